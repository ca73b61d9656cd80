package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

// noting is a script that notes its environment in file and fails at a stage.
func noting(file, failAt string) string {
	return `echo "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR $CRTOOLS_INIT_PID" >> ` + file + `; [ "$CRTOOLS_SCRIPT_ACTION" != "` + failAt + `" ]`
}

func TestActionScripts(t *testing.T) {
	root := strconv.Itoa(1 << 22)
	tests := []struct {
		name        string
		failAt      string
		stages      string // of dump, then of restore
		source      string
		images      bool
		landed      string
		want, want2 string // errors of dump and restore
	}{
		{name: "all", stages: "pre-dump . DIR; post-dump 12 DIR; pre-restore . DIR; post-restore R DIR; pre-resume R DIR; post-resume R DIR",
			source: "killed", images: true, landed: "running"},
		{name: "pre-dump fails", failAt: "pre-dump", stages: "pre-dump . DIR", source: "running", want: "pre-dump: exit status 1"},
		{name: "post-dump fails", failAt: "post-dump", stages: "pre-dump . DIR; post-dump 12 DIR", source: "running", want: "which runs on: action script"},
		{name: "pre-restore fails", failAt: "pre-restore", stages: "pre-dump . DIR; post-dump 12 DIR; pre-restore . DIR",
			source: "killed", images: true, want2: "pre-restore: exit status 1"},
		{name: "post-restore fails", failAt: "post-restore", stages: "pre-dump . DIR; post-dump 12 DIR; pre-restore . DIR; post-restore R DIR",
			source: "killed", images: true, landed: "discarded", want2: "post-restore: exit status 1"},
		{name: "pre-resume fails", failAt: "pre-resume", stages: "pre-dump . DIR; post-dump 12 DIR; pre-restore . DIR; post-restore R DIR; pre-resume R DIR",
			source: "killed", images: true, landed: "discarded", want2: "pre-resume: exit status 1"},
		{name: "post-resume fails", failAt: "post-resume", stages: "pre-dump . DIR; post-dump 12 DIR; pre-restore . DIR; post-restore R DIR; pre-resume R DIR; post-resume R DIR",
			source: "killed", images: true, landed: "running"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			note := filepath.Join(t.TempDir(), "note")
			dir := t.TempDir()
			w := newWorld()
			d := dumpFlags{tree: 12}
			d.imagesDir, d.scripts = dir, []string{noting(note, tt.failAt)}
			err := runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, d, hclog.NewNullLogger())
			check := func(err error, want string) {
				if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q", err, want)
				}
			}
			check(err, tt.want)
			if w.source != tt.source {
				t.Errorf("the source is %s, want %s", w.source, tt.source)
			}
			if names, _ := filepath.Glob(dir + "/*.img"); (len(names) > 0) != tt.images {
				t.Errorf("images: %v", names)
			}
			if tt.images {
				f := restoreFlags{detached: true, pidfile: "pid"}
				f.imagesDir, f.workDir, f.scripts = dir, t.TempDir(), d.scripts
				check(runRestore(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger()), tt.want2)
				if w.landed != tt.landed {
					t.Errorf("the tree is %q, want %q", w.landed, tt.landed)
				}
				if _, err := os.Stat(filepath.Join(f.workDir, "pid")); (err == nil) != (tt.landed == "running") {
					t.Errorf("pid file: %v", err)
				}
			}
			b, _ := os.ReadFile(note)
			var got []string
			for line := range strings.Lines(string(b)) {
				s := strings.Split(strings.TrimSuffix(line, "\n"), " ")
				pid := map[string]string{"": ".", "12": "12", root: "R"}[s[2]]
				got = append(got, s[0]+" "+pid+" "+strings.Replace(s[1], dir, "DIR", 1))
			}
			if diff := cmp.Diff(tt.stages, strings.Join(got, "; ")); diff != "" {
				t.Errorf("stages:\n%s", diff)
			}
		})
	}
}

// TestPostDumpScript looks at what a script finds when the tree is to run on: images
// that are complete, and a tree that is still frozen.
func TestPostDumpScript(t *testing.T) {
	w := newWorld()
	dir := t.TempDir()
	f := dumpFlags{tree: 12, leaveRunning: true}
	f.imagesDir, f.scripts = dir, []string{`[ "$CRTOOLS_SCRIPT_ACTION" = pre-dump ] || [ -e "$CRTOOLS_IMAGE_DIR/inventory.img" ]`}
	thawed := ""
	w.on("thaw", func(context.Context) error {
		if _, err := os.Stat(dir + "/inventory.img"); err != nil {
			return err
		}
		thawed = w.source
		return nil
	})
	noErr(t, runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger()))
	if thawed != "frozen" || w.source != "running" {
		t.Errorf("the tree was %q when it was let go and is %s", thawed, w.source)
	}
}

func TestStats(t *testing.T) {
	dir, work := t.TempDir(), t.TempDir()
	w := newWorld()
	d := dumpFlags{tree: 12}
	d.imagesDir, d.workDir = dir, work
	noErr(t, runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, d, hclog.NewNullLogger()))
	got, err := crit.GetDumpStats(work)
	noErr(t, err)
	if got.GetFreezingTime() != 1000 || got.GetPagesWritten() != 256 || got.GetFrozenTime() == 0 || got.GetMemwriteTime() == 0 {
		t.Errorf("dump: %v", got)
	}
	f := restoreFlags{detached: true}
	f.imagesDir, f.workDir = dir, work
	noErr(t, runRestore(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger()))
	res, err := crit.GetRestoreStats(work)
	noErr(t, err)
	if res.GetForkingTime() != 3000 || res.GetRestoreTime() != 5000 || res.GetPagesRestored() != 256 {
		t.Errorf("restore: %v", res)
	}
	// A dump that failed leaves none.
	w = newWorld()
	w.on("dump-data", func(context.Context) error { return errors.New("no") })
	d.imagesDir, d.workDir = t.TempDir(), t.TempDir()
	if err := runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, d, hclog.NewNullLogger()); err == nil {
		t.Error("no error")
	}
	if names, _ := os.ReadDir(d.workDir); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}
