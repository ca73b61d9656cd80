package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/plan"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Memory that parent and child share until one of them writes comes back as such: a
// child is cloned out of its parent when that has its memory already, keeps the
// mappings that both have, and of its pages only those are written that differ.
// For this the data of a process must come before that of its children
// (plan.Births); what comes in another order is right all the same, but shared
// no more.

// family tells whether processes of the tree have memory to inherit. Those that have
// files of the tree's processes open do not, because these must be there first.
func (m *model) family(set *image.Set) bool {
	if !slices.ContainsFunc(m.procs, func(p *process) bool {
		return p.parent != nil && !p.zombie && mem.Common(p.vmas, p.parent.vmas)
	}) {
		return false
	}
	for _, file := range []string{image.FilesFile, "reg-files", "pidfd"} {
		for _, e := range set.Entries(file) {
			if f, ok := e.Msg.(*fdinfo.FileEntry); ok && (f.GetType() == fdinfo.FdTypes_PIDFD || strings.HasPrefix(f.GetReg().GetName(), "/proc/")) {
				return false
			}
		}
	}
	return true
}

// births gives the data sets of the processes in the order in which they are made.
func (m *model) births() (out []image.DataID) {
	kin := make([]plan.Kin, len(m.procs))
	index := map[*process]int{nil: -1}
	for i, p := range m.procs {
		index[p] = i
		kin[i] = plan.Kin{Pid: p.vpid, Sid: p.sid, Parent: index[p.parent]}
	}
	for _, i := range plan.Births(kin) {
		out = append(out, image.DataID{Kind: image.Memory, ID: uint32(m.procs[i].vpid)})
	}
	return out
}

// bequest is the process whose mappings one has that is cloned out of p.
func (p *process) bequest() *process {
	if p.built {
		return p
	}
	return p.heritage
}

// ripen makes a process ready for a child to be cloned out of it that has memory in
// common with it: with its mappings and its memory.
// Preconditions: on the tracer's thread.
func (t *Tree) ripen(ctx context.Context, p, c *process) error {
	if t.filler == nil || p.ripe || p.zombie || c.zombie || !mem.Common(c.vmas, p.vmas) {
		return nil
	}
	if !p.built {
		if err := t.addressSpace(ctx, p); err != nil {
			return err
		}
	}
	if err := t.filler.take(ctx, p); err != nil {
		return err
	}
	p.ripe = true
	return t.filled(p)
}

// hugeFile tells whether the file of a mapping consists of huge pages.
func (t *Tree) hugeFile(v *mem.VMA) bool {
	f, err := t.files.File(uint32(v.ShmID))
	if err != nil {
		return true // it is missed where it is mapped
	}
	_, huge, err := sys.HugePages(f)
	return huge || err != nil
}

// strip makes the calls that take away all mappings which a process was cloned
// with but those that it keeps, and make these what they are to be.
func (t *Tree) strip(p *process) (calls []*ptrace.Call) {
	keep := []span{{t.spare, t.spare + spareSize}}
	for _, v := range p.vmas {
		if v.Kept != 0 {
			keep = append(keep, span{v.Start, v.Kept})
		}
	}
	calls = unmapOthers(keep, "unmap what is not inherited")
	for _, v := range p.vmas {
		if v.Kept == 0 {
			continue
		}
		if v.Kept < v.End {
			// By its last page: what comes before may be several mappings for the kernel, of
			// which mremap(2) resizes no two at once.
			last := v.Kept - arch.PageSize
			calls = append(calls, ptrace.NewCall("extend "+v.String(), unix.SYS_MREMAP, ptrace.Int(last), ptrace.Int(uint64(arch.PageSize)), ptrace.Int(v.End-last), ptrace.Int(0)))
		}
		if v.Prot != v.KeptProt {
			calls = append(calls, ptrace.NewCall("protect "+v.String(), unix.SYS_MPROTECT, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(v.Prot)))
		}
	}
	return calls
}

// unmapOthers makes the calls that unmap everything but some ranges.
func unmapOthers(keep []span, what string) (calls []*ptrace.Call) {
	sortSpans(keep)
	at := uint64(0)
	for _, s := range append(keep, span{arch.TaskSize, arch.TaskSize}) {
		if s.start > at {
			calls = append(calls, ptrace.NewCall(what, unix.SYS_MUNMAP, ptrace.Int(at), ptrace.Int(s.start-at)))
		}
		at = s.end
	}
	return calls
}

// progress is how far the data of a process has come.
type progress struct {
	next  uint64 // behind the last data
	vma   int    // index of the mapping there
	stale []image.Range
	over  bool // stale was emptied: what comes after that is only written
}

