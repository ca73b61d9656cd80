package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"sort"
	"strings"

	ghost_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
)

// maxPiece is the longest run of data that a DirSource returns, in bytes.
const maxPiece = 1 << 20

// rawPrefixes begin the names of images that are not in CRIU's own format:
// pages, and what other programs wrote of a network or mount namespace.
var rawPrefixes = []string{
	"pages-", "tmpfs-", "tmpfs-dev-", "route-", "route6-", "rule-", "iptables-", "ip6tables-", "nftables-", "ifaddr-", "netns-ct-", "netns-exp-",
}

// DirSource reads a dump out of a directory, whether it was made here or by CRIU.
type DirSource struct {
	dir  string
	set  *Set
	sums map[string]fileSum // nil: not written by a DirSink
	ids  []DataID           // in the order of Next
	cur  *inSet
	buf  []byte
	err  error // of Next, which repeats it

	parents chain      // the dumps that it builds on
	self    *parentDir // this dump, if what is read is remembered
	read    []stale
}

// OpenDir reads the metadata of the dump in dir. Anything wrong with it is an
// error that names the file and the offset.
func OpenDir(dir string) (*DirSource, error) {
	s := &DirSource{dir: dir, set: NewSet(), buf: make([]byte, maxPiece)}
	err := s.load()
	if err == nil {
		s.parents, err = openChain(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open images in %s: %w", dir, err)
	}
	return s, nil
}

func (s *DirSource) load() error {
	des, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(s.dir, InventoryFile+Extension)); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return errors.New("there is no inventory.img: it is no dump, or one that did not come to its end")
		}
		return err
	}
	if err := s.loadFacts(); err != nil {
		return err
	}
	found := map[string]bool{}
	for _, de := range des {
		name, isImage := strings.CutSuffix(de.Name(), Extension)
		if !isImage {
			continue
		}
		found[de.Name()] = true
		if err := s.loadImage(name); err != nil {
			return err
		}
	}
	for name := range s.sums {
		if !found[name] {
			return fmt.Errorf("image %s is missing, %s lists it", clip(name), FactsFile)
		}
	}
	sort.Slice(s.ids, func(i, j int) bool {
		a, b := s.ids[i], s.ids[j]
		return a.Kind < b.Kind || a.Kind == b.Kind && a.ID < b.ID
	})
	return nil
}

// loadFacts reads FactsFile; a dump made by CRIU has none.
func (s *DirSource) loadFacts() error {
	b, err := os.ReadFile(filepath.Join(s.dir, FactsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	facts, sums, err := parseFacts(b)
	if err != nil {
		return fmt.Errorf("%s: %w", FactsFile, err)
	}
	s.set.Facts, s.sums = facts, sums
	return nil
}

func parseFacts(b []byte) (*Facts, map[string]fileSum, error) {
	f := factsFile{Facts: &Facts{}}
	if err := json.Unmarshal(b, &f); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return nil, nil, fmt.Errorf("offset %d: %w", syntax.Offset, err)
		}
		return nil, nil, err
	}
	if f.Version != 1 {
		return nil, nil, fmt.Errorf("version %d is not known here, want 1", f.Version)
	}
	return f.Facts, f.Sums, nil
}

// input is an open image whose bytes are summed up as they are read.
type input struct {
	f    *os.File
	size int64
	crc  uint32
	want *fileSum // nil: unknown
	name string   // with extension
}

func (in *input) Read(p []byte) (int, error) {
	n, err := in.f.Read(p)
	in.crc = crc32.Update(in.crc, castagnoli, p[:n])
	return n, err
}

// verify compares the sum, once all of the file has been read.
func (in *input) verify() error {
	if in.want == nil || in.crc == in.want.CRC {
		return nil
	}
	return fmt.Errorf("image %s: its checksum is %08x, it was written with %08x: the file is damaged or was edited "+
		"(without its line in the sums of %s it is taken as it is)", in.name, in.crc, in.want.CRC, FactsFile)
}

