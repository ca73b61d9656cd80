package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
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
			dir := fmt.Sprintf("%s/gwf-%s", mnt, filepath.Base(base))
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

// parent restores a tree as a child of itself, and looks whether it is, and the only one.
const parent = `
import os, subprocess, sys
subprocess.run(sys.argv[2:], check=True)
pid = int(open(sys.argv[1]).read())
stat = open(f"/proc/{pid}/stat").read()
ppid = int(stat[stat.rindex(")") + 2:].split()[1])
if ppid != os.getpid():
    sys.exit(f"the parent of {pid} is {ppid}, not {os.getpid()}")
ended = os.waitpid(-1, os.WNOHANG)
if ended[0] != 0:
    sys.exit(f"another child has ended: {ended}")
`

// TestRestoreSibling: the root comes back as a child of the restorer's parent, which
// gets no other children.
func TestRestoreSibling(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, command := range []string{"pidfd", "sessions", "threads", "tcpconn"} {
		t.Run(command, func(t *testing.T) {
			ctx := deadline(t, 2*time.Minute)
			options := objects[command].options
			r := selfcheck(ctx, t, h, newDir(t), command)
			for range 3 {
				img := dump(ctx, t, h, r.Pid, options...)
				args := append([]string{"-c", parent, filepath.Join(img, "pid"), binaries.Agent, "restore", "-D", img, "-dS", "--pidfile", "pid"}, options...)
				if out, err := h.Run(ctx, "python3", args...); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if b, err := os.ReadFile(filepath.Join(img, "pid")); err != nil || string(b) != fmt.Sprint(r.Pid) {
					t.Errorf("the pid file says %q (%v), want %d", b, err, r.Pid)
				}
				goes(ctx, t, r, 5)
			}
			stop(ctx, t, r)
		})
	}
	t.Run("container", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := contained(ctx, t, h, newDir(t), "container")
		for range 3 {
			img := dump(ctx, t, h, r.Pid)
			pidfile := filepath.Join(img, "pid")
			if out, err := h.Run(ctx, "python3", "-c", parent, pidfile, binaries.Agent, "restore", "-D", img, "-dS", "--pidfile", "pid"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			readPid(t, r, pidfile)
			goes(ctx, t, r, 5)
		}
		stop(ctx, t, r)
	})
	t.Run("taken", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "pidfd")
		img := newDir(t)
		mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img, "-R")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-dS"); o.code != 1 || !strings.Contains(o.stderr, fmt.Sprintf("pid %d is taken", r.Pid)) {
			t.Errorf("beside the running tree: exit code %d, %q", o.code, o.stderr)
		}
		stop(ctx, t, r)
	})
}

// TestStatusOptions: who is told of a restore, and what is executed in its place.
func TestStatusOptions(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "threads")
	told := func(args ...string) {
		t.Helper()
		in, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = in.Close() }()
		mustAgent(ctx, t, h, []*os.File{out}, args...)
		_ = out.Close()
		if b, err := io.ReadAll(in); err != nil || string(b) != "\x00" {
			t.Errorf("%v: the status descriptor was told %q (%v)", args, b, err)
		}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	o := agentCmd(ctx, t, h, []*os.File{null}, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R", "--close", "3", "--status-fd", "3")
	if o.code != 1 || !strings.Contains(o.stderr, "descriptor 3 is not open") {
		t.Errorf("a descriptor that is closed first: exit code %d, %q", o.code, o.stderr)
	}
	img := newDir(t)
	told("dump", "-t", fmt.Sprint(r.Pid), "-D", img, "--status-fd", "3", "--pidfile", "root", "-o", "dump.log", "-v4", "--log-pid")
	if err := h.WaitGone(ctx, r.Pid); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"root": fmt.Sprint(r.Pid), fmt.Sprintf("dump.log.%d", r.Pid): "process dumped", "dump.log": "process dumped"} {
		if b, err := os.ReadFile(filepath.Join(img, name)); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s holds %q (%v), want %q", name, b, err, want)
		}
	}
	told("restore", "-D", img, "-d", "--status-fd=3", "--tree", fmt.Sprint(r.Pid), "--timeout", "5", "--weak-sysctls", "--mntns-compat-mode", "--lsm-profile", "none")
	goes(ctx, t, r, 5)

	img = dump(ctx, t, h, r.Pid, "-r", "/", "--weak-sysctls", "--mntns-compat-mode", "--network-lock", "iptables")
	script := `import os, sys
stat = open("/proc/" + sys.argv[1] + "/stat").read()
sys.exit(7 if int(stat[stat.rindex(")") + 2:].split()[1]) == os.getpid() else 8)`
	o = agentCmd(ctx, t, h, nil, "restore", "-D", img, "--exec-cmd", "--", "python3", "-c", script, fmt.Sprint(r.Pid))
	if o.code != 7 {
		t.Errorf("the command of --exec-cmd ended with %d: %s", o.code, o.stderr)
	}
	goes(ctx, t, r, 5)

	// Stopped until it is told to go on.
	img = dump(ctx, t, h, r.Pid)
	restore(ctx, t, h, img, r.Pid, nil, "--leave-stopped")
	// The signal is there before it is let go; a moment later it has stopped.
	if _, err := h.Run(ctx, "sh", "-c", fmt.Sprintf("until grep -q 'State.*(stopped)' /proc/%[1]d/status; do sleep 0.01; done; kill -CONT %[1]d", r.Pid)); err != nil {
		t.Errorf("with --leave-stopped it does not stop: %v", err)
	}
	goes(ctx, t, r, 5)
	stop(ctx, t, r)
}

