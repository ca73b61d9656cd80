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
			if err := f.StopAgent(ctx, dies.Name(), unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := f.StartAgent(ctx, dies.Name(), agent.FailpointEnv+"="+point+"=kill"); err != nil {
				t.Fatal(err)
			}
			if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
				t.Fatal(err)
			}
			old, err := f.History(ctx)
			if err != nil {
				t.Fatal(err)
			}
			r := selfcheck(ctx, t, alpha, newDir(t), "tree")
			cmd := f.Godwit(ctx, "migrate", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--mode", fleet.PreCopy, "--output", "json")
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
