package dump

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// landlockLayers is how many times a thread can confine itself
// (LANDLOCK_MAX_NUM_LAYERS, security/landlock/limits.h).
const landlockLayers = 16

// sandboxes refuses processes that Landlock confines: nothing reads their rules, and
// without them they would come back free. Only those are asked that have given up
// new privileges, as everybody does who is about to confine himself.
func (c *collector) sandboxes() error {
	if !sys.HasLandlock() {
		return nil
	}
	for _, p := range c.procs {
		if p.zombie || !p.status.NoNewPrivs {
			continue
		}
		confined := false
		err := c.withTask(p, p.pid, func(b *ptrace.Borrowed) error {
			return c.frozen.Tracer.Do(func() (err error) {
				confined, err = landlocked(b, p.status.Seccomp != 0)
				return err
			})
		})
		if errors.Is(err, unix.EAGAIN) {
			c.refuse(p, "", "may make no more threads (RLIMIT_NPROC, pids.max), so that it cannot tell whether Landlock confines it", "raise the limit")
			continue
		}
		if err != nil {
			return fmt.Errorf("find out whether pid %d (%s) is confined by Landlock: %w", p.pid, p.comm, err)
		}
		if confined {
			c.refuse(p, "", "is confined by Landlock, whose rules cannot be read", "run it without its sandbox, or confine it by other means")
		}
	}
	return nil
}

// landlocked finds out whether a borrowed thread is confined: by one more thread,
// which confines itself as often as the kernel lets it, and ends.
// Preconditions: on the tracer's thread.
func landlocked(b *ptrace.Borrowed, seccomp bool) (confined bool, err error) {
	options := sys.PtraceOptionTraceSysGood
	if seccomp {
		options |= sys.PtraceOptionSuspendSeccomp
	}
	if err := sys.PtraceSetOptions(b.Tid, options|unix.PTRACE_O_TRACECLONE); err != nil {
		return false, err
	}
	const flags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD
	args := make([]byte, 88) // struct clone_args (include/uapi/linux/sched.h)
	binary.LittleEndian.PutUint64(args, flags)
	err = b.Run(ptrace.NewCall("make a thread", unix.SYS_CLONE3, ptrace.Bytes(args), ptrace.Int(len(args))))
	err = errors.Join(err, sys.PtraceSetOptions(b.Tid, options))
	if err != nil || len(b.Born) == 0 {
		return false, errors.Join(err, errors.New("no thread was made"))
	}
	r := ptrace.Remote{Tid: b.Born[0], Insn: b.Insn, Area: b.Area}
	layers, err := layersLeft(&r)
	gone := r.Run(ptrace.NewCall("end the thread", unix.SYS_EXIT, ptrace.Int(0)))
	if !errors.Is(gone, ptrace.ErrGone) {
		err = errors.Join(err, gone, errors.New("the thread did not end"))
	}
	return layers < landlockLayers, err
}

// layersLeft confines a new thread as often as possible and says how often that was.
func layersLeft(r *ptrace.Remote) (n int, err error) {
	if r.Base, err = ptrace.GetRegs(r.Tid); err != nil {
		return 0, err
	}
	if _, err := ptrace.BlockSignals(r.Tid); err != nil {
		return 0, err
	}
	// Rules about nothing but the making of block devices.
	rules := ptrace.NewCall("make a set of rules", unix.SYS_LANDLOCK_CREATE_RULESET,
		ptrace.Bytes(binary.LittleEndian.AppendUint64(nil, unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK)), ptrace.Int(8), ptrace.Int(0))
	if err := r.Run(ptrace.NewCall("give up new privileges", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_NO_NEW_PRIVS), ptrace.Int(1), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0)), rules); err != nil {
		return 0, err
	}
	var calls []*ptrace.Call
	for range landlockLayers {
		c := ptrace.NewCall("confine the thread", unix.SYS_LANDLOCK_RESTRICT_SELF, ptrace.Int(rules.Ret), ptrace.Int(0))
		c.MayFail = true
		calls = append(calls, c)
	}
	if err := r.Run(append(calls, ptrace.NewCall("close the set of rules", unix.SYS_CLOSE, ptrace.Int(rules.Ret)))...); err != nil {
		return 0, err
	}
	for _, c := range calls {
		switch {
		case c.Ret == 0:
			n++
		case c.Ret != -int64(unix.E2BIG):
			return n, ptrace.Errno("landlock_restrict_self", c.Ret)
		}
	}
	return n, nil
}
