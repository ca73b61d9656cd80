package dump

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"godwit/engine/image"
	"godwit/engine/mem"
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
	s := &segment{attach: d.Nattch, inside: 1, first: p, vma: v, facts: image.SysVFacts{
		ID: id, Key: d.Perm.Key, Size: d.Segsz, Mode: d.Perm.Mode,
		UID: d.Perm.Uid, GID: d.Perm.Gid, CUID: d.Perm.Cuid, CGID: d.Perm.Cgid,
	}}
	c.segments[id] = s
	f, err := os.OpenFile(v.Link(p.pid), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", v, err)
	}
	c.shmems[id] = &shmem{id: id, file: f, size: int64(d.Segsz)}
	return nil
}

// attachments refuses those of a process that shmat cannot make again.
func (c *collector) attachments(p *process, vmas []*mem.VMA) error {
	_, err := mem.Attachments(vmas, func(id uint64) (uint64, error) { return c.segments[uint32(id)].facts.Size, nil })
	var partly *mem.PartlyError
	if errors.As(err, &partly) {
		c.refuse(p, partly.VMA.String(), fmt.Sprintf("is only a part of System V segment %d, the rest of which was unmapped; that cannot be carried", partly.VMA.ShmID), "")
		return nil
	}
	return err
}

// finishSysV refuses segments that others have attached too.
func (c *collector) finishSysV() {
	for _, s := range c.segments {
		if s.attach > s.inside {
			c.refusal.Add(refuse.Problem{Pid: s.first.pid, Comm: s.first.comm, Path: s.vma.String(),
				Reason: fmt.Sprintf("System V segment %d is attached %d times, but only %d times in the tree: somebody outside shares it", s.facts.ID, s.attach, s.inside),
				Hint:   "end the other process, or name a process above both"})
		}
	}
}

// sysvFacts gives the segments, by id.
func (c *collector) sysvFacts() (out []image.SysVFacts) {
	for _, s := range c.segments {
		out = append(out, s.facts)
	}
	slices.SortFunc(out, func(a, b image.SysVFacts) int { return int(int64(a.ID) - int64(b.ID)) })
	return out
}
