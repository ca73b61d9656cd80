package ns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/ptrace"
)

// maxMounts bounds the mounts of an image; the kernel's own bound is as high.
const maxMounts = 100_000

// newMount is one mount to be made.
type newMount struct {
	*mnt.MntEntry
	parent *newMount
	owner  *newMount // the mount by which its file system is made; nil if that is not the tree's own
	fd     int       // of its root, -1 until it is made
	host   int       // of what it is bound from, -1 if that is not the host's
	placed bool
}

func (m *newMount) what() string { return fmt.Sprintf("the mount at %s", m.GetMountpoint()) }

// external tells whether the file system is not the tree's own.
func (m *newMount) external() bool { return m.GetExtMount() || m.GetExtKey() != "" }

// mounter makes the mounts of a tree.
type mounter struct {
	set  *image.Set
	o    RestoreOptions
	list []*newMount
	root *newMount
}

// loadMounts reads the mounts of an image, which are untrusted.
func loadMounts(set *image.Set, id uint32, o RestoreOptions) (*mounter, error) {
	file := image.MountpointsFile(id)
	es, err := image.All[*mnt.MntEntry](set, file)
	if err != nil {
		return nil, err
	}
	if len(es) == 0 || len(es) > maxMounts {
		return nil, fmt.Errorf("image %s: %d mounts", file, len(es))
	}
	w := &mounter{set: set, o: o}
	byID := map[uint32]*newMount{}
	for _, e := range es {
		m := &newMount{MntEntry: e, fd: -1, host: -1}
		p := e.GetMountpoint()
		if !strings.HasPrefix(p, "/") || strings.ContainsRune(p, 0) || slices.Contains(strings.Split(p, "/"), "..") || byID[e.GetMntId()] != nil {
			return nil, fmt.Errorf("image %s: mount %d at %q is impossible or there twice", file, e.GetMntId(), p)
		}
		byID[e.GetMntId()] = m
		w.list = append(w.list, m)
	}
	for _, m := range w.list {
		m.parent = byID[m.GetParentMntId()]
		switch {
		case m.parent == nil && w.root == nil && m.GetMountpoint() == "/":
			w.root = m
		case m.parent == nil:
			return nil, fmt.Errorf("image %s: %s lies on a mount that is not there", file, m.what())
		}
		if m.external() {
			continue
		}
		for _, x := range w.list {
			if x.GetRootDev() == m.GetRootDev() && x.GetRoot() == "/" && !x.external() {
				m.owner = x
				break
			}
		}
		if m.owner == nil && m != w.root {
			return nil, fmt.Errorf("image %s: %s shows a part of a file system that is nowhere mounted whole", file, m.what())
		}
	}
	if w.root == nil {
		return nil, fmt.Errorf("image %s: there is no root", file)
	}
	return w, nil
}

// close closes the roots of all mounts.
func (w *mounter) close() {
	for _, m := range w.list {
		for _, fd := range []*int{&m.fd, &m.host} {
			if *fd >= 0 {
				_ = unix.Close(*fd)
				*fd = -1
			}
		}
	}
}

// restoreMnt makes the mounts of the tree in the mount namespace of its root,
// which is a copy of this process's, and returns the namespace's root directory.
func restoreMnt(set *image.Set, im Images, o RestoreOptions) (*os.File, error) {
	w, err := loadMounts(set, im.ids[Mnt], o)
	if err != nil {
		return nil, err
	}
	defer w.close()
	for _, m := range w.list {
		if m.owner == m && m.fstype() == mnt.Fstype_PROC && !(m == w.root && o.Root != "") {
			if err := w.proc(m); err != nil {
				return nil, fmt.Errorf("make %s: %w", m.what(), err)
			}
		}
	}
	// File systems belong to the namespaces of whoever mounts them.
	if err := Do(o.Pid, im.Own&(Net|Ipc|Uts|Cgroup), w.prepare); err != nil {
		return nil, err
	}
	var root *os.File
	err = Do(o.Pid, Mnt, func() error {
		if err := w.build(); err != nil {
			return err
		}
		fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/", Err: err}
		}
		root = os.NewFile(uintptr(fd), "/")
		return nil
	})
	return root, err
}

