package restore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/files"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// takeTerminal gives a process that has just begun its session the session's
// controlling terminal. Its children of that session inherit it, those that were
// born before do not.
func (t *Tree) takeTerminal(p *process) error {
	s := t.files.Session(p.vpid)
	if s == nil || p.zombie {
		return nil
	}
	r := p.remote()
	nums, err := t.ch.give(r, []*os.File{s.Terminal})
	if err != nil {
		return err
	}
	calls := s.Calls(nums[0])
	if err := r.Run(calls...); err != nil {
		return err
	}
	opened, err := s.Take(r.Tid, calls)
	var closes []*ptrace.Call
	for _, fd := range append(opened, nums...) {
		closes = append(closes, ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(fd)))
	}
	return errors.Join(err, r.Run(closes...))
}

// foreground makes process groups those in the foreground of their terminals, and
// has processes give up a terminal that they had given up.
func (t *Tree) foreground() error {
	for _, f := range t.files.Foregrounds() {
		if err := t.front(f); err != nil {
			return fmt.Errorf("terminal of session %d: %w", f.Sid, err)
		}
		for _, pid := range f.Without {
			if p := t.model.byPid[pid]; p != nil && !p.zombie && p.curSid == f.Sid {
				if err := t.withTerminal(p.remote(), f.Terminal, "give up the terminal", ptrace.Int(unix.TIOCNOTTY)); err != nil {
					return fmt.Errorf("%s: %w", p, err)
				}
			}
		}
	}
	return nil
}

func (t *Tree) front(f files.Foreground) error {
	leader := t.model.byPid[f.Sid]
	switch {
	case leader != nil && (leader.zombie || leader.sid != leader.vpid):
		return nil
	case leader == nil && !f.Lent:
		return fmt.Errorf("the images have a terminal of it, but not process %d that leads it", f.Sid)
	case leader == nil:
		// The session is that of this process, the terminal perhaps another's.
		leader = t.model.procs[0]
		if st, err := procfs.ReadStat(t.root); err != nil || leader.curSid != f.Sid || st.TTYNr == 0 {
			return nil
		}
	}
	who, group := leader.remote(), f.Pgrp
	var helper *ptrace.Remote
	members := 0
	for _, p := range t.model.procs {
		if p.pgid == group && p.curSid == leader.curSid {
			members++
		}
	}
	switch {
	case group == 0:
		return nil
	case members == 0 && (f.Lent || t.model.ids[group]):
		return nil // of processes outside of the tree
	case members == 0:
		// All of it have ended, as those of a shell's last command.
		var err error
		if helper, err = t.clone(who, 0, uint64(unix.SIGCHLD), group); err != nil {
			return fmt.Errorf("begin process group %d: %w", group, err)
		}
		if err := helper.Run(ptrace.NewCall("begin a process group", unix.SYS_SETPGID, ptrace.Int(0), ptrace.Int(0))); err != nil {
			return err
		}
		who = helper
	case t.model.byPid[group] == nil && inStubGroup(t, leader, group):
		group = 0
	}
	err := t.setForeground(who, f.Terminal, group)
	if helper != nil {
		err = errors.Join(err, t.endHelper(leader, helper))
	}
	if f.Resized {
		if n, gerr := unix.IoctlGetInt(int(f.Terminal.Fd()), unix.TIOCGPGRP); gerr == nil && n > 0 {
			t.resized = n
		}
	}
	return err
}

// inStubGroup says whether a group of the tree, whose leader was outside, is that
// of the stub now.
func inStubGroup(t *Tree, leader *process, group int) bool {
	root := t.model.procs[0]
	return leader == root && root.pgid == group && !inGroup(root)
}

// setForeground executes tcsetpgrp(3) in a task of the session; group 0 is its own.
// All its signals are blocked, so that it is not stopped for it (SIGTTOU).
func (t *Tree) setForeground(r *ptrace.Remote, tty *os.File, group int) error {
	if group == 0 {
		get := ptrace.NewCall("ask for its process group", unix.SYS_GETPGID, ptrace.Int(0))
		if err := r.Run(get); err != nil {
			return err
		}
		group = int(get.Ret)
	}
	return t.withTerminal(r, tty, fmt.Sprintf("put process group %d in the foreground", group), ptrace.Int(unix.TIOCSPGRP),
		ptrace.Bytes(binary.LittleEndian.AppendUint32(nil, uint32(group))))
}

// withTerminal executes an ioctl(2) on a terminal in a task of the tree.
func (t *Tree) withTerminal(r *ptrace.Remote, tty *os.File, what string, args ...ptrace.Arg) error {
	nums, err := t.ch.give(r, []*os.File{tty})
	if err != nil {
		return err
	}
	err = r.Run(ptrace.NewCall(what, unix.SYS_IOCTL, append([]ptrace.Arg{ptrace.Int(nums[0])}, args...)...))
	return errors.Join(err, r.Run(ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(nums[0]))))
}
