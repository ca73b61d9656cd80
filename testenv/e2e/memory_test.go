package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
)

// pagesWritten sums up the disk space, in bytes, of the images of pages in a directory.
func pagesWritten(t *testing.T, dir string) (n int64) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "pages-*.img"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no images of pages in %s (%v)", dir, err)
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		n += st.Blocks * 512
	}
	return n
}

// TestPreDump: dumps that build on each other, of a program that changes its
// memory all the time, restored from the whole chain.
func TestPreDump(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	t.Run("chain", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "vma")
		pid := strconv.Itoa(r.Pid)
		for round := range 5 {
			dir := newDir(t)
			at := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
			mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", at(1))
			goes(ctx, t, r, 10)
			mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", at(2), "--prev-images-dir", "../1", "--track-mem", "--pre-dump-mode", "read")
			goes(ctx, t, r, 10)
			mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", at(3), "--prev-images-dir", at(2))
			goes(ctx, t, r, 10)
			mustAgent(ctx, t, h, nil, "dump", "-t", pid, "-D", at(4), "--prev-images-dir", "../3", "--track-mem")
			if err := h.WaitGone(ctx, r.Pid); err != nil {
				t.Fatal(err)
			}
			first := pagesWritten(t, at(1))
			for i := 2; i <= 4; i++ {
				if n := pagesWritten(t, at(i)); n > first/4 {
					t.Errorf("round %d: dump %d has %d bytes of pages, the first has %d", round, i, n, first)
				}
				if link, err := os.Readlink(filepath.Join(at(i), "parent")); err != nil || link != fmt.Sprintf("../%d", i-1) {
					t.Errorf("dump %d builds on %q, %v", i, link, err)
				}
			}
			if round == 0 {
				if n := decodeAll(t, at(1)); n < 3 {
					t.Errorf("a pre-dump has %d images", n)
				}
				decodeImages(t, at(4))
			}
			if o := agentCmd(ctx, t, h, nil, "restore", "-D", at(3), "-d"); o.code != 1 || !strings.Contains(o.stderr, "of a pre-dump") {
				t.Errorf("restore of a pre-dump: exit code %d, %q", o.code, o.stderr)
			}
			restore(ctx, t, h, at(4), r.Pid, nil)
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
	})
	t.Run("dedup", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "vma")
		pid := strconv.Itoa(r.Pid)
		dir := newDir(t)
		at := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
		mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", at(1))
		mustAgent(ctx, t, h, nil, "dump", "-R", "-t", pid, "-D", at(2), "--prev-images-dir", "../1", "--auto-dedup")
		goes(ctx, t, r, 10)
		before := pagesWritten(t, at(1)) + pagesWritten(t, at(2))
		mustAgent(ctx, t, h, nil, "dump", "-t", pid, "-D", at(3), "--prev-images-dir", "../2", "--auto-dedup")
		if err := h.WaitGone(ctx, r.Pid); err != nil {
			t.Fatal(err)
		}
		if n := pagesWritten(t, at(1)) + pagesWritten(t, at(2)); n >= before {
			t.Errorf("the dumps before take %d bytes, took %d", n, before)
		}
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", at(2), "-d"); o.code != 1 || !strings.Contains(o.stderr, "--auto-dedup") {
			t.Errorf("restore of a dump whose pages were given up: exit code %d, %q", o.code, o.stderr)
		}
		restore(ctx, t, h, at(3), r.Pid, nil, "--auto-dedup")
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
		if n := pagesWritten(t, at(3)); n > 0 {
			t.Errorf("the images take %d bytes of pages after a restore that gave them up", n)
		}
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", at(3), "-d"); o.code != 1 || !strings.Contains(o.stderr, "given up") {
			t.Errorf("restore of images whose pages were given up: exit code %d, %q", o.code, o.stderr)
		}
	})
	// What is wrong with the dump before is found before anything is touched.
	t.Run("refused", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "vma")
		pid := strconv.Itoa(r.Pid)
		dir := newDir(t)
		for prev, want := range map[string]string{"../none": "no such file", "..": "must be in a directory in", "/tmp": "must be in a directory in", ".": "circle"} {
			for _, command := range []string{"dump", "pre-dump"} {
				img := filepath.Join(dir, "img")
				if o := agentCmd(ctx, t, h, nil, command, "-t", pid, "-D", img, "--prev-images-dir", prev); o.code != 1 || !strings.Contains(o.stderr, want) {
					t.Errorf("%s after %s: exit code %d, %q, want %q", command, prev, o.code, o.stderr, want)
				}
				if _, err := os.Lstat(img); !os.IsNotExist(err) {
					t.Errorf("%s after %s left %s: %v", command, prev, img, err)
				}
			}
		}
		if o := agentCmd(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", filepath.Join(dir, "x"), "--pre-dump-mode", "magic"); o.code != 1 || !strings.Contains(o.stderr, "neither splice nor read") {
			t.Errorf("unknown mode: exit code %d, %q", o.code, o.stderr)
		}
		before := traces(t, h, r.Pid)
		mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", filepath.Join(dir, "1"))
		if diff := cmp.Diff(before, traces(t, h, r.Pid)); diff != "" {
			t.Errorf("a pre-dump changed the process (-before +after):\n%s", diff)
		}
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
}

// familyMemory sums up, in bytes, what a process of a host and its descendants take (Pss).
func familyMemory(t *testing.T, h *hosts.Host, root int) (sum int64) {
	t.Helper()
	parents := map[int]int{}
	names, err := os.ReadDir(h.Path("/proc"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		pid, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/stat", pid)))
		if err != nil {
			continue
		}
		var state string
		var parent int
		if _, err := fmt.Sscan(string(b[strings.LastIndexByte(string(b), ')')+1:]), &state, &parent); err != nil {
			t.Fatal(err)
		}
		parents[pid] = parent
	}
	for pid := range parents {
		p := pid
		for p != root && p != 0 {
			p = parents[p]
		}
		if p != root {
			continue
		}
		b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/smaps_rollup", pid)))
		if err != nil {
			t.Fatal(err)
		}
		var kb int64
		_, text, ok := strings.Cut(string(b), "\nPss:")
		if _, err := fmt.Sscan(text, &kb); err != nil || !ok {
			t.Fatalf("no Pss of pid %d in %q", pid, b)
		}
		sum += kb << 10
	}
	return sum
}

// TestFamilyMemory: what parents and children share since a fork they share after
// a restore, and while a dump reads it.
func TestFamilyMemory(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "cow", "256")
	before := familyMemory(t, h, r.Pid)
	near := func(when string) {
		t.Helper()
		if now := familyMemory(t, h, r.Pid); now > before+before/10 || now < before-before/10 {
			t.Errorf("%s the family takes %d MiB, took %d", when, now>>20, before>>20)
		}
	}
	mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "-R")
	near("after a dump that left it running")
	for range 3 {
		dumpRestore(ctx, t, r, 1)
		near("after a restore")
	}
	goes(ctx, t, r, 20)
	stop(ctx, t, r)
}

// TestMigrateFamily: a family that moves shares its memory at the destination, too.
func TestMigrateFamily(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	r := selfcheck(ctx, t, alpha, newDir(t), "cow")
	before := familyMemory(t, alpha, r.Pid)
	for _, to := range []*hosts.Host{beta, alpha, beta} {
		migrate(ctx, t, f, r, to)
		if now := familyMemory(t, to, r.Pid); now > before+before/10 || now < before-before/10 {
			t.Errorf("on %s the family takes %d MiB, took %d", to.Name(), now>>20, before>>20)
		}
	}
	stop(ctx, t, r)
}