// prepare makes what comes from the host and the file systems of the tree's own.
func (w *mounter) prepare() error {
	for _, m := range w.list {
		var err error
		switch {
		case m == w.root && w.o.Root != "":
			err = m.clone(unix.AT_FDCWD, w.o.Root)
		case m.GetExtKey() == hostKey:
			if n := w.covers(m); n > 0 {
				err = m.uncover(m.GetSource(), n)
			} else {
				err = m.clone(unix.AT_FDCWD, m.GetSource())
			}
		case m.external():
			p, ok := w.o.External[m.GetExtKey()]
			if !ok {
				return fmt.Errorf("%s is external: name a path for it (--external mnt[%s]:PATH)", m.what(), m.GetExtKey())
			}
			err = m.clone(unix.AT_FDCWD, p)
		case m == w.root && m.owner == nil:
			err = m.clone(unix.AT_FDCWD, "/")
		case m.owner == m && m.fd < 0:
			err = w.fresh(m)
		}
		if err != nil {
			return fmt.Errorf("make %s: %w", m.what(), err)
		}
	}
	return nil
}

// covers counts the mounts of the host that cover what one of the tree is bound from.
func (w *mounter) covers(m *newMount) int {
	if w.set.Facts == nil {
		return 0
	}
	for _, f := range w.set.Facts.Mounts {
		if f.ID == m.GetMntId() {
			return min(f.Covered, maxCovers)
		}
	}
	return 0
}

// maxCovers bounds how deep a mount is searched for below others.
const maxCovers = 64

// uncover is clone for what n mounts cover: in a copy of the host's mounts those
// can be taken away.
func (m *newMount) uncover(path string, n int) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
		if err == nil {
			err = os.NewSyscallError("mount", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		}
		for ; err == nil && n > 0; n-- {
			err = os.NewSyscallError("umount", unix.Unmount(path, unix.MNT_DETACH))
		}
		if err == nil {
			err = m.clone(unix.AT_FDCWD, path)
		}
		done <- err
	}()
	return <-done
}

// clone binds a path, without what is mounted below it.
func (m *newMount) clone(dir int, path string) error {
	flags := uint(unix.OPEN_TREE_CLONE | unix.O_CLOEXEC)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	fd, err := unix.OpenTree(dir, path, flags)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	m.fd = fd
	if dir == unix.AT_FDCWD {
		if m.host, err = unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
	// What will be mounted on it must not appear on its peers.
	return m.attributes(unix.MS_PRIVATE)
}

// attributes sets the flags of a mount and its propagation.
func (m *newMount) attributes(propagation uint64) error {
	a := &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR__ATIME, Propagation: propagation}
	flags := uint64(m.GetFlags())
	for _, f := range mountFlags {
		if flags&f.ms != 0 {
			a.Attr_set |= f.attr
		}
		if f.ms != unix.MS_NOATIME && f.ms != unix.MS_RELATIME {
			a.Attr_clr |= f.attr
		}
	}
	if flags&(unix.MS_NOATIME|unix.MS_RELATIME) == 0 {
		a.Attr_set |= unix.MOUNT_ATTR_STRICTATIME
	}
	return os.NewSyscallError("mount_setattr", unix.MountSetattr(m.fd, "", unix.AT_EMPTY_PATH, a))
}

// options are the parameters of a file system of an image, "" for the value of a flag.
func (m *newMount) options() [][2]string {
	var out [][2]string
	for _, o := range strings.Split(m.GetOptions(), ",") {
		if o == "" {
			continue
		}
		k, v, _ := strings.Cut(o, "=")
		if k == "newinstance" || m.fstype() == mnt.Fstype_SYSFS || m.fstype() == mnt.Fstype_MQUEUE {
			continue // says nothing any more, or belongs to the host's security
		}
		out = append(out, [2]string{k, v})
	}
	return out
}

func (m *newMount) fstype() mnt.Fstype { return mnt.Fstype(m.GetFstype()) }

func (m *newMount) fsname() string {
	for name, t := range fstypes {
		if t == m.fstype() {
			return name
		}
	}
	return ""
}

