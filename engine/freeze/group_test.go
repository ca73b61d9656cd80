package freeze_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/cgroup"
	"godwit/engine/freeze"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// group makes a group that can be frozen, of a version of control groups, with a
// process in it; skipped where this machine does not have that version.
func group(t *testing.T, version, pid int) string {
	t.Helper()
	root, err := sys.MountCgroup([]string{1: "freezer", 2: ""}[version])
	if err != nil {
		t.Skipf("no freezer of version %d: %v", version, err)
	}
	dir := fmt.Sprintf("/proc/%d/fd/%d/gw-freeze-%d", os.Getpid(), root.Fd(), pid)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGKILL) // which is this test's, and not reaped yet
		setFrozen(t, dir, version, false)
		err := os.Remove(dir)
		for begin := time.Now(); errors.Is(err, unix.EBUSY) && time.Since(begin) < 30*time.Second; time.Sleep(10 * time.Millisecond) {
			err = os.Remove(dir)
		}
		if err = errors.Join(err, root.Close()); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, pid), 0); err != nil {
		t.Fatal(err)
	}
	return dir
}

func setFrozen(t *testing.T, dir string, version int, frozen bool) {
	t.Helper()
	name, value := "cgroup.freeze", map[bool]string{true: "1", false: "0"}[frozen]
	if version == 1 {
		name, value = "freezer.state", map[bool]string{true: "FROZEN", false: "THAWED"}[frozen]
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func ends(t *testing.T, pid int, wait func() (*os.ProcessState, error)) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st, err := wait(); err != nil || !st.Success() {
		t.Errorf("the program ended with %v (%v)", st, err)
	}
}

// TestFrozenMeanwhile freezes the group of a tree that is being dumped: what was
// to be executed in it is given up, and when it is thawed it goes on as if nothing
// had happened.
func TestFrozenMeanwhile(t *testing.T) {
	needRoot(t)
	for version := 1; version <= 2; version++ {
		t.Run(fmt.Sprintf("version %d", version), func(t *testing.T) {
			cmd, _ := start(t, counter)
			pid := cmd.Process.Pid
			dir := group(t, version, pid)
			tree, err := freeze.Freeze(context.Background(), pid, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			setFrozen(t, dir, version, true)
			err = readAll(tree)
			if _, ok := errors.AsType[*ptrace.StuckError](err); !ok || !strings.Contains(err.Error(), "frozen") {
				t.Errorf("a system call in a frozen task: %v", err)
			}
			if err := tree.Tracer.Do(func() error {
				for _, th := range tree.Root().Threads {
					if regs, err := ptrace.GetRegs(th.Tid); err != nil || regs != th.Regs {
						t.Errorf("registers of task %d changed (%v):\n%+v\n%+v", th.Tid, err, th.Regs, regs)
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			setFrozen(t, dir, version, false)
			if err := readAll(tree); err != nil {
				t.Errorf("after it was thawed: %v", err)
			}
			if err := tree.Thaw(); err != nil {
				t.Fatal(err)
			}
			ends(t, pid, cmd.Process.Wait)
		})
	}
}

// TestKilledInFreezer ends a tree whose group was frozen meanwhile.
func TestKilledInFreezer(t *testing.T) {
	needRoot(t)
	for version := 1; version <= 2; version++ {
		t.Run(fmt.Sprintf("version %d", version), func(t *testing.T) {
			cmd, _ := start(t, counter)
			dir := group(t, version, cmd.Process.Pid)
			tree, err := freeze.Freeze(context.Background(), cmd.Process.Pid, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			setFrozen(t, dir, version, true)
			if err := tree.Kill(); err != nil {
				t.Error(err)
			}
			if err := unix.Kill(cmd.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("the program is still there (%v)", err)
			}
		})
	}
}

// TestFreezeIn stops a program by its group, which is left as it was found.
func TestFreezeIn(t *testing.T) {
	needRoot(t)
	for version := 1; version <= 2; version++ {
		for _, before := range []bool{false, true} {
			t.Run(fmt.Sprintf("version %d, frozen before: %v", version, before), func(t *testing.T) {
				cmd, _ := start(t, counter)
				pid := cmd.Process.Pid
				dir := group(t, version, pid)
				setFrozen(t, dir, version, before)
				for range 3 {
					tree, err := freeze.FreezeIn(context.Background(), pid, 30*time.Second, dir)
					if err != nil {
						t.Fatal(err)
					}
					if err := readAll(tree); err != nil {
						t.Error(err)
					}
					if err := tree.Thaw(); err != nil {
						t.Fatal(err)
					}
					until(t, pid, before)
				}
				setFrozen(t, dir, version, false)
				ends(t, pid, cmd.Process.Wait)
			})
		}
	}
}

// until waits until a program that counts stands still in a frozen group, or counts.
func until(t *testing.T, pid int, frozen bool) {
	t.Helper()
	var first uint64
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		st, err := procfs.ReadStat(pid)
		if err != nil {
			t.Fatal(err)
		}
		if first == 0 {
			first = st.UTime + 1
		}
		switch {
		case frozen && ptrace.Frozen(pid, st.State), !frozen && st.UTime > first:
			return
		case time.Since(begin) > time.Minute:
			t.Fatalf("pid %d is in state %c, frozen is to be %v", pid, st.State, frozen)
		}
	}
}

// TestFreezeOutside: a group that does not stop the tree is refused, and left alone.
func TestFreezeOutside(t *testing.T) {
	needRoot(t)
	in, _ := start(t, counter)
	out, _ := start(t, counter)
	dir := group(t, 2, in.Process.Pid)
	tree, err := freeze.FreezeIn(context.Background(), out.Process.Pid, 30*time.Second, dir)
	if err == nil || !strings.Contains(err.Error(), "not in the control group") {
		t.Errorf("a tree outside of the group: %v", err)
		if err == nil {
			_ = tree.Thaw()
		}
	}
	for _, pid := range []int{in.Process.Pid, out.Process.Pid} {
		until(t, pid, false)
	}
	for _, dir := range []string{t.TempDir(), "/nonexistent"} {
		if _, err := cgroup.OpenFreezer(dir); err == nil {
			t.Errorf("%s is taken for a group", dir)
		}
	}
}
