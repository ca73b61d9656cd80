package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// ttySide is one entry of tty-info.img: a terminal, or one side of a pseudoterminal.
type ttySide struct {
	e     *tty.TtyInfoEntry
	facts *image.TTYFacts // nil: none
	data  []byte          // what waits on this side
	at    []*description
}

// ttyMade is one pseudoterminal being made, or the terminal that stands for one.
type ttyMade struct {
	index         uint32
	master, slave *ttySide // either may be nil
	peer          *os.File // a slave of our own
	// hung: the master is gone. lent: it is outside of the tree.
	hung, lent bool
	far        *plan.Far // of one that is lent: the restore makes it, and the master goes there
}

// side is the one that tells of settings and session.
func (t *ttyMade) side() *ttySide {
	if t.slave != nil {
		return t.slave
	}
	return t.master
}

// maxPTY bounds the number of a pseudoterminal (kernel.pty.max, include/linux/devpts_fs.h).
const maxPTY = 1 << 20

// loadTTYs reads terminals and what waits in them.
func (r *Restorer) loadTTYs() error {
	es, err := image.All[*tty.TtyInfoEntry](r.set, image.TtyInfoFile)
	if err != nil {
		return err
	}
	r.ttySides = map[uint32]*ttySide{}
	for _, e := range es {
		if r.ttySides[e.GetId()] != nil {
			return fmt.Errorf("image %s: terminal %d is there twice", image.TtyInfoFile, e.GetId())
		}
		if err := checkTTYInfo(e); err != nil {
			return fmt.Errorf("image %s: terminal %d: %w", image.TtyInfoFile, e.GetId(), err)
		}
		r.ttySides[e.GetId()] = &ttySide{e: e}
	}
	ds, err := image.All[*tty.TtyDataEntry](r.set, image.TtyDataFile)
	if err != nil {
		return err
	}
	for _, e := range ds {
		s := r.ttySides[e.GetTtyId()]
		switch {
		case s == nil:
			return fmt.Errorf("image %s: there is no terminal %d", image.TtyDataFile, e.GetTtyId())
		case len(s.data)+len(e.GetData()) > maxQueue:
			return fmt.Errorf("image %s: more than %d bytes wait in terminal %d", image.TtyDataFile, maxQueue, e.GetTtyId())
		}
		s.data = append(s.data, e.GetData()...)
	}
	if r.set.Facts == nil {
		return nil
	}
	for i := range r.set.Facts.TTYs {
		f := &r.set.Facts.TTYs[i]
		for _, id := range []uint32{f.ID, f.Master} {
			if s := r.ttySides[id]; s != nil {
				s.facts = f
			}
		}
		if err := checkTTYFacts(f, r.ttySides[f.ID]); err != nil {
			return fmt.Errorf("%s: terminal %d: %w", image.FactsFile, f.ID, err)
		}
	}
	return nil
}

func checkTTYInfo(e *tty.TtyInfoEntry) error {
	for _, t := range []*tty.TermiosEntry{e.GetTermios(), e.GetTermiosLocked()} {
		if t == nil {
			continue
		}
		if n := len(t.GetCCc()); n < 17 || n > 32 {
			return fmt.Errorf("it has %d control characters", n)
		}
		if t.GetCLine() > 255 || slices.ContainsFunc(t.GetCCc(), func(c uint32) bool { return c > 255 }) {
			return errors.New("a control character or the line discipline is out of range")
		}
	}
	if t := e.GetTermios(); t != nil && t.GetCLine() != 0 {
		return fmt.Errorf("its line discipline %d is not carried", t.GetCLine())
	}
	if w := e.GetWinsize(); w != nil && max(w.GetWsRow(), w.GetWsCol(), w.GetWsXpixel(), w.GetWsYpixel()) > 1<<16-1 {
		return errors.New("its size is out of range")
	}
	if e.GetType() == tty.TtyType_PTY && (e.Pty == nil || e.GetPty().GetIndex() >= maxPTY) {
		return errors.New("its number is missing or out of range")
	}
	return nil
}