// precheck sums up the file and goes back to its start: a list of pages is
// small, and a wrong one would be blamed on its pages.
func (in *input) precheck() error {
	if in.want == nil {
		return nil
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if err := in.verify(); err != nil {
		return err
	}
	in.crc = 0
	_, err := in.f.Seek(0, io.SeekStart)
	return err
}

// openImage opens an image; its size must be the one that was written.
func (s *DirSource) openImage(file string) (*input, error) {
	path := filepath.Join(s.dir, file)
	// A fifo of that name must not block.
	if fi, err := os.Stat(path); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("image %s is no regular file", file)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	in := &input{f: f, size: fi.Size(), name: file}
	if sum, ok := s.sums[file]; ok {
		in.want = &sum
		if sum.Size != in.size {
			_ = f.Close()
			return nil, fmt.Errorf("image %s has %d bytes, it was written with %d", file, in.size, sum.Size)
		}
	}
	return in, nil
}

func (s *DirSource) loadImage(name string) error {
	if strings.HasPrefix(name, "pages-") {
		return nil
	}
	if isRaw(name) {
		return s.loadRaw(name)
	}
	id, isData, err := dataOf(name)
	if err != nil {
		return err
	}
	if isData {
		s.ids = append(s.ids, id)
		if id.Kind != Ghost {
			return nil // Next reads it
		}
	}
	in, err := s.openImage(name + Extension)
	if err != nil {
		return err
	}
	defer func() { _ = in.f.Close() }()
	magic, entries, err := Decode(name, in, in.size)
	if err != nil {
		return err
	}
	if magic == "" {
		return fmt.Errorf("image %s%s: it does not start as an image does", name, Extension)
	}
	if (id.Kind == Ghost) != (magic == MagicGhostFile) || (name == InventoryFile) != (magic == MagicInventory) {
		return fmt.Errorf("image %s%s: it is of type %s", name, Extension, magic)
	}
	if id.Kind == Ghost {
		if len(entries) == 0 {
			return fmt.Errorf("image %s%s: it has no entry", name, Extension)
		}
	} else if err := in.verify(); err != nil { // of ghosts by Next
		return err
	}
	// An image without entries is an image all the same.
	s.set.files[name] = append([]Entry{}, entries...)
	return nil
}

// loadRaw reads an image of another program's form. What is too large to be
// carried is left out, and missed where it is needed.
func (s *DirSource) loadRaw(name string) error {
	in, err := s.openImage(name + Extension)
	if err != nil {
		return err
	}
	defer func() { _ = in.f.Close() }()
	if in.size > MaxMessage {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(in, in.size))
	if err != nil {
		return err
	}
	s.set.files[name] = []Entry{{File: name, Magic: MagicRaw, Extra: b}}
	return in.verify()
}

// Dir is the directory.
func (s *DirSource) Dir() string { return s.dir }

// Images returns all entries. Lists of pages are not among them.
func (s *DirSource) Images(ctx context.Context) (*Set, error) { return s.set, ctx.Err() }

// Close gives up the files; the bytes of the last Next stay valid.
func (s *DirSource) Close() error {
	if s.cur != nil {
		s.cur.close()
		s.cur = nil
	}
	s.parents.close()
	if s.err == nil {
		s.err = fmt.Errorf("images in %s: %w", s.dir, os.ErrClosed)
	}
	return nil
}

// Order makes Next give these sets first, in this order.
func (s *DirSource) Order(first []DataID) {
	rank := map[DataID]int{}
	for i, id := range first {
		rank[id] = i - len(first)
	}
	sort.SliceStable(s.ids, func(i, j int) bool { return rank[s.ids[i]] < rank[s.ids[j]] })
}

// Next returns the next run of data, at most 1 MiB: of all processes by ascending
// pid, of all shared objects, of all ghost files, unless Order was called.
func (s *DirSource) Next(ctx context.Context) (DataID, uint64, []byte, error) {
	if s.err != nil {
		return DataID{}, 0, nil, s.err
	}
	if err := ctx.Err(); err != nil {
		return DataID{}, 0, nil, err
	}
	id, off, p, err := s.next()
	if err != nil {
		if !errors.Is(err, io.EOF) {
			err = fmt.Errorf("read images in %s: %w", s.dir, err)
		}
		_ = s.Close()
		s.err = err
		return DataID{}, 0, nil, err
	}
	return id, off, p, nil
}

func (s *DirSource) next() (DataID, uint64, []byte, error) {
	for {
		if s.cur == nil {
			if len(s.ids) == 0 {
				return DataID{}, 0, nil, io.EOF
			}
			id := s.ids[0]
			s.ids = s.ids[1:]
			set, err := s.openSet(id)
			if err != nil {
				return DataID{}, 0, nil, err
			}
			s.cur = set
		}
		off, p, err := s.cur.next(s.buf)
		if err == nil {
			return s.cur.id, off, p, nil
		}
		if !errors.Is(err, io.EOF) {
			return DataID{}, 0, nil, err
		}
		if err := s.cur.verify(); err != nil {
			return DataID{}, 0, nil, err
		}
		s.cur.close()
		s.cur = nil
	}
}

// run is a piece of a data set that lies in one piece in a file.
type run struct{ off, len uint64 }

// inSet is a data set that is being read.
type inSet struct {
	id   DataID
	list *reader // pages: the list; ghost: the file itself
	data *reader // pages: the pages; ghost: the file itself
	ours bool    // made by a DirSink: nothing may be left over

	cur       run  // what is left of the run that is being read
	elsewhere bool // cur is in the dump before
	parents   chain
	pages     uint32 // id of the pages image
	src       *DirSource
	low       uint64 // lowest offset that may come
	whole     bool   // a ghost without chunks
	limit     uint64 // size of a ghost, MaxUint64: unknown

	inputs []*input
}

func (s *DirSource) openSet(id DataID) (*inSet, error) {
	name := dataFile(id)
	in, err := s.openImage(name + Extension)
	if err != nil {
		return nil, err
	}
	if id.Kind != Ghost {
		if err := in.precheck(); err != nil {
			_ = in.f.Close()
			return nil, err
		}
	}
	set := &inSet{id: id, list: newReader(name, in, in.size), inputs: []*input{in}, ours: s.sums != nil, parents: s.parents, src: s}
	pagesID, err := set.start()
	if err == nil && id.Kind != Ghost {
		set.pages = pagesID
		pages := PagesFile(pagesID)
		if in, err = s.openImage(pages + Extension); err == nil {
			set.inputs = append(set.inputs, in)
			set.data = &reader{name: pages, r: bufio.NewReaderSize(in, 64<<10), size: uint64(in.size)}
		}
	}
	if err != nil {
		set.close()
		return nil, err
	}
	return set, nil
}

// start reads the head of the list and returns the id of the pages.
func (s *inSet) start() (pagesID uint32, err error) {
	magic, err := s.list.head()
	if err != nil {
		return 0, err
	}
	if s.id.Kind == Ghost {
		if magic != MagicGhostFile {
			return 0, s.list.fail(0, "it is no ghost file")
		}
		g := &ghost_file.GhostFileEntry{}
		if more, err := s.list.message(g); err != nil {
			return 0, err
		} else if !more {
			return 0, s.list.fail(s.list.off, "it has no entry")
		}
		s.data = s.list
		s.whole = !g.GetChunks()
		s.limit = math.MaxUint64
		if g.Size != nil {
			s.limit = g.GetSize()
		}
		return 0, nil
	}
	if magic != MagicPagemap {
		return 0, s.list.fail(0, "it is no list of pages")
	}
	head := &pagemap.PagemapHead{}
	if more, err := s.list.message(head); err != nil {
		return 0, err
	} else if !more {
		return 0, s.list.fail(s.list.off, "it does not say where its pages are")
	}
	return head.GetPagesId(), nil
}

// next reads the next piece into buf.
func (s *inSet) next(buf []byte) (uint64, []byte, error) {
	for s.cur.len == 0 {
		var err error
		switch {
		case s.id.Kind != Ghost:
			err = s.nextPages()
		case s.whole:
			err = s.nextWhole()
		default:
			err = s.nextChunk()
		}
		if err != nil {
			return 0, nil, err
		}
	}
	n := min(s.cur.len, uint64(len(buf)))
	if s.elsewhere {
		pl, err := s.parents.read(s.id, s.cur.off, buf[:n])
		if err != nil {
			return 0, nil, err
		}
		if s.src != nil && s.src.self != nil {
			s.src.took(stale{pl.dir, pl.dir.pages, pl.at, int64(pl.len)})
		}
		off := s.cur.off
		s.cur.off += pl.len
		s.cur.len -= pl.len
		return off, buf[:pl.len], nil
	}
	at := s.data.off
	if n > s.data.left() {
		return 0, nil, s.data.fail(at, "the file ends where %s at %#x, %d bytes, should be", s.id, s.cur.off, s.cur.len)
	}
	if err := s.data.into(buf[:n], s.id.String()); err != nil {
		return 0, nil, err
	}
	if s.id.Kind != Ghost && s.src != nil && s.src.self != nil {
		s.src.took(stale{s.src.self, s.pages, int64(at), int64(n)})
	}
	off := s.cur.off
	s.cur.off += n
	s.cur.len -= n
	return off, buf[:n], nil
}

func (s *inSet) nextPages() error {
	r, more, err := s.entry()
	if err != nil {
		return err
	}
	if !more {
		if left := s.data.left(); s.ours && left > 0 {
			return s.data.fail(s.data.off, "%d bytes more than %s%s tells of", left, s.list.name, Extension)
		}
		return io.EOF
	}
	s.cur, s.elsewhere = run{r.off, r.len}, r.inParent
	return nil
}

func (s *inSet) nextChunk() error {
	at := s.list.off
	c := &ghost_file.GhostChunkEntry{}
	more, err := s.list.message(c)
	if err != nil {
		return err
	}
	if !more {
		return io.EOF
	}
	off, n := c.GetOff(), c.GetLen()
	switch {
	case n > s.list.left():
		return s.list.fail(at, "chunk of %d bytes, the file has %d more", n, s.list.left())
	case off < s.low:
		return s.list.fail(at, "chunk at %d comes after data up to %d", off, s.low)
	case off > s.limit || n > s.limit-off || n > math.MaxUint64-off:
		return s.list.fail(at, "chunk at %d of %d bytes is beyond the size of %d", off, n, s.limit)
	}
	s.low = off + n
	s.cur = run{off, n}
	return nil
}

func (s *inSet) nextWhole() error {
	left := s.list.left()
	if left == 0 {
		return io.EOF
	}
	if left > s.limit-min(s.low, s.limit) {
		return s.list.fail(s.list.off, "%d bytes of data are beyond the size of %d", left, s.limit)
	}
	s.cur = run{s.low, left}
	s.low += left
	return nil
}

func (s *inSet) verify() error {
	for _, in := range s.inputs {
		if err := in.verify(); err != nil {
			return err
		}
	}
	return nil
}

func (s *inSet) close() {
	for _, in := range s.inputs {
		_ = in.f.Close()
	}
}
