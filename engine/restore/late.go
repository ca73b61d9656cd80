package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/paging"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// postpone lets memory come later that is in no data (Facts.Late): whoever misses a page of it
// waits from now on, the calls that are executed in the process included, until it is
// served. All that is there already is there to stay.
func (t *Tree) postpone(set *image.Set) (err error) {
	if set.Facts == nil || len(set.Facts.Late) == 0 {
		return nil
	}
	if t.o.Paging == nil {
		return errors.New("images are of a tree whose memory comes when it runs already, which only a migration can do")
	}
	var spaces []paging.Space
	defer func() {
		if err != nil {
			for _, s := range spaces {
				err = errors.Join(err, s.Close())
			}
		}
	}()
	for _, pid := range set.Facts.Late {
		p := t.model.byPid[int(pid)]
		if p == nil || p.zombie {
			return fmt.Errorf("memory of pid %d is to come later, which is not among the processes", pid)
		}
		s := paging.Space{Pid: pid, Host: p.remote().Tid}
		if err := t.tracer.Do(func() error { return t.leave(p, &s) }); err != nil {
			return fmt.Errorf("let the memory of %s come later: %w", p, err)
		}
		spaces = append(spaces, s)
	}
	err = t.o.Paging(spaces)
	if err == nil {
		t.log.Debug("memory comes later", "processes", len(spaces))
	}
	return err
}

// leave makes a userfaultfd in a process for what it misses, and takes it out of it.
// Preconditions: on the tracer's thread.
func (t *Tree) leave(p *process, s *paging.Space) (err error) {
	for _, v := range p.vmas {
		if v.Late() {
			s.Ranges = append(s.Ranges, image.Range{Start: v.Start, End: v.End})
		}
	}
	// What it has of its parent there is not its own.
	if err := t.filled(p); err != nil {
		return err
	}
	r := p.remote()
	fd, err := r.Extract(ptrace.NewCall("make a userfaultfd", unix.SYS_USERFAULTFD, ptrace.Int(unix.O_CLOEXEC|unix.O_NONBLOCK)))
	if err != nil {
		return err
	}
	// Only then can it be waited for.
	err = sys.UffdServe(fd)
	s.Uffd = os.NewFile(uintptr(fd), "userfaultfd")
	pagemap, perr := os.Open(procfs.Path(r.Tid, "pagemap"))
	if err = errors.Join(err, perr); err != nil {
		return errors.Join(err, s.Uffd.Close(), pagemap.Close())
	}
	s.Pagemap = pagemap
	for i := 0; err == nil && i < len(s.Ranges); i++ {
		err = sys.UffdMissing(fd, s.Ranges[i].Start, s.Ranges[i].End)
	}
	if err != nil {
		err = errors.Join(err, s.Close())
	}
	return err
}