// fresh mounts a file system anew.
func (w *mounter) fresh(m *newMount) error {
	if !slices.Contains(fresh, m.fstype()) {
		return fmt.Errorf("file systems of type %s cannot be mounted anew", m.fstype())
	}
	fs, err := unix.Fsopen(m.fsname(), 1) // FSOPEN_CLOEXEC
	if err != nil {
		return os.NewSyscallError("fsopen "+m.fsname(), err)
	}
	defer func() { _ = unix.Close(fs) }()
	if s := m.GetSource(); s != "" {
		if err := unix.FsconfigSetString(fs, "source", s); err != nil {
			return os.NewSyscallError("fsconfig source", err)
		}
	}
	for _, o := range m.options() {
		if o[1] == "" {
			err = unix.FsconfigSetFlag(fs, o[0])
		} else {
			err = unix.FsconfigSetString(fs, o[0], o[1])
		}
		if err != nil {
			return fmt.Errorf("option %s: %w", o[0], os.NewSyscallError("fsconfig", err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return os.NewSyscallError("fsconfig create", err)
	}
	if m.fd, err = unix.Fsmount(fs, 1, 0); err != nil { // FSMOUNT_CLOEXEC
		return os.NewSyscallError("fsmount", err)
	}
	if m.fstype() == mnt.Fstype_TMPFS {
		if err := w.content(m); err != nil {
			return err
		}
	}
	if m.GetSbFlags()&unix.MS_RDONLY != 0 {
		if err := errors.Join(unix.FsconfigSetFlag(fs, "ro"), unix.FsconfigReconfigure(fs)); err != nil {
			return os.NewSyscallError("fsconfig reconfigure", err)
		}
	}
	return m.attributes(unix.MS_PRIVATE)
}

func (w *mounter) content(m *newMount) error {
	es := w.set.Entries(image.TmpfsFile(m.GetRootDev()))
	if len(es) != 1 || es[0].Magic != image.MagicRaw {
		return errNoContent
	}
	return unpack(fmt.Sprintf("/proc/self/fd/%d", m.fd), es[0].Extra)
}

// System calls of the new mount interface (x86-64 and generic numbers agree).
const (
	fsconfigSetFlag   = 0
	fsconfigSetString = 1
	fsconfigCreate    = 6
)

// proc mounts a proc file system: it is that of the pid namespace of whoever
// mounts it, so that the root of the tree must do it.
// Preconditions: on the tracer's thread.
func (w *mounter) proc(m *newMount) error {
	open := ptrace.NewCall("open proc", unix.SYS_FSOPEN, ptrace.Str("proc"), ptrace.Int(1))
	if err := w.o.Run(open); err != nil {
		return err
	}
	var calls []*ptrace.Call
	for _, o := range append([][2]string{{"source", m.GetSource()}}, m.options()...) {
		if o[1] == "" {
			calls = append(calls, ptrace.NewCall("option "+o[0]+" of proc", unix.SYS_FSCONFIG, ptrace.Int(open.Ret), ptrace.Int(fsconfigSetFlag), ptrace.Str(o[0]), ptrace.Int(0), ptrace.Int(0)))
			continue
		}
		calls = append(calls, ptrace.NewCall("option "+o[0]+" of proc", unix.SYS_FSCONFIG, ptrace.Int(open.Ret), ptrace.Int(fsconfigSetString), ptrace.Str(o[0]), ptrace.Str(o[1]), ptrace.Int(0)))
	}
	create := ptrace.NewCall("make proc", unix.SYS_FSCONFIG, ptrace.Int(open.Ret), ptrace.Int(fsconfigCreate), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
	fsmount := ptrace.NewCall("mount proc", unix.SYS_FSMOUNT, ptrace.Int(open.Ret), ptrace.Int(1), ptrace.Int(0))
	if err := w.o.Run(append(calls, create, fsmount)...); err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(w.o.Pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	if m.fd, err = unix.PidfdGetfd(pidfd, int(fsmount.Ret), 0); err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	unix.CloseOnExec(m.fd)
	if err := w.o.Run(ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(open.Ret)), ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(fsmount.Ret))); err != nil {
		return err
	}
	return m.attributes(unix.MS_PRIVATE)
}

// build puts all mounts in place, on a thread in the new namespace, which then
// has nothing of the host's.
func (w *mounter) build() error {
	// From here on nothing that happens reaches the host's mounts.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to the tree: %w", os.NewSyscallError("mount", err))
	}
	if err := unix.MoveMount(w.root.fd, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("place the root of the tree: %w", os.NewSyscallError("move_mount", err))
	}
	if err := unix.Fchdir(w.root.fd); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root of the tree: %w", os.NewSyscallError("pivot_root", err))
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount what the host has: %w", os.NewSyscallError("umount", err))
	}
	if err := unix.Chdir("/"); err != nil {
		return os.NewSyscallError("chdir", err)
	}
	w.root.placed = true
	for left := len(w.list) - 1; left > 0; {
		n := 0
		for _, m := range w.list {
			if m.placed || !m.parent.placed || m.fd < 0 && (m.owner == nil || !m.owner.placed) {
				continue
			}
			if err := m.place(); err != nil {
				return fmt.Errorf("place %s: %w", m.what(), err)
			}
			n++
		}
		if left -= n; n == 0 {
			return errors.New("mounts of the images lie on each other in a circle")
		}
	}
	return w.propagate()
}

// place puts a mount onto its mount point.
func (m *newMount) place() error {
	if m.fd < 0 {
		if err := m.clone(m.owner.fd, strings.TrimPrefix(m.GetRoot(), "/")); err != nil {
			return err
		}
	}
	rel, ok := below(m.parent.GetMountpoint(), m.GetMountpoint())
	if !ok {
		return fmt.Errorf("it does not lie on %s", m.parent.what())
	}
	to, toFlags := m.parent.fd, unix.MOVE_MOUNT_T_EMPTY_PATH
	if rel != "" {
		fd, err := unix.Openat2(m.parent.fd, rel, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV})
		if err != nil {
			return &os.PathError{Op: "open", Path: m.GetMountpoint(), Err: err}
		}
		defer func() { _ = unix.Close(fd) }()
		to = fd
	}
	if err := unix.MoveMount(m.fd, "", to, "", unix.MOVE_MOUNT_F_EMPTY_PATH|toFlags); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	m.placed = true
	return nil
}

