package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestCgroups puts a tree into groups of its own, of version 2 and, where the
// machine has them, of version 1, and moves it in every mode of --manage-cgroups.
func TestCgroups(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	sh := func(format string, args ...any) string {
		t.Helper()
		out, err := h.Run(ctx, "sh", "-ec", fmt.Sprintf(format, args...))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	r := selfcheck(ctx, t, h, newDir(t), "pidfd")
	name := "gw-" + filepath.Base(base)
	// Only what the groups are in is mounted for the test; v1 is every controller
	// with a hierarchy of version 1.
	sh("mkdir /run/cg /run/cg/2; mount -t cgroup2 none /run/cg/2; "+
		"for c in memory pids; do grep -q \":$c:\" /proc/self/cgroup || continue; mkdir /run/cg/$c; mount -t cgroup -o $c none /run/cg/$c; done; "+
		"mkdir /run/cg/2/%[1]s /run/cg/2/%[1]s/sub; echo 7 >/run/cg/2/%[1]s/sub/cgroup.max.depth; echo 9 >/run/cg/2/%[1]s/sub/cgroup.max.descendants; "+
		"if [ -d /run/cg/memory ]; then mkdir /run/cg/memory/%[1]s; echo 1G >/run/cg/memory/%[1]s/memory.limit_in_bytes; fi; "+
		"if [ -d /run/cg/pids ]; then mkdir /run/cg/pids/%[1]s /run/cg/pids/%[1]s/thread; echo 55 >/run/cg/pids/%[1]s/pids.max; fi", name)
	members := func() string {
		return sh("for p in $(ls /proc/%[1]d/task); do cat /proc/%[1]d/task/$p/cgroup; done; "+
			"cat /run/cg/2/%[2]s/sub/cgroup.max.depth /run/cg/2/%[2]s/sub/cgroup.max.descendants; "+
			"cat /run/cg/memory/%[2]s/memory.limit_in_bytes /run/cg/pids/%[2]s/pids.max 2>/dev/null || true", r.Pid, name)
	}
	remove := func() {
		sh("for d in /run/cg/*; do for g in $d/%[1]s/*/ $d/%[1]s; do if [ -d $g ]; then rmdir $g; fi; done; done", name)
	}
	t.Cleanup(func() {
		_, _ = h.Run(ctx, "sh", "-c", fmt.Sprintf("rmdir /run/cg/*/%[1]s/*/ /run/cg/*/%[1]s /run/cg/*/%[1]s-other 2>/dev/null", name))
	})
	sh("echo %[1]d >/run/cg/2/%[2]s/sub/cgroup.procs; "+
		"if [ -d /run/cg/memory ]; then echo %[1]d >/run/cg/memory/%[2]s/cgroup.procs; fi; "+
		"if [ -d /run/cg/pids ]; then echo %[1]d >/run/cg/pids/%[2]s/cgroup.procs; ls /proc/%[1]d/task | tail -1 >/run/cg/pids/%[2]s/thread/tasks; fi", r.Pid, name)
	want := members()
	if !strings.Contains(want, "0::/"+name+"/sub") {
		t.Fatalf("the program is in\n%s", want)
	}
	fails := func(want string, args ...string) {
		t.Helper()
		if o := agentCmd(ctx, t, h, nil, args...); o.code != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("%v: exit code %d, %q; want 1 and %q", args, o.code, o.stderr, want)
		}
	}
	// In a frozen group nothing can be asked of a program, and nothing is waited for.
	freezer := fmt.Sprintf("/run/cg/2/%s/sub/cgroup", name)
	sh("echo 1 >%[1]s.freeze; until grep -q 'frozen 1' %[1]s.events; do sleep 0.01; done", freezer)
	fails("frozen control group", "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
	sh("echo 0 >%s.freeze", freezer)
	goes(ctx, t, r, 5)
	for i := range 10 {
		img := dump(ctx, t, h, r.Pid, "--manage-cgroups")
		if i == 0 {
			decodeImages(t, img)
			fails("exists already", "restore", "-D", img, "-d", "--manage-cgroups=strict")
		}
		if i%2 == 0 {
			remove()
		}
		if i == 2 {
			fails("does not exist", "restore", "-D", img, "-d", "--manage-cgroups=cg-none")
			fails("does not exist", "restore", "-D", img, "-d", "--manage-cgroups=props")
		}
		mode := []string{"--manage-cgroups", "--manage-cgroups=props", "--manage-cgroups=strict", "--manage-cgroups=cg-none", "--manage-cgroups=full", "--manage-cgroups=full"}[i%6]
		restore(ctx, t, h, img, r.Pid, nil, mode)
		if diff := cmp.Diff(want, members()); diff != "" {
			t.Fatalf("round %d, %s: (-was +is)\n%s", i+1, mode, diff)
		}
		goes(ctx, t, r, 5)
	}
	// Without the option, and elsewhere.
	img := dump(ctx, t, h, r.Pid, "--manage-cgroups=soft")
	remove()
	restore(ctx, t, h, img, r.Pid, nil)
	if got := sh("grep ^0: /proc/%d/cgroup", r.Pid); strings.Contains(got, name) {
		t.Errorf("without --manage-cgroups the tree is in %s", got)
	}
	goes(ctx, t, r, 5)
	img = dump(ctx, t, h, r.Pid)
	fails("dump it with --manage-cgroups", "restore", "-D", img, "-d", "--manage-cgroups")
	restore(ctx, t, h, img, r.Pid, nil)
	img = dump(ctx, t, h, r.Pid, "--manage-cgroups")
	restore(ctx, t, h, img, r.Pid, nil, "--manage-cgroups", "--cgroup-root", ":/"+name+"-other")
	if got := sh("grep ^0: /proc/%d/cgroup", r.Pid); strings.TrimSpace(got) != "0::/"+name+"-other" {
		t.Errorf("with --cgroup-root the tree is in %s", got)
	}
	fails("is no way to handle cgroups", "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--manage-cgroups=maybe")
	stop(ctx, t, r)
	sh("rmdir /run/cg/2/%s-other", name)
	// A restore that failed leaves no groups.
	if out := sh("ls -d /run/cg/*/%s 2>/dev/null || true", name); out != "" {
		t.Errorf("groups are left: %s", out)
	}
}
