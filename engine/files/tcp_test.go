package files

import (
	"bytes"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/sys"
)

func init() {
	scenes["tcp pairs"] = func(string) fds {
		l := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		must(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		must(unix.Listen(l, 5))
		out := fds{"listen": l}
		pair := func(name string) (c, s int) {
			c = must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
			must(unix.Connect(c, must1(unix.Getsockname(l))))
			s, _, _ = accept(l)
			out[name+" c"], out[name+" s"] = c, s
			return c, s
		}
		c, s := pair("both")
		must1(unix.Write(c, []byte("to the server")))
		must1(unix.Write(s, []byte("to the client")))
		c, _ = pair("half")
		must1(unix.Write(c, []byte("last words")))
		must(unix.Shutdown(c, unix.SHUT_WR))
		c, s = pair("deaf")
		must1(unix.Write(c, []byte("heard")))
		must(unix.Shutdown(s, unix.SHUT_RD))
		c, s = pair("full")
		b := bytes.Repeat([]byte("0123456789"), 1000)
		for {
			if _, err := unix.SendmsgN(c, b, nil, nil, unix.MSG_DONTWAIT); err != nil {
				break
			}
		}
		must(unix.Shutdown(c, unix.SHUT_WR))
		must1(unix.Write(s, []byte("against the stream")))
		return out
	}
}

// tcpSeen is what can be seen of one end.
type tcpSeen struct {
	names  [2]string
	state  uint8
	events int16
	queued int
	reuse  int
}

func seeTCP(t *testing.T, fd int) tcpSeen {
	t.Helper()
	s := tcpSeen{events: events(t, fd)}
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal(err)
	}
	if s.state = info.State; s.state == 4 {
		s.state = 5 // FIN_WAIT1 becomes FIN_WAIT2 by itself, when the end is acknowledged
	}
	if s.queued, err = unix.IoctlGetInt(fd, unix.TIOCINQ); err != nil {
		t.Fatal(err)
	}
	if s.reuse, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR); err != nil {
		t.Fatal(err)
	}
	for i, f := range []func(int) (unix.Sockaddr, error){unix.Getsockname, unix.Getpeername} {
		sa, err := f(fd)
		if err != nil {
			t.Fatal(err)
		}
		words, port, _, err := sockaddrWords(sa)
		if err != nil {
			t.Fatal(err)
		}
		s.names[i] = addrPort(words, port, "")
	}
	return s
}

func readAll(t *testing.T, fd int, n int) string {
	t.Helper()
	var out []byte
	for len(out) < n {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if k, err := unix.Poll(p, 5000); err != nil || k == 0 {
			t.Fatalf("%d bytes of %d came, then %d, %v", len(out), n, k, err)
		}
		b := make([]byte, 1<<20)
		k, err := unix.Read(fd, b)
		if err != nil || k == 0 {
			t.Fatalf("%d bytes of %d came, then %d, %v", len(out), n, k, err)
		}
		out = append(out, b[:k]...)
	}
	return string(out)
}

