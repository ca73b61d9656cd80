package restore

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/files"
	"godwit/engine/ptrace"
)

// place sets the program, root and working directory of a process. It comes after
// all data: a program whose file was deleted cannot be set while that file is
// still being written.
func (t *Tree) place(p *process) error {
	for _, th := range p.threads[1:] {
		if th.facts != nil && th.facts.FS != nil {
			if err := t.placeThread(th); err != nil {
				return fmt.Errorf("thread %d: %w", th.vtid, err)
			}
		}
	}
	dirs, err := t.directories(p.remote().Tid, p.fs.GetCwdId(), p.fs.GetRootId())
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
	calls := append([]*ptrace.Call{mmMap(p, nums[0])}, enter(nums[1:])...)
	calls = append(calls, ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(nums[0])))
	return p.remote().Run(calls...)
}

// placeThread gives a thread directories and an umask of its own.
func (t *Tree) placeThread(th *thread) error {
	if err := th.remote.Run(ptrace.NewCall("have directories of its own", unix.SYS_UNSHARE, ptrace.Int(unix.CLONE_FS))); err != nil {
		return err
	}
	dirs, err := t.directories(th.remote.Tid, th.facts.FS.Cwd, th.facts.FS.Root)
	if err != nil {
		return err
	}
	nums, err := t.ch.give(th.remote, dirs)
	if err != nil {
		return err
	}
	return th.remote.Run(append(enter(nums), ptrace.NewCall("set umask", unix.SYS_UMASK, ptrace.Int(th.facts.FS.Umask)))...)
}

// enter makes the calls that go to a working directory and, if there are two, to a
// root directory, and close both.
func enter(nums []int) (calls []*ptrace.Call) {
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	if len(nums) == 2 {
		add("enter root directory", unix.SYS_FCHDIR, ptrace.Int(nums[1]))
		add("change root directory", unix.SYS_CHROOT, ptrace.Str("."))
	}
	add("enter working directory", unix.SYS_FCHDIR, ptrace.Int(nums[0]))
	for _, n := range nums {
		add("close", unix.SYS_CLOSE, ptrace.Int(n))
	}
	return calls
}

// numbers gives the first descriptor above all that a process will have, and whether
// there is room above for as many again.
func (t *Tree) numbers(p *process) (list []files.Descriptor, above int, room bool, err error) {
	list = t.files.Descriptors(p.filesID)
	high := t.ch.fd
	for _, d := range list {
		high = max(high, d.FD)
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, 0, false, os.NewSyscallError("getrlimit", err)
	}
	// The new processes have the same limit.
	return list, high + 1, uint64(high)+uint64(len(list))+maxRights < lim.Max, nil
}

// widen makes the descriptor table of a process as large as it will be. Once threads
// share it the kernel waits for all of its processors before it does that
// (expand_fdtable, fs/file.c), some 10 ms.
func (t *Tree) widen(p *process) error {
	list, above, room, err := t.numbers(p)
	if err != nil || !room {
		return err
	}
	c := ptrace.NewCall("widen the descriptor table", unix.SYS_FCNTL, ptrace.Int(t.ch.fd), ptrace.Int(unix.F_DUPFD_CLOEXEC), ptrace.Int(above+len(list)))
	if err := p.remote().Run(c); err != nil {
		return err
	}
	return p.remote().Run(closeCall(int(c.Ret)))
}

// descriptors fills the descriptor table of a process, and of those that share it.
func (t *Tree) descriptors(p *process) error {
	list, above, room, err := t.numbers(p)
	if err != nil {
		return err
	}
	fill := t.placeFromAbove
	if !room {
		fill = t.placeFromBelow
	}
	if err := fill(p, list, above); err != nil {
		return err
	}
	t.files.Placed(p.filesID, p.remote().Tid, list)
	return nil
}

func closeCall(n int) *ptrace.Call { return ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(n)) }

func placeCall(from int, d files.Descriptor) *ptrace.Call {
	flags := 0
	if d.Cloexec {
		flags = unix.O_CLOEXEC
	}
	return ptrace.NewCall(fmt.Sprintf("place fd %d", d.FD), unix.SYS_DUP3, ptrace.Int(from), ptrace.Int(d.FD), ptrace.Int(flags))
}

// send gives a process the files of some descriptors, under any numbers.
func (t *Tree) send(p *process, part []files.Descriptor) ([]int, error) {
	fs, err := t.files.Hold(p.filesID, part)
	if err != nil {
		return nil, err
	}
	nums, err := t.ch.give(p.remote(), fs)
	t.files.Let(p.filesID, part)
	return nums, err
}

