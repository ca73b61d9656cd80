package files

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
)

// earlyRig sends files of one directory to another, as two hosts would.
type earlyRig struct {
	t        *testing.T
	from, to string
	copy     *EarlyCopy
	land     *EarlyFiles
	bytes    uint64 // sent in the last look
	cuts     int
}

func newEarlyRig(t *testing.T, limit uint64) *earlyRig {
	t.Helper()
	r := &earlyRig{t: t, from: t.TempDir(), to: t.TempDir(), copy: NewEarlyCopy()}
	var err error
	if r.land, err = NewEarlyFiles([]plan.Place{{Path: r.to, Dir: true, Limit: limit}}, "test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.land.Remove(); err != nil {
			t.Error(err)
		}
		if es, err := os.ReadDir(r.to); err != nil || len(es) > 0 {
			t.Errorf("left over: %v (%v)", es, err)
		}
	})
	return r
}

func (r *earlyRig) Facts(*image.Facts) error      { return nil }
func (r *earlyRig) Entry(image.Entry) error       { return nil }
func (r *earlyRig) Sealed() error                 { return nil }
func (r *earlyRig) Outline(*image.Outline) error  { return nil }
func (r *earlyRig) File(f *image.EarlyFile) error { return r.land.Announce(f) }
func (r *earlyRig) Data(id image.DataID, off uint64, b []byte) error {
	switch id.Kind {
	case image.Cut:
		r.cuts++
	case image.Content:
		r.bytes += uint64(len(b))
	}
	return r.land.Data(id, off, b)
}

// look sends what changed of the file a and compares both sides.
func (r *earlyRig) look(since time.Time) {
	r.t.Helper()
	r.bytes, r.cuts = 0, 0
	path := filepath.Join(r.from, "a")
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		r.t.Fatal(err)
	}
	n, err := r.copy.Look(context.Background(), []CarriedFile{{from: path, to: filepath.Join(r.to, "a"), ino: inode(&st)}}, since, r)
	if err != nil || n != r.bytes {
		r.t.Fatalf("%d bytes, %d of them seen: %v", n, r.bytes, err)
	}
	r.compare()
}

// compare wants the same content at both sides, as far as the file reaches, and no more.
func (r *earlyRig) compare() {
	r.t.Helper()
	const most = 16 << 20 // of a file with a hole that nobody wants to read
	read := func(path string) []byte {
		f, err := os.Open(path)
		if err != nil {
			r.t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		b, err := io.ReadAll(io.LimitReader(f, most))
		if err != nil {
			r.t.Fatal(err)
		}
		return b
	}
	want, got := read(filepath.Join(r.from, "a")), read(filepath.Join(r.to, r.land.all[1].temp))
	// What is missing at the end, or too much, is zeros: the size is set in the end.
	if n := len(want) - len(got); n > 0 {
		got = append(got, make([]byte, n)...)
	}
	if !bytes.Equal(got[:len(want)], want) || !zero(got[len(want):]) {
		r.t.Fatalf("%d bytes became %d others", len(want), len(got))
	}
}

func (r *earlyRig) change(do func(f *os.File) error) {
	r.t.Helper()
	f, err := os.OpenFile(filepath.Join(r.from, "a"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = errors.Join(do(f), f.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// noise is content that is nowhere zero.
func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7+i>>8*13) ^ seed | 1
	}
	return b
}

// TestEarlyDifference: after every change only the blocks that differ are sent again.
func TestEarlyDifference(t *testing.T) {
	const mb = 1 << 20
	r := newEarlyRig(t, 1<<30)
	write := func(at int64, b []byte) func(*os.File) error {
		return func(f *os.File) error { _, err := f.WriteAt(b, at); return err }
	}
	for _, x := range []struct {
		name   string
		change func(*os.File) error
		bytes  uint64
		cuts   int
	}{
		{"made", write(0, noise(5*mb+100, 2)), 5*mb + 100, 0},
		{"not changed", func(*os.File) error { return nil }, 0, 0},
		{"touched", func(f *os.File) error { now := time.Now(); return os.Chtimes(f.Name(), now, now) }, 0, 0},
		{"written in place", write(2*mb+77, []byte("other")), mb, 1},
		{"appended", write(5*mb+100, noise(1000, 4)), 1100, 1},
		{"appended by blocks", write(5*mb+1100, noise(2*mb, 4)), 2*mb + 1100, 1},
		{"truncated in a block", func(f *os.File) error { return f.Truncate(6*mb + 5) }, 5, 2},
		{"truncated and grown again with zeros", func(f *os.File) error { return errors.Join(f.Truncate(3*mb), f.Truncate(7*mb)) }, 0, 1},
		{"a hole", func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, mb+8192, 4096)
		}, mb - 4096, 1},
		{"a block of zeros", write(0, make([]byte, mb)), 0, 1},
		{"far behind", write(9<<30, []byte("deep")), 4, 0},
		{"emptied", func(f *os.File) error { return f.Truncate(0) }, 0, 1},
	} {
		r.change(x.change)
		r.look(time.Now())
		if x.name == "far behind" {
			b := make([]byte, 4)
			f, err := os.Open(filepath.Join(r.to, r.land.all[1].temp))
			if err == nil {
				_, err = f.ReadAt(b, 9<<30)
				_ = f.Close()
			}
			if err != nil || string(b) != "deep" {
				t.Errorf("%s: %q (%v)", x.name, b, err)
			}
		}
		if r.bytes != x.bytes || r.cuts != x.cuts {
			t.Errorf("%s: %d bytes and %d cuts, want %d and %d", x.name, r.bytes, r.cuts, x.bytes, x.cuts)
		}
	}
	if r.land.blocks != 0 || r.land.spent[&r.land.places[0]] != 0 {
		t.Errorf("of an empty file %d blocks and %d bytes are counted", r.land.blocks, r.land.spent[&r.land.places[0]])
	}
}

