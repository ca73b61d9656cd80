package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ghost_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// needRoot skips loudly, and fails where a skip would hide that nothing was tested.
func needRoot(t *testing.T, what string) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s needs root", what)
	}
	t.Skipf("%s needs root", what)
}

func TestDiskFull(t *testing.T) {
	needRoot(t, "mounting a small tmpfs")
	for _, kib := range []int{4, 32, 64, 128, 1024, 3600} {
		t.Run(fmt.Sprintf("%d KiB", kib), func(t *testing.T) {
			mnt := t.TempDir()
			if err := unix.Mount("godwit-test", mnt, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
				t.Fatalf("mount tmpfs: %v", err)
			}
			defer func() {
				if err := unix.Unmount(mnt, 0); err != nil {
					t.Errorf("unmount: %v (a descriptor is still open)", err)
				}
			}()
			if err := os.WriteFile(filepath.Join(mnt, "other"), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := NewDirSink(mnt)
			if err != nil {
				t.Fatal(err)
			}
			err = func() error {
				if err := s.Facts(testFacts()); err != nil {
					return err
				}
				for _, e := range testEntries() {
					if err := s.Entry(e); err != nil {
						return err
					}
				}
				if err := s.Sealed(); err != nil {
					return err
				}
				for _, d := range testData() {
					if err := s.Data(d.ID, d.Off, d.P); err != nil {
						return err
					}
				}
				return s.Commit()
			}()
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("dump into %d KiB: %v, want no space left", kib, err)
			}
			if !strings.Contains(err.Error(), mnt+"/") {
				t.Errorf("error names no file: %v", err)
			}
			// What failed once must not look whole later.
			if err := s.Commit(); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("commit after the failure: %v", err)
			}
			if _, err := OpenDir(mnt); err == nil || !strings.Contains(err.Error(), "inventory.img") {
				t.Errorf("open of what failed: %v", err)
			}
			if err := s.Abort(); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff([]string{"other"}, listing(t, mnt)); d != "" {
				t.Errorf("after the abort (-want +got):\n%s", d)
			}
		})
	}
}

func TestAbortRemovesItsFilesOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range testEntries() {
		if err := s.Entry(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Sealed(); err != nil {
		t.Fatal(err)
	}
	if n := len(listing(t, dir)); n == 0 {
		t.Fatal("nothing was written")
	}
	if err := s.Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory that the sink made is still there: %v", err)
	}
	if err := s.Entry(testEntries()[0]); err == nil {
		t.Error("an entry after the abort was taken")
	}
}

func TestCommitThenAbortKeeps(t *testing.T) {
	dir := t.TempDir()
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Entry(testEntries()[0]); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Sealed(), s.Commit(), s.Abort()); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(dir); err != nil {
		t.Error(err)
	}
}

func TestNewDirSinkRefuses(t *testing.T) {
	dir := t.TempDir()
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewDirSink(dir); err == nil || !strings.Contains(err.Error(), "another dump") {
		t.Errorf("second sink: %v", err)
	}
	if err := s.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "core-1.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewDirSink(dir); err == nil || !strings.Contains(err.Error(), "1 images of a dump that failed") {
		t.Errorf("remains: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "core-1.img")); err != nil {
		t.Fatal(err)
	}
	write(t, dir, testFacts(), testEntries(), nil)
	if _, err := NewDirSink(dir); err == nil || !strings.Contains(err.Error(), "a dump already") {
		t.Errorf("whole dump: %v", err)
	}
	if _, err := NewDirSink(filepath.Join(dir, "a", "b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing parent: %v", err)
	}
}

