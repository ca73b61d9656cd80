package ns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Messages of rtnetlink(7) and netlink(7), in the byte order of the host.

var ne = binary.NativeEndian

const (
	sizeofTcmsg = 20     // struct tcmsg (include/uapi/linux/rtnetlink.h)
	nlaTypeMask = 0x3fff // NLA_TYPE_MASK (include/uapi/linux/netlink.h)
)

// nlmsg is one message without its head.
type nlmsg struct {
	typ  uint16
	data []byte
}

// conn is a netlink socket of the thread's network namespace.
type conn struct {
	fd  int
	seq uint32
}

func dial(proto int) (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket netlink", err)
	}
	// Dumps are filtered by the kernel only for those who ask strictly.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	return &conn{fd: fd}, nil
}

func (c *conn) close() { _ = unix.Close(c.fd) }

// do sends a request, with NLM_F_DUMP or NLM_F_ACK, and gives the messages of the answer; an error of the
// kernel is an *os.SyscallError that what names.
func (c *conn) do(what string, typ, flags uint16, data []byte) ([]nlmsg, error) {
	c.seq++
	b := appendMsg(nil, typ, flags|unix.NLM_F_REQUEST, c.seq, data)
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError(what, err)
	}
	var out []nlmsg
	buf := make([]byte, 256<<10)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError(what, err)
		}
		ms, err := splitMsgs(buf[:n])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		for _, m := range ms {
			switch m.typ {
			case unix.NLMSG_DONE:
				return out, nil
			case unix.NLMSG_ERROR:
				if len(m.data) < 4 {
					return nil, fmt.Errorf("%s: a short error", what)
				}
				if e := -int32(ne.Uint32(m.data)); e != 0 {
					return nil, os.NewSyscallError(what, unix.Errno(e))
				}
				return out, nil
			default:
				out = append(out, nlmsg{m.typ, append([]byte(nil), m.data...)})
			}
		}
	}
}

// dump lists objects.
func (c *conn) dump(what string, typ uint16, data []byte) ([]nlmsg, error) {
	return c.do(what, typ, unix.NLM_F_DUMP, data)
}

// set changes something.
func (c *conn) set(what string, typ, flags uint16, data []byte) error {
	_, err := c.do(what, typ, flags|unix.NLM_F_ACK, data)
	return err
}

func pad4(n int) int { return (n + 3) &^ 3 }

func appendMsg(b []byte, typ, flags uint16, seq uint32, data []byte) []byte {
	b = ne.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+len(data)))
	b = ne.AppendUint16(b, typ)
	b = ne.AppendUint16(b, flags)
	b = ne.AppendUint32(b, seq)
	b = ne.AppendUint32(b, 0)
	b = append(b, data...)
	return append(b, make([]byte, pad4(len(data))-len(data))...)
}

// splitMsgs takes a row of messages apart, which may come from an image.
func splitMsgs(b []byte) ([]nlmsg, error) {
	var out []nlmsg
	for len(b) > 0 {
		if len(b) < unix.NLMSG_HDRLEN {
			return nil, fmt.Errorf("%d bytes where a message should be", len(b))
		}
		n := int(ne.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			return nil, fmt.Errorf("a message of %d bytes, %d are left", n, len(b))
		}
		out = append(out, nlmsg{ne.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:n]})
		b = b[min(len(b), pad4(n)):]
	}
	return out, nil
}

// attr is one attribute.
type attr struct {
	typ  uint16
	data []byte
}

// attrs takes attributes apart, behind a head of size bytes.
func attrs(b []byte, size int) ([]attr, error) {
	if len(b) < size {
		return nil, fmt.Errorf("a message of %d bytes, its head has %d", len(b), size)
	}
	var out []attr
	for b = b[size:]; len(b) >= 4; {
		n := int(ne.Uint16(b))
		if n < 4 || n > len(b) {
			return nil, fmt.Errorf("an attribute of %d bytes, %d are left", n, len(b))
		}
		out = append(out, attr{ne.Uint16(b[2:]) & nlaTypeMask, b[4:n]})
		b = b[min(len(b), pad4(n)):]
	}
	return out, nil
}

func find(as []attr, typ uint16) []byte {
	for _, a := range as {
		if a.typ == typ {
			return a.data
		}
	}
	return nil
}

func find32(as []attr, typ uint16) (uint32, bool) {
	b := find(as, typ)
	if len(b) < 4 {
		return 0, false
	}
	return ne.Uint32(b), true
}

// text is a string attribute, without its NUL.
func text(b []byte) string { return unix.ByteSliceToString(b) }

func appendAttr(b []byte, typ uint16, data []byte) []byte {
	b = ne.AppendUint16(b, uint16(4+len(data)))
	b = ne.AppendUint16(b, typ)
	b = append(b, data...)
	return append(b, make([]byte, pad4(len(data))-len(data))...)
}

func appendText(b []byte, typ uint16, s string) []byte {
	return appendAttr(b, typ, append([]byte(s), 0))
}

func append32(b []byte, typ uint16, v uint32) []byte {
	return appendAttr(b, typ, ne.AppendUint32(nil, v))
}

// ifinfo is struct ifinfomsg: flags are those to set where mask has them.
func ifinfo(index int32, flags, mask uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	ne.PutUint32(b[4:], uint32(index))
	ne.PutUint32(b[8:], flags)
	ne.PutUint32(b[12:], mask)
	return b
}
