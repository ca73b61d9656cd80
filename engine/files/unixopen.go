package files

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// unixOpener makes the unix sockets of a tree: first listeners and others that
// only have a name, then connections, accepted or waiting; then what the sockets hold.
type unixOpener struct {
	r     *Restorer
	boot  string // id of this boot
	todo  []*description
	byIno map[uint32]*description
	// sharing counts the sockets with a name; those beyond the listener were accepted.
	sharing   map[string]int
	byName    map[string]*description // datagram sockets
	listeners map[string]*description
	waiting   map[*description]*description // connections not accepted yet: client, or who is to be accepted → listener
	temporary map[string]*listening         // listeners made only to accept connections under a name
	ready     map[*description]*listening   // listeners of the tree
	at        map[*description]address      // of those with a name
	paths     map[*description]string       // socket files that were made
	closers   map[*description]*os.File     // far ends of connections whose peer is closed
	senders   map[string]*os.File           // of datagrams, by name
	tmpDirs   []string
}

// listening is a listener and whom those who connect see.
type listening struct {
	file *os.File
	at   address
	cred *image.Credentials
	set  bool
}

// manyPending is a backlog that no restore fills.
const manyPending = 1 << 20

func newUnixOpener(r *Restorer) *unixOpener {
	return &unixOpener{
		r: r, boot: bootID(), byIno: map[uint32]*description{}, sharing: map[string]int{}, byName: map[string]*description{}, listeners: map[string]*description{},
		waiting: map[*description]*description{}, temporary: map[string]*listening{}, ready: map[*description]*listening{}, at: map[*description]address{},
		paths: map[*description]string{}, closers: map[*description]*os.File{}, senders: map[string]*os.File{},
	}
}

func openUnix(r *Restorer, xs []*description) []error {
	u := newUnixOpener(r)
	defer u.close()
	var errs []error
	for _, x := range xs {
		e := x.entry.GetUsk()
		if isExtern(e) {
			continue
		}
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
		name := string(unixName(e))
		u.sharing[name]++
		if isDgram(e.GetType()) && name != "" {
			u.byName[name] = x
		}
		// Of two with one name, the one whose path leads nowhere is the older.
		if e.GetState() == stateListen && (u.listeners[name] == nil || !e.GetDeleted()) {
			u.listeners[name] = x
		}
		u.todo = append(u.todo, x)
	}
	if len(errs) > 0 {
		return errs
	}
	u.findWaiting()
	return u.each(u.alone, u.connected, u.wait, u.fill, u.send, u.settle)
}

