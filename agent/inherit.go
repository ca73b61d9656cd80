package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/wire"
)

// inherited holds the files that this host hands to a tree that lands here.
// They stay open until close, so that what preflight accepted is what the
// restore gets, and so that a fifo keeps both ends meanwhile.
type inherited struct {
	files map[string]engine.Inherit
}

func (h *inherited) close() {
	for _, f := range h.files {
		_ = f.File.Close()
	}
	h.files = nil
}

// keptFlags are the recorded open flags that an opening of ours takes over when
// the description itself is handed on; the others either create something
// (O_CREAT, O_TRUNC …) or are set by the restore.
const keptFlags = unix.O_APPEND | unix.O_NONBLOCK | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME

// openInherits opens every file that is to back an external key. All failures
// come back as one refusal that lists each. Preconditions: the caller closes
// the result.
func openInherits(list []*wire.Inherit, externals []*wire.ExternalFile) (*inherited, error) {
	byKey := map[string]*wire.ExternalFile{}
	for _, e := range externals {
		byKey[e.Key] = e
	}
	h := &inherited{files: map[string]engine.Inherit{}}
	var bad []*wire.Problem
	refuse := func(in *wire.Inherit, reason, hint string) {
		bad = append(bad, &wire.Problem{Object: &wire.Object{Path: in.Path, Key: in.Key}, Reason: reason, Hint: hint})
	}
	for _, in := range list {
		ext := byKey[in.Key]
		switch {
		case in.Key == "":
			refuse(in, "no key is named for it", "give KEY=PATH")
			continue
		case !filepath.IsAbs(in.Path):
			refuse(in, "the path is not absolute", "give the full path on the destination")
			continue
		case ext == nil:
			refuse(in, "no external file of the tree has this key", "declared and found are: "+keysOf(externals))
			continue
		}
		if _, twice := h.files[in.Key]; twice {
			refuse(in, "the key is handed in twice", "name one file for it")
			continue
		}
		f, err := openInherit(in, ext)
		if err != nil {
			refuse(in, err.Error(), "the source has it at "+ext.Path)
			continue
		}
		h.files[in.Key] = engine.Inherit{File: f, Forward: in.Forward}
	}
	if bad != nil {
		h.close()
		return nil, &wire.Failure{
			Code: wire.Code_CODE_REFUSED, Message: "files for the external keys cannot be provided, nothing was touched", Problems: bad,
		}
	}
	return h, nil
}

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

// openInherit opens one file. The kind is looked at through an O_PATH
// description first, since opening a wrong object (a tty, a tape, a fifo
// without a peer) already does something to it.
func openInherit(in *wire.Inherit, ext *wire.ExternalFile) (*os.File, error) {
	look, err := openFile(in.Path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer func() { _ = look.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(look.Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	kind := kindOf(st.Mode)
	if ext.Kind != "" && kind != ext.Kind {
		return nil, fmt.Errorf("it is a %s here, the tree has a %s open", kind, ext.Kind)
	}
	access := int(ext.Flags) & unix.O_ACCMODE
	if int(ext.Flags)&unix.O_PATH != 0 {
		// A description of O_PATH has no access mode; any of another file would give more than was there.
		return reopen(look, in.Path, unix.O_PATH)
	}
	if kind != "fifo" {
		flags := access
		if in.Forward {
			flags |= int(ext.Flags) & keptFlags
		}
		return reopen(look, in.Path, flags)
	}
	// A fifo opened for both ways never blocks, and as long as it is held a
	// reader or a writer that opens or closes the other end changes nothing for the tree.
	both, err := reopen(look, in.Path, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil || !in.Forward {
		return both, err
	}
	defer func() { _ = both.Close() }()
	return reopen(look, in.Path, access|int(ext.Flags)&keptFlags)
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
