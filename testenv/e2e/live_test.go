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

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// live moves a workload n times to and fro while it runs.
func live(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, n int, args ...string) {
	t.Helper()
	to := map[string]*hosts.Host{"alpha": f.Env.Host("beta"), "beta": f.Env.Host("alpha")}
	for range n {
		m := migrate(ctx, t, f, r, to[r.Host.Name()], append([]string{"--mode", fleet.PreCopy}, args...)...)
		if m.FrozenMS == nil {
			t.Fatal("no frozen time is reported")
		}
		t.Logf("to %s: sent %d MiB, memory %d MiB, total %.0f ms, frozen %.1f ms", r.Host.Name(), m.Bytes>>20, m.MemoryBytes>>20, m.TotalMS, *m.FrozenMS)
	}
}

// TestLiveDirty moves memory that changes all the time, and memory that does
// not: all of it is looked at in the end, and the row of changes repeated.
func TestLiveDirty(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	f, alpha, _ := newFleet(ctx, t)
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"idle", []string{"256", "0"}},
		{"50 MB a second", []string{"256", "50"}},
		{"threads and descriptors", []string{"64", "20", "50", "500"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", tc.args...)
			for range 6 {
				heartbeats(ctx, t, r)
				live(ctx, t, f, r, 1)
				h := heartbeats(ctx, t, r)
				t.Logf("longest pause %v, dirtied %d MB in %v", time.Duration(h.Longest), h.Dirtied/1e6, time.Duration(h.Until-h.Since))
			}
			stop(ctx, t, r)
		})
	}
}

func heartbeats(ctx context.Context, t *testing.T, r *workloads.Run) *workloads.Heartbeats {
	t.Helper()
	h, err := r.Heartbeats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestLiveChurn moves a tree whose mappings, heap, stack and children come and
// go while it is copied.
func TestLiveChurn(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, _ := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "churner")
	for i := range 5 {
		var slowly []string
		if i%2 == 1 { // so that more changes while it is on its way
			slowly = []string{"--bandwidth", "40MiB/s", "--compress", "none"}
		}
		live(ctx, t, f, r, 1, slowly...)
		goes(ctx, t, r, 50)
	}
	stop(ctx, t, r)
}

// TestLiveTree moves three processes with much memory each at once.
func TestLiveTree(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, _ := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "128", "20", "2", "10", "3")
	live(ctx, t, f, r, 4)
	stop(ctx, t, r)
}

// TestLiveGrandchild moves a process with much memory whose parent and grandparent have little.
func TestLiveGrandchild(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	prefix := filepath.Join(newDir(t), "dirtier")
	inner := fmt.Sprintf("%s dirtier %s 128 10; true", programs.Selfcheck, prefix)
	r := start(ctx, t, alpha, prefix, "sh", "-c", fmt.Sprintf("sh -c '%s'; true", inner))
	shell := *r
	for _, to := range []*hosts.Host{beta, alpha} {
		m, res, err := f.Migrate(ctx, shell.Host.Name(), shell.Pid, to.Name(), "--mode", fleet.PreCopy)
		if err != nil || res.Code != 0 {
			t.Fatalf("exit code %d, %s, %v", res.Code, res.Stderr, err)
		}
		if m.SourceReport.PrecopyBytes < 120<<20 {
			t.Errorf("%d bytes travelled early", m.SourceReport.PrecopyBytes)
		}
		shell.Host, r.Host = to, to
		goes(ctx, t, r, 20)
	}
	b, err := os.ReadFile(alpha.Path(fmt.Sprintf("/proc/%d/task/%d/children", shell.Pid, shell.Pid)))
	if err != nil {
		t.Fatal(err)
	}
	b, err = os.ReadFile(alpha.Path(fmt.Sprintf("/proc/%[1]s/task/%[1]s/children", strings.TrimSpace(string(b)))))
	if err != nil {
		t.Fatal(err)
	}
	if r.Pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		t.Fatal(err)
	}
	stop(ctx, t, r)
}

// TestLiveShort moves a tree under a downtime that it can hardly keep: it may
// take longer, or end as it began, but not break.
func TestLiveShort(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "256", "200")
	m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", "--mode", fleet.PreCopy, "--max-downtime", "1ms")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("exit code %d, %s: %s", res.Code, m.State, m.Reason)
	if m.Owner == "destination" {
		r.Host = beta
	}
	goes(ctx, t, r, 20)
	stop(ctx, t, r)
}

