package files

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-packet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// message is one datagram, or a piece of a stream.
type message struct {
	data   []byte
	from   string // name of the sender, if it has one
	rights []uint32
	cred   *image.Credentials
	oob    bool
}

// peeked is a message as a dump finds it: fds are duplicates of this process.
type peeked struct {
	message
	fds []int
}

// flight is what the queue of a unix socket holds.
type flight struct {
	messages []message
	listener *object // of a connection that was not accepted yet
	trouble  trouble
	reset    bool // an error waited to be reported
}

// trouble is why a queue cannot be carried.
type trouble int

const (
	noTrouble trouble = iota
	packetsAndError
	readMark
	lostOOB
)

// maxMessages bounds one socket's queue; its buffers do so long before.
const maxMessages = 1 << 20

// noID is how the kernel shows the ids of a sender that are not recorded
// (overflowuid, kernel/sys.c).
const noID = 65534

// findInFlight reads the queues of all unix sockets. Files that were sent and not
// received become objects, and what is in the queues of those that are sockets is
// read, too. A preflight does not: the peek offset is one for all who read.
func (d *Dumper) findInFlight() error {
	if d.dry() {
		return nil
	}
	for i := 0; i < len(d.objects); i++ {
		if err := d.lookInside(d.objects[i], d.takePending, nil); err != nil {
			return err
		}
	}
	for i := 0; i < len(d.objects); i++ {
		if err := d.lookInside(d.objects[i], nil, d.readFlight); err != nil {
			return err
		}
	}
	return nil
}

// lookInside calls one function for a listening unix socket, the other for another.
func (d *Dumper) lookInside(o *object, listening, other func(*object) error) error {
	if o.mode()&unix.S_IFMT != unix.S_IFSOCK || o.isPath() {
		return nil
	}
	if err := d.need(o); err != nil {
		return err
	}
	defer d.park(o)
	if !kindUnix.takes(d, o) {
		return nil
	}
	fn := other
	if acceptsConns(o) {
		fn = listening
	}
	if fn == nil {
		return nil
	}
	if err := fn(o); err != nil {
		return fmt.Errorf("%s: %w", o.link, err)
	}
	return nil
}

func acceptsConns(o *object) bool {
	n, err := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && n != 0
}

func (d *Dumper) readFlight(o *object) error {
	fl := d.flights[o]
	if fl == nil {
		fl = &flight{}
		d.flights[o] = fl
	}
	fd := int(o.file.Fd())
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt SO_TYPE", err)
	}
	if d.buf == nil {
		d.buf = make([]byte, 256<<10)
	}
	p := &peeker{fd: fd, stream: typ == unix.SOCK_STREAM, buf: d.buf, oobAt: -1}
	if fl.reset, err = hasError(fd); err != nil {
		return err
	}
	if fl.reset && typ == unix.SOCK_DGRAM {
		return nil // refused
	}
	if fl.reset && !p.stream {
		// Whoever looks for packets takes the error away.
		if n, err := unix.IoctlGetInt(fd, unix.SIOCINQ); err != nil || n == 0 {
			return os.NewSyscallError("ioctl SIOCINQ", err)
		}
		if !d.opts.Ends {
			fl.trouble = packetsAndError
			return nil
		}
	}
	ms, err := p.all()
	d.buf = p.buf
	fl.trouble = p.trouble
	if err == nil && !p.stream {
		var all []peeked
		if all, err = d.withHiddenUnix(o, fd, ms); err == nil && !o.refused {
			ms = all
		}
	}
	for i := range ms {
		m := &ms[i]
		for j, n := range m.fds {
			x, aerr := d.addInFlight(o, n)
			if aerr != nil {
				for _, n := range m.fds[j+1:] {
					_ = unix.Close(n)
				}
				err = errors.Join(err, fmt.Errorf("look at a descriptor in flight: %w", aerr))
				break
			}
			m.rights = append(m.rights, x.id)
		}
		if m.cred != nil {
			m.cred.PID = d.vpidOf(m.cred.PID)
		}
		fl.messages = append(fl.messages, m.message)
	}
	return err
}

