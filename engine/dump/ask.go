package dump

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"godwit/engine/arch"
	"godwit/engine/freeze"
	"godwit/engine/mem"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// ask finds out what only tasks of a frozen tree can tell, and refuses what
// cannot be carried of it. Nobody notices that they were asked.
func (c *collector) ask() error {
	if err := c.keys(); err != nil {
		return err
	}
	if err := c.sandboxes(); err != nil {
		return err
	}
	if err := c.adjustments(); err != nil {
		return err
	}
	return c.rings()
}

// keys refuses threads with rights to memory with protection keys: of the keys
// that a program has allocated (pkey_alloc) nothing else tells.
func (c *collector) keys() error {
	if !arch.HasKeys() {
		return nil
	}
	return c.frozen.Tracer.Do(func() error {
		for i, fp := range c.frozen.Procs {
			for _, th := range fp.Threads {
				xstate := make([]byte, arch.MaxXState)
				n, err := sys.PtraceGetRegSet(th.Tid, sys.NTX86Xstate, xstate)
				if err != nil {
					return fmt.Errorf("read extended state of task %d: %w", th.Tid, err)
				}
				if keys := arch.KeyRights(xstate[:n]); keys != arch.KeysDefault {
					c.refuse(c.procs[i], "", fmt.Sprintf("thread %d has rights to memory with protection keys (PKRU %#x), which cannot be carried", th.Tid, keys),
						"let the program free its keys (pkey_free) and take the rights away (pkey_set)")
				}
			}
		}
		return nil
	})
}

// withTask runs f, outside of the tracer's thread, with a thread that is borrowed meanwhile.
func (c *collector) withTask(p *process, tid int, f func(*ptrace.Borrowed) error) error {
	fp := c.frozen.Procs[slices.Index(c.procs, p)]
	i := slices.IndexFunc(fp.Threads, func(th *freeze.Thread) bool { return th.Tid == tid })
	if i < 0 {
		return fmt.Errorf("task %d is not among those that were stopped", tid)
	}
	th := fp.Threads[i]
	var b *ptrace.Borrowed
	err := c.frozen.Tracer.Do(func() (err error) {
		b, err = c.borrow(fp, p, th, 0)
		return err
	})
	if err != nil {
		return err
	}
	err = f(b)
	return errors.Join(err, c.frozen.Tracer.Do(func() error {
		err := b.Return(false)
		th.Resend = th.Resend || b.Stopped
		return err
	}))
}

// errIdle says that no request of asynchronous I/O is under way, after files had
// been looked at that one of them may just have changed.
var errIdle = errors.New("requests of asynchronous I/O have ended")

// ringPatience is how long requests of asynchronous I/O may take to end in a frozen tree.
const ringPatience = 200 * time.Millisecond

// rings waits until no request of asynchronous I/O is under way and refuses
// those that do not end.
func (c *collector) rings() error {
	if c.idle {
		return nil
	}
	found := false
	for _, p := range c.procs {
		for _, v := range p.vmas {
			if !v.Is(mem.AioRing) {
				continue
			}
			found = true
			if err := c.ring(p, v); err != nil {
				return fmt.Errorf("look at %s of pid %d (%s): %w", v, p.pid, p.comm, err)
			}
		}
	}
	if found && len(c.refusal.Problems) == 0 {
		return errIdle
	}
	return nil
}

func (c *collector) ring(p *process, v *mem.VMA) error {
	return c.withTask(p, p.pid, func(b *ptrace.Borrowed) error {
		for until := time.Now().Add(ringPatience); ; time.Sleep(2 * time.Millisecond) {
			var busy uint32
			err := c.frozen.Tracer.Do(func() (err error) {
				busy, err = mem.RingBusy(&b.Remote, v)
				return err
			})
			switch {
			case errors.Is(err, mem.ErrStaleRing):
				c.refuse(p, v.String(), "is a ring of asynchronous I/O (io_setup) that belongs to no context of this process, as after a fork, and cannot be carried", "let the program unmap it (munmap)")
				return nil
			case err != nil || busy == 0:
				return err
			case time.Now().After(until):
				c.refuse(p, v.String(), fmt.Sprintf("is a ring of asynchronous I/O (io_setup) with %d requests under way, which cannot be carried", busy),
					"wait until they are done; those for poll may have to be cancelled (io_cancel)")
				return nil
			}
		}
	})
}
