package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// kindInotify carries inotify(7): each watch with its number and mask, on the file
// that it was on, wherever that is now. Events that wait to be read cannot be put
// back; IN_Q_OVERFLOW, which means that events were lost, stands for them.
var kindInotify = &kind{
	name: "inotify", note: "events that wait to be read are lost, and IN_Q_OVERFLOW tells so",
	typ: fdinfo.FdTypes_INOTIFY,
	takes: func(_ *Dumper, o *object) bool {
		return o.link == "anon_inode:inotify" || o.link == "anon_inode:[inotify]"
	},
	dump:  dumpInotify,
	check: checkInotify,
	open:  openEach(openInotify),
	last:  openEach(watchInotify),
}

// inotifyKept are the bits of a mask that stay with a watch: events,
// IN_EXCL_UNLINK and IN_ONESHOT. The others say how to add one.
const inotifyKept = unix.IN_ALL_EVENTS | unix.IN_EXCL_UNLINK | unix.IN_ONESHOT

func dumpInotify(d *Dumper, o *object) error {
	info, err := procfs.ReadFdinfo(os.Getpid(), int(o.file.Fd()))
	if err != nil {
		return err
	}
	e := &fsnotify.InotifyFileEntry{Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown}
	f := o.fact(o.id)
	f.Path, f.Ino, f.Dev = "", 0, 0
	for _, w := range info.Inotify {
		id, link, err := d.addWatched(o, watchedInode{sdev: w.Sdev, ino: w.Ino, handle: w.Handle})
		if err != nil {
			return fmt.Errorf("watch %d: %w", w.WD, err)
		}
		if o.refused {
			return nil
		}
		e.Wd = append(e.Wd, &fsnotify.InotifyWdEntry{Id: proto.Uint32(o.id), IIno: proto.Uint64(w.Ino), Mask: proto.Uint32(w.Mask & inotifyKept),
			IgnoredMask: proto.Uint32(0), SDev: proto.Uint32(w.Sdev), Wd: proto.Uint32(uint32(w.WD)), FHandle: fhEntry(w.Handle, strings.TrimSuffix(link, deletedSuffix))})
		f.Watches = append(f.Watches, image.WatchFacts{Number: uint32(w.WD), File: id})
	}
	if n, err := queuedEvents(o); err != nil {
		return err
	} else if n > 0 && !d.dry() {
		f.Overflow = true
		d.log.Warn("events of inotify that wait to be read are lost: the program is told by IN_Q_OVERFLOW", "pid", o.first().proc.Pid, "fd", o.first().fd, "bytes", n)
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Id: proto.Uint32(o.id), Ify: e})
	return nil
}

// queuedEvents is how many bytes of events wait in an inotify or fanotify file.
func queuedEvents(o *object) (int, error) {
	n, err := unix.IoctlGetInt(int(o.file.Fd()), unix.TIOCINQ) // FIONREAD
	if err != nil {
		return 0, os.NewSyscallError("ioctl FIONREAD", err)
	}
	return n, nil
}

func checkInotify(r *Restorer, x *description) error {
	seen := map[uint32]bool{}
	for _, w := range x.entry.GetIfy().GetWd() {
		switch n := w.GetWd(); {
		case n == 0 || n > 1<<31-1:
			return fmt.Errorf("watch number %d is out of range", n)
		case seen[n]:
			return fmt.Errorf("watch %d is there twice", n)
		}
		seen[w.GetWd()] = true
		if w.GetMask()&^inotifyKept != 0 {
			// CRIU keeps what the kernel shows, which may be more.
			r.log.Debug("bits of a mask that no watch keeps are left out", "watch", w.GetWd(), "mask", w.GetMask())
		}
		if _, err := handleOf(w.GetFHandle()); err != nil {
			return fmt.Errorf("watch %d: %w", w.GetWd(), err)
		}
	}
	return r.checkWatches(x.id)
}

// checkWatches validates what the facts of a file say of its watches.
func (r *Restorer) checkWatches(id uint32) error {
	for _, w := range r.watchesOf(id) {
		if y := r.byID[w.File]; w.File != 0 && (y == nil || y.kind == nil || y.entry.GetReg() == nil) {
			return fmt.Errorf("it watches file %d, which is not there", w.File)
		}
	}
	return nil
}

func (r *Restorer) watchesOf(id uint32) []image.WatchFacts {
	if f := r.facts[id]; f != nil {
		return f.Watches
	}
	return nil
}

// watchedFile finds the entry of the file that a watch is on, 0 if there is none.
func (r *Restorer) watchedFile(id, number uint32) uint32 {
	for _, w := range r.watchesOf(id) {
		if w.Number == number {
			return w.File
		}
	}
	return 0
}