func TestSinkMisuse(t *testing.T) {
	inv := testEntries()[0]
	mm := Entry{File: MMFile(1), Magic: MagicMM, Msg: testMM(0)}
	page := make([]byte, PageSize)
	seal := func(s *DirSink) error { return errors.Join(s.Entry(inv), s.Entry(mm), s.Sealed()) }
	for _, tc := range []struct {
		name string
		do   func(*DirSink) error
		want string
	}{
		{"no inventory", func(s *DirSink) error { return s.Sealed() }, "no inventory"},
		{"commit before seal", func(s *DirSink) error { return s.Commit() }, "before its last entry"},
		{"data before seal", func(s *DirSink) error { return s.Data(DataID{Memory, 1}, 0, page) }, "before the last entry"},
		{"entry after seal", func(s *DirSink) error { _ = seal(s); return s.Entry(mm) }, "after the last"},
		{"sealed twice", func(s *DirSink) error { _ = seal(s); return s.Sealed() }, "before"},
		{"unknown process", func(s *DirSink) error { _ = seal(s); return s.Data(DataID{Memory, 2}, 0, page) }, "memory-2, of which no entry tells"},
		{"half a page", func(s *DirSink) error { _ = seal(s); return s.Data(DataID{Memory, 1}, 0, page[:100]) }, "no whole pages"},
		{"off a page", func(s *DirSink) error { _ = seal(s); return s.Data(DataID{Memory, 1}, 100, page) }, "no whole pages"},
		{"backwards", func(s *DirSink) error {
			_ = seal(s)
			_ = s.Data(DataID{Memory, 1}, 0x2000, page)
			return s.Data(DataID{Memory, 1}, 0x2000, page)
		}, "comes after data up to 0x3000"},
		{"beyond the end", func(s *DirSink) error {
			_ = seal(s)
			return s.Data(DataID{Memory, 1}, ^uint64(0)-4095, append(page, page...))
		}, "comes after"},
		{"two types", func(s *DirSink) error {
			_ = s.Entry(inv)
			return s.Entry(Entry{File: InventoryFile, Magic: MagicMM, Msg: testMM(0)})
		}, "belongs in mm-PID"},
		{"into pages", func(s *DirSink) error { return s.Entry(Entry{File: "pages-1", Magic: MagicInventory, Msg: inv.Msg}) }, "cannot hold"},
		{"into a list", func(s *DirSink) error { return s.Entry(Entry{File: "pagemap-1", Magic: MagicInventory, Msg: inv.Msg}) }, "cannot hold"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := NewDirSink(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = s.Abort() }()
			first := tc.do(s)
			if first == nil || !strings.Contains(first.Error(), tc.want) {
				t.Fatalf("error %v, want %q", first, tc.want)
			}
			if err := s.Sealed(); err == nil {
				t.Error("the sink forgot its failure")
			}
			if err := s.Commit(); err == nil {
				t.Error("a dump with a failure was committed")
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	return len(listing(t, "/proc/self/fd"))
}

// Many sets at once: descriptors stay bounded and nothing is mixed up.
func TestManySets(t *testing.T) {
	dir := t.TempDir()
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	const n = 200
	es := []Entry{testEntries()[0]}
	for pid := range uint32(n) {
		es = append(es, Entry{File: MMFile(pid + 1), Magic: MagicMM, Msg: testMM(0)})
	}
	for _, e := range es {
		if err := s.Entry(e); err != nil {
			t.Fatal(err)
		}
	}
	before := openFiles(t)
	if err := s.Sealed(); err != nil {
		t.Fatal(err)
	}
	var want []piece
	for round := range uint64(3) {
		for pid := range uint32(n) {
			p := piece{DataID{Memory, pid + 1}, 0x10000 + round*3*PageSize, fill(PageSize, byte(pid)+byte(round))}
			if err := s.Data(p.ID, p.Off, p.P); err != nil {
				t.Fatal(err)
			}
			want = append(want, p)
			if open := openFiles(t); open > before+2*keepOpen {
				t.Fatalf("%d descriptors, %d before the data", open, before)
			}
		}
	}
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
	src, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := drain(src)
	if err != nil {
		t.Fatal(err)
	}
	if d := diffData(sorted(want), got); d != "" {
		t.Error(d)
	}
	if open := openFiles(t); open >= before {
		t.Errorf("%d descriptors are left open, %d before", open, before)
	}
}

// Big images of entries are written before the seal.
func TestMetadataSpills(t *testing.T) {
	dir := t.TempDir()
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Entry(testEntries()[0]); err != nil {
		t.Fatal(err)
	}
	want := NewSet()
	want.Add(testEntries()[0])
	for i := range uint32(5) {
		e := pipeEntry(i, fill(400<<10, byte(i)))
		want.Add(e)
		if err := s.Entry(e); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff([]string{"pipes-data.img"}, listing(t, dir)); d != "" {
		t.Errorf("before the seal (-want +got):\n%s", d)
	}
	if err := errors.Join(s.Sealed(), s.Commit()); err != nil {
		t.Fatal(err)
	}
	src, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := diffSets(want, src.set); d != "" {
		t.Error(d)
	}
}

// memoryDir is a directory in memory where there is one: each commit waits for
// the disk, which is for other tests to see.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "godwit-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestRoundtripProperty(t *testing.T) {
	base := memoryDir(t)
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(base, "")
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		entries := []Entry{testEntries()[0]}
		var ids []DataID
		for _, pid := range rapid.SliceOfNDistinct(rapid.Uint32Range(1, 1<<22), 0, 6, rapid.ID).Draw(rt, "pids") {
			entries = append(entries, Entry{File: MMFile(pid), Magic: MagicMM, Msg: testMM(0)})
			ids = append(ids, DataID{Memory, pid})
		}
		for _, id := range rapid.SliceOfNDistinct(rapid.Uint32(), 0, 4, rapid.ID).Draw(rt, "ghosts") {
			entries = append(entries, Entry{File: GhostFile(id), Magic: MagicGhostFile, Msg: &ghost_file.GhostFileEntry{
				Uid: proto.Uint32(0), Gid: proto.Uint32(0), Mode: proto.Uint32(0o100600), Chunks: proto.Bool(true)}})
			ids = append(ids, DataID{Ghost, id})
		}
		for _, id := range rapid.SliceOfNDistinct(rapid.Uint32(), 0, 4, rapid.ID).Draw(rt, "shmids") {
			ids = append(ids, DataID{Shmem, id})
		}
		for i := range rapid.Uint32Range(0, 4).Draw(rt, "pipes") {
			entries = append(entries, pipeEntry(i, rapid.SliceOfN(rapid.Byte(), 0, 64).Draw(rt, "pipe")))
		}
		var data []piece
		next := map[DataID]uint64{}
		if len(ids) > 0 {
			for i := range rapid.IntRange(0, 30).Draw(rt, "pieces") {
				id := rapid.SampledFrom(ids).Draw(rt, "set")
				unit := uint64(PageSize)
				if id.Kind == Ghost {
					unit = 1
				}
				off := next[id] + unit*rapid.Uint64Range(0, 3).Draw(rt, "gap")
				n := unit * rapid.Uint64Range(1, 80).Draw(rt, "length")
				data = append(data, piece{id, off, fill(int(n), byte(i))})
				next[id] = off + n
			}
		}
		write(t, dir, testFacts(), entries, data)
		src, err := OpenDir(dir)
		if err != nil {
			rt.Fatal(err)
		}
		want := NewSet()
		for _, e := range entries {
			want.Add(e)
		}
		if d := diffSets(want, src.set); d != "" {
			rt.Fatal(d)
		}
		got, err := drain(src)
		if err != nil {
			rt.Fatal(err)
		}
		if d := diffData(sorted(data), got); d != "" {
			rt.Fatal(d)
		}
	})
}

// criuDump writes a directory as CRIU would: no facts, no sums, lists of pages by hand.
func criuDump(t testing.TB, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	inv, err := AppendHead(nil, MagicInventory)
	if err != nil {
		t.Fatal(err)
	}
	if inv, err = AppendEntry(inv, testEntries()[0]); err != nil {
		t.Fatal(err)
	}
	files[InventoryFile+Extension] = inv
	for name, b := range files {
		if b == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func messages(t testing.TB, magic string, ms ...proto.Message) []byte {
	t.Helper()
	b, err := AppendHead(nil, magic)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		if b, err = AppendMessage(b, m); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func list(t testing.TB, pages uint32, es ...*pagemap.PagemapEntry) []byte {
	ms := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(pages)}}
	for _, e := range es {
		ms = append(ms, e)
	}
	return messages(t, MagicPagemap, ms...)
}

func pages(vaddr uint64, compat uint32, more ...func(*pagemap.PagemapEntry)) *pagemap.PagemapEntry {
	e := &pagemap.PagemapEntry{Vaddr: proto.Uint64(vaddr), CompatNrPages: proto.Uint32(compat)}
	for _, f := range more {
		f(e)
	}
	return e
}

func flags(f uint32) func(*pagemap.PagemapEntry) {
	return func(e *pagemap.PagemapEntry) { e.Flags = proto.Uint32(f) }
}

func nr(n uint64) func(*pagemap.PagemapEntry) {
	return func(e *pagemap.PagemapEntry) { e.NrPages = proto.Uint64(n) }
}

func inParent(e *pagemap.PagemapEntry) { e.InParent = proto.Bool(true) }

func ghostEntry(chunks bool, size uint64) *ghost_file.GhostFileEntry {
	g := &ghost_file.GhostFileEntry{Uid: proto.Uint32(0), Gid: proto.Uint32(0), Mode: proto.Uint32(0o100600), Size: proto.Uint64(size)}
	if chunks {
		g.Chunks = proto.Bool(true)
	}
	return g
}

func chunk(off, n uint64) *ghost_file.GhostChunkEntry {
	return &ghost_file.GhostChunkEntry{Off: proto.Uint64(off), Len: proto.Uint64(n)}
}

func TestReadsDumpsOfCRIU(t *testing.T) {
	mem := DataID{Memory, 7}
	for _, tc := range []struct {
		name  string
		files map[string][]byte
		want  []piece
		err   string // part of it
	}{
		{
			"old entries without flags",
			map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1), pages(0x4000, 2)), "pages-3.img": fill(3*PageSize, 1)},
			[]piece{{mem, 0x1000, fill(3*PageSize, 1)[:PageSize]}, {mem, 0x4000, fill(3*PageSize, 1)[PageSize:]}}, "",
		},
		{
			"64 bits win over the compatible count",
			map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1, nr(2), flags(4))), "pages-3.img": fill(2*PageSize, 1)},
			[]piece{{mem, 0x1000, fill(2*PageSize, 1)}}, "",
		},
		{
			"lazy pages that are there",
			map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1, flags(4|2))), "pages-3.img": fill(PageSize, 1)},
			[]piece{{mem, 0x1000, fill(PageSize, 1)}}, "",
		},
		{
			"hole, and bytes that no list tells of",
			map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 9, flags(0)), pages(0xa000, 1, flags(4))), "pages-3.img": fill(2*PageSize, 1)},
			[]piece{{mem, 0xa000, fill(PageSize, 1)}}, "",
		},
		{
			"ghost in one piece",
			map[string][]byte{"ghost-file-f.img": append(messages(t, MagicGhostFile, ghostEntry(false, 5)), "hello"...)},
			[]piece{{DataID{Ghost, 15}, 0, []byte("hello")}}, "",
		},
		{
			"images of other programs, and other files",
			map[string][]byte{"route-9.img": []byte("routes"), "tmpfs-1.tar.gz.img": {31, 139}, "stats-dump": {1}, "dump.log": {2}},
			nil, "",
		},
		{"lazy pages that stayed", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1, flags(2))), "pages-3.img": {}}, nil,
			"image pagemap-7.img, offset 14: pages at 0x1000 were left with the source"},
		{"incremental", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1, inParent)), "pages-3.img": {}}, nil, "should be in the dump before it"},
		{"incremental by flag", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 1, flags(1))), "pages-3.img": {}}, nil, "should be in the dump before it"},
		{"short pages", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 3, flags(4))), "pages-3.img": make([]byte, 2*PageSize)}, nil,
			"image pages-3.img, offset 0: the file ends where memory-7 at 0x1000, 12288 bytes, should be"},
		{"no pages", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x1000, 3, flags(4)))}, nil, "pages-3.img: no such file"},
		{"order", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x2000, 1), pages(0x1000, 1)), "pages-3.img": make([]byte, 2*PageSize)}, nil,
			"pages at 0x1000 come after pages up to 0x3000"},
		{"unaligned", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x2001, 1)), "pages-3.img": make([]byte, PageSize)}, nil, "not that of a page"},
		{"no page", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x2000, 0)), "pages-3.img": {}}, nil, "0 pages"},
		{"too many pages", map[string][]byte{"pagemap-7.img": list(t, 3, pages(0x2000, 1, nr(1<<60))), "pages-3.img": {}}, nil, "1152921504606846976 pages"},
		{"list without a head", map[string][]byte{"pagemap-7.img": messages(t, MagicPagemap)}, nil, "does not say where its pages are"},
		{"list of another type", map[string][]byte{"pagemap-7.img": messages(t, MagicCore)}, nil, "it is no list of pages"},
		{"pagemap under another name", map[string][]byte{"core-7.img": list(t, 3)}, nil, "list of pages, which is no list of entries"},
		{"ghost under another name", map[string][]byte{"core-7.img": messages(t, MagicGhostFile)}, nil, "of type GHOST_FILE"},
		{"ghost without an entry", map[string][]byte{"ghost-file-7.img": messages(t, MagicGhostFile)}, nil, "it has no entry"},
		{"chunk beyond the file", map[string][]byte{"ghost-file-7.img": messages(t, MagicGhostFile, ghostEntry(true, 1<<40), chunk(0, 1<<39))}, nil,
			"chunk of 549755813888 bytes, the file has 0 more"},
		{"chunk beyond the size", map[string][]byte{"ghost-file-7.img": append(messages(t, MagicGhostFile, ghostEntry(true, 4), chunk(0, 5)), "hello"...)}, nil, "beyond the size of 4"},
		{"chunk wraps", map[string][]byte{"ghost-file-7.img": append(messages(t, MagicGhostFile, ghostEntry(true, 4), chunk(^uint64(0)-1, 5)), "hello"...)}, nil, "beyond the size of 4"},
		{"chunks overlap", map[string][]byte{"ghost-file-7.img": append(append(messages(t, MagicGhostFile, ghostEntry(true, 9), chunk(0, 5)), "hello"...),
			messages(t, MagicInventory, chunk(4, 1))[4:]...)}, nil, "the file has 0 more"},
		{"unknown type", map[string][]byte{"core-7.img": binary.LittleEndian.AppendUint32(messages(t, MagicCore)[:4:4], 5)}, nil, "offset 4: unknown image type 0x5"},
		{"no image", map[string][]byte{"core-7.img": []byte("text that is none")}, nil, "does not start as an image does"},
		{"empty", map[string][]byte{"core-7.img": {}}, nil, "does not start as an image does"},
		{"half a magic", map[string][]byte{"core-7.img": messages(t, MagicCore)[:6]}, nil, "offset 4: the file ends where a magic should be"},
		{"half a size", map[string][]byte{"core-7.img": append(messages(t, MagicCore), 1, 0)}, nil, "offset 8: the file ends where the size of an entry should be"},
		{"size beyond the file", map[string][]byte{"core-7.img": append(messages(t, MagicCore), 0, 0, 0, 1)}, nil, "an entry of 16777216 bytes, the file has 0 more"},
		{"size beyond sense", map[string][]byte{"core-7.img": append(messages(t, MagicCore), 255, 255, 255, 255)}, nil, "entry of 4294967295 bytes, the largest"},
		{"garbage message", map[string][]byte{"core-7.img": append(messages(t, MagicCore), 2, 0, 0, 0, 255, 255)}, nil, "offset 8: entry of 2 bytes is no core_entry"},
		{"inventory elsewhere", map[string][]byte{"core-7.img": messages(t, MagicInventory)}, nil, "it is of type INVENTORY"},
		{"facts of another version", map[string][]byte{FactsFile: []byte(`{"version": 2}`)}, nil, "godwit.json: version 2 is not known here"},
		{"facts no JSON", map[string][]byte{FactsFile: []byte(`{"version" 2}`)}, nil, "godwit.json: offset 12"},
		{"strange list name", map[string][]byte{"pagemap-07.img": {}}, nil, `"07" is no id`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := criuDump(t, tc.files)
			var got []piece
			src, err := OpenDir(dir)
			if err == nil {
				got, err = drain(src)
			}
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), dir) {
					t.Fatalf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := diffData(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// Any damage to a dump of ours is found, in whatever file it is.
func TestDamageIsFound(t *testing.T) {
	clean := t.TempDir()
	write(t, clean, testFacts(), testEntries(), testData())
	for _, name := range listing(t, clean) {
		if name == FactsFile {
			continue
		}
		b, err := os.ReadFile(filepath.Join(clean, name))
		if err != nil {
			t.Fatal(err)
		}
		damages := map[string][]byte{"missing": nil, "longer": append(append([]byte{}, b...), 0)}
		if len(b) > 0 {
			flipped := append([]byte{}, b...)
			flipped[len(b)-1] ^= 0x10
			damages["flipped"] = flipped
			damages["shorter"] = b[:len(b)-1]
		}
		for how, bad := range damages {
			dir := t.TempDir()
			for _, n := range listing(t, clean) {
				if n != name {
					if err := os.Link(filepath.Join(clean, n), filepath.Join(dir, n)); err != nil {
						t.Fatal(err)
					}
				} else if bad != nil {
					if err := os.WriteFile(filepath.Join(dir, n), bad, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			src, err := OpenDir(dir)
			if err == nil {
				_, err = drain(src)
			}
			if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(name, Extension)) {
				t.Errorf("%s %s: error %v", name, how, err)
			}
		}
	}
}

func TestOpenDirRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := OpenDir(dir); err == nil || !strings.Contains(err.Error(), "no inventory.img") {
		t.Errorf("empty directory: %v", err)
	}
	if _, err := OpenDir(filepath.Join(dir, "x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	write(t, dir, nil, testEntries(), nil)
	if err := unix.Mkfifo(filepath.Join(dir, "core-99.img"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(dir); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("fifo: %v", err)
	}
}

func TestNextMindsContextAndClose(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, testFacts(), testEntries(), testData())
	src, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, _, err := src.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, _, _, err := src.Next(t.Context()); err != nil {
		t.Errorf("a cancelled call spoiled the source: %v", err)
	}
	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := src.Next(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
