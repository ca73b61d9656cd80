package mem

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// Tracker gives the anonymous memory of a running process to a sink, and then, round by
// round, what was written meanwhile. It learns that from a userfaultfd of the
// process in its asynchronous write-protect mode: the kernel notes the first
// write to a page since the last look and lets it go on at once. Closing the
// userfaultfd undoes everything.
//
// What the other side has is known at any moment: known are the mappings that it was
// told of, sent the pages that it has, owed those that could not be read when they
// were seen to be written. A mapping that the kernel does not follow,
// because it is new or took the place of another, is told anew, which empties it.
type Tracker struct {
	pid   int
	image uint32 // pid in the images
	uffd  *os.File
	known []image.Region // ascending, apart or of different kinds
	sent  PageSet
	owed  PageSet
	buf   []byte
	vec   []sys.PageRegion
	batch []unix.RemoteIovec

	maps []procfs.SmapsEntry // as they were at seen
	seen time.Time
}

// NewTracker follows a process by a userfaultfd of its own, which is the tracker's from
// then on. errors.ErrUnsupported: the kernel cannot. image is its pid in the images.
func NewTracker(pid int, image uint32, uffd *os.File) (*Tracker, error) {
	if err := sys.UffdTrack(int(uffd.Fd())); err != nil {
		return nil, errors.Join(err, uffd.Close())
	}
	return &Tracker{pid: pid, image: image, uffd: uffd, buf: make([]byte, ChunkSize), vec: make([]sys.PageRegion, 4096)}, nil
}

// Close ends the following; the process has nothing left of it.
func (t *Tracker) Close() error { return t.uffd.Close() }

// Early tells whether memory of a mapping can travel before the images.
func (v *VMA) Early() bool {
	const never = unix.MAP_HUGETLB | Droppable
	return v.Is(AnonPrivate) && !v.Special() && !v.Is(AioRing) && v.Flags&never == 0 && !v.Guarded
}

// Late tells whether memory of a mapping can come when the process runs already. What is
// locked is to be there at once.
func (v *VMA) Late() bool { return v.Early() && v.Flags&unix.MAP_LOCKED == 0 }

// region is v as the other side is told of it. What can be changed later is not part of it.
func (v *VMA) region() image.Region {
	prot := v.Prot
	if v.Accounted {
		prot = unix.PROT_READ | unix.PROT_WRITE
	}
	return image.Region{Range: image.Range{Start: v.Start, End: v.End}, Prot: uint32(prot), Flags: uint32(v.Flags &^ unix.MAP_LOCKED), Madvise: v.Madvise & hugeAdvice}
}

// Made tells whether a mapping can be what such a region has become.
func (v *VMA) Made(r image.Region) bool {
	own := v.region()
	return own.Flags == r.Flags && own.Madvise == r.Madvise
}

// hugeAdvice is what has to be known of memory before it is filled.
const hugeAdvice = 1<<unix.MADV_HUGEPAGE | 1<<unix.MADV_NOHUGEPAGE

// owns tells whether memory under a userfaultfd in write-protect mode is so because of the
// tracker: mappings that grow, or come out of others, are under it, too, without its
// knowledge. A userfaultfd of the program's own is refused as such, for its descriptor.
func (t *Tracker) owns() bool { return t != nil }

// memoryOfMaps is for how long what was read of mappings is taken for what they are.
const memoryOfMaps = 250 * time.Millisecond

// remember keeps what was read of the mappings, for recall.
func (t *Tracker) remember(maps []procfs.SmapsEntry) {
	if t != nil {
		t.maps, t.seen = maps, time.Now()
	}
}

// recall gives what remember kept if the mappings of the process, which is frozen, are
// the same now; nil: it is to be read again. Advice that a program gave on a whole
// mapping since is not to be seen.
func (t *Tracker) recall(pid int, locked uint64) ([]procfs.SmapsEntry, error) {
	if t == nil || t.maps == nil || time.Since(t.seen) > memoryOfMaps {
		return nil, nil
	}
	now, err := procfs.ReadMaps(pid)
	if err != nil {
		return nil, err
	}
	if len(now) != len(t.maps) {
		return nil, nil
	}
	was := uint64(0)
	for i := range now {
		if now[i] != t.maps[i].Mapping {
			return nil, nil
		}
		if t.maps[i].Has("lo") {
			was += now[i].Len()
		}
	}
	if was != locked {
		return nil, nil
	}
	return t.maps, nil
}

// errUnwatched: a mapping is not under the userfaultfd.
var errUnwatched = errors.New("memory that is not followed")

