package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// ParentLink is the symbolic link in a directory of images to the dump before
// it, in which pages are that did not change since.
const ParentLink = "parent"

// maxChain bounds the dumps that build on each other.
const maxChain = 256

// chain is the dumps before one, the nearest first.
type chain []*parentDir

// parentDir is a dump that others build on.
type parentDir struct {
	src   *DirSource // of its sums; its entries are not read
	lists map[DataID]*pageList
	open  *os.File // the pages image that was read last
	pages uint32   // its id
}

// pageList is the list of the pages of one data set.
type pageList struct {
	pages uint32
	runs  []pageRun
}

// pageRun is a run of pages: at a place in the pages image, or in the dump before.
type pageRun struct {
	start, end uint64
	at         int64
	inParent   bool
}

// openChain opens the dumps that the one in dir builds on, none if it has no link
// to one. Images may come from anywhere: the link must lead to a directory beside
// or below that of the dump, so that nobody else's memory gets into a tree.
func openChain(dir string) (c chain, err error) {
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	top, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	if top, err = filepath.Abs(top); err != nil {
		return nil, err
	}
	seen := map[string]bool{top: true}
	for at := top; ; {
		next, err := follow(at, filepath.Dir(top))
		if err != nil || next == "" {
			return c, err
		}
		if seen[next] || len(c) == maxChain {
			return c, fmt.Errorf("%s in %s: the dumps before it lead in a circle or are more than %d", ParentLink, at, maxChain)
		}
		seen[next] = true
		p, err := openParent(next)
		if err != nil {
			return c, fmt.Errorf("open the dump before it, %s: %w", next, err)
		}
		c = append(c, p)
		at = next
	}
}

// follow resolves the link in dir; "" means that there is none.
func follow(dir, below string) (string, error) {
	link := filepath.Join(dir, ParentLink)
	fi, err := os.Lstat(link)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if fi.Mode()&os.ModeSymlink != 0 {
		to, err := os.Readlink(link)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(to) {
			return "", fmt.Errorf("%s leads to %s: only a relative link to the dump before it is followed", link, clip(to))
		}
	}
	to, err := filepath.EvalSymlinks(link)
	if err != nil {
		return "", fmt.Errorf("find the dump before it: %w", err)
	}
	if fi, err = os.Stat(to); err != nil {
		return "", err
	}
	if !strings.HasPrefix(to, strings.TrimSuffix(below, "/")+"/") || !fi.IsDir() {
		return "", fmt.Errorf("%s leads to %s: the dump before it must be in a directory in %s", link, to, below)
	}
	return to, nil
}

// openParent reads the lists of pages in dir and sums up the pages.
func openParent(dir string) (*parentDir, error) {
	if _, err := os.Lstat(filepath.Join(dir, InventoryFile+Extension)); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, errors.New("there is no inventory.img: it is no dump, or one that did not come to its end")
		}
		return nil, err
	}
	p := &parentDir{src: &DirSource{dir: dir, set: NewSet()}, lists: map[DataID]*pageList{}}
	if err := p.src.loadFacts(); err != nil {
		return nil, err
	}
	des, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, de := range des {
		name, isImage := strings.CutSuffix(de.Name(), Extension)
		if !isImage {
			continue
		}
		id, isData, err := dataOf(name)
		if err != nil {
			return nil, err
		}
		if !isData || id.Kind == Ghost {
			continue
		}
		if p.lists[id], err = p.readList(id); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *parentDir) readList(id DataID) (*pageList, error) {
	in, err := p.src.openImage(dataFile(id) + Extension)
	if err != nil {
		return nil, err
	}
	defer func() { _ = in.f.Close() }()
	if err := in.precheck(); err != nil {
		return nil, err
	}
	set := &inSet{id: id, list: newReader(dataFile(id), in, in.size)}
	l := &pageList{}
	if l.pages, err = set.start(); err != nil {
		return nil, err
	}
	size, err := p.sumUp(PagesFile(l.pages) + Extension)
	if err != nil {
		return nil, err
	}
	var at int64
	for {
		run, more, err := set.entry()
		if err != nil || !more {
			return l, err
		}
		if run.len == 0 {
			continue // a hole
		}
		l.runs = append(l.runs, pageRun{start: run.off, end: run.off + run.len, at: at, inParent: run.inParent})
		if run.inParent {
			continue
		}
		if at += int64(run.len); at < 0 || at > size {
			return nil, fmt.Errorf("image %s%s tells of more pages than %s%s has", dataFile(id), Extension, PagesFile(l.pages), Extension)
		}
	}
}

// sumUp checks a pages image and gives its size.
func (p *parentDir) sumUp(file string) (int64, error) {
	in, err := p.src.openImage(file)
	if err != nil {
		return 0, err
	}
	defer func() { _ = in.f.Close() }()
	return in.size, in.precheck()
}

