package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/cli"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
	"godwit/engine/procfs"
)

// TestMain keeps descriptors that whoever runs the tests left open from the programs under test.
func TestMain(m *testing.M) {
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		fmt.Fprintln(os.Stderr, "close_range:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// needRoot fails under CI=true and skips otherwise where tracing is not possible.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test traces processes and needs root")
	}
	t.Skip("this test traces processes and needs root")
}

// workload counts in two threads, checks a table all the time and its clock
// for going back, and says on SIGTERM how it went.
const workload = `
import threading, time, signal, sys
table = [str(i) for i in range(100000)]
n, bad, last = 0, 0, time.monotonic()
def done(*a):
    print("ok" if bad == 0 and n > 0 else "bad %d" % bad, flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, done)
def sleeper():
    global bad
    while True:
        a = time.monotonic(); time.sleep(0.05)
        if time.monotonic() - a < 0.049: bad += 1
threading.Thread(target=sleeper, daemon=True).start()
print("up", flush=True)
while True:
    n += 1
    if table[n % 100000] != str(n % 100000): bad += 1
    now = time.monotonic()
    if now < last: bad += 1
    last = now
`

type program struct {
	t   *testing.T
	pid int
	out string
	cmd *exec.Cmd
}

func start(t *testing.T, script string) *program {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("python3", "-c", script)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, pid: cmd.Process.Pid, out: out, cmd: cmd}
	t.Cleanup(func() { _ = unix.Kill(p.pid, unix.SIGKILL); _, _ = p.wait() })
	p.until("up")
	return p
}

