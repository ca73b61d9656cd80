package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
	"godwit/engine/sys"
)

// kindUnix carries unix sockets: pairs and connections with both ends in the
// tree, with what is queued in them, descriptors and credentials included;
// listeners with the connections that wait there; bound and unbound ones.
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
	diag  unixDiag
	e     *sk_unix.UnixSkEntry
	facts *image.UnixFacts
}

func isDgram(typ uint32) bool { return typ == unix.SOCK_DGRAM }

func dumpUnix(d *Dumper, o *object) error {
	if other, err := d.refuseOtherNetns(o); other || err != nil {
		return err
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
	if st.facts, err = d.dumpUnixFacts(o, &u); err != nil {
		return err
	}
	if u.state == stateListen {
		e.Backlog = proto.Uint32(u.wqueue)
	}
	if name != "" && name[0] != 0 {
		if err := d.dumpUnixPath(o, st); err != nil {
			return err
		}
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(o.id), Usk: e})
	return nil
}

// dumpUnixFacts reads what the entry has no field for.
func (d *Dumper) dumpUnixFacts(o *object, u *unixDiag) (*image.UnixFacts, error) {
	f := &image.UnixFacts{}
	fd := int(o.file.Fd())
	var err error
	if f.PeerCred, err = d.dumpPeerCred(o); err != nil {
		return nil, err
	}
	if u.state != stateListen && u.hasPeer && u.peer == 0 {
		if f.PeerName, err = sys.UnixPeerName(fd); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return nil, err
		}
		if fl := d.flights[o]; fl != nil {
			f.Reset = fl.reset
		} else if f.Reset, err = hasError(fd); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// siocUnixFile is SIOCUNIXFILE (include/uapi/linux/un.h, Linux 4.13).
const siocUnixFile = 0x89e0

// dumpUnixPath looks at the file to which a socket is bound.
func (d *Dumper) dumpUnixPath(o *object, st0 *unixState) error {
	e := st0.e
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
	if filepath.IsAbs(name) {
		root, err := os.Readlink(procfs.Path(o.first().proc.Pid, "root"))
		if err != nil {
			return err
		}
		if root != "/" && strings.HasPrefix(path, root+"/") && d.rootOf(o) == "" {
			st0.facts.Root = root
		}
	} else {
		dir, ok := strings.CutSuffix(path, "/"+filepath.Clean(name))
		if !ok {
			if e.GetDeleted() {
				return nil // its name is all that is left
			}
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

// unixTree is what finishUnix knows of all unix sockets together.
type unixTree struct {
	d     *Dumper
	byIno map[uint32]*object
	// waits are the clients that were not accepted yet, by inode, with the listener.
	waits map[uint32]*object
}

func finishUnix(d *Dumper, os []*object) error {
	t := &unixTree{d: d, byIno: map[uint32]*object{}, waits: map[uint32]*object{}}
	for _, o := range os {
		t.byIno[uint32(o.stat.Ino)] = o
	}
	for _, o := range os {
		if st, ok := o.state.(*unixState); ok && !o.refused && st.diag.state == stateListen {
			t.pending(o, st)
		}
	}
	for _, o := range os {
		st, ok := o.state.(*unixState)
		if !ok || o.refused {
			continue
		}
		if err := t.finish(o, st); err != nil {
			return fmt.Errorf("%s: %w", o.link, err)
		}
	}
	return nil
}

// pending looks at the connections that wait to be accepted at a listener.
func (t *unixTree) pending(o *object, st *unixState) {
	foreign := 0
	for _, ino := range st.diag.pending {
		t.waits[ino] = o
	}
	for _, ino := range st.diag.pending {
		c := t.byIno[ino]
		switch {
		case c == nil && ino != 0:
			foreign++
			continue
		case (c == nil || unsent(c) > 0) && !t.d.opts.Ends:
			t.d.passes(o, "a connection that has brought data already waits to be accepted", "retry when the program has accepted it, or let the tree end with the dump")
			return
		case c == nil:
			continue // a preflight: it will be accepted for the dump
		}
		st.facts.Pending = append(st.facts.Pending, ino)
	}
	for _, x := range t.d.objects {
		if f := t.d.flights[x]; f != nil && f.listener == o {
			st.facts.Pending = append(st.facts.Pending, uint32(x.stat.Ino))
		}
	}
	switch {
	case foreign > 0 && !t.d.opts.SkipInFlight:
		t.d.passes(o, fmt.Sprintf("%d connections from outside the tree wait to be accepted", foreign), "retry when the program has accepted them, or give --skip-in-flight to leave them out")
	case foreign > 0:
		t.d.log.Warn("connections from outside the tree that wait to be accepted are left out", "listener", o.link, "connections", foreign)
	}
}

func (t *unixTree) finish(o *object, st *unixState) error {
	d, u, e := t.d, &st.diag, st.e
	if e.FilePerms != nil && !e.GetDeleted() && (u.state == stateListen || !u.hasPeer) {
		// Bound for itself, not by the listener that accepted it.
		o.path, o.create = o.facts.Path, true
	}
	if o.facts == nil {
		o.fact(o.id)
	}
	o.facts.Unix = st.facts
	if d.socketProxied(o) {
		return t.proxied(o, st)
	}
	if x, ok := d.outside(o.link); ok && (u.hasPeer || isDgram(uint32(u.typ))) {
		d.refuse(o, fmt.Sprintf("the socket is also held by pid %d (%s), fd %d, outside the tree", x.pid, x.comm, x.fd), "include that process in the tree")
		return nil
	}
	if isDgram(uint32(u.typ)) {
		if bad, err := hasError(int(o.file.Fd())); err != nil || bad {
			d.passes(o, "an error of the connection, whose peer is connected elsewhere, has not been reported yet", "retry when the program has seen it")
			return err
		}
	}
	peer := t.byIno[u.peer]
	switch l := t.waits[uint32(o.stat.Ino)]; {
	case u.state == stateListen || !u.hasPeer:
	case l != nil:
		e.Peer = proto.Uint32(uint32(l.stat.Ino))
		var err error
		if st.facts.Connector, err = d.holderCred(o); err != nil {
			return err
		}
		st.facts.PeerName, st.facts.Reset = nil, false
	case u.peer == 0 && !isDgram(uint32(u.typ)) && u.shutdown != 3:
		d.refuse(o, "the connection has not been accepted yet", "include the process that listens in the tree, or retry when it has accepted it")
	case u.peer != 0 && peer == nil && d.dry() && t.sending() && !t.held(u.peer):
		// A preflight does not look at what is in flight: the peer may be.
	case u.peer != 0 && peer == nil:
		return t.outer(o, st)
	case isDgram(uint32(u.typ)) && u.peer != 0:
		p := peer.state.(*unixState)
		if p.diag.peer != uint32(o.stat.Ino) && len(p.e.Name) == 0 {
			d.refuse(o, "it sends to an unnamed socket that is connected elsewhere", "bind that socket to a name")
		}
	}
	return t.queue(o, st)
}

// sending says whether descriptors are in the queues of the tree's sockets.
func (t *unixTree) sending() bool {
	for _, o := range t.byIno {
		for _, kv := range o.info.Other {
			if kv.Key == "scm_fds" && strings.TrimSpace(kv.Value) != "0" {
				return true
			}
		}
	}
	return false
}

// held says whether a process outside the tree has a socket.
func (t *unixTree) held(ino uint32) bool {
	_, ok := t.d.outside(fmt.Sprintf("socket:[%d]", ino))
	return ok
}

// queue emits what is in the queue of a socket.
func (t *unixTree) queue(o *object, st *unixState) error {
	fl := t.d.flights[o]
	if fl == nil || o.refused {
		return nil
	}
	switch fl.trouble {
	case noTrouble:
	case packetsAndError:
		t.d.passes(o, "packets, and an error of the connection, whose peer is closed, wait to be received", "retry when the program has received them, or let the tree end with the dump")
		return nil
	case readMark:
		t.d.passes(o, "it is at the mark of a byte out of band that was read", "retry when the program has read on")
		return nil
	case lostOOB:
		t.d.passes(o, "the place of its byte out of band cannot be told", "retry when the program has read it")
		return nil
	}
	for _, m := range fl.messages {
		if len(m.data) == 0 && len(m.rights) > 0 && st.e.GetType() == unix.SOCK_STREAM {
			t.d.passes(o, "descriptors without data are in its queue", "retry when the program has received them")
			return nil
		}
	}
	var err error
	st.facts.Messages, err = t.d.emitQueue(o)
	return err
}

// outer sees to a socket whose peer is outside the tree.
func (t *unixTree) outer(o *object, st *unixState) error {
	d, u, e := t.d, &st.diag, st.e
	o.peerIno = uint64(u.peer)
	if n, err := unix.IoctlGetInt(int(o.file.Fd()), unix.TIOCINQ); err == nil {
		o.queued = uint64(n)
	}
	if p, err := readUnixDiag(u.peer); err == nil {
		o.peer = unixText(p.name)
	}
	if _, ok := d.apart[uint32(o.stat.Ino)]; !ok {
		_, ok = d.apart[u.peer]
		if !ok {
			return t.named(o, st)
		}
	}
	// Whoever restores hands in a socket in its place, or it hangs up.
	st.facts.External, o.ext = true, true
	e.Peer = proto.Uint32(0)
	return t.queue(o, st)
}

// unixText is a name as people write it: a path without NUL behind it.
func unixText(name string) string {
	if name != "" && name[0] != 0 {
		return strings.TrimRight(name, "\x00")
	}
	return name
}

// named carries a datagram socket that is connected to a named one outside the
// tree, if that is asked for: it is connected to that name again.
func (t *unixTree) named(o *object, st *unixState) error {
	d, u := t.d, &st.diag
	p, err := readUnixDiag(u.peer)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	name := unixText(p.name)
	reachable := err == nil && isDgram(uint32(u.typ)) && name != "" && (name[0] == 0 || name[0] == '/')
	switch {
	case reachable && p.hasPeer:
		d.lacks(o, fmt.Sprintf("its peer, socket %d, is outside the tree and connected itself, so that it takes no other's datagrams", u.peer), "end that process, or include it in the tree")
	case reachable && !d.opts.ExtUnixSk:
		d.lacks(o, fmt.Sprintf("its peer, socket %d, is outside the tree, at %q", u.peer, name), "give --ext-unix-sk to connect it to that name again")
	case reachable:
		return t.extern(o, st, p, name)
	default:
		hint := "include the process that has the other end in the tree, let the program close the connection"
		if x, ok := d.outside(fmt.Sprintf("socket:[%d]", u.peer)); ok {
			hint = fmt.Sprintf("the other end belongs to pid %d (%s): include it in the tree, let the program close the connection", x.pid, x.comm)
		}
		d.lacks(o, fmt.Sprintf("its peer, socket %d, is outside the tree", u.peer), fmt.Sprintf("%s, or declare it external (--external unix[%d]), to hand in another socket or let it hang up", hint, o.stat.Ino))
	}
	return nil
}

// extern emits an entry for a socket outside the tree, once.
func (t *unixTree) extern(o *object, st *unixState, p unixDiag, name string) error {
	if t.d.dry() {
		return nil
	}
	if err := t.queue(o, st); err != nil || t.d.externs[st.diag.peer] {
		return err
	}
	t.d.externs[st.diag.peer] = true
	id := t.d.newID()
	zero := proto.Uint32(0)
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(id), Usk: &sk_unix.UnixSkEntry{
		Id: proto.Uint32(id), Ino: proto.Uint32(st.diag.peer), Type: proto.Uint32(uint32(p.typ)), State: proto.Uint32(uint32(p.state)),
		Flags: proto.Uint32(unix.O_RDWR), Uflags: proto.Uint32(uskExtern), Backlog: zero, Peer: zero,
		Fown: &fown.FownEntry{Uid: zero, Euid: zero, Signum: zero, PidType: zero, Pid: zero},
		Opts: &sk_opts.SkOptsEntry{SoSndbuf: zero, SoRcvbuf: zero, SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0),
			SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)},
		Name: []byte(name),
	}})
	return nil
}

