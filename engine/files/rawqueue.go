package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// Raw and ping sockets let nobody look behind the head of their queue
// (SO_PEEK_OFF is not theirs). What waits is taken out, and sent again at once, as
// it is at a restore: over the loopback interface, with the headers that it had and
// a mark by which filters tell it from all other packets.

const (
	injected   = 0x676f0000 // the marks of packets that are sent again, with 16 bits of their own
	ipv4Header = 20
	ipv6Header = 40

	icmpEchoReply  = 0
	icmpEcho       = 8
	icmpTimestamp  = 13
	icmpLastKnown  = 18 // NR_ICMP_TYPES (include/uapi/linux/icmp.h)
	icmp6EchoReply = 129
)

// handledProtocols are those that the kernel itself takes packets of, or may: what
// is sent again would have effects besides a raw socket's. Of ICMP see resendable.
var handledProtocols = []uint32{
	0, unix.IPPROTO_IGMP, unix.IPPROTO_IPIP, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_DCCP, unix.IPPROTO_IPV6, 43, 44, unix.IPPROTO_GRE,
	unix.IPPROTO_ESP, unix.IPPROTO_AH, 59, 60, unix.IPPROTO_PIM, unix.IPPROTO_COMP, unix.IPPROTO_L2TP, unix.IPPROTO_SCTP, 135, unix.IPPROTO_UDPLITE,
	unix.IPPROTO_MPLS, 139, 140, 143, unix.IPPROTO_RAW,
}

// resendable says whether a packet of a raw or ping socket can be sent again: it
// must have no effect but to be received, and leave this host in no way.
func resendable(e *sk_inet.InetSkEntry, m image.SockDatagram) bool {
	from, err := netip.ParseAddrPort(m.From)
	if err != nil || from.Addr().Is4() != (e.GetFamily() == unix.AF_INET) {
		return false
	}
	data := m.Data
	if protoName(e) == "raw" && e.GetFamily() == unix.AF_INET {
		// Nothing that is a fragment, or has options, which the kernel obeys.
		be := binary.BigEndian
		if len(data) < ipv4Header || data[0] != 0x45 || uint32(data[9]) != e.GetProto() || int(be.Uint16(data[2:])) != len(data) ||
			be.Uint16(data[6:])&0x3fff != 0 || netip.AddrFrom4([4]byte(data[12:16])) != from.Addr() {
			return false
		}
		data = data[ipv4Header:]
	} else if e.GetFamily() == unix.AF_INET6 {
		if to, err := netip.ParseAddr(m.To); err != nil || to.Is4() || len(data) > 1<<16-1-ipv6Header {
			return false
		}
	} else if len(data) > 1<<16-1-ipv4Header {
		return false
	}
	switch e.GetProto() {
	case unix.IPPROTO_ICMP:
		if e.GetFamily() != unix.AF_INET || len(data) < 8 {
			return false
		}
		if protoName(e) == "ping" {
			return data[0] == icmpEchoReply && uint32(binary.BigEndian.Uint16(data[4:])) == e.GetSrcPort()
		}
		// Of what comes by broadcast the kernel answers no request, and obeys nothing
		// (net/ipv4/icmp.c icmp_rcv).
		return data[0] <= icmpLastKnown && (data[0] != icmpEcho && data[0] != icmpTimestamp || ignoresBroadcasts())
	case unix.IPPROTO_ICMPV6:
		return e.GetFamily() == unix.AF_INET6 && len(data) >= 8 && data[0] == icmp6EchoReply &&
			(protoName(e) != "ping" || uint32(binary.BigEndian.Uint16(data[4:])) == e.GetSrcPort())
	}
	return e.GetProto() < unix.IPPROTO_RAW && !slices.Contains(handledProtocols, e.GetProto())
}

