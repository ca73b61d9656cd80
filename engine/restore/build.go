package restore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sort"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/cgroup"
	"godwit/engine/files"
	"godwit/engine/freeze"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/paging"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// Options says how a tree is rebuilt.
type Options struct {
	TCPEstablished  bool
	TCPClose        bool
	TCPOutside      bool
	LockSkip        bool
	ExtUnixSk       bool
	Inherit         map[string]files.Inherit
	NewPidNamespace bool
	FileLocks       bool
	Namespaces      NamespaceOptions
	// Stage is called at StageSetup and StagePostSetup; it may be nil.
	Stage   func(stage string, pid int) error
	Cgroups cgroup.Options
	Files   plan.FileRestoreOptions
	Carry   []plan.Place // where files that travelled may be placed
	Mark    string       // part of the names under which they wait for it
	// Note, if set, is told of what is made in its place at once, before that.
	Note          func(paths []string) error
	TimeNamespace Clocks
	// ShellJob lands sessions whose leader is not in the tree in that of this
	// process, and puts Terminal in the place of one that was outside the tree.
	ShellJob bool
	Terminal *os.File // nil: there is none
	// Lead: in a new session that the root leads, if it did not lead one.
	Lead bool
	// Paging serves what is missing (late.go); it may be nil.
	Paging func([]paging.Space) error
	// Sibling makes the root a child of this process's parent.
	Sibling bool
}

// Tree is a rebuilt tree. None of its tasks has run yet; all are stopped with
// their final registers.
type Tree struct {
	log    hclog.Logger
	o      Options
	tracer *ptrace.Tracer
	model  *model
	stub   *stub
	// seed is the root that is no child of this process, nil otherwise.
	seed    *stub
	ch      *channel
	files   *files.Restorer
	landing *files.Landing // TCP connections that lead out of the tree
	shmems  map[uint32]*os.File
	// terminals: the images have pseudoterminals that are to be made.
	terminals bool
	users     *ns.Users           // the user namespace of the tree's own, nil: none
	cgroups   *cgroup.Restorer    // nil: not looked at
	join      map[ns.Set]*os.File // namespaces of the tree that are there already
	joined    ns.Set              // their kinds
	rootDir   *os.File            // root directory of a mount namespace of the tree's own
	links     *files.Links        // names to remove once the tree runs
	cuts      *files.Cuts         // files to truncate just before
	carried   *files.Carried      // files to be placed before it runs
	made      []int               // System V segments that go with a Discard
	spare     uint64
	filler    *filler // nil: memory is not inherited
	early     *early  // what came before the images, nil: nothing
	// earlyFiles are files of which content came before the images.
	earlyFiles *files.EarlyFiles

	paths  []string               // socket files that go with a Discard
	extras map[int]*ptrace.Remote // processes made only to act, by pid in the images
	// live are the threads that exist, by tid on this host, in order of birth.
	live []int
	late []latecomer
	pids []int
	root int
	init int // the stub that stays as init of a new pid namespace, 0 otherwise
	// resized is the process group that is to be told of another size of its terminal.
	resized int
	done    bool
	st      Stats
}

// Stats counts what a restore made.
type Stats struct {
	Processes, Threads int
	Pages              uint64        // of private mappings
	ComparedPages      uint64        // of those, compared with what was inherited
	SharedPages        uint64        // of those, equal to what was inherited, and not written
	Bytes              uint64        // of data, all kinds
	ForkDur            time.Duration // making all processes and threads
	RestoreDur         time.Duration // from the read images to a tree that stands
}

// Stats says what the restore did.
func (t *Tree) Stats() Stats { return t.st }

// reap waits for a killed tracee.
func reap(tid int) error { return freeze.Reap(tid) }

