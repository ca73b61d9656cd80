package e2e

import (
	"testing"
	"time"
)

// TestPostcopy moves memory that changes all the time, and comes when the program runs
// at the destination already.
func TestPostcopy(t *testing.T) {
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
