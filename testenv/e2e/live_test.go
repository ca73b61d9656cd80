package e2e

import (
	"context"
	"testing"
	"time"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// live moves a workload n times to and fro while it runs.
func live(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, n int, args ...string) {
	t.Helper()
	mode, known, err := f.Mode(ctx, fleet.PreCopy)
	if err != nil {
		t.Fatal(err)
	}
	if !known {
		t.Log("godwit migrate has no --mode: moved by stop-and-copy")
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the workload says: %v", r.Failed())
		}
	})
	to := map[string]*hosts.Host{"alpha": f.Env.Host("beta"), "beta": f.Env.Host("alpha")}
	for range n {
		m := migrate(ctx, t, f, r, to[r.Host.Name()], append(mode, args...)...)
		if m.FrozenMS == nil {
			t.Fatal("no frozen time is reported")
		}
		t.Logf("to %s: sent %d MiB, memory %d MiB, total %.0f ms, frozen %.1f ms", r.Host.Name(), m.Bytes>>20, m.MemoryBytes>>20, m.TotalMS, *m.FrozenMS)
	}
}

// TestLiveDirty moves memory that changes all the time, and memory that does
// not: all of it is looked at in the end, and the row of changes repeated.
func TestLiveDirty(t *testing.T) {
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
			slowly = []string{"--bandwidth", "40MiB/s"}
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

// TestLiveShort moves a tree under a downtime that it can hardly keep: it may
// take longer, or end as it began, but not break.
func TestLiveShort(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	mode, known, err := f.Mode(ctx, fleet.PreCopy)
	if err != nil {
		t.Fatal(err)
	}
	if !known {
		t.Skip("godwit migrate has no --mode")
	}
	r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "256", "200")
	m, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", append(mode, "--max-downtime", "1ms")...)
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
