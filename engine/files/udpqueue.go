package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/sys"
)

const (
	maxDatagrams     = 1 << 16
	maxDatagramBytes = 16 << 20 // of all sockets of a tree
	maxDatagram      = 1<<16 - 1
	maxUDP           = 65507 // bytes of content, over IPv4
	maxUndelivered   = 3     // datagrams that do not arrive, before no more are sent
	udpHeader        = 8
)

// dumpWaiting reads the datagrams that wait to be received. UDP may lose them, so
// that none of them is a reason to refuse; what is not carried is told.
func (d *Dumper) dumpWaiting(o *object, fd int, e *sk_inet.InetSkEntry) error {
	if d.dry() {
		return nil // a server that runs takes what comes
	}
	// One without content counts, too, which SIOCINQ does not tell.
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	if _, err := unix.Poll(p, 0); err != nil {
		return os.NewSyscallError("poll", err)
	}
	// An error that waits would be taken from the program by looking at the queue.
	if p[0].Revents&(unix.POLLIN|unix.POLLRDHUP|unix.POLLERR) == unix.POLLIN {
		read := func(o *object, fd int, _ *sk_inet.InetSkEntry, room int) ([]image.SockDatagram, int, error) {
			ms, lost, err := peekDatagrams(fd, room)
			if err == nil {
				ms, err = d.withHidden(o, fd, ms)
			}
			return ms, lost, err
		}
		if e.GetType() == unix.SOCK_RAW || protoName(e) == "ping" {
			read = d.takeDatagrams
		}
		ms, lost, err := read(o, fd, e, maxDatagramBytes-d.waiting)
		if err != nil {
			return err
		}
		for _, m := range ms {
			d.waiting += len(m.Data)
		}
		if len(ms) > 0 {
			o.sockFacts().Datagrams = ms
		}
		if lost == 0 {
			return nil
		}
	} else if p[0].Revents&(unix.POLLIN|unix.POLLRDHUP) != unix.POLLIN {
		return nil
	}
	h := o.first()
	d.log.Warn("some datagrams that wait to be received do not travel, as their protocol allows", "pid", h.proc.Pid, "fd", h.fd, "socket", o.link)
	return nil
}

// peekDatagrams reads a queue without taking it out, at most room bytes. lost counts
// those for which there is none, or that cannot be made again. The peek offset is the socket's own, so it is put back as it was.
func peekDatagrams(fd, room int) (ms []image.SockDatagram, lost int, err error) {
	old, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err != nil {
		return nil, 0, os.NewSyscallError("getsockopt SO_PEEK_OFF", err)
	}
	defer func() { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, old) }()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0); err != nil {
		return nil, 0, os.NewSyscallError("setsockopt SO_PEEK_OFF", err)
	}
	buf, oob, total := make([]byte, 1<<16), make([]byte, 4096), 0
	for len(ms)+lost < maxDatagrams {
		n, oobn, _, from, err := unix.Recvmsg(fd, buf, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			ms, err = hiddenHead(fd, ms, buf, oob)
			return ms, lost, err
		case err != nil:
			return nil, 0, os.NewSyscallError("recvmsg", err)
		}
		m, segment, ok := datagramOf(from, oob[:oobn])
		if total += n; !ok || total > room {
			lost++
			continue
		}
		// What UDP_GRO put together comes apart again.
		for rest := buf[:n]; ; {
			k := len(rest)
			if segment > 0 && segment < k {
				k = segment
			}
			m.Data = bytes.Clone(rest[:k])
			ms = append(ms, m)
			if rest = rest[k:]; len(rest) == 0 {
				break
			}
		}
	}
	return ms, lost, nil
}

// hiddenHead sees to an empty datagram at the head of a queue, as peeker.emptyHead does.
// Without an offset the head is always seen.
func hiddenHead(fd int, ms []image.SockDatagram, buf, oob []byte) ([]image.SockDatagram, error) {
	if len(ms) > 0 && len(ms[0].Data) == 0 {
		return ms, nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, -1); err != nil {
		return nil, os.NewSyscallError("setsockopt SO_PEEK_OFF", err)
	}
	for {
		n, oobn, _, from, err := unix.Recvmsg(fd, buf, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), err == nil && n > 0:
			return ms, nil
		case err != nil:
			return nil, os.NewSyscallError("recvmsg", err)
		}
		if m, _, ok := datagramOf(from, oob[:oobn]); ok {
			return slices.Insert(ms, 0, m), nil
		}
		return ms, nil
	}
}

