package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	criu_sa "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-sa"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/rlimit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/siginfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timer"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Check refuses a core image that a restore could not use.
func Check(core *criu_core.CoreEntry, leader bool) error {
	switch {
	case core.GetMtype() != criu_core.CoreEntry_X86_64:
		return fmt.Errorf("image is of a task of architecture %s, this host is %s", core.GetMtype(), arch.Name)
	case leader && core.GetTc() == nil:
		return errNoCore
	case leader && core.GetTc().GetTaskState() == Dead:
		return nil
	case leader && core.GetTc().GetTaskState() != Alive && core.GetTc().GetTaskState() != Stopped:
		return fmt.Errorf("image is of a task in state %d; only running, stopped and ended tasks can be carried", core.GetTc().GetTaskState())
	case leader && core.GetTc().GetTaskState() == Stopped && !StopSignal(unix.Signal(core.GetTc().GetStopSigno())) && core.GetTc().GetStopSigno() != 0:
		return fmt.Errorf("image is of a task that was stopped by signal %d, which stops nothing", core.GetTc().GetStopSigno())
	case core.GetThreadInfo().GetGpregs() == nil, core.GetThreadInfo().GetFpregs() == nil, core.GetThreadCore() == nil:
		return errNoCore
	case core.GetThreadCore().GetSeccompMode() > criu_core.SeccompMode_filter || core.GetThreadCore().GetSeccompMode() < 0:
		return fmt.Errorf("image is of a task in seccomp mode %d, which is unknown", core.GetThreadCore().GetSeccompMode())
	case core.GetTc().GetOldSeccompMode() != criu_core.SeccompMode_disabled:
		return fmt.Errorf("image keeps seccomp for the whole process, as CRIU before 3.12 did, which cannot be carried")
	}
	return nil
}

// StopSignal tells whether a signal is one of those whose default action is to
// stop a process.
func StopSignal(sig unix.Signal) bool {
	switch sig {
	case unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		return true
	}
	return false
}

func put64(vs ...uint64) []byte {
	b := make([]byte, 0, len(vs)*8)
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func put32(vs ...uint32) []byte {
	b := make([]byte, 0, len(vs)*4)
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// ProcessCalls are the system calls that give a new process what belongs to
// all its threads. They run in its leader before any credential is dropped.
func ProcessCalls(core *criu_core.CoreEntry) ([]*ptrace.Call, error) {
	tc := core.GetTc()
	var cs []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		cs = append(cs, ptrace.NewCall(what, nr, args...))
	}
	if n := len(tc.GetSigactions()); n != Signals-2 {
		return nil, fmt.Errorf("image holds %d signal actions, want %d", n, Signals-2)
	}
	i := 0
	for sig := 1; sig <= Signals; sig++ {
		if !imaged(sig) {
			continue
		}
		sa := tc.GetSigactions()[i]
		i++
		if sig == int(unix.SIGTRAP) {
			continue // every batch ends in one: LastAction
		}
		add(fmt.Sprintf("set action of signal %d", sig), unix.SYS_RT_SIGACTION, ptrace.Int(sig),
			ptrace.Bytes(sigaction(sa)), ptrace.Int(0), ptrace.Int(8))
	}
	for res, l := range tc.GetRlimits().GetRlimits() {
		if res == unix.RLIMIT_SIGPENDING {
			var own unix.Rlimit
			if err := unix.Getrlimit(res, &own); err != nil {
				return nil, os.NewSyscallError("getrlimit", err)
			}
			if l.GetMax() <= own.Max {
				continue // LastLimits
			}
			l = &rlimit.RlimitEntry{Cur: l.Max, Max: l.Max}
		}
		add(fmt.Sprintf("set limit %d to %d/%d", res, int64(l.GetCur()), int64(l.GetMax())), unix.SYS_PRLIMIT64, ptrace.Int(0), ptrace.Int(res),
			ptrace.Bytes(put64(l.GetCur(), l.GetMax())), ptrace.Int(0))
	}
	if tc.GetChildSubreaper() {
		add("become child subreaper", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_CHILD_SUBREAPER), ptrace.Int(1))
	}
	return cs, nil
}

// LastLimits are the calls that set what would keep signals and timers of the
// process from being queued and made.
func LastLimits(core *criu_core.CoreEntry) (cs []*ptrace.Call) {
	if l := core.GetTc().GetRlimits().GetRlimits(); len(l) > unix.RLIMIT_SIGPENDING {
		x := l[unix.RLIMIT_SIGPENDING]
		cs = append(cs, ptrace.NewCall("set the limit of pending signals", unix.SYS_PRLIMIT64, ptrace.Int(0), ptrace.Int(unix.RLIMIT_SIGPENDING),
			ptrace.Bytes(put64(x.GetCur(), x.GetMax())), ptrace.Int(0)))
	}
	return cs
}

