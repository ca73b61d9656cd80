package files

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// kindFanotify carries fanotify(7) groups that are told of events: their marks
// on files, mounts and file systems. Groups that decide on access are refused:
// while they are frozen, whoever opens such a file waits for them, and that may
// be the dump itself. Events that wait to be read are lost.
var kindFanotify = &kind{
	name: "fanotify", note: "events that wait to be read are lost",
	typ:   fdinfo.FdTypes_FANOTIFY,
	takes: func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[fanotify]" },
	dump:  dumpFanotify,
	check: checkFanotify,
	open:  openEach(openFanotify),
	last:  openEach(markFanotify),
}

// Bits of masks (include/uapi/linux/fanotify.h).
const (
	fanPermission = unix.FAN_OPEN_PERM | unix.FAN_ACCESS_PERM | unix.FAN_OPEN_EXEC_PERM | 0x00100000 // FAN_PRE_ACCESS, 6.14
	fanScope      = unix.FAN_ONDIR | unix.FAN_EVENT_ON_CHILD
	fanEvents     = unix.FAN_ACCESS | unix.FAN_MODIFY | unix.FAN_ATTRIB | unix.FAN_CLOSE | unix.FAN_OPEN | unix.FAN_MOVE | unix.FAN_CREATE |
		unix.FAN_DELETE | unix.FAN_DELETE_SELF | unix.FAN_MOVE_SELF | unix.FAN_OPEN_EXEC | unix.FAN_FS_ERROR | unix.FAN_RENAME
	// fanMarkFlags are what fdinfo tells of the flags of a mark.
	fanMarkFlags = unix.FAN_MARK_IGNORED_SURV_MODIFY | unix.FAN_MARK_EVICTABLE | unix.FAN_MARK_IGNORE
	// fanInit are the flags of fanotify_init(2) that a group without permission
	// events can have, but for those that its open file has.
	fanInit = unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS | unix.FAN_ENABLE_AUDIT | unix.FAN_REPORT_PIDFD | unix.FAN_REPORT_TID |
		unix.FAN_REPORT_FID | unix.FAN_REPORT_DIR_FID | unix.FAN_REPORT_NAME | unix.FAN_REPORT_TARGET_FID | 0x00002000 // FAN_REPORT_FD_ERROR, 6.13
	fanOwn = unix.FAN_CLOEXEC | unix.FAN_NONBLOCK
)

func dumpFanotify(d *Dumper, o *object) error {
	info, err := procfs.ReadFdinfo(os.Getpid(), int(o.file.Fd()))
	if err != nil {
		return err
	}
	g := info.Fanotify
	switch {
	case g == nil:
		return errors.New("its fdinfo tells nothing of the group")
	case g.Flags&^(fanInit|fanOwn) != 0:
		d.refuse(o, "it is a fanotify group that decides on access, or of a kind that is not known", "let the program close it")
		return nil
	}
	e := &fsnotify.FanotifyFileEntry{Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown,
		Faflags: proto.Uint32(g.Flags), Evflags: proto.Uint32(g.EventFlags)}
	f := o.fact(o.id)
	f.Path, f.Ino, f.Dev = "", 0, 0
	for i, m := range g.Marks {
		if m.Mask&fanPermission != 0 || m.Mask&^(fanEvents|fanScope) != 0 {
			d.refuse(o, fmt.Sprintf("it has a fanotify mark of mask %#x, which decides on access or is not known", m.Mask), "let the program remove it")
			return nil
		}
		me, id, err := d.dumpMark(o, &m)
		if err != nil {
			return fmt.Errorf("mark %d: %w", i+1, err)
		}
		if o.refused {
			return nil
		}
		f.Watches = append(f.Watches, image.WatchFacts{Number: uint32(i), File: id, Filesystem: m.Kind == "filesystem"})
		e.Mark = append(e.Mark, me)
	}
	if n, err := queuedEvents(o); err != nil {
		return err
	} else if n > 0 && !d.dry() {
		d.log.Warn("events of fanotify that wait to be read are lost", "pid", o.first().proc.Pid, "fd", o.first().fd, "bytes", n)
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_FANOTIFY.Enum(), Id: proto.Uint32(o.id), Ffy: e})
	return nil
}

// dumpMark gives the image of a mark and the entry of the file that it is on.
// CRIU knows no marks on file systems: they look like those on a mount there.
func (d *Dumper) dumpMark(o *object, m *procfs.FanotifyMark) (*fsnotify.FanotifyMarkEntry, uint32, error) {
	e := &fsnotify.FanotifyMarkEntry{Id: proto.Uint32(o.id), Mflags: proto.Uint32(m.MFlags), Mask: proto.Uint32(m.Mask),
		IgnoredMask: proto.Uint32(m.Ignored), SDev: proto.Uint32(m.Sdev)}
	if m.Kind == "inode" {
		id, link, err := d.addWatched(o, watchedInode{sdev: m.Sdev, ino: m.Ino, handle: m.Handle})
		e.Type = fsnotify.MarkType_INODE.Enum()
		e.Ie = &fsnotify.FanotifyInodeMarkEntry{IIno: proto.Uint64(m.Ino), FHandle: fhEntry(m.Handle, strings.TrimSuffix(link, deletedSuffix))}
		return e, id, err
	}
	point, err := d.mountPoint(o, m)
	if err != nil {
		return nil, 0, err
	}
	if point == "" {
		d.refuse(o, fmt.Sprintf("it has a fanotify mark on a %s that is not mounted where its process could see it", m.Kind), "let the program remove the mark")
		return nil, 0, nil
	}
	f, err := openPath(d.rootOf(o)+point, unix.O_PATH, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = f.Close() }()
	id, err := d.AddPath(*o.first().proc, "watch", f, point, unix.O_PATH)
	e.Type = fsnotify.MarkType_MOUNT.Enum()
	e.Me = &fsnotify.FanotifyMountMarkEntry{MntId: proto.Uint32(uint32(m.MntID)), Path: proto.String(point)}
	return e, id, err
}

