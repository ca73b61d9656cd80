package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/engine/plan"
	"godwit/wire"
)

// A program's standard output may be a stream to journald: a connection to the
// socket journalStdout, which begins with a few lines that say who writes there
// (sd_journal_stream_fd(3)). It is made again by connecting to the journald of the
// destination and saying the same.

const (
	journalStdout = "/run/systemd/journal/stdout"
	// journalStreams is where journald keeps what it was told, by device and inode
	// of its end of a connection.
	journalStreams = "/run/systemd/journal/streams"
	// maxJournalField bounds a line of the beginning, bytes.
	maxJournalField = 4 << 10
)

// journalStream tells what was said at the beginning of a stream to journald; nil: o
// is none.
func journalStream(o plan.Object) *wire.JournalStream {
	if o.Kind != "unix-stream" || o.Peer != journalStdout {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(journalStreams, fmt.Sprintf("%d:%d", o.Dev, o.PeerIno)))
	if err == nil {
		var s *wire.JournalStream
		if s, err = parseJournalStream(b); err == nil {
			return s
		}
	}
	// What systemd tells for a service that says nothing.
	s := &wire.JournalStream{Priority: 6, LevelPrefix: true}
	if len(o.Holders) > 0 {
		s.Identifier = o.Holders[0].Comm
	}
	return s
}

// parseJournalStream parses journald's file of a stream: lines NAME=VALUE, the
// identifier with C's escapes. Lines of other names are passed over.
func parseJournalStream(b []byte) (*wire.JournalStream, error) {
	s := &wire.JournalStream{}
	for line := range bytes.Lines(b) {
		name, value, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), "=")
		if !ok || strings.HasPrefix(name, "#") {
			continue
		}
		var err error
		switch name {
		case "IDENTIFIER":
			s.Identifier, err = journalText(value)
		case "UNIT":
			s.Unit, err = journalText(value)
		case "PRIORITY":
			var n uint64
			if n, err = strconv.ParseUint(value, 10, 32); err == nil && n > 7 {
				err = fmt.Errorf("%d is no priority", n)
			}
			s.Priority = uint32(n)
		case "LEVEL_PREFIX":
			s.LevelPrefix, err = strconv.ParseBool(value)
		case "FORWARD_TO_SYSLOG":
			s.ForwardToSyslog, err = strconv.ParseBool(value)
		case "FORWARD_TO_KMSG":
			s.ForwardToKmsg, err = strconv.ParseBool(value)
		case "FORWARD_TO_CONSOLE":
			s.ForwardToConsole, err = strconv.ParseBool(value)
		}
		if err != nil {
			return nil, fmt.Errorf("state of a stream to journald: %s: %w", name, err)
		}
	}
	return s, nil
}

// journalText takes C's escapes out of a value, which must be one line then.
func journalText(s string) (string, error) {
	if len(s) > maxJournalField {
		return "", fmt.Errorf("it has %d bytes, at most %d are allowed", len(s), maxJournalField)
	}
	var out []byte
	for rest := s; rest != ""; {
		if rest[0] != '\\' {
			out, rest = append(out, rest[0]), rest[1:]
			continue
		}
		c, tail, err := journalEscape(rest)
		if err != nil {
			return "", err
		}
		out, rest = append(out, c), tail
	}
	text := strings.ToValidUTF8(string(out), "?")
	if strings.ContainsAny(text, "\n\x00") {
		return "", errors.New("it has more than one line")
	}
	return text, nil
}

// journalEscape takes one escape off the beginning of s: octal, hexadecimal or of one
// letter.
func journalEscape(s string) (byte, string, error) {
	for _, x := range []struct{ lead, digits, base int }{{1, 3, 8}, {2, 2, 16}} {
		if len(s) < x.lead+x.digits || x.base == 16 && s[1] != 'x' {
			continue
		}
		if n, err := strconv.ParseUint(s[x.lead:x.lead+x.digits], x.base, 8); err == nil {
			return byte(n), s[x.lead+x.digits:], nil
		}
	}
	if len(s) > 1 {
		if i := strings.IndexByte(`abfnrtvs\"'`, s[1]); i >= 0 {
			return "\a\b\f\n\r\t\v \\\"'"[i], s[2:], nil
		}
	}
	return 0, "", fmt.Errorf("%.8q is no escape", s)
}

// journalHead is the beginning of a stream, in the form that journald reads.
func journalHead(s *wire.JournalStream) ([]byte, error) {
	for _, text := range []string{s.Identifier, s.Unit} {
		if strings.ContainsAny(text, "\n\x00") || len(text) > maxJournalField {
			return nil, fmt.Errorf("identifier or unit of the stream is not one line: %.80q", text)
		}
	}
	if s.Priority > 7 {
		return nil, fmt.Errorf("%d is no priority", s.Priority)
	}
	bit := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	return fmt.Appendf(nil, "%s\n%s\n%d\n%d\n%d\n%d\n%d\n", s.Identifier, s.Unit, s.Priority, bit(s.LevelPrefix),
		bit(s.ForwardToSyslog), bit(s.ForwardToKmsg), bit(s.ForwardToConsole)), nil
}

func servesJournal(o *wire.OpenObject, _ external.Entry) error {
	if o.Kind != "unix-stream" || o.Peer != journalStdout {
		return fmt.Errorf("it is no stream to journald (a connection to %s)", journalStdout)
	}
	return nil
}

// holdJournal begins a stream to this host's journald.
func holdJournal(_ context.Context, q *holdRequest) (*held, error) {
	path := q.Argument
	if path == "" {
		path = journalStdout
	}
	return q.connect(path, q.journal())
}

// holdConnection makes a new connection to the socket at a path.
func holdConnection(q *holdRequest) (*held, error) { return q.connect(q.Argument, q.journal()) }

// journal is what has to be said at the beginning of a connection; nil: nothing.
func (q *holdRequest) journal() *wire.JournalStream {
	for _, o := range q.Objects {
		if o.Journal != nil {
			return o.Journal
		}
	}
	return nil
}

// connect connects to the stream socket at a path. It is the tree's once that runs.
func (q *holdRequest) connect(path string, journal *wire.JournalStream) (*held, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EAGAIN) {
			err = errors.New("too many connections wait to be accepted there")
		}
		return nil, hintedf("start the program that listens there", "connect to %s: %w", path, err)
	}
	if err := q.introduce(fd, journal); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("begin a stream to journald: %w", err)
	}
	if len(q.external) > 0 && int(q.external[0].Flags)&unix.O_NONBLOCK == 0 {
		if err := unix.SetNonblock(fd, false); err != nil {
			_ = f.Close()
			return nil, os.NewSyscallError("fcntl F_SETFL", err)
		}
	}
	return &held{file: f, forward: true}, nil
}

func (q *holdRequest) introduce(fd int, journal *wire.JournalStream) error {
	if journal == nil {
		return nil
	}
	head, err := journalHead(journal)
	if err != nil {
		return err
	}
	if err := unix.Shutdown(fd, unix.SHUT_RD); err != nil {
		return os.NewSyscallError("shutdown", err)
	}
	n, err := unix.SendmsgN(fd, head, nil, nil, unix.MSG_NOSIGNAL)
	if err == nil && n != len(head) {
		err = unix.EAGAIN // a new connection takes that much
	}
	return os.NewSyscallError("send", err)
}
