package agent

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/wire"
)

// A proxied terminal is one whose master (a terminal emulator, sshd, script) stays at
// home. There the agent has the slave in the place of the tree; on the tree's host
// the agent has the master of a new one.
//
//	master ─ slave ─ pump ═ relay over the bus ═ pump ─ master │ slave ─ tree
//	         └──── home's agent ────┘            └─ the agent of the tree's host
//
// Lines, echo and signals are the new terminal's business, so that home's is raw as long
// as the proxy lasts. Who started the tree waits for its root: a stand-in stays there
// until the tree's terminal ends (engine.StandIn), and then exits as the root did.
// Where somebody else reads what is typed, such as a shell whose job in the
// background moves, only what the tree writes goes home; its settings are left alone, so
// that lines end in two carriage returns, of which one is not to be seen.

// homeTerminal is the slave that home has.
type homeTerminal struct {
	file   *os.File
	log    hclog.Logger
	silent bool // output only: its settings are others'
	was    *unix.Termios
	size   unix.Winsize // as the tree has it
	told   time.Time    // when the tree was told of one; zero: never
	stand  engine.StandIn

	once   sync.Once
	heard  chan struct{} // closed when it is known how the tree ended
	status int
}

const (
	// sizePoll is how often the size of a terminal is looked at: only its own session is
	// told of a change (SIGWINCH).
	sizePoll   = 200 * time.Millisecond
	sizeRepeat = 5 * time.Second
	// endWait is how long the tree may take to end after its terminal.
	endWait = 3 * time.Second
	// statusUnknown is the exit status of a stand-in for a root of which it is not known.
	statusUnknown = 255
)

// isTerminal says whether a key is that of a pseudoterminal that was opened by its name.
func isTerminal(key string) bool {
	rdev, _, ok := strings.Cut(strings.TrimPrefix(key, "tty["), ":")
	dev, err := strconv.ParseUint(rdev, 16, 64)
	major := unix.Major(dev)
	return ok && strings.HasPrefix(key, "tty[") && err == nil && major >= 136 && major <= 143 // UNIX98_PTY_SLAVE_MAJOR
}

// newHomeTerminal keeps a terminal of a frozen tree.
func newHomeTerminal(f *os.File, info *wire.Proxy, log hclog.Logger) *homeTerminal {
	h := &homeTerminal{file: f, log: log, silent: info.OutputOnly, heard: make(chan struct{})}
	if w, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		h.size = *w
	}
	return h
}

// begin makes the terminal raw, and gives what waits in it: lines that were typed
// already. Errors are those of a terminal that has hung up, which its pump meets.
func (h *homeTerminal) begin() (typed []byte) {
	if h.silent {
		return nil
	}
	fd := int(h.file.Fd())
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS2)
	if err != nil {
		return nil
	}
	h.was = t
	if t.Lflag&unix.ICANON != 0 {
		typed = typedLines(fd, t.Cc[unix.VEOF])
	}
	raw := *t
	raw.Iflag, raw.Oflag, raw.Lflag = 0, 0, 0
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS2, &raw); err != nil {
		h.log.Debug("the terminal cannot be made raw", "error", err)
	}
	return typed
}

// typedLines reads whole lines, and ends of file, which raw mode would make of them
// what they are not.
func typedLines(fd int, eof byte) []byte {
	var out []byte
	b := make([]byte, 4096)
	for len(out) < 1<<16 {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); err != nil && !errors.Is(err, unix.EINTR) || n == 0 || p[0].Revents&unix.POLLHUP != 0 {
			break
		}
		n, err := unix.Read(fd, b)
		switch {
		case err != nil:
			return out
		case n == 0 && eof != 0:
			out = append(out, eof)
		default:
			out = append(out, b[:max(n, 0)]...)
		}
	}
	return out
}

// end puts the terminal's settings back. Preconditions: it is still open.
func (h *homeTerminal) end() {
	if h == nil || h.was == nil {
		return
	}
	if err := unix.IoctlSetTermios(int(h.file.Fd()), unix.TCSETS2, h.was); err != nil {
		h.log.Debug("the terminal's settings cannot be put back", "error", err)
	}
	h.was = nil
}

// follow tells the tree's host of the size, when it has changed and now and then, since
// what is told may be lost.
func (p *proxy) follow(peer string) {
	h := p.term
	w, err := unix.IoctlGetWinsize(int(h.file.Fd()), unix.TIOCGWINSZ)
	if err != nil || peer == "" || *w == h.size && (h.told.IsZero() || time.Since(h.told) < sizeRepeat) {
		return
	}
	size := &wire.WindowSize{Rows: uint32(w.Row), Columns: uint32(w.Col), XPixels: uint32(w.Xpixel), YPixels: uint32(w.Ypixel)}
	if err := p.tell(peer, wire.RelaySize, wire.SizePayload(size)); err == nil {
		h.size, h.told = *w, time.Now()
	}
}

// tell sends the other end what is none of the relay's business.
func (p *proxy) tell(peer string, typ wire.RelayType, payload []byte) error {
	err := p.ps.send(peer, p.info.Id, !p.home, wire.RelayHeader{Type: typ, Epoch: p.relay.Stats().Epoch}.Frame(payload))
	if err != nil {
		p.log.Debug("a word to the other end could not be sent", "type", typ, "error", err)
	}
	return err
}

// told takes what tell sent.
func (p *proxy) told(h wire.RelayHeader, payload []byte) {
	if h.Epoch != p.relay.Stats().Epoch {
		return
	}
	switch {
	case h.Type == wire.RelaySize && !p.home:
		if size, ok := wire.ParseSize(payload); ok {
			if err := p.ps.resize(p.info.Id, size); err != nil {
				p.log.Debug("the terminal gets no other size", "error", err)
			}
		}
	case h.Type == wire.RelayEnd && p.home && p.term != nil:
		if e, status, ok := wire.ParseEnd(payload); ok {
			p.term.hear(e, status)
		}
	}
}

// resize gives the tree's end of a terminal another size.
func (ps *proxies) resize(id string, s *wire.WindowSize) error {
	size, err := winsize(s)
	if err != nil {
		return err
	}
	ps.mu.Lock()
	p := ps.trees[id]
	ps.mu.Unlock()
	if p == nil || !p.pump.tty || p.relay.Over() {
		return wire.Errorf(wire.Code_CODE_NOT_FOUND, "no tree is attached to terminal %s", id)
	}
	return p.pump.resize(size)
}

// hear notes how the tree ended.
func (h *homeTerminal) hear(e wire.Ending, status uint8) {
	h.once.Do(func() {
		if h.status = statusUnknown; e == wire.EndingExited {
			h.status = int(status)
		}
		close(h.heard)
	})
}

// leave ends the stand-in with the exit status that the root had where it ran last.
func (h *homeTerminal) leave() {
	if h == nil || h.stand == nil {
		return
	}
	status := statusUnknown
	select {
	case <-h.heard:
		status = h.status
	case <-time.After(endWait + time.Second):
		h.log.Warn("how the tree ended is not known")
	}
	if err := h.stand.End(status); err != nil {
		h.log.Warn("what stood in for the root of the tree cannot be ended", "pid", h.stand.Pid(), "error", err)
	}
	h.stand = nil
}

// waitsForRoot says whether somebody waits for the root of a tree of this host who is
// neither init nor this agent.
func waitsForRoot(root int) bool {
	parent := parentOf(root)
	return parent > 1 && parent != os.Getpid()
}
