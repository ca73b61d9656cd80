package sys

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cloneArgs is struct clone_args (include/uapi/linux/sched.h, 5.5).
type cloneArgs struct {
	flags, pidfd, childTid, parentTid, exitSignal, stack, stackSize, tls, setTid, setTidSize, cgroup uint64
}

// Sibling is a process that was made beside this one, a child of its parent. It
// waits before it executes its program.
type Sibling struct {
	Pid  int
	gate *os.File
}

// sibling is what the new process needs, prepared before it exists: it runs on a
// copy of this program's memory, with nothing of its runtime.
type sibling struct {
	gate, ours, exe, channel, null uintptr
	empty, dir                     *byte
	argv, envv                     **byte
	b                              byte
}

// NewSibling makes a child of this process's parent with a pid (0: any) by clone3(2)
// with flags besides CLONE_PARENT. When it is let go it executes exe, with the
// null device for its standard files, channel as descriptor 3 and nothing else.
// It ends if this program ends before. A taken pid is EEXIST.
func NewSibling(flags uint64, pid int, exe, null, channel *os.File) (_ *Sibling, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	var c sibling
	var high []int
	defer func() {
		for _, fd := range high {
			_ = unix.Close(fd)
		}
	}()
	// Out of the way of the four that it is to have.
	for f, to := range map[*os.File]*uintptr{r: &c.gate, w: &c.ours, exe: &c.exe, null: &c.null, channel: &c.channel} {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 16)
		if err != nil {
			return nil, errors.Join(os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err), w.Close())
		}
		high = append(high, fd)
		*to = uintptr(fd)
	}
	empty, name, dir := []byte{0}, []byte("godwit-stub\x00"), []byte("/\x00")
	argv, envv := []*byte{&name[0], nil}, []*byte{nil}
	c.empty, c.dir, c.argv, c.envv = &empty[0], &dir[0], &argv[0], &envv[0]
	id := int32(pid)
	args := cloneArgs{flags: flags | unix.CLONE_PARENT}
	if pid != 0 {
		args.setTid, args.setTidSize = uint64(uintptr(unsafe.Pointer(&id))), 1
	}
	runtime.LockOSThread()
	got, errno := c.clone(&args)
	runtime.UnlockOSThread()
	runtime.KeepAlive(&id)
	if errno != 0 {
		return nil, errors.Join(os.NewSyscallError(fmt.Sprintf("clone3 pid %d beside this process", pid), errno), w.Close())
	}
	// The copy of the writing end goes with high.
	return &Sibling{Pid: int(got), gate: w}, nil
}

// clone makes the process. All signals are blocked meanwhile: the copy must not run
// handlers of a runtime that it does not have.
//
//go:norace
//go:noinline
func (c *sibling) clone(args *cloneArgs) (uintptr, unix.Errno) {
	all, old := ^uint64(0), uint64(0)
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	pid, _, errno := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0)
	if errno == 0 && pid == 0 {
		c.become()
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	return pid, errno
}

// become is all that the new process does in this program. It makes system calls only.
//
//go:norace
//go:nosplit
func (c *sibling) become() {
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, c.ours, 0, 0)
	n, _, _ := unix.RawSyscall(unix.SYS_READ, c.gate, uintptr(unsafe.Pointer(&c.b)), 1)
	if n == 1 {
		_, _, _ = unix.RawSyscall(unix.SYS_DUP3, c.null, 0, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_DUP3, c.null, 1, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_DUP3, c.null, 2, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_DUP3, c.channel, 3, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(c.dir)), 0, 0)
		_, _, _ = unix.RawSyscall(unix.SYS_CLOSE_RANGE, 4, 15, 0)
		_, _, _ = unix.RawSyscall6(unix.SYS_EXECVEAT, c.exe, uintptr(unsafe.Pointer(c.empty)), uintptr(unsafe.Pointer(c.argv)),
			uintptr(unsafe.Pointer(c.envv)), unix.AT_EMPTY_PATH, 0)
	}
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
}

// Go lets it execute its program, or, without a success, end.
func (s *Sibling) Go() error {
	_, err := s.gate.Write([]byte{0})
	return errors.Join(err, s.gate.Close())
}

// Abandon has one that was not let go end.
func (s *Sibling) Abandon() error { return s.gate.Close() }
