package files

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// kindRegular carries what is found by its path: regular files, directories,
// O_PATH descriptors of anything, and external files, which are found by their key.
var kindRegular = &kind{
	name: "regular file", note: "one whose name was removed goes by another one in the same directory, or one that the kernel remembers",
	typ: fdinfo.FdTypes_REG,
	takes: func(_ *Dumper, o *object) bool {
		if !strings.HasPrefix(o.link, "/") || pseudo(o) {
			return false
		}
		switch o.mode() & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR:
			return true
		}
		return o.isPath()
	},
	dump:  dumpRegular,
	check: checkRegular,
	open:  openEach(openRegular),
}

// regularState is what a plan wants to know of a regular file.
type regularState struct {
	buildID string
}

func dumpRegular(d *Dumper, o *object) error {
	if o.ext {
		return d.dumpExternal(o)
	}
	st := &regularState{}
	o.state = st
	switch isProc, pid, rest, err := insideProc(o); {
	case err != nil:
		return err
	case isProc && d.ownProc(pid, rest):
		// No destination has it before the tree is there: not a path to check.
		o.entries = append(o.entries, d.regEntry(o, o.id, o.link))
		return nil
	case isProc:
		d.lacks(o, "it is a file of one process in /proc", "it ends with that process: let the program close it, or declare the file external")
		return nil
	}
	path, at := d.locate(o)
	if at != atPath {
		return d.dumpLost(o, o.id)
	}
	o.noteHint()
	o.path = path
	e := d.regEntry(o, o.id, path)
	if o.mapped() || d.opts.BuildIDs && !o.isPath() {
		st.buildID = objectBuildID(o)
		e.Reg.BuildId = buildIDWords(st.buildID)
	}
	o.entries = append(o.entries, e)
	return nil
}

// refuseLost refuses a file to which no known path leads.
func (d *Dumper) refuseLost(o *object) {
	if o.mode()&unix.S_IFMT == unix.S_IFREG && o.deleted() {
		d.lacks(o, fmt.Sprintf("its name was removed, but it has %d other names that are not known", o.stat.Nlink),
			"dump with --link-remap, link it under its old name again (ln), or declare it external")
		return
	}
	if d.detached(o) {
		d.lacks(o, "it is on a mount that is nowhere any more (umount -l, open_tree)", "mount it, or declare the file external")
		return
	}
	d.lacks(o, "another file stands at its path, or none", "a mount may hide it: unmount that, or declare the file external")
}

// detached says whether o is on a mount that its process no longer sees.
func (d *Dumper) detached(o *object) bool {
	mounts, err := procfs.Mountinfo(o.first().proc.Pid)
	return err == nil && !slices.ContainsFunc(mounts, func(m procfs.Mount) bool { return m.ID == o.info.MntID })
}

// regEntry is the image entry of a file found by name.
func (d *Dumper) regEntry(o *object, id uint32, name string) *fdinfo.FileEntry {
	r := &regfile.RegFileEntry{
		Id: proto.Uint32(id), Flags: proto.Uint32(uint32(o.flags)), Pos: proto.Uint64(uint64(max(o.info.Pos, 0))),
		Fown: o.fown, Name: proto.String(name), Mode: proto.Uint32(o.mode()),
	}
	if o.mode()&unix.S_IFMT == unix.S_IFREG {
		r.Size = proto.Uint64(uint64(o.stat.Size))
	}
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(id), Reg: r}
}

// dumpExternal names the file by its key; its content stays outside.
func (d *Dumper) dumpExternal(o *object) error {
	e := d.regEntry(o, o.id, o.key.String())
	e.Reg.Ext = proto.Bool(true)
	o.entries = append(o.entries, e)
	f := o.fact(o.id)
	f.Path, f.MappedBytes = o.link, o.reach
	return nil
}

func checkRegular(r *Restorer, x *description) error {
	e := x.entry.GetReg()
	if e.GetPos() > 1<<63-1 {
		return fmt.Errorf("the position %d is out of range", e.GetPos())
	}
	if e.GetExt() {
		return r.checkExternal(e.GetName(), x)
	}
	return checkName(e.GetName())
}

func openRegular(r *Restorer, x *description) error {
	e := x.entry.GetReg()
	in, base, err := r.base(x, e)
	if err != nil {
		return err
	}
	if in != nil && in.Forward {
		return r.forward(x, in)
	}
	defer func() {
		if in == nil {
			_ = base.Close()
		}
	}()
	if in == nil && e.GetFlags()&unix.O_NOFOLLOW != 0 {
		x.file = r.openNamed(base, e)
	}
	if x.file == nil {
		if x.file, err = r.reopenRecorded(x, base, e); err != nil {
			return err
		}
	}
	r.setHint(x)
	return setPosition(x.file, e.GetPos())
}

// Hints of how long what is written will live, kept by the inode (fcntl(2)).
const (
	fGetRWHint = 1024 + 11
	fSetRWHint = 1024 + 12
)

