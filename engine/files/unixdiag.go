package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// unixDiag is what sock_diag(7) tells of a unix socket (include/uapi/linux/unix_diag.h).
type unixDiag struct {
	typ, state uint8
	name       string // sun_path; an abstract one begins with NUL
	hasPeer    bool
	peer       uint32   // inode of the peer; 0: it is closed, or not accepted yet
	pending    []uint32 // of a listener: inodes of the peers that wait to be accepted
	rqueue     uint32   // of a listener: how many wait; else bytes to be read, for datagrams of the first
	wqueue     uint32   // of a listener: the backlog
	shutdown   uint8    // 1 no more receiving, 2 no more sending
}

const (
	sockDiagByFamily = 20
	udiagShowAll     = 0x01 | 0x04 | 0x08 | 0x10 // NAME, PEER, ICONS, RQLEN
	unixDiagName     = 0
	unixDiagPeer     = 2
	unixDiagIcons    = 3
	unixDiagRqlen    = 4
	unixDiagShutdown = 6
	udiagHeader      = 16 // sizeof(struct unix_diag_msg)
	nlmsgHeader      = 16
)

// readUnixDiag asks for one socket of this network namespace.
func readUnixDiag(ino uint32) (unixDiag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return unixDiag{}, os.NewSyscallError("socket sock_diag", err)
	}
	defer func() { _ = unix.Close(fd) }()
	req := make([]byte, 0, 40)
	ne := binary.NativeEndian
	req = ne.AppendUint32(req, 40)
	req = ne.AppendUint16(req, sockDiagByFamily)
	req = ne.AppendUint16(req, unix.NLM_F_REQUEST)
	req = ne.AppendUint32(req, 1) // sequence
	req = ne.AppendUint32(req, 0)
	req = append(req, unix.AF_UNIX, 0, 0, 0)
	req = ne.AppendUint32(req, 0xffffffff) // any state
	req = ne.AppendUint32(req, ino)
	req = ne.AppendUint32(req, udiagShowAll)
	req = ne.AppendUint32(req, 0xffffffff) // no cookie
	req = ne.AppendUint32(req, 0xffffffff)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return unixDiag{}, os.NewSyscallError("sendto sock_diag", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return unixDiag{}, os.NewSyscallError("recvfrom sock_diag", err)
		}
		return parseUnixDiag(buf[:n])
	}
}

// parseUnixDiag parses the answer for one socket.
func parseUnixDiag(b []byte) (unixDiag, error) {
	ne := binary.NativeEndian
	if len(b) < nlmsgHeader {
		return unixDiag{}, fmt.Errorf("sock_diag: an answer of %d bytes", len(b))
	}
	size, typ := ne.Uint32(b), ne.Uint16(b[4:])
	if size < nlmsgHeader || uint64(size) > uint64(len(b)) {
		return unixDiag{}, fmt.Errorf("sock_diag: a message of %d bytes in an answer of %d", size, len(b))
	}
	b = b[nlmsgHeader:size]
	switch typ {
	case unix.NLMSG_ERROR:
		if len(b) < 4 {
			return unixDiag{}, errors.New("sock_diag: a short error")
		}
		return unixDiag{}, os.NewSyscallError("sock_diag", unix.Errno(-int32(ne.Uint32(b))))
	case sockDiagByFamily:
	default:
		return unixDiag{}, fmt.Errorf("sock_diag: a message of type %d", typ)
	}
	if len(b) < udiagHeader {
		return unixDiag{}, fmt.Errorf("sock_diag: a message of %d bytes", len(b))
	}
	d := unixDiag{typ: b[1], state: b[2]}
	for b = b[udiagHeader:]; len(b) >= 4; {
		n, at := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if n < 4 || n > len(b) {
			return unixDiag{}, fmt.Errorf("sock_diag: attribute %d of %d bytes, %d are left", at, n, len(b))
		}
		v := b[4:n]
		b = b[min(len(b), (n+3)&^3):]
		need := map[uint16]int{unixDiagPeer: 4, unixDiagRqlen: 8, unixDiagShutdown: 1}[at]
		if len(v) < need {
			return unixDiag{}, fmt.Errorf("sock_diag: attribute %d has %d bytes, expected %d", at, len(v), need)
		}
		switch at {
		case unixDiagName:
			d.name = string(v)
		case unixDiagPeer:
			d.hasPeer, d.peer = true, ne.Uint32(v)
		case unixDiagIcons:
			for ; len(v) >= 4; v = v[4:] {
				d.pending = append(d.pending, ne.Uint32(v))
			}
		case unixDiagRqlen:
			d.rqueue, d.wqueue = ne.Uint32(v), ne.Uint32(v[4:])
		case unixDiagShutdown:
			d.shutdown = v[0]
		}
	}
	return d, nil
}