func ignoresBroadcasts() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// takeDatagrams reads the queue of a raw or ping socket, at most room bytes, which is
// as before afterwards. lost counts those that the image does not get, at least.
// Preconditions: no error waits.
func (d *Dumper) takeDatagrams(o *object, fd int, e *sk_inet.InetSkEntry, room int) (ms []image.SockDatagram, lost int, err error) {
	if o.refused {
		return nil, 0, nil
	}
	others, err := d.rawSockets(o, e)
	if err != nil {
		return nil, 0, err
	}
	inodes := map[uint64]bool{o.stat.Ino: true}
	for _, c := range others {
		inodes[c.stat.Ino] = true
		defer d.park(c)
	}
	if apart, err := apartFrom(inodes, e); err != nil || !apart {
		return nil, 1, err
	}
	if e.GetFamily() == unix.AF_INET6 { // its checksum covers where a packet was sent to
		old, _, err := getOpt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO)
		if err != nil {
			return nil, 0, err
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); err != nil {
			return nil, 0, os.NewSyscallError("setsockopt IPV6_RECVPKTINFO", err)
		}
		defer func() { _ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, old) }()
	}
	r := &rawReader{fd: fd, buf: make([]byte, 1<<16), oob: make([]byte, 4096)}
	// What stands first decides: it can be seen without being taken.
	if m, ok, err := r.next(unix.MSG_PEEK); err != nil || !ok || !resendable(e, m) {
		return nil, btoi(ok), err
	}
	total := 0
	var taken []image.SockDatagram
	for len(taken) < maxDatagrams {
		m, ok, err := r.next(0)
		if err != nil {
			d.log.Warn("a socket has an error while its queue is read", "socket", o.link, "error", err)
		}
		if err != nil || !ok {
			break
		}
		if !resendable(e, m) {
			lost++ // from the tree, too, if that runs on
			continue
		}
		taken = append(taken, m)
		if total += len(m.Data); total > room {
			lost++
			continue
		}
		ms = append(ms, m)
	}
	return ms, lost, d.putBack(o, fd, e, others, taken)
}

// rawReader receives from a socket.
type rawReader struct {
	fd       int
	buf, oob []byte
}

func (r *rawReader) next(flags int) (m image.SockDatagram, ok bool, err error) {
	for {
		n, oobn, _, from, err := unix.Recvmsg(r.fd, r.buf, r.oob, flags|unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return m, false, nil
		case err != nil:
			return m, false, os.NewSyscallError("recvmsg", err)
		}
		m, _, ok := datagramOf(from, r.oob[:oobn])
		if !ok {
			m.From = "" // known on one network interface only
		}
		m.Data = bytes.Clone(r.buf[:n])
		return m, true, nil
	}
}

// rawSockets are the raw sockets of the tree, but for o, that get what o gets.
func (d *Dumper) rawSockets(o *object, e *sk_inet.InetSkEntry) ([]*object, error) {
	var out []*object
	for _, c := range d.objects {
		if c == o || c.mode()&unix.S_IFMT != unix.S_IFSOCK || c.isPath() {
			continue
		}
		if err := d.need(c); err != nil {
			return nil, err
		}
		k, err := sockTypeOf(int(c.file.Fd()))
		if err == nil && k == (sockType{int(e.GetFamily()), unix.SOCK_RAW, int(e.GetProto())}) {
			out = append(out, c)
			continue
		}
		d.park(c)
	}
	return out, nil
}

// apartFrom says whether nobody else is harmed by a packet that comes again. With
// ICMP every raw socket gets what is meant for others, and passes over it.
func apartFrom(inodes map[uint64]bool, e *sk_inet.InetSkEntry) (bool, error) {
	table := "raw"
	switch {
	case e.GetProto() == unix.IPPROTO_ICMP && e.GetFamily() == unix.AF_INET, e.GetProto() == unix.IPPROTO_ICMPV6 && e.GetFamily() == unix.AF_INET6:
		return true, nil
	case e.GetFamily() == unix.AF_INET6:
		table = "raw6"
	}
	ss, err := procfs.OwnInet(table)
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(ss, func(s procfs.InetSocket) bool {
		return uint32(s.Local.Port()) == e.GetProto() && !inodes[s.Inode]
	}), nil
}

