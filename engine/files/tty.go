package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
	"godwit/engine/sys"
)

// kindTTY carries terminals. A pseudoterminal of which the tree has the master
// travels with all that it is: settings, size, what waits in it, whose controlling
// terminal it is and which group is in the foreground. Of one of which the master
// is outside (the terminal that the tree was started on) only the settings do; the
// restore uses another one in its place, if that was asked for, or makes one whose
// master goes to its caller (proxied). Consoles and serial lines are opened again.
//
// A description has two entries: TTY, which descriptors name, and a REG with its
// path. The terminal has one in tty-info.img, and each side of a pseudoterminal its own.
var kindTTY = &kind{
	name: "terminal", typ: fdinfo.FdTypes_TTY,
	takes: func(_ *Dumper, o *object) bool {
		if o.mode()&unix.S_IFMT != unix.S_IFCHR || o.isPath() || !strings.HasPrefix(o.link, "/") {
			return false
		}
		rdev := uint64(o.stat.Rdev)
		return isSlave(rdev) || rdev == devMaster || rdev == devCurrent || isTTY(o)
	},
	dump:   dumpTTY,
	finish: finishTTYs,
	check:  checkTTY,
	open:   openTTYs,
	seal:   sealTTYs,
}

// Device numbers (Documentation/admin-guide/devices.txt).
var (
	devCurrent = unix.Mkdev(5, 0) // /dev/tty
	devConsole = unix.Mkdev(5, 1)
	devMaster  = unix.Mkdev(5, 2) // /dev/ptmx
)

// isSlave says whether rdev is a slave of a pseudoterminal. Only majors 136 to 143
// are used, of which 136 has all.
func isSlave(rdev uint64) bool { m := unix.Major(rdev); return m >= 136 && m <= 143 }

// ptyIndex is the number of a slave.
func ptyIndex(rdev uint64) uint32 { return (unix.Major(rdev)-136)<<20 | unix.Minor(rdev) }

// ttyState is what one description says about its terminal.
type ttyState struct {
	master  bool
	current bool   // opened as /dev/tty
	hung    bool   // the master is gone
	dev     uint64 // of the terminal; of a pseudoterminal, of its slave
	node    unix.Stat_t
	hasNode bool   // node is the slave's
	path    string // of the slave, if this is its master
}

// terminal is one terminal of the tree.
type terminal struct {
	dev    uint64
	fs     uint64 // file system of the slaves' nodes; 0: of none
	master *object
	others []*object
	id     uint32 // in tty-info.img, of the slave
	// proxied is its key, if its master stays where it is.
	proxied string
	info    *tty.TtyInfoEntry
	facts   *image.TTYFacts
	path    string // of its slave, if the restore makes it
}

func (t *terminal) all() []*object {
	if t.master == nil {
		return t.others
	}
	return append([]*object{t.master}, t.others...)
}

func dumpTTY(d *Dumper, o *object) error {
	s := &ttyState{dev: uint64(o.stat.Rdev)}
	o.state = s
	fd := int(o.file.Fd())
	switch rdev := uint64(o.stat.Rdev); {
	case rdev == devMaster:
		s.master = true
		if o.flags&unix.O_ACCMODE != unix.O_RDWR {
			d.refuse(o, "it is the master of a terminal, but not open for reading and writing", "let the program open it for both")
			return nil
		}
		peer, err := sys.OpenPTYPeer(fd, unix.O_PATH)
		if err != nil {
			return err
		}
		f := hold(peer, "slave")
		defer release(f)
		if err := unix.Fstat(peer, &s.node); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		s.dev, s.hasNode = uint64(s.node.Rdev), true
		s.path, err = procfs.FdLink(os.Getpid(), peer)
		if err != nil {
			return err
		}
	case !isTTY(o):
		s.hung = true
		s.node, s.hasNode = o.stat, rdev != devCurrent
		if rdev == devCurrent {
			d.refuse(o, "the terminal was opened as /dev/tty and has hung up since", "let the program close it")
		}
		return nil
	case rdev == devCurrent:
		s.current = true
		dev, err := unix.IoctlGetUint32(fd, unix.TIOCGDEV)
		if err != nil {
			return os.NewSyscallError("ioctl TIOCGDEV", err)
		}
		s.dev = uint64(dev)
	case isSlave(rdev):
		s.node, s.hasNode = o.stat, true
	default:
		o.path = o.link // a console or serial line
	}
	if n, err := unix.IoctlGetInt(fd, unix.TIOCGETD); err != nil {
		return os.NewSyscallError("ioctl TIOCGETD", err)
	} else if n != 0 {
		d.refuse(o, fmt.Sprintf("the terminal has line discipline %d", n), "end the program that set it, such as pppd or slattach")
	}
	return nil
}

