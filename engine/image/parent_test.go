package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Dumps that build on each other hold what the last one was given, whatever
// changed in between, and write no page twice that stayed.
func TestChain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base, err := os.MkdirTemp("", "chain")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(base) }()
		n := rapid.IntRange(2, 5).Draw(t, "dumps")
		dedup := rapid.Bool().Draw(t, "dedup")
		memory := map[uint64]byte{} // by page number
		for i := range n {
			for range rapid.IntRange(0, 12).Draw(t, "changes") {
				start, count := rapid.Uint64Range(0, 40).Draw(t, "start"), rapid.Uint64Range(1, 12).Draw(t, "count")
				value := byte(rapid.IntRange(0, 3).Draw(t, "value")) // 0: unmapped
				for p := start; p < start+count; p++ {
					if memory[p] = value; value == 0 {
						delete(memory, p)
					}
				}
			}
			s, err := NewDirSink(filepath.Join(base, fmt.Sprint(i)))
			if err != nil {
				t.Fatal(err)
			}
			if i < n-1 {
				s.PreDump()
			}
			if i > 0 {
				if err := s.Build(fmt.Sprintf("../%d", i-1), dedup); err != nil {
					t.Fatal(err)
				}
			}
			put(t, s, memory)
			if skipped, _ := s.Skipped(); i > 0 && len(memory) > 0 && skipped > uint64(len(memory)) {
				t.Fatalf("%d of %d pages skipped", skipped, len(memory))
			}
			if dedup {
				if err := s.Dedup(); err != nil {
					t.Fatal(err)
				}
			}
		}
		src, err := OpenDir(filepath.Join(base, fmt.Sprint(n-1)))
		if err != nil {
			t.Fatal(err)
		}
		pieces, err := drain(src)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range pieces {
			for i := 0; i < len(d.P); i += PageSize {
				p := (d.Off + uint64(i)) / PageSize
				if !bytes.Equal(d.P[i:i+PageSize], fill(PageSize, memory[p])) {
					t.Fatalf("page %d holds %d, want %d", p, d.P[i], memory[p])
				}
				delete(memory, p)
			}
		}
		if len(memory) > 0 {
			t.Fatalf("pages %v are missing", memory)
		}
	})
}

// put dumps one process that has these pages.
func put(t interface {
	Helper()
	Fatal(...any)
}, s *DirSink, memory map[uint64]byte) {
	t.Helper()
	err := errors.Join(s.Facts(testFacts()), s.Entry(testEntries()[0]))
	if !s.partial {
		err = errors.Join(err, s.Entry(Entry{File: MMFile(7), Magic: MagicMM, Msg: testMM(0)}))
	}
	err = errors.Join(err, s.Sealed())
	for p := uint64(0); p < 64 && err == nil; {
		var b []byte
		at := p
		for ; memory[p] != 0; p++ {
			b = append(b, fill(PageSize, memory[p])...)
		}
		if len(b) > 0 {
			err = s.Data(DataID{Memory, 7}, at*PageSize, b)
			continue
		}
		p++
	}
	if err := errors.Join(err, s.Commit()); err != nil {
		t.Fatal(err)
	}
}

// Links and lists that lie are refused before anything is read into a tree.
func TestHostileChain(t *testing.T) {
	full := map[uint64]byte{1: 1, 2: 2, 3: 3}
	for _, tc := range []struct {
		name string
		lie  func(t *testing.T, base string) // 2 builds on 1, which builds on 0
		want string
	}{
		{"nothing", func(*testing.T, string) {}, ""},
		{"circle", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), "../2") }, "circle"},
		{"itself", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), ".") }, "circle"},
		{"absolute", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), base+"/1") }, "only a relative link"},
		{"elsewhere", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), "../..") }, "must be in a directory in"},
		{"elsewhere by a second link", func(t *testing.T, base string) {
			if err := os.Symlink("/etc", filepath.Join(base, "etc")); err != nil {
				t.Fatal(err)
			}
			link(t, filepath.Join(base, "0"), "../etc")
		}, "must be in a directory in"},
		{"nowhere", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), "../9") }, "no such file"},
		{"a file", func(t *testing.T, base string) { link(t, filepath.Join(base, "0"), "inventory.img") }, "must be in a directory in"},
		{"gone", func(t *testing.T, base string) { remove(t, filepath.Join(base, "1", "parent")) }, "does not have them"},
		{"pages gone", func(t *testing.T, base string) { remove(t, filepath.Join(base, "0", "pages-1.img")) }, "no such file"},
		{"pages changed", func(t *testing.T, base string) {
			b := bytes.Repeat(fill(PageSize, 9), 3)
			if err := os.WriteFile(filepath.Join(base, "0", "pages-1.img"), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "checksum"},
		{"too few pages", func(t *testing.T, base string) {
			remove(t, filepath.Join(base, "0", FactsFile))
			if err := os.Truncate(filepath.Join(base, "0", "pages-1.img"), 2*PageSize); err != nil {
				t.Fatal(err)
			}
		}, "more pages than pages-1.img has"},
		{"list gone", func(t *testing.T, base string) {
			remove(t, filepath.Join(base, "0", FactsFile))
			remove(t, filepath.Join(base, "0", "pagemap-7.img"))
		}, "does not have them"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			base := filepath.Join(t.TempDir(), "images")
			if err := os.Mkdir(base, 0o700); err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				s, err := NewDirSink(filepath.Join(base, fmt.Sprint(i)))
				if err != nil {
					t.Fatal(err)
				}
				if i > 0 {
					if err := s.Build(fmt.Sprintf("../%d", i-1), false); err != nil {
						t.Fatal(err)
					}
				}
				put(t, s, full)
				if n, _ := s.Skipped(); i > 0 && n != 3 {
					t.Fatalf("dump %d skipped %d pages", i, n)
				}
			}
			tc.lie(t, base)
			src, err := OpenDir(filepath.Join(base, "2"))
			if err == nil {
				_, err = drain(src)
			}
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func link(t *testing.T, dir, to string) {
	t.Helper()
	if err := os.Symlink(to, filepath.Join(dir, ParentLink)); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
