package files

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// tcpSockets connects two sockets of this process.
func tcpSockets(t *testing.T) (c, s int) {
	t.Helper()
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(l) }()
	if c, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(c) })
	if err := errors.Join(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(c, sa); err != nil {
		t.Fatal(err)
	}
	if s, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s) })
	return c, s
}

// Urgent data stands in the way of a dump, wherever it is, until it has been passed.
func TestTCPUrgent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("repair mode needs root")
	}
	for _, tc := range []struct {
		name   string
		before string // sent before the urgent byte
		oob    bool   // it is received
		read   int    // so much of the ordinary bytes is received
		want   bool
	}{
		{"waits", "abc", false, 0, true},
		{"received out of band", "abc", true, 0, true},
		{"at the mark", "", false, 0, true},
		{"passed", "abc", true, 5, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, s := tcpSockets(t)
			for _, x := range []struct {
				b     string
				flags int
			}{{tc.before, 0}, {"X", unix.MSG_OOB}, {"def", 0}} {
				if err := unix.Sendto(c, []byte(x.b), x.flags, nil); err != nil {
					t.Fatal(err)
				}
			}
			b := make([]byte, 100)
			if tc.oob {
				if _, _, err := unix.Recvfrom(s, b, unix.MSG_OOB); err != nil {
					t.Fatal(err)
				}
			}
			for got := 0; got < tc.read; {
				n, err := unix.Read(s, b[:tc.read-got])
				if err != nil {
					t.Fatal(err)
				}
				got += n
			}
			_, queues, err := readStream(s, &sk_inet.InetSkEntry{State: proto.Uint32(stateEstablished), TcpOpts: &tcp_stream.TcpOptsEntry{}})
			if errors.Is(err, errUrgent) != tc.want {
				t.Errorf("read %q, error %v", queues, err)
			}
			if err == nil && string(queues) != "f" {
				t.Errorf("read %q, want what is left", queues)
			}
			if n, err := unix.GetsockoptInt(s, unix.SOL_TCP, unix.TCP_INQ); err != nil || n != 0 {
				t.Errorf("TCP_INQ is %d afterwards, %v", n, err)
			}
		})
	}
}

func TestSegment(t *testing.T) {
	for _, tc := range []struct{ src, dst string }{{"10.1.2.3:80", "192.168.0.9:4321"}, {"[fe80::1]:80", "[2001:db8::5]:4321"}} {
		src, dst := netip.MustParseAddrPort(tc.src), netip.MustParseAddrPort(tc.dst)
		b := segment(src, dst, 0x01020304, 0xa0b0c0d0, 777)
		head := 20
		if src.Addr().Is6() {
			head = 40
		}
		tcp := b[head:]
		pseudo := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
		pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(tcp)))
		pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_TCP)
		if sum := checksum(append(pseudo, tcp...)); sum != 0 {
			t.Errorf("%s: the checksum is off by %#x", tc.src, sum)
		}
		if got := binary.BigEndian.Uint16(tcp); got != 80 {
			t.Errorf("source port %d", got)
		}
		if seq, ack := binary.BigEndian.Uint32(tcp[4:]), binary.BigEndian.Uint32(tcp[8:]); seq != 0x01020304 || ack != 0xa0b0c0d0 {
			t.Errorf("sequence numbers %#x, %#x", seq, ack)
		}
		if len(tcp) != 20 || tcp[13] != 0x11 {
			t.Errorf("segment % x", tcp)
		}
	}
	if got := checksum([]byte{1, 2, 3}); got != ^uint16(0x0402) {
		t.Errorf("checksum of an odd number of bytes: %#x", got)
	}
}