func (p *program) read() string {
	b, err := os.ReadFile(p.out)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

func (p *program) until(text string) {
	p.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !strings.Contains(p.read(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("the program did not say %q but %q", text, p.read())
		}
	}
}

func (p *program) wait() (unix.WaitStatus, error) {
	var ws unix.WaitStatus
	_, err := unix.Wait4(p.pid, &ws, unix.WALL, nil)
	return ws, err
}

// dump writes the tree's images and ends it with kill, else lets it run on.
func (p *program) dump(e *engine.Engine, dir string, kill bool) {
	p.t.Helper()
	ctx := context.Background()
	tree, err := e.Freeze(ctx, p.pid, engine.DumpOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	sink, err := image.NewDirSink(dir)
	if err == nil {
		_, err = tree.Dump(ctx, sink)
	}
	if err == nil {
		err = sink.Commit()
	}
	if err != nil {
		_ = tree.Thaw()
		p.t.Fatal(err)
	}
	if !kill {
		if err := tree.Thaw(); err != nil {
			p.t.Fatal(err)
		}
		return
	}
	if err := tree.Kill(); err != nil {
		p.t.Fatal(err)
	}
	// The tracer is a thread of the parent here, so that it reaped the root.
	if _, err := p.wait(); !errors.Is(err, unix.ECHILD) {
		p.t.Fatalf("the killed program is still to be reaped: %v", err)
	}
}

func restoreDir(t *testing.T, e *engine.Engine, dir string, o engine.RestoreOptions) (engine.Standing, error) {
	t.Helper()
	src, err := image.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = src.Close() }()
	return e.Restore(context.Background(), src, o)
}

func (p *program) finish() {
	p.t.Helper()
	if err := unix.Kill(p.pid, unix.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	ws, err := p.wait()
	if err != nil || !ws.Exited() || ws.ExitStatus() != 0 || !strings.Contains(p.read(), "ok\n") {
		p.t.Fatalf("the program ended with %#x (%v) and said %q", ws, err, p.read())
	}
}

// shape is what must be the same before and after: mappings with their rights,
// descriptors, and lines of status.
func shape(t *testing.T, pid int) map[string][]string {
	t.Helper()
	s := map[string][]string{}
	maps, err := procfs.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Path != "[vsyscall]" {
			s["maps"] = append(s["maps"], fmt.Sprintf("%s %x", m, m.Offset))
		}
	}
	fds, err := procfs.Fds(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		link, err := procfs.FdLink(pid, fd)
		if err != nil {
			t.Fatal(err)
		}
		s["fds"] = append(s["fds"], fmt.Sprintf("%d %s", fd, link))
	}
	b, err := os.ReadFile(procfs.Path(pid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		key, _, _ := strings.Cut(line, ":")
		switch key {
		case "Name", "Umask", "Uid", "Gid", "Groups", "NStgid", "NSpgid", "NSsid", "Threads", "SigBlk", "SigIgn", "SigCgt",
			"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Cpus_allowed":
			s["status"] = append(s["status"], line)
		}
	}
	for _, name := range []string{"cmdline", "environ", "auxv", "oom_score_adj", "personality", "limits"} {
		b, err := os.ReadFile(procfs.Path(pid, name))
		if err != nil {
			t.Fatal(err)
		}
		s[name] = []string{string(b)}
	}
	for _, name := range []string{"exe", "cwd", "root"} {
		link, err := os.Readlink(procfs.Path(pid, name))
		if err != nil {
			t.Fatal(err)
		}
		s[name] = []string{link}
	}
	return s
}

// TestRoundTrip dumps and restores one program ten times in place.
func TestRoundTrip(t *testing.T) {
	needRoot(t)
	p := start(t, workload)
	e := engine.New(nil)
	if _, err := e.Plan(context.Background(), p.pid, engine.DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	want := shape(t, p.pid)
	for i := range 10 {
		dir := filepath.Join(t.TempDir(), "images")
		p.dump(e, dir, true)
		s, err := restoreDir(t, e, dir, engine.RestoreOptions{})
		if err != nil {
			t.Fatalf("restore %d: %v", i, err)
		}
		if err := s.Run(); err != nil {
			t.Fatal(err)
		}
		if s.Root() != p.pid {
			t.Fatalf("landed as pid %d, was %d", s.Root(), p.pid)
		}
		time.Sleep(50 * time.Millisecond) // long enough to notice what is wrong
	}
	got := shape(t, p.pid)
	if d := cmp.Diff(want["status"], got["status"]); d != "" {
		t.Errorf("status (-before +after):\n%s", d)
	}
	for _, k := range []string{"fds", "cmdline", "environ", "auxv", "oom_score_adj", "personality", "limits", "exe", "cwd", "root"} {
		if d := cmp.Diff(want[k], got[k]); d != "" {
			t.Errorf("%s (-before +after):\n%s", k, d)
		}
	}
	p.finish()
}

// TestLeaveRunning dumps a program that goes on; crit's library must be able
// to decode every image.
func TestLeaveRunning(t *testing.T) {
	needRoot(t)
	p := start(t, workload)
	e := engine.New(nil)
	want := shape(t, p.pid)
	dir := filepath.Join(t.TempDir(), "images")
	p.dump(e, dir, false)
	if d := cmp.Diff(want["maps"], shape(t, p.pid)["maps"]); d != "" {
		t.Errorf("mappings after the dump (-before +after):\n%s", d)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.img"))
	if err != nil || len(names) < 8 {
		t.Fatalf("found images %v (%v)", names, err)
	}
	for _, name := range names {
		if strings.HasPrefix(filepath.Base(name), "pages-") {
			continue // no magic, no entries
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		entry, err := cli.GetEntryTypeFromImg(f)
		if err == nil {
			_, err = crit.New(f, nil, "", false, false).Decode(entry)
		}
		if err != nil {
			t.Errorf("crit decodes %s: %v", filepath.Base(name), err)
		}
		_ = f.Close()
	}
	// The pid is taken by the very program: a restore must say so and leave it alone.
	_, err = restoreDir(t, e, dir, engine.RestoreOptions{})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("pid %d is taken", p.pid)) || !strings.Contains(err.Error(), "python") {
		t.Errorf("restore over the running program: %v", err)
	}
	p.finish()
}

// TestNewPidNamespace lands a copy beside the running original.
func TestNewPidNamespace(t *testing.T) {
	needRoot(t)
	p := start(t, workload)
	e := engine.New(nil)
	dir := filepath.Join(t.TempDir(), "images")
	p.dump(e, dir, true)
	holder := exec.Command("sleep", "100") // somebody else may have the pid meanwhile
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	s, err := restoreDir(t, e, dir, engine.RestoreOptions{NewPidNamespace: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	inner := p.pid
	p.pid = s.Root()
	st, err := procfs.ReadStatus(s.Root())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(st.NSpid); n < 2 || st.NSpid[n-1] != inner {
		t.Errorf("landed with pids %v, want %d inside", st.NSpid, inner)
	}
	time.Sleep(100 * time.Millisecond)
	if err := unix.Kill(s.Root(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(s.Child(), &ws, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.read(), "ok\n") {
		t.Errorf("the program said %q", p.read())
	}
}

// TestDiscard takes back a tree that stands; nothing of it may have run or be left.
func TestDiscard(t *testing.T) {
	needRoot(t)
	p := start(t, workload)
	e := engine.New(nil)
	dir := filepath.Join(t.TempDir(), "images")
	p.dump(e, dir, true)
	before := p.read()
	s, err := restoreDir(t, e, dir, engine.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(p.pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("pid %d after the discard: %v", p.pid, err)
	}
	if p.read() != before {
		t.Errorf("the discarded tree wrote %q", p.read())
	}
	if err := s.Run(); err == nil {
		t.Error("a discarded tree could be let go")
	}
}

// TestUnknownPid wants one clear sentence.
func TestUnknownPid(t *testing.T) {
	e := engine.New(nil)
	for _, pid := range []int{0, -1, 4194304, os.Getpid()} {
		if _, err := e.Plan(context.Background(), pid, engine.DumpOptions{}); err == nil {
			t.Errorf("plan of pid %d succeeded", pid)
		}
		if _, err := e.Freeze(context.Background(), pid, engine.DumpOptions{}); err == nil {
			t.Errorf("freeze of pid %d succeeded", pid)
		}
	}
}

// TestRefusal asks for what cannot be carried: everything is listed, nothing stops.
func TestRefusal(t *testing.T) {
	needRoot(t)
	p := start(t, `
import socket, fcntl, time, signal, sys, os
signal.signal(signal.SIGTERM, lambda *a: (print("ok", flush=True), sys.exit(0)))
raw = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
lock = open("/proc/self/fd/1", "a"); fcntl.flock(lock, fcntl.LOCK_EX)
print("up", flush=True)
while True: time.sleep(0.01)
`)
	e := engine.New(nil)
	_, err := e.Plan(context.Background(), p.pid, engine.DumpOptions{})
	var r *engine.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("plan: %v", err)
	}
	if len(r.Problems) < 2 {
		t.Errorf("want the socket of another family and the lock among the problems: %v", err)
	}
	for _, x := range r.Problems {
		if x.Pid != p.pid || x.Reason == "" {
			t.Errorf("problem without pid or reason: %+v", x)
		}
	}
	p.finish()
}

// TestSelfProbe checks that this host has what the engine needs.
func TestSelfProbe(t *testing.T) {
	needRoot(t)
	var b bytes.Buffer
	for _, f := range engine.Probe() {
		fmt.Fprintf(&b, "%s: %s %v\n", f.Name, f.Answer, f.Err)
		if f.Required && f.Answer != engine.Yes {
			t.Errorf("%s: %s: %v", f.Name, f.Answer, f.Err)
		}
	}
	t.Log(b.String())
}
