package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"godwit/testenv/hosts"
)

// newHostsAt makes hosts whose clocks that count from boot differ.
func newHostsAt(t *testing.T, clocks []time.Duration, names ...string) *hosts.Env {
	t.Helper()
	e, err := hosts.NewAt(base, clocks, names...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// TestClocks moves a program between hosts that have booted at different times:
// its clocks go on.
func TestClocks(t *testing.T) {
	e := newHostsAt(t, []time.Duration{5000 * time.Second, 0}, "alpha", "beta")
	alpha, beta := e.Host("alpha"), e.Host("beta")
	t.Run("back and forth", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, alpha, newDir(t), "clocks")
		for range 5 {
			for _, to := range []*hosts.Host{beta, alpha} {
				img := dump(ctx, t, r.Host, r.Pid)
				decodeImages(t, img)
				r.Host = to
				restore(ctx, t, to, img, r.Pid, nil)
				goes(ctx, t, r, 10)
			}
		}
		stop(ctx, t, r)
	})
	// From where they stood, as between different kernels.
	t.Run("new", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, alpha, newDir(t), "clocks")
		for _, to := range []*hosts.Host{alpha, beta, beta, alpha} {
			img := dump(ctx, t, r.Host, r.Pid)
			r.Host = to
			restore(ctx, t, to, img, r.Pid, nil, "--time-namespace", "new")
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
	})
	t.Run("own namespace", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		prefix := filepath.Join(newDir(t), "clocks")
		r := start(ctx, t, beta, prefix, "unshare", "-T", "--monotonic", "77777", "--boottime", "88888", programs.Selfcheck, "clocks", prefix, "77777")
		dumpRestore(ctx, t, r, 3)
		img := dump(ctx, t, beta, r.Pid)
		r.Host = alpha
		restore(ctx, t, alpha, img, r.Pid, nil, "--pid-namespace", "same")
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// With the destination's clocks the program itself says what is wrong.
	t.Run("keep", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		r := selfcheck(ctx, t, alpha, dir, "clocks")
		img := dump(ctx, t, alpha, r.Pid)
		restore(ctx, t, beta, img, r.Pid, nil, "--time-namespace", "keep")
		r.Host = beta
		if err := r.Goes(ctx, 10); err == nil {
			t.Fatal("the program noticed nothing")
		}
		b, err := os.ReadFile(filepath.Join(dir, "clocks.fail"))
		if said := string(b); err != nil || !strings.Contains(said, "went back") && !strings.Contains(said, "too early") {
			t.Errorf("the program says %q, %v", b, err)
		}
		if o := agentCmd(ctx, t, beta, nil, "restore", "-D", img, "--time-namespace", "other"); o.code != 1 || !strings.Contains(o.stderr, "--time-namespace") {
			t.Errorf("an unknown choice: exit code %d, %q", o.code, o.stderr)
		}
	})
	// One process of the tree has other clocks than the rest.
	t.Run("refused", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		for _, c := range []struct{ script, want string }{
			{`unshare -T --monotonic 9 sleep 1000 & echo $! >"$0"; while :; do sleep 1; done`, "lives in another time namespace than the root"},
			{`exec 9>"$0"; echo $$ >&9; exec unshare -T --fork sh -c "sleep 1000" 9>&-`, "makes its children in another time namespace"},
		} {
			file := filepath.Join(newDir(t), "pid")
			pid, err := beta.Start(ctx, hosts.Spec{Args: []string{"sh", "-c", c.script, file}})
			if err != nil {
				t.Fatal(err)
			}
			for {
				b, _ := os.ReadFile(file)
				if strings.TrimSpace(string(b)) != "" {
					break
				}
				time.Sleep(time.Millisecond)
			}
			refusedEventually(ctx, t, beta, pid, c.want)
			if err := beta.Kill(pid, 9); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestMigrateClocks is TestClocks by the coordinator.
func TestMigrateClocks(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := fleetOf(ctx, t, newHostsAt(t, []time.Duration{0, 4000 * time.Second, 0}, "alpha", "beta", "hub"))
	r := selfcheck(ctx, t, alpha, newDir(t), "clocks")
	for range 3 {
		migrate(ctx, t, f, r, beta)
		migrate(ctx, t, f, r, alpha)
	}
	stop(ctx, t, r)
}
