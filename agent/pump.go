package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"godwit/transport"
)

// pump moves bytes between open files of this host and one end of a relay: what is
// read of in is sent, what comes is written to out. Either may be nil; of a socket
// or terminal they are the same. It can be halted and started again without a byte
// being lost or doubled.
type pump struct {
	relay *transport.Relay
	in    *os.File
	out   *os.File
	sock  bool
	tty   bool

	mu             sync.Mutex
	halted         chan struct{} // closed when the goroutines have to end
	wake, wakeOut  *os.File      // eventfds, readable when poll has to end
	running        sync.WaitGroup
	inDone, outEnd bool // nothing more is read, or written
}

// newPump makes a pump over files, which are its own from then on. A pipe or
// terminal is opened again: O_NONBLOCK belongs to a description that others share.
func newPump(relay *transport.Relay, files []*os.File, far bool) (*pump, error) {
	p := &pump{relay: relay}
	for _, f := range files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return nil, os.NewSyscallError("fstat", err)
		}
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err != nil {
			return nil, os.NewSyscallError("fcntl F_GETFL", err)
		}
		acc := flags & unix.O_ACCMODE
		if p.sock = st.Mode&unix.S_IFMT == unix.S_IFSOCK; p.sock {
			p.in, p.out = f, f
			continue
		}
		if p.tty = st.Mode&unix.S_IFMT == unix.S_IFCHR; p.tty {
			acc = unix.O_RDWR
		}
		if p.tty && p.out != nil {
			_ = f.Close()
			continue
		}
		if far { // nobody else has it
			if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, flags|unix.O_NONBLOCK); err != nil {
				return nil, os.NewSyscallError("fcntl F_SETFL", err)
			}
		} else {
			again, err := openFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), acc|unix.O_NONBLOCK)
			switch {
			case err == nil:
				_ = f.Close()
				f = again
			case !errors.Is(err, unix.ENXIO): // nobody reads it, so that no write blocks
				return nil, err
			}
		}
		if acc != unix.O_WRONLY {
			p.in = f
		}
		if acc != unix.O_RDONLY {
			p.out = f
		}
	}
	return p, nil
}

func eventfd() (*os.File, error) {
	n, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd2", err)
	}
	return os.NewFile(uintptr(n), "eventfd"), nil
}

func ring(f *os.File) {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(int(f.Fd()), one[:]) // it only fails if it was rung very often
}

// start lets the bytes flow.
func (p *pump) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.halted != nil {
		return nil
	}
	var err error
	if p.wake, err = eventfd(); err != nil {
		return err
	}
	if p.wakeOut, err = eventfd(); err != nil {
		_ = p.wake.Close()
		return err
	}
	p.halted = make(chan struct{})
	halted, wake, wakeOut := p.halted, p.wake, p.wakeOut
	if p.in != nil && !p.inDone {
		p.running.Go(func() { p.read(halted, wake) })
		p.running.Go(func() { // an idle read must end, too, if nobody wants more
			p.relay.PeerShut(halted)
			ring(wake)
		})
	}
	if p.out != nil && !p.outEnd {
		p.running.Go(func() { p.write(halted, wakeOut) })
		p.running.Go(func() { p.watch(wakeOut) })
	}
	return nil
}

// halt ends what start began. Afterwards nothing is read or written.
func (p *pump) halt() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.halted == nil {
		return
	}
	close(p.halted)
	ring(p.wake)
	ring(p.wakeOut)
	p.running.Wait()
	_, _ = p.wake.Close(), p.wakeOut.Close()
	p.halted = nil
}

// close halts the pump and closes its files.
func (p *pump) close() {
	p.halt()
	for _, f := range []*os.File{p.in, p.out} {
		if f != nil {
			_ = f.Close() // of a socket twice: the second changes nothing
		}
	}
}

