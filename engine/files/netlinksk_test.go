package files

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

func init() {
	scenes["netlink-refused"] = func(string) fds {
		out := fds{
			"waiting": must1(unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)),
			"idle":    must1(unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)),
			"proc":    must1(unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM, unix.NETLINK_CONNECTOR)),
		}
		must(unix.SetsockoptInt(out["proc"], unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, cnIdxProc))
		ne := binary.NativeEndian
		req := ne.AppendUint32(nil, nlmsgHeader+16)
		req = ne.AppendUint16(req, unix.RTM_GETLINK)
		req = ne.AppendUint16(req, unix.NLM_F_REQUEST)
		req = append(req, make([]byte, 8+16)...)
		ne.PutUint32(req[nlmsgHeader+4:], 1)
		must(unix.Sendto(out["waiting"], req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
		return out
	}
}

// What nobody can put back stands in the way of a dump, not of the plan of a
// program that runs.
func TestNetlinkRefused(t *testing.T) {
	c := start(t, "netlink-refused")
	pre := NewDumper(nil, Options{}, nil)
	defer func() { _ = pre.Close() }()
	if err := pre.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	if err := pre.Finish(); err != nil {
		t.Fatal(err)
	}
	wantProblem(t, pre.Refusal(), "proc connector")
	if n := len(pre.Refusal()); n != 1 {
		t.Errorf("the plan has %d problems, want 1", n)
	}
	d := dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "proc connector")
	wantProblem(t, d.problems, "messages of the kernel wait")
	for _, p := range d.problems {
		if p.FD == c.fds["idle"] {
			t.Errorf("an idle socket is refused: %s", p)
		}
	}
}

func TestNetlinkPort(t *testing.T) {
	const table = "    0   4242     0 2 65531     0     0        3  1\n   10    777     0 2 65531     0     0        3  1\n"
	for port, want := range map[uint32]bool{777: true, 4242: true, 10: false, 42: false, 0: false} {
		if hasPort(table, port) != want {
			t.Errorf("port %d: %v", port, !want)
		}
	}
}

func TestNetlinkHostile(t *testing.T) {
	for _, x := range []struct {
		want  string
		spoil func(*sk_netlink.NetlinkSkEntry)
	}{
		{"out of range", func(e *sk_netlink.NetlinkSkEntry) { e.Protocol = proto.Uint32(256) }},
		{"words of groups", func(e *sk_netlink.NetlinkSkEntry) { e.Groups = make([]uint32, 3000) }},
		{"instructions", func(e *sk_netlink.NetlinkSkEntry) { e.Opts.SoFilter = make([]uint64, 5000) }},
	} {
		e := &sk_netlink.NetlinkSkEntry{Opts: &sk_opts.SkOptsEntry{}}
		x.spoil(e)
		err := checkNetlink(&Restorer{}, &description{entry: &fdinfo.FileEntry{Nlsk: e}})
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v, want %q", err, x.want)
		}
	}
}