// finishTTYs puts both sides of pseudoterminals together and looks at whole terminals.
func finishTTYs(d *Dumper, os []*object) error {
	terms := d.groupTTYs(os)
	procs, err := d.terminalUsers()
	if err != nil {
		return err
	}
	inTree := map[uint32]*terminal{}
	var lent []*terminal
	for _, t := range terms {
		if t.master != nil || t.others[0].state.(*ttyState).hung {
			if have := inTree[ptyIndex(t.dev)]; have != nil {
				d.refuse(t.all()[0], fmt.Sprintf("it is a terminal of the same number, %d, as another one of the tree", ptyIndex(t.dev)), "end one of the two programs")
				continue
			}
			inTree[ptyIndex(t.dev)] = t
		} else if !d.externalTTY(t) && isSlave(t.dev) && !d.proxiedTTY(t) {
			lent = append(lent, t)
		}
		if err := d.dumpTerminal(t, procs); err != nil {
			return err
		}
	}
	for i, t := range lent {
		switch {
		case !d.opts.ShellJob:
			for _, o := range t.others {
				d.lacks(o, "its terminal is not part of the tree",
					d.terminalHint()+"; or declare it external: --external "+ttyKey(&t.others[0].stat))
			}
		case i > 0:
			for _, o := range t.others {
				d.lacks(o, "it is a second terminal that is not part of the tree, of which one alone is carried",
					"declare it external: --external "+ttyKey(&t.others[0].stat))
			}
		}
	}
	d.terminals = terms
	return nil
}

// terminalHint says how a tree gets another terminal.
func (d *Dumper) terminalHint() string {
	if d.opts.Elsewhere {
		return "move it from the terminal that it is to use from then on, with --attach, or let its bytes go on flowing: --external kind:tty=proxy"
	}
	return "dump with --shell-job, and restore with it on the terminal to use in its place"
}

// groupTTYs finds the terminals of descriptions.
func (d *Dumper) groupTTYs(os []*object) []*terminal {
	type place struct {
		fs, dev uint64
	}
	var out []*terminal
	byPlace := map[place]*terminal{}
	at := func(k place) *terminal {
		if byPlace[k] == nil {
			byPlace[k] = &terminal{dev: k.dev, fs: k.fs}
			out = append(out, byPlace[k])
		}
		return byPlace[k]
	}
	var current []*object
	for _, o := range os {
		s, ok := o.state.(*ttyState)
		if !ok || o.refused {
			continue
		}
		switch {
		case s.current:
			current = append(current, o)
		case s.master:
			t := at(place{uint64(s.node.Dev), s.dev})
			t.master, t.path = o, s.path
		case s.hasNode:
			t := at(place{uint64(o.stat.Dev), s.dev})
			t.others = append(t.others, o)
		default:
			t := at(place{0, s.dev})
			t.others = append(t.others, o)
		}
	}
	// What was opened as /dev/tty tells the number of its terminal only.
	for _, o := range current {
		s := o.state.(*ttyState)
		var of *terminal
		for _, t := range out {
			if t.dev != s.dev {
				continue
			}
			if of != nil {
				d.refuse(o, "it was opened as /dev/tty, and there are several terminals of its number", "let the program close it")
				break
			}
			of = t
		}
		if o.refused {
			continue
		}
		if of == nil {
			of = at(place{0, s.dev})
		}
		of.others = append(of.others, o)
	}
	for _, t := range out {
		t.nameCurrent()
	}
	return out
}

