package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/sys"
)

// EarlyFiles are files of which content comes before the images: each is written
// under a name of its own in the nearest directory above its place that is there,
// from where it is moved when the images are. Remove ends them.
type EarlyFiles struct {
	places []plan.Place
	spent  map[*plan.Place]uint64 // bytes of content
	blocks uint64                 // of all files
	mark   string
	all    map[uint32]*earlyLanding
	cur    *earlyLanding // whose file is open
	file   *os.File
}

// earlyLanding is one of them.
type earlyLanding struct {
	path  string // where it is to be placed
	place *plan.Place
	mtime int64 // ns, as the source had it at first

	at      spot // where it waits, and under which name
	temp    string
	ino     inodeID
	size    uint64            // as the source had it at first
	blocks  map[uint64]uint64 // bytes that its blocks take, by number
	sum     digest
	met     *metFile // what it is to replace; nil: it was not looked at, or something came since
	looked  bool
	claimed bool // by a file of the images
	taken   bool // and moved
}

// metFile is a file that is to be replaced, as it was when both were compared.
type metFile struct {
	version version
	size    uint64 // of the one that came
	same    bool   // has the same content
}

// NewEarlyFiles returns none. Places are where the files may go, mark is part of the
// names under which they wait.
func NewEarlyFiles(places []plan.Place, mark string) (*EarlyFiles, error) {
	e := &EarlyFiles{places: slices.Clone(places), mark: mark, spent: map[*plan.Place]uint64{}, all: map[uint32]*earlyLanding{}}
	return e, checkPlaces(e.places)
}

// TempName makes a name for what waits beside its place.
func TempName(mark string) string {
	if mark != "" {
		mark += "-"
	}
	return tempPrefix + mark + randomName()
}

const tempPrefix = ".godwit-"

// Announce takes up a file.
func (e *EarlyFiles) Announce(f *image.EarlyFile) error {
	if err := f.Check(); err != nil {
		return err
	}
	switch {
	case e.all[f.ID] != nil:
		return fmt.Errorf("%w: early file %d comes twice", image.ErrMalformed, f.ID)
	case len(e.all) >= maxCarried:
		return fmt.Errorf("%w: more than %d early files", image.ErrMalformed, maxCarried)
	}
	at, place, err := spotOf(e.places, unix.S_IFREG, f.Path)
	if err != nil {
		return err
	}
	l := &earlyLanding{path: f.Path, place: place, mtime: f.MTimeNS, temp: TempName(e.mark), size: f.Size, blocks: map[uint64]uint64{}}
	err = e.make(l, at)
	if err != nil {
		return fmt.Errorf("make a file for the content of %s: %w", f.Path, noRoom(err))
	}
	e.all[f.ID] = l
	return nil
}

// make makes the file in the nearest directory that is there.
func (e *EarlyFiles) make(l *earlyLanding, at spot) error {
	dir, err := at.open()
	for errors.Is(err, unix.ENOENT) && (at.base != "/" || at.rel != "") {
		at = at.above()
		dir, err = at.open()
	}
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	l.at = at
	if err := mknodAt(int(dir.Fd()), l.temp, unix.S_IFREG|0o600); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), l.temp, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return errors.Join(err, unix.Unlinkat(int(dir.Fd()), l.temp, 0))
	}
	l.ino = inode(&st)
	return nil
}

// above is the directory that s is in.
func (s spot) above() spot {
	switch s.rel {
	case "", ".":
		return spot{base: filepath.Dir(s.base)}
	}
	return spot{base: s.base, rel: filepath.Dir(s.rel)}
}

// open opens the file of a landing, and closes that of another one.
func (e *EarlyFiles) open(l *earlyLanding) (*os.File, error) {
	if e.cur == l {
		return e.file, nil
	}
	e.close()
	dir, err := l.at.open()
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	if e.file, err = l.openIn(int(dir.Fd()), l.temp); err != nil {
		return nil, err
	}
	e.cur = l
	return e.file, nil
}

