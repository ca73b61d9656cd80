package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// contained starts a command of selfcheck that makes a pid namespace and runs in
// it: the Run is that of its first process there.
func contained(ctx context.Context, t *testing.T, h *hosts.Host, dir, command string, args ...string) *workloads.Run {
	t.Helper()
	r := selfcheck(ctx, t, h, dir, command, args...)
	readPid(t, r, r.Prefix+".pid")
	return r
}

func readPid(t *testing.T, r *workloads.Run, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &r.Pid); err != nil {
		t.Fatalf("pid file %s: %v", path, err)
	}
}

// moveContained dumps a tree in a pid namespace of its own and restores it; its
// pid on the host may be another one then.
func moveContained(ctx context.Context, t *testing.T, r *workloads.Run, n int, options ...string) {
	t.Helper()
	for i := range n {
		img := dump(ctx, t, r.Host, r.Pid, options...)
		if i == 0 {
			decodeImages(t, img)
		}
		pidfile := filepath.Join(img, "pid")
		mustAgent(ctx, t, r.Host, nil, append([]string{"restore", "-D", img, "-d", "--pidfile", pidfile}, options...)...)
		readPid(t, r, pidfile)
		if err := r.Goes(ctx, 5); err != nil {
			t.Fatalf("after %d rounds: %v", i+1, err)
		}
		if err := os.RemoveAll(img); err != nil {
			t.Fatal(err)
		}
	}
}

// hostMounts are the mounts of a host, which no restore may change.
func hostMounts(t *testing.T, h *hosts.Host) string {
	t.Helper()
	b, err := os.ReadFile(h.Path("/proc/1/mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// network is how the network namespace of a process is configured.
func network(ctx context.Context, t *testing.T, h *hosts.Host, pid int) []string {
	t.Helper()
	out, err := h.Run(ctx, "nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", pid), "sh", "-c",
		"ip -o link | sed 's/ state [A-Z]*//'; ip -o addr; for t in main 77; do ip route show table $t; done; ip -6 route show table all | sort; ip rule; ip -6 rule; cd /proc/sys/net; "+
			"grep . core/somaxconn unix/max_dgram_qlen ipv4/ip_forward ipv4/ip_local_port_range ipv4/conf/*/proxy_arp ipv4/conf/*/forwarding ipv6/conf/*/accept_dad")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(out, "\n")
}

// TestContainer moves trees that made namespaces of their own.
func TestContainer(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	before := hostMounts(t, h)
	t.Run("unshared", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := contained(ctx, t, h, newDir(t), "container")
		moveContained(ctx, t, r, 10)
		goes(ctx, t, r, 20)
		stop(ctx, t, r)
	})
	t.Run("network", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "netns")
		want := network(ctx, t, h, r.Pid)
		for range 10 {
			dumpRestore(ctx, t, r, 1, "--tcp-established")
			if diff := cmp.Diff(want, network(ctx, t, h, r.Pid)); diff != "" {
				t.Fatalf("the network changed (-was +is):\n%s", diff)
			}
		}
		goes(ctx, t, r, 20)
		stop(ctx, t, r)
	})
	if after := hostMounts(t, h); after != before {
		t.Errorf("the mounts of the host were\n%s\nand are\n%s", before, strings.TrimSpace(after))
	}
}
