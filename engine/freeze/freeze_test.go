package freeze_test

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/freeze"
	"godwit/engine/mem"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// needRoot fails under CI=true and skips otherwise where tracing is not possible.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test traces processes and needs root")
	}
	t.Skip("this test traces processes and needs root")
}

// counter is a program that counts, with a thread asleep, and prints its count
// when it gets SIGTERM.
const counter = `
import threading, time, signal, sys
n = [0]
def done(*a):
    print("count", n[0] > 0, flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, done)
threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
print("up", flush=True)
while True:
    n[0] += 1
`

func start(t *testing.T, script string) (*exec.Cmd, *strings.Builder) {
	t.Helper()
	cmd := exec.Command("python3", "-c", script)
	out := &strings.Builder{}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	buf := make([]byte, 3)
	if _, err := r.Read(buf); err != nil {
		t.Fatalf("the workload did not come up: %v", err)
	}
	go func() {
		b := make([]byte, 100)
		for {
			n, err := r.Read(b)
			out.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _, _ = cmd.Process.Wait(); _ = r.Close() })
	return cmd, out
}

// TestDumpLeavesNoTrace reads every thread of a busy program many times; maps,
// registers and signal state must be as before, and the program must go on.
func TestDumpLeavesNoTrace(t *testing.T) {
	needRoot(t)
	cmd, _ := start(t, counter)
	pid := cmd.Process.Pid
	before, err := procfs.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		tree, err := freeze.Freeze(context.Background(), pid, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if got := tree.Threads(); got != 2 {
			t.Fatalf("froze %d threads, want 2", got)
		}
		if err := readAll(tree); err != nil {
			_ = tree.Thaw()
			t.Fatal(err)
		}
		if err := tree.Tracer.Do(func() error {
			for _, th := range tree.Root().Threads {
				regs, err := ptrace.GetRegs(th.Tid)
				if err != nil {
					return err
				}
				if regs != th.Regs {
					t.Errorf("registers of task %d changed:\n%+v\n%+v", th.Tid, th.Regs, regs)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := tree.Thaw(); err != nil {
			t.Fatal(err)
		}
	}
	after, err := procfs.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != len(after) {
		t.Errorf("%d mappings before, %d after", len(before), len(after))
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	st, err := cmd.Process.Wait()
	if err != nil || !st.Success() {
		t.Fatalf("the program ended with %v (%v)", st, err)
	}
}

func readAll(tree *freeze.Tree) error {
	p := tree.Root()
	vmas, _, err := mem.Read(p.Pid, nil)
	if err != nil {
		return err
	}
	return tree.Tracer.Do(func() error {
		for _, v := range vmas {
			if !v.Is(mem.Vdso) {
				continue
			}
			insn, err := ptrace.FindInsn(p.Pid, v.Start, v.End)
			if err != nil {
				return err
			}
			for i, th := range p.Threads {
				b, err := ptrace.Borrow(th.Tid, insn, th.Regs, false, 0)
				if err != nil {
					return err
				}
				_, err = task.Dump(task.Source{Pid: p.Pid, Tid: th.Tid, VTid: th.VTid, Leader: i == 0, Regs: th.Regs, Rseq: th.Rseq, Mask: b.Mask(), Remote: &b.Remote})
				if rerr := b.Return(false); rerr != nil {
					return rerr
				}
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// patient is a program of which a thread makes calls that any interruption ends, and a
// child that another program can trace. Sent SIGTERM, it says how often it was disturbed.
const patient = `
import ctypes, signal, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
ep, event = libc.epoll_create1(0), ctypes.create_string_buffer(12)
child = subprocess.Popen(["sleep", "1000"])
bad = [0]
def wait():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]) # which would end the call, too
    while True:
        bad[0] += libc.epoll_wait(ep, event, 1, 1000) != 0
threading.Thread(target=wait, daemon=True).start()
def done(*a):
    child.kill(); child.wait()
    print("disturbed", bad[0], flush=True); sys.exit(bad[0])
signal.signal(signal.SIGTERM, done)
time.sleep(0.1)
print("up", flush=True)
while True:
    time.sleep(0.01)
`

// TestFailedFreezeIsUnnoticed freezes a tree again and again of which one process
// cannot be stopped.
func TestFailedFreezeIsUnnoticed(t *testing.T) {
	needRoot(t)
	cmd, _ := start(t, patient)
	pid := cmd.Process.Pid
	children, err := procfs.Children(pid)
	if err != nil || len(children) != 1 {
		t.Fatalf("children: %v, %v", children, err)
	}
	other := ptrace.NewTracer()
	if err := other.Do(func() error { return sys.PtraceSeize(children[0], 0) }); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		tree, err := freeze.Freeze(context.Background(), pid, time.Minute)
		if err == nil {
			_ = tree.Thaw()
			t.Fatal("a traced process was frozen")
		}
		if !strings.Contains(err.Error(), "is being traced by") {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	other.Close() // lets it go
	tree, err := freeze.Freeze(context.Background(), pid, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	st, err := cmd.Process.Wait()
	if err != nil || !st.Success() {
		t.Fatalf("the program was disturbed: %v (%v)", st, err)
	}
}