func (p *parentDir) close() {
	if p.open != nil {
		_ = p.open.Close()
		p.open = nil
	}
}

func (c chain) close() {
	for _, p := range c {
		p.close()
	}
}

// place is where pages are: in a file, from at on. A nil file means nowhere. They
// are len bytes; what follows is elsewhere or nowhere.
type place struct {
	dir  *parentDir
	file *os.File
	at   int64
	len  uint64
}

// find tells where the page at off of a data set is. limit bounds the length.
func (c chain) find(id DataID, off, limit uint64) (place, error) {
	for _, p := range c {
		l := p.lists[id]
		if l == nil {
			return place{len: limit}, nil
		}
		i := sort.Search(len(l.runs), func(i int) bool { return l.runs[i].end > off })
		if i == len(l.runs) {
			return place{len: limit}, nil
		}
		r := &l.runs[i]
		if r.start > off {
			return place{len: min(limit, r.start-off)}, nil
		}
		limit = min(limit, r.end-off)
		if r.inParent {
			continue
		}
		f, err := p.file(l.pages)
		return place{dir: p, file: f, at: r.at + int64(off-r.start), len: limit}, err
	}
	return place{len: limit}, nil
}

// file opens a pages image; the one before is closed.
func (p *parentDir) file(pages uint32) (*os.File, error) {
	if p.open != nil && p.pages == pages {
		return p.open, nil
	}
	p.close()
	in, err := p.src.openImage(PagesFile(pages) + Extension)
	if err != nil {
		return nil, err
	}
	p.open, p.pages = in.f, pages
	return p.open, nil
}

// read reads pages of a data set, at most to the end of a stretch that is in one
// place. Pages that are nowhere are an error: the list that sent us here lies.
func (c chain) read(id DataID, off uint64, b []byte) (place, error) {
	pl, err := c.find(id, off, uint64(len(b)))
	if err != nil {
		return pl, err
	}
	if pl.file == nil {
		return pl, fmt.Errorf("pages of %s at %#x should be in the dump before it, which does not have them", id, off)
	}
	b = b[:pl.len]
	if _, err := pl.file.ReadAt(b, pl.at); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return pl, fmt.Errorf("read pages of %s at %#x: %w", id, off, err)
	}
	return pl, nil
}

// Build makes this dump build on the one in dir, a path that is meant relative to the
// directory of images: pages that are equal there are not written again. With
// dedup, Dedup gives up those that are written again.
func (s *DirSink) Build(dir string, dedup bool) error {
	if err := s.ready("a dump before it"); err != nil {
		return err
	}
	to, err := filepath.EvalSymlinks(s.dir)
	if err == nil {
		to, err = filepath.Abs(to)
	}
	if err != nil {
		return err
	}
	if filepath.IsAbs(dir) {
		if dir, err = filepath.EvalSymlinks(dir); err == nil {
			dir, err = filepath.Rel(to, dir)
		}
		if err != nil {
			return fmt.Errorf("use the images of the dump before: %w", err)
		}
	}
	if err := os.Symlink(dir, filepath.Join(s.dir, ParentLink)); err != nil {
		return fmt.Errorf("link to the images of the dump before: %w", err)
	}
	s.made = append(s.made, ParentLink)
	if s.parents, err = openChain(s.dir); err != nil {
		return fmt.Errorf("use the images of the dump before: %w", err)
	}
	s.dedup = dedup
	s.compare = make([]byte, dataBuffer)
	return nil
}

// Skipped counts the pages of memory and of shared memory that were not written
// because the dump before has them.
func (s *DirSink) Skipped() (memory, shmem uint64) { return s.skipped[0], s.skipped[1] }

// incremental puts pages into a set, those alone that the dump before does not have.
func (s *DirSink) incremental(set *outSet, off uint64, p []byte) error {
	for len(p) > 0 {
		pl, err := s.parents.find(set.id, off, min(uint64(len(p)), uint64(len(s.compare))))
		if err != nil {
			return err
		}
		part := p[:pl.len]
		if pl.file == nil {
			if err := s.pages(set, off, part, pagePresent); err != nil {
				return err
			}
		} else if err := s.differing(set, off, part, pl); err != nil {
			return err
		}
		off += pl.len
		p = p[pl.len:]
	}
	return nil
}

