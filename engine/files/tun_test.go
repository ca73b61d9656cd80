package files

import (
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tun"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

func TestTunHostile(t *testing.T) {
	for _, x := range []struct {
		want  string
		spoil func(*fdinfo.FileEntry, *image.TunFacts)
	}{
		{"node is missing", func(e *fdinfo.FileEntry, _ *image.TunFacts) { e.Reg = nil }},
		{"no character device", func(e *fdinfo.FileEntry, _ *image.TunFacts) { e.Reg.Mode = proto.Uint32(unix.S_IFREG) }},
		{"no name of a network", func(e *fdinfo.FileEntry, _ *image.TunFacts) { e.Tunf.Netdev = proto.String("") }},
		{"no name of a network", func(e *fdinfo.FileEntry, _ *image.TunFacts) { e.Tunf.Netdev = proto.String("tun%d") }},
		{"no name of a network", func(e *fdinfo.FileEntry, _ *image.TunFacts) {
			e.Tunf.Netdev = proto.String("a-name-of-16-byt")
		}},
		{"neither TUN nor TAP", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Flags = unix.IFF_TUN | unix.IFF_TAP }},
		{"header of -1", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.VnetHdrSize = -1 }},
		{"2000 addresses", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Link.Addresses = make([]image.LinkAddress, 2000) }},
		{"9000 routes", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Link.Routes = make([]image.LinkRoute, 9000) }},
		{"is no address", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Link.Addresses = []image.LinkAddress{{}} }},
		{"is no address", func(_ *fdinfo.FileEntry, f *image.TunFacts) {
			f.Link.Addresses = []image.LinkAddress{{Local: "10.0.0.1", Peer: "x"}}
		}},
		{"is no address of a route", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Link.Routes = []image.LinkRoute{{Gateway: "x"}} }},
		{"metrics", func(_ *fdinfo.FileEntry, f *image.TunFacts) {
			f.Link.Routes = []image.LinkRoute{{Metrics: make([]byte, 5000)}}
		}},
		{"no label", func(_ *fdinfo.FileEntry, f *image.TunFacts) {
			f.Link.Addresses = []image.LinkAddress{{Local: "10.0.0.1", Label: strings.Repeat("x", 16)}}
		}},
		{"hardware address", func(_ *fdinfo.FileEntry, f *image.TunFacts) { f.Link.Address = make([]byte, 33) }},
	} {
		e := &fdinfo.FileEntry{Tunf: &tun.TunfileEntry{Netdev: proto.String("tun0")}, Reg: &regfile.RegFileEntry{Mode: proto.Uint32(unix.S_IFCHR)}}
		f := &image.TunFacts{Flags: unix.IFF_TUN}
		r := &Restorer{facts: map[uint32]*image.FileFacts{1: {ID: 1, Tun: f}}}
		if err := checkTun(r, &description{id: 1, entry: e}); err != nil {
			t.Fatalf("a sound entry: %v", err)
		}
		x.spoil(e, f)
		if err := checkTun(r, &description{id: 1, entry: e}); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v, want %q", err, x.want)
		}
	}
}

// TestReadLink reads what every network namespace has.
func TestReadLink(t *testing.T) {
	l, _, err := readLink("lo")
	if err != nil {
		t.Fatal(err)
	}
	if l.Index != 1 || l.MTU == 0 || len(l.Address) != 6 {
		t.Errorf("lo is %+v", l)
	}
	if err := checkLink(&l); err != nil {
		t.Error(err)
	}
	if _, _, err := readLink("no-such-link"); err == nil {
		t.Error("a link that is not there can be read")
	}
}

// FuzzLink: no answer of the kernel's makes the parsers panic, and what they accept
// an image may hold.
func FuzzLink(f *testing.F) {
	for _, typ := range []uint16{unix.RTM_GETLINK, unix.RTM_GETADDR, unix.RTM_GETROUTE} {
		_ = netlinkDump(unix.NETLINK_ROUTE, typ, make([]byte, 16), func(_ uint16, b []byte) error {
			f.Add(append([]byte{}, b...))
			return nil
		})
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var l image.LinkFacts
		if len(b) >= unix.SizeofIfInfomsg {
			_ = parseLink(b, &l, map[uint16]uint32{})
		}
		if len(b) >= unix.SizeofIfAddrmsg {
			if a, err := parseAddress(b); err == nil && len(a.Label) < unix.IFNAMSIZ {
				l.Addresses = append(l.Addresses, a)
			}
		}
		if rt, ok, err := parseRoute(b, 1); ok && err == nil && len(rt.Metrics) <= maxMetrics {
			l.Routes = append(l.Routes, rt)
		}
		if len(l.Address) > maxHardware {
			return
		}
		if err := checkLink(&l); err != nil {
			t.Error(err)
		}
	})
}
