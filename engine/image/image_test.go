package image

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/cli"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	ghost_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	pipe_data "github.com/checkpoint-restore/go-criu/v8/crit/images/pipe-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

// piece is one call of Data, or the merged ones of a set.
type piece struct {
	ID  DataID
	Off uint64
	P   []byte
}

// testMM is an address space with one shared anonymous mapping.
func testMM(shmid uint64) *mm.MmEntry {
	u := proto.Uint64
	m := &mm.MmEntry{
		MmStartCode: u(1), MmEndCode: u(2), MmStartData: u(3), MmEndData: u(4), MmStartStack: u(5), MmStartBrk: u(6), MmBrk: u(7),
		MmArgStart: u(8), MmArgEnd: u(9), MmEnvStart: u(10), MmEnvEnd: u(11), ExeFileId: proto.Uint32(1), MmSavedAuxv: []uint64{6, 4096, 0, 0},
		Vmas: []*vma.VmaEntry{{
			Start: u(0x10000), End: u(0x90000), Pgoff: u(0), Shmid: u(0), Prot: proto.Uint32(3), Flags: proto.Uint32(0x22),
			Status: proto.Uint32(1 | 1<<9), Fd: proto.Int64(-1),
		}},
	}
	if shmid != 0 {
		m.Vmas = append(m.Vmas, &vma.VmaEntry{
			Start: u(0x100000), End: u(0x200000), Pgoff: u(0), Shmid: u(shmid), Prot: proto.Uint32(3), Flags: proto.Uint32(0x21),
			Status: proto.Uint32(1 | vmaAnonShared), Fd: proto.Int64(-1),
		})
	}
	return m
}

func testFown() *fown.FownEntry {
	z := proto.Uint32(0)
	return &fown.FownEntry{Uid: z, Euid: z, Signum: z, PidType: z, Pid: z}
}

// testEntries is a tree of two processes and three threads, with a deleted
// file, a pipe with data, a memfd and a path of bytes that are not UTF-8.
func testEntries() []Entry {
	u32, u64 := proto.Uint32, proto.Uint64
	es := []Entry{
		{File: InventoryFile, Magic: MagicInventory, Msg: &inventory.InventoryEntry{ImgVersion: u32(2), FdinfoPerId: proto.Bool(true)}},
		{File: PstreeFile, Magic: MagicPstree, Msg: &pstree.PstreeEntry{Pid: u32(12), Ppid: u32(0), Pgid: u32(12), Sid: u32(12), Threads: []uint32{12, 13}}},
		{File: PstreeFile, Magic: MagicPstree, Msg: &pstree.PstreeEntry{Pid: u32(14), Ppid: u32(12), Pgid: u32(12), Sid: u32(12), Threads: []uint32{14}}},
		{File: FilesFile, Magic: MagicFiles, Msg: &fdinfo.FileEntry{
			Type: fdinfo.FdTypes_REG.Enum(), Id: u32(1),
			Reg: &regfile.RegFileEntry{Id: u32(1), Flags: u32(2), Pos: u64(7), Fown: testFown(), Name: proto.String("/tmp/\xff\xfe name"), Ext: proto.Bool(false)},
		}},
		{File: FilesFile, Magic: MagicFiles, Msg: &fdinfo.FileEntry{Type: fdinfo.FdTypes_MEMFD.Enum(), Id: u32(2), Memfd: &memfd.MemfdFileEntry{
			Id: u32(2), Flags: u32(2), Pos: u64(0), Fown: testFown(), InodeId: u32(1)}}},
		{File: MemfdFile, Magic: MagicMemfdInode, Msg: &memfd.MemfdInodeEntry{
			Name: proto.String("m"), Uid: u32(0), Gid: u32(0), Size: u64(8192), Shmid: u32(77), Seals: u32(0), InodeId: u64(1)}},
		{File: FdinfoFile(1), Magic: MagicFdinfo, Msg: &fdinfo.FdinfoEntry{Id: u32(1), Flags: u32(0), Type: fdinfo.FdTypes_REG.Enum(), Fd: u32(3)}},
		{File: PipesDataFile, Magic: MagicPipesData, Msg: &pipe_data.PipeDataEntry{PipeId: u32(5), Bytes: u32(5), Size: u32(65536)}, Extra: []byte("hello")},
		{File: PipesDataFile, Magic: MagicPipesData, Msg: &pipe_data.PipeDataEntry{PipeId: u32(6), Bytes: u32(0), Size: u32(65536)}},
		{File: FifoDataFile, Magic: MagicFifoData, Msg: &pipe_data.PipeDataEntry{PipeId: u32(9), Bytes: u32(3)}, Extra: []byte{0, 1, 2}},
		{File: GhostFile(26), Magic: MagicGhostFile, Msg: &ghost_file.GhostFileEntry{
			Uid: u32(0), Gid: u32(0), Mode: u32(0o100600), Size: u64(1 << 20), Chunks: proto.Bool(true)}},
		{File: GhostFile(27), Magic: MagicGhostFile, Msg: &ghost_file.GhostFileEntry{Uid: u32(0), Gid: u32(0), Mode: u32(0o010600)}},
	}
	for _, pid := range []uint32{12, 14} {
		es = append(es,
			Entry{File: MMFile(pid), Magic: MagicMM, Msg: testMM(55)},
			Entry{File: FSFile(pid), Magic: MagicFS, Msg: &fs.FsEntry{CwdId: u32(1), RootId: u32(1), Umask: u32(0o22)}},
			Entry{File: IDsFile(pid), Magic: MagicIDs, Msg: &criu_core.TaskKobjIdsEntry{VmId: u32(pid), FilesId: u32(1), FsId: u32(pid), SighandId: u32(pid)}},
		)
	}
	for _, tid := range []uint32{12, 13, 14} {
		es = append(es, Entry{File: CoreFile(tid), Magic: MagicCore, Msg: &criu_core.CoreEntry{
			Mtype: criu_core.CoreEntry_X86_64.Enum(),
			Tc: &criu_core.TaskCoreEntry{
				TaskState: u32(1), ExitCode: u32(0), Personality: u32(0), Flags: u32(0), BlkSigset: u64(0), Comm: proto.String("worker"),
			},
		}})
	}
	return es
}

