package arch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// GOARCH of this set of files, as Facts.Arch says it.
const Name = "amd64"

// PageSize in bytes.
const PageSize = 4096

// TaskSize is the first address that user space cannot have (4-level tables).
const TaskSize = 0x7ffffffff000

// RegsSize is sizeof(struct user_regs_struct).
const RegsSize = 27 * 8

// Regs are the general registers of a stopped task: struct user_regs_struct
// (arch/x86/include/asm/user_64.h).
type Regs struct {
	R15, R14, R13, R12, Rbp, Rbx, R11, R10, R9, R8, Rax, Rcx, Rdx, Rsi, Rdi uint64
	OrigRax, Rip, Cs, Eflags, Rsp, Ss, FsBase, GsBase, Ds, Es, Fs, Gs       uint64
}

func (r *Regs) fields() [27]*uint64 {
	return [27]*uint64{
		&r.R15, &r.R14, &r.R13, &r.R12, &r.Rbp, &r.Rbx, &r.R11, &r.R10, &r.R9, &r.R8, &r.Rax, &r.Rcx, &r.Rdx, &r.Rsi, &r.Rdi,
		&r.OrigRax, &r.Rip, &r.Cs, &r.Eflags, &r.Rsp, &r.Ss, &r.FsBase, &r.GsBase, &r.Ds, &r.Es, &r.Fs, &r.Gs,
	}
}

// Decode fills r from the bytes of NT_PRSTATUS.
func (r *Regs) Decode(b []byte) error {
	if len(b) < RegsSize {
		return fmt.Errorf("register set of %d bytes, want %d: a 32-bit task", len(b), RegsSize)
	}
	for i, f := range r.fields() {
		*f = binary.LittleEndian.Uint64(b[i*8:])
	}
	return nil
}

// Encode gives the bytes of NT_PRSTATUS.
func (r *Regs) Encode() []byte {
	b := make([]byte, RegsSize)
	for i, f := range r.fields() {
		binary.LittleEndian.PutUint64(b[i*8:], *f)
	}
	return b
}

// PC is the address of the next instruction.
func (r *Regs) PC() uint64 { return r.Rip }

// Near are addresses of memory that a thread uses at once: its stack and its own data.
func (r *Regs) Near() []uint64 { return []uint64{r.Rsp, r.Rsp + PageSize, r.FsBase} }

// SetPC moves the task to another instruction.
func (r *Regs) SetPC(pc uint64) { r.Rip = pc }

// Native tells whether the task runs 64-bit code.
func (r *Regs) Native() bool { return r.Cs == 0x33 }

// MakesTask tells whether a system call makes a process or thread.
func MakesTask(nr uint64) bool {
	return nr == unix.SYS_VFORK || nr == unix.SYS_CLONE || nr == unix.SYS_CLONE3
}

// IOPL tells whether the task may use I/O instructions (iopl(2)).
func (r *Regs) IOPL() bool { return r.Eflags&(3<<12) != 0 }

// DebugControl is the offset of the debug control register in struct user
// (arch/x86/include/asm/user_64.h), DebugEnabled its bits that enable breakpoints.
const (
	DebugControl = 848 + 7*8
	DebugEnabled = 0xff
)

// Ret is the result of the last system call.
func (r *Regs) Ret() int64 { return int64(r.Rax) }

// NoRestart keeps the kernel from taking the registers for those of an
// interrupted system call, which it would restart.
func (r *Regs) NoRestart() { r.OrigRax = ^uint64(0) }

// SetSyscall makes the task, at pc on a system-call instruction, execute nr.
func (r *Regs) SetSyscall(pc uint64, nr uintptr, args [6]uint64) {
	r.NoRestart()
	r.Rip = pc
	r.Rax = uint64(nr)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = args[0], args[1], args[2], args[3], args[4], args[5]
}

// SetBatch makes the task run the code of BatchCode at code over count entries at table.
func (r *Regs) SetBatch(code, table, count, stack uint64) {
	r.NoRestart()
	r.Rip, r.Rbx, r.R12, r.Rsp = code, table, count, stack
	// The direction and trap flags of the interrupted code must not act on ours.
	r.Eflags &^= 1<<8 | 1<<10
}

// Errno values with which the kernel marks an interrupted system call
// (include/linux/errno.h); user space never sees them.
const (
	erestartsys         = 512
	erestartnointr      = 513
	erestartnohand      = 514
	erestartRestartbloc = 516
)

