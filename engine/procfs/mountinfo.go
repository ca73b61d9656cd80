package procfs

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// Mount is one line of /proc/PID/mountinfo (proc_pid_mountinfo(5)), unescaped.
type Mount struct {
	ID, Parent   int
	Major, Minor uint32
	Root         string   // of the mount, in its file system
	Point        string   // where it is, from the process's root
	Options      string   // of the mount
	Tags         []string // such as "shared:1"
	FSType       string
	Source       string
	SuperOptions string
}

// mountEscapes are what show_mountinfo escapes (fs/proc_namespace.c), and '#'
// at the start of a source.
const mountEscapes = " \t\n\\#"

// ParseMount parses one line.
func ParseMount(line string) (Mount, error) {
	// Fields may be empty: an empty source is two spaces.
	f := strings.Split(line, " ")
	if len(f) < 9 {
		return Mount{}, fmt.Errorf("mount of %d fields, want at least 9", len(f))
	}
	var m Mount
	if err := errors.Join(set(&m.ID, f[0], 10), set(&m.Parent, f[1], 10)); err != nil {
		return Mount{}, fmt.Errorf("mount id: %w", err)
	}
	a, b, ok := strings.Cut(f[2], ":")
	if !ok {
		return Mount{}, fmt.Errorf("%q is no device", clip(f[2]))
	}
	if err := errors.Join(set(&m.Major, a, 10), set(&m.Minor, b, 10)); err != nil {
		return Mount{}, fmt.Errorf("device: %w", err)
	}
	m.Root, m.Point, m.Options = unescape(f[3], mountEscapes), unescape(f[4], mountEscapes), f[5]
	i := 6
	for ; i < len(f) && f[i] != "-"; i++ {
		m.Tags = append(m.Tags, f[i])
	}
	if len(f) < i+4 {
		return Mount{}, errors.New("mount without a file system behind a dash")
	}
	m.FSType, m.Source = unescape(f[i+1], mountEscapes), unescape(f[i+2], mountEscapes)
	m.SuperOptions = strings.Join(f[i+3:], " ")
	return m, nil
}

// ParseMountinfo parses a mountinfo file.
func ParseMountinfo(r io.Reader) ([]Mount, error) {
	var out []Mount
	err := eachLine(r, func(line []byte) error {
		m, err := ParseMount(string(line))
		if err != nil {
			return err
		}
		out = append(out, m)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Mountinfo reads the mounts that a process sees below its root. A zombie has
// none: the file cannot be opened then (EINVAL).
func Mountinfo(pid int) ([]Mount, error) { return stream(Path(pid, "mountinfo"), ParseMountinfo) }
