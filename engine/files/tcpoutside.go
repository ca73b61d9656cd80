package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/netlock"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// TCP connections of which the other end is outside the tree.
//
// Dump: a network lock (engine/netlock) makes the kernel drop whatever comes for
// them and whatever they send. It lasts from before their streams are read until
// the restore, so that what they held is neither acknowledged nor refused by
// anybody meanwhile: to its peer the network is down.
//
// Restore: an end is made in repair mode, with both queues and windows as they
// were. A peer's end of stream that was received comes to it in a packet of ours.
// It stays silent in repair mode, and the lock stays, until the tree is let go
// (Landing.Release): whatever fails before can be tried again.

// NetworkLock methods, by the number that the inventory has (CRIU's own).
const (
	lockIptables = 0
	lockNftables = 1
	lockSkip     = 2
)

// LockSkip, as Options.NetworkLock, is no lock: the caller has locked the network,
// or lets the tree run on.
const LockSkip = "skip"

// connected says whether a TCP socket in this state has a connection, or is about
// to get one, that can be carried.
func connected(state uint32) bool { return hasPeer(state) || state == stateSynSent }

// netConn names a connection for the lock.
func netConn(e *sk_inet.InetSkEntry) netlock.Conn {
	p := pairOf(e)
	return netlock.Conn{Local: p.src, Peer: p.dst}
}

// dumpConnecting looks at a socket that has asked for a connection and has no
// answer yet. Only /proc tells whom it asked.
func (d *Dumper) dumpConnecting(o *object, e *sk_inet.InetSkEntry) error {
	read := procfs.NetTCP
	if e.GetFamily() == unix.AF_INET6 {
		read = procfs.NetTCP6
	}
	list, err := read(unix.Gettid()) // in whose network namespace the socket is
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.Inode == o.stat.Ino && s.Remote.Port() != 0 {
			e.DstAddr, *e.DstPort = wordsOf(s.Remote.Addr().AsSlice()), uint32(s.Remote.Port())
			return nil
		}
	}
	d.refuse(o, "the TCP connection is just being made", "retry in a moment")
	return nil
}

// probeLock refuses connections that lead out of the tree where the network cannot
// be locked.
func (d *Dumper) probeLock(list []*object) {
	if !d.dry() || d.opts.NetworkLock == LockSkip {
		return
	}
	var err error
	for i, o := range list {
		if !o.state.(*inetState).leads {
			continue
		}
		if i == 0 || err == nil {
			if err = netlock.Probe(); err == nil {
				return
			}
		}
		d.refuse(o, fmt.Sprintf("the TCP connection leads out of the tree, and the network cannot be locked for it: %v", err),
			"lock the network by other means and give --network-lock skip, or let the connection be closed with --tcp-close")
	}
}

// lockNetwork locks the connections that lead out of the tree.
func (d *Dumper) lockNetwork(list []*object) (err error) {
	var conns []netlock.Conn
	for _, o := range list {
		if s := o.state.(*inetState); s.leads {
			conns = append(conns, netConn(s.e))
		}
	}
	if len(conns) == 0 || d.opts.NetworkLock == LockSkip {
		return nil
	}
	if d.lock, err = netlock.New(d.opts.NetworkLock, conns); err != nil {
		return fmt.Errorf("lock the network: %w", err)
	}
	if !d.brief {
		d.lockID = d.opts.NetworkLock
	}
	d.log.Debug("network locked", "table", netlock.TableName(d.opts.NetworkLock), "connections", len(conns))
	return nil
}

// NoteLock puts into the inventory how the network is locked.
func (d *Dumper) NoteLock(e *inventory.InventoryEntry) {
	method := uint32(lockSkip)
	switch {
	case d.opts.TCPClose:
		e.TcpClose = proto.Bool(true)
		return
	case d.lockID != "":
		method = lockNftables
		e.DumpCriuRunId = proto.String(d.lockID)
	case d.opts.NetworkLock == "":
		return
	}
	e.NetworkLockMethod = proto.Uint32(method)
}

// inventory is the inventory of the images; nil if there is none.
func (r *Restorer) inventory() *inventory.InventoryEntry {
	for _, m := range r.set.Entries(image.InventoryFile) {
		if e, ok := m.Msg.(*inventory.InventoryEntry); ok {
			return e
		}
	}
	return nil
}

// checkClosed refuses images without the streams of connections.
func (r *Restorer) checkClosed() error {
	if r.inventory().GetTcpClose() && !r.opts.TCPClose {
		return errors.New("the tree was dumped with --tcp-close: restore it so, too")
	}
	return nil
}