// differing compares pages with those at a place.
func (s *DirSink) differing(set *outSet, off uint64, p []byte, pl place) error {
	old := s.compare[:len(p)]
	if _, err := pl.file.ReadAt(old, pl.at); err != nil {
		return fmt.Errorf("read pages of the dump before: %w", err)
	}
	equal := func(i int) bool { return bytes.Equal(p[i:i+PageSize], old[i:i+PageSize]) }
	for i := 0; i < len(p); {
		same, j := equal(i), i+PageSize
		for j < len(p) && equal(j) == same {
			j += PageSize
		}
		flags := uint32(pagePresent)
		if same {
			flags = pageInParent
			k := 0
			if set.id.Kind == Shmem {
				k = 1
			}
			s.skipped[k] += uint64(j-i) / PageSize
		} else if s.dedup {
			s.stale = append(s.stale, stale{pl.dir, pl.dir.pages, pl.at + int64(i), int64(j - i)})
		}
		if err := s.pages(set, off+uint64(i), p[i:j], flags); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// stale is what a dump before holds that is of no use any more.
type stale struct {
	dir     *parentDir
	pages   uint32
	at, len int64
}

// Dedup gives up the pages in dumps before this one that it has written anew. Such
// a dump can only be built on afterwards. Call it after Commit.
func (s *DirSink) Dedup() error {
	defer s.parents.close()
	list := s.stale
	s.stale = nil
	return giveUp(list)
}

// Dedup gives up the pages that were read since Track, in this dump and in those
// before it.
func (s *DirSource) Dedup() error {
	list := s.read
	s.read = nil
	return giveUp(list)
}

// Track makes the source remember what is read, for Dedup.
func (s *DirSource) Track() { s.self = &parentDir{src: s} }

// took remembers what was read.
func (s *DirSource) took(x stale) {
	if n := len(s.read); n > 0 {
		if last := &s.read[n-1]; last.dir == x.dir && last.pages == x.pages && last.at+last.len == x.at {
			last.len += x.len
			return
		}
	}
	s.read = append(s.read, x)
}

// giveUp frees the space of pages.
func giveUp(list []stale) error {
	for i := range list {
		x := &list[i]
		if !x.dir.src.set.Facts.spoiled() {
			if err := x.dir.spoil(); err != nil {
				return fmt.Errorf("give up pages in %s: %w", x.dir.src.dir, err)
			}
		}
		path := filepath.Join(x.dir.src.dir, PagesFile(x.pages)+Extension)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, x.at, x.len)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("give up pages in %s: %w", path, err)
		}
	}
	return nil
}

func (f *Facts) spoiled() bool { return f != nil && f.Spoiled }

// spoil notes that pages of this dump are given up, and drops the sums of its pages.
func (p *parentDir) spoil() error {
	if p.src.set.Facts == nil {
		p.src.set.Facts = &Facts{Spoiled: true} // made by CRIU, which notes nothing
		return nil
	}
	p.src.set.Facts.Spoiled = true
	for name := range p.src.sums {
		if strings.HasPrefix(name, "pages-") {
			delete(p.src.sums, name)
		}
	}
	b, err := marshalFacts(p.src.set.Facts, p.src.sums)
	if err != nil {
		return err
	}
	path := filepath.Join(p.src.dir, FactsFile)
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// entryRun is one entry of a list of pages, in bytes; a hole has no length.
type entryRun struct {
	off, len uint64
	inParent bool
}

// entry reads the next entry of a list of pages.
func (s *inSet) entry() (r entryRun, more bool, err error) {
	at := s.list.off
	e := &pagemap.PagemapEntry{}
	if more, err = s.list.message(e); err != nil || !more {
		return r, more, err
	}
	n := uint64(e.GetCompatNrPages())
	if e.NrPages != nil { // CRIU 4.0 has 64 bits
		n = e.GetNrPages()
	}
	vaddr, flags := e.GetVaddr(), e.GetFlags()
	switch {
	case vaddr%PageSize != 0:
		return r, false, s.list.fail(at, "address %#x is not that of a page", vaddr)
	case n == 0 || n > (math.MaxUint64-vaddr)/PageSize:
		return r, false, s.list.fail(at, "%d pages at %#x", n, vaddr)
	case vaddr < s.low:
		return r, false, s.list.fail(at, "pages at %#x come after pages up to %#x", vaddr, s.low)
	case flags&pageLazy != 0 && flags&(pagePresent|pageInParent) == 0:
		return r, false, s.list.fail(at, "pages at %#x were left with the source of a lazy dump", vaddr)
	}
	s.low = vaddr + n*PageSize
	r.inParent = e.GetInParent() || flags&pageInParent != 0
	// Without flags an old list means present pages; flags of which none says
	// where the pages are mean a hole.
	if r.off = vaddr; r.inParent || e.Flags == nil || flags&pagePresent != 0 {
		r.len = n * PageSize
	}
	return r, true, nil
}

func pagemapEntry(start, pages uint64, flags uint32) *pagemap.PagemapEntry {
	return &pagemap.PagemapEntry{
		Vaddr:         proto.Uint64(start),
		CompatNrPages: proto.Uint32(uint32(pages)),
		NrPages:       proto.Uint64(pages),
		Flags:         proto.Uint32(flags),
	}
}
