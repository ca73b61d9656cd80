package restore

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

type span struct{ start, end uint64 }

func sortSpans(s []span) {
	slices.SortFunc(s, func(a, b span) int { return cmp.Compare(a.start, b.start) })
}

// channel is a socket pair over which descriptors travel to the new processes,
// which all inherit its other end from the stub.
type channel struct {
	ours   *os.File
	theirs *os.File
	fd     int // number of the other end in the new processes
}

func newChannel() (*channel, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	return &channel{ours: os.NewFile(uintptr(fds[0]), "descriptor channel"), theirs: os.NewFile(uintptr(fds[1]), "descriptor channel")}, nil
}

func (c *channel) close() error { return errors.Join(c.ours.Close(), c.theirs.Close()) }

// maxRights is SCM_MAX_FD (include/net/scm.h).
const maxRights = 253

// give puts files into the descriptor table of the process in which r runs
// calls and returns their numbers there.
// Preconditions: on the tracer's thread.
func (c *channel) give(r *ptrace.Remote, files []*os.File) ([]int, error) {
	var nums []int
	for len(files) > 0 {
		n := min(len(files), maxRights)
		fds := make([]int, n)
		for i, f := range files[:n] {
			fds[i] = int(f.Fd())
		}
		if err := unix.Sendmsg(int(c.ours.Fd()), []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
			return nil, fmt.Errorf("send %d descriptors: %w", n, os.NewSyscallError("sendmsg", err))
		}
		got, err := c.receive(r, n)
		if err != nil {
			return nil, err
		}
		nums = append(nums, got...)
		files = files[n:]
	}
	return nums, nil
}

// receive runs recvmsg in a new process. The buffer holds struct msghdr (56
// bytes), one iovec (16), a byte of data and, aligned, the control message.
func (c *channel) receive(r *ptrace.Remote, n int) ([]int, error) {
	const iov, data, control = 56, 72, 80
	space := unix.CmsgSpace(n * 4)
	in := make([]byte, control+space)
	le := binary.LittleEndian
	le.PutUint64(in[24:], 1) // msg_iovlen
	le.PutUint64(in[40:], uint64(space))
	le.PutUint64(in[iov+8:], 1)
	out := make([]byte, len(in))
	call := ptrace.NewCall("receive descriptors", unix.SYS_RECVMSG, ptrace.Int(c.fd),
		ptrace.Arg{In: in, Out: out, Rel: []ptrace.Rel{{At: 16, To: iov}, {At: 32, To: control}, {At: iov, To: data}}}, ptrace.Int(0))
	if err := r.Run(call); err != nil {
		return nil, err
	}
	if flags := le.Uint32(out[48:]); flags&unix.MSG_CTRUNC != 0 {
		return nil, fmt.Errorf("task %d cannot take %d more descriptors: its limit of open files is too low", r.Tid, n)
	}
	got := le.Uint64(out[40:])
	msgs, err := unix.ParseSocketControlMessage(out[control : control+min(int(got), space)])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive descriptors in task %d: unexpected control data (%w)", r.Tid, errors.Join(err, unix.EBADMSG))
	}
	nums, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(nums) != n {
		return nil, fmt.Errorf("receive descriptors in task %d: got %d of %d", r.Tid, len(nums), n)
	}
	return nums, nil
}

// stub is the first new process, a tiny program of ours out of which all
// others are cloned.
type stub struct {
	remote *ptrace.Remote
	// own are the registers with which it goes on when it is let go.
	own arch.Regs
	// special are its [vvar…] and [vdso], rest its other mappings.
	special, rest []span
}

// sessionOptions are the ptrace options of everything that is being built: it
// dies with us, and its children are ours before their first instruction.
const sessionOptions = sys.PtraceOptionTraceSysGood | sys.PtraceOptionExitKill | sys.PtraceOptionTraceChildren

// stubKind says where the stub lives.
type stubKind struct {
	newPid      bool // the first process of new pid and mount namespaces
	sameSession bool // in the session and group of this process
	terminals   bool // with newPid: pseudoterminals of its own
}

// startStub starts and seizes the stub.
// Preconditions: on the tracer's thread, which must outlive the stub.
func startStub(ch *channel, kind stubKind) (_ *stub, err error) {
	exe, err := stubFile()
	if err != nil {
		return nil, fmt.Errorf("make the stub program: %w", err)
	}
	defer func() { err = errors.Join(err, exe.Close()) }()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, null.Close()) }()
	attr := &syscall.ProcAttr{
		Dir: "/", Env: []string{},
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), ch.theirs.Fd()},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: !kind.sameSession},
	}
	ch.fd = 3
	if kind.newPid {
		attr.Sys.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS
	}
	// Not /proc/self: in the new process the number may be another file's by then, as
	// ForkExec moves its own pipe there to make way for Files.
	pid, err := syscall.ForkExec(procfs.Path(os.Getpid(), "fd", strconv.Itoa(int(exe.Fd()))), []string{"godwit-stub"}, attr)
	if err != nil {
		return nil, fmt.Errorf("start the stub process: %w", err)
	}
	s := &stub{remote: &ptrace.Remote{Tid: pid}}
	if err := s.seize(); err != nil {
		return nil, errors.Join(fmt.Errorf("take over the stub process: %w", err), s.kill())
	}
	if kind.newPid {
		if err := s.mountProc(kind.terminals); err != nil {
			return nil, errors.Join(err, s.kill())
		}
	}
	return s, nil
}

