package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/setup"
	"godwit/testenv/workloads"
)

// base is the directory that every host of every test sees at the same path.
var base string

var (
	programs *workloads.Programs
	binaries *fleet.Binaries
)

func TestMain(m *testing.M) {
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

func runAll(m *testing.M) (int, error) {
	if why := lacking(); why != "" {
		if os.Getenv("CI") == "true" {
			return 1, errors.New(why)
		}
		fmt.Fprintf(os.Stderr, "e2e: skipping all end-to-end tests: %s\n", why)
		return 0, nil
	}
	// Short, because unix socket addresses are.
	dir, err := os.MkdirTemp("/var/tmp", "gw")
	if err != nil {
		return 1, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	base = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	if programs, err = workloads.Build(ctx, filepath.Join(dir, "bin")); err != nil {
		return 1, err
	}
	if binaries, err = fleet.Build(ctx, filepath.Join(dir, "bin")); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// lacking says what the tests miss on this machine.
func lacking() string {
	if os.Geteuid() != 0 {
		return "they need root"
	}
	var names []string
	for _, n := range append(append([]setup.Need{}, setup.Hosts...), setup.Workloads...) {
		if len(setup.Missing([]setup.Need{n})) > 0 {
			names = append(names, n.Path)
		}
	}
	if len(names) > 0 {
		return "missing are " + strings.Join(names, ", ") + "; go run ./testenv test installs them"
	}
	return ""
}

// newDir makes a directory of the test that all hosts see.
func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(base, "t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			_ = os.RemoveAll(dir)
		}
	})
	return dir
}

// newHosts makes hosts that end with the test.
func newHosts(t *testing.T, names ...string) *hosts.Env {
	t.Helper()
	e, err := hosts.New(base, names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// patience is how much slower than the machines on which they were measured a
// machine may be before a test gives up waiting.
const patience = 5

// deadline bounds a test that hangs; d is plenty on a machine that is not busy.
func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience*d)
	t.Cleanup(cancel)
	return ctx
}

// selfcheck starts a command of selfcheck and waits until it is set up.
func selfcheck(ctx context.Context, t *testing.T, h *hosts.Host, dir, command string, args ...string) *workloads.Run {
	t.Helper()
	prefix := filepath.Join(dir, command)
	return start(ctx, t, h, prefix, append([]string{programs.Selfcheck, command, prefix}, args...)...)
}

func start(ctx context.Context, t *testing.T, h *hosts.Host, prefix string, argv ...string) *workloads.Run {
	t.Helper()
	r, err := workloads.Start(ctx, h, prefix, argv...)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Goes(ctx, 5); err != nil {
		t.Fatal(err)
	}
	return r
}

// stop ends a workload; its verdict is the test's.
func stop(ctx context.Context, t *testing.T, r *workloads.Run) {
	t.Helper()
	if err := r.Stop(ctx); err != nil {
		t.Fatal(err)
	}
}

func goes(ctx context.Context, t *testing.T, r *workloads.Run, n int) {
	t.Helper()
	if err := r.Goes(ctx, n); err != nil {
		t.Fatal(err)
	}
}

// outcome is how a run of godwit-agent ended.
type outcome struct {
	code           int
	stdout, stderr string
}

// agentCmd runs godwit-agent inside a host.
func agentCmd(ctx context.Context, t *testing.T, h *hosts.Host, files []*os.File, args ...string) outcome {
	t.Helper()
	cmd := h.Command(ctx, binaries.Agent, args...)
	cmd.ExtraFiles = files
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	o := outcome{stdout: stdout.String(), stderr: stderr.String()}
	var ee *exec.ExitError
	if errors.As(err, &ee) && ctx.Err() == nil {
		o.code = ee.ExitCode()
	} else if err != nil {
		t.Fatalf("godwit-agent %s: %v\n%s", strings.Join(args, " "), err, o.stderr)
	}
	return o
}

// mustAgent is agentCmd for what has to succeed.
func mustAgent(ctx context.Context, t *testing.T, h *hosts.Host, files []*os.File, args ...string) outcome {
	t.Helper()
	o := agentCmd(ctx, t, h, files, args...)
	if o.code != 0 {
		t.Fatalf("godwit-agent %s: exit code %d\n%s%s", strings.Join(args, " "), o.code, o.stdout, o.stderr)
	}
	return o
}

