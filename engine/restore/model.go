// Package restore owns the rebuilding of a tree from its images: new processes
// with the recorded pids, their memory, files and state, ready to run. It must
// not know where images come from.
package restore

import (
	"errors"
	"fmt"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	fsimg "github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/ns"
	"godwit/engine/ptrace"
	"godwit/engine/task"
)

// thread is one thread to be built.
type thread struct {
	vtid  int
	core  *criu_core.CoreEntry
	facts *image.TaskFacts
	// filters are its seccomp filters, the oldest first.
	filters []*seccomp.SeccompFilter
	// remote runs system calls in the new thread, whose pid on this host is remote.Tid.
	remote *ptrace.Remote
}

// process is one process to be built.
type process struct {
	vpid, pgid, sid int
	parent          *process
	children        []*process
	threads         []*thread // the leader first
	zombie          bool

	filesID uint32
	// with are the flags of what it is cloned sharing with its parent, leave those
	// of what it gets for itself once all processes are there.
	with, leave uint64
	ids         *criu_core.TaskKobjIdsEntry
	mm          *mm.MmEntry
	vmas        []*mem.VMA
	memory      *image.MemoryFacts // nil: none

	attached []*mem.Attachment // among vmas

	built    bool                // its mappings are there
	ripe     bool                // and its memory, for children
	heritage *process            // out of whose mappings it was cloned; nil: the stub's
	data     progress            // of a process with a heritage
	graft    *nursling           // what it was before the images were there; nil: nothing
	early    map[*mem.VMA]*there // of a graft: mappings of which something is there
	fs       *fsimg.FsEntry

	curSid    int // session that it is in while the tree is built
	reapChild bool
}

func (p *process) leader() *thread            { return p.threads[0] }
func (p *process) remote() *ptrace.Remote     { return p.leader().remote }
func (p *process) core() *criu_core.CoreEntry { return p.leader().core }
func (p *process) comm() string               { return p.core().GetTc().GetComm() }
func (p *process) String() string             { return fmt.Sprintf("pid %d (%s)", p.vpid, p.comm()) }

// model is a tree as its images describe it, checked.
type model struct {
	procs []*process // parents before children
	byPid map[int]*process
	ids   map[int]bool // every pid and tid

	own      ns.Images // namespaces that the tree has for itself
	clocks   *clocks
	segments map[uint32]*image.SysVFacts // System V shared memory by id
}

// maxPid is the largest pid of a 64-bit kernel (include/linux/threads.h).
const maxPid = 4 << 20

// parse checks images, which may come from anywhere, and links them.
func parse(set *image.Set) (*model, error) {
	inv, err := image.One[*inventory.InventoryEntry](set, image.InventoryFile)
	if err != nil {
		return nil, err
	}
	if v := inv.GetImgVersion(); v != 1 && v != 2 {
		return nil, fmt.Errorf("images have version %d; this engine reads 1 and 2", v)
	}
	if f := set.Facts; f != nil && f.Version > image.FactsVersion {
		return nil, fmt.Errorf("%s has version %d; this engine reads up to %d", image.FactsFile, f.Version, image.FactsVersion)
	}
	items, err := image.All[*pstree.PstreeEntry](set, image.PstreeFile)
	if err != nil {
		return nil, err
	}
	switch {
	case len(items) == 0 && inv.PreDumpMode != nil:
		return nil, errors.New("the images are of a pre-dump, which holds memory alone: restore the dump that was made after it")
	case len(items) == 0:
		return nil, errors.New("images hold no process")
	case set.Facts != nil && set.Facts.Spoiled:
		return nil, errors.New("pages of these images were given up (--auto-dedup), in favour of a later dump or after a restore")
	}
	m := &model{byPid: map[int]*process{}, ids: map[int]bool{}}
	tasks := map[uint32]*image.TaskFacts{}
	if set.Facts != nil {
		for i := range set.Facts.Tasks {
			tasks[set.Facts.Tasks[i].TID] = &set.Facts.Tasks[i]
		}
	}
	memory := map[uint32]*image.MemoryFacts{}
	if set.Facts != nil {
		for i := range set.Facts.Memory {
			memory[set.Facts.Memory[i].PID] = &set.Facts.Memory[i]
		}
	}
	for i, it := range items {
		p, err := m.process(set, it, tasks)
		if f := memory[it.GetPid()]; err == nil && f != nil && !p.zombie {
			p.memory = f
			err = mem.ApplyFacts(p.vmas, f)
		}
		if err != nil {
			return nil, fmt.Errorf("images of pid %d: %w", it.GetPid(), err)
		}
		switch p.parent = m.byPid[int(it.GetPpid())]; {
		case i == 0 && p.zombie:
			return nil, fmt.Errorf("images hold a root process, pid %d, that has exited", p.vpid)
		case i > 0 && p.parent == nil:
			return nil, fmt.Errorf("images of pid %d: its parent %d is not among the processes before it", p.vpid, it.GetPpid())
		case i > 0 && p.parent.zombie:
			return nil, fmt.Errorf("images of pid %d: its parent %d has exited", p.vpid, it.GetPpid())
		case i == 0:
			p.parent = nil
		}
		if p.parent != nil {
			p.parent.children = append(p.parent.children, p)
		}
		m.procs = append(m.procs, p)
		m.byPid[p.vpid] = p
	}
	if m.clocks, err = readClocks(set, m.procs[0].ids.GetTimeNsId()); err != nil {
		return nil, err
	}
	if err := m.chains(set); err != nil {
		return nil, err
	}
	if err := m.sharing(); err != nil {
		return nil, err
	}
	if err := m.namespaces(inv); err != nil {
		return nil, err
	}
	facts, err := sysvFacts(set, m.own)
	if err != nil {
		return nil, err
	}
	return m, m.checkSegments(facts)
}

