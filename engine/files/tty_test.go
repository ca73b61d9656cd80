package files

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/sys"
)

// testPair makes a pair with a blocking master, and settings changed by f.
func testPair(t *testing.T, f func(*unix.Termios)) *ptyPair {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(m.Fd()) // makes it blocking
	t.Cleanup(func() { _ = m.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	s, err := sys.OpenPTYPeer(fd, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s) })
	p, err := newPair(fd, s)
	if err != nil {
		t.Fatal(err)
	}
	f(&p.termios)
	if err := setTermios(s, &p.termios); err != nil {
		t.Fatal(err)
	}
	return p
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		if b[i] = byte(r.IntN(256)); r.IntN(3) == 0 {
			b[i] = byte(r.IntN(32)) // many control characters
		}
	}
	return b
}

// What is put into a pair is what is read from it, and is still there afterwards.
func TestPairQueues(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		canonical := seed%3 != 0
		eol, eol2 := byte(r.IntN(200)), byte(r.IntN(200))
		p := testPair(t, func(tt *unix.Termios) {
			tt.Cc[unix.VEOL], tt.Cc[unix.VEOL2] = eol, eol2
			if !canonical {
				tt.Lflag &^= unix.ICANON
				tt.Cc[unix.VMIN] = byte(r.IntN(200))
			}
		})
		want := &ttyQueues{out: randomBytes(r, r.IntN(6000))}
		if canonical {
			for range r.IntN(8) {
				x := piece{data: randomBytes(r, r.IntN(200)), end: endEOF}
				if r.IntN(3) > 0 {
					x = piece{data: append(x.data, '\n'), end: endLine}
				} else if n := len(x.data); n > 0 && p.ends(x.data[n-1]) {
					x.end = endLine // of which it could not be told apart
				}
				want.in = append(want.in, x)
			}
			if r.IntN(2) == 0 {
				want.in = append(want.in, piece{data: randomBytes(r, 1+r.IntN(100)), end: endOpen})
			}
		} else if n := r.IntN(4095); n > 0 {
			want.in = append(want.in, piece{data: randomBytes(r, n), end: endRaw})
		}
		want.stopped = []string{"", stoppedByChar, stoppedByCall}[r.IntN(3)]
		if err := p.put(want); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for round := range 3 {
			got, err := p.read()
			if err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
			same := bytes.Equal(got.out, want.out) && got.stopped == want.stopped && slices.EqualFunc(got.in, want.in, func(a, b piece) bool {
				return bytes.Equal(a.data, b.data) && a.end == b.end
			})
			if !same {
				t.Fatalf("seed %d, round %d (EOL %x, EOL2 %x): got %q, want %q", seed, round, eol, eol2, got, want)
			}
			now, err := unix.IoctlGetTermios(p.s, unix.TCGETS2)
			if err != nil || *now != p.termios {
				t.Fatalf("seed %d, round %d: the settings are %+v (%v), want %+v", seed, round, now, err, p.termios)
			}
		}
	}
}