// addInFlight takes up a description that carrier brings; n is a duplicate, which
// becomes the object's.
func (d *Dumper) addInFlight(carrier *object, n int) (*object, error) {
	o := &object{holders: []holder{{proc: carrier.first().proc, fd: -1, role: "in flight"}}, inFlight: true}
	o.file = hold(n, "descriptor in flight")
	keep := false
	defer func() {
		if !keep {
			release(o.file)
		}
	}()
	var err error
	if err := unix.Fstat(n, &o.stat); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	if o.flags, err = unix.FcntlInt(uintptr(n), unix.F_GETFL, 0); err != nil {
		return nil, os.NewSyscallError("fcntl F_GETFL", err)
	}
	if o.info, err = procfs.ReadFdinfo(os.Getpid(), n); err != nil {
		return nil, err
	}
	if o.link, err = procfs.FdLink(os.Getpid(), n); err != nil {
		return nil, err
	}
	have, err := d.identify(o)
	if err != nil {
		return nil, err
	}
	if keep = have == o; keep {
		d.holding++
	}
	if keep && len(o.info.Locks) > 0 {
		d.passes(o, "it is locked, and in flight in a unix socket", "retry when the program has received it")
	}
	return have, nil
}

// vpidOf translates a pid of this process's namespace into the tree's; 0 if that
// cannot be told.
func (d *Dumper) vpidOf(pid uint32) uint32 {
	if v, ok := d.vpid[int(pid)]; ok {
		return uint32(v)
	}
	if st, err := procfs.ReadStatus(int(pid)); err == nil && len(st.NSpid) > 1 {
		return uint32(st.NSPid())
	}
	for p, v := range d.vpid {
		if p != v {
			return 0 // of a process that has ended, in a namespace of the tree's own
		}
	}
	return pid
}

