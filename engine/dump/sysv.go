package dump

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
	"godwit/engine/sys"
)

// segment is a System V shared memory segment that the tree has attached.
type segment struct {
	facts  image.SysVFacts
	attach uint64 // mappings outside and inside the tree
	inside uint64 // mappings of the tree
	first  *process
	vma    *mem.VMA
}

// sysv registers a mapping of a System V segment, whose inode number is its id.
func (c *collector) sysv(p *process, v *mem.VMA) error {
	id := uint32(v.Ino)
	v.ShmID = v.Ino
	if s := c.segments[id]; s != nil {
		s.inside++
		return nil
	}
	d, err := sys.ShmStat(int(id))
	if err != nil {
		return fmt.Errorf("examine System V segment %d, %s: %w", id, v, err)
	}
	s := &segment{attach: d.Nattch, inside: 1, first: p, vma: v, facts: segmentFacts(id, d)}
	c.segments[id] = s
	f, err := os.OpenFile(v.Link(p.pid), os.O_RDWR, 0)
	if c.running && procfs.Gone(err) {
		return nil // just detached
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", v, err)
	}
	c.shmems[id] = &shmem{id: id, file: f, size: int64(d.Segsz)}
	page, huge, err := sys.HugePages(f)
	if huge {
		s.facts.Huge = sys.ShmHugetlb | uint32(bits.TrailingZeros64(page))<<sys.ShmHugeShift
	}
	return err
}

func segmentFacts(id uint32, d unix.SysvShmDesc) image.SysVFacts {
	return image.SysVFacts{
		ID: id, Key: d.Perm.Key, Size: d.Segsz, Mode: d.Perm.Mode,
		UID: d.Perm.Uid, GID: d.Perm.Gid, CUID: d.Perm.Cuid, CGID: d.Perm.Cgid,
	}
}

// sharedOutside says whether a process that is not in the tree has a segment
// attached. While the tree runs the numbers do not tell: it forks.
func (c *collector) sharedOutside(s *segment) bool {
	pids, err := procfs.Pids()
	if err != nil {
		return true
	}
	tree, err := procfs.Tree(c.procs[0].pid)
	if err != nil {
		return true
	}
	for _, pid := range pids {
		if slices.Contains(tree, pid) || slices.ContainsFunc(c.procs, func(p *process) bool { return p.pid == pid }) {
			continue
		}
		maps, err := procfs.ReadMaps(pid)
		if err != nil {
			continue // it has ended
		}
		if slices.ContainsFunc(maps, func(m procfs.Mapping) bool {
			return strings.HasPrefix(m.Path, "/SYSV") && m.Inode == uint64(s.facts.ID)
		}) {
			now, err := procfs.Tree(c.procs[0].pid)
			return err != nil || !slices.Contains(now, pid) // it may have been born meanwhile
		}
	}
	return false
}

// finishSysV refuses segments that others have attached too, and what cannot be
// read or does not come along.
func (c *collector) finishSysV() error {
	for _, s := range c.segments {
		if s.attach > s.inside && (!c.running || c.sharedOutside(s)) {
			c.refusal.Add(refuse.Problem{Pid: s.first.pid, Comm: s.first.comm, Path: s.vma.String(),
				Reason: fmt.Sprintf("System V segment %d is attached %d times, but only %d times in the tree: somebody outside shares it", s.facts.ID, s.attach, s.inside),
				Hint:   "end the other process, or name a process above both"})
		}
	}
	if err := c.unattached(); err != nil {
		return err
	}
	sets, err := procfs.SysV("sem")
	if err != nil {
		return err
	}
	if err := c.findUndo(sets); err != nil {
		return err
	}
	if !c.o.Elsewhere || c.own.Has(ns.Ipc) {
		return nil
	}
	return c.leftBehind(sets)
}

// unattached takes up the segments of the tree's own IPC namespace that nobody
// has attached.
func (c *collector) unattached() error {
	if !c.own.Has(ns.Ipc) {
		return nil
	}
	queues, err := ns.PosixQueues()
	if err != nil {
		return fmt.Errorf("list POSIX message queues: %w", err)
	}
	for _, name := range queues {
		c.refuse(c.procs[0], name, "is a POSIX message queue of the tree's IPC namespace, which cannot be carried", "remove it (mq_unlink)")
	}
	all, err := procfs.SysV("shm")
	if err != nil {
		return err
	}
	for _, o := range all {
		id := uint32(o.ID)
		if c.segments[id] != nil {
			continue
		}
		d, err := sys.ShmStat(o.ID)
		if err != nil {
			return err
		}
		if c.running {
			continue // opening it would show: it is attached for a moment
		}
		f, err := sys.ShmFile(o.ID, sys.ShmPage(0))
		if errors.Is(err, fs.ErrNotExist) {
			c.refuse(c.procs[0], "", fmt.Sprintf("System V segment %d, which nobody has attached, is of huge pages; that cannot be carried", id), "")
			continue
		}
		if err != nil {
			return fmt.Errorf("open System V segment %d: %w", id, err)
		}
		c.segments[id] = &segment{facts: segmentFacts(id, d)}
		c.shmems[id] = &shmem{id: id, file: f, size: int64(d.Segsz)}
	}
	return nil
}

// leftBehind refuses objects of the host's IPC namespace that the tree uses and
// that stay on this host.
func (c *collector) leftBehind(sets []procfs.SysVObject) error {
	byPid := map[int]*process{}
	for _, p := range c.procs {
		byPid[p.pid] = p
	}
	stays := func(pid int, what string, o procfs.SysVObject) bool {
		p := byPid[pid]
		if p == nil {
			return false
		}
		c.refuse(p, "", fmt.Sprintf("used %s %d (key %#x), which stays on this host", what, o.ID, uint32(o.Key)),
			"remove it if it is not needed (ipcrm), or run the tree in an IPC namespace of its own (unshare --ipc)")
		return true
	}
	for _, o := range sets {
		for i := range int(o.Size) {
			if pid, err := sys.SemPid(o.ID, i); err == nil && stays(pid, "System V semaphores", o) {
				break
			}
		}
	}
	queues, err := procfs.SysV("msg")
	if err != nil {
		return err
	}
	for _, o := range queues {
		_ = stays(o.Last, "System V message queue", o) || stays(o.LastReader, "System V message queue", o)
	}
	segments, err := procfs.SysV("shm")
	if err != nil {
		return err
	}
	for _, o := range segments {
		if c.segments[uint32(o.ID)] == nil {
			_ = stays(o.Creator, "System V segment", o) || stays(o.Last, "System V segment", o)
		}
	}
	return nil
}

// sysvFacts gives the segments, by id.
func (c *collector) sysvFacts() (out []image.SysVFacts) {
	for _, s := range c.segments {
		out = append(out, s.facts)
	}
	slices.SortFunc(out, func(a, b image.SysVFacts) int { return int(int64(a.ID) - int64(b.ID)) })
	return out
}
