package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/wire"
)

// resolverCreate makes an empty file or a fifo with the recorded mode and owner. It
// is removed again if the tree does not run here.
var resolverCreate = resolver{serves: servesCreate, hold: holdCreate}

func servesCreate(o *wire.OpenObject, _ external.Entry) error {
	if r := standsOn(o); r != "" {
		return fmt.Errorf("an empty file cannot be the %s of a process", r)
	}
	switch {
	case o.Kind == "fifo" && o.Queued > 0:
		return fmt.Errorf("%d bytes are queued in the fifo and would be lost with a new one: let them be read first, or take the path of a fifo", o.Queued)
	case o.Kind == "fifo", o.Kind == "regular":
		return nil
	}
	return fmt.Errorf("only regular files and fifos can be created, not what is of kind %s", o.Kind)
}

func holdCreate(_ context.Context, q *holdRequest) (*held, error) {
	if !filepath.IsAbs(q.Argument) {
		return nil, hintedf("give the full path on the destination", "the path is not absolute")
	}
	m, err := q.create()
	if errors.Is(err, unix.EEXIST) {
		if q.Overwrite {
			return q.emptied()
		}
		return nil, hintedf("say path to take it as it is, or overwrite to empty it", "there is something at this path here already")
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, hintedf("make it: mkdir -p "+filepath.Dir(q.Argument), "the directory does not exist here")
	}
	if err != nil {
		return nil, err
	}
	f, err := q.openLook(m.file, q.Argument)
	if err != nil {
		m.remove()
		return nil, err
	}
	return &held{file: f, release: m.remove, landed: m.keep}, nil
}

// madeFile is a file that was made for a tree.
type madeFile struct {
	dir  *os.File // O_PATH
	name string
	file *os.File // O_PATH
}

// create makes the file of the request.
func (q *holdRequest) create() (*madeFile, error) {
	dir, err := openFile(filepath.Dir(q.Argument), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	m := &madeFile{dir: dir, name: engine.TempName(engine.MarkOf(q.migration))}
	mode := q.external[0].Mode
	if err := unix.Mknodat(int(dir.Fd()), m.name, mode&unix.S_IFMT|0o600, 0); err != nil {
		_ = dir.Close()
		return nil, &os.PathError{Op: "create", Path: q.Argument, Err: err}
	}
	err = m.dress(mode, q.Objects)
	if err == nil && q.note != nil {
		var st unix.Stat_t
		if err = unix.Fstat(int(m.file.Fd()), &st); err == nil {
			err = q.note(createdFile{Path: q.Argument, Ino: st.Ino})
		}
	}
	if err == nil {
		err = m.rename(filepath.Base(q.Argument))
	}
	if err != nil {
		m.remove()
		return nil, err
	}
	return m, nil
}

// rename gives the file its name, unless that is taken.
func (m *madeFile) rename(name string) error {
	dir := int(m.dir.Fd())
	err := unix.Renameat2(dir, m.name, dir, name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // a file system that does not know the flag
		if err = unix.Linkat(dir, m.name, dir, name, 0); err == nil {
			err = unix.Unlinkat(dir, m.name, 0)
		}
	}
	if err != nil {
		return &os.PathError{Op: "create", Path: name, Err: err}
	}
	m.name = name
	return nil
}

// created are where files are made.
func created(resolutions []*wire.Resolution) (out []engine.Place) {
	for _, r := range resolutions {
		if r.Resolver == external.Create && plainPath(r.Argument) {
			out = append(out, engine.Place{Path: r.Argument})
		}
	}
	return out
}

// dress gives it its owner, and then its mode, which a change of owner narrows.
// Others may have put something in its place: only what was just made has one
// name and is this process's.
func (m *madeFile) dress(mode uint32, objects []*wire.OpenObject) error {
	fd, err := unix.Openat(int(m.dir.Fd()), m.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: m.name, Err: err}
	}
	m.file = os.NewFile(uintptr(fd), m.name)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode != mode&unix.S_IFMT|0o600 || int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
		return errors.New("somebody replaced it as soon as it was made")
	}
	if len(objects) > 0 {
		if err := unix.Fchownat(fd, "", int(objects[0].Uid), int(objects[0].Gid), unix.AT_EMPTY_PATH); err != nil {
			return os.NewSyscallError("fchownat", err)
		}
	}
	return os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), fileMode(mode))
}

// fileMode is the permissions of a st_mode as package os has them.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, is := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= is
		}
	}
	return m
}

// remove removes it, as long as its name leads to it.
func (m *madeFile) remove() {
	var st, own unix.Stat_t
	dir := int(m.dir.Fd())
	if m.file != nil && unix.Fstat(int(m.file.Fd()), &own) == nil && unix.Fstatat(dir, m.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		st.Dev == own.Dev && st.Ino == own.Ino {
		_ = unix.Unlinkat(dir, m.name, 0)
	}
	m.keep()
}

// keep leaves it where it is.
func (m *madeFile) keep() {
	_ = m.dir.Close()
	if m.file != nil {
		_ = m.file.Close()
	}
}

// emptied takes what stands at the path; a regular file is emptied just before the
// tree runs.
func (q *holdRequest) emptied() (*held, error) {
	f, err := q.openPath(q.Argument)
	if err != nil {
		return nil, err
	}
	h := &held{file: f}
	if q.external[0].Mode&unix.S_IFMT != unix.S_IFREG {
		return h, nil
	}
	w, err := reopen(f, q.Argument, unix.O_WRONLY)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	h.start = func(context.Context) error {
		return os.NewSyscallError("ftruncate", unix.Ftruncate(int(w.Fd()), 0))
	}
	h.release = func() { _ = w.Close() }
	h.landed = h.release
	return h, nil
}
