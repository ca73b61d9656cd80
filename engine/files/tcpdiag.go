package files

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What sock_diag(7) tells of a TCP socket (include/uapi/linux/inet_diag.h).
const (
	inetDiagMsgSize = 72 // sizeof(struct inet_diag_msg)
	inetDiagInode   = 68 // offset of idiag_inode in it
	inetDiagInfo    = 2  // INET_DIAG_INFO; without it the kernel tells of no keys
	inetDiagMD5     = 18 // INET_DIAG_MD5SIG, told to CAP_NET_ADMIN
)

// refuseSigned refuses a socket whose segments are signed (TCP_MD5SIG, RFC 2385):
// its keys would be lost. It can be told of bound sockets only.
func (d *Dumper) refuseSigned(o *object, e *sk_inet.InetSkEntry) error {
	if e.GetProto() != unix.IPPROTO_TCP || e.GetState() == stateClose || d.opts.TCPClose && connected(e.GetState()) {
		return nil
	}
	signed, err := tcpSigned(e, uint32(o.stat.Ino))
	if err != nil {
		return fmt.Errorf("ask for the keys of signatures: %w", err)
	}
	if signed {
		d.refuse(o, "its segments are signed (TCP_MD5SIG), and the keys are not carried", "let the program end what needs them")
	}
	return nil
}

// tcpSigned asks whether a socket has keys for signatures. One that cannot be found,
// since it is just ending, or since another one shares its port, has none.
func tcpSigned(e *sk_inet.InetSkEntry, ino uint32) (bool, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	ms, err := c.Execute(netlink.Message{Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request}, Data: inetDiagRequest(e)})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, m := range ms {
		if len(m.Data) < inetDiagMsgSize || binary.NativeEndian.Uint32(m.Data[inetDiagInode:]) != ino {
			continue
		}
		attrs, err := netlink.UnmarshalAttributes(m.Data[inetDiagMsgSize:])
		if err != nil {
			return false, err
		}
		for _, a := range attrs {
			if a.Type == inetDiagMD5 && len(a.Data) > 0 {
				return true, nil
			}
		}
	}
	return false, nil
}

// inetDiagRequest is a struct inet_diag_req_v2 for one socket.
func inetDiagRequest(e *sk_inet.InetSkEntry) []byte {
	b := []byte{byte(e.GetFamily()), unix.IPPROTO_TCP, 1 << (inetDiagInfo - 1), 0}
	b = binary.NativeEndian.AppendUint32(b, ^uint32(0)) // any state
	b = binary.BigEndian.AppendUint16(b, uint16(e.GetSrcPort()))
	b = binary.BigEndian.AppendUint16(b, uint16(e.GetDstPort()))
	for _, words := range [][]uint32{e.GetSrcAddr(), e.GetDstAddr()} {
		b = append(b, append(addrBytes(words), make([]byte, 16)...)[:16]...)
	}
	b = binary.NativeEndian.AppendUint32(b, 0) // any interface
	return append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
}
