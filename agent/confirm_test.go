package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/transport"
	"godwit/wire"
)

// TestChangedBetween: a program that opens something else after the plan was made
// is not moved with what the destination holds for the first; it runs on.
func TestChangedBetween(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	r := newRig(t, nil)
	src := engine.New(r.src.log)
	for _, c := range []struct {
		name, entry, change, want string
	}{
		{"descriptor", "fd:PID:5=path:DIR/there", `exec 5<b`, "came in place of regular DIR/a, for which there is --external fd:PID:5=path"},
		{"another kind", "fd:PID:5=path:DIR/there", `exec 5</dev/null`, "fd:PID:5=path:DIR/there leads to this no longer"},
		{"closed", "fd:PID:5=path:DIR/there", `exec 5<&-`, "nothing that the tree holds matches fd:PID:5"},
		{"opened", "path:DIR/*=path:DIR/there", `exec 6<b`, "this was opened, for which there is --external path:DIR/*"},
		{"made anew under its name", "file[KEY]=path:DIR/there", `exec 5<&- 6<&-; rm a; : >a; exec 5<a`, "since the plan was made"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.fresh(t)
			dir := t.TempDir()
			for _, name := range []string{"a", "b", "there"} {
				noErr(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600))
			}
			sh := exec.Command("sh", "-c", `exec 5<a; : >ready; while ! [ -e go ]; do sleep 0.02; done; `+c.change+`; : >changed; while :; do sleep 0.05; echo x >>beat; done`)
			sh.Dir = dir
			noErr(t, sh.Start())
			defer func() { _, _ = sh.Process.Kill(), sh.Wait() }()
			exists := func(name string) func() bool {
				return func() bool { _, err := os.Stat(filepath.Join(dir, name)); return !errors.Is(err, fs.ErrNotExist) }
			}
			r.until("the program", exists("ready"))
			r.src.cfg.Engine = src
			r.pid = int32(sh.Process.Pid)

			var st unix.Stat_t
			noErr(t, unix.Stat(filepath.Join(dir, "a"), &st))
			key := ""
			pre, err := transport.Call[*wire.PreflightRequest, *wire.PreflightReply](t.Context(), r.nc, "alpha", "preflight",
				&wire.PreflightRequest{Protocol: wire.Version, Id: "x", Pid: r.pid, Destination: "beta", Discover: true})
			noErr(t, err)
			for _, o := range pre.Objects {
				if o.Ino == st.Ino && strings.HasSuffix(o.Path, "/a") {
					key = strings.TrimSuffix(strings.TrimPrefix(o.Key, "file["), "]")
				}
			}
			fill := strings.NewReplacer("PID", fmt.Sprint(r.pid), "DIR", dir, "KEY", key)
			entry := fill.Replace(c.entry)
			res, err := transport.Call[*wire.ResolveRequest, *wire.ResolveReply](t.Context(), r.nc, "beta", "resolve",
				&wire.ResolveRequest{Protocol: wire.Version, Id: "x", Source: "alpha", Objects: pre.Objects, Options: &wire.MigrateOptions{External: []string{entry}}})
			noErr(t, err)
			if len(res.Resolutions) != 1 || res.Resolutions[0].Resolver != external.Path || len(res.Problems) > 0 {
				t.Fatalf("resolved: %v, problems %v", res.Resolutions, res.Problems)
			}
			declared := &wire.MigrateOptions{External: []string{res.Resolutions[0].Key}}
			pre, err = transport.Call[*wire.PreflightRequest, *wire.PreflightReply](t.Context(), r.nc, "alpha", "preflight",
				&wire.PreflightRequest{Protocol: wire.Version, Id: "x", Pid: r.pid, Destination: "beta", Options: declared})
			noErr(t, err)
			id := r.create()
			prep, err := transport.Call[*wire.PrepareRequest, *wire.PrepareReply](t.Context(), r.nc, "beta", "prepare",
				&wire.PrepareRequest{Protocol: wire.Version, Id: id, Source: "alpha", Requirements: pre.Requirements, Options: declared, Resolutions: res.Resolutions})
			noErr(t, err)

			noErr(t, os.WriteFile(filepath.Join(dir, "go"), nil, 0o600))
			r.until("the change", exists("changed"))
			_, err = transport.Call[*wire.StartRequest, *wire.StartReply](t.Context(), r.nc, "alpha", "start", &wire.StartRequest{
				Protocol: wire.Version, Id: id, Pid: r.pid, Destination: "beta", Stream: prep.Stream, Options: declared, Resolutions: res.Resolutions, Entries: res.Entries,
			})
			noErr(t, err)
			rec := r.finished(id)
			said := rec.Error.Failure()
			if want := fill.Replace(c.want); rec.State != wire.State_STATE_ABORTED || said == nil || !strings.Contains(said.Error(), want) {
				t.Errorf("record is %s, error %v, want %q", rec.State, said, want)
			}
			before, _ := os.ReadFile(filepath.Join(dir, "beat"))
			r.until("the program to run on", func() bool {
				now, _ := os.ReadFile(filepath.Join(dir, "beat"))
				return len(now) > len(before)+2
			})
		})
	}
}

// TestInodeUsedAgain: a key may lead to another file that got the inode number.
func TestInodeUsedAgain(t *testing.T) {
	e, err := external.Parse("file[1:2]=path:/x")
	noErr(t, err)
	was := &wire.OpenObject{Key: "file[1:2]", Kind: "regular", Path: "/a", Mode: unix.S_IFREG | 0o600, BirthNs: 5, Carry: "path"}
	planned := []*wire.Resolution{{Key: was.Key, Resolver: e.Resolver, Entry: e.String(), Objects: []*wire.OpenObject{was}}}
	for _, c := range []struct {
		name string
		edit func(*wire.OpenObject)
		want bool
	}{
		{"the same", func(*wire.OpenObject) {}, false},
		{"renamed and grown", func(o *wire.OpenObject) { o.Path, o.Size = "/b", 9 }, false},
		{"birth not known", func(o *wire.OpenObject) { o.BirthNs = 0 }, false},
		{"another birth", func(o *wire.OpenObject) { o.BirthNs = 6 }, true},
		{"another kind", func(o *wire.OpenObject) { o.Mode = unix.S_IFIFO | 0o600 }, true},
	} {
		is := proto.CloneOf(was)
		c.edit(is)
		got := changes([]*wire.OpenObject{is}, []external.Rule{{Entry: e, Origin: "--external", Asked: true}}, planned)
		if (len(got) > 0) != c.want {
			t.Errorf("%s: %v, want a problem: %v", c.name, got, c.want)
		}
	}
}
