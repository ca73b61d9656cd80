package files

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
)

// SetRoot says where the paths of a tree with mounts of its own are found from
// this process: path gives that for one of them.
func (d *Dumper) SetRoot(path func(string) string) { d.root = path }

// SetIDs says which ids of users and groups the tree's processes have in a user
// namespace of their own.
func (d *Dumper) SetIDs(ids *procfs.IDMap) { d.ids = ids }

// LockBriefly says that the network need not stay locked: it ends with the tree.
func (d *Dumper) LockBriefly() { d.brief = true }

// inRoot runs fn on a thread whose root directory is the tree's, if that has
// mounts of its own, and whose network namespace is the caller's: what is named by
// a path there, as sockets are, has that path in the tree. /proc is not this
// process's then.
func (r *Restorer) inRoot(fn func() error) error {
	if r.opts.Root == nil {
		return fn()
	}
	net, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer func() { _ = net.Close() }()
	return r.inDir("/", func() error {
		if err := unix.Setns(int(net.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return fn()
	})
}

// inDir runs fn with a root and a working directory of its own.
func (r *Restorer) inDir(dir string, fn func() error) error {
	c := make(chan error)
	go func() {
		// Not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			c <- os.NewSyscallError("unshare", err)
			return
		}
		if root := r.opts.Root; root != nil {
			if err := unix.Fchdir(int(root.Fd())); err != nil {
				c <- &os.PathError{Op: "chdir", Path: root.Name(), Err: err}
				return
			}
			if err := unix.Chroot("."); err != nil {
				c <- &os.PathError{Op: "chroot", Path: root.Name(), Err: err}
				return
			}
		}
		if err := unix.Chdir(dir); err != nil {
			c <- &os.PathError{Op: "chdir", Path: dir, Err: err}
			return
		}
		c <- fn()
	}()
	return <-c
}
