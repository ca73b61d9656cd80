package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/sys"
)

// sockType is what decides which options a socket has.
type sockType struct{ family, typ, protocol int }

func (k sockType) inet() bool { return k.family == unix.AF_INET || k.family == unix.AF_INET6 }

// ip4 says whether options of level IPPROTO_IP can be read: a socket of IPv6 has
// them, too, for its IPv4 datagrams.
func (k sockType) ip4() bool {
	return k.family == unix.AF_INET || k.family == unix.AF_INET6 && k.typ != unix.SOCK_RAW
}

func (k sockType) ip6() bool { return k.family == unix.AF_INET6 }

func (k sockType) udp() bool {
	return k.inet() && k.typ == unix.SOCK_DGRAM && (k.protocol == unix.IPPROTO_UDP || k.protocol == unix.IPPROTO_UDPLITE)
}

func (k sockType) udplite() bool { return k.udp() && k.protocol == unix.IPPROTO_UDPLITE }

func (k sockType) tcp() bool {
	return k.inet() && k.typ == unix.SOCK_STREAM && k.protocol == unix.IPPROTO_TCP
}

// groups says whether such sockets can join multicast groups.
func (k sockType) groups() bool { return k.inet() && k.typ != unix.SOCK_STREAM }

func sockTypeOf(fd int) (sockType, error) {
	var n [3]int
	for i, opt := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_PROTOCOL} {
		var err error
		if n[i], err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, opt); err != nil {
			return sockType{}, os.NewSyscallError("getsockopt", err)
		}
	}
	return sockType{n[0], n[1], n[2]}, nil
}

// Interface indexes in the value of an option.
const (
	noIndex   = iota
	hostIndex // the value is one
	netIndex  // the same, in network order
)

// sockOption is an option that CRIU's messages have no field for. What differs
// from a fresh socket's is carried in the facts, or refused.
type sockOption struct {
	level, opt int
	name       string
	size       int // bytes of its value, at most
	index      int
	hint       bool // only makes things faster: a host that cannot have it does without
	has        func(sockType) bool
	refuse     func(k sockType, fd int, v []byte) (reason, hint string) // may be nil
}

const (
	udpEncap   = 100 // include/uapi/linux/udp.h
	udpNoTx6   = 101
	udpNoRx6   = 102
	udpSegment = 103
	udpGRO     = 104

	udpliteSendCoverage = 10
	udpliteRecvCoverage = 11

	timestampNumbers = 1 << 7 // SOF_TIMESTAMPING_OPT_ID
)

func any4(sockType) bool { return true }

