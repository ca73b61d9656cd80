package procfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
)

func itoa(n int) string { return strconv.Itoa(n) }

// numbers lists the entries of a directory that are numbers, ascending.
func numbers(path string) ([]int, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	out := make([]int, 0, len(names))
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil && n >= 0 {
			out = append(out, n)
		}
	}
	sort.Ints(out)
	return out, nil
}

// Pids lists all processes of the pid namespace that /proc shows, ascending.
func Pids() ([]int, error) { return numbers("/proc") }

// Tids lists the threads of a process, ascending: the leader is first unless a
// pid has wrapped around. Threads that start meanwhile may be missing.
func Tids(pid int) ([]int, error) { return numbers(Path(pid, "task")) }

// Fds lists the open descriptors of a process, ascending.
func Fds(pid int) ([]int, error) { return numbers(Path(pid, "fd")) }

// FdLink reads the link /proc/PID/fd/FD: a path or a text such as "pipe:[12]".
func FdLink(pid, fd int) (string, error) { return Readlink(Path(pid), "fd/"+itoa(fd)) }

// Readlink reads a link in the directory of a task, such as "ns/mnt". Of a task
// that has ended it is fs.ErrNotExist, where the kernel says EACCES.
func Readlink(task, link string) (string, error) {
	s, err := os.Readlink(task + "/" + link)
	if errors.Is(err, fs.ErrPermission) {
		if _, serr := os.Stat(task); serr != nil {
			return "", serr
		}
	}
	return s, err
}

// Comm reads the name of a process's leading thread.
func Comm(pid int) (string, error) { return comm(Path(pid, "comm")) }

// TaskComm reads the name of a thread.
func TaskComm(pid, tid int) (string, error) { return comm(TaskPath(pid, tid, "comm")) }

func comm(path string) (string, error) {
	b, err := ReadAll(path)
	if err != nil {
		return "", err
	}
	return string(bytes.TrimSuffix(b, []byte("\n"))), nil
}

// ParseCmdline splits the arguments of a process. One that has overwritten
// them (setproctitle) may give anything.
func ParseCmdline(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	return strings.Split(string(bytes.TrimSuffix(b, []byte{0})), "\x00")
}

// Cmdline reads the arguments of a process; nil for a zombie or a kernel thread.
func Cmdline(pid int) ([]string, error) {
	b, err := ReadAll(Path(pid, "cmdline"))
	if err != nil {
		return nil, err
	}
	return ParseCmdline(b), nil
}

// hasChildren: the kernel has /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN).
var hasChildren = sync.OnceValue(func() bool {
	_, err := os.Stat("/proc/thread-self/children")
	return err == nil
})

// ParseChildren parses a children file.
func ParseChildren(b []byte) ([]int, error) {
	var out []int
	if err := ints(&out, string(b)); err != nil {
		return nil, err
	}
	return out, nil
}

// Children lists the children of a process, of all its threads, zombies
// included, ascending. Unless the process is stopped, a child that is born or
// dies meanwhile may be missing or too much.
func Children(pid int) ([]int, error) {
	if !hasChildren() {
		all, err := childrenByParent()
		if err != nil {
			return nil, err
		}
		if len(all[pid]) == 0 {
			if _, err := os.Stat(Path(pid)); err != nil {
				return nil, err
			}
		}
		return all[pid], nil
	}
	tids, err := Tids(pid)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, tid := range tids {
		kids, err := read(TaskPath(pid, tid, "children"), ParseChildren)
		if err != nil {
			if Gone(err) && tid != pid {
				continue
			}
			return nil, err
		}
		out = append(out, kids...)
	}
	sort.Ints(out)
	return out, nil
}

// childrenByParent reads the parent of every process.
func childrenByParent() (map[int][]int, error) {
	pids, err := Pids()
	if err != nil {
		return nil, err
	}
	out := map[int][]int{}
	for _, pid := range pids {
		st, err := ReadStat(pid)
		if err != nil {
			if Gone(err) {
				continue
			}
			return nil, err
		}
		out[st.PPid] = append(out[st.PPid], pid)
	}
	return out, nil
}