// RestartInNewTask changes registers that were taken inside an interrupted
// system call so that a task which never made the call makes it again: the
// kernel restarts calls only in the task that was interrupted.
// nanosleep and clock_nanosleep go on with the remaining time where the
// program asked for it.
func (r *Regs) RestartInNewTask() {
	if int64(r.OrigRax) < 0 {
		r.NoRestart()
		return
	}
	again := func() {
		r.Rax = r.OrigRax
		r.Rip -= uint64(len(SyscallInsn))
	}
	switch -int64(r.Rax) {
	case erestartsys, erestartnointr, erestartnohand:
		again()
	case erestartRestartbloc:
		switch r.OrigRax {
		case unix.SYS_NANOSLEEP:
			if r.Rsi != 0 { // the kernel wrote the remaining time there
				r.Rdi = r.Rsi
			}
		case unix.SYS_CLOCK_NANOSLEEP:
			if r.R10 != 0 {
				r.Rdx = r.R10
			}
		}
		again()
	}
	r.NoRestart()
}

// Continues tells whether the kernel would go on with an interrupted system
// call by restart_syscall(2).
func (r *Regs) Continues() bool {
	return int64(r.OrigRax) >= 0 && -int64(r.Rax) == erestartRestartbloc
}

// clocks is more than the number of any clock (MAX_CLOCKS, include/uapi/linux/time.h) and
// less than any address of a program.
const clocks = 64

// ContinuesUnnamed tells whether it would go on with a call that was interrupted
// before, so that the registers do not say which.
func (r *Regs) ContinuesUnnamed() bool {
	return r.Continues() && r.OrigRax == unix.SYS_RESTART_SYSCALL
}

// AboutToContinue tells whether the kernel has already sent it back to such a call;
// the next instruction, which the caller looks at, is SyscallInsn then.
func (r *Regs) AboutToContinue() bool {
	return int64(r.OrigRax) < 0 && r.Rax == unix.SYS_RESTART_SYSCALL
}

// NameContinued sets the number of such a call by the kernel's function in which
// it waits, as /proc/PID/task/TID/wchan has it. The kernel restarts few calls in
// this way; another name changes nothing and gives false.
func (r *Regs) NameContinued(wchan string) bool {
	switch {
	case strings.Contains(wchan, "sleep"), strings.Contains(wchan, "syscall"):
		// hrtimer_nanosleep, do_cpu_nanosleep, alarmtimer_do_nsleep; or do_syscall_64,
		// which calls the functions of a sleep that are left out as those of the scheduler.
		// The first argument is a clock, a small or (of CPU time) negative int, or an
		// address, which is neither.
		r.OrigRax = unix.SYS_NANOSLEEP
		if int64(r.Rdi) < clocks || r.Rdi < 1<<32 && int32(r.Rdi) < 0 {
			r.OrigRax = unix.SYS_CLOCK_NANOSLEEP
		}
	case strings.Contains(wchan, "poll"):
		r.OrigRax = unix.SYS_POLL
	case strings.Contains(wchan, "futex"):
		r.OrigRax = unix.SYS_FUTEX
	}
	return r.OrigRax != unix.SYS_RESTART_SYSCALL
}

// interruptible are system calls that end with EINTR, having done nothing, when
// they are interrupted without a signal for the program, as by a tracer
// (signal(7), "Interruption of system calls and library functions by stop
// signals"; those on sockets only if a timeout is set). They can be made again.
var interruptible = map[uint64]bool{
	unix.SYS_EPOLL_WAIT: true, unix.SYS_EPOLL_PWAIT: true, unix.SYS_EPOLL_PWAIT2: true,
	unix.SYS_SEMOP: true, unix.SYS_SEMTIMEDOP: true, unix.SYS_IO_GETEVENTS: true, unix.SYS_IO_PGETEVENTS: true,
	unix.SYS_RT_SIGTIMEDWAIT: true,
	unix.SYS_READ:            true, unix.SYS_READV: true, unix.SYS_WRITE: true, unix.SYS_WRITEV: true,
	unix.SYS_RECVFROM: true, unix.SYS_RECVMSG: true, unix.SYS_RECVMMSG: true,
	unix.SYS_SENDTO: true, unix.SYS_SENDMSG: true, unix.SYS_ACCEPT: true, unix.SYS_ACCEPT4: true,
}

