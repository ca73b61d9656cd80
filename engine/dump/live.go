package dump

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/freeze"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Live copies memory of a tree that runs (pre-copy): Start, then Round again and again,
// then the dump of the frozen tree with Options.Live. Close ends it.
//
// Only anonymous memory of a process's own travels early, and only that of processes
// which have much of it; what else there is travels with the dump.
type Live struct {
	root int
	kept []*followed // the root first, parents before children
}

// followed is a process whose memory travels early.
type followed struct {
	pid     int
	start   uint64 // ticks, as /proc/PID/stat has it
	comm    string
	outline image.OutlineProc
	bytes   uint64 // of memory that can travel early
	tracker *mem.Tracker
	parent  *followed
	worth   bool // it, or a descendant, has memory that is worth it
	lost    bool // it ended, or executed another program
}

// earlyLeast is the anonymous memory of its own that a process other than the root has if
// it is worth an early copy, bytes. The root is always copied.
const earlyLeast = 8 << 20

// ErrNotLive says that a tree has nothing that could travel while it runs.
var ErrNotLive = errors.New("memory cannot be copied while the tree runs")

// StartLive begins to follow the tree below pid, which is frozen for a moment, and gives
// the sink an outline of it. An error that is ErrNotLive leaves the sink untouched.
func StartLive(ctx context.Context, log hclog.Logger, pid int, o Options, freezer func() (*freeze.Tree, error), sink image.EarlySink) (_ *Live, err error) {
	c, err := look(ctx, log, pid, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	l := &Live{root: pid}
	if l.kept, err = c.early(); err != nil {
		return nil, err
	}
	if l.kept == nil {
		return nil, fmt.Errorf("%w: %s", ErrNotLive, c.notEarly)
	}
	t, err := freezer()
	if err != nil {
		return nil, err
	}
	err = l.follow(c, t)
	if err := errors.Join(err, t.Thaw()); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	out := &image.Outline{Terminals: slices.ContainsFunc(c.files.Objects(), func(o plan.Object) bool { return strings.Contains(o.Link, "ptmx") })}
	for _, f := range l.kept {
		out.Procs = append(out.Procs, f.outline)
	}
	out.Free = c.free()
	if err := out.Check(); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrNotLive, err), l.Close())
	}
	log.Debug("tree is followed", "pid", pid, "processes", len(l.kept), "frozen_us", t.FreezeDur.Microseconds())
	return l, sink.Outline(out)
}

// early finds the processes whose memory can travel early: they can be made now as they
// will be in the end. If there are none, notEarly says why.
func (c *collector) early() (kept []*followed, err error) {
	if own := c.own &^ ns.Time; own != 0 {
		c.notEarly = "it has a " + strings.Join(own.Names(), " and a ") + " namespace of its own"
		return nil, nil
	}
	if err := sys.UffdProbe(); err != nil {
		c.notEarly = fmt.Sprintf("the kernel does not tell what is written (Linux 6.7 does): %s", strings.ReplaceAll(err.Error(), "\n", ": "))
		return nil, nil
	}
	byPid := map[int]*followed{}
	shared := map[uint32]int{}
	for _, p := range c.procs {
		shared[p.filesID]++
		shared[p.fsID|1<<31]++
	}
	for i, p := range c.procs {
		st, err := procfs.ReadStat(p.pid)
		if err != nil {
			if i == 0 {
				return nil, err
			}
			continue
		}
		f := &followed{pid: p.pid, start: st.StartTime, comm: p.comm, parent: byPid[p.ppid],
			outline: image.OutlineProc{Pid: uint32(p.vpid), Sid: uint32(p.vsid), ExitSignal: uint32(max(st.ExitSignal, 0))}}
		why := ""
		switch {
		case p.zombie || p.headless || p.vfork != 0 || p.vmas == nil:
			why = "it is ending or just beginning"
		case st.TTYNr != 0:
			why = "it has a terminal"
		case shared[p.filesID] > 1 || shared[p.fsID|1<<31] > 1:
			why = "it shares descriptors or directories with another process"
		case i > 0 && f.parent == nil:
			why = "its parent is made in the end"
		case i > 0 && p.vsid != p.vpid && uint32(p.vsid) != f.parent.outline.Sid:
			why = "it is in another session than its parent"
		case c.elderChildren(p):
			why = "it leads a session that began after its children"
		}
		switch {
		case why != "" && i == 0:
			c.notEarly = fmt.Sprintf("pid %d (%s): %s", p.pid, p.comm, why)
			return nil, nil
		case why != "":
			continue
		case i > 0:
			f.outline.Parent = f.parent.outline.Pid
		default:
			f.outline.ExitSignal = 0
		}
		own, common := earlyMemory(p.vmas)
		f.bytes = own + common
		byPid[p.pid] = f
		kept = append(kept, f)
		if i == 0 || own >= earlyLeast && common < own/4 {
			// What is copied early is shared with relatives no more. It can only be made if those that it descends from are there.
			for a := f; a != nil; a = a.parent {
				a.worth = true
			}
		}
	}
	return slices.DeleteFunc(kept, func(f *followed) bool { return !f.worth }), nil
}