// Round gives what was written since the last round, or everything there is, and
// returns how many pages that were. vmas are the mappings of the process a moment ago.
func (t *Tracker) Round(ctx context.Context, vmas []*VMA, sink image.Sink) (pages uint64, err error) {
	r, err := NewReader(t.pid)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var news []image.Region
	k := 0
	for _, v := range vmas {
		if !v.Early() {
			continue
		}
		for k < len(t.known) && t.known[k].End <= v.Start {
			k++
		}
		parts := unknown(v, t.known[k:])
		if len(parts) == 0 {
			continue
		}
		// What cannot be followed, or is gone meanwhile, is found out below.
		if err := t.watch(v); errors.Is(err, unix.ESRCH) {
			return 0, err
		}
		news = append(news, parts...)
	}
	if err := t.tell(news, sink); err != nil {
		return 0, err
	}
	for _, v := range vmas {
		if !v.Early() {
			continue
		}
		n, err := t.round(ctx, r, v, sink)
		pages += n
		if procfs.Gone(err) {
			return pages, err
		}
		if err != nil {
			return pages, fmt.Errorf("copy %s of pid %d: %w", v, t.pid, err)
		}
	}
	return pages, nil
}

// watch puts a mapping under the userfaultfd.
func (t *Tracker) watch(v *VMA) error { return sys.UffdWatch(int(t.uffd.Fd()), v.Start, v.End) }

func (t *Tracker) round(ctx context.Context, r *Reader, v *VMA, sink image.Sink) (uint64, error) {
	n, err := t.written(ctx, r, v, sink)
	if !errors.Is(err, errUnwatched) {
		return n, err
	}
	err = t.watch(v)
	if errors.Is(err, unix.ESRCH) {
		return 0, err
	}
	// Whatever the other side has there may be another mapping's.
	if terr := t.tell([]image.Region{v.region()}, sink); terr != nil {
		return 0, terr
	}
	if err != nil {
		return 0, nil // gone meanwhile, or not to be followed: it travels in the end
	}
	n, err = t.written(ctx, r, v, sink)
	if errors.Is(err, errUnwatched) {
		return n, nil // it changes all the time
	}
	return n, err
}

// unknown are the parts of a mapping that are not as such among known regions, of
// which the first may be the one where it begins.
func unknown(v *VMA, known []image.Region) (out []image.Region) {
	whole := v.region()
	at := v.Start
	for _, k := range known {
		if k.Start >= v.End {
			break
		}
		if k.End <= at || !v.Made(k) {
			continue
		}
		if k.Start > at {
			p := whole
			p.Start, p.End = at, k.Start
			out = append(out, p)
		}
		at = k.End
	}
	if at < v.End {
		p := whole
		p.Start = at
		out = append(out, p)
	}
	return out
}

// regionsAtOnce bounds the data of one message.
const regionsAtOnce = 2048

// tell gives the other side new, empty memory; the regions ascend.
func (t *Tracker) tell(news []image.Region, sink image.Sink) error {
	for part := range slices.Chunk(news, regionsAtOnce) {
		var b []byte
		for _, p := range part {
			b = image.AppendRegion(b, p)
		}
		if err := sink.Data(t.id(image.Layout), 0, b); err != nil {
			return err
		}
		t.known = Lay(t.known, part)
		for _, p := range part {
			t.forget(p.Start, p.End)
		}
	}
	return nil
}

// forget notes that the other side has nothing in a range.
func (t *Tracker) forget(start, end uint64) {
	t.sent.Remove(start, end)
	t.owed.Remove(start, end)
}

func (t *Tracker) id(kind image.DataKind) image.DataID { return image.DataID{Kind: kind, ID: t.image} }

// Lay puts regions into a list, in the place of what is there. Both ascend, and so does
// what it returns.
func Lay(list, news []image.Region) []image.Region {
	out := make([]image.Region, 0, len(list)+2*len(news))
	i := 0
	put := func(k image.Region) {
		if k.Start < k.End {
			out = append(out, k)
		}
	}
	for _, k := range list {
		// New ones before it, and over its beginning.
		for i < len(news) && news[i].Start <= k.Start {
			put(news[i])
			k.Start = max(k.Start, min(news[i].End, k.End))
			i++
		}
		if n := len(out); n > 0 {
			k.Start = max(k.Start, min(out[n-1].End, k.End))
		}
		for i < len(news) && news[i].Start < k.End {
			left := k
			left.End = news[i].Start
			put(left)
			put(news[i])
			k.Start = max(k.Start, min(news[i].End, k.End))
			i++
		}
		put(k)
	}
	return append(out, news[i:]...)
}

// pagesOwn are the categories that pages do not have which are a process's own.
const pagesOwn = sys.PageIsFile | sys.PageIsPfnZero

