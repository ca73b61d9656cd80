package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/wire"
)

// keptFlags are the recorded open flags that an opening of ours takes over when
// the description itself is handed on; the others either create something
// (O_CREAT, O_TRUNC …) or are set by the restore.
const keptFlags = unix.O_APPEND | unix.O_NONBLOCK | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME

func keysOf(externals []*wire.ExternalFile) string {
	if len(externals) == 0 {
		return "none"
	}
	var keys []string
	for _, e := range externals {
		keys = append(keys, e.Key)
	}
	return strings.Join(keys, ", ")
}

// holdPath opens the file at a path. It stays open until the tree runs, so that
// what preflight accepted is what the restore gets, and so that a fifo keeps both
// ends meanwhile.
func holdPath(_ context.Context, q *holdRequest) (*held, error) {
	if !filepath.IsAbs(q.Argument) {
		return nil, hintedf("give the full path on the destination", "the path is not absolute")
	}
	if len(q.Objects) > 0 && q.Objects[0].Kind == "unix-stream" {
		return holdConnection(q)
	}
	f, err := q.openPath(q.Argument)
	if err != nil {
		return nil, hintedf("the source has it at "+q.external[0].Path, "%w", err)
	}
	if err := q.suits(f); err != nil {
		_ = f.Close()
		return nil, hintedf(sizeHint, "%w", err)
	}
	return &held{file: f, forward: q.Forward}, nil
}

const sizeHint = "give another file, or say what may differ: size=any, mode=any, content=any"

// openPath opens one file. The kind is looked at through an O_PATH description
// first, since opening a wrong object (a tty, a tape, a fifo without a peer)
// already does something to it.
func (q *holdRequest) openPath(path string) (*os.File, error) {
	look, err := openFile(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer func() { _ = look.Close() }()
	return q.openLook(look, path)
}

// openLook is openPath of a file that is open with O_PATH.
func (q *holdRequest) openLook(look *os.File, path string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(look.Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	kind, want := kindOf(st.Mode), q.external[0].Kind
	if want == "pipe" {
		want = "fifo"
	}
	if want != "" && kind != want {
		return nil, fmt.Errorf("it is a %s here, the tree has a %s open", kind, q.external[0].Kind)
	}
	flags := q.flags()
	access := flags & unix.O_ACCMODE
	if flags&unix.O_PATH != 0 {
		// A description of O_PATH has no access mode; any of another file would give more than was there.
		return reopen(look, path, unix.O_PATH)
	}
	if kind != "fifo" {
		if q.Forward {
			access |= flags & keptFlags
		}
		return reopen(look, path, access)
	}
	// A fifo opened for both ways never blocks, and as long as it is held a
	// reader or a writer that opens or closes the other end changes nothing for the tree.
	both, err := reopen(look, path, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil || !q.Forward {
		return both, err
	}
	defer func() { _ = both.Close() }()
	return reopen(look, path, access|flags&keptFlags)
}

func reopen(look *os.File, path string, flags int) (*os.File, error) {
	f, err := openFile(fmt.Sprintf("/proc/self/fd/%d", look.Fd()), flags)
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		pe.Path = path
	}
	return f, err
}

// openFile opens path with exactly these flags: os.OpenFile would put a fifo
// into the poller and so change O_NONBLOCK of a description that is handed on.
func openFile(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// kindOf names the kind of file that a st_mode says, as plans name it.
func kindOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "regular"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFCHR:
		return "chr"
	case unix.S_IFBLK:
		return "blk"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("object of mode %#o", mode)
}
