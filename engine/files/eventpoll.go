package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventpoll"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// kindEventpoll carries epoll(7). The kernel knows a watched file by its
// description and the number of the descriptor with which it was added, which may
// be closed or mean another file by now; and a signalfd reports the signals of
// whoever added it. So the files are added by a process that has the epoll
// descriptor (Restorer.Calls), under the same number.
//
// In the image, EventpollTfdEntry.id is the epoll file's own id if the descriptor
// number still leads to the watched file, as CRIU has it; otherwise it is the id of
// the watched file's entry.
var kindEventpoll = &kind{
	name: "epoll", typ: fdinfo.FdTypes_EVENTPOLL,
	takes:  func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[eventpoll]" },
	dump:   dumpEventpoll,
	finish: finishEventpolls,
	check:  checkEventpoll,
	open:   openEach(openEventpoll),
}

func dumpEventpoll(_ *Dumper, o *object) error {
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_EVENTPOLL.Enum(), Id: proto.Uint32(o.id), Epfd: &eventpoll.EventpollFileEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown,
	}})
	return nil
}

func finishEventpolls(d *Dumper, os []*object) error {
	for _, o := range os {
		if err := d.dumpTargets(o); err != nil {
			if d.dry() && (errors.Is(err, unix.EBADF) || errors.Is(err, unix.ENOENT) || procfs.Gone(err)) {
				continue // the running program has changed it meanwhile
			}
			return err
		}
	}
	return nil
}

func (d *Dumper) dumpTargets(o *object) error {
	if o.inFlight && len(o.info.Epoll) > 0 {
		d.passes(o, "it is in flight in a unix socket and watches files", "retry when the program has received it")
		return nil
	}
	e := o.entries[0].GetEpfd()
	seen := map[int]int{} // several files may have been added under one number
	for _, t := range o.info.Epoll {
		nth := seen[t.FD]
		seen[t.FD]++
		target, same, err := d.target(o, t, nth)
		if err != nil {
			return fmt.Errorf("find the file watched as fd %d: %w", t.FD, err)
		}
		if target == nil {
			if !d.dry() || d.settled(o, t) {
				d.refuse(o, fmt.Sprintf("it watches a file, added as fd %d, that no process of the tree has open", t.FD), "let the program remove it from the epoll set")
			}
			continue
		}
		if target.refused {
			d.refuse(o, fmt.Sprintf("it watches fd %d (%s), which cannot be carried", t.FD, target.link), "")
			continue
		}
		id := o.id
		if !same {
			id = target.id
		}
		e.Tfd = append(e.Tfd, &eventpoll.EventpollTfdEntry{
			Id: proto.Uint32(id), Tfd: proto.Uint32(uint32(t.FD)), Events: proto.Uint32(t.Events), Data: proto.Uint64(t.Data),
			Dev: proto.Uint32(t.Sdev), Inode: proto.Uint64(t.Ino), Pos: proto.Uint64(uint64(t.Pos)),
		})
	}
	return nil
}

// settled says whether the epoll still watches t: in a preflight the program runs on.
func (d *Dumper) settled(o *object, t procfs.EpollTarget) bool {
	info, err := procfs.ReadFdinfo(os.Getpid(), int(o.file.Fd()))
	if err != nil {
		return false
	}
	for _, u := range info.Epoll {
		if u.FD == t.FD && u.Ino == t.Ino && u.Data == t.Data {
			return true
		}
	}
	return false
}

