package procfs

import (
	"fmt"
	"strings"

	"godwit/engine/arch"
)

// ParseSyscall parses a syscall file: the number of the system call in which a
// task is blocked. ok is false for one that is in none, or runs.
func ParseSyscall(b []byte) (nr uint64, ok bool, err error) {
	word, _ := field(strings.TrimSpace(string(b)))
	if word == "running" || word == "-1" {
		return 0, false, nil
	}
	if err := set(&nr, word, 10); err != nil {
		return 0, false, fmt.Errorf("system call: %w", err)
	}
	return nr, true, nil
}

// InVfork tells whether a thread waits for a child that shares its memory, as
// after vfork(2): nothing but the child, or a signal that kills, wakes it.
func InVfork(pid, tid int) bool {
	st, err := ReadTaskStat(pid, tid)
	if err != nil || st.State != 'D' {
		return false
	}
	b, err := ReadAll(TaskPath(pid, tid, "syscall"))
	if err != nil {
		return false
	}
	nr, ok, err := ParseSyscall(b)
	return err == nil && ok && arch.MakesTask(nr)
}