func sigaction(sa *criu_sa.SaEntry) []byte {
	return put64(sa.GetSigaction(), sa.GetFlags(), sa.GetRestorer(), sa.GetMask())
}

// LastAction sets the action of SIGTRAP, which the breakpoint at the end of a
// batch would reset if the program ignores it, and gives the area back.
// Preconditions: r runs no batch any more.
func LastAction(r *ptrace.Remote, core *criu_core.CoreEntry) error {
	// Signals 1 to 4 come before it, all of them imaged.
	if err := r.SlowAction(unix.SIGTRAP, sigaction(core.GetTc().GetSigactions()[unix.SIGTRAP-1])); err != nil {
		return err
	}
	return r.Unmap()
}

// TimerCalls arm the timers of a process. They run in its leader, last of all:
// time runs from then on.
func TimerCalls(core *criu_core.CoreEntry) []*ptrace.Call {
	t := core.GetTc().GetTimers()
	var cs []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		cs = append(cs, ptrace.NewCall(what, nr, args...))
	}
	for i, it := range []*timer.ItimerEntry{t.GetReal(), t.GetVirt(), t.GetProf()} {
		usec := it.GetVusec()
		if it.GetVsec() == 0 && usec == 0 {
			if i != 0 || it.GetIsec() == 0 && it.GetIusec() == 0 {
				continue // not running
			}
			// It has expired, and the kernel starts the next interval when the
			// pending SIGALRM is taken. The one that this makes joins that one.
			usec = 1
		}
		add(fmt.Sprintf("set interval timer %d", i), unix.SYS_SETITIMER, ptrace.Int(i),
			ptrace.Bytes(put64(it.GetIsec(), it.GetIusec(), it.GetVsec(), usec)), ptrace.Int(0))
	}
	if len(t.GetPosix()) == 0 {
		return cs
	}
	add("choose ids of POSIX timers (Linux 6.16)", unix.SYS_PRCTL, ptrace.Int(prTimerCreateRestoreID), ptrace.Int(1))
	for _, p := range t.GetPosix() {
		// struct sigevent: value, signal, notification, thread, padding to 64 bytes.
		ev := put64(p.GetSivalPtr())
		ev = append(ev, put32(p.GetSiSigno(), p.GetItSigevNotify(), uint32(p.GetNotifyThreadId()))...)
		ev = append(ev, make([]byte, 64-len(ev))...)
		id := put32(p.GetItId())
		what := fmt.Sprintf("timer %d", p.GetItId())
		add("make "+what, unix.SYS_TIMER_CREATE, ptrace.Int(p.GetClockId()), ptrace.Bytes(ev), ptrace.Bytes(id))
		if p.GetVsec() != 0 || p.GetVnsec() != 0 {
			add("arm "+what, unix.SYS_TIMER_SETTIME, ptrace.Int(p.GetItId()), ptrace.Int(0),
				ptrace.Bytes(put64(p.GetIsec(), p.GetInsec(), p.GetVsec(), p.GetVnsec())), ptrace.Int(0))
		}
	}
	add("stop choosing ids of POSIX timers", unix.SYS_PRCTL, ptrace.Int(prTimerCreateRestoreID), ptrace.Int(0))
	return cs
}