// What a restore wants to know of the network lock comes from the inventory.
func TestTCPOutsideImages(t *testing.T) {
	for _, tc := range []struct {
		name   string
		inv    *inventory.InventoryEntry
		opts   RestoreOptions
		change func(*sk_inet.InetSkEntry)
		lock   string
		want   string // of the error
	}{
		{name: "nftables", inv: &inventory.InventoryEntry{NetworkLockMethod: proto.Uint32(lockNftables), DumpCriuRunId: proto.String("abc-1")}, lock: "abc-1"},
		{name: "bad name", inv: &inventory.InventoryEntry{NetworkLockMethod: proto.Uint32(lockNftables), DumpCriuRunId: proto.String("a b")}},
		{name: "skip", inv: &inventory.InventoryEntry{NetworkLockMethod: proto.Uint32(lockNftables), DumpCriuRunId: proto.String("abc")}, opts: RestoreOptions{LockSkip: true}},
		{name: "iptables", inv: &inventory.InventoryEntry{NetworkLockMethod: proto.Uint32(lockIptables)}, want: "by iptables"},
		{name: "iptables, undone", inv: &inventory.InventoryEntry{NetworkLockMethod: proto.Uint32(lockIptables)}, opts: RestoreOptions{LockSkip: true}},
		{name: "closed", inv: &inventory.InventoryEntry{TcpClose: proto.Bool(true)}, want: "was dumped with --tcp-close"},
		{name: "to be closed", inv: &inventory.InventoryEntry{TcpClose: proto.Bool(true)}, opts: RestoreOptions{TCPClose: true}},
		{name: "address", change: func(e *sk_inet.InetSkEntry) { e.SrcAddr = wordsOf([]byte{192, 0, 2, 1}) }, want: "this host does not have the address"},
		{name: "unsent", change: func(e *sk_inet.InetSkEntry) { e.Ino = proto.Uint32(162) }, want: "4 bytes of 0 are not sent yet"},
		{name: "no address", change: func(e *sk_inet.InetSkEntry) { e.SrcAddr = nil }, want: "without an address"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			set := tcpEnds(stateEstablished, 10, 23, 20, 10, []byte("in"), []byte("out"))
			inv := tc.inv
			if inv == nil {
				inv = &inventory.InventoryEntry{}
			}
			set.Add(image.Entry{File: image.InventoryFile, Msg: inv})
			first := set.Entries(filesImage)[0].Msg.(*fdinfo.FileEntry).GetIsk()
			first.DstPort = proto.Uint32(5) // nobody's
			if tc.change != nil {
				tc.change(first)
			}
			if tc.name == "unsent" {
				set.Entries(streamImage(162))[0].Msg.(*tcp_stream.TcpStreamEntry).UnsqLen = proto.Uint32(4)
			}
			tc.opts.TCPEstablished, tc.opts.TCPOutside = true, true
			r, err := NewRestorer(nil, set, tc.opts)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q", err, tc.want)
			case tc.want == "" && r.lockID != tc.lock:
				t.Errorf("lock %q, want %q", r.lockID, tc.lock)
			}
			if r != nil {
				_ = r.Close()
			}
		})
	}
}

// A socket with keys for signatures is told from others of its port.
func TestTCPSigned(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("keys are told to root only")
	}
	for _, state := range []uint32{stateListen, stateEstablished} {
		var fd int
		if state == stateListen {
			var err error
			if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Close(fd) })
			if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 1)); err != nil {
				t.Fatal(err)
			}
		} else {
			_, fd = tcpSockets(t)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		e := &sk_inet.InetSkEntry{Family: proto.Uint32(unix.AF_INET), SrcPort: proto.Uint32(0), DstPort: proto.Uint32(0)}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		if e.SrcAddr, *e.SrcPort, _, err = sockaddrWords(sa); err != nil {
			t.Fatal(err)
		}
		if sa, err := unix.Getpeername(fd); err == nil {
			if e.DstAddr, *e.DstPort, _, err = sockaddrWords(sa); err != nil {
				t.Fatal(err)
			}
		}
		if signed, err := tcpSigned(e, uint32(st.Ino)); signed || err != nil {
			t.Errorf("state %d: signed %v, %v without a key", state, signed, err)
		}
		if err := unix.SetsockoptTCPMD5Sig(fd, unix.SOL_TCP, unix.TCP_MD5SIG, md5Key()); errors.Is(err, unix.ENOPROTOOPT) {
			t.Skip("this kernel has no TCP_MD5SIG")
		} else if err != nil {
			t.Fatal(err)
		}
		if signed, err := tcpSigned(e, uint32(st.Ino)); !signed || err != nil {
			t.Errorf("state %d: signed %v, %v with a key", state, signed, err)
		}
		if signed, err := tcpSigned(e, uint32(st.Ino)+1); signed || err != nil {
			t.Errorf("state %d: signed %v, %v for another inode", state, signed, err)
		}
	}
}

func md5Key() *unix.TCPMD5Sig {
	k := &unix.TCPMD5Sig{Keylen: 3}
	k.Addr.Family = unix.AF_INET
	k.Addr.Data[2], k.Addr.Data[5] = 127, 1 // behind the port
	copy(k.Key[:], "key")
	return k
}
