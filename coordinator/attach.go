package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"godwit/transport"
	"godwit/wire"
)

// attachment is this command's terminal in the place of the one that a tree was
// started on (migrate --attach).
type attachment struct {
	in, out *os.File
	link    *link
	host    string // where the tree lands
	relay   *transport.Relay
	ended   chan struct{} // closed when it is known how the tree ended
	how     wire.Ending
	status  uint8
	bus     *transport.RelayBus
	asked   *wire.Attachment
}

// ownTerminal is the terminal that a tree is to be attached to.
func (a *app) ownTerminal() (in, out *os.File, err error) {
	out, _ = a.stdout.(*os.File)
	in = os.Stdin
	if out == nil || !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) {
		return nil, nil, usagef("--attach wants a terminal as standard input and standard output")
	}
	return in, out, nil
}

// attach makes the end of the relay that stays here. It listens before the migration
// is asked for: the tree may write as soon as it runs.
// mark makes its name on the bus another one than those of earlier ends.
func attach(l *link, m *wire.Record, in, out *os.File, patience time.Duration, mark string) (*attachment, error) {
	x := &attachment{in: in, out: out, link: l, host: m.Destination, ended: make(chan struct{}),
		asked: &wire.Attachment{Id: m.Id, Peer: "attach-" + m.Id + mark, Size: windowSize(out), PatienceMs: uint64(patience.Milliseconds())}}
	// A program that is told of another size draws its screen anew: it gets the right
	// one when it is attached.
	x.asked.Size.Rows = max(x.asked.Size.Rows, 2) - 1
	var err error
	x.bus, err = transport.NewRelayBus(l.nc, x.asked.Peer, func(id string, toHome bool, frame []byte) bool {
		if id != m.Id || !toHome {
			return false
		}
		h, payload, err := wire.ParseRelayFrame(frame)
		switch {
		case err != nil: // what is lost is sent again
		case h.Type == wire.RelayEnd:
			x.hear(payload)
		default:
			x.relay.Handle(h, payload)
		}
		return true
	})
	if err != nil {
		return nil, wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%w", err)
	}
	x.relay = transport.NewRelay(transport.RelayConfig{
		ID: m.Id, Home: true, Host: x.asked.Peer, Epoch: 1, Reads: true, Writes: true, Send: x.bus.Send, Chunk: x.bus.Chunk(),
	})
	x.relay.Activate()
	return x, nil
}

func windowSize(f *os.File) *wire.WindowSize {
	w, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return &wire.WindowSize{}
	}
	return &wire.WindowSize{Rows: uint32(w.Row), Columns: uint32(w.Col), XPixels: uint32(w.Xpixel), YPixels: uint32(w.Ypixel)}
}

// close ends this end; the tree's terminal hangs up, if it has not ended.
func (x *attachment) close() error {
	x.relay.Farewell()
	x.relay.Leave()
	return x.bus.Close()
}

const attachHelp = "attached; ~. at the beginning of a line hangs up"

// serve lets the terminal be the tree's until that closes it, or until somebody
// hangs up. The terminal is as it was afterwards.
func (x *attachment) serve(ctx context.Context, interrupts <-chan os.Signal) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	was, err := term.MakeRaw(int(x.in.Fd()))
	if err != nil {
		return fmt.Errorf("set up the terminal: %w", err)
	}
	defer func() {
		if rerr := term.Restore(int(x.in.Fd()), was); rerr != nil {
			err = errors.Join(err, fmt.Errorf("put the terminal back: %w", rerr))
		}
		_, _ = fmt.Fprintln(x.out)
	}()
	if _, err := fmt.Fprintf(x.out, "%s\r\n", attachHelp); err != nil {
		return fmt.Errorf("write to the terminal: %w", err)
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGWINCH)
	defer signal.Stop(signals)
	signals <- syscall.SIGWINCH
	hungUp := make(chan struct{})
	go x.read(hungUp)
	written := make(chan error, 1)
	go func() { written <- x.write(ctx.Done()) }()
	for {
		select {
		case err := <-written:
			if err != nil {
				return err
			}
			return x.outcome()
		case <-hungUp:
			return nil
		case <-interrupts:
			return nil
		case s := <-signals:
			if s == syscall.SIGHUP {
				return nil
			}
			x.resize(ctx)
		}
	}
}

