package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

const (
	icmpFilter  = 1 // ICMP_FILTER of level SOL_RAW (include/uapi/linux/icmp.h), one word
	icmp6Filter = 1 // ICMPV6_FILTER of level SOL_ICMPV6 (include/uapi/linux/icmpv6.h), eight words
)

// isPing says whether a socket sends and receives ICMP echoes, by an identifier
// that is its port.
func isPing(family, typ, protocol uint32) bool {
	return typ == unix.SOCK_DGRAM && (family == unix.AF_INET && protocol == unix.IPPROTO_ICMP || family == unix.AF_INET6 && protocol == unix.IPPROTO_ICMPV6)
}

// dumpRawPeer reads the peer of a socket without ports, which getpeername(2) does
// not tell.
func (d *Dumper) dumpRawPeer(o *object, e *sk_inet.InetSkEntry) error {
	if e.GetType() != unix.SOCK_RAW && !isPing(e.GetFamily(), e.GetType(), e.GetProto()) {
		return nil
	}
	if err := d.refuseRouter(o, e); err != nil {
		return err
	}
	table := "icmp"
	if e.GetType() == unix.SOCK_RAW {
		table = "raw"
	}
	if e.GetFamily() == unix.AF_INET6 {
		table += "6"
	}
	ss, err := procfs.OwnInet(table)
	if err != nil {
		return err
	}
	for _, s := range ss {
		if s.Inode == o.stat.Ino && s.State == stateEstablished {
			e.DstAddr, e.State = wordsOf(s.Remote.Addr().AsSlice()), proto.Uint32(stateEstablished)
		}
	}
	return nil
}

// refuseRouter refuses the socket by which a program routes multicast (MRT_INIT): the
// kernel forgets interfaces and routes when it is closed.
func (d *Dumper) refuseRouter(o *object, e *sk_inet.InetSkEntry) error {
	table := map[[2]uint32]string{{unix.AF_INET, unix.IPPROTO_IGMP}: "ip_mr_vif", {unix.AF_INET6, unix.IPPROTO_ICMPV6}: "ip6_mr_vif"}[[2]uint32{e.GetFamily(), e.GetProto()}]
	if table == "" || e.GetType() != unix.SOCK_RAW {
		return nil
	}
	b, err := os.ReadFile("/proc/thread-self/net/" + table)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if bytes.Count(b, []byte("\n")) > 1 { // below the heading a line for each interface
		d.refuse(o, "multicast is routed in its network namespace, perhaps by this socket (MRT_INIT)", "stop the multicast router")
	}
	return nil
}

// rawBools are the yes-or-no options of raw sockets; 0: the family has none.
var rawBools = []struct {
	v4, v6 int
	get    func(*sk_inet.IpOptsRawEntry) *bool
	set    func(*sk_inet.IpOptsRawEntry, *bool)
}{
	{unix.IP_HDRINCL, unix.IPV6_HDRINCL, func(e *sk_inet.IpOptsRawEntry) *bool { return e.Hdrincl }, func(e *sk_inet.IpOptsRawEntry, b *bool) { e.Hdrincl = b }},
	{unix.IP_NODEFRAG, 0, func(e *sk_inet.IpOptsRawEntry) *bool { return e.Nodefrag }, func(e *sk_inet.IpOptsRawEntry, b *bool) { e.Nodefrag = b }},
	{unix.IP_CHECKSUM, 0, func(e *sk_inet.IpOptsRawEntry) *bool { return e.Checksum }, func(e *sk_inet.IpOptsRawEntry, b *bool) { e.Checksum = b }},
}

// icmpFilterOf tells where the filter of a raw socket is; n is its size in words, 0
// without one.
func icmpFilterOf(e *sk_inet.InetSkEntry) (level, opt, n int) {
	switch {
	case e.GetType() != unix.SOCK_RAW:
	case e.GetFamily() == unix.AF_INET && e.GetProto() == unix.IPPROTO_ICMP:
		return unix.SOL_RAW, icmpFilter, 1
	case e.GetFamily() == unix.AF_INET6 && e.GetProto() == unix.IPPROTO_ICMPV6:
		return unix.SOL_ICMPV6, icmp6Filter, 8
	}
	return 0, 0, 0
}

func dumpRawOpts(fd int, e *sk_inet.InetSkEntry) error {
	if e.GetType() != unix.SOCK_RAW {
		return nil
	}
	raw := &sk_inet.IpOptsRawEntry{}
	for _, b := range rawBools {
		level, opt := ipOpt{v4: b.v4, v6: b.v6}.of(e.GetFamily())
		if opt == 0 {
			continue
		}
		n, ok, err := getOpt(fd, level, opt)
		if err != nil {
			return err
		}
		if ok {
			b.set(raw, proto.Bool(n != 0))
		}
	}
	if level, opt, n := icmpFilterOf(e); n > 0 {
		b := make([]byte, 4*n)
		if _, err := sys.GetSockopt(fd, level, opt, b); err != nil {
			return fmt.Errorf("ICMP filter: %w", err)
		}
		raw.IcmpvFilter = wordsOf(b)
	}
	e.IpOpts.Raw = raw
	return nil
}

func checkRawOpts(e *sk_inet.InetSkEntry) error {
	_, _, n := icmpFilterOf(e)
	switch have := len(e.GetIpOpts().GetRaw().GetIcmpvFilter()); {
	case have != 0 && have != n:
		return fmt.Errorf("its ICMP filter has %d words, expected %d", have, n)
	case e.GetProto() > 255:
		if e.GetType() == unix.SOCK_RAW {
			return errors.New("its protocol is out of range")
		}
	}
	return nil
}

func restoreRawOpts(fd int, e *sk_inet.InetSkEntry) error {
	raw := e.GetIpOpts().GetRaw()
	if raw == nil || e.GetType() != unix.SOCK_RAW {
		return nil
	}
	for _, b := range rawBools {
		level, opt := ipOpt{v4: b.v4, v6: b.v6}.of(e.GetFamily())
		v := b.get(raw)
		if opt == 0 || v == nil {
			continue
		}
		if have, ok, err := getOpt(fd, level, opt); err != nil || ok && have == btoi(*v) {
			if err != nil {
				return err
			}
			continue
		}
		if err := unix.SetsockoptInt(fd, level, opt, btoi(*v)); err != nil {
			return fmt.Errorf("IP option %d: %w", opt, os.NewSyscallError("setsockopt", err))
		}
	}
	if level, opt, n := icmpFilterOf(e); n > 0 && len(raw.GetIcmpvFilter()) == n {
		var b []byte
		for _, w := range raw.GetIcmpvFilter() {
			b = binary.NativeEndian.AppendUint32(b, w)
		}
		if err := sys.SetSockopt(fd, level, opt, b); err != nil {
			return fmt.Errorf("ICMP filter: %w", err)
		}
	}
	return nil
}
