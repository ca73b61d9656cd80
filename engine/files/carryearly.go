package files

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// Content of files that travel with their names is sent while the tree runs, and of
// each block the digest is kept. A look at the frozen tree sends the blocks that
// differ. Blocks that are zero are holes at the other side.

// blockSize is how much is compared at once, bytes.
const blockSize = 1 << 20

// EarlyCopy is what the other side has of files that travel.
type EarlyCopy struct {
	files map[string]*earlyFile // by where they are placed
	known []CarriedFile         // as of the last look
	since time.Time             // when that began
	buf   []byte
}

// NewEarlyCopy returns one of nothing.
func NewEarlyCopy() *EarlyCopy { return &EarlyCopy{files: map[string]*earlyFile{}} }

// CarriedFile is a regular file that travels with its name and content.
type CarriedFile struct {
	from, to string
	ino      inodeID
	// mapped: the tree may write to it through a mapping, which does not always
	// change its times.
	mapped bool
}

// earlyFile is one of which content was sent.
type earlyFile struct {
	id     uint32
	blocks map[uint64][sha256.Size]byte // those that are not zero, by number
	seen   version                      // when it was sent
	sure   bool                         // whatever is written later changes its version
}

// version is what changes about a file that is written to.
type version struct {
	inode        inodeID
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(st *unix.Stat_t) version {
	return version{inode(st), st.Size, st.Mtim, st.Ctim}
}

// EarlyFiles lists, after Finish, the files whose content can be sent while the tree
// runs; nil if more is to travel than may.
func (d *Dumper) EarlyFiles() []CarriedFile {
	if d.tooMuch {
		return nil
	}
	leased := map[inodeID]bool{} // whose holders would be told of an open
	for _, o := range d.objects {
		if slices.ContainsFunc(o.info.Locks, func(l procfs.Lock) bool { return lockKinds[l.Kind] == lockLease }) {
			leased[inode(&o.stat)] = true
		}
	}
	for i := range d.carriedFiles {
		f := &d.carriedFiles[i]
		f.mapped = d.writesMapped(f.ino)
	}
	return slices.DeleteFunc(d.carriedFiles, func(f CarriedFile) bool { return leased[f.ino] })
}

// writesMapped says whether the tree may write to a file through a mapping.
func (d *Dumper) writesMapped(id inodeID) bool {
	if d.mappedWritable == nil {
		d.mappedWritable = map[inodeID]bool{}
		for _, o := range d.objects {
			if o.held("mapping") && o.writable() {
				d.mappedWritable[inode(&o.stat)] = true
			}
		}
	}
	return d.mappedWritable[id]
}

// builds lets the content of a ghost build on what was sent of its place already.
func (d *Dumper) builds(g *ghost, x *Data, st *unix.Stat_t) {
	if d.opts.Early == nil {
		return
	}
	f := d.opts.Early.files[g.facts.Named.Path]
	if f == nil {
		return
	}
	g.facts.Named.Early = f.id
	x.early, x.version, x.mapped, x.buf = f, versionOf(st), d.writesMapped(inode(st)), d.opts.Early.buffer()
}

// Look takes up which files travel, as a look at the running tree that began at since
// found them, and gives the sink what the other side lacks of their content.
func (e *EarlyCopy) Look(ctx context.Context, list []CarriedFile, since time.Time, sink image.EarlySink) (bytes uint64, err error) {
	e.known, e.since = list, since
	return e.Again(ctx, sink)
}

// Again gives the sink what changed of the files of the last look.
func (e *EarlyCopy) Again(ctx context.Context, sink image.EarlySink) (bytes uint64, err error) {
	for i := range e.known {
		n, err := e.send(ctx, &e.known[i], sink)
		bytes += n
		if err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}

// Len is of how many files something was sent.
func (e *EarlyCopy) Len() int { return len(e.files) }

func (e *EarlyCopy) buffer() []byte {
	if e.buf == nil {
		e.buf = make([]byte, blockSize)
	}
	return e.buf
}

// send sends what changed of one file. One that cannot be read is left to the dump.
func (e *EarlyCopy) send(ctx context.Context, c *CarriedFile, sink image.EarlySink) (n uint64, err error) {
	own, err := openPath(c.from, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOATIME, 0)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = own.Close() }()
	var st unix.Stat_t
	if unix.Fstat(int(own.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || inode(&st) != c.ino {
		return 0, nil
	}
	if _, huge, err := sys.HugePages(own); err != nil || huge {
		return 0, nil // of which nothing is written in such pieces
	}
	v := versionOf(&st)
	f := e.files[c.to]
	if f == nil {
		f = &earlyFile{id: uint32(len(e.files) + 1), blocks: map[uint64][sha256.Size]byte{}}
		if err := sink.File(&image.EarlyFile{ID: f.id, Path: c.to, MTimeNS: st.Mtim.Nano(), Size: uint64(st.Size)}); err != nil {
			return 0, err
		}
		e.files[c.to] = f
	} else if f.seen == v {
		f.sure = f.sure && !c.mapped
		return 0, nil
	}
	f.seen, f.sure = version{}, false
	summed := &Summed{Sink: sink}
	n, err = f.difference(ctx, own, st.Size, summed, image.DataID{Kind: image.Content, ID: f.id}, e.buffer(), false)
	if err != nil {
		return n, err
	}
	if err := summed.End(f.id); err != nil {
		return n, err
	}
	if unix.Fstat(int(own.Fd()), &st) == nil && versionOf(&st) == v {
		f.seen = v
		f.sure = !c.mapped && settled(own, &st, e.since)
	}
	return n, nil
}

// settled says whether any later write to a file gives it another version: it changed
// so long before since that the clock has gone on, and its file system notes each
// write, also through mappings that were made later.
func settled(f *os.File, st *unix.Stat_t, since time.Time) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &fs) != nil || !slices.Contains(noting, int64(fs.Type)) {
		return false
	}
	tick := clockTick
	if st.Ctim.Nsec == 0 && st.Mtim.Nsec == 0 {
		tick = coarseTick
	}
	return since.Sub(time.Unix(0, st.Ctim.Nano())) > tick
}

const (
	// clockTick is more than the time that passes unseen by the kernel's coarse clock.
	clockTick = 20 * time.Millisecond
	// coarseTick is that of file systems that count seconds.
	coarseTick = 2 * time.Second
)

// noting are file systems that are made in this host's memory or on its disks, whose
// times come from its clock, and which are told of the first write to each clean page
// of a mapping. tmpfs is not.
var noting = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC}

