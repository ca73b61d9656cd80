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
		"ip -o link | sed 's/ state [A-Z]*//; s/,LOWER_UP//; s/NO-CARRIER,//; s/,M-DOWN//'; ip -o addr; for t in main 77; do ip route show table $t; done; ip -6 route show table all | sort; ip rule; ip -6 rule; cd /proc/sys/net; "+
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
	t.Run("pivoted", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := contained(ctx, t, h, newDir(t), "container", "pivot")
		moveContained(ctx, t, r, 10)
		img := dump(ctx, t, h, r.Pid, "--external", "mnt[/srv]:data")
		// The root is named, and another directory becomes the external one.
		if _, err := h.Run(ctx, "sh", "-c", "mv /tmp/srv /tmp/old; mkdir /tmp/srv; echo mine >/tmp/srv/file"); err != nil {
			t.Fatal(err)
		}
		pidfile := filepath.Join(img, "pid")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d"); o.code != 1 || !strings.Contains(o.stderr, "mnt[data]") {
			t.Errorf("restore without the external mount: exit code %d, %q", o.code, o.stderr)
		}
		mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "--pidfile", pidfile, "--external", "mnt[data]:/tmp/srv", "-r", "/")
		readPid(t, r, pidfile)
		goes(ctx, t, r, 20)
		if got, err := h.Run(ctx, "cat", fmt.Sprintf("/proc/%d/root/srv/file", r.Pid)); err != nil || got != "mine\n" {
			t.Errorf("the external mount holds %q, %v", got, err)
		}
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--external", "mnt[/nowhere]:x"); o.code != 1 || !strings.Contains(o.stderr, "nothing is mounted there") {
			t.Errorf("dump with an external mount that is not there: exit code %d, %q", o.code, o.stderr)
		}
		stop(ctx, t, r)
	})
	t.Run("veth", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "netns")
		sh := func(format string, args ...any) string {
			t.Helper()
			out, err := h.Run(ctx, "sh", "-ec", fmt.Sprintf(format, args...))
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		sh("ip link add hostbr type bridge; ip addr add 10.66.0.1/24 dev hostbr; ip link set hostbr up; "+
			"ip link add out0 type veth peer name in0; ip link set out0 master hostbr; ip link set out0 up; ip link set in0 netns %d; "+
			"nsenter --net=/proc/%d/ns/net sh -ec 'ip addr add 10.66.0.2/24 dev in0; ip link set in0 up'", r.Pid, r.Pid)
		ping := func() {
			t.Helper()
			sh("for i in $(seq 100); do timeout 20 bash -c '</dev/tcp/10.66.0.2/9' 2>&1 | grep -q refused && exit 0; sleep .2; done; exit 1")
		}
		ping()
		img := dump(ctx, t, h, r.Pid, "--tcp-established")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d", "--tcp-established"); o.code != 1 || !strings.Contains(o.stderr, "veth[in0]") {
			t.Errorf("restore without a name for the other end: exit code %d, %q", o.code, o.stderr)
		}
		restore(ctx, t, h, img, r.Pid, nil, "--tcp-established", "--external", "veth[in0]:out0@hostbr")
		goes(ctx, t, r, 10)
		ping()
		// The network namespace stays, and the tree comes back into it.
		ino := sh("readlink /proc/%d/ns/net | tr -dc 0-9", r.Pid)
		sh("touch /run/kept; mount --bind /proc/%d/ns/net /run/kept", r.Pid)
		img = dump(ctx, t, h, r.Pid, "--tcp-established", "--external", "net["+ino+"]:kept")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d", "--tcp-established"); o.code != 1 || !strings.Contains(o.stderr, "fd[N]:kept") {
			t.Errorf("restore without the external namespace: exit code %d, %q", o.code, o.stderr)
		}
		f, err := os.Open(h.Path("/run/kept"))
		if err != nil {
			t.Fatal(err)
		}
		restore(ctx, t, h, img, r.Pid, []*os.File{f}, "--tcp-established", "--inherit-fd", "fd[3]:kept")
		_ = f.Close()
		goes(ctx, t, r, 10)
		ping()
		if got := sh("readlink /proc/%d/ns/net | tr -dc 0-9", r.Pid); got != ino {
			t.Errorf("the tree is in network namespace %s, want %s", got, ino)
		}
		img = dump(ctx, t, h, r.Pid, "--tcp-established", "--empty-ns", "net")
		restore(ctx, t, h, img, r.Pid, nil, "--tcp-established", "-J", "net:/run/kept")
		goes(ctx, t, r, 10)
		// What the tree cannot have made again is refused.
		sh("nsenter --net=/proc/%d/ns/net ip neigh add 10.66.0.9 lladdr 02:00:00:00:00:99 dev in0", r.Pid)
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--tcp-established"); o.code != 1 || !strings.Contains(o.stderr, "neighbours that were set by hand") {
			t.Errorf("dump with a neighbour: exit code %d, %q", o.code, o.stderr)
		}
		stop(ctx, t, r)
		sh("umount /run/kept; rm /run/kept; ip link del hostbr")
		// The pair goes with its inner end, a moment later.
		sh("for i in $(seq 1200); do ip link show out0 2>/dev/null || exit 0; sleep .05; done; exit 1")
		if out := sh("ls /run"); strings.Contains(out, "kept") {
			t.Errorf("something is left: %s", out)
		}
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

