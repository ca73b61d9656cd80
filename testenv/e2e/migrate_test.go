package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// newFleet makes alpha, beta and a hub with the real programs on them.
func newFleet(ctx context.Context, t *testing.T, agentArgs ...string) (*fleet.Fleet, *hosts.Host, *hosts.Host) {
	t.Helper()
	return fleetOf(ctx, t, newHosts(t, "alpha", "beta", "hub"), agentArgs...)
}

// fleetOf is newFleet on hosts that are there.
func fleetOf(ctx context.Context, t *testing.T, e *hosts.Env, agentArgs ...string) (*fleet.Fleet, *hosts.Host, *hosts.Host) {
	t.Helper()
	f, err := fleet.Start(ctx, e, binaries, newDir(t), "hub", []string{"alpha", "beta"}, agentArgs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range []string{"serve", "alpha", "beta"} {
				t.Logf("end of the log of %s:\n%s", n, f.Log(n))
			}
		}
	})
	return f, e.Host("alpha"), e.Host("beta")
}

// migrate moves a workload and wants that to succeed.
func migrate(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, to *hosts.Host, args ...string) *fleet.Migration {
	t.Helper()
	from := r.Host
	m, res, err := f.Migrate(ctx, from.Name(), r.Pid, to.Name(), args...)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 || m.State != "completed" || m.Owner != "destination" {
		t.Fatalf("migration: exit code %d, state %s, owner %s: %s%s", res.Code, m.State, m.Owner, res.Stdout, res.Stderr)
	}
	if m.LandedPID != r.Pid {
		t.Errorf("landed as pid %d, want %d", m.LandedPID, r.Pid)
	}
	r.Host = to
	goes(ctx, t, r, 10)
	if err := from.WaitGone(ctx, r.Pid); err != nil {
		t.Fatalf("two copies: %v", err)
	}
	return m
}

// TestMigrate moves programs of all kinds to and fro.
func TestMigrate(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, tc := range []struct {
		name string
		argv func(prefix string) []string
	}{
		{"threads", func(p string) []string { return []string{programs.Selfcheck, "threads", p} }},
		{"tree", func(p string) []string { return []string{programs.Selfcheck, "tree", p} }},
		{"syscalls", func(p string) []string { return []string{programs.Selfcheck, "syscalls", p} }},
		{"vma", func(p string) []string { return []string{programs.Selfcheck, "vma", p} }},
		{"files", func(p string) []string { return []string{programs.Selfcheck, "files", p} }},
		{"inotify", func(p string) []string { return []string{programs.Selfcheck, "inotify", p} }},
		{"ghosts", func(p string) []string { return []string{programs.Selfcheck, "ghosts", p} }},
		{"epollmore", func(p string) []string { return []string{programs.Selfcheck, "epollmore", p} }},
		{"deleted", func(p string) []string { return []string{programs.Selfcheck, "deleted", p} }},
		{"pipe", func(p string) []string { return []string{programs.Selfcheck, "pipe", p} }},
		{"pty", func(p string) []string { return []string{programs.Selfcheck, "pty", p} }},
		{"ptyjobs", func(p string) []string { return []string{programs.Selfcheck, "ptyjobs", p} }},
		{"inet", func(p string) []string { return []string{programs.Selfcheck, "inet", p} }},
		{"tcpconn", func(p string) []string { return []string{programs.Selfcheck, "tcpconn", p} }},
		{"unixrights", func(p string) []string { return []string{programs.Selfcheck, "unixrights", p} }},
		{"unixoob", func(p string) []string { return []string{programs.Selfcheck, "unixoob", p} }},
		{"aioring", func(p string) []string { return []string{programs.Selfcheck, "aioring", p} }},
		{"sigtrap", func(p string) []string { return []string{programs.Selfcheck, "sigtrap", p} }},
		{"guards", func(p string) []string { return []string{programs.Selfcheck, "guards", p} }},
		{"posixshm", func(p string) []string { return []string{programs.Selfcheck, "posixshm", p} }},
		{"sysvshm", func(p string) []string { return []string{programs.Selfcheck, "sysvshm", p} }},
		{"seccomp", func(p string) []string { return []string{programs.Selfcheck, "seccomp", p} }},
		{"pycheck", func(p string) []string { return []string{"/usr/bin/python3", programs.Pycheck, p, "32"} }},
		{"gocheck", func(p string) []string { return []string{programs.Gocheck, p, "0.0.0.0:8080", "32"} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			prefix := filepath.Join(newDir(t), tc.name)
			r := start(ctx, t, alpha, prefix, tc.argv(prefix)...)
			migrate(ctx, t, f, r, beta)
			migrate(ctx, t, f, r, alpha)
			migrate(ctx, t, f, r, beta)
			stop(ctx, t, r)
		})
	}
}