func testFacts() *Facts {
	return &Facts{
		Version: 1, Host: "alpha", BootID: "b", Kernel: "6.18", Arch: "amd64", MonotonicNS: 1, BoottimeNS: 2, RealtimeNS: 3,
		Tasks: []TaskFacts{{TID: 12, Affinity: []uint64{3}, TimerSlack: 50000}},
		Files: []FileFacts{{ID: 1, Path: "/tmp/x", Dev: 4, Ino: 5, Holders: []string{"12:3"}}},
	}
}

// fill makes n bytes that tell where they belong.
func fill(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i>>12) + byte(i)
	}
	return b
}

func testData() []piece {
	return []piece{
		{DataID{Memory, 12}, 0x10000, fill(2*PageSize, 1)},
		{DataID{Memory, 12}, 0x12000, fill(PageSize, 2)}, // joins the run before
		{DataID{Ghost, 26}, 0, []byte("start")},
		{DataID{Memory, 12}, 0x20000, fill(600<<10, 3)},
		{DataID{Shmem, 55}, 0x3000, fill(PageSize, 4)},
		{DataID{Ghost, 26}, 1 << 19, fill(5000, 5)},
		{DataID{Shmem, 55}, 0x8000, fill(3<<20, 6)}, // longer than a piece
		{DataID{Shmem, 99}, 0, fill(PageSize, 7)},   // of which no entry tells
	}
}

