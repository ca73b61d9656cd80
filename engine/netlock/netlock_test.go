package netlock

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// inNetns runs the test in a network namespace of its own, with loopback up.
func inNetns(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test sets up nftables and needs root")
		}
		t.Skip("this test sets up nftables and needs root")
	}
	runtime.LockOSThread() // it ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		t.Fatal(err)
	}
}

// pair connects two sockets over loopback.
func pair(t *testing.T, addr string) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

func connOf(c net.Conn) Conn {
	return Conn{Local: c.LocalAddr().(*net.TCPAddr).AddrPort(), Peer: c.RemoteAddr().(*net.TCPAddr).AddrPort()}
}

// passes says whether a byte gets from a to b within d.
func passes(t *testing.T, a, b net.Conn, d time.Duration) bool {
	t.Helper()
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := b.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	n, err := b.Read(make([]byte, 1))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n == 1
}

func TestLock(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(addr, func(t *testing.T) {
			inNetns(t)
			a, b := pair(t, addr)
			other, another := pair(t, addr)
			l, err := New("test", []Conn{connOf(a)})
			if err != nil {
				t.Fatal(err)
			}
			if ks, err := List(); err != nil || len(ks) != 0 {
				t.Errorf("a lock that is not kept is listed: %v, %v", ks, err)
			}
			for i, c := range [][2]net.Conn{{a, b}, {b, a}} {
				if passes(t, c[0], c[1], 100*time.Millisecond) {
					t.Errorf("direction %d passes", i)
				}
			}
			if !passes(t, other, another, time.Minute) || !passes(t, another, other, time.Minute) {
				t.Error("another connection does not pass")
			}
			if err := l.Keep(); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if passes(t, a, b, 100*time.Millisecond) {
				t.Error("the kept lock lets pass")
			}
			want := []Kept{{ID: "test", Conns: []Conn{connOf(a)}}}
			if ks, err := List(); err != nil || !cmp.Equal(want, ks, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })) {
				t.Errorf("kept locks: %v, %v, want %v", ks, err, want)
			}
			if found, err := Remove("test", nil); err != nil || !found {
				t.Errorf("remove: %v, %v", found, err)
			}
			if found, err := Remove("test", nil); err != nil || found {
				t.Errorf("remove again: %v, %v", found, err)
			}
			if !passes(t, a, b, time.Minute) {
				t.Error("it does not pass after the lock")
			}
		})
	}
}

// TestLockEndsWithMaker: what is not kept goes with its socket, as at the maker's end.
func TestLockEndsWithMaker(t *testing.T) {
	inNetns(t)
	a, b := pair(t, "127.0.0.1:0")
	l, err := New("test", []Conn{connOf(b)})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Keep(); err != nil {
		t.Fatal(err)
	}
	if err := l.Forsake(); err != nil {
		t.Fatal(err)
	}
	if passes(t, a, b, 100*time.Millisecond) {
		t.Error("it passes while it is locked")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if !passes(t, a, b, time.Minute) {
		t.Error("it does not pass after the lock")
	}
}

// TestManyConns needs several messages.
func TestManyConns(t *testing.T) {
	inNetns(t)
	var conns []Conn
	for i := range 3*chunk + 7 {
		conns = append(conns, Conn{Local: netip.MustParseAddrPort(fmt.Sprintf("10.0.0.1:%d", 1000+i)), Peer: netip.MustParseAddrPort("10.0.0.2:80")})
	}
	conns = append(conns, conns[0]) // said twice
	l, err := New("many", conns)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Keep(); err != nil {
		t.Fatal(err)
	}
	ks, err := List()
	if err != nil || len(ks) != 1 || len(ks[0].Conns) != len(conns)-1 {
		t.Errorf("listed: %v, %v", ks, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{"": false, "a b": false, "0b1-2_X": true, "a/b": false, "a\x00": false, string(make([]byte, 65)): false} {
		if ValidID(id) != want {
			t.Errorf("%q: %v", id, !want)
		}
	}
	if _, err := New("a b", nil); err == nil {
		t.Error("a lock could get a bad name")
	}
}

func TestProbe(t *testing.T) {
	inNetns(t)
	if err := Probe(); err != nil {
		t.Error(err)
	}
}
