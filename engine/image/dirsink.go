package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sort"
	"strings"

	ghost_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	ipc_shm "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-shm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// PageSize is the unit of lists of pages, in bytes.
const PageSize = 4096

// Flags of a PagemapEntry.
const (
	pageInParent = 1 << 0 // in the dump before
	pageLazy     = 1 << 1 // may be fetched later
	pagePresent  = 1 << 2 // in the pages image
)

const (
	// vmaAnonShared is a bit of VmaEntry.status.
	vmaAnonShared = 1 << 8
)

const (
	// keepOpen bounds the data sets whose files are open, of two files each:
	// mostly sets come one after the other.
	keepOpen = 4
	// metaBuffer bounds what is held of an image of entries before it is written.
	metaBuffer = 1 << 20
	// dataBuffer collects small pieces of data.
	dataBuffer = 256 << 10
	// listBuffer collects entries of lists of pages.
	listBuffer = 16 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fileSum is what a file of a dump held when it was written.
type fileSum struct {
	Size int64  `json:"size"`   // bytes
	CRC  uint32 `json:"crc32c"` // of the whole file
}

// factsFile is FactsFile: the facts, and the sums of all images beside it.
type factsFile struct {
	*Facts
	Sums map[string]fileSum `json:"sums,omitempty"`
}

// outFile is a file of the dump that is being written, with its name in the directory.
type outFile struct {
	name    string
	magic   string // of an image of entries
	limit   int    // buffered bytes
	created bool
	f       *os.File // nil: not open now
	buf     []byte
	sum     fileSum
}

// outSet is a data set that is being written.
type outSet struct {
	id    DataID
	list  *outFile // pages: the list; ghost: the file itself
	pages *outFile // nil for a ghost
	next  uint64   // first offset that may come
	// A run of adjacent pages that is not in the list yet, with its flags.
	runStart, runPages uint64
	runFlags           uint32
}

// DirSink writes a dump into a directory, as CRIU would. A directory holds a
// dump once Commit has returned nil; until then it has no inventory.img, which
// is what makes a directory a dump.
//
// Metadata is buffered and files are opened for as long as they are written,
// so that neither memory nor descriptors grow with the tree.
type DirSink struct {
	dir     string
	d       *os.File // holds the lock
	madeDir bool

	facts     *Facts
	meta      map[string]*outFile
	sets      map[DataID]*outSet
	open      []*outSet // the last used last
	lastPages uint32    // id of a pages image
	made      []string  // names of files that exist because of this sink
	sums      map[string]fileSum

	parents chain  // nil: no dump before
	compare []byte // pages of a dump before
	dedup   bool
	stale   []stale
	skipped [2]uint64 // pages of memory and shared memory

	partial      bool // PreDump
	sealed, over bool
	committed    bool
	err          error // of the first failure, which all later calls repeat
}

// NewDirSink prepares dir, and makes it if it is missing, for one dump. It
// refuses a directory that holds images or that another dump is being written to.
func NewDirSink(dir string) (*DirSink, error) {
	s := &DirSink{
		dir: dir, meta: map[string]*outFile{}, sets: map[DataID]*outSet{}, sums: map[string]fileSum{},
	}
	// Only the owner may look: images hold memory.
	if err := os.Mkdir(dir, 0o700); err == nil {
		s.madeDir = true
	} else if !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("prepare images directory: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("prepare images directory: %w", err)
	}
	if err := s.claim(d); err != nil {
		_ = d.Close()
		return nil, err
	}
	s.d = d
	return s, nil
}

func (s *DirSink) claim(d *os.File) error {
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("images directory %s: another dump is being written to it", s.dir)
		}
		return &os.PathError{Op: "flock", Path: s.dir, Err: err}
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("prepare images directory: %w", err)
	}
	var images int
	for _, n := range names {
		if n == InventoryFile+Extension {
			return fmt.Errorf("images directory %s holds a dump already: give an empty directory", s.dir)
		}
		if strings.HasSuffix(n, Extension) || n == FactsFile {
			images++
		}
	}
	if images > 0 {
		return fmt.Errorf("images directory %s holds %d images of a dump that failed: remove them or give an empty directory", s.dir, images)
	}
	return nil
}

// PreDump says that what comes is memory alone, of processes of which nothing else
// is told: a dump that others build on.
func (s *DirSink) PreDump() { s.partial = true }

// Dir is the directory.
func (s *DirSink) Dir() string { return s.dir }

// ready gives the error of a call at a wrong time or after a failure.
func (s *DirSink) ready(what string) error {
	if s.err != nil {
		return s.err
	}
	if s.over {
		return fmt.Errorf("images directory %s: %s after its end", s.dir, what)
	}
	return nil
}

