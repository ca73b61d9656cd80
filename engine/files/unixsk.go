package files

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-packet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// kindUnix carries unix sockets: pairs and connections with both ends in the
// tree, with what is queued in them; listeners nobody waits at; bound and unbound
// ones.
var kindUnix = &kind{
	name: "unix socket", typ: fdinfo.FdTypes_UNIXSK,
	takes: func(_ *Dumper, o *object) bool {
		if o.mode()&unix.S_IFMT != unix.S_IFSOCK || o.isPath() {
			return false
		}
		n, err := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
		return err == nil && n == unix.AF_UNIX
	},
	dump:   dumpUnix,
	finish: finishUnix,
	check:  checkUnix,
	open:   openUnix,
}

type unixState struct {
	diag unixDiag
	e    *sk_unix.UnixSkEntry
}

func isDgram(typ uint32) bool { return typ == unix.SOCK_DGRAM }

func dumpUnix(d *Dumper, o *object) error {
	if other, err := d.otherNetns(o); err != nil {
		return err
	} else if other {
		d.refuse(o, "the socket is in another network namespace", "run the agent in the network namespace of the tree")
		return nil
	}
	u, err := readUnixDiag(uint32(o.stat.Ino))
	if errors.Is(err, unix.ENOENT) { // the duplicate keeps the socket: it cannot have gone
		d.refuse(o, "this kernel tells nothing about unix sockets", "load or build in unix_diag (CONFIG_UNIX_DIAG)")
		return nil
	}
	if err != nil {
		return err
	}
	opts, err := d.dumpSockOpts(o)
	if err != nil {
		return err
	}
	name := u.name
	if name != "" && name[0] != 0 {
		name = strings.TrimRight(name, "\x00")
	}
	e := &sk_unix.UnixSkEntry{
		Id: proto.Uint32(o.id), Ino: proto.Uint32(uint32(o.stat.Ino)), Type: proto.Uint32(uint32(u.typ)), State: proto.Uint32(uint32(u.state)),
		Flags: proto.Uint32(uint32(o.flags)), Uflags: proto.Uint32(0), Backlog: proto.Uint32(0), Peer: proto.Uint32(u.peer),
		Fown: o.fown, Opts: opts, Name: []byte(name),
	}
	if isDgram(uint32(u.typ)) {
		// The kernel marks both ends of a datagram connection as established, also
		// the one that is connected to nobody; the entry only that with a peer.
		e.State = proto.Uint32(stateClose)
		if u.hasPeer {
			e.State = proto.Uint32(stateEstablished)
		}
	}
	if u.shutdown != 0 {
		e.Shutdown = sk_opts.SkShutdown(u.shutdown & 3).Enum()
	}
	st := &unixState{diag: u, e: e}
	o.state = st
	if u.state == stateListen {
		e.Backlog = proto.Uint32(u.wqueue)
		if u.rqueue > 0 || len(u.pending) > 0 {
			d.refuse(o, fmt.Sprintf("%d connections wait to be accepted", max(int(u.rqueue), len(u.pending))), "retry when the program has accepted them")
		}
	}
	if name != "" && name[0] != 0 {
		if err := d.dumpUnixPath(o, e); err != nil {
			return err
		}
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(o.id), Usk: e})
	return nil
}

// siocUnixFile is SIOCUNIXFILE (include/uapi/linux/un.h, Linux 4.13).
const siocUnixFile = 0x89e0