// Restore rebuilds a tree from a source. If it fails, nothing of it is left.
func Restore(ctx context.Context, log hclog.Logger, src image.Source, o Options) (_ *Tree, err error) {
	t := &Tree{log: log, o: o, model: &model{}, tracer: ptrace.NewTracer(), shmems: map[uint32]*os.File{}, extras: map[int]*ptrace.Remote{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Discard())
		}
	}()
	if t.ch, err = newChannel(); err != nil {
		return nil, err
	}
	if err := t.nurse(ctx, src); err != nil {
		return nil, err
	}
	set, err := src.Images(ctx)
	if err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	if o.Lead {
		if err := lead(set); err != nil {
			return nil, err
		}
	}
	m, err := parse(set)
	if err != nil {
		return nil, err
	}
	m.outliveAgent(log)
	t.model, t.terminals = m, files.MakesTerminals(set)
	if err := t.tracer.Do(func() error { return t.graft(set) }); err != nil {
		return nil, err
	}
	start := time.Now()
	if err := t.checkSibling(); err != nil {
		return nil, err
	}
	if err := t.findJoined(set); err != nil {
		return nil, err
	}
	if t.users, err = ns.LoadUsers(set, m.own); err != nil {
		return nil, err
	}
	if err := t.readCgroups(set); err != nil {
		return nil, err
	}
	if err := t.readFiles(set); err != nil {
		return nil, err
	}
	data := &filler{t: t, src: src}
	defer func() { err = errors.Join(err, data.close()) }()
	if err := t.tracer.Do(func() error { return t.first(set) }); err != nil {
		return nil, err
	}
	// Processes come before files, since a program may have files of its own in /proc
	// open, unless it matters that they come after the memory of their parents.
	family := m.family(set)
	if family {
		if o, ok := src.(image.Orderer); ok {
			o.Order(m.births())
		}
		if err := t.openFiles(); err != nil {
			return nil, err
		}
		t.filler = data
	}
	if err := t.tracer.Do(func() error { return t.plant(ctx) }); err != nil {
		return nil, err
	}
	if err := t.enterCgroups(); err != nil {
		return nil, err
	}
	t.st.ForkDur = time.Since(start)
	for _, p := range m.procs {
		t.st.Processes++
		t.st.Threads += len(p.threads)
	}
	log.Debug("processes made", "root", t.root, "processes", t.st.Processes, "threads", t.st.Threads, "duration_us", t.st.ForkDur.Microseconds())
	if !family {
		if err := t.openFiles(); err != nil {
			return nil, err
		}
	}
	if err := t.openUnix(); err != nil {
		return nil, err
	}
	if err := t.tracer.Do(func() error { return t.build(ctx) }); err != nil {
		return nil, err
	}
	log.Debug("tree built", "processes", len(m.procs), "duration_ms", time.Since(start).Milliseconds())
	if err := data.rest(ctx); err != nil {
		return nil, err
	}
	log.Debug("data written", "pages_shared", t.st.SharedPages, "pages", t.st.Pages, "bytes", t.st.Bytes, "duration_ms", time.Since(start).Milliseconds())
	if err := t.postpone(set); err != nil {
		return nil, err
	}
	if err := t.files.Seal(); err != nil {
		return nil, err
	}
	if err := t.tracer.Do(func() error { return t.complete(ctx) }); err != nil {
		return nil, err
	}
	t.landing, t.carried = t.files.TakeLanding(), t.files.TakeCarried()
	t.st.RestoreDur = time.Since(start)
	log.Debug("tree stands", "duration_ms", t.st.RestoreDur.Milliseconds())
	return t, t.releaseFiles()
}

// first makes the stub and the root.
func (t *Tree) first(set *image.Set) error {
	if err := t.sow(); err != nil {
		return err
	}
	return t.rootProcess(set)
}

// plant makes all other processes and all threads, each with the spare memory and
// the address space of the stub, or of what it is cloned from.
func (t *Tree) plant(ctx context.Context) error {
	if err := t.processes(ctx); err != nil {
		return err
	}
	for _, p := range t.model.procs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.loginUID(p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if err := t.cloneThreads(p); err != nil {
			return fmt.Errorf("make threads of %s: %w", p, err)
		}
	}
	return nil
}

// loginUID gives a process the user who logged in, before its threads are made, which inherit it.
func (t *Tree) loginUID(p *process) error {
	if p.zombie {
		return nil
	}
	done, err := task.LoginUID(p.remote(), p.remote().Tid, p.core())
	if err == nil && !done {
		t.log.Warn("the user who logged in is the restorer's: the audit rules of this host do not let it be another",
			"pid", p.vpid, "loginuid", int32(p.core().GetTc().GetLoginuid()))
	}
	return err
}