// findLock finds out how the dump locked the network.
func (r *Restorer) findLock() error {
	leads := false
	for _, c := range r.conns {
		leads = leads || c.peer == nil
	}
	switch e := r.inventory(); {
	case !leads || r.opts.LockSkip || e == nil || e.NetworkLockMethod == nil:
	case e.GetNetworkLockMethod() == lockIptables:
		return errors.New("the dump locked the network by iptables, which this version does not unlock: remove those rules and give --network-lock skip")
	case e.GetNetworkLockMethod() == lockNftables && netlock.ValidID(e.GetDumpCriuRunId()):
		r.lockID = e.GetDumpCriuRunId()
	}
	return nil
}

// checkOutside validates an end whose peer is outside the images: this host must
// have its address, and not the same connection.
func (r *Restorer) checkOutside(c *connection) error {
	if !r.opts.TCPOutside {
		return fmt.Errorf("the other end of the TCP connection, %s, is not in the images or was handed in", addrPort(c.e.GetDstAddr(), c.e.GetDstPort(), ""))
	}
	if r.opts.OwnNet {
		return nil
	}
	p := pairOf(c.e)
	if !c.e.GetIpOpts().GetFreebind() {
		if err := haveAddress(c.e); err != nil {
			return err
		}
	}
	if r.tcps == nil {
		r.tcps = map[tcpPair]bool{}
		for _, read := range []func(int) ([]procfs.InetSocket, error){procfs.NetTCP, procfs.NetTCP6} {
			list, err := read(unix.Gettid())
			if err != nil {
				return err
			}
			for _, s := range list {
				at := func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
				if s.State != procfs.TCPListen && s.State != procfs.TCPClose && s.State != stateTimeWait {
					r.tcps[tcpPair{src: at(s.Local), dst: at(s.Remote)}] = true
				}
			}
		}
	}
	if r.tcps[p] {
		return fmt.Errorf("this host has a TCP connection from %s to %s already; end it first", p.src, p.dst)
	}
	return nil
}

const stateTimeWait = 6