// openIn opens the file by its name, by which others may have put something else.
func (l *earlyLanding) openIn(dir int, name string) (*os.File, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), l.path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || inode(&st) != l.ino || st.Nlink != 1 {
		_ = f.Close()
		return nil, fmt.Errorf("somebody replaced %s, which was made for the content of %s", name, l.path)
	}
	return f, nil
}

// close closes the file that is open.
func (e *EarlyFiles) close() {
	if e.cur != nil {
		_ = e.file.Close() // what fails of writing is told by the writes
		e.cur, e.file = nil, nil
	}
}

// Data takes a piece of what comes before the images, of kind Content, Cut or Digest.
func (e *EarlyFiles) Data(id image.DataID, off uint64, b []byte) error {
	l := e.all[id.ID]
	if l == nil {
		return fmt.Errorf("%w: %s of a file that was not announced", image.ErrMalformed, id)
	}
	switch id.Kind {
	case image.Digest:
		return e.digest(l, b)
	case image.Cut:
		f, err := e.open(l)
		if err != nil {
			return err
		}
		return e.cut(l, f, b)
	}
	f, err := e.open(l)
	if err != nil {
		return err
	}
	if err := e.charge(l, off, len(b)); err != nil {
		return err
	}
	l.sum.add(off, b)
	if err := Write(f, b, off); err != nil {
		return fmt.Errorf("write the content of %s: %w", l.path, noRoom(err))
	}
	return nil
}

// maxOffset bounds where content may be, bytes.
const maxOffset = 1 << 62

// charge counts a piece of content.
func (e *EarlyFiles) charge(l *earlyLanding, off uint64, n int) error {
	l.met = nil
	end := off + uint64(n)
	if end < off || end > maxOffset {
		return fmt.Errorf("%w: content of %s at %#x", image.ErrMalformed, l.path, off)
	}
	for at := off; at < end; {
		b := at / blockSize
		part := min(end, (b+1)*blockSize) - at
		if _, known := l.blocks[b]; !known {
			e.blocks++
		}
		l.blocks[b] += part
		e.spent[l.place] += part
		// A block that is not empty has a page at least, unless it is the last of its file.
		if e.spent[l.place] > l.place.Limit || e.blocks > e.spent[l.place]/digestPage+maxCarried {
			return fmt.Errorf("what comes for %s has more than the limit of %d bytes", l.place.Path, l.place.Limit)
		}
		at += part
	}
	return nil
}

// cut empties blocks whose content comes anew, or is gone.
func (e *EarlyFiles) cut(l *earlyLanding, f *os.File, b []byte) error {
	rs, err := image.ParseRanges(b)
	if err != nil {
		return err
	}
	l.met = nil
	for _, r := range rs {
		if r.Start%blockSize != 0 || r.End%blockSize != 0 {
			return fmt.Errorf("%w: %#x-%#x of %s are no blocks", image.ErrMalformed, r.Start, r.End, l.path)
		}
		e.refund(l, r.Start/blockSize, r.End/blockSize)
		if err := punch(f, r); err != nil {
			return fmt.Errorf("empty %#x-%#x of %s: %w", r.Start, r.End, l.path, noRoom(err))
		}
	}
	return nil
}

// refund forgets the blocks from, up to but not including to.
func (e *EarlyFiles) refund(l *earlyLanding, from, to uint64) {
	forget := func(b uint64) {
		if took, ok := l.blocks[b]; ok {
			e.spent[l.place] -= took
			e.blocks--
			delete(l.blocks, b)
		}
	}
	if to-from < uint64(len(l.blocks)) {
		for b := from; b < to; b++ {
			forget(b)
		}
		return
	}
	for b := range l.blocks {
		if b >= from && b < to {
			forget(b)
		}
	}
}