// sow starts the stub and gives it the spare memory.
func (t *Tree) sow() (err error) {
	if t.early != nil {
		return t.setClocks()
	}
	kind := stubKind{newPid: t.newPid(), sameSession: t.o.ShellJob && !t.o.Lead, terminals: t.terminals}
	if t.stub, err = startStub(t.ch, kind); err != nil {
		return err
	}
	taken := append(append([]span(nil), t.stub.special...), t.stub.rest...)
	if t.o.Sibling {
		if err := t.sowSibling(); err != nil {
			return err
		}
		taken = append(append(taken, t.seed.special...), t.seed.rest...)
	}
	if t.spare, err = t.model.spare(taken); err != nil {
		return err
	}
	if err := t.stub.prepare(t.spare); err != nil {
		return err
	}
	return t.setClocks()
}

// readFiles checks what the images say of files, before anything is built.
func (t *Tree) readFiles(set *image.Set) (err error) {
	fo := files.RestoreOptions{TCPEstablished: t.o.TCPEstablished, TCPClose: t.o.TCPClose, TCPOutside: t.o.TCPOutside, LockSkip: t.o.LockSkip, OwnNet: t.inside().Has(ns.Net), Inherit: t.o.Inherit, FileLocks: t.o.FileLocks, ShellJob: t.o.ShellJob, Terminal: t.o.Terminal, TerminalOwned: t.o.Lead, Carry: t.o.Carry, FileRestoreOptions: t.o.Files}
	fo.Early, fo.Mark, fo.Note = t.earlyFiles, t.o.Mark, t.o.Note
	fo.ExtUnixSk, fo.Actor = t.o.ExtUnixSk, t.actor
	fo.Pid = t.hostPid
	t.files, err = files.NewRestorer(t.log, set, fo)
	return err
}

func (t *Tree) openFiles() (err error) {
	// What the tree uses in these namespaces is made by a thread inside.
	if err := ns.Do(t.root, t.inside(), t.files.Open); err != nil {
		return err
	}
	for id, o := range t.model.sharedAnons() {
		if t.shmems[id], err = sys.SharedAnon(o.size, o.huge); err != nil {
			return fmt.Errorf("make %d bytes of shared memory%s: %w", o.size, hugeHint(o.huge != 0), err)
		}
	}
	return t.inIPC(t.openSegments)
}

// hostPid gives the tid on this host of a task of the tree.
func (t *Tree) hostPid(vtid int) (int, bool) {
	for _, p := range t.model.procs {
		for _, th := range p.threads {
			if th.vtid == vtid && th.remote != nil {
				return th.remote.Tid, true
			}
		}
	}
	return 0, false
}

