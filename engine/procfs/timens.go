package procfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// TimeOffsets says by how much the clocks of a time namespace are ahead of the
// kernel's own, ns (time_namespaces(7)).
type TimeOffsets struct {
	Monotonic int64
	Boottime  int64
}

// ParseTimeOffsets parses a timens_offsets file.
func ParseTimeOffsets(b []byte) (TimeOffsets, error) {
	var o TimeOffsets
	seen := map[string]bool{}
	for no, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 3 || seen[f[0]] {
			return TimeOffsets{}, fmt.Errorf("line %d is not a clock with seconds and nanoseconds", no+1)
		}
		seen[f[0]] = true
		var sec, nsec int64
		if err := errors.Join(set(&sec, f[1], 10), set(&nsec, f[2], 10)); err != nil {
			return TimeOffsets{}, fmt.Errorf("line %d: %w", no+1, err)
		}
		const most = 1 << 33 // seconds; the kernel takes less than 2^62 ns
		if sec < -most || sec > most || nsec < 0 || nsec >= 1e9 {
			return TimeOffsets{}, fmt.Errorf("line %d: %d.%d s are out of range", no+1, sec, nsec)
		}
		switch f[0] {
		case "monotonic":
			o.Monotonic = sec*1e9 + nsec
		case "boottime":
			o.Boottime = sec*1e9 + nsec
		}
	}
	if !seen["monotonic"] || !seen["boottime"] {
		return TimeOffsets{}, errors.New("a clock is missing")
	}
	return o, nil
}

// ReadTimeOffsets reads the offsets of the time namespace in which children of
// a process are born; all are 0 on a kernel without time namespaces.
func ReadTimeOffsets(pid int) (TimeOffsets, error) {
	o, err := read(Path(pid, "timens_offsets"), ParseTimeOffsets)
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(Path(pid)); serr == nil {
			return TimeOffsets{}, nil
		}
	}
	return o, err
}
