package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/plan"
)

// kindInet carries TCP (and multipath TCP) sockets that listen or have no
// connection, UDP, UDP-Lite, raw and ping sockets (rawsk.go), and, if told so,
// TCP connections (tcp.go).
var kindInet = &kind{
	name: "internet socket", typ: fdinfo.FdTypes_INETSK,
	takes: func(_ *Dumper, o *object) bool {
		if o.mode()&unix.S_IFMT != unix.S_IFSOCK || o.isPath() {
			return false
		}
		fd := int(o.file.Fd())
		fam, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		typ, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		pro, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		return inetCarried(fam, typ, pro)
	},
	dump:   dumpInet,
	finish: finishInets,
	check:  checkInet,
	open:   openInets,
	seal:   sealInets,
}

func inetCarried(family, typ, protocol int) bool {
	if family != unix.AF_INET && family != unix.AF_INET6 {
		return false
	}
	switch {
	case typ == unix.SOCK_STREAM && (protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_MPTCP):
		return true
	case typ == unix.SOCK_DGRAM && (protocol == unix.IPPROTO_UDP || protocol == unix.IPPROTO_UDPLITE):
		return true
	case typ == unix.SOCK_RAW, isPing(uint32(family), uint32(typ), uint32(protocol)):
		return true
	}
	return false
}

// States of sockets, of all families (include/net/tcp_states.h).
const (
	stateEstablished = 1
	stateClose       = 7
	stateListen      = 10
)

// inetState is what a plan wants to know of a socket.
type inetState struct {
	e     *sk_inet.InetSkEntry
	muted bool // while its stream is read
	leads bool // its other end is outside the tree
}

// connected says whether it is one end of a TCP connection, or about to be.
func (s *inetState) connected() bool {
	return s.e.GetType() == unix.SOCK_STREAM && connected(s.e.GetState())
}

// port is the address that must be free on the destination. A connection needs
// only that nobody has the same one.
func (s *inetState) port(o *object) (plan.Port, bool) {
	if s.e == nil || s.e.GetSrcPort() == 0 || s.connected() || tcpEnded(s.e) {
		return plan.Port{}, false
	}
	network := "tcp"
	switch {
	case s.e.GetType() == unix.SOCK_RAW, s.e.GetProto() == unix.IPPROTO_UDPLITE, isPing(s.e.GetFamily(), s.e.GetType(), s.e.GetProto()):
		return plan.Port{}, false // it has no port, or one of a space of its own
	case s.e.GetType() == unix.SOCK_DGRAM:
		// Receivers of one multicast port share it with whoever else wants it.
		if s.e.GetOpts().GetReuseaddr() {
			return plan.Port{}, false
		}
		network = "udp"
	}
	return plan.Port{Network: network, Address: addrPort(s.e.GetSrcAddr(), s.e.GetSrcPort(), s.e.GetIfname()), Pid: o.first().proc.Pid}, true
}