// tables gives one process for each table of descriptors, the first that has it.
func (m *model) tables() (out []*process) {
	seen := map[uint32]bool{}
	for _, p := range m.procs {
		if !p.zombie && !seen[p.filesID] {
			seen[p.filesID] = true
			out = append(out, p)
		}
	}
	return out
}

// sharing finds out what processes share with each other.
func (m *model) sharing() error {
	index := map[*process]int{nil: -1}
	parent := make([]int, len(m.procs))
	for i, p := range m.procs {
		index[p], parent[i] = i, index[p.parent]
	}
	for _, k := range []struct {
		flag uint64
		id   func(*process) uint32
	}{
		{unix.CLONE_FILES, func(p *process) uint32 { return p.filesID }},
		{unix.CLONE_FS, func(p *process) uint32 { return p.ids.GetFsId() }},
	} {
		ids := make([]uint32, len(m.procs))
		for i, p := range m.procs {
			ids[i] = k.id(p)
		}
		with, leave, err := task.Share(parent, ids)
		var bad *task.SharingError
		if errors.As(err, &bad) {
			return fmt.Errorf("%s stands between processes that share descriptors or directories in a way that cannot be made again", m.procs[bad.Process])
		}
		if err != nil {
			return err
		}
		for i, p := range m.procs {
			if with[i] {
				p.with |= k.flag
			}
			if leave[i] {
				p.leave |= k.flag
			}
		}
	}
	return nil
}

func (m *model) process(set *image.Set, it *pstree.PstreeEntry, facts map[uint32]*image.TaskFacts) (*process, error) {
	p := &process{vpid: int(it.GetPid()), pgid: int(it.GetPgid()), sid: int(it.GetSid())}
	tids := []uint32{it.GetPid()}
	for _, t := range it.GetThreads() {
		if t != it.GetPid() {
			tids = append(tids, t)
		}
	}
	for i, t := range tids {
		if t < 1 || t > maxPid || m.ids[int(t)] {
			return nil, fmt.Errorf("thread id %d is impossible or used twice", t)
		}
		m.ids[int(t)] = true
		core, err := image.One[*criu_core.CoreEntry](set, image.CoreFile(t))
		if err != nil {
			return nil, err
		}
		if err := task.Check(core, i == 0); err != nil {
			return nil, fmt.Errorf("task %d: %w", t, err)
		}
		if err := task.CheckFacts(facts[t]); err != nil {
			return nil, fmt.Errorf("task %d: %w", t, err)
		}
		p.threads = append(p.threads, &thread{vtid: int(t), core: core, facts: facts[t]})
		if i == 0 && core.GetTc().GetTaskState() == task.Dead {
			p.zombie = true
			return p, nil
		}
	}
	var err error
	if p.mm, err = image.One[*mm.MmEntry](set, image.MMFile(it.GetPid())); err != nil {
		return nil, err
	}
	if p.vmas, err = mem.FromImage(p.mm.GetVmas()); err != nil {
		return nil, err
	}
	if err := mem.CheckRings(p.vmas, p.mm.GetAios()); err != nil {
		return nil, err
	}
	if n := len(p.mm.GetMmSavedAuxv()); n > 128 || n%2 != 0 {
		return nil, fmt.Errorf("auxiliary vector of %d words", n)
	}
	if p.fs, err = image.One[*fsimg.FsEntry](set, image.FSFile(it.GetPid())); err != nil {
		return nil, err
	}
	ids := p.core().GetIds()
	if ids == nil {
		if ids, err = image.One[*criu_core.TaskKobjIdsEntry](set, image.IDsFile(it.GetPid())); err != nil {
			return nil, err
		}
	}
	p.filesID, p.ids = ids.GetFilesId(), ids
	return p, nil
}

// sharedAnon is an object of shared anonymous memory.
type sharedAnon struct {
	size uint64
	huge int // flags of mmap that say which huge pages it consists of
}

// sharedAnons gives every object of shared anonymous memory.
func (m *model) sharedAnons() map[uint32]sharedAnon {
	objects := map[uint32]sharedAnon{}
	for _, p := range m.procs {
		for _, v := range p.vmas {
			if v.Is(mem.AnonShared) && !v.Is(mem.Sysvipc) {
				id := uint32(v.ShmID)
				objects[id] = sharedAnon{max(objects[id].size, v.Offset+v.Len()), objects[id].huge | v.Flags&mem.HugeFlags}
			}
		}
	}
	return objects
}

// spareSize is what a restore needs of each address space for itself: the
// area of a Remote and room to park [vdso] and [vvar] in.
const spareSize = ptrace.AreaSize + parkSize

const parkSize = 64 * arch.PageSize

// spare finds an address whose next spareSize bytes no process uses, nor the
// stub in its own mappings taken.
func (m *model) spare(taken []span) (uint64, error) {
	all := append([]span(nil), taken...)
	for _, p := range m.procs {
		for _, v := range p.vmas {
			all = append(all, span{v.Start, v.End})
		}
	}
	return gap(all, spareSize, lowest)
}

// lowest is where free addresses are looked for: lower ones are left to the programs,
// whose brk grows there.
const lowest = 0x10_0000_0000

// gap finds an address, at or above at, whose next size bytes none of taken has.
func gap(taken []span, size, at uint64) (uint64, error) {
	sortSpans(taken)
	// One page more on both sides keeps ours apart from theirs.
	size += 2 * arch.PageSize
	for _, s := range taken {
		if s.start > at && s.start-at >= size {
			break
		}
		at = max(at, s.end)
	}
	if at+size > arch.TaskSize {
		return 0, fmt.Errorf("no address range of %d bytes is free", size)
	}
	return at + arch.PageSize, nil
}
