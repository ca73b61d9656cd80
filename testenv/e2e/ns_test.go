package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	if after := hostMounts(t, h); after != before {
		t.Errorf("the mounts of the host were\n%s\nand are\n%s", before, strings.TrimSpace(after))
	}
}
