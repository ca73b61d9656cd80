package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
)

// sentBytes is what a host has sent over its network so far.
func sentBytes(h *hosts.Host) (uint64, error) {
	b, err := os.ReadFile(h.Path("/proc/1/net/dev"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "eth0:"); ok {
			return strconv.ParseUint(strings.Fields(rest)[8], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no eth0: %s", h.Name(), b)
}

// TestLane: a stream takes the way from host to host, the one over the cluster where the network
// does not let it, and goes on there when the direct way is lost in the middle.
func TestLane(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	// Only between these two: both still reach the hub.
	cut := func(what string) error {
		_, err := beta.Run(ctx, "ip", "route", what, "unreachable", alpha.Addr().String()+"/32")
		return err
	}
	route := func(t *testing.T, what string) {
		t.Helper()
		if err := cut(what); err != nil {
			t.Fatal(err)
		}
	}
	where := fmt.Sprintf("direct %s:4223", alpha.Addr())
	const memory = 32
	for _, tc := range []struct {
		name, compress string
		before         bool // the way is gone before
		during         bool // or in the middle
		lane           string
	}{
		{name: "direct", compress: "s2", lane: where},
		{name: "blocked", compress: "zstd", before: true, lane: fmt.Sprintf("cluster (direct: %s:4223: no route to host)", alpha.Addr())},
		{name: "cut", compress: "none", during: true, lane: where + ", then cluster (the direct connections were lost)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, 40*time.Second)
			r := selfcheck(ctx, t, alpha, newDir(t), "mem", strconv.Itoa(memory), "500")
			if tc.before {
				route(t, "add")
			}
			args := []string{"--mode", fleet.StopAndCopy, "--compress", tc.compress}
			if tc.before || tc.during {
				defer route(t, "del")
			}
			if tc.during {
				args = append(args, "--bandwidth", "20MiB/s")
				done := make(chan error, 1)
				defer func() {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}()
				begun, err := sentBytes(alpha)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for ctx.Err() == nil {
						if n, err := sentBytes(alpha); err != nil {
							done <- err
							return
						} else if n-begun >= memory<<20/4 {
							break
						}
						time.Sleep(5 * time.Millisecond)
					}
					done <- cut("add")
				}()
			}
			if !tc.during {
				res, err := f.Run(ctx, "plan", fmt.Sprintf("alpha:%d", r.Pid), "beta")
				if err != nil || res.Code != 0 || !strings.Contains(res.Stdout, "lane: "+tc.lane+"\n") {
					t.Errorf("the plan does not say %q: %v, exit code %d, %s%s", tc.lane, err, res.Code, res.Stdout, res.Stderr)
				}
			}
			m := migrate(ctx, t, f, r, beta, args...)
			rep := m.SourceReport
			if rep == nil || rep.Lane != tc.lane || rep.Compression != tc.compress {
				t.Fatalf("the report says %+v, want lane %q, compression %s", rep, tc.lane, tc.compress)
			}
			if smaller := m.Bytes-m.ResentBytes < rep.StreamBytes; smaller == (tc.compress == "none") {
				t.Errorf("%d bytes on the wire, %d again, for %d of the stream", m.Bytes, m.ResentBytes, rep.StreamBytes)
			}
			// No more than a window, and what went on into the dead connection.
			if m.ResentBytes > 20<<20 || !tc.during && m.ResentBytes != 0 {
				t.Errorf("%d bytes were sent again", m.ResentBytes)
			}
			stop(ctx, t, r)
		})
	}
	t.Run("only direct", func(t *testing.T) {
		r := selfcheck(ctx, t, alpha, newDir(t), "mem", "1", "500")
		route(t, "add")
		defer route(t, "del")
		_, res, err := f.Migrate(ctx, "alpha", r.Pid, "beta", "--lane", "direct")
		if err != nil || res.Code != 4 || !strings.Contains(res.Stdout, "no route to host") {
			t.Errorf("%v, exit code %d, want 4: %s", err, res.Code, res.Stdout)
		}
		stop(context.WithoutCancel(ctx), t, r)
	})
}