// putBack sends to a socket of the tree again what was taken out of its queue.
func (d *Dumper) putBack(o *object, fd int, e *sk_inet.InetSkEntry, others []*object, ms []image.SockDatagram) error {
	mark := injected | o.id&0xffff
	for _, c := range others {
		undo, err := filterMarked(int(c.file.Fd()), mark, 0)
		if err != nil {
			return err
		}
		defer undo()
	}
	undo, err := filterMarked(fd, mark, 1<<32-1)
	if err != nil {
		return err
	}
	defer undo()
	if dev, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE); err == nil && dev != "" {
		if err := unix.BindToDevice(fd, ""); err != nil {
			return fmt.Errorf("unbind from network device %s: %w", dev, os.NewSyscallError("setsockopt SO_BINDTODEVICE", err))
		}
		defer func() { _ = unix.BindToDevice(fd, dev) }()
	}
	undoRoom, err := makeRoom(fd)
	if err != nil {
		return err
	}
	defer undoRoom()
	if err := sendAgain(fd, e, mark, ms); err != nil {
		d.log.Warn("packets that waited to be received are lost, as their protocol allows", "socket", o.link, "error", err)
	}
	return nil
}

// makeRoom lets a socket's queue hold more than it may. A limit that nobody has set
// may be odd, and then cannot be set.
func makeRoom(fd int) (undo func(), err error) {
	old, _, err := getOpt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil || old%2 != 0 {
		return func() {}, err
	}
	lock, locks, err := getOpt(fd, unix.SOL_SOCKET, soBufLock)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<29); err != nil {
		return nil, os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
	}
	return func() {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, old/2)
		if locks {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, soBufLock, lock)
		}
	}, nil
}

// filterMarked puts a rule in front of a socket's filter: of packets with a mark it
// gets verdict bytes, 0 for none. A filter that is locked stays.
func filterMarked(fd int, mark, verdict uint32) (undo func(), err error) {
	old, err := sys.GetFilter(fd)
	if errors.Is(err, unix.EACCES) { // an eBPF program, which is refused
		return func() {}, nil
	}
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	prog := old
	if len(old) == 0 {
		prog = []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1}}
	}
	if err := sys.SetFilter(fd, append(markRule(mark, verdict), prog...)); err != nil {
		return func() {}, nil // as long as can be, perhaps
	}
	return func() {
		if len(old) > 0 {
			_ = sys.SetFilter(fd, old)
			return
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	}, nil
}

func markRule(mark, verdict uint32) []unix.SockFilter {
	const skbMark = 1<<32 - 0x1000 + 20 // SKF_AD_OFF + SKF_AD_MARK (include/uapi/linux/filter.h)
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: skbMark},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: mark},
		{Code: unix.BPF_RET | unix.BPF_K, K: verdict},
	}
}

// closeRaw lets a new raw or ping socket get nothing but what is sent to it again.
func (r *Restorer) closeRaw(x *description) error {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	return sys.SetFilter(int(x.file.Fd()), append(markRule(injected|x.id&0xffff, 1<<32-1), drop...))
}

// queueRaw puts packets into the queue of a new raw or ping socket that closeRaw has
// closed, as all others of the tree are. One of ping is bound for good, by which it
// is found; a raw one is to be bound later.
func (r *Restorer) queueRaw(x *description, ms []image.SockDatagram) error {
	e, fd := x.entry.GetIsk(), int(x.file.Fd())
	if !slices.ContainsFunc(ms, func(m image.SockDatagram) bool { return resendable(e, m) }) {
		return nil
	}
	inodes := map[uint64]bool{}
	for _, c := range r.all {
		var st unix.Stat_t
		if c.entry.GetType() == fdinfo.FdTypes_INETSK && c.file != nil && unix.Fstat(int(c.file.Fd()), &st) == nil {
			inodes[st.Ino] = true
		}
	}
	apart, err := apartFrom(inodes, e)
	switch {
	case err != nil:
		return err
	case !apart:
		r.log.Warn("packets that waited to be received are lost, as their protocol allows: another raw socket of this host would get them, too", "file", r.who(x))
		return nil
	}
	if protoName(e) == "ping" {
		if err := r.bindPing(fd, e); err != nil {
			r.log.Warn("answers to pings that waited to be received are lost", "file", r.who(x), "error", err)
			return nil
		}
	}
	if _, err := makeRoom(fd); err != nil { // its limit is set later
		return err
	}
	if err := sendAgain(fd, e, injected|x.id&0xffff, ms); err != nil {
		r.log.Warn("packets that waited to be received are lost, as their protocol allows", "file", r.who(x), "error", err)
	}
	return nil
}