// dumpUnixPath looks at the file to which a socket is bound.
func (d *Dumper) dumpUnixPath(o *object, e *sk_unix.UnixSkEntry) error {
	name := string(e.Name)
	// The description of the file that bind(2) made, wherever it is now.
	n, err := unix.IoctlRetInt(int(o.file.Fd()), siocUnixFile)
	if errors.Is(err, unix.ENOENT) { // an end of a connection accepted long ago may have none
		e.Deleted = proto.Bool(true)
		return nil
	}
	if err != nil {
		return os.NewSyscallError("ioctl SIOCUNIXFILE", err)
	}
	f := os.NewFile(uintptr(n), name)
	defer func() { _ = f.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(n, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", n))
	if err != nil {
		return err
	}
	e.FilePerms = &sk_unix.FilePermsEntry{Mode: proto.Uint32(st.Mode), Uid: proto.Uint32(st.Uid), Gid: proto.Uint32(st.Gid)}
	if !leads(d.rootOf(o)+path, &st) {
		e.Deleted = proto.Bool(true)
		path = strings.TrimSuffix(path, deletedSuffix)
	}
	if !filepath.IsAbs(name) {
		dir, ok := strings.CutSuffix(path, "/"+name)
		if !ok {
			d.refuse(o, fmt.Sprintf("it is bound to the relative name %q, but its file is %s", name, path), "bind it to an absolute path")
			return nil
		}
		e.NameDir = proto.String(dir)
		if dir == "" {
			e.NameDir = proto.String("/")
		}
	}
	f0 := o.fact(o.id)
	f0.Path, f0.Dev, f0.Ino = path, uint64(st.Dev), st.Ino
	return nil
}

func finishUnix(d *Dumper, os []*object) error {
	byIno := map[uint32]*object{}
	for _, o := range os {
		byIno[uint32(o.stat.Ino)] = o
	}
	for _, o := range os {
		st, ok := o.state.(*unixState)
		if !ok || o.refused {
			continue
		}
		u, e := st.diag, st.e
		if o.facts != nil && !e.GetDeleted() && (u.state == stateListen || !u.hasPeer) {
			// Bound for itself, not by the listener that accepted it.
			o.path, o.create = o.facts.Path, true
		}
		switch {
		case u.state == stateListen:
		case u.hasPeer && u.peer == 0 && !isDgram(uint32(u.typ)) && u.shutdown != 3:
			d.refuse(o, "the connection has not been accepted yet", "retry when the peer has accepted it")
		case u.hasPeer && u.peer != 0 && byIno[u.peer] == nil:
			hint := "include the process that has the other end in the tree, or let the program close the connection"
			if x, ok := d.outside(fmt.Sprintf("socket:[%d]", u.peer)); ok {
				hint = fmt.Sprintf("the other end belongs to pid %d (%s): include it in the tree, or let the program close the connection", x.pid, x.comm)
			}
			d.refuse(o, fmt.Sprintf("its peer, socket %d, is outside the tree", u.peer), hint)
		}
		if x, ok := d.outside(o.link); ok && (u.hasPeer || isDgram(uint32(u.typ))) {
			d.refuse(o, fmt.Sprintf("the socket is also held by pid %d (%s), fd %d, outside the tree", x.pid, x.comm, x.fd), "include that process in the tree")
		}
		for _, kv := range o.info.Other {
			if kv.Key == "scm_fds" && strings.TrimSpace(kv.Value) != "0" {
				d.refuse(o, "descriptors sent through it (SCM_RIGHTS) have not been received yet", "retry when the program has received them")
			}
		}
		// An error that waits to be reported is taken away by whoever looks first.
		if p := []unix.PollFd{{Fd: int32(o.file.Fd())}}; !o.refused && u.state != stateListen {
			if _, err := unix.Poll(p, 0); err == nil && p[0].Revents&unix.POLLERR != 0 {
				d.refuse(o, "an error of the connection, whose peer is closed, has not been reported yet", "retry when the program has closed it")
			}
		}
		if o.refused {
			continue
		}
		if isDgram(uint32(u.typ)) && u.peer != 0 {
			p := byIno[u.peer].state.(*unixState)
			if p.diag.peer != uint32(o.stat.Ino) && len(p.e.Name) == 0 {
				d.refuse(o, "it sends to an unnamed socket that is connected elsewhere", "bind that socket to a name")
				continue
			}
		}
		if d.dry() || u.state == stateListen {
			continue
		}
		if err := d.dumpSockQueue(o, st, byIno[u.peer]); err != nil {
			return fmt.Errorf("%s: %w", o.link, err)
		}
	}
	return nil
}

// message is one datagram, or a piece of a stream.
type message struct {
	data []byte
	from string // name of the sender, if it has one
}

// dumpSockQueue emits what is queued at a socket, unless it cannot be put back.
func (d *Dumper) dumpSockQueue(o *object, st *unixState, peer *object) error {
	if st.diag.rqueue == 0 && st.e.GetType() == unix.SOCK_STREAM {
		return nil
	}
	ms, rights, err := d.peekQueue(int(o.file.Fd()), st.e.GetType() == unix.SOCK_STREAM, st.diag.shutdown&1 != 0)
	if err != nil {
		return err
	}
	if rights {
		d.refuse(o, "descriptors sent through it (SCM_RIGHTS) have not been received yet", "retry when the program has received them")
		return nil
	}
	for _, m := range ms {
		if isDgram(st.e.GetType()) && m.from != "" && (peer == nil || m.from != string(peer.state.(*unixState).e.Name)) {
			d.refuse(o, fmt.Sprintf("a datagram from %q waits to be received", m.from), "retry when the program has received it")
			return nil
		}
	}
	for _, m := range ms {
		e := &sk_packet.SkPacketEntry{IdFor: proto.Uint32(o.id), Length: proto.Uint32(uint32(len(m.data)))}
		if err := d.put(skQueuesImage, skQueuesMagic, e, m.data); err != nil {
			return err
		}
	}
	return nil
}

// maxMessages bounds one socket's queue; its buffers do so long before.
const maxMessages = 1 << 20

// peekQueue reads what is queued at a socket without taking it out. The peek
// offset is the socket's own, so it is put back as it was. rights: descriptors
// are in the queue.
func (d *Dumper) peekQueue(fd int, stream, closed bool) (ms []message, rights bool, err error) {
	old, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err != nil {
		return nil, false, os.NewSyscallError("getsockopt SO_PEEK_OFF", err)
	}
	defer func() { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, old) }()
	if d.buf == nil {
		d.buf = make([]byte, 256<<10)
	}
	for {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0); err != nil {
			return nil, false, os.NewSyscallError("setsockopt SO_PEEK_OFF", err)
		}
		var longest int
		ms, longest, rights, err = peekAll(fd, stream, closed, d.buf)
		if err != nil || longest <= len(d.buf) || stream {
			return ms, rights, err
		}
		d.buf = make([]byte, longest) // a datagram did not fit: once more
	}
}

