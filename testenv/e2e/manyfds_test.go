package e2e

import (
	"testing"
	"time"
)

// TestManyDescriptors carries nearly as many descriptors as one process may
// have, and more than the agent may have in several.
func TestManyDescriptors(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, tc := range []struct {
		name       string
		procs, fds string
		rounds     int
	}{
		{"18,000 in one process", "1", "18000", 2},
		{"10,000 in each of ten", "10", "10000", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, 5*time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "manyfds", tc.procs, tc.fds)
			dumpRestore(ctx, t, r, tc.rounds)
			goes(ctx, t, r, 20)
			stop(ctx, t, r)
		})
	}
}