// datagramOf takes up what the kernel tells of a datagram. segment is the size of
// the pieces that it was put together from, 0 for none. ok is false for one whose
// sender is known on one network interface only.
func datagramOf(from unix.Sockaddr, oob []byte) (m image.SockDatagram, segment int, ok bool) {
	var sender netip.AddrPort
	switch a := from.(type) {
	case *unix.SockaddrInet4:
		sender = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		sender = netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
		if a.ZoneId != 0 {
			return m, 0, false
		}
	default:
		return m, 0, false
	}
	m.From = sender.String()
	cs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return m, 0, true
	}
	for _, c := range cs {
		switch level, typ := int(c.Header.Level), int(c.Header.Type); {
		case level == unix.IPPROTO_IP && typ == unix.IP_PKTINFO && len(c.Data) >= 12:
			m.To = netip.AddrFrom4([4]byte(c.Data[8:12])).String()
		case level == unix.IPPROTO_IPV6 && typ == unix.IPV6_PKTINFO && len(c.Data) >= 16:
			m.To = netip.AddrFrom16([16]byte(c.Data[:16])).Unmap().String()
		case typ == unix.IP_TTL && level == unix.IPPROTO_IP, typ == unix.IPV6_HOPLIMIT && level == unix.IPPROTO_IPV6:
			if len(c.Data) >= 4 {
				m.TTL = uint8(binary.NativeEndian.Uint32(c.Data))
			}
		case level == unix.IPPROTO_IP && typ == unix.IP_TOS && len(c.Data) >= 1:
			m.TOS = c.Data[0]
		case level == unix.IPPROTO_IPV6 && typ == unix.IPV6_TCLASS && len(c.Data) >= 4:
			m.TOS = uint8(binary.NativeEndian.Uint32(c.Data))
		case level == unix.IPPROTO_UDP && typ == udpGRO && len(c.Data) >= 4:
			segment = int(binary.NativeEndian.Uint32(c.Data))
		}
	}
	return m, segment, true
}

func checkDatagrams(ms []image.SockDatagram) error {
	if len(ms) > maxDatagrams {
		return fmt.Errorf("%d datagrams wait", len(ms))
	}
	total := 0
	for _, m := range ms {
		if _, err := netip.ParseAddrPort(m.From); err != nil || strings.Contains(m.From, "%") {
			return fmt.Errorf("a datagram from %.64q", m.From)
		}
		if a, err := netip.ParseAddr(m.To); m.To != "" && (err != nil || a.Zone() != "") {
			return fmt.Errorf("a datagram to %.64q", m.To)
		}
		if total += len(m.Data); len(m.Data) > maxDatagram || total > maxDatagramBytes {
			return fmt.Errorf("a datagram of %d bytes, of %d that wait", len(m.Data), total)
		}
	}
	return nil
}

// queueInet puts what waited to be received into the queue of a new socket. What does
// not arrive is told: the protocols may lose it.
func queueInet(r *Restorer, x *description) error {
	e, f := x.entry.GetIsk(), r.facts[x.id]
	if r.isForwarded(x) || f == nil || f.Sock == nil || len(f.Sock.Datagrams) == 0 {
		return nil
	}
	switch protoName(e) {
	case "udp", "udplite":
		return r.queueUDP(x, f.Sock.Datagrams)
	case "raw", "ping":
		return r.queueRaw(x, f.Sock.Datagrams)
	}
	return nil
}

// queueUDP: for that the socket gets a port that nobody knows, to which the datagrams
// are sent with the addresses of their senders; then it is as new again, but for the
// queue.
func (r *Restorer) queueUDP(x *description, ms []image.SockDatagram) error {
	e, fd := x.entry.GetIsk(), int(x.file.Fd())
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<29); err != nil {
		return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
	}
	var anyAddr unix.Sockaddr = &unix.SockaddrInet4{}
	if e.GetFamily() == unix.AF_INET6 {
		anyAddr = &unix.SockaddrInet6{}
	}
	// Neither address nor port of such a bind is there to stay (net/ipv4/af_inet.c
	// __inet_bind): to disconnect takes them away.
	if err := unix.Bind(fd, anyAddr); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := sendDatagrams(fd, uint8(e.GetProto()), ms); err != nil {
		r.log.Warn("datagrams that waited to be received are lost, as UDP allows", "file", r.who(x), "error", err)
	}
	if err := sys.Disconnect(fd); err != nil {
		return fmt.Errorf("take the port from a socket: %w", err)
	}
	return nil
}

// memoryOf is how much memory the queue of a socket takes, bytes.
func memoryOf(fd int) (uint32, error) {
	b := make([]byte, 4) // SK_MEMINFO_RMEM_ALLOC is the first number
	_, err := sys.GetSockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, b)
	return binary.NativeEndian.Uint32(b), err
}

