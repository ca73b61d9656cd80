package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	core_x86 "github.com/checkpoint-restore/go-criu/v8/crit/images/core-x86"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// arch_prctl(2) options (arch/x86/include/uapi/asm/prctl.h).
const (
	archGetCPUID = 0x1011
	archSetCPUID = 0x1012
	// Features of extended state that are only there for who asks (AMX).
	archGetXCompPerm = 0x1022
	archReqXCompPerm = 0x1023
)

// xTileData is XFEATURE_MASK_XTILE_DATA (arch/x86/include/asm/fpu/types.h).
const (
	xTileDataBit = 18
	xTileData    = 1 << xTileDataBit
)

// Flags of a task that prctl(PR_SET_IO_FLUSHER) sets (include/linux/sched.h);
// asking for them with prctl needs CAP_SYS_RESOURCE.
const (
	pfMemallocNoIO  = 0x00080000
	pfLocalThrottle = 0x00100000
)

// Scheduling (include/uapi/linux/sched.h).
const (
	schedOther    = 0
	schedBatch    = 3
	schedDeadline = 6

	schedFlagUtilClamp = 0x60 // SCHED_FLAG_UTIL_CLAMP_MIN and _MAX
	utilMax            = 1024
)

// speculations is how many features PR_SET_SPECULATION_CTRL knows (include/uapi/linux/prctl.h).
const speculations = 3

// numaWords is the size of a mask of memory nodes: 1024 of them.
const numaWords = 16

// Descriptor tables (arch/x86/include/uapi/asm/ldt.h).
const (
	ldtEntry   = 8
	ldtEntries = 8192
	ldtProbe   = 64 * ldtEntry // what nearly every table fits in
)

// attrCalls read attributes of a thread that few programs set.
type attrCalls struct {
	tsc         [4]byte
	tscCall     *ptrace.Call
	mce         *ptrace.Call
	cpuid       *ptrace.Call
	spec        [speculations]*ptrace.Call
	policy      *ptrace.Call
	mode, nodes []byte
}

func (a *attrCalls) calls() []*ptrace.Call {
	var cs []*ptrace.Call
	// A kernel that lacks one of these cannot have it set.
	add := func(what string, nr uintptr, args ...ptrace.Arg) *ptrace.Call {
		c := ptrace.NewCall(what, nr, args...)
		c.MayFail = true
		cs = append(cs, c)
		return c
	}
	zero := ptrace.Int(0)
	a.tscCall = add("read use of the time stamp counter", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_TSC), ptrace.Buf(a.tsc[:]))
	a.mce = add("read machine check policy", unix.SYS_PRCTL, ptrace.Int(unix.PR_MCE_KILL_GET), zero, zero, zero, zero)
	a.cpuid = add("read use of cpuid", unix.SYS_ARCH_PRCTL, ptrace.Int(archGetCPUID), zero)
	for i := range a.spec {
		a.spec[i] = add("read speculation control", unix.SYS_PRCTL, ptrace.Int(unix.PR_GET_SPECULATION_CTRL), ptrace.Int(i), zero, zero, zero)
	}
	a.mode, a.nodes = make([]byte, 4), make([]byte, numaWords*8)
	a.policy = add("read memory policy", unix.SYS_GET_MEMPOLICY, ptrace.Buf(a.mode), ptrace.Buf(a.nodes), ptrace.Int(numaWords*64), zero, zero)
	return cs
}