func addrPort(words []uint32, port uint32, zone string) string {
	ip, _ := netip.AddrFromSlice(addrBytes(words))
	host := ip.String()
	if zone != "" {
		host += "%" + zone
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

func dumpInet(d *Dumper, o *object) error {
	fd := int(o.file.Fd())
	if other, err := d.refuseOtherNetns(o); other || err != nil {
		return err
	}
	var n [3]int
	for i, opt := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_PROTOCOL} {
		var err error
		if n[i], _, err = getOpt(fd, unix.SOL_SOCKET, opt); err != nil {
			return err
		}
	}
	opts, err := d.dumpSockOpts(o)
	if err != nil {
		return err
	}
	e := &sk_inet.InetSkEntry{
		Id: proto.Uint32(o.id), Ino: proto.Uint32(uint32(o.stat.Ino)), Family: proto.Uint32(uint32(n[0])), Type: proto.Uint32(uint32(n[1])),
		Proto: proto.Uint32(uint32(n[2])), State: proto.Uint32(stateClose), SrcPort: proto.Uint32(0), DstPort: proto.Uint32(0),
		Flags: proto.Uint32(uint32(o.flags)), Backlog: proto.Uint32(0), Fown: o.fown, Opts: opts,
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	var zone uint32
	if e.SrcAddr, *e.SrcPort, zone, err = sockaddrWords(local); err != nil {
		return err
	}
	if zone != 0 {
		ifi, err := net.InterfaceByIndex(int(zone))
		if err != nil {
			return fmt.Errorf("name of network interface %d: %w", zone, err)
		}
		e.Ifname = proto.String(ifi.Name)
	}
	o.link = fmt.Sprintf("socket:[%d] (%s %s)", o.stat.Ino, protoName(e), addrPort(e.SrcAddr, e.GetSrcPort(), e.GetIfname()))
	if n[1] == unix.SOCK_STREAM {
		err = d.dumpTCP(o, fd, e)
	} else {
		err = d.dumpDatagrams(o, fd, e)
	}
	if err != nil {
		return err
	}
	if err := dumpIPOpts(fd, e); err != nil {
		return err
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: proto.Uint32(o.id), Isk: e})
	o.state = &inetState{e: e}
	return nil
}

func protoName(e *sk_inet.InetSkEntry) string {
	switch {
	case e.GetType() == unix.SOCK_RAW:
		return "raw"
	case isPing(e.GetFamily(), e.GetType(), e.GetProto()):
		return "ping"
	case e.GetProto() == unix.IPPROTO_UDPLITE:
		return "udplite"
	case e.GetType() == unix.SOCK_DGRAM:
		return "udp"
	case e.GetProto() == unix.IPPROTO_MPTCP:
		return "mptcp"
	}
	return "tcp"
}

func (d *Dumper) dumpTCP(o *object, fd int, e *sk_inet.InetSkEntry) error {
	listening, _, err := getOpt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return err
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return os.NewSyscallError("getsockopt TCP_INFO", err)
	}
	switch {
	case listening != 0:
		e.State = proto.Uint32(stateListen)
		if info != nil {
			// For a listener these are the queue of accept(2) and its limit
			// (net/ipv4/tcp.c tcp_get_info).
			e.Backlog = proto.Uint32(info.Sacked)
			if info.Unacked > 0 && !d.opts.SkipInFlight {
				d.passes(o, fmt.Sprintf("%d connections wait to be accepted", info.Unacked), "retry when the program has accepted them, or leave them behind with --skip-in-flight")
			}
		}
	case info != nil && (d.opts.TCPEstablished || d.opts.TCPClose) && e.GetProto() == unix.IPPROTO_TCP && connected(uint32(info.State)):
		if err := d.dumpConnection(o, fd, e, info.State); err != nil {
			return err
		}
	case info != nil && info.State != stateClose:
		d.refuse(o, fmt.Sprintf("the TCP connection is in state %s", tcpState(info.State)), "let the program or its peer end it first; dump and restore carry connections with --tcp-established and close them with --tcp-close")
	default:
		// A connection that is over is CLOSE, too, but its readers get end of file.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
		if _, err := unix.Poll(p, 0); err == nil && p[0].Revents&(unix.POLLIN|unix.POLLRDHUP|unix.POLLERR) != 0 {
			if err := d.dumpEnded(o, fd, e, p[0].Revents); err != nil {
				return err
			}
		}
	}
	if err := d.refuseSigned(o, e); err != nil {
		return err
	}
	d.dumpTCPOptions(o, fd, e)
	e.TcpOpts = &tcp_stream.TcpOptsEntry{}
	for _, x := range tcpOpts {
		n, ok, err := getOpt(fd, unix.SOL_TCP, x.opt)
		if err != nil {
			return err
		}
		if ok {
			x.set(e.TcpOpts, uint32(n))
		}
	}
	return nil
}

func tcpState(s uint8) string {
	names := []string{"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING"}
	if int(s) < len(names) {
		return names[s]
	}
	return strconv.Itoa(int(s))
}

var tcpOpts = []struct {
	opt int
	set func(*tcp_stream.TcpOptsEntry, uint32)
	get func(*tcp_stream.TcpOptsEntry) (int, bool)
}{
	{unix.TCP_NODELAY, func(e *tcp_stream.TcpOptsEntry, n uint32) { e.Nodelay = proto.Bool(n != 0) },
		func(e *tcp_stream.TcpOptsEntry) (int, bool) { return btoi(e.GetNodelay()), e.Nodelay != nil }},
	{unix.TCP_CORK, func(e *tcp_stream.TcpOptsEntry, n uint32) { e.Cork = proto.Bool(n != 0) },
		func(e *tcp_stream.TcpOptsEntry) (int, bool) { return btoi(e.GetCork()), e.Cork != nil }},
	{unix.TCP_KEEPCNT, func(e *tcp_stream.TcpOptsEntry, n uint32) { e.Keepcnt = proto.Uint32(n) },
		func(e *tcp_stream.TcpOptsEntry) (int, bool) { return int(e.GetKeepcnt()), e.Keepcnt != nil }},
	{unix.TCP_KEEPIDLE, func(e *tcp_stream.TcpOptsEntry, n uint32) { e.Keepidle = proto.Uint32(n) },
		func(e *tcp_stream.TcpOptsEntry) (int, bool) { return int(e.GetKeepidle()), e.Keepidle != nil }},
	{unix.TCP_KEEPINTVL, func(e *tcp_stream.TcpOptsEntry, n uint32) { e.Keepintvl = proto.Uint32(n) },
		func(e *tcp_stream.TcpOptsEntry) (int, bool) { return int(e.GetKeepintvl()), e.Keepintvl != nil }},
}

