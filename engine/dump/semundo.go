package dump

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/files"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// undoer is a thread with a list of adjustments: by how much semaphores are put
// back when its process ends (SEM_UNDO). Threads that were made together have
// one list, which need not hold anything: pthread_create makes it, and it stays
// when all other threads have ended or another program is executed.
type undoer struct {
	p   *process
	tid int
}

// findUndo looks for lists of adjustments. Only their owners, when they are
// frozen, can tell what is in them.
func (c *collector) findUndo(sets []procfs.SysVObject) error {
	if c.running || len(sets) == 0 {
		return nil
	}
	c.semaphores = sets
	return files.WithStillborn(func(none int) error {
		for _, p := range c.procs {
			if p.zombie {
				continue
			}
			tids, err := undoLists(none, p.tids)
			if err != nil {
				return fmt.Errorf("look for semaphore adjustments of pid %d: %w", p.pid, err)
			}
			for _, tid := range tids {
				c.undoers = append(c.undoers, undoer{p, tid})
			}
		}
		return nil
	})
}

// undoLists gives one of the threads for each list that they have; none is a task
// without.
func undoLists(none int, tids []int) (with []int, err error) {
	for _, tid := range tids {
		same := false
		for _, other := range append([]int{none}, with...) {
			ord, err := sys.KcmpTask(other, tid, sys.KcmpSysVSem)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return nil, err
			}
			same = same || err != nil || ord == sys.Equal
		}
		if !same {
			with = append(with, tid)
		}
	}
	return with, nil
}