// skip notes that a process has no data up to an address: what it has there of its
// parent goes.
func (p *process) skip(to uint64) {
	d := &p.data
	for ; d.vma < len(p.vmas); d.vma++ {
		v := p.vmas[d.vma]
		if start, end := max(v.Start, d.next), min(v.Kept, to); start < end {
			d.stale = append(d.stale, image.Range{Start: start, End: end})
		}
		if v.End > to {
			return
		}
	}
}

// filled takes from a process, whose data is complete, the memory of its parent
// that is not its own.
// Preconditions: on the tracer's thread.
func (t *Tree) filled(p *process) error {
	if p.heritage == nil || p.data.over {
		return nil
	}
	p.skip(arch.TaskSize)
	p.data.over = true
	for part := range slices.Chunk(p.data.stale, staleCalls) {
		calls := make([]*ptrace.Call, len(part))
		for i, r := range part {
			calls[i] = ptrace.NewCall("empty inherited memory", unix.SYS_MADVISE, ptrace.Int(r.Start), ptrace.Int(r.End-r.Start), ptrace.Int(unix.MADV_DONTNEED))
		}
		if err := p.remote().Run(calls...); err != nil {
			return fmt.Errorf("memory of %s: %w", p, err)
		}
	}
	p.data.stale = nil
	return nil
}

// staleCalls bounds the calls that are prepared at once: there may be one a page.
const staleCalls = 1000

// filler writes the data of a source to where it belongs.
type filler struct {
	t      *Tree
	src    image.Source
	writer *mem.Writer // of to
	to     *process

	held bool // a piece was read but not written yet
	done bool
	id   image.DataID
	off  uint64
	b    []byte
}

// peek reads the next piece unless one is held; false at the end.
func (f *filler) peek(ctx context.Context) (bool, error) {
	if f.held || f.done {
		return f.held, nil
	}
	id, off, b, err := f.src.Next(ctx)
	if errors.Is(err, io.EOF) {
		f.done = true
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read data: %w", err)
	}
	f.t.st.Bytes += uint64(len(b))
	f.held, f.id, f.off, f.b = true, id, off, b
	return true, nil
}

// process is that to which the held piece belongs.
func (f *filler) process() (*process, error) {
	p := f.t.model.byPid[int(f.id.ID)]
	if p == nil || p.zombie {
		return nil, fmt.Errorf("images hold memory of pid %d, which is not among their processes", f.id.ID)
	}
	return p, nil
}

// take writes data until that of p is complete, or what comes belongs to a process
// that is not there yet.
// Preconditions: on the tracer's thread.
func (f *filler) take(ctx context.Context, p *process) error {
	for began := false; ; {
		more, err := f.peek(ctx)
		if err != nil || !more || f.id.Kind != image.Memory && f.id.Kind != image.Holes {
			return err
		}
		q, err := f.process()
		if err != nil {
			return err
		}
		if q.remote() == nil || began && q != p {
			return nil
		}
		began = began || q == p
		if !q.built {
			if err := f.t.addressSpace(ctx, q); err != nil {
				return err
			}
		}
		if f.id.Kind == image.Holes {
			f.held = false
			err = f.t.holes(f.id, f.b)
		} else {
			err = f.put(q)
		}
		if err != nil {
			return err
		}
	}
}

// rest writes all data that is left.
func (f *filler) rest(ctx context.Context) error {
	for {
		more, err := f.peek(ctx)
		if err != nil || !more {
			return errors.Join(err, f.close())
		}
		if f.id.Kind == image.Holes {
			f.held = false
			if err := f.t.tracer.Do(func() error { return f.t.holes(f.id, f.b) }); err != nil {
				return err
			}
			continue
		}
		if f.id.Kind != image.Memory {
			f.held = false
			if err := f.t.fillFile(f.id, f.off, f.b); err != nil {
				return err
			}
			continue
		}
		p, err := f.process()
		if err != nil {
			return err
		}
		if err := f.put(p); err != nil {
			return err
		}
	}
}

// put writes the held piece into a process.
func (f *filler) put(p *process) (err error) {
	f.held = false
	if f.to != p {
		if err := f.close(); err != nil {
			return err
		}
		if f.writer, err = mem.NewWriter(p.remote().Tid, p.vmas); err != nil {
			return err
		}
		f.to = p
	}
	if p.heritage != nil && !p.data.over {
		if f.off < p.data.next {
			return fmt.Errorf("images hold memory of %s at %#x after that up to %#x", p, f.off, p.data.next)
		}
		p.skip(f.off)
		p.data.next = f.off + uint64(len(f.b))
	}
	f.t.st.Pages += uint64(len(f.b)) / arch.PageSize
	return f.writer.Write(f.off, f.b)
}

// close ends the writing into a process.
func (f *filler) close() error {
	if f.writer == nil {
		return nil
	}
	f.t.st.ComparedPages += f.writer.Compared
	f.t.st.SharedPages += f.writer.Shared
	err := f.writer.Close()
	f.writer, f.to = nil, nil
	return err
}