// written gives the pages of a mapping that were written since the last look.
func (t *Tracker) written(ctx context.Context, r *Reader, v *VMA, sink image.Sink) (pages uint64, err error) {
	for at := v.Start; at < v.End; {
		n, next, err := sys.PagemapWritten(int(r.pagemap.Fd()), true, at, v.End, pagesOwn, pagesOwn|sys.PageIsWritten, sys.PageIsPresent|sys.PageIsSwapped, 0, t.vec)
		if errors.Is(err, unix.EPERM) {
			return pages, errUnwatched
		}
		if err != nil {
			return pages, err
		}
		got, err := t.give(ctx, r, v, t.vec[:n], true, sink)
		pages += got
		if err != nil {
			return pages, err
		}
		if n < len(t.vec) {
			break
		}
		at = next
	}
	return pages, nil
}

// Pending counts the pages that a round would give now.
func (t *Tracker) Pending(vmas []*VMA) (pages uint64, err error) {
	f, err := os.Open(procfs.Path(t.pid, "pagemap"))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	for _, v := range vmas {
		if !v.Early() {
			continue
		}
		for at := v.Start; at < v.End; {
			n, next, err := sys.PagemapWritten(int(f.Fd()), false, at, v.End, pagesOwn, pagesOwn|sys.PageIsWritten, sys.PageIsPresent|sys.PageIsSwapped, 0, t.vec)
			if errors.Is(err, unix.EPERM) {
				n, next, err = sys.PagemapScan(int(f.Fd()), at, v.End, pagesOwn, pagesOwn, sys.PageIsPresent|sys.PageIsSwapped, 0, t.vec)
			}
			if err != nil {
				return pages, err
			}
			for _, run := range t.vec[:n] {
				pages += (run.End - run.Start) / arch.PageSize
			}
			if n < len(t.vec) {
				break
			}
			at = next
		}
	}
	return pages, nil
}