// mountPoint finds where the mount, or any mount of the file system, of a mark is.
func (d *Dumper) mountPoint(o *object, m *procfs.FanotifyMark) (string, error) {
	mounts, err := procfs.Mountinfo(o.first().proc.Pid)
	if err != nil {
		return "", err
	}
	for _, x := range mounts {
		if m.Kind == "mount" && x.ID != m.MntID || m.Kind != "mount" && x.Major<<20|x.Minor != m.Sdev {
			continue
		}
		f, err := openPath(d.rootOf(o)+x.Point, unix.O_PATH, 0)
		if err != nil {
			continue
		}
		info, err := procfs.ReadFdinfo(os.Getpid(), int(f.Fd()))
		_ = f.Close()
		if err == nil && info.MntID == x.ID { // not hidden by another mount
			return x.Point, nil
		}
	}
	return "", nil
}

func checkFanotify(r *Restorer, x *description) error {
	e := x.entry.GetFfy()
	if e.GetFaflags()&^(fanInit|fanOwn) != 0 {
		return fmt.Errorf("flags %#x of a fanotify group are not carried", e.GetFaflags())
	}
	for i, m := range e.GetMark() {
		switch {
		case m.GetType() == fsnotify.MarkType_INODE && m.Ie == nil, m.GetType() == fsnotify.MarkType_MOUNT && m.Me == nil:
			return fmt.Errorf("mark %d: what it is on is missing", i+1)
		case m.GetMask()&^(fanEvents|fanScope) != 0:
			return fmt.Errorf("mark %d: mask %#x is not carried", i+1, m.GetMask())
		case m.GetMflags()&^fanMarkFlags != 0:
			return fmt.Errorf("mark %d: unknown flags %#x", i+1, m.GetMflags())
		}
		if _, err := handleOf(m.GetIe().GetFHandle()); err != nil {
			return fmt.Errorf("mark %d: %w", i+1, err)
		}
	}
	return r.checkWatches(x.id)
}

func openFanotify(_ *Restorer, x *description) error {
	e := x.entry.GetFfy()
	// The group remembers FAN_CLOEXEC.
	syscall.ForkLock.RLock()
	fd, err := unix.FanotifyInit(uint(e.GetFaflags()), uint(e.GetEvflags()))
	if err == nil {
		unix.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return os.NewSyscallError("fanotify_init", err)
	}
	x.file = os.NewFile(uintptr(fd), "fanotify")
	return setStatus(x.file, e.GetFlags())
}

// markFanotify sets the marks, when nothing more happens to files.
func markFanotify(r *Restorer, x *description) error {
	if x.file == nil {
		return nil
	}
	for i, m := range x.entry.GetFfy().GetMark() {
		if err := r.mark(x, uint32(i), m); err != nil {
			return fmt.Errorf("mark %d: %w", i+1, err)
		}
	}
	return nil
}

func (r *Restorer) mark(x *description, i uint32, m *fsnotify.FanotifyMarkEntry) error {
	e := m.GetIe().GetFHandle()
	flags := uint(unix.FAN_MARK_ADD)
	if m.GetType() == fsnotify.MarkType_MOUNT {
		flags |= unix.FAN_MARK_MOUNT
		e = fhEntry(procfs.Handle{}, m.GetMe().GetPath())
	}
	file := uint32(0)
	for _, w := range r.watchesOf(x.id) {
		if w.Number != i {
			continue
		}
		if file = w.File; w.Filesystem {
			flags = flags&^unix.FAN_MARK_MOUNT | unix.FAN_MARK_FILESYSTEM
		}
	}
	f, err := r.watchTarget(file, m.GetSDev(), m.GetIe().GetIIno(), e)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	set := func(flags uint, mask uint32) error {
		return os.NewSyscallError("fanotify_mark", unix.FanotifyMark(int(x.file.Fd()), flags, uint64(mask), unix.AT_FDCWD, path))
	}
	evictable := uint(m.GetMflags() & unix.FAN_MARK_EVICTABLE)
	if m.GetMask()&fanEvents != 0 {
		if err := set(flags|evictable, m.GetMask()); err != nil {
			return err
		}
	}
	ignored := m.GetIgnoredMask() & (fanEvents | fanPermission)
	if ignored == 0 {
		return nil
	}
	how := uint(unix.FAN_MARK_IGNORED_MASK)
	if m.GetMflags()&unix.FAN_MARK_IGNORE != 0 {
		how, ignored = unix.FAN_MARK_IGNORE, ignored|m.GetIgnoredMask()&fanScope
	}
	return set(flags|evictable|how|uint(m.GetMflags()&unix.FAN_MARK_IGNORED_SURV_MODIFY), ignored)
}