// takePending accepts the connections that wait at a listener, if there is
// something about one that only that brings to light: data, or a client that is
// gone. Preconditions: the tree does not run on.
func (d *Dumper) takePending(o *object) error {
	u, err := readUnixDiag(uint32(o.stat.Ino))
	if err != nil || len(u.pending) == 0 || !d.opts.Ends {
		return nil // dumpUnix tells
	}
	ours := map[uint32]*object{}
	for _, c := range d.objects {
		if c.mode()&unix.S_IFMT == unix.S_IFSOCK {
			ours[uint32(c.stat.Ino)] = c
		}
	}
	need := false
	for _, ino := range u.pending {
		c := ours[ino]
		if c == nil && ino != 0 && !d.opts.SkipInFlight {
			return nil // refused for that
		}
		if c != nil {
			if err := d.need(c); err != nil {
				return err
			}
		}
		need = need || ino == 0 || c != nil && unsent(c) > 0
	}
	if !need || !d.rehearse() {
		return nil
	}
	d.log.Info("connections that wait to be accepted are taken for their data", "listener", o.link, "connections", len(u.pending))
	for _, ino := range u.pending {
		p := []unix.PollFd{{Fd: int32(o.file.Fd()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 {
			return fmt.Errorf("accept a connection that waits: %w", errors.Join(err, unix.EAGAIN))
		}
		fd, _, err := unix.Accept4(int(o.file.Fd()), unix.SOCK_CLOEXEC)
		if err != nil {
			return os.NewSyscallError("accept4", err)
		}
		if ino != 0 && ours[ino] == nil {
			_ = unix.Close(fd)
			continue
		}
		x, err := d.addInFlight(o, fd)
		if err != nil {
			return err
		}
		d.flights[x] = &flight{listener: o}
		d.accepted++
	}
	return nil
}

// TakeAccepted gives the number of connections that were accepted for their data,
// and which the tree lacks if it runs on after all.
func (d *Dumper) TakeAccepted() LostConnections {
	n := d.accepted
	d.accepted = 0
	return n
}

// LostConnections is how many connections waited to be accepted and are lost: no
// socket can be put back where it waited.
type LostConnections int

func (n LostConnections) Error() string {
	return fmt.Sprintf("connections of unix sockets that waited to be accepted, %d of them, were accepted for what was in them, and are lost to the tree, which runs on: their clients find them closed", int(n))
}

// RunsOn says that the tree is refused for other reasons, so that it will run on.
func (d *Dumper) RunsOn() { d.opts.Ends = false }

// rehearse says whether nothing is refused, as far as that can be told: then the
// tree ends with this dump.
func (d *Dumper) rehearse() bool {
	r := NewDumper(nil, d.opts, nil)
	defer func() { _ = r.Close() }()
	r.root, r.inside, r.vpids, r.vpid = d.root, maps.Clone(d.inside), maps.Clone(d.vpids), maps.Clone(d.vpid)
	for _, id := range d.order {
		if r.AddProcess(*d.tables[id]) != nil {
			return false
		}
	}
	return r.Finish() == nil && len(r.Refusal()) == 0
}

// unsent is how much memory the receiver's queue takes of what o sent.
func unsent(o *object) int {
	n, err := unix.IoctlGetInt(int(o.file.Fd()), unix.TIOCOUTQ)
	if err != nil {
		return 0
	}
	return n
}

// peeker reads the queue of a socket without taking anything out.
type peeker struct {
	fd      int
	stream  bool
	buf     []byte
	left    int // of a stream: bytes behind the peek offset
	oobAt   int // offset of the byte out of band in a stream, -1: none
	trouble trouble
}

func (p *peeker) set(opt, v int) error {
	if err := unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, opt, v); err != nil {
		return fmt.Errorf("option %d: %w", opt, os.NewSyscallError("setsockopt", err))
	}
	return nil
}

// all gives every message. The socket's options are as before afterwards.
func (p *peeker) all() (out []peeked, err error) {
	// With the credentials; without a new pidfd and a label each time.
	for _, o := range []struct{ opt, want int }{
		{unix.SO_PEEK_OFF, 0}, {unix.SO_PASSCRED, 1}, {unix.SO_PASSPIDFD, 0}, {unix.SO_PASSSEC, 0}, {unix.SO_PASSRIGHTS, 1}, {unix.SO_OOBINLINE, 1},
	} {
		old, ok, err := getOpt(p.fd, unix.SOL_SOCKET, o.opt)
		if err != nil {
			return nil, err
		}
		if !ok || old == o.want {
			continue
		}
		if err := p.set(o.opt, o.want); err != nil {
			return nil, err
		}
		defer func() { _ = p.set(o.opt, old) }()
	}
	defer func() { // nobody takes them
		if err != nil {
			for _, m := range out {
				closeAll(m.fds)
			}
		}
	}()
	if p.stream {
		if err := p.findOOB(); err != nil {
			return nil, err
		}
	}
	for {
		longest := 0
		if out, longest, err = p.sweep(); err != nil || p.stream || longest <= len(p.buf) {
			return out, err
		}
		for _, m := range out { // a datagram did not fit: once more
			closeAll(m.fds)
		}
		p.buf = make([]byte, longest)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

func (p *peeker) sweep() (out []peeked, longest int, err error) {
	if err := p.begin(); err != nil {
		return nil, 0, err
	}
	at := 0
	for len(out) < maxMessages {
		m, n, end, err := p.next(len(p.buf))
		if err == nil && end && !p.stream {
			out, err = p.emptyHead(out)
		}
		if err != nil || end {
			return out, longest, err
		}
		longest = max(longest, n)
		if !p.stream {
			out = append(out, m)
			continue
		}
		parts, err := p.split(m, at)
		if err != nil {
			closeAll(m.fds)
			return out, 0, err
		}
		out = append(out, parts...)
		at += n
	}
	return out, 0, fmt.Errorf("more than %d messages are queued", maxMessages)
}

// emptyHead sees to an empty datagram at the head of the queue: an offset passes
// over it once it was peeked at (net/core/datagram.c), by an earlier dump perhaps.
func (p *peeker) emptyHead(out []peeked) ([]peeked, error) {
	if len(out) > 0 && len(out[0].data) == 0 {
		return out, nil
	}
	if err := p.set(unix.SO_PEEK_OFF, -1); err != nil {
		return out, err
	}
	m, n, end, err := p.next(len(p.buf))
	if err != nil || end || n > 0 {
		closeAll(m.fds)
		return out, err
	}
	return slices.Insert(out, 0, m), nil
}

// begin sets the peek offset to the head of the queue.
func (p *peeker) begin() (err error) {
	if p.stream {
		if p.left, err = unix.IoctlGetInt(p.fd, unix.SIOCINQ); errors.Is(err, unix.EINVAL) {
			p.left, err = 0, nil // never connected
		}
		if err != nil {
			return os.NewSyscallError("ioctl SIOCINQ", err)
		}
	}
	return p.set(unix.SO_PEEK_OFF, 0)
}

// hasError says whether an error waits to be reported by a socket.
func hasError(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd)}}
	if _, err := unix.Poll(p, 0); err != nil {
		return false, os.NewSyscallError("poll", err)
	}
	return p[0].Revents&unix.POLLERR != 0, nil
}

// next peeks at what comes at the peek offset; n is the length of a datagram, of
// which m has what fits.
func (p *peeker) next(limit int) (m peeked, n int, end bool, err error) {
	if p.stream {
		// At the end an error would be taken away.
		if limit = min(limit, p.left); limit == 0 {
			return m, 0, true, nil
		}
	}
	oob := make([]byte, 4096)
	n, oobn, flags, from, err := sys.RecvmsgUnix(p.fd, p.buf[:limit], oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC|unix.MSG_CMSG_CLOEXEC)
	switch {
	case errors.Is(err, unix.ECONNRESET) && !p.stream:
		return p.next(limit)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTCONN):
		return m, 0, true, nil // empty, or never connected
	case err != nil:
		return m, 0, false, err
	}
	if err := m.control(oob[:oobn]); err != nil {
		return m, 0, false, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		closeAll(m.fds)
		return m, 0, false, errors.New("this process cannot take the descriptors in flight: its limit of open files is too low")
	}
	// An empty datagram comes with credentials, the end of a closed socket without.
	if n == 0 && (p.stream || oobn == 0) {
		return m, 0, true, nil
	}
	m.data = bytes.Clone(p.buf[:min(n, limit)])
	m.from = string(from)
	p.left -= n
	return m, n, false, nil
}

