package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/netlock"
	"godwit/engine/sys"
)

// TCP connections are carried when both of their ends are in the tree, and, if the
// caller sees to it that nothing of theirs passes until the restore
// (Options.NetworkLock), when the other end is outside (tcpoutside.go).
//
// Dump: nothing of the tree runs, but the kernel goes on to deliver, acknowledge
// and send again. So both ends are muted first: what arrives is dropped, as if
// the network had lost it. Then, in repair mode (Documentation/networking of TCP
// has none; net/ipv4/tcp.c do_tcp_setsockopt), sequence numbers and queues are
// read. At once the ends are as they were; what was dropped meanwhile is sent
// again by the kernel.
//
// Restore of both ends: they are made in repair mode, which connects them without a
// packet. An end's receive queue is put back as it was; of a send queue only
// what the other end has not received. Once repair mode is off, that is sent in
// the ordinary way, and so is the end of the stream by an end that was shut
// down: the states from FIN_WAIT1 to LAST_ACK come by themselves.

// States of TCP connections besides those in inetsk.go (include/net/tcp_states.h).
const (
	stateSynSent   = 2
	stateFinWait1  = 4
	stateFinWait2  = 5
	stateCloseWait = 8
	stateLastAck   = 9
	stateClosing   = 11
)

// Queues for TCP_REPAIR_QUEUE (include/uapi/linux/tcp.h).
const (
	repairNoQueue   = 0
	repairRecvQueue = 1
	repairSendQueue = 2
)

// Codes of options in TCP headers (include/net/tcp.h), for TCP_REPAIR_OPTIONS.
const (
	tcpOptMSS        = 2
	tcpOptWindow     = 3
	tcpOptSACK       = 4
	tcpOptTimestamps = 8
)

// hasPeer says whether a TCP socket in this state has a connection that can be
// carried.
func hasPeer(state uint32) bool {
	switch state {
	case stateEstablished, stateFinWait1, stateFinWait2, stateCloseWait, stateLastAck, stateClosing:
		return true
	}
	return false
}

// finSent says whether an end in this state has ended its stream, finReceived
// whether the other has: each takes one sequence number.
func finSent(state uint32) bool {
	return hasPeer(state) && state != stateEstablished && state != stateCloseWait
}
func finReceived(state uint32) bool {
	return state == stateCloseWait || state == stateLastAck || state == stateClosing
}

// finWaits says whether an end in this state has ended its stream and the other
// has not acknowledged that: the end is the last of the send queue.
func finWaits(state uint32) bool {
	return state == stateFinWait1 || state == stateLastAck || state == stateClosing
}

func streamImage(ino uint32) string { return fmt.Sprintf("tcp-stream-%x", ino) }

// tcpPair names a connection as one of its ends sees it.
type tcpPair struct{ src, dst netip.AddrPort }

func (p tcpPair) reverse() tcpPair { return tcpPair{src: p.dst, dst: p.src} }