// propagate joins mounts to groups, now that all are placed. A group can be made
// once the one whose slave it is has been; of its members the one that shows most
// comes first.
func (w *mounter) propagate() error {
	var todo []*newMount
	shared := map[uint32]bool{}
	for _, m := range w.list {
		if m.GetSharedId() != 0 || m.GetMasterId() != 0 {
			todo = append(todo, m)
			shared[m.GetSharedId()] = true
		}
		if m.GetFlags()&unix.MS_UNBINDABLE != 0 {
			if err := m.attributes(unix.MS_UNBINDABLE); err != nil {
				return err
			}
		}
	}
	slices.SortStableFunc(todo, func(a, b *newMount) int { return len(a.GetRoot()) - len(b.GetRoot()) })
	heads := map[uint32]*newMount{}
	for len(todo) > 0 {
		var later []*newMount
		for _, m := range todo {
			master := m.GetMasterId()
			if master != 0 && heads[master] == nil && shared[master] {
				later = append(later, m)
				continue
			}
			if err := m.join(heads); err != nil {
				return fmt.Errorf("set the propagation of %s: %w", m.what(), err)
			}
		}
		if len(later) == len(todo) {
			return errors.New("groups of mounts are slaves of each other in a circle")
		}
		todo = later
	}
	return nil
}

// join makes a mount a member of its group and a slave of its master's.
func (m *newMount) join(heads map[uint32]*newMount) error {
	shared, master := m.GetSharedId(), m.GetMasterId()
	if head := heads[shared]; shared != 0 && head != nil {
		return m.setGroup(head.fd)
	}
	if master != 0 {
		var err error
		if head := heads[master]; head != nil {
			err = m.setGroup(head.fd)
		} else if err = m.setGroup(m.host); errors.Is(err, unix.EINVAL) {
			err = nil // the mount of this host is in no group: nothing to take on
		}
		if err == nil {
			err = m.attributes(unix.MS_SLAVE)
		}
		if err != nil {
			return err
		}
	}
	if shared != 0 {
		heads[shared] = m
		return m.attributes(unix.MS_SHARED)
	}
	return nil
}

func (m *newMount) setGroup(from int) error {
	const flags = unix.MOVE_MOUNT_SET_GROUP | unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	return os.NewSyscallError("move_mount set group", unix.MoveMount(from, "", m.fd, "", flags))
}
