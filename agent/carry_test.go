package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/wire"
)

func openFileObject(key, path string) *wire.OpenObject {
	return &wire.OpenObject{Key: key, Kind: "regular", Path: path, Carry: "path", Size: 4}
}

// resolved is what an entry makes of objects.
func resolved(t *testing.T, entry string, objects ...*wire.OpenObject) ([]*wire.Resolution, []external.Rule, []external.Problem) {
	t.Helper()
	e, err := external.Parse(entry)
	noErr(t, err)
	rules := []external.Rule{{Entry: e, Origin: "--external", Asked: true}}
	choices, bad := match(objects, rules)
	var out []*wire.Resolution
	for _, c := range choices {
		r, err := resolution(objects, c)
		noErr(t, err)
		out = append(out, r)
	}
	return out, rules, bad
}

// TestCarried: what an entry lets travel, and where the destination lets it land.
func TestCarried(t *testing.T) {
	a := openFileObject("file[1:a]", "/srv/app/a")
	cwd := &wire.OpenObject{Key: "file[1:d]", Kind: "directory", Path: "/srv/app", Carry: "path"}
	for _, c := range []struct {
		entry  string
		object *wire.OpenObject
		carry  []engine.Carry
		places []engine.Place
	}{
		{"file[1:a]=carry,limit=1kB", a, []engine.Carry{{Key: a.Key, Limit: 1000}}, []engine.Place{{Path: a.Path, Limit: 1000}}},
		{"path:/srv/app/a=carry:/new/{base},overwrite", a, []engine.Carry{{Key: a.Key, To: "/new/a", Overwrite: true}}, []engine.Place{{Path: "/new/a", Overwrite: true}}},
		{"path:/srv/app/**=carry", a, []engine.Carry{{Key: a.Key}, {Dir: "/srv/app"}}, []engine.Place{{Path: a.Path}, {Path: "/srv/app", Dir: true}}},
		{"path:/srv/app/**=carry", cwd, []engine.Carry{{Key: cwd.Key}, {Dir: "/srv/app"}}, []engine.Place{{Path: cwd.Path, Dir: true}, {Path: "/srv/app", Dir: true}}},
		{"path:/srv/app/**=carry:/new{path}", a, []engine.Carry{{Key: a.Key, To: "/new/srv/app/a"}, {Dir: "/srv/app", To: "/new/srv/app"}},
			[]engine.Place{{Path: "/new/srv/app/a"}, {Path: "/new/srv/app", Dir: true}}},
		{"path:/srv/app/**=carry:/flat/{base}", a, []engine.Carry{{Key: a.Key, To: "/flat/a"}}, []engine.Place{{Path: "/flat/a"}}},
		{"path:/srv/*/**=carry", a, []engine.Carry{{Key: a.Key}}, []engine.Place{{Path: a.Path}}},
		{"path:/**=carry", a, []engine.Carry{{Key: a.Key}}, []engine.Place{{Path: a.Path}}},
	} {
		rs, _, bad := resolved(t, c.entry, c.object)
		if len(bad) > 0 {
			t.Errorf("%s: %v", c.entry, bad)
		}
		if d := cmp.Diff(c.carry, carried(rs)); d != "" {
			t.Errorf("%s: travels (-want +got):\n%s", c.entry, d)
		}
		if d := cmp.Diff(c.places, places(rs)); d != "" {
			t.Errorf("%s: lands (-want +got):\n%s", c.entry, d)
		}
	}
	for _, o := range []*wire.OpenObject{
		openFileObject("file[1:a]", "/srv/app/../../etc/shadow"), openFileObject("file[1:a]", "/srv/app//a"),
		{Key: "file[1:a]", Kind: "fifo", Path: "/srv/app/a", Carry: "path"},
	} {
		if rs, _, bad := resolved(t, "file[1:a]=carry", o); len(bad) != 1 || len(rs) != 0 {
			t.Errorf("%s %s travels: %v, problems %v", o.Kind, o.Path, rs, bad)
		}
	}
}

// TestCarriedMeanwhile: what is opened and closed in a directory that travels is
// no reason to give up, but a file of which nobody knew is.
func TestCarriedMeanwhile(t *testing.T) {
	a, b := openFileObject("file[1:a]", "/srv/app/a"), openFileObject("file[1:b]", "/srv/app/b")
	for _, c := range []struct {
		entry  string
		frozen []*wire.OpenObject
		want   int
	}{
		{"path:/srv/app/**=carry", []*wire.OpenObject{a, b}, 0},
		{"path:/srv/app/**=carry", []*wire.OpenObject{b}, 0},
		{"path:/srv/app/*=carry", []*wire.OpenObject{a}, 0},
		{"path:/srv/app/*=carry", []*wire.OpenObject{a, b}, 1},
	} {
		planned, rules, _ := resolved(t, c.entry, a)
		if got := changes(c.frozen, rules, planned); len(got) != c.want {
			t.Errorf("%s of %v: %v, want %d problems", c.entry, c.frozen, got, c.want)
		}
	}
}

// TestLookCarried: content is read where it may be the same, and nowhere else.
func TestLookCarried(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "a")
	r := &wire.Resolution{Argument: p, Objects: []*wire.OpenObject{openFileObject("file[1:a]", p)}}
	look := func() *wire.FileState {
		s, err := lookCarried(r)
		noErr(t, err)
		return s
	}
	if s := look(); s != nil {
		t.Errorf("nothing is there, but: %v", s)
	}
	at := time.Unix(7, 9)
	for text, known := range map[string]bool{"four": true, "other": false} {
		noErr(t, os.WriteFile(p, []byte(text), 0o600))
		noErr(t, os.Chtimes(p, at, at))
		if s := look(); s.GetSize() != uint64(len(text)) || s.GetMtimeNs() != at.UnixNano() || (s.GetDigest() != "") != known {
			t.Errorf("%q: %v", text, s)
		}
	}
	noErr(t, os.Remove(p))
	noErr(t, os.Mkdir(p, 0o700))
	if s := look(); s != nil {
		t.Errorf("a directory is there, but: %v", s)
	}
}