// addAttributes notes what a thread has set; attr is what the scheduler says of it.
func (d *Dumped) addAttributes(s Source, stat *procfs.Stat, attr *unix.SchedAttr, a *attrCalls) error {
	f := &d.Facts
	var err error
	if f.Sched, err = schedFacts(attr); err != nil {
		return err
	}
	const flusher = pfMemallocNoIO | pfLocalThrottle
	f.IOFlusher = stat.Flags&flusher == flusher
	if t := le32(a.tsc[:]); a.tscCall.Ret == 0 && t != unix.PR_TSC_ENABLE {
		f.TSC = t
	}
	f.NoCPUID = a.cpuid.Ret == 0
	if a.mce.Ret >= 0 && a.mce.Ret != unix.PR_MCE_KILL_DEFAULT {
		f.MCEKill = proto.Uint32(uint32(a.mce.Ret))
	}
	for i, c := range a.spec {
		const set = unix.PR_SPEC_DISABLE | unix.PR_SPEC_FORCE_DISABLE | unix.PR_SPEC_DISABLE_NOEXEC
		if c.Ret > 0 && c.Ret&unix.PR_SPEC_PRCTL != 0 && c.Ret&set != 0 {
			if f.Speculation == nil {
				f.Speculation = make([]uint32, speculations)
			}
			f.Speculation[i] = uint32(c.Ret & set)
		}
	}
	if mode := le32(a.mode); a.policy.Ret == 0 && mode != 0 {
		f.NUMA = &image.NUMAFacts{Mode: mode, Nodes: words(a.nodes)}
	}
	if s.SUD.Mode != 0 {
		f.Dispatch = &image.DispatchFacts{Mode: s.SUD.Mode, Selector: s.SUD.Selector, Offset: s.SUD.Offset, Len: s.SUD.Len}
	}
	if s.Leader {
		return nil
	}
	own, err := readHex(procfs.TaskPath(s.Pid, s.Tid, "personality"))
	if err != nil {
		return err
	}
	first, err := readHex(procfs.Path(s.Pid, "personality"))
	if err != nil {
		return err
	}
	if own != first {
		f.Personality = proto.Uint32(uint32(own))
	}
	return nil
}

// words are those of a mask without the empty ones at its end.
func words(b []byte) (w []uint64) {
	for ; len(b) >= 8; b = b[8:] {
		w = append(w, le64(b))
	}
	for len(w) > 0 && w[len(w)-1] == 0 {
		w = w[:len(w)-1]
	}
	return w
}

// addProcessFacts notes what a process has set.
func (d *Dumped) addProcessFacts(s Source, l *leaderCalls) error {
	filter, err := readHex(procfs.Path(s.Pid, "coredump_filter"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err == nil {
		d.Facts.CoredumpFilter = proto.Uint32(uint32(filter))
	}
	if d.Facts.Autogroup, err = autogroup(s.Pid); err != nil {
		return err
	}
	if l.xperm.Ret == 0 {
		// Tile data is the one feature that is not everybody's.
		d.Facts.XPermission = le64(l.xpermMask) & xTileData
	}
	d.Facts.LDT, err = readLDT(s.Remote, l)
	return err
}

// ExitSignal is what the parent of a process gets at its end, nil for SIGCHLD.
func ExitSignal(stat *procfs.Stat) *uint32 {
	if stat.ExitSignal == int(unix.SIGCHLD) || stat.ExitSignal < 0 {
		return nil
	}
	return proto.Uint32(uint32(stat.ExitSignal))
}

// autogroup reads the niceness of the session of a process; 0 where sessions have none.
func autogroup(pid int) (int32, error) {
	text, err := readText(procfs.Path(pid, "autogroup"))
	if errors.Is(err, os.ErrNotExist) || err == nil && text == "" {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var group, nice int32
	if _, err := fmt.Sscanf(text, "/autogroup-%d nice %d", &group, &nice); err != nil {
		return 0, fmt.Errorf("read autogroup of pid %d, %q: %w", pid, text, err)
	}
	return nice, nil
}

// readLDT gives the whole table, of which the first entries were read along with the rest.
func readLDT(r *ptrace.Remote, l *leaderCalls) ([]byte, error) {
	if l.ldt.Ret <= 0 {
		return nil, nil
	}
	if l.ldt.Ret < ldtProbe {
		return l.ldtBytes[:l.ldt.Ret], nil
	}
	b := make([]byte, ldtEntries*ldtEntry)
	c := ptrace.NewCall("read local descriptor table", unix.SYS_MODIFY_LDT, ptrace.Int(0), ptrace.Buf(b), ptrace.Int(len(b)))
	if err := r.Run(c); err != nil {
		return nil, err
	}
	return b[:c.Ret], nil
}

// schedFacts gives what is not in a core image, nil for nothing.
func schedFacts(a *unix.SchedAttr) (*image.SchedFacts, error) {
	f := image.SchedFacts{Flags: a.Flags}
	switch a.Policy {
	case schedDeadline:
		f.Runtime, f.Deadline, f.Period = a.Runtime, a.Deadline, a.Period
	case schedOther, schedBatch:
		// The slice is always told; the host's own is that of this thread.
		own, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			return nil, os.NewSyscallError("sched_getattr", err)
		}
		if a.Runtime != own.Runtime {
			f.Runtime = a.Runtime
		}
	}
	if a.Util_max != 0 && (a.Util_min != 0 || a.Util_max != utilMax) {
		f.UtilMin, f.UtilMax = a.Util_min, a.Util_max
	}
	if f == (image.SchedFacts{}) {
		return nil, nil
	}
	return &f, nil
}

// niceness reads that of a task, also while another policy makes nothing of it.
func niceness(tid int) (int32, error) {
	// The kernel gives 20 less the niceness (getpriority(2)).
	v, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	if err != nil {
		return 0, os.NewSyscallError("getpriority", err)
	}
	return int32(20 - v), nil
}

// setScheduling makes a task that is stopped scheduled as tc and facts say.
func setScheduling(tid int, tc *criu_core.ThreadCoreEntry, facts *image.TaskFacts) error {
	want := schedAttr(tc, facts)
	if want.Policy != schedOther && want.Policy != schedBatch {
		if err := unix.Setpriority(unix.PRIO_PROCESS, tid, int(want.Nice)); err != nil {
			return fmt.Errorf("set niceness %d of task %d: %w", want.Nice, tid, os.NewSyscallError("setpriority", err))
		}
		want.Nice = 0
	}
	cur, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		return os.NewSyscallError("sched_getattr", err)
	}
	if differs(cur, &want) {
		if err := unix.SchedSetAttr(tid, &want, 0); err != nil {
			return fmt.Errorf("set scheduling of task %d (policy %d, priority %d, nice %d): %w", tid, want.Policy, want.Priority, want.Nice, os.NewSyscallError("sched_setattr", err))
		}
	}
	return nil
}

func schedAttr(tc *criu_core.ThreadCoreEntry, facts *image.TaskFacts) unix.SchedAttr {
	a := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: tc.GetSchedPolicy(), Priority: tc.GetSchedPrio(), Nice: tc.GetSchedNice()}
	if facts != nil && facts.Sched != nil {
		f := facts.Sched
		a.Flags, a.Runtime, a.Deadline, a.Period = f.Flags, f.Runtime, f.Deadline, f.Period
		if f.UtilMax != 0 {
			a.Flags |= schedFlagUtilClamp
			a.Util_min, a.Util_max = f.UtilMin, f.UtilMax
		}
	}
	return a
}