// freeRoom is how much free memory an outline tells of, bytes.
const freeRoom = 1 << 30

// free finds an address behind which no process has anything for freeRoom: as high as
// programs seldom go by themselves, else where there is room at all; 0: nowhere.
func (c *collector) free() uint64 {
	var taken []*mem.VMA
	for _, p := range c.procs {
		taken = append(taken, p.vmas...)
	}
	slices.SortFunc(taken, func(a, b *mem.VMA) int { return cmp.Compare(a.Start, b.Start) })
	for _, from := range []uint64{0x2a00_0000_0000, 0x10_0000_0000} {
		at := from
		for _, v := range taken {
			if v.End <= at {
				continue
			}
			if v.Start >= at+freeRoom {
				break
			}
			at = v.End
		}
		if at+freeRoom <= arch.TaskSize {
			return at
		}
	}
	return 0
}

// earlyMemory is how much memory can travel early that a process has for itself, and that
// it shares with relatives, bytes.
func earlyMemory(vmas []*mem.VMA) (own, common uint64) {
	for _, v := range vmas {
		if v.Early() {
			own, common = own+v.Own, common+v.Common
		}
	}
	return own, common
}

// elderChildren tells whether a session leader has children of another session that
// does not begin with them: they can only be made before it begins its own.
func (c *collector) elderChildren(p *process) bool {
	return p.vsid == p.vpid && slices.ContainsFunc(c.procs, func(q *process) bool {
		return q.ppid == p.pid && q.vsid != p.vsid && q.vsid != q.vpid
	})
}

// follow gives every process a tracker.
func (l *Live) follow(c *collector, t *freeze.Tree) error {
	for _, f := range l.kept {
		i := slices.IndexFunc(t.Procs, func(p *freeze.Proc) bool { return p.Pid == f.pid && !p.Zombie })
		p := c.byPid(f.pid)
		if i < 0 {
			if f.pid == l.root {
				return fmt.Errorf("pid %d (%s): %w", f.pid, f.comm, unix.ESRCH)
			}
			f.lost = true
			continue
		}
		var fd *os.File
		err := t.Tracer.Do(func() (err error) {
			fd, err = c.userfault(t.Procs[i], p)
			return err
		})
		if err != nil {
			return fmt.Errorf("%w: pid %d (%s): %w", ErrNotLive, f.pid, f.comm, err)
		}
		if f.tracker, err = mem.NewTracker(f.pid, f.outline.Pid, fd); err != nil {
			return fmt.Errorf("%w: pid %d (%s): %w", ErrNotLive, f.pid, f.comm, err)
		}
	}
	return nil
}

// userfault makes a userfaultfd in a frozen process and takes it out of it.
// Preconditions: on the tracer's thread.
func (c *collector) userfault(fp *freeze.Proc, p *process) (_ *os.File, err error) {
	th := fp.Leader()
	b, err := c.borrow(fp, p, th, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, b.Return(false))
		th.Resend = th.Resend || b.Stopped
	}()
	fd, err := b.Extract(ptrace.NewCall("make a userfaultfd", unix.SYS_USERFAULTFD, ptrace.Int(unix.O_CLOEXEC|unix.O_NONBLOCK|sys.UffdUserModeOnly)))
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), nil
}

// Round gives the sink what was written since the last one, and says how many bytes that
// were.
func (l *Live) Round(ctx context.Context, sink image.Sink) (bytes uint64, err error) {
	return l.all(func(f *followed, vmas []*mem.VMA) (uint64, error) { return f.tracker.Round(ctx, vmas, sink) })
}

// Pending is how many bytes a round would give now.
func (l *Live) Pending() (bytes uint64, err error) {
	return l.all(func(f *followed, vmas []*mem.VMA) (uint64, error) { return f.tracker.Pending(vmas) })
}

// Look reads the mappings of each process, for the dump of the frozen tree to find them.
func (l *Live) Look() error {
	_, err := l.all(func(*followed, []*mem.VMA) (uint64, error) { return 0, nil })
	return err
}

