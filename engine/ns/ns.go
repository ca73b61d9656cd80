// Package ns owns the namespaces that a tree has of its own: which they are,
// what they hold, and making them again. Each kind has a file of its own with its
// dump and its restore side by side. It must not know tracing beyond building
// system calls for others to run, nor files, nor memory.
//
// A namespace is looked at, and filled again, from threads of this process that
// have entered it: no program of the tree runs for that.
package ns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// Set is a set of kinds of namespaces, by their CLONE_NEW* flags.
type Set uint64

// Kinds of namespaces.
const (
	Pid    Set = unix.CLONE_NEWPID
	Net    Set = unix.CLONE_NEWNET
	Ipc    Set = unix.CLONE_NEWIPC
	Uts    Set = unix.CLONE_NEWUTS
	Mnt    Set = unix.CLONE_NEWNS
	User   Set = unix.CLONE_NEWUSER
	Cgroup Set = unix.CLONE_NEWCGROUP
	Time   Set = unix.CLONE_NEWTIME
)

// Has tells whether all kinds of o are in s.
func (s Set) Has(o Set) bool { return s&o == o }

// kinds are in the order in which images number them.
var kinds = []struct {
	kind Set
	name string // in /proc/PID/ns
	id   func(*criu_core.TaskKobjIdsEntry) **uint32
}{
	{Pid, "pid", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.PidNsId }},
	{Net, "net", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.NetNsId }},
	{Ipc, "ipc", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.IpcNsId }},
	{Uts, "uts", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.UtsNsId }},
	{Mnt, "mnt", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.MntNsId }},
	{User, "user", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.UserNsId }},
	{Cgroup, "cgroup", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.CgroupNsId }},
	{Time, "time", func(e *criu_core.TaskKobjIdsEntry) **uint32 { return &e.TimeNsId }},
}

// Links are the texts of the links in /proc/PID/ns, by kind. A kind that the
// kernel does not have is missing.
type Links map[Set]string

// ReadLinks reads the namespaces of a task.
func ReadLinks(pid, tid int) (Links, error) {
	l := Links{}
	for _, k := range kinds {
		s, err := procfs.Readlink(procfs.TaskPath(pid, tid), "ns/"+k.name)
		if errors.Is(err, fs.ErrNotExist) {
			if _, serr := os.Stat(procfs.TaskPath(pid, tid)); serr != nil {
				return nil, serr
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		l[k.kind] = s
	}
	return l, nil
}

// Differ are the kinds in which two tasks live in different namespaces.
func (l Links) Differ(o Links) Set {
	var s Set
	for k, text := range l {
		if o[k] != text {
			s |= k
		}
	}
	return s
}

// Names are the names of the kinds of a set, in the kernel's words.
func (s Set) Names() (out []string) {
	for _, k := range kinds {
		if s.Has(k.kind) {
			out = append(out, k.name)
		}
	}
	return out
}

// ownID is added to the number of a kind to give the id of a namespace that the
// tree has of its own; the ids of the host's are the numbers, from 1.
const ownID = 10

// SetIDs sets the ids of the namespaces of a task that has those of own for itself.
func (s Set) SetIDs(e *criu_core.TaskKobjIdsEntry) {
	for i, k := range kinds {
		id := uint32(i + 1)
		if s.Has(k.kind) {
			id += ownID
		}
		*k.id(e) = &id
	}
}

// id is the id in images of a namespace of the tree's own.
func (s Set) id() uint32 {
	for i, k := range kinds {
		if k.kind == s {
			return uint32(i+1) + ownID
		}
	}
	return 0
}

// Images are the ids of the own namespaces of a tree in its images.
type Images struct {
	Own Set
	ids map[Set]uint32
}

// FromImages compares the ids of the root with those that whoever dumped it had.
func FromImages(inv *inventory.InventoryEntry, root *criu_core.TaskKobjIdsEntry) Images {
	im := Images{ids: map[Set]uint32{}}
	host := inv.GetRootIds()
	for _, k := range kinds {
		if host == nil || root == nil {
			break
		}
		a, b := *k.id(host), *k.id(root)
		if a == nil || b == nil || *b == 0 || *a == *b {
			continue
		}
		im.Own |= k.kind
		im.ids[k.kind] = *b
	}
	return im
}

// Same tells whether a task of the images is in all namespaces of the root.
func (im Images) Same(root, e *criu_core.TaskKobjIdsEntry) bool {
	for _, k := range kinds {
		a, b := *k.id(root), *k.id(e)
		if a != nil && b != nil && *a != *b {
			return false
		}
	}
	return true
}

// The first thread of a program cannot end with a goroutine, and what /proc/self
// shows is that thread's: it stays where the program was started.
func init() { runtime.LockOSThread() }

// Do runs f on a thread inside those namespaces of a process that s names; of
// Pid, User and Time a thread cannot enter. What f does by new goroutines
// happens outside. In another mount namespace /proc is that of the tree.
func Do(pid int, s Set, f func() error) error {
	s &^= Pid | User | Time
	if s == 0 {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		err := enter(pid, s)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func enter(pid int, s Set) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("open pidfd of pid %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	defer func() { _ = unix.Close(fd) }()
	if s.Has(Mnt) {
		// Only a thread that shares its directory with no other may: setns(2).
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
	}
	if err := unix.Setns(fd, int(s)); err != nil {
		return fmt.Errorf("enter the namespaces of pid %d: %w", pid, os.NewSyscallError("setns", err))
	}
	return nil
}

// Emit takes the entries of a dump.
type Emit func(image.Entry) error