// nameCurrent gives what was opened as /dev/tty the key of the terminal, if that is
// outside of the tree and was opened by its own name, too.
func (t *terminal) nameCurrent() {
	i := slices.IndexFunc(t.others, func(o *object) bool { return o.state.(*ttyState).hasNode })
	if t.master != nil || i < 0 {
		return
	}
	for _, o := range t.others {
		if o.state.(*ttyState).current {
			o.ttyKey = ttyKey(&t.others[i].stat)
		}
	}
}

// terminalUser is a process of the tree that has a controlling terminal, or whose
// session has one.
type terminalUser struct {
	pid, vpid   int
	comm        string
	sid, vsid   int
	dev         uint64 // 0: it has none
	foreground  int    // process group, on this host
	leaderIsOur bool
}

// terminalUsers lists the processes of the tree with their controlling terminals.
func (d *Dumper) terminalUsers() ([]terminalUser, error) {
	var out []terminalUser
	for pid := range d.inside {
		st, err := procfs.ReadStat(pid)
		if procfs.Gone(err) && d.dry() {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the terminal of pid %d: %w", pid, err)
		}
		status, err := procfs.ReadStatus(pid)
		if procfs.Gone(err) && d.dry() {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the session of pid %d: %w", pid, err)
		}
		if st.Zombie() || len(status.NSsid) == 0 {
			continue
		}
		out = append(out, terminalUser{pid: pid, vpid: status.NSPid(), comm: st.Comm, sid: st.Session, vsid: status.NSsid[len(status.NSsid)-1],
			dev: uint64(uint32(st.TTYNr)), foreground: st.TTYPgrp, leaderIsOur: d.inside[st.Session]})
	}
	slices.SortFunc(out, func(a, b terminalUser) int { return a.pid - b.pid })
	return out, nil
}

// checkSessions refuses sessions of the tree that would lose their controlling
// terminal: nobody has it open, and its master is outside. Those whose leader is
// outside too become other ones anyway.
func (d *Dumper) checkSessions() error {
	if d.opts.ShellJob {
		return nil
	}
	procs, err := d.terminalUsers()
	if err != nil {
		return err
	}
	for _, p := range procs {
		if p.pid != p.sid || p.dev == 0 || slices.ContainsFunc(d.terminals, func(t *terminal) bool { return t.dev == p.dev }) {
			continue
		}
		d.refusal.Add(refuse.Problem{Pid: p.pid, Comm: p.comm,
			Reason: fmt.Sprintf("its controlling terminal, device %d:%d, is not part of the tree", unix.Major(p.dev), unix.Minor(p.dev)),
			Hint:   d.terminalHint()})
	}
	return nil
}