// ThreadCalls are the system calls that give a new thread what is its own.
// They run in the thread itself, after which it may have no privilege left.
// cur is the thread as it is now, persona the personality of the first thread.
func ThreadCalls(core *criu_core.CoreEntry, vpid, vtid int, cur *procfs.Status, persona uint32, facts *image.TaskFacts) ([]*ptrace.Call, error) {
	tc := core.GetThreadCore()
	var cs []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		cs = append(cs, ptrace.NewCall(what, nr, args...))
	}
	prctl := func(what string, args ...ptrace.Arg) { add(what, unix.SYS_PRCTL, args...) }

	add("set clear_child_tid", unix.SYS_SET_TID_ADDRESS, ptrace.Int(core.GetThreadInfo().GetClearTidAddr()))
	if tc.GetFutexRla() != 0 {
		add("set robust futex list", unix.SYS_SET_ROBUST_LIST, ptrace.Int(tc.GetFutexRla()), ptrace.Int(tc.GetFutexRlaLen()))
	}
	if s := tc.GetSas(); s != nil {
		const onStack = 1 // SS_ONSTACK is a state, not a setting
		ss := append(put64(s.GetSsSp()), put32(s.GetSsFlags()&^onStack, 0)...)
		add("set alternate signal stack", unix.SYS_SIGALTSTACK, ptrace.Bytes(append(ss, put64(s.GetSsSize())...)), ptrace.Int(0))
	}
	comm := tc.GetComm()
	if comm == "" {
		comm = core.GetTc().GetComm()
	}
	if comm != "" {
		prctl("set name", ptrace.Int(unix.PR_SET_NAME), ptrace.Str(comm))
	}
	if facts != nil && facts.TimerSlack != 0 {
		prctl("set timer slack", ptrace.Int(unix.PR_SET_TIMERSLACK), ptrace.Int(facts.TimerSlack))
	}
	if r := tc.GetRseqEntry(); r.GetRseqAbiPointer() != 0 {
		add("register rseq", unix.SYS_RSEQ, ptrace.Int(r.GetRseqAbiPointer()), ptrace.Int(r.GetRseqAbiSize()), ptrace.Int(0), ptrace.Int(r.GetSignature()))
	}
	cs = append(cs, attributeCalls(persona, facts)...)
	cr, err := credCalls(tc.GetCreds(), cur)
	if err != nil {
		return nil, err
	}
	cs = append(cs, cr...)
	if s := tc.GetPdeathSig(); s != 0 {
		prctl("set parent-death signal", ptrace.Int(unix.PR_SET_PDEATHSIG), ptrace.Int(s))
	}
	if err := signalCalls(add, tc.GetSignalsP(), vpid, vtid); err != nil {
		return nil, err
	}
	if core.GetTc() != nil {
		if err := signalCalls(add, core.GetTc().GetSignalsS(), vpid, 0); err != nil {
			return nil, err
		}
	}
	return cs, nil
}

// signalCalls queue signals again; the kernel takes arbitrary siginfo only from the receiver itself.
func signalCalls(add func(string, uintptr, ...ptrace.Arg), q *siginfo.SignalQueueEntry, vpid, vtid int) error {
	for _, e := range q.GetSignals() {
		si := e.GetSiginfo()
		if len(si) != sys.SigInfoSize {
			return fmt.Errorf("image holds a pending signal of %d bytes, want %d", len(si), sys.SigInfoSize)
		}
		sig := int(le32(si))
		if sig < 1 || sig > Signals {
			return fmt.Errorf("image holds a pending signal with number %d", sig)
		}
		if sig == int(unix.SIGTRAP) {
			return errors.New("image holds a pending SIGTRAP, which cannot be queued while the process is being built")
		}
		what := fmt.Sprintf("queue signal %d", sig)
		if vtid != 0 {
			add(what, unix.SYS_RT_TGSIGQUEUEINFO, ptrace.Int(vpid), ptrace.Int(vtid), ptrace.Int(sig), ptrace.Bytes(si))
		} else {
			add(what, unix.SYS_RT_SIGQUEUEINFO, ptrace.Int(vpid), ptrace.Int(sig), ptrace.Bytes(si))
		}
	}
	return nil
}

func caps(w []uint32) uint64 {
	var v uint64
	for i, x := range w {
		if i < 2 {
			v |= uint64(x) << (32 * i)
		}
	}
	return v
}

// Securebits (include/uapi/linux/securebits.h).
const (
	secNoSetuidFixup = 1 << 2
	secKeepCaps      = 1 << 4
)

// OwnerCalls make a process that is about to end the one of a user.
func OwnerCalls(o *image.OwnerFacts) []*ptrace.Call {
	return []*ptrace.Call{
		ptrace.NewCall("set group ids", unix.SYS_SETRESGID, ptrace.Int(o.GID[0]), ptrace.Int(o.GID[1]), ptrace.Int(o.GID[2])),
		ptrace.NewCall("set file system group", unix.SYS_SETFSGID, ptrace.Int(o.GID[3])),
		ptrace.NewCall("set user ids", unix.SYS_SETRESUID, ptrace.Int(o.UID[0]), ptrace.Int(o.UID[1]), ptrace.Int(o.UID[2])),
		ptrace.NewCall("set file system user", unix.SYS_SETFSUID, ptrace.Int(o.UID[3])),
	}
}