// sockOptions is in the order in which they are set. Numbers without a name in
// golang.org/x/sys are from include/uapi/asm-generic/socket.h and include/uapi/linux/in6.h.
var sockOptions = func() []sockOption {
	var out []sockOption
	add := func(level, size int, has func(sockType) bool, opts ...sockOption) {
		for _, o := range opts {
			o.level, o.has = level, has
			if o.size == 0 {
				o.size = size
			}
			out = append(out, o)
		}
	}
	o := func(n int, name string) sockOption { return sockOption{opt: n, name: name} }
	add(unix.SOL_SOCKET, 4, any4,
		o(unix.SO_DEBUG, "SO_DEBUG"),
		o(29, "SO_TIMESTAMP"), o(35, "SO_TIMESTAMPNS"), o(63, "SO_TIMESTAMP_NEW"), o(64, "SO_TIMESTAMPNS_NEW"),
		sockOption{opt: 37, name: "SO_TIMESTAMPING", size: 8, refuse: refuseNumbers},
		sockOption{opt: 65, name: "SO_TIMESTAMPING_NEW", size: 8, refuse: refuseNumbers},
		o(unix.SO_RXQ_OVFL, "SO_RXQ_OVFL"), o(unix.SO_WIFI_STATUS, "SO_WIFI_STATUS"), o(unix.SO_PEEK_OFF, "SO_PEEK_OFF"),
		o(unix.SO_NOFCS, "SO_NOFCS"), o(unix.SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE"),
		sockOption{opt: unix.SO_BUSY_POLL, name: "SO_BUSY_POLL", hint: true},
		sockOption{opt: unix.SO_MAX_PACING_RATE, name: "SO_MAX_PACING_RATE", size: 8},
		o(unix.SO_INCOMING_CPU, "SO_INCOMING_CPU"),
		sockOption{opt: unix.SO_ZEROCOPY, name: "SO_ZEROCOPY", refuse: refuseZerocopy},
		sockOption{opt: unix.SO_TXTIME, name: "SO_TXTIME", size: 8},
		sockOption{opt: unix.SO_PREFER_BUSY_POLL, name: "SO_PREFER_BUSY_POLL", hint: true},
		sockOption{opt: 73, name: "SO_RESERVE_MEM", hint: true},
		o(74, "SO_TXREHASH"), o(75, "SO_RCVMARK"), o(76, "SO_PASSPIDFD"), o(82, "SO_RCVPRIORITY"), o(83, "SO_PASSRIGHTS"))
	add(unix.IPPROTO_IP, 4, sockType.ip4,
		sockOption{opt: unix.IP_OPTIONS, name: "IP_OPTIONS", size: 40},
		o(unix.IP_RECVOPTS, "IP_RECVOPTS"), o(unix.IP_RETOPTS, "IP_RETOPTS"), o(unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER"),
		o(unix.IP_RECVERR, "IP_RECVERR"), o(unix.IP_RECVTTL, "IP_RECVTTL"), o(unix.IP_RECVTOS, "IP_RECVTOS"),
		o(unix.IP_PASSSEC, "IP_PASSSEC"), o(unix.IP_TRANSPARENT, "IP_TRANSPARENT"), o(unix.IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"),
		o(unix.IP_MINTTL, "IP_MINTTL"), o(unix.IP_NODEFRAG, "IP_NODEFRAG"), o(unix.IP_CHECKSUM, "IP_CHECKSUM"),
		o(unix.IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT"), o(unix.IP_RECVFRAGSIZE, "IP_RECVFRAGSIZE"),
		o(unix.IP_RECVERR_RFC4884, "IP_RECVERR_RFC4884"), o(unix.IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP"),
		o(unix.IP_MULTICAST_ALL, "IP_MULTICAST_ALL"), sockOption{opt: unix.IP_UNICAST_IF, name: "IP_UNICAST_IF", index: netIndex},
		o(unix.IP_LOCAL_PORT_RANGE, "IP_LOCAL_PORT_RANGE"))
	// Of a stream these can be read but not set.
	add(unix.IPPROTO_IP, 4, func(k sockType) bool { return k.ip4() && k.groups() },
		o(unix.IP_MULTICAST_IF, "IP_MULTICAST_IF"), o(unix.IP_MULTICAST_TTL, "IP_MULTICAST_TTL"))
	add(unix.IPPROTO_IPV6, 4, func(k sockType) bool { return k.ip6() && k.groups() },
		sockOption{opt: unix.IPV6_MULTICAST_IF, name: "IPV6_MULTICAST_IF", index: hostIndex},
		o(unix.IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS"))
	// An IPv6 socket has two bits of IPv4 under other numbers (IPv4 datagrams reach it).
	add(unix.IPPROTO_IP, 4, func(k sockType) bool { return k.family == unix.AF_INET6 && k.ip4() },
		o(unix.IP_PKTINFO, "IP_PKTINFO"), o(unix.IP_TOS, "IP_TOS"), o(unix.IP_TTL, "IP_TTL"))
	add(unix.IPPROTO_IPV6, 4, sockType.ip6,
		o(unix.IPV6_2292PKTINFO, "IPV6_2292PKTINFO"), o(unix.IPV6_2292HOPOPTS, "IPV6_2292HOPOPTS"),
		o(unix.IPV6_2292DSTOPTS, "IPV6_2292DSTOPTS"), o(unix.IPV6_2292RTHDR, "IPV6_2292RTHDR"), o(unix.IPV6_CHECKSUM, "IPV6_CHECKSUM"),
		o(unix.IPV6_2292HOPLIMIT, "IPV6_2292HOPLIMIT"), o(11, "IPV6_FLOWINFO"),
		o(unix.IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP"),
		o(unix.IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER"), o(unix.IPV6_RECVERR, "IPV6_RECVERR"), o(29, "IPV6_MULTICAST_ALL"),
		o(30, "IPV6_ROUTER_ALERT_ISOLATE"), o(31, "IPV6_RECVERR_RFC4884"), o(33, "IPV6_FLOWINFO_SEND"),
		o(unix.IPV6_HDRINCL, "IPV6_HDRINCL"),
		o(unix.IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT"), o(unix.IPV6_RECVHOPOPTS, "IPV6_RECVHOPOPTS"),
		sockOption{opt: unix.IPV6_HOPOPTS, name: "IPV6_HOPOPTS", size: maxExtension},
		sockOption{opt: unix.IPV6_RTHDRDSTOPTS, name: "IPV6_RTHDRDSTOPTS", size: maxExtension},
		o(unix.IPV6_RECVRTHDR, "IPV6_RECVRTHDR"), sockOption{opt: unix.IPV6_RTHDR, name: "IPV6_RTHDR", size: maxExtension},
		o(unix.IPV6_RECVDSTOPTS, "IPV6_RECVDSTOPTS"), sockOption{opt: unix.IPV6_DSTOPTS, name: "IPV6_DSTOPTS", size: maxExtension},
		o(unix.IPV6_RECVPATHMTU, "IPV6_RECVPATHMTU"), o(unix.IPV6_DONTFRAG, "IPV6_DONTFRAG"), o(unix.IPV6_RECVTCLASS, "IPV6_RECVTCLASS"),
		o(unix.IPV6_AUTOFLOWLABEL, "IPV6_AUTOFLOWLABEL"), o(unix.IPV6_ADDR_PREFERENCES, "IPV6_ADDR_PREFERENCES"),
		o(unix.IPV6_MINHOPCOUNT, "IPV6_MINHOPCOUNT"), o(unix.IPV6_ORIGDSTADDR, "IPV6_RECVORIGDSTADDR"),
		o(unix.IPV6_TRANSPARENT, "IPV6_TRANSPARENT"), sockOption{opt: unix.IPV6_UNICAST_IF, name: "IPV6_UNICAST_IF", index: netIndex},
		o(unix.IPV6_RECVFRAGSIZE, "IPV6_RECVFRAGSIZE"))
	for _, level := range []int{unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE} {
		add(level, 4, func(k sockType) bool { return k.udp() && k.protocol == level },
			o(unix.UDP_CORK, "UDP_CORK"),
			sockOption{opt: udpEncap, name: "UDP_ENCAP", refuse: refuseEncap},
			o(udpNoTx6, "UDP_NO_CHECK6_TX"), o(udpNoRx6, "UDP_NO_CHECK6_RX"), o(udpSegment, "UDP_SEGMENT"), o(udpGRO, "UDP_GRO"))
	}
	add(unix.IPPROTO_UDPLITE, 4, sockType.udplite,
		o(udpliteSendCoverage, "UDPLITE_SEND_CSCOV"), o(udpliteRecvCoverage, "UDPLITE_RECV_CSCOV"))
	add(unix.SOL_NETLINK, 4, func(k sockType) bool { return k.family == unix.AF_NETLINK },
		o(unix.NETLINK_PKTINFO, "NETLINK_PKTINFO"), o(unix.NETLINK_BROADCAST_ERROR, "NETLINK_BROADCAST_ERROR"),
		o(unix.NETLINK_NO_ENOBUFS, "NETLINK_NO_ENOBUFS"), o(unix.NETLINK_LISTEN_ALL_NSID, "NETLINK_LISTEN_ALL_NSID"),
		o(unix.NETLINK_CAP_ACK, "NETLINK_CAP_ACK"), o(unix.NETLINK_EXT_ACK, "NETLINK_EXT_ACK"),
		o(unix.NETLINK_GET_STRICT_CHK, "NETLINK_GET_STRICT_CHK"))
	add(unix.SOL_PACKET, 4, func(k sockType) bool { return k.family == unix.AF_PACKET },
		o(unix.PACKET_TX_HAS_OFF, "PACKET_TX_HAS_OFF"), o(unix.PACKET_QDISC_BYPASS, "PACKET_QDISC_BYPASS"),
		o(unix.PACKET_IGNORE_OUTGOING, "PACKET_IGNORE_OUTGOING"), o(24, "PACKET_VNET_HDR_SZ"))
	add(unix.SOL_TCP, 4, sockType.tcp, tcpOptions...)
	// dumpTCPOptions says when these have a value.
	add(unix.SOL_TCP, 4, func(sockType) bool { return false }, tcpStateOptions...)
	// The last one: a locked filter cannot be set again.
	add(unix.SOL_SOCKET, 4, any4, o(unix.SO_LOCK_FILTER, "SO_LOCK_FILTER"))
	return out
}()

// maxExtension bounds a header of IPv6 options (RFC 8200: 256 units of 8 bytes).
const maxExtension = 2048

func refuseNumbers(_ sockType, _ int, v []byte) (string, string) {
	if len(v) >= 4 && binary.NativeEndian.Uint32(v)&timestampNumbers != 0 {
		return "its transmit timestamps are numbered (SOF_TIMESTAMPING_OPT_ID), and the number cannot be read", "let the program close it"
	}
	return "", ""
}

func refuseZerocopy(k sockType, fd int, _ []byte) (string, string) {
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && n != 0 {
		return "", ""
	}
	return "its sends without copying (SO_ZEROCOPY) are numbered, and the number cannot be read", "let the program send without SO_ZEROCOPY"
}

func refuseEncap(sockType, int, []byte) (string, string) {
	return "the kernel itself receives through it (UDP_ENCAP)", "end the tunnel"
}

func (o *object) sockFacts() *image.SockFacts {
	if o.facts == nil {
		o.facts = &image.FileFacts{ID: o.id}
	}
	if o.facts.Sock == nil {
		o.facts.Sock = &image.SockFacts{}
	}
	return o.facts.Sock
}

// readOption reads an option; a socket that does not have it gives nil.
func readOption(fd int, o *sockOption) []byte {
	b := make([]byte, o.size)
	n, err := sys.GetSockopt(fd, o.level, o.opt, b)
	if err != nil {
		return nil
	}
	return b[:n]
}

// freshOptions reads the options of a new socket; nil for those that it does not have.
func (d *Dumper) freshOptions(k sockType) ([][]byte, error) {
	if v, ok := d.fresh[k]; ok {
		return v, nil
	}
	fd, err := unix.Socket(k.family, k.typ|unix.SOCK_CLOEXEC, k.protocol)
	if err != nil {
		return nil, fmt.Errorf("make a socket of family %d, type %d, protocol %d to compare with: %w", k.family, k.typ, k.protocol, os.NewSyscallError("socket", err))
	}
	defer func() { _ = unix.Close(fd) }()
	out := make([][]byte, len(sockOptions))
	for i := range sockOptions {
		if o := &sockOptions[i]; o.has(k) {
			out[i] = readOption(fd, o)
		}
	}
	if d.fresh == nil {
		d.fresh = map[sockType][][]byte{}
	}
	d.fresh[k] = out
	return out, nil
}

// dumpSockExtra notes what a socket has besides the fields of CRIU's messages.
func (d *Dumper) dumpSockExtra(o *object) error {
	fd := int(o.file.Fd())
	k, err := sockTypeOf(fd)
	if err != nil {
		return err
	}
	if o.stat.Uid != 0 {
		o.sockFacts().UID = o.stat.Uid
	}
	fresh, err := d.freshOptions(k)
	if errors.Is(err, unix.EACCES) {
		d.refuse(o, "this host lets nobody make such a socket", "let the agent's group make ping sockets (net.ipv4.ping_group_range)")
		return nil
	}
	if err != nil {
		return err
	}
	for i := range sockOptions {
		x := &sockOptions[i]
		if !x.has(k) {
			continue
		}
		v := readOption(fd, x)
		if v == nil || bytes.Equal(v, fresh[i]) {
			continue
		}
		if x.refuse != nil {
			if reason, hint := x.refuse(k, fd, v); reason != "" {
				d.refuse(o, reason, hint)
				continue
			}
		}
		s := image.SockOption{Level: x.level, Option: x.opt, Value: v}
		if x.index != noIndex {
			if s.Interface, err = indexName(x.index, v); err != nil {
				return fmt.Errorf("option %s: %w", x.name, err)
			}
			s.Value = nil
		}
		f := o.sockFacts()
		f.Options = append(f.Options, s)
	}
	if k.groups() {
		return d.dumpGroups(o, k, fd)
	}
	return nil
}

// indexName is the name of the interface whose index an option has, "" for none.
func indexName(order int, v []byte) (string, error) {
	if len(v) != 4 {
		return "", fmt.Errorf("an interface index of %d bytes", len(v))
	}
	n := binary.NativeEndian.Uint32(v)
	if order == netIndex {
		n = binary.BigEndian.Uint32(v)
	}
	if n == 0 {
		return "", nil
	}
	return interfaceName(n)
}

func interfaceName(index uint32) (string, error) {
	ifi, err := net.InterfaceByIndex(int(index))
	if err != nil {
		return "", fmt.Errorf("name of network interface %d: %w", index, err)
	}
	return ifi.Name, nil
}

func interfaceIndex(name string) (uint32, error) {
	if name == "" || len(name) >= unix.IFNAMSIZ {
		return 0, fmt.Errorf("%.20q is no name of a network interface", name)
	}
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("network interface %s: %w", name, err)
	}
	return uint32(ifi.Index), nil
}

// sockOptionOf finds the option of a fact.
func sockOptionOf(s image.SockOption) *sockOption {
	i := slices.IndexFunc(sockOptions, func(o sockOption) bool { return o.level == s.Level && o.opt == s.Option })
	if i < 0 {
		return nil
	}
	return &sockOptions[i]
}

// checkSockFacts validates the facts of a socket, which are untrusted.
func checkSockFacts(f *image.SockFacts) error {
	if n := len(f.Options); n > len(sockOptions) {
		return fmt.Errorf("%d options, there are only %d", n, len(sockOptions))
	}
	for _, s := range f.Options {
		x := sockOptionOf(s)
		switch {
		case x == nil:
			return fmt.Errorf("option %d of level %d is not carried", s.Option, s.Level)
		case len(s.Value) > x.size:
			return fmt.Errorf("option %s has %d bytes, expected at most %d", x.name, len(s.Value), x.size)
		}
	}
	if err := checkDatagrams(f.Datagrams); err != nil {
		return err
	}
	return checkGroups(f.Groups)
}

// restoreSockExtra sets what a socket had besides the fields of CRIU's messages.
func (r *Restorer) restoreSockExtra(x *description) error {
	f := r.facts[x.id]
	if f == nil || f.Sock == nil {
		return nil
	}
	fd := int(x.file.Fd())
	if f.Sock.UID != 0 {
		if err := unix.Fchown(fd, int(f.Sock.UID), -1); err != nil {
			return fmt.Errorf("owner of a socket: %w", os.NewSyscallError("fchown", err))
		}
	}
	for _, s := range f.Sock.Options {
		o := sockOptionOf(s)
		v, err := o.value(s)
		if err == nil && !bytes.Equal(readOption(fd, o), v) {
			err = sys.SetSockopt(fd, o.level, o.opt, v)
		}
		switch {
		case err != nil && o.hint:
			r.log.Warn("this host does not have an option that makes a socket faster", "option", o.name, "error", err)
		case err != nil:
			return fmt.Errorf("option %s: %w", o.name, err)
		}
	}
	return joinGroups(fd, f.Sock.Groups)
}

// value is what an option is set to on this host.
func (o *sockOption) value(s image.SockOption) ([]byte, error) {
	if o.index == noIndex {
		return s.Value, nil
	}
	var n uint32
	if s.Interface != "" {
		var err error
		if n, err = interfaceIndex(s.Interface); err != nil {
			return nil, err
		}
	}
	if o.index == netIndex {
		return binary.BigEndian.AppendUint32(nil, n), nil
	}
	return binary.NativeEndian.AppendUint32(nil, n), nil
}
