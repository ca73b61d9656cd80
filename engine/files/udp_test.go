package files

import (
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

func init() {
	scenes["udp-refused"] = func(string) fds {
		out := fds{}
		udp := func(name string) int {
			fd := must1(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0))
			out[name] = fd
			must(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
			return fd
		}
		a, b, c := udp("empty datagram"), udp("idle"), udp("corked")
		must(unix.Sendto(b, nil, 0, must1(unix.Getsockname(a))))
		must(unix.SetsockoptInt(c, unix.IPPROTO_UDP, unix.UDP_CORK, 1))
		must(unix.Sendto(c, []byte("held back"), 0, must1(unix.Getsockname(a))))
		return out
	}
	scenes["options-refused"] = func(string) fds {
		out := fds{}
		for _, x := range []struct {
			name             string
			level, opt, want int
		}{
			{"numbers", unix.SOL_SOCKET, unix.SO_TIMESTAMPING, unix.SOF_TIMESTAMPING_OPT_ID | unix.SOF_TIMESTAMPING_TX_SOFTWARE},
			{"zero-copy", unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1},
			{"encapsulation", unix.IPPROTO_UDP, udpEncap, 2},
			{"more", unix.SOL_SOCKET, unix.SO_DEBUG, 1},
		} {
			fd := must1(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0))
			out[x.name] = fd
			must(unix.SetsockoptInt(fd, x.level, x.opt, x.want))
		}
		must(unix.Sendto(out["more"], []byte("held back"), unix.MSG_MORE, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 9}))
		return out
	}
}

// Options that the kernel does not tell whole are refused, each by what it is.
func TestOptionsRefused(t *testing.T) {
	d := dumpAll(t, Options{}, start(t, "options-refused"))
	for _, want := range []string{"SOF_TIMESTAMPING_OPT_ID", "SO_ZEROCOPY", "UDP_ENCAP", "MSG_MORE"} {
		wantProblem(t, d.problems, want)
	}
	if len(d.problems) != 4 {
		t.Errorf("%d problems, want 4", len(d.problems))
	}
}

// Facts come from elsewhere: what is no option or group that a dump writes is refused.
func TestSockFactsHostile(t *testing.T) {
	for _, x := range []struct {
		want string
		f    image.SockFacts
	}{
		{"not carried", image.SockFacts{Options: []image.SockOption{{Level: unix.SOL_SOCKET, Option: unix.SO_ATTACH_BPF, Value: make([]byte, 4)}}}},
		{"at most 4", image.SockFacts{Options: []image.SockOption{{Level: unix.IPPROTO_IP, Option: unix.IP_MINTTL, Value: make([]byte, 5)}}}},
		{"there are only", image.SockFacts{Options: make([]image.SockOption, 1000)}},
		{"no multicast group", image.SockFacts{Groups: []image.SockGroup{{Group: "10.0.0.1", Exclude: true}}}},
		{"no multicast group", image.SockFacts{Groups: []image.SockGroup{{Group: "ff02::1%lo", Exclude: true}}}},
		{"no sources", image.SockFacts{Groups: []image.SockGroup{{Group: "239.0.0.1"}}}},
		{"is no source", image.SockFacts{Groups: []image.SockGroup{{Group: "239.0.0.1", Sources: []string{"::1"}}}}},
		{"5000 sources", image.SockFacts{Groups: []image.SockGroup{{Group: "239.0.0.1", Sources: make([]string, 5000)}}}},
		{"a datagram from", image.SockFacts{Datagrams: []image.SockDatagram{{From: "10.0.0.1"}}}},
		{"a datagram from", image.SockFacts{Datagrams: []image.SockDatagram{{From: "[fe80::1%lo]:7"}}}},
		{"a datagram to", image.SockFacts{Datagrams: []image.SockDatagram{{From: "10.0.0.1:7", To: "x"}}}},
		{"a datagram of 70000", image.SockFacts{Datagrams: []image.SockDatagram{{From: "10.0.0.1:7", Data: make([]byte, 70000)}}}},
		{"70000 datagrams", image.SockFacts{Datagrams: make([]image.SockDatagram, 70000)}},
		{"5000 multicast groups", image.SockFacts{Groups: make([]image.SockGroup, 5000)}},
	} {
		if err := checkSockFacts(&x.f); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v, want %q", err, x.want)
		}
	}
}

// What a corked socket holds back stands in the way of a dump; datagrams that
// wait do not.
func TestUDPRefused(t *testing.T) {
	c := start(t, "udp-refused")
	d := dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "UDP_CORK")
	for _, p := range d.problems {
		if p.FD != c.fds["corked"] {
			t.Errorf("another socket is refused: %s", p)
		}
	}
	if len(d.problems) != 1 {
		t.Errorf("%d problems, want 1", len(d.problems))
	}
}

