package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/files"
	"godwit/engine/ns"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// actor is a process in which the restorer of files executes system calls, on the
// tracer's thread. Its descriptors are those of the stub.
type actor struct {
	t *Tree
	r *ptrace.Remote
}

func (a actor) Pid() int { return a.r.Tid }

func (a actor) Give(fs []*os.File) (nums []int, err error) {
	err = a.t.tracer.Do(func() error {
		nums, err = a.t.ch.give(a.r, fs)
		return err
	})
	return nums, err
}

func (a actor) Run(calls ...*ptrace.Call) error {
	return a.t.tracer.Do(func() error { return a.r.Run(calls...) })
}

func (a actor) Self() (uid, gid uint32, groups []uint32, err error) {
	st, err := procfs.ReadStatus(a.r.Tid)
	if err != nil {
		return 0, 0, nil, err
	}
	for _, r := range a.t.extras {
		if r == a.r { // it is not in the namespaces of the tree
			return st.Uid[1], st.Gid[1], st.Groups, nil
		}
	}
	st = a.t.users.Map().Inside(st)
	return st.Uid[1], st.Gid[1], st.Groups, nil
}

// actor finds the process that has a pid in the images. For one that is not in
// the tree a process is made, which ends when the files are open; 0 is any.
func (t *Tree) actor(pid int) (files.Actor, error) {
	if p := t.model.byPid[pid]; p != nil {
		return actor{t, p.remote()}, nil
	}
	if r := t.extras[pid]; r != nil {
		return actor{t, r}, nil
	}
	flags, exitSignal := uint64(unix.CLONE_PARENT), uint64(0)
	if t.o.NewPidNamespace {
		flags, exitSignal = 0, uint64(unix.SIGCHLD)
	}
	err := t.tracer.Do(func() error {
		if t.model.ids[pid] {
			return fmt.Errorf("pid %d is that of a thread in the tree", pid)
		}
		r, err := t.clone(t.stub.remote, flags, exitSignal, pid)
		if err != nil {
			return err
		}
		t.extras[pid] = r
		return nil
	})
	return actor{t, t.extras[pid]}, err
}

// openUnix makes the unix sockets. All processes are there, to act.
func (t *Tree) openUnix() error {
	err := ns.Do(t.root, t.model.own.Own&ns.Net, t.files.OpenUnix)
	t.paths = t.files.Made()
	return errors.Join(err, t.endExtras())
}

// endExtras ends the processes that were made only to act.
func (t *Tree) endExtras() error {
	return t.tracer.Do(func() error {
		for pid, r := range t.extras {
			if err := unix.Kill(r.Tid, unix.SIGKILL); err != nil {
				return os.NewSyscallError("kill", err)
			}
			if err := reap(r.Tid); err != nil {
				return err
			}
			t.forget(r.Tid)
			delete(t.extras, pid)
			if !t.o.NewPidNamespace {
				continue
			}
			wait := ptrace.NewCall("reap a helper", unix.SYS_WAIT4, ptrace.Int(-1), ptrace.Int(0), ptrace.Int(unix.WALL|unix.WNOHANG), ptrace.Int(0))
			if err := t.stub.remote.Run(wait); err != nil {
				return err
			}
		}
		return nil
	})
}
