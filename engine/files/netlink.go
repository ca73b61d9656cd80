package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const nlmsgHeader = 16 // sizeof(struct nlmsghdr)

// netlinkDump asks for a list and gives each message of the answer.
func netlinkDump(protocol int, typ uint16, body []byte, each func(typ uint16, body []byte) error) error {
	return netlinkExchange(protocol, typ, unix.NLM_F_DUMP, body, each)
}

// netlinkDo sends one request of NETLINK_ROUTE and waits for its acknowledgement.
func netlinkDo(typ, flags uint16, body []byte) error {
	return netlinkExchange(unix.NETLINK_ROUTE, typ, unix.NLM_F_ACK|flags, body, func(uint16, []byte) error { return nil })
}

// netlinkExchange sends one request and gives each message of the answer, until it
// ends: flags must have NLM_F_ACK or NLM_F_DUMP.
func netlinkExchange(protocol int, typ, flags uint16, body []byte, each func(typ uint16, body []byte) error) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return os.NewSyscallError("socket netlink", err)
	}
	defer func() { _ = unix.Close(fd) }()
	ne := binary.NativeEndian
	req := ne.AppendUint32(nil, uint32(nlmsgHeader+len(body)))
	req = ne.AppendUint16(req, typ)
	req = ne.AppendUint16(req, unix.NLM_F_REQUEST|flags)
	req = ne.AppendUint64(req, 1) // sequence and port
	if err := unix.Sendto(fd, append(req, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto netlink", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom netlink", err)
		}
		if done, err := netlinkMessages(buf[:n], each); done || err != nil {
			return err
		}
	}
}

// netlinkMessages takes a datagram apart; done says that it
// ends a list, or acknowledges a request.
func netlinkMessages(b []byte, each func(typ uint16, body []byte) error) (done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= nlmsgHeader {
		size, typ := ne.Uint32(b), ne.Uint16(b[4:])
		if size < nlmsgHeader || uint64(size) > uint64(len(b)) {
			return false, fmt.Errorf("netlink: a message of %d bytes, %d are left", size, len(b))
		}
		body := b[nlmsgHeader:size]
		switch typ {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, errors.New("netlink: a short error")
			}
			if e := -int32(ne.Uint32(body)); e != 0 {
				return true, os.NewSyscallError("netlink", unix.Errno(e))
			}
			return true, nil
		}
		if err := each(typ, body); err != nil {
			return false, err
		}
		b = b[min(len(b), int(size+3)&^3):]
	}
	return false, nil
}

// netlinkAttrs gives each attribute of a message.
func netlinkAttrs(b []byte, each func(typ uint16, v []byte) error) error {
	ne := binary.NativeEndian
	for len(b) >= 4 {
		n, typ := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if n < 4 || n > len(b) {
			return fmt.Errorf("netlink: attribute %d of %d bytes, %d are left", typ, n, len(b))
		}
		if err := each(typ, b[4:n]); err != nil {
			return err
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return nil
}