// Final gives what the other side lacks of the memory of the process, which is frozen:
// what was written since the last round, what it was never given, and where it
// has something that is no more. rest are the mappings that it has nothing of.
//
// If late is not nil, nothing is given of memory that can come later (VMA.Late) but the
// pages at these addresses.
func (t *Tracker) Final(ctx context.Context, vmas []*VMA, late []uint64, sink image.Sink) (pages uint64, rest []*VMA, err error) {
	r, err := NewReader(t.pid)
	if err != nil {
		return 0, nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var holes []image.Range
	for _, v := range vmas {
		if !v.HasPages() {
			continue
		}
		if !v.Early() {
			t.sent.Runs(v.Start, v.End, func(a, b uint64) { holes = append(holes, image.Range{Start: a, End: b}) })
			rest = append(rest, v)
			continue
		}
		n, gone, err := t.last(ctx, r, v, late != nil && v.Late(), sink)
		pages += n
		if errors.Is(err, errUnwatched) {
			gone = nil
			t.sent.Runs(v.Start, v.End, func(a, b uint64) { gone = addRange(gone, a, b) })
			t.forget(v.Start, v.End)
			if err = nil; late == nil || !v.Late() {
				rest = append(rest, v)
			}
		}
		if err != nil {
			return pages, nil, fmt.Errorf("dump %s of pid %d: %w", v, t.pid, err)
		}
		holes = append(holes, gone...)
	}
	for part := range slices.Chunk(holes, holesAtOnce) {
		var b []byte
		for _, h := range part {
			b = image.AppendRange(b, h)
		}
		if err := sink.Data(t.id(image.Holes), 0, b); err != nil {
			return pages, nil, err
		}
	}
	n, err := t.hot(ctx, r, vmas, late, sink)
	return pages + n, rest, err
}

// holesAtOnce bounds the data of one message.
const holesAtOnce = 4096

// hot gives the pages at addresses that are about to be used.
func (t *Tracker) hot(ctx context.Context, r *Reader, vmas []*VMA, at []uint64, sink image.Sink) (pages uint64, err error) {
	slices.Sort(at)
	last := uint64(0)
	for _, a := range at {
		page := a &^ (arch.PageSize - 1)
		i, ok := slices.BinarySearchFunc(vmas, page+1, func(v *VMA, end uint64) int { return cmp.Compare(v.End, end) })
		if !ok && i == len(vmas) || page < vmas[i].Start || page == last || !vmas[i].Late() {
			continue
		}
		last = page
		n, err := t.give(ctx, r, vmas[i], []sys.PageRegion{{Start: page, End: page + arch.PageSize}}, false, sink)
		if pages += n; err != nil {
			return pages, err
		}
	}
	return pages, nil
}

// last is Final of one mapping; late: without its pages.
func (t *Tracker) last(ctx context.Context, r *Reader, v *VMA, late bool, sink image.Sink) (pages uint64, gone []image.Range, err error) {
	// Where a part of it took another's place the sent pages are not its own.
	i, _ := slices.BinarySearchFunc(t.known, v.Start+1, func(k image.Region, at uint64) int { return cmp.Compare(k.End, at) })
	for _, p := range unknown(v, t.known[i:]) {
		t.forget(p.Start, p.End)
	}
	var runs []sys.PageRegion
	behind := v.Start // everything before it has been looked at
	drop := func(start, end uint64) {
		t.sent.Runs(start, end, func(a, b uint64) { gone = addRange(gone, a, b) })
	}
	if late && !t.sent.Any(v.Start, v.End) {
		return 0, nil, nil
	}
	for at := v.Start; at < v.End; {
		n, next, err := sys.PagemapWritten(int(r.pagemap.Fd()), false, at, v.End, pagesOwn, pagesOwn, sys.PageIsPresent|sys.PageIsSwapped, sys.PageIsWritten, t.vec)
		if errors.Is(err, unix.EPERM) {
			return pages, nil, errUnwatched
		}
		if err != nil {
			return pages, nil, err
		}
		runs = runs[:0]
		for _, run := range t.vec[:n] {
			drop(behind, run.Start)
			behind = run.End
			if late {
				if run.Categories&sys.PageIsWritten != 0 {
					t.owed.Add(run.Start, run.End)
				}
				t.owed.Runs(run.Start, run.End, drop)
				t.owed.Runs(run.Start, run.End, func(a, b uint64) { t.sent.Remove(a, b) })
				continue
			}
			if run.Categories&sys.PageIsWritten != 0 {
				runs = append(runs, run)
				continue
			}
			t.lacks(run.Start, run.End, func(a, b uint64) { runs = append(runs, sys.PageRegion{Start: a, End: b}) })
		}
		got, err := t.give(ctx, r, v, runs, false, sink)
		pages += got
		if err != nil {
			return pages, nil, err
		}
		if n < len(t.vec) {
			break
		}
		at = next
	}
	drop(behind, v.End)
	return pages, gone, nil
}

// lacks calls fn for the runs of pages in [start, end) that the other side has not, or
// has as they were before.
func (t *Tracker) lacks(start, end uint64, fn func(start, end uint64)) {
	t.owed.Runs(start, end, func(a, b uint64) { t.sent.Remove(a, b) }) // as if it had not
	t.sent.Absent(start, end, fn)
}

// give reads runs of pages and gives them to the sink; of a running process, what goes
// away meanwhile is left out.
func (t *Tracker) give(ctx context.Context, r *Reader, v *VMA, runs []sys.PageRegion, running bool, sink image.Sink) (pages uint64, err error) {
	t.batch = t.batch[:0]
	size := 0
	flush := func() error {
		if len(t.batch) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := t.giveBatch(r, v, size, running, sink)
		pages += n
		t.batch, size = t.batch[:0], 0
		return err
	}
	for _, run := range runs {
		for a := run.Start; a < run.End; {
			if size == len(t.buf) || len(t.batch) == sys.IovMax {
				if err := flush(); err != nil {
					return pages, err
				}
			}
			n := min(run.End-a, uint64(len(t.buf)-size))
			t.batch = append(t.batch, unix.RemoteIovec{Base: uintptr(a), Len: int(n)})
			size += int(n)
			a += n
		}
	}
	return pages, flush()
}

func (t *Tracker) giveBatch(r *Reader, v *VMA, size int, running bool, sink image.Sink) (pages uint64, err error) {
	whole := false
	if v.Prot&unix.PROT_READ != 0 && !v.Cow {
		n, err := sys.ProcessVMRead(t.pid, t.buf[:size], t.batch)
		whole = err == nil && n == size
	}
	b := t.buf[:size]
	put := func(at uint64, b []byte) error {
		return split(b, func(from, to int, zero bool) error {
			start, end := at+uint64(from), at+uint64(to)
			if zero && !t.sent.Any(start, end) {
				t.sent.Add(start, end) // new memory is as empty there
				return nil
			}
			if err := sink.Data(t.id(image.Memory), start, b[from:to]); err != nil {
				return err
			}
			t.sent.Add(start, end)
			t.owed.Remove(start, end)
			pages += (end - start) / arch.PageSize
			return nil
		})
	}
	for _, x := range t.batch {
		at, p := uint64(x.Base), b[:x.Len]
		b = b[x.Len:]
		var err error
		if !whole {
			err = r.read(v, at, p)
		}
		if err == nil {
			if err := put(at, p); err != nil {
				return pages, err
			}
			continue
		}
		if !running {
			return pages, err
		}
		for len(p) > 0 {
			if r.read(v, at, p[:arch.PageSize]) == nil {
				if err := put(at, p[:arch.PageSize]); err != nil {
					return pages, err
				}
			} else {
				t.owed.Add(at, at+arch.PageSize) // the look has noted it as seen
			}
			at, p = at+arch.PageSize, p[arch.PageSize:]
		}
	}
	return pages, nil
}