func checkTTYFacts(f *image.TTYFacts, s *ttySide) error {
	left := 0
	if s != nil {
		left = len(s.data)
	}
	if len(f.Input) > 2*ttyBuffer {
		return fmt.Errorf("its input is in %d pieces", len(f.Input))
	}
	for _, x := range f.Input {
		if x.Len < 0 || x.Len > left {
			return fmt.Errorf("a piece of its input has %d bytes, of %d", x.Len, left)
		}
		left -= x.Len
		switch x.End {
		case endLine, endEOF, endOpen, endRaw, endNew:
		default:
			return fmt.Errorf("a piece of its input ends in %q", x.End)
		}
	}
	switch {
	case len(f.Input) > 0 && left > 0:
		return fmt.Errorf("%d bytes of its input belong to no piece", left)
	case f.Stopped != "" && f.Stopped != stoppedByChar && f.Stopped != stoppedByCall:
		return fmt.Errorf("its output was stopped by %q", f.Stopped)
	}
	return nil
}

// ttyReg is the REG entry of a terminal's description, nil if it has none.
func (r *Restorer) ttyReg(x *description) *regfile.RegFileEntry {
	e := x.entry.GetTty()
	if e == nil || e.RegfId == nil {
		return nil
	}
	if y := r.byID[e.GetRegfId()]; y != nil {
		return y.entry.GetReg()
	}
	return nil
}

// current says whether a description was opened as /dev/tty.
func (r *Restorer) current(x *description) bool {
	return r.ttyReg(x).GetName() == "/dev/tty" || r.ttySides[x.entry.GetTty().GetTtyInfoId()].e.GetType() == tty.TtyType_CTTY
}

func isMaster(e *tty.TtyInfoEntry) bool { return uint64(e.GetRdev()) == devMaster }

func checkTTY(r *Restorer, x *description) error {
	e := x.entry.GetTty()
	s := r.ttySides[e.GetTtyInfoId()]
	if s == nil {
		return fmt.Errorf("image %s has no terminal %d", image.TtyInfoFile, e.GetTtyInfoId())
	}
	if e.RegfId != nil {
		reg := r.ttyReg(x)
		if reg == nil {
			return fmt.Errorf("its file entry %d is missing", e.GetRegfId())
		}
		if err := checkName(reg.GetName()); err != nil {
			return err
		}
		y := r.byID[e.GetRegfId()]
		if y.part != nil && y.part != x {
			return fmt.Errorf("its file entry %d is also that of file %d", e.GetRegfId(), y.part.id)
		}
		y.part = x
	}
	if e.GetFlags()&unix.O_ACCMODE == unix.O_ACCMODE {
		return errors.New("the access mode of a terminal is not possible")
	}
	switch s.e.GetType() {
	case tty.TtyType_PTY:
		if isMaster(s.e) && (len(s.at) > 0 || e.GetFlags()&unix.O_ACCMODE != unix.O_RDWR) {
			return fmt.Errorf("terminal %d has two masters, or one that is not open for reading and writing", s.e.GetPty().GetIndex())
		}
	case tty.TtyType_EXT_TTY:
		if r.handed[extTTYKey(s.e)] == nil {
			return fmt.Errorf("external terminal %s was not handed in: supply it, such as --inherit-fd fd[4]:%s with the terminal open as descriptor 4", extTTYKey(s.e), extTTYKey(s.e))
		}
	case tty.TtyType_CTTY:
	case tty.TtyType_VT, tty.TtyType_CONSOLE, tty.TtyType_SERIAL:
		if r.ttyReg(x) == nil {
			return errors.New("its path is missing")
		}
	default:
		return fmt.Errorf("terminals of type %s are not carried", s.e.GetType())
	}
	s.at = append(s.at, x)
	return nil
}

func extTTYKey(e *tty.TtyInfoEntry) string {
	return fmt.Sprintf("tty[%x:%x]", e.GetRdev(), e.GetDev())
}