// More typed lines than can be carried exactly are left alone.
func TestPairTooMuch(t *testing.T) {
	p := testPair(t, func(*unix.Termios) {})
	line := append(bytes.Repeat([]byte("x"), 99), '\n')
	for range 30 {
		if err := feed(p.m, line, p.s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pollNow(p.s, unix.POLLIN); err != nil {
		t.Fatal(err)
	}
	_, err := p.read()
	if err == nil || !strings.Contains(err.Error(), "of typed lines wait to be read") {
		t.Fatalf("error %v", err)
	}
	b := make([]byte, 8192)
	if n, err := readTTY(p.s, b); err != nil || !bytes.Equal(b[:n], line) {
		t.Fatalf("read %q (%v)", b[:n], err)
	}
}

func ttyInfo(id, rdev uint32, change func(*tty.TtyInfoEntry)) *tty.TtyInfoEntry {
	cc := make([]uint32, 19)
	e := &tty.TtyInfoEntry{
		Id: proto.Uint32(id), Type: tty.TtyType_PTY.Enum(), Rdev: proto.Uint32(rdev), Locked: proto.Bool(false), Exclusive: proto.Bool(false),
		PacketMode: proto.Bool(false), Sid: proto.Uint32(0), Pgrp: proto.Uint32(0), Pty: &tty.TtyPtyEntry{Index: proto.Uint32(77)},
		Termios: &tty.TermiosEntry{CIflag: proto.Uint32(0), COflag: proto.Uint32(0), CCflag: proto.Uint32(0xbf), CLflag: proto.Uint32(unix.ICANON),
			CLine: proto.Uint32(0), CIspeed: proto.Uint32(38400), COspeed: proto.Uint32(38400), CCc: cc},
	}
	if change != nil {
		change(e)
	}
	return e
}

func ttyFile(id, info, flags uint32) *fdinfo.FileEntry {
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum(), Id: proto.Uint32(id), Tty: &tty.TtyFileEntry{
		Id: proto.Uint32(id), TtyInfoId: proto.Uint32(info), Flags: proto.Uint32(flags), Fown: noOwner()}}
}

// Images of terminals that make no sense are told apart before anything is made.
func TestTerminalImages(t *testing.T) {
	master, slave := uint32(devMaster), uint32(unix.Mkdev(136, 77))
	both := func(change func(*tty.TtyInfoEntry)) []proto.Message {
		return []proto.Message{ttyInfo(1, slave, change), ttyInfo(2, master, nil), ttyFile(10, 2, unix.O_RDWR), ttyFile(11, 1, unix.O_RDWR)}
	}
	for _, x := range []struct {
		name string
		ms   []proto.Message
		tty  *image.TTYFacts
		want string
	}{
		{name: "no information", ms: []proto.Message{ttyFile(10, 1, 0)}, want: "has no terminal 1"},
		{name: "twice", ms: append(both(nil), ttyInfo(1, slave, nil)), want: "terminal 1 is there twice"},
		{name: "two of one number", ms: append(both(nil), ttyInfo(3, slave, nil)), want: "has terminal 77 twice"},
		{name: "two masters", ms: append(both(nil), ttyFile(12, 2, unix.O_RDWR)), want: "two masters"},
		{name: "read-only master", ms: []proto.Message{ttyInfo(2, master, nil), ttyFile(10, 2, unix.O_RDONLY)}, want: "not open for reading and writing"},
		{name: "number", ms: both(func(e *tty.TtyInfoEntry) { e.Pty.Index = proto.Uint32(1 << 30) }), want: "number is missing or out of range"},
		{name: "line discipline", ms: both(func(e *tty.TtyInfoEntry) { e.Termios.CLine = proto.Uint32(3) }), want: "line discipline 3"},
		{name: "characters", ms: both(func(e *tty.TtyInfoEntry) { e.Termios.CCc = make([]uint32, 1000) }), want: "1000 control characters"},
		{name: "character", ms: both(func(e *tty.TtyInfoEntry) { e.Termios.CCc[3] = 256 }), want: "out of range"},
		{name: "size", ms: both(func(e *tty.TtyInfoEntry) {
			e.Winsize = &tty.WinsizeEntry{WsRow: proto.Uint32(1 << 16), WsCol: proto.Uint32(1), WsXpixel: proto.Uint32(0), WsYpixel: proto.Uint32(0)}
		}), want: "size is out of range"},
		{name: "access mode", ms: append(both(nil), ttyFile(12, 1, unix.O_ACCMODE)), want: "access mode"},
		{name: "type", ms: both(func(e *tty.TtyInfoEntry) { e.Type = tty.TtyType_UNKNOWN.Enum() }), want: "type UNKNOWN"},
		{name: "external", ms: both(func(e *tty.TtyInfoEntry) { e.Type, e.Dev = tty.TtyType_EXT_TTY.Enum(), proto.Uint32(0x1b) }), want: "external terminal tty[884d:1b] was not handed in"},
		{name: "lent", ms: []proto.Message{ttyInfo(1, slave, nil), ttyFile(11, 1, unix.O_RDWR)}, want: "restore with --shell-job"},
		{name: "data of nothing", ms: append(both(nil), &tty.TtyDataEntry{TtyId: proto.Uint32(9), Data: []byte("x")}), want: "there is no terminal 9"},
		{name: "much data", ms: append(both(nil), &tty.TtyDataEntry{TtyId: proto.Uint32(1), Data: make([]byte, maxQueue+1)}), want: "bytes wait in terminal 1"},
		{name: "short input", ms: both(nil), tty: &image.TTYFacts{ID: 1, Input: []image.TTYPiece{{Len: 5, End: endLine}}}, want: "has 5 bytes, of 0"},
		{name: "long input", ms: append(both(nil), &tty.TtyDataEntry{TtyId: proto.Uint32(1), Data: []byte("xy")}),
			tty: &image.TTYFacts{ID: 1, Input: []image.TTYPiece{{Len: 1, End: endLine}}}, want: "1 bytes of its input belong to no piece"},
		{name: "negative input", ms: both(nil), tty: &image.TTYFacts{ID: 1, Input: []image.TTYPiece{{Len: -1, End: endLine}}}, want: "has -1 bytes"},
		{name: "end", ms: both(nil), tty: &image.TTYFacts{ID: 1, Input: []image.TTYPiece{{End: "x"}}}, want: `ends in "x"`},
		{name: "stop", ms: both(nil), tty: &image.TTYFacts{ID: 1, Stopped: "x"}, want: `stopped by "x"`},
	} {
		t.Run(x.name, func(t *testing.T) {
			set := image.NewSet()
			for _, m := range x.ms {
				set.Add(image.Entry{File: imageOf(t, m), Msg: m})
			}
			if x.tty != nil {
				set.Facts = &image.Facts{TTYs: []image.TTYFacts{*x.tty}}
			}
			_, err := NewRestorer(nil, set, RestoreOptions{})
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Fatalf("error %v, want %q", err, x.want)
			}
		})
	}
}

