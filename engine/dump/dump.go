package dump

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	fsimg "github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	timensimg "github.com/checkpoint-restore/go-criu/v8/crit/images/timens"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/files"
	"godwit/engine/freeze"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/task"
)

// Stats counts what a dump read.
type Stats struct {
	Processes, Threads int
	Pages              uint64 // of the process memory and of shared memory
	ShmemPages         uint64 // those of shared memory
	Scanned            uint64 // pages that were looked at in private mappings
	Bytes              uint64 // of data, all kinds
	CarriedBytes       uint64 // of those, content of files that travel with their names
	Segments           []int  // ids of System V shared memory
	Sockets            []files.SocketFile
	Moved              []files.Moved // files that leave with the tree
	DataDur            time.Duration // reading all data and giving it to the sink
	// Connections are the TCP connections, for the tree's end; the caller closes
	// them. Nil if there are none or the dump failed.
	Connections *files.Connections
	// Links are the names that were made for files without one; the caller
	// removes or leaves them.
	Links *files.Links
	// Late are the processes whose memory can be asked for, by their pids in the images.
	Late map[uint32]Late
	// Accepted are the connections that the tree lacks if it runs on after all.
	Accepted files.LostConnections
}

// imgVersion is CRIU's CRTOOLS_IMAGES_V1_1: images with two magics.
const imgVersion = 2

// Preflight looks at a running tree and says what it needs. With everything that
// cannot be carried, as a *refuse.Refusal, comes the plan for the rest. Nothing
// of the tree is touched.
func Preflight(ctx context.Context, log hclog.Logger, pid int, o Options) (*plan.Plan, error) {
	var p *plan.Plan
	err := patiently(ctx, pid, func() (err error) {
		p, err = preflight(ctx, log, pid, o)
		return err
	})
	return p, err
}

// patiently looks at a running tree, again and again while that fails for what passes.
func patiently(ctx context.Context, pid int, look func() error) error {
	for until := time.Now().Add(quietWait); ; time.Sleep(2 * time.Millisecond) {
		err := look()
		// A process that executes another program has nothing of the old one any more,
		// and while threads end the kernel forbids to read their links.
		passing := procfs.Gone(err) && !ended(pid) || errors.Is(err, fs.ErrPermission)
		if !passing || time.Now().After(until) || ctx.Err() != nil {
			return err
		}
	}
}

