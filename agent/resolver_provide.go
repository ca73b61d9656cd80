package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/wire"
)

// resolverProvide takes what godwit-agent provide keeps ready.
var resolverProvide = resolver{
	serves: func(o *wire.OpenObject, _ external.Entry) error {
		if slices.Contains([]string{"regular", "directory", "fifo", "pipe", "tty", "chr"}, o.Kind) || socketTypes[o.Kind] != (socketType{}) {
			return nil
		}
		return fmt.Errorf("what is of kind %s cannot be handed in", o.Kind)
	},
	hold: holdProvided,
}

func holdProvided(_ context.Context, q *holdRequest) (*held, error) {
	ps := q.agent.provisions
	p, f, err := ps.take(q.migration, q.Key, q.Objects)
	if err != nil {
		return nil, hintedf(fmt.Sprintf("run godwit-agent provide '%s' on %s and leave it running", q.Key, q.agent.cfg.Host), "%w", err)
	}
	h := &held{file: f, forward: q.Forward || socketTypes[q.kind()] != (socketType{}), release: func() { ps.release(p) }, landed: func() { ps.use(p) }}
	if err := q.checkProvided(f); err != nil {
		h.release()
		_ = f.Close()
		return nil, hintedf("provide one that is, and withdraw this one", "what is provided for it, %s, %w", p.name(), err)
	}
	return h, nil
}

// kind is the kind of the objects with the key.
func (q *holdRequest) kind() string {
	if len(q.Objects) > 0 {
		return q.Objects[0].Kind
	}
	return q.external[0].Kind
}

// socketType is what getsockopt(2) tells of a socket.
type socketType struct{ domain, typ int }

var socketTypes = map[string]socketType{
	"unix-stream":    {unix.AF_UNIX, unix.SOCK_STREAM},
	"unix-dgram":     {unix.AF_UNIX, unix.SOCK_DGRAM},
	"unix-seqpacket": {unix.AF_UNIX, unix.SOCK_SEQPACKET},
	"tcp":            {unix.AF_INET, unix.SOCK_STREAM},
	"udp":            {unix.AF_INET, unix.SOCK_DGRAM},
}

// checkProvided says whether a descriptor can stand for the objects: its kind, what
// it allows where that counts, and what the options say of size and mode. The
// error goes on after the descriptor's name.
func (q *holdRequest) checkProvided(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_GETFL", err)
	}
	have, want := handedKind(f, &st), q.kind()
	if want == "pipe" || want == "fifo" { // one may stand for the other
		want = have
		if have != "pipe" && have != "fifo" {
			want = q.kind()
		}
	}
	if have != want {
		return fmt.Errorf("is a %s, expected a %s", have, want)
	}
	// A regular file or a fifo is opened again; else its own mode is what the tree gets.
	if opened := have == "regular" || have == "directory" || have == "fifo"; (q.Forward || !opened) && !slices.Contains([]string{"directory"}, have) {
		need := q.flags()
		if a, n := fl&unix.O_ACCMODE, need&unix.O_ACCMODE; need&unix.O_PATH == 0 && (fl&unix.O_PATH != 0 || a != unix.O_RDWR && a != n) {
			return fmt.Errorf("is open %s, expected %s", accessWords(fl), accessWords(need))
		}
	}
	return q.suits(f)
}

// handedKind is the kind of a descriptor, as plans name it.
func handedKind(f *os.File, st *unix.Stat_t) string {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		domain, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
		typ, terr := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
		if domain == unix.AF_INET6 {
			domain = unix.AF_INET
		}
		for name, t := range socketTypes {
			if errors.Join(err, terr) == nil && t == (socketType{domain, typ}) {
				return name
			}
		}
	case unix.S_IFIFO:
		if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil && strings.HasPrefix(link, "pipe:") {
			return "pipe"
		}
	case unix.S_IFCHR:
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return "tty"
		}
	}
	return kindOf(st.Mode)
}

func accessWords(flags int) string {
	switch {
	case flags&unix.O_PATH != 0:
		return "as a path only"
	case flags&unix.O_ACCMODE == unix.O_RDONLY:
		return "for reading"
	case flags&unix.O_ACCMODE == unix.O_WRONLY:
		return "for writing"
	}
	return "for reading and writing"
}