// pairOf gives the addresses of an entry. Those of IPv4 in IPv6 are taken for what
// they are: the two ends of one connection may be of either family.
func pairOf(e *sk_inet.InetSkEntry) tcpPair {
	at := func(words []uint32, port uint32) netip.AddrPort {
		ip, _ := netip.AddrFromSlice(addrBytes(words))
		return netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return tcpPair{src: at(e.GetSrcAddr(), e.GetSrcPort()), dst: at(e.GetDstAddr(), e.GetDstPort())}
}

// dumpConnection looks at a socket that is connected; its stream is read when
// both ends are known.
func (d *Dumper) dumpConnection(o *object, fd int, e *sk_inet.InetSkEntry, state uint8) error {
	e.State = proto.Uint32(uint32(state))
	if state == stateSynSent {
		return d.dumpConnecting(o, e)
	}
	peer, err := unix.Getpeername(fd)
	if errors.Is(err, unix.ENOTCONN) {
		d.refuse(o, "the TCP connection is just ending", "retry in a moment")
		return nil
	}
	if err != nil {
		return os.NewSyscallError("getpeername", err)
	}
	if e.DstAddr, *e.DstPort, _, err = sockaddrWords(peer); err != nil {
		return err
	}
	if d.opts.TCPClose {
		return nil // it comes back closed, whatever it was
	}
	if s, err := unix.GetsockoptString(fd, unix.SOL_TCP, unix.TCP_ULP); err == nil && s != "" {
		d.refuse(o, fmt.Sprintf("the TCP connection is run by %q in the kernel", s), "let the program end it first")
		return nil
	}
	return d.dumpShutdown(o, fd, e)
}

// dumpShutdown notes what of a connection the program has ended.
func (d *Dumper) dumpShutdown(o *object, fd int, e *sk_inet.InetSkEntry) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if _, err := unix.Poll(p, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return os.NewSyscallError("poll", err)
	}
	if p[0].Revents&unix.POLLERR != 0 {
		d.passes(o, "the TCP connection has failed, and the program has not been told yet", "retry when it has closed it")
		return nil
	}
	state := e.GetState()
	how := sk_opts.SkShutdown_NONE
	if finSent(state) {
		how |= sk_opts.SkShutdown_WRITE
	}
	// An end of which the other's stream has not ended tells of the end all the
	// same if the program itself will not receive any more.
	if p[0].Revents&unix.POLLRDHUP != 0 && !finReceived(state) {
		how |= sk_opts.SkShutdown_READ
	}
	e.Shutdown = nil
	if how != sk_opts.SkShutdown_NONE {
		e.Shutdown = how.Enum()
	}
	return nil
}

// dumpStill looks at a connection again once nothing can change it any more.
func (d *Dumper) dumpStill(o *object) error {
	fd, e := int(o.file.Fd()), o.state.(*inetState).e
	info, err := sys.GetTCPInfo(fd)
	if err != nil {
		return err
	}
	if !connected(uint32(info.State)) {
		d.refuse(o, "the TCP connection is just ending", "retry in a moment")
		return nil
	}
	e.State = proto.Uint32(uint32(info.State))
	return d.dumpShutdown(o, fd, e)
}

// dumpEnded looks at a socket whose connection is over; events are poll(2)'s. One
// of which the program has everything but the end of the stream is carried: its
// address, which nothing uses any more, is free on the destination.
func (d *Dumper) dumpEnded(o *object, fd int, e *sk_inet.InetSkEntry, events int16) error {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return os.NewSyscallError("ioctl TIOCINQ", err)
	}
	if e.GetProto() != unix.IPPROTO_TCP || events&unix.POLLERR != 0 || n > 0 {
		d.passes(o, "the TCP connection has ended, but the program has not closed it yet", "retry when it has")
		return nil
	}
	e.Shutdown = sk_opts.SkShutdown_BOTH.Enum()
	return nil
}

// tcpEnded says whether an entry is of a socket whose connection is over.
func tcpEnded(e *sk_inet.InetSkEntry) bool {
	return e.GetType() == unix.SOCK_STREAM && e.GetState() == stateClose && e.GetShutdown() == sk_opts.SkShutdown_BOTH
}

