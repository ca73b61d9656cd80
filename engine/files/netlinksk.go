package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/sys"
)

// kindNetlink carries netlink sockets of every protocol, with their port and
// groups. What the kernel keeps for a port besides (queues of packets, the audit
// daemon) is refused, and so are messages that wait: nobody can send them again
// in the kernel's name.
var kindNetlink = &kind{
	name: "netlink socket", typ: fdinfo.FdTypes_NETLINKSK,
	takes: func(_ *Dumper, o *object) bool { return o.family() == unix.AF_NETLINK },
	dump:  dumpNetlink,
	check: checkNetlink,
	open:  openEach(openNetlink),
}

// family is the address family of a socket, -1 of anything else.
func (o *object) family() int {
	if o.mode()&unix.S_IFMT != unix.S_IFSOCK || o.isPath() {
		return -1
	}
	n, err := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return -1
	}
	return n
}

// Options and states of netlink sockets (include/uapi/linux/netlink.h,
// net/netlink/af_netlink.c).
const (
	netlinkListMemberships = 9
	netlinkConnected       = 1
	maxNetlinkGroups       = 1 << 16 // of a protocol, in an image
	cnIdxProc              = 1
)

func dumpNetlink(d *Dumper, o *object) error {
	fd := int(o.file.Fd())
	if other, err := d.refuseOtherNetns(o); other || err != nil {
		return err
	}
	k, err := sockTypeOf(fd)
	if err != nil {
		return err
	}
	opts, err := d.dumpSockOpts(o)
	if err != nil {
		return err
	}
	e := &sk_netlink.NetlinkSkEntry{
		Id: proto.Uint32(o.id), Ino: proto.Uint32(uint32(o.stat.Ino)), Protocol: proto.Uint32(uint32(k.protocol)), State: proto.Uint32(0),
		Flags: proto.Uint32(uint32(o.flags)), Portid: proto.Uint32(0), DstPortid: proto.Uint32(0), DstGroup: proto.Uint32(0), Fown: o.fown, Opts: opts,
	}
	if k.typ != unix.SOCK_RAW {
		o.sockFacts().Type = k.typ
	}
	if err := netlinkNames(fd, e); err != nil {
		return err
	}
	if e.Groups, err = netlinkGroups(fd); err != nil {
		return err
	}
	o.link = fmt.Sprintf("socket:[%d] (netlink protocol %d port %d)", o.stat.Ino, k.protocol, e.GetPortid())
	if err := d.refuseNetlinkState(o, e); err != nil {
		return err
	}
	if !d.dry() { // a program that runs takes what comes
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 0); err != nil {
			return os.NewSyscallError("poll", err)
		}
		if p[0].Revents&(unix.POLLIN|unix.POLLERR) != 0 {
			d.passes(o, "messages of the kernel wait to be received, and nobody could send them again", "retry when the program has received them")
		}
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_NETLINKSK.Enum(), Id: proto.Uint32(o.id), Nlsk: e})
	return nil
}

func netlinkNames(fd int, e *sk_netlink.NetlinkSkEntry) error {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	local, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return fmt.Errorf("a netlink socket has an address of type %T", sa)
	}
	e.Portid = proto.Uint32(local.Pid)
	if sa, err = unix.Getpeername(fd); err != nil {
		return os.NewSyscallError("getpeername", err)
	}
	if peer, ok := sa.(*unix.SockaddrNetlink); ok && (peer.Pid != 0 || peer.Groups != 0) {
		e.State = proto.Uint32(netlinkConnected)
		e.DstPortid = proto.Uint32(peer.Pid)
		if peer.Groups != 0 {
			e.DstGroup = proto.Uint32(uint32(bits.TrailingZeros32(peer.Groups)) + 1)
		}
	}
	return nil
}

// netlinkGroups reads which groups a socket has joined: bit n of word m is group
// 32m+n+1. There are none of a socket without any.
func netlinkGroups(fd int) ([]uint32, error) {
	for b := make([]byte, 64); ; b = make([]byte, 2*len(b)) {
		// The kernel fills what it has room for and tells how much it needs.
		n, err := sys.GetSockoptSize(fd, unix.SOL_NETLINK, netlinkListMemberships, b)
		if err != nil {
			return nil, fmt.Errorf("groups of a netlink socket: %w", err)
		}
		if n > maxNetlinkGroups/8 {
			return nil, fmt.Errorf("a netlink socket with %d bytes of groups", n)
		}
		if n > len(b) {
			continue
		}
		words := wordsOf(b[:n])
		if !anySet(words) {
			return nil, nil
		}
		return words, nil
	}
}

