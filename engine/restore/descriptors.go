package restore

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/ptrace"
)

// place sets the program, root and working directory of a process. It comes after
// all data: a program whose file was deleted cannot be set while that file is
// still being written.
func (t *Tree) place(p *process) error {
	dirs, err := t.directories(p)
	if err != nil {
		return err
	}
	exe, err := t.files.File(p.mm.GetExeFileId())
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	nums, err := t.ch.give(p.remote(), append([]*os.File{exe}, dirs...))
	if err != nil {
		return err
	}
	calls := []*ptrace.Call{mmMap(p, nums[0])}
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	if len(nums) == 3 {
		add("enter root directory", unix.SYS_FCHDIR, ptrace.Int(nums[2]))
		add("change root directory", unix.SYS_CHROOT, ptrace.Str("."))
	}
	add("enter working directory", unix.SYS_FCHDIR, ptrace.Int(nums[1]))
	for _, n := range nums {
		add("close", unix.SYS_CLOSE, ptrace.Int(n))
	}
	return p.remote().Run(calls...)
}

// descriptors fills the descriptor table of a process, and of those that share it.
func (t *Tree) descriptors(p *process) error {
	r := p.remote()
	list, err := t.files.Descriptors(p.filesID)
	if err != nil {
		return err
	}
	// New descriptors arrive at the lowest free numbers and are moved above all
	// that are wanted, before those are filled.
	high := t.ch.fd
	for _, d := range list {
		high = max(high, d.FD)
	}
	high++
	var calls []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	moved := make([]int, 0, len(list))
	for start := 0; start < len(list); start += maxRights {
		part := list[start:min(start+maxRights, len(list))]
		fs := make([]*os.File, len(part))
		for i, d := range part {
			fs[i] = d.File
		}
		nums, err := t.ch.give(r, fs)
		if err != nil {
			return err
		}
		dups := make([]*ptrace.Call, len(nums))
		for i, n := range nums {
			dups[i] = ptrace.NewCall(fmt.Sprintf("move descriptor for fd %d", part[i].FD), unix.SYS_FCNTL, ptrace.Int(n), ptrace.Int(unix.F_DUPFD_CLOEXEC), ptrace.Int(high))
		}
		closes := make([]*ptrace.Call, len(nums))
		for i, n := range nums {
			closes[i] = ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(n))
		}
		if err := r.Run(append(dups, closes...)...); err != nil {
			return err
		}
		for _, d := range dups {
			moved = append(moved, int(d.Ret))
		}
	}
	add("close descriptors of the stub", unix.SYS_CLOSE_RANGE, ptrace.Int(0), ptrace.Int(high-1), ptrace.Int(0))
	for i, d := range list {
		flags := 0
		if d.Cloexec {
			flags = unix.O_CLOEXEC
		}
		add(fmt.Sprintf("place fd %d", d.FD), unix.SYS_DUP3, ptrace.Int(moved[i]), ptrace.Int(d.FD), ptrace.Int(flags))
	}
	add("close moved descriptors", unix.SYS_CLOSE_RANGE, ptrace.Int(high), ptrace.Int(^uint32(0)), ptrace.Int(0))
	return r.Run(calls...)
}

// directories gives the working directory of a process and, if it is not the
// one that new processes have anyway, its root directory.
func (t *Tree) directories(p *process) ([]*os.File, error) {
	cwd, err := t.files.File(p.fs.GetCwdId())
	if err != nil {
		return nil, fmt.Errorf("working directory: %w", err)
	}
	root, err := t.files.File(p.fs.GetRootId())
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	st, err := root.Stat()
	if err != nil {
		return nil, err
	}
	here, err := os.Stat(fmt.Sprintf("/proc/%d/root/", t.root))
	if err != nil {
		return nil, err
	}
	if os.SameFile(st, here) {
		return []*os.File{cwd}, nil
	}
	return []*os.File{cwd, root}, nil
}