// finishInets pairs the ends of connections and reads their streams.
func finishInets(d *Dumper, os []*object) error {
	if d.opts.TCPClose {
		return nil
	}
	ends := map[tcpPair]*object{}
	for _, o := range os {
		if s, ok := o.state.(*inetState); ok && !o.refused && s.connected() {
			ends[pairOf(s.e)] = o
		}
	}
	var list []*object
	for _, o := range os {
		s, ok := o.state.(*inetState)
		if !ok || o.refused || !s.connected() {
			continue
		}
		s.leads = s.e.GetState() == stateSynSent || ends[pairOf(s.e).reverse()] == nil
		if s.leads && d.opts.NetworkLock == "" {
			d.refuse(o, fmt.Sprintf("the other end of the TCP connection, %s, is not in the tree", addrPort(s.e.GetDstAddr(), s.e.GetDstPort(), "")),
				"a migration carries only connections within the tree: let the program or its peer end it first, or include the peer in the tree")
			continue
		}
		if x, ok := d.outside(socketLink(o)); ok {
			d.refuse(o, fmt.Sprintf("the TCP connection is also held by pid %d (%s), fd %d, outside the tree", x.pid, x.comm, x.fd), "include that process in the tree, or let it close it")
			continue
		}
		list = append(list, o)
	}
	d.probeLock(list)
	if d.dry() || len(d.refusal.Problems) > 0 {
		return nil
	}
	if err := d.lockNetwork(list); err != nil {
		return err
	}
	if err := d.dumpStreams(list); err != nil {
		return err
	}
	for _, o := range list {
		d.conns = append(d.conns, conn{file: o.file, opts: o.state.(*inetState).e.GetOpts()})
		o.file = nil
	}
	return nil
}

// conn is one end of a connection of a dumped tree.
type conn struct {
	file *os.File // a duplicate
	opts *sk_opts.SkOptsEntry
}

// Connections are the TCP connections of a dumped tree, for the moment in which
// it is killed.
type Connections struct {
	ends  []conn
	lock  *netlock.Lock // of those that lead out of the tree; nil: none
	brief bool          // the lock is not kept
}

// TakeConnections hands the connections over, after Finish; nil if there are none.
func (d *Dumper) TakeConnections() *Connections {
	if len(d.conns) == 0 && d.lock == nil {
		return nil
	}
	c := &Connections{ends: d.conns, lock: d.lock, brief: d.brief}
	d.conns, d.lock = nil, nil
	return c
}

// Keep makes the network lock last until the restore.
func (c *Connections) Keep() error {
	if c == nil || c.brief {
		return nil
	}
	return c.lock.Keep()
}

// LockTable names the table of nftables in which the connections are locked;
// empty: none.
func (c *Connections) LockTable() string {
	if c == nil || c.lock == nil || c.brief {
		return ""
	}
	return netlock.TableName(c.lock.ID())
}

// Silence makes all ends close without a packet: an ordinary close leaves the
// addresses taken for a minute (FIN_WAIT2, TIME_WAIT), in which the tree could
// not be restored on this host, and ends connections that lead out of the tree.
// Preconditions: the tree is stopped.
func (c *Connections) Silence() error {
	if c == nil {
		return nil
	}
	for i, x := range c.ends {
		if err := repairOn(int(x.file.Fd())); err != nil {
			return errors.Join(err, c.voice(c.ends[:i]))
		}
	}
	return nil
}

// Voice takes Keep and Silence back.
func (c *Connections) Voice() error {
	if c == nil {
		return nil
	}
	return errors.Join(c.voice(c.ends), c.lock.Forsake())
}

func (*Connections) voice(ends []conn) error {
	var errs []error
	for _, x := range ends {
		errs = append(errs, repairOff(int(x.file.Fd()), unix.TCP_REPAIR_OFF_NO_WP, x.opts))
	}
	return errors.Join(errs...)
}

// Close lets go of the connections; it may be called twice. A network lock that
// was not kept ends.
func (c *Connections) Close() {
	if c == nil {
		return
	}
	_ = c.lock.Close()
	for _, x := range c.ends {
		release(x.file)
	}
	c.ends = nil
}