// differs tells whether a new task, as cur says, must be told how it is scheduled.
func differs(cur, want *unix.SchedAttr) bool {
	return cur.Policy != want.Policy || cur.Priority != want.Priority || cur.Nice != want.Nice || cur.Flags != want.Flags ||
		want.Runtime != 0 && cur.Runtime != want.Runtime
}

// attributeCalls give a thread what addAttributes noted. They come before its
// privileges are dropped.
func attributeCalls(persona uint32, f *image.TaskFacts) []*ptrace.Call {
	var cs []*ptrace.Call
	zero := ptrace.Int(0)
	prctl := func(what string, args ...ptrace.Arg) { cs = append(cs, ptrace.NewCall(what, unix.SYS_PRCTL, args...)) }
	if f != nil && f.Personality != nil {
		persona = *f.Personality
	}
	cs = append(cs, ptrace.NewCall("set personality", unix.SYS_PERSONALITY, ptrace.Int(persona)))
	if f == nil {
		return cs
	}
	if f.IOFlusher {
		prctl("become an I/O flusher (needs CAP_SYS_RESOURCE)", ptrace.Int(unix.PR_SET_IO_FLUSHER), ptrace.Int(1), zero, zero, zero)
	}
	if f.TSC != 0 {
		prctl("forbid the time stamp counter", ptrace.Int(unix.PR_SET_TSC), ptrace.Int(f.TSC))
	}
	if f.MCEKill != nil {
		prctl("set machine check policy", ptrace.Int(unix.PR_MCE_KILL), ptrace.Int(unix.PR_MCE_KILL_SET), ptrace.Int(*f.MCEKill), zero, zero)
	}
	for i, v := range f.Speculation {
		if v != 0 {
			prctl(fmt.Sprintf("set speculation control of feature %d, which this host may not offer,", i),
				ptrace.Int(unix.PR_SET_SPECULATION_CTRL), ptrace.Int(i), ptrace.Int(v), zero, zero)
		}
	}
	if f.NoCPUID {
		cs = append(cs, ptrace.NewCall("forbid cpuid, which this CPU may not offer,", unix.SYS_ARCH_PRCTL, ptrace.Int(archSetCPUID), zero))
	}
	if n := f.NUMA; n != nil {
		mask := make([]byte, numaWords*8)
		for i, w := range n.Nodes {
			if i < numaWords {
				binary.LittleEndian.PutUint64(mask[8*i:], w)
			}
		}
		cs = append(cs, ptrace.NewCall(fmt.Sprintf("set memory policy %#x of nodes %x", n.Mode, n.Nodes), unix.SYS_SET_MEMPOLICY,
			ptrace.Int(n.Mode), ptrace.Bytes(mask), ptrace.Int(numaWords*64+1)))
	}
	return cs
}