// stubFile is a memory file with the stub program, open for reading only: a
// file that is open for writing cannot be executed.
func stubFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("godwit-stub", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	w := os.NewFile(uintptr(fd), "godwit-stub")
	_, err = w.Write(arch.StubELF())
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	return r, errors.Join(err, w.Close())
}

func (s *stub) seize() error {
	pid := s.remote.Tid
	if err := sys.PtraceSeize(pid, sessionOptions); err != nil {
		return err
	}
	if err := sys.PtraceInterrupt(pid); err != nil {
		return err
	}
	return s.learn()
}

// learn waits for a stub that was told to stop, and looks at it.
func (s *stub) learn() error {
	pid := s.remote.Tid
	st, err := ptrace.Wait(pid)
	if err != nil {
		return err
	}
	if st.Event != sys.PtraceEventStop {
		return &ptrace.StopError{Want: "the stub in an event stop", Got: st}
	}
	if s.own, err = ptrace.GetRegs(pid); err != nil {
		return err
	}
	s.remote.Base = s.own
	if _, err := ptrace.BlockSignals(pid); err != nil {
		return err
	}
	maps, err := procfs.ReadMaps(pid)
	if err != nil {
		return err
	}
	for _, m := range maps {
		sp := span{m.Start, m.End}
		switch m.Path {
		case "[vsyscall]":
		case "[vdso]":
			if s.remote.Insn, err = ptrace.FindInsn(pid, m.Start, m.End); err != nil {
				return err
			}
			s.special = append(s.special, sp)
		case "[vvar]", "[vvar_vclock]":
			s.special = append(s.special, sp)
		default:
			s.rest = append(s.rest, sp)
		}
	}
	if s.remote.Insn == 0 {
		return errors.New("new processes have no [vdso] on this host")
	}
	return nil
}

// mountProc gives the new pid namespace a /proc of its own, and, for terminals, a
// /dev/pts of which all numbers are free. They are mounted by the stub through an
// area that is mapped for the purpose.
func (s *stub) mountProc(terminals bool) error {
	if err := s.remote.Map(0); err != nil {
		return err
	}
	calls := []*ptrace.Call{
		ptrace.NewCall("keep mounts to itself", unix.SYS_MOUNT, ptrace.Str("none"), ptrace.Str("/"), ptrace.Int(0), ptrace.Int(unix.MS_REC|unix.MS_SLAVE), ptrace.Int(0)),
		ptrace.NewCall("mount /proc", unix.SYS_MOUNT, ptrace.Str("proc"), ptrace.Str("/proc"), ptrace.Str("proc"), ptrace.Int(unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC), ptrace.Int(0)),
	}
	if terminals {
		calls = append(calls, ptrace.NewCall("mount /dev/pts", unix.SYS_MOUNT, ptrace.Str("devpts"), ptrace.Str("/dev/pts"), ptrace.Str("devpts"),
			ptrace.Int(unix.MS_NOSUID|unix.MS_NOEXEC), ptrace.Str("mode=620,ptmxmode=666")))
	}
	err := s.remote.Run(calls...)
	return errors.Join(err, s.remote.Unmap())
}

// prepare maps the spare memory at addr and lifts the limit of open files as
// far as it goes.
func (s *stub) prepare(addr uint64) error {
	if err := s.remote.Map(addr); err != nil {
		return err
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	lim.Cur = lim.Max
	b := binary.LittleEndian.AppendUint64(nil, lim.Cur)
	return s.remote.Run(ptrace.NewCall("lift limit of open files", unix.SYS_PRLIMIT64, ptrace.Int(0), ptrace.Int(unix.RLIMIT_NOFILE),
		ptrace.Bytes(binary.LittleEndian.AppendUint64(b, lim.Max)), ptrace.Int(0)))
}

// kill ends the stub.
func (s *stub) kill() error {
	if err := unix.Kill(s.remote.Tid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("kill", err)
	}
	return reap(s.remote.Tid)
}

// release lets the stub run on as the init of its pid namespace.
func (s *stub) release() error {
	err := s.remote.Run(
		ptrace.NewCall("outlive the agent", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_PDEATHSIG), ptrace.Int(0)),
		ptrace.NewCall("close the descriptor channel", unix.SYS_CLOSE_RANGE, ptrace.Int(3), ptrace.Int(^uint32(0)), ptrace.Int(0)),
	)
	if err = errors.Join(err, s.remote.Unmap()); err != nil {
		return err
	}
	regs := s.own
	regs.NoRestart()
	regs.SetPC(arch.StubInit)
	if err := ptrace.SetRegs(s.remote.Tid, &regs); err != nil {
		return err
	}
	if err := sys.PtraceSetSigMask(s.remote.Tid, 0); err != nil {
		return err
	}
	return sys.PtraceDetach(s.remote.Tid, 0)
}
