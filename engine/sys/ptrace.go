package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ptrace requests and register sets that golang.org/x/sys/unix does not wrap
// (include/uapi/linux/ptrace.h, include/uapi/linux/elf.h).
const (
	ptracePeekSigInfo         = 0x4209
	ptraceGetSigMask          = 0x420a
	ptraceSetSigMask          = 0x420b
	ptraceGetRseqConfig       = 0x420f
	ptracePeekSigInfoShared   = 1
	NTPrstatus                = 1     // NT_PRSTATUS
	NTX86Xstate               = 0x202 // NT_X86_XSTATE
	PtraceEventStop           = 128   // PTRACE_EVENT_STOP
	SigInfoSize               = 128   // sizeof(siginfo_t), all architectures
	PtraceOptionTraceSysGood  = unix.PTRACE_O_TRACESYSGOOD
	PtraceOptionExitKill      = unix.PTRACE_O_EXITKILL
	PtraceOptionTraceExec     = unix.PTRACE_O_TRACEEXEC
	PtraceOptionTraceChildren = unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK
)

func ptrace(name string, req, pid int, addr, data uintptr) error {
	for {
		_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(pid), addr, data, 0, 0)
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return os.NewSyscallError("ptrace "+name, e)
	}
}

// Preconditions of all Ptrace functions: called from the OS thread that seized tid.

// PtraceSeize attaches to a task without stopping it.
func PtraceSeize(tid, options int) error {
	return ptrace("seize", unix.PTRACE_SEIZE, tid, 0, uintptr(options))
}

// PtraceInterrupt stops a seized task; the stop is PTRACE_EVENT_STOP.
func PtraceInterrupt(tid int) error {
	return ptrace("interrupt", unix.PTRACE_INTERRUPT, tid, 0, 0)
}

// PtraceCont resumes a stopped task, delivering sig unless it is 0.
func PtraceCont(tid, sig int) error { return ptrace("cont", unix.PTRACE_CONT, tid, 0, uintptr(sig)) }

// PtracePoke writes one word to a stopped task, whatever the protection of its page.
func PtracePoke(tid int, addr, word uint64) error {
	return ptrace("poke", unix.PTRACE_POKEDATA, tid, uintptr(addr), uintptr(word))
}

// PtraceSyscall resumes a stopped task until the next entry to or exit from a system call.
func PtraceSyscall(tid, sig int) error {
	return ptrace("syscall", unix.PTRACE_SYSCALL, tid, 0, uintptr(sig))
}

// PtraceDetach lets a stopped task go, delivering sig unless it is 0.
func PtraceDetach(tid, sig int) error {
	return ptrace("detach", unix.PTRACE_DETACH, tid, 0, uintptr(sig))
}

// PtraceSetOptions replaces the options given to PtraceSeize.
func PtraceSetOptions(tid, options int) error {
	return ptrace("setoptions", unix.PTRACE_SETOPTIONS, tid, 0, uintptr(options))
}

// PtraceEventMsg reads the message of the current event stop: the pid of a new child, say.
func PtraceEventMsg(tid int) (uint64, error) {
	var msg uint64
	err := ptrace("geteventmsg", unix.PTRACE_GETEVENTMSG, tid, 0, uintptr(unsafe.Pointer(&msg)))
	return msg, err
}

// PtraceGetRegSet reads a register set into buf and returns how many bytes there are.
func PtraceGetRegSet(tid, set int, buf []byte) (int, error) {
	iov := unix.Iovec{Base: &buf[0], Len: uint64(len(buf))}
	err := ptrace("getregset", unix.PTRACE_GETREGSET, tid, uintptr(set), uintptr(unsafe.Pointer(&iov)))
	return int(iov.Len), err
}

// PtraceSetRegSet writes a register set.
func PtraceSetRegSet(tid, set int, buf []byte) error {
	iov := unix.Iovec{Base: &buf[0], Len: uint64(len(buf))}
	return ptrace("setregset", unix.PTRACE_SETREGSET, tid, uintptr(set), uintptr(unsafe.Pointer(&iov)))
}

// PtraceGetSigMask reads the blocked signals of a stopped task; bit 0 is signal 1.
func PtraceGetSigMask(tid int) (uint64, error) {
	var m uint64
	err := ptrace("getsigmask", ptraceGetSigMask, tid, 8, uintptr(unsafe.Pointer(&m)))
	return m, err
}

// PtraceSetSigMask replaces the blocked signals of a stopped task.
func PtraceSetSigMask(tid int, m uint64) error {
	return ptrace("setsigmask", ptraceSetSigMask, tid, 8, uintptr(unsafe.Pointer(&m)))
}

// PtraceGetSigInfo reads the siginfo of a signal-delivery stop.
func PtraceGetSigInfo(tid int) ([SigInfoSize]byte, error) {
	var si [SigInfoSize]byte
	err := ptrace("getsiginfo", unix.PTRACE_GETSIGINFO, tid, 0, uintptr(unsafe.Pointer(&si)))
	return si, err
}

// PtracePeekSigInfo reads the queued signals of a stopped task, the thread's
// own or those of its process, without taking them.
func PtracePeekSigInfo(tid int, shared bool) ([][SigInfoSize]byte, error) {
	var out [][SigInfoSize]byte
	for {
		var buf [32][SigInfoSize]byte
		args := struct {
			off   uint64
			flags uint32
			nr    int32
		}{off: uint64(len(out)), nr: int32(len(buf))}
		if shared {
			args.flags = ptracePeekSigInfoShared
		}
		n, _, e := unix.RawSyscall6(unix.SYS_PTRACE, ptracePeekSigInfo, uintptr(tid),
			uintptr(unsafe.Pointer(&args)), uintptr(unsafe.Pointer(&buf)), 0, 0)
		if e != 0 {
			return nil, os.NewSyscallError("ptrace peeksiginfo", e)
		}
		out = append(out, buf[:n]...)
		if int(n) < len(buf) {
			return out, nil
		}
	}
}

// RseqConfig is struct ptrace_rseq_configuration.
type RseqConfig struct {
	Pointer   uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

// PtraceRseqConfig reads the restartable-sequence registration of a stopped
// task; Pointer is 0 where there is none (Linux 5.13).
func PtraceRseqConfig(tid int) (RseqConfig, error) {
	var c RseqConfig
	err := ptrace("get_rseq_configuration", ptraceGetRseqConfig, tid, unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)))
	return c, err
}

// Reap reaps a child or tracee of any thread of this process, if it has ended; a
// stop of it that waits to be told is left alone.
func Reap(tid int) (bool, error) {
	// Stops of tracees are told whether asked for or not (wait_task_stopped, kernel/exit.c),
	// so that one has to look first.
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, tid, &info, unix.WEXITED|unix.WNOHANG|unix.WALL|unix.WNOWAIT, nil)
	if err != nil || info.Signo == 0 || info.Code > cldDumped {
		return false, os.NewSyscallError("waitid", err)
	}
	err = unix.Waitid(unix.P_PID, tid, &info, unix.WEXITED|unix.WNOHANG|unix.WALL, nil)
	return err == nil, os.NewSyscallError("waitid", err)
}

// cldDumped is CLD_DUMPED, the last of the codes of SIGCHLD for ends (asm-generic/siginfo.h).
const cldDumped = 3

// Wait4 waits for one task of the calling thread's children and tracees.
// It returns pid 0 if options has WNOHANG and nothing has happened.
func Wait4(pid, options int) (int, unix.WaitStatus, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(pid, &ws, options, nil)
		if err == unix.EINTR {
			continue
		}
		return got, ws, os.NewSyscallError("wait4", err)
	}
}