// dumpTerminal makes the entries of one terminal and its descriptions.
func (d *Dumper) dumpTerminal(t *terminal, procs []terminalUser) error {
	first := t.all()[0]
	s := first.state.(*ttyState)
	t.id = d.newTTY()
	t.info = &tty.TtyInfoEntry{
		Id: proto.Uint32(t.id), Type: ttyType(t.dev).Enum(), Rdev: proto.Uint32(uint32(t.dev)),
		Locked: proto.Bool(false), Exclusive: proto.Bool(false), PacketMode: proto.Bool(false), Sid: proto.Uint32(0), Pgrp: proto.Uint32(0),
	}
	if first.ext {
		t.info.Type = tty.TtyType_EXT_TTY.Enum()
	}
	t.facts = &image.TTYFacts{ID: t.id}
	if isSlave(t.dev) {
		t.info.Pty = &tty.TtyPtyEntry{Index: proto.Uint32(ptyIndex(t.dev))}
	}
	for _, o := range t.all() {
		if s := o.state.(*ttyState); s.hasNode {
			t.info.Dev, t.info.Uid, t.info.Gid = proto.Uint32(uint32(s.node.Dev)), proto.Uint32(s.node.Uid), proto.Uint32(s.node.Gid)
			t.facts.Mode = s.node.Mode & 0o7777
		}
	}
	if first.ext { // as its key has them
		t.info.Rdev, t.info.Dev = proto.Uint32(uint32(first.stat.Rdev)), proto.Uint32(uint32(first.stat.Dev))
	}
	if t.master != nil {
		if x, ok := d.terminalOutside(t); ok {
			for _, o := range t.all() {
				d.refuse(o, fmt.Sprintf("the terminal is also used by pid %d (%s), outside the tree", x.pid, x.comm), "include that process in the tree, or end it")
			}
			return nil
		}
	}
	if s.hung {
		return d.putTerminal(t)
	}
	fd := int(first.file.Fd())
	if err := ttySettings(fd, t.info); err != nil {
		return err
	}
	d.ttySession(t, procs)
	if err := d.proxiedInput(t); err != nil {
		return err
	}
	if t.master != nil {
		if err := d.dumpPair(t); err != nil || t.master.refused {
			return err
		}
	}
	return d.putTerminal(t)
}

func ttyType(dev uint64) tty.TtyType {
	switch {
	case isSlave(dev):
		return tty.TtyType_PTY
	case dev == devConsole:
		return tty.TtyType_CONSOLE
	case unix.Major(dev) == 4 && unix.Minor(dev) < 64:
		return tty.TtyType_VT
	}
	return tty.TtyType_SERIAL
}

// ttySettings reads settings and size of a terminal.
func ttySettings(fd int, e *tty.TtyInfoEntry) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS2)
	if err != nil {
		return os.NewSyscallError("ioctl TCGETS2", err)
	}
	e.Termios = termiosEntry(t)
	if t, err = unix.IoctlGetTermios(fd, unix.TIOCGLCKTRMIOS); err != nil {
		return os.NewSyscallError("ioctl TIOCGLCKTRMIOS", err)
	}
	t.Ispeed, t.Ospeed = 0, 0
	e.TermiosLocked = termiosEntry(t)
	w, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
	if err != nil {
		return os.NewSyscallError("ioctl TIOCGWINSZ", err)
	}
	e.Winsize = &tty.WinsizeEntry{WsRow: proto.Uint32(uint32(w.Row)), WsCol: proto.Uint32(uint32(w.Col)),
		WsXpixel: proto.Uint32(uint32(w.Xpixel)), WsYpixel: proto.Uint32(uint32(w.Ypixel))}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGEXCL)
	if err != nil {
		return os.NewSyscallError("ioctl TIOCGEXCL", err)
	}
	e.Exclusive = proto.Bool(n != 0)
	return nil
}

func termiosEntry(t *unix.Termios) *tty.TermiosEntry {
	e := &tty.TermiosEntry{CIflag: &t.Iflag, COflag: &t.Oflag, CCflag: &t.Cflag, CLflag: &t.Lflag, CLine: proto.Uint32(uint32(t.Line)),
		CIspeed: &t.Ispeed, COspeed: &t.Ospeed}
	for _, c := range t.Cc {
		e.CCc = append(e.CCc, uint32(c))
	}
	return e
}