// ProcessFactCalls give a process what addProcessFacts noted.
func ProcessFactCalls(f *image.TaskFacts) []*ptrace.Call {
	if f == nil {
		return nil
	}
	var cs []*ptrace.Call
	if f.XPermission&xTileData != 0 {
		cs = append(cs, ptrace.NewCall("ask leave to use AMX", unix.SYS_ARCH_PRCTL, ptrace.Int(archReqXCompPerm), ptrace.Int(xTileDataBit)))
	}
	for i := 0; i+ldtEntry <= len(f.LDT) && i < ldtEntries*ldtEntry; i += ldtEntry {
		if raw := le64(f.LDT[i:]); raw != 0 {
			cs = append(cs, ptrace.NewCall(fmt.Sprintf("set entry %d of the local descriptor table", i/ldtEntry), unix.SYS_MODIFY_LDT,
				ptrace.Int(0x11), ptrace.Bytes(descriptor(uint32(i/ldtEntry), raw)), ptrace.Int(sys.UserDescSize)))
		}
	}
	return cs
}

// descriptor gives the struct user_desc with which the kernel makes a segment
// descriptor (fill_ldt, arch/x86/include/asm/desc.h).
func descriptor(entry uint32, raw uint64) []byte {
	bit := func(n uint) uint32 { return uint32(raw>>n) & 1 }
	base := uint32(raw>>16)&0xffffff | uint32(raw>>56)<<24
	limit := uint32(raw)&0xffff | uint32(raw>>32)&0xf0000
	flags := bit(54) | // seg_32bit
		(uint32(raw>>42)&3)<<1 | // contents
		(bit(41)^1)<<3 | // read_exec_only
		bit(55)<<4 | // limit_in_pages
		(bit(47)^1)<<5 | // seg_not_present
		bit(52)<<6 | // useable
		bit(53)<<7 // lm
	return put32(entry, base, limit, flags)
}

// processFiles sets what is a file in /proc.
func processFiles(pid int, f *image.TaskFacts) error {
	if f == nil {
		return nil
	}
	if f.CoredumpFilter != nil {
		path := procfs.Path(pid, "coredump_filter")
		if cur, err := readHex(path); err != nil || cur != uint64(*f.CoredumpFilter) {
			if err := os.WriteFile(path, fmt.Appendf(nil, "%#x", *f.CoredumpFilter), 0); err != nil {
				return fmt.Errorf("set the filter of core files: %w", err)
			}
		}
	}
	cur, err := autogroup(pid)
	if err != nil {
		return err
	}
	if cur != f.Autogroup && f.Autogroup != 0 {
		if err := os.WriteFile(procfs.Path(pid, "autogroup"), fmt.Append(nil, f.Autogroup), 0); err != nil {
			return fmt.Errorf("set niceness %d of its session: %w", f.Autogroup, err)
		}
	}
	return nil
}

// readTLS reads the segments of thread-local storage that 32-bit code uses.
func readTLS(tid int) ([]*core_x86.UserDescT, error) {
	var out []*core_x86.UserDescT
	for _, entry := range sys.TLSEntries {
		b, err := sys.PtraceGetThreadArea(tid, entry)
		if errors.Is(err, unix.EIO) {
			return nil, nil // a kernel without 32-bit programs
		}
		if err != nil {
			return nil, err
		}
		f := le32(b[12:])
		bit := func(n uint) *bool { return proto.Bool(f>>n&1 != 0) }
		out = append(out, &core_x86.UserDescT{
			EntryNumber: proto.Uint32(le32(b[:])), BaseAddr: proto.Uint32(le32(b[4:])), Limit: proto.Uint32(le32(b[8:])),
			Seg_32Bit: bit(0), ContentsL: bit(1), ContentsH: bit(2), ReadExecOnly: bit(3), LimitInPages: bit(4), SegNotPresent: bit(5), Usable: bit(6),
		})
	}
	return out, nil
}

