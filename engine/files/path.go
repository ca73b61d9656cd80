package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
)

// settable are the flags of an open description that F_SETFL changes.
const settable = unix.O_APPEND | unix.O_NONBLOCK | unix.O_DIRECT | unix.O_NOATIME | unix.O_ASYNC

// tmpfileBit is O_TMPFILE without O_DIRECTORY, which it includes.
const tmpfileBit = unix.O_TMPFILE &^ unix.O_DIRECTORY

// reopenFlags turns recorded flags into those with which an existing file is
// opened again through its descriptor: O_CREAT and O_EXCL would fail, O_TRUNC
// would empty the file, O_NOFOLLOW would refuse the link in /proc, and O_ASYNC
// does nothing at open(2).
func reopenFlags(flags int, dir bool) int {
	flags &^= unix.O_CREAT | unix.O_EXCL | unix.O_TRUNC | unix.O_NOFOLLOW | unix.O_ASYNC | tmpfileBit
	if !dir {
		flags &^= unix.O_DIRECTORY
	}
	return flags | unix.O_NOCTTY | unix.O_CLOEXEC
}

// reopen makes a new open file description of what f is, whatever f was opened
// for: /proc/self/fd/N (proc_pid_fd(5)). f may be O_PATH or a deleted file.
func reopen(f *os.File, flags int) (*os.File, error) {
	p := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	for {
		fd, err := unix.Open(p, flags|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "reopen", Path: f.Name(), Err: err}
		}
		return os.NewFile(uintptr(fd), f.Name()), nil
	}
}

func inode(st *unix.Stat_t) inodeID { return inodeID{uint64(st.Dev), st.Ino} }

// leads says whether path, looked up without following a last symlink, is the
// file of st.
func leads(path string, st *unix.Stat_t) bool {
	var have unix.Stat_t
	return unix.Lstat(path, &have) == nil && inode(&have) == inode(st)
}

// where is what became of the name of an open file.
type where int

const (
	atPath   where = iota // the path leads to it
	gone                  // deleted, no link left
	unlinked              // the path is gone or another file's, but links remain elsewhere
)

// locate finds the path under which a restore finds o's file. A file whose own
// name was removed but that has another link in the same directory is found by
// that one.
func (d *Dumper) locate(o *object) (string, where) {
	path := o.link
	root := d.rootOf(o)
	if leads(root+path, &o.stat) {
		return path, atPath
	}
	path = o.linkPath()
	if o.stat.Nlink == 0 {
		return path, gone
	}
	if o.mode()&unix.S_IFMT == unix.S_IFDIR && o.deleted() {
		return path, gone // some file systems never count a directory down
	}
	if o.deleted() && o.stat.Nlink == 1 && onOverlay(o.file) {
		return path, gone // its one name is still in a lower layer, where nobody sees it
	}
	if alt, ok := sibling(root+filepath.Dir(path), &o.stat); ok {
		return filepath.Join(filepath.Dir(path), alt), atPath
	}
	if alt := d.alias(o); alt != "" && leads(root+alt, &o.stat) {
		return alt, atPath
	}
	return path, unlinked
}

// onOverlay says whether a file is on an overlayfs.
func onOverlay(f *os.File) bool {
	var fs unix.Statfs_t
	return f != nil && unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// alias is a path of o's file that the kernel happens to remember (d_find_alias).
func (d *Dumper) alias(o *object) string {
	if o.isPath() || o.first().fd < 0 || o.file == nil {
		return "" // not a descriptor with which handles can be opened
	}
	h, _, err := unix.NameToHandleAt(int(o.file.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return ""
	}
	fd, err := unix.OpenByHandleAt(int(o.file.Fd()), h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Close(fd) }()
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return ""
	}
	return link
}

// rootOf is the directory under which the paths of o's holder are looked up: that
// of this process unless the holder lives in another mount namespace.
func (d *Dumper) rootOf(o *object) string {
	if d.root != nil {
		return d.root("")
	}
	pid := o.first().proc.Pid
	other, ok := d.mntns[pid]
	if !ok {
		a, errA := os.Readlink("/proc/self/ns/mnt")
		b, errB := procfs.Readlink(procfs.Path(pid), "ns/mnt")
		other = errA == nil && errB == nil && a != b
		d.mntns[pid] = other
	}
	if other {
		return procfs.Path(pid, "root")
	}
	return ""
}

// siblingMax bounds how many names of a directory are compared.
const siblingMax = 1 << 16

// sibling finds another link of a file in a directory.
func sibling(dir string, st *unix.Stat_t) (string, bool) {
	f, err := os.Open(dir)
	if err != nil {
		return "", false
	}
	defer func() { _ = f.Close() }()
	for n := 0; n < siblingMax; {
		names, err := f.Readdirnames(1024)
		for _, name := range names {
			if leads(filepath.Join(dir, name), st) {
				return name, true
			}
		}
		if err != nil {
			return "", false
		}
		n += len(names)
	}
	return "", false
}

// insideProc says whether path belongs to one process of a proc file system,
// such as /proc/12/status: such a file ends with its process. pid is that
// process, rest what follows it in the path; pid is 0 where that cannot be told.
func insideProc(o *object) (inside bool, pid int, rest string, err error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(o.file.Fd()), &fs); err != nil {
		return false, 0, "", os.NewSyscallError("fstatfs", err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return false, 0, "", nil
	}
	path, ok := strings.CutPrefix(o.link, "/proc/")
	if !ok {
		return true, 0, "", nil // a proc file system of some other place: cannot tell
	}
	word, rest, _ := strings.Cut(path, "/")
	pid, err = strconv.Atoi(word)
	return err == nil, pid, rest, nil
}

// ownProc says whether a file in /proc is there again as soon as the process
// pid is, which is of the tree: /proc/12/stat is, /proc/12/fd/7 is not yet when
// files are opened.
func (d *Dumper) ownProc(pid int, rest string) bool {
	if !d.vpids[pid] {
		return false
	}
	dir, sub, _ := strings.Cut(rest, "/")
	switch dir {
	case "fd", "fdinfo", "map_files":
		return sub == ""
	case "task":
		_, sub, ok := strings.Cut(sub, "/") // threads are made with their process
		return !ok || d.ownProc(pid, sub)
	}
	return true
}

// checkName validates a path of an image.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the path is empty")
	case strings.IndexByte(name, 0) >= 0:
		return errors.New("the path holds a NUL byte")
	case len(name) >= unix.PathMax:
		return fmt.Errorf("the path has %d bytes, of which at most %d are possible", len(name), unix.PathMax-1)
	case name[0] != '/':
		return fmt.Errorf("the path %q is not absolute", name)
	}
	return nil
}