// HideInterrupt makes a task that a tracer interrupted in such a call make it
// again, so that the program does not see EINTR; it says whether it did. A
// timeout of the call begins anew.
// Preconditions: no signal for the program is pending, which would have been
// the reason itself.
func (r *Regs) HideInterrupt() bool {
	if int64(r.OrigRax) < 0 || int64(r.Rax) != -int64(unix.EINTR) || !interruptible[r.OrigRax] {
		return false
	}
	r.Rax = r.OrigRax
	r.Rip -= uint64(len(SyscallInsn))
	r.NoRestart()
	return true
}

// SyscallInsn is the system-call instruction; every [vdso] contains it.
var SyscallInsn = []byte{0x0f, 0x05}

// BatchEntry is the size of one entry {nr, a1..a6, ret} of a batch table.
const BatchEntry = 64

// BatchCode runs a table of system calls and ends in a breakpoint. It is
// position-independent, needs no stack, and keeps its state in rbx (table) and
// r12 (entries left), which system calls preserve.
var BatchCode = []byte{
	0x4d, 0x85, 0xe4, // test r12, r12
	0x74, 0x2a, // jz done
	0x48, 0x8b, 0x03, // mov rax, [rbx]
	0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx+8]
	0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx+16]
	0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx+24]
	0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx+32]
	0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx+40]
	0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx+48]
	0x0f, 0x05, // syscall
	0x48, 0x89, 0x43, 0x38, // mov [rbx+56], rax
	0x48, 0x83, 0xc3, 0x40, // add rbx, 64
	0x49, 0xff, 0xcc, // dec r12
	0xeb, 0xd1, // jmp start
	0xcc, // done: int3
}

// stubText is the program of a stub. It sleeps until it is traced; let go at
// StubInit, it reaps children until none is left and then exits, as the init of
// a pid namespace does.
//
//	idle: mov eax, 34; syscall; jmp idle                                                      // pause
//	init: mov eax, 61; mov rdi, -1; xor esi, esi; mov edx, __WALL; xor r10d, r10d; syscall    // wait4
//	      cmp rax, -10; jne init                                                              // ECHILD
//	      mov eax, 231; xor edi, edi; syscall                                                 // exit_group
var stubText = []byte{
	0xb8, 0x22, 0x00, 0x00, 0x00, // idle: mov eax, 34
	0x0f, 0x05, // syscall
	0xeb, 0xf7, // jmp idle
	0xb8, 0x3d, 0x00, 0x00, 0x00, // init: mov eax, 61
	0x48, 0xc7, 0xc7, 0xff, 0xff, 0xff, 0xff, // mov rdi, -1
	0x31, 0xf6, // xor esi, esi
	0xba, 0x00, 0x00, 0x00, 0x40, // mov edx, __WALL
	0x45, 0x31, 0xd2, // xor r10d, r10d
	0x0f, 0x05, // syscall
	0x48, 0x83, 0xf8, 0xf6, // cmp rax, -ECHILD
	0x75, 0xe2, // jne init
	0xb8, 0xe7, 0x00, 0x00, 0x00, // mov eax, 231
	0x31, 0xff, // xor edi, edi
	0x0f, 0x05, // syscall
}

const (
	stubBase   = 0x400000
	stubHeader = 64 + 56
	stubIdle   = 9 // bytes
)

// StubInit is the address at which a stub is let go as an init.
const StubInit = stubBase + stubHeader + stubIdle

// StubELF is a complete static executable of one page: the stub.
func StubELF() []byte {
	const base, hdr = stubBase, stubHeader
	b := make([]byte, hdr, 256)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 2)  // ET_EXEC
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], base+hdr) // entry
	le.PutUint64(b[32:], 64)       // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	p := b[64:]
	le.PutUint32(p[0:], 1) // PT_LOAD
	le.PutUint32(p[4:], 5) // R-X
	le.PutUint64(p[16:], base)
	le.PutUint64(p[24:], base)
	size := uint64(hdr + len(stubText))
	le.PutUint64(p[32:], size)
	le.PutUint64(p[40:], size)
	le.PutUint64(p[48:], PageSize)
	return append(b, stubText...)
}

// ErrXState says that extended state cannot be taken over.
var ErrXState = errors.New("extended processor state cannot be carried")
