package restore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/files"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// Memory that comes before the images (pre-copy) is written into processes which are
// made for it, with their final pids: they become those of the tree when the
// images are there. Until then such a process has nothing but anonymous memory, the
// spare memory, and in it, parked, its [vdso].

// early is what there is before the images.
type early struct {
	procs   []*nursling // parents before children
	byPid   map[int]*nursling
	special []span // where [vdso] and [vvar] are parked
	// terminals: there are places for pseudoterminals.
	terminals bool
}

// nursling is a process that has only memory yet.
type nursling struct {
	image.OutlineProc
	remote *ptrace.Remote
	have   []image.Region // ascending
	writer *mem.Writer    // nil: have has changed
}

func (n *nursling) String() string { return fmt.Sprintf("pid %d", n.Pid) }

// earlySpare is where the spare memory is looked for when nobody knows yet what the
// processes will map: far from where programs and their allocators begin.
const earlySpare = 0x2a00_0000_0000

// freeMargin is left between what they have already and the spare memory, bytes: heaps grow.
const freeMargin = 1 << 29

// nurse takes what comes before the images, if anything does.
func (t *Tree) nurse(ctx context.Context, src image.Source) error {
	from, ok := src.(image.EarlySource)
	if !ok {
		return nil
	}
	for {
		x, err := from.Early(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch {
		case x.Outline != nil:
			err = t.outline(x.Outline)
		case x.File != nil:
			err = t.earlyFile(x.File)
		default:
			t.st.Bytes += uint64(len(x.Data))
			err = t.earlyData(x)
		}
		if err != nil {
			return err
		}
	}
	return t.early.close()
}

// outline makes processes for memory that comes.
func (t *Tree) outline(out *image.Outline) error {
	if err := out.Check(); err != nil {
		return err
	}
	if t.early != nil {
		return errors.New("a second outline of the tree comes")
	}
	if t.o.ShellJob || t.o.Lead || t.o.Sibling || len(t.o.Namespaces.Join) > 0 {
		return errors.New("memory comes before the images, although a tree that is restored in this way cannot be made without them")
	}
	if err := t.tracer.Do(func() error { return t.bear(out) }); err != nil {
		return fmt.Errorf("make processes for memory that comes early: %w", err)
	}
	t.log.Debug("processes made for early memory", "processes", len(t.early.procs))
	return nil
}

func (t *Tree) earlyFile(f *image.EarlyFile) (err error) {
	if t.earlyFiles == nil {
		if t.earlyFiles, err = files.NewEarlyFiles(t.o.Carry, t.o.Mark); err != nil {
			return err
		}
	}
	return t.earlyFiles.Announce(f)
}

// earlyData takes a run of data that comes before the images.
func (t *Tree) earlyData(x image.Early) error {
	switch x.ID.Kind {
	case image.Content, image.Cut, image.Digest:
		if t.earlyFiles == nil {
			return fmt.Errorf("data of %s before any file was told of", x.ID)
		}
		return t.earlyFiles.Data(x.ID, x.Off, x.Data)
	case image.Layout, image.Memory:
	default:
		return fmt.Errorf("data of %s before the images", x.ID)
	}
	n := t.early.find(x.ID.ID)
	if n == nil {
		return fmt.Errorf("early memory of pid %d, which is not among the processes", x.ID.ID)
	}
	if x.ID.Kind == image.Layout {
		return t.lay(n, x.Data)
	}
	t.st.Pages += uint64(len(x.Data)) / arch.PageSize
	return n.write(x.Off, x.Data)
}

// find finds a process by its pid in the images.
func (e *early) find(pid uint32) *nursling {
	if e == nil {
		return nil
	}
	return e.byPid[int(pid)]
}

// bear makes the processes.
// Preconditions: on the tracer's thread.
func (t *Tree) bear(out *image.Outline) (err error) {
	kind := stubKind{newPid: t.newPid(), terminals: out.Terminals}
	if t.stub, err = startStub(t.ch, kind); err != nil {
		return err
	}
	t.early = &early{byPid: map[int]*nursling{}, terminals: out.Terminals}
	from := uint64(earlySpare)
	if out.Free != 0 {
		from = out.Free + freeMargin
	}
	if t.spare, err = gap(append(slices.Clone(t.stub.special), t.stub.rest...), spareSize, from); err != nil {
		return err
	}
	if err := t.stub.prepare(t.spare); err != nil {
		return err
	}
	for _, op := range out.Procs {
		n := &nursling{OutlineProc: op}
		if parent := t.early.byPid[int(op.Parent)]; parent == nil {
			flags, exitSignal := t.rootFlags()
			n.remote, err = t.clone(t.stub.remote, flags, exitSignal, int(op.Pid))
			if err == nil {
				err = t.hollow(n.remote)
			}
		} else {
			n.remote, err = t.clone(parent.remote, 0, uint64(op.ExitSignal), int(op.Pid))
		}
		if err == nil && op.Sid == op.Pid {
			err = n.remote.Run(ptrace.NewCall("begin a session", unix.SYS_SETSID))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
		t.early.procs = append(t.early.procs, n)
		t.early.byPid[int(op.Pid)] = n
	}
	return nil
}

// hollow takes everything out of a process that was cloned from the stub but the spare
// memory, in which it parks [vdso] and [vvar].
func (t *Tree) hollow(r *ptrace.Remote) error {
	var calls []*ptrace.Call
	park := t.spare + ptrace.AreaSize
	from := slices.Clone(t.stub.special)
	sortSpans(from)
	if n := from[len(from)-1].end - from[0].start; n > parkSize {
		return fmt.Errorf("[vdso] and [vvar] take %d bytes", n)
	}
	for _, s := range from {
		to := park + s.start - from[0].start
		calls = append(calls, moveCall("park [vdso]", s.start, s.end-s.start, to))
		t.early.special = append(t.early.special, span{to, to + s.end - s.start})
	}
	for _, s := range t.stub.rest {
		calls = append(calls, ptrace.NewCall("unmap the stub", unix.SYS_MUNMAP, ptrace.Int(s.start), ptrace.Int(s.end-s.start)))
	}
	if err := r.Run(calls...); err != nil {
		return err
	}
	r.Insn += park - from[0].start
	return nil
}

// moveCall makes the call that moves a mapping.
func moveCall(what string, from, n, to uint64) *ptrace.Call {
	return ptrace.NewCall(what, unix.SYS_MREMAP, ptrace.Int(from), ptrace.Int(n), ptrace.Int(n), ptrace.Int(uint64(mremapFixed)), ptrace.Int(to))
}

// lay gives a process new memory.
func (t *Tree) lay(n *nursling, b []byte) error {
	regions, err := image.ParseRegions(b)
	if err != nil {
		return err
	}
	var calls []*ptrace.Call
	for i, r := range regions {
		if i > 0 && r.Start < regions[i-1].End {
			return fmt.Errorf("%w: early memory of %s in disorder", image.ErrMalformed, n)
		}
		const may = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_GROWSDOWN | unix.MAP_NORESERVE
		if int(r.Flags)&^may != 0 || int(r.Flags)&unix.MAP_PRIVATE == 0 || r.Prot&^7 != 0 {
			return fmt.Errorf("early memory %x-%x of %s with flags %#x and protection %#x", r.Start, r.End, n, r.Flags, r.Prot)
		}
		if r.Start < t.spare+spareSize && r.End > t.spare {
			return t.crowded(n, r.Start, r.End)
		}
		what := fmt.Sprintf("make early memory %x-%x", r.Start, r.End)
		calls = append(calls, ptrace.NewCall(what, unix.SYS_MMAP, ptrace.Int(r.Start), ptrace.Int(r.End-r.Start), ptrace.Int(r.Prot),
			ptrace.Int(r.Flags|unix.MAP_ANONYMOUS|unix.MAP_FIXED), ptrace.Int(^uint64(0)), ptrace.Int(0)))
		for a := range 64 {
			if r.Madvise&(1<<uint(a)) != 0 {
				calls = append(calls, ptrace.NewCall(what, unix.SYS_MADVISE, ptrace.Int(r.Start), ptrace.Int(r.End-r.Start), ptrace.Int(a)))
			}
		}
	}
	n.have = mem.Lay(n.have, regions)
	if err := n.done(); err != nil {
		return err
	}
	if err := t.tracer.Do(func() error { return n.remote.Run(calls...) }); err != nil {
		return fmt.Errorf("%s: %w", n, err)
	}
	return nil
}

// crowded says that a program uses the addresses of the spare memory.
func (t *Tree) crowded(who fmt.Stringer, start, end uint64) error {
	return fmt.Errorf("%s has memory at %x-%x, which is where this engine works while memory comes early: move it without a pre-copy (--mode stop-and-copy)", who, start, end)
}

// write puts early memory into a process.
func (n *nursling) write(addr uint64, b []byte) (err error) {
	if n.writer == nil {
		if n.writer, err = mem.NewWriter(n.remote.Tid, n.vmas()); err != nil {
			return err
		}
	}
	return n.writer.Write(addr, b)
}

// done closes what writes into a process.
func (n *nursling) done() error {
	if n.writer == nil {
		return nil
	}
	err := n.writer.Close()
	n.writer = nil
	return err
}

// vmas are the mappings of a process as those of images would be.
func (n *nursling) vmas() (out []*mem.VMA) {
	for _, r := range n.have {
		out = append(out, &mem.VMA{Start: r.Start, End: r.End, Prot: int(r.Prot), Flags: int(r.Flags), Madvise: r.Madvise, Status: mem.Regular | mem.AnonPrivate})
	}
	return out
}

func (e *early) close() (err error) {
	if e == nil {
		return nil
	}
	for _, n := range e.procs {
		err = errors.Join(err, n.done())
	}
	return err
}

// graft makes processes that have memory already those of the model, and ends the ones
// of which the images do not say that their memory is of use.
// Preconditions: on the tracer's thread; the model is there.
func (t *Tree) graft(set *image.Set) error {
	useful := map[int]bool{}
	if set.Facts != nil {
		for _, pid := range set.Facts.Precopied {
			useful[int(pid)] = true
		}
	}
	if t.early == nil {
		if len(useful) > 0 {
			return errors.New("images need memory that should have come before them")
		}
		return nil
	}
	if t.newPid() && t.terminals && !t.early.terminals {
		return errors.New("images have pseudoterminals, of which nothing was said when memory came before them")
	}
	for i := len(t.early.procs) - 1; i >= 0; i-- {
		n := t.early.procs[i]
		if useful[int(n.Pid)] {
			continue
		}
		parent := t.early.byPid[int(n.Parent)]
		if err := t.end(n, parent); err != nil {
			return fmt.Errorf("end %s, whose memory came in vain: %w", n, err)
		}
		if parent != nil {
			if p := t.model.byPid[int(parent.Pid)]; p != nil {
				p.reapChild = true
			}
		}
		delete(t.early.byPid, int(n.Pid))
	}
	for _, n := range t.early.procs {
		if !useful[int(n.Pid)] {
			continue
		}
		delete(useful, int(n.Pid))
		p := t.model.byPid[int(n.Pid)]
		parent := 0
		if p != nil && p.parent != nil {
			parent = p.parent.vpid
		}
		switch {
		case p == nil || p.zombie || p.with != 0 || p.leave != 0 || p.sid != int(n.Sid) || parent != int(n.Parent),
			p.parent != nil && (p.parent.graft == nil || p.exitSignal() != uint64(n.ExitSignal)):
			return fmt.Errorf("images are not of the tree whose memory came before them: pid %d differs", n.Pid)
		}
		for _, v := range p.vmas {
			if v.Start < t.spare+spareSize && v.End > t.spare {
				return t.crowded(p, v.Start, v.End)
			}
		}
		p.leader().remote, p.graft = n.remote, n
		p.heritage = &process{vpid: p.vpid, vmas: t.shadow(n)}
		p.data.over = true // nothing is inherited: what is there is its own
	}
	for pid := range useful {
		return fmt.Errorf("images need memory of pid %d that should have come before them", pid)
	}
	return nil
}

// end kills a process that is not needed.
func (t *Tree) end(n, parent *nursling) error {
	if err := unix.Kill(n.remote.Tid, unix.SIGKILL); err != nil {
		return err
	}
	if err := reap(n.remote.Tid); err != nil {
		return err
	}
	t.forget(n.remote.Tid)
	if parent == nil {
		return nil
	}
	return parent.remote.Run(ptrace.NewCall("reap a helper", unix.SYS_WAIT4, ptrace.Int(-1), ptrace.Int(0), ptrace.Int(unix.WALL|unix.WNOHANG), ptrace.Int(0)))
}

// shadow are the mappings that a process has before its images are there.
func (t *Tree) shadow(n *nursling) []*mem.VMA {
	out := n.vmas()
	for _, s := range t.early.special {
		out = append(out, &mem.VMA{Start: s.start, End: s.end, Status: mem.Regular | mem.Vvar | mem.AnonPrivate})
	}
	slices.SortFunc(out, func(a, b *mem.VMA) int { return cmp.Compare(a.Start, b.Start) })
	return out
}

// there is what a graft has of a mapping already.
type there struct {
	parts []image.Range
	// writable: it was made writable, for which the kernel has accounted it; what was
	// not is never one mapping with it.
	writable bool
}

// prune makes the calls that leave a process with early memory what of it is part of
// its mappings, and the spare memory; what that is goes to p.early.
func (t *Tree) prune(p *process) []*ptrace.Call {
	p.early = map[*mem.VMA]*there{}
	keep := []span{{t.spare, t.spare + spareSize}}
	have := p.graft.have
	for _, v := range p.vmas {
		if !v.Early() || len(v.Guards) > 0 {
			continue
		}
		for len(have) > 0 && have[0].End <= v.Start {
			have = have[1:]
		}
		for _, h := range have {
			if h.Start >= v.End {
				break
			}
			if !v.Made(h) {
				continue
			}
			e := p.early[v]
			if e == nil {
				e = &there{writable: v.Prot&unix.PROT_WRITE != 0}
				p.early[v] = e
			}
			r := image.Range{Start: max(h.Start, v.Start), End: min(h.End, v.End)}
			e.parts, e.writable = append(e.parts, r), e.writable || h.Prot&unix.PROT_WRITE != 0
			keep = append(keep, span{r.Start, r.End})
		}
	}
	return unmapOthers(keep, "unmap what came in vain")
}

// firstProt is the protection with which a part of a mapping is made.
func (p *process) firstProt(v *mem.VMA) int {
	if e := p.early[v]; e != nil && e.writable {
		return unix.PROT_READ | unix.PROT_WRITE
	}
	return v.Prot
}

// protect makes the calls that give a mapping its protection, if it may have another one.
func (p *process) protect(v *mem.VMA) (calls []*ptrace.Call) {
	e := p.early[v]
	if e == nil {
		return nil
	}
	call := func(prot int) {
		calls = append(calls, ptrace.NewCall("protect "+v.String(), unix.SYS_MPROTECT, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(prot)))
	}
	if e.writable {
		call(unix.PROT_READ | unix.PROT_WRITE)
	}
	call(v.Prot)
	return calls
}

// missing are the parts of a mapping that are to be made.
func (p *process) missing(v *mem.VMA) (out []image.Range) {
	at := v.Start
	e := p.early[v]
	if e == nil {
		return []image.Range{{Start: v.Start, End: v.End}}
	}
	for _, r := range e.parts {
		if r.Start > at {
			out = append(out, image.Range{Start: at, End: r.Start})
		}
		at = r.End
	}
	if at < v.End {
		out = append(out, image.Range{Start: at, End: v.End})
	}
	return out
}

// holes empties memory of a process that came early.
// Preconditions: on the tracer's thread.
func (t *Tree) holes(id image.DataID, b []byte) error {
	rs, err := image.ParseRanges(b)
	if err != nil {
		return err
	}
	p := t.model.byPid[int(id.ID)]
	if p == nil || p.graft == nil {
		return fmt.Errorf("images have holes in the memory of pid %d, of which nothing came before them", id.ID)
	}
	if !p.built {
		return fmt.Errorf("images have holes in the memory of %s before it is there", p)
	}
	var calls []*ptrace.Call
	i := 0
	for _, r := range rs {
		for i > 0 && p.vmas[i].Start > r.Start {
			i--
		}
		for i < len(p.vmas) && p.vmas[i].End <= r.Start {
			i++
		}
		if i == len(p.vmas) || r.Start < p.vmas[i].Start || r.End > p.vmas[i].End || !p.vmas[i].HasPages() {
			return fmt.Errorf("images have a hole at %x-%x of %s, where it has no memory of its own", r.Start, r.End, p)
		}
		advice := unix.MADV_DONTNEED
		if p.vmas[i].Flags&unix.MAP_LOCKED != 0 {
			advice = unix.MADV_DONTNEED_LOCKED
		}
		calls = append(calls, ptrace.NewCall("empty memory that came early", unix.SYS_MADVISE, ptrace.Int(r.Start), ptrace.Int(r.End-r.Start), ptrace.Int(advice)))
	}
	for part := range slices.Chunk(calls, staleCalls) {
		if err := p.remote().Run(part...); err != nil {
			return fmt.Errorf("memory of %s: %w", p, err)
		}
	}
	return nil
}

// healPiece is how much of a mapping is in this process's memory at once, bytes.
const healPiece = 4 << 20

// heal joins what the kernel keeps apart although it is one mapping of the images: parts
// that got memory before what lies between them was there. A program could not
// resize or move such a mapping.
// Preconditions: on the tracer's thread; the mappings are there.
func (t *Tree) heal(ctx context.Context, p *process) error {
	maps, err := procfs.ReadMaps(p.remote().Tid)
	if err != nil {
		return err
	}
	i := 0
	for _, v := range p.vmas {
		if p.early[v] == nil {
			continue
		}
		for i < len(maps) && maps[i].End <= v.Start {
			i++
		}
		for start := v.Start; i < len(maps) && maps[i].End < v.End; i++ {
			// What is on the smaller side of the border is made anew, from there on.
			border := maps[i].End
			end := v.End
			if i+1 < len(maps) {
				end = min(end, maps[i+1].End)
			}
			t.log.Debug("parts of a mapping are joined", "pid", p.vpid, "mapping", v, "at", fmt.Sprintf("%x", border))
			if border-start <= end-border {
				for at := border; at > start; at -= min(healPiece, at-start) {
					err = errors.Join(err, t.remake(ctx, p, v, at-min(healPiece, at-start), at))
				}
			} else {
				for at := border; at < end; at += min(healPiece, end-at) {
					err = errors.Join(err, t.remake(ctx, p, v, at, at+min(healPiece, end-at)))
				}
			}
			if err != nil {
				return fmt.Errorf("join the parts of %s: %w", v, err)
			}
		}
	}
	return nil
}

// remake maps a part of a mapping anew, with what is in it.
func (t *Tree) remake(ctx context.Context, p *process, v *mem.VMA, start, end uint64) (err error) {
	part := *v
	part.Start, part.End = start, end
	r, err := mem.NewReader(p.remote().Tid)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var kept kept
	if _, err := r.Dump(ctx, []*mem.VMA{&part}, &kept, image.DataID{}); err != nil {
		return err
	}
	calls := append([]*ptrace.Call{ptrace.NewCall("make "+v.String(), unix.SYS_MMAP, ptrace.Int(start), ptrace.Int(end-start), ptrace.Int(p.firstProt(v)),
		ptrace.Int(v.Flags&^unix.MAP_LOCKED|unix.MAP_FIXED), ptrace.Int(^uint64(0)), ptrace.Int(0))}, advise(v)...)
	calls = append(calls, ptrace.NewCall("protect "+v.String(), unix.SYS_MPROTECT, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(v.Prot)))
	if v.Flags&unix.MAP_LOCKED != 0 {
		calls = append(calls, lock(v))
	}
	if err := p.remote().Run(calls...); err != nil {
		return err
	}
	w, err := mem.NewWriter(p.remote().Tid, p.vmas)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	for _, k := range kept {
		if err := w.Write(k.at, k.b); err != nil {
			return err
		}
	}
	return nil
}

// kept is a sink that keeps data.
type kept []struct {
	at uint64
	b  []byte
}

func (*kept) Facts(*image.Facts) error { return nil }
func (*kept) Entry(image.Entry) error  { return nil }
func (*kept) Sealed() error            { return nil }

func (k *kept) Data(_ image.DataID, at uint64, b []byte) error {
	*k = append(*k, struct {
		at uint64
		b  []byte
	}{at, slices.Clone(b)})
	return nil
}