// holderCred gives the credentials of the first process that has o.
func (d *Dumper) holderCred(o *object) (*image.Credentials, error) {
	p := o.first().proc
	st, err := procfs.ReadStatus(p.Pid)
	if err != nil {
		return nil, err
	}
	st = d.ids.Inside(st)
	return &image.Credentials{PID: uint32(p.VPid), UID: st.Uid[1], GID: st.Gid[1], Groups: st.Groups}, nil
}

// parseUnixKey parses CRIU's key of a unix socket, "unix[inode]", decimal.
func parseUnixKey(s string) (ino uint32, ok bool) {
	in, ok := strings.CutPrefix(s, "unix[")
	in, ok2 := strings.CutSuffix(in, "]")
	n, err := strconv.ParseUint(in, 10, 32)
	return uint32(n), ok && ok2 && err == nil
}

// checkUnixKeys refuses keys of unix sockets that match nothing.
func (d *Dumper) checkUnixKeys() {
	for ino := range d.apart {
		peer := ^uint32(0)
		if u, err := readUnixDiag(ino); err == nil && u.hasPeer {
			peer = u.peer
		}
		if !slices.ContainsFunc(d.objects, func(o *object) bool {
			return o.mode()&unix.S_IFMT == unix.S_IFSOCK && (o.stat.Ino == uint64(ino) || o.stat.Ino == uint64(peer))
		}) {
			d.refusal.Add(refuse.Problem{Key: fmt.Sprintf("unix[%d]", ino), Reason: "no process of the tree has this socket or one connected to it"})
		}
	}
}

