package e2e

import (
	"testing"
	"time"
)

// TestTCPOutside dumps and restores a tree whose TCP connections lead to a peer
// outside of it, which must not notice anything but a pause.
func TestTCPOutside(t *testing.T) {
	for _, tc := range []struct {
		name, family, address string
		far                   bool // the peer is on another host
		device                string
	}{
		{name: "loopback", family: "4", address: "127.0.0.1"},
		{name: "loopback IPv6", family: "6", address: "::1"},
		{name: "loopback mapped", family: "m", address: "127.0.0.1"},
		{name: "veth", family: "4", far: true},
		{name: "veth mapped", family: "m", far: true},
		{name: "veth by device", family: "4", far: true, device: "eth0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, 3*time.Minute)
			env := newHosts(t, "alpha", "beta")
			h, other := env.Host("alpha"), env.Host("alpha")
			if tc.far {
				other = env.Host("beta")
				tc.address = other.Addr().String()
			}
			dir := newDir(t)
			peer := selfcheck(ctx, t, other, dir, "tcppeer", "7000")
			args := []string{tc.family, tc.address, "7000"}
			if tc.device != "" {
				args = append(args, tc.device)
			}
			r := selfcheck(ctx, t, h, dir, "tcpout", args...)
			for range 10 {
				dumpRestore(ctx, t, r, 1, "--tcp-established")
				goes(ctx, t, peer, 5)
			}
			stop(ctx, t, r)
			stop(ctx, t, peer)
		})
	}
}