// planTTYs puts the sides of pseudoterminals together.
func (r *Restorer) planTTYs() error {
	byIndex := map[uint32]*ttyMade{}
	for _, s := range r.ttySides {
		if s.e.GetType() != tty.TtyType_PTY {
			continue
		}
		t := byIndex[s.e.GetPty().GetIndex()]
		if t == nil {
			t = &ttyMade{index: s.e.GetPty().GetIndex()}
			byIndex[t.index] = t
			r.ttys = append(r.ttys, t)
		}
		to := &t.slave
		if isMaster(s.e) {
			to = &t.master
		}
		if *to != nil {
			return fmt.Errorf("image %s has terminal %d twice", image.TtyInfoFile, t.index)
		}
		*to = s
	}
	slices.SortFunc(r.ttys, func(a, b *ttyMade) int { return int(a.index) - int(b.index) })
	lent := 0
	for _, t := range r.ttys {
		switch {
		case t.master != nil && len(t.master.at) > 0:
			if t.side().e.Termios == nil {
				return fmt.Errorf("image %s has no settings of terminal %d", image.TtyInfoFile, t.index)
			}
		case t.slave == nil || len(t.slave.at) == 0:
			return fmt.Errorf("image %s has a terminal %d that nothing refers to", image.TtyInfoFile, t.index)
		case t.slave.e.Termios == nil:
			t.hung = true
		case r.far(extTTYKey(t.slave.e)) != nil:
			t.lent, t.far = true, r.far(extTTYKey(t.slave.e))
		default:
			t.lent = true
			lent++
			if err := r.checkLent(t); err != nil {
				return fmt.Errorf("%s: %w", r.who(t.slave.at[0]), err)
			}
		}
	}
	if lent > 1 {
		return errors.New("the tree had several terminals that were not part of it; only one can be replaced")
	}
	return r.planCurrent()
}

// planCurrent finds the terminals of CRIU's entries of /dev/tty, by session.
func (r *Restorer) planCurrent() error {
	for _, s := range r.ttySides {
		if s.e.GetType() != tty.TtyType_CTTY {
			continue
		}
		i := slices.IndexFunc(r.ttys, func(t *ttyMade) bool {
			return t.slave != nil && s.e.GetSid() != 0 && t.slave.e.GetSid() == s.e.GetSid()
		})
		if i < 0 {
			return fmt.Errorf("image %s has a /dev/tty of session %d, which has no terminal there", image.TtyInfoFile, s.e.GetSid())
		}
		r.ttys[i].slave.at = append(r.ttys[i].slave.at, s.at...)
	}
	return nil
}

// checkLent says whether the terminal that stands for an outside one is there.
func (r *Restorer) checkLent(*ttyMade) error {
	if !r.opts.ShellJob {
		return errors.New("its terminal is not among the images: restore with --shell-job on a terminal")
	}
	if r.opts.Terminal == nil {
		return errors.New("--shell-job needs a terminal as standard input")
	}
	if _, err := unix.IoctlGetTermios(int(r.opts.Terminal.Fd()), unix.TCGETS); err != nil {
		return fmt.Errorf("--shell-job needs a terminal as standard input: %w", os.NewSyscallError("ioctl TCGETS", err))
	}
	return nil
}

// MakesTerminals says whether images have pseudoterminals that are to be made.
func MakesTerminals(set *image.Set) bool {
	return slices.ContainsFunc(set.Entries(image.TtyInfoFile), func(e image.Entry) bool {
		m, ok := e.Msg.(*tty.TtyInfoEntry)
		return ok && isMaster(m)
	})
}

// OpenTerminals makes the pseudoterminals. It may be called before Open, and must
// be before sessions are begun that they are the terminals of (Session): only what
// is born afterwards has them.
func (r *Restorer) OpenTerminals() error {
	if r.ttysOpen {
		return nil
	}
	r.ttysOpen = true
	var errs []error
	for _, t := range r.ttys {
		make := r.makePTY
		switch {
		case t.far != nil:
			make = r.makeFarPTY
		case t.lent:
			continue
		}
		if err := make(t); err != nil {
			errs = append(errs, fmt.Errorf("%s: make terminal %d again: %w", r.who(t.side().at0()), t.index, err))
		}
	}
	return list("make the terminals of the tree", errs)
}

// at0 is a description for messages.
func (s *ttySide) at0() *description {
	if len(s.at) == 0 {
		return &description{entry: &fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum()}}
	}
	return s.at[0]
}