// target finds the description that is the nth added to o under the number of t.
// same says that a process with the epoll has it under this very number.
func (d *Dumper) target(o *object, t procfs.EpollTarget, nth int) (found *object, same bool, err error) {
	epid, efd := o.ref()
	is := func(pid, fd int) (bool, error) {
		ord, err := sys.KcmpEpoll(pid, fd, epid, efd, t.FD, nth)
		if err != nil {
			if d.dry() {
				return false, nil
			}
			return false, err
		}
		return ord == sys.Equal, nil
	}
	for _, eh := range o.holders {
		if s := d.slot(eh.proc.FilesID, t.FD); s != nil {
			if ok, err := is(eh.proc.Pid, t.FD); err != nil {
				return nil, false, err
			} else if ok {
				return s.obj, true, nil
			}
		}
	}
	// Some file systems tell stat(2) another inode number than fdinfo has, so
	// those that match are only the first to be asked.
	for _, likely := range []bool{true, false} {
		for _, c := range d.objects {
			if (c.stat.Ino == t.Ino) != likely || c.first().fd < 0 && !c.inFlight {
				continue
			}
			if ok, err := is(c.ref()); err != nil {
				return nil, false, err
			} else if ok {
				return c, false, nil
			}
		}
	}
	return nil, false, nil
}

func (d *Dumper) slot(filesID uint32, fd int) *fdSlot {
	tab := d.fds[filesID] // ascending
	if i, ok := slices.BinarySearchFunc(tab, fd, func(s fdSlot, fd int) int { return s.fd - fd }); ok {
		return &tab[i]
	}
	return nil
}

func checkEventpoll(r *Restorer, x *description) error {
	for _, t := range x.entry.GetEpfd().GetTfd() {
		if t.GetTfd() > maxFD {
			return fmt.Errorf("it watches fd %d, which is out of range", t.GetTfd())
		}
		if t.GetId() == x.id {
			if len(x.at) > 0 && r.watcher(x, int(t.GetTfd())) == nil {
				return fmt.Errorf("it watches fd %d, which no process with this epoll descriptor has", t.GetTfd())
			}
			continue
		}
		if y := r.byID[t.GetId()]; y == nil || y.kind == nil {
			return fmt.Errorf("it watches file %d, which is not there", t.GetId())
		}
	}
	return nil
}

// watcher finds a place from which the epoll's fd tfd can be added under its number.
func (r *Restorer) watcher(x *description, tfd int) *place {
	for i := range x.at {
		if _, ok := r.tables[x.at[i].filesID].byFD[tfd]; ok {
			return &x.at[i]
		}
	}
	return nil
}

func openEventpoll(_ *Restorer, x *description) error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	x.file = os.NewFile(uintptr(fd), "epoll")
	return setStatus(x.file, x.entry.GetEpfd().GetFlags())
}

// privateBits of events say how to report, not what (fs/eventpoll.c EP_PRIVATE_BITS).
const privateBits = unix.EPOLLWAKEUP | unix.EPOLLONESHOT | unix.EPOLLET&0xffffffff | unix.EPOLLEXCLUSIVE

// watch is one file to add to an epoll.
type watch struct {
	epfd, fd int
	file     *description
	borrow   bool // fd does not lead to file: it must for a moment
	events   uint32
	data     uint64
}

// planWatches finds out which table's processes add which files. Every watched
// file of an epoll is added once, by the first process that can.
func (r *Restorer) planWatches() {
	for _, x := range r.all {
		if x.kind != kindEventpoll || len(x.at) == 0 {
			continue
		}
		for _, t := range x.entry.GetEpfd().GetTfd() {
			p := &x.at[0]
			w := watch{fd: int(t.GetTfd()), events: t.GetEvents(), data: t.GetData()}
			if t.GetId() == x.id {
				if p = r.watcher(x, w.fd); p == nil {
					continue
				}
				w.file = r.tables[p.filesID].byFD[w.fd]
			} else {
				w.file, w.borrow = r.byID[t.GetId()], true
			}
			w.epfd = p.fd
			tab := r.tables[p.filesID]
			tab.watches = append(tab.watches, w)
		}
	}
}