func openInotify(_ *Restorer, x *description) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.EMFILE) {
			return fmt.Errorf("make an inotify instance: %w (raise fs.inotify.max_user_instances)", err)
		}
		return os.NewSyscallError("inotify_init1", err)
	}
	x.file = os.NewFile(uintptr(fd), "inotify")
	return nil
}

// watchInotify adds the watches, when everything else that this process does to
// files is done: the program must not be told of it.
func watchInotify(r *Restorer, x *description) error {
	if x.file == nil {
		return nil
	}
	fd := int(x.file.Fd())
	if f := r.facts[x.id]; f != nil && f.Overflow {
		if err := overflow(fd); err != nil {
			return fmt.Errorf("tell of lost events: %w", err)
		}
	}
	ws := slices.Clone(x.entry.GetIfy().GetWd())
	slices.SortFunc(ws, func(a, b *fsnotify.InotifyWdEntry) int { return int(a.GetWd()) - int(b.GetWd()) })
	for _, w := range ws {
		f, err := r.watchTarget(r.watchedFile(x.id, w.GetWd()), w.GetSDev(), w.GetIIno(), w.GetFHandle())
		if err != nil {
			return fmt.Errorf("watch %d: %w", w.GetWd(), err)
		}
		err = addWatch(fd, f, w.GetWd(), w.GetMask()&inotifyKept)
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("watch %d, %s: %w", w.GetWd(), f.Name(), err)
		}
	}
	return setStatus(x.file, x.entry.GetIfy().GetFlags())
}

// inotifySetNextWD is INOTIFY_IOC_SETNEXTWD, _IOW('I', 0, __s32)
// (include/uapi/linux/inotify.h, 4.18, needs CONFIG_CHECKPOINT_RESTORE).
const inotifySetNextWD = 0x40044900

// maxWDTries bounds how many numbers are tried on kernels that cannot be asked
// for one.
const maxWDTries = 1 << 20

// addWatch adds a watch under its number. Numbers go up from 1.
func addWatch(fd int, target *os.File, wd, mask uint32) error {
	path := fmt.Sprintf("/proc/self/fd/%d", target.Fd())
	direct := unix.IoctlSetInt(fd, inotifySetNextWD, int(wd)) == nil
	for range maxWDTries {
		got, err := unix.InotifyAddWatch(fd, path, mask)
		switch {
		case errors.Is(err, unix.ENOSPC):
			return fmt.Errorf("%w (raise fs.inotify.max_user_watches)", os.NewSyscallError("inotify_add_watch", err))
		case err != nil:
			return os.NewSyscallError("inotify_add_watch", err)
		case uint32(got) == wd:
			return nil
		case uint32(got) > wd || direct:
			return fmt.Errorf("it got number %d", got)
		}
		if _, err := unix.InotifyRmWatch(fd, uint32(got)); err != nil {
			return os.NewSyscallError("inotify_rm_watch", err)
		}
		if err := discard(fd); err != nil { // IN_IGNORED
			return err
		}
	}
	return errors.New("its number is too high to be reached on this kernel")
}

// discard reads all events of an inotify file.
func discard(fd int) error {
	b := make([]byte, 4096)
	for {
		_, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return os.NewSyscallError("read", err)
		}
	}
}

// maxOverflow bounds how many events are made for the sake of one overflow.
const maxOverflow = 1 << 20

// overflow makes IN_Q_OVERFLOW the one event of an inotify file without watches:
// only a full queue brings it, so it is filled with events of a memory file and
// read up to the last. What removing that watch would tell finds no room.
func overflow(fd int) error {
	const size = unix.SizeofInotifyEvent // without a name
	m, err := unix.MemfdCreate("godwit-overflow", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before 6.3
		m, err = unix.MemfdCreate("godwit-overflow", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	defer func() { _ = unix.Close(m) }()
	wd, err := unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", m), unix.IN_ATTRIB|unix.IN_MODIFY)
	if err != nil {
		return os.NewSyscallError("inotify_add_watch", err)
	}
	n := 0
	for i, last := int64(0), -1; i < maxOverflow; i++ {
		// Two kinds in turn: equal events that follow each other become one.
		if err := errors.Join(unix.Ftruncate(m, i&1), unix.Fchmod(m, 0o600)); err != nil {
			return os.NewSyscallError("ftruncate, fchmod", err)
		}
		if i%256 != 255 {
			continue
		}
		if n, err = unix.IoctlGetInt(fd, unix.TIOCINQ); err != nil {
			return os.NewSyscallError("ioctl FIONREAD", err)
		}
		if n == last {
			break
		}
		last = n
	}
	if _, err := unix.InotifyRmWatch(fd, uint32(wd)); err != nil {
		return os.NewSyscallError("inotify_rm_watch", err)
	}
	b := make([]byte, 1<<16)
	for left := n - size; left > 0; {
		got, err := unix.Read(fd, b[:min(left, len(b))])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("read", err)
		}
		left -= got
	}
	return nil
}