// control reads the control messages of a message.
func (m *peeked) control(b []byte) error {
	cs, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return fmt.Errorf("control messages: %w", err)
	}
	for i := range cs {
		c := &cs[i]
		if c.Header.Level != unix.SOL_SOCKET {
			continue
		}
		switch c.Header.Type {
		case unix.SCM_RIGHTS:
			fds, err := unix.ParseUnixRights(c)
			if err != nil {
				return fmt.Errorf("control messages: %w", err)
			}
			m.fds = append(m.fds, fds...)
		case unix.SCM_CREDENTIALS:
			u, err := unix.ParseUnixCredentials(c)
			if err != nil {
				return fmt.Errorf("control messages: %w", err)
			}
			if u.Pid != 0 || u.Uid != noID || u.Gid != noID {
				m.cred = &image.Credentials{PID: uint32(u.Pid), UID: u.Uid, GID: u.Gid}
			}
		}
	}
	return nil
}

// split cuts a piece of a stream, which begins at offset at, where the message
// with its descriptors begins, and around the byte out of band. A read ends with
// the message that carries descriptors, but may begin before it.
func (p *peeker) split(m peeked, at int) ([]peeked, error) {
	var out []peeked
	if len(m.fds) > 0 && len(m.data) > 1 {
		cut, err := p.firstWithRights(at, len(m.data))
		if err != nil {
			return nil, err
		}
		if cut > 0 {
			out = append(out, peeked{message: message{data: m.data[:cut:cut], cred: m.cred}})
			m.data = m.data[cut:]
		}
		at += cut
	}
	if k := p.oobAt - at; p.oobAt >= 0 && k >= 0 && k < len(m.data) {
		if k > 0 {
			return nil, errors.New("a byte out of band is not where it was")
		}
		first := m
		first.data, first.oob = m.data[:1:1], true
		out = append(out, first)
		m = peeked{message: message{data: m.data[1:], cred: m.cred}}
		if len(m.data) == 0 {
			return out, nil
		}
	}
	return append(out, m), nil
}

// firstWithRights finds the first of n bytes from offset at that belongs to the
// message with the descriptors, which is the last. The kernel copies message by
// message: with no room for the last byte, it gives what comes before that message.
func (p *peeker) firstWithRights(at, n int) (int, error) {
	page := os.Getpagesize()
	room := (n + page - 1) / page * page
	b, err := unix.Mmap(-1, 0, room+page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, os.NewSyscallError("mmap", err)
	}
	defer func() { _ = unix.Munmap(b) }()
	if err := unix.Mprotect(b[room:], unix.PROT_NONE); err != nil {
		return 0, os.NewSyscallError("mprotect", err)
	}
	if err := p.set(unix.SO_PEEK_OFF, at); err != nil {
		return 0, err
	}
	cut, oobn, _, _, err := sys.RecvmsgUnix(p.fd, b[room-n+1:room+1], make([]byte, 4096), unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	switch {
	case errors.Is(err, unix.EFAULT):
		cut, err = 0, nil
	case err == nil && (cut >= n || oobn > unix.CmsgSpace(unix.SizeofUcred)):
		err = errors.New("the place of the descriptors in a stream cannot be told")
	}
	return cut, errors.Join(err, p.set(unix.SO_PEEK_OFF, at+n))
}

// findOOB finds the place of a byte out of band: reads stop before it, but they do
// so too behind descriptors, and at the end.
func (p *peeker) findOOB() error {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLPRI}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return os.NewSyscallError("poll", err)
	}
	mark, err := unix.IoctlGetInt(p.fd, unix.SIOCATMARK)
	atMark := err == nil && mark != 0
	switch pending := fds[0].Revents&unix.POLLPRI != 0; {
	case !pending && atMark:
		p.trouble = readMark
		return nil
	case !pending:
		return nil
	case atMark:
		p.oobAt = 0
		return nil
	}
	// Credentials that differ end a read, too.
	if err := p.set(unix.SO_PASSCRED, 0); err != nil {
		return err
	}
	if err := p.begin(); err != nil {
		return err
	}
	for at := 0; ; {
		m, n, end, err := p.next(len(p.buf))
		closeAll(m.fds)
		if err != nil {
			return err
		}
		if end {
			p.trouble = lostOOB
			break
		}
		at += n
		if n < len(p.buf) && len(m.fds) == 0 {
			p.oobAt = at
			break
		}
	}
	return p.set(unix.SO_PASSCRED, 1)
}

