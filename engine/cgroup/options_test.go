package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
)

const props = `"cpu":
 - "strategy": "merge"
 - "properties": ["cpu.rt_period_us", "cpu.shares"]
# of another one
"memory":
 - "strategy": "replace"
 - "properties": ["memory.high"]
`

func TestParseProps(t *testing.T) {
	got, err := ParseProps(props)
	if err != nil {
		t.Fatal(err)
	}
	want := []Spec{{Controller: "cpu", Names: []string{"cpu.rt_period_us", "cpu.shares"}}, {Controller: "memory", Replace: true, Names: []string{"memory.high"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for text, want := range map[string]string{
		"cpu:":                                     "line 1",
		`- "strategy": "merge"`:                    "before the name of a controller",
		`"cpu":` + "\n- \"strategy\": \"x\"":       "line 2: the strategy",
		`"cpu":` + "\n- \"properties\": \"cpu.x\"": "not of the form",
		`"cpu":` + "\n- \"properties\": [\"../../etc/passwd\"]": "can be carried",
		`"cpu":` + "\n- \"properties\": [\"cgroup.procs\"]":     "can be carried",
		`"cpu":` + "\n- \"odd\": [\"cpu.x\"]":                   "neither strategy nor properties",
		`"cpu":`:                                                "has no properties",
		`"a/b":`:                                                "no name of a controller",
		strings.Repeat(" ", maxProps+1):                         "too long",
	} {
		if _, err := ParseProps(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
}

func FuzzProps(f *testing.F) {
	f.Add(props)
	f.Add("\"c\":\n - \"properties\": [\"\"]")
	f.Fuzz(func(t *testing.T, s string) {
		list, err := ParseProps(s)
		for _, p := range list {
			for _, n := range p.Names {
				if err == nil && (strings.ContainsAny(n, "/\x00") || strings.Contains(n, "..")) {
					t.Errorf("%q leads elsewhere", n)
				}
			}
		}
	})
}

func TestDumpOptions(t *testing.T) {
	list, err := ParseProps(props)
	if err != nil {
		t.Fatal(err)
	}
	o := DumpOptions{Props: list, Controllers: []string{"cpu", "name=systemd"}, Roots: map[string]string{"memory": "/a", "*": "/"}}
	for name, want := range map[string]bool{"cpu": true, "cpu,cpuacct": true, "memory": false, "": false, "name=systemd": true} {
		if o.dumps(name) != want {
			t.Errorf("%q is recorded: %v", name, !want)
		}
	}
	if !(DumpOptions{}).dumps("") {
		t.Error("without a choice not all are recorded")
	}
	cpu, mem, v2, pids := o.settings("cpu,cpuacct"), o.settings("memory"), o.settings(""), o.settings("pids")
	for _, tt := range []struct {
		in   []string
		name string
		want bool
	}{
		{cpu, "cpu.rt_period_us", true}, {cpu, "cpu.weight", true}, {cpu, "memory.max", true},
		{mem, "cpu.rt_period_us", false}, {mem, "memory.high", true}, {mem, "memory.max", false},
		{v2, "cpu.rt_period_us", true}, {v2, "memory.max", false}, {pids, "cpu.rt_period_us", false}, {pids, "memory.max", true},
	} {
		if slices.Contains(tt.in, tt.name) != tt.want {
			t.Errorf("%s is read: %v", tt.name, !tt.want)
		}
	}
	for _, tt := range []struct{ name, at, want string }{
		{"memory", "/a/b", "/a"}, {"memory", "/a", "/a"}, {"memory", "/ab", ""}, {"cpu", "/x/y", "/"},
	} {
		if got, err := o.top(tt.name, tt.at); got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("the top of %s in %s is %q (%v)", tt.at, tt.name, got, err)
		}
	}
}

// TestPlaceOfTop: what takes the place of the topmost group that was recorded has
// those below it at their places.
func TestPlaceOfTop(t *testing.T) {
	r := &Restorer{root: Set{"memory": "/a/b"}, o: Options{Roots: map[string]string{"*": "/n"}},
		dirs: map[string][]*cgroup.CgroupDirEntry{"memory": {{DirName: proto.String("a")}}}}
	for group, want := range map[string]string{"/a": "/n", "/a/b": "/n/b", "/a/b/c": "/n/b/c", "/x": "/x"} {
		if got := r.place("memory", group); got != want {
			t.Errorf("%s is at %s, want %s", group, got, want)
		}
	}
}

func TestYard(t *testing.T) {
	yard := t.TempDir()
	for _, d := range []string{"cpu,cpuacct", "systemd", "unified"} {
		if err := os.Mkdir(filepath.Join(yard, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"cpu,cpuacct": "cpu,cpuacct", "name=systemd": "systemd", "": "unified", "memory": "absent"} {
		f, err := open(yard, name)
		if want == "absent" {
			if err == nil || !strings.Contains(err.Error(), `"memory"`) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if f.Name() != filepath.Join(yard, want) {
			t.Errorf("%q is at %s", name, f.Name())
		}
		_ = f.Close()
	}
}