func preflight(ctx context.Context, log hclog.Logger, pid int, o Options) (_ *plan.Plan, err error) {
	c, err := look(ctx, log, pid, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	refusal := c.err()
	p, err := c.plan()
	return p, errors.Join(refusal, err)
}

// Dump reads a frozen tree and gives its images and data to the sink. The tree
// stays frozen and is left exactly as it was, also after an error. After a
// *refuse.Refusal the sink has been given nothing.
func Dump(ctx context.Context, log hclog.Logger, t *freeze.Tree, o Options, sink image.Sink) (Stats, error) {
	st, err := dump(ctx, log, t, o, sink, false)
	if errors.Is(err, errIdle) {
		return dump(ctx, log, t, o, sink, true)
	}
	return st, err
}

// dump is Dump of a tree; idle says that it is known to have no request of
// asynchronous I/O under way.
func dump(ctx context.Context, log hclog.Logger, t *freeze.Tree, o Options, sink image.Sink, idle bool) (st Stats, err error) {
	var held []image.Entry // until it is known that everything can be carried
	c := newCollector(log, o, t.Root().Pid, func(e image.Entry) error {
		held = append(held, e)
		return nil
	})
	c.frozen, c.idle = t, idle
	defer func() { err = errors.Join(err, c.close()) }()
	procs := make([]*process, 0, len(t.Procs))
	for _, fp := range t.Procs {
		p, err := readProcess(fp.Pid)
		if err != nil {
			return st, fmt.Errorf("read pid %d (%s): %w", fp.Pid, fp.Comm, err)
		}
		procs = append(procs, p)
		st.Processes++
		st.Threads += len(fp.Threads)
	}
	if err := c.collect(procs, false); err != nil {
		return st, err
	}
	if o.Confirm != nil {
		for _, p := range o.Confirm(c.files.Objects()) {
			c.refusal.Add(p)
		}
	}
	if err := c.err(); err != nil {
		return st, err
	}
	for _, e := range held {
		if err := sink.Entry(e); err != nil {
			return st, err
		}
	}
	facts, err := c.images(ctx, t, sink)
	if err != nil {
		return st, err
	}
	facts.Precopied = o.Live.settle(c)
	if o.Late {
		if facts.Late, st.Late, err = o.Live.late(c); err != nil {
			return st, err
		}
	}
	facts.Files = c.files.Facts()
	st.Sockets, st.Moved = c.files.SocketFiles(), c.files.MovedFiles()
	facts.Ghosts = c.files.GhostFacts()
	facts.TTYs = c.files.TTYFacts()
	facts.SysV = c.sysvFacts()
	facts.Users = c.userns.Facts()
	facts.Mounts, facts.NetSysctls = c.mounts.Facts(), c.net.Sysctls()
	if !c.own.Has(ns.Ipc) { // else they end with their namespace
		for _, s := range facts.SysV {
			st.Segments = append(st.Segments, int(s.ID))
		}
	}
	if err := ns.Dump(ns.Dumped{Pid: c.procs[0].pid, Own: c.own, Shm: facts.SysV, Mounts: c.mounts, Net: c.net, Users: c.userns}, sink.Entry); err != nil {
		return st, err
	}
	if err := sink.Facts(facts); err != nil {
		return st, err
	}
	if err := sink.Sealed(); err != nil {
		return st, err
	}
	if err := c.data(ctx, sink, &st); err != nil {
		return st, err
	}
	st.Connections = c.files.TakeConnections()
	st.Links = c.files.TakeLinks()
	st.Accepted = c.files.TakeAccepted()
	return st, nil
}

func (c *collector) images(ctx context.Context, t *freeze.Tree, sink image.Sink) (*image.Facts, error) {
	facts, err := c.facts()
	if err != nil {
		return nil, err
	}
	put := func(file, magic string, m proto.Message) error {
		return sink.Entry(image.Entry{File: file, Magic: magic, Msg: m})
	}
	inTree := map[int]bool{}
	for _, p := range c.procs {
		inTree[p.pid] = true
	}
	for i, p := range c.procs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e := &pstree.PstreeEntry{Pid: u32(p.vpid), Ppid: u32(0), Pgid: u32(p.vpgid), Sid: u32(p.vsid)}
		if inTree[p.ppid] && i > 0 {
			e.Ppid = u32(c.byPid(p.ppid).vpid)
		}
		for _, v := range p.vtids {
			e.Threads = append(e.Threads, uint32(v))
		}
		if err := put(image.PstreeFile, image.MagicPstree, e); err != nil {
			return nil, err
		}
		if p.zombie {
			if err := put(image.CoreFile(uint32(p.vpid)), image.MagicCore, task.DeadCore(p.comm, t.Procs[i].ExitCode)); err != nil {
				return nil, err
			}
			stat, err := procfs.ReadStat(p.pid)
			if err != nil {
				return nil, fmt.Errorf("read state of pid %d (%s): %w", p.pid, p.comm, err)
			}
			owner := c.userns.Map().Inside(p.status)
			facts.Tasks = append(facts.Tasks, image.TaskFacts{
				TID: uint32(p.vpid), ExitSignal: task.ExitSignal(&stat), Owner: &image.OwnerFacts{UID: owner.Uid, GID: owner.Gid},
			})
			continue
		}
		if err := c.processImages(t, t.Procs[i], p, facts, put); err != nil {
			return nil, fmt.Errorf("dump pid %d (%s): %w", p.pid, p.comm, err)
		}
		c.log.Debug("process dumped", "pid", p.pid, "pid_inside", p.vpid, "comm", p.comm, "threads", len(p.vtids), "mappings", len(p.vmas))
	}
	if err := put(image.TimensFile(c.procs[0].ids(c.own).GetTimeNsId()), image.MagicTimens, timens(facts)); err != nil {
		return nil, err
	}
	if c.o.Cgroups {
		e, err := c.cgroups.Image(c.o.Groups)
		if err != nil {
			return nil, fmt.Errorf("read the cgroups of the tree: %w", err)
		}
		if err := put(image.CgroupFile, image.MagicCgroup, e); err != nil {
			return nil, err
		}
	}
	if e := c.seccomp.Image(); e != nil {
		if err := put(image.SeccompFile, image.MagicSeccomp, e); err != nil {
			return nil, err
		}
	}
	inv := &inventory.InventoryEntry{
		ImgVersion: proto.Uint32(imgVersion), FdinfoPerId: proto.Bool(true), NsPerId: proto.Bool(true),
		RootIds: c.procs[0].ids(0), Lsmtype: inventory.Lsmtype_NO_LSM.Enum(), DumpUptime: proto.Uint64(uint64(facts.BoottimeNS) / 1000),
	}
	if c.o.Cgroups {
		inv.RootCgSet = u32(1) // the first that was read
	}
	c.files.NoteLock(inv)
	return facts, put(image.InventoryFile, image.MagicInventory, inv)
}

