// Package task owns what one process or thread is besides memory and files:
// registers, signals, timers, credentials, limits and scheduling, as they are
// read from a stopped task, kept in an image and given to a new one. It must
// not know trees, descriptors or where images go.
package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	core_x86 "github.com/checkpoint-restore/go-criu/v8/crit/images/core-x86"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	criu_sa "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-sa"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/rlimit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/rseq"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/siginfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timer"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Task states in CRIU's images.
const (
	Alive   = 1
	Dead    = 2
	Stopped = 3
)

// Signals is the number of signals; actions of SIGKILL and SIGSTOP are not imaged.
const Signals = 64

const rlimits = 16

// prctl options that golang.org/x/sys/unix may lack (include/uapi/linux/prctl.h).
const (
	prGetTidAddress        = 40
	prTimerCreateRestoreID = 77 // Linux 6.16
)

// Source is one stopped thread to be read.
type Source struct {
	Pid, Tid, VTid int
	Leader         bool
	Regs           arch.Regs // as it would go on
	Rseq           sys.RseqConfig
	Mask           uint64
	SUD            sys.SUDConfig  // syscall user dispatch, which is off while Remote has the thread
	Remote         *ptrace.Remote // runs system calls in this thread
	IDs            *procfs.IDMap  // of a user namespace of the tree's own
	Filters        *Filters       // of the tree; this thread's seccomp filters join them
}

// Dumped is what was read from a thread, ready for an image.
type Dumped struct {
	Core  *criu_core.CoreEntry
	Facts image.TaskFacts
	// MM has everything but mappings, exe file and, for threads, is nil.
	MM    *mm.MmEntry
	Umask uint32
}

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// actionSize is sizeof(struct kernel_sigaction).
const actionSize = 32

type leaderCalls struct {
	actions   [Signals + 1][]byte
	itimers   [3][]byte
	limits    [rlimits][]byte
	subreaper []byte
	timers    []procfs.Timer
	timerVal  [][]byte
	overrun   []*ptrace.Call
	brk       *ptrace.Call
	dumpable  *ptrace.Call
	thp       *ptrace.Call
	ldt       *ptrace.Call
	ldtBytes  []byte
	xperm     *ptrace.Call
	xpermMask []byte
}

func (l *leaderCalls) calls() []*ptrace.Call {
	var cs []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) *ptrace.Call {
		c := ptrace.NewCall(what, nr, args...)
		cs = append(cs, c)
		return c
	}
	for sig := 1; sig <= Signals; sig++ {
		if imaged(sig) {
			l.actions[sig] = make([]byte, actionSize)
			add("read action of signal "+strconv.Itoa(sig), unix.SYS_RT_SIGACTION, ptrace.Int(sig), ptrace.Int(0), ptrace.Buf(l.actions[sig]), ptrace.Int(8))
		}
	}
	for i := range l.itimers {
		l.itimers[i] = make([]byte, 32)
		add("read interval timer "+strconv.Itoa(i), unix.SYS_GETITIMER, ptrace.Int(i), ptrace.Buf(l.itimers[i]))
	}
	for i := range l.limits {
		l.limits[i] = make([]byte, 16)
		add("read limit "+strconv.Itoa(i), unix.SYS_PRLIMIT64, ptrace.Int(0), ptrace.Int(i), ptrace.Int(0), ptrace.Buf(l.limits[i]))
	}
	for _, t := range l.timers {
		b := make([]byte, 32)
		l.timerVal = append(l.timerVal, b)
		add(fmt.Sprintf("read timer %d", t.ID), unix.SYS_TIMER_GETTIME, ptrace.Int(t.ID), ptrace.Buf(b))
		l.overrun = append(l.overrun, add(fmt.Sprintf("read overrun of timer %d", t.ID), unix.SYS_TIMER_GETOVERRUN, ptrace.Int(t.ID)))
	}
	l.subreaper = make([]byte, 4)
	add("read child subreaper", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_CHILD_SUBREAPER), ptrace.Buf(l.subreaper))
	l.brk = add("read brk", unix.SYS_BRK, ptrace.Int(0))
	l.dumpable = add("read dumpable", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_DUMPABLE))
	l.thp = add("read THP setting", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_THP_DISABLE))
	l.xpermMask = make([]byte, 8)
	l.xperm = add("read leave to use features of extended state", unix.SYS_ARCH_PRCTL, ptrace.Int(archGetXCompPerm), ptrace.Buf(l.xpermMask))
	l.xperm.MayFail = true // a CPU without AMX
	l.ldtBytes = make([]byte, ldtProbe)
	l.ldt = add("read local descriptor table", unix.SYS_MODIFY_LDT, ptrace.Int(0), ptrace.Buf(l.ldtBytes), ptrace.Int(len(l.ldtBytes)))
	l.ldt.MayFail = true // a kernel without it
	return cs
}