// TestCgroupOptions: what is recorded of control groups, and where they are looked for.
func TestCgroupOptions(t *testing.T) {
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
	name := "gwo-" + filepath.Base(base)
	sets := "/run/yard/cpuset/" + name
	// A yard with version 2, and the cpusets of version 1 where the machine has those.
	sh("mkdir -p /run/yard/unified; mount -t cgroup2 none /run/yard/unified; mkdir -p /run/yard/unified/%[1]s/sub; chmod 750 /run/yard/unified/%[1]s; "+
		"if grep -q :cpuset: /proc/self/cgroup; then mkdir /run/yard/cpuset; mount -t cgroup -o cpuset none /run/yard/cpuset; mkdir %[2]s; "+
		"for f in cpus mems; do cat /run/yard/cpuset/cpuset.$f >%[2]s/cpuset.$f; done; echo 1 >%[2]s/cpuset.memory_migrate; echo %[3]d >%[2]s/cgroup.procs; fi; "+
		"echo %[3]d >/run/yard/unified/%[1]s/sub/cgroup.procs", name, sets, r.Pid)
	v1 := sh("ls /run/yard") == "cpuset\nunified\n"
	remove := func(name string) {
		sh("for g in /run/yard/*/%[1]s/sub /run/yard/*/%[1]s; do if [ -d $g ]; then rmdir $g; fi; done", name)
	}
	t.Cleanup(func() {
		_, _ = h.Run(ctx, "sh", "-c", fmt.Sprintf("rmdir /run/yard/*/%[1]s*/sub /run/yard/*/%[1]s* 2>/dev/null", name))
	})
	fails := func(want string, args ...string) {
		t.Helper()
		if o := agentCmd(ctx, t, h, nil, args...); o.code != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("%v: exit code %d, %q; want 1 and %q", args, o.code, o.stderr, want)
		}
	}
	pid := fmt.Sprint(r.Pid)
	fails("is not below /elsewhere", "dump", "-t", pid, "-D", newDir(t), "-R", "--manage-cgroups", "--cgroup-root", "/elsewhere")
	fails("no hierarchy that is to be recorded", "dump", "-t", pid, "-D", newDir(t), "-R", "--manage-cgroups", "--cgroup-dump-controller", "none-such")
	fails("the yard has no directory", "dump", "-t", pid, "-D", newDir(t), "-R", "--manage-cgroups", "--cgroup-yard", "/run")

	// The group above that of the root comes along, with its permissions, and all
	// goes below another one.
	controller, top := "cpuset", ":/"+name
	if !v1 {
		controller = ""
	}
	args := []string{"--manage-cgroups=full", "--cgroup-yard", "/run/yard", "--cgroup-root", top, "--cgroup-props", `"cpuset":\n - "strategy": "merge"\n - "properties": ["cpuset.memory_migrate"]`}
	if v1 {
		args = append(args, "--cgroup-dump-controller", controller, "--cgroup-dump-controller", "")
	} else {
		args = append(args, "--cgroup-dump-controller", "")
	}
	img := dump(ctx, t, h, r.Pid, args...)
	decodeImages(t, img)
	remove(name)
	restore(ctx, t, h, img, r.Pid, nil, "--manage-cgroups=full", "--cgroup-yard", "/run/yard")
	want := "0::/" + name + "/sub\n750\n"
	look := "grep ^0: /proc/%[1]d/cgroup; stat -c %%a /run/yard/unified/%[2]s"
	if v1 {
		want += "cpuset:/" + name + "\n1\n"
		look += "; grep -o cpuset:.* /proc/%[1]d/cgroup; cat %[3]s/cpuset.memory_migrate"
	}
	if diff := cmp.Diff(want, sh(look, r.Pid, name, sets)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	goes(ctx, t, r, 5)
	img = dump(ctx, t, h, r.Pid, args...)
	restore(ctx, t, h, img, r.Pid, nil, "--manage-cgroups", "--cgroup-yard", "/run/yard", "--cgroup-root", "/"+name+"-new")
	if got := sh("grep ^0: /proc/%d/cgroup", r.Pid); got != "0::/"+name+"-new/sub\n" {
		t.Errorf("with another root it is in %s", got)
	}
	goes(ctx, t, r, 5)
	stop(ctx, t, r)
	remove(name)
	remove(name + "-new")
}