// writeTLS sets those segments that are not empty.
func writeTLS(tid int, tls []*core_x86.UserDescT) error {
	for i, t := range tls {
		if i >= len(sys.TLSEntries) {
			return fmt.Errorf("task %d: image holds %d segments of thread-local storage, which are at most %d", tid, len(tls), len(sys.TLSEntries))
		}
		if t.GetBaseAddr() == 0 && t.GetLimit() == 0 && t.GetSegNotPresent() {
			continue
		}
		flags := uint32(0)
		for n, set := range []bool{t.GetSeg_32Bit(), t.GetContentsL(), t.GetContentsH(), t.GetReadExecOnly(), t.GetLimitInPages(), t.GetSegNotPresent(), t.GetUsable()} {
			if set {
				flags |= 1 << n
			}
		}
		b := [sys.UserDescSize]byte(put32(uint32(sys.TLSEntries[i]), t.GetBaseAddr(), t.GetLimit(), flags))
		if err := sys.PtraceSetThreadArea(tid, sys.TLSEntries[i], b); err != nil {
			return fmt.Errorf("set segment %d of task %d: %w", sys.TLSEntries[i], tid, err)
		}
	}
	return nil
}

// LoginUID gives a process the user who logged in (credentials of the audit
// subsystem), which only it itself can; done tells whether it has that user.
func LoginUID(r *ptrace.Remote, pid int, core *criu_core.CoreEntry) (done bool, err error) {
	want := core.GetTc().Loginuid
	if want == nil {
		return true, nil
	}
	text, err := readText(procfs.Path(pid, "loginuid"))
	if errors.Is(err, os.ErrNotExist) {
		return *want == ^uint32(0), nil
	}
	if err != nil || text == fmt.Sprint(*want) {
		return err == nil, err
	}
	open := ptrace.NewCall("open /proc/self/loginuid", unix.SYS_OPENAT, ptrace.Int(unix.AT_FDCWD), ptrace.Str("/proc/self/loginuid"), ptrace.Int(unix.O_WRONLY|unix.O_CLOEXEC), ptrace.Int(0))
	open.MayFail = true // a tree need not have a /proc
	if err := r.Run(open); err != nil || open.Ret < 0 {
		return false, err
	}
	value := fmt.Sprint(*want)
	write := ptrace.NewCall("write /proc/self/loginuid", unix.SYS_WRITE, ptrace.Int(open.Ret), ptrace.Bytes([]byte(value)), ptrace.Int(len(value)))
	write.MayFail = true
	if err := r.Run(write, ptrace.NewCall("close /proc/self/loginuid", unix.SYS_CLOSE, ptrace.Int(open.Ret))); err != nil {
		return false, err
	}
	return write.Ret == int64(len(value)), nil
}

// validLDT tells whether an image's table can be one.
func validLDT(b []byte) bool { return len(b)%ldtEntry == 0 && len(b) <= ldtEntries*ldtEntry }

// CheckFacts refuses facts that a restore could not use.
func CheckFacts(f *image.TaskFacts) error {
	switch {
	case f == nil:
		return nil
	case f.ExitSignal != nil && *f.ExitSignal > Signals:
		return fmt.Errorf("signal %d at its end", *f.ExitSignal)
	case f.XPermission&^xTileData != 0:
		return fmt.Errorf("leave to use unknown features %#x of extended state", f.XPermission&^xTileData)
	case !validLDT(f.LDT):
		return fmt.Errorf("local descriptor table of %d bytes", len(f.LDT))
	case len(f.Speculation) > speculations:
		return fmt.Errorf("%d features of speculation, more than the %d that are known", len(f.Speculation), speculations)
	case f.NUMA != nil && len(f.NUMA.Nodes) > numaWords:
		return fmt.Errorf("memory policy with a mask of %d words", len(f.NUMA.Nodes))
	}
	return nil
}