// stick keeps the first failure: a dump with a hole must not be committed.
func (s *DirSink) stick(err error) error {
	if err != nil && s.err == nil {
		s.err = fmt.Errorf("write images to %s: %w", s.dir, err)
	}
	if err != nil {
		return s.err
	}
	return nil
}

// Facts keeps the facts until Commit writes them.
func (s *DirSink) Facts(f *Facts) error {
	if err := s.ready("facts"); err != nil {
		return err
	}
	s.facts = f
	return nil
}

// Entry takes one entry.
func (s *DirSink) Entry(e Entry) error {
	if err := s.ready("entry"); err != nil {
		return err
	}
	return s.stick(s.entry(e))
}

func (s *DirSink) entry(e Entry) error {
	if s.sealed {
		return fmt.Errorf("image %s: an entry after the last", clip(e.File))
	}
	if err := e.Check(); err != nil {
		return err
	}
	// Names that lead to data belong to the data.
	id, isData, err := dataOf(e.File)
	if err != nil {
		return err
	}
	if ghost := isData && id.Kind == Ghost; (isData && !ghost) || ghost != (e.Magic == MagicGhostFile) ||
		strings.HasPrefix(e.File, "pages-") {
		return fmt.Errorf("image %s: it cannot hold an entry of type %s", e.File, e.Magic)
	}
	switch m := e.Msg.(type) {
	case *ghost_file.GhostFileEntry:
		if s.meta[e.File] != nil {
			return fmt.Errorf("image %s: a second entry", e.File)
		}
		if !m.GetChunks() {
			// Data always comes in chunks; crit cannot decode an empty file without them.
			m = proto.Clone(m).(*ghost_file.GhostFileEntry)
			m.Chunks = proto.Bool(true)
			e.Msg = m
		}
		s.expect(id)
	case *mm.MmEntry:
		pid, err := processOf(e.File)
		if err != nil {
			return err
		}
		s.expect(DataID{Memory, pid})
		for _, v := range m.GetVmas() {
			if v.GetStatus()&vmaAnonShared != 0 {
				s.expect(DataID{Shmem, uint32(v.GetShmid())})
			}
		}
	case *memfd.MemfdInodeEntry:
		s.expect(DataID{Shmem, m.GetShmid()})
	case *ipc_shm.IpcShmEntry:
		if m.GetInPagemaps() {
			s.expect(DataID{Shmem, m.GetDesc().GetId()})
		}
	}
	o := s.meta[e.File]
	if o == nil {
		o = &outFile{name: e.File + Extension, magic: e.Magic, limit: metaBuffer}
		if o.buf, err = AppendHead(nil, e.Magic); err != nil {
			return err
		}
		s.meta[e.File] = o
	} else if o.magic != e.Magic || e.Magic == MagicRaw {
		return fmt.Errorf("image %s: entries of types %s and %s", e.File, o.magic, e.Magic)
	}
	if o.buf, err = AppendEntry(o.buf, e); err != nil {
		return err
	}
	if len(o.buf) > o.limit && e.File != InventoryFile {
		return s.close(o)
	}
	return nil
}

// processOf reads the pid out of "mm-12".
func processOf(file string) (uint32, error) {
	var pid uint32
	if _, err := fmt.Sscanf(file, "mm-%d", &pid); err != nil || MMFile(pid) != file {
		return 0, fmt.Errorf("image %s: an address space belongs in mm-PID", file)
	}
	return pid, nil
}

// expect notes a data set: CRIU wants its images even if no data comes.
func (s *DirSink) expect(id DataID) {
	if s.sets[id] == nil {
		s.sets[id] = &outSet{id: id}
	}
}

// Sealed writes all images of entries but the inventory.
func (s *DirSink) Sealed() error {
	if err := s.ready("seal"); err != nil {
		return err
	}
	return s.stick(s.seal())
}

func (s *DirSink) seal() error {
	if s.sealed {
		return errors.New("all entries have been given before")
	}
	inv := s.meta[InventoryFile]
	if inv == nil || inv.magic != MagicInventory {
		return errors.New("there is no inventory among the entries")
	}
	s.sealed = true
	names := make([]string, 0, len(s.meta))
	for n := range s.meta {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		o := s.meta[n]
		switch {
		case n == InventoryFile:
			continue
		case o.magic == MagicGhostFile:
			// The data set goes on where the entry ends.
			id, _, err := dataOf(n)
			if err != nil {
				return err
			}
			o.limit = dataBuffer
			s.sets[id].list = o
		}
		if err := s.close(o); err != nil {
			return err
		}
		s.sums[o.name] = o.sum
		delete(s.meta, n)
	}
	return nil
}

// put appends p to a file, by way of its buffer if p is small.
func (s *DirSink) put(o *outFile, p []byte) error {
	if len(o.buf)+len(p) > o.limit {
		if err := s.flush(o); err != nil {
			return err
		}
		if len(p) >= o.limit/2 {
			return s.write(o, p)
		}
	}
	o.buf = append(o.buf, p...)
	return nil
}