func u32(v int) *uint32 { return proto.Uint32(uint32(v)) }

func (c *collector) byPid(pid int) *process {
	for _, p := range c.procs {
		if p.pid == pid {
			return p
		}
	}
	return nil
}

// ids numbers the kernel objects of a process in a tree that has the namespaces
// of own for itself.
func (p *process) ids(own ns.Set) *criu_core.TaskKobjIdsEntry {
	e := &criu_core.TaskKobjIdsEntry{VmId: &p.vmID, FilesId: &p.filesID, FsId: &p.fsID, SighandId: &p.sig}
	own.SetIDs(e)
	return e
}

func (c *collector) processImages(t *freeze.Tree, fp *freeze.Proc, p *process, facts *image.Facts, put func(string, string, proto.Message) error) error {
	dumped, state, err := c.readTasks(t, fp, p)
	if err != nil {
		return err
	}
	vpid := uint32(p.vpid)
	leader := dumped[0]
	for i, d := range dumped {
		d.Facts.FS = p.threadFS[fp.Threads[i].Tid]
		facts.Tasks = append(facts.Tasks, d.Facts)
		if i == 0 {
			d.Core.Ids = p.ids(c.own)
			if state.Membarriers != 0 {
				d.Core.Tc.MembarrierRegistrationMask = proto.Uint32(state.Membarriers)
			}
			if fp.Stop != 0 {
				d.Core.Tc.TaskState = u32(task.Stopped)
				d.Core.Tc.StopSigno = u32(int(fp.Stop))
				facts.Tasks[len(facts.Tasks)-1].StopSeen = fp.StopSeen
			}
		}
		if c.o.Cgroups {
			id, err := c.cgroups.Add(fp.Pid, fp.Threads[i].Tid, c.o.Groups)
			if err != nil {
				return err
			}
			d.Core.ThreadCore.CgSet = &id
			if i == 0 {
				d.Core.Tc.CgSet = &id
			}
		}
		if err := put(image.CoreFile(uint32(fp.Threads[i].VTid)), image.MagicCore, d.Core); err != nil {
			return err
		}
	}
	mm := leader.MM
	mm.ExeFileId = &p.exe
	state.Facts.PID = vpid
	mem.AddFacts(&state.Facts, p.vmas)
	if mem.HasFacts(&state.Facts) {
		facts.Memory = append(facts.Memory, state.Facts)
	}
	for _, v := range p.vmas {
		mm.Vmas = append(mm.Vmas, v.ToImage())
	}
	mm.Aios = mem.RingsToImage(p.vmas)
	if err := put(image.MMFile(vpid), image.MagicMM, mm); err != nil {
		return err
	}
	if err := put(image.IDsFile(vpid), image.MagicIDs, p.ids(c.own)); err != nil {
		return err
	}
	return put(image.FSFile(vpid), image.MagicFS, &fsimg.FsEntry{CwdId: &p.cwd, RootId: &p.root, Umask: &leader.Umask})
}

