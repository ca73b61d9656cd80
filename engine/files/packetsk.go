package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	packet_sock "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/sys"
)

// kindPacket carries packet sockets. Interfaces are found again by their names;
// packets that wait do not travel: only the first could be seen, and whoever sends
// one again sends it to all.
var kindPacket = &kind{
	name: "packet socket", note: "packets that wait are lost, as when a capture falls behind", typ: fdinfo.FdTypes_PACKETSK,
	takes: func(_ *Dumper, o *object) bool { return o.family() == unix.AF_PACKET },
	dump:  dumpPacket,
	check: checkPacket,
	open:  openEach(openPacket),
}

const (
	packetAddMembership = 1
	noFanout            = ^uint32(0)
	fanoutCBPF          = 6 // PACKET_FANOUT_CBPF and _EBPF (include/uapi/linux/if_packet.h)
	fanoutEBPF          = 7
	maxMembers          = 4096 // of one socket, in an image
	maxInterface        = 1<<31 - 1
)

// packetOpts are the options of level SOL_PACKET that CRIU's message has.
var packetOpts = []struct {
	opt int
	set func(*packet_sock.PacketSockEntry, uint32)
	get func(*packet_sock.PacketSockEntry) uint32
}{
	{unix.PACKET_VERSION, func(e *packet_sock.PacketSockEntry, n uint32) { e.Version = &n }, (*packet_sock.PacketSockEntry).GetVersion},
	{unix.PACKET_RESERVE, func(e *packet_sock.PacketSockEntry, n uint32) { e.Reserve = &n }, (*packet_sock.PacketSockEntry).GetReserve},
	{unix.PACKET_AUXDATA, func(e *packet_sock.PacketSockEntry, n uint32) { e.AuxData = proto.Bool(n != 0) },
		func(e *packet_sock.PacketSockEntry) uint32 { return uint32(btoi(e.GetAuxData())) }},
	{unix.PACKET_ORIGDEV, func(e *packet_sock.PacketSockEntry, n uint32) { e.OrigDev = proto.Bool(n != 0) },
		func(e *packet_sock.PacketSockEntry) uint32 { return uint32(btoi(e.GetOrigDev())) }},
	{unix.PACKET_VNET_HDR, func(e *packet_sock.PacketSockEntry, n uint32) { e.VnetHdr = proto.Bool(n != 0) },
		func(e *packet_sock.PacketSockEntry) uint32 { return uint32(btoi(e.GetVnetHdr())) }},
	{unix.PACKET_LOSS, func(e *packet_sock.PacketSockEntry, n uint32) { e.Loss = proto.Bool(n != 0) },
		func(e *packet_sock.PacketSockEntry) uint32 { return uint32(btoi(e.GetLoss())) }},
	{unix.PACKET_TIMESTAMP, func(e *packet_sock.PacketSockEntry, n uint32) { e.Timestamp = &n }, (*packet_sock.PacketSockEntry).GetTimestamp},
}

func dumpPacket(d *Dumper, o *object) error {
	fd := int(o.file.Fd())
	if other, err := d.refuseOtherNetns(o); other || err != nil {
		return err
	}
	k, err := sockTypeOf(fd)
	if err != nil {
		return err
	}
	if k.typ != unix.SOCK_RAW && k.typ != unix.SOCK_DGRAM {
		d.refuse(o, fmt.Sprintf("packet sockets of type %d are not carried", k.typ), "let the program close it")
		return nil
	}
	opts, err := d.dumpSockOpts(o)
	if err != nil {
		return err
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	local, ok := sa.(*unix.SockaddrLinklayer)
	if !ok {
		return fmt.Errorf("a packet socket has an address of type %T", sa)
	}
	if local.Ifindex < 0 {
		d.refuse(o, "the network interface that it was bound to is gone", "let the program close it")
		return nil
	}
	e := &packet_sock.PacketSockEntry{
		Id: proto.Uint32(o.id), Type: proto.Uint32(uint32(k.typ)), Protocol: proto.Uint32(uint32(swap16(local.Protocol))), Flags: proto.Uint32(uint32(o.flags)),
		Ifindex: proto.Uint32(uint32(local.Ifindex)), Fown: o.fown, Opts: opts,
	}
	for _, x := range packetOpts {
		n, _, err := getOpt(fd, unix.SOL_PACKET, x.opt)
		if err != nil {
			return err
		}
		x.set(e, uint32(n))
	}
	if err := d.dumpFanout(o, fd, e); err != nil {
		return err
	}
	if err := d.dumpMembers(o, e); err != nil {
		return err
	}
	if err := d.warnWaiting(o, fd, "packets that wait to be received do not travel"); err != nil {
		return err
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_PACKETSK.Enum(), Id: proto.Uint32(o.id), Psk: e})
	return nil
}

