package restore

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// SelfTest makes a process with a chosen pid out of a stub, as every restore
// does, reads its rseq registration, and ends both.
func SelfTest() (err error) {
	t := &Tree{model: &model{}, tracer: ptrace.NewTracer()}
	defer func() { err = errors.Join(err, t.Discard()) }()
	if t.ch, err = newChannel(); err != nil {
		return err
	}
	return t.tracer.Do(func() error {
		if err := t.sow(); err != nil {
			return err
		}
		for pid := 300; pid < 32768; pid++ {
			if unix.Kill(pid, 0) != unix.ESRCH {
				continue
			}
			r, err := t.clone(t.stub.remote, unix.CLONE_PARENT, 0, pid)
			if errors.Is(err, unix.EEXIST) {
				continue // the number of a group or session
			}
			if err != nil {
				return err
			}
			_, err = sys.PtraceRseqConfig(r.Tid)
			return err
		}
		return fmt.Errorf("no pid is free: %w", unix.EAGAIN)
	})
}
