package files

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// packetDiag is what sock_diag(7) tells of a packet socket (include/uapi/linux/packet_diag.h).
type packetDiag struct {
	ino        uint32
	copyThresh uint32
	members    []packetMember
	rings      bool // it has a ring of packets, to receive or to send
	fanout     bool // it shares packets with others
}

// packetMember is a membership of packet(7).
type packetMember struct {
	index uint32 // of the interface
	count uint32 // how often it was added
	typ   uint16 // PACKET_MR_*
	addr  []byte
}

const (
	pdiagShow      = 1 | 2 | 4 | 8 // INFO, MCLIST, RING_CFG, FANOUT
	packetDiagInfo = 0
	packetDiagMC   = 1
	packetDiagRX   = 2
	packetDiagTX   = 3
	packetDiagFan  = 4
	pdiagHeader    = 16 // sizeof(struct packet_diag_msg)
	pdiagMember    = 44 // sizeof(struct packet_diag_mclist)
	maxHardware    = 32 // MAX_ADDR_LEN
)

// readPacketDiag asks for all packet sockets of this network namespace: the kernel
// does not tell of one alone.
func readPacketDiag() (map[uint32]packetDiag, error) {
	ne := binary.NativeEndian
	req := []byte{unix.AF_PACKET, 0, 0, 0, 0, 0, 0, 0}
	req = ne.AppendUint32(req, pdiagShow)
	req = ne.AppendUint64(req, ^uint64(0)) // no cookie
	out := map[uint32]packetDiag{}
	err := netlinkDump(unix.NETLINK_SOCK_DIAG, sockDiagByFamily, req, func(_ uint16, b []byte) error {
		d, err := parsePacketDiag(b)
		out[d.ino] = d
		return err
	})
	return out, err
}

// parsePacketDiag parses what is told of one socket.
func parsePacketDiag(b []byte) (packetDiag, error) {
	ne := binary.NativeEndian
	if len(b) < pdiagHeader {
		return packetDiag{}, fmt.Errorf("sock_diag: a message of %d bytes", len(b))
	}
	d := packetDiag{ino: ne.Uint32(b[4:])}
	err := netlinkAttrs(b[pdiagHeader:], func(typ uint16, v []byte) error {
		switch typ {
		case packetDiagInfo:
			if len(v) < 24 {
				return fmt.Errorf("sock_diag: attribute %d has %d bytes", typ, len(v))
			}
			d.copyThresh = ne.Uint32(v[12:])
		case packetDiagMC:
			for ; len(v) >= pdiagMember; v = v[pdiagMember:] {
				m := packetMember{index: ne.Uint32(v), count: ne.Uint32(v[4:]), typ: ne.Uint16(v[8:])}
				n := ne.Uint16(v[10:])
				if n > maxHardware {
					return fmt.Errorf("sock_diag: an address of %d bytes", n)
				}
				m.addr = append([]byte{}, v[12:12+n]...)
				d.members = append(d.members, m)
			}
		case packetDiagRX, packetDiagTX:
			d.rings = true
		case packetDiagFan:
			d.fanout = true
		}
		return nil
	})
	return d, err
}