func imaged(sig int) bool { return sig != int(unix.SIGKILL) && sig != int(unix.SIGSTOP) }

// Dump reads a thread; for a leader also what belongs to the whole process.
// Preconditions: on the tracer's thread; s.Remote can run system calls.
func Dump(s Source) (*Dumped, error) {
	d, err := dump(s)
	if err != nil {
		return nil, fmt.Errorf("read task %d of pid %d: %w", s.Tid, s.Pid, err)
	}
	return d, nil
}

func dump(s Source) (*Dumped, error) {
	st, err := procfs.ReadTaskStatus(s.Pid, s.Tid)
	if err != nil {
		return nil, err
	}
	stat, err := procfs.ReadTaskStat(s.Pid, s.Tid)
	if err != nil {
		return nil, err
	}
	xstate := make([]byte, arch.MaxXState)
	n, err := sys.PtraceGetRegSet(s.Tid, sys.NTX86Xstate, xstate)
	if err != nil {
		return nil, err
	}
	fp, err := arch.XStateToImage(xstate[:n])
	if err != nil {
		return nil, err
	}
	inUse, err := arch.InUse(xstate[:n])
	if err != nil {
		return nil, err
	}
	private, err := sys.PtracePeekSigInfo(s.Tid, false)
	if err != nil {
		return nil, err
	}
	robust, robustLen, err := sys.RobustList(s.Tid)
	if err != nil {
		return nil, err
	}
	attr, err := unix.SchedGetAttr(s.Tid, 0)
	if err != nil {
		return nil, os.NewSyscallError("sched_getattr", err)
	}
	nice, err := niceness(s.Tid)
	if err != nil {
		return nil, err
	}
	affinity, err := pinned(s.Tid)
	if err != nil {
		return nil, err
	}
	ioprio, err := sys.IOPrio(s.Tid)
	if err != nil {
		return nil, err
	}

	var leader leaderCalls
	var calls []*ptrace.Call
	if s.Leader {
		if leader.timers, err = procfs.Timers(s.Pid); err != nil {
			return nil, err
		}
		calls = leader.calls()
	}
	tidAddr, altstack, pdeath := make([]byte, 8), make([]byte, 24), make([]byte, 4)
	var extra attrCalls
	calls = append(calls, extra.calls()...)
	secbits := ptrace.NewCall("read securebits", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_SECUREBITS))
	slack := ptrace.NewCall("read timer slack", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_TIMERSLACK))
	calls = append(calls,
		ptrace.NewCall("read clear_child_tid", unix.SYS_PRCTL, ptrace.Int(prGetTidAddress), ptrace.Buf(tidAddr)),
		ptrace.NewCall("read alternate signal stack", unix.SYS_SIGALTSTACK, ptrace.Int(0), ptrace.Buf(altstack)),
		ptrace.NewCall("read parent-death signal", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_PDEATHSIG), ptrace.Buf(pdeath)),
		secbits, slack)
	if err := s.Remote.Run(calls...); err != nil {
		return nil, err
	}

	tls, err := readTLS(s.Tid)
	if err != nil {
		return nil, err
	}

	regs := s.Regs
	regs.RestartInNewTask()
	inside := s.IDs.Inside(st)
	cr := credsToImage(&inside)
	cr.Secbits = proto.Uint32(uint32(secbits.Ret))
	mtype := criu_core.CoreEntry_X86_64
	policy, prio := attr.Policy, attr.Priority
	core := &criu_core.CoreEntry{
		Mtype: &mtype,
		ThreadInfo: &core_x86.ThreadInfoX86{
			ClearTidAddr: proto.Uint64(le64(tidAddr)),
			Gpregs:       arch.RegsToImage(&regs),
			Fpregs:       fp,
			Tls:          tls,
		},
		ThreadCore: &criu_core.ThreadCoreEntry{
			FutexRla:    proto.Uint64(robust),
			FutexRlaLen: proto.Uint32(uint32(robustLen)),
			SchedNice:   proto.Int32(nice),
			SchedPolicy: &policy,
			SchedPrio:   &prio,
			BlkSigset:   proto.Uint64(s.Mask),
			Sas: &criu_core.ThreadSasEntry{
				SsSp:    proto.Uint64(le64(altstack)),
				SsFlags: proto.Uint32(le32(altstack[8:])),
				SsSize:  proto.Uint64(le64(altstack[16:])),
			},
			PdeathSig: proto.Uint32(le32(pdeath)),
			SignalsP:  signalsToImage(private),
			Creds:     cr,
			Comm:      proto.String(st.Name),
		},
	}
	if s.Rseq.Pointer != 0 {
		core.ThreadCore.RseqEntry = &rseq.RseqEntry{
			RseqAbiPointer: proto.Uint64(s.Rseq.Pointer),
			RseqAbiSize:    proto.Uint32(s.Rseq.Size),
			Signature:      proto.Uint32(s.Rseq.Signature),
		}
	}
	switch st.Seccomp {
	case seccompStrict:
		core.ThreadCore.SeccompMode = criu_core.SeccompMode_strict.Enum()
	case seccompFilter:
		core.ThreadCore.SeccompMode = criu_core.SeccompMode_filter.Enum()
		last, err := s.Filters.read(s.Tid)
		if err != nil {
			return nil, err
		}
		core.ThreadCore.SeccompFilter = &last
	}
	d := &Dumped{Core: core, Facts: image.TaskFacts{
		TID: uint32(s.VTid), Affinity: affinity, IOPrio: ioprio, TimerSlack: uint64(slack.Ret), XFeatures: inUse,
	}}
	if err := d.addAttributes(s, &stat, attr, &extra); err != nil {
		return nil, err
	}
	if s.Leader {
		if err := d.addLeader(s, &st, &stat, &leader); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// pinned gives the CPU mask of a task, none if it has all CPUs of this host.
func pinned(tid int) ([]uint64, error) {
	mask, err := sys.Affinity(tid)
	if err != nil {
		return nil, err
	}
	all, err := procfs.OnlineCPUs()
	if err != nil {
		return nil, err
	}
	for i, w := range all {
		if i >= len(mask) || w&^mask[i] != 0 {
			return mask, nil
		}
	}
	return nil, nil
}

func (d *Dumped) addLeader(s Source, st *procfs.Status, stat *procfs.Stat, l *leaderCalls) error {
	shared, err := sys.PtracePeekSigInfo(s.Tid, true)
	if err != nil {
		return err
	}
	persona, err := readHex(fmt.Sprintf("/proc/%d/personality", s.Pid))
	if err != nil {
		return err
	}
	oom, err := readInt(fmt.Sprintf("/proc/%d/oom_score_adj", s.Pid))
	if err != nil {
		return err
	}
	timers := &timer.TaskTimersEntry{Real: itimer(l.itimers[0]), Virt: itimer(l.itimers[1]), Prof: itimer(l.itimers[2])}
	for i, t := range l.timers {
		pt, err := posixTimer(s.Pid, t, l.timerVal[i], l.overrun[i].Ret)
		if err != nil {
			return err
		}
		timers.Posix = append(timers.Posix, pt)
	}
	tc := &criu_core.TaskCoreEntry{
		TaskState:      proto.Uint32(Alive),
		ExitCode:       proto.Uint32(0),
		Personality:    proto.Uint32(uint32(persona)),
		Flags:          proto.Uint32(uint32(stat.Flags)),
		BlkSigset:      proto.Uint64(s.Mask),
		Comm:           proto.String(st.Name),
		Timers:         timers,
		Rlimits:        &criu_core.TaskRlimitsEntry{},
		SignalsS:       signalsToImage(shared),
		OomScoreAdj:    proto.Int32(int32(oom)),
		ChildSubreaper: proto.Bool(le32(l.subreaper) != 0),
	}
	if v, err := readInt(fmt.Sprintf("/proc/%d/loginuid", s.Pid)); err == nil {
		tc.Loginuid = proto.Uint32(uint32(v))
	}
	for _, b := range l.limits {
		tc.Rlimits.Rlimits = append(tc.Rlimits.Rlimits, &rlimit.RlimitEntry{Cur: proto.Uint64(le64(b)), Max: proto.Uint64(le64(b[8:]))})
	}
	for sig := 1; sig <= Signals; sig++ {
		if imaged(sig) {
			b := l.actions[sig]
			tc.Sigactions = append(tc.Sigactions, &criu_sa.SaEntry{
				Sigaction: proto.Uint64(le64(b)), Flags: proto.Uint64(le64(b[8:])),
				Restorer: proto.Uint64(le64(b[16:])), Mask: proto.Uint64(le64(b[24:])),
			})
		}
	}
	d.Core.Tc = tc
	d.Facts.ExitSignal = ExitSignal(stat)
	if err := d.addProcessFacts(s, l); err != nil {
		return err
	}
	d.Umask = uint32(st.Umask)

	auxv, err := procfs.Auxv(s.Pid)
	if err != nil {
		return err
	}
	u := func(v uint64) *uint64 { return &v }
	d.MM = &mm.MmEntry{
		MmStartCode: u(stat.StartCode), MmEndCode: u(stat.EndCode), MmStartData: u(stat.StartData), MmEndData: u(stat.EndData),
		MmStartStack: u(stat.StartStack), MmStartBrk: u(stat.StartBrk), MmBrk: u(uint64(l.brk.Ret)),
		MmArgStart: u(stat.ArgStart), MmArgEnd: u(stat.ArgEnd), MmEnvStart: u(stat.EnvStart), MmEnvEnd: u(stat.EnvEnd),
		MmSavedAuxv: auxv, Dumpable: proto.Int32(int32(l.dumpable.Ret)), ThpDisabled: proto.Bool(l.thp.Ret > 0),
	}
	return nil
}

// DeadCore is the core image of a zombie; code is its wait status.
func DeadCore(comm string, code int) *criu_core.CoreEntry {
	mtype := criu_core.CoreEntry_X86_64
	return &criu_core.CoreEntry{Mtype: &mtype, Tc: &criu_core.TaskCoreEntry{
		TaskState: proto.Uint32(Dead), ExitCode: proto.Uint32(uint32(code)), Personality: proto.Uint32(0),
		Flags: proto.Uint32(0), BlkSigset: proto.Uint64(0), Comm: proto.String(comm),
	}}
}

func itimer(b []byte) *timer.ItimerEntry {
	return &timer.ItimerEntry{
		Isec: proto.Uint64(le64(b)), Iusec: proto.Uint64(le64(b[8:])),
		Vsec: proto.Uint64(le64(b[16:])), Vusec: proto.Uint64(le64(b[24:])),
	}
}

// Notifications of a POSIX timer (include/uapi/asm-generic/siginfo.h).
const (
	sigevSignal   = 0
	sigevNone     = 1
	sigevThread   = 2
	sigevThreadID = 4
)

func posixTimer(pid int, t procfs.Timer, val []byte, overrun int64) (*timer.PosixTimerEntry, error) {
	notify := uint32(map[string]int{"signal": sigevSignal, "none": sigevNone, "thread": sigevThread}[t.Notify])
	if t.ByTID {
		notify |= sigevThreadID
	}
	e := &timer.PosixTimerEntry{
		ItId: proto.Uint32(uint32(t.ID)), ClockId: proto.Uint32(uint32(t.Clock)), SiSigno: proto.Uint32(uint32(t.Signal)),
		ItSigevNotify: &notify, SivalPtr: proto.Uint64(t.Value), Overrun: proto.Uint32(uint32(max(overrun, 0))),
		Isec: proto.Uint64(le64(val)), Insec: proto.Uint64(le64(val[8:])), Vsec: proto.Uint64(le64(val[16:])), Vnsec: proto.Uint64(le64(val[24:])),
	}
	if notify&sigevThreadID != 0 {
		st, err := procfs.ReadTaskStatus(pid, t.Pid)
		if err != nil {
			return nil, fmt.Errorf("timer %d notifies thread %d: %w", t.ID, t.Pid, err)
		}
		e.NotifyThreadId = proto.Int32(int32(st.NSpid[len(st.NSpid)-1]))
	}
	return e, nil
}

func signalsToImage(sigs [][sys.SigInfoSize]byte) *siginfo.SignalQueueEntry {
	q := &siginfo.SignalQueueEntry{}
	for i := range sigs {
		q.Signals = append(q.Signals, &siginfo.SiginfoEntry{Siginfo: append([]byte(nil), sigs[i][:]...)})
	}
	return q
}

func credsToImage(st *procfs.Status) *creds.CredsEntry {
	caps := func(v uint64) []uint32 { return []uint32{uint32(v), uint32(v >> 32)} }
	e := &creds.CredsEntry{
		Uid: proto.Uint32(st.Uid[0]), Euid: proto.Uint32(st.Uid[1]), Suid: proto.Uint32(st.Uid[2]), Fsuid: proto.Uint32(st.Uid[3]),
		Gid: proto.Uint32(st.Gid[0]), Egid: proto.Uint32(st.Gid[1]), Sgid: proto.Uint32(st.Gid[2]), Fsgid: proto.Uint32(st.Gid[3]),
		CapInh: caps(st.CapInh), CapPrm: caps(st.CapPrm), CapEff: caps(st.CapEff), CapBnd: caps(st.CapBnd), CapAmb: caps(st.CapAmb),
		Groups: st.Groups,
	}
	if st.NoNewPrivs {
		e.NoNewPrivs = proto.Uint32(1)
	}
	return e
}

func readText(path string) (string, error) {
	b, err := procfs.ReadAll(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

func readInt(path string) (int64, error) {
	s, err := readText(path)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}

func readHex(path string) (uint64, error) {
	s, err := readText(path)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}

var errNoCore = errors.New("image holds no state of the task")
