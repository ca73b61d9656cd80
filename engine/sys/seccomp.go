package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and options for tasks under seccomp (include/uapi/linux/ptrace.h).
const (
	ptraceSeccompGetFilter   = 0x420c // Linux 4.4
	ptraceSeccompGetMetadata = 0x420d // Linux 4.16

	// PtraceOptionSuspendSeccomp lets a tracee make every system call until it is let go.
	PtraceOptionSuspendSeccomp = 1 << 21 // PTRACE_O_SUSPEND_SECCOMP, Linux 4.3
)

// SeccompInsnSize is sizeof(struct sock_filter), SeccompMaxInsns BPF_MAXINSNS.
const (
	SeccompInsnSize = 8
	SeccompMaxInsns = 4096
)

// PtraceSeccompFilter reads the filter number n of a stopped task, 0 being the
// oldest, and its SECCOMP_FILTER_FLAG_*; ENOENT says that it has no such filter.
// Preconditions: as of all Ptrace functions.
func PtraceSeccompFilter(tid, n int) (prog []byte, flags uint64, err error) {
	count, _, e := unix.RawSyscall6(unix.SYS_PTRACE, ptraceSeccompGetFilter, uintptr(tid), uintptr(n), 0, 0, 0)
	if e != 0 {
		return nil, 0, os.NewSyscallError("ptrace seccomp_get_filter", e)
	}
	if count == 0 || count > SeccompMaxInsns {
		return nil, 0, os.NewSyscallError("ptrace seccomp_get_filter", unix.EINVAL)
	}
	prog = make([]byte, count*SeccompInsnSize)
	_, _, e = unix.RawSyscall6(unix.SYS_PTRACE, ptraceSeccompGetFilter, uintptr(tid), uintptr(n), uintptr(unsafe.Pointer(&prog[0])), 0, 0)
	if e != 0 {
		return nil, 0, os.NewSyscallError("ptrace seccomp_get_filter", e)
	}
	meta := struct{ off, flags uint64 }{off: uint64(n)} // struct seccomp_metadata
	_, _, e = unix.RawSyscall6(unix.SYS_PTRACE, ptraceSeccompGetMetadata, uintptr(tid), unsafe.Sizeof(meta), uintptr(unsafe.Pointer(&meta)), 0, 0)
	if e != 0 {
		return nil, 0, os.NewSyscallError("ptrace seccomp_get_metadata", e)
	}
	return prog, meta.flags, nil
}