// Both ends of connections come back with what was under way. The dumped ones are
// left as they were, and end without taking their addresses with them.
func TestTCPConnections(t *testing.T) {
	c := start(t, "tcp pairs")
	before := map[string]tcpSeen{}
	pidfd, err := unix.PidfdOpen(c.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	see := func(name string) tcpSeen {
		fd, err := unix.PidfdGetfd(pidfd, c.fds[name], 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		if prog, err := sys.GetFilter(fd); len(prog) != 0 || err != nil {
			t.Errorf("%s: a filter of %d instructions, %v", name, len(prog), err)
		}
		if n, err := unix.GetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR); n != 0 || err != nil {
			t.Errorf("%s: repair mode %d, %v", name, n, err)
		}
		return seeTCP(t, fd)
	}
	for name := range c.fds {
		if name != "listen" {
			before[name] = see(name)
		}
	}
	out := &dumped{set: image.NewSet(), data: map[image.DataID][]byte{}}
	d := NewDumper(nil, Options{TCPEstablished: true}, func(e image.Entry) error {
		e.Msg, e.Extra = reencode(t, e.Msg), bytes.Clone(e.Extra)
		out.set.Add(e)
		return nil
	})
	defer func() { _ = d.Close() }()
	c.stop()
	if err := d.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	if err := d.Finish(); err != nil || len(d.Refusal()) > 0 {
		t.Fatal(err, d.Refusal())
	}
	for name, b := range before {
		if a := see(name); a != b {
			t.Errorf("%s was %+v and after the dump is %+v", name, b, a)
		}
	}
	conns := d.TakeConnections()
	if err := conns.Silence(); err != nil {
		t.Fatal(err)
	}
	c.kill()
	conns.Close()

	if _, err := NewRestorer(nil, out.set, RestoreOptions{}); err == nil || !strings.Contains(err.Error(), "restore with --tcp-established") {
		t.Errorf("without the option: %v", err)
	}
	r := restore(t, out, RestoreOptions{TCPEstablished: true})
	for name, b := range before {
		a := seeTCP(t, r.fd(c, name))
		// How much of a full stream is at which end is the kernel's.
		if strings.HasPrefix(name, "full") {
			a.state, a.events, a.queued, b.state, b.events, b.queued = 0, 0, 0, 0, 0, 0
		}
		if a != b {
			t.Errorf("%s was %+v and is %+v", name, b, a)
		}
	}
	for name, want := range map[string]string{"both s": "to the server", "both c": "to the client", "half s": "last words", "deaf s": "heard", "full c": "against the stream"} {
		if got := readAll(t, r.fd(c, name), len(want)); got != want {
			t.Errorf("%s reads %q, want %q", name, got, want)
		}
	}
	full := out.streamBytes(t, before["full s"].names) + out.streamOut(t, before["full c"].names)
	got := readAll(t, r.fd(c, "full s"), len(full))
	if got != full || !strings.HasPrefix(got, "01234567890") {
		t.Errorf("a full connection brings %d bytes, want %d", len(got), len(full))
	}
	for _, name := range []string{"half s", "full s"} {
		b := make([]byte, 1)
		if n, err := unix.Read(r.fd(c, name), b); n != 0 || err != nil {
			t.Errorf("%s reads %d bytes, %v, want end of file", name, n, err)
		}
	}
	for _, to := range [][2]string{{"both c", "both s"}, {"both s", "both c"}, {"half s", "half c"}, {"full s", "full c"}} {
		if _, err := unix.Write(r.fd(c, to[0]), []byte("more")); err != nil {
			t.Errorf("%s: %v", to[0], err)
		} else if got := readAll(t, r.fd(c, to[1]), 4); got != "more" {
			t.Errorf("%s reads %q", to[1], got)
		}
	}
}

func init() {
	scenes["tcp ended"] = func(string) fds {
		l := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		must(unix.Listen(l, 5))
		c := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.Connect(c, must1(unix.Getsockname(l))))
		s, _, _ := accept(l)
		must(unix.Close(s))
		must(unix.Shutdown(c, unix.SHUT_WR))
		// With bytes that the program has not received.
		u := must1(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
		must(unix.Connect(u, must1(unix.Getsockname(l))))
		s, _, _ = accept(l)
		must1(unix.Write(s, []byte("unread")))
		must(unix.Close(s))
		must(unix.Shutdown(u, unix.SHUT_WR))
		must(unix.Close(l))
		return fds{"ended": c, "unread": u}
	}
}

// A connection that is over needs no other end; without the option, too.
func TestTCPEnded(t *testing.T) {
	c := start(t, "tcp ended")
	d := dumpAll(t, Options{}, c)
	if len(d.problems) != 1 || d.problems[0].FD != c.fds["unread"] {
		t.Fatalf("refused: %v, want only fd %d", d.problems, c.fds["unread"])
	}
	_, _, ports, _ := d.d.Plan()
	if len(ports) != 0 {
		t.Errorf("the destination is asked for %v", ports)
	}
	c.kill()
	fd := restore(t, d, RestoreOptions{}).fd(c, "ended")
	if got, want := events(t, fd), int16(unix.POLLIN|unix.POLLOUT|unix.POLLHUP|unix.POLLRDHUP); got != want {
		t.Errorf("poll says %x, want %x", got, want)
	}
	if n, err := unix.Read(fd, make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("read gives %d, %v, want end of file", n, err)
	}
	if err := unix.Sendto(fd, []byte("x"), unix.MSG_NOSIGNAL, nil); err != unix.EPIPE {
		t.Errorf("send gives %v, want %v", err, unix.EPIPE)
	}
}

// streamOf gives the stream of the end whose addresses are names.
func (d *dumped) streamOf(t *testing.T, names [2]string) (*tcp_stream.TcpStreamEntry, []byte) {
	t.Helper()
	for _, e := range d.set.Entries(filesImage) {
		if s := e.Msg.(*fdinfo.FileEntry).GetIsk(); s != nil && addrPort(s.GetSrcAddr(), s.GetSrcPort(), "") == names[0] && addrPort(s.GetDstAddr(), s.GetDstPort(), "") == names[1] {
			x := d.set.Entries(streamImage(s.GetIno()))[0]
			return x.Msg.(*tcp_stream.TcpStreamEntry), x.Extra
		}
	}
	t.Fatalf("no socket %v", names)
	return nil, nil
}

func (d *dumped) streamBytes(t *testing.T, names [2]string) string {
	s, b := d.streamOf(t, names)
	return string(b[:s.GetInqLen()])
}

func (d *dumped) streamOut(t *testing.T, names [2]string) string {
	s, b := d.streamOf(t, names)
	return string(b[s.GetInqLen():])
}

// A connection that leads out of the tree is refused, whatever was asked for.
func TestTCPOutside(t *testing.T) {
	d := dumpAll(t, Options{TCPEstablished: true}, start(t, "tcp"))
	for _, s := range []string{"is not in the tree", "1 connections wait to be accepted", "has ended, but the program has not closed it"} {
		wantProblem(t, d.problems, s)
	}
}

// So is one that somebody outside has, too, who would lose it.
func TestTCPShared(t *testing.T) {
	c := start(t, "tcp pairs")
	pidfd, err := unix.PidfdOpen(c.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	fd, err := unix.PidfdGetfd(pidfd, c.fds["both c"], 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	d := dumpAll(t, Options{TCPEstablished: true}, c)
	if len(d.problems) != 1 {
		t.Errorf("refused: %v, want one", d.problems)
	}
	wantProblem(t, d.problems, "outside the tree")
	wantProblem(t, d.problems, "the TCP connection is also held by pid")
}

// tcpEnds are the entries of a connection, with the streams of its two ends.
func tcpEnds(state, inSeq, outSeq, peerIn, peerOut uint32, in, out []byte) *image.Set {
	set := image.NewSet()
	lo := wordsOf([]byte{127, 0, 0, 1})
	for i := range uint32(2) {
		id, port := i+1, 1000+i
		st, is, os, bin, bout := state, inSeq, outSeq, in, out
		if i == 1 {
			st, is, os, bin, bout = stateEstablished, peerIn, peerOut, nil, nil
		}
		set.Add(image.Entry{File: filesImage, Msg: &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: &id, Isk: &sk_inet.InetSkEntry{
			Id: &id, Ino: proto.Uint32(id + 160), Family: proto.Uint32(unix.AF_INET), Type: proto.Uint32(unix.SOCK_STREAM), Proto: proto.Uint32(unix.IPPROTO_TCP),
			State: &st, SrcPort: &port, DstPort: proto.Uint32(2001 - port), SrcAddr: lo, DstAddr: lo, Flags: proto.Uint32(0), Backlog: proto.Uint32(0),
			Fown: noOwner(), Opts: &sk_opts.SkOptsEntry{},
		}}})
		set.Add(image.Entry{File: streamImage(id + 160), Extra: append(bytes.Clone(bin), bout...), Msg: &tcp_stream.TcpStreamEntry{
			InqLen: proto.Uint32(uint32(len(bin))), InqSeq: &is, OutqLen: proto.Uint32(uint32(len(bout))), OutqSeq: &os,
			OptMask: proto.Uint32(0), SndWscale: proto.Uint32(0), MssClamp: proto.Uint32(1460),
		}})
	}
	return set
}

func TestTCPCorrupt(t *testing.T) {
	stream := func(s *image.Set) *tcp_stream.TcpStreamEntry {
		return s.Entries("tcp-stream-a1")[0].Msg.(*tcp_stream.TcpStreamEntry)
	}
	socket := func(s *image.Set) *sk_inet.InetSkEntry {
		return s.Entries(filesImage)[0].Msg.(*fdinfo.FileEntry).GetIsk()
	}
	for _, x := range []struct {
		name   string
		change func(*image.Set)
		want   string
	}{
		{"good", func(*image.Set) {}, ""},
		{"seqs wrap", func(s *image.Set) { *stream(s).OutqSeq = 2 }, "do not continue"},
		{"gap", func(s *image.Set) { *stream(s).OutqSeq = 30 }, "its 3 bytes to be sent do not continue what its other end, 127.0.0.1:1001, has received"},
		{"end of stream", func(s *image.Set) { *socket(s).State = stateFinWait1; *stream(s).OutqSeq = 24 }, ""},
		{"no stream", func(s *image.Set) { *socket(s).Ino = 9 }, "image tcp-stream-9: 0 entries, want 1"},
		{"length", func(s *image.Set) { *stream(s).InqLen = 7 }, "tells of 7 and 3 bytes, but there are 5"},
		{"scale", func(s *image.Set) { *stream(s).SndWscale = 15 }, "out of range"},
		{"other end", func(s *image.Set) { *socket(s).DstPort = 5 }, "the other end of the TCP connection, 127.0.0.1:5, is not in the images"},
		{"state", func(s *image.Set) { *socket(s).State = 3 }, "in state SYN_RECV are not carried"},
		{"asked for", func(s *image.Set) { *socket(s).State = 2 }, "is not in the images"},
		{"protocol", func(s *image.Set) { *socket(s).Proto = unix.IPPROTO_MPTCP }, "connections of protocol 262 are not carried"},
	} {
		t.Run(x.name, func(t *testing.T) {
			set := tcpEnds(stateEstablished, 10, 23, 20, 10, []byte("in"), []byte("out"))
			x.change(set)
			r, err := NewRestorer(nil, set, RestoreOptions{TCPEstablished: true})
			switch {
			case x.want == "" && err != nil:
				t.Error(err)
			case x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)):
				t.Errorf("error %v, want %q", err, x.want)
			}
			if r != nil {
				_ = r.Close()
			}
		})
	}
}

// FuzzTCPStreams feeds NewRestorer with connections: it returns, and what it
// takes has, at each end, no more to be sent than it had.
func FuzzTCPStreams(f *testing.F) {
	f.Add(uint32(1), uint32(10), uint32(23), uint32(20), uint32(10), []byte("in"), []byte("out"))
	f.Add(uint32(stateFinWait1), uint32(10), uint32(2), uint32(0xfffffffe), uint32(10), []byte{}, []byte("over"))
	f.Fuzz(func(t *testing.T, state, inSeq, outSeq, peerIn, peerOut uint32, in, out []byte) {
		r, err := NewRestorer(nil, tcpEnds(state, inSeq, outSeq, peerIn, peerOut, in, out), RestoreOptions{TCPEstablished: true})
		if err != nil {
			return
		}
		for _, c := range r.conns {
			if len(c.out) > len(out) || c.peer.inEnd()+uint32(len(c.out)) != c.outEnd() {
				t.Errorf("%d bytes of %d are sent from %d to %d", len(c.out), len(out), c.peer.inEnd(), c.outEnd())
			}
		}
		_ = r.Close()
	})
}