// TestLiveNoConverge moves memory that is written faster than it travels, as it is
// wanted then.
func TestLiveNoConverge(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "24", "200")
	args := []string{"--mode", fleet.PreCopy, "--bandwidth", "30MiB/s", "--compress", "none", "--max-rounds", "6", "--on-no-converge"}

	m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", append(args, "abort")...)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 3 || m.State != "aborted" || !strings.Contains(res.Stderr+res.Stdout, "memory is written at") {
		t.Errorf("exit code %d, %s: %s", res.Code, m.State, res.Stderr)
	}
	goes(ctx, t, r, 20)
	if err := beta.WaitGone(ctx, r.Pid); err != nil {
		t.Errorf("something of it is left on beta: %v", err)
	}

	m = migrate(ctx, t, f, r, beta, append(args, "freeze")...)
	if src := m.SourceReport; src == nil || src.Rounds == 0 || src.CopyNote == "" {
		t.Errorf("the report does not say that it was frozen for longer: %+v", src)
	}
	m = migrate(ctx, t, f, r, alpha, append(args, "throttle")...)
	if src := m.SourceReport; src == nil || src.Rounds < 4 {
		t.Errorf("the report does not tell of rounds: %+v", src)
	}
	stop(ctx, t, r)
}

// TestLiveNotes: what cannot be copied early travels all the same, and the plan says so.
func TestLiveNotes(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	prefix := filepath.Join(newDir(t), "counter")
	r := start(ctx, t, alpha, prefix, "unshare", "--uts", programs.Selfcheck, "counter", prefix)
	res, err := f.Run(ctx, "plan", fmt.Sprintf("alpha:%d", r.Pid), "beta")
	if err != nil || !strings.Contains(res.Stdout, "travels while the tree is frozen: it has a uts namespace") {
		t.Errorf("plan: %s%s, %v", res.Stdout, res.Stderr, err)
	}
	m := migrate(ctx, t, f, r, beta, "--mode", fleet.PreCopy)
	if src := m.SourceReport; src == nil || src.Rounds != 0 || !strings.Contains(src.CopyNote, "namespace of its own") {
		t.Errorf("the report: %+v", src)
	}
	stop(ctx, t, r)
}

// TestLiveAbort ends a migration while the tree is copied: it has not been frozen, and
// has nothing left of it.
func TestLiveAbort(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "64", "10")
	res, err := f.Run(ctx, "migrate", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--mode", fleet.PreCopy, "--bandwidth", "5MiB/s", "--compress", "none", "--detach")
	if err != nil || res.Code != 0 {
		t.Fatalf("exit code %d, %s, %v", res.Code, res.Stderr, err)
	}
	for {
		b, err := os.ReadFile(alpha.Path(fmt.Sprintf("/proc/%d/smaps", r.Pid)))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), " uw") {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the tree is never followed")
		}
		time.Sleep(5 * time.Millisecond)
	}
	heartbeats(ctx, t, r)
	hist, err := f.History(ctx)
	if err != nil || len(hist) != 1 {
		t.Fatalf("%d migrations, %v", len(hist), err)
	}
	if res, err := f.Run(ctx, "abort", hist[0].ID); err != nil || res.Code != 0 || !strings.Contains(res.Stdout, "runs on at alpha") {
		t.Errorf("abort: exit code %d, %s%s, %v", res.Code, res.Stdout, res.Stderr, err)
	}
	goes(ctx, t, r, 10)
	if h := heartbeats(ctx, t, r); time.Duration(h.Longest) > smallGap {
		t.Errorf("it stood for %v", time.Duration(h.Longest))
	}
	if err := beta.WaitGone(ctx, r.Pid); err != nil {
		t.Errorf("something of it is left on beta: %v", err)
	}
	for _, h := range []*hosts.Host{alpha, beta} {
		awaitEmpty(ctx, t, journalDir(h))
	}
	b, err := os.ReadFile(alpha.Path(fmt.Sprintf("/proc/%d/smaps", r.Pid)))
	if err != nil || strings.Contains(string(b), " uw") {
		t.Errorf("its memory is still followed (%v)", err)
	}
	stop(ctx, t, r)
}

// TestLiveKinds moves memory and tasks of many kinds in several rounds each.
func TestLiveKinds(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 6*time.Minute)
	f, alpha, _ := newFleet(ctx, t)
	for _, name := range []string{
		"advised", "churn", "clocks", "cow", "creds", "crowd", "devzero", "edges", "execer", "family", "futexes", "guards", "locked", "manyvmas", "memfd",
		"mmstate", "pasteof", "rseq", "sealed", "seccomp", "sessions", "shares", "signals", "spawner", "stack", "stopped", "sysvshm", "threads", "ticking", "timers", "tree",
		"vma", "zombies",
	} {
		t.Run(name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, alpha, newDir(t), name)
			live(ctx, t, f, r, 2, "--max-downtime", "1ms")
			stop(ctx, t, r)
		})
	}
}