func imageOf(t *testing.T, m proto.Message) string {
	t.Helper()
	switch m.(type) {
	case *tty.TtyInfoEntry:
		return image.TtyInfoFile
	case *tty.TtyDataEntry:
		return image.TtyDataFile
	case *fdinfo.FileEntry:
		return image.FilesFile
	}
	t.Fatalf("a %T belongs to no image", m)
	return ""
}

// FuzzTTYPieces checks that pieces that pass the checks are the data, whole and in order.
func FuzzTTYPieces(f *testing.F) {
	f.Add([]byte("a\nb"), []byte{2, 0, 1, 2}, true)
	f.Add([]byte("a\nb"), []byte{}, true)
	f.Add([]byte("abc"), []byte{1, 3, 2, 4}, false)
	f.Fuzz(func(t *testing.T, data, cuts []byte, canonical bool) {
		s := &ttySide{data: data, facts: &image.TTYFacts{}}
		ends := []string{endLine, endEOF, endOpen, endRaw, endNew, ""}
		for i := 0; i+1 < len(cuts); i += 2 {
			s.facts.Input = append(s.facts.Input, image.TTYPiece{Len: int(int8(cuts[i])), End: ends[int(cuts[i+1])%len(ends)]})
		}
		if checkTTYFacts(s.facts, s) != nil {
			return
		}
		var all []byte
		for _, x := range s.pieces(canonical) {
			all = append(all, x.data...)
		}
		if !bytes.Equal(all, data) {
			t.Fatalf("pieces %v give %q of %q", s.facts.Input, all, data)
		}
	})
}

func FuzzParseTTYKey(f *testing.F) {
	f.Add("tty[8803:1b]")
	f.Add("tty[0x8803:0X1B]")
	f.Add("tty[:]")
	f.Fuzz(func(t *testing.T, s string) {
		key, ok, err := parseTTYKey(s)
		if !ok || err != nil {
			return
		}
		var rdev, dev uint64
		if n, err := fmt.Sscanf(key, "tty[%x:%x]", &rdev, &dev); n != 2 || err != nil {
			t.Fatalf("%q gives %q", s, key)
		}
		if again, ok, err := parseTTYKey(key); !ok || err != nil || again != key {
			t.Fatalf("%q gives %q, and that %q (%v)", s, key, again, err)
		}
	})
}

// An event of packet mode that waits to be read would be lost: the pair is left alone.
func TestPairPacketEvent(t *testing.T) {
	p := testPair(t, func(*unix.Termios) {})
	if err := unix.IoctlSetPointerInt(p.m, unix.TIOCPKT, 1); err != nil {
		t.Fatal(err)
	}
	p.packet = true
	if q, err := p.read(); err != nil || len(q.in)+len(q.out) > 0 {
		t.Fatalf("an empty pair gives %v (%v)", q, err)
	}
	if n, err := unix.IoctlGetInt(p.m, unix.TIOCGPKT); err != nil || n != 1 {
		t.Fatalf("packet mode is %d (%v)", n, err)
	}
	if err := unix.IoctlSetInt(p.s, unix.TCFLSH, unix.TCOFLUSH); err != nil {
		t.Fatal(err)
	}
	if _, err := p.read(); err == nil || !strings.Contains(err.Error(), "packet mode has not been read") {
		t.Fatalf("error %v", err)
	}
	b := make([]byte, 8)
	if n, err := readTTY(p.m, b); err != nil || n != 1 || b[0] != unix.TIOCPKT_FLUSHWRITE {
		t.Fatalf("the event is %x (%v)", b[:n], err)
	}
}