// Tree lists root and all its descendants, parents before their children,
// siblings ascending. A running tree may change while it is walked: who must
// have all of it stops what was found and walks again until nothing is new.
func Tree(root int) ([]int, error) {
	if _, err := os.Stat(Path(root)); err != nil {
		return nil, err
	}
	kids := Children
	if !hasChildren() {
		// One scan for the whole tree in place of one a process.
		all, err := childrenByParent()
		if err != nil {
			return nil, err
		}
		kids = func(pid int) ([]int, error) { return all[pid], nil }
	}
	seen := map[int]bool{root: true}
	out := []int{root}
	for i := 0; i < len(out); i++ {
		ks, err := kids(out[i])
		if err != nil {
			if Gone(err) && out[i] != root {
				continue
			}
			return nil, err
		}
		for _, k := range ks {
			if !seen[k] {
				seen[k] = true
				out = append(out, k)
			}
		}
	}
	return out, nil
}

// ParseAuxv parses /proc/PID/auxv into its words, type and value by turns, the
// closing AT_NULL pair included.
func ParseAuxv(b []byte) ([]uint64, error) {
	if len(b)%16 != 0 {
		return nil, fmt.Errorf("%d bytes are no pairs of words", len(b))
	}
	out := make([]uint64, 0, len(b)/8)
	for ; len(b) > 0; b = b[8:] {
		out = append(out, binary.LittleEndian.Uint64(b))
	}
	return out, nil
}

// Auxv reads the auxiliary vector of a process; empty for a zombie.
func Auxv(pid int) ([]uint64, error) { return read(Path(pid, "auxv"), ParseAuxv) }

// AuxvValue finds the value of an AT_* type.
func AuxvValue(auxv []uint64, typ uint64) (uint64, bool) {
	for i := 0; i+1 < len(auxv); i += 2 {
		if auxv[i] == typ {
			return auxv[i+1], true
		}
	}
	return 0, false
}

// Timer is one POSIX timer of /proc/PID/timers. What it is set to must be
// asked from within the process.
type Timer struct {
	ID     int
	Signal int
	Value  uint64 // sigev_value
	Notify string // "signal", "none" or "thread"
	// ByTID: the signal goes to thread Pid, else to process Pid.
	ByTID bool
	Pid   int
	Clock int
}

// ParseTimers parses a timers file.
func ParseTimers(b []byte) ([]Timer, error) {
	var out []Timer
	for no, line := range strings.Split(string(b), "\n") {
		if line == "" {
			continue
		}
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("line %d has no colon", no+1)
		}
		val = strings.TrimSpace(val)
		if key == "ID" {
			out = append(out, Timer{})
		}
		if len(out) == 0 {
			return nil, fmt.Errorf("line %d comes before the first timer", no+1)
		}
		t := &out[len(out)-1]
		var err error
		switch key {
		case "ID":
			err = set(&t.ID, val, 10)
		case "signal":
			sig, value, ok := strings.Cut(val, "/")
			if !ok {
				err = errors.New("no slash")
				break
			}
			err = errors.Join(set(&t.Signal, sig, 10), set(&t.Value, strings.TrimPrefix(value, "0x"), 16))
		case "notify":
			how, who, ok1 := strings.Cut(val, "/")
			kind, id, ok2 := strings.Cut(who, ".")
			if !ok1 || !ok2 || kind != "tid" && kind != "pid" {
				err = fmt.Errorf("%q names no receiver", clip(val))
				break
			}
			t.Notify, t.ByTID = how, kind == "tid"
			err = set(&t.Pid, id, 10)
		case "ClockID":
			err = set(&t.Clock, val, 10)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d, %s: %w", no+1, clip(key), err)
		}
	}
	return out, nil
}

// Timers reads the POSIX timers of a process.
func Timers(pid int) ([]Timer, error) { return read(Path(pid, "timers"), ParseTimers) }