// TestMigrateRedis moves a server with a million keys and an external log.
func TestMigrateRedis(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	pid := redis(ctx, t, alpha, newDir(t))
	want := redisDo(ctx, t, alpha, "debug", "digest")
	quiet(ctx, t, alpha, 6379)
	m, res, err := f.Migrate(ctx, "alpha", pid, "beta")
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 {
		t.Fatalf("exit code %d: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	if got := redisDo(ctx, t, beta, "debug", "digest"); got != want {
		t.Errorf("digest was %s and is %s", want, got)
	}
	if got := redisDo(ctx, t, beta, "dbsize"); got != "1000008" {
		t.Errorf("%s keys, want 1000008", got)
	}
	if alpha.Alive(pid) {
		t.Error("the source's copy still runs")
	}
	t.Logf("%d bytes, total %.0f ms, frozen %.0f ms", m.Bytes, m.TotalMS, *m.FrozenMS)
}

// TestMigrateGiB checks times and memory against what an observer sees.
func TestMigrateGiB(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	// Records come every millisecond: their longest gap is the frozen time.
	r := selfcheck(ctx, t, alpha, newDir(t), "mem", "1024")
	const slack = 10.0 // ms
	agree := func(what string, reported, seen float64) error {
		if math.Abs(reported-seen) > slack {
			return fmt.Errorf("%s: reported are %.1f ms, an observer saw %.1f ms", what, reported, seen)
		}
		return nil
	}
	gapMS := func(n int) float64 {
		return float64(longestGap(t, r, n).Microseconds())/1000 - 1 // less the usual pause
	}

	other := func() *hosts.Host {
		if r.Host == alpha {
			return beta
		}
		return alpha
	}
	// On a busy machine the observer itself may be late: one agreement of several
	// shows that the report is right, one that is wrong never agrees.
	tries := func(move func() error) {
		t.Helper()
		var err error
		for range 8 {
			if err = move(); err == nil || t.Failed() {
				return
			}
			t.Log(err)
		}
		t.Error(err)
	}
	tries(func() error {
		n, begin := count(t, r), time.Now()
		m := migrate(ctx, t, f, r, other())
		seen := gapMS(n)
		if m.FrozenMS == nil {
			t.Fatal("no frozen time is reported")
		}
		t.Logf("to %s: %d bytes (%s), total %.1f ms, frozen %.1f ms, observed gap %.1f ms", r.Host.Name(), m.Bytes, m.SourceReport.Compression, m.TotalMS, *m.FrozenMS, seen)
		if m.TotalMS > float64(time.Since(begin).Milliseconds()) || m.TotalMS < *m.FrozenMS {
			t.Errorf("total time %.1f ms does not fit frozen time %.1f ms and %v for the command", m.TotalMS, *m.FrozenMS, time.Since(begin))
		}
		if n := m.SourceReport.StreamBytes; n < 1<<30 || m.Pages < 1<<18 {
			t.Errorf("%d bytes and %d pages were reported for 1 GiB", n, m.Pages)
		}
		return agree("frozen time", *m.FrozenMS, seen)
	})

	// With the view for people.
	tries(func() error {
		n, to := count(t, r), other()
		res, err := f.Run(ctx, "migrate", fmt.Sprintf("%s:%d", r.Host.Name(), r.Pid), to.Name())
		if err != nil {
			t.Fatal(err)
		}
		if res.Code != 0 {
			t.Fatalf("exit code %d: %s%s", res.Code, res.Stdout, res.Stderr)
		}
		r.Host = to
		goes(ctx, t, r, 50)
		seen := gapMS(n)
		total, frozen := duration(t, res.Stdout, "total time"), duration(t, res.Stdout, "frozen time")
		t.Logf("to %s: total %v, frozen %v, observed gap %.1f ms, command %v\n%s%s", to.Name(), total, frozen, seen, res.Took, res.Stderr, res.Stdout)
		if total > res.Took || total < frozen {
			t.Errorf("total time %v does not fit frozen time %v and %v for the command", total, frozen, res.Took)
		}
		// People get three digits.
		if d := math.Abs(float64(frozen.Microseconds())/1000 - seen); d > slack+seen/100 {
			return fmt.Errorf("frozen time: reported is %v, an observer saw %.1f ms", frozen, seen)
		}
		return nil
	})
	for _, h := range []string{"alpha", "beta"} {
		rss, err := f.PeakRSS(h)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("peak RSS of the agent of %s: %d MiB", h, rss>>20)
		if rss >= 128<<20 {
			t.Errorf("the agent of %s used %d MiB, want less than 128", h, rss>>20)
		}
	}
	stop(ctx, t, r)
}

// duration finds "name   1.25 s" in a report for people.
func duration(t *testing.T, report, name string) time.Duration {
	t.Helper()
	m := regexp.MustCompile(name + `\s+([0-9.]+) ?(µs|ms|s)`).FindStringSubmatch(report)
	if m == nil {
		t.Fatalf("the report has no %s:\n%s", name, report)
	}
	d, err := time.ParseDuration(m[1] + m[2])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMigrateExternal provides a fifo and a log on the destination both ways.
func TestMigrateExternal(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, tc := range []struct{ name, fifo, log string }{
		{"fifo reopened, log forwarded", "", ",forward"},
		{"fifo forwarded, log reopened", ",forward", ""},
	} {
		t.Run(strings.ReplaceAll(tc.name, " ", "-"), func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			dir := newDir(t)
			fifo := "/tmp/" + filepath.Base(dir)
			w := newFeed(ctx, t, alpha, fifo)
			r, logs := external(ctx, t, alpha, dir, w, "rw")
			w.send(30)
			waitLines(ctx, t, alpha, logs, 30)
			fifoKey, logKey := key(t, alpha, r.Pid, 4), key(t, alpha, r.Pid, 5)

			// Without a word on them it is refused, and both are named.
			m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", "--external", fifoKey, "--external", logKey)
			if err != nil {
				t.Fatal(err)
			}
			if res.Code != 4 || m.Error == nil || !strings.Contains(res.Stdout, fifoKey) || !strings.Contains(res.Stdout, logKey) {
				t.Errorf("exit code %d, want 4 and both keys: %s%s", res.Code, res.Stdout, res.Stderr)
			}
			goes(ctx, t, r, 5)

			w2 := newFeed(ctx, t, beta, "/tmp/elsewhere"+filepath.Base(dir))
			w2.next = w.next
			there := "/run/" + filepath.Base(dir) + ".log"
			b, err := os.ReadFile(alpha.Path(logs))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(beta.Path(there), b, 0o644); err != nil {
				t.Fatal(err)
			}
			migrate(ctx, t, f, r, beta, "--external", fifoKey, "--external", logKey,
				"--inherit", fifoKey+"="+w2.path+tc.fifo, "--inherit", logKey+"="+there+tc.log)
			w2.send(30)
			waitLines(ctx, t, beta, there, 60)
			waitLines(ctx, t, alpha, logs, 30)
			stop(ctx, t, r)
		})
	}
}

// TestMigratePids: a pid that is taken on the destination is found before the
// freeze; a pid namespace of its own is the way out.
func TestMigratePids(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "threads")
	takePid(ctx, t, beta, r.Pid)
	n := count(t, r)
	_, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta")
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 4 || !strings.Contains(res.Stdout, "sleep") || !strings.Contains(res.Stdout, fmt.Sprint(r.Pid)) {
		t.Errorf("exit code %d, want 4, the pid and its holder: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	goes(ctx, t, r, 5)
	if gap := longestGap(t, r, n); gap > smallGap {
		t.Errorf("the process stood for %v though nothing was to be touched", gap)
	}
	m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", "--pid-namespace", "new", "--mode", fleet.PreCopy)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 {
		t.Fatalf("exit code %d: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	if m.LandedPID == r.Pid {
		t.Errorf("landed as pid %d, which is taken", m.LandedPID)
	}
	r.Host, r.Pid = beta, m.LandedPID
	goes(ctx, t, r, 10)
	stop(ctx, t, r)
}

func TestMigrateRefused(t *testing.T) {
	ctx := deadline(t, time.Minute)
	f, alpha, _ := newFleet(ctx, t)
	dir := newDir(t)
	r, fine := selfcheck(ctx, t, alpha, dir, "hold", "vsock"), selfcheck(ctx, t, alpha, dir, "counter")
	for _, tc := range []struct {
		name, source, destination string
		pid, code                 int
		want                      string
	}{
		{"object", "alpha", "beta", r.Pid, 4, "vsock"},
		{"unknown pid", "alpha", "beta", 99999, 1, "99999"},
		{"unknown source", "gamma", "beta", r.Pid, 1, "gamma"},
		{"unknown destination", "alpha", "gamma", fine.Pid, 1, "gamma"},
		{"same host", "alpha", "alpha", r.Pid, 2, "same"},
	} {
		t.Run(strings.ReplaceAll(tc.name, " ", "-"), func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			res, err := f.Run(ctx, "migrate", fmt.Sprintf("%s:%d", tc.source, tc.pid), tc.destination, "--output", "json")
			if err != nil {
				t.Fatal(err)
			}
			if res.Code != tc.code || !strings.Contains(res.Stdout+res.Stderr, tc.want) {
				t.Errorf("exit code %d, want %d and %q: %s%s", res.Code, tc.code, tc.want, res.Stdout, res.Stderr)
			}
		})
	}
	for _, r := range []*workloads.Run{r, fine} {
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	}
}

// inFlight is a migration that a test disturbs.
type inFlight struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	id             string
}

