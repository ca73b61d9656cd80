// Package dump owns the reading of a whole tree: what it consists of, what of
// it cannot be carried, and its images. It must not know where images go or
// how they are restored.
package dump

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
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
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/refuse"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// Options says how a tree is read.
type Options struct {
	TCPEstablished bool         // carried, not refused
	TCPClose       bool         // comes back closed
	SkipInFlight   bool         // left behind, not refused
	NetworkLock    string       // as files.Options has it
	External       []string     // keys of external files
	Carry          []plan.Carry // files that travel with their content
	GhostLimit     uint64       // bytes
	FileLocks      bool         // carried, not refused
	Elsewhere      bool         // the tree goes to another host
	// Confirm, if set, says what of a frozen tree's objects must not travel.
	Confirm     func([]plan.Object) []refuse.Problem
	Mounts      ns.MountOptions
	Cgroups     bool // the tree's places and settings are recorded
	Groups      cgroup.DumpOptions
	FreezeGroup string // the directory of the control group that stops the tree, or empty
	// Networks are keys under which the restorer provides network namespaces, by the
	// texts of their links.
	Networks  map[string]string
	EmptyNet  bool // what is in the tree's own network namespace is left out
	ShellJob  bool // a terminal outside the tree is carried, not refused
	ExtUnixSk bool // carried, not refused
	Ends      bool // the tree does not run on
	Host      string
	Files     plan.FileOptions
	Live      *Live            // what the sink has been given already; nil: nothing
	Late      bool             // memory that can come when the tree runs elsewhere is left out
	Early     *files.EarlyCopy // of the files that travel; nil: nothing
}

// process is one process as the collector sees it.
type process struct {
	pid, ppid, vpid, vpgid, vsid int
	comm                         string
	zombie                       bool
	headless                     bool  // its first thread has exited, but others run
	tids, vtids                  []int // the leader first
	status                       procfs.Status
	threadFS                     map[int]*image.FSFacts // of threads that have their own, by tid
	vfork                        int                    // a thread that waits for a child made by vfork
	hot                          []uint64               // addresses that its threads use at once; known once it is dumped

	vmas            []*mem.VMA
	insn            uint64 // address of a system-call instruction, 0: not looked for yet
	exe, cwd, root  uint32 // file ids
	filesID         uint32
	vmID, fsID, sig uint32
}

// shmem is one object of shared anonymous memory.
type shmem struct {
	id   uint32
	file *os.File
	size int64
}

// collector reads everything of a tree but what needs its tasks' cooperation.
type collector struct {
	seccomp task.Filters // of all threads that were read
	log     hclog.Logger
	o       Options
	files   *files.Dumper
	procs   []*process
	running bool         // the tree runs meanwhile
	frozen  *freeze.Tree // if it does not
	idle    bool         // no request of asynchronous I/O is under way
	refusal refuse.Refusal
	shmems  map[uint32]*shmem

	segments   map[uint32]*segment // System V shared memory by id
	semaphores []procfs.SysVObject // sets of a frozen tree's IPC namespace, none if there is no undoer
	undoers    []undoer
	own        ns.Set   // namespaces that the tree has for itself
	links      ns.Links // those of the root
	cgroups    cgroup.Collector
	inGroup    map[int]bool // tids in the control group that stops the tree, nil: there is none
	net        *ns.Network  // of a network namespace of its own
	mounts     *ns.Mounts   // of a mount namespace of its own
	userns     *ns.Users    // its own user namespace, nil: none
	rss        uint64
	limits     map[int]plan.Rlimit
	notEarly   string // why no memory can travel while the tree runs
}