// ttySession finds out whose controlling terminal it is. Pids are those of the
// tree's own pid namespace.
func (d *Dumper) ttySession(t *terminal, procs []terminalUser) {
	sid, pgrp := 0, 0
	for _, p := range procs {
		if p.dev == t.dev {
			sid, pgrp = p.sid, p.foreground
			t.info.Sid = proto.Uint32(uint32(p.vsid))
			break
		}
	}
	if sid == 0 {
		return
	}
	inner, state := d.innerPid(sys.FileOwner{Type: sys.OwnerPGRP, Pid: int32(pgrp)})
	if state != ownerInside { // of a session that others are in too, or without members
		inner = max(pgrp, 0)
	}
	t.info.Pgrp = proto.Uint32(uint32(inner))
	for _, p := range procs {
		if p.sid == sid && p.dev == 0 && p.leaderIsOur {
			t.facts.Without = append(t.facts.Without, uint32(p.vpid))
		}
	}
}

// dumpPair reads what only the master tells, and what waits in the pair.
func (d *Dumper) dumpPair(t *terminal) error {
	m := int(t.master.file.Fd())
	for _, x := range []struct {
		req  uint
		name string
		to   **bool
	}{{unix.TIOCGPTLCK, "TIOCGPTLCK", &t.info.Locked}, {unix.TIOCGPKT, "TIOCGPKT", &t.info.PacketMode}} {
		n, err := unix.IoctlGetInt(m, x.req)
		if err != nil {
			return os.NewSyscallError("ioctl "+x.name, err)
		}
		*x.to = proto.Bool(n != 0)
	}
	if len(t.others) == 0 {
		ev, err := pollNow(m, 0)
		if err != nil {
			return err
		}
		if ev&unix.POLLHUP == 0 {
			d.refuse(t.master, "the slave of this terminal has not been opened yet, and what was written to it cannot be read", "retry in a moment")
			return nil
		}
	}
	if d.dry() || len(d.refusal.Problems) > 0 {
		return nil
	}
	q, err := d.readPair(m, t.info.GetLocked())
	if busy := errTTYBusy(""); errors.As(err, &busy) {
		d.refuse(t.master, fmt.Sprintf("what waits in the terminal cannot be carried at this moment: %s", busy), "retry in a moment")
		return nil
	}
	if err != nil {
		return fmt.Errorf("read what waits in %s: %w", t.path, err)
	}
	in := t.notes(q)
	masterID := d.newTTY()
	t.facts.Master = masterID
	for _, x := range []struct {
		id   uint32
		data []byte
	}{{t.id, in}, {masterID, q.out}} {
		if len(x.data) > 0 {
			d.ttyData = append(d.ttyData, &tty.TtyDataEntry{TtyId: proto.Uint32(x.id), Data: x.data})
		}
	}
	return nil
}

// notes keeps what the images say besides the bytes of a pair's input, and gives those.
func (t *terminal) notes(q *ttyQueues) (in []byte) {
	t.facts.Stopped = q.stopped
	for _, x := range q.in {
		t.facts.Input = append(t.facts.Input, image.TTYPiece{Len: len(x.data), End: x.end})
		in = append(in, x.data...)
	}
	return in
}

// readPair reads what waits in a pair through a slave of its own.
func (d *Dumper) readPair(m int, locked bool) (*ttyQueues, error) {
	if locked {
		if err := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err != nil {
			return nil, os.NewSyscallError("ioctl TIOCSPTLCK", err)
		}
	}
	s, err := sys.OpenPTYPeer(m, unix.O_RDWR|unix.O_NONBLOCK)
	if locked {
		lerr := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 1)
		err = errors.Join(err, os.NewSyscallError("ioctl TIOCSPTLCK", lerr))
	}
	if err != nil {
		return nil, err
	}
	f := hold(s, "slave")
	defer release(f)
	p, err := newPair(m, s)
	if err != nil {
		return nil, err
	}
	return p.read()
}

