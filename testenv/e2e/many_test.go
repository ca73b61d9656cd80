package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// TestMigrateMany moves many trees at once between hosts that let a few come and go at
// a time: the others wait for their turn.
func TestMigrateMany(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, "[limits]\noutgoing = 2\nincoming = 1\n"))
	dir := newDir(t)
	var runs []*workloads.Run
	for i := range 16 {
		h := []*hosts.Host{alpha, beta}[i%2]
		prefix := filepath.Join(dir, fmt.Sprintf("threads%d", i))
		runs = append(runs, start(ctx, t, h, prefix, programs.Selfcheck, "threads", prefix))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	waited := 0
	for i, r := range runs {
		to := []*hosts.Host{beta, alpha}[i%2]
		wg.Go(func() {
			res, err := f.Run(ctx, "migrate", fmt.Sprintf("%s:%d", r.Host.Name(), r.Pid), to.Name())
			mu.Lock()
			defer mu.Unlock()
			if err != nil || res.Code != 0 {
				t.Errorf("tree %d: exit code %d, %s%s, %v", i, res.Code, res.Stdout, res.Stderr, err)
				return
			}
			if strings.Contains(res.Stderr, "waits for its turn") {
				waited++
			}
			r.Host = to
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	if waited == 0 {
		t.Error("nobody waited")
	}
	t.Logf("%d of %d waited", waited, len(runs))
	for _, r := range runs {
		goes(ctx, t, r, 5)
		stop(ctx, t, r)
	}
	history, err := f.History(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range history {
		if m.State != "completed" {
			t.Errorf("migration %s is %s", m.ID, m.State)
		}
	}
}