// unixName is the name as the kernel has it: a path without NUL behind it.
func unixName(e *sk_unix.UnixSkEntry) []byte {
	n := e.GetName()
	if len(n) > 0 && n[0] != 0 {
		n = bytes.TrimRight(n, "\x00")
	}
	return n
}

// unixPath is the path of the file to which the socket is bound, which it meant
// below root; "" if it is not bound to one.
func unixPath(root string, e *sk_unix.UnixSkEntry) string {
	n := unixName(e)
	switch {
	case len(n) == 0 || n[0] == 0:
		return ""
	case n[0] == '/':
		return filepath.Join(root, string(n))
	}
	return filepath.Join(e.GetNameDir(), string(n))
}

// maxName is the size of sun_path.
const maxName = 108

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
	case len(name) > 0 && (len(name) > maxName || name[0] != 0 && bytes.IndexByte(name, 0) >= 0):
		return fmt.Errorf("%q is no name of a unix socket", name)
	case isExtern(e):
		return checkExtern(r, x)
	case e.GetOpts() == nil:
		return errors.New("its options are missing")
	case checkSockOpts(e.GetOpts()) != nil:
		return checkSockOpts(e.GetOpts())
	case len(name) > 0 && name[0] != 0 && name[0] != '/' && !e.GetDeleted() && !filepath.IsAbs(e.GetNameDir()):
		return fmt.Errorf("its name %q is relative, and the directory is missing", name)
	case e.GetState() == stateListen && (isDgram(e.GetType()) || e.GetPeer() != 0 || len(name) == 0):
		return errors.New("a listener has a name and no peer")
	}
	if err := r.checkUnixFacts(x); err != nil {
		return err
	}
	if e.GetPeer() == 0 || r.handed[fmt.Sprintf("socket:[%d]", e.GetIno())] != nil {
		return nil
	}
	p := r.byIno[e.GetPeer()]
	if p == nil {
		return fmt.Errorf("its peer, socket %d, is not in the images", e.GetPeer())
	}
	pe := p.entry.GetUsk()
	switch {
	case p == x:
		return errors.New("it is its own peer")
	case pe.GetType() != e.GetType():
		return fmt.Errorf("its peer, socket %d, is of another type", e.GetPeer())
	case pe.GetState() == stateListen: // it waits there to be accepted
	case pe.GetPeer() != e.GetIno() && !isDgram(e.GetType()):
		return fmt.Errorf("its peer, socket %d, has another peer", e.GetPeer())
	case pe.GetPeer() != e.GetIno() && len(unixName(pe)) == 0:
		return fmt.Errorf("its peer, socket %d, has no name", e.GetPeer())
	}
	return nil
}