// noteHint notes the write hint of a regular file.
func (o *object) noteHint() {
	if o.isPath() || o.first().fd < 0 || o.mode()&unix.S_IFMT != unix.S_IFREG {
		return
	}
	if hint, err := sys.FcntlUint64(int(o.file.Fd()), fGetRWHint, 0); err == nil && hint != 0 {
		o.fact(o.id).WriteHint = hint
	}
}

// setHint gives a file its write hint, which is only advice.
func (r *Restorer) setHint(x *description) {
	f := r.facts[x.id]
	if f == nil || f.WriteHint == 0 || x.file == nil {
		return
	}
	if _, err := sys.FcntlUint64(int(x.file.Fd()), fSetRWHint, f.WriteHint); err != nil {
		r.log.Warn("the write hint of a file cannot be set", "path", x.file.Name(), "error", err)
	}
}

// openNamed opens a file by its name, so that its flags show O_NOFOLLOW as
// before, which a reopened one cannot have. It gives nil unless that leads to
// base, which was checked.
func (r *Restorer) openNamed(base *os.File, e *regfile.RegFileEntry) *os.File {
	want, err := base.Stat()
	if err != nil || !want.Mode().IsRegular() && !want.IsDir() && e.GetFlags()&unix.O_PATH == 0 {
		return nil
	}
	f, err := r.opts.Open(r.nameOf(e), reopenFlags(int(e.GetFlags()), want.IsDir())|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	if got, err := f.Stat(); err != nil || !os.SameFile(want, got) {
		_ = f.Close()
		return nil
	}
	return f
}

// base gives the file from which an entry's descriptions are opened: a handed
// one, or what is at the path, opened with O_PATH so that nothing happens if it
// is something else than expected. in is nil unless it was handed in.
func (r *Restorer) base(x *description, e *regfile.RegFileEntry) (in *Inherit, base *os.File, err error) {
	if in = r.inherited(e); in != nil {
		if err := r.checkHanded(x, e, in); err != nil {
			return nil, nil, err
		}
		if err := r.checkPolicy(in.File, e); err != nil {
			return nil, nil, err
		}
		return in, in.File, nil
	}
	if e.GetExt() {
		return nil, nil, errors.New("no file was handed in for its key")
	}
	flags := unix.O_PATH | unix.O_CLOEXEC
	if e.GetFlags()&unix.O_PATH != 0 && (e.Mode == nil || e.GetMode()&unix.S_IFMT == unix.S_IFLNK) {
		flags |= int(e.GetFlags()) & unix.O_NOFOLLOW
	}
	f, err := r.opts.Open(r.nameOf(e), flags, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(r.validate(f, e), r.noteLink(e, f)); err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return nil, f, nil
}

// reopenRecorded opens base with the flags of the entry.
func (r *Restorer) reopenRecorded(x *description, base *os.File, e *regfile.RegFileEntry) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(base.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: base.Name(), Err: err}
	}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFREG, kind == unix.S_IFDIR, e.GetFlags()&unix.O_PATH != 0, nullDevice(&st):
	default: // opening it could block, or do something
		return nil, fmt.Errorf("%s is a %s here, expected a regular file or directory", base.Name(), modeKind(st.Mode))
	}
	flags := reopenFlags(int(e.GetFlags()), st.Mode&unix.S_IFMT == unix.S_IFDIR)
	if nullDevice(&st) {
		flags &^= unix.O_DIRECT
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR && len(x.at) == 0 {
		flags |= unix.O_PATH // to be entered; whoever watches it is not told
	}
	if flags&unix.O_PATH != 0 && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return dupFile(base) // a symlink itself cannot be reopened, but O_PATH is O_PATH
	}
	f, err := reopen(base, flags)
	if errors.Is(err, unix.EPERM) && flags&unix.O_NOATIME != 0 {
		r.log.Warn("file is not owned by this user: opened without O_NOATIME", "path", base.Name())
		f, err = reopen(base, flags&^unix.O_NOATIME)
	}
	if err != nil {
		return nil, hinted(err)
	}
	return f, nil
}

// hinted adds what to do to the errors of open(2) that puzzle.
func hinted(err error) error {
	switch {
	case errors.Is(err, unix.ETXTBSY):
		return fmt.Errorf("%w: the file is being executed and cannot be written", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: mount it read-write", err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: the file system may not know O_DIRECT", err)
	case errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: it cannot be opened again; hand it in to be forwarded", err)
	}
	return err
}

func dupFile(f *os.File) (*os.File, error) {
	n, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, &os.PathError{Op: "duplicate", Path: f.Name(), Err: err}
	}
	return os.NewFile(uintptr(n), f.Name()), nil
}

// setPosition seeks to the recorded position, unless the file has none. A
// position beyond the end is kept.
func setPosition(f *os.File, pos uint64) error {
	if pos == 0 {
		return nil
	}
	_, err := unix.Seek(int(f.Fd()), int64(pos), io.SeekStart)
	switch {
	case err == nil, errors.Is(err, unix.ESPIPE), errors.Is(err, unix.EBADF): // EBADF: O_PATH
		return nil
	}
	return &os.PathError{Op: fmt.Sprintf("seek to %d in", pos), Path: f.Name(), Err: err}
}