// Difference gives the sink what the other side lacks of the content, if something was
// sent early; ok: that is so. Nothing is read of what cannot have changed.
func (x *Data) Difference(ctx context.Context, sink image.Sink) (n uint64, ok bool, err error) {
	f := x.early
	if f == nil {
		return 0, false, nil
	}
	if f.sure && !x.mapped && f.seen == x.version {
		return 0, true, nil
	}
	own, err := x.Open()
	if err != nil {
		return 0, true, err
	}
	defer func() { _ = own.Close() }()
	// A description of our own: the position of another one must not move.
	again, err := reopen(own, unix.O_RDONLY)
	if err != nil {
		return 0, true, err
	}
	defer func() { _ = again.Close() }()
	summed := &Summed{Sink: sink}
	if n, err = f.difference(ctx, again, x.Size, summed, x.ID, x.buf, true); err != nil || !summed.some {
		return n, true, err
	}
	return n, true, summed.End(x.ID.ID)
}

// difference gives the sink the blocks of a file of size bytes that the other side has
// not, and says how many bytes that were. whole: the file must have that size.
func (f *earlyFile) difference(ctx context.Context, own *os.File, size int64, sink image.Sink, id image.DataID, buf []byte, whole bool) (n uint64, err error) {
	was := slices.Sorted(maps.Keys(f.blocks))
	var gone []image.Range
	for at := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		b, err := nextData(own, at, size)
		if err != nil {
			return n, err
		}
		for len(was) > 0 && (b < 0 || was[0] < uint64(b)) {
			gone = addBlock(gone, was[0])
			delete(f.blocks, was[0])
			was = was[1:]
		}
		if b < 0 {
			break
		}
		if len(was) > 0 && was[0] == uint64(b) {
			was = was[1:]
		}
		more, err := f.block(own, uint64(b), size, sink, id, buf, whole)
		n += more
		if err != nil {
			return n, err
		}
		at = (b + 1) * blockSize
	}
	for part := range slices.Chunk(gone, maxCuts) {
		if err := tellCut(sink, id, part); err != nil {
			return n, err
		}
	}
	return n, nil
}