// putTerminal notes the entries of a terminal's sides and descriptions.
func (d *Dumper) putTerminal(t *terminal) error {
	if len(t.others) > 0 || t.facts.Master != 0 {
		d.ttyInfos = append(d.ttyInfos, t.info)
	}
	d.ttyFacts = append(d.ttyFacts, t.facts)
	if t.master != nil {
		m := proto.CloneOf(t.info)
		m.Id, m.Rdev = proto.Uint32(t.facts.Master), proto.Uint32(uint32(devMaster))
		d.ttyInfos = append(d.ttyInfos, m)
		n, err := unix.IoctlGetInt(int(t.master.file.Fd()), unix.TIOCGEXCL)
		if err != nil {
			return os.NewSyscallError("ioctl TIOCGEXCL", err)
		}
		m.Exclusive = proto.Bool(n != 0)
		// The first description told of its own side only.
		if len(t.others) > 0 {
			if n, err = unix.IoctlGetInt(int(t.others[0].file.Fd()), unix.TIOCGEXCL); err != nil {
				return os.NewSyscallError("ioctl TIOCGEXCL", err)
			}
			t.info.Exclusive = proto.Bool(n != 0)
		}
		d.ttyEntry(t.master, t.facts.Master)
	}
	for _, o := range t.others {
		d.ttyEntry(o, t.id)
	}
	return nil
}

func (d *Dumper) ttyEntry(o *object, info uint32) {
	reg := d.newID()
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_TTY.Enum(), Id: proto.Uint32(o.id), Tty: &tty.TtyFileEntry{
		Id: proto.Uint32(o.id), TtyInfoId: proto.Uint32(info), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown, RegfId: proto.Uint32(reg),
	}}, d.regEntry(o, reg, o.linkPath()))
	o.fact(reg).Rdev = uint64(o.stat.Rdev)
}

func (d *Dumper) newTTY() uint32 {
	d.lastTTY++
	return d.lastTTY
}

func (d *Dumper) emitTTYs() error {
	for _, e := range d.ttyInfos {
		if err := d.put(image.TtyInfoFile, image.MagicTtyInfo, e, nil); err != nil {
			return err
		}
	}
	for _, e := range d.ttyData {
		if err := d.put(image.TtyDataFile, image.MagicTtyData, e, nil); err != nil {
			return err
		}
	}
	return nil
}

// TTYFacts tells, after Finish, what the images have no field for about terminals.
func (d *Dumper) TTYFacts() []image.TTYFacts {
	var out []image.TTYFacts
	for _, f := range d.ttyFacts {
		out = append(out, *f)
	}
	return out
}

// ttyUse is a use of a terminal by a process outside of the tree: an open file, or,
// with fd -1, that it is the controlling one.
type ttyUse struct {
	pid, fd int
	dev, fs uint64 // as in terminal; of a master, fs is 0
}

// terminalOutside finds a process outside the tree that uses a terminal: has it
// open, or as its controlling one.
func (d *Dumper) terminalOutside(t *terminal) (outsider, bool) {
	if !d.ttyScanned {
		d.ttyUses, d.ttyScanned = d.scanTTYs(), true
	}
	for _, u := range d.ttyUses {
		uses := u.dev == t.dev && (u.fs == t.fs || u.fs == 0)
		if u.dev == devMaster {
			h := t.master.first()
			r, err := sys.KcmpFile(h.proc.Pid, h.fd, u.pid, u.fd)
			uses = err == nil && r == sys.Equal
		}
		if uses {
			comm, _ := procfs.Comm(u.pid)
			return outsider{pid: u.pid, comm: comm, fd: u.fd}, true
		}
	}
	return outsider{}, false
}

