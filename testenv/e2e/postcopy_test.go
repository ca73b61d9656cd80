package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
)

// TestPostcopy moves memory that changes all the time, and comes when the program runs
// at the destination already.
func TestPostcopy(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, tc := range []struct {
		name     string
		workload []string
		args     []string
	}{
		{"postcopy", []string{"dirtier", "256", "50"}, []string{"--mode", "postcopy"}},
		{"hybrid", []string{"dirtier", "256", "50"}, []string{"--mode", "hybrid"}},
		{"no convergence", []string{"dirtier", "64", "200", "20", "50"}, []string{"--mode", "precopy", "--bandwidth", "60MiB/s", "--max-rounds", "4", "--on-no-converge", "postcopy"}},
		{"churn", []string{"churner"}, []string{"--mode", "postcopy"}},
		{"a tree", []string{"dirtier", "64", "20", "2", "10", "3"}, []string{"--mode", "postcopy"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, alpha, newDir(t), tc.workload[0], tc.workload[1:]...)
			for _, to := range []int{1, 0} {
				dst := beta
				if to == 0 {
					dst = alpha
				}
				m, res, err := f.Migrate(ctx, r.Host.Name(), r.Pid, dst.Name(), tc.args...)
				if err != nil || res.Code != 0 {
					t.Fatalf("exit code %d, %s, %v", res.Code, res.Stderr, err)
				}
				r.Host = dst
				d := m.DestinationReport
				t.Logf("to %s: frozen %.1f ms; then %.0f ms, %d MiB, %d faults (%.2f, %.2f ms)", dst.Name(), *m.FrozenMS, d.PagingMS, d.PagedBytes>>20, d.Faults, d.FaultP50MS, d.FaultP99MS)
				if d.PagedBytes == 0 {
					t.Error("no memory came later")
				}
				goes(ctx, t, r, 50)
			}
			stop(ctx, t, r)
		})
	}
}

// TestPostcopyTrouble: while memory of a tree that runs at its destination is still at the
// source, agents die, the link is cut, and the process that brings it is killed.
func TestPostcopyTrouble(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	agents := func(t *testing.T, names ...string) {
		t.Helper()
		for _, name := range names {
			if err := f.StartAgent(ctx, name); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
			t.Fatal(err)
		}
	}
	kill := func(t *testing.T, name string) {
		t.Helper()
		if err := f.StopAgent(ctx, name, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, id string)
		end  string // the state in the end
		lost bool   // the tree ends at the destination
	}{
		{"the source's agent", func(t *testing.T, _ string) {
			kill(t, "alpha")
			time.Sleep(500 * time.Millisecond)
			agents(t, "alpha")
		}, "completed", false},
		{"the destination's agent", func(t *testing.T, _ string) {
			kill(t, "beta")
			time.Sleep(500 * time.Millisecond)
			agents(t, "beta")
		}, "completed", false},
		{"both agents", func(t *testing.T, _ string) {
			kill(t, "alpha")
			kill(t, "beta")
			time.Sleep(500 * time.Millisecond)
			agents(t, "alpha", "beta")
		}, "completed", false},
		{"the link", func(t *testing.T, _ string) {
			if err := alpha.Unplug(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(1500 * time.Millisecond)
			if err := alpha.Plug(); err != nil {
				t.Fatal(err)
			}
		}, "completed", false},
		{"the pager", func(t *testing.T, id string) {
			pid := pagerOf(t, beta)
			if err := beta.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(ctx, t, f, id, func(m *fleet.Migration) bool { return m.Error != nil && strings.Contains(m.Error.Message, "pager") })
			res, err := f.Run(ctx, "resolve", id, "--destination-is-dead", "--yes")
			if err != nil || res.Code != 0 || !strings.Contains(res.Stdout, "runs on at alpha") {
				t.Errorf("resolve: exit code %d, %s%s, %v", res.Code, res.Stdout, res.Stderr, err)
			}
		}, "aborted", true},
		{"the source", func(t *testing.T, id string) {
			kill(t, "alpha")
			res, err := f.Run(ctx, "resolve", id, "--source-is-dead", "--yes")
			if err != nil || res.Code != 0 || !strings.Contains(res.Stdout, "is lost with alpha") {
				t.Errorf("resolve: exit code %d, %s%s, %v", res.Code, res.Stdout, res.Stderr, err)
			}
			agents(t, "alpha")
		}, "completed", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, alpha, newDir(t), "dirtier", "64", "5")
			res, err := f.Run(ctx, "migrate", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--mode", "postcopy", "--bandwidth", "20MiB/s", "--detach", "--output", "json")
			if err != nil || res.Code != 0 {
				t.Fatalf("exit code %d, %s, %v", res.Code, res.Stderr, err)
			}
			var begun struct{ ID string }
			if err := json.Unmarshal([]byte(res.Stdout), &begun); err != nil || begun.ID == "" {
				t.Fatalf("%s: %v", res.Stdout, err)
			}
			until(ctx, t, f, begun.ID, func(m *fleet.Migration) bool { return m.State == "paging" })
			tc.do(t, begun.ID)
			until(ctx, t, f, begun.ID, func(m *fleet.Migration) bool { return m.State == tc.end })
			if tc.lost {
				if err := beta.WaitGone(ctx, r.Pid); err != nil {
					t.Error(err)
				}
				if tc.end == "aborted" { // its other copy had written into the same files
					err = alpha.Kill(r.Pid, unix.SIGKILL)
				} else {
					err = alpha.WaitGone(ctx, r.Pid)
				}
				if err != nil {
					t.Error(err)
				}
			} else {
				r.Host = beta
				goes(ctx, t, r, 50)
				stop(ctx, t, r)
				if err := alpha.WaitGone(ctx, r.Pid); err != nil {
					t.Error(err)
				}
			}
			for _, h := range []*hosts.Host{alpha, beta} {
				awaitEmpty(ctx, t, journalDir(h))
			}
		})
	}
}

// until waits until a migration is as it should be.
func until(ctx context.Context, t *testing.T, f *fleet.Fleet, id string, is func(*fleet.Migration) bool) {
	t.Helper()
	var last fleet.Migration
	for ctx.Err() == nil {
		hist, err := f.History(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range hist {
			if last = m; m.ID == id && is(&m) {
				return
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("the migration stays %s: %v", last.State, last.Error)
}

// pagerOf finds the pager of a host.
func pagerOf(t *testing.T, h *hosts.Host) int {
	t.Helper()
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		list, err := os.ReadDir(h.Path("/proc"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			b, _ := os.ReadFile(h.Path("/proc/" + e.Name() + "/cmdline"))
			if pid, err := strconv.Atoi(e.Name()); err == nil && strings.HasSuffix(string(b), "\x00page\x00") {
				return pid
			}
		}
	}
	t.Fatal("there is no pager")
	return 0
}