func (s *DirSink) flush(o *outFile) error {
	if len(o.buf) == 0 && o.created {
		return nil
	}
	err := s.write(o, o.buf)
	o.buf = o.buf[:0]
	return err
}

// write appends p to the file, which is made or opened again if need be.
func (s *DirSink) write(o *outFile, p []byte) error {
	if o.f == nil {
		mode := os.O_WRONLY | os.O_APPEND
		if !o.created {
			mode = os.O_WRONLY | os.O_CREATE | os.O_EXCL
		}
		f, err := os.OpenFile(filepath.Join(s.dir, o.name), mode, 0o600)
		if err != nil {
			return err
		}
		o.f = f
		if !o.created {
			o.created = true
			s.made = append(s.made, o.name)
		}
	}
	n, err := o.f.Write(p)
	o.sum.Size += int64(n)
	o.sum.CRC = crc32.Update(o.sum.CRC, castagnoli, p[:n])
	return err
}

// close writes what is buffered and gives up the descriptor and the buffer.
func (s *DirSink) close(o *outFile) error {
	err := s.flush(o)
	o.buf = nil
	if o.f != nil {
		if cerr := o.f.Close(); err == nil {
			err = cerr
		}
		o.f = nil
	}
	return err
}

// Data appends to a data set.
func (s *DirSink) Data(id DataID, off uint64, p []byte) error {
	if err := s.ready("data"); err != nil {
		return err
	}
	return s.stick(s.data(id, off, p))
}

func (s *DirSink) data(id DataID, off uint64, p []byte) error {
	if !s.sealed {
		return fmt.Errorf("data of %s before the last entry", id)
	}
	if id.Kind == Digest {
		return nil // the directory has checksums of its own
	}
	set := s.sets[id]
	if set == nil {
		if id.Kind != Shmem && !(s.partial && id.Kind == Memory) {
			return fmt.Errorf("data of %s, of which no entry tells", id)
		}
		s.expect(id)
		set = s.sets[id]
	}
	if len(p) == 0 {
		return nil
	}
	n := uint64(len(p))
	if off < set.next || off+n < off {
		return fmt.Errorf("data of %s at %#x, %d bytes, comes after data up to %#x", id, off, n, set.next)
	}
	if err := s.use(set); err != nil {
		return err
	}
	if id.Kind == Ghost {
		b, err := AppendMessage(nil, &ghost_file.GhostChunkEntry{Len: proto.Uint64(n), Off: proto.Uint64(off)})
		if err != nil {
			return err
		}
		if err := s.put(set.list, b); err != nil {
			return err
		}
		set.next = off + n
		return s.put(set.list, p)
	}
	if off%PageSize != 0 || n%PageSize != 0 {
		return fmt.Errorf("data of %s at %#x, %d bytes, is no whole pages", id, off, n)
	}
	if s.parents != nil {
		return s.incremental(set, off, p)
	}
	return s.pages(set, off, p, pagePresent)
}

// pages puts pages into the list of a set, and into its pages image unless the
// dump before has them.
func (s *DirSink) pages(set *outSet, off uint64, p []byte, flags uint32) error {
	pages := uint64(len(p)) / PageSize
	// Room for the 32 bits of compat_nr_pages.
	if set.runPages > 0 && off == set.next && flags == set.runFlags && set.runPages+pages < 1<<32 {
		set.runPages += pages
	} else {
		if err := s.endRun(set); err != nil {
			return err
		}
		set.runStart, set.runPages, set.runFlags = off, pages, flags
	}
	set.next = off + uint64(len(p))
	if flags&pagePresent == 0 {
		return nil
	}
	return s.put(set.pages, p)
}

// use makes the set the last used one and starts its files if it has none.
func (s *DirSink) use(set *outSet) error {
	if n := len(s.open); n > 0 && s.open[n-1] == set {
		return nil
	}
	for i, o := range s.open {
		if o == set {
			s.open = append(append(s.open[:i:i], s.open[i+1:]...), set)
			return nil
		}
	}
	if len(s.open) >= keepOpen {
		old := s.open[0]
		s.open = s.open[1:]
		if err := s.rest(old); err != nil {
			return err
		}
	}
	s.open = append(s.open, set)
	if set.list != nil {
		return nil
	}
	s.lastPages++
	set.pages = &outFile{name: PagesFile(s.lastPages) + Extension, limit: dataBuffer}
	set.list = &outFile{name: dataFile(set.id) + Extension, limit: listBuffer}
	b, err := AppendHead(nil, MagicPagemap)
	if err != nil {
		return err
	}
	if b, err = AppendMessage(b, &pagemap.PagemapHead{PagesId: proto.Uint32(s.lastPages)}); err != nil {
		return err
	}
	return s.put(set.list, b)
}

