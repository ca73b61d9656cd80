package procfs

import (
	"fmt"
	"io"
	"math"
	"strings"
)

// Lock is one line of /proc/locks, or of an fdinfo file (fs/locks.c
// lock_get_status).
type Lock struct {
	ID      int64
	Blocked bool   // waits for the lock of the same ID before it; not in fdinfo
	Kind    string // "POSIX", "FLOCK", "OFDLCK", "LEASE", "DELEG", "ACCESS"
	Mode    string // "ADVISORY", "*NOINODE*"; of a lease "ACTIVE", "BREAKING", "BREAKER"
	Type    string // "READ", "WRITE", "UNLCK", "NONE"
	Pid     int    // of the owner in the reader's pid namespace; -1: the description owns it; 0: not in there
	Major   uint32
	Minor   uint32
	Ino     uint64
	// Start and End are the first and the last byte; End is MaxInt64 for "to the end".
	Start, End int64
}

// ParseLock parses one line.
func ParseLock(line string) (Lock, error) {
	var l Lock
	f := strings.Fields(line)
	if len(f) > 1 && f[1] == "->" {
		l.Blocked = true
		f = append(f[:1:1], f[2:]...)
	}
	if len(f) != 8 {
		return Lock{}, fmt.Errorf("lock of %d words, want 8", len(f))
	}
	id, ok := strings.CutSuffix(f[0], ":")
	if !ok {
		return Lock{}, fmt.Errorf("%q is no lock number", clip(f[0]))
	}
	if err := set(&l.ID, id, 10); err != nil {
		return Lock{}, fmt.Errorf("lock number: %w", err)
	}
	l.Kind, l.Mode, l.Type = f[1], f[2], f[3]
	if err := set(&l.Pid, f[4], 10); err != nil {
		return Lock{}, fmt.Errorf("lock owner: %w", err)
	}
	// "<none>:0" stands for no inode.
	if dev, ino, ok := cutLast(f[5], ":"); ok && dev != "<none>" {
		var err error
		if l.Major, l.Minor, err = device(dev); err != nil {
			return Lock{}, fmt.Errorf("lock: %w", err)
		}
		if err := set(&l.Ino, ino, 10); err != nil {
			return Lock{}, fmt.Errorf("lock inode: %w", err)
		}
	} else if !ok {
		return Lock{}, fmt.Errorf("%q is no inode", clip(f[5]))
	}
	if err := set(&l.Start, f[6], 10); err != nil {
		return Lock{}, fmt.Errorf("lock start: %w", err)
	}
	if f[7] == "EOF" {
		l.End = math.MaxInt64
	} else if err := set(&l.End, f[7], 10); err != nil {
		return Lock{}, fmt.Errorf("lock end: %w", err)
	}
	return l, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// ParseLocks parses /proc/locks.
func ParseLocks(r io.Reader) ([]Lock, error) {
	var out []Lock
	err := eachLine(r, func(line []byte) error {
		if len(line) == 0 {
			return nil
		}
		l, err := ParseLock(string(line))
		if err != nil {
			return err
		}
		out = append(out, l)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// ReadLocks reads /proc/locks: the locks of all processes that the reader's
// pid namespace can name.
func ReadLocks() ([]Lock, error) { return stream("/proc/locks", ParseLocks) }
