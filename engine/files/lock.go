package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	file_lock "github.com/checkpoint-restore/go-criu/v8/crit/images/file-lock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// Kinds of file locks in the images (file_lock_entry.flag).
const (
	lockPosix = 1
	lockFlock = 2
	lockOFD   = 4
	lockLease = 8
)

// lockKinds are the kinds of locks as /proc names them (fs/locks.c
// lock_get_status). Delegations, of file servers, are not among them.
var lockKinds = map[string]uint32{"POSIX": lockPosix, "FLOCK": lockFlock, "OFDLCK": lockOFD, "LEASE": lockLease}

var lockTypes = map[string]uint32{"READ": unix.F_RDLCK, "WRITE": unix.F_WRLCK}

// lockID tells locks apart: descriptors of one description show the same ones,
// those of POSIX only within the table of descriptors that owns them.
type lockID struct {
	obj        *object
	filesID    uint32 // of POSIX locks, otherwise 0
	kind, typ  string
	start, end int64
}

// heldLock is a lock of the tree, with one descriptor through which it can be set.
type heldLock struct {
	obj   *object
	entry *file_lock.FileLockEntry
}

// noteLocks takes up the locks that were set through one descriptor of o. Its
// fdinfo shows no lock of anybody else on the same file, nor those waited for.
func (d *Dumper) noteLocks(o *object, h holder, locks []procfs.Lock) {
	for _, l := range locks {
		id := lockID{obj: o, kind: l.Kind, typ: l.Type, start: l.Start, end: l.End}
		if l.Kind == "POSIX" {
			id.filesID = h.proc.FilesID
		}
		if d.lockIDs[id] {
			continue
		}
		d.lockIDs[id] = true
		kind, known := lockKinds[l.Kind]
		typ, typed := lockTypes[l.Type]
		switch {
		case !d.opts.FileLocks:
			if d.lockIDs[lockID{obj: o}] {
				continue // said already
			}
			d.lockIDs[lockID{obj: o}] = true
			d.problem(o, fmt.Sprintf("it is locked (%s %s)", l.Kind, l.Type), "give --file-locks to carry file locks, or let the program release it")
			continue
		case kind == lockLease && l.Mode != "ACTIVE":
			d.passes(o, "its lease is being broken by somebody who opens the file", "retry when the program has given the lease up")
			continue
		case !known || !typed:
			d.refuse(o, fmt.Sprintf("its lock of kind %s %s %s is not carried", l.Kind, l.Mode, l.Type), "let the program release it")
			continue
		case kind == lockLease && o.deleted():
			// Reading the content would break it.
			d.refuse(o, "it is a deleted file with a lease", "let the program release the lease (fcntl F_SETLEASE)")
			continue
		}
		e := &file_lock.FileLockEntry{
			Flag: proto.Uint32(kind), Type: proto.Uint32(typ), Pid: proto.Int32(int32(h.proc.VPid)), Fd: proto.Int32(int32(h.fd)),
			Start: proto.Int64(l.Start), Len: proto.Int64(0), // to the end
		}
		if l.End != math.MaxInt64 {
			e.Len = proto.Int64(l.End - l.Start + 1)
		}
		d.locks = append(d.locks, heldLock{obj: o, entry: e})
	}
}

func (d *Dumper) emitLocks() error {
	for _, l := range d.locks {
		if l.obj.refused {
			continue
		}
		if err := d.put(image.FileLocksFile, image.MagicFileLocks, l.entry, nil); err != nil {
			return err
		}
	}
	return nil
}

// fileLock is a lock to be set again.
type fileLock struct {
	entry *file_lock.FileLockEntry
	x     *description
	fd    int
}

