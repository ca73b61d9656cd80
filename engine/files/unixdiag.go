package files

import (
	"encoding/binary"
	"fmt"

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
)

// readUnixDiag asks for one socket of this network namespace.
func readUnixDiag(ino uint32) (d unixDiag, err error) {
	ne := binary.NativeEndian
	req := []byte{unix.AF_UNIX, 0, 0, 0}
	req = ne.AppendUint32(req, 0xffffffff) // any state
	req = ne.AppendUint32(req, ino)
	req = ne.AppendUint32(req, udiagShowAll)
	req = ne.AppendUint64(req, ^uint64(0)) // no cookie
	err = netlinkExchange(unix.NETLINK_SOCK_DIAG, sockDiagByFamily, unix.NLM_F_ACK, req, func(typ uint16, b []byte) (err error) {
		if typ != sockDiagByFamily {
			return fmt.Errorf("sock_diag: a message of type %d", typ)
		}
		d, err = parseUnixDiag(b)
		return err
	})
	return d, err
}

// parseUnixDiag parses what is told of one socket.
func parseUnixDiag(b []byte) (unixDiag, error) {
	ne := binary.NativeEndian
	if len(b) < udiagHeader {
		return unixDiag{}, fmt.Errorf("sock_diag: a message of %d bytes", len(b))
	}
	d := unixDiag{typ: b[1], state: b[2]}
	err := netlinkAttrs(b[udiagHeader:], func(at uint16, v []byte) error {
		need := map[uint16]int{unixDiagPeer: 4, unixDiagRqlen: 8, unixDiagShutdown: 1}[at]
		if len(v) < need {
			return fmt.Errorf("sock_diag: attribute %d has %d bytes, expected %d", at, len(v), need)
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
		return nil
	})
	return d, err
}