// arrived waits until more is in a queue than there was, bytes of memory, and tells how
// much that is. To look at the queue would not do: a second look passes over what has
// no content (net/core/datagram.c __skb_try_recv_from_queue).
func arrived(fd int, was uint32) (uint32, error) {
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		n, err := memoryOf(fd)
		if err != nil {
			return 0, err
		}
		if n > was {
			return n, nil
		}
		if time.Now().After(until) {
			return was, errors.New("it does not arrive")
		}
	}
}

func sendDatagrams(fd int, protocol uint8, ms []image.SockDatagram) error {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	_, port, _, err := sockaddrWords(sa)
	if err != nil {
		return err
	}
	local, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	mine := map[netip.Addr]bool{}
	for _, a := range local {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			mine[p.Addr().WithZone("")] = true
		}
	}
	var errs []error
	var queued uint32
	raw := map[int]int{} // by family
	defer func() {
		for _, s := range raw {
			_ = unix.Close(s)
		}
	}()
	for i, m := range ms {
		from, err := netip.ParseAddrPort(m.From)
		if err != nil {
			return err
		}
		if len(m.Data) > maxUDP {
			errs = append(errs, fmt.Errorf("one of %d bytes", len(m.Data)))
			continue
		}
		family := unix.AF_INET6
		if from.Addr().Is4() {
			family = unix.AF_INET
		}
		s, ok := raw[family]
		if !ok {
			if s, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
				return os.NewSyscallError("socket", err)
			}
			raw[family] = s
		}
		to, err := netip.ParseAddr(m.To)
		// Only to addresses of this host: nothing of it must leave.
		if err != nil || to.Is4() != from.Addr().Is4() || !mine[to] && !(to.Is4() && to.IsLoopback()) {
			to = netip.IPv6Loopback()
			if from.Addr().Is4() {
				to = netip.AddrFrom4([4]byte{127, 0, 0, 1})
			}
		}
		err = sendRaw(s, packetOf(protocol, from, netip.AddrPortFrom(to, uint16(port)), m), to)
		if err == nil {
			queued, err = arrived(fd, queued)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("one of %d bytes from %s: %w", len(m.Data), from, err))
			if len(errs) == maxUndelivered {
				errs = append(errs, fmt.Errorf("%d others are not tried", len(ms)-i-1))
				break
			}
		}
	}
	return errors.Join(errs...)
}

func sendRaw(s int, packet []byte, to netip.Addr) error {
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.As16()}
	if to.Is4() {
		sa = &unix.SockaddrInet4{Addr: to.As4()}
	}
	return os.NewSyscallError("sendto", unix.Sendto(s, packet, 0, sa))
}

// packetOf makes the whole packet of a datagram of UDP or UDP-Lite (RFC 791, 8200, 768, 3828).
func packetOf(protocol uint8, from, to netip.AddrPort, m image.SockDatagram) []byte {
	be := binary.BigEndian
	ttl := m.TTL
	if ttl == 0 {
		ttl = 64
	}
	n := uint16(udpHeader + len(m.Data))
	udp := be.AppendUint16(nil, from.Port())
	udp = be.AppendUint16(udp, to.Port())
	if protocol == unix.IPPROTO_UDPLITE {
		udp = be.AppendUint16(udp, 0) // the checksum covers all of it
	} else {
		udp = be.AppendUint16(udp, n)
	}
	udp = append(be.AppendUint16(udp, 0), m.Data...)
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	if !from.Addr().Is4() || protocol == unix.IPPROTO_UDPLITE { // UDP over IPv4 needs none
		sum := onesSum(onesSum(onesSum(uint32(n)+uint32(protocol), src), dst), udp)
		for sum>>16 != 0 {
			sum = sum&0xffff + sum>>16
		}
		if sum = ^sum & 0xffff; sum == 0 {
			sum = 0xffff
		}
		be.PutUint16(udp[6:], uint16(sum))
	}
	if from.Addr().Is4() { // the kernel fills in what is 0
		p := be.AppendUint16([]byte{0x45, m.TOS}, uint16(ipv4Header)+n)
		p = append(p, 0, 0, 0, 0, ttl, protocol, 0, 0)
		return append(append(append(p, src...), dst...), udp...)
	}
	p := be.AppendUint32(nil, 6<<28|uint32(m.TOS)<<20)
	p = be.AppendUint16(p, n)
	p = append(p, protocol, ttl)
	return append(append(append(p, src...), dst...), udp...)
}

// onesSum adds 16-bit words to a sum that is folded later.
func onesSum(sum uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum&0xffff + sum>>16
}