// placeFromAbove has new descriptors, which arrive at the lowest free numbers,
// moved to high and above, where none is wanted, before those are filled.
func (t *Tree) placeFromAbove(p *process, list []files.Descriptor, high int) error {
	r := p.remote()
	moved := make([]int, 0, len(list))
	for start := 0; start < len(list); start += maxRights {
		part := list[start:min(start+maxRights, len(list))]
		nums, err := t.send(p, part)
		if err != nil {
			return err
		}
		dups := make([]*ptrace.Call, len(nums))
		closes := make([]*ptrace.Call, len(nums))
		for i, n := range nums {
			dups[i] = ptrace.NewCall(fmt.Sprintf("move descriptor for fd %d", part[i].FD), unix.SYS_FCNTL, ptrace.Int(n), ptrace.Int(unix.F_DUPFD_CLOEXEC), ptrace.Int(high))
			closes[i] = closeCall(n)
		}
		if err := r.Run(append(dups, closes...)...); err != nil {
			return err
		}
		for _, d := range dups {
			moved = append(moved, int(d.Ret))
		}
	}
	calls := []*ptrace.Call{ptrace.NewCall("close descriptors of the stub", unix.SYS_CLOSE_RANGE, ptrace.Int(0), ptrace.Int(high-1), ptrace.Int(0))}
	for i, d := range list {
		calls = append(calls, placeCall(moved[i], d))
	}
	calls = append(calls, ptrace.NewCall("close moved descriptors", unix.SYS_CLOSE_RANGE, ptrace.Int(high), ptrace.Int(^uint32(0)), ptrace.Int(0)))
	return r.Run(calls...)
}

// placeFromBelow is for a process that has more than half as many descriptors
// as it may have. The highest are placed first: as long as at least as many are
// still to come as are sent at once, those arrive below all that are wanted. The
// rest comes one by one, and what takes the number of the channel last.
func (t *Tree) placeFromBelow(p *process, list []files.Descriptor, _ int) error {
	r := p.remote()
	ch := t.ch.fd
	err := r.Run(ptrace.NewCall("close descriptors of the stub", unix.SYS_CLOSE_RANGE, ptrace.Int(0), ptrace.Int(ch-1), ptrace.Int(0)),
		ptrace.NewCall("close descriptors of the stub", unix.SYS_CLOSE_RANGE, ptrace.Int(ch+1), ptrace.Int(^uint32(0)), ptrace.Int(0)))
	if err != nil {
		return err
	}
	rest := slices.Clone(list)
	var last []files.Descriptor
	if i := slices.IndexFunc(rest, func(d files.Descriptor) bool { return d.FD == ch }); i >= 0 {
		last = append(last, rest[i])
		rest = slices.Delete(rest, i, i+1)
	}
	for len(rest) > 0 {
		n := 1
		if len(rest) >= 2*maxRights {
			n = maxRights
		}
		part := rest[len(rest)-n:]
		rest = rest[:len(rest)-n]
		if err := t.placeAt(p, part); err != nil {
			return err
		}
	}
	if len(last) == 0 {
		return r.Run(closeCall(ch))
	}
	return t.placeAt(p, last)
}

func (t *Tree) placeAt(p *process, part []files.Descriptor) error {
	nums, err := t.send(p, part)
	if err != nil {
		return err
	}
	var calls, closes []*ptrace.Call
	for i, n := range nums {
		if n != part[i].FD {
			calls, closes = append(calls, placeCall(n, part[i])), append(closes, closeCall(n))
		} else if part[i].Cloexec {
			calls = append(calls, ptrace.NewCall(fmt.Sprintf("fcntl F_SETFD of fd %d", n), unix.SYS_FCNTL, ptrace.Int(n), ptrace.Int(unix.F_SETFD), ptrace.Int(unix.FD_CLOEXEC)))
		}
	}
	return p.remote().Run(append(calls, closes...)...)
}

// directories gives the working directory of a task and, if it is not the one
// that it has anyway, its root directory.
func (t *Tree) directories(tid int, cwdID, rootID uint32) ([]*os.File, error) {
	cwd, err := t.files.File(cwdID)
	if err != nil {
		return nil, fmt.Errorf("working directory: %w", err)
	}
	root, err := t.files.File(rootID)
	if err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	st, err := root.Stat()
	if err != nil {
		return nil, err
	}
	here, err := os.Stat(fmt.Sprintf("/proc/%d/root/", tid))
	if err != nil {
		return nil, err
	}
	if os.SameFile(st, here) {
		return []*os.File{cwd}, nil
	}
	return []*os.File{cwd, root}, nil
}
