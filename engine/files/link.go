package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

// Attributes that golang.org/x/sys has no names for (include/uapi/linux/if_link.h,
// rtnetlink.h), and bounds of what an image may ask for.
const (
	iflaInfoData            = 2
	iflaInet6AddrGen        = 8
	iflaTunOwner            = 1
	iflaTunPI               = 4
	iflaTunGroup            = 2
	addrGenNone             = 1    // IN6_ADDR_GEN_MODE_NONE
	ifaFlagNoDAD            = 0x02 // IFA_F_NODAD
	rtnhDead                = 0x1 | 0x10
	maxLinkAddrs            = 1024
	maxLinkRoutes           = 4096
	maxMetrics              = 1024
	nlaTypeMask      uint16 = 0x3fff
	nlaNested        uint16 = 0x8000
)

// readLink reads the configuration of an interface of the calling thread's network
// namespace: what a new one of this name would need.
func readLink(name string) (image.LinkFacts, map[uint16]uint32, error) {
	index, err := interfaceIndex(name)
	if err != nil {
		return image.LinkFacts{}, nil, err
	}
	l := image.LinkFacts{Index: index}
	tun := map[uint16]uint32{}
	found := false
	err = netlinkDump(unix.NETLINK_ROUTE, unix.RTM_GETLINK, make([]byte, unix.SizeofIfInfomsg), func(_ uint16, b []byte) error {
		if len(b) < unix.SizeofIfInfomsg || binary.NativeEndian.Uint32(b[4:]) != index {
			return nil
		}
		found = true
		return parseLink(b, &l, tun)
	})
	if err != nil {
		return l, nil, err
	}
	if !found {
		return l, nil, fmt.Errorf("network interface %s is gone", name)
	}
	err = netlinkDump(unix.NETLINK_ROUTE, unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg), func(_ uint16, b []byte) error {
		if len(b) < unix.SizeofIfAddrmsg || binary.NativeEndian.Uint32(b[4:]) != index {
			return nil
		}
		a, err := parseAddress(b)
		l.Addresses = append(l.Addresses, a)
		return err
	})
	if err != nil {
		return l, nil, err
	}
	err = netlinkDump(unix.NETLINK_ROUTE, unix.RTM_GETROUTE, make([]byte, unix.SizeofRtMsg), func(_ uint16, b []byte) error {
		rt, ok, err := parseRoute(b, index)
		if ok {
			l.Routes = append(l.Routes, rt)
		}
		return err
	})
	return l, tun, err
}

// word reads an attribute of 32 bits.
func word(v []byte) (uint32, error) {
	if len(v) != 4 {
		return 0, fmt.Errorf("netlink: a number of %d bytes", len(v))
	}
	return binary.NativeEndian.Uint32(v), nil
}

// parseLink parses struct ifinfomsg and its attributes; tun gets those of the kind "tun".
func parseLink(b []byte, l *image.LinkFacts, tun map[uint16]uint32) error {
	l.Up = binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0
	return netlinkAttrs(b[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) (err error) {
		switch typ & nlaTypeMask {
		case unix.IFLA_MTU:
			l.MTU, err = word(v)
		case unix.IFLA_TXQLEN:
			l.TxQueueLen, err = word(v)
		case unix.IFLA_ADDRESS:
			l.Address = bytes.Clone(v)
		case unix.IFLA_CARRIER:
			l.NoCarrier = len(v) == 1 && v[0] == 0
		case unix.IFLA_MASTER:
			var n uint32
			if n, err = word(v); err == nil {
				l.Master, err = interfaceName(n)
			}
		case unix.IFLA_AF_SPEC:
			err = netlinkAttrs(v, func(family uint16, v []byte) error {
				if family&nlaTypeMask != unix.AF_INET6 {
					return nil
				}
				return netlinkAttrs(v, func(typ uint16, v []byte) error {
					if typ&nlaTypeMask == iflaInet6AddrGen && len(v) == 1 {
						mode := v[0]
						l.AddrGenMode = &mode
					}
					return nil
				})
			})
		case unix.IFLA_LINKINFO:
			err = netlinkAttrs(v, func(typ uint16, v []byte) error {
				if typ&nlaTypeMask != iflaInfoData {
					return nil
				}
				return netlinkAttrs(v, func(typ uint16, v []byte) error {
					switch len(v) {
					case 1:
						tun[typ&nlaTypeMask] = uint32(v[0])
					case 4:
						tun[typ&nlaTypeMask] = binary.NativeEndian.Uint32(v)
					}
					return nil
				})
			})
		}
		return err
	})
}

// ipText is an address in the form that facts have.
func ipText(v []byte) (string, error) {
	a, ok := netip.AddrFromSlice(v)
	if !ok {
		return "", fmt.Errorf("netlink: an address of %d bytes", len(v))
	}
	return a.String(), nil
}