// epollCalls makes the calls for one table. Files whose one-shot event has been
// delivered come first: only delivery puts them into that state, so they are
// added ready and collected.
func (r *Restorer) epollCalls(filesID uint32) []*ptrace.Call {
	var spent, rest []*ptrace.Call
	for _, w := range r.tables[filesID].watches {
		before, after := r.lend(filesID, w)
		if w.events&unix.EPOLLONESHOT != 0 && w.events&^uint32(privateBits) == 0 {
			spent = append(spent, before...)
			if ready(w.file.file) {
				spent = append(spent, ctlCall(w, w.events|unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLPRI|unix.EPOLLRDHUP), waitCall(w))
			} else {
				spent = append(spent, ctlCall(w, w.events))
			}
			spent = append(spent, after...)
			continue
		}
		rest = append(rest, before...)
		rest = append(rest, ctlCall(w, w.events))
		rest = append(rest, after...)
	}
	return append(spent, rest...)
}

// lend makes the number of w lead to its file for as long as it is added.
func (r *Restorer) lend(filesID uint32, w watch) (before, after []*ptrace.Call) {
	if !w.borrow {
		return nil, nil
	}
	t := r.tables[filesID]
	before = append(before, ptrace.NewCall(fmt.Sprintf("dup3 fd %d to %d", t.spare[w.file], w.fd), unix.SYS_DUP3,
		ptrace.Int(t.spare[w.file]), ptrace.Int(w.fd), ptrace.Int(0)))
	own, ok := t.byFD[w.fd]
	if !ok {
		return before, []*ptrace.Call{ptrace.NewCall(fmt.Sprintf("close fd %d", w.fd), unix.SYS_CLOSE, ptrace.Int(w.fd))}
	}
	flags := 0
	if t.cloexec[w.fd] {
		flags = unix.O_CLOEXEC
	}
	return before, []*ptrace.Call{ptrace.NewCall(fmt.Sprintf("dup3 fd %d to %d", t.spare[own], w.fd), unix.SYS_DUP3,
		ptrace.Int(t.spare[own]), ptrace.Int(w.fd), ptrace.Int(flags))}
}

// placeSpares finds free numbers for the descriptors that lend needs.
func (t *table) placeSpares() {
	lent := map[int]bool{}
	for _, w := range t.watches {
		lent[w.fd] = lent[w.fd] || w.borrow
	}
	fd := 0
	add := func(x *description) {
		if x == nil {
			return
		}
		if _, ok := t.spare[x]; ok {
			return
		}
		for t.byFD[fd] != nil || lent[fd] {
			fd++
		}
		t.spare[x] = fd
		fd++
	}
	for _, w := range t.watches {
		if w.borrow {
			add(w.file)
			add(t.byFD[w.fd])
		}
	}
}

func ctlCall(w watch, events uint32) *ptrace.Call {
	// struct epoll_event is packed on x86-64 only (include/uapi/linux/eventpoll.h).
	var b []byte
	b = binary.NativeEndian.AppendUint32(b, events)
	if runtime.GOARCH != "amd64" {
		b = append(b, 0, 0, 0, 0)
	}
	b = binary.NativeEndian.AppendUint64(b, w.data)
	return ptrace.NewCall(fmt.Sprintf("epoll_ctl add fd %d to epoll fd %d", w.fd, w.epfd), unix.SYS_EPOLL_CTL,
		ptrace.Int(w.epfd), ptrace.Int(unix.EPOLL_CTL_ADD), ptrace.Int(w.fd), ptrace.Bytes(b))
}

// waitCall takes the one ready event out.
func waitCall(w watch) *ptrace.Call {
	return ptrace.NewCall(fmt.Sprintf("epoll_pwait of epoll fd %d", w.epfd), unix.SYS_EPOLL_PWAIT,
		ptrace.Int(w.epfd), ptrace.Buf(make([]byte, 16)), ptrace.Int(1), ptrace.Int(0), ptrace.Int(0), ptrace.Int(8))
}

// ready says whether an epoll that watches f for everything would report it.
func ready(f *os.File) bool {
	if f == nil {
		return false
	}
	p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN | unix.POLLOUT | unix.POLLPRI | unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n > 0
	}
}