// endRun puts the run of pages that is open into the list.
func (s *DirSink) endRun(set *outSet) error {
	if set.runPages == 0 {
		return nil
	}
	b, err := AppendMessage(nil, pagemapEntry(set.runStart, set.runPages, set.runFlags))
	if err != nil {
		return err
	}
	set.runPages = 0
	return s.put(set.list, b)
}

// rest gives up the descriptors of a set; it can be used again.
func (s *DirSink) rest(set *outSet) error {
	err := s.close(set.list)
	if set.pages != nil {
		err = errors.Join(err, s.close(set.pages))
	}
	return err
}

// Commit completes the dump: everything is on disk when it returns nil. On an
// error the directory is no dump; call Abort.
func (s *DirSink) Commit() error {
	if err := s.ready("commit"); err != nil {
		return err
	}
	if err := s.stick(s.commit()); err != nil {
		return err
	}
	s.over, s.committed = true, true
	if !s.dedup {
		s.parents.close()
	}
	_ = s.d.Close() // gives the lock back; nothing is written through it
	return nil
}

func (s *DirSink) commit() error {
	if !s.sealed {
		return errors.New("the dump ends before its last entry")
	}
	ids := make([]DataID, 0, len(s.sets))
	for id := range s.sets {
		ids = append(ids, id)
	}
	sort.Slice(ids, func(i, j int) bool {
		return ids[i].Kind < ids[j].Kind || ids[i].Kind == ids[j].Kind && ids[i].ID < ids[j].ID
	})
	for _, id := range ids {
		set := s.sets[id]
		if set.list == nil || set.runPages > 0 {
			if err := s.use(set); err != nil {
				return err
			}
		}
		if err := s.endRun(set); err != nil {
			return err
		}
		if err := s.rest(set); err != nil {
			return err
		}
		for _, o := range []*outFile{set.list, set.pages} {
			if o != nil {
				s.sums[o.name] = o.sum
			}
		}
	}
	s.open = nil

	inv := s.meta[InventoryFile]
	s.sums[inv.name] = fileSum{Size: int64(len(inv.buf)), CRC: crc32.Checksum(inv.buf, castagnoli)}
	if s.facts != nil {
		b, err := marshalFacts(s.facts, s.sums)
		if err != nil {
			return err
		}
		o := &outFile{name: FactsFile, buf: b}
		if err := s.close(o); err != nil {
			return err
		}
	}
	// One call for all files: a large tree has thousands, each of which would
	// cost a journal commit. It also tells of failed writes that no file does
	// any more (syncfs(2), Linux 5.8).
	if err := unix.Syncfs(int(s.d.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: s.dir, Err: err}
	}
	return s.publish(inv)
}

func marshalFacts(f *Facts, sums map[string]fileSum) ([]byte, error) {
	b, err := json.MarshalIndent(factsFile{f, sums}, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", FactsFile, err)
	}
	return append(b, '\n'), nil
}

// publish writes the inventory, which makes the directory a dump, in one step.
func (s *DirSink) publish(inv *outFile) error {
	final := inv.name
	inv.name += ".tmp"
	if err := s.flush(inv); err != nil {
		return err
	}
	err := inv.f.Sync()
	if cerr := inv.f.Close(); err == nil {
		err = cerr
	}
	inv.f = nil
	if err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(s.dir, inv.name), filepath.Join(s.dir, final)); err != nil {
		return err
	}
	s.made = append(s.made, final)
	return s.d.Sync()
}

// Abort removes every file that this sink made, and the directory if it made
// that. After a Commit that returned nil it does nothing.
func (s *DirSink) Abort() error {
	if s.over {
		return nil
	}
	s.over = true
	for _, o := range s.meta {
		if o.f != nil {
			_ = o.f.Close()
		}
	}
	for _, set := range s.sets {
		for _, o := range []*outFile{set.list, set.pages} {
			if o != nil && o.f != nil {
				_ = o.f.Close()
			}
		}
	}
	s.parents.close()
	err := s.remove()
	_ = s.d.Close()
	return err
}

// Withdraw is Abort for a dump that is complete as well: it is not wanted any more.
func (s *DirSink) Withdraw() error {
	if s.committed {
		s.committed = false
		return s.remove()
	}
	return s.Abort()
}

// remove removes what this sink made, the file that makes it a dump first.
func (s *DirSink) remove() error {
	var errs []error
	for i := len(s.made) - 1; i >= 0; i-- {
		if err := os.Remove(filepath.Join(s.dir, s.made[i])); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if s.madeDir {
		// Somebody else may have put something there.
		if err := os.Remove(s.dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the images of a failed dump: %w", err)
	}
	return nil
}