func peekAll(fd int, stream, closed bool, buf []byte) (ms []message, longest int, rights bool, err error) {
	oob := make([]byte, 4096)
	for len(ms) < maxMessages {
		n, oobn, _, from, err := unix.Recvmsg(fd, buf, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC|unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTCONN):
			return ms, longest, rights, nil // empty, or never connected
		case err != nil:
			return nil, 0, false, os.NewSyscallError("recvmsg", err)
		}
		rights = hasRights(oob[:oobn]) || rights
		if n == 0 && (stream || closed) {
			return ms, longest, rights, nil
		}
		longest = max(longest, n)
		m := message{data: bytes.Clone(buf[:min(n, len(buf))])}
		if sa, ok := from.(*unix.SockaddrUnix); ok && sa != nil {
			m.from = sa.Name
			if strings.HasPrefix(m.from, "@") { // how the package writes NUL
				m.from = "\x00" + m.from[1:]
			}
		}
		ms = append(ms, m)
	}
	return nil, 0, false, fmt.Errorf("more than %d messages are queued", maxMessages)
}

// hasRights looks for descriptors in control messages, and closes the duplicates
// that peeking at them has made.
func hasRights(oob []byte) bool {
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	found := false
	for i := range ms {
		if ms[i].Header.Level != unix.SOL_SOCKET || ms[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		found = true
		fds, err := unix.ParseUnixRights(&ms[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	return found
}

func (r *Restorer) loadSockQueues() error {
	r.queues = map[uint32][]message{}
	for i, e := range r.set.Entries(skQueuesImage) {
		m, ok := e.Msg.(*sk_packet.SkPacketEntry)
		switch {
		case !ok:
			return fmt.Errorf("image %s: entry %d is a %T", skQueuesImage, i, e.Msg)
		case int(m.GetLength()) != len(e.Extra):
			return fmt.Errorf("image %s: entry %d tells of %d bytes, but there are %d", skQueuesImage, i, m.GetLength(), len(e.Extra))
		case len(m.GetScm()) > 0:
			return fmt.Errorf("image %s: entry %d carries descriptors or credentials, which is not supported", skQueuesImage, i)
		}
		x := r.byID[m.GetIdFor()]
		if x == nil || x.entry.GetType() != fdinfo.FdTypes_UNIXSK {
			return fmt.Errorf("image %s: entry %d is for file %d, which is no unix socket", skQueuesImage, i, m.GetIdFor())
		}
		r.queues[m.GetIdFor()] = append(r.queues[m.GetIdFor()], message{data: e.Extra})
	}
	return nil
}

// unixName is the name as the kernel has it: a path without NUL behind it.
func unixName(e *sk_unix.UnixSkEntry) []byte {
	n := e.GetName()
	if len(n) > 0 && n[0] != 0 {
		n = bytes.TrimRight(n, "\x00")
	}
	return n
}

// unixPath is the path of the file to which the socket is bound; "" if it is not
// bound to one.
func unixPath(e *sk_unix.UnixSkEntry) string {
	n := unixName(e)
	switch {
	case len(n) == 0 || n[0] == 0:
		return ""
	case n[0] == '/':
		return string(n)
	}
	return filepath.Join(e.GetNameDir(), string(n))
}

func checkUnix(r *Restorer, x *description) error {
	e := x.entry.GetUsk()
	name := unixName(e)
	switch e.GetType() {
	case unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_SEQPACKET:
	default:
		return fmt.Errorf("unix sockets of type %d are not carried", e.GetType())
	}
	switch e.GetState() {
	case stateEstablished, stateClose, stateListen:
	default:
		return fmt.Errorf("a unix socket cannot be in state %d", e.GetState())
	}
	switch {
	case e.GetOpts() == nil:
		return errors.New("its options are missing")
	case checkSockOpts(e.GetOpts()) != nil:
		return checkSockOpts(e.GetOpts())
	case len(name) > 0 && (len(name) > 108 || name[0] != 0 && bytes.IndexByte(name, 0) >= 0):
		return fmt.Errorf("%q is no name of a unix socket", name)
	case len(name) > 0 && name[0] != 0 && name[0] != '/' && !filepath.IsAbs(e.GetNameDir()):
		return fmt.Errorf("its name %q is relative, and the directory is missing", name)
	case e.GetState() == stateListen && (isDgram(e.GetType()) || e.GetPeer() != 0 || len(name) == 0):
		return errors.New("a listener has a name and no peer")
	}
	if e.GetPeer() == 0 || r.handed[fmt.Sprintf("socket:[%d]", e.GetIno())] != nil {
		return nil
	}
	p := r.byIno[e.GetPeer()]
	switch {
	case p == nil:
		return fmt.Errorf("its peer, socket %d, is not in the images", e.GetPeer())
	case p == x:
		return errors.New("it is its own peer")
	case p.entry.GetUsk().GetType() != e.GetType():
		return fmt.Errorf("its peer, socket %d, is of another type", e.GetPeer())
	case p.entry.GetUsk().GetPeer() != e.GetIno() && !isDgram(e.GetType()):
		return fmt.Errorf("its peer, socket %d, has another peer", e.GetPeer())
	case p.entry.GetUsk().GetPeer() != e.GetIno() && len(unixName(p.entry.GetUsk())) == 0:
		return fmt.Errorf("its peer, socket %d, has no name", e.GetPeer())
	}
	return nil
}

// unixOpener makes the unix sockets of a tree: first listeners and others that
// only have a name, then connections, then what they hold.
type unixOpener struct {
	boot  string // id of this boot
	r     *Restorer
	byIno map[uint32]*description
	// sharing counts the sockets with a name; those beyond the listener were accepted.
	sharing   map[string]int
	listeners map[string]*description
	temporary map[string]*os.File       // listeners made only to accept connections under a name
	closers   map[*description]*os.File // far ends of connections whose peer is closed
	tmpPaths  []string
}

func openUnix(r *Restorer, xs []*description) (errs []error) {
	boot := bootID()
	_ = r.inRoot(func() error {
		errs = openUnixInside(r, xs, boot)
		return nil
	})
	return errs
}

// openUnixInside is openUnix where paths are the tree's. boot is the id of this boot.
func openUnixInside(r *Restorer, xs []*description, boot string) []error {
	u := &unixOpener{r: r, boot: boot, byIno: map[uint32]*description{}, sharing: map[string]int{}, listeners: map[string]*description{}, temporary: map[string]*os.File{},
		closers: map[*description]*os.File{}}
	defer u.close()
	var todo []*description
	var errs []error
	for _, x := range xs {
		e := x.entry.GetUsk()
		if done, err := r.openHandedSocket(x, e.GetIno()); done {
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
			}
			continue
		}
		if u.byIno[e.GetIno()] != nil {
			errs = append(errs, fmt.Errorf("%s: socket %d is there twice", r.who(x), e.GetIno()))
			continue
		}
		u.byIno[e.GetIno()] = x
		u.sharing[string(unixName(e))]++
		if e.GetState() == stateListen {
			u.listeners[string(unixName(e))] = x
		}
		todo = append(todo, x)
	}
	if len(errs) > 0 {
		return errs
	}
	for _, step := range []func(*description) error{u.alone, u.connected, u.fill, u.settle} {
		for _, x := range todo {
			if err := step(x); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
			}
		}
		if len(errs) > 0 {
			return errs
		}
	}
	return nil
}

func (u *unixOpener) close() {
	for _, f := range u.closers {
		_ = f.Close()
	}
	for _, f := range u.temporary {
		_ = f.Close()
	}
	for _, p := range u.tmpPaths {
		_ = unix.Unlink(p)
	}
}

func mutual(a, b *description) bool {
	return b != nil && b.entry.GetUsk().GetPeer() == a.entry.GetUsk().GetIno() && a.entry.GetUsk().GetPeer() == b.entry.GetUsk().GetIno()
}

// paired says whether a socket is made by socketpair(2) or connect(2) with a far
// end, which may be gone.
func (u *unixOpener) paired(x *description) bool {
	e := x.entry.GetUsk()
	if e.GetState() == stateListen {
		return false
	}
	if e.GetPeer() == 0 {
		// CRIU keeps the kernel's state of datagram sockets (dumpUnix).
		return e.GetState() == stateEstablished && (!isDgram(e.GetType()) || u.r.set.Facts != nil)
	}
	return mutual(x, u.byIno[e.GetPeer()])
}

func socketFile(fd int) *os.File { return os.NewFile(uintptr(fd), "unix socket") }

func newUnix(typ uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return socketFile(fd), nil
}

// alone makes a socket that stands for itself.
func (u *unixOpener) alone(x *description) error {
	e := x.entry.GetUsk()
	if u.paired(x) {
		return nil
	}
	f, err := newUnix(e.GetType())
	if err != nil {
		return err
	}
	x.file = f
	if len(unixName(e)) > 0 {
		if err := u.bind(x, f); err != nil {
			return err
		}
	}
	if e.GetState() == stateListen {
		return os.NewSyscallError("listen", unix.Listen(int(f.Fd()), int(min(e.GetBacklog(), 1<<30))))
	}
	return nil
}

// bind gives a socket its name. A path must be free, but for the socket file that
// the tree itself left behind.
func (u *unixOpener) bind(x *description, f *os.File) error {
	e := x.entry.GetUsk()
	if path := unixPath(e); path != "" {
		if err := u.vacate(x, path); err != nil {
			return err
		}
	}
	return u.bindName(f, e)
}

func (u *unixOpener) bindName(f *os.File, e *sk_unix.UnixSkEntry) error {
	name := unixName(e)
	return u.byName(e, func() error {
		if err := sys.BindUnix(int(f.Fd()), name); err != nil {
			return fmt.Errorf("bind it to %q: %w", name, err)
		}
		return nil
	})
}

// byName runs fn where the name of e, if it is a relative path, is valid.
func (u *unixOpener) byName(e *sk_unix.UnixSkEntry, fn func() error) error {
	if n := unixName(e); len(n) > 0 && n[0] != 0 && n[0] != '/' {
		return u.r.inDir(e.GetNameDir(), fn)
	}
	return fn()
}

// vacate makes sure that a path is free. A socket file stands in the way, unless
// it is the very one of the dead tree: the same inode, since the same boot, with
// nobody listening.
func (u *unixOpener) vacate(x *description, path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("its path is taken by a %s: remove that first", modeKind(st.Mode))
	}
	f := u.r.facts[x.id]
	if f == nil || f.Dev != uint64(st.Dev) || f.Ino != st.Ino || u.r.set.Facts == nil || u.r.set.Facts.BootID == "" ||
		u.r.set.Facts.BootID != u.boot || answered(path, x.entry.GetUsk().GetType()) {
		return fmt.Errorf("its path is taken by another socket: end the program that owns it, or remove the file %s", path)
	}
	if err := unix.Unlink(path); err != nil {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// answered says whether a socket is bound to the file at path. Connecting to a
// datagram socket tells nobody; a listener would see a connection come and go.
func answered(path string, typ uint32) bool {
	f, err := newUnix(typ)
	if err != nil {
		return true
	}
	defer func() { _ = f.Close() }()
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		return true
	}
	err = sys.ConnectUnix(int(f.Fd()), []byte(path))
	return !errors.Is(err, unix.ECONNREFUSED)
}

// connected makes both ends of a connection, or the one that is left; and connects
// datagram sockets that send one way.
func (u *unixOpener) connected(x *description) error {
	e := x.entry.GetUsk()
	peer := u.byIno[e.GetPeer()]
	if !u.paired(x) {
		if e.GetPeer() == 0 || peer == nil {
			return nil
		}
		pe := peer.entry.GetUsk()
		err := u.byName(pe, func() error { return sys.ConnectUnix(int(x.file.Fd()), unixName(pe)) })
		if err != nil {
			return fmt.Errorf("connect it to %q: %w", unixName(pe), err)
		}
		return nil
	}
	if x.file != nil {
		return nil // made with its peer
	}
	// The end with the name of a listener was accepted there.
	accepted, client := x, peer
	if peer != nil && u.listener(x) == nil && u.listener(peer) != nil {
		accepted, client = peer, x
	}
	var near, far *os.File
	var err error
	if l := u.listener(accepted); l != nil {
		near, far, err = u.accept(l, accepted, client)
	} else {
		near, far, err = u.pair(accepted, client)
	}
	if err != nil {
		return err
	}
	accepted.file = near
	if client != nil {
		client.file = far
	} else {
		u.closers[accepted] = far
	}
	return nil
}

func (u *unixOpener) pair(a, b *description) (near, far *os.File, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, int(a.entry.GetUsk().GetType())|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	near, far = socketFile(p[0]), socketFile(p[1])
	for _, end := range []struct {
		x *description
		f *os.File
	}{{a, near}, {b, far}} {
		if end.x == nil || len(unixName(end.x.entry.GetUsk())) == 0 {
			continue
		}
		if err := u.bind(end.x, end.f); err != nil {
			if isDgram(end.x.entry.GetUsk().GetType()) {
				return nil, nil, errors.Join(err, near.Close(), far.Close())
			}
			// The connection works without it; the name was perhaps that of a listener
			// outside the tree.
			u.r.log.Warn("connection of a unix socket restored without its name", "file", u.r.who(end.x), "error", err)
		}
	}
	return near, far, nil
}

// listener finds, or for a name that several connections share makes, a listener
// at the name of an end of a stream connection. nil: it needs none.
func (u *unixOpener) listener(x *description) *os.File {
	if x == nil {
		return nil
	}
	e := x.entry.GetUsk()
	name := unixName(e)
	if len(name) == 0 || isDgram(e.GetType()) {
		return nil
	}
	if l := u.listeners[string(name)]; l != nil {
		if l.entry.GetUsk().GetType() != e.GetType() {
			return nil
		}
		return l.file
	}
	if f, ok := u.temporary[string(name)]; ok {
		return f
	}
	path := unixPath(e)
	if path == "" && u.sharing[string(name)] < 2 {
		return nil
	}
	if path != "" {
		if _, err := os.Lstat(path); err == nil {
			return nil
		}
	}
	f, err := newUnix(e.GetType())
	if err != nil {
		return nil
	}
	if err := u.bindName(f, e); err != nil {
		_ = f.Close()
		return nil
	}
	if path != "" {
		u.tmpPaths = append(u.tmpPaths, path)
	}
	if err := unix.Listen(int(f.Fd()), 16); err != nil {
		_ = f.Close()
		return nil
	}
	u.temporary[string(name)] = f
	return f
}

// accept connects a new socket to l and accepts it there. Strangers may connect
// to a name at any time: the token tells which connection is ours. Strangers'
// connections are closed, as if the listener had not been there yet.
func (u *unixOpener) accept(l *os.File, a, client *description) (near, far *os.File, err error) {
	e := a.entry.GetUsk()
	if far, err = newUnix(e.GetType()); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = far.Close()
		}
	}()
	if client != nil && len(unixName(client.entry.GetUsk())) > 0 {
		if err = u.bind(client, far); err != nil {
			return nil, nil, err
		}
	}
	if err = u.byName(e, func() error { return sys.ConnectUnix(int(far.Fd()), unixName(e)) }); err != nil {
		return nil, nil, fmt.Errorf("connect to %q: %w", unixName(e), err)
	}
	token := make([]byte, 16)
	_, _ = rand.Read(token) // never fails
	if _, err = unix.SendmsgN(int(far.Fd()), token, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err != nil {
		return nil, nil, os.NewSyscallError("sendmsg", err)
	}
	if near, err = acceptToken(l, token); err != nil {
		return nil, nil, fmt.Errorf("accept our own connection to %q: %w", unixName(e), err)
	}
	return near, far, nil
}

func acceptToken(l *os.File, token []byte) (*os.File, error) {
	for range 4096 {
		p := []unix.PollFd{{Fd: int32(l.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 1000)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, os.NewSyscallError("poll", err)
		case n == 0:
			return nil, errors.New("it did not come")
		}
		fd, _, err := unix.Accept4(int(l.Fd()), unix.SOCK_CLOEXEC)
		if err != nil {
			return nil, os.NewSyscallError("accept4", err)
		}
		got := make([]byte, len(token))
		if n, _, err := unix.Recvfrom(fd, got, unix.MSG_DONTWAIT); err == nil && n == len(got) && bytes.Equal(got, token) {
			return socketFile(fd), nil
		}
		_ = unix.Close(fd)
	}
	return nil, errors.New("too many others came first")
}

// fill queues again what a socket had not received.
func (u *unixOpener) fill(x *description) error {
	ms := u.r.queues[x.id]
	if len(ms) == 0 {
		return nil
	}
	e := x.entry.GetUsk()
	var err error
	var from *os.File
	var name []byte // where to send; empty: to the peer
	peer := u.byIno[e.GetPeer()]
	switch {
	case u.paired(x) && peer != nil:
		from = peer.file
	case u.paired(x):
		from = u.closers[x]
	case !isDgram(e.GetType()) || len(unixName(e)) == 0:
		return errors.New("it holds data, but nobody could have sent it")
	default:
		name = unixName(e)
		if peer != nil {
			from = peer.file
			break
		}
		f, err := newUnix(e.GetType())
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		from = f
	}
	total := 0
	for _, m := range ms {
		total += len(m.data) + 4096
	}
	// Room enough at the sender, whose own limit settle sets.
	if err := unix.SetsockoptInt(int(from.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, min(max(4*total, 1<<16), 1<<29)); err != nil {
		return os.NewSyscallError("setsockopt SO_SNDBUFFORCE", err)
	}
	for i, m := range ms {
		send := func() error { return sendAll(from, name, m.data, e.GetType() == unix.SOCK_STREAM) }
		if len(name) > 0 {
			err = u.byName(e, send)
		} else {
			err = send()
		}
		if err != nil {
			return fmt.Errorf("queue message %d of %d, %d bytes: %w", i+1, len(ms), len(m.data), err)
		}
	}
	return nil
}

func sendAll(f *os.File, name, p []byte, stream bool) error {
	const flags = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	if len(name) > 0 {
		return sys.SendtoUnix(int(f.Fd()), p, flags, name)
	}
	for {
		n, err := unix.SendmsgN(int(f.Fd()), p, nil, nil, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("sendmsg", err)
		}
		if p = p[n:]; !stream || len(p) == 0 {
			return nil
		}
	}
}

// settle gives a socket its options, permissions and flags, and closes what was closed.
func (u *unixOpener) settle(x *description) error {
	for _, f := range u.closers { // everything is queued by now
		_ = f.Close()
	}
	clear(u.closers)
	e := x.entry.GetUsk()
	fd := int(x.file.Fd())
	if err := u.r.restoreSockOpts(x, e.GetOpts(), nil); err != nil {
		return err
	}
	if how, ok := map[sk_opts.SkShutdown]int{sk_opts.SkShutdown_READ: unix.SHUT_RD, sk_opts.SkShutdown_WRITE: unix.SHUT_WR, sk_opts.SkShutdown_BOTH: unix.SHUT_RDWR}[e.GetShutdown()]; ok {
		if err := unix.Shutdown(fd, how); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return os.NewSyscallError("shutdown", err)
		}
	}
	if path := unixPath(e); path != "" && u.ownsPath(x) {
		if e.GetDeleted() {
			if err := unix.Unlink(path); err != nil {
				return &os.PathError{Op: "unlink", Path: path, Err: err}
			}
		} else if p := e.GetFilePerms(); p != nil {
			if err := unix.Lchown(path, int(p.GetUid()), int(p.GetGid())); err != nil {
				return &os.PathError{Op: "chown", Path: path, Err: err}
			}
			if err := unix.Chmod(path, p.GetMode()&0o7777); err != nil {
				return &os.PathError{Op: "chmod", Path: path, Err: err}
			}
		}
	}
	return setStatus(x.file, e.GetFlags())
}

// ownsPath says whether it was x for which the file at its path was made.
func (u *unixOpener) ownsPath(x *description) bool {
	e := x.entry.GetUsk()
	if e.GetState() == stateListen || !u.paired(x) {
		return true
	}
	name := unixName(e)
	return isDgram(e.GetType()) && u.listeners[string(name)] == nil && u.temporary[string(name)] == nil
}

func listenCalls(x *description) []*ptrace.Call {
	e := x.entry.GetUsk()
	if e.GetState() != stateListen {
		return nil
	}
	// Once more, by the process: its credentials are what those who connect see
	// (SO_PEERCRED, net/unix/af_unix.c unix_listen).
	return []*ptrace.Call{ptrace.NewCall(fmt.Sprintf("listen on fd %d", x.at[0].fd), unix.SYS_LISTEN,
		ptrace.Int(x.at[0].fd), ptrace.Int(min(e.GetBacklog(), 1<<30)))}
}