// maxCuts bounds the ranges that are told of at once.
const maxCuts = 4096

func addBlock(rs []image.Range, b uint64) []image.Range {
	if i := len(rs) - 1; i >= 0 && rs[i].End == b*blockSize {
		rs[i].End += blockSize
		return rs
	}
	return append(rs, image.Range{Start: b * blockSize, End: (b + 1) * blockSize})
}

func tellCut(sink image.Sink, id image.DataID, rs []image.Range) error {
	var b []byte
	for _, r := range rs {
		b = image.AppendRange(b, r)
	}
	return sink.Data(image.DataID{Kind: image.Cut, ID: id.ID}, 0, b)
}

// nextData finds the first block at or behind an offset that has data; -1: none.
func nextData(f *os.File, at, size int64) (int64, error) {
	data, err := dataFrom(f, at, size)
	if data < 0 {
		return -1, err
	}
	return data / blockSize, nil
}

// dataFrom finds the first byte at or behind an offset, in a file of that size, that is in no hole;
// -1: none, or an error. The position of f moves.
func dataFrom(f *os.File, at, size int64) (int64, error) {
	if at >= size {
		return -1, nil
	}
	data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return -1, nil
	case errors.Is(err, unix.EINVAL): // a file system without holes
		data = at
	case err != nil:
		return -1, &os.PathError{Op: "find data of", Path: f.Name(), Err: err}
	}
	if data = max(data, at); data >= size {
		return -1, nil
	}
	return data, nil
}

// block sends a block, if it is another one than before, without what is zero of it.
func (f *earlyFile) block(own *os.File, b uint64, size int64, sink image.Sink, id image.DataID, buf []byte, whole bool) (n uint64, err error) {
	at := int64(b) * blockSize
	buf = buf[:min(blockSize, size-at)]
	got, err := own.ReadAt(buf, at)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return 0, fmt.Errorf("read %s: %w", own.Name(), err)
	case got < len(buf) && whole:
		return 0, fmt.Errorf("read %s at %d: %w: it was truncated meanwhile", own.Name(), at, io.ErrUnexpectedEOF)
	}
	buf = buf[:got]
	runs := dataRuns(buf)
	old, had := f.blocks[b]
	sum := blockSum(buf, runs)
	if had == (len(runs) > 0) && (!had || old == sum) {
		return 0, nil
	}
	delete(f.blocks, b)
	if had {
		if err := tellCut(sink, id, addBlock(nil, b)); err != nil {
			return 0, err
		}
	}
	for _, r := range runs {
		if err := sink.Data(id, uint64(at)+r.Start, buf[r.Start:r.End]); err != nil {
			return n, err
		}
		n += r.End - r.Start
	}
	if len(runs) > 0 {
		f.blocks[b] = sum
	}
	return n, nil
}

// dataRuns are the parts of b that are not zero, in whole pages but for its end.
func dataRuns(b []byte) (out []image.Range) {
	for at := 0; at < len(b); at += digestPage {
		end := min(at+digestPage, len(b))
		if zero(b[at:end]) {
			continue
		}
		if i := len(out) - 1; i >= 0 && out[i].End == uint64(at) {
			out[i].End = uint64(end)
			continue
		}
		out = append(out, image.Range{Start: uint64(at), End: uint64(end)})
	}
	return out
}

// blockSum is a SHA-256 of the runs of b and of where they are.
func blockSum(b []byte, runs []image.Range) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, r := range runs {
		h.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, r.Start), r.End))
		h.Write(b[r.Start:r.End])
	}
	h.Sum(sum[:0])
	return sum
}

// noteCarried takes up a regular file that travels with its name.
func (d *Dumper) noteCarried(from, to string, st *unix.Stat_t) {
	d.carriedFiles = append(d.carriedFiles, CarriedFile{from: from, to: to, ino: inode(st)})
}