// openInside opens a path in the mount namespace of the tree.
func (t *Tree) openInside(path string, flags int, mode uint32) (*os.File, error) {
	root := t.rootDir
	if root == nil {
		var err error
		if root, err = os.OpenFile(procfs.Path(t.stub.remote.Tid, "root"), unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return nil, err
		}
		defer func() { _ = root.Close() }()
	}
	how := &unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	if flags&unix.O_CREAT != 0 {
		how.Mode = uint64(mode)
	}
	fd, err := unix.Openat2(int(root.Fd()), path, how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// build makes the empty address spaces.
func (t *Tree) build(ctx context.Context) error {
	for _, p := range t.model.procs {
		if p.zombie || p.built {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.addressSpace(ctx, p); err != nil {
			return err
		}
	}
	return t.inIPC(t.removeSegments)
}

// born takes over a task that r's target just made.
func (t *Tree) born(r *ptrace.Remote, area uint64) (*ptrace.Remote, error) {
	if len(r.Born) == 0 {
		return nil, fmt.Errorf("task %d made no new task", r.Tid)
	}
	tid := r.Born[len(r.Born)-1]
	return t.adopt(tid, r, area)
}

func (t *Tree) adopt(tid int, parent *ptrace.Remote, area uint64) (*ptrace.Remote, error) {
	t.live = append(t.live, tid)
	n := &ptrace.Remote{Tid: tid, Insn: parent.Insn, Area: area}
	var err error
	if n.Base, err = ptrace.GetRegs(tid); err != nil {
		return nil, err
	}
	_, err = ptrace.BlockSignals(tid)
	return n, err
}

// cloneArgs is struct clone_args (include/uapi/linux/sched.h) with the one
// pid of set_tid behind it.
func cloneArgs(flags, exitSignal uint64, tid int) ptrace.Arg {
	const size = 88
	b := make([]byte, size+8)
	le := binary.LittleEndian
	le.PutUint64(b, flags)
	le.PutUint64(b[32:], exitSignal)
	if tid == 0 {
		return ptrace.Arg{In: b}
	}
	le.PutUint64(b[72:], 1)
	le.PutUint32(b[size:], uint32(tid))
	return ptrace.Arg{In: b, Rel: []ptrace.Rel{{At: 64, To: size}}}
}

const cloneArgsSize = 88

// clone makes a task with a chosen id (0: any) out of r's target.
func (t *Tree) clone(r *ptrace.Remote, flags, exitSignal uint64, tid int) (*ptrace.Remote, error) {
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		err := r.Run(ptrace.NewCall(fmt.Sprintf("clone task %d", tid), unix.SYS_CLONE3, cloneArgs(flags, exitSignal, tid), ptrace.Int(cloneArgsSize)))
		if err == nil {
			return t.born(r, r.Area)
		}
		// A tree that ended a moment ago may wait for its init to reap it.
		if !errors.Is(err, unix.EEXIST) || living(tid) || time.Since(start) > reapWait {
			return nil, t.explain(err, tid)
		}
	}
}

// reapWait is how long a restore waits for a dead holder of a pid to be reaped.
const reapWait = 10 * time.Second

// living tells whether a task with that id exists and has not exited.
func living(tid int) bool {
	st, err := procfs.ReadStat(tid)
	return err == nil && !st.Zombie() && st.State != 'X'
}

// explain names the holder of a pid that is taken.
func (t *Tree) explain(err error, tid int) error {
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if t.newPid() || t.model.own.Own.Has(ns.Pid) {
		return fmt.Errorf("pid %d is taken in the new pid namespace: %w", tid, err)
	}
	return fmt.Errorf("%w: %w", PidTaken(tid), err)
}

// vdsoSpans pairs the special mappings that a new process has with those that
// the images want; they can be moved but not be resized.
func (t *Tree) vdsoSpans(p *process) (from, to []span, err error) {
	to = p.special()
	from = append(from, t.stub.special...)
	if p.heritage != nil {
		from = p.heritage.special()
	}
	sortSpans(from)
	sortSpans(to)
	bad := len(from) != len(to)
	for i := 0; !bad && i < len(from); i++ {
		bad = from[i].end-from[i].start != to[i].end-to[i].start ||
			from[i].start-from[0].start != to[i].start-to[0].start
	}
	if bad {
		return nil, nil, fmt.Errorf("its [vdso] and [vvar] are laid out differently on this kernel (%x here, %x there)", from, to)
	}
	return from, to, nil
}

// special are the mappings of a process that the kernel provides.
func (p *process) special() (out []span) {
	for _, v := range p.vmas {
		if v.Special() {
			out = append(out, span{v.Start, v.End})
		}
	}
	return out
}

// mremap flags (include/uapi/linux/mman.h).
const mremapFixed = unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED

// addressSpace replaces the mappings that a process was cloned with by its own,
// empty but for what it has from its parent.
func (t *Tree) addressSpace(ctx context.Context, p *process) error {
	err := t.makeRoom(p)
	if err == nil {
		err = t.mapAll(p)
	}
	if err == nil && p.graft != nil {
		err = t.heal(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("build the address space of %s: %w", p, err)
	}
	p.built = true
	t.log.Debug("address space built", "pid", p.vpid, "comm", p.comm(), "mappings", len(p.vmas), "inherits", p.heritage != nil)
	return nil
}

func (t *Tree) makeRoom(p *process) error {
	from, to, err := t.vdsoSpans(p)
	if err != nil {
		return err
	}
	r := p.remote()
	var calls []*ptrace.Call
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	park := t.spare + ptrace.AreaSize
	move := func(what string, from, n, to uint64) { calls = append(calls, moveCall(what, from, n, to)) }
	if n := from[len(from)-1].end - from[0].start; n > parkSize {
		return fmt.Errorf("[vdso] and [vvar] take %d bytes", n)
	}
	for _, s := range from {
		if from[0].start != park { // as that of a process with early memory is
			move("park [vdso]", s.start, s.end-s.start, park+s.start-from[0].start)
		}
	}
	switch {
	case p.graft != nil:
		calls = append(calls, t.prune(p)...)
	case p.heritage == nil:
		for _, s := range t.stub.rest {
			add("unmap the stub", unix.SYS_MUNMAP, ptrace.Int(s.start), ptrace.Int(s.end-s.start))
		}
	default:
		mem.Inherit(p.vmas, p.heritage.vmas, t.hugeFile)
		calls = append(calls, t.strip(p)...)
	}
	for i, s := range from {
		move("place [vdso]", park+s.start-from[0].start, s.end-s.start, to[i].start)
	}
	if err := r.Run(calls...); err != nil {
		return err
	}
	r.Insn += to[0].start - from[0].start
	return nil
}

// mapAll maps everything.
func (t *Tree) mapAll(p *process) error {
	r := p.remote()
	use, err := t.mapFiles(p)
	if err != nil {
		return err
	}
	var list []*os.File
	index := map[*os.File]int{}
	for _, f := range use {
		if _, ok := index[f]; !ok && f != nil {
			index[f] = len(list)
			list = append(list, f)
		}
	}
	nums, err := t.ch.give(r, list)
	if err != nil {
		return err
	}
	calls, err := t.attach(p)
	if err != nil {
		return err
	}
	var locks []*ptrace.Call
	var locked []*mem.VMA
	for i, v := range p.vmas {
		if v.Special() || v.Kept != 0 {
			continue
		}
		if !v.Is(mem.Sysvipc) {
			flags := v.Flags&(unix.MAP_SHARED|unix.MAP_PRIVATE|mem.Droppable|unix.MAP_GROWSDOWN|unix.MAP_NORESERVE) | unix.MAP_FIXED_NOREPLACE
			fd, off := ^uint64(0), uint64(0)
			if f := use[i]; f != nil {
				fd, off = uint64(nums[index[f]]), v.Offset
			} else {
				flags |= unix.MAP_ANONYMOUS | v.Flags&mem.HugeFlags
			}
			if v.Is(mem.AioRing) { // rings
				flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED_NOREPLACE
			}
			for _, r := range p.missing(v) {
				calls = append(calls, ptrace.NewCall("make "+v.String()+hugeHint(v.Flags&unix.MAP_HUGETLB != 0), unix.SYS_MMAP, ptrace.Int(r.Start), ptrace.Int(r.End-r.Start),
					ptrace.Int(p.firstProt(v)), ptrace.Int(flags), ptrace.Int(fd), ptrace.Int(off)))
			}
		}
		if v.Is(mem.AioRing) {
			continue
		}
		calls = append(calls, p.protect(v)...)
		calls = append(calls, advise(v)...)
		if v.Flags&unix.MAP_LOCKED != 0 {
			c := lock(v)
			calls, locks, locked = append(calls, c), append(locks, c), append(locked, v)
		}
	}
	if c := mem.THPCall(p.mm.GetThpDisabled(), p.memory, p.heritage != nil); c != nil {
		calls = append(calls, c)
	}
	for _, n := range nums {
		calls = append(calls, ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(n)))
	}
	if err := r.Run(calls...); err != nil {
		return err
	}
	return checkLocks(r.Tid, locked, locks)
}

// hugeHint is for messages on what may be of huge pages.
func hugeHint(huge bool) string {
	if !huge {
		return ""
	}
	return " of huge pages (reserve some with vm.nr_hugepages)"
}

// mapFiles gives the file behind each VMA, nil for anonymous memory.
func (t *Tree) mapFiles(p *process) ([]*os.File, error) {
	out := make([]*os.File, len(p.vmas))
	for i, v := range p.vmas {
		switch {
		case v.Is(mem.Sysvipc), v.Kept != 0:
		case v.Is(mem.AnonShared):
			out[i] = t.shmems[uint32(v.ShmID)]
		case v.Mapped():
			f, err := t.files.File(uint32(v.ShmID))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v, err)
			}
			out[i] = f
		}
	}
	return out, nil
}