func newCollector(log hclog.Logger, o Options, root int, emit func(image.Entry) error) *collector {
	return &collector{
		log: log, o: o,
		files: files.NewDumper(log, files.Options{TCPEstablished: o.TCPEstablished, TCPClose: o.TCPClose, SkipInFlight: o.SkipInFlight, NetworkLock: o.NetworkLock, External: o.External, Carry: o.Carry, GhostLimit: o.GhostLimit, FileLocks: o.FileLocks, ShellJob: o.ShellJob, FileOptions: o.Files,
			ExtUnixSk: o.ExtUnixSk, Ends: o.Ends, Elsewhere: o.Elsewhere, Early: o.Early}, emit),
		refusal: refuse.Refusal{Doing: fmt.Sprintf("dump of pid %d", root)},
		shmems:  map[uint32]*shmem{}, segments: map[uint32]*segment{},
		limits: map[int]plan.Rlimit{},
	}
}

// close gives back every descriptor that was taken.
func (c *collector) close() error {
	err := c.files.Close()
	c.mounts.Close()
	for _, s := range c.shmems {
		err = errors.Join(err, s.file.Close())
	}
	return err
}

// refuse notes something that cannot be carried.
func (c *collector) refuse(p *process, path, reason, hint string) {
	c.refusal.Add(refuse.Problem{Pid: p.pid, Comm: p.comm, Path: path, Reason: reason, Hint: hint})
}

// err gives the refusal with everything that was found.
func (c *collector) err() error {
	for _, p := range c.files.Refusal() {
		c.refusal.Add(p)
	}
	return c.refusal.Err()
}