// checkExtern validates the entry of a socket outside the tree.
func checkExtern(r *Restorer, x *description) error {
	e := x.entry.GetUsk()
	name := unixName(e)
	switch {
	case !isDgram(e.GetType()):
		return errors.New("only datagram sockets can be connected to one outside the tree again")
	case len(name) == 0 || name[0] != 0 && name[0] != '/':
		return fmt.Errorf("it is a socket outside the tree, and its name is %q", name)
	case len(x.at) > 0 || e.GetPeer() != 0:
		return errors.New("it is a socket outside the tree, but a process has it")
	case !r.opts.ExtUnixSk:
		return fmt.Errorf("a socket is connected to %q outside the tree: give --ext-unix-sk to connect it there again", name)
	}
	return nil
}

func (r *Restorer) checkUnixFacts(x *description) error {
	f := r.unixFacts(x)
	creds := []*image.Credentials{f.PeerCred, f.Connector}
	for i := range f.Messages {
		creds = append(creds, f.Messages[i].Cred)
	}
	for _, c := range creds {
		if err := checkCred(c); err != nil {
			return err
		}
	}
	switch {
	case len(f.PeerName) > maxName || len(f.PeerName) > 0 && f.PeerName[0] != 0 && bytes.IndexByte(f.PeerName, 0) >= 0:
		return fmt.Errorf("%q is no name of a unix socket", f.PeerName)
	case f.Root != "":
		if err := checkName(f.Root); err != nil {
			return err
		}
	}
	if len(f.Pending) > 0 && x.entry.GetUsk().GetState() != stateListen {
		return errors.New("connections wait at a socket that does not listen")
	}
	return nil
}