// launch starts a slow migration and waits until memory is being copied.
func launch(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, to string) *inFlight {
	t.Helper()
	old, err := f.History(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m := &inFlight{cmd: f.Godwit(ctx, "migrate", fmt.Sprintf("%s:%d", r.Host.Name(), r.Pid), to, "--output", "json", "--bandwidth", "25MiB/s", "--compress", "none")}
	m.cmd.Stdout, m.cmd.Stderr = &m.stdout, &m.stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for {
		hist, err := f.History(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(hist) > len(old) {
			newest := hist[len(hist)-1]
			for _, s := range newest.Steps {
				if s.State == "final copying" {
					m.id = newest.ID
					return m
				}
			}
			if newest.State == "aborted" || newest.State == "completed" {
				_ = m.cmd.Wait()
				t.Fatalf("the migration ended before it could be disturbed: %s%s", m.stdout.String(), m.stderr.String())
			}
		}
		if ctx.Err() != nil {
			t.Fatalf("no memory is copied: %s", m.stderr.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// wait returns the exit code of the command.
func (m *inFlight) wait(t *testing.T) int {
	t.Helper()
	err := m.cmd.Wait()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return ee.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0
}

// TestMigrateDisturbed: whatever happens before the commit, the tree goes on at
// the source, whole and once, and can be moved afterwards.
func TestMigrateDisturbed(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 6*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	restartAgent := func(ctx context.Context, t *testing.T, host string, sig unix.Signal) {
		t.Helper()
		if err := f.StopAgent(ctx, host, sig); err != nil {
			t.Fatal(err)
		}
		if err := f.StartAgent(ctx, host); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name    string
		disturb func(ctx context.Context, t *testing.T, m *inFlight)
		codes   []int // that the command may end with
		moved   bool  // it may also succeed
	}{
		{"abort", func(ctx context.Context, t *testing.T, m *inFlight) {
			res, err := f.Run(ctx, "abort", m.id)
			if err != nil {
				t.Fatal(err)
			}
			if res.Code != 0 {
				t.Errorf("abort: exit code %d: %s%s", res.Code, res.Stdout, res.Stderr)
			}
		}, []int{3}, false},
		{"interrupt", func(_ context.Context, t *testing.T, m *inFlight) {
			if err := m.cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Fatal(err)
			}
		}, []int{3}, false},
		{"destination agent killed", func(ctx context.Context, t *testing.T, _ *inFlight) {
			restartAgent(ctx, t, "beta", unix.SIGKILL)
		}, []int{3}, false},
		{"destination agent stopped", func(ctx context.Context, t *testing.T, _ *inFlight) {
			restartAgent(ctx, t, "beta", unix.SIGTERM)
		}, []int{3}, false},
		{"source agent stopped", func(ctx context.Context, t *testing.T, _ *inFlight) {
			restartAgent(ctx, t, "alpha", unix.SIGTERM)
		}, []int{3}, false},
		{"bus restarted", func(ctx context.Context, t *testing.T, _ *inFlight) {
			if err := f.StopServe(ctx, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := f.StartServe(ctx); err != nil {
				t.Fatal(err)
			}
		}, []int{0, 3}, true},
		{"cable pulled for a moment", func(_ context.Context, t *testing.T, _ *inFlight) {
			if err := beta.Unplug(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second) // long enough for the stream to stall
			if err := beta.Plug(); err != nil {
				t.Fatal(err)
			}
		}, []int{0, 3}, true},
	} {
		t.Run(strings.ReplaceAll(tc.name, " ", "-"), func(t *testing.T) {
			ctx := deadline(t, 90*time.Second)
			r := selfcheck(ctx, t, alpha, newDir(t), "mem", "256", "500")
			m := launch(ctx, t, f, r, "beta")
			tc.disturb(ctx, t, m)
			code := m.wait(t)
			ok := false
			for _, c := range tc.codes {
				ok = ok || c == code
			}
			if !ok {
				t.Errorf("exit code %d, want one of %v: %s%s", code, tc.codes, m.stdout.String(), m.stderr.String())
			}
			if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
				t.Fatal(err)
			}
			if code == 0 {
				r.Host = beta
			}
			goes(ctx, t, r, 50)
			other := beta
			if r.Host == beta {
				other = alpha
			}
			if err := other.WaitGone(ctx, r.Pid); err != nil {
				t.Fatalf("two copies: %v", err)
			}
			migrate(ctx, t, f, r, other)
			stop(ctx, t, r)
		})
	}
}