func credCalls(c *creds.CredsEntry, cur *procfs.Status) ([]*ptrace.Call, error) {
	if c == nil {
		return nil, fmt.Errorf("image holds no credentials")
	}
	var cs []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) *ptrace.Call {
		call := ptrace.NewCall(what, nr, args...)
		cs = append(cs, call)
		return call
	}
	inh, prm, eff, bnd, amb := caps(c.GetCapInh()), caps(c.GetCapPrm()), caps(c.GetCapEff()), caps(c.GetCapBnd()), caps(c.GetCapAmb())
	if lack := prm &^ cur.CapPrm; lack != 0 {
		return nil, fmt.Errorf("the task has capabilities %#x that the agent lacks", lack)
	}
	owner := cur.Uid == [4]uint32{c.GetUid(), c.GetEuid(), c.GetSuid(), c.GetFsuid()} &&
		cur.Gid == [4]uint32{c.GetGid(), c.GetEgid(), c.GetSgid(), c.GetFsgid()} &&
		slices.Equal(cur.Groups, c.GetGroups()) && c.GetSecbits() == 0
	same := owner && cur.CapInh == inh && cur.CapPrm == prm && cur.CapEff == eff && cur.CapBnd == bnd && cur.CapAmb == amb
	if err := mayChange(cur, !owner, cur.CapBnd&^bnd != 0); err != nil {
		return nil, err
	}
	if !owner {
		// Without the fixup, changing the uid leaves capabilities alone.
		add("set securebits", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_SECUREBITS), ptrace.Int(secNoSetuidFixup|secKeepCaps))
		if !slices.Equal(cur.Groups, c.GetGroups()) { // which a user namespace may forbid
			groups := ptrace.Int(0)
			if len(c.GetGroups()) > 0 {
				groups = ptrace.Bytes(put32(c.GetGroups()...))
			}
			add("set groups", unix.SYS_SETGROUPS, ptrace.Int(len(c.GetGroups())), groups)
		}
		add("set group ids", unix.SYS_SETRESGID, ptrace.Int(c.GetGid()), ptrace.Int(c.GetEgid()), ptrace.Int(c.GetSgid()))
		add("set file system group", unix.SYS_SETFSGID, ptrace.Int(c.GetFsgid()))
	}
	if !same {
		for drop := cur.CapBnd &^ bnd; drop != 0; drop &= drop - 1 {
			n := bits.TrailingZeros64(drop)
			add(fmt.Sprintf("drop capability %d from the bounding set", n), unix.SYS_PRCTL, ptrace.Int(unix.PR_CAPBSET_DROP), ptrace.Int(n))
		}
		if !owner {
			add("set user ids", unix.SYS_SETRESUID, ptrace.Int(c.GetUid()), ptrace.Int(c.GetEuid()), ptrace.Int(c.GetSuid()))
			add("set file system user", unix.SYS_SETFSUID, ptrace.Int(c.GetFsuid()))
		}
		capset := func(e, p, i uint64) {
			hdr := put32(unix.LINUX_CAPABILITY_VERSION_3, 0)
			data := put32(uint32(e), uint32(p), uint32(i), uint32(e>>32), uint32(p>>32), uint32(i>>32))
			add("set capabilities", unix.SYS_CAPSET, ptrace.Bytes(hdr), ptrace.Bytes(data))
		}
		// Ambient capabilities must be inheritable and permitted first, and
		// securebits may forbid to raise them.
		capset(cur.CapEff, cur.CapPrm, inh)
		add("clear ambient capabilities", unix.SYS_PRCTL, ptrace.Int(unix.PR_CAP_AMBIENT), ptrace.Int(unix.PR_CAP_AMBIENT_CLEAR_ALL), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
		for a := amb; a != 0; a &= a - 1 {
			n := bits.TrailingZeros64(a)
			add(fmt.Sprintf("raise ambient capability %d", n), unix.SYS_PRCTL, ptrace.Int(unix.PR_CAP_AMBIENT), ptrace.Int(unix.PR_CAP_AMBIENT_RAISE), ptrace.Int(n), ptrace.Int(0), ptrace.Int(0))
		}
		if !owner {
			add("set securebits", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_SECUREBITS), ptrace.Int(c.GetSecbits()))
		}
		capset(eff, prm, inh)
	}
	if c.GetNoNewPrivs() != 0 {
		add("set no_new_privs", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_NO_NEW_PRIVS), ptrace.Int(1), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
	}
	return cs, nil
}

