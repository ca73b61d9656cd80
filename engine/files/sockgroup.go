package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// Options of both levels, IPPROTO_IP and IPPROTO_IPV6, and the layout of their
// arguments (include/uapi/linux/in.h): an interface index, padding, addresses of
// sizeof(struct sockaddr_storage).
const (
	mcastJoinGroup   = 42
	mcastBlockSource = 43
	mcastJoinSource  = 46
	mcastMsfilter    = 48

	storageSize   = 128
	groupReqSize  = 8 + storageSize            // struct group_req
	sourceReqSize = groupReqSize + storageSize // struct group_source_req
	filterModeAt  = groupReqSize               // struct group_filter
	filterNumAt   = filterModeAt + 4           //
	filterListAt  = filterModeAt + 8           //
	excludeMode   = 0                          // MCAST_EXCLUDE
	maxGroups     = 4096                       // of one socket, in an image
	maxSources    = 4096                       // of one group, in an image
)

// dumpGroups notes the multicast groups of a socket. Nothing lists them, but
// MCAST_MSFILTER tells of any group whether the socket is in it: every group
// of the network namespace is tried.
func (d *Dumper) dumpGroups(o *object, k sockType, fd int) error {
	if d.joined == nil {
		gs, err := procfs.MulticastGroups()
		if err != nil {
			return err
		}
		d.joined = &gs
	}
	for _, g := range *d.joined {
		if k.family == unix.AF_INET && g.Group.Is6() {
			continue
		}
		m, ok, err := membership(fd, g)
		if err != nil {
			return fmt.Errorf("multicast group %s on %s: %w", g.Group, g.Interface, err)
		}
		if ok {
			f := o.sockFacts()
			f.Groups = append(f.Groups, m)
		}
	}
	return nil
}

func groupLevel(a netip.Addr) int {
	if a.Is4() {
		return unix.IPPROTO_IP
	}
	return unix.IPPROTO_IPV6
}

// membership asks whether a socket is in a group, and whom it listens to there.
func membership(fd int, g procfs.MulticastGroup) (image.SockGroup, bool, error) {
	for room := 0; ; {
		b := make([]byte, filterListAt+room*storageSize)
		binary.NativeEndian.PutUint32(b, g.Index)
		putStorage(b[8:], g.Group)
		binary.NativeEndian.PutUint32(b[filterNumAt:], uint32(room))
		n, err := sys.GetSockopt(fd, groupLevel(g.Group), mcastMsfilter, b)
		switch {
		case errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENODEV):
			// Not in it, or a socket or interface of the other family.
			return image.SockGroup{}, false, nil
		case err != nil:
			return image.SockGroup{}, false, err
		}
		num := int(binary.NativeEndian.Uint32(b[filterNumAt:]))
		if num > maxSources {
			return image.SockGroup{}, false, fmt.Errorf("it has %d sources", num)
		}
		if num > room {
			room = num
			continue
		}
		out := image.SockGroup{Group: g.Group.String(), Interface: g.Interface, Exclude: binary.NativeEndian.Uint32(b[filterModeAt:]) == excludeMode}
		for i := range num {
			at := filterListAt + i*storageSize
			if at+storageSize > max(n, len(b)) {
				break
			}
			a, err := storageAddr(b[at : at+storageSize])
			if err != nil {
				return image.SockGroup{}, false, err
			}
			out.Sources = append(out.Sources, a.String())
		}
		return out, true, nil
	}
}

// putStorage writes an address as a struct sockaddr_storage.
func putStorage(b []byte, a netip.Addr) {
	if a.Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		copy(b[4:], a.AsSlice())
		return
	}
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	copy(b[8:], a.AsSlice())
}

func storageAddr(b []byte) (netip.Addr, error) {
	switch f := binary.NativeEndian.Uint16(b); f {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(b[4:8])), nil
	case unix.AF_INET6:
		return netip.AddrFrom16([16]byte(b[8:24])), nil
	default:
		return netip.Addr{}, fmt.Errorf("an address of family %d", f)
	}
}

func checkGroups(gs []image.SockGroup) error {
	if len(gs) > maxGroups {
		return fmt.Errorf("%d multicast groups", len(gs))
	}
	for _, g := range gs {
		a, err := netip.ParseAddr(g.Group)
		switch {
		case err != nil || !a.IsMulticast() || a.Zone() != "":
			return fmt.Errorf("%.64q is no multicast group", g.Group)
		case len(g.Sources) > maxSources:
			return fmt.Errorf("multicast group %s has %d sources", g.Group, len(g.Sources))
		case !g.Exclude && len(g.Sources) == 0:
			return fmt.Errorf("multicast group %s has no sources", g.Group)
		}
		for _, s := range g.Sources {
			if b, err := netip.ParseAddr(s); err != nil || b.Is4() != a.Is4() || b.Zone() != "" {
				return fmt.Errorf("%.64q is no source of multicast group %s", s, g.Group)
			}
		}
	}
	return nil
}

// joinGroups joins the groups of facts that were checked.
func joinGroups(fd int, gs []image.SockGroup) error {
	for _, g := range gs {
		if err := joinGroup(fd, g); err != nil {
			return fmt.Errorf("join multicast group %s on %s: %w", g.Group, g.Interface, err)
		}
	}
	return nil
}

func joinGroup(fd int, g image.SockGroup) error {
	index, err := interfaceIndex(g.Interface)
	if err != nil {
		return err
	}
	a, err := netip.ParseAddr(g.Group)
	if err != nil {
		return err
	}
	b := make([]byte, sourceReqSize)
	binary.NativeEndian.PutUint32(b, index)
	putStorage(b[8:], a)
	opt := mcastJoinSource
	if g.Exclude {
		if err := sys.SetSockopt(fd, groupLevel(a), mcastJoinGroup, b[:groupReqSize]); err != nil {
			return err
		}
		opt = mcastBlockSource
	}
	for _, s := range g.Sources {
		src, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		clear(b[groupReqSize:])
		putStorage(b[groupReqSize:], src)
		if err := sys.SetSockopt(fd, groupLevel(a), opt, b); err != nil {
			return fmt.Errorf("source %s: %w", s, err)
		}
	}
	return nil
}