// TestEarlyRandom: whatever is done to a file, the other side gets it, and counts it right.
func TestEarlyRandom(t *testing.T) {
	r := newEarlyRig(t, 1<<30)
	rnd := rand.New(rand.NewPCG(1, 2))
	r.change(func(f *os.File) error { return f.Truncate(1) })
	for range 60 {
		r.change(func(f *os.File) error {
			at := rnd.Int64N(6 << 20)
			switch rnd.IntN(4) {
			case 0:
				return f.Truncate(at)
			case 1:
				return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, 1+rnd.Int64N(2<<20))
			}
			_, err := f.WriteAt(noise(1+rnd.IntN(100_000), byte(rnd.IntN(256))), at)
			return err
		})
		r.look(time.Now())
	}
	var sum uint64
	for _, n := range r.land.all[1].blocks {
		sum += n
	}
	if got := r.land.spent[&r.land.places[0]]; got != sum || r.land.blocks != uint64(len(r.land.all[1].blocks)) || len(r.land.all[1].blocks) != len(r.copy.files[filepath.Join(r.to, "a")].blocks) {
		t.Errorf("%d bytes in %d blocks are counted, want %d in %d", got, r.land.blocks, sum, len(r.land.all[1].blocks))
	}
}

// lateSink counts what a dump of the frozen tree gives.
type lateSink struct {
	image.Sink
	land         *EarlyFiles
	bytes, calls int
}

func (s *lateSink) Data(id image.DataID, off uint64, b []byte) error {
	s.calls++
	if id.Kind == image.Ghost {
		s.bytes += len(b)
		id.Kind = image.Content
	}
	return s.land.Data(id, off, b)
}

