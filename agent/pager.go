package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"godwit/agent/handoff"
	"godwit/engine"
	"godwit/engine/image"
	"godwit/transport"
	"godwit/wire"
)

// Pagers starts the processes that fill the memory of trees which run already.
type Pagers struct {
	Bus      transport.Config
	LogLevel string
	LogJSON  bool
}

// pagerOrder is what a pager is told first.
type pagerOrder struct {
	Bus       transport.Config
	ID        string
	Host      string
	Source    string
	Bandwidth uint64 // bytes per second of what nobody waits for; 0: any
	LogLevel  string
	LogJSON   bool
}

// pagerSpace is a space without its files, which come beside it.
type pagerSpace struct {
	Pid    uint32
	Host   engine.Held
	Ranges []image.Range
}

// pagerSpaces is what it is told of the spaces. Their files, two each, follow it.
type pagerSpaces struct{ Spaces []pagerSpace }

// pagerAnswer is what it says when it serves them.
type pagerAnswer struct{ Error string }

const (
	// pagerFilesAtOnce is how many files go in one message (SCM_MAX_FD is 253).
	pagerFilesAtOnce = 200
	// pagerPatience is how long a pager may take for its answer.
	pagerPatience = 20 * time.Second
	// pagerFD is the descriptor of its end of the connection.
	pagerFD = 3
)

// pagerProcess is a pager as the agent has it.
type pagerProcess struct {
	who  engine.Held
	conn *os.File
	done chan struct{} // closed when it has ended
	// spaces keep what it serves from being filled by the kernel should it end, until it
	// has said that nothing is missing.
	spaces []engine.Space
}

// start starts a pager that serves nothing yet: this takes some milliseconds, which a
// frozen tree would wait for.
func (l *Pagers) start(id, host, source string, rate uint64) (*pagerProcess, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, err
	}
	own, its := os.NewFile(uintptr(fds[0]), "pager"), os.NewFile(uintptr(fds[1]), "agent")
	defer func() { _ = its.Close() }()
	cmd := exec.Command("/proc/self/exe", pagerCommand)
	cmd.Args[0] = os.Args[0]
	cmd.ExtraFiles = []*os.File{its}
	cmd.Stderr = os.Stderr
	// It outlives the agent, whatever ends that.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start a pager: %w", err), own.Close())
	}
	p := &pagerProcess{conn: own, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	if p.who, err = identify(cmd.Process.Pid); err == nil {
		bus := l.Bus
		bus.Logger, bus.InProcess = nil, nil
		err = p.tell(pagerOrder{Bus: bus, ID: id, Host: host, Source: source, Bandwidth: rate, LogLevel: l.LogLevel, LogJSON: l.LogJSON})
	}
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), own.Close())
	}
	return p, nil
}

// close leaves a pager to itself: one that serves nothing ends. nil: there is none.
func (p *pagerProcess) close() {
	if p != nil {
		_ = p.conn.Close()
		p.release()
	}
}

// tell sends a message, in a file, as there is no bound to its size.
func (p *pagerProcess) tell(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("godwit-pager", unix.MFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "message")
	defer func() { _ = f.Close() }()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return p.send(fd)
}