// FuzzDatagram: what the kernel tells of a datagram makes nothing panic, and is what
// an image may hold.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0}, false)
	f.Add([]byte{28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0}, true)
	f.Fuzz(func(t *testing.T, oob []byte, six bool) {
		var from unix.Sockaddr = &unix.SockaddrInet4{Port: 7, Addr: [4]byte{127, 0, 0, 1}}
		if six {
			from = &unix.SockaddrInet6{Port: 7, Addr: [16]byte{15: 1}}
		}
		m, _, ok := datagramOf(from, oob)
		if err := checkDatagrams([]image.SockDatagram{m}); !ok || err != nil {
			t.Error(ok, err)
		}
	})
}

// What waits at raw and ping sockets is sent again only if nothing else comes of it.
func TestResendable(t *testing.T) {
	entry := func(family, typ, protocol, port uint32) *sk_inet.InetSkEntry {
		return &sk_inet.InetSkEntry{Family: &family, Type: &typ, Proto: &protocol, SrcPort: &port}
	}
	icmp4, ping4 := entry(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP, 1), entry(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP, 0x102)
	icmp6, ping6 := entry(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6, 58), entry(unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6, 0x102)
	packet := func(protocol byte, first ...byte) image.SockDatagram {
		b := append(make([]byte, 20), append(first, make([]byte, 8-len(first))...)...)
		b[0], b[3], b[9], b[12], b[15] = 0x45, byte(len(b)), protocol, 10, 7
		return image.SockDatagram{From: "10.0.0.7:0", Data: b}
	}
	change := func(m image.SockDatagram, at int, v byte) image.SockDatagram {
		m.Data[at] = v
		return m
	}
	six := func(data ...byte) image.SockDatagram {
		return image.SockDatagram{From: "[2001:db8::1]:0", To: "::1", Data: append(data, make([]byte, 8)...)}
	}
	for _, x := range []struct {
		name string
		e    *sk_inet.InetSkEntry
		m    image.SockDatagram
		want bool
	}{
		{"echo reply", icmp4, packet(1, 0), true},
		{"unreachable", icmp4, packet(1, 3), true},
		{"extended echo, which is answered", icmp4, packet(1, 42), false},
		{"another protocol", icmp4, packet(17, 0), false},
		{"a fragment", icmp4, change(packet(1, 0), 6, 0x20), false},
		{"another length", icmp4, change(packet(1, 0), 3, 29), false},
		{"another sender", icmp4, change(packet(1, 0), 15, 8), false},
		{"options", icmp4, change(packet(1, 0), 0, 0x46), false},
		{"of UDP", entry(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP, 17), packet(17), false},
		{"of OSPF", entry(unix.AF_INET, unix.SOCK_RAW, 89, 89), packet(89), true},
		{"of a protocol that is none", entry(unix.AF_INET, unix.SOCK_RAW, 300, 300), packet(44), false},
		{"answer to a ping", ping4, image.SockDatagram{From: "10.0.0.7:0", Data: []byte{0, 0, 0, 0, 1, 2, 0, 1}}, true},
		{"of another", ping4, image.SockDatagram{From: "10.0.0.7:0", Data: []byte{0, 0, 0, 0, 1, 3, 0, 1}}, false},
		{"a ping itself", ping4, image.SockDatagram{From: "10.0.0.7:0", Data: []byte{8, 0, 0, 0, 1, 2, 0, 1}}, false},
		{"short", ping4, image.SockDatagram{From: "10.0.0.7:0", Data: []byte{0, 0, 0, 0}}, false},
		{"from the other family", ping4, six(0, 0, 0, 0, 1, 2), false},
		{"too large", ping4, image.SockDatagram{From: "10.0.0.7:0", Data: make([]byte, 65530)}, false},
		{"echo reply of IPv6", icmp6, six(129), true},
		{"router advertisement", icmp6, six(134), false},
		{"echo request of IPv6", icmp6, six(128), false},
		{"answer to a ping of IPv6", ping6, six(129, 0, 0, 0, 1, 2), true},
		{"of IPv6 to nobody", ping6, image.SockDatagram{From: "[::1]:0", Data: make([]byte, 8)}, false},
		{"from nobody", icmp4, image.SockDatagram{Data: make([]byte, 28)}, false},
	} {
		if got := resendable(x.e, x.m); got != x.want {
			t.Errorf("%s: %t, want %t", x.name, got, x.want)
		}
	}
}

// FuzzResendable: what an image holds makes nothing panic on its way to a socket.
func FuzzResendable(f *testing.F) {
	f.Add(uint32(unix.AF_INET), uint32(unix.SOCK_RAW), uint32(1), "10.0.0.7:0", "", []byte{0x45})
	f.Add(uint32(unix.AF_INET6), uint32(unix.SOCK_DGRAM), uint32(58), "[::1]:0", "::1", make([]byte, 8))
	f.Fuzz(func(t *testing.T, family, typ, protocol uint32, from, to string, data []byte) {
		e := &sk_inet.InetSkEntry{Family: &family, Type: &typ, Proto: &protocol}
		m := image.SockDatagram{From: from, To: to, Data: data}
		if family != unix.AF_INET && family != unix.AF_INET6 || !resendable(e, m) {
			return
		}
		if p, to := rawPacket(e, m); len(p) > 1<<16-1+ipv6Header || !to.IsLoopback() {
			t.Errorf("%d bytes to %s", len(p), to)
		}
	})
}
