package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What waits in a pseudoterminal can only be read by taking it out (there is no
// MSG_PEEK), so it is taken out and put back at once, while nobody else runs on
// the terminal. Meanwhile its settings are others: nothing is echoed, edited or
// turned into a signal a second time (termios(3), drivers/tty/n_tty.c).

// Ends of pieces of input.
const (
	endLine = "line" // the last byte ends a line: newline, VEOL or VEOL2
	endEOF  = "eof"  // followed by an end of file, which is no byte
	endOpen = "open" // the beginning of a line
	endRaw  = "raw"  // not in lines
	endNew  = "new"  // written to the master and not processed yet
)

// Ways in which output was stopped.
const (
	stoppedByChar = "char" // the stop character was typed
	stoppedByCall = "call" // tcflow(3)
)

// piece is a part of what waits in a slave to be read.
type piece struct {
	data []byte
	end  string
}

// ttyQueues is what waits in a pair.
type ttyQueues struct {
	in      []piece // in the slave
	out     []byte  // in the master
	stopped string
}

// ptyPair is a pair of which both ends are at hand. Preconditions of its methods:
// nobody else runs on it.
type ptyPair struct {
	m, s    int          // s is non-blocking
	termios unix.Termios // the terminal's own
	packet  bool         // TIOCPKT
}

const (
	// ttyBuffer is what n_tty holds (N_TTY_BUF_SIZE, drivers/tty/n_tty.c).
	ttyBuffer = 4096
	// maxTyped bounds the input in lines that is dumped: beyond a full buffer
	// there may be bytes that are not in lines yet.
	maxTyped = ttyBuffer / 2
	// maxQueue bounds all that waits on one side: the buffer of n_tty, and those
	// before it (tty_buffer_set_limit in drivers/tty/pty.c: 8192, and one more).
	maxQueue = 64 << 10
	// ttyPatience is how long the kernel may take to hand bytes on.
	ttyPatience = 10 * time.Second
)

// errTTYBusy says that a pair cannot be dumped at this moment.
type errTTYBusy string

func (e errTTYBusy) Error() string { return string(e) }

func newPair(m, s int) (*ptyPair, error) {
	p := &ptyPair{m: m, s: s}
	t, err := unix.IoctlGetTermios(s, unix.TCGETS2)
	if err != nil {
		return nil, os.NewSyscallError("ioctl TCGETS2", err)
	}
	p.termios = *t
	n, err := unix.IoctlGetInt(m, unix.TIOCGPKT)
	if err != nil {
		return nil, os.NewSyscallError("ioctl TIOCGPKT", err)
	}
	p.packet = n != 0
	return p, nil
}

// canonical says whether input is in lines.
func (p *ptyPair) canonical() bool {
	return p.termios.Lflag&unix.ICANON != 0 && p.termios.Lflag&unix.EXTPROC == 0
}

// read reads what waits in the pair and leaves all as it was.
func (p *ptyPair) read() (*ttyQueues, error) {
	// Asking has the kernel hand on what is on its way.
	se, err := pollNow(p.s, unix.POLLIN|unix.POLLOUT)
	if err != nil {
		return nil, err
	}
	me, err := pollNow(p.m, unix.POLLIN|unix.POLLPRI)
	if err != nil {
		return nil, err
	}
	n, err := p.settled()
	switch {
	case err != nil:
		return nil, err
	case p.packet && me&unix.POLLPRI != 0:
		return nil, errTTYBusy("an event of its packet mode has not been read by the master")
	case p.canonical() && n > maxTyped:
		return nil, errTTYBusy(fmt.Sprintf("%d bytes of typed lines wait to be read, of which at most %d are carried", n, maxTyped))
	case !p.canonical() && n == 0 && me&unix.POLLIN == 0 && se&unix.POLLOUT != 0:
		return &ttyQueues{}, nil
	}
	q := &ttyQueues{}
	err = p.take(q)
	if perr := p.put(q); perr != nil {
		err = errors.Join(err, fmt.Errorf("put what waits in the terminal back: %w", perr))
	}
	total := 0
	for _, x := range q.in {
		total += len(x.data)
	}
	if err == nil && p.canonical() && total >= ttyBuffer-1 {
		return nil, errTTYBusy(fmt.Sprintf("%d typed bytes wait to be read, more than can be carried", total))
	}
	return q, err
}

// settled is how much the slave has to be read once nothing is on its way to it any
// more: what arrives later would be processed under other settings. Where there is
// none, asking for it had the kernel hand on everything (n_tty_poll); else it is
// given time for that.
func (p *ptyPair) settled() (int, error) {
	n, err := waiting(p.s)
	for quiet, start := 0, time.Now(); err == nil && n > 0 && quiet < 12 && time.Since(start) < ttyPatience; quiet++ {
		time.Sleep(500 * time.Microsecond)
		before := n
		if n, err = waiting(p.s); n != before {
			quiet = -1
		}
	}
	return n, err
}

// take moves what waits into q; also after an error q has all that was taken.
func (p *ptyPair) take(q *ttyQueues) error {
	if p.packet {
		if err := unix.IoctlSetPointerInt(p.m, unix.TIOCPKT, 0); err != nil {
			return os.NewSyscallError("ioctl TIOCPKT", err)
		}
	}
	if err := drain(p.m, &q.out); err != nil {
		return err
	}
	if ev, err := pollNow(p.s, unix.POLLOUT); err != nil {
		return err
	} else if ev == 0 {
		// The master's buffers are empty: output was stopped.
		if err := unix.IoctlSetInt(p.s, unix.TCXONC, unix.TCOON); err != nil {
			return os.NewSyscallError("ioctl TCXONC", err)
		}
		q.stopped = stoppedByChar // started by turning IXON off
		if ev, err := pollNow(p.s, unix.POLLOUT); err != nil {
			return err
		} else if ev != 0 {
			q.stopped = stoppedByCall
		}
	}
	if p.canonical() {
		return p.takeLines(q)
	}
	return p.takeRaw(q)
}

func (p *ptyPair) takeLines(q *ttyQueues) error {
	quiet := p.quiet(unix.ICANON)
	if err := setTermios(p.s, &quiet); err != nil {
		return err
	}
	for {
		ev, err := pollNow(p.s, unix.POLLIN)
		if err != nil {
			return err
		}
		if ev == 0 {
			break
		}
		b := make([]byte, 2*ttyBuffer)
		n, err := readTTY(p.s, b)
		if err != nil {
			return err
		}
		x := piece{data: b[:n], end: endEOF}
		if n > 0 && p.ends(b[n-1]) {
			x.end = endLine
		}
		q.in = append(q.in, x)
	}
	quiet.Lflag = 0
	if err := setTermios(p.s, &quiet); err != nil {
		return err
	}
	x := piece{end: endOpen}
	err := takeN(p.s, &x.data)
	if len(x.data) > 0 {
		q.in = append(q.in, x)
	}
	return err
}

func (p *ptyPair) takeRaw(q *ttyQueues) error {
	quiet := p.quiet(p.termios.Lflag & (unix.ICANON | unix.EXTPROC))
	if err := setTermios(p.s, &quiet); err != nil {
		return err
	}
	for _, end := range []string{endRaw, endNew} {
		x := piece{end: end}
		err := takeN(p.s, &x.data)
		if len(x.data) > 0 {
			q.in = append(q.in, x)
		}
		if err != nil {
			return err
		}
		// What was on its way to a full buffer comes now.
		if _, err := pollNow(p.s, unix.POLLIN); err != nil {
			return err
		}
	}
	return nil
}

// takeN reads as many bytes as wait. Further ones may follow.
func takeN(fd int, to *[]byte) error {
	n, err := waiting(fd)
	if err != nil {
		return err
	}
	for n > 0 {
		b := make([]byte, n)
		got, err := readTTY(fd, b)
		if err != nil {
			return err
		}
		if got == 0 {
			return errors.New("a terminal with input gives none")
		}
		*to = append(*to, b[:got]...)
		n -= got
	}
	return nil
}

// drain reads all that a master has. Its description may be a blocking one.
func drain(m int, to *[]byte) error {
	for len(*to) < maxQueue {
		ev, err := pollNow(m, unix.POLLIN)
		if err != nil || ev&unix.POLLIN == 0 {
			return err
		}
		b := make([]byte, 2*ttyBuffer)
		n, err := readTTY(m, b)
		if err != nil {
			return err
		}
		*to = append(*to, b[:n]...)
	}
	return fmt.Errorf("a master gives more than %d bytes", maxQueue)
}

// quiet are settings under which nothing happens to bytes.
func (p *ptyPair) quiet(lflag uint32) unix.Termios {
	t := p.termios
	t.Iflag, t.Oflag, t.Lflag = 0, 0, lflag
	return t
}

// ends says whether c ends a line.
func (p *ptyPair) ends(c byte) bool {
	cc := &p.termios.Cc
	return c == '\n' || c != 0 && (c == cc[unix.VEOL] || c == cc[unix.VEOL2])
}

// put puts what waited, or is to wait, into the pair, whose settings are those of
// p afterwards.
func (p *ptyPair) put(q *ttyQueues) error {
	var errs []error
	do := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	if p.canonical() {
		do("input", p.putLines(q.in))
	} else {
		do("input", p.putRaw(q.in))
	}
	t := p.quiet(p.termios.Lflag & (unix.ICANON | unix.EXTPROC))
	do("settings for output", setTermios(p.s, &t))
	do("output", feed(p.s, q.out, p.m))
	do("settings", setTermios(p.s, &p.termios))
	for _, x := range q.in {
		if x.end == endNew {
			do("input that is not processed yet", feed(p.m, x.data, p.s))
		}
	}
	switch q.stopped {
	case stoppedByCall:
		do("stop the output", os.NewSyscallError("ioctl TCXONC", unix.IoctlSetInt(p.s, unix.TCXONC, unix.TCOOFF)))
	case stoppedByChar:
		do("stop the output", p.typeStop())
	}
	if p.packet {
		do("packet mode", os.NewSyscallError("ioctl TIOCPKT", unix.IoctlSetPointerInt(p.m, unix.TIOCPKT, 1)))
	}
	return errors.Join(errs...)
}

// typeStop types the stop character.
func (p *ptyPair) typeStop() error {
	stop := p.termios.Cc[unix.VSTOP]
	if p.termios.Iflag&unix.IXON == 0 || stop == 0 {
		return errors.New("it has no stop character")
	}
	if err := feed(p.m, []byte{stop}, p.s); err != nil {
		return err
	}
	return p.await(func() (bool, error) {
		ev, err := pollNow(p.s, unix.POLLOUT)
		return ev == 0, err
	})
}

// putLines types lines, ends of file and the beginning of a line again, and waits
// until the terminal has them all: it then stops and starts its output.
func (p *ptyPair) putLines(in []piece) error {
	t := p.quiet(unix.ICANON | unix.IEXTEN)
	t.Iflag = unix.IXON
	eol, eol2 := t.Cc[unix.VEOL], t.Cc[unix.VEOL2]
	t.Cc = [len(t.Cc)]uint8{}
	t.Cc[unix.VEOL], t.Cc[unix.VEOL2] = eol, eol2
	next := byte(0)
	for _, at := range []int{unix.VLNEXT, unix.VEOF, unix.VSTOP, unix.VSTART} {
		for next++; next == eol || next == eol2 || next == '\n'; next++ {
		}
		t.Cc[at] = next
	}
	if err := setTermios(p.s, &t); err != nil {
		return err
	}
	if len(in) == 0 {
		return nil
	}
	var b bytes.Buffer
	for _, x := range in {
		data, last := x.data, []byte(nil)
		switch {
		case x.end == endLine && len(data) > 0 && p.ends(data[len(data)-1]):
			data, last = data[:len(data)-1], data[len(data)-1:]
		case x.end == endLine, x.end == endEOF:
			last = t.Cc[unix.VEOF : unix.VEOF+1]
		}
		for _, c := range data {
			if c < ' ' || c == 0x7f || c == eol || c == eol2 {
				b.WriteByte(t.Cc[unix.VLNEXT])
			}
			b.WriteByte(c)
		}
		b.Write(last)
	}
	if err := feed(p.m, b.Bytes(), p.s); err != nil {
		return err
	}
	for _, mark := range []struct {
		c    byte
		room bool
	}{{t.Cc[unix.VSTOP], false}, {t.Cc[unix.VSTART], true}} {
		if err := feed(p.m, []byte{mark.c}, p.s); err != nil {
			return err
		}
		err := p.await(func() (bool, error) {
			ev, err := pollNow(p.s, unix.POLLOUT)
			return (ev != 0) == mark.room, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// putRaw types bytes that are not in lines again.
func (p *ptyPair) putRaw(in []piece) error {
	t := p.quiet(p.termios.Lflag & (unix.ICANON | unix.EXTPROC))
	if err := setTermios(p.s, &t); err != nil {
		return err
	}
	total := 0
	for _, x := range in {
		if x.end == endNew {
			continue
		}
		total += len(x.data)
		if err := feed(p.m, x.data, p.s); err != nil {
			return err
		}
	}
	return p.await(func() (bool, error) {
		n, err := waiting(p.s)
		return n >= min(total, ttyBuffer-1), err
	})
}

func (p *ptyPair) await(done func() (bool, error)) error {
	for start := time.Now(); ; time.Sleep(20 * time.Microsecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Since(start) > ttyPatience {
			return errors.New("the terminal does not take them")
		}
	}
}

// feed writes to one end of a pair. Its description may be a blocking one, of
// which a short write never blocks where there is any room: the last buffer may be
// larger than the room (__tty_buffer_request_room). For a long one it is made
// non-blocking, as only a write tells of room in buffers that are there already.
func feed(fd int, b []byte, reader int) (err error) {
	const short = 256
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_GETFL", err)
	}
	blocks := fl&unix.O_NONBLOCK == 0
	if blocks && len(b) > short {
		blocks = false
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl|unix.O_NONBLOCK); err != nil {
			return os.NewSyscallError("fcntl F_SETFL", err)
		}
		defer func() {
			_, ferr := unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl)
			err = errors.Join(err, os.NewSyscallError("fcntl F_SETFL", ferr))
		}()
	}
	last := time.Now()
	for done := 0; len(b) > 0; {
		n := 0
		ev, err := pollNow(fd, unix.POLLOUT)
		if err != nil {
			return err
		}
		if !blocks || ev&unix.POLLOUT != 0 {
			n, err = unix.Write(fd, b[:min(len(b), portion(done))])
			if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				return os.NewSyscallError("write", err)
			}
		}
		if n > 0 {
			b, done, last = b[n:], done+n, time.Now()
			if done == ttyBuffer-1 && len(b) > 0 {
				err = awaitFull(reader)
			}
			if err != nil {
				return err
			}
			continue
		}
		if time.Since(last) > ttyPatience {
			return fmt.Errorf("the terminal has no room for %d bytes", len(b))
		}
		time.Sleep(20 * time.Microsecond)
	}
	return nil
}

// portion is how much to write at once behind done bytes, so that as much fits as
// ever can: behind the buffer of n_tty there are buffers that hold twice what they
// count, of which those that count 8192 together, and one more, are made. None
// may be left half empty, nor half read (drivers/tty/tty_buffer.c).
func portion(done int) int {
	switch {
	case done < ttyBuffer-1:
		return (ttyBuffer-1-done-1)%1024 + 1
	case done < ttyBuffer-1+2*8192:
		return 1024
	}
	return 1792 // TTY_BUFFER_PAGE
}

// awaitFull waits, not for ever, until n_tty has taken what it holds.
func awaitFull(reader int) error {
	for start := time.Now(); time.Since(start) < ttyPatience/50; time.Sleep(20 * time.Microsecond) {
		if n, err := waiting(reader); err != nil || n >= ttyBuffer-1 {
			return err
		}
	}
	return nil
}

func readTTY(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return max(n, 0), os.NewSyscallError("read", err)
	}
}

// waiting is how much a terminal has to be read: of lines, only whole ones.
func waiting(fd int) (int, error) {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	return n, os.NewSyscallError("ioctl TIOCINQ", err)
}

func setTermios(fd int, t *unix.Termios) error {
	return os.NewSyscallError("ioctl TCSETS2", unix.IoctlSetTermios(fd, unix.TCSETS2, t))
}

// pollNow says which of the wanted events, or POLLHUP, a descriptor has.
func pollNow(fd int, want int16) (int16, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: want}}
	for {
		_, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return p[0].Revents & (want | unix.POLLHUP), os.NewSyscallError("poll", err)
	}
}