// send sends files.
func (p *pagerProcess) send(fds ...int) error {
	c, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := c.Control(func(fd uintptr) {
		serr = unix.Sendmsg(int(fd), []byte{1}, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
	}); err != nil {
		return err
	}
	return os.NewSyscallError("sendmsg", serr)
}

// serve hands spaces over. From when it returns nil, whoever
// misses a page of them is served, whatever becomes of the agent.
func (p *pagerProcess) serve(spaces []engine.Space) (err error) {
	p.spaces = spaces
	var list pagerSpaces
	var fds []int
	raw := func(f *os.File) error {
		c, err := f.SyscallConn()
		if err != nil {
			return err
		}
		return c.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
	}
	for _, s := range spaces {
		h, err := identify(s.Host)
		if err != nil {
			return err
		}
		list.Spaces = append(list.Spaces, pagerSpace{Pid: s.Pid, Host: h, Ranges: s.Ranges})
		if err := errors.Join(raw(s.Uffd), raw(s.Pagemap)); err != nil {
			return err
		}
	}
	if err := p.tell(list); err != nil {
		return err
	}
	for len(fds) > 0 {
		n := min(len(fds), pagerFilesAtOnce)
		if err := p.send(fds[:n]...); err != nil {
			return err
		}
		fds = fds[n:]
	}
	answer := make(chan error, 1)
	go func() {
		var a pagerAnswer
		err := receive(p.conn, &a, nil)
		if err == nil && a.Error != "" {
			err = errors.New(a.Error)
		}
		answer <- err
	}()
	select {
	case err = <-answer:
	case <-p.done:
		err = errors.New("it ended")
	case <-time.After(pagerPatience):
		err = fmt.Errorf("it said nothing for %s", pagerPatience)
	}
	if err != nil {
		return fmt.Errorf("the pager of this migration: %w", err)
	}
	go func() {
		var done pagerAnswer
		if receive(p.conn, &done, nil) == nil {
			p.release()
		}
	}()
	return nil
}

// release lets go of what the pager has filled.
func (p *pagerProcess) release() {
	for _, s := range p.spaces {
		_ = s.Close()
	}
}

// receive reads one message: JSON in a file, or, with files, just these.
func receive(conn *os.File, v any, files *[]*os.File) error {
	c, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	oob := make([]byte, unix.CmsgSpace(4*pagerFilesAtOnce))
	var n, oobn int
	var rerr error
	err = c.Read(func(fd uintptr) bool {
		n, oobn, _, _, rerr = unix.Recvmsg(int(fd), make([]byte, 16), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		return !errors.Is(rerr, unix.EAGAIN)
	})
	if err = errors.Join(err, rerr); err != nil {
		return err
	}
	if n == 0 {
		return errPartnerGone
	}
	got, err := filesOf(oob[:oobn])
	if err == nil && files != nil {
		*files = append(*files, got...)
		return nil
	}
	defer closeAll(got)
	if err == nil && len(got) != 1 {
		err = fmt.Errorf("a message with %d files", len(got))
	}
	if err != nil {
		return err
	}
	if _, err := got[0].Seek(0, 0); err != nil {
		return err
	}
	return json.NewDecoder(got[0]).Decode(v)
}

var errPartnerGone = errors.New("the other process has ended")

// watchPager looks whether all memory has come to a tree that runs here, which its pager
// sees to and says in the record, and whether that lives.
func (d *destination) watchPager() handoff.Event {
	d.committed.Store(true)
	lives := d.entry.Pager != nil && d.entry.Pager.Lives()
	rec, err := d.ledger.read(forever())
	if err != nil {
		return d.unread(err)
	}
	saw := handoff.Saw(rec)
	switch {
	case saw == handoff.SawComplete:
		d.point("completed")
		d.enter(wire.State_STATE_COMPLETED, "pid", rec.LandedPid)
	case lives:
		d.dead = time.Time{}
	case overruled(rec):
	case d.dead.IsZero():
		d.dead = time.Now() // its last word may be on its way
	case time.Since(d.dead) > recordPoll/4:
		return handoff.PagerGone
	}
	return saw
}

// doom says in the record that the pager has died, with memory missing, which the kernel
// fills with zeros, or will. The record first: the pager's word that nothing is missing may
// have been on its way, and from this change on it is not heard any more.
func (d *destination) doom() handoff.Event {
	if d.pager == nil {
		signalTrees(d.alive, unix.SIGSTOP) // nobody holds what is missing
	}
	why := wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the pager of %s has died before all memory was there, and the tree with it: its copy at %s stays frozen as it was when it was handed over; godwit resolve %s --destination-is-dead lets it run on from there", d.a.cfg.Host, d.peer, d.id)
	rec, err := d.ledger.note(forever(), func(r *wire.Record) {
		if r.State != wire.State_STATE_PAGING {
			return
		}
		r.Reason = why.Error() // which changes the record, whatever else it says already
		if handoff.Saw(r) != handoff.SawGivenUp {
			r.Error = failure(why, d.a.cfg.Host, d.phase()).Proto()
		}
	})
	if err == nil && rec.State != wire.State_STATE_PAGING {
		d.dead = time.Time{}
		if d.pager == nil {
			signalTrees(d.alive, unix.SIGCONT)
		}
		return handoff.Overtaken
	}
	d.log.Error("the process that brought memory has died before all of it was here, and the tree with it; the frozen copy at the source is as it was when it was handed over", "source", d.peer)
	return handoff.Told
}

// concede ends a migration whose tree was lost, with the source that had memory of it.
func (d *destination) concede() handoff.Event {
	if _, err := d.ledger.move(forever(), wire.State_STATE_COMPLETED, nil); err != nil {
		return handoff.Refused
	}
	return handoff.Told
}

// canPage says why memory cannot come to this host when the tree runs already, if a
// migration may need that.
func (a *Agent) canPage(o *wire.MigrateOptions) error {
	if !wantsPaging(o) {
		return nil
	}
	err := engine.CanPage()
	if a.cfg.Pagers == nil {
		err = errors.New("this agent has no pager")
	}
	if err == nil {
		return nil
	}
	return wire.Errorf(wire.Code_CODE_REFUSED, "memory cannot come to %s after the tree (--mode, --on-no-converge): %w", a.cfg.Host, err)
}

// pageWith gets a pager ready, if the migration may need one.
func (d *destination) pageWith() (err error) {
	if err := d.a.canPage(d.req.Options); err != nil || !wantsPaging(d.req.Options) {
		return err
	}
	d.pager, err = d.a.cfg.Pagers.start(d.id, d.a.cfg.Host, d.req.Source, d.req.Options.GetBandwidth())
	return err
}