// loadLocks validates the locks and finds whose they are.
func (r *Restorer) loadLocks() error {
	es, err := image.All[*file_lock.FileLockEntry](r.set, image.FileLocksFile)
	if err != nil {
		return err
	}
	if len(es) > 0 && !r.opts.FileLocks {
		return fmt.Errorf("the tree holds %d file locks, the first through fd %d of pid %d: give --file-locks to set them again", len(es), es[0].GetFd(), es[0].GetPid())
	}
	for _, e := range es {
		bad := func(format string, args ...any) error {
			return fmt.Errorf("image %s: lock through fd %d of pid %d: %w", image.FileLocksFile, e.GetFd(), e.GetPid(), fmt.Errorf(format, args...))
		}
		switch e.GetFlag() {
		case lockPosix, lockFlock, lockOFD, lockLease:
		default:
			return bad("its kind %d is not carried", e.GetFlag())
		}
		if e.GetType() != unix.F_RDLCK && e.GetType() != unix.F_WRLCK {
			return bad("its type %d is not carried", e.GetType())
		}
		if e.GetStart() < 0 || e.GetLen() < 0 || e.GetLen() > 0 && e.GetStart() > math.MaxInt64-e.GetLen() {
			return bad("it has %d bytes at %d", e.GetLen(), e.GetStart())
		}
		t, id := r.tableOf(e.GetPid())
		if t == nil {
			return bad("the process has no descriptors in the images")
		}
		x := t.byFD[int(e.GetFd())]
		if x == nil {
			return bad("the process has no such descriptor")
		}
		r.locks[id] = append(r.locks[id], &fileLock{entry: e, x: x, fd: int(e.GetFd())})
	}
	return nil
}

// tableOf finds the table of descriptors of a process by its pid in the images.
func (r *Restorer) tableOf(pid int32) (*table, uint32) {
	for id, t := range r.tables {
		if t.pid != 0 && int64(t.pid) == int64(pid) {
			return t, id
		}
	}
	return nil, 0
}

// where names the descriptor of a lock and its process.
func (l *fileLock) where(r *Restorer) string {
	s := fmt.Sprintf("fd %d%s", l.fd, r.process(fmt.Sprint(l.entry.GetPid())))
	if reg := l.x.entry.GetReg(); reg != nil {
		s += ", " + reg.GetName()
	} else if reg := r.fifoReg(l.x); reg != nil {
		s += ", " + reg.GetName()
	}
	return s
}

// flock is struct flock (include/uapi/asm-generic/fcntl.h) of a lock.
func (l *fileLock) flock() unix.Flock_t {
	return unix.Flock_t{Type: int16(l.entry.GetType()), Start: l.entry.GetStart(), Len: l.entry.GetLen()}
}

// flockOp is what flock(2) gets.
func (l *fileLock) flockOp() int {
	if l.entry.GetType() == unix.F_WRLCK {
		return unix.LOCK_EX | unix.LOCK_NB
	}
	return unix.LOCK_SH | unix.LOCK_NB
}

func (l *fileLock) String() string {
	kind := map[uint32]string{lockPosix: "POSIX lock", lockFlock: "flock", lockOFD: "OFD lock", lockLease: "lease"}[l.entry.GetFlag()]
	if l.entry.GetType() == unix.F_WRLCK {
		kind = "write " + kind
	} else {
		kind = "read " + kind
	}
	switch first := l.entry.GetStart(); {
	case l.entry.GetFlag() == lockFlock || l.entry.GetFlag() == lockLease:
		return kind
	case l.entry.GetLen() == 0:
		return fmt.Sprintf("%s from byte %d on", kind, first)
	default:
		return fmt.Sprintf("%s of bytes %d to %d", kind, first, first+l.entry.GetLen()-1)
	}
}

// probeLocks says which locks others on this host hold meanwhile. Nothing of the
// tree holds any yet. Leases show only when they are taken.
func (r *Restorer) probeLocks() []error {
	var errs []error
	for _, ls := range r.locks {
		for _, l := range ls {
			if l.x.file == nil || r.isForwarded(l.x) {
				continue
			}
			if err := l.probe(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", l.where(r), err))
			}
		}
	}
	return errs
}

