package ns

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzUnpack: no archive reaches outside of its directory.
func FuzzUnpack(f *testing.F) {
	dir := f.TempDir()
	for _, name := range []string{"a", "b/c"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			f.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(name), 0o640); err != nil {
			f.Fatal(err)
		}
	}
	if err := os.Symlink("../..", filepath.Join(dir, "up")); err != nil {
		f.Fatal(err)
	}
	d, err := os.Open(dir)
	if err != nil {
		f.Fatal(err)
	}
	good, err := pack(d)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		inner := filepath.Join(outer, "inner")
		if err := os.Mkdir(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = unpack(inner, b)
		des, err := os.ReadDir(outer)
		if err != nil {
			t.Fatal(err)
		}
		if len(des) != 1 {
			t.Errorf("the archive made %d files beside its directory", len(des)-1)
		}
	})
}

// TestPack: what comes out of an archive is what went in.
func TestPack(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "a"), 0o4711|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := pack(d)
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	if err := unpack(to, b); err != nil {
		t.Fatal(err)
	}
	a, err := os.Stat(filepath.Join(to, "a"))
	if err != nil {
		t.Fatal(err)
	}
	hard, err := os.Stat(filepath.Join(to, "hard"))
	if err != nil {
		t.Fatal(err)
	}
	if want := os.ModeSetuid | 0o711; a.Mode() != want || !os.SameFile(a, hard) {
		t.Errorf("mode %v, want %v; same file: %v", a.Mode(), want, os.SameFile(a, hard))
	}
	text, err := os.ReadFile(filepath.Join(to, "a"))
	if err != nil || string(text) != "text" {
		t.Errorf("content %q, %v", text, err)
	}
}