// TestUnprivileged: an ordinary user dumps and restores own programs, with the one
// capability that it takes, and is told what is missing.
func TestUnprivileged(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	user := func(caps string, argv ...string) []string {
		args := []string{"HOME=/", "setpriv", "--reuid", "1234", "--regid", "2345", "--clear-groups", "--inh-caps=-all" + caps}
		if caps != "" {
			args = append(args, "--ambient-caps=-all"+caps)
		}
		return append(append(args, "--"), argv...)
	}
	for _, c := range unprivileged {
		command, rights := c.command, ",+checkpoint_restore"
		t.Run(command, func(t *testing.T) {
			ctx := deadline(t, 2*time.Minute)
			dir := newDir(t)
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			prefix := filepath.Join(dir, command)
			r := start(ctx, t, h, prefix, append([]string{"env"}, user("", programs.Selfcheck, command, prefix)...)...)
			if out, err := h.Run(ctx, "sh", "-c", "chown 1234:2345 "+prefix+"*"); err != nil { // which is root's
				t.Fatalf("%v\n%s", err, out)
			}
			pid := fmt.Sprint(r.Pid)
			fails := func(want string, argv ...string) {
				t.Helper()
				if out, err := h.Run(ctx, "env", argv...); err == nil || !strings.Contains(err.Error()+out, want) {
					t.Errorf("%v: %v, %q; want %q", argv, err, out, want)
				}
			}
			if c.lacks != "" {
				fails("takes CAP_"+strings.ToUpper(c.lacks), user(rights, binaries.Agent, "dump", "--unprivileged", "-t", pid, "-D", filepath.Join(dir, "none"))...)
				goes(ctx, t, r, 3)
				stop(ctx, t, r)
				return
			}
			for i := range 2 {
				img := filepath.Join(dir, fmt.Sprint("img", i))
				if i == 0 {
					fails("needs root", user("", binaries.Agent, "dump", "-t", pid, "-D", img)...)
					fails("needs CAP_CHECKPOINT_RESTORE", user("", binaries.Agent, "dump", "--unprivileged", "-t", pid, "-D", img)...)
					fails("takes CAP_SYS_PTRACE", user(rights, binaries.Agent, "dump", "--unprivileged", "-t", "1", "-D", img)...)
					goes(ctx, t, r, 3)
				}
				if out, err := h.Run(ctx, "env", user(rights, binaries.Agent, "dump", "--unprivileged", "-t", pid, "-D", img)...); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if err := h.WaitGone(ctx, r.Pid); err != nil {
					t.Fatal(err)
				}
				if out, err := h.Run(ctx, "env", user(rights, binaries.Agent, "restore", "--unprivileged", "-D", img, "-d")...); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				goes(ctx, t, r, 5)
				status, err := h.Run(ctx, "grep", "-E", "^(Uid|CapPrm|CapAmb)", "/proc/"+pid+"/status")
				if want := "Uid:\t1234\t1234\t1234\t1234\nCapPrm:\t0000000000000000\nCapAmb:\t0000000000000000\n"; err != nil || status != want {
					t.Errorf("it came back with (%v)\n%s", err, status)
				}
			}
			stop(ctx, t, r)
		})
	}
}

// unprivileged are commands of selfcheck that an ordinary user can move, or that he
// is told that he cannot.
var unprivileged = []struct{ command, lacks string }{
	{"pidfd", ""}, {"files", ""}, {"threads", ""}, {"epoll", ""}, {"timers", ""}, {"signals", ""}, {"sessions", ""}, {"deleted", ""}, {"waits", ""},
	{"unix", "net_admin"},
}