// emitQueue emits what is queued at a socket, and gives what the image has no field for.
func (d *Dumper) emitQueue(o *object) ([]image.MessageFacts, error) {
	var facts []image.MessageFacts
	for i, m := range d.flights[o].messages {
		e := &sk_packet.SkPacketEntry{IdFor: proto.Uint32(o.id), Length: proto.Uint32(uint32(len(m.data)))}
		if len(m.rights) > 0 {
			e.Scm = []*sk_packet.ScmEntry{{Type: proto.Uint32(unix.SCM_RIGHTS), Rights: m.rights}}
		}
		if m.from != "" || m.cred != nil || m.oob {
			facts = append(facts, image.MessageFacts{Index: i, From: []byte(m.from), Cred: m.cred, OOB: m.oob})
		}
		if err := d.put(skQueuesImage, skQueuesMagic, e, m.data); err != nil {
			return nil, err
		}
	}
	return facts, nil
}

func (r *Restorer) loadSockQueues() error {
	r.queues = map[uint32][]message{}
	for i, e := range r.set.Entries(skQueuesImage) {
		bad := func(format string, args ...any) error {
			return fmt.Errorf("image %s: entry %d %w", skQueuesImage, i, fmt.Errorf(format, args...))
		}
		m, ok := e.Msg.(*sk_packet.SkPacketEntry)
		switch {
		case !ok:
			return bad("is a %T", e.Msg)
		case int(m.GetLength()) != len(e.Extra):
			return bad("tells of %d bytes, but there are %d", m.GetLength(), len(e.Extra))
		}
		x := r.byID[m.GetIdFor()]
		if x == nil || x.entry.GetType() != fdinfo.FdTypes_UNIXSK {
			return bad("is for file %d, which is no unix socket", m.GetIdFor())
		}
		msg := message{data: e.Extra}
		for _, s := range m.GetScm() {
			if s.GetType() != unix.SCM_RIGHTS {
				return bad("carries a control message of type %d, which is not known", s.GetType())
			}
			for _, id := range s.GetRights() {
				if r.byID[id] == nil {
					return bad("carries file %d, which image %s does not have", id, filesImage)
				}
			}
			msg.rights = append(msg.rights, s.GetRights()...)
		}
		if len(msg.rights) > maxRights {
			return bad("carries %d descriptors, of which at most %d are possible", len(msg.rights), maxRights)
		}
		if len(msg.rights) > 0 && len(msg.data) == 0 && x.entry.GetUsk().GetType() == unix.SOCK_STREAM {
			return bad("carries descriptors without data in a stream")
		}
		r.queues[m.GetIdFor()] = append(r.queues[m.GetIdFor()], msg)
	}
	return r.loadMessageFacts()
}

// maxRights is SCM_MAX_FD (include/net/scm.h).
const maxRights = 253

func (r *Restorer) loadMessageFacts() error {
	for id, f := range r.facts {
		if f.Unix == nil {
			continue
		}
		q := r.queues[id]
		for _, m := range f.Unix.Messages {
			switch {
			case m.Index < 0 || m.Index >= len(q):
				return fmt.Errorf("%s: message %d of file %d is not in image %s", image.FactsFile, m.Index, id, skQueuesImage)
			case len(m.From) > maxName:
				return fmt.Errorf("%s: the sender of message %d of file %d has a name of %d bytes", image.FactsFile, m.Index, id, len(m.From))
			case m.OOB && len(q[m.Index].data) != 1:
				return fmt.Errorf("%s: message %d of file %d is out of band and has %d bytes", image.FactsFile, m.Index, id, len(q[m.Index].data))
			}
			q[m.Index].from, q[m.Index].cred, q[m.Index].oob = string(m.From), m.Cred, m.OOB
		}
	}
	return nil
}
