package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// A file whose name was removed, or is hidden, but that has other names cannot
// be carried like a deleted one: those names would lead to another file
// afterwards. With Options.LinkRemap the dump gives it one more name, in the
// directory where it was, under which a restore finds it and which that removes.

// Links are such names. Either Remove or Close ends them.
type Links struct{ all []madeLink }

type madeLink struct {
	dir  *os.File // O_PATH
	name string
	ino  inodeID
}

// Remove removes the names, as long as they lead to what they were made for.
// It may be called twice, and on nil.
func (l *Links) Remove() error {
	if l == nil {
		return nil
	}
	var errs []error
	for _, x := range l.all {
		var st unix.Stat_t
		err := unix.Fstatat(int(x.dir.Fd()), x.name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && inode(&st) == x.ino {
			err = onWritable(x.dir, func(fd int) error { return unix.Unlinkat(fd, x.name, 0) })
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "unlink", Path: filepath.Join(x.dir.Name(), x.name), Err: err})
		}
	}
	l.Close()
	return errors.Join(errs...)
}

// Close leaves the names where they are. It may be called twice, and on nil.
func (l *Links) Close() {
	if l == nil {
		return
	}
	for _, x := range l.all {
		_ = x.dir.Close()
	}
	l.all = nil
}

// linkRemap is a file with such a name on its way.
type linkRemap struct {
	id    uint32 // of the entry with the new name
	path  string
	users []uint32 // ids of the entries with the old ones
}

// linkName is CRIU's name for the n-th.
func linkName(n uint32) string { return fmt.Sprintf("link_remap.%d", n) }

// dumpLost carries o, to which no known path leads although it has names, as the
// entry regID by a new name, or refuses it.
func (d *Dumper) dumpLost(o *object, regID uint32) error {
	if !d.opts.LinkRemap || o.mode()&unix.S_IFMT == unix.S_IFDIR {
		d.refuseLost(o)
		return nil
	}
	o.path, o.dirOnly = d.standingDir(o), true
	o.entries = append(o.entries, d.regEntry(o, regID, o.linkPath()))
	if d.dry() {
		return nil
	}
	k := inode(&o.stat)
	l := d.remapOf[k]
	if l == nil {
		l = &linkRemap{id: d.newID()}
		made, err := d.link(o, l.id)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EMLINK) {
			d.lacks(o, fmt.Sprintf("its name was removed, and it cannot be given another: %v", err), "link it under its old name again (ln), or declare it external")
			return nil
		}
		if err != nil {
			return err
		}
		d.links.all = append(d.links.all, made)
		l.path = filepath.Join(o.path, made.name)
		d.remapOf[k] = l
		d.remaps = append(d.remaps, l)
		e := &regfile.RegFileEntry{Id: proto.Uint32(l.id), Flags: proto.Uint32(unix.O_PATH), Pos: proto.Uint64(0), Fown: noOwner(),
			Name: proto.String(l.path), Mode: proto.Uint32(o.mode())}
		o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(l.id), Reg: e})
	}
	l.users = append(l.users, regID)
	return nil
}

// link gives o a name with the number n, or a higher one, in the directory o.path.
func (d *Dumper) link(o *object, n uint32) (madeLink, error) {
	dir, err := openPath(d.rootOf(o)+o.path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return madeLink{}, err
	}
	m := madeLink{dir: dir, ino: inode(&o.stat)}
	for ; ; n++ {
		m.name = linkName(n)
		err = unix.Linkat(int(o.file.Fd()), "", int(dir.Fd()), m.name, unix.AT_EMPTY_PATH)
		switch {
		case err == nil:
			return m, nil
		case !errors.Is(err, unix.EEXIST):
			_ = dir.Close()
			return madeLink{}, &os.PathError{Op: "link", Path: filepath.Join(o.path, m.name), Err: err}
		}
	}
}

// emitLinks emits which entry is found under which other one's name.
func (d *Dumper) emitLinks() error {
	for _, l := range d.remaps {
		for _, id := range l.users {
			e := &remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(id), RemapId: proto.Uint32(l.id), RemapType: remap_file_path.RemapType_LINKED.Enum()}
			if err := d.put(remapImage, remapMagic, e, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// TakeLinks gives the names that the dump made, for the caller to remove or
// leave; those that nobody takes are removed by Close.
func (d *Dumper) TakeLinks() *Links {
	l := d.links
	d.links = Links{}
	return &l
}

// loadLinked validates the entries that are found under another one's name.
func (r *Restorer) loadLinked() error {
	for orig, id := range r.linked {
		x, y := r.byID[orig], r.byID[id]
		if x == nil || y == nil || x.entry.GetReg() == nil || y.entry.GetReg() == nil || orig == id || r.linked[id] != 0 {
			return fmt.Errorf("image %s: file %d cannot be found under the name of file %d", remapImage, orig, id)
		}
		if len(y.at) > 0 {
			return fmt.Errorf("image %s: file %d, which is only another name, has descriptors", remapImage, id)
		}
		y.part = x
	}
	return nil
}

// nameOf is the path under which an entry is found.
func (r *Restorer) nameOf(e *regfile.RegFileEntry) string {
	if id, ok := r.linked[e.GetId()]; ok {
		return r.byID[id].entry.GetReg().GetName()
	}
	return e.GetName()
}

// noteLink remembers that f was found under a name that goes away.
func (r *Restorer) noteLink(e *regfile.RegFileEntry, f *os.File) error {
	id, ok := r.linked[e.GetId()]
	if !ok || r.noted[id] {
		return nil
	}
	name := r.nameOf(e)
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: name, Err: err}
	}
	dir, err := r.opts.Open(filepath.Dir(name), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	r.noted[id] = true
	r.links.all = append(r.links.all, madeLink{dir: dir, name: filepath.Base(name), ino: inode(&st)})
	return nil
}

// TakeLinks gives the names that are to be removed once the tree runs.
func (r *Restorer) TakeLinks() *Links {
	l := r.links
	r.links = Links{}
	return &l
}
