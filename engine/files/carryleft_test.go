package files

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// listed is what is in a directory: content by name, of a directory its slash.
func listed(t *testing.T, dir string) map[string]string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range es {
		if e.IsDir() {
			out[e.Name()] = "/"
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

// TestWaitingLeft: wherever an agent died that placed files, either end of its
// migration can be reached, and no file of others is touched.
func TestWaitingLeft(t *testing.T) {
	// made is what waits, with two that replace, one that is new and one that is kept.
	made := func(t *testing.T) (dir string, c *Carried, ws []Waiting) {
		dir = t.TempDir()
		c = &Carried{}
		for _, n := range []string{"a", "b", "new", "same"} {
			x := &carriedFile{at: spot{base: dir}, name: n, temp: ".godwit-m-" + n, typ: unix.S_IFREG, replace: true, keep: n == "same"}
			err := os.WriteFile(filepath.Join(dir, x.temp), []byte("ours"), 0o600)
			if err == nil && n != "new" {
				err = os.WriteFile(filepath.Join(dir, n), []byte("theirs"), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			c.all = append(c.all, x)
		}
		ws, err := c.Waiting()
		if err != nil || len(ws) != 4 {
			t.Fatal(ws, err)
		}
		return dir, c, ws
	}
	before := map[string]string{"a": "theirs", "b": "theirs", "same": "theirs"}
	after := map[string]string{"a": "ours", "b": "ours", "new": "ours", "same": "theirs"}
	for placed := range 5 { // files before the death; 4: all, and more
		dir, c, ws := made(t)
		for _, x := range c.all[:min(placed, 3)] {
			if err := x.in(x.place); err != nil {
				t.Fatal(err)
			}
		}
		if placed == 4 { // the agent had removed one of what was replaced
			if err := os.Remove(filepath.Join(dir, ".godwit-m-a")); err != nil {
				t.Fatal(err)
			}
			if err := EndWaiting(ws); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(after, listed(t, dir)); d != "" {
				t.Errorf("the tree runs (-want +got):\n%s", d)
			}
			continue
		}
		for range 2 { // it may die again
			if err := UndoWaiting(ws); err != nil {
				t.Fatal(err)
			}
		}
		if d := cmp.Diff(before, listed(t, dir)); d != "" {
			t.Errorf("%d were placed (-want +got):\n%s", placed, d)
		}
	}

	// Somebody has put another file into the place since.
	dir, c, ws := made(t)
	if err := c.Place(); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, filepath.Join(dir, "new")); err != nil {
		t.Fatal(err)
	}
	if err := UndoWaiting(ws); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"a": "theirs", "b": "theirs", "same": "theirs", "new": "another"}
	if d := cmp.Diff(want, listed(t, dir)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestRemoveLeft: what has the mark goes, and directories that are empty.
func TestRemoveLeft(t *testing.T) {
	dir := t.TempDir()
	place := filepath.Join(dir, "srv", "app")
	mark := MarkOf("m")
	for _, p := range []string{"srv/app/sub/deep/", "srv/app/full/"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{TempName(mark), "srv/" + TempName(mark), "srv/app/sub/deep/" + TempName(mark), "srv/app/full/theirs", "srv/" + TempName(MarkOf("n")), "srv/app/.godwit-" + mark} {
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/", filepath.Join(place, "root")); err != nil { // is not followed
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(place, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := RemoveMarked(mark, []plan.Place{{Path: place, Dir: true}, {Path: filepath.Join(dir, "not", "there")}}); err != nil {
		t.Fatal(err)
	}
	if err := RemoveMade([]string{filepath.Join(place, "sub"), filepath.Join(place, "sub", "deep"), filepath.Join(place, "fifo"), filepath.Join(place, "full"), filepath.Join(place, "full", "theirs"), filepath.Join(dir, "not", "there")}); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		got = append(got, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 8 { // ., srv, the file of another migration, app, .godwit-MARK, full, theirs, root
		t.Errorf("left: %q", got)
	}
}