// mayChange says which capability a restorer that is not root lacks: for other ids,
// groups and securebits, and to take from the bounding set.
func mayChange(cur *procfs.Status, owner, bounding bool) error {
	var lack []string
	for _, n := range []struct {
		capability uint
		name       string
		needed     bool
	}{
		{unix.CAP_SETUID, "CAP_SETUID", owner}, {unix.CAP_SETGID, "CAP_SETGID", owner}, {unix.CAP_SETPCAP, "CAP_SETPCAP", owner || bounding},
	} {
		if n.needed && cur.CapEff&(1<<n.capability) == 0 {
			lack = append(lack, n.name)
		}
	}
	if lack == nil {
		return nil
	}
	return fmt.Errorf("it has other user or group ids, securebits or bounding capabilities than the restorer, which lacks %s to give it these", strings.Join(lack, ", "))
}

// Outside gives a new task what the agent sets from outside.
// Preconditions: tid is stopped.
func Outside(pid, tid int, core *criu_core.CoreEntry, facts *image.TaskFacts) error {
	tc := core.GetThreadCore()
	if facts != nil {
		// A deadline task must be free to run on all CPUs before it becomes one.
		if err := setAffinity(tid, facts.Affinity); err != nil {
			return fmt.Errorf("set CPU affinity of task %d: %w", tid, err)
		}
	}
	if err := setScheduling(tid, tc, facts); err != nil {
		return err
	}
	if facts != nil {
		if facts.IOPrio != 0 {
			if err := sys.SetIOPrio(tid, facts.IOPrio); err != nil {
				return fmt.Errorf("set I/O priority of task %d: %w", tid, err)
			}
		}
	}
	if core.GetTc() != nil {
		if err := processFiles(pid, facts); err != nil {
			return err
		}
	}
	if core.GetTc() != nil && core.GetTc().OomScoreAdj != nil {
		path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
		if cur, err := readInt(path); err == nil && cur == int64(core.GetTc().GetOomScoreAdj()) {
			return nil
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "%d", core.GetTc().GetOomScoreAdj()), 0); err != nil {
			return fmt.Errorf("set OOM score adjustment %d: %w", core.GetTc().GetOomScoreAdj(), err)
		}
	}
	return nil
}

// setAffinity gives a task its CPU mask. One that was free to run everywhere is
// free here too, whatever the agent itself is pinned to.
func setAffinity(tid int, want []uint64) error {
	if len(want) == 0 {
		want = make([]uint64, 128) // the kernel takes away what does not exist
		for i := range want {
			want[i] = ^uint64(0)
		}
	}
	return sys.SetAffinity(tid, want)
}

// Finish writes extended state, signal mask and registers, after which the
// thread is ready to be let go.
// Preconditions: on the tracer's thread; the thread executes no system call
// for us any more.
func Finish(tid int, core *criu_core.CoreEntry, facts *image.TaskFacts) error {
	base := make([]byte, arch.MaxXState)
	n, err := sys.PtraceGetRegSet(tid, sys.NTX86Xstate, base)
	if err != nil {
		return fmt.Errorf("read extended state of task %d: %w", tid, err)
	}
	xs, err := arch.XStateFromImage(core.GetThreadInfo().GetFpregs(), base[:n])
	if err != nil {
		return fmt.Errorf("task %d: %w", tid, err)
	}
	if err := sys.PtraceSetRegSet(tid, sys.NTX86Xstate, xs); err != nil {
		return fmt.Errorf("write extended state of task %d: %w", tid, err)
	}
	mask := core.GetThreadCore().GetBlkSigset()
	if core.GetThreadCore().BlkSigset == nil {
		mask = core.GetTc().GetBlkSigset()
	}
	if err := sys.PtraceSetSigMask(tid, mask); err != nil {
		return fmt.Errorf("set signal mask of task %d: %w", tid, err)
	}
	// Segment registers may refer to them.
	if err := writeTLS(tid, core.GetThreadInfo().GetTls()); err != nil {
		return err
	}
	if facts != nil && facts.Dispatch != nil {
		d := facts.Dispatch
		if err := sys.PtraceSetSUD(tid, sys.SUDConfig{Mode: d.Mode, Selector: d.Selector, Offset: d.Offset, Len: d.Len}); err != nil {
			return fmt.Errorf("set syscall user dispatch of task %d: %w", tid, err)
		}
	}
	regs, err := arch.RegsFromImage(core.GetThreadInfo().GetGpregs())
	if err != nil {
		return fmt.Errorf("task %d: %w", tid, err)
	}
	return ptrace.SetRegs(tid, &regs)
}