// all does something with the mappings of each process that counts pages, and gives
// the bytes that they are.
func (l *Live) all(do func(*followed, []*mem.VMA) (uint64, error)) (bytes uint64, err error) {
	for _, f := range l.kept {
		n, err := f.each(func(vmas []*mem.VMA) (uint64, error) { return do(f, vmas) })
		bytes += n * arch.PageSize
		if err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}

// each does something with the mappings of a process, unless it is no more what it was.
func (f *followed) each(do func([]*mem.VMA) (uint64, error)) (uint64, error) {
	if f.lost {
		return 0, nil
	}
	vmas, _, err := mem.Read(f.pid, f.tracker)
	var n uint64
	if err == nil && len(vmas) > 0 {
		n, err = do(vmas)
	}
	if procfs.Gone(err) || errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		f.lost, err = true, nil
	}
	return n, err
}

// find gives a process by its pid; nil: it is not followed.
func (l *Live) find(pid int) *followed {
	if l == nil {
		return nil
	}
	i := slices.IndexFunc(l.kept, func(f *followed) bool { return f.pid == pid })
	if i < 0 {
		return nil
	}
	return l.kept[i]
}

// tracker finds what follows a process; nil: nothing.
func (l *Live) tracker(pid int) *mem.Tracker {
	if f := l.find(pid); f != nil {
		return f.tracker
	}
	return nil
}

// settle finds out of which processes of the frozen tree the other side has made good
// use: those that are still what the outline said.
func (l *Live) settle(c *collector) (pids []uint32) {
	if l == nil {
		return nil
	}
	for _, f := range l.kept {
		p := c.byPid(f.pid)
		ok := !f.lost && p != nil && !p.zombie && f.tracker != nil
		if ok {
			st, err := procfs.ReadStat(f.pid)
			with := slices.ContainsFunc(c.procs, func(q *process) bool { return q != p && (q.filesID == p.filesID || q.fsID == p.fsID) })
			ok = err == nil && st.StartTime == f.start && uint32(p.vsid) == f.outline.Sid && !with &&
				(f.parent == nil || !f.parent.lost && p.ppid == f.parent.pid && uint32(max(st.ExitSignal, 0)) == f.outline.ExitSignal)
		}
		if f.lost = !ok; ok {
			pids = append(pids, f.outline.Pid)
			continue
		}
		c.log.Debug("memory was copied in vain: the process ended or is another one", "pid", f.pid, "comm", f.comm)
	}
	return pids
}

// Late is a process whose memory is asked for while it is frozen.
type Late struct {
	freeze.Held
	// Ranges are that memory, ascending; nil: it is to be found out (VMA.Late).
	Ranges []image.Range `json:"-"`
}

// late finds the processes of which memory can come when the tree runs elsewhere: those
// whose memory is copied early, and those that have some in common with them, which is
// common no more then. All else they have would be in the way of the others.
func (l *Live) late(c *collector) (pids []uint32, who map[uint32]Late, err error) {
	if l == nil {
		return nil, nil, nil
	}
	who = map[uint32]Late{}
	for _, p := range c.procs {
		parent := c.byPid(p.ppid)
		heir := parent != nil && who[uint32(parent.vpid)].Pid == parent.pid && mem.Common(p.vmas, parent.vmas)
		if p.zombie || p.vmas == nil || l.keeps(p.pid) == nil && !heir {
			continue
		}
		st, err := procfs.ReadStat(p.pid)
		if err != nil {
			return nil, nil, err
		}
		pids = append(pids, uint32(p.vpid))
		l := Late{Held: freeze.Held{Pid: p.pid, Start: st.StartTime}, Ranges: []image.Range{}}
		for _, v := range p.vmas {
			if v.Late() {
				l.Ranges = append(l.Ranges, image.Range{Start: v.Start, End: v.End})
			}
		}
		who[uint32(p.vpid)] = l
	}
	return pids, who, nil
}

// keeps gives what follows a process of the frozen tree of which the other side has memory.
func (l *Live) keeps(pid int) *mem.Tracker {
	if f := l.find(pid); f != nil && !f.lost {
		return f.tracker
	}
	return nil
}

// Close ends the following; the tree has nothing left of it.
func (l *Live) Close() (err error) {
	if l == nil {
		return nil
	}
	for _, f := range l.kept {
		if f.tracker != nil {
			err = errors.Join(err, f.tracker.Close())
			f.tracker, f.lost = nil, true
		}
	}
	return err
}