// dumpDatagrams is for every type of socket but streams.
func (d *Dumper) dumpDatagrams(o *object, fd int, e *sk_inet.InetSkEntry) error {
	peer, err := unix.Getpeername(fd)
	switch {
	case errors.Is(err, unix.ENOTCONN):
		// A raw socket or one of ping may be connected to an address without a port.
		if err := d.dumpRawPeer(o, e); err != nil {
			return err
		}
	case err != nil:
		return os.NewSyscallError("getpeername", err)
	default:
		if e.DstAddr, *e.DstPort, _, err = sockaddrWords(peer); err != nil {
			return err
		}
		e.State = proto.Uint32(stateEstablished)
	}
	if err := d.refuseUnsent(o, fd); err != nil {
		return err
	}
	return d.dumpWaiting(o, fd, e)
}

// refuseUnsent refuses a socket that holds back a datagram to be completed
// (UDP_CORK, MSG_MORE), which nobody can read. What a network device has still
// to send counts, too, but is soon gone.
func (d *Dumper) refuseUnsent(o *object, fd int) error {
	for until := time.Now().Add(20 * time.Millisecond); ; time.Sleep(time.Millisecond) {
		n, err := unix.IoctlGetInt(fd, unix.TIOCOUTQ)
		if errors.Is(err, unix.ENOTTY) { // a ping socket, which sends at once
			return nil
		}
		if err != nil {
			return os.NewSyscallError("ioctl SIOCOUTQ", err)
		}
		if n == 0 {
			return nil
		}
		if d.dry() { // more may come, and go
			if corked, _, err := getOpt(fd, unix.IPPROTO_UDP, unix.UDP_CORK); err != nil || corked == 0 {
				return nil
			}
		}
		if d.dry() || time.Now().After(until) {
			break
		}
	}
	d.refuse(o, "what it holds back (UDP_CORK, MSG_MORE) cannot be read", "let the program send it")
	return nil
}

// IP options by family. The two families number theirs differently.
func dumpIPOpts(fd int, e *sk_inet.InetSkEntry) error {
	ip := &sk_inet.IpOptsEntry{}
	if e.GetFamily() == unix.AF_INET6 {
		n, ok, err := getOpt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return err
		}
		if ok {
			e.V6Only = proto.Bool(n != 0)
		}
	}
	for _, x := range ipOpts {
		level, opt := x.of(e.GetFamily())
		n, ok, err := getOpt(fd, level, opt)
		if err != nil {
			return err
		}
		if ok && n >= 0 { // -1: the default of the route
			x.set(ip, uint32(n))
		}
	}
	e.IpOpts = ip
	return dumpRawOpts(fd, e)
}

var ipOpts = []ipOpt{
	{unix.IP_FREEBIND, unix.IPV6_FREEBIND, func(e *sk_inet.IpOptsEntry, n uint32) { e.Freebind = proto.Bool(n != 0) },
		func(e *sk_inet.IpOptsEntry) (int, bool) { return btoi(e.GetFreebind()), e.Freebind != nil }},
	{unix.IP_PKTINFO, unix.IPV6_RECVPKTINFO, func(e *sk_inet.IpOptsEntry, n uint32) { e.Pktinfo = proto.Bool(n != 0) },
		func(e *sk_inet.IpOptsEntry) (int, bool) { return btoi(e.GetPktinfo()), e.Pktinfo != nil }},
	{unix.IP_TOS, unix.IPV6_TCLASS, func(e *sk_inet.IpOptsEntry, n uint32) { e.Tos = proto.Uint32(n) },
		func(e *sk_inet.IpOptsEntry) (int, bool) { return int(e.GetTos()), e.Tos != nil }},
	{unix.IP_TTL, unix.IPV6_UNICAST_HOPS, func(e *sk_inet.IpOptsEntry, n uint32) { e.Ttl = proto.Uint32(n) },
		func(e *sk_inet.IpOptsEntry) (int, bool) { return int(e.GetTtl()), e.Ttl != nil }},
}

type ipOpt struct {
	v4, v6 int
	set    func(*sk_inet.IpOptsEntry, uint32)
	get    func(*sk_inet.IpOptsEntry) (int, bool)
}