// dump writes the images of a tree into a new directory and leaves the tree
// dead and its pids free.
func dump(ctx context.Context, t *testing.T, h *hosts.Host, pid int, extra ...string) string {
	t.Helper()
	dir := newDir(t)
	mustAgent(ctx, t, h, nil, append([]string{"dump", "-t", strconv.Itoa(pid), "-D", dir}, extra...)...)
	if err := h.WaitGone(ctx, pid); err != nil {
		t.Fatal(err)
	}
	return dir
}

// restore rebuilds a tree and wants its root to have the pid that it had.
func restore(ctx context.Context, t *testing.T, h *hosts.Host, dir string, pid int, files []*os.File, extra ...string) {
	t.Helper()
	pidfile := filepath.Join(dir, "pid")
	mustAgent(ctx, t, h, files, append([]string{"restore", "-D", dir, "-d", "--pidfile", pidfile}, extra...)...)
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(b)); got != strconv.Itoa(pid) {
		t.Fatalf("pid file says %q, want %d", got, pid)
	}
}

// dumpRestore moves a tree into images and back n times, with options that both
// commands have.
func dumpRestore(ctx context.Context, t *testing.T, r *workloads.Run, n int, options ...string) {
	t.Helper()
	defer func() {
		if b, err := os.ReadFile(r.Prefix + ".fail"); err == nil && t.Failed() {
			t.Logf("the workload says: %s", b)
		}
	}()
	for i := range n {
		dir := dump(ctx, t, r.Host, r.Pid, options...)
		if i == 0 {
			decodeImages(t, dir)
		}
		restore(ctx, t, r.Host, dir, r.Pid, nil, options...)
		if err := r.Goes(ctx, 5); err != nil {
			t.Fatalf("after %d rounds: %v", i+1, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// refusedEventually wants a dump of a tree that may not yet be as it will be to
// be refused for a reason.
func refusedEventually(ctx context.Context, t *testing.T, h *hosts.Host, pid int, want string) {
	t.Helper()
	for {
		o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(pid), "-D", newDir(t), "-R")
		if o.code == 1 && strings.Contains(o.stderr, want) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("exit code %d, %q; want 1 and %q", o.code, o.stderr, want)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// key is the external key of a descriptor.
func key(t *testing.T, h *hosts.Host, pid, fd int) string {
	t.Helper()
	b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd)))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^mnt_id:\s*(\d+)$`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("fdinfo has no mnt_id: %s", b)
	}
	mnt, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(h.Path(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)), &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("file[%x:%x]", mnt, st.Ino)
}

// traces is what a failed dump must not change.
func traces(t *testing.T, h *hosts.Host, pid int) string {
	t.Helper()
	var b strings.Builder
	maps, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/maps", pid)))
	if err != nil {
		t.Fatal(err)
	}
	b.Write(maps)
	tasks, err := os.ReadDir(h.Path(fmt.Sprintf("/proc/%d/task", pid)))
	if err != nil {
		t.Fatal(err)
	}
	for _, de := range tasks {
		st, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/task/%s/status", pid, de.Name())))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(st)) {
			if strings.HasPrefix(line, "TracerPid:") || strings.HasPrefix(line, "Sig") && !strings.HasPrefix(line, "SigQ:") || strings.HasPrefix(line, "Shd") {
				b.WriteString(de.Name() + " " + line)
			}
		}
	}
	fds, err := os.ReadDir(h.Path(fmt.Sprintf("/proc/%d/fd", pid)))
	if err != nil {
		t.Fatal(err)
	}
	for _, de := range fds {
		b.WriteString("fd " + de.Name() + "\n")
	}
	return b.String()
}

// longestGap is the longest pause between records from number n on.
func longestGap(t *testing.T, r *workloads.Run, n int) time.Duration {
	t.Helper()
	rs, err := r.Records()
	if err != nil {
		t.Fatal(err)
	}
	if n >= len(rs) {
		t.Fatalf("there are only %d records, none after %d", len(rs), n)
	}
	return workloads.MaxGap(rs[n:])
}

func count(t *testing.T, r *workloads.Run) int {
	t.Helper()
	rs, err := r.Records()
	if err != nil {
		t.Fatal(err)
	}
	return len(rs)
}