// resize gives the terminal that the pump is behind another size.
func (p *pump) resize(size *unix.Winsize) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	// Not after close, when the number may be another file's.
	if p.out == nil || p.halted == nil {
		return os.ErrClosed
	}
	return os.NewSyscallError("ioctl TIOCSWINSZ", unix.IoctlSetWinsize(int(p.out.Fd()), unix.TIOCSWINSZ, size))
}

// poll waits until f is ready for events, or broken, or wake was rung (0).
func poll(f *os.File, events int16, wake *os.File) (int16, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: events}, {Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError("poll", err)
		case fds[1].Revents != 0:
			return 0, nil
		case fds[0].Revents != 0:
			return fds[0].Revents, nil
		}
	}
}

func (p *pump) read(halted <-chan struct{}, wake *os.File) {
	for {
		n := p.relay.Room(halted)
		if n == 0 {
			break
		}
		if ev, err := poll(p.in, unix.POLLIN, wake); err != nil || ev == 0 {
			break
		}
		if end, _ := p.take(min(n, maxRead)); end {
			p.inDone = true
			p.relay.Fin()
			break
		}
	}
	select {
	case <-halted:
	default: // it is over, or nobody wants more: whoever writes has to be told
		p.inDone = true
		p.endIn()
	}
}

// maxRead is how much one read takes, bytes: a pipe has 64 KiB.
const maxRead = 64 << 10

// take reads at most n bytes without waiting; end: there will be none any more.
func (p *pump) take(n int) (end, some bool) {
	b := make([]byte, n)
	for {
		var got int
		var err error
		if p.sock {
			got, _, err = unix.Recvfrom(int(p.in.Fd()), b, unix.MSG_DONTWAIT)
		} else {
			got, err = unix.Read(int(p.in.Fd()), b)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false, false
		case err != nil || got <= 0: // EIO: the other side of a terminal is gone
			return true, false
		}
		p.relay.Put(b[:got:got])
		return false, true
	}
}

// drain takes everything that is there. Preconditions: the pump is halted.
func (p *pump) drain() {
	if p.in == nil || p.inDone {
		return
	}
	p.relay.Flush(true)
	for {
		end, some := p.take(maxRead)
		if end {
			p.inDone = true
			p.relay.Fin()
		}
		if !some {
			return
		}
	}
}

// endIn closes what is read, if it is not written, too.
func (p *pump) endIn() {
	if p.in != p.out {
		_ = p.in.Close()
	} else if p.sock {
		_ = unix.Shutdown(int(p.in.Fd()), unix.SHUT_RD)
	}
}

func (p *pump) write(halted <-chan struct{}, wake *os.File) {
	for {
		b, fin, ok := p.relay.Next(halted)
		switch {
		case !ok:
			select {
			case <-halted:
			default:
				p.endOut(wake)
			}
			return
		case fin:
			p.endOut(wake)
			return
		}
		var n int
		var err error
		if p.sock {
			n, err = unix.SendmsgN(int(p.out.Fd()), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		} else {
			n, err = unix.Write(int(p.out.Fd()), b)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			if ev, err := poll(p.out, unix.POLLOUT, wake); err == nil && ev == 0 {
				select {
				case <-halted:
					return
				default:
				}
			}
			continue
		case err != nil: // nobody reads it any more
			p.endOut(wake)
			return
		}
		p.relay.Took(n)
	}
}

// endOut closes what is written, if it is not read, too, and says that no more is
// taken.
func (p *pump) endOut(wake *os.File) {
	p.outEnd = true
	ring(wake) // as long as watch waits for it in poll(2), it stays open
	switch {
	case p.in != p.out:
		_ = p.out.Close()
	case p.sock:
		_ = unix.Shutdown(int(p.out.Fd()), unix.SHUT_WR)
	}
	p.relay.Shut()
}

// watch looks whether what is written still has a reader, also while there is
// nothing to write.
func (p *pump) watch(wake *os.File) {
	if ev, err := poll(p.out, 0, wake); err == nil && ev != 0 {
		p.relay.Shut()
	}
}