// swap16 turns a number from network order into the host's and back.
func swap16(n uint16) uint16 {
	return binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, n))
}

func (d *Dumper) dumpFanout(o *object, fd int, e *packet_sock.PacketSockEntry) error {
	var b [4]byte
	if _, err := sys.GetSockopt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, b[:]); err != nil {
		return fmt.Errorf("PACKET_FANOUT: %w", err)
	}
	e.Fanout = proto.Uint32(noFanout)
	n := binary.NativeEndian.Uint32(b[:])
	if n == 0 { // of id 0 with the first way of sharing, or none: that is asked of the kernel's list
		st, err := d.packetFanout(o)
		if err != nil || !st {
			return err
		}
	}
	if typ := n >> 16 & 0xff; typ == fanoutCBPF || typ == fanoutEBPF {
		d.refuse(o, "a BPF program shares the packets out (PACKET_FANOUT), and cannot be read", "let the program share them by hash")
	}
	e.Fanout = proto.Uint32(n)
	return nil
}

func (d *Dumper) diagOf(o *object) (packetDiag, error) {
	if d.packets == nil {
		var err error
		if d.packets, err = readPacketDiag(); err != nil {
			return packetDiag{}, err
		}
	}
	p, ok := d.packets[uint32(o.stat.Ino)]
	if !ok {
		return packetDiag{}, fmt.Errorf("sock_diag does not know packet socket %d", o.stat.Ino)
	}
	return p, nil
}

func (d *Dumper) packetFanout(o *object) (bool, error) {
	p, err := d.diagOf(o)
	return p.fanout, err
}

func (d *Dumper) dumpMembers(o *object, e *packet_sock.PacketSockEntry) error {
	p, err := d.diagOf(o)
	if err != nil {
		return err
	}
	if p.rings {
		d.refuse(o, "it has a ring of packets (PACKET_RX_RING, PACKET_TX_RING), whose positions cannot be read", "let the program receive by recv(2)")
	}
	e.CopyThresh = proto.Uint32(p.copyThresh)
	for _, m := range p.members {
		for range min(m.count, maxMembers) {
			e.Mclist = append(e.Mclist, &packet_sock.PacketMclist{Index: proto.Uint32(m.index), Type: proto.Uint32(uint32(m.typ)), Addr: m.addr})
		}
	}
	for _, i := range packetInterfaces(e) {
		name, err := interfaceName(i)
		if err != nil {
			return err
		}
		f := o.sockFacts()
		if f.Interfaces == nil {
			f.Interfaces = map[uint32]string{}
		}
		f.Interfaces[i] = name
	}
	return nil
}

// packetInterfaces are the indexes in an entry.
func packetInterfaces(e *packet_sock.PacketSockEntry) []uint32 {
	var out []uint32
	if e.GetIfindex() != 0 {
		out = append(out, e.GetIfindex())
	}
	for _, m := range e.GetMclist() {
		out = append(out, m.GetIndex())
	}
	return out
}