// parseAddress parses struct ifaddrmsg and its attributes.
func parseAddress(b []byte) (image.LinkAddress, error) {
	a := image.LinkAddress{Prefix: b[1], Flags: uint32(b[2]), Scope: b[3]}
	var address string
	err := netlinkAttrs(b[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) (err error) {
		switch typ {
		case unix.IFA_LOCAL:
			a.Local, err = ipText(v)
		case unix.IFA_ADDRESS:
			address, err = ipText(v)
		case unix.IFA_BROADCAST:
			a.Broadcast, err = ipText(v)
		case unix.IFA_LABEL:
			a.Label = string(bytes.TrimRight(v, "\x00"))
		case unix.IFA_FLAGS:
			a.Flags, err = word(v)
		}
		return err
	})
	// IFA_ADDRESS is the peer's, or the same as IFA_LOCAL, which IPv6 leaves out.
	if a.Local == "" {
		a.Local = address
	} else if address != a.Local {
		a.Peer = address
	}
	if err == nil && a.Local == "" {
		err = errors.New("netlink: an address without an address")
	}
	return a, err
}

// parseRoute parses struct rtmsg and its attributes; ok says that it goes through
// the interface and is none that the kernel makes by itself.
func parseRoute(b []byte, index uint32) (rt image.LinkRoute, ok bool, err error) {
	if len(b) < unix.SizeofRtMsg {
		return rt, false, fmt.Errorf("netlink: a route of %d bytes", len(b))
	}
	rt = image.LinkRoute{Family: b[0], DstLen: b[1], TOS: b[3], Table: uint32(b[4]), Protocol: b[5], Scope: b[6], Type: b[7],
		Flags: binary.NativeEndian.Uint32(b[8:]) &^ rtnhDead & 0xff}
	cloned := binary.NativeEndian.Uint32(b[8:])&unix.RTM_F_CLONED != 0
	err = netlinkAttrs(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) (err error) {
		switch typ & nlaTypeMask {
		case unix.RTA_OIF:
			var n uint32
			n, err = word(v)
			ok = n == index
		case unix.RTA_DST:
			rt.Dst, err = ipText(v)
		case unix.RTA_GATEWAY:
			rt.Gateway, err = ipText(v)
		case unix.RTA_PREFSRC:
			rt.Source, err = ipText(v)
		case unix.RTA_PRIORITY:
			rt.Priority, err = word(v)
		case unix.RTA_TABLE:
			rt.Table, err = word(v)
		case unix.RTA_METRICS:
			rt.Metrics = bytes.Clone(v)
		case unix.RTA_PREF:
			if len(v) == 1 {
				p := v[0]
				rt.Preferred = &p
			}
		}
		return err
	})
	return rt, ok && err == nil && !cloned && rt.Protocol != unix.RTPROT_KERNEL && rt.Type != unix.RTN_LOCAL, err
}

// checkLink bounds what an image asks for.
func checkLink(l *image.LinkFacts) error {
	switch {
	case len(l.Addresses) > maxLinkAddrs:
		return fmt.Errorf("a network interface with %d addresses", len(l.Addresses))
	case len(l.Routes) > maxLinkRoutes:
		return fmt.Errorf("a network interface with %d routes", len(l.Routes))
	case len(l.Address) > maxHardware:
		return fmt.Errorf("a hardware address of %d bytes", len(l.Address))
	}
	for _, a := range l.Addresses {
		for _, s := range []string{a.Local, a.Peer, a.Broadcast} {
			if _, err := netip.ParseAddr(s); err != nil && (s != "" || a.Local == "") {
				return fmt.Errorf("%.64q is no address", s)
			}
		}
		if len(a.Label) >= unix.IFNAMSIZ {
			return fmt.Errorf("%.64q is no label of an address", a.Label)
		}
	}
	for _, rt := range l.Routes {
		for _, s := range []string{rt.Dst, rt.Gateway, rt.Source} {
			if _, err := netip.ParseAddr(s); err != nil && s != "" {
				return fmt.Errorf("%.64q is no address of a route", s)
			}
		}
		if len(rt.Metrics) > maxMetrics {
			return fmt.Errorf("a route with metrics of %d bytes", len(rt.Metrics))
		}
	}
	return nil
}

// attr appends an attribute.
func attr(b []byte, typ uint16, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(v)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func wordAttr(b []byte, typ uint16, n uint32) []byte {
	return attr(b, typ, binary.NativeEndian.AppendUint32(nil, n))
}

// ipAttr appends an address that was checked; none for an empty one.
func ipAttr(b []byte, typ uint16, s string) []byte {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return b
	}
	return attr(b, typ, a.AsSlice())
}

