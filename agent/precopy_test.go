package agent

import (
	"strings"
	"testing"
	"time"

	"godwit/wire"
)

// tree is a program that writes to new pages at a rate, copied over a link.
type tree struct {
	memory, rate, link float64 // bytes, bytes per second, bytes per second
}

// copied plays rounds until they end, and says how, and what is left.
func copied(t *testing.T, x tree, o *wire.MigrateOptions) (c *convergence, last copyStep, pending float64, slowed int) {
	t.Helper()
	c = newConvergence(o, uint64(x.memory))
	send, rate := x.memory, x.rate
	for range 1000 {
		took := send/x.link + 0.001
		pending = min(rate*took, x.memory)
		switch last = c.round(uint64(send), time.Duration(took*1e9), uint64(pending)); last {
		case copyFreeze, copyAbort:
			return c, last, pending, slowed
		case copyThrottle:
			slowed++
			rate = x.rate * float64(10-slowed) / 10
		}
		send = pending
	}
	t.Fatal("the rounds never end")
	return
}

func TestConvergence(t *testing.T) {
	const mb, gib = 1e6, 1 << 30
	for _, tt := range []struct {
		name   string
		tree   tree
		o      *wire.MigrateOptions
		end    copyStep
		fits   bool // into the downtime
		rounds [2]int
		why    string
	}{
		{"idle", tree{gib, 0, 300 * mb}, nil, copyFreeze, true, [2]int{1, 1}, ""},
		{"a little", tree{gib, 50 * mb, 300 * mb}, nil, copyFreeze, true, [2]int{2, 8}, ""},
		{"much", tree{gib, 200 * mb, 300 * mb}, nil, copyFreeze, true, [2]int{4, 20}, ""},
		{"too much", tree{gib, 500 * mb, 300 * mb}, nil, copyFreeze, false, [2]int{2, 8}, "is written at"},
		{"too much, abort", tree{gib, 500 * mb, 300 * mb}, &wire.MigrateOptions{NoConverge: wire.NoConverge_NO_CONVERGE_ABORT}, copyAbort, false, [2]int{2, 8}, "is written at"},
		{"too much, throttle", tree{gib, 500 * mb, 300 * mb}, &wire.MigrateOptions{NoConverge: wire.NoConverge_NO_CONVERGE_THROTTLE}, copyFreeze, true, [2]int{5, 60}, ""},
		{"far too much, throttle", tree{gib, 9000 * mb, 300 * mb}, &wire.MigrateOptions{NoConverge: wire.NoConverge_NO_CONVERGE_THROTTLE}, copyFreeze, false, [2]int{5, 60}, "is written at"},
		{"a long downtime", tree{gib, 200 * mb, 300 * mb}, &wire.MigrateOptions{MaxDowntimeMs: 60_000}, copyFreeze, true, [2]int{1, 20}, ""},
		{"few rounds", tree{gib, 200 * mb, 300 * mb}, &wire.MigrateOptions{MaxRounds: 2}, copyFreeze, false, [2]int{2, 2}, "after 2 rounds"},
		{"few bytes", tree{gib, 200 * mb, 300 * mb}, &wire.MigrateOptions{MaxCopyBytes: 3 << 29}, copyFreeze, false, [2]int{1, 2}, "were sent"},
		{"few bytes, abort", tree{gib, 200 * mb, 300 * mb}, &wire.MigrateOptions{MaxCopyBytes: 3 << 29, NoConverge: wire.NoConverge_NO_CONVERGE_ABORT}, copyAbort, false, [2]int{1, 2}, "were sent"},
		{"tiny", tree{1 << 20, 0, 300 * mb}, nil, copyFreeze, true, [2]int{1, 1}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, end, pending, _ := copied(t, tt.tree, tt.o)
			freeze := time.Duration(pending / tt.tree.link * 1e9)
			if end != tt.end || (freeze <= c.downtime) != tt.fits {
				t.Errorf("in the end %s with a freeze of %v, want %s", end, freeze, tt.end)
			}
			if c.rounds < tt.rounds[0] || c.rounds > tt.rounds[1] {
				t.Errorf("%d rounds, want %v", c.rounds, tt.rounds)
			}
			if (c.why == "") != (tt.why == "") || !strings.Contains(c.why, tt.why) {
				t.Errorf("it says %q, want %q in it", c.why, tt.why)
			}
		})
	}
}