// scanTTYs lists all uses of pseudoterminals outside of the tree.
func (d *Dumper) scanTTYs() []ttyUse {
	pids, err := procfs.Pids()
	if err != nil {
		return nil
	}
	var out []ttyUse
	for _, pid := range pids {
		if d.inside[pid] || d.dry() && d.descends(pid) {
			continue
		}
		if st, err := procfs.ReadStat(pid); err == nil && st.TTYNr != 0 {
			u := ttyUse{pid: pid, fd: -1, dev: uint64(uint32(st.TTYNr))}
			// Its number is that of some devpts: of the one that the process sees.
			u.fs = devptsOf(pid, u.dev)
			out = append(out, u)
		}
		fds, err := procfs.Fds(pid)
		if err != nil {
			continue // ended, or not ours to see
		}
		for _, fd := range fds {
			if _, mine := held.Load(fd); mine && pid == os.Getpid() {
				continue
			}
			link, err := procfs.FdLink(pid, fd)
			if err != nil || !strings.HasPrefix(link, "/dev/p") {
				continue
			}
			var st unix.Stat_t
			if unix.Stat(procfs.Path(pid, "fd", strconv.Itoa(fd)), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
				continue
			}
			if rdev := uint64(st.Rdev); rdev == devMaster || isSlave(rdev) {
				out = append(out, ttyUse{pid: pid, fd: fd, dev: rdev, fs: uint64(st.Dev)})
			}
		}
	}
	return out
}

// ttyKey is the key of an external terminal, as CRIU has it: tty[rdev:dev], hexadecimal.
func ttyKey(st *unix.Stat_t) string {
	return fmt.Sprintf("tty[%x:%x]", uint64(st.Rdev), uint64(st.Dev))
}

// parseTTYKey gives the canonical form of a key of a terminal; ok is false for keys
// of other kinds.
func parseTTYKey(s string) (key string, ok bool, err error) {
	in, ok := strings.CutPrefix(s, "tty[")
	if !ok {
		return "", false, nil
	}
	in, closed := strings.CutSuffix(in, "]")
	rdev, dev, two := strings.Cut(in, ":")
	if !closed || !two {
		return "", true, fmt.Errorf("external key %q is not of the form tty[rdev:dev], both hexadecimal, such as tty[8803:1b]", s)
	}
	r, _, err := keyNumber(rdev)
	if err != nil {
		return "", true, fmt.Errorf("external key %q: device number %w", s, err)
	}
	v, _, err := keyNumber(dev)
	if err != nil {
		return "", true, fmt.Errorf("external key %q: device number of the file system %w", s, err)
	}
	return fmt.Sprintf("tty[%x:%x]", r, v), true, nil
}

// externalTTY marks the descriptions of a terminal that was declared external.
func (d *Dumper) externalTTY(t *terminal) bool {
	for i, o := range t.others {
		key := ttyKey(&o.stat)
		if _, ok := d.wantedTTYs[key]; !ok {
			continue
		}
		d.wantedTTYs[key] = true
		// The first is the one that the key is of.
		t.others = slices.Insert(slices.Delete(t.others, i, i+1), 0, o)
		for _, o := range t.others {
			o.ext, o.ttyKey, o.path = true, key, ""
		}
		return true
	}
	return false
}

// checkTTYKeys refuses keys of terminals that match nothing.
func (d *Dumper) checkTTYKeys() {
	var have []string
	for _, t := range d.terminals {
		if t.master == nil {
			have = append(have, ttyKey(&t.others[0].stat))
		}
	}
	for key, found := range d.wantedTTYs {
		if found {
			continue
		}
		p := refuse.Problem{Key: key, Reason: "no process of the tree has a terminal with this key open of which the master is outside"}
		if near := nearest(key, have); len(near) > 0 {
			p.Hint = "nearest: " + strings.Join(near, ", ")
		}
		d.refusal.Add(p)
	}
}

// terminalPlan lists the terminals whose numbers must be free.
func (d *Dumper) terminalPlan() []plan.File {
	var out []plan.File
	for _, t := range d.terminals {
		if t.path == "" || t.master == nil {
			continue
		}
		f := plan.File{Path: t.path, Kind: KindTerminal, Mode: unix.S_IFCHR, Rdev: t.dev, Writable: true, Create: true}
		for _, h := range t.master.holders {
			if !slices.Contains(f.Pids, h.proc.Pid) {
				f.Pids = append(f.Pids, h.proc.Pid)
			}
		}
		out = append(out, f)
	}
	return out
}

// KindTerminal is plan.File's kind of a pseudoterminal that the restore makes.
const KindTerminal = "terminal"