// borrow makes a thread execute system calls for us, in the area of another thread
// of its process or, for 0, in one of its own.
// Preconditions: on the tracer's thread.
func (c *collector) borrow(fp *freeze.Proc, p *process, th *freeze.Thread, area uint64) (*ptrace.Borrowed, error) {
	if p.insn == 0 {
		i := slices.IndexFunc(p.vmas, func(v *mem.VMA) bool { return v.Is(mem.Vdso) })
		if i < 0 {
			return nil, errors.New("it has no [vdso]")
		}
		var err error
		if p.insn, err = ptrace.FindInsn(fp.Pid, p.vmas[i].Start, p.vmas[i].End); err != nil {
			return nil, err
		}
	}
	trapIgnored := p.status.SigIgn&(1<<(uint(unix.SIGTRAP)-1)) != 0
	return ptrace.Borrow(th.Tid, p.insn, th.Regs, trapIgnored, area)
}

// readTasks borrows every thread of a process in turn to read what only it can
// tell, and puts all of them back, whatever happens.
func (c *collector) readTasks(t *freeze.Tree, fp *freeze.Proc, p *process) (out []*task.Dumped, state *mem.State, err error) {
	err = t.Tracer.Do(func() (err error) {
		var area uint64
		var lead *ptrace.Borrowed
		defer func() {
			if lead != nil {
				err = errors.Join(err, lead.Return(false))
				fp.Leader().Resend = fp.Leader().Resend || lead.Stopped
			}
		}()
		for i, th := range fp.Threads {
			b, berr := c.borrow(fp, p, th, area)
			if berr != nil {
				return berr
			}
			if i == 0 {
				lead, area = b, b.Area
			}
			// The actions of signals come first: the end of a batch may change one.
			d, derr := task.Dump(task.Source{
				Pid: fp.Pid, Tid: th.Tid, VTid: th.VTid, Leader: i == 0,
				Regs: th.Regs, Rseq: th.Rseq, Mask: b.Mask(), SUD: b.SUD(), Remote: &b.Remote, Filters: &c.seccomp, IDs: c.userns.Map(),
			})
			if i > 0 {
				derr = errors.Join(derr, b.Return(true))
				th.Resend = th.Resend || b.Stopped
			}
			if derr == nil && i == 0 {
				state, derr = mem.ReadState(&b.Remote, fp.Pid, p.status.VmLck)
			}
			if derr != nil {
				return derr
			}
			p.hot = append(append(p.hot, th.Regs.Near()...), th.Rseq.Pointer)
			out = append(out, d)
		}
		return nil
	})
	return out, state, err
}

func (c *collector) facts() (*image.Facts, error) {
	f := &image.Facts{Version: image.FactsVersion, Host: c.o.Host, Arch: arch.Name}
	var err error
	if f.BootID, err = procfs.BootID(); err != nil {
		return nil, err
	}
	if f.Kernel, err = procfs.KernelRelease(); err != nil {
		return nil, err
	}
	if f.VdsoSHA256, err = VdsoIdentity(); err != nil {
		return nil, err
	}
	for clock, to := range map[int32]*int64{unix.CLOCK_MONOTONIC: &f.MonotonicNS, unix.CLOCK_BOOTTIME: &f.BoottimeNS, unix.CLOCK_REALTIME: &f.RealtimeNS} {
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			return nil, os.NewSyscallError("clock_gettime", err)
		}
		*to = ts.Nano()
	}
	return f, c.treeClocks(f)
}

// treeClocks makes clocks of this process those of the tree.
func (c *collector) treeClocks(f *image.Facts) error {
	tree, err := procfs.ReadTimeOffsets(c.procs[0].pid)
	if err != nil {
		return err
	}
	own, err := procfs.ReadTimeOffsets(os.Getpid())
	if err != nil {
		return err
	}
	f.MonotonicOffsetNS, f.BoottimeOffsetNS = tree.Monotonic, tree.Boottime
	f.MonotonicNS += tree.Monotonic - own.Monotonic
	f.BoottimeNS += tree.Boottime - own.Boottime
	return nil
}

// timens is the image of the tree's clocks.
func timens(f *image.Facts) *timensimg.TimensEntry {
	at := func(ns int64) *timensimg.Timespec {
		ns = max(ns, 0)
		return &timensimg.Timespec{TvSec: proto.Uint64(uint64(ns / 1e9)), TvNsec: proto.Uint64(uint64(ns % 1e9))}
	}
	return &timensimg.TimensEntry{Monotonic: at(f.MonotonicNS), Boottime: at(f.BoottimeNS)}
}

