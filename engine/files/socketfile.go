package files

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SocketFile is the file of a bound unix socket, as this process finds it.
type SocketFile struct {
	Path     string
	Dev, Ino uint64
}

// SocketFiles lists, after Finish, the files of the tree's bound unix sockets.
func (d *Dumper) SocketFiles() []SocketFile {
	var out []SocketFile
	for _, o := range d.objects {
		if o.kind == kindUnix && !o.refused && o.create && o.facts != nil {
			out = append(out, SocketFile{Path: d.rootOf(o) + o.path, Dev: o.facts.Dev, Ino: o.facts.Ino})
		}
	}
	return out
}

// Remove removes the file, if it is still that one: the tree that is bound to it
// has left, and nobody else ever can be.
func (s SocketFile) Remove() error {
	var st unix.Stat_t
	err := unix.Lstat(s.Path, &st)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK && uint64(st.Dev) == s.Dev && st.Ino == s.Ino {
		err = unix.Unlink(s.Path)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("remove the socket file that the tree leaves: %w", &os.PathError{Op: "unlink", Path: s.Path, Err: err})
	}
	return nil
}
