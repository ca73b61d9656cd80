package freeze_test

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/freeze"
	"godwit/engine/procfs"
)

// family is a program with a child, which tells of every signal that it gets.
const family = `
import os, signal, sys, threading, time
seen = []
for s in (signal.SIGCHLD, signal.SIGCONT, signal.SIGUSR1):
    signal.signal(s, lambda n, f: seen.append(signal.Signals(n).name))
child = os.fork()
if child == 0:
    while True: time.sleep(0.01)
end = []
signal.signal(signal.SIGTERM, lambda n, f: end.append(n))
threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
print("up", flush=True)
while not end or WANT not in seen:
    time.sleep(0.02)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
os.kill(child, signal.SIGKILL)
print("seen", seen, flush=True)
`

// waiting is a family that does not end before it has got a signal.
func waiting(signal string) string { return "WANT = '" + signal + "'" + family }

func states(t *testing.T, held []freeze.Held) string {
	t.Helper()
	var b strings.Builder
	for _, h := range held {
		st, err := procfs.ReadStat(h.Pid)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteByte(st.State)
	}
	return b.String()
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func finish(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st, err := cmd.Process.Wait(); err != nil || !st.Success() {
		t.Fatalf("the program ended with %v (%v)", st, err)
	}
}

func hold(t *testing.T, pid int) (*freeze.Tree, []freeze.Held) {
	t.Helper()
	tree, err := freeze.Freeze(t.Context(), pid, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var held []freeze.Held
	if err := tree.Hold(func(list []freeze.Held) error { held = list; return nil }); err != nil {
		t.Fatal(err)
	}
	if len(held) != 2 {
		t.Fatalf("holds %d processes, want 2", len(held))
	}
	return tree, held
}

// TestHoldUnnoticed holds a tree and thaws it: it must not notice, and a signal
// that came meanwhile must reach it.
func TestHoldUnnoticed(t *testing.T) {
	needRoot(t)
	cmd, out := start(t, waiting("SIGUSR1"))
	for i := range 50 {
		tree, _ := hold(t, cmd.Process.Pid)
		if i == 25 {
			if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
				t.Fatal(err)
			}
		}
		if err := tree.Thaw(); err != nil {
			t.Fatal(err)
		}
	}
	finish(t, cmd)
	await(t, "the report", func() bool { return strings.Contains(out.String(), "]") })
	if got := strings.TrimSpace(out.String()); got != "seen ['SIGUSR1']" {
		t.Errorf("the program says %q", got)
	}
}

// TestHoldKeepsPendingContinue holds a tree for which a SIGCONT waits, which a
// SIGSTOP would remove.
func TestHoldKeepsPendingContinue(t *testing.T) {
	needRoot(t)
	cmd, out := start(t, waiting("SIGCONT"))
	tree, err := freeze.Freeze(t.Context(), cmd.Process.Pid, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := tree.Hold(func([]freeze.Held) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := tree.Thaw(); err != nil {
		t.Fatal(err)
	}
	finish(t, cmd)
	await(t, "the report", func() bool { return strings.Contains(out.String(), "]") })
	if got := strings.TrimSpace(out.String()); got != "seen ['SIGCONT']" {
		t.Errorf("the program says %q", got)
	}
}

// TestLeftover ends the tracer of a held tree, as the death of an agent does.
func TestLeftover(t *testing.T) {
	needRoot(t)
	t.Run("thaw", func(t *testing.T) {
		cmd, _ := start(t, waiting("SIGCONT"))
		tree, held := hold(t, cmd.Process.Pid)
		tree.Tracer.Close()
		await(t, "the tree to stop by itself", func() bool { return states(t, held) == "TT" })
		if err := freeze.NewLeftover(held).Thaw(); err != nil {
			t.Fatal(err)
		}
		await(t, "the tree to go on", func() bool { return !strings.Contains(states(t, held), "T") })
		finish(t, cmd)
	})
	t.Run("kill", func(t *testing.T) {
		cmd, _ := start(t, waiting("SIGCONT"))
		tree, held := hold(t, cmd.Process.Pid)
		tree.Tracer.Close()
		await(t, "the tree to stop by itself", func() bool { return states(t, held) == "TT" })
		other := append(held[:len(held):len(held)], freeze.Held{Pid: 1, Start: held[0].Start})
		left := freeze.NewLeftover(other)
		if n := left.Processes(); n != 2 {
			t.Errorf("%d processes are left, want 2: pid 1 was started at another time", n)
		}
		if err := left.Kill(); err != nil {
			t.Fatal(err)
		}
		if n := freeze.NewLeftover(held).Processes(); n != 0 {
			t.Errorf("%d processes are left after the kill", n)
		}
	})
}