// write makes a whole dump.
func write(t testing.TB, dir string, facts *Facts, entries []Entry, data []piece) {
	t.Helper()
	s, err := NewDirSink(dir)
	if err != nil {
		t.Fatal(err)
	}
	if facts != nil {
		if err := s.Facts(facts); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range entries {
		if err := s.Entry(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Sealed(); err != nil {
		t.Fatal(err)
	}
	for _, d := range data {
		if err := s.Data(d.ID, d.Off, d.P); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
}

// drain reads all data and merges what is adjacent.
func drain(src Source) ([]piece, error) {
	var out []piece
	for {
		id, off, p, err := src.Next(context.Background())
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if len(p) == 0 || len(p) > maxPiece {
			return nil, errors.New("piece of a wrong length")
		}
		out = append(out, piece{id, off, append([]byte(nil), p...)})
		out = merge(out)
	}
}

func merge(ps []piece) []piece {
	var out []piece
	for _, p := range ps {
		if n := len(out); n > 0 && out[n-1].ID == p.ID && out[n-1].Off+uint64(len(out[n-1].P)) == p.Off {
			out[n-1].P = append(out[n-1].P[:len(out[n-1].P):len(out[n-1].P)], p.P...)
			continue
		}
		out = append(out, p)
	}
	return out
}

func sorted(ps []piece) []piece {
	ps = append([]piece(nil), ps...)
	sort.SliceStable(ps, func(i, j int) bool {
		a, b := ps[i], ps[j]
		if a.ID != b.ID {
			return a.ID.Kind < b.ID.Kind || a.ID.Kind == b.ID.Kind && a.ID.ID < b.ID.ID
		}
		return a.Off < b.Off
	})
	return merge(ps)
}

// diffData names the first difference; cmp.Diff takes seconds for megabytes.
func diffData(want, got []piece) string {
	for i := range max(len(want), len(got)) {
		switch {
		case i >= len(got):
			return fmt.Sprintf("%v at %#x is missing", want[i].ID, want[i].Off)
		case i >= len(want):
			return fmt.Sprintf("%v at %#x, %d bytes, is too much", got[i].ID, got[i].Off, len(got[i].P))
		case want[i].ID != got[i].ID || want[i].Off != got[i].Off || len(want[i].P) != len(got[i].P):
			return fmt.Sprintf("piece %d is %v at %#x, %d bytes, want %v at %#x, %d bytes", i,
				got[i].ID, got[i].Off, len(got[i].P), want[i].ID, want[i].Off, len(want[i].P))
		case !bytes.Equal(want[i].P, got[i].P):
			return fmt.Sprintf("%v at %#x has other bytes", want[i].ID, want[i].Off)
		}
	}
	return ""
}

func listing(t testing.TB, dir string) []string {
	t.Helper()
	des, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, de := range des {
		names = append(names, de.Name())
	}
	return names
}

func TestDirRoundtrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	write(t, dir, testFacts(), testEntries(), testData())

	src, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	set, err := src.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(testFacts(), set.Facts); d != "" {
		t.Errorf("facts (-want +got):\n%s", d)
	}
	want := NewSet()
	for _, e := range testEntries() {
		if g, ok := e.Msg.(*ghost_file.GhostFileEntry); ok {
			g.Chunks = proto.Bool(true)
		}
		want.Add(e)
	}
	if d := cmp.Diff(want.Files(), set.Files()); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
	for _, f := range want.Files() {
		if d := cmp.Diff(want.Entries(f), set.Entries(f), protocmp.Transform()); d != "" {
			t.Errorf("entries of %s (-want +got):\n%s", f, d)
		}
	}
	got, err := drain(src)
	if err != nil {
		t.Fatal(err)
	}
	if d := diffData(sorted(testData()), got); d != "" {
		t.Errorf("data: %s", d)
	}
	if _, _, _, err := src.Next(t.Context()); !errors.Is(err, io.EOF) {
		t.Errorf("Next after the end: %v, want EOF", err)
	}

	// A copy is the same dump, byte for byte but for the order of pages images.
	src2, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	dir2 := t.TempDir()
	sink, err := NewDirSink(dir2)
	if err != nil {
		t.Fatal(err)
	}
	if err := Copy(t.Context(), sink, src2); err != nil {
		t.Fatal(err)
	}
	if err := sink.Commit(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(listing(t, dir), listing(t, dir2)); d != "" {
		t.Errorf("copy (-want +got):\n%s", d)
	}
}

func TestDirNames(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, testFacts(), testEntries(), testData())
	want := []string{
		"core-12.img", "core-13.img", "core-14.img", "fdinfo-1.img", "fifo-data.img", "files.img", "fs-12.img", "fs-14.img",
		"ghost-file-1a.img", "ghost-file-1b.img", "godwit.json", "ids-12.img", "ids-14.img", "inventory.img", "memfd.img", "mm-12.img", "mm-14.img",
		"pagemap-12.img", "pagemap-14.img", "pagemap-shmem-55.img", "pagemap-shmem-77.img", "pagemap-shmem-99.img",
		"pages-1.img", "pages-2.img", "pages-3.img", "pages-4.img", "pages-5.img", "pipes-data.img", "pstree.img",
	}
	if d := cmp.Diff(want, listing(t, dir)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// critDecode reads an image with go-criu's own decoder.
func critDecode(t *testing.T, path string) *crit.CriuImage {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	typ, err := cli.GetEntryTypeFromImg(f)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	img, err := crit.New(f, nil, "", false, false).Decode(typ)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return img
}

func TestCritDecodesAll(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, testFacts(), testEntries(), testData())
	want := map[string][]Entry{}
	for _, e := range testEntries() {
		want[e.File] = append(want[e.File], e)
	}
	decoded := 0
	for _, name := range listing(t, dir) {
		base, ok := strings.CutSuffix(name, Extension)
		if !ok || strings.HasPrefix(base, "pages-") {
			continue
		}
		img := critDecode(t, filepath.Join(dir, name))
		decoded++
		if strings.HasPrefix(base, "ghost-file-") || strings.HasPrefix(base, "pagemap-") {
			continue
		}
		if len(img.Entries) != len(want[base]) {
			t.Errorf("%s: crit found %d entries, want %d", name, len(img.Entries), len(want[base]))
			continue
		}
		for i, e := range img.Entries {
			if img.Magic != want[base][i].Magic {
				t.Errorf("%s: crit says type %s, want %s", name, img.Magic, want[base][i].Magic)
			}
			if d := cmp.Diff(want[base][i].Msg, e.Message, protocmp.Transform()); d != "" {
				t.Errorf("%s: entry %d (-want +crit):\n%s", name, i, d)
			}
			if w := base64.StdEncoding.EncodeToString(want[base][i].Extra); w != e.Extra {
				t.Errorf("%s: entry %d: extra %q, want %q", name, i, e.Extra, w)
			}
		}
	}
	if decoded != 23 {
		t.Errorf("crit decoded %d files, want 23", decoded)
	}

	var runs []*pagemap.PagemapEntry
	for _, e := range critDecode(t, filepath.Join(dir, "pagemap-12.img")).Entries[1:] {
		runs = append(runs, e.Message.(*pagemap.PagemapEntry))
	}
	wantRuns := []*pagemap.PagemapEntry{
		{Vaddr: proto.Uint64(0x10000), NrPages: proto.Uint64(3), CompatNrPages: proto.Uint32(3), Flags: proto.Uint32(4)},
		{Vaddr: proto.Uint64(0x20000), NrPages: proto.Uint64(150), CompatNrPages: proto.Uint32(150), Flags: proto.Uint32(4)},
	}
	if d := cmp.Diff(wantRuns, runs, protocmp.Transform()); d != "" {
		t.Errorf("pagemap-12 (-want +crit):\n%s", d)
	}
	if n := len(critDecode(t, filepath.Join(dir, "pagemap-14.img")).Entries); n != 1 {
		t.Errorf("pagemap-14: %d entries, want the head alone", n)
	}
	mr, err := crit.NewMemoryReader(dir, 12, PageSize)
	if err != nil {
		t.Fatal(err)
	}
	buf, err := mr.GetMemPages(0x12000, 0x12100)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf.Bytes(), fill(PageSize, 2)[:0x100]) {
		t.Error("crit reads other memory at 0x12000 than was written")
	}
	ghost := critDecode(t, filepath.Join(dir, "ghost-file-1a.img")).Entries
	// Every entry that crit gives of a ghost file is the last one (v8.3.0 takes
	// the address of one variable in its loop), but it read them all to get there.
	if len(ghost) != 3 || ghost[2].Extra != base64.StdEncoding.EncodeToString(fill(5000, 5)) {
		t.Errorf("ghost file: %d entries for crit, want the file and two chunks", len(ghost))
	}
	ps, err := crit.New(nil, nil, dir, false, false).ExplorePs()
	if err != nil {
		t.Fatal(err)
	}
	if ps.PID != 12 || ps.Comm != "worker" || len(ps.Children) != 1 || ps.Children[0].PID != 14 {
		t.Errorf("crit x ps: %+v, want 12 with the child 14", ps)
	}
	rss, err := crit.New(nil, nil, dir, false, false).ExploreRss()
	if err != nil {
		t.Fatal(err)
	}
	if len(rss) != 2 || rss[0].PId != 12 || len(rss[0].Rsses) != 2 || len(rss[1].Rsses) != 0 {
		t.Errorf("crit x rss: %+v, want 2 runs of 12 and none of 14", rss)
	}
}

func TestEntryCheck(t *testing.T) {
	ok := &pipe_data.PipeDataEntry{PipeId: proto.Uint32(1), Bytes: proto.Uint32(2)}
	for _, tc := range []struct {
		name string
		e    Entry
		want string // part of the error, "": none
	}{
		{"sound", Entry{"pipes-data", MagicPipesData, ok, []byte("ab")}, ""},
		{"tcp queues", Entry{"tcp-stream-1", "TCP_STREAM", &tcp_stream.TcpStreamEntry{
			InqLen: proto.Uint32(1), OutqLen: proto.Uint32(2), InqSeq: proto.Uint32(0), OutqSeq: proto.Uint32(0), OptMask: proto.Uint32(0), MssClamp: proto.Uint32(0), SndWscale: proto.Uint32(0)}, []byte("abc")}, ""},
		{"escapes", Entry{"../etc/passwd", MagicPipesData, ok, []byte("ab")}, "byte that no image name has"},
		{"no name", Entry{"", MagicPipesData, ok, []byte("ab")}, "0 bytes"},
		{"unknown type", Entry{"x", "NONSENSE", ok, nil}, "no message is known"},
		{"other message", Entry{"x", MagicCore, ok, nil}, "type CORE holds core_entry, not pipe_data_entry"},
		{"no message", Entry{"x", MagicCore, nil, nil}, "without a message"},
		{"required field", Entry{"pstree", MagicPstree, &pstree.PstreeEntry{}, nil}, "required field"},
		{"short extra", Entry{"pipes-data", MagicPipesData, ok, []byte("a")}, "1 extra bytes, its message says 2"},
		{"extra without need", Entry{"fs-1", MagicFS, &fs.FsEntry{CwdId: proto.Uint32(1), RootId: proto.Uint32(1)}, []byte("a")}, "1 extra bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.e.Check()
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestTypesHaveMagics(t *testing.T) {
	for name := range types {
		b, err := AppendHead(nil, name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, _, err := Decode("x", bytes.NewReader(b), int64(len(b)))
		if err != nil || got != name {
			t.Errorf("head of %s reads back as %q, %v", name, got, err)
		}
	}
}

func TestDataNames(t *testing.T) {
	for _, tc := range []struct {
		name string
		id   DataID
		ok   bool
		err  bool
	}{
		{"pagemap-12", DataID{Memory, 12}, true, false},
		{"pagemap-shmem-4294967295", DataID{Shmem, 1<<32 - 1}, true, false},
		{"ghost-file-1a", DataID{Ghost, 26}, true, false},
		{"core-12", DataID{}, false, false},
		{"pagemap-012", DataID{}, false, true},
		{"pagemap-", DataID{}, false, true},
		{"pagemap-x", DataID{}, false, true},
		{"pagemap-shmem-4294967296", DataID{}, false, true},
		{"ghost-file-1A", DataID{}, false, true},
	} {
		id, ok, err := dataOf(tc.name)
		if id != tc.id || ok != tc.ok || (err != nil) != tc.err {
			t.Errorf("%s: %v %v %v", tc.name, id, ok, err)
		}
	}
}

func pipeEntry(id uint32, p []byte) Entry {
	if len(p) == 0 {
		p = nil
	}
	return Entry{File: PipesDataFile, Magic: MagicPipesData, Msg: &pipe_data.PipeDataEntry{PipeId: proto.Uint32(id), Bytes: proto.Uint32(uint32(len(p)))}, Extra: p}
}

func diffSets(want, got *Set) string {
	if d := cmp.Diff(want.Files(), got.Files()); d != "" {
		return "files (-want +got):\n" + d
	}
	for _, f := range want.Files() {
		w, g := want.Entries(f), got.Entries(f)
		if len(w) != len(g) {
			return fmt.Sprintf("%s: %d entries, want %d", f, len(g), len(w))
		}
		for i := range w {
			if w[i].File != g[i].File || w[i].Magic != g[i].Magic || !proto.Equal(w[i].Msg, g[i].Msg) || !bytes.Equal(w[i].Extra, g[i].Extra) {
				return fmt.Sprintf("%s: entry %d differs", f, i)
			}
		}
	}
	return ""
}
