package files

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/plan"
)

// FuzzSpot: whatever path an image names, a file lands where the caller allowed.
func FuzzSpot(f *testing.F) {
	for _, s := range []string{"/srv/app/a", "/srv/app", "/srv", "/srv/app/../../etc/shadow", "/srv/apple", "/etc/shadow", "/dev/shm/x", "/dev/shm/../x", "srv/app/a", "/srv/app//a", "/one/file", "/one"} {
		for i := range 8 {
			f.Add(s, i&1 != 0, i&2 != 0, i&4 != 0)
		}
	}
	f.Fuzz(func(t *testing.T, path string, dir, replace, trailing bool) {
		g := &ghostFile{
			msg:   &ghost_file.GhostFileEntry{Mode: proto.Uint32(unix.S_IFREG | 0o600)},
			facts: &image.GhostFacts{Named: &image.NamedFacts{Path: path, Replace: replace}},
		}
		if dir {
			g.msg.Mode = proto.Uint32(unix.S_IFDIR | 0o700)
		}
		places := []plan.Place{{Path: "/srv/app", Dir: true}, {Path: "/one/file"}}
		if trailing {
			places = places[1:]
		}
		r := &Restorer{opts: RestoreOptions{Carry: places}}
		at, err := r.spot(g, path)
		if err != nil {
			return
		}
		if got := filepath.Join(at.base, at.rel, filepath.Base(path)); got != path || strings.Contains(at.rel, "..") {
			t.Fatalf("%q lands at %q (%+v)", path, got, at)
		}
		inside := !trailing && strings.HasPrefix(path, "/srv/app/")
		above := dir && (path == "/one" || !trailing && (path == "/srv" || path == "/srv/app"))
		shm := !dir && !replace && strings.HasPrefix(path, "/dev/shm/")
		if !inside && !above && !shm && (path != "/one/file" || dir) {
			t.Fatalf("%q, a directory: %v, was not agreed on", path, dir)
		}
		if inside && at.base != "/srv/app" {
			t.Fatalf("%q is looked up from %s, from where symlinks lead outside", path, at.base)
		}
	})
}

// TestDigests: pieces make no difference to the digest of what travels, holes none
// to that by which contents are compared.
func TestDigests(t *testing.T) {
	data := bytes.Repeat([]byte("abc"), 5000)
	var whole, parts, moved digest
	whole.add(7, data)
	for i := 0; i < len(data); i += 1000 {
		parts.add(7+uint64(i), data[i:i+1000])
	}
	moved.add(8, data)
	if !bytes.Equal(whole.total(), parts.total()) || bytes.Equal(whole.total(), moved.total()) {
		t.Error("the digest is not one of data and where they are")
	}

	dir := t.TempDir()
	sum := func(name string, write func(f *os.File) error) string {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if err := write(f); err != nil {
			t.Fatal(err)
		}
		s, err := ContentDigest(f)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	const size = 1<<20 + 5
	holes := sum("holes", func(f *os.File) error {
		if _, err := f.WriteAt([]byte("x"), 600_000); err != nil {
			return err
		}
		return f.Truncate(size)
	})
	b := make([]byte, size)
	b[600_000] = 'x'
	zeros := sum("zeros", func(f *os.File) error { _, err := f.Write(b); return err })
	b[600_001] = 'y'
	other := sum("other", func(f *os.File) error { _, err := f.Write(b); return err })
	longer := sum("longer", func(f *os.File) error {
		if _, err := f.WriteAt([]byte("x"), 600_000); err != nil {
			return err
		}
		return f.Truncate(size + 1)
	})
	if holes != zeros || holes == other || holes == longer {
		t.Errorf("holes %s, zeros %s, other %s, longer %s", holes, zeros, other, longer)
	}
}