// warnWaiting tells that what waits in a socket is lost, when it is dumped.
func (d *Dumper) warnWaiting(o *object, fd int, what string) error {
	if d.dry() {
		return nil
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil {
		return os.NewSyscallError("poll", err)
	}
	if p[0].Revents&unix.POLLIN != 0 {
		h := o.first()
		d.log.Warn(what, "pid", h.proc.Pid, "fd", h.fd, "socket", o.link)
	}
	return nil
}

func checkPacket(r *Restorer, x *description) error {
	e := x.entry.GetPsk()
	switch {
	case e.GetType() != unix.SOCK_RAW && e.GetType() != unix.SOCK_DGRAM:
		return fmt.Errorf("packet sockets of type %d are not carried", e.GetType())
	case e.GetProtocol() > 65535:
		return errors.New("its protocol is out of range")
	case e.RxRing != nil || e.TxRing != nil:
		return errors.New("packet sockets with rings are not carried")
	case len(e.GetMclist()) > maxMembers:
		return fmt.Errorf("it has %d memberships", len(e.GetMclist()))
	}
	for _, m := range e.GetMclist() {
		if len(m.GetAddr()) > maxHardware || m.GetType() > 65535 {
			return fmt.Errorf("a membership of type %d with an address of %d bytes", m.GetType(), len(m.GetAddr()))
		}
	}
	for _, i := range packetInterfaces(e) {
		if i > maxInterface {
			return fmt.Errorf("network interface %d is out of range", i)
		}
	}
	return checkSockOpts(e.GetOpts())
}

// interfaceOf finds the interface that had an index on the host of the dump.
func (r *Restorer) interfaceOf(x *description, index uint32) (uint32, error) {
	if f := r.facts[x.id]; f != nil && f.Sock != nil && f.Sock.Interfaces[index] != "" {
		return interfaceIndex(f.Sock.Interfaces[index])
	}
	return index, nil
}

func openPacket(r *Restorer, x *description) error {
	e := x.entry.GetPsk()
	// Without a protocol it receives nothing until all is set.
	fd, err := unix.Socket(unix.AF_PACKET, int(e.GetType())|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	x.file = os.NewFile(uintptr(fd), "packet socket")
	for _, o := range packetOpts {
		if have, ok, err := getOpt(fd, unix.SOL_PACKET, o.opt); err == nil && ok && uint32(have) == o.get(e) {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o.opt, int(o.get(e))); err != nil {
			return fmt.Errorf("packet option %d: %w", o.opt, os.NewSyscallError("setsockopt", err))
		}
	}
	if n := e.GetCopyThresh(); n != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_COPY_THRESH, int(n)); err != nil {
			return os.NewSyscallError("setsockopt PACKET_COPY_THRESH", err)
		}
	}
	if err := r.restoreSockOpts(x, e.GetOpts(), nil); err != nil {
		return err
	}
	for _, m := range e.GetMclist() {
		if err := r.addMember(x, fd, m); err != nil {
			return fmt.Errorf("membership of type %d on network interface %d: %w", m.GetType(), m.GetIndex(), err)
		}
	}
	index, err := r.interfaceOf(x, e.GetIfindex())
	if err != nil {
		return err
	}
	if e.GetProtocol() != 0 || index != 0 {
		sa := &unix.SockaddrLinklayer{Protocol: swap16(uint16(e.GetProtocol())), Ifindex: int(index)}
		if err := unix.Bind(fd, sa); err != nil {
			return fmt.Errorf("bind to network interface %d: %w", index, os.NewSyscallError("bind", err))
		}
	}
	if n := e.GetFanout(); n != noFanout {
		if err := sys.SetSockopt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, binary.NativeEndian.AppendUint32(nil, n)); err != nil {
			return fmt.Errorf("PACKET_FANOUT: %w", err)
		}
	}
	return setStatus(x.file, e.GetFlags())
}

// addMember adds one membership: struct packet_mreq, its address as long as it needs.
func (r *Restorer) addMember(x *description, fd int, m *packet_sock.PacketMclist) error {
	index, err := r.interfaceOf(x, m.GetIndex())
	if err != nil {
		return err
	}
	ne := binary.NativeEndian
	b := ne.AppendUint32(nil, index)
	b = ne.AppendUint16(b, uint16(m.GetType()))
	b = ne.AppendUint16(b, uint16(len(m.GetAddr())))
	b = append(b, m.GetAddr()...)
	for len(b) < 16 {
		b = append(b, 0)
	}
	return sys.SetSockopt(fd, unix.SOL_PACKET, packetAddMembership, b)
}
