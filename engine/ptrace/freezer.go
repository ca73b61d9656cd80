package ptrace

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// wchan is the kernel's function in which a task waits, empty if it is not told.
func wchan(tid int) string {
	b, err := procfs.ReadAll(procfs.Path(tid, "wchan"))
	if err != nil {
		return ""
	}
	return string(b)
}

// Frozen says whether a task in a state of /proc/PID/stat, which is not stopped,
// waits in the freezer of control groups.
func Frozen(tid int, state byte) bool { return inFreezer(tid, state, wchan(tid)) }

// inFreezer says whether a task that is not stopped waits in the freezer of
// control groups. In one of version 2 it sleeps in a place of its own; version 1
// also keeps it where it was (TASK_FROZEN, kernel/freezer.c, 6.1).
func inFreezer(tid int, state byte, place string) bool {
	switch state {
	case 'S':
		return place == "get_signal" || place == "do_freezer_trap" || place == "__refrigerator"
	case 'D':
		frozen, err := frozen1(tid)
		return err == nil && frozen
	}
	return false
}

// group1 is the group of a task in the freezer of version 1, empty if there is none.
func group1(tid int) (string, error) {
	b, err := procfs.ReadAll(procfs.Path(tid, "cgroup"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && f[1] == "freezer" {
			return path.Clean("/" + f[2]), nil
		}
	}
	return "", nil
}

// frozen1 says whether a task is in a frozen group of version 1.
func frozen1(tid int) (bool, error) {
	group, err := group1(tid)
	if err != nil || group == "" || group == "/" {
		return false, err // the root cannot be frozen
	}
	root, err := sys.MountCgroup("freezer")
	if err != nil {
		return false, err
	}
	defer func() { _ = root.Close() }()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d%s/freezer.state", root.Fd(), group))
	return err == nil && strings.TrimSpace(string(b)) != "THAWED", err
}

// leaveFreezer takes a task, and no other, out of a group of the freezer of version
// 1, in which not even a tracer reaches it; back puts it back, where it stands still again.
func leaveFreezer(tid int) (back func() error, err error) {
	none := func() error { return nil }
	group, err := group1(tid)
	if err != nil || group == "" || group == "/" {
		return none, err
	}
	root, err := sys.MountCgroup("freezer")
	if err != nil {
		return none, err
	}
	put := func(group string) error {
		err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d%s/tasks", root.Fd(), group), fmt.Append(nil, tid), 0)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return err
	}
	if err := put("/"); err != nil {
		return none, errors.Join(fmt.Errorf("take task %d out of its frozen control group: %w", tid, err), root.Close())
	}
	return func() error { return errors.Join(put(group), root.Close()) }, nil
}