// TestUserNamespace moves trees in user namespaces of their own.
func TestUserNamespace(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	const all = "unshare -U -r -p -f --mount-proc -n -u -i"
	// unshared starts a command of selfcheck under others, the last of which forks;
	// its child is the root of the tree.
	unshared := func(ctx context.Context, t *testing.T, under, command string) *workloads.Run {
		t.Helper()
		prefix := filepath.Join(newDir(t), command)
		r := start(ctx, t, h, prefix, append(strings.Fields(under), programs.Selfcheck, command, prefix)...)
		if !strings.Contains(under, " -f") {
			return r
		}
		for range strings.Count(under, " -f") {
			out, err := h.Run(ctx, "pgrep", "-P", fmt.Sprint(r.Pid))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Sscan(out, &r.Pid); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
	t.Run("many users", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := contained(ctx, t, h, newDir(t), "userns", "many")
		moveContained(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	for name, under := range map[string]string{"of root": all, "of a user": "setpriv --reuid 1234 --regid 2345 --clear-groups " + all} {
		t.Run(name, func(t *testing.T) {
			ctx := deadline(t, 2*time.Minute)
			r := unshared(ctx, t, under, "userns")
			moveContained(ctx, t, r, 10)
			stop(ctx, t, r)
		})
	}
	for name, c := range map[string]struct{ under, want string }{
		"without a pid namespace": {"unshare -U -r", "not in a pid namespace of its own"},
		"nested":                  {all + " " + all, "was made inside another one"},
		"of another owner":        {"unshare -n unshare -U -r -p -f --mount-proc", "a net namespace of its own that belongs to another user namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := unshared(ctx, t, c.under, "counter")
			o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t))
			if o.code != 1 || !strings.Contains(o.stderr, c.want) {
				t.Errorf("exit code %d, %q; want 1 and %q", o.code, o.stderr, c.want)
			}
			goes(ctx, t, r, 10)
			stop(ctx, t, r)
		})
	}
}

// TestContainerMigrates moves a tree with namespaces of its own to another host
// and back.
func TestContainerMigrates(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, r := range []*workloads.Run{contained(ctx, t, alpha, newDir(t), "container"), contained(ctx, t, alpha, newDir(t), "userns", "many")} {
		for _, to := range []*hosts.Host{beta, alpha} {
			m, res, err := f.Migrate(ctx, r.Host.Name(), r.Pid, to.Name())
			if err != nil {
				t.Fatal(err)
			}
			if res.Code != 0 || m.State != "completed" || m.Owner != "destination" {
				t.Fatalf("migration: exit code %d, state %s, owner %s: %s%s", res.Code, m.State, m.Owner, res.Stdout, res.Stderr)
			}
			r.Host, r.Pid = to, m.LandedPID
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
	}
}