func (r *Restorer) bindPing(fd int, e *sk_inet.InetSkEntry) error {
	if e.GetIfname() != "" {
		return errors.New("it is bound to an address of network interface " + e.GetIfname())
	}
	for _, o := range []struct{ level, v4, v6, want int }{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, unix.SO_REUSEADDR, btoi(e.GetOpts().GetReuseaddr())},
		{-1, unix.IP_FREEBIND, unix.IPV6_FREEBIND, btoi(e.GetIpOpts().GetFreebind())},
	} {
		level, opt := o.level, o.v4
		if level < 0 {
			level, opt = ipOpt{v4: o.v4, v6: o.v6}.of(e.GetFamily())
		}
		if o.want == 0 {
			continue
		}
		if err := unix.SetsockoptInt(fd, level, opt, 1); err != nil {
			return fmt.Errorf("option %d: %w", opt, os.NewSyscallError("setsockopt", err))
		}
	}
	sa, err := sockaddr(e.GetFamily(), e.GetSrcAddr(), e.GetSrcPort(), "")
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return bindError(err)
	}
	return nil
}

// boundPing says whether queueRaw has bound a socket of ping.
func boundPing(fd int, e *sk_inet.InetSkEntry) bool {
	if protoName(e) != "ping" {
		return false
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	_, port, _, err := sockaddrWords(sa)
	return err == nil && port != 0
}

// sendAgain sends packets to a socket of this host. The first that do not arrive say
// that none will.
func sendAgain(fd int, e *sk_inet.InetSkEntry, mark uint32, ms []image.SockDatagram) error {
	s, err := unix.Socket(int(e.GetFamily()), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(s) }()
	for _, o := range []struct{ opt, v int }{{unix.SO_MARK, int(mark)}, {unix.SO_BROADCAST, 1}} {
		if err := unix.SetsockoptInt(s, unix.SOL_SOCKET, o.opt, o.v); err != nil {
			return fmt.Errorf("option %d: %w", o.opt, os.NewSyscallError("setsockopt", err))
		}
	}
	var errs []error
	queued, err := memoryOf(fd)
	if err != nil {
		return err
	}
	for i, m := range ms {
		if !resendable(e, m) {
			continue
		}
		packet, to := rawPacket(e, m)
		err := sendRaw(s, packet, to)
		if err == nil {
			queued, err = arrived(fd, queued)
		}
		if err == nil {
			continue
		}
		errs = append(errs, fmt.Errorf("one of %d bytes from %s: %w", len(m.Data), m.From, err))
		if len(errs) == maxUndelivered {
			errs = append(errs, fmt.Errorf("%d others are not tried", len(ms)-i-1))
			break
		}
	}
	return errors.Join(errs...)
}

// rawPacket makes the whole packet of one that is resendable, and says where it is
// sent to: an address of the loopback interface, whatever its header says.
func rawPacket(e *sk_inet.InetSkEntry, m image.SockDatagram) ([]byte, netip.Addr) {
	be := binary.BigEndian
	if e.GetFamily() == unix.AF_INET && protoName(e) == "raw" {
		return m.Data, netip.AddrFrom4([4]byte{127, 255, 255, 255})
	}
	from := netip.MustParseAddrPort(m.From).Addr().AsSlice()
	ttl := m.TTL
	if ttl == 0 {
		ttl = 64
	}
	if e.GetFamily() == unix.AF_INET {
		to := addrBytes(e.GetSrcAddr())
		if !anySet(e.GetSrcAddr()) {
			to = []byte{127, 0, 0, 1}
		}
		p := be.AppendUint16([]byte{0x45, m.TOS}, uint16(ipv4Header+len(m.Data))) // the kernel fills in what is 0
		p = append(p, 0, 0, 0, 0, ttl, uint8(e.GetProto()), 0, 0)
		return append(append(append(p, from...), to[:4]...), m.Data...), netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	p := be.AppendUint32(nil, 6<<28|uint32(m.TOS)<<20)
	p = be.AppendUint16(p, uint16(len(m.Data)))
	p = append(p, uint8(e.GetProto()), ttl)
	return append(append(append(p, from...), netip.MustParseAddr(m.To).AsSlice()...), m.Data...), netip.IPv6Loopback()
}