// dumpStreams reads the streams of connections while all of their ends are muted.
// Whatever happens, they are as before when it returns.
func (d *Dumper) dumpStreams(list []*object) (err error) {
	defer func() {
		for _, o := range list {
			if s := o.state.(*inetState); s.muted {
				err = errors.Join(err, unmute(o, s))
			}
		}
	}()
	for _, o := range list {
		s := o.state.(*inetState)
		s.muted = true
		if err := sys.MuteSocket(int(o.file.Fd())); err != nil {
			return fmt.Errorf("mute %s: %w", o.link, err)
		}
	}
	for _, o := range list {
		if err := d.dumpStill(o); err != nil || o.refused {
			return err
		}
		e, queues, err := readStill(int(o.file.Fd()), o.state.(*inetState).e)
		if errors.Is(err, unix.EAGAIN) {
			d.refuse(o, fmt.Sprintf("the TCP connection does not stand still: %v", err), "retry in a moment")
			return nil
		}
		if errors.Is(err, errUrgent) {
			d.passes(o, fmt.Sprintf("the TCP connection cannot be read: %v", err), "retry when the program has received it")
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the stream of %s: %w", o.link, err)
		}
		if err := d.put(streamImage(uint32(o.stat.Ino)), image.MagicTCPStream, e, queues); err != nil {
			return err
		}
	}
	return nil
}

// unmute ends repair mode, which takes SO_REUSEADDR away (net/ipv4/tcp.c
// tcp_disable_repair), and the filter.
func unmute(o *object, s *inetState) error {
	fd := int(o.file.Fd())
	s.muted = false
	var errs []error
	if n, err := unix.GetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR); err == nil && n != 0 {
		errs = append(errs, repairOff(fd, unix.TCP_REPAIR_OFF_NO_WP, s.e.GetOpts()))
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, os.NewSyscallError("setsockopt SO_DETACH_FILTER", err))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("put %s back: %w", o.link, err)
	}
	return nil
}

// repairOff ends repair mode; how is TCP_REPAIR_OFF, which probes the other end's
// window, or TCP_REPAIR_OFF_NO_WP.
func repairOff(fd, how int, opts *sk_opts.SkOptsEntry) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, how); err != nil {
		return os.NewSyscallError("setsockopt TCP_REPAIR", err)
	}
	return setIfOther(fd, unix.SO_REUSEADDR, btoi(opts.GetReuseaddr()))
}

func repairOn(fd int) error {
	return os.NewSyscallError("setsockopt TCP_REPAIR", unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_ON))
}

func repairQueue(fd, queue int) error {
	return os.NewSyscallError("setsockopt TCP_REPAIR_QUEUE", unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR_QUEUE, queue))
}

// stillTries is how often a stream is read that changes meanwhile: a packet may
// have been on its way through the kernel when the connection was muted.
const stillTries = 5

// readStill reads a stream until it is twice the same.
func readStill(fd int, e *sk_inet.InetSkEntry) (*tcp_stream.TcpStreamEntry, []byte, error) {
	last, queues, err := readStream(fd, e)
	for range stillTries {
		if err != nil {
			return nil, nil, err
		}
		again, q, err := readStream(fd, e)
		if err != nil {
			return nil, nil, err
		}
		again.Timestamp = last.Timestamp // a clock
		if proto.Equal(last, again) {
			return last, queues, nil
		}
		last, queues = again, q
	}
	return nil, nil, fmt.Errorf("it goes on to change although it is muted: %w", unix.EAGAIN)
}

