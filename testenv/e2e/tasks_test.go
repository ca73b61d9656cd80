package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// taskState is the letter of a process's state in /proc.
func taskState(t *testing.T, h *hosts.Host, pid int) string {
	t.Helper()
	b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/status", pid)))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(b), "State:\t")
	if !ok {
		t.Fatalf("status has no state: %s", b)
	}
	return after[:1]
}

// TestStoppedRoot moves a tree that is stopped as a whole, with its parent
// outside the tree, and one that a dump or a restore leaves stopped.
func TestStoppedRoot(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, command := range []string{"counter", "threads", "sessions"} {
		t.Run(command, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), command)
			stands := func() {
				t.Helper()
				// Tasks that are let go stop by themselves, as soon as they are scheduled.
				for taskState(t, h, r.Pid) != "T" {
					if ctx.Err() != nil {
						t.Fatalf("its state is %s, want T", taskState(t, h, r.Pid))
					}
					time.Sleep(time.Millisecond)
				}
				n := count(t, r)
				// As long as five of its records take when it runs.
				time.Sleep(60 * time.Millisecond)
				if now := count(t, r); now != n {
					t.Fatalf("it is stopped and made %d records", now-n)
				}
			}
			cont := func() {
				t.Helper()
				// Every process was stopped; the host has no others that matter.
				if _, err := h.Run(ctx, "sh", "-c", "kill -CONT -1"); err != nil {
					t.Fatal(err)
				}
				goes(ctx, t, r, 5)
			}
			for range 2 {
				if err := h.Kill(r.Pid, unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				for taskState(t, h, r.Pid) != "T" {
					time.Sleep(time.Millisecond)
				}
				// Stopped before and stopped after a dump that leaves it alone.
				mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "-R")
				stands()
				img := dump(ctx, t, h, r.Pid)
				decodeImages(t, img)
				restore(ctx, t, h, img, r.Pid, nil)
				stands()
				if err := h.Kill(r.Pid, unix.SIGCONT); err != nil {
					t.Fatal(err)
				}
				goes(ctx, t, r, 5)

				mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "--leave-stopped")
				stands()
				cont()
				img = dump(ctx, t, h, r.Pid)
				pidfile := filepath.Join(img, "pid")
				mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "-s", "--pidfile", pidfile)
				stands()
				cont()
			}
			stop(ctx, t, r)
		})
	}
}

// TestSeccompWithoutPrivileges moves filters that a program without rights
// installed, as no_new_privs lets it; TestObjects moves those of root.
func TestSeccompWithoutPrivileges(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "seccomp", "nnp")
	mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "-R")
	goes(ctx, t, r, 20)
	dumpRestore(ctx, t, r, 3)
	stop(ctx, t, r)
}

// TestRootOutlivesRestorer moves a program that wanted to die with its parent,
// which is not the process that restores it.
func TestRootOutlivesRestorer(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "counter")
	// Its parent, a shell, goes on; the pid of the program is that of its child.
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"sh", "-c",
		`setpriv --pdeathsig USR2 "$0" counter "$1" & echo $! >"$1.pid"; while :; do sleep 1; done`, programs.Selfcheck, prefix}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Kill(pid, unix.SIGKILL) }()
	r := &workloads.Run{Host: h, Prefix: prefix}
	for {
		b, _ := os.ReadFile(prefix + ".pid")
		if _, err := fmt.Sscan(string(b), &r.Pid); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
		time.Sleep(time.Millisecond)
	}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	img := newDir(t)
	// The shell reaps it some time after the dump killed it.
	mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", img)
	restore(ctx, t, h, img, r.Pid, nil)
	goes(ctx, t, r, 20)
	stop(ctx, t, r)
}

// TestKinship moves trees whose sessions, groups, orphans and zombies came about
// by chance, always the same for one seed.
func TestKinship(t *testing.T) {
	t.Parallel()
	h := newHosts(t, "alpha").Host("alpha")
	for seed := range 20 {
		t.Run(strconv.Itoa(seed), func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "kinship", strconv.Itoa(seed))
			dumpRestore(ctx, t, r, 2)
			goes(ctx, t, r, 10)
			stop(ctx, t, r)
		})
	}
}