// TestEarlyTrust: a file is not read again in the freeze if nothing can have changed,
// and is read if its times may not tell.
func TestEarlyTrust(t *testing.T) {
	r := newEarlyRig(t, 1<<30)
	path := filepath.Join(r.from, "a")
	r.change(func(f *os.File) error { _, err := f.Write(noise(3<<20, 8)); return err })
	late := func(mapped bool) (reads bool, sink *lateSink) {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		// A file that cannot be opened fails to be read.
		x := &Data{ID: image.DataID{Kind: image.Ghost, ID: 1}, Size: st.Size, path: "/nowhere", early: r.copy.files[filepath.Join(r.to, "a")], version: versionOf(&st), mapped: mapped, buf: r.copy.buffer()}
		_, _, err = x.Difference(context.Background(), &lateSink{land: r.land})
		reads = err != nil
		x.path, x.ino = path, inode(&st)
		sink = &lateSink{land: r.land}
		if _, ok, err := x.Difference(context.Background(), sink); err != nil || !ok {
			t.Fatal(ok, err)
		}
		return reads, sink
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(r.from, &fs); err != nil {
		t.Fatal(err)
	}
	kept := noting
	t.Cleanup(func() { noting = kept })
	noting = []int64{int64(fs.Type)} // the rest of the rule is what is tested
	trusted := func(want bool, mapped bool, why string) {
		t.Helper()
		reads, sink := late(mapped)
		if reads == want || sink.calls != 0 {
			t.Errorf("%s: trusted %v, want %v; %d calls", why, !reads, want, sink.calls)
		}
	}
	r.look(time.Now())
	trusted(false, false, "written within a tick of the look")
	old := r.copy.files[filepath.Join(r.to, "a")]
	old.seen = version{}
	r.look(time.Now().Add(time.Minute))
	trusted(true, false, "written long before")
	trusted(false, true, "mapped in the freeze")

	// Another content of the same size, with the old time of modification.
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	r.change(func(f *os.File) error {
		_, err := f.WriteAt([]byte("sly"), 1<<20)
		return errors.Join(err, os.Chtimes(path, st.ModTime(), st.ModTime()))
	})
	if reads, sink := late(false); !reads || sink.bytes != 1<<20 {
		t.Errorf("read %v, sent %d bytes of a file with a block that differs", reads, sink.bytes)
	}
	noting = nil
	old.seen = version{}
	r.look(time.Now().Add(time.Minute))
	trusted(false, false, "a file system that does not note all writes")
}

// TestEarlyLimits: what comes before the images goes where it may, and is no more
// than that.
func TestEarlyLimits(t *testing.T) {
	r := newEarlyRig(t, 1<<20)
	content := image.DataID{Kind: image.Content, ID: 1}
	if err := r.land.Announce(&image.EarlyFile{ID: 1, Path: filepath.Join(r.to, "not", "there", "a"), Size: 5}); err != nil {
		t.Fatal(err)
	}
	if es, _ := os.ReadDir(r.to); len(es) != 1 || !strings.HasPrefix(es[0].Name(), ".godwit-test-") {
		t.Errorf("a file that waits for its directory: %v", es)
	}
	for _, x := range []struct {
		name string
		do   func() error
		want string
	}{
		{"elsewhere", func() error { return r.land.Announce(&image.EarlyFile{ID: 2, Path: "/etc/shadow"}) }, "not among the files"},
		{"not clean", func() error { return r.land.Announce(&image.EarlyFile{ID: 2, Path: r.to + "/../x"}) }, "malformed"},
		{"twice", func() error { return r.land.Announce(&image.EarlyFile{ID: 1, Path: filepath.Join(r.to, "b")}) }, "twice"},
		{"unknown", func() error { return r.land.Data(image.DataID{Kind: image.Content, ID: 7}, 0, []byte("x")) }, "not announced"},
		{"too much", func() error { return r.land.Data(content, 0, make([]byte, 1<<20+1)) }, "more than the limit"},
		{"far away", func() error { return r.land.Data(content, ^uint64(0)-1, []byte("xxx")) }, "malformed"},
		{"no ranges", func() error { return r.land.Data(image.DataID{Kind: image.Cut, ID: 1}, 0, []byte("x")) }, "malformed"},
		{"no blocks", func() error {
			return r.land.Data(image.DataID{Kind: image.Cut, ID: 1}, 0, image.AppendRange(nil, image.Range{Start: 4096, End: 8192}))
		}, "no blocks"},
		{"another digest", func() error { return r.land.Data(image.DataID{Kind: image.Digest, ID: 1}, 0, make([]byte, 32)) }, "another content"},
		{"claimed by another path", func() error { _, err := r.land.claim(1, filepath.Join(r.to, "b")); return err }, "did not come"},
	} {
		if err := x.do(); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
	if err := os.Symlink("/etc", filepath.Join(r.to, "link")); err != nil {
		t.Fatal(err)
	}
	if err := r.land.Announce(&image.EarlyFile{ID: 3, Path: filepath.Join(r.to, "link", "x")}); err == nil {
		t.Error("a file lands through a symlink")
	}
	if err := os.Remove(filepath.Join(r.to, "link")); err != nil {
		t.Fatal(err)
	}
}

// TestEarlyNewer: a newer file with another content ends it before the freeze.
func TestEarlyNewer(t *testing.T) {
	r := newEarlyRig(t, 1<<20)
	there := filepath.Join(r.to, "a")
	for _, x := range []struct {
		content string
		age     time.Duration
		over    bool
		fails   bool
	}{{"same", -time.Hour, false, false}, {"else", -time.Hour, false, true}, {"else", -time.Hour, true, false}, {"else", time.Hour, false, false}, {"longer", -time.Hour, false, true}} {
		r.land.places[0].Overwrite = x.over
		if err := os.WriteFile(there, []byte(x.content), 0o600); err != nil {
			t.Fatal(err)
		}
		var d digest
		d.add(0, []byte("same"))
		id := uint32(len(r.land.all) + 1)
		err := r.land.Announce(&image.EarlyFile{ID: id, Path: there, Size: 4, MTimeNS: time.Now().Add(x.age).UnixNano()})
		if err == nil {
			err = r.land.Data(image.DataID{Kind: image.Content, ID: id}, 0, []byte("same"))
		}
		if err == nil {
			err = r.land.Data(image.DataID{Kind: image.Digest, ID: id}, 0, d.total())
		}
		if errors.Is(err, errNewer) != x.fails || err != nil && !x.fails {
			t.Errorf("%+v: %v", x, err)
		}
	}
	if err := os.Remove(there); err != nil {
		t.Fatal(err)
	}
}

// FuzzEarlyFiles: whatever comes before the images lands below its place, within the
// limit, and goes again.
func FuzzEarlyFiles(f *testing.F) {
	f.Add(byte(0), uint32(1), uint64(0), []byte("x"), "a")
	f.Add(byte(1), uint32(1), uint64(1<<20), []byte("x"), "d/../b")
	f.Add(byte(2), uint32(1), uint64(0), image.AppendRange(nil, image.Range{End: 1 << 20}), "d/b")
	f.Add(byte(3), uint32(2), uint64(1<<62), make([]byte, 32), "")
	f.Fuzz(func(t *testing.T, kind byte, id uint32, off uint64, b []byte, name string) {
		dir := t.TempDir()
		to := filepath.Join(dir, "to")
		e, err := NewEarlyFiles([]plan.Place{{Path: to, Dir: true, Limit: 8 << 10}}, "m")
		if err != nil {
			t.Fatal(err)
		}
		_ = os.Mkdir(to, 0o700)
		_ = e.Announce(&image.EarlyFile{ID: 1, Path: to + "/known"})
		_ = e.Announce(&image.EarlyFile{ID: id, Path: to + "/" + name, Size: off})
		k := []image.DataKind{image.Content, image.Cut, image.Digest}[int(kind)%3]
		for range 3 {
			_ = e.Data(image.DataID{Kind: k, ID: id}, off, b)
			_ = e.Data(image.DataID{Kind: image.Content, ID: 1}, off, b)
		}
		if got := e.spent[&e.places[0]]; got > 2*(8<<10)+uint64(len(b)) {
			t.Errorf("%d bytes were taken", got)
		}
		if err := e.Remove(); err != nil {
			t.Fatal(err)
		}
		for _, d := range []string{dir, to} {
			es, err := os.ReadDir(d)
			if err != nil || slices.ContainsFunc(es, func(x os.DirEntry) bool { return x.Name() != "to" }) {
				t.Errorf("left over: %v (%v)", es, err)
			}
		}
	})
}