// haveAddress says whether a socket can have the local address of a connection.
func haveAddress(e *sk_inet.InetSkEntry) error {
	sa, err := sockaddr(e.GetFamily(), e.GetSrcAddr(), 0, e.GetIfname())
	if err != nil {
		return err
	}
	fd, err := unix.Socket(int(e.GetFamily()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Bind(fd, sa); err != nil {
		return fmt.Errorf("the TCP connection from %s to %s cannot be made: %w",
			addrPort(e.GetSrcAddr(), e.GetSrcPort(), e.GetIfname()), addrPort(e.GetDstAddr(), e.GetDstPort(), ""), bindError(err))
	}
	return nil
}

// prepareSyn gives a socket the first sequence number of a connection that was
// asked for, so that the same request is made again (net/ipv4/tcp_ipv4.c
// tcp_v4_connect keeps one that is set).
func (c *connection) prepareSyn(fd int) error {
	if err := repairQueue(fd, repairSendQueue); err != nil {
		return err
	}
	return sys.SetTCPNumber(fd, unix.TCP_QUEUE_SEQ, c.s.GetOutqSeq()-1)
}

// connectOutside puts back what was sent and is not acknowledged, the windows, and
// the end of the peer's stream.
func (c *connection) connectOutside(fd int) error {
	if err := repairQueue(fd, repairSendQueue); err != nil {
		return err
	}
	sent, _ := c.parts()
	if err := c.grown(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, len(c.out), func() error { return sendStream(fd, sent) }); err != nil {
		return fmt.Errorf("put %d bytes back that were sent: %w", len(sent), err)
	}
	if err := repairQueue(fd, repairNoQueue); err != nil {
		return err
	}
	if !finReceived(c.e.GetState()) {
		return c.windows(fd)
	}
	if err := c.openRaw(); err != nil {
		return err
	}
	if c.e.GetState() == stateClosing {
		return c.windows(fd) // the end comes once the program's own is sent
	}
	defer c.closeRaw()
	return c.endIn(fd)
}

// parts are what of the send queue was sent, and what was not.
func (c *connection) parts() (sent, rest []byte) {
	n := len(c.out) - int(c.s.GetUnsqLen())
	return c.out[:n], c.out[n:]
}

func (c *connection) windows(fd int) error {
	if c.s.SndWnd == nil {
		return nil // an old image; the probe at the end of repair mode brings it
	}
	if c.e.GetState() == stateClosing && c.s.GetRcvWup() == c.s.GetInqSeq() {
		c.s.RcvWup = proto.Uint32(c.inEnd()) // the end of the stream is yet to come
	}
	return sys.SetTCPWindow(fd, sys.TCPWindow{SndWl1: c.s.GetSndWl1(), SndWnd: c.s.GetSndWnd(), MaxWindow: c.s.GetMaxWindow(),
		RcvWnd: c.s.GetRcvWnd(), RcvWup: c.s.GetRcvWup()})
}

// endIn lets the socket receive the end of the peer's stream, which the peer may
// know to be received and will not send again.
func (c *connection) endIn(fd int) error {
	room := sys.TCPWindow{SndWl1: c.inEnd(), SndWnd: c.s.GetSndWnd(), MaxWindow: max(c.s.GetMaxWindow(), c.s.GetSndWnd()), RcvWnd: 1 << 16, RcvWup: c.inEnd()}
	if err := sys.SetTCPWindow(fd, room); err != nil {
		return err
	}
	// What comes over loopback does not come from the device that it is bound to.
	if dev := c.e.GetOpts().GetSoBoundDev(); dev != "" {
		if err := unix.BindToDevice(fd, ""); err != nil {
			return os.NewSyscallError("setsockopt SO_BINDTODEVICE", err)
		}
		defer func() { _ = unix.BindToDevice(fd, dev) }()
	}
	if err := c.injectFin(); err != nil {
		return fmt.Errorf("end the stream from %s: %w", addrPort(c.e.GetDstAddr(), c.e.GetDstPort(), ""), err)
	}
	for end := time.Now().Add(20 * time.Second); ; {
		info, err := sys.GetTCPInfo(fd)
		if err != nil {
			return err
		}
		if finReceived(uint32(info.State)) || info.State == stateClose {
			return c.windows(fd)
		}
		if time.Now().After(end) {
			return fmt.Errorf("the end of the stream from %s did not arrive", addrPort(c.e.GetDstAddr(), c.e.GetDstPort(), ""))
		}
		time.Sleep(time.Millisecond)
	}
}

// openRaw makes the socket for injectFin, in the network namespace of the
// connection.
func (c *connection) openRaw() error {
	fam, level, opt := unix.AF_INET, unix.IPPROTO_IP, unix.IP_HDRINCL
	if pairOf(c.e).src.Addr().Is6() {
		fam, level, opt = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL
	}
	fd, err := unix.Socket(fam, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	c.raw = os.NewFile(uintptr(fd), "raw socket")
	if err := unix.SetsockoptInt(fd, level, opt, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_HDRINCL", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, netlock.Mark); err != nil {
		return os.NewSyscallError("setsockopt SO_MARK", err)
	}
	return nil
}

func (c *connection) closeRaw() {
	if c.raw != nil {
		_ = c.raw.Close()
		c.raw = nil
	}
}

// injectFin sends the peer's last segment, without data, to this host.
func (c *connection) injectFin() error {
	p := pairOf(c.e)
	una := c.outEnd() - uint32(len(c.out))
	wnd := min(c.s.GetSndWnd()>>min(c.s.GetSndWscale(), 14), 65535)
	b := segment(p.dst, p.src, c.inEnd(), una, uint16(wnd))
	fam := uint32(unix.AF_INET)
	if p.src.Addr().Is6() {
		fam = unix.AF_INET6
	}
	sa, err := sockaddr(fam, wordsOf(p.src.Addr().AsSlice()), 0, c.e.GetIfname())
	if err != nil {
		return err
	}
	return os.NewSyscallError("sendto", unix.Sendto(int(c.raw.Fd()), b, 0, sa))
}

// segment makes a packet: an IP header and a TCP segment that acknowledges ack and
// ends the stream at seq.
func segment(src, dst netip.AddrPort, seq, ack uint32, window uint16) []byte {
	const fin, ackFlag = 0x01, 0x10
	tcp := binary.BigEndian.AppendUint16(nil, src.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, dst.Port())
	tcp = binary.BigEndian.AppendUint32(tcp, seq)
	tcp = binary.BigEndian.AppendUint32(tcp, ack)
	tcp = append(tcp, 5<<4, fin|ackFlag)
	tcp = binary.BigEndian.AppendUint16(tcp, window)
	tcp = append(tcp, 0, 0, 0, 0) // checksum, urgent pointer
	pseudo := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(tcp)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	var ip []byte
	if src.Addr().Is4() {
		ip = []byte{0x45, 0}
		ip = binary.BigEndian.AppendUint16(ip, uint16(20+len(tcp)))
		ip = append(ip, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0) // the kernel fills in the checksum
	} else {
		ip = []byte{0x60, 0, 0, 0}
		ip = binary.BigEndian.AppendUint16(ip, uint16(len(tcp)))
		ip = append(ip, unix.IPPROTO_TCP, 64)
	}
	ip = append(ip, src.Addr().AsSlice()...)
	ip = append(ip, dst.Addr().AsSlice()...)
	return append(ip, tcp...)
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// Landing is the connections of a rebuilt tree that lead out of it, until the tree
// is let go. They are silent, and their network lock is in place.
type Landing struct {
	lockID string
	conns  []*connection
}

// TakeLanding hands the connections that lead out of the tree over, after Seal and
// once all processes have their descriptors; nil if there are none.
func (r *Restorer) TakeLanding() *Landing {
	l := &Landing{lockID: r.lockID}
	for _, x := range r.all {
		if c := r.conns[x]; c != nil && c.peer == nil {
			c.file, x.file = x.file, nil
			l.conns = append(l.conns, c)
		}
	}
	if len(l.conns) == 0 {
		return nil
	}
	return l
}

// Release unlocks the network and lets all connections go. After an error they
// cannot be restored again.
func (l *Landing) Release(log hclog.Logger) error {
	if l == nil {
		return nil
	}
	if l.lockID != "" {
		netns, err := netnsOf(l.conns[0].file)
		if err != nil {
			return err
		}
		_, err = netlock.Remove(l.lockID, netns)
		_ = netns.Close()
		if err != nil {
			return err
		}
	}
	var errs []error
	for _, c := range l.conns {
		p := pairOf(c.e)
		if c.e.GetState() == stateSynSent {
			// The program asks again, or is told so, by itself.
			if err := c.ask(); err != nil {
				log.Warn("a TCP connection that was being made is asked for no more", "local", p.src, "peer", p.dst, "error", err)
			}
			continue
		}
		if err := c.release(); err != nil {
			errs = append(errs, fmt.Errorf("let the TCP connection from %s to %s go: %w", p.src, p.dst, err))
		}
	}
	l.Close()
	return errors.Join(errs...)
}

// netnsOf is the network namespace of a socket.
func netnsOf(f *os.File) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.SIOCGSKNS)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("to tell in which network namespace a socket is takes CAP_NET_ADMIN, which this program does not have: %w", os.NewSyscallError("ioctl SIOCGSKNS", err))
	}
	if err != nil {
		return nil, os.NewSyscallError("ioctl SIOCGSKNS", err)
	}
	return os.NewFile(uintptr(fd), "network namespace of a socket"), nil
}

// Close lets go of the connections; it may be called twice.
func (l *Landing) Close() {
	if l == nil {
		return
	}
	for _, c := range l.conns {
		if c.file != nil {
			_ = c.file.Close()
			c.file = nil
		}
		c.closeRaw()
	}
}

func (c *connection) release() error {
	fd := int(c.file.Fd())
	// With a window probe: the answer tells what the peer has received.
	if err := repairOff(fd, unix.TCP_REPAIR_OFF, c.e.GetOpts()); err != nil {
		return err
	}
	_, rest := c.parts()
	if err := c.sendRest(fd, rest); err != nil {
		return err
	}
	if err := c.shut(fd); err != nil {
		return err
	}
	if c.e.GetState() == stateClosing {
		return c.injectFin()
	}
	return nil
}

// ask asks for the connection again, without waiting.
func (c *connection) ask() error {
	fd := int(c.file.Fd())
	if err := repairOff(fd, unix.TCP_REPAIR_OFF_NO_WP, c.e.GetOpts()); err != nil {
		return err
	}
	sa, err := sockaddr(c.e.GetFamily(), c.e.GetDstAddr(), c.e.GetDstPort(), c.e.GetIfname())
	if err != nil {
		return err
	}
	flags := c.e.GetFlags()
	if err := unix.SetNonblock(fd, true); err != nil {
		return os.NewSyscallError("fcntl F_SETFL", err)
	}
	if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	return os.NewSyscallError("fcntl F_SETFL", unix.SetNonblock(fd, flags&unix.O_NONBLOCK != 0))
}