// adjustments refuses processes that have semaphores to put back when they end.
func (c *collector) adjustments() error {
	for _, u := range c.undoers {
		err := c.withTask(u.p, u.tid, func(b *ptrace.Borrowed) error {
			for _, set := range c.semaphores {
				n, err := c.held(b, u.p, set)
				if err != nil {
					return err
				}
				if n >= 0 {
					c.refuse(u.p, "", fmt.Sprintf("changes semaphore %d of System V set %d (key %#x) back when it ends (SEM_UNDO), which cannot be carried", n, set.ID, uint32(set.Key)),
						"let it release the semaphore, or use it without SEM_UNDO")
					return nil
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("look for semaphore adjustments of pid %d (%s): %w", u.p.pid, u.p.comm, err)
		}
	}
	return nil
}

const (
	semUndo = 0x1000 // SEM_UNDO (include/uapi/linux/sem.h)
	// semMax is SEMVMX and SEMAEM: the most that a semaphore can be, and the most
	// that it can be adjusted by; the least is one below its negative.
	semMax = 32767
	// undoGroup is how many semaphores are looked at by one call; a call may have
	// 32 operations or more (SEMOPM).
	undoGroup = 3
	undoTries = 100
)

// held gives the first semaphore of a set for which a borrowed thread has an
// adjustment, -1 if there is none.
func (c *collector) held(b *ptrace.Borrowed, p *process, set procfs.SysVObject) (int, error) {
	for range undoTries {
		values, err := sys.SemValues(set.ID, int(set.Size))
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIDRM) {
			return -1, nil // removed
		}
		if err != nil {
			return 0, err
		}
		n, err := c.probe(b, set.ID, values)
		if errors.Is(err, unix.EACCES) {
			// Whoever may not use a set has hardly used it.
			return slices.Index(users(set), p.pid), nil
		}
		if !errors.Is(err, errMoves) {
			return n, err
		}
	}
	return 0, fmt.Errorf("semaphores %d of System V: %w", set.ID, errMoves)
}

// users are the processes that changed the semaphores of a set last.
func users(set procfs.SysVObject) []int {
	out := make([]int, set.Size)
	for i := range out {
		out[i], _ = sys.SemPid(set.ID, i) // 0 if it was removed meanwhile
	}
	return out
}

// errMoves says that semaphores were changed while they were looked at.
var errMoves = errors.New("others change them all the time")

// probe has a borrowed thread tell for which semaphore of a set it has an adjustment.
func (c *collector) probe(b *ptrace.Borrowed, id int, values []uint16) (int, error) {
	var calls []*ptrace.Call
	for at := 0; at < len(values); at += undoGroup {
		group := values[at:min(at+undoGroup, len(values))]
		for _, ops := range [][]sembuf{undoProbe(at, group), valueProbe(at, group)} {
			call := ptrace.NewCall(fmt.Sprintf("look at System V semaphores %d", id), unix.SYS_SEMOP, ptrace.Int(id), ptrace.Bytes(encodeOps(ops)), ptrace.Int(len(ops)))
			call.MayFail = true
			calls = append(calls, call)
		}
	}
	if err := c.frozen.Tracer.Do(func() error { return b.Run(calls...) }); err != nil {
		return 0, err
	}
	for i := 0; i < len(calls); i += 2 {
		free, err := judge(unix.Errno(-calls[i].Ret), unix.Errno(-calls[i+1].Ret))
		if err != nil {
			return 0, err
		}
		if !free {
			return i / 2 * undoGroup, nil
		}
	}
	return -1, nil
}

// judge tells from the errors of undoProbe and of valueProbe after it whether there
// is no adjustment.
func judge(undo, value unix.Errno) (free bool, err error) {
	switch {
	case undo == unix.ERANGE:
		return false, nil
	case undo == unix.EAGAIN && value == unix.ERANGE:
		return true, nil
	case undo == unix.EAGAIN && value == unix.EAGAIN:
		return false, errMoves
	case undo == unix.EIDRM || undo == unix.EINVAL || value == unix.EIDRM || value == unix.EINVAL:
		return true, nil // removed
	}
	return false, undo
}

// sembuf is struct sembuf (semop(2)).
type sembuf struct {
	num uint16
	op  int16
	flg int16
}

func encodeOps(ops []sembuf) []byte {
	var b []byte
	for _, o := range ops {
		b = binary.LittleEndian.AppendUint16(b, o.num)
		b = binary.LittleEndian.AppendUint16(b, uint16(o.op))
		b = binary.LittleEndian.AppendUint16(b, uint16(o.flg))
	}
	return b
}

// fromZero are operations that go on only if semaphores first, first+1, … have
// these values, and then as if those were 0.
func fromZero(first int, values []uint16) (ops []sembuf) {
	for i, v := range values {
		if v > 0 {
			ops = append(ops, sembuf{uint16(first + i), -int16(v), unix.IPC_NOWAIT})
		}
		ops = append(ops, sembuf{uint16(first + i), 0, unix.IPC_NOWAIT})
	}
	return ops
}

// undoProbe are operations that all fail together, so that nothing is changed:
// with ERANGE if the caller has an adjustment for one of these semaphores,
// because they take each to the ends of its range, and with EAGAIN otherwise.
func undoProbe(first int, values []uint16) []sembuf {
	ops := fromZero(first, values)
	for i := range values {
		n := uint16(first + i)
		for _, o := range []struct {
			by   int16
			undo bool
		}{
			{semMax, false}, {-semMax, true}, // adjusted by semMax more
			{semMax, true}, {-semMax, false}, {semMax, true}, {-semMax, false}, {1, true}, {-1, false}, // by semMax + 1 less
		} {
			flg := int16(unix.IPC_NOWAIT)
			if o.undo {
				flg |= semUndo
			}
			ops = append(ops, sembuf{n, o.by, flg})
		}
	}
	return append(ops, sembuf{uint16(first), -1, unix.IPC_NOWAIT})
}

// valueProbe are operations that fail with ERANGE if the semaphores have these
// values, with EAGAIN otherwise.
func valueProbe(first int, values []uint16) []sembuf {
	return append(fromZero(first, values), sembuf{uint16(first), semMax, unix.IPC_NOWAIT}, sembuf{uint16(first), 1, unix.IPC_NOWAIT})
}