// advise makes the calls that give a new, empty mapping its flags and guard regions.
func advise(v *mem.VMA) (calls []*ptrace.Call) {
	// Before it is locked: a locked mapping takes no guard regions.
	for _, g := range v.Guards {
		calls = append(calls, ptrace.NewCall(fmt.Sprintf("install guard region %x-%x in %s", g.Start, g.End, v), unix.SYS_MADVISE,
			ptrace.Int(g.Start), ptrace.Int(g.End-g.Start), ptrace.Int(mem.AdviseGuard)))
	}
	for a := range 64 {
		if v.Madvise&(1<<uint(a)) != 0 {
			calls = append(calls, ptrace.NewCall(fmt.Sprintf("advise %d on %s", a, v), unix.SYS_MADVISE, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(a)))
		}
	}
	if v.Name != "" {
		calls = append(calls, mem.NameCall(v))
	}
	return calls
}

// lock makes the call that locks a mapping. It may fail: see checkLocks.
func lock(v *mem.VMA) *ptrace.Call {
	flags := 0
	if v.OnFault {
		flags = unix.MLOCK_ONFAULT
	}
	c := ptrace.NewCall("lock "+v.String(), unix.SYS_MLOCK2, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(flags))
	c.MayFail = true
	return c
}

// checkLocks judges calls of lock: one that fails with ENOMEM has locked the
// mapping all the same if it was only not able to populate it, as one that is
// inaccessible, has guard regions or reaches past the end of its file.
func checkLocks(tid int, vmas []*mem.VMA, calls []*ptrace.Call) error {
	var maps []procfs.SmapsEntry
	for i, c := range calls {
		v := vmas[i]
		if c.Ret == 0 {
			continue
		}
		if c.Ret == -int64(unix.ENOMEM) {
			if maps == nil {
				var err error
				if maps, err = procfs.ReadSmaps(tid); err != nil {
					return err
				}
			}
			j := sort.Search(len(maps), func(j int) bool { return maps[j].End > v.Start })
			if j < len(maps) && maps[j].Start <= v.Start && maps[j].Has("lo") {
				continue
			}
		}
		return fmt.Errorf("%s: %w", c.What, ptrace.Errno("mlock", c.Ret))
	}
	return nil
}

