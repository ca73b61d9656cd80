package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestScriptStages has action scripts told of every stage in the life of a tree
// with namespaces of its own, each with the pid that it has on this host.
func TestScriptStages(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := contained(ctx, t, h, newDir(t), "userns", "many")
	notes := filepath.Join(newDir(t), "notes")
	script := fmt.Sprintf("echo $CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID:+pid}$(test $CRTOOLS_SCRIPT_ACTION = post-setup-namespaces && nsenter --net=/proc/$CRTOOLS_INIT_PID/ns/net ip -o link | grep -c ': lo:') >>%s", notes)
	told := func(want ...string) {
		t.Helper()
		b, err := os.ReadFile(notes)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(b)); got != strings.Join(want, "\n") {
			t.Errorf("scripts were called for\n%s\nwant\n%s", got, strings.Join(want, "\n"))
		}
		if err := os.Remove(notes); err != nil {
			t.Fatal(err)
		}
	}
	mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R", "--action-script", script)
	told("pre-dump", "network-lock pid", "post-dump pid", "network-unlock pid")
	goes(ctx, t, r, 5)
	img := dump(ctx, t, h, r.Pid, "--action-script", script)
	told("pre-dump", "network-lock pid", "post-dump pid")
	pidfile := filepath.Join(img, "pid")
	mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "--pidfile", pidfile, "--action-script", script)
	readPid(t, r, pidfile)
	told("pre-restore", "setup-namespaces pid", "post-setup-namespaces pid1", "post-restore pid", "network-unlock pid", "pre-resume pid", "post-resume pid")
	goes(ctx, t, r, 5)
	// A script that fails there ends the restore, and one that fails at the lock the dump.
	fails := func(stage string) []string {
		return []string{"--action-script", fmt.Sprintf("test $CRTOOLS_SCRIPT_ACTION != %s", stage)}
	}
	if o := agentCmd(ctx, t, h, nil, append([]string{"dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)}, fails("network-lock")...)...); o.code != 1 || !strings.Contains(o.stderr, "network-lock") {
		t.Errorf("dump: exit code %d, %q", o.code, o.stderr)
	}
	goes(ctx, t, r, 5)
	img = dump(ctx, t, h, r.Pid)
	if o := agentCmd(ctx, t, h, nil, append([]string{"restore", "-D", img, "-d"}, fails("setup-namespaces")...)...); o.code != 1 || !strings.Contains(o.stderr, "setup-namespaces") {
		t.Errorf("restore: exit code %d, %q", o.code, o.stderr)
	}
	pidfile = filepath.Join(img, "pid")
	mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "--pidfile", pidfile)
	readPid(t, r, pidfile)
	goes(ctx, t, r, 5)
	stop(ctx, t, r)
}
