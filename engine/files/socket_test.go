package files

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

func usock(typ int) int { return must1(unix.Socket(unix.AF_UNIX, typ, 0)) }

func upair(typ int) (a, b int) {
	p := must1(unix.Socketpair(unix.AF_UNIX, typ, 0))
	return p[0], p[1]
}

func send(fd int, s string) { must(unix.Sendto(fd, []byte(s), 0, nil)) }

func abstract(dir, name string) *unix.SockaddrUnix {
	return &unix.SockaddrUnix{Name: "@" + strings.ReplaceAll(dir, "/", "-") + name}
}

func init() {
	scenes["unix"] = func(dir string) fds {
		out := fds{}
		out["sa"], out["sb"] = upair(unix.SOCK_STREAM | unix.SOCK_NONBLOCK)
		send(out["sa"], "stream ")
		send(out["sa"], "data")
		send(out["sb"], strings.Repeat("x", 100000))
		must(unix.SetsockoptInt(out["sb"], unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
		out["da"], out["db"] = upair(unix.SOCK_DGRAM)
		for _, s := range []string{"one", "two", "three"} {
			send(out["da"], s)
		}
		out["qa"], out["qb"] = upair(unix.SOCK_SEQPACKET | unix.SOCK_NONBLOCK)
		send(out["qb"], "packet")
		send(out["qb"], "next")
		// The far end is closed, with data before.
		a, b := upair(unix.SOCK_STREAM)
		send(b, "goodbye")
		must(unix.Close(b))
		out["half"] = a
		// Shut down one way.
		out["wa"], out["wb"] = upair(unix.SOCK_STREAM)
		send(out["wa"], "done")
		must(unix.Shutdown(out["wa"], unix.SHUT_WR))
		// Listeners, and a connection made through one.
		path := filepath.Join(dir, "sock")
		l := usock(unix.SOCK_STREAM)
		must(unix.Bind(l, &unix.SockaddrUnix{Name: path}))
		must(unix.Chmod(path, 0o640))
		must(unix.Listen(l, 7))
		out["listen"] = l
		out["client"] = usock(unix.SOCK_STREAM)
		must(unix.Connect(out["client"], &unix.SockaddrUnix{Name: path}))
		out["server"], _, _ = accept(l)
		send(out["client"], "request")
		al := usock(unix.SOCK_SEQPACKET)
		must(unix.Bind(al, abstract(dir, "listen")))
		must(unix.Listen(al, 3))
		out["alisten"] = al
		// A server socket whose listener is gone.
		gl := usock(unix.SOCK_STREAM)
		must(unix.Bind(gl, abstract(dir, "gone")))
		must(unix.Listen(gl, 3))
		for _, n := range []string{"1", "2"} {
			out["gc"+n] = usock(unix.SOCK_STREAM)
			must(unix.Connect(out["gc"+n], abstract(dir, "gone")))
			out["gs"+n], _, _ = accept(gl)
		}
		must(unix.Close(gl))
		// A datagram server, and a client that sends to it.
		dpath := filepath.Join(dir, "dgram")
		out["dserver"] = usock(unix.SOCK_DGRAM)
		must(unix.Bind(out["dserver"], &unix.SockaddrUnix{Name: dpath}))
		tmp := usock(unix.SOCK_DGRAM)
		must(unix.Sendto(tmp, []byte("anon"), 0, &unix.SockaddrUnix{Name: dpath}))
		must(unix.Close(tmp))
		out["dclient"] = usock(unix.SOCK_DGRAM)
		must(unix.Connect(out["dclient"], &unix.SockaddrUnix{Name: dpath}))
		// A relative name, an unlinked one, none at all.
		must(os.Chdir(dir))
		out["relative"] = usock(unix.SOCK_STREAM)
		must(unix.Bind(out["relative"], &unix.SockaddrUnix{Name: "rel.sock"}))
		must(unix.Listen(out["relative"], 1))
		must(os.Chdir("/"))
		out["unlinked"] = usock(unix.SOCK_STREAM)
		must(unix.Bind(out["unlinked"], &unix.SockaddrUnix{Name: filepath.Join(dir, "unlinked")}))
		must(os.Remove(filepath.Join(dir, "unlinked")))
		out["fresh"] = usock(unix.SOCK_STREAM | unix.SOCK_NONBLOCK)
		must(unix.SetsockoptInt(out["fresh"], unix.SOL_SOCKET, unix.SO_SNDBUF, 20000))
		return out
	}
}

func accept(l int) (int, unix.Sockaddr, error) {
	fd, sa, err := unix.Accept(l)
	must(err)
	return fd, sa, err
}

// names gives the two addresses of a socket.
func names(t *testing.T, fd int) [2]string {
	t.Helper()
	var out [2]string
	for i, get := range []func(int) (unix.Sockaddr, error){unix.Getsockname, unix.Getpeername} {
		sa, err := get(fd)
		switch {
		case errors.Is(err, unix.ENOTCONN):
			out[i] = "not connected"
		case err != nil:
			t.Fatal(err)
		default:
			switch a := sa.(type) {
			case *unix.SockaddrUnix:
				out[i] = a.Name
			case *unix.SockaddrInet4:
				out[i] = fmt.Sprintf("%v:%d", net.IP(a.Addr[:]), a.Port)
			case *unix.SockaddrInet6:
				out[i] = fmt.Sprintf("%v:%d", net.IP(a.Addr[:]), a.Port)
			}
		}
	}
	return out
}

// sockLook is what options and poll tell of a socket.
type sockLook struct {
	Names  [2]string
	Opts   map[int]int
	Events int16
	Flags  int
}

func sockAt(t *testing.T, fd int, opts map[int][]int) sockLook {
	t.Helper()
	out := sockLook{Names: names(t, fd), Opts: map[int]int{}, Events: events(t, fd)}
	for level, os := range opts {
		for _, o := range os {
			if n, err := unix.GetsockoptInt(fd, level, o); err == nil {
				out.Opts[level*1000+o] = n
			}
		}
	}
	var err error
	if out.Flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil {
		t.Fatal(err)
	}
	return out
}

var someOpts = map[int][]int{
	unix.SOL_SOCKET: {unix.SO_TYPE, unix.SO_PROTOCOL, unix.SO_SNDBUF, unix.SO_RCVBUF, unix.SO_REUSEADDR, unix.SO_REUSEPORT, unix.SO_KEEPALIVE, unix.SO_PASSCRED,
		unix.SO_BROADCAST, unix.SO_ACCEPTCONN, unix.SO_RCVLOWAT, unix.SO_PRIORITY, soBufLock},
	unix.IPPROTO_TCP:  {unix.TCP_NODELAY, unix.TCP_KEEPCNT, unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL},
	unix.IPPROTO_IPV6: {unix.IPV6_V6ONLY},
}

// before looks at all sockets of a child through duplicates.
func socksBefore(t *testing.T, c *child) map[string]sockLook {
	t.Helper()
	pidfd, err := unix.PidfdOpen(c.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	out := map[string]sockLook{}
	for name, fd := range c.fds {
		n, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = sockAt(t, n, someOpts)
		_ = unix.Close(n)
	}
	return out
}

func socksAfter(t *testing.T, c *child, r *restored) map[string]sockLook {
	t.Helper()
	out := map[string]sockLook{}
	for name := range c.fds {
		out[name] = sockAt(t, r.fd(c, name), someOpts)
	}
	return out
}

func TestUnixSockets(t *testing.T) {
	c := start(t, "unix")
	before := socksBefore(t, c)
	// Peeking leaves everything as it was: twice the same.
	first := dumpOK(t, Options{}, c)
	d := dumpOK(t, Options{}, c)
	if diff := cmp.Diff(extras(first, skQueuesImage), extras(d, skQueuesImage)); diff != "" {
		t.Errorf("the second dump differs:\n%s", diff)
	}
	files, _, _, _ := d.d.Plan()
	if ps := CheckDestination(files, nil, nil, nil); len(ps) != 3 { // the child still has them
		t.Errorf("%d paths are taken, want 3: %v", len(ps), ps)
	}
	c.kill()
	r := restore(t, d, RestoreOptions{})
	if diff := cmp.Diff(before, socksAfter(t, c, r)); diff != "" {
		t.Errorf("sockets differ (-before +after):\n%s", diff)
	}
	for name, want := range map[string][]string{
		"sb": {"stream data"}, "sa": {strings.Repeat("x", 100000)}, "db": {"one", "two", "three"}, "qa": {"packet", "next"},
		"half": {"goodbye", ""}, "wb": {"done", ""}, "server": {"request"}, "dserver": {"anon"},
	} {
		for _, w := range want {
			if s, err := readFD(t, r.fd(c, name)); err != nil || s != w {
				t.Errorf("%s reads %.20q, %v, want %.20q", name, s, err, w)
			}
		}
	}
	// Connections and listeners work.
	if _, err := unix.Write(r.fd(c, "server"), []byte("reply")); err != nil {
		t.Error(err)
	}
	if s, err := readFD(t, r.fd(c, "client")); err != nil || s != "reply" {
		t.Errorf("the client reads %q, %v", s, err)
	}
	if _, err := unix.Write(r.fd(c, "dclient"), []byte("ping")); err != nil {
		t.Error(err)
	}
	if s, err := readFD(t, r.fd(c, "dserver")); err != nil || s != "ping" {
		t.Errorf("the datagram server reads %q, %v", s, err)
	}
	conn, err := net.Dial("unix", filepath.Join(c.dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	n, _, err := unix.Accept(r.fd(c, "listen"))
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(n)
	if st, err := os.Stat(filepath.Join(c.dir, "sock")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode of the socket file: %v, %v", st.Mode(), err)
	}
	if _, err := os.Lstat(filepath.Join(c.dir, "unlinked")); err == nil {
		t.Error("the unlinked socket has its file again")
	}
	if conn, err := net.Dial("unix", filepath.Join(c.dir, "rel.sock")); err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}
}

func TestUnixPathTaken(t *testing.T) {
	c := start(t, "unix")
	d := dumpOK(t, Options{}, c)
	// The child lives: its listeners answer, so their paths are not ours.
	r, err := NewRestorer(nil, d.set, RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if err := r.OpenUnix(); err == nil || !strings.Contains(err.Error(), "its path is taken by another socket") {
		t.Errorf("OpenUnix says %v", err)
	}
	if _, err := os.Lstat(filepath.Join(c.dir, "sock")); err != nil {
		t.Errorf("the live socket's file: %v", err)
	}
}

func init() {
	scenes["unix-refused"] = func(dir string) fds {
		out := fds{}
		l := usock(unix.SOCK_STREAM)
		must(unix.Bind(l, abstract(dir, "p")))
		must(unix.Listen(l, 5))
		out["listen"], out["client"] = l, usock(unix.SOCK_STREAM)
		must(unix.Connect(out["client"], abstract(dir, "p")))
		send(out["client"], "request")
		out["da"], out["db"] = upair(unix.SOCK_DGRAM)
		send(out["db"], "lost")
		other := usock(unix.SOCK_DGRAM)
		must(unix.Bind(other, abstract(dir, "other")))
		must(unix.Connect(out["da"], abstract(dir, "other"))) // an error waits at db
		return out
	}
}

// peekParts is what a peeker makes of a stream.
func TestPeekParts(t *testing.T) {
	a, b := upair(unix.SOCK_STREAM)
	defer closeAll([]int{a, b})
	send(a, "one")
	must(unix.Sendmsg(a, []byte("two"), unix.UnixRights(0), nil, 0))
	must(unix.Sendmsg(a, []byte("x"), unix.UnixRights(0, 1), nil, 0))
	send(a, "three")
	for range 2 {
		p := &peeker{fd: b, stream: true, buf: make([]byte, 1000), oobAt: -1}
		ms, err := p.all()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range ms {
			got = append(got, fmt.Sprintf("%s %d", m.data, len(m.fds)))
			closeAll(m.fds)
		}
		if diff := cmp.Diff([]string{"one 0", "two 1", "x 2", "three 0"}, got); diff != "" {
			t.Errorf("parts differ (-want +got):\n%s", diff)
		}
	}
}

func TestUnixRefused(t *testing.T) {
	c := start(t, "unix-refused")
	d := dumpAll(t, Options{}, c)
	for _, s := range []string{"a connection that has brought data already waits", "an error of the connection"} {
		wantProblem(t, d.problems, s)
	}
	// A pair of which this process has an end.
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, mine := os.NewFile(uintptr(p[0]), "a"), os.NewFile(uintptr(p[1]), "b")
	defer func() { _ = mine.Close() }()
	c = start(t, "idle", f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	d = dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "is outside the tree")
	wantProblem(t, d.problems, fmt.Sprintf("the other end belongs to pid %d", os.Getpid()))
}

func init() {
	scenes["inet"] = func(string) fds {
		out := fds{}
		sock := func(name string, fam, typ, proto int) int {
			out[name] = must1(unix.Socket(fam, typ, proto))
			return out[name]
		}
		lo4, lo6 := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
		fd := sock("listen4", unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		for opt, n := range map[int]int{unix.SO_REUSEADDR: 1, unix.SO_REUSEPORT: 1, unix.SO_KEEPALIVE: 1, unix.SO_SNDBUF: 30000, unix.SO_PRIORITY: 3} {
			must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, n))
		}
		for opt, n := range map[int]int{unix.TCP_NODELAY: 1, unix.TCP_KEEPIDLE: 77, unix.TCP_KEEPINTVL: 11, unix.TCP_KEEPCNT: 5} {
			must(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, opt, n))
		}
		must(unix.Bind(fd, lo4))
		must(unix.Listen(fd, 17))
		fd = sock("listen6", unix.AF_INET6, unix.SOCK_STREAM, 0)
		must(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
		must(unix.Bind(fd, lo6))
		must(unix.Listen(fd, 5))
		fd = sock("any6", unix.AF_INET6, unix.SOCK_STREAM, 0)
		must(unix.Bind(fd, &unix.SockaddrInet6{}))
		must(unix.Listen(fd, 5))
		must(unix.Bind(sock("bound", unix.AF_INET, unix.SOCK_STREAM, 0), lo4))
		sock("fresh", unix.AF_INET, unix.SOCK_STREAM, 0)
		fd = sock("udp", unix.AF_INET, unix.SOCK_DGRAM, 0)
		must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
		must(unix.Bind(fd, lo4))
		to := must1(unix.Getsockname(fd))
		must(unix.Connect(sock("udpc", unix.AF_INET, unix.SOCK_DGRAM, 0), to))
		must(unix.Bind(sock("udp6", unix.AF_INET6, unix.SOCK_DGRAM, 0), lo6))
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err == nil {
			out["mptcp"] = fd
			must(unix.Bind(fd, lo4))
			must(unix.Listen(fd, 4))
		}
		return out
	}
}

func TestInetSockets(t *testing.T) {
	c := start(t, "inet")
	before := socksBefore(t, c)
	d := dumpOK(t, Options{}, c)
	_, _, ports, _ := d.d.Plan()
	if ps := CheckDestination(nil, nil, ports, nil); len(ps) == 0 || !strings.Contains(ps[0].String(), "another socket of this host has it") {
		t.Errorf("ports are taken, but: %v", ps)
	}
	c.kill()
	if ps := CheckDestination(nil, nil, ports, nil); len(ps) != 0 {
		t.Errorf("ports are free, but: %v", ps)
	}
	r := restore(t, d, RestoreOptions{})
	if diff := cmp.Diff(before, socksAfter(t, c, r)); diff != "" {
		t.Errorf("sockets differ (-before +after):\n%s", diff)
	}
	for _, name := range []string{"listen4", "listen6", "any6"} {
		addr := before[name].Names[0]
		host, port, _ := strings.Cut(addr, ":")
		if i := strings.LastIndex(addr, ":"); i > 0 {
			host, port = addr[:i], addr[i+1:]
		}
		conn, err := net.Dial("tcp", net.JoinHostPort(host, port))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		n, _, err := unix.Accept(r.fd(c, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else {
			_ = unix.Close(n)
		}
		_ = conn.Close()
	}
	if _, err := unix.Write(r.fd(c, "udpc"), []byte("datagram")); err != nil {
		t.Error(err)
	}
	if s, err := readFD(t, r.fd(c, "udp")); err != nil || s != "datagram" {
		t.Errorf("udp reads %q, %v", s, err)
	}
}

func init() {
	scenes["tcp"] = func(string) fds {
		l := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		must(unix.Listen(l, 5))
		out := fds{"listen": l, "c": must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)), "d": must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))}
		must(unix.Connect(out["c"], must1(unix.Getsockname(l))))
		out["s"], _, _ = accept(l)
		must(unix.Connect(out["d"], must1(unix.Getsockname(l)))) // not accepted
		// A connection that is over, reset by its peer.
		x := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		l2 := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.Bind(l2, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		must(unix.Listen(l2, 5))
		must(unix.Connect(x, must1(unix.Getsockname(l2))))
		y, _, _ := accept(l2)
		must(unix.SetsockoptLinger(y, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		must(unix.Close(y))
		out["over"] = x
		return out
	}
}

func TestTCPRefused(t *testing.T) {
	c := start(t, "tcp")
	d := dumpAll(t, Options{}, c)
	for _, s := range []string{"in state ESTABLISHED", "1 connections wait to be accepted", "has ended, but the program has not closed it"} {
		wantProblem(t, d.problems, s)
	}
}

func init() {
	scenes["unix-pending"] = func(dir string) fds {
		l := usock(unix.SOCK_STREAM)
		must(unix.Bind(l, abstract(dir, "p")))
		must(unix.Listen(l, 5))
		out := fds{"listen": l, "client": usock(unix.SOCK_STREAM)}
		must(unix.Connect(out["client"], abstract(dir, "p")))
		send(out["client"], "request")
		return out
	}
}

// A connection that waits is accepted for its data only if nothing else keeps
// the tree from being dumped.
func TestUnixPendingKept(t *testing.T) {
	for _, bad := range []bool{true, false} {
		var files []*os.File
		if bad { // the child has one end of a pair
			p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			mine := os.NewFile(uintptr(p[1]), "mine")
			defer func() { _ = mine.Close() }()
			files = append(files, os.NewFile(uintptr(p[0]), "theirs"))
		}
		c := start(t, "unix-pending", files...)
		for _, f := range files {
			_ = f.Close()
		}
		d := dumpAll(t, Options{Ends: true}, c)
		if bad != (len(d.problems) > 0) {
			t.Errorf("refused: %v, want %v: %v", len(d.problems) > 0, bad, d.problems)
		}
		u, err := readUnixDiag(inodeOf(t, c, "listen"))
		if err != nil {
			t.Fatal(err)
		}
		if waits := len(u.pending) > 0; waits != bad {
			t.Errorf("with another problem %v: the connection still waits: %v", bad, waits)
		}
	}
}

// A dump that fails after it has accepted what waited says what is lost by that.
func TestUnixPendingLost(t *testing.T) {
	c := start(t, "unix-pending")
	full := errors.New("the disk is full")
	d := NewDumper(nil, Options{Ends: true}, func(image.Entry) error { return full })
	c.stop()
	if err := d.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	if err := d.Finish(); !errors.Is(err, full) {
		t.Errorf("the dump ended with %v, want %v", err, full)
	}
	if n, ok := errors.AsType[LostConnections](d.Close()); !ok || n != 1 {
		t.Errorf("%d connections are told to be lost, want 1", n)
	}
}

// inodeOf is the inode of a child's socket.
func inodeOf(t *testing.T, c *child, name string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", c.pid(), c.fds[name]), &st); err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}