// refuseNetlinkState refuses what the kernel keeps for the port of a socket and
// forgets when it is closed.
func (d *Dumper) refuseNetlinkState(o *object, e *sk_netlink.NetlinkSkEntry) error {
	switch e.GetProtocol() {
	case unix.NETLINK_CONNECTOR:
		if len(e.Groups) > 0 && e.Groups[0]&cnIdxProc != 0 {
			d.refuse(o, "the kernel reports processes to it (proc connector), and asking for that again would lose events", "let the program close it")
		}
	case unix.NETLINK_NETFILTER:
		for _, f := range []struct{ table, what string }{{"nfnetlink_queue", "queues packets for"}, {"nfnetlink_log", "logs packets to"}} {
			b, err := os.ReadFile("/proc/thread-self/net/netfilter/" + f.table)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if hasPort(string(b), e.GetPortid()) {
				d.refuse(o, "the kernel "+f.what+" it (NETLINK_NETFILTER)", "stop the program that takes packets from the firewall")
			}
		}
	case unix.NETLINK_AUDIT:
		if pid := auditDaemon(); pid != 0 && d.inside[pid] {
			d.refuse(o, "its program is the audit daemon", "stop auditd")
		}
	}
	return nil
}

// hasPort says whether the second column of a table has a port.
func hasPort(table string, port uint32) bool {
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 1 && port != 0 && f[1] == strconv.FormatUint(uint64(port), 10) {
			return true
		}
	}
	return false
}

const (
	auditGet      = 1000 // AUDIT_GET (include/uapi/linux/audit.h)
	auditStatusAt = nlmsgHeader + 12
)

// auditDaemon asks the kernel for the pid of the audit daemon; 0: there is none, or
// this process may not ask.
func auditDaemon() int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_AUDIT)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(fd) }()
	ne := binary.NativeEndian
	req := ne.AppendUint32(nil, nlmsgHeader)
	req = ne.AppendUint16(req, auditGet)
	req = ne.AppendUint16(req, unix.NLM_F_REQUEST)
	req = append(req, 1, 0, 0, 0, 0, 0, 0, 0)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0
	}
	// The kernel answers with the status within the call.
	b := make([]byte, 256)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil || n < auditStatusAt+4 || ne.Uint16(b[4:]) != auditGet {
		return 0
	}
	return int(ne.Uint32(b[auditStatusAt:]))
}

func checkNetlink(r *Restorer, x *description) error {
	e := x.entry.GetNlsk()
	switch f := r.facts[x.id]; {
	case e.GetProtocol() > 255:
		return fmt.Errorf("netlink protocol %d is out of range", e.GetProtocol())
	case len(e.GetGroups()) > maxNetlinkGroups/32:
		return fmt.Errorf("it is in %d words of groups", len(e.GetGroups()))
	case f != nil && f.Sock != nil && f.Sock.Type != 0 && f.Sock.Type != unix.SOCK_DGRAM:
		return fmt.Errorf("a netlink socket cannot be of type %d", f.Sock.Type)
	}
	return checkSockOpts(e.GetOpts())
}

func openNetlink(r *Restorer, x *description) error {
	e := x.entry.GetNlsk()
	if done, err := r.openHandedSocket(x, e.GetIno()); done {
		return err
	}
	typ := unix.SOCK_RAW
	if f := r.facts[x.id]; f != nil && f.Sock != nil && f.Sock.Type != 0 {
		typ = f.Sock.Type
	}
	fd, err := unix.Socket(unix.AF_NETLINK, typ|unix.SOCK_CLOEXEC, int(e.GetProtocol()))
	if err != nil {
		return fmt.Errorf("netlink protocol %d: %w", e.GetProtocol(), os.NewSyscallError("socket", err))
	}
	x.file = os.NewFile(uintptr(fd), "netlink socket")
	if err := r.restoreSockOpts(x, e.GetOpts(), nil); err != nil {
		return err
	}
	if e.GetPortid() != 0 {
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: e.GetPortid()}); err != nil {
			return fmt.Errorf("bind netlink port %d of protocol %d: %w", e.GetPortid(), e.GetProtocol(), bindError(err))
		}
	}
	for i, w := range e.GetGroups() {
		for ; w != 0; w &= w - 1 {
			group := 32*i + bits.TrailingZeros32(w) + 1
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
				return fmt.Errorf("join group %d of netlink protocol %d: %w", group, e.GetProtocol(), os.NewSyscallError("setsockopt", err))
			}
		}
	}
	if e.GetDstPortid() != 0 || e.GetDstGroup() != 0 {
		to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: e.GetDstPortid()}
		if g := e.GetDstGroup(); g > 0 && g <= 32 {
			to.Groups = 1 << (g - 1)
		}
		if err := unix.Connect(fd, to); err != nil {
			return fmt.Errorf("connect to netlink port %d: %w", e.GetDstPortid(), os.NewSyscallError("connect", err))
		}
	}
	return setStatus(x.file, e.GetFlags())
}