// setLink changes an interface; up also takes it up.
func setLink(index uint32, up bool, attrs []byte) error {
	ne := binary.NativeEndian
	b := ne.AppendUint32(make([]byte, 4, 64), index) // family, type; index
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	b = ne.AppendUint32(b, flags)
	b = ne.AppendUint32(b, flags) // which of them change
	return netlinkDo(unix.RTM_NEWLINK, 0, append(b, attrs...))
}

func addrGenAttr(mode uint8) []byte {
	return attr(nil, unix.IFLA_AF_SPEC|nlaNested, attr(nil, unix.AF_INET6|nlaNested, attr(nil, iflaInet6AddrGen, []byte{mode})))
}

// configureLink gives a new interface the configuration of the old one.
func configureLink(name string, l *image.LinkFacts) error {
	index, err := interfaceIndex(name)
	if err != nil {
		return err
	}
	var attrs []byte
	if len(l.Address) > 0 {
		attrs = attr(attrs, unix.IFLA_ADDRESS, l.Address)
	}
	attrs = wordAttr(attrs, unix.IFLA_MTU, l.MTU)
	attrs = wordAttr(attrs, unix.IFLA_TXQLEN, l.TxQueueLen)
	if l.Master != "" {
		n, err := interfaceIndex(l.Master)
		if err != nil {
			return err
		}
		attrs = wordAttr(attrs, unix.IFLA_MASTER, n)
	}
	if err := setLink(index, false, attrs); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	if l.AddrGenMode != nil { // it has its addresses, and needs no new one
		if err := setLink(index, false, addrGenAttr(addrGenNone)); err != nil {
			return fmt.Errorf("addresses of IPv6: %w", err)
		}
	}
	if l.Up {
		if err := setLink(index, true, nil); err != nil {
			return fmt.Errorf("take up: %w", err)
		}
	}
	for _, a := range l.Addresses {
		if err := addAddress(index, a); err != nil {
			return fmt.Errorf("address %s: %w", a.Local, err)
		}
	}
	if l.AddrGenMode != nil {
		if err := setLink(index, false, addrGenAttr(*l.AddrGenMode)); err != nil {
			return fmt.Errorf("addresses of IPv6: %w", err)
		}
	}
	for _, rt := range l.Routes {
		if err := addRoute(index, rt); err != nil {
			return fmt.Errorf("route to %s/%d: %w", rt.Dst, rt.DstLen, err)
		}
	}
	return nil
}

func familyOf(s string) byte {
	if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func addAddress(index uint32, a image.LinkAddress) error {
	family := familyOf(a.Local)
	flags := a.Flags &^ unix.IFA_F_TENTATIVE
	if family == unix.AF_INET6 {
		flags |= ifaFlagNoDAD // it was found to be unique
	}
	b := []byte{family, a.Prefix, byte(flags), a.Scope}
	b = binary.NativeEndian.AppendUint32(b, index)
	b = ipAttr(b, unix.IFA_LOCAL, a.Local)
	peer := a.Peer
	if peer == "" {
		peer = a.Local
	}
	b = ipAttr(b, unix.IFA_ADDRESS, peer)
	b = ipAttr(b, unix.IFA_BROADCAST, a.Broadcast)
	if a.Label != "" {
		b = attr(b, unix.IFA_LABEL, append([]byte(a.Label), 0))
	}
	b = wordAttr(b, unix.IFA_FLAGS, flags)
	return netlinkDo(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}

func addRoute(index uint32, rt image.LinkRoute) error {
	b := []byte{rt.Family, rt.DstLen, 0, rt.TOS, byte(min(rt.Table, unix.RT_TABLE_COMPAT)), rt.Protocol, rt.Scope, rt.Type}
	b = binary.NativeEndian.AppendUint32(b, rt.Flags)
	b = ipAttr(b, unix.RTA_DST, rt.Dst)
	b = ipAttr(b, unix.RTA_GATEWAY, rt.Gateway)
	b = ipAttr(b, unix.RTA_PREFSRC, rt.Source)
	b = wordAttr(b, unix.RTA_OIF, index)
	b = wordAttr(b, unix.RTA_TABLE, rt.Table)
	if rt.Priority != 0 {
		b = wordAttr(b, unix.RTA_PRIORITY, rt.Priority)
	}
	if len(rt.Metrics) > 0 {
		b = attr(b, unix.RTA_METRICS|nlaNested, rt.Metrics)
	}
	if rt.Preferred != nil && rt.Family == unix.AF_INET6 {
		b = attr(b, unix.RTA_PREF, []byte{*rt.Preferred})
	}
	return netlinkDo(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}