func (x ipOpt) of(family uint32) (level, opt int) {
	if family == unix.AF_INET6 {
		return unix.IPPROTO_IPV6, x.v6
	}
	return unix.IPPROTO_IP, x.v4
}

// sockaddrWords splits an address as CRIU keeps it: the bytes of the address in
// network order as 32-bit words in the host's, one or four of them.
func sockaddrWords(sa unix.Sockaddr) (words []uint32, port, zone uint32, err error) {
	var b []byte
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		b, port = a.Addr[:], uint32(a.Port)
	case *unix.SockaddrInet6:
		b, port, zone = a.Addr[:], uint32(a.Port), a.ZoneId
	default:
		return nil, 0, 0, fmt.Errorf("address of type %T", sa)
	}
	return wordsOf(b), port, zone, nil
}

func wordsOf(b []byte) []uint32 {
	var words []uint32
	for ; len(b) >= 4; b = b[4:] {
		words = append(words, binary.NativeEndian.Uint32(b))
	}
	return words
}

func addrBytes(words []uint32) []byte {
	var b []byte
	for _, w := range words {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return b
}

// sockaddr builds the address of an entry.
func sockaddr(family uint32, words []uint32, port uint32, ifname string) (unix.Sockaddr, error) {
	b := addrBytes(words)
	if family == unix.AF_INET {
		sa := &unix.SockaddrInet4{Port: int(port)}
		copy(sa.Addr[:], b)
		return sa, nil
	}
	sa := &unix.SockaddrInet6{Port: int(port)}
	copy(sa.Addr[:], b)
	if ifname != "" {
		ifi, err := net.InterfaceByName(ifname)
		if err != nil {
			return nil, fmt.Errorf("network interface %s: %w", ifname, err)
		}
		sa.ZoneId = uint32(ifi.Index)
	}
	return sa, nil
}

func checkInet(r *Restorer, x *description) error {
	e := x.entry.GetIsk()
	if !inetCarried(int(e.GetFamily()), int(e.GetType()), int(e.GetProto())) {
		return fmt.Errorf("sockets of family %d, type %d, protocol %d are not carried", e.GetFamily(), e.GetType(), e.GetProto())
	}
	want := 1
	if e.GetFamily() == unix.AF_INET6 {
		want = 4
	}
	if n := len(e.GetSrcAddr()); n != want && n != 0 {
		return fmt.Errorf("its address has %d words, expected %d", n, want)
	}
	if n := len(e.GetDstAddr()); n != want && n != 0 {
		return fmt.Errorf("its peer's address has %d words, expected %d", n, want)
	}
	if e.GetSrcPort() > 65535 || e.GetDstPort() > 65535 {
		return errors.New("a port is out of range")
	}
	stream := e.GetType() == unix.SOCK_STREAM
	switch s := e.GetState(); {
	case stream && s != stateListen && s != stateClose && !connected(s):
		return fmt.Errorf("TCP sockets in state %s are not carried", tcpState(uint8(min(s, 255))))
	case !stream && s != stateEstablished && s != stateClose:
		return fmt.Errorf("a %s socket cannot be in state %d", protoName(e), s)
	}
	if err := checkSockOpts(e.GetOpts()); err != nil {
		return err
	}
	if stream && connected(e.GetState()) {
		return r.checkConnection(x)
	}
	return checkRawOpts(e)
}

// openInets makes the sockets in rounds: what waits at a raw socket is sent to it
// while all others of the tree are there and closed to it, and sockets that share a
// port, with SO_REUSEADDR, can all be bound only while none listens.
func openInets(r *Restorer, xs []*description) []error {
	for _, round := range []func(*Restorer, *description) error{makeInet, queueInet, openInet, listenInet} {
		if errs := openEach(round)(r, xs); len(errs) > 0 {
			return errs
		}
	}
	return nil
}

func makeInet(r *Restorer, x *description) error {
	e := x.entry.GetIsk()
	if done, err := r.openHandedSocket(x, e.GetIno()); done {
		return err
	}
	fd, err := unix.Socket(int(e.GetFamily()), int(e.GetType())|unix.SOCK_CLOEXEC, int(e.GetProto()))
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	x.file = os.NewFile(uintptr(fd), fmt.Sprintf("%s socket", protoName(e)))
	// A raw socket has its port, the protocol, from the start, and then cannot change it.
	if have, ok, err := getOpt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); err == nil && ok && e.V6Only != nil && have != btoi(e.GetV6Only()) {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, btoi(e.GetV6Only())); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
	}
	if e.GetType() == unix.SOCK_RAW || protoName(e) == "ping" {
		return r.closeRaw(x)
	}
	return nil
}

