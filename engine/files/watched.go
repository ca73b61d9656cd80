package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
)

// watchedInode is an inode of which inotify(7) or fanotify(7) tells, as fdinfo
// names it: by numbers and a file handle, never by a path.
type watchedInode struct {
	sdev   uint32 // kernel's: major << 20 | minor
	ino    uint64
	handle procfs.Handle
}

func (w watchedInode) String() string {
	return fmt.Sprintf("inode %d of device %d:%d", w.ino, w.sdev>>20, w.sdev&(1<<20-1))
}

// is says whether f, which may be open with O_PATH, is the inode. Handles hold
// a generation and so tell an inode from its successor of the same number; not
// every file system has them.
func (w watchedInode) is(f *os.File) bool {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	sameDev := uint64(st.Dev) == unix.Mkdev(w.sdev>>20, w.sdev&(1<<20-1))
	h, err := fileHandle(f)
	if err == nil && len(w.handle.Data) > 0 && h.Type == w.handle.Type {
		// Some file systems (btrfs, overlayfs) tell stat(2) another device.
		return bytes.Equal(h.Data, w.handle.Data) && (sameDev || len(h.Data) > 8)
	}
	return sameDev && st.Ino == w.ino
}

// atHandleFID is AT_HANDLE_FID (include/uapi/linux/fcntl.h, 6.5).
const atHandleFID = 0x200

// fileHandle gives the handle of a file as fdinfo shows it. AT_HANDLE_FID (6.5)
// asks for one even if it cannot be opened again.
func fileHandle(f *os.File) (procfs.Handle, error) {
	h, _, err := unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH|atHandleFID)
	if errors.Is(err, unix.EINVAL) {
		h, _, err = unix.NameToHandleAt(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return procfs.Handle{}, os.NewSyscallError("name_to_handle_at", err)
	}
	return procfs.Handle{Type: h.Type(), Data: h.Bytes()}, nil
}

// watchedPaths are paths that watched inodes were found at, as looking for them
// can take long and is done before the tree is frozen. They are hints only.
var watchedPaths sync.Map // of string(handle) and numbers → path

func (w watchedInode) cacheKey() string {
	return fmt.Sprintf("%d %d %d %x", w.sdev, w.ino, w.handle.Type, w.handle.Data)
}

// addWatched registers the inode that o's wd-th watch or mark is on, as a file
// that is opened by its path, and gives the id of its entry; 0 if o is refused.
func (d *Dumper) addWatched(o *object, w watchedInode) (id uint32, link string, err error) {
	f, link := d.findWatched(o, w)
	if f == nil {
		d.refuse(o, fmt.Sprintf("it watches %s, to which no path was found", w),
			"name a directory below which it is (--irmap-scan-path), or let the program remove the watch")
		return 0, "", nil
	}
	defer func() { _ = f.Close() }()
	flags := unix.O_PATH
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, "", os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		flags |= unix.O_NOFOLLOW
	}
	id, err = d.AddPath(*o.first().proc, "watch", f, link, flags)
	return id, link, err
}

// findWatched opens a watched inode with O_PATH and tells where it is.
func (d *Dumper) findWatched(o *object, w watchedInode) (*os.File, string) {
	root := d.rootOf(o)
	try := func(path string) *os.File {
		f, err := openPath(root+path, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil
		}
		if !w.is(f) {
			_ = f.Close()
			return nil
		}
		watchedPaths.Store(w.cacheKey(), path)
		return f
	}
	if p, ok := watchedPaths.Load(w.cacheKey()); ok {
		if f := try(p.(string)); f != nil {
			return f, p.(string)
		}
	}
	var held *object // the tree has it open, perhaps without a name
	for _, c := range d.objects {
		if c.stat.Ino != w.ino || c.file == nil {
			continue
		}
		if f := try(c.linkPath()); f != nil {
			return f, c.linkPath()
		}
		if held == nil && w.is(c.file) {
			held = c
		}
	}
	handle, link := d.openWatched(o, w)
	if handle != nil {
		if f := try(link); f != nil {
			_ = handle.Close()
			return f, link
		}
	}
	var st unix.Stat_t
	if held != nil || handle != nil && unix.Fstat(int(handle.Fd()), &st) == nil && st.Nlink == 0 {
		// It has no name left: no search would find it.
	} else if path := d.searchWatched(root, w); path != "" {
		if f := try(path); f != nil {
			if handle != nil {
				_ = handle.Close()
			}
			return f, path
		}
	}
	if handle == nil && held != nil {
		if f, err := reopen(held.file, unix.O_PATH); err == nil {
			return f, held.link
		}
	}
	return handle, link
}