// readStream reads a muted connection: what was negotiated, sequence numbers and
// windows, and the bytes of both queues, those to be received first. Preconditions:
// nobody else uses the socket meanwhile.
func readStream(fd int, e *sk_inet.InetSkEntry) (*tcp_stream.TcpStreamEntry, []byte, error) {
	if err := repairOn(fd); err != nil {
		return nil, nil, err
	}
	info, err := sys.GetTCPInfo(fd)
	if err != nil {
		return nil, nil, err
	}
	if uint32(info.State) != e.GetState() {
		return nil, nil, fmt.Errorf("it went from state %s to %s: %w", tcpState(uint8(e.GetState())), tcpState(info.State), unix.EAGAIN)
	}
	s := &tcp_stream.TcpStreamEntry{
		OptMask: proto.Uint32(uint32(info.Options)), SndWscale: proto.Uint32(uint32(info.SndWscale)), RcvWscale: proto.Uint32(uint32(info.RcvWscale)),
		Cork: e.GetTcpOpts().Cork, Nodelay: e.GetTcpOpts().Nodelay,
	}
	w, err := sys.GetTCPWindow(fd)
	if err != nil {
		return nil, nil, err
	}
	s.SndWl1, s.SndWnd, s.MaxWindow, s.RcvWnd, s.RcvWup = &w.SndWl1, &w.SndWnd, &w.MaxWindow, &w.RcvWnd, &w.RcvWup
	for opt, to := range map[int]**uint32{unix.TCP_MAXSEG: &s.MssClamp, unix.TCP_TIMESTAMP: &s.Timestamp} {
		n, err := sys.GetTCPNumber(fd, opt)
		if err != nil {
			return nil, nil, err
		}
		*to = &n
	}
	var queues []byte
	for _, q := range []struct {
		queue int
		count uint
		n     **uint32
		seq   **uint32
		fin   bool // takes one of the bytes that are counted
	}{
		{repairRecvQueue, unix.TIOCINQ, &s.InqLen, &s.InqSeq, false},
		{repairSendQueue, unix.TIOCOUTQ, &s.OutqLen, &s.OutqSeq, finWaits(e.GetState())},
	} {
		b, seq, err := peekQueue(fd, q.queue, q.count, q.fin)
		if err != nil {
			return nil, nil, err
		}
		if q.queue == repairRecvQueue {
			if err := checkUrgent(fd, len(b), finReceived(e.GetState())); err != nil {
				return nil, nil, err
			}
		}
		*q.n, *q.seq = proto.Uint32(uint32(len(b))), &seq
		queues = append(queues, b...)
	}
	unsent, err := unix.IoctlGetInt(fd, unix.SIOCOUTQNSD)
	if err != nil {
		return nil, nil, os.NewSyscallError("ioctl SIOCOUTQNSD", err)
	}
	if unsent > 0 && finWaits(e.GetState()) {
		unsent-- // the end of the stream, which comes last, is counted
	}
	s.UnsqLen = proto.Uint32(min(uint32(unsent), s.GetOutqLen()))
	return s, queues, repairQueue(fd, repairNoQueue)
}

// errUrgent says that a queue has a byte out of band (MSG_OOB), which is not read
// with the others.
var errUrgent = errors.New("urgent data is not carried")

// peekQueue reads one queue and the sequence number behind it.
func peekQueue(fd, queue int, count uint, fin bool) (b []byte, seq uint32, err error) {
	if err := repairQueue(fd, queue); err != nil {
		return nil, 0, err
	}
	if seq, err = sys.GetTCPNumber(fd, unix.TCP_QUEUE_SEQ); err != nil {
		return nil, 0, err
	}
	n, err := unix.IoctlGetInt(fd, count)
	if err != nil {
		return nil, 0, os.NewSyscallError("ioctl", err)
	}
	n = max(0, n-btoi(fin))
	b = make([]byte, n+1)
	got, _, err := unix.Recvfrom(fd, b, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) {
		got, err = 0, nil
	}
	if err != nil {
		return nil, 0, os.NewSyscallError("recv MSG_PEEK", err)
	}
	if got != n {
		return nil, 0, fmt.Errorf("a queue has %d bytes, of which %d can be read: %w", n, got, errUrgent)
	}
	return b[:n], seq, nil
}