// hear takes the word of how the tree ended. It comes from one goroutine.
func (x *attachment) hear(payload []byte) {
	e, status, ok := wire.ParseEnd(payload)
	select {
	case <-x.ended:
	default:
		if ok {
			x.how, x.status = e, status
			close(x.ended)
		}
	}
}

// statusError has the command exit as the program that was attached did.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return e.text }

const (
	// endPatience is how long the word of how the tree ended may take to come.
	endPatience = 5 * time.Second
	// exitUnknown is the exit code of a command that does not know how the program
	// ended, as it is ssh's.
	exitUnknown = 255
)

// outcome is how the tree ended whose terminal has.
func (x *attachment) outcome() error {
	if err := x.relay.Err(); err != nil {
		return &statusError{exitUnknown, "the terminal was lost: " + err.Error()}
	}
	select {
	case <-x.ended:
	case <-time.After(endPatience):
	}
	select {
	case <-x.ended:
	default:
		return &statusError{exitUnknown, "the terminal has ended, and how the program did is not known"}
	}
	switch {
	case x.how == wire.EndingUnknown:
		return &statusError{exitUnknown, "how the program ended is not known"}
	case x.how == wire.EndingExited && x.status != 0:
		return &statusError{code: int(x.status)}
	}
	return nil
}

// resize tells the tree of the size of the terminal. Should it not hear of it, the
// next time is when the size changes again.
func (x *attachment) resize(ctx context.Context) {
	call, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, _ = transport.Call[*wire.ResizeRequest, *wire.ResizeReply](call, x.link.nc, x.host, "resize",
		&wire.ResizeRequest{Id: x.asked.Id, Size: windowSize(x.out)})
}

// read sends what is typed. It ends with the process: nothing interrupts a read.
func (x *attachment) read(hungUp chan<- struct{}) {
	b, line := make([]byte, 4096), hangUp{begins: true}
	for {
		n, err := x.in.Read(b)
		if err != nil {
			close(hungUp)
			return
		}
		typed, hang := line.filter(b[:n])
		for len(typed) > 0 {
			room := x.relay.Room(nil)
			if room == 0 {
				return // it is over
			}
			n := min(room, len(typed))
			x.relay.Put(append([]byte(nil), typed[:n]...))
			typed = typed[n:]
		}
		if hang {
			close(hungUp)
			return
		}
	}
}

// write prints what the tree writes, until that has ended or stop is closed.
func (x *attachment) write(stop <-chan struct{}) error {
	for {
		b, fin, ok := x.relay.Next(stop)
		if fin {
			x.relay.Shut()
			return nil
		}
		if !ok {
			return x.relay.Err()
		}
		n, err := x.out.Write(b)
		if err != nil && !errors.Is(err, io.ErrShortWrite) {
			return fmt.Errorf("write to the terminal: %w", err)
		}
		x.relay.Took(n)
	}
}

// hangUp finds ~. at the beginning of a line in what is typed; ~~ is one ~.
type hangUp struct {
	begins bool // the next byte begins a line
	tilde  bool // a ~ at the beginning was held back
}

func (h *hangUp) filter(b []byte) (typed []byte, hang bool) {
	for _, c := range b {
		switch {
		case h.tilde && c == '.':
			return typed, true
		case h.tilde:
			h.tilde, h.begins = false, false
			if typed = append(typed, '~'); c == '~' {
				continue
			}
		case h.begins && c == '~':
			h.tilde = true
			continue
		}
		h.begins = c == '\r' || c == '\n'
		typed = append(typed, c)
	}
	return typed, false
}