// punch makes a hole, or zeros on a file system without holes.
func punch(f *os.File, r image.Range) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(r.Start), int64(r.End-r.Start))
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	empty := make([]byte, 64<<10)
	for at := int64(r.Start); at < min(int64(r.End), st.Size()); at += int64(len(empty)) {
		if _, err := f.WriteAt(empty[:min(int64(len(empty)), st.Size()-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// digest ends a run of content.
func (e *EarlyFiles) digest(l *earlyLanding, sum []byte) error {
	if !bytes.Equal(l.sum.total(), sum) {
		return fmt.Errorf("%s arrived with another content than it was sent with", l.path)
	}
	l.sum = digest{}
	if l.looked {
		return nil
	}
	l.looked = true
	f, err := e.open(l)
	if err != nil {
		return err
	}
	return l.compare(f)
}

// compare looks at what the file is to replace: what is newer and another stays, so
// that nothing need be frozen to find that out.
func (l *earlyLanding) compare(f *os.File) error {
	old, err := openPath(l.path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil // there is nothing, or what is told of in the end
	}
	defer func() { _ = old.Close() }()
	var st unix.Stat_t
	if unix.Fstat(int(old.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	m := &metFile{version: versionOf(&st), size: l.size}
	if uint64(st.Size) == l.size {
		if err := unix.Ftruncate(int(f.Fd()), st.Size); err != nil { // its end may be a hole
			return os.NewSyscallError("ftruncate", err)
		}
		a, aerr := ContentDigest(old)
		b, berr := ContentDigest(f)
		if err := errors.Join(aerr, berr); err != nil {
			return err
		}
		m.same = a == b
	}
	if !m.same && !l.place.Overwrite && st.Mtim.Nano() > l.mtime {
		return fmt.Errorf("%s: %w", l.path, errNewer)
	}
	l.met = m
	return nil
}

// errNewer is why a file is not replaced.
var errNewer = errors.New("the file here is newer and has another content; copy it, or let it be overwritten (carry,overwrite)")

// knows says whether a file has the content of the one that came, if nothing has
// changed since they were compared.
func (l *earlyLanding) knows(st *unix.Stat_t, size uint64) bool {
	return l != nil && l.met != nil && l.met.same && l.met.size == size && l.met.version == versionOf(st)
}

// claim gives the landing that a file of the images builds on.
func (e *EarlyFiles) claim(id uint32, path string) (*earlyLanding, error) {
	if e == nil || e.all[id] == nil || e.all[id].path != path || e.all[id].claimed {
		return nil, fmt.Errorf("%s builds on content %d, which did not come before the images", path, id)
	}
	l := e.all[id]
	l.claimed = true
	return l, nil
}

// take moves a file to where its images want it.
func (e *EarlyFiles) take(l *earlyLanding, dir int, name string) error {
	if e.cur == l {
		e.close()
	}
	from, err := l.at.open()
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	f, err := l.openIn(int(from.Fd()), l.temp)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := unix.Renameat2(int(from.Fd()), l.temp, dir, name, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("move its content, which came early, to where it belongs: %w", err)
	}
	l.taken = true
	return nil
}

// drop removes the files that nothing in the images builds on.
func (e *EarlyFiles) drop() error {
	if e == nil {
		return nil
	}
	return e.remove(func(l *earlyLanding) bool { return !l.claimed })
}

// Remove removes all files that were not moved to their places. It may be called
// twice, and on nil.
func (e *EarlyFiles) Remove() error {
	if e == nil {
		return nil
	}
	return e.remove(func(*earlyLanding) bool { return true })
}

func (e *EarlyFiles) remove(which func(*earlyLanding) bool) error {
	var errs []error
	for id, l := range e.all {
		if l.taken || !which(l) {
			continue
		}
		if e.cur == l {
			e.close()
		}
		x := carriedFile{at: l.at, name: l.temp}
		errs = append(errs, x.fail("remove", x.in(func(dir int) error { return unix.Unlinkat(dir, l.temp, 0) })))
		delete(e.all, id)
	}
	return errors.Join(errs...)
}

// Write writes content to a file; those of huge pages take whole ones only.
func Write(f *os.File, b []byte, off uint64) error {
	page, huge, err := sys.HugePages(f)
	if err == nil && huge {
		return sys.WriteHuge(f, b, off, page)
	}
	if err == nil {
		_, err = f.WriteAt(b, int64(off))
	}
	return err
}