func (u *unixOpener) each(steps ...func(*description) error) []error {
	var errs []error
	for _, step := range steps {
		for _, x := range u.todo {
			if err := step(x); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", u.r.who(x), err))
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
	for _, f := range u.senders {
		_ = f.Close()
	}
	for _, l := range u.temporary {
		if l != nil {
			_ = l.file.Close()
		}
	}
	for _, p := range u.tmpDirs {
		_ = os.RemoveAll(p)
	}
}

// unixFacts gives what is known of a socket beyond its entry.
func (r *Restorer) unixFacts(x *description) *image.UnixFacts {
	if x != nil {
		if f := r.facts[x.id]; f != nil && f.Unix != nil {
			return f.Unix
		}
	}
	return &image.UnixFacts{}
}

// findWaiting finds the connections that wait to be accepted.
func (u *unixOpener) findWaiting() {
	for _, l := range u.todo {
		if l.entry.GetUsk().GetState() != stateListen {
			continue
		}
		for _, ino := range u.r.unixFacts(l).Pending {
			if x := u.byIno[ino]; x != nil && x != l {
				u.waiting[x] = l
			}
		}
	}
	for _, x := range u.todo {
		// CRIU names the listener as the peer of a client that waits.
		if p := u.byIno[x.entry.GetUsk().GetPeer()]; p != nil && p.entry.GetUsk().GetState() == stateListen && u.waiting[x] == nil && !isDgram(x.entry.GetUsk().GetType()) {
			u.waiting[x] = p
			f := u.r.unixFacts(p)
			f.Pending = append(f.Pending, x.entry.GetUsk().GetIno())
			if u.r.facts[p.id] == nil {
				u.r.facts[p.id] = &image.FileFacts{ID: p.id}
			}
			u.r.facts[p.id].Unix = f
		}
	}
}

// embryo says whether x is what will be accepted: it has no file yet.
func (u *unixOpener) embryo(x *description) bool {
	l := u.waiting[x]
	return l != nil && x.entry.GetUsk().GetPeer() != l.entry.GetUsk().GetIno()
}

func mutual(a, b *description) bool {
	return b != nil && b.entry.GetUsk().GetPeer() == a.entry.GetUsk().GetIno() && a.entry.GetUsk().GetPeer() == b.entry.GetUsk().GetIno()
}

// paired says whether a socket is made by socketpair(2) or connect(2) with a far
// end, which may be gone.
func (u *unixOpener) paired(x *description) bool {
	e := x.entry.GetUsk()
	f := u.r.unixFacts(x)
	peer := u.byIno[e.GetPeer()]
	switch {
	case e.GetState() == stateListen || u.waiting[x] != nil || u.waiting[peer] != nil:
		return false
	case e.GetPeer() == 0 && isDgram(e.GetType()):
		// CRIU keeps the kernel's state of datagram sockets (dumpUnix). One that was
		// connected by name has no peer whose credentials it could know.
		return e.GetState() == stateEstablished && u.r.set.Facts != nil && (f.PeerCred != nil || len(f.PeerName) == 0)
	case e.GetPeer() == 0:
		return e.GetState() == stateEstablished
	case isDgram(e.GetType()) && u.r.set.Facts != nil && f.PeerCred == nil && peer != nil && len(unixName(peer.entry.GetUsk())) > 0:
		return false
	}
	return mutual(x, peer)
}

func socketFile(fd int) *os.File { return os.NewFile(uintptr(fd), "unix socket") }

func newUnix(typ uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return socketFile(fd), nil
}

// alone makes a socket that stands for itself.
func (u *unixOpener) alone(x *description) error {
	e := x.entry.GetUsk()
	if u.paired(x) || u.embryo(x) || u.awaited(x) {
		return nil
	}
	f, err := newUnix(e.GetType())
	if err != nil {
		return err
	}
	x.file = f
	if err := u.bind(x, f); err != nil {
		return err
	}
	if e.GetState() != stateListen {
		return nil
	}
	l := &listening{file: f, at: u.at[x]}
	u.ready[x] = l
	return u.listenSeen(l, u.r.unixFacts(x).PeerCred)
}

// awaited says whether x is the client of a connection whose other end is an
// embryo: it is made with that.
func (u *unixOpener) awaited(x *description) bool {
	p := u.byIno[x.entry.GetUsk().GetPeer()]
	return p != nil && u.embryo(p)
}

// listenSeen makes l listen so that those who connect see c.
func (u *unixOpener) listenSeen(l *listening, c *image.Credentials) error {
	if l.set && (c == nil || sameCred(l.cred, c)) {
		return nil
	}
	l.cred, l.set = c, true
	return u.listenAs(l.file, c, manyPending)
}

// address is where a socket can be reached: name, looked up in dir unless that is
// empty. aside: dir is a path of this process, not of the tree.
type address struct {
	dir   string
	name  []byte
	aside bool
}

func addressOf(path string) address {
	return address{dir: filepath.Dir(path), name: []byte(filepath.Base(path))}
}

func (u *unixOpener) reach(a address, fn func(name []byte) error) error {
	switch {
	case a.dir == "":
		return fn(a.name)
	case a.aside:
		return within("", a.dir, func() error { return fn(a.name) })
	}
	return u.r.inDir(a.dir, func() error { return fn(a.name) })
}

// dirOf opens the directory of an address.
func (u *unixOpener) dirOf(a address) (f *os.File, err error) {
	open := func() error {
		f, err = openPath(a.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		return err
	}
	if a.aside {
		return f, open()
	}
	return f, u.r.inRoot(open)
}

// within runs fn with a root or a working directory of its own, paths of this process.
func within(root, dir string, fn func() error) error {
	c := make(chan error)
	go func() {
		// Not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		c <- func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if root != "" {
				if err := unix.Chroot(root); err != nil {
					return &os.PathError{Op: "chroot", Path: root, Err: err}
				}
				dir = "/"
			}
			if err := unix.Chdir(dir); err != nil {
				return &os.PathError{Op: "chdir", Path: dir, Err: err}
			}
			return fn()
		}()
	}()
	return <-c
}

// bind gives a socket its name. A path must be free, but for the socket file that
// the tree itself left behind.
func (u *unixOpener) bind(x *description, f *os.File) error {
	e := x.entry.GetUsk()
	name := unixName(e)
	if len(name) == 0 {
		return nil
	}
	root := u.r.unixFacts(x).Root
	path := unixPath(root, e)
	if path != "" && e.GetDeleted() {
		at, err := u.bindAside(f, name)
		u.at[x] = at
		return err
	}
	do := func() error { return bindName(f, name) }
	if path == "" {
		u.at[x] = address{name: name}
		return do()
	}
	err := u.r.inRoot(func() error { return u.vacate(x, path) })
	switch {
	case err != nil:
	case name[0] != '/':
		err = u.r.inDir(e.GetNameDir(), do)
	case root != "":
		err = within(root, "", do)
	default:
		err = u.r.inRoot(do)
	}
	if err != nil {
		return err
	}
	u.at[x], u.paths[x] = addressOf(path), path
	if u.r.opts.Root == nil {
		u.r.made = append(u.r.made, path)
	}
	return nil
}

func bindName(f *os.File, name []byte) error {
	if err := sys.BindUnix(int(f.Fd()), name); err != nil {
		return fmt.Errorf("bind it to %q: %w", name, err)
	}
	return nil
}

// bindAside gives f a name whose path leads elsewhere or nowhere: in a root or
// working directory of its own. Abstract names are bound as they are.
func (u *unixOpener) bindAside(f *os.File, name []byte) (address, error) {
	if name[0] == 0 {
		return address{name: name}, bindName(f, name)
	}
	tmp, err := os.MkdirTemp("", "godwit-unix")
	if err != nil {
		return address{}, err
	}
	u.tmpDirs = append(u.tmpDirs, tmp)
	start, root := tmp, tmp
	if name[0] != '/' {
		start, root = tmp+strings.Repeat("/d", strings.Count(string(name), "..")), ""
	}
	if err := os.MkdirAll(start, 0o700); err != nil {
		return address{}, err
	}
	at := start
	parts := strings.Split(string(name), "/")
	for _, c := range parts[:len(parts)-1] {
		at = filepath.Join(at, c)
		if !strings.HasPrefix(at+"/", tmp+"/") {
			at = tmp // above the root is the root
		}
		if err := os.MkdirAll(at, 0o700); err != nil {
			return address{}, err
		}
	}
	if err := within(root, start, func() error { return bindName(f, name) }); err != nil {
		return address{}, err
	}
	return address{dir: at, name: []byte(parts[len(parts)-1]), aside: true}, nil
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
		u.r.set.Facts.BootID != u.boot || u.answered(path, x.entry.GetUsk().GetType()) {
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
func (u *unixOpener) answered(path string, typ uint32) bool {
	f, err := newUnix(typ)
	if err != nil {
		return true
	}
	defer func() { _ = f.Close() }()
	at := addressOf(path)
	err = u.r.inDir(at.dir, func() error { return sys.ConnectUnix(int(f.Fd()), at.name) })
	return !errors.Is(err, unix.ECONNREFUSED)
}

// connected makes both ends of a connection, or the one that is left.
func (u *unixOpener) connected(x *description) error {
	if !u.paired(x) || x.file != nil {
		return nil // made with its peer
	}
	peer := u.byIno[x.entry.GetUsk().GetPeer()]
	c := u.plan(x, peer)
	near, far, err := u.connection(c)
	if err != nil {
		return err
	}
	for _, end := range []struct {
		x    *description
		f    *os.File
		left *description
	}{{c.accepted, near, c.client}, {c.client, far, c.accepted}} {
		if end.x != nil {
			end.x.file = end.f
		} else {
			u.closers[end.left] = end.f
		}
	}
	return nil
}

// link is a connection to be made. One of its ends may be closed, nil.
type link struct {
	typ              uint32
	accepted, client *description
	acceptedName     []byte
	clientName       []byte
	// connector is whom the accepted end sees, listener whom the client sees.
	connector, listener *image.Credentials
}

// plan finds out which end was accepted: the one with the name of a listener.
func (u *unixOpener) plan(x, peer *description) link {
	e, f := x.entry.GetUsk(), u.r.unixFacts(x)
	c := link{typ: e.GetType(), accepted: x, client: peer, acceptedName: unixName(e), clientName: f.PeerName}
	if peer != nil {
		c.clientName = unixName(peer.entry.GetUsk())
	}
	swap := u.rank(c.clientName, c.typ) > u.rank(c.acceptedName, c.typ)
	if swap {
		c.accepted, c.client, c.acceptedName, c.clientName = c.client, c.accepted, c.clientName, c.acceptedName
	}
	c.connector, c.listener = u.r.unixFacts(c.accepted).PeerCred, u.r.unixFacts(c.client).PeerCred
	if c.accepted == nil {
		c.connector = c.listener
	}
	if c.client == nil {
		c.listener = c.connector
	}
	return c
}

// rank tells how likely a name is that of an accepted end.
func (u *unixOpener) rank(name []byte, typ uint32) int {
	l := u.listeners[string(name)]
	switch {
	case len(name) == 0 || isDgram(typ):
		return 0
	case l != nil && l.entry.GetUsk().GetType() == typ:
		return 1000000
	}
	return max(1, u.sharing[string(name)])
}

func (u *unixOpener) connection(c link) (near, far *os.File, err error) {
	l, err := u.listenerOf(c)
	if err != nil {
		u.r.log.Warn("connection of a unix socket restored without its name", "name", fmt.Sprintf("%q", c.acceptedName), "error", err)
		c.acceptedName = nil
	}
	if l != nil {
		return u.accept(l, c)
	}
	if near, far, err = u.pairAs(c.typ, c.connector); err != nil {
		return nil, nil, err
	}
	for _, end := range []struct {
		x    *description
		f    *os.File
		name []byte
	}{{c.accepted, near, c.acceptedName}, {c.client, far, c.clientName}} {
		if err := u.bindEnd(end.x, end.f, end.name); err != nil {
			return nil, nil, errors.Join(err, near.Close(), far.Close())
		}
	}
	return near, far, nil
}

// bindEnd names an end of a connection, which works without it: the name was
// perhaps that of a listener outside the tree. x is nil for an end that is closed.
func (u *unixOpener) bindEnd(x *description, f *os.File, name []byte) error {
	if len(name) == 0 {
		return nil
	}
	var err error
	if x != nil {
		if err = u.bind(x, f); err == nil {
			return nil
		}
		if isDgram(x.entry.GetUsk().GetType()) {
			return err
		}
	}
	at, aerr := u.bindAside(f, name)
	if aerr != nil {
		u.r.log.Warn("connection of a unix socket restored without its name", "name", fmt.Sprintf("%q", name), "error", errors.Join(err, aerr))
	} else if x != nil {
		u.at[x] = at
	}
	return nil
}

// listenerOf finds, or makes, a listener at the name of the accepted end of a
// stream connection. nil: it needs none.
func (u *unixOpener) listenerOf(c link) (*listening, error) {
	name := c.acceptedName
	if len(name) == 0 || isDgram(c.typ) {
		return nil, nil
	}
	if x := u.listeners[string(name)]; x != nil && x.entry.GetUsk().GetType() == c.typ {
		return u.ready[x], nil
	}
	key := fmt.Sprintf("%d %s", c.typ, name)
	if l := u.temporary[key]; l != nil {
		return l, nil
	}
	if name[0] == 0 && u.sharing[string(name)] < 2 && c.accepted != nil && sameCred(c.connector, c.listener) {
		return nil, nil // as socketpair(2) and bind(2) make it
	}
	f, err := newUnix(c.typ)
	if err != nil {
		return nil, err
	}
	at, err := u.bindAside(f, name)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	u.temporary[key] = &listening{file: f, at: at}
	return u.temporary[key], nil
}

// accept connects a new socket to l and accepts it there. Strangers may connect
// to a name at any time: the token tells which connection is ours. Strangers'
// connections are closed, as if the listener had not been there yet.
func (u *unixOpener) accept(l *listening, c link) (near, far *os.File, err error) {
	if far, err = u.connectTo(l, c); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = far.Close()
		}
	}()
	token := make([]byte, 16)
	_, _ = rand.Read(token) // never fails
	if _, err = unix.SendmsgN(int(far.Fd()), token, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err != nil {
		return nil, nil, os.NewSyscallError("sendmsg", err)
	}
	if near, err = acceptToken(l.file, token); err != nil {
		return nil, nil, fmt.Errorf("accept our own connection to %q: %w", l.at.name, err)
	}
	return near, far, nil
}

// connectTo makes the client of a connection to l.
func (u *unixOpener) connectTo(l *listening, c link) (_ *os.File, err error) {
	far, err := newUnix(c.typ)
	if err != nil {
		return nil, err
	}
	if err = u.bindEnd(c.client, far, c.clientName); err == nil {
		err = u.listenSeen(l, c.listener)
	}
	if err == nil {
		err = u.connectAs(far, c.connector, l.at)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to %q: %w", c.acceptedName, err), far.Close())
	}
	return far, nil
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

// wait connects those who wait at a listener, in their order.
func (u *unixOpener) wait(x *description) error {
	l := u.ready[x]
	if l == nil {
		return nil
	}
	for _, ino := range u.r.unixFacts(x).Pending {
		w := u.byIno[ino]
		if w == nil || u.waiting[w] != x {
			return fmt.Errorf("socket %d, which waits to be accepted, is not there", ino)
		}
		e := w.entry.GetUsk()
		c := link{typ: e.GetType(), client: w, acceptedName: unixName(x.entry.GetUsk()), clientName: unixName(e)}
		if u.embryo(w) {
			f := u.r.unixFacts(w)
			c.client, c.clientName, c.connector = u.byIno[e.GetPeer()], f.PeerName, f.PeerCred
			if c.client != nil {
				c.clientName = unixName(c.client.entry.GetUsk())
			}
		} else {
			c.connector = u.r.unixFacts(w).Connector
		}
		c.listener = u.r.unixFacts(c.client).PeerCred
		if c.client == nil || c.client.file == nil {
			f, err := u.connectTo(l, c)
			if err != nil {
				return err
			}
			if c.client == nil {
				u.closers[w] = f
			} else {
				c.client.file = f
			}
			continue
		}
		if err := u.listenSeen(l, c.listener); err != nil {
			return err
		}
		if err := u.connectAs(c.client.file, c.connector, l.at); err != nil {
			return err
		}
	}
	return nil
}

// fill queues again what a socket had not received.
func (u *unixOpener) fill(x *description) error {
	ms := u.r.queues[x.id]
	if len(ms) == 0 {
		return nil
	}
	for i := range ms {
		from, to, err := u.sender(x, &ms[i])
		if err == nil {
			err = u.queue(from, to, &ms[i], x)
		}
		if err != nil {
			return fmt.Errorf("queue message %d of %d, %d bytes: %w", i+1, len(ms), len(ms[i].data), err)
		}
	}
	return nil
}

// sender finds whose message it is to be: the socket, and the address to which it
// is sent; nil: it is sent to the peer.
func (u *unixOpener) sender(x *description, m *message) (*os.File, *address, error) {
	e := x.entry.GetUsk()
	peer := u.byIno[e.GetPeer()]
	switch {
	case (u.paired(x) || u.embryo(x)) && peer != nil:
		return peer.file, nil, nil
	case u.paired(x) || u.embryo(x):
		return u.closers[x], nil, nil
	case !isDgram(e.GetType()) || len(unixName(e)) == 0:
		return nil, nil, errors.New("nobody could have sent it")
	}
	to := u.at[x]
	if p := u.byName[m.from]; p != nil && p.file != nil {
		return p.file, &to, nil
	}
	if m.from == "" && peer != nil && len(unixName(peer.entry.GetUsk())) == 0 {
		return peer.file, &to, nil
	}
	if u.senders[m.from] == nil {
		f, err := newUnix(e.GetType())
		if err != nil {
			return nil, nil, err
		}
		u.senders[m.from] = f
		if m.from != "" {
			if _, err := u.bindAside(f, []byte(m.from)); err != nil {
				u.r.log.Warn("a datagram that waits is shown without the name of its sender", "file", u.r.who(x), "name", fmt.Sprintf("%q", m.from), "error", err)
			}
		}
	}
	return u.senders[m.from], &to, nil
}

// queue sends a message with everything that came with it.
func (u *unixOpener) queue(from *os.File, to *address, m *message, x *description) error {
	// Room enough at the sender, whose own limit settle sets.
	room, err := unix.GetsockoptInt(int(from.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return os.NewSyscallError("getsockopt SO_SNDBUF", err)
	}
	if used, err := unix.IoctlGetInt(int(from.Fd()), unix.TIOCOUTQ); err == nil && room < 1<<29 {
		if want := 2*(used+4*len(m.data)) + 1<<16; want > room {
			if err := unix.SetsockoptInt(int(from.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, min(want, 1<<29)); err != nil {
				return os.NewSyscallError("setsockopt SO_SNDBUFFORCE", err)
			}
		}
	}
	control, err := u.control(m)
	if err != nil {
		return err
	}
	flags := unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	if m.oob {
		flags |= unix.MSG_OOB
	}
	if to != nil {
		err := u.reach(*to, func(name []byte) error {
			_, err := sys.SendmsgUnix(int(from.Fd()), m.data, control, flags, name)
			return err
		})
		if errors.Is(err, unix.EAGAIN) {
			err = fmt.Errorf("%w: so many datagrams may wait here only with a higher sysctl net.unix.max_dgram_qlen", err)
		}
		return err
	}
	for p := m.data; ; control = nil {
		n, err := sys.SendmsgUnix(int(from.Fd()), p, control, flags, nil)
		if err != nil {
			return err
		}
		if p = p[n:]; x.entry.GetUsk().GetType() != unix.SOCK_STREAM || len(p) == 0 {
			return nil
		}
	}
}

// control makes the control messages: descriptors, and the credentials of a
// sender that the receiver had asked for.
func (u *unixOpener) control(m *message) ([]byte, error) {
	var out []byte
	if len(m.rights) > 0 {
		fds := make([]int, 0, len(m.rights))
		for _, id := range m.rights {
			y := u.r.byID[id]
			if y == nil || y.file == nil {
				return nil, fmt.Errorf("file %d, which it carries, is not open", id)
			}
			fds = append(fds, int(y.file.Fd()))
		}
		out = append(out, unix.UnixRights(fds...)...)
	}
	if m.cred != nil {
		c := &unix.Ucred{Pid: int32(os.Getpid()), Uid: m.cred.UID, Gid: m.cred.GID}
		a, err := u.actor(m.cred)
		if err != nil {
			return nil, err
		}
		if a != nil {
			c.Pid = int32(a.Pid())
		}
		out = append(out, unix.UnixCredentials(c)...)
	}
	return out, nil
}

// send connects datagram sockets that send to a name.
func (u *unixOpener) send(x *description) error {
	e := x.entry.GetUsk()
	if !isDgram(e.GetType()) || u.paired(x) || x.file == nil {
		return nil
	}
	connect := func(to address) error {
		err := u.reach(to, func(name []byte) error { return sys.ConnectUnix(int(x.file.Fd()), name) })
		if err != nil {
			return fmt.Errorf("connect it to %q: %w", to.name, err)
		}
		return nil
	}
	f := u.r.unixFacts(x)
	if peer := u.byIno[e.GetPeer()]; peer != nil {
		return connect(u.at[peer])
	}
	if ext := u.r.byIno[e.GetPeer()]; e.GetPeer() != 0 && ext != nil && isExtern(ext.entry.GetUsk()) {
		name := unixName(ext.entry.GetUsk())
		if name[0] == '/' {
			return connect(addressOf(string(name)))
		}
		return connect(address{name: name})
	}
	if e.GetPeer() != 0 || e.GetState() != stateEstablished || len(f.PeerName) == 0 {
		return nil
	}
	// The peer is closed.
	dead, err := newUnix(unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	defer func() { _ = dead.Close() }()
	at, err := u.bindAside(dead, f.PeerName)
	if err != nil {
		u.r.log.Warn("a datagram socket whose peer is closed is not connected any more", "file", u.r.who(x), "peer", fmt.Sprintf("%q", f.PeerName), "error", err)
		return nil
	}
	return connect(at)
}

// settle gives a socket its options, permissions and flags, and closes what was closed.
func (u *unixOpener) settle(x *description) error {
	if x.file == nil {
		if f := u.closers[x]; f != nil && u.embryo(x) { // its client is gone
			delete(u.closers, x)
			return f.Close()
		}
		return nil
	}
	e, f := x.entry.GetUsk(), u.r.unixFacts(x)
	fd := int(x.file.Fd())
	shutdown := e.GetShutdown()
	if far := u.closers[x]; far != nil {
		delete(u.closers, x)
		if keep := u.r.far(fmt.Sprintf("socket:[%d]", e.GetIno())); keep != nil {
			keep.File = far
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				return os.NewSyscallError("fstat", err)
			}
			keep.Key = fmt.Sprintf("unix[%d]", st.Ino)
			// What the other end does is for the one who has it to repeat, after all
			// that is still to come.
			return u.settleFar(x, shutdown&^sk_opts.SkShutdown_READ)
		}
		if f.Reset { // it is closed with data that it has not read
			if err := unix.Sendto(fd, []byte{0}, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil); err != nil {
				return os.NewSyscallError("send", err)
			}
		}
		if err := far.Close(); err != nil {
			return err
		}
	}
	if err := u.r.restoreSockOpts(x, e.GetOpts(), nil); err != nil {
		return err
	}
	if err := shutdownSocket(fd, shutdown); err != nil {
		return err
	}
	if e.GetState() == stateListen {
		if err := u.listenAs(x.file, f.PeerCred, int(min(e.GetBacklog(), 1<<30))); err != nil {
			return err
		}
	}
	if err := u.settlePath(x); err != nil {
		return err
	}
	return setStatus(x.file, e.GetFlags())
}

// settleFar is settle for a connection whose other end somebody keeps.
func (u *unixOpener) settleFar(x *description, shutdown sk_opts.SkShutdown) error {
	e := x.entry.GetUsk()
	if err := u.r.restoreSockOpts(x, e.GetOpts(), nil); err != nil {
		return err
	}
	if err := shutdownSocket(int(x.file.Fd()), shutdown); err != nil {
		return err
	}
	return setStatus(x.file, e.GetFlags())
}

func shutdownSocket(fd int, s sk_opts.SkShutdown) error {
	how, ok := map[sk_opts.SkShutdown]int{sk_opts.SkShutdown_READ: unix.SHUT_RD, sk_opts.SkShutdown_WRITE: unix.SHUT_WR, sk_opts.SkShutdown_BOTH: unix.SHUT_RDWR}[s]
	if !ok {
		return nil
	}
	if err := unix.Shutdown(fd, how); err != nil && !errors.Is(err, unix.ENOTCONN) {
		return os.NewSyscallError("shutdown", err)
	}
	return nil
}

// settlePath gives the socket file that x made its owner and mode.
func (u *unixOpener) settlePath(x *description) error {
	path, p := u.paths[x], x.entry.GetUsk().GetFilePerms()
	if path == "" || p == nil {
		return nil
	}
	return u.r.inRoot(func() error {
		if err := unix.Lchown(path, int(p.GetUid()), int(p.GetGid())); err != nil {
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
		if err := unix.Chmod(path, p.GetMode()&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: path, Err: err}
		}
		return nil
	})
}

func (r *Restorer) listenCalls(x *description) []*ptrace.Call {
	e := x.entry.GetUsk()
	if e.GetState() != stateListen || r.opts.Actor != nil && r.unixFacts(x).PeerCred != nil {
		return nil
	}
	// Once more, by the process: its credentials are what those who connect see
	// (SO_PEERCRED, net/unix/af_unix.c unix_listen).
	return []*ptrace.Call{ptrace.NewCall(fmt.Sprintf("listen on fd %d", x.at[0].fd), unix.SYS_LISTEN,
		ptrace.Int(x.at[0].fd), ptrace.Int(min(e.GetBacklog(), 1<<30)))}
}

// uskExtern marks the entry of a socket outside the tree (UnixSkEntry.uflags).
const uskExtern = 1

func isExtern(e *sk_unix.UnixSkEntry) bool { return e.GetUflags()&uskExtern != 0 }
