package agent

import (
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	"godwit/configs/external"
	"godwit/engine/plan"
	"godwit/wire"
)

func TestParseJournalStream(t *testing.T) {
	tests := []struct {
		name, text string
		want       *wire.JournalStream
		bad        string
	}{
		{
			"all", "# This is private data. Do not parse\nPRIORITY=5\nLEVEL_PREFIX=1\nFORWARD_TO_SYSLOG=0\nFORWARD_TO_KMSG=1\nFORWARD_TO_CONSOLE=1\nSTREAM_ID=abc\nIDENTIFIER=my\\x20svc\\t\\101\\\\\nUNIT=my.service\n",
			&wire.JournalStream{Identifier: "my svc\tA\\", Unit: "my.service", Priority: 5, LevelPrefix: true, ForwardToKmsg: true, ForwardToConsole: true}, "",
		},
		{"nothing", "", &wire.JournalStream{}, ""},
		{"priority", "PRIORITY=8\n", nil, "no priority"},
		{"flag", "LEVEL_PREFIX=maybe\n", nil, "LEVEL_PREFIX"},
		{"two lines", "IDENTIFIER=a\\nb\n", nil, "more than one line"},
		{"escape", "UNIT=a\\q\n", nil, "no escape"},
		{"length", "UNIT=" + strings.Repeat("x", maxJournalField+1), nil, "at most"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseJournalStream([]byte(tt.text))
			if tt.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tt.bad) {
					t.Errorf("error %v, want %q", err, tt.bad)
				}
				return
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); err != nil || diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
		})
	}
}

func FuzzParseJournalStream(f *testing.F) {
	f.Add([]byte("PRIORITY=5\nLEVEL_PREFIX=1\nIDENTIFIER=a\\x20b\\101\nUNIT=x\n"))
	f.Add([]byte("IDENTIFIER=\\"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseJournalStream(b)
		if err != nil {
			return
		}
		if head, err := journalHead(s); err != nil || strings.Count(string(head), "\n") != 7 {
			t.Errorf("%q was read, but makes %q, %v", b, head, err)
		}
	})
}

func TestHoldJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stdout")
	l, err := net.Listen("unix", path)
	noErr(t, err)
	defer func() { _ = l.Close() }()
	q := &holdRequest{
		Resolution: &wire.Resolution{Argument: path, Objects: []*wire.OpenObject{{Kind: "unix-stream", Journal: &wire.JournalStream{Identifier: "svc", Unit: "a.service", Priority: 3, LevelPrefix: true}}}},
		external:   []*wire.ExternalFile{{Flags: unix.O_RDWR}},
	}
	h, err := holdJournal(t.Context(), q)
	noErr(t, err)
	fl, err := unix.FcntlInt(h.file.Fd(), unix.F_GETFL, 0)
	noErr(t, err)
	if fl&unix.O_NONBLOCK != 0 || !h.forward {
		t.Errorf("flags %#x, forwarded %v", fl, h.forward)
	}
	_, err = h.file.WriteString("a line\n")
	noErr(t, err)
	noErr(t, h.file.Close())
	c, err := l.Accept()
	noErr(t, err)
	defer func() { _ = c.Close() }()
	got, err := io.ReadAll(c)
	noErr(t, err)
	if want := "svc\na.service\n3\n1\n0\n0\n0\na line\n"; string(got) != want {
		t.Errorf("journald is told %q, want %q", got, want)
	}
	q.Objects[0].Journal.Identifier = "two\nlines"
	if _, err := holdJournal(t.Context(), q); err == nil || !strings.Contains(err.Error(), "not one line") {
		t.Errorf("an identifier of two lines: %v", err)
	}
	q.Argument = path + "x"
	if _, err := holdJournal(t.Context(), q); err == nil || !strings.Contains(err.Error(), "connect to") {
		t.Errorf("nobody listens: %v", err)
	}
	for peer, ok := range map[string]bool{journalStdout: true, "/run/other": false} {
		if err := servesJournal(&wire.OpenObject{Kind: "unix-stream", Peer: peer}, external.Entry{}); (err == nil) != ok {
			t.Errorf("peer %s: %v", peer, err)
		}
	}
	if s := journalStream(plan.Object{Kind: "unix-stream", Peer: journalStdout, PeerIno: 1, Holders: []plan.Holder{{Comm: "x"}}}); s.GetIdentifier() != "x" || s.GetPriority() != 6 {
		t.Errorf("without a state file: %v", s)
	}
}
