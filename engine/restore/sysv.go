package restore

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// sysvFacts gives the System V segments of images; those that CRIU wrote have
// them as what is in an IPC namespace.
func sysvFacts(set *image.Set, own ns.Images) ([]image.SysVFacts, error) {
	if set.Facts != nil {
		return set.Facts.SysV, nil
	}
	return own.Segments(set)
}

// checkSegments checks the System V segments of an image and groups the
// mappings of each process that show them.
func (m *model) checkSegments(facts []image.SysVFacts) error {
	m.segments = map[uint32]*image.SysVFacts{}
	for i := range facts {
		s := &facts[i]
		if s.ID > 1<<31-1 || s.Size == 0 || s.Size > 1<<47 || !hugeSegment(s.Huge) || m.segments[s.ID] != nil {
			return fmt.Errorf("images hold an impossible System V segment: id %d, %d bytes, mode %#o, huge pages %#x", s.ID, s.Size, s.Mode, s.Huge)
		}
		m.segments[s.ID] = s
	}
	for id := range m.sharedAnons() {
		if m.segments[id] != nil {
			return fmt.Errorf("images hold a System V segment and other shared memory of number %d", id)
		}
	}
	for _, p := range m.procs {
		var err error
		p.attached, err = mem.Attachments(p.vmas, func(id uint64) (uint64, error) {
			if s := m.segments[uint32(id)]; s != nil && id == uint64(s.ID) {
				page := sys.ShmPage(s.Huge)
				return (s.Size + page - 1) / page * page, nil
			}
			return 0, fmt.Errorf("the images do not hold System V segment %d", id)
		})
		if err != nil {
			return fmt.Errorf("images of %s: %w", p, err)
		}
	}
	return nil
}

// hugeSegment tells whether flags of shmget name no huge pages or such as a CPU may
// have: 64 KiB to 16 GiB.
func hugeSegment(flags uint32) bool {
	shift := flags >> sys.ShmHugeShift & sys.ShmHugeMask
	return flags == 0 || flags == sys.ShmHugetlb|shift<<sys.ShmHugeShift && shift >= 16 && shift <= 34
}

// inIPC runs f in the IPC namespace of the tree.
func (t *Tree) inIPC(f func() error) error { return ns.Do(t.root, t.inside()&ns.Ipc, f) }

// openSegments makes the System V segments.
// Preconditions: in the IPC namespace of the tree.
func (t *Tree) openSegments() error {
	for id, s := range t.model.segments {
		d := unix.SysvShmDesc{Segsz: s.Size, Perm: unix.SysvIpcPerm{Key: s.Key, Uid: s.UID, Gid: s.GID, Cuid: s.CUID, Cgid: s.CGID, Mode: s.Mode}}
		if err := sys.ShmCreate(int(id), &d, s.Huge); err != nil {
			what := fmt.Sprintf("make System V segment %d with key %#x", id, uint32(s.Key))
			if errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("%s: its id or key is taken on this host; remove what has it (ipcrm -m %d or ipcrm -M %#x): %w", what, id, uint32(s.Key), err)
			}
			return fmt.Errorf("%s%s: %w", what, hugeHint(s.Huge != 0), err)
		}
		t.made = append(t.made, int(id))
		var err error
		if t.shmems[id], err = sys.ShmFile(int(id), sys.ShmPage(s.Huge)); err != nil {
			return fmt.Errorf("open System V segment %d: %w", id, err)
		}
	}
	return nil
}

// attach attaches the segments of a process where it has them, before
// anything else is mapped.
func (t *Tree) attach(p *process) (calls []*ptrace.Call, err error) {
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	for _, a := range p.attached {
		flags, prot := a.Flags()
		at := a.Start
		if !a.Whole() {
			// What is missing may be in the way of something else: its parts are
			// moved to where they belong.
			page := sys.ShmPage(t.model.segments[uint32(a.Segment)].Huge)
			if at, err = p.free(a.End-a.Start+page, span{t.spare, t.spare + spareSize}); err != nil {
				return nil, err
			}
			at = (at + page - 1) / page * page
		}
		add(fmt.Sprintf("attach System V segment %d at %x", a.Segment, at), unix.SYS_SHMAT, ptrace.Int(a.Segment), ptrace.Int(at), ptrace.Int(flags))
		for _, v := range a.VMAs {
			if !a.Whole() {
				add("move "+v.String(), unix.SYS_MREMAP, ptrace.Int(at+v.Offset), ptrace.Int(v.Len()), ptrace.Int(v.Len()), ptrace.Int(uint64(mremapFixed)), ptrace.Int(v.Start))
			}
			if v.Prot != prot {
				add("protect "+v.String(), unix.SYS_MPROTECT, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(v.Prot))
			}
		}
		if !a.Whole() {
			add("unmap the rest of a System V segment", unix.SYS_MUNMAP, ptrace.Int(at), ptrace.Int(a.End-a.Start))
		}
	}
	return calls, nil
}

// free finds an address whose next size bytes neither the process nor any of taken uses.
func (p *process) free(size uint64, taken ...span) (uint64, error) {
	for _, v := range p.vmas {
		taken = append(taken, span{v.Start, v.End})
	}
	return gap(taken, size, lowest)
}

// removeSegments removes, once all are attached, those that the program had
// removed already: they go with their last attachment.
// Preconditions: in the IPC namespace of the tree.
func (t *Tree) removeSegments() error {
	kept := t.made[:0]
	for _, id := range t.made {
		if t.model.segments[uint32(id)].Mode&sys.ShmDest == 0 {
			kept = append(kept, id)
			continue
		}
		if err := sys.ShmRemove(id); err != nil {
			return err
		}
	}
	t.made = kept
	return nil
}

// discardSegments removes what was made, for a tree that will not be.
func (t *Tree) discardSegments() (err error) {
	if t.inside().Has(ns.Ipc) && !t.joined.Has(ns.Ipc) {
		return nil // they went with their namespace
	}
	for _, id := range t.made {
		err = errors.Join(err, sys.ShmRemove(id))
	}
	t.made = nil
	return err
}