// openWatched opens an inode by its handle, through any mount of its file system.
func (d *Dumper) openWatched(o *object, w watchedInode) (*os.File, string) {
	if len(w.handle.Data) == 0 {
		return nil, ""
	}
	mounts, err := procfs.Mountinfo(o.first().proc.Pid)
	if err != nil {
		return nil, ""
	}
	handle := unix.NewFileHandle(w.handle.Type, w.handle.Data)
	for _, m := range mounts {
		if m.Major<<20|m.Minor != w.sdev {
			continue
		}
		anchor, err := openPath(d.rootOf(o)+m.Point, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			continue
		}
		fd, err := unix.OpenByHandleAt(int(anchor.Fd()), handle, unix.O_PATH|unix.O_CLOEXEC)
		_ = anchor.Close()
		if err != nil {
			continue
		}
		f := os.NewFile(uintptr(fd), w.String())
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil || !w.is(f) {
			_ = f.Close()
			continue
		}
		return f, link
	}
	return nil, ""
}

// searchMax bounds how many names a search for a watched inode looks at.
const searchMax = 1 << 18

// searchWatched looks for an inode below the paths that were named for it, the
// directories in which the tree has files, and where programs like to watch.
func (d *Dumper) searchWatched(root string, w watchedInode) string {
	dirs := slices.Clone(d.opts.IrmapScanPaths)
	for _, o := range d.objects {
		if p := o.linkPath(); o.mode()&unix.S_IFMT == unix.S_IFDIR && !o.held("root") {
			dirs = append(dirs, p)
		} else if p != "" && p[0] == '/' {
			dirs = append(dirs, filepath.Dir(p))
		}
	}
	dirs = append(dirs, "/etc", "/run", "/var/log", "/var/spool", "/var/lib", "/usr/share", "/sys/fs/cgroup")
	seen := map[string]bool{}
	left := searchMax
	for _, dir := range dirs {
		if p := searchDir(root, filepath.Clean(dir), w, seen, &left); p != "" {
			return p
		}
	}
	return ""
}

// searchDir looks at dir and everything below it on the same device.
func searchDir(root, dir string, w watchedInode, seen map[string]bool, left *int) string {
	if seen[dir] || *left <= 0 || dir[0] != '/' {
		return ""
	}
	seen[dir] = true
	*left--
	f, err := openPath(root+dir, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ""
	}
	found := w.is(f)
	_ = f.Close()
	if found {
		return dir
	}
	entries, _ := os.ReadDir(root + dir)
	var below []string
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		if e.IsDir() {
			below = append(below, p)
			continue
		}
		if *left--; *left <= 0 {
			return ""
		}
		if f, err := openPath(root+p, unix.O_PATH|unix.O_NOFOLLOW, 0); err == nil {
			found := w.is(f)
			_ = f.Close()
			if found {
				return p
			}
		}
	}
	for _, p := range below {
		if p := searchDir(root, p, w, seen, left); p != "" {
			return p
		}
	}
	return ""
}

// handleWords is how many 64-bit words CRIU's messages have at least for a handle.
const handleWords = 16

// fhEntry is the image form of a handle. CRIU opens the path if there is one.
func fhEntry(h procfs.Handle, path string) *fh.FhEntry {
	e := &fh.FhEntry{Bytes: proto.Uint32(uint32(len(h.Data))), Type: proto.Uint32(uint32(h.Type))}
	b := append(slices.Clone(h.Data), make([]byte, max(0, handleWords*8-len(h.Data)))...)
	for ; len(b) >= 8; b = b[8:] {
		e.Handle = append(e.Handle, binary.NativeEndian.Uint64(b))
	}
	if path != "" {
		e.Path = proto.String(path)
	}
	return e
}

// maxHandle is MAX_HANDLE_SZ (include/linux/exportfs.h).
const maxHandle = 128

// handleOf is the reverse of fhEntry.
func handleOf(e *fh.FhEntry) (procfs.Handle, error) {
	n := int(e.GetBytes())
	if e.GetBytes() > maxHandle || n > len(e.GetHandle())*8 {
		return procfs.Handle{}, fmt.Errorf("a file handle of %d bytes in %d words is not possible", e.GetBytes(), len(e.GetHandle()))
	}
	var b []byte
	for _, w := range e.GetHandle() {
		b = binary.NativeEndian.AppendUint64(b, w)
	}
	return procfs.Handle{Type: int32(e.GetType()), Data: b[:n]}, nil
}

// watchTarget gives the file that a watch of an image is on, open with O_PATH;
// the caller closes it. Our images have an entry for it (file, 0: none), those
// of CRIU a path or only a handle.
func (r *Restorer) watchTarget(file, sdev uint32, ino uint64, e *fh.FhEntry) (*os.File, error) {
	if file != 0 {
		x := r.byID[file]
		if x == nil || x.file == nil {
			return nil, fmt.Errorf("the watched file %d is not open", file)
		}
		return reopen(x.file, unix.O_PATH)
	}
	if e.GetPath() != "" {
		if err := checkName(e.GetPath()); err != nil {
			return nil, err
		}
		return r.opts.Open(e.GetPath(), unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	h, err := handleOf(e)
	if err != nil {
		return nil, err
	}
	w := watchedInode{sdev: sdev, ino: ino, handle: h}
	d := &Dumper{mntns: map[int]bool{os.Getpid(): false}}
	f, _ := d.openWatched(&object{holders: []holder{{proc: &Proc{Pid: os.Getpid()}}}}, w)
	if f == nil {
		return nil, fmt.Errorf("%s is not there, and the image has no path to it", w)
	}
	return f, nil
}