func (l *fileLock) probe() error {
	fd := int(l.x.file.Fd())
	switch l.entry.GetFlag() {
	case lockPosix, lockOFD:
		lk := l.flock()
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
			return fmt.Errorf("look for other locks: %w", os.NewSyscallError("fcntl F_OFD_GETLK", err))
		}
		if lk.Type != unix.F_UNLCK {
			return l.taken(int(lk.Pid))
		}
	case lockFlock:
		err := unix.Flock(fd, l.flockOp())
		if errors.Is(err, unix.EWOULDBLOCK) {
			return l.taken(flockHolder(fd))
		}
		if err == nil {
			err = unix.Flock(fd, unix.LOCK_UN) // the process itself sets it
		}
		if err != nil {
			return os.NewSyscallError("flock", err)
		}
	}
	return nil
}

// taken says who has a lock that stands in the way of l.
func (l *fileLock) taken(pid int) error {
	holder := "another open file"
	if pid > 0 {
		holder = fmt.Sprintf("pid %d", pid)
		if st, err := procfs.ReadStat(pid); err == nil {
			holder += " (" + st.Comm + ")"
		}
	}
	return fmt.Errorf("its %s cannot be set again, %s has locked the file meanwhile: wait until that is released, or end the holder", l, holder)
}

// flockHolder names a process that called flock(2) on the file behind fd; 0 if
// none can be found.
func flockHolder(fd int) int {
	var st unix.Stat_t
	all, err := procfs.ReadLocks()
	if err != nil || unix.Fstat(fd, &st) != nil {
		return 0
	}
	for _, l := range all {
		if l.Kind == "FLOCK" && !l.Blocked && l.Ino == st.Ino && l.Major == unix.Major(uint64(st.Dev)) && l.Minor == unix.Minor(uint64(st.Dev)) {
			return l.Pid
		}
	}
	return 0
}

// lockCalls set the locks of a table. They must run in the process, which owns
// its POSIX locks, once it closes no descriptor any more: each close(2) of a
// file drops its POSIX locks.
func (r *Restorer) lockCalls(filesID uint32) []*ptrace.Call {
	var out []*ptrace.Call
	for _, l := range r.locks[filesID] {
		what := fmt.Sprintf("set the %s of %s again, which fails if others here have the file locked, or open under a lease:", l, l.where(r))
		switch l.entry.GetFlag() {
		case lockFlock:
			out = append(out, ptrace.NewCall(what, unix.SYS_FLOCK, ptrace.Int(l.fd), ptrace.Int(l.flockOp())))
		case lockLease:
			out = append(out, ptrace.NewCall(what, unix.SYS_FCNTL, ptrace.Int(l.fd), ptrace.Int(unix.F_SETLEASE), ptrace.Int(l.entry.GetType())))
			// The kernel makes who takes a lease the owner of its signals, if there
			// is none; what the program had follows.
			if o, _ := r.ownerOf(l.x); o.GetPid() == 0 {
				out = append(out, ptrace.NewCall(fmt.Sprintf("fcntl F_SETOWN 0 of fd %d", l.fd), unix.SYS_FCNTL, ptrace.Int(l.fd), ptrace.Int(unix.F_SETOWN), ptrace.Int(0)))
			}
		default:
			cmd := unix.F_SETLK
			if l.entry.GetFlag() == lockOFD {
				cmd = unix.F_OFD_SETLK
			}
			b := make([]byte, 32) // struct flock of 64-bit architectures
			binary.NativeEndian.PutUint16(b, uint16(l.entry.GetType()))
			binary.NativeEndian.PutUint64(b[8:], uint64(l.entry.GetStart()))
			binary.NativeEndian.PutUint64(b[16:], uint64(l.entry.GetLen()))
			out = append(out, ptrace.NewCall(what, unix.SYS_FCNTL, ptrace.Int(l.fd), ptrace.Int(cmd), ptrace.Bytes(b)))
		}
	}
	return out
}