func (r *Restorer) makePTY(t *ttyMade) error {
	path := "/dev/ptmx"
	if t.master != nil && !t.hung {
		if reg := r.ttyReg(t.master.at[0]); reg != nil {
			path = reg.GetName()
		}
	}
	m, err := r.openMaster(path, t.index, t.hung)
	if err != nil {
		return err
	}
	if !t.hung {
		t.master.at[0].file = m
	} else {
		defer func() { _ = m.Close() }()
	}
	mfd := int(m.Fd())
	if err := unix.IoctlSetPointerInt(mfd, unix.TIOCSPTLCK, 0); err != nil {
		return os.NewSyscallError("ioctl TIOCSPTLCK", err)
	}
	peer, err := sys.OpenPTYPeer(mfd, unix.O_RDWR|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	t.peer = os.NewFile(uintptr(peer), "slave")
	if t.hung {
		defer func() { _ = t.peer.Close(); t.peer = nil }()
	}
	if err := r.ownPTY(t, t.peer); err != nil {
		return err
	}
	if t.slave != nil {
		for _, x := range t.slave.at {
			if r.current(x) {
				continue // by a process of the session
			}
			if err := openSlave(mfd, x); err != nil {
				return err
			}
		}
	}
	if t.hung {
		return nil
	}
	if err := r.fillPTY(t, mfd); err != nil {
		return err
	}
	return setStatus(m, t.master.at[0].entry.GetTty().GetFlags())
}

// makeFarPTY makes a terminal of which the tree has the slave alone, of any number.
func (r *Restorer) makeFarPTY(t *ttyMade) error {
	var err error
	if t.far.File, t.peer, err = NewPTY(); err != nil {
		return err
	}
	m := int(t.far.File.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(int(t.peer.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	t.far.Key = ttyKey(&st)
	return errors.Join(r.ownPTY(t, t.peer), r.fillPTY(t, m))
}

// NewPTY makes a pseudoterminal; the slave does not block. The caller closes both
// ends.
func NewPTY() (master, slave *os.File, err error) {
	// Not among Go's pollable files: they would be left in non-blocking mode, or not.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	n := -1
	if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		err = os.NewSyscallError("ioctl TIOCSPTLCK", err)
	} else {
		n, err = sys.OpenPTYPeer(fd, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, os.NewFile(uintptr(n), "the terminal"), nil
}

// terminal is what stands for one that is outside of the tree.
func (r *Restorer) terminal(t *ttyMade) *os.File {
	if t.far != nil {
		return t.peer
	}
	return r.opts.Terminal
}

func openSlave(m int, x *description) error {
	flags := x.entry.GetTty().GetFlags()
	fd, err := sys.OpenPTYPeer(m, reopenFlags(int(flags), false)&^unix.O_CLOEXEC|int(flags)&unix.O_CLOEXEC|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	x.file = os.NewFile(uintptr(fd), "slave")
	return setStatus(x.file, flags)
}

// openMaster makes a new pseudoterminal of a number. The kernel gives the lowest
// that is free, so that the lower ones are taken meanwhile.
func (r *Restorer) openMaster(path string, index uint32, otherwise bool) (*os.File, error) {
	base, err := r.opts.Open(path, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = base.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(base.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || uint64(st.Rdev) != devMaster {
		return nil, fmt.Errorf("%s is not the device that makes terminals (5:2)", path)
	}
	var lower []*os.File
	defer func() {
		for _, f := range lower {
			_ = f.Close()
		}
	}()
	for start := time.Now(); ; {
		f, err := r.opts.Open(path, unix.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return nil, fmt.Errorf("make a terminal: %w", err)
		}
		n, err := unix.IoctlGetUint32(int(f.Fd()), unix.TIOCGPTN)
		if err != nil {
			_ = f.Close()
			return nil, os.NewSyscallError("ioctl TIOCGPTN", err)
		}
		switch {
		case n == index:
			return f, nil
		case n < index:
			lower = append(lower, f)
			continue
		case otherwise:
			return f, nil
		}
		_ = f.Close()
		// Terminals of a tree that was just killed may be about to go.
		if time.Since(start) > ttyTaken {
			return nil, errors.New(terminalTaken(fmt.Sprintf("/dev/pts/%d", index)) + ": " + terminalTakenHint)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ttyTaken is how long a restore waits for the number of a terminal.
const ttyTaken = 3 * time.Second

func terminalTaken(path string) string {
	return fmt.Sprintf("%s is in use here, and the tree needs a terminal of that number", path)
}

const terminalTakenHint = "end the program that has it, or land the tree in a pid namespace of its own (--pid-namespace new), which has its own /dev/pts"

// ownPTY gives the slave's node its owner and permissions.
func (r *Restorer) ownPTY(t *ttyMade, slave *os.File) error {
	s := t.side()
	var st unix.Stat_t
	fd := int(slave.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if s.e.Uid != nil && s.e.Gid != nil && (st.Uid != s.e.GetUid() || st.Gid != s.e.GetGid()) {
		if err := unix.Fchown(fd, int(s.e.GetUid()), int(s.e.GetGid())); err != nil {
			return os.NewSyscallError("fchown", err)
		}
	}
	mode := st.Mode & 0o7777
	if s.facts != nil && s.facts.Mode != 0 {
		mode = s.facts.Mode & 0o7777
	}
	if mode == st.Mode&0o7777 {
		return nil
	}
	return os.NewSyscallError("fchmod", unix.Fchmod(fd, mode))
}

// fillPTY gives a new pair its settings, its size and what waited in it.
func (r *Restorer) fillPTY(t *ttyMade, m int) error {
	s := t.side()
	if w := s.e.GetWinsize(); w != nil {
		ws := unix.Winsize{Row: uint16(w.GetWsRow()), Col: uint16(w.GetWsCol()), Xpixel: uint16(w.GetWsXpixel()), Ypixel: uint16(w.GetWsYpixel())}
		if err := unix.IoctlSetWinsize(m, unix.TIOCSWINSZ, &ws); err != nil {
			return os.NewSyscallError("ioctl TIOCSWINSZ", err)
		}
	}
	p := &ptyPair{m: m, s: int(t.peer.Fd()), termios: ttySettingsOf(s.e.GetTermios())}
	q := &ttyQueues{}
	if t.master != nil {
		p.packet, q.out = t.master.e.GetPacketMode(), t.master.data
	}
	if s.facts != nil {
		q.stopped = s.facts.Stopped
	}
	if t.slave != nil {
		q.in = t.slave.pieces(p.canonical())
	}
	if err := p.put(q); err != nil {
		return err
	}
	if l := ttySettingsOf(s.e.GetTermiosLocked()); l != (unix.Termios{}) {
		if err := unix.IoctlSetTermios(p.s, unix.TIOCSLCKTRMIOS, &l); err != nil {
			return os.NewSyscallError("ioctl TIOCSLCKTRMIOS", err)
		}
	}
	return nil
}

func ttySettingsOf(e *tty.TermiosEntry) unix.Termios {
	t := unix.Termios{Iflag: e.GetCIflag(), Oflag: e.GetCOflag(), Cflag: e.GetCCflag(), Lflag: e.GetCLflag(), Line: uint8(e.GetCLine()),
		Ispeed: e.GetCIspeed(), Ospeed: e.GetCOspeed()}
	for i, c := range e.GetCCc() {
		if i < len(t.Cc) {
			t.Cc[i] = uint8(c)
		}
	}
	return t
}

// pieces gives a slave's input in pieces. Without facts, lines end in newlines.
func (s *ttySide) pieces(canonical bool) []piece {
	var out []piece
	rest := s.data
	cut := func(n int, end string) {
		out = append(out, piece{data: rest[:n], end: end})
		rest = rest[n:]
	}
	if s.facts != nil && len(s.facts.Input) > 0 {
		for _, x := range s.facts.Input {
			cut(x.Len, x.End)
		}
		return out
	}
	for len(rest) > 0 {
		n := slices.Index(rest, '\n') + 1
		switch {
		case !canonical:
			cut(len(rest), endRaw)
		case n == 0:
			cut(len(rest), endOpen)
		default:
			cut(n, endLine)
		}
	}
	return out
}

// openTTYs opens what OpenTerminals and Sessions did not.
func openTTYs(r *Restorer, xs []*description) []error {
	if err := r.OpenTerminals(); err != nil {
		return []error{err}
	}
	return openEach(openTTY)(r, xs)
}

func openTTY(r *Restorer, x *description) error {
	if x.file != nil {
		return nil
	}
	flags := x.entry.GetTty().GetFlags()
	s := r.ttySides[x.entry.GetTty().GetTtyInfoId()]
	var err error
	switch s.e.GetType() {
	case tty.TtyType_EXT_TTY:
		in := r.handed[extTTYKey(s.e)]
		if in.Forward {
			return r.forward(x, in)
		}
		x.file, err = reopenTTY(in.File, flags)
	case tty.TtyType_VT, tty.TtyType_CONSOLE, tty.TtyType_SERIAL:
		return r.openLine(x, s)
	default:
		t := r.ttyOf(x)
		switch {
		case t == nil:
			return errors.New("its terminal is missing")
		case t.lent && r.current(x):
			x.file, err = openPath("/dev/tty", reopenFlags(int(flags), false)|unix.O_NONBLOCK, 0)
		case t.lent:
			x.file, err = reopenTTY(r.terminal(t), flags)
		case t.hung:
			return errors.New("it was opened as /dev/tty and has hung up")
		default: // as /dev/tty, by the leader of its session
			return nil
		}
	}
	if err != nil {
		return hinted(err)
	}
	return setStatus(x.file, flags)
}

// reopenTTY opens a terminal again. One that was opened as /dev/tty opens what that
// is for this process.
func reopenTTY(f *os.File, flags uint32) (*os.File, error) {
	again, err := reopen(f, reopenFlags(int(flags), false)|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	is, err := unix.IoctlGetUint32(int(again.Fd()), unix.TIOCGDEV)
	if err == nil {
		var want uint32
		if want, err = unix.IoctlGetUint32(int(f.Fd()), unix.TIOCGDEV); err == nil && is != want {
			err = errors.New("the terminal was opened as /dev/tty in another session: open it by its name")
		}
	}
	if err != nil {
		_ = again.Close()
		return nil, err
	}
	return again, nil
}

// ttyOf is the pseudoterminal of a description of a slave.
func (r *Restorer) ttyOf(x *description) *ttyMade {
	i := slices.IndexFunc(r.ttys, func(t *ttyMade) bool { return t.slave != nil && slices.Contains(t.slave.at, x) })
	if i < 0 {
		return nil
	}
	return r.ttys[i]
}

// openLine opens a console or serial line by its path and gives it its settings.
func (r *Restorer) openLine(x *description, s *ttySide) error {
	reg := r.ttyReg(x)
	base, err := r.opts.Open(reg.GetName(), unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer func() { _ = base.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(base.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: base.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || uint32(st.Rdev) != s.e.GetRdev() {
		return fmt.Errorf("%s is not terminal %d:%d here", reg.GetName(), unix.Major(uint64(s.e.GetRdev())), unix.Minor(uint64(s.e.GetRdev())))
	}
	flags := x.entry.GetTty().GetFlags()
	if x.file, err = reopen(base, reopenFlags(int(flags), false)|unix.O_NONBLOCK); err != nil {
		return hinted(err)
	}
	if s.e.Termios != nil {
		t := ttySettingsOf(s.e.GetTermios())
		now, err := unix.IoctlGetTermios(int(x.file.Fd()), unix.TCGETS2)
		if err != nil {
			return os.NewSyscallError("ioctl TCGETS2", err)
		}
		if *now != t {
			if err := setTermios(int(x.file.Fd()), &t); err != nil {
				return err
			}
		}
	}
	return setStatus(x.file, flags)
}

// sealTTYs does what would keep a terminal from being opened, and gives the
// terminal that stands for an outside one the settings of that.
func sealTTYs(r *Restorer, _ []*description) []error {
	var errs []error
	do := func(t *ttyMade, what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("terminal %d: %s: %w", t.index, what, err))
		}
	}
	for _, t := range r.ttys {
		switch {
		case t.far != nil:
			continue
		case t.lent:
			want := ttySettingsOf(t.slave.e.GetTermios())
			do(t, "settings", setTermios(int(r.opts.Terminal.Fd()), &want))
			if r.opts.TerminalOwned {
				do(t, "owner", r.ownPTY(t, r.opts.Terminal))
			}
			continue
		case t.hung:
			continue
		}
		m := int(t.master.at[0].file.Fd())
		if t.slave != nil {
			for _, x := range t.slave.at {
				if x.file == nil { // of a session that is not there any more
					do(t, "open it", openSlave(m, x))
				}
			}
		}
		if t.slave != nil && t.slave.e.GetExclusive() {
			do(t, "exclusive mode", unix.IoctlSetInt(int(t.peer.Fd()), unix.TIOCEXCL, 0))
		}
		if t.master.e.GetExclusive() {
			do(t, "exclusive mode of the master", unix.IoctlSetInt(m, unix.TIOCEXCL, 0))
		}
		if t.master.e.GetLocked() {
			do(t, "lock", unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 1))
		}
	}
	return errs
}

// Session is what the leader of a session does to get its controlling terminal.
type Session struct {
	Terminal *os.File // the Restorer's
	lent     bool
	current  []*description
	r        *Restorer
}

// Session gives the controlling terminal of a session that a process of the tree
// leads, by the pid in the images; nil if it has none. OpenTerminals was called.
func (r *Restorer) Session(sid int) *Session {
	for _, t := range r.ttys {
		if t.hung || sid == 0 || int(t.side().e.GetSid()) != sid {
			continue
		}
		s := &Session{Terminal: t.peer, lent: t.lent, r: r}
		if t.lent {
			s.Terminal = r.terminal(t)
		}
		if t.slave != nil {
			for _, x := range t.slave.at {
				if r.current(x) {
					s.current = append(s.current, x)
				}
			}
		}
		return s
	}
	return nil
}

// Calls are for the leader, which has the terminal open as fd: they make it the
// controlling one, and open it as /dev/tty where the tree had done so.
func (s *Session) Calls(fd int) []*ptrace.Call {
	how := 0
	if s.lent {
		how = 1 // also from the session that it belongs to now
	}
	out := []*ptrace.Call{ptrace.NewCall("take the controlling terminal", unix.SYS_IOCTL, ptrace.Int(fd), ptrace.Int(unix.TIOCSCTTY), ptrace.Int(how))}
	for _, x := range s.current {
		flags := reopenFlags(int(x.entry.GetTty().GetFlags()), false) | unix.O_NONBLOCK
		out = append(out, ptrace.NewCall("open /dev/tty", unix.SYS_OPENAT, ptrace.Int(unix.AT_FDCWD), ptrace.Str("/dev/tty"), ptrace.Int(flags)))
	}
	return out
}

// Take takes over what Calls opened in the leader, whose pid on this host is pid,
// and says what it has to close.
func (s *Session) Take(pid int, calls []*ptrace.Call) ([]int, error) {
	if len(s.current) == 0 {
		return nil, nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	var out []int
	for i, x := range s.current {
		fd := int(calls[1+i].Ret)
		out = append(out, fd)
		n, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			return out, os.NewSyscallError("pidfd_getfd", err)
		}
		if x.file != nil {
			_ = x.file.Close()
		}
		x.file = os.NewFile(uintptr(n), "/dev/tty")
		if err := setStatus(x.file, x.entry.GetTty().GetFlags()); err != nil {
			return out, err
		}
	}
	return out, nil
}

// Foreground is who uses a controlling terminal. Pids are as in the images.
type Foreground struct {
	Terminal *os.File // the Restorer's
	Sid      int
	Pgrp     int   // 0: none
	Without  []int // processes of the session that have given it up
	// Lent: it stands for a terminal outside of the tree. Resized: its size is
	// not that of the one that it stands for.
	Lent, Resized bool
}

// Foregrounds lists the controlling terminals.
func (r *Restorer) Foregrounds() []Foreground {
	var out []Foreground
	for _, t := range r.ttys {
		s := t.side()
		if t.hung || s.e.GetSid() == 0 {
			continue
		}
		f := Foreground{Terminal: t.peer, Sid: int(s.e.GetSid()), Pgrp: int(s.e.GetPgrp()), Lent: t.lent}
		if t.lent {
			f.Terminal = r.terminal(t)
			w, err := unix.IoctlGetWinsize(int(f.Terminal.Fd()), unix.TIOCGWINSZ)
			was := s.e.GetWinsize()
			f.Resized = err == nil && was != nil && (uint32(w.Row) != was.GetWsRow() || uint32(w.Col) != was.GetWsCol())
		}
		if s.facts != nil {
			for _, pid := range s.facts.Without {
				f.Without = append(f.Without, int(pid))
			}
		}
		out = append(out, f)
	}
	return out
}

func (r *Restorer) closeTTYs() error {
	var errs []error
	for _, t := range r.ttys {
		if t.peer != nil {
			errs = append(errs, t.peer.Close())
			t.peer = nil
		}
	}
	return errors.Join(errs...)
}
