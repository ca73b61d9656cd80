package agent

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
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
				f := restoreFlags{detached: true, status: statusFlags{pidfile: "pid"}}
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

// TestScriptsRealTree has scripts look at a real process at each stage: it is
// stopped where it must be and goes on where nothing else would be right.
func TestScriptsRealTree(t *testing.T) {
	if os.Geteuid() != 0 {
		needsRoot(t)
	}
	dir := t.TempDir()
	img, work, notes := filepath.Join(dir, "img"), filepath.Join(dir, "work"), filepath.Join(dir, "notes")
	noErr(t, os.Mkdir(work, 0o700))
	cmd := exec.Command("/bin/sleep", "600")
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	noErr(t, cmd.Start())
	pid := strconv.Itoa(cmd.Process.Pid)
	defer func() { _ = unix.Kill(cmd.Process.Pid, unix.SIGKILL) }()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for asleep := false; !asleep; time.Sleep(time.Millisecond) {
		st, err := procfs.ReadStat(cmd.Process.Pid)
		noErr(t, err)
		comm, err := procfs.Comm(cmd.Process.Pid)
		noErr(t, err)
		asleep = comm == "sleep" && st.State == 'S'
	}
	// The letter of the process's state: t is stopped by a tracer.
	script := `echo $CRTOOLS_SCRIPT_ACTION $(sed -n 's/^State:.\(.\).*/\1/p' /proc/` + pid + `/status) >> ` + notes
	conf := filepath.Join(dir, "conf")
	noErr(t, os.WriteFile(conf, []byte("# of the test\nverbosity 4\nlog-file log # in the work directory\nwork-dir "+work+
		"\naction-script \""+strings.ReplaceAll(script, `"`, `\"`)+"\"\ndisplay-stats\n"), 0o600))
	run := func(want int, args ...string) string {
		t.Helper()
		cmd := program(ctx, append(args, "--no-default-config", "--config", conf)...)
		out, _ := cmd.CombinedOutput()
		log, _ := os.ReadFile(filepath.Join(work, "log"))
		if code := cmd.ProcessState.ExitCode(); code != want || !strings.Contains(string(log), "begin: command="+args[0]) ||
			strings.Contains(string(log), "failed: error=") != (want != 0) {
			t.Fatalf("%v: exit code %d, want %d, %s\n%s", args, code, want, out, log)
		}
		return string(out)
	}
	run(1, "dump", "-t", pid, "-D", img, "--action-script", `[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ]`)
	if names, _ := os.ReadDir(img); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
	noErr(t, unix.Kill(cmd.Process.Pid, 0))
	if out := run(0, "dump", "-Rjt", pid, "-D", img); !strings.Contains(out, "Memory pages written: ") {
		t.Errorf("statistics: %s", out)
	}
	noErr(t, os.RemoveAll(img))
	run(0, "dump", "-t", pid, "-D", img)
	_, _ = cmd.Process.Wait() // its pid must be free
	if out := run(0, "restore", "-djD", img, "--pidfile", "pid"); !strings.Contains(out, "Pages restored: ") {
		t.Errorf("statistics: %s", out)
	}
	if b, _ := os.ReadFile(filepath.Join(work, "pid")); string(b) != pid {
		t.Errorf("pid file: %q, want %s", b, pid)
	}
	b, _ := os.ReadFile(notes)
	// Just let go it may be running, but stopped it is not.
	b = bytes.Replace(b, []byte("post-resume R"), []byte("post-resume S"), 1)
	const want = "pre-dump S\npost-dump t\n"
	if diff := cmp.Diff(want+want+want+"pre-restore\npost-restore t\npre-resume t\npost-resume S\n", string(b)); diff != "" {
		t.Errorf("states:\n%s", diff)
	}
	st, err := crit.GetDumpStats(work)
	if err != nil || st.GetPagesWritten() == 0 || st.GetFrozenTime() == 0 || st.GetPagesScanned() < st.GetPagesWritten() {
		t.Errorf("statistics: %v, %v", st, err)
	}
}
