package freeze_test

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/freeze"
	"godwit/engine/procfs"
)

// householder is a program that waits for another one, with a thread, memory and a child.
const householder = `
import os, threading, time
pid = os.fork()
if pid:
    print("status", os.waitpid(pid, 0)[1], flush=True)
    os._exit(0)
keep = bytearray(64 << 20)
for i in range(0, len(keep), 4096): keep[i] = 1
if os.fork() == 0: time.sleep(1000)
threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
print("up", flush=True)
time.sleep(1000)
`

func standIn(t *testing.T) (*strings.Builder, *freeze.StandIn) {
	t.Helper()
	cmd, out := start(t, householder)
	pids, err := procfs.Tree(cmd.Process.Pid)
	if err != nil || len(pids) != 3 {
		t.Fatalf("the processes are %v, %v", pids, err)
	}
	tree, err := freeze.Freeze(t.Context(), pids[1], 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.Hold(func([]freeze.Held) error { return nil }); err != nil {
		t.Fatal(err)
	}
	child := tree.Procs[1].Pid
	s, err := tree.KillButRoot()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := procfs.ReadStat(child); !procfs.Gone(err) {
		t.Errorf("the child is still there: %v", err)
	}
	if fds, err := procfs.Fds(s.Pid()); err != nil || len(fds) != 0 {
		t.Errorf("it has the descriptors %v open, %v", fds, err)
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(s.Pid()) + "/statm")
	if err != nil {
		t.Fatal(err)
	}
	if pages, _ := strconv.Atoi(strings.Fields(string(b))[1]); pages > 4 {
		t.Errorf("it has %d pages", pages)
	}
	if !s.Lives() {
		t.Error("it does not live")
	}
	return out, s
}

// TestStandIn has the parent of a program wait until that has ended elsewhere.
func TestStandIn(t *testing.T) {
	needRoot(t)
	out, s := standIn(t)
	for range 2 {
		if err := s.End(7); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "its status", func() bool { return strings.Contains(out.String(), "status 1792\n") }) // 7 << 8
}

// TestStandInKilled ends it from outside.
func TestStandInKilled(t *testing.T) {
	needRoot(t)
	out, s := standIn(t)
	if err := unix.Kill(s.Pid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "its end", func() bool { return !s.Lives() })
	if err := s.End(7); err != nil {
		t.Fatal(err)
	}
	await(t, "its status", func() bool { return strings.Contains(out.String(), "status 9\n") })
}