// checkUrgent looks for bytes behind the n that wait to be received: there are some
// if one in between is out of band. Preconditions: the receive queue is being
// repaired.
func checkUrgent(fd, n int, ended bool) error {
	inq, ok, err := getOpt(fd, unix.SOL_TCP, unix.TCP_INQ)
	if err != nil || !ok || n == 0 {
		return err // n == 0: the peek went past it
	}
	if inq == 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_INQ, 1); err != nil {
			return os.NewSyscallError("setsockopt TCP_INQ", err)
		}
		defer func() { _ = unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_INQ, 0) }()
	}
	oob := make([]byte, 256)
	_, oobn, _, _, err := unix.Recvmsg(fd, make([]byte, 1), oob, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != nil {
		return os.NewSyscallError("recv MSG_PEEK", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return fmt.Errorf("control messages: %w", err)
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_TCP && m.Header.Type == unix.TCP_CM_INQ && len(m.Data) >= 4 {
			if have := int(binary.NativeEndian.Uint32(m.Data)); have > n+btoi(ended) {
				return fmt.Errorf("the receive queue has %d bytes, of which %d can be read: %w", have, n, errUrgent)
			}
		}
	}
	return nil
}

// connection is one end of a connection being made again.
type connection struct {
	x       *description
	e       *sk_inet.InetSkEntry
	s       *tcp_stream.TcpStreamEntry
	in, out []byte      // its queues
	peer    *connection // nil: outside
	file    *os.File    // from release on
	raw     *os.File    // for segments of an outside peer
}

// inEnd and outEnd are the sequence numbers behind the data of the queues.
func (c *connection) inEnd() uint32 {
	return c.s.GetInqSeq() - uint32(btoi(finReceived(c.e.GetState())))
}
func (c *connection) outEnd() uint32 {
	return c.s.GetOutqSeq() - uint32(btoi(finSent(c.e.GetState())))
}

// trim drops from the send queue what the peer has received already.
func (c *connection) trim() error {
	received := c.peer.inEnd() - (c.outEnd() - uint32(len(c.out)))
	if received > uint32(len(c.out)) {
		return fmt.Errorf("its %d bytes to be sent do not continue what its other end, %s, has received", len(c.out), addrPort(c.e.GetDstAddr(), c.e.GetDstPort(), ""))
	}
	c.out = c.out[received:]
	return nil
}

// loadConnections reads the streams and finds both ends of every connection.
func (r *Restorer) loadConnections() error {
	if err := r.checkClosed(); err != nil {
		return err
	}
	ends := map[tcpPair]*connection{}
	for _, x := range r.all {
		e := x.entry.GetIsk()
		if e == nil || e.GetType() != unix.SOCK_STREAM || !connected(e.GetState()) || !r.opts.TCPEstablished || r.opts.TCPClose {
			continue
		}
		if r.handed[fmt.Sprintf("socket:[%d]", e.GetIno())] != nil {
			continue
		}
		img := streamImage(e.GetIno())
		es := r.set.Entries(img)
		if len(es) != 1 {
			return fmt.Errorf("image %s: %d entries, want 1", img, len(es))
		}
		s, ok := es[0].Msg.(*tcp_stream.TcpStreamEntry)
		if !ok {
			return fmt.Errorf("image %s: its entry is a %T", img, es[0].Msg)
		}
		if uint64(s.GetInqLen())+uint64(s.GetOutqLen()) != uint64(len(es[0].Extra)) {
			return fmt.Errorf("image %s: it tells of %d and %d bytes, but there are %d", img, s.GetInqLen(), s.GetOutqLen(), len(es[0].Extra))
		}
		if s.GetSndWscale() > 14 || s.GetRcvWscale() > 14 || s.GetMssClamp() > 65535 {
			return fmt.Errorf("image %s: window scales %d and %d or segment size %d are out of range", img, s.GetSndWscale(), s.GetRcvWscale(), s.GetMssClamp())
		}
		if s.GetUnsqLen() > s.GetOutqLen() {
			return fmt.Errorf("image %s: %d bytes of %d are not sent yet", img, s.GetUnsqLen(), s.GetOutqLen())
		}
		c := &connection{x: x, e: e, s: s, in: es[0].Extra[:s.GetInqLen()], out: es[0].Extra[s.GetInqLen():]}
		p := pairOf(e)
		if ends[p] != nil {
			return fmt.Errorf("image %s: two sockets are the end %s of the connection to %s", filesImage, p.src, p.dst)
		}
		ends[p] = c
		r.conns[x] = c
	}
	for p, c := range ends {
		if o := ends[p.reverse()]; o != nil && hasPeer(c.e.GetState()) && hasPeer(o.e.GetState()) {
			c.peer = o
		}
	}
	return r.findLock()
}

// checkConnection validates one end.
func (r *Restorer) checkConnection(x *description) error {
	if r.opts.TCPClose {
		return nil
	}
	if !r.opts.TCPEstablished {
		return errors.New("it is a TCP connection: restore with --tcp-established, as it was dumped, or with --tcp-close, which closes it")
	}
	c := r.conns[x]
	switch {
	case c == nil: // handed in
		return nil
	case x.entry.GetIsk().GetProto() != unix.IPPROTO_TCP:
		return fmt.Errorf("connections of protocol %d are not carried", x.entry.GetIsk().GetProto())
	case len(c.e.GetDstAddr()) == 0 || len(c.e.GetSrcAddr()) == 0:
		return errors.New("it is a TCP connection without an address")
	case c.peer == nil:
		return r.checkOutside(c)
	}
	return c.trim()
}

// connect puts a bound socket in repair mode into its connection, with what is
// to be received; of one that leads out of the tree also with what was sent.
func (c *connection) connect(fd int) error {
	if c.e.GetState() == stateSynSent {
		return c.prepareSyn(fd)
	}
	sendSeq := c.outEnd() - uint32(len(c.out))
	if c.peer != nil {
		sendSeq = c.peer.inEnd()
	}
	for _, q := range []struct {
		queue int
		seq   uint32
	}{{repairRecvQueue, c.inEnd() - uint32(len(c.in))}, {repairSendQueue, sendSeq}} {
		if err := repairQueue(fd, q.queue); err != nil {
			return err
		}
		if err := sys.SetTCPNumber(fd, unix.TCP_QUEUE_SEQ, q.seq); err != nil {
			return err
		}
	}
	sa, err := sockaddr(c.e.GetFamily(), c.e.GetDstAddr(), c.e.GetDstPort(), c.e.GetIfname())
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, sa); err != nil {
		err = os.NewSyscallError("connect", err)
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			err = fmt.Errorf("%w: this host has the same connection already; end it first, or wait a minute if it has ended", err)
		}
		return fmt.Errorf("connect tcp %s to %s: %w", addrPort(c.e.GetSrcAddr(), c.e.GetSrcPort(), ""), addrPort(c.e.GetDstAddr(), c.e.GetDstPort(), ""), err)
	}
	if err := c.negotiated(fd); err != nil {
		return err
	}
	if err := repairQueue(fd, repairRecvQueue); err != nil {
		return err
	}
	if err := c.grown(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, len(c.in), func() error { return sendStream(fd, c.in) }); err != nil {
		return fmt.Errorf("put %d bytes back that wait to be received: %w", len(c.in), err)
	}
	if c.peer == nil {
		return c.connectOutside(fd)
	}
	if err := repairQueue(fd, repairNoQueue); err != nil {
		return err
	}
	max := max(c.s.GetMaxWindow(), c.peer.window())
	return sys.SetTCPWindow(fd, sys.TCPWindow{SndWl1: c.inEnd(), SndWnd: c.peer.window(), MaxWindow: max, RcvWnd: c.window(), RcvWup: c.inEnd()})
}

