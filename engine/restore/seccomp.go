package restore

import (
	"fmt"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"

	"godwit/engine/image"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// chains checks the seccomp filters of the images and gives each thread its own.
func (m *model) chains(set *image.Set) error {
	entries, err := image.All[*seccomp.SeccompEntry](set, image.SeccompFile)
	if err != nil {
		return err
	}
	all := &seccomp.SeccompEntry{}
	for _, e := range entries {
		all.SeccompFilters = append(all.SeccompFilters, e.GetSeccompFilters()...)
	}
	for _, p := range m.procs {
		for _, th := range p.threads {
			tc := th.core.GetThreadCore()
			if p.zombie || tc.GetSeccompMode() != criu_core.SeccompMode_filter {
				continue
			}
			if tc.SeccompFilter == nil {
				return fmt.Errorf("images of task %d: it has a seccomp filter that is not in them", th.vtid)
			}
			if th.filters, err = task.Chain(all, tc.GetSeccompFilter()); err != nil {
				return fmt.Errorf("images of task %d: %w", th.vtid, err)
			}
		}
	}
	return nil
}

// seccomp puts the threads of a process under seccomp. What follows is not
// subject to it as long as we trace them. The filters that all threads have are
// shared by them again, as a later SECCOMP_FILTER_FLAG_TSYNC of the program wants it.
// Preconditions: the threads have all their privileges.
func (t *Tree) seccomp(p *process) error {
	shared := len(p.leader().filters)
	for _, th := range p.threads {
		n := 0
		for n < min(shared, len(th.filters)) && th.filters[n] == p.leader().filters[n] {
			n++
		}
		shared = n
		if th.core.GetThreadCore().GetSeccompMode() == criu_core.SeccompMode_disabled {
			continue
		}
		if err := sys.PtraceSetOptions(th.remote.Tid, sessionOptions|sys.PtraceOptionSuspendSeccomp); err != nil {
			return fmt.Errorf("suspend seccomp of task %d: %w", th.vtid, err)
		}
	}
	for i, th := range p.threads {
		var calls []*ptrace.Call
		for n, f := range th.filters {
			if n >= shared || i == 0 {
				calls = append(calls, task.FilterCall(f, n < shared && len(p.threads) > 1))
			}
		}
		if th.core.GetThreadCore().GetSeccompMode() == criu_core.SeccompMode_strict {
			calls = append(calls, task.StrictCall())
		}
		if len(calls) == 0 {
			continue
		}
		if err := th.remote.Run(calls...); err != nil {
			return err
		}
	}
	return nil
}
