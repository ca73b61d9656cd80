package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and register sets for what a task has beside its registers
// (include/uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h).
const (
	ptraceGetThreadArea = 25
	ptraceSetThreadArea = 26
	ptraceSetSUD        = 0x4210 // Linux 6.4
	ptraceGetSUD        = 0x4211
	NT386IOPerm         = 0x201 // NT_386_IOPERM
)

// TLSEntries is GDT_ENTRY_TLS_MIN and the two behind it (arch/x86/include/asm/segment.h).
var TLSEntries = [3]int{12, 13, 14}

// UserDescSize is sizeof(struct user_desc) (arch/x86/include/uapi/asm/ldt.h).
const UserDescSize = 16

// PtraceGetThreadArea reads one of the TLS entries of a stopped task.
func PtraceGetThreadArea(tid, entry int) (b [UserDescSize]byte, err error) {
	err = ptrace("get_thread_area", ptraceGetThreadArea, tid, uintptr(entry), uintptr(unsafe.Pointer(&b)))
	return b, err
}

// PtraceSetThreadArea replaces one of the TLS entries of a stopped task.
func PtraceSetThreadArea(tid, entry int, b [UserDescSize]byte) error {
	return ptrace("set_thread_area", ptraceSetThreadArea, tid, uintptr(entry), uintptr(unsafe.Pointer(&b)))
}

// SUDConfig is struct ptrace_sud_config: syscall user dispatch.
type SUDConfig struct {
	Mode     uint64 // PR_SYS_DISPATCH_*, 0: off
	Selector uint64
	Offset   uint64
	Len      uint64
}

// PtraceGetSUD reads the syscall user dispatch of a stopped task; a kernel that
// cannot tell gives EIO.
func PtraceGetSUD(tid int) (SUDConfig, error) {
	var c SUDConfig
	err := ptrace("get_syscall_user_dispatch_config", ptraceGetSUD, tid, unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)))
	return c, err
}

// PtraceSetSUD replaces the syscall user dispatch of a stopped task.
func PtraceSetSUD(tid int, c SUDConfig) error {
	return ptrace("set_syscall_user_dispatch_config", ptraceSetSUD, tid, unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)))
}

// PtracePeekUser reads a word of struct user of a stopped task.
func PtracePeekUser(tid int, offset uintptr) (uint64, error) {
	var v uint64
	err := ptrace("peekuser", unix.PTRACE_PEEKUSR, tid, offset, uintptr(unsafe.Pointer(&v)))
	return v, err
}

// SchedCookie reads the core scheduling cookie of a task, 0 for none and where
// the kernel or the CPU knows no core scheduling.
func SchedCookie(tid int) (uint64, error) {
	var v uint64
	_, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SCHED_CORE, unix.PR_SCHED_CORE_GET, uintptr(tid),
		unix.PR_SCHED_CORE_SCOPE_THREAD, uintptr(unsafe.Pointer(&v)), 0)
	switch e {
	case 0:
		return v, nil
	case unix.EINVAL, unix.ENODEV:
		return 0, nil
	}
	return 0, os.NewSyscallError("prctl PR_SCHED_CORE_GET", e)
}