// negotiated sets what the two ends agreed upon when they connected.
func (c *connection) negotiated(fd int) error {
	opts := []unix.TCPRepairOpt{{Code: tcpOptMSS, Val: c.s.GetMssClamp()}}
	mask := c.s.GetOptMask()
	if mask&sys.TCPOptWscale != 0 {
		opts = append(opts, unix.TCPRepairOpt{Code: tcpOptWindow, Val: c.s.GetSndWscale() | c.s.GetRcvWscale()<<16})
	}
	if mask&sys.TCPOptSACK != 0 {
		opts = append(opts, unix.TCPRepairOpt{Code: tcpOptSACK})
	}
	if mask&sys.TCPOptTimestamps != 0 {
		opts = append(opts, unix.TCPRepairOpt{Code: tcpOptTimestamps})
	}
	if err := sys.SetTCPOptions(fd, opts); err != nil {
		return err
	}
	if mask&sys.TCPOptTimestamps != 0 && c.s.Timestamp != nil {
		return sys.SetTCPNumber(fd, unix.TCP_TIMESTAMP, c.s.GetTimestamp())
	}
	return nil
}

// window is how many bytes, behind those it has, an end has said it will take.
func (c *connection) window() uint32 {
	used := c.s.GetInqSeq() - c.s.GetRcvWup()
	if used > c.s.GetRcvWnd() {
		return 0
	}
	return c.s.GetRcvWnd() - used
}