func openInet(r *Restorer, x *description) error {
	if r.isForwarded(x) {
		return nil
	}
	e, fd := x.entry.GetIsk(), int(x.file.Fd())
	if e.GetType() == unix.SOCK_RAW || protoName(e) == "ping" { // see closeRaw
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil {
			return os.NewSyscallError("setsockopt SO_DETACH_FILTER", err)
		}
	}
	// What is left of old connections (TIME_WAIT) would keep a TCP port busy.
	reuse := e.GetOpts().GetReuseaddr() || e.GetType() == unix.SOCK_STREAM
	if err := r.restoreSockOpts(x, e.GetOpts(), &reuse); err != nil {
		return err
	}
	for _, o := range ipOpts {
		n, ok := o.get(e.GetIpOpts())
		if e.GetIpOpts() == nil || !ok {
			continue
		}
		level, opt := o.of(e.GetFamily())
		if have, ok, err := getOpt(fd, level, opt); err == nil && ok && have == n {
			continue
		}
		if err := unix.SetsockoptInt(fd, level, opt, n); err != nil {
			return fmt.Errorf("IP option %d: %w", opt, os.NewSyscallError("setsockopt", err))
		}
	}
	// IP_TOS brings a priority of its own.
	if p := e.GetOpts().SoPriority; p != nil {
		if err := setIfOther(fd, unix.SO_PRIORITY, int(*p)); err != nil {
			return err
		}
	}
	if err := restoreRawOpts(fd, e); err != nil {
		return err
	}
	if e.GetTcpOpts() != nil {
		for _, o := range tcpOpts {
			n, ok := o.get(e.GetTcpOpts())
			if !ok {
				continue
			}
			if have, ok, err := getOpt(fd, unix.SOL_TCP, o.opt); err == nil && ok && have == n {
				continue
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_TCP, o.opt, n); err != nil {
				return fmt.Errorf("TCP option %d: %w", o.opt, os.NewSyscallError("setsockopt", err))
			}
		}
	}
	c := r.conns[x]
	if c != nil {
		// From here on it binds whatever else is bound, and sends nothing.
		if err := repairOn(fd); err != nil {
			return err
		}
	}
	if tcpEnded(e) || e.GetType() == unix.SOCK_STREAM && connected(e.GetState()) && c == nil {
		// With --tcp-close every connection has ended. The call says that it is not connected, and does it all the same.
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return os.NewSyscallError("shutdown", err)
		}
	} else if (e.GetSrcPort() != 0 || anySet(e.GetSrcAddr())) && !boundPing(fd, e) {
		sa, err := sockaddr(e.GetFamily(), e.GetSrcAddr(), e.GetSrcPort(), e.GetIfname())
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, sa); err != nil {
			return fmt.Errorf("bind %s %s: %w", protoName(e), addrPort(e.GetSrcAddr(), e.GetSrcPort(), e.GetIfname()), bindError(err))
		}
	}
	if c != nil {
		if err := c.connect(fd); err != nil {
			return err
		}
	}
	if e.GetType() != unix.SOCK_STREAM && e.GetState() == stateEstablished && len(e.GetDstAddr()) > 0 {
		sa, err := sockaddr(e.GetFamily(), e.GetDstAddr(), e.GetDstPort(), e.GetIfname())
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			return fmt.Errorf("connect %s to %s: %w", protoName(e), addrPort(e.GetDstAddr(), e.GetDstPort(), ""), os.NewSyscallError("connect", err))
		}
	}
	return setStatus(x.file, e.GetFlags())
}

func bindError(err error) error {
	err = os.NewSyscallError("bind", err)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w: another socket of this host has it; end its owner", err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%w: this host does not have the address; move the address here first", err)
	}
	return err
}

func anySet(words []uint32) bool {
	for _, w := range words {
		if w != 0 {
			return true
		}
	}
	return false
}

func listenInet(r *Restorer, x *description) error {
	e := x.entry.GetIsk()
	if e.GetType() != unix.SOCK_STREAM || r.isForwarded(x) || r.conns[x] != nil {
		return nil
	}
	fd := int(x.file.Fd())
	if e.GetState() == stateListen {
		if err := unix.Listen(fd, int(min(e.GetBacklog(), 1<<30))); err != nil {
			return fmt.Errorf("listen on %s: %w", addrPort(e.GetSrcAddr(), e.GetSrcPort(), e.GetIfname()), os.NewSyscallError("listen", err))
		}
	}
	// It was on to bind.
	return setIfOther(fd, unix.SO_REUSEADDR, btoi(e.GetOpts().GetReuseaddr()))
}