// mmMap builds PR_SET_MM_MAP: struct prctl_mm_map (include/uapi/linux/prctl.h)
// with the auxiliary vector behind it.
func mmMap(p *process, exe int) *ptrace.Call {
	const size = 104
	m := p.mm
	var b []byte
	for _, v := range []uint64{
		m.GetMmStartCode(), m.GetMmEndCode(), m.GetMmStartData(), m.GetMmEndData(), m.GetMmStartBrk(), m.GetMmBrk(), m.GetMmStartStack(),
		m.GetMmArgStart(), m.GetMmArgEnd(), m.GetMmEnvStart(), m.GetMmEnvEnd(), 0,
	} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.GetMmSavedAuxv())*8))
	b = binary.LittleEndian.AppendUint32(b, uint32(exe))
	for _, v := range m.GetMmSavedAuxv() {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return ptrace.NewCall("set the fields of the address space", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_MM), ptrace.Int(unix.PR_SET_MM_MAP),
		ptrace.Arg{In: b, Rel: []ptrace.Rel{{At: 88, To: size}}}, ptrace.Int(size), ptrace.Int(0))
}

// threadFlags are those of pthread_create that make a thread.
const threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM

func (t *Tree) cloneThreads(p *process) error {
	if len(p.threads) == 1 {
		return nil
	}
	if err := t.widen(p); err != nil {
		return err
	}
	lead := p.remote()
	var calls []*ptrace.Call
	for _, th := range p.threads[1:] {
		c := ptrace.NewCall(fmt.Sprintf("clone thread %d", th.vtid), unix.SYS_CLONE3, cloneArgs(threadFlags, 0, th.vtid), ptrace.Int(cloneArgsSize))
		calls = append(calls, c)
	}
	err := lead.Run(calls...)
	// Whatever was born is ours to end, also after an error.
	for i, tid := range lead.Born {
		r, aerr := t.adopt(tid, lead, lead.Area)
		if aerr != nil {
			return errors.Join(err, aerr)
		}
		if err == nil {
			p.threads[1+i].remote = r
		}
	}
	if err != nil {
		for i, c := range calls {
			if c.Ret == -int64(unix.EEXIST) {
				return t.explain(err, p.threads[1+i].vtid)
			}
		}
	}
	return err
}

func (t *Tree) fillFile(id image.DataID, off uint64, b []byte) error {
	if id.Kind == image.Digest {
		return t.files.CheckSum(id.ID, b)
	}
	if id.Kind == image.Cut {
		return t.files.Cut(id.ID, b)
	}
	f, err := t.files.DataFile(id, off, b)
	if err != nil {
		return err
	}
	if id.Kind == image.Shmem && f == nil {
		f = t.shmems[id.ID]
	}
	if f == nil {
		return fmt.Errorf("images hold data of %s, which nothing refers to", id)
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	// Whole pages may reach past the end of an object that ends inside one.
	if end := off + uint64(len(b)); id.Kind == image.Shmem && end > uint64(st.Size()) {
		if off >= uint64(st.Size()) || end-uint64(st.Size()) >= arch.PageSize {
			return fmt.Errorf("images hold data of %s at %#x, behind its end at %#x", id, off, st.Size())
		}
		b = b[:uint64(st.Size())-off]
	}
	err = files.Write(f, b, off)
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("write %s: the file system here is full: %w", f.Name(), err)
	}
	if err != nil {
		return fmt.Errorf("write data of %s: %w", id, err)
	}
	return nil
}

