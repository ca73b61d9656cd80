package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/agent"
	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// journalDir is where the agent of a host notes what it holds.
func journalDir(h *hosts.Host) string { return h.Path("/run/godwit-agent/journal-" + h.Name()) }

// runsAt waits until the outcome of the migration that came after old others is
// known, and has r where that says.
func runsAt(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, old int, alpha, beta *hosts.Host) string {
	t.Helper()
	for ctx.Err() == nil {
		hist, err := f.History(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(hist) > old {
			switch last := hist[len(hist)-1]; last.State {
			case "completed":
				r.Host = beta
				return last.State
			case "aborted":
				r.Host = alpha
				return last.State
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the migration comes to no end")
	return ""
}

// TestAgentsDie kills an agent at each step of a migration and starts it again: the
// tree runs exactly once afterwards, and nothing is left over.
func TestAgentsDie(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 12*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	outcomes := map[string]int{}
	for _, point := range agent.Failpoints {
		t.Run(point, func(t *testing.T) {
			ctx := deadline(t, 3*time.Minute)
			dies := alpha
			if strings.HasPrefix(point, "destination.") {
				dies = beta
			}
			old := failAt(ctx, t, f, dies, point)
			r := selfcheck(ctx, t, alpha, newDir(t), "tree")
			mode := fleet.PreCopy
			if point == "destination.paging" {
				mode = "postcopy"
			}
			cmd := f.Godwit(ctx, "migrate", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--mode", mode, "--output", "json")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if err := dies.WaitGone(ctx, f.AgentPid(dies.Name())); err != nil {
				t.Fatal(err)
			}
			if err := f.StartAgent(ctx, dies.Name()); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // its outcome is that of the record
			if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
				t.Fatal(err)
			}
			outcome := runsAt(ctx, t, f, r, len(old), alpha, beta)
			goes(ctx, t, r, 10)
			other := beta
			if r.Host == beta {
				other = alpha
			}
			if err := other.WaitGone(ctx, r.Pid); err != nil {
				t.Fatalf("two copies: %v", err)
			}
			for _, h := range []*hosts.Host{alpha, beta} {
				awaitEmpty(ctx, t, journalDir(h))
			}
			stop(ctx, t, r)
			outcomes[outcome]++
			t.Logf("it was %s", outcome)
		})
	}
	if !t.Failed() && (outcomes["completed"] == 0 || outcomes["aborted"] == 0) {
		t.Errorf("of all migrations %v: want some of both", outcomes)
	}
}

// failAt has the agent of a host start anew, to die at a point of its next migration, and
// gives the migrations so far.
func failAt(ctx context.Context, t *testing.T, f *fleet.Fleet, h *hosts.Host, point string) []fleet.Migration {
	t.Helper()
	err := f.StopAgent(ctx, h.Name(), unix.SIGTERM)
	if err == nil {
		err = f.StartAgent(ctx, h.Name(), agent.FailpointEnv+"="+point+"=kill")
	}
	if err == nil {
		err = f.WaitHosts(ctx, "alpha", "beta")
	}
	if err != nil {
		t.Fatal(err)
	}
	old, err := f.History(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return old
}

// awaitEmpty waits until a directory has no files, or is not there.
func awaitEmpty(ctx context.Context, t *testing.T, dir string) {
	t.Helper()
	for {
		list, err := os.ReadDir(dir)
		if os.IsNotExist(err) || err == nil && len(list) == 0 {
			return
		}
		if err != nil || ctx.Err() != nil {
			t.Fatalf("%s keeps %v (%v)", dir, list, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestResolve: an operator says that a host is dead which dies after the commit, and is
// right or wrong about it; or dies before.
func TestResolve(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, tc := range []struct {
		point, flag, says string
	}{
		{"destination.handing", "--destination-is-dead", "runs on at alpha"},
		{"destination.ran", "--destination-is-dead", "runs on at alpha"}, // where it runs on beta, too
		{"source.held", "--source-is-dead", "is lost with alpha"},
	} {
		t.Run(tc.point, func(t *testing.T) {
			dies := beta
			if strings.HasPrefix(tc.point, "source.") {
				dies = alpha
			}
			old := failAt(ctx, t, f, dies, tc.point)
			r := selfcheck(ctx, t, alpha, newDir(t), "counter")
			cmd := f.Godwit(ctx, "migrate", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--detach")
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			if err := dies.WaitGone(ctx, f.AgentPid(dies.Name())); err != nil {
				t.Fatal(err)
			}
			now, err := f.History(ctx)
			if err != nil || len(now) != len(old)+1 {
				t.Fatalf("%d migrations, were %d: %v", len(now), len(old), err)
			}
			id := now[len(old)].ID
			for args, want := range map[string]string{"resolve " + id: "say which host is dead", "resolve " + id + " " + tc.flag: "add --yes"} {
				if res, err := f.Run(ctx, strings.Fields(args)...); err != nil || res.Code != 2 || !strings.Contains(res.Stderr, want) {
					t.Errorf("%s: exit code %d, %s, %v", args, res.Code, res.Stderr, err)
				}
			}
			other := map[string]string{"--destination-is-dead": "--source-is-dead", "--source-is-dead": "--destination-is-dead"}[tc.flag]
			if res, err := f.Run(ctx, "resolve", id, other, "--yes"); err != nil || res.Code == 0 {
				t.Errorf("resolve %s: exit code %d, %v", other, res.Code, err)
			}
			res, err := f.Run(ctx, "resolve", id, tc.flag, "--yes")
			if err != nil || res.Code != 0 || !strings.Contains(res.Stdout, tc.says) {
				t.Fatalf("resolve: exit code %d, %s%s, %v", res.Code, res.Stdout, res.Stderr, err)
			}
			if res, err := f.Run(ctx, "resolve", id, tc.flag, "--yes"); err != nil || res.Code == 0 || !strings.Contains(res.Stderr, "has ended already") {
				t.Errorf("resolve again: exit code %d, %s, %v", res.Code, res.Stderr, err)
			}
			if err := f.StartAgent(ctx, dies.Name()); err != nil {
				t.Fatal(err)
			}
			if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
				t.Fatal(err)
			}
			if err := beta.WaitGone(ctx, r.Pid); err != nil {
				t.Fatalf("two copies: %v", err)
			}
			if tc.point == "destination.ran" {
				// Both copies have written into the same file, as was to be expected.
				if err := alpha.Kill(r.Pid, unix.SIGKILL); err != nil {
					t.Error(err)
				}
				return
			}
			goes(ctx, t, r, 10) // a source that was not as dead as its operator believed lets it run on, too
			for _, h := range []*hosts.Host{alpha, beta} {
				awaitEmpty(ctx, t, journalDir(h))
			}
			stop(ctx, t, r)
		})
	}
}
