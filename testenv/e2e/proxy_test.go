package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// waitNumber waits for a file with a number that a workload writes.
func waitNumber(ctx context.Context, t *testing.T, r *workloads.Run, suffix string) int {
	t.Helper()
	for {
		b, err := os.ReadFile(r.Prefix + "." + suffix)
		if n, perr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && perr == nil {
			return n
		}
		if err := r.Failed(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("wait for %s.%s: %v", filepath.Base(r.Prefix), suffix, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// proxies are the proxies that a host has.
func proxies(ctx context.Context, t *testing.T, f *fleet.Fleet, host string) string {
	t.Helper()
	res, err := f.Run(ctx, "ps", host, "--proxies")
	if err != nil || res.Code != 0 {
		t.Fatalf("godwit ps %s: %v, exit code %d: %s", host, err, res.Code, res.Stderr)
	}
	return res.Stdout
}

// TestMigrateWorker moves only the worker of "producer | worker > out.txt" to and
// fro while bytes flow.
func TestMigrateWorker(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	size := "64"
	if s := os.Getenv("GODWIT_PROXY_MIB"); s != "" {
		size = s
	}
	mib, err := strconv.Atoi(size)
	if err != nil {
		t.Fatal(err)
	}
	dir := newDir(t)
	prefix, out := filepath.Join(dir, "work"), filepath.Join(dir, "out.txt")
	pipeline := fmt.Sprintf("%[1]s proxyfeed %[2]s %[3]d | %[1]s proxywork %[2]s > %[4]s", programs.Selfcheck, prefix, mib<<20, out)
	sh, err := workloads.Launch(ctx, alpha, prefix, "/bin/sh", "-c", pipeline)
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Prefix: prefix, Pid: waitNumber(ctx, t, sh, "pid")}
	goes(ctx, t, r, 3)

	// Without a word it is refused, and nothing is touched.
	m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta")
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 4 || m.Error == nil || !strings.Contains(res.Stdout, "pipe[") {
		t.Errorf("exit code %d, want 4 and the pipe: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	goes(ctx, t, r, 3)

	to := []*hosts.Host{beta, alpha}
	migrate(ctx, t, f, r, beta, "--external", "role:stdin=proxy")
	for i := 1; i < 10; i++ {
		migrate(ctx, t, f, r, to[i%2]) // what is proxied goes on being so
	}
	if err := os.WriteFile(prefix+".enough", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	got, sent := waitNumber(ctx, t, r, "got"), waitNumber(ctx, t, r, "sent")
	if got != sent || sent < mib<<20 {
		t.Errorf("%d bytes were sent, %d came", sent, got)
	}
	if err := r.WaitFile(ctx, "ok"); err != nil {
		t.Fatal(err)
	}
	checkOutput(t, out, got)
}

// checkOutput wants growing numbers and the end.
func checkOutput(t *testing.T, path string, want int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	last := 0
	for _, l := range lines[:len(lines)-1] {
		n, err := strconv.Atoi(l)
		if err != nil || n < last {
			t.Fatalf("line %q behind %d", l, last)
		}
		last = n
	}
	if got := lines[len(lines)-1]; got != fmt.Sprintf("end %d", want) {
		t.Errorf("the last line is %q, want end %d", got, want)
	}
}

// TestMigrateProxy moves a program with pipes of both directions and a socket that
// lead out of it.
func TestMigrateProxy(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	dir := newDir(t)
	r := selfcheck(ctx, t, alpha, dir, "proxyflow")
	args := []string{"--external", "kind:pipe=proxy", "--external", "kind:unix-stream=proxy"}
	migrate(ctx, t, f, r, beta, args...)
	if got := proxies(ctx, t, f, "alpha"); strings.Count(got, "pipe:[") != 2 || strings.Count(got, "socket:[") != 1 || !strings.Contains(got, "beta") {
		t.Errorf("proxies of alpha:\n%s", got)
	}
	for args, want := range map[string]string{"hosts": "alpha is still needed by trees that have left it, for the bytes of 3 objects", "history": "still needed"} {
		line := []string{args}
		if args == "history" {
			hist, err := f.History(ctx)
			if err != nil || len(hist) != 1 {
				t.Fatalf("history: %+v, %v", hist, err)
			}
			line = append(line, hist[0].ID)
		}
		if res, err := f.Run(ctx, line...); err != nil || !strings.Contains(res.Stdout, want) {
			t.Errorf("%s does not say %q: %s%s, %v", args, want, res.Stdout, res.Stderr, err)
		}
	}
	for i := range 9 {
		migrate(ctx, t, f, r, []*hosts.Host{alpha, beta}[i%2])
	}
	// An abort leaves all as it was.
	m, res, err := f.Migrate(ctx, r.Host.Name(), r.Pid, "gamma")
	if err == nil && res.Code == 0 {
		t.Errorf("a migration to a host that is not there: %+v", m)
	}
	goes(ctx, t, r, 10)
	migrate(ctx, t, f, r, beta)
	stop(ctx, t, r)
	for tree, peer := range map[string]string{"tree-sent": "peer-got", "tree-got": "peer-sent", "given": "eaten"} {
		if a, b := waitNumber(ctx, t, r, tree), waitNumber(ctx, t, r, peer); a != b || a == 0 {
			t.Errorf("%s is %d, %s is %d", tree, a, peer, b)
		}
	}
	waitNumber(ctx, t, r, "fed") // it has been told that nobody reads
	waitProxies(ctx, t, f, "alpha", "beta")
}

// waitProxies waits until no proxy is in use.
func waitProxies(ctx context.Context, t *testing.T, f *fleet.Fleet, names ...string) {
	t.Helper()
	for _, n := range names {
		for {
			got := proxies(ctx, t, f, n)
			if !strings.Contains(got, "[") {
				break
			}
			select {
			case <-ctx.Done():
				t.Fatalf("proxies of %s that do not end:\n%s", n, got)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

// TestProxyLink: while the bus is away the program waits; when it is back all goes on.
// When the agent that has the object ends, the program meets the end.
func TestProxyLink(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	dir := newDir(t)
	prefix, out := filepath.Join(dir, "work"), filepath.Join(dir, "out.txt")
	sh, err := workloads.Launch(ctx, alpha, prefix, "/bin/sh", "-c",
		fmt.Sprintf("%[1]s proxyfeed %[2]s 1 | %[1]s proxywork %[2]s > %[3]s", programs.Selfcheck, prefix, out))
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Prefix: prefix, Pid: waitNumber(ctx, t, sh, "pid")}
	goes(ctx, t, r, 3)
	migrate(ctx, t, f, r, beta, "--external", "role:stdin=proxy")
	if err := f.StopServe(ctx, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := f.StartServe(ctx); err != nil {
		t.Fatal(err)
	}
	if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
		t.Fatal(err)
	}
	goes(ctx, t, r, 10)
	if err := f.StopAgent(ctx, "alpha", unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := f.StartAgent(ctx, "alpha"); err != nil {
		t.Fatal(err)
	}
	if err := r.WaitFile(ctx, "ok"); err != nil { // every byte that came was right
		t.Fatal(err)
	}
	for !strings.Contains(f.Log("beta"), "proxy lost") {
		if ctx.Err() != nil {
			t.Fatal("the log of beta does not tell that the proxy was lost")
		}
		time.Sleep(10 * time.Millisecond)
	}
}
