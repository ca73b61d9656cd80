package e2e

import (
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// soakEnv says for how long TestSoak goes on, as 10m. It runs only when asked
// for: a random mix finds something else each time, which is no verdict on a change.
const soakEnv = "GODWIT_SOAK"

// soaked is one program that the soak test dumps and restores again and again.
type soaked struct {
	name    string
	run     *workloads.Run
	options []string
	fds     int  // of the root, when it was set up
	moved   bool // restored at least once
}

// TestSoak dumps and restores a random mix of all kinds of objects, several of
// them side by side, and looks for anything that is left over in the end.
func TestSoak(t *testing.T) {
	if os.Getenv(soakEnv) == "" {
		t.Skipf("say for how long: %s=10m", soakEnv)
	}
	length, err := time.ParseDuration(os.Getenv(soakEnv))
	if err != nil {
		t.Fatalf("%s: %v", soakEnv, err)
	}
	ctx := deadline(t, length+3*time.Minute)
	cmds, err := programs.Commands(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cmds = slices.DeleteFunc(cmds, func(c string) bool { return objects[c].elsewhere })
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	h := newHosts(t, "alpha").Host("alpha")
	// Where dumps note what queues have shown, and umount(8) what it did; they stay.
	if _, err := h.Run(ctx, "mkdir", "-p", "/run/godwit", "/run/mount"); err != nil {
		t.Fatal(err)
	}
	before := inventory(t, h)

	var running []*soaked
	cycles, kinds := 0, map[string]bool{}
	end := func(i int) {
		s := running[i]
		// Some open a file for a moment.
		for n := 0; openFiles(t, h, s.run.Pid) > s.fds; n++ {
			if n == 200 {
				t.Errorf("%s had %d descriptors and has %d", s.name, s.fds, openFiles(t, h, s.run.Pid))
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		stop(ctx, t, s.run)
		if s.name == "jail" { // it cannot take back what its records are in
			if _, err := h.Run(ctx, "umount", s.run.Prefix+".jail"+filepath.Dir(s.run.Prefix)); err != nil {
				t.Error(err)
			}
		}
		running = slices.Delete(running, i, i+1)
	}
	for begin := time.Now(); time.Since(begin) < length; cycles++ {
		for len(running) < 6 {
			c := cmds[random.IntN(len(cmds))]
			if slices.ContainsFunc(running, func(s *soaked) bool { return rivals(s.name, c) }) {
				continue
			}
			r := selfcheck(ctx, t, h, newDir(t), c, objects[c].args...)
			running = append(running, &soaked{name: c, run: r, options: objects[c].options, fds: openFiles(t, h, r.Pid)})
			kinds[c] = true
		}
		i := random.IntN(len(running))
		s := running[i]
		// The names that --link-remap makes stay for the images, and are noticed.
		what := random.IntN(6)
		t.Logf("cycle %d: %s, pid %d, action %d", cycles, s.name, s.run.Pid, what)
		goes(ctx, t, s.run, 1)
		switch {
		case what == 0 && s.moved:
			end(i)
		// Waiting connections that hold data are only carried by a dump that ends the tree.
		case what == 1 && !slices.Contains(s.options, "--link-remap") && s.name != "unixpending":
			dir := newDir(t)
			mustAgent(ctx, t, h, nil, append([]string{"dump", "-t", strconv.Itoa(s.run.Pid), "-D", dir, "-R"}, s.options...)...)
			goes(ctx, t, s.run, 5)
		default:
			dumpRestore(ctx, t, s.run, 1, s.options...)
			s.moved = true
		}
		if t.Failed() {
			return
		}
	}
	for len(running) > 0 {
		if s := running[0]; !s.moved { // some wait for it
			dumpRestore(ctx, t, s.run, 1, s.options...)
		}
		end(0)
	}
	t.Logf("%d cycles with %d of %d kinds", cycles, len(kinds), len(cmds))
	// Any dump forgets what earlier ones noted of programs that have ended.
	last := selfcheck(ctx, t, h, newDir(t), "threads")
	mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(last.Pid), "-D", newDir(t), "-R")
	stop(ctx, t, last)
	// What a killed tree held goes away a little after it.
	var diff string
	for range 100 {
		if diff = cmp.Diff(before, inventory(t, h)); diff == "" {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("left over (+) or missing (-) in the end:\n%s", diff)
}

// rivals says whether two programs want the same of a host, such as ports or huge
// pages, or one listens to what the other does to it.
func rivals(a, b string) bool {
	return a == b || strings.HasPrefix(a, "huge") && strings.HasPrefix(b, "huge") ||
		a == "netlink" && b == "tun" || a == "tun" && b == "netlink"
}

func openFiles(t *testing.T, h *hosts.Host, pid int) int {
	t.Helper()
	names, err := os.ReadDir(h.Path("/proc/" + strconv.Itoa(pid) + "/fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// inventory is what a host holds that could leak: processes, mounts, files,
// namespaces, System V objects, interfaces, control groups.
func inventory(t *testing.T, h *hosts.Host) map[string][]string {
	t.Helper()
	inv := map[string][]string{}
	lines := func(file string) {
		b, err := os.ReadFile(h.Path(file))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			name, _, _ := strings.Cut(strings.TrimSpace(line), ":") // without counters
			inv[file] = append(inv[file], name)
		}
	}
	for _, f := range []string{"/proc/1/mountinfo", "/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg", "/proc/1/net/dev"} {
		lines(f)
	}
	procs, err := filepath.Glob(h.Path("/proc/[0-9]*"))
	if err != nil {
		t.Fatal(err)
	}
	spaces := map[string]bool{}
	for _, p := range procs {
		comm, err := os.ReadFile(filepath.Join(p, "comm"))
		if err != nil {
			continue // it ended
		}
		inv["processes"] = append(inv["processes"], filepath.Base(p)+" "+strings.TrimSpace(string(comm)))
		links, _ := filepath.Glob(filepath.Join(p, "ns", "*"))
		for _, l := range links {
			if s, err := os.Readlink(l); err == nil {
				spaces[s] = true
			}
		}
	}
	for s := range spaces {
		inv["namespaces"] = append(inv["namespaces"], s)
	}
	slices.Sort(inv["namespaces"])
	for _, dir := range []string{"/tmp", "/run", "/dev/shm", "/dev/mqueue", "/dev/hugepages", "/sys/fs/cgroup"} {
		err := filepath.WalkDir(h.Path(dir), func(p string, d fs.DirEntry, err error) error {
			if err == nil && (d.IsDir() && !inUse(p) || !strings.HasPrefix(p, h.Path("/sys"))) {
				inv[dir] = append(inv[dir], strings.TrimPrefix(p, h.Path("")))
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return inv
}

// inUse tells whether a directory is a control group with processes: those of the
// soak have ended, but others work on this machine, too.
func inUse(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err == nil && len(b) > 0
}
