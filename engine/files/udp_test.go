package files

import (
	"testing"

	"golang.org/x/sys/unix"
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
		return out
	}
}

// What a corked socket holds back stands in the way of a dump; datagrams that
// wait do not, or no busy server could ever be moved.
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