// complete gives every process its descriptors and state and every thread its
// final registers.
func (t *Tree) complete(ctx context.Context) error {
	for _, p := range t.model.procs {
		if p.zombie {
			continue
		}
		if err := t.filled(p); err != nil {
			return err
		}
		if err := t.place(p); err != nil {
			return fmt.Errorf("descriptors of %s: %w", p, err)
		}
	}
	for _, p := range t.model.tables() {
		if err := t.descriptors(p); err != nil {
			return fmt.Errorf("descriptors of %s: %w", p, err)
		}
	}
	if err := t.zombies(); err != nil {
		return err
	}
	if err := t.stops(); err != nil {
		return err
	}
	for _, p := range t.model.tables() {
		calls, err := t.files.Calls(p.filesID)
		if err != nil {
			return fmt.Errorf("descriptors of %s: %w", p, err)
		}
		if err := p.remote().Run(calls...); err != nil {
			return fmt.Errorf("descriptors of %s: %w", p, err)
		}
	}
	for _, p := range t.model.procs {
		if p.zombie {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.rings(p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		calls, err := mem.LastCalls(p.vmas, p.memory, p.core().GetTc().GetMembarrierRegistrationMask())
		if err != nil {
			return fmt.Errorf("images of %s: %w", p, err)
		}
		if err := p.remote().Run(calls...); err != nil {
			return fmt.Errorf("build the address space of %s: %w", p, err)
		}
		if err := t.state(p); err != nil {
			return fmt.Errorf("state of %s: %w", p, err)
		}
		t.log.Debug("process stands", "pid", p.vpid, "comm", p.comm(), "threads", len(p.threads))
	}
	if err := t.files.Last(); err != nil {
		return err
	}
	return t.lastWords()
}

// rings makes the rings of asynchronous I/O of a process, of which the contents
// lie in their places.
func (t *Tree) rings(p *process) error {
	for _, v := range p.vmas {
		if !v.Is(mem.AioRing) {
			continue
		}
		if err := mem.MakeRing(p.remote(), v); err != nil {
			return err
		}
		if err := p.remote().Run(advise(v)...); err != nil {
			return err
		}
	}
	return nil
}

// lastWords ends or releases the stub: nothing more is cloned from it.
func (t *Tree) lastWords() error {
	if !t.newPid() {
		err := t.stub.kill()
		t.stub = nil
		return err
	}
	return nil
}

func (t *Tree) state(p *process) error {
	lead := p.remote()
	cur, err := procfs.ReadStatus(lead.Tid)
	if err != nil {
		return err
	}
	cur = t.users.Map().Inside(cur)
	calls, err := task.ProcessCalls(p.core())
	if err != nil {
		return err
	}
	if p.reapChild {
		// What clones and zombies of ours left behind is not the program's.
		calls = append([]*ptrace.Call{drainSIGCHLD()}, calls...)
	}
	calls = append(calls, ptrace.NewCall("set umask", unix.SYS_UMASK, ptrace.Int(p.fs.GetUmask())))
	calls = append(calls, task.ProcessFactCalls(p.leader().facts)...)
	if err := lead.Run(calls...); err != nil {
		return err
	}
	if err := t.seccomp(p); err != nil {
		return err
	}
	for i := len(p.threads) - 1; i >= 0; i-- {
		th := p.threads[i]
		if err := task.Outside(lead.Tid, th.remote.Tid, th.core, th.facts); err != nil {
			return err
		}
		calls, err := task.ThreadCalls(th.core, p.vpid, th.vtid, &cur, p.core().GetTc().GetPersonality(), th.facts)
		if err != nil {
			return err
		}
		if i == 0 {
			calls = append(task.TimerCalls(th.core), calls...)
			calls = append(calls, task.LastLimits(th.core)...)
			if d := p.mm.GetDumpable(); d == 0 || d == 1 {
				calls = append(calls, ptrace.NewCall("set dumpable", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_DUMPABLE), ptrace.Int(d)))
			}
		}
		if err := th.remote.Run(calls...); err != nil {
			return err
		}
	}
	if err := task.LastAction(lead, p.core()); err != nil {
		return err
	}
	for _, th := range p.threads {
		if err := task.Finish(th.remote.Tid, th.core, th.facts); err != nil {
			return err
		}
	}
	return nil
}

func (t *Tree) releaseFiles() error {
	var err error
	if t.files != nil {
		t.links, t.cuts = t.files.TakeLinks(), t.files.TakeCuts()
		err = t.files.Close()
		t.files = nil
	}
	for _, f := range t.shmems {
		err = errors.Join(err, f.Close())
	}
	if t.rootDir != nil {
		err = errors.Join(err, t.rootDir.Close())
		t.rootDir = nil
	}
	t.shmems = nil
	if t.ch != nil {
		err = errors.Join(err, t.ch.close())
		t.ch = nil
	}
	return err
}

// Root is the pid of the root process on this host.
func (t *Tree) Root() int { return t.root }

// Pids are the processes on this host, the root first.
func (t *Tree) Pids() []int { return t.pids }

// Init is the pid of the first process of a new pid namespace, else 0.
func (t *Tree) Init() int { return t.init }

// Waiting lists the files that Run places.
func (t *Tree) Waiting() ([]files.Waiting, error) { return t.carried.Waiting() }

// Run lets all tasks go. It may be called once.
func (t *Tree) Run() error { return t.run(false) }

// RunStopped is Run that leaves every process stopped by SIGSTOP before its
// first instruction.
func (t *Tree) RunStopped() error { return t.run(true) }

func (t *Tree) run(stopped bool) error {
	if t.done {
		return errors.New("the tree was let go or discarded already")
	}
	if err := t.carried.Place(); err != nil {
		return err
	}
	if err := t.landing.Release(t.log); err != nil {
		return err
	}
	if err := t.cuts.Apply(); err != nil {
		return err
	}
	t.done = true
	if cerr := t.carried.Close(); cerr != nil {
		t.log.Warn("a file that was replaced stays beside the new one", "error", cerr)
	}
	if lerr := t.links.Remove(); lerr != nil {
		t.log.Warn("a name that the dump made for a file stays", "error", lerr)
	}
	err := t.tracer.Do(func() error {
		var errs []error
		if t.stub != nil {
			errs = append(errs, t.stub.release())
		}
		for _, p := range t.model.procs {
			if stopped && !p.zombie {
				// Queued before any thread of it is let go.
				if err := unix.Kill(p.remote().Tid, unix.SIGSTOP); err != nil {
					errs = append(errs, fmt.Errorf("stop %s: %w", p, os.NewSyscallError("kill", err)))
				}
			}
			for _, th := range p.threads {
				if p.zombie {
					continue
				}
				if th.remote.Stopped {
					errs = append(errs, os.NewSyscallError("tgkill", unix.Tgkill(p.remote().Tid, th.remote.Tid, unix.SIGSTOP)))
				}
				if err := sys.PtraceDetach(th.remote.Tid, 0); err != nil {
					errs = append(errs, fmt.Errorf("let task %d of %s go: %w", th.vtid, p, err))
				}
			}
		}
		return errors.Join(errs...)
	})
	err = errors.Join(err, t.leaveCgroups(false))
	t.tracer.Close()
	if t.resized != 0 {
		_ = unix.Kill(-t.resized, unix.SIGWINCH) // whoever is not there needs none
	}
	return err
}

// Discard ends everything that was built; it may be called at any time before
// Run, and again.
func (t *Tree) Discard() error {
	if t.done {
		return nil
	}
	t.done = true
	err := t.tracer.Do(func() error {
		var errs []error
		for _, tid := range t.live {
			if err := unix.Kill(tid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, os.NewSyscallError("kill", err))
			}
		}
		// The youngest first: leaders are reaped after their threads, and
		// children before the parents that would have to wait for them.
		for i := len(t.live) - 1; i >= 0; i-- {
			errs = append(errs, reap(t.live[i]))
		}
		if t.stub != nil {
			errs = append(errs, t.stub.kill())
		}
		return errors.Join(errs...)
	})
	t.tracer.Close()
	for _, p := range t.paths {
		if rerr := os.Remove(p); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	t.landing.Close()
	err = errors.Join(err, t.discardSegments(), t.leaveCgroups(true), t.carried.Remove(), t.releaseFiles(), t.earlyFiles.Remove())
	t.links.Close()
	t.cuts.Close()
	return err
}