// data streams the contents of memory, shared memory and deleted files.
func (c *collector) data(ctx context.Context, sink image.Sink, st *Stats) error {
	start := time.Now()
	for _, i := range plan.Births(c.kin()) {
		p := c.procs[i]
		if p.zombie {
			continue
		}
		r, err := mem.NewReader(p.pid)
		if err != nil {
			return err
		}
		r.NoZeros = c.o.Elsewhere
		begin := time.Now()
		n, vmas := uint64(0), p.vmas
		_, late := st.Late[uint32(p.vpid)]
		if t := c.o.Live.keeps(p.pid); t != nil {
			var hot []uint64
			if late {
				hot = p.hot
			}
			if n, vmas, err = t.Final(ctx, vmas, hot, sink); err != nil {
				return errors.Join(err, r.Close())
			}
		} else if late {
			vmas = slices.DeleteFunc(slices.Clone(vmas), (*mem.VMA).Late)
		}
		more, err := r.Dump(ctx, vmas, sink, image.DataID{Kind: image.Memory, ID: uint32(p.vpid)})
		n += more
		st.Pages += n
		st.Bytes += n * arch.PageSize
		scanned := uint64(0)
		for _, v := range p.vmas {
			if v.HasPages() {
				scanned += v.Len() / arch.PageSize
			}
		}
		st.Scanned += scanned
		c.log.Debug("memory dumped", "pid", p.pid, "comm", p.comm, "mappings", len(p.vmas), "pages_scanned", scanned, "pages", n,
			"duration_us", time.Since(begin).Microseconds())
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	n, err := c.sharedMemory(ctx, sink)
	st.Bytes += n * arch.PageSize
	st.Pages += n
	st.ShmemPages += n
	if err != nil {
		return err
	}
	for _, d := range c.files.Data() {
		whole := d.ID.Kind == image.Shmem
		n, err := content(ctx, &d, sink)
		st.Bytes += n
		if d.Sum {
			st.CarriedBytes += n
		}
		if whole {
			st.Pages += n / arch.PageSize
			st.ShmemPages += n / arch.PageSize
		}
		c.log.Debug("contents of a file dumped", "data", d.ID, "size_bytes", d.Size, "bytes", n)
		if err != nil {
			return err
		}
	}
	st.DataDur = time.Since(start)
	c.log.Debug("data sent", "pages", st.Pages, "bytes", st.Bytes, "duration_ms", st.DataDur.Milliseconds())
	return nil
}

// content streams the content of one file.
func content(ctx context.Context, d *files.Data, sink image.Sink) (n uint64, err error) {
	if n, early, err := d.Difference(ctx, sink); early {
		return n, err
	}
	f, err := d.Open()
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	if !d.Sum {
		return mem.DumpFile(ctx, f, d.Size, d.ID.Kind == image.Shmem, sink, d.ID)
	}
	summed := &files.Summed{Sink: sink}
	if n, err = mem.DumpFile(ctx, f, d.Size, false, summed, d.ID); err != nil {
		return n, err
	}
	return n, summed.End(d.ID.ID)
}

// kin says how the processes are related.
func (c *collector) kin() []plan.Kin {
	index, out := map[int]int{}, make([]plan.Kin, len(c.procs))
	for i, p := range c.procs {
		index[p.pid] = i
		out[i] = plan.Kin{Pid: p.vpid, Sid: p.vsid, Parent: -1}
		if i > 0 {
			out[i].Parent = index[p.ppid] // parents come first
		}
	}
	return out
}

// sharedMemory streams the contents of shared memory that is mapped.
func (c *collector) sharedMemory(ctx context.Context, sink image.Sink) (pages uint64, err error) {
	for _, s := range c.shmems {
		n, err := mem.DumpFile(ctx, s.file, s.size, true, sink, image.DataID{Kind: image.Shmem, ID: s.id})
		pages += n / arch.PageSize
		c.log.Debug("shared memory dumped", "shmid", s.id, "size_bytes", s.size, "bytes", n)
		if err != nil {
			return pages, err
		}
	}
	return pages, nil
}