// find lists the processes of a running tree.
func find(root int) ([]*process, error) {
	pids, err := procfs.Tree(root)
	if procfs.Gone(err) || errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no process has pid %d: %w", root, unix.ESRCH)
	}
	if err != nil {
		return nil, fmt.Errorf("list the tree of pid %d: %w", root, err)
	}
	var out []*process
	for _, pid := range pids {
		p, err := readProcess(pid)
		if procfs.Gone(err) && pid != root {
			continue // it ended just now
		}
		if err != nil {
			return nil, fmt.Errorf("read pid %d: %w", pid, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// quietWait is how long a look at a running tree waits for what does not last.
const quietWait = time.Second

// findQuiet is find that waits until no process is in a vfork or has threads
// without the first one, as while it executes a program, if that does not last.
func findQuiet(ctx context.Context, root int) ([]*process, error) {
	for until := time.Now().Add(quietWait); ; time.Sleep(2 * time.Millisecond) {
		procs, err := find(root)
		if err != nil || time.Now().After(until) || ctx.Err() != nil {
			return procs, err
		}
		if !slices.ContainsFunc(procs, func(p *process) bool { return p.vfork != 0 || p.headless }) {
			return procs, nil
		}
	}
}

// look collects what a running tree has. The collector is to be closed.
func look(ctx context.Context, log hclog.Logger, pid int, o Options) (*collector, error) {
	procs, err := findQuiet(ctx, pid)
	if err != nil {
		return nil, err
	}
	c := newCollector(log, o, pid, nil)
	if err := c.collect(procs, true); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

func readProcess(pid int) (*process, error) {
	st, err := procfs.ReadStatus(pid)
	if err != nil {
		return nil, err
	}
	p := &process{
		pid: pid, ppid: st.PPid, comm: st.Name, zombie: st.Zombie(), status: st,
		vpid: last(st.NSpid), vpgid: last(st.NSpgid), vsid: last(st.NSsid),
	}
	tids, err := procfs.Tids(pid)
	if p.zombie {
		p.headless = slices.ContainsFunc(tids, func(tid int) bool { return tid != pid && goesOn(pid, tid) })
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	slices.SortFunc(tids, func(a, b int) int {
		if a == pid || b == pid {
			return cmp.Compare(btoi(b == pid), btoi(a == pid))
		}
		return cmp.Compare(a, b)
	})
	for _, tid := range tids {
		ts, err := procfs.ReadTaskStatus(pid, tid)
		if procfs.Gone(err) && tid != pid {
			continue
		}
		if err != nil {
			return nil, err
		}
		if ts.State == 'D' && procfs.InVfork(pid, tid) {
			p.vfork = tid
		}
		p.tids = append(p.tids, tid)
		p.vtids = append(p.vtids, last(ts.NSpid))
	}
	return p, nil
}

// goesOn tells whether a thread runs that is not just ending.
func goesOn(pid, tid int) bool {
	const exiting = 0x4 // PF_EXITING (include/linux/sched.h)
	stat, err := procfs.ReadTaskStat(pid, tid)
	if err != nil || stat.State == 'Z' || stat.State == 'X' || stat.Flags&exiting != 0 {
		return false
	}
	st, err := procfs.ReadTaskStatus(pid, tid)
	return err == nil && (st.SigPnd|st.ShdPnd)&(1<<(uint(unix.SIGKILL)-1)) == 0
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func last(ids []int) int {
	if len(ids) == 0 {
		return 0
	}
	return ids[len(ids)-1]
}

// ended tells whether a process is no more, whose links the kernel then forbids to read.
func ended(pid int) bool {
	st, err := procfs.ReadStat(pid)
	return err != nil || st.Ended()
}

// collect reads the processes; running says that they may change meanwhile.
func (c *collector) collect(procs []*process, running bool) error {
	c.procs, c.running = procs, running
	for _, p := range procs {
		if p.headless {
			c.refuse(p, "", "its first thread has exited while others run, which cannot be rebuilt", "let the first thread wait for the others (pthread_join) in place of ending")
		}
	}
	if procs[0].headless {
		return c.err()
	}
	if procs[0].zombie {
		return fmt.Errorf("pid %d (%s) has exited", procs[0].pid, procs[0].comm)
	}
	if err := c.setOwn(procs[0]); err != nil {
		return fmt.Errorf("read the namespaces of pid %d (%s): %w", procs[0].pid, procs[0].comm, err)
	}
	if c.o.FreezeGroup != "" {
		g, err := cgroup.OpenFreezer(c.o.FreezeGroup)
		if err != nil {
			return err
		}
		if c.inGroup, err = g.Tids(); err != nil {
			return fmt.Errorf("read who is in the control group %s: %w", g.Name(), err)
		}
	}
	// Objects of these namespaces are only seen by a thread inside.
	return ns.Do(procs[0].pid, c.own&(ns.Net|ns.Ipc), func() error { return c.collectInside(running) })
}

func (c *collector) collectInside(running bool) error {
	procs := c.procs
	if err := c.network(); err != nil {
		return err
	}
	if err := c.kernelObjects(); err != nil {
		return err
	}
	for _, p := range procs {
		if p.zombie {
			continue
		}
		err := c.process(p)
		if running && p != procs[0] && (procfs.Gone(err) || err != nil && ended(p.pid)) {
			c.log.Debug("process ended during preflight", "pid", p.pid)
			continue
		}
		if err != nil {
			return fmt.Errorf("read pid %d (%s): %w", p.pid, p.comm, err)
		}
	}
	if err := c.finishSysV(); err != nil {
		return err
	}
	if len(c.refusal.Problems) == 0 && !running {
		if err := c.ask(); err != nil {
			return err
		}
	}
	if len(c.refusal.Problems) > 0 {
		c.files.RunsOn()
	}
	if err := c.files.Finish(); err != nil {
		return err
	}
	for _, name := range c.net.Tuns() {
		if !c.files.HasTun(name) {
			c.refuse(procs[0], "network device "+name, "no descriptor of the tree is attached to it, and it cannot be made again", "remove it (ip link del)")
		}
	}
	return nil
}

// kernelObjects numbers address spaces, file tables, fs and signal handler
// structures, and refuses what different processes cannot share again.
func (c *collector) kernelObjects() error {
	var alive []*process
	for _, p := range c.procs {
		if !p.zombie {
			alive = append(alive, p)
		}
	}
	for _, k := range []struct {
		typ   int
		name  string
		id    func(*process) *uint32
		first uint32
		// shared: those of different processes that are the same are carried.
		shared bool
	}{
		{sys.KcmpVM, "address space", func(p *process) *uint32 { return &p.vmID }, 1, false},
		{sys.KcmpFiles, "descriptor table", func(p *process) *uint32 { return &p.filesID }, 1, true},
		{sys.KcmpFS, "working directory", func(p *process) *uint32 { return &p.fsID }, 1, true},
		{sys.KcmpSighand, "signal handlers", func(p *process) *uint32 { return &p.sig }, 1, false},
	} {
		sorted := slices.Clone(alive)
		var err error
		slices.SortFunc(sorted, func(a, b *process) int {
			if a == b || err != nil {
				return 0
			}
			r, e := sys.KcmpTask(a.pid, b.pid, k.typ)
			if e != nil && !errors.Is(e, unix.ESRCH) {
				err = e
			}
			switch r {
			case sys.Less:
				return -1
			case sys.Greater:
				return 1
			}
			return 0
		})
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("a process in the tree of pid %d (%s) has privileges that this agent lacks, so that it cannot be examined: %w", c.procs[0].pid, c.procs[0].comm, err)
		}
		if err != nil {
			return fmt.Errorf("compare kernel objects of the tree: %w", err)
		}
		n := k.first
		for i, p := range sorted {
			*k.id(p) = n
			if i+1 == len(sorted) {
				break
			}
			next := sorted[i+1]
			if r, err := sys.KcmpTask(p.pid, next.pid, k.typ); err != nil || r != sys.Equal {
				n++
				continue
			}
			switch {
			case k.shared:
			case p.vfork != 0 || next.vfork != 0:
				c.refuse(next, "", fmt.Sprintf("shares its %s with pid %d (%s): a vfork that does not end", k.name, p.pid, p.comm), "wait until it has ended")
			default:
				c.refuse(next, "", fmt.Sprintf("shares its %s with pid %d (%s), as after clone with CLONE_VM, which cannot be carried", k.name, p.pid, p.comm), "")
			}
		}
		if k.shared {
			c.shareable(k.name, k.id)
		}
	}
	return nil
}

// shareable refuses objects that cannot be shared again in the same way.
func (c *collector) shareable(name string, id func(*process) *uint32) {
	index := map[int]int{}
	parent, ids := make([]int, len(c.procs)), make([]uint32, len(c.procs))
	for i, p := range c.procs {
		index[p.pid] = i
		if parent[i] = -1; i > 0 {
			parent[i] = index[p.ppid]
		}
		ids[i] = *id(p)
	}
	with, _, err := task.Share(parent, ids)
	var bad *task.SharingError
	if errors.As(err, &bad) {
		c.refuse(c.procs[bad.Process], "", "stands between processes that share a "+name+" with each other, and other ones that share another; that cannot be carried", "")
	}
	for i, shares := range with {
		// One of another session than its parent's was born before that one began
		// its session, or left to it by a parent that has ended.
		if !shares || c.procs[i].vsid == c.procs[parent[i]].vsid || c.procs[i].vsid == c.procs[i].vpid {
			continue
		}
		p, of := c.procs[i], c.procs[parent[i]]
		if up := parent[parent[i]]; of.vsid != of.vpid || up >= 0 && c.procs[up].vsid != p.vsid {
			c.refuse(p, "", fmt.Sprintf("is an orphan in a session of its own, but shares a %s with its new parent's family; that cannot be carried", name), "")
		}
	}
}

func (c *collector) process(p *process) error {
	if err := c.state(p); err != nil {
		return err
	}
	if err := c.threads(p); err != nil {
		return err
	}
	if err := c.memory(p); err != nil {
		return err
	}
	if err := c.paths(p); err != nil {
		return err
	}
	return c.files.AddProcess(files.Proc{Pid: p.pid, VPid: p.vpid, Comm: p.comm, FilesID: p.filesID})
}

// state refuses what the whole process is in.
func (c *collector) state(p *process) error {
	st := &p.status
	switch {
	case !st.HasMM && !st.Kthread:
		return fmt.Errorf("it is just exiting: %w", unix.ESRCH)
	case st.Kthread:
		c.refuse(p, "", "is a kernel thread", "name a process of user space")
	case st.CoreDumping:
		c.refuse(p, "", "is dumping core", "")
	case st.Tagged:
		c.refuse(p, "", "uses tags in addresses (LAM), which cannot be carried", "")
	}
	c.freezer(p)
	if !st.Kthread && compat(p.pid) {
		c.refuse(p, "", "is a 32-bit program, which cannot be carried", "")
	}
	if err := c.profile(p); err != nil {
		return err
	}
	return c.namespaces(p)
}

// freezer refuses a process that stands still in a frozen control group, unless the
// dump freezes and thaws that group itself, and one that is not in that.
func (c *collector) freezer(p *process) {
	if c.inGroup == nil {
		if ptrace.Frozen(p.pid, p.status.State) {
			c.refuse(p, "", "stands still in a frozen control group, where nothing can be executed in it", "thaw the group: write 0 to its cgroup.freeze (version 1: THAWED to freezer.state), or name it with --freeze-cgroup")
		}
		return
	}
	if !c.inGroup[p.pid] {
		c.refuse(p, "", "is not in the control group "+c.o.FreezeGroup+", which does not stop it", "name a group that all of the tree is in (--freeze-cgroup)")
	}
}

// profile refuses a process that a security module confines otherwise than this
// one, whose context a restored process would have.
func (c *collector) profile(p *process) error {
	its, err := label(p.pid)
	if err != nil {
		return err
	}
	own, err := label(os.Getpid())
	if err != nil {
		return err
	}
	if its != own {
		c.refuse(p, "", fmt.Sprintf("has the security context %q, the agent has %q, which it would come back with", its, own), "run the agent in the same context")
	}
	return nil
}

// label reads the context of a process, empty where no security module gives one.
func label(pid int) (string, error) {
	b, err := procfs.ReadAll(procfs.Path(pid, "attr", "current"))
	if errors.Is(err, unix.EINVAL) {
		return "", nil // no module that gives one
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(procfs.Path(pid)); serr == nil {
			return "", nil
		}
	}
	return strings.TrimRight(string(b), "\x00\n"), err
}

// compat tells whether a process executes a 32-bit program (e_ident, elf(5)).
func compat(pid int) bool {
	f, err := os.Open(procfs.Path(pid, "exe"))
	if err != nil {
		return false // what cannot be opened is refused as its program
	}
	defer func() { _ = f.Close() }()
	var ident [elf.EI_CLASS + 1]byte
	_, err = f.ReadAt(ident[:], 0)
	return err == nil && string(ident[:elf.EI_CLASS]) == elf.ELFMAG && elf.Class(ident[elf.EI_CLASS]) == elf.ELFCLASS32
}

func (c *collector) threads(p *process) error {
	for _, tid := range p.tids {
		st, err := procfs.ReadTaskStatus(p.pid, tid)
		if procfs.Gone(err) && tid != p.pid {
			continue
		}
		if err != nil {
			return err
		}
		what := ""
		if tid != p.pid {
			what = fmt.Sprintf("thread %d ", tid)
		}
		if reason, hint := threadState(&st); reason != "" {
			c.refuse(p, "", what+reason, hint)
		}
		if st.TracerPid != 0 && !ownThread(st.TracerPid) {
			c.refuse(p, "", fmt.Sprintf("%sis being traced by pid %d", what, st.TracerPid), "detach that tracer first")
		}
		cookie, err := sys.SchedCookie(tid)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		if cookie != 0 {
			c.refuse(p, "", what+"is in a group of core scheduling (PR_SCHED_CORE), which cannot be carried", "")
		}
		if tid == p.pid {
			continue
		}
		if r, err := sys.KcmpTask(p.pid, tid, sys.KcmpFiles); err == nil && r != sys.Equal {
			c.refuse(p, "", what+"has descriptors of its own (unshare), which cannot be carried", "")
		}
		if r, err := sys.KcmpTask(p.pid, tid, sys.KcmpFS); err == nil && r != sys.Equal {
			if err := c.threadFS(p, tid, st.Umask); procfs.Gone(err) {
				continue
			} else if err != nil {
				return fmt.Errorf("thread %d: %w", tid, err)
			}
		}
	}
	return nil
}

// threadState says what a thread is in that cannot be carried, empty if nothing.
func threadState(st *procfs.Status) (reason, hint string) {
	switch {
	case (st.SigPnd|st.ShdPnd)&(1<<(uint(unix.SIGTRAP)-1)) != 0:
		return "has a SIGTRAP waiting for it, which cannot be carried", ""
	case slices.Contains(st.ThreadFeatures, "shstk"):
		return "uses a shadow stack, which cannot be carried", "run the program without (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)"
	}
	return "", ""
}

// ownThread tells whether a task is a thread of this process: the tracer.
func ownThread(tid int) bool {
	_, err := os.Stat(procfs.TaskPath(os.Getpid(), tid))
	return err == nil
}

func (c *collector) memory(p *process) error {
	// Nothing of a tree that runs is remembered: it has no Live.
	vmas, refused, err := mem.ReadFrozen(p.pid, c.o.Live.tracker(p.pid), p.status.VmLck)
	if err != nil {
		return err
	}
	if len(vmas) == 0 {
		return fmt.Errorf("it is just exiting: %w", unix.ESRCH)
	}
	c.rss += p.status.RssAnon + p.status.RssShmem
	hasVdso := false
	for _, v := range vmas {
		if why := refused[v]; why != "" {
			c.refuse(p, v.String(), "is "+why+", which cannot be carried", "")
			continue
		}
		if v.Is(mem.Vdso) {
			hasVdso = true
		}
		if err := c.object(p, v); err != nil {
			return err
		}
	}
	if !hasVdso {
		c.refuse(p, "", "has no [vdso] (vdso=0 or removed), through which it is examined", "")
	}
	p.vmas = vmas
	return c.readLimits(p)
}

// object registers what a mapping shows.
func (c *collector) object(p *process, v *mem.VMA) error {
	switch {
	case v.Is(mem.Sysvipc):
		return c.sysv(p, v)
	case v.Is(mem.AnonShared):
		id := c.files.ShmID(v.Dev, v.Ino)
		v.ShmID = uint64(id)
		if c.shmems[id] != nil {
			return nil
		}
		f, err := os.OpenFile(v.Link(p.pid), os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", v, err)
		}
		st, err := f.Stat()
		if err != nil {
			return errors.Join(err, f.Close())
		}
		c.shmems[id] = &shmem{id: id, file: f, size: st.Size()}
	case v.Mapped():
		link, err := os.Readlink(v.Link(p.pid))
		if err != nil {
			return err
		}
		// As a path only: whoever watches the file is not told.
		f, err := os.OpenFile(v.Link(p.pid), unix.O_PATH, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", v, err)
		}
		id, err := c.files.AddMapping(files.Proc{Pid: p.pid, VPid: p.vpid, Comm: p.comm, FilesID: p.filesID}, f, link, v.OpenFlags, v.Offset+v.Len())
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		v.ShmID = uint64(id)
	}
	return nil
}

// paths registers the program, working directory and root.
func (c *collector) paths(p *process) error {
	return c.addPaths(p, p.pid, []path{
		{"exe", os.O_RDONLY, &p.exe},
		{"cwd", os.O_RDONLY | unix.O_DIRECTORY, &p.cwd},
		{"root", os.O_RDONLY | unix.O_DIRECTORY, &p.root},
	})
}

// threadFS registers the directories of a thread that has its own (unshare with
// CLONE_FS). Nobody else may have the same ones.
func (c *collector) threadFS(p *process, tid int, umask uint32) error {
	for _, o := range c.procs {
		for _, other := range o.tids {
			if other == tid || o.pid == p.pid && other == p.pid {
				continue
			}
			if r, err := sys.KcmpTask(tid, other, sys.KcmpFS); err == nil && r == sys.Equal {
				c.refuse(p, "", fmt.Sprintf("thread %d shares a working directory with task %d, but not with its process, which cannot be carried", tid, other), "")
				return nil
			}
		}
	}
	f := &image.FSFacts{Umask: umask}
	if p.threadFS == nil {
		p.threadFS = map[int]*image.FSFacts{}
	}
	p.threadFS[tid] = f
	return c.addPaths(p, tid, []path{
		{"cwd", os.O_RDONLY | unix.O_DIRECTORY, &f.Cwd},
		{"root", os.O_RDONLY | unix.O_DIRECTORY, &f.Root},
	})
}

// path is a link in /proc of a task, the flags with which the restore opens what
// it leads to, and where the id of that is noted.
type path struct {
	role  string
	flags int
	id    *uint32
}

func (c *collector) addPaths(p *process, tid int, paths []path) error {
	for _, x := range paths {
		path := procfs.TaskPath(p.pid, tid, x.role)
		link, err := os.Readlink(path)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(path, x.flags|unix.O_PATH, 0)
		if err != nil {
			return fmt.Errorf("open its %s %s: %w", x.role, link, err)
		}
		*x.id, err = c.files.AddPath(files.Proc{Pid: p.pid, VPid: p.vpid, Comm: p.comm, FilesID: p.filesID}, x.role, f, link, x.flags)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// readLimits notes the highest hard limits: raising one above the agent's own
// needs CAP_SYS_RESOURCE. /proc/PID/limits lists resources in the kernel's order.
func (c *collector) readLimits(p *process) error {
	b, err := procfs.ReadAll(procfs.Path(p.pid, "limits"))
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for res, line := range lines[1:] {
		if len(line) < 68 {
			return fmt.Errorf("read limits: unexpected line %q", line)
		}
		l := plan.Rlimit{Resource: res, Pid: p.pid}
		for _, x := range []struct {
			text string
			to   *uint64
		}{{line[26:47], &l.Cur}, {line[47:68], &l.Max}} {
			text := strings.TrimSpace(x.text)
			if text == "unlimited" {
				*x.to = unix.RLIM_INFINITY
				continue
			}
			if *x.to, err = strconv.ParseUint(text, 10, 64); err != nil {
				return fmt.Errorf("read limits: %w", err)
			}
		}
		if old, ok := c.limits[res]; !ok || l.Max > old.Max {
			c.limits[res] = l
		}
	}
	return nil
}

// plan sums up.
func (c *collector) plan() (*plan.Plan, error) {
	pl := &plan.Plan{Pid: c.procs[0].pid, MemoryBytes: c.rss, XFeatures: arch.XFeatures(), Arch: arch.Name}
	for _, p := range c.procs {
		pl.Tasks = append(pl.Tasks, plan.Task{Pid: p.pid, VPid: p.vpid, VTids: p.vtids, PPid: p.ppid, Comm: p.comm, RSS: p.status.VmRSS})
		if c.userns == nil { // in a namespace of its own it has all
			pl.Capabilities |= p.status.CapPrm
		}
	}
	for _, l := range c.limits {
		pl.Rlimits = append(pl.Rlimits, l)
	}
	slices.SortFunc(pl.Rlimits, func(a, b plan.Rlimit) int { return cmp.Compare(a.Resource, b.Resource) })
	pl.Files, pl.External, pl.Ports, pl.OpenFiles = c.files.Plan()
	pl.Objects = c.files.Objects()
	if c.running {
		files.NoteInherited(c.procs[0].pid, pl.Objects)
		early, err := c.early()
		if err != nil {
			return nil, err
		}
		for _, f := range early {
			pl.EarlyBytes += f.bytes
		}
		if early == nil {
			pl.NotEarly = c.notEarly
		}
	}
	if c.own.Has(ns.Pid) {
		for i := range pl.Tasks {
			pl.Tasks[i].VTids = nil // always free
		}
	}
	if c.own.Has(ns.Mnt) {
		pl.Files = nil // where no host can look before the mounts are made
	}
	if c.own.Has(ns.Net) {
		pl.Ports = nil
	}
	var err error
	if pl.CPUFlags, err = procfs.CPUFlags(); err != nil {
		return nil, err
	}
	if pl.Kernel, err = procfs.KernelRelease(); err != nil {
		return nil, err
	}
	pl.VdsoSHA256, err = VdsoIdentity()
	return pl, err
}