// grown runs f while a buffer has room for n bytes, however they are cut, and
// sets its size and who may change it (SO_BUF_LOCK) back.
func (c *connection) grown(fd, force, opt, n int, f func() error) error {
	if n == 0 {
		return nil
	}
	have, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	lock, _, err := getOpt(fd, unix.SOL_SOCKET, soBufLock)
	if err != nil {
		return err
	}
	// Small segments take several times their size.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, max(have, 2*n+1<<20)); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	err = f()
	if serr := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, have/2); serr != nil {
		return errors.Join(err, os.NewSyscallError("setsockopt", serr))
	}
	return errors.Join(err, setIfOther(fd, soBufLock, lock))
}

// sendStream sends b, in pieces that a socket in repair mode takes, without waiting.
func sendStream(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.SendmsgN(fd, b[:min(len(b), 32<<10)], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("send", err)
		}
		b = b[n:]
	}
	return nil
}

// sealInets lets connections within the tree go: no repair mode any more, then
// what was yet to be sent, then the ends of streams.
func sealInets(r *Restorer, xs []*description) []error {
	var errs []error
	each := func(f func(c *connection, fd int) error) {
		for _, x := range xs {
			if c := r.conns[x]; c != nil && c.peer != nil && len(errs) == 0 {
				if err := f(c, int(x.file.Fd())); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
				}
			}
		}
	}
	// Without a window probe: the windows are right.
	each(func(c *connection, fd int) error { return repairOff(fd, unix.TCP_REPAIR_OFF_NO_WP, c.e.GetOpts()) })
	each(func(c *connection, fd int) error { return c.sendRest(fd, c.out) })
	each((*connection).shut)
	return errs
}

// sendRest sends what the program has sent and the kernel had not.
func (c *connection) sendRest(fd int, b []byte) error {
	if err := c.grown(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, len(b), func() error { return sendStream(fd, b) }); err != nil {
		return fmt.Errorf("put %d bytes back that wait to be sent: %w", len(b), err)
	}
	return nil
}

// shut ends what the program has ended.
func (c *connection) shut(fd int) error {
	how := c.e.GetShutdown()
	if finSent(c.e.GetState()) {
		how |= sk_opts.SkShutdown_WRITE
	}
	for bit, arg := range map[sk_opts.SkShutdown]int{sk_opts.SkShutdown_WRITE: unix.SHUT_WR, sk_opts.SkShutdown_READ: unix.SHUT_RD} {
		if how&bit == 0 {
			continue
		}
		// Of a connection that thereby is over there is nothing more to shut.
		if err := unix.Shutdown(fd, arg); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return os.NewSyscallError("shutdown", err)
		}
	}
	return nil
}
