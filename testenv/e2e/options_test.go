package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFreezeCgroup dumps by the freezer of both versions of control groups, with a
// program in the group that is not part of the tree.
func TestFreezeCgroup(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for version, name := range []string{1: "freezer", 2: ""} {
		if version == 0 {
			continue
		}
		t.Run(fmt.Sprintf("version %d", version), func(t *testing.T) {
			ctx := deadline(t, 5*time.Minute)
			sh := func(format string, args ...any) string {
				t.Helper()
				out, err := h.Run(ctx, "sh", "-ec", fmt.Sprintf(format, args...))
				if err != nil {
					t.Fatal(err)
				}
				return out
			}
			mnt := fmt.Sprintf("/run/freezer%d", version)
			dir := fmt.Sprintf("%s/gw-%s", mnt, filepath.Base(base))
			freeze, thaw, state := "echo 1 >"+dir+"/cgroup.freeze", "echo 0 >"+dir+"/cgroup.freeze", dir+"/cgroup.freeze"
			if version == 1 {
				if b, err := os.ReadFile("/proc/cgroups"); err != nil || !strings.Contains(string(b), "freezer") || sh("grep -c :freezer: /proc/self/cgroup || true") == "0\n" {
					t.Skip("this machine has no freezer of version 1")
				}
				freeze, thaw, state = "echo FROZEN >"+dir+"/freezer.state", "echo THAWED >"+dir+"/freezer.state", dir+"/freezer.self_freezing"
				sh("mkdir %[1]s; mount -t cgroup -o %[2]s none %[1]s", mnt, name)
			} else {
				sh("mkdir %[1]s; mount -t cgroup2 none %[1]s", mnt)
			}
			sh("mkdir %s", dir)
			r, other := selfcheck(ctx, t, h, newDir(t), "threads"), selfcheck(ctx, t, h, newDir(t), "pidfd")
			defer func() {
				stop(ctx, t, r)
				stop(ctx, t, other)
				sh("%s; rmdir %s", thaw, dir)
			}()
			outside := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R", "--freeze-cgroup", dir)
			if outside.code != 1 || !strings.Contains(outside.stderr, "is not in the control group") {
				t.Errorf("a tree outside of the group: exit code %d, %q", outside.code, outside.stderr)
			}
			if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R", "--freeze-cgroup", mnt); o.code != 1 || !strings.Contains(o.stderr, "no control group that can be frozen") {
				t.Errorf("the root of a hierarchy: exit code %d, %q", o.code, o.stderr)
			}
			for _, run := range []int{r.Pid, other.Pid} {
				sh("echo %d >%s/cgroup.procs", run, dir)
			}
			for i := range 3 {
				img := dump(ctx, t, h, r.Pid, "--freeze-cgroup", dir)
				goes(ctx, t, other, 3)
				restore(ctx, t, h, img, r.Pid, nil)
				sh("echo %d >%s/cgroup.procs", r.Pid, dir)
				goes(ctx, t, r, 3)
				if i > 0 {
					continue
				}
				// One that stands still already is found, dumped and left so.
				sh("%s", freeze)
				img = newDir(t)
				mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img, "-R", "--freeze-cgroup", dir)
				if got := strings.TrimSpace(sh("cat %s", state)); got != "1" {
					t.Errorf("the group was frozen before the dump, and is %q after it", got)
				}
				o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
				if o.code != 1 || !strings.Contains(o.stderr, "frozen control group") {
					t.Errorf("a dump without the option: exit code %d, %q", o.code, o.stderr)
				}
				sh("%s", thaw)
				goes(ctx, t, r, 3)
				goes(ctx, t, other, 3)
				decodeImages(t, img)
			}
		})
	}
}
