package files

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	packet_sock "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

func init() {
	scenes["packet-refused"] = func(string) fds {
		out := fds{
			"ring": must1(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)),
			"idle": must1(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)),
			"old":  must1(unix.Socket(unix.AF_PACKET, unix.SOCK_PACKET, 0)),
		}
		must(unix.SetsockoptInt(out["ring"], unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2))
		must(unix.SetsockoptTpacketReq(out["ring"], unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq{Block_size: 4096, Block_nr: 1, Frame_size: 2048, Frame_nr: 2}))
		return out
	}
}

func TestPacketRefused(t *testing.T) {
	c := start(t, "packet-refused")
	d := dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "ring of packets")
	wantProblem(t, d.problems, "packet sockets of type 10")
	if len(d.problems) != 2 {
		t.Errorf("%d problems, want 2", len(d.problems))
	}
}

func TestPacketHostile(t *testing.T) {
	member := func(typ, n int) *packet_sock.PacketMclist {
		return &packet_sock.PacketMclist{Index: proto.Uint32(1), Type: proto.Uint32(uint32(typ)), Addr: make([]byte, n)}
	}
	for _, x := range []struct {
		want  string
		spoil func(*packet_sock.PacketSockEntry)
	}{
		{"of type 10", func(e *packet_sock.PacketSockEntry) { e.Type = proto.Uint32(unix.SOCK_PACKET) }},
		{"protocol is out of range", func(e *packet_sock.PacketSockEntry) { e.Protocol = proto.Uint32(1 << 16) }},
		{"with rings", func(e *packet_sock.PacketSockEntry) { e.RxRing = &packet_sock.PacketRing{} }},
		{"memberships", func(e *packet_sock.PacketSockEntry) { e.Mclist = make([]*packet_sock.PacketMclist, 5000) }},
		{"address of 33 bytes", func(e *packet_sock.PacketSockEntry) { e.Mclist = append(e.Mclist, member(1, 33)) }},
		{"type 65536", func(e *packet_sock.PacketSockEntry) { e.Mclist = append(e.Mclist, member(1<<16, 6)) }},
		{"out of range", func(e *packet_sock.PacketSockEntry) { e.Ifindex = proto.Uint32(1 << 31) }},
		{"options are missing", func(e *packet_sock.PacketSockEntry) { e.Opts = nil }},
	} {
		e := &packet_sock.PacketSockEntry{Type: proto.Uint32(unix.SOCK_RAW), Opts: &sk_opts.SkOptsEntry{}}
		x.spoil(e)
		err := checkPacket(&Restorer{}, &description{entry: &fdinfo.FileEntry{Psk: e}})
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v, want %q", err, x.want)
		}
	}
}

// FuzzPacketDiag: no answer of the kernel's makes the parsers panic.
func FuzzPacketDiag(f *testing.F) {
	ne := binary.NativeEndian
	msg := make([]byte, pdiagHeader)
	ne.PutUint32(msg[4:], 77)
	msg = append(ne.AppendUint16(ne.AppendUint16(msg, 4+24), packetDiagInfo), make([]byte, 24)...)
	msg = append(ne.AppendUint16(ne.AppendUint16(msg, 4+pdiagMember), packetDiagMC), make([]byte, pdiagMember)...)
	whole := ne.AppendUint32(nil, uint32(nlmsgHeader+len(msg)))
	whole = append(ne.AppendUint16(whole, sockDiagByFamily), make([]byte, 10)...)
	f.Add(append(whole, msg...))
	f.Add([]byte{16, 0, 0, 0, unix.NLMSG_DONE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = netlinkMessages(b, func(_ uint16, body []byte) error {
			d, err := parsePacketDiag(body)
			for _, m := range d.members {
				if len(m.addr) > maxHardware {
					t.Errorf("an address of %d bytes", len(m.addr))
				}
			}
			return err
		})
	})
}
