package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"godwit/engine/cgroup"
	"godwit/engine/dump"
	"godwit/engine/files"
	"godwit/engine/freeze"
	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/refuse"
	"godwit/engine/restore"
	"godwit/engine/sys"
)

const (
	defaultFreezeTimeout = 10 * time.Second
	defaultGhostLimit    = 1 << 30

	// planTries is how often a running tree is looked at before what cannot be
	// carried is taken for lasting.
	planTries = 3
)

func (o DumpOptions) internal() (dump.Options, error) {
	d := dump.Options{TCPEstablished: o.TCPEstablished, TCPClose: o.TCPClose, SkipInFlight: o.SkipInFlight, GhostLimit: o.GhostLimit, FileLocks: o.FileLocks, ShellJob: o.ShellJob, Elsewhere: o.Elsewhere, Host: o.Host}
	d.ExtUnixSk, d.Ends = o.ExtUnixSk, o.Ends
	d.Files, d.Carry, d.Confirm = o.Files, o.Carry, o.Confirm
	d.Late = o.Late
	d.FreezeGroup = o.FreezeGroup
	var err error
	if d.Live, err = o.internalLive(); err != nil {
		return d, err
	}
	if o.Early != nil {
		d.Early = o.Early.copy
	}
	if err := o.namespaces(&d); err != nil {
		return d, err
	}
	d.Groups = cgroup.DumpOptions{Roots: o.CgroupDump.Roots, Yard: o.CgroupDump.Yard, Controllers: o.CgroupDump.Controllers}
	for _, text := range o.CgroupDump.Props {
		p, err := cgroup.ParseProps(text)
		if err != nil {
			return d, err
		}
		d.Groups.Props = append(d.Groups.Props, p...)
	}
	switch o.NetworkLock {
	case LockNone:
	case LockSkip:
		d.NetworkLock = files.LockSkip
	case LockNftables:
		d.NetworkLock = newRunID()
	default:
		return d, fmt.Errorf("%q is no way to lock the network; there are %s and %s", o.NetworkLock, LockNftables, LockSkip)
	}
	if d.GhostLimit == 0 {
		d.GhostLimit = defaultGhostLimit
	}
	if d.Host == "" {
		if d.Host, err = os.Hostname(); err != nil {
			return d, err
		}
	}
	return d, nil
}

// newRunID makes a random id (RFC 9562, version 4), which is what CRIU names its
// locks by.
func newRunID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Plan looks at the running tree below pid and says what it holds and needs.
// It returns a *Refusal that lists everything that cannot be carried, with the
// plan. Nothing of the tree is touched.
func (e *Engine) Plan(ctx context.Context, pid int, o DumpOptions) (*Plan, error) {
	if err := e.source(pid); err != nil {
		return nil, err
	}
	d, err := o.internal()
	if err != nil {
		return nil, err
	}
	var lasting []refuse.Problem
	for try := 1; ; try++ {
		p, err := dump.Preflight(ctx, e.log, pid, d)
		var r *Refusal
		if !errors.As(err, &r) {
			return p, err
		}
		if try == 1 {
			lasting = r.Problems
		}
		lasting = slices.DeleteFunc(lasting, func(p refuse.Problem) bool {
			return !slices.ContainsFunc(r.Problems, func(q refuse.Problem) bool { return sameTrouble(p, q) })
		})
		switch {
		case len(lasting) == 0:
			e.log.Debug("what cannot be carried was there for a moment only", "pid", pid, "error", err)
			passing(p, lasting)
			return p, nil
		case try == planTries || ctx.Err() != nil:
			passing(p, lasting)
			return p, errors.Join(&Refusal{Doing: r.Doing, Problems: lasting}, ctx.Err())
		}
		// A running program is full of passing moments; what lasts is refused.
		time.Sleep(20 * time.Millisecond)
	}
}

// passing takes back the refusal of objects that is not among what lasts.
func passing(p *Plan, lasting []refuse.Problem) {
	if p == nil {
		return
	}
	for i := range p.Objects {
		o := &p.Objects[i]
		if o.Carry != plan.CarryRefused || slices.ContainsFunc(lasting, func(q refuse.Problem) bool { return sameReason(q.Reason, o.Reason) }) {
			continue
		}
		o.Carry, o.Reason, o.Hint, o.Declarable = plan.CarryImage, "", "", false
	}
}

// sameTrouble says whether two looks at a tree found the same object in the
// same way; numbers in the reason, such as sizes, may have changed.
func sameTrouble(a, b refuse.Problem) bool {
	return a.Pid == b.Pid && a.HasFD == b.HasFD && a.FD == b.FD && a.Path == b.Path && a.Key == b.Key && sameReason(a.Reason, b.Reason)
}

// sameReason compares reasons without their numbers.
func sameReason(a, b string) bool {
	digits := func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}
	return strings.Map(digits, a) == strings.Map(digits, b)
}

// PreDump gives the memory of the running tree below pid to a sink of its own
// (image.DirSink.PreDump), for a dump that builds on it. The tree runs on
// meanwhile. mode is the way of reading that CRIU's inventory names: 1 splice, 2
// read, which makes no difference here. What cannot be carried is for Plan to tell.
func (e *Engine) PreDump(ctx context.Context, pid int, o DumpOptions, mode uint32, sink image.Sink) (DumpStats, error) {
	if err := e.source(pid); err != nil {
		return DumpStats{}, err
	}
	d, err := o.internal()
	if err != nil {
		return DumpStats{}, err
	}
	s, err := dump.PreDump(ctx, e.log, pid, d, mode, sink)
	return DumpStats{Processes: s.Processes, Pages: s.Pages, ShmemPages: s.ShmemPages, Bytes: s.Bytes, DataDur: s.DataDur}, err
}

// source refuses pids that cannot be the root of a dump.
func (e *Engine) source(pid int) error {
	switch {
	case pid < 1:
		return fmt.Errorf("%d is not a pid", pid)
	case pid == os.Getpid():
		return fmt.Errorf("pid %d is the agent itself", pid)
	}
	return nil
}

// freezeTimeout is Timeout, or what it means not to give one.
func (o *DumpOptions) freezeTimeout() time.Duration {
	if o.Timeout == 0 {
		return defaultFreezeTimeout
	}
	return o.Timeout
}

// Freeze stops the tree below pid: every process and thread of it. After an
// error the tree runs as before.
func (e *Engine) Freeze(ctx context.Context, pid int, o DumpOptions) (Tree, error) {
	if err := e.source(pid); err != nil {
		return nil, err
	}
	d, err := o.internal()
	if err != nil {
		return nil, err
	}
	timeout := o.freezeTimeout()
	t, err := freeze.FreezeIn(ctx, pid, timeout, o.FreezeGroup)
	if err != nil {
		return nil, err
	}
	for _, p := range t.Procs {
		if p.Pid == os.Getpid() {
			return nil, errors.Join(fmt.Errorf("the agent itself (pid %d) is part of the tree of pid %d", p.Pid, pid), t.Thaw())
		}
	}
	for _, p := range t.Procs {
		e.log.Debug("process frozen", "pid", p.Pid, "comm", p.Comm, "threads", len(p.Threads))
	}
	e.log.Debug("tree frozen", "pid", pid, "processes", len(t.Procs), "threads", t.Threads(), "duration_us", t.FreezeDur.Microseconds())
	return &frozen{e: e, t: t, o: d, pid: pid, timeout: timeout}, nil
}

// frozen is a Tree.
type frozen struct {
	e       *Engine
	t       *freeze.Tree
	o       dump.Options
	pid     int
	timeout time.Duration

	segments []int                 // System V shared memory that was dumped
	sockets  []files.SocketFile    // of the dumped tree
	moved    []files.Moved         // of the dumped tree
	conns    *files.Connections    // of the dumped tree
	links    *files.Links          // names that the dump made
	lost     files.LostConnections // by a dump, if the tree runs on
}

// Pids implements Tree.
func (f *frozen) Pids() []int {
	var out []int
	for _, p := range f.t.Procs {
		out = append(out, p.Pid)
	}
	return out
}

// A tree is frozen again and again for some time before what it holds that cannot be
// carried is taken for lasting: for passingPatience if that ends by itself as soon as
// the program goes on, as a connection that it has not accepted.
const (
	lastingPatience = time.Second
	passingPatience = 3 * time.Second
)

// Dump freezes the tree again, a little later, if it was caught with something
// that cannot be carried and that the plan, moments before, did not see: a vfork
// in progress, a file open for an instant.
func (f *frozen) Dump(ctx context.Context, sink image.Sink) (DumpStats, error) {
	start := time.Now()
	for try := 1; ; try++ {
		s, err := dump.Dump(ctx, f.e.log, f.t, f.o, sink)
		var r *Refusal
		if errors.As(err, &r) && time.Since(start) < f.bears(r) {
			f.e.log.Debug("frozen at a bad moment, trying again", "pid", f.pid, "try", try, "error", err)
			// The longer the program runs meanwhile, the more surely it has got on.
			if aerr := f.again(ctx, min(time.Duration(try*try)*7*time.Millisecond, passingPatience/10)); aerr != nil {
				return DumpStats{}, errors.Join(err, aerr)
			}
			continue
		}
		f.conns, f.links, f.lost = s.Connections, s.Links, s.Accepted
		if err == nil {
			f.segments, f.sockets, f.moved = s.Segments, s.Sockets, s.Moved
		}
		return DumpStats{
			Processes: s.Processes, Threads: s.Threads, Pages: s.Pages, Bytes: s.Bytes,
			ShmemPages: s.ShmemPages, Scanned: s.Scanned, DataDur: s.DataDur, CarriedBytes: s.CarriedBytes,
			FreezeDur: f.t.FreezeDur, DumpDur: time.Since(start), FrozenAt: f.t.FrozenAt, Late: s.Late,
		}, err
	}
}

// bears says for how long a refusal is taken for one that may pass.
func (f *frozen) bears(r *Refusal) time.Duration {
	if r.Passing() {
		return passingPatience
	}
	return lastingPatience
}

// again lets the tree run for a moment and freezes it anew.
func (f *frozen) again(ctx context.Context, pause time.Duration) error {
	if err := f.t.Thaw(); err != nil {
		return err
	}
	time.Sleep(pause)
	t, err := freeze.FreezeIn(ctx, f.pid, f.timeout, f.o.FreezeGroup)
	if err != nil {
		return err
	}
	f.t = t
	return nil
}

func (f *frozen) Hold(note func([]Held) error) error { return f.t.Hold(note) }

func (f *frozen) Thaw() error {
	defer f.conns.Close()
	f.tellLost()
	return errors.Join(f.endLinks(), f.t.Thaw())
}

func (f *frozen) tellLost() {
	if f.lost > 0 {
		f.e.log.Error("the tree runs on without what a dump took from it", "pid", f.pid, "error", f.lost)
	}
}

// endLinks ends the names of a tree that runs on.
func (f *frozen) endLinks() error {
	if f.o.Files.KeepLinks {
		f.links.Close()
		return nil
	}
	return f.links.Remove()
}

func (f *frozen) ThawStopped() error {
	defer f.conns.Close()
	f.tellLost()
	return errors.Join(f.endLinks(), f.t.ThawStopped())
}

// Kill ends the tree. Its TCP connections close without a word.
func (f *frozen) Kill() error { return f.kill(f.t.Kill) }

// KillButRoot implements Tree.
func (f *frozen) KillButRoot() (StandIn, error) {
	var s *freeze.StandIn
	err := f.kill(func() (err error) {
		if s, err = f.t.KillButRoot(); err != nil {
			f.e.log.Warn("nothing stands in for the root of the tree", "pid", f.pid, "error", err)
			return f.t.Kill()
		}
		return nil
	})
	if err != nil || s == nil {
		return nil, err
	}
	return s, nil
}

func (f *frozen) kill(kill func() error) error {
	defer f.conns.Close()
	if err := f.conns.Keep(); err != nil {
		return fmt.Errorf("keep the network locked: %w", err)
	}
	if err := f.conns.Silence(); err != nil {
		// They close as when a program ends, and a restore on this host may have to
		// wait for their addresses.
		f.e.log.Warn("TCP connections of the dumped tree close with packets", "pid", f.pid, "error", err)
	}
	err := kill()
	if err != nil {
		return errors.Join(err, f.conns.Voice())
	}
	f.links.Close() // for the restore to find
	if t := f.conns.LockTable(); t != "" {
		f.e.log.Info("the network stays locked for the connections that lead out of the tree, until the restore", "pid", f.pid, "table", "inet "+t)
	}
	if f.o.Elsewhere {
		// Here they would be in the way when the tree comes back. A restore on this
		// host finds and replaces them.
		for _, s := range f.sockets {
			if err := s.Remove(); err != nil {
				f.e.log.Warn("a file is left", "pid", f.pid, "error", err)
			}
		}
		if err := files.RemoveMoved(f.moved); err != nil {
			f.e.log.Warn("a file is left", "pid", f.pid, "error", err)
		}
	}
	return f.removeSegments()
}

// removeSegments takes the System V segments of a tree that was killed along,
// which would stay otherwise.
func (f *frozen) removeSegments() (err error) {
	for _, id := range f.segments {
		rerr := sys.ShmRemove(id)
		if rerr != nil && !errors.Is(rerr, unix.EINVAL) && !errors.Is(rerr, unix.EIDRM) { // gone with its last attachment
			err = errors.Join(err, fmt.Errorf("remove System V segment %d: %w", id, rerr))
		}
	}
	return err
}

// Restore rebuilds a tree from a source. The tree stands, and nothing of it
// has run, when it returns; after an error nothing is left of it.
func (e *Engine) Restore(ctx context.Context, src image.Source, o RestoreOptions) (Standing, error) {
	in := map[string]files.Inherit{}
	for k, v := range o.Inherit {
		in[k] = files.Inherit{File: v.File, Forward: v.Forward, AnyKind: v.AnyKind}
	}
	spaces, err := o.namespaces()
	if err != nil {
		return nil, err
	}
	groups := cgroup.Options{Roots: o.Cgroups.Roots, Yard: o.Cgroups.Yard}
	if groups.Mode, err = cgroup.ParseMode(o.Cgroups.Mode); err != nil {
		return nil, err
	}
	t, err := restore.Restore(ctx, e.log, src, restore.Options{Namespaces: spaces, Stage: o.Stage, Cgroups: groups, TCPEstablished: o.TCPEstablished, TCPClose: o.TCPClose, TCPOutside: o.NetworkLock != LockNone, LockSkip: o.NetworkLock == LockSkip, Inherit: in, NewPidNamespace: o.NewPidNamespace, FileLocks: o.FileLocks, ShellJob: o.ShellJob, Terminal: o.Terminal, Lead: o.Lead, Files: o.Files, Carry: o.Carry, Mark: o.Mark, Note: o.Note, ExtUnixSk: o.ExtUnixSk, Sibling: o.Sibling, Paging: o.Paging, TimeNamespace: o.TimeNamespace})
	if err != nil {
		return nil, err
	}
	return &standing{t}, nil
}

// standing is a Standing.
type standing struct{ *restore.Tree }

func (s *standing) Stats() RestoreStats {
	st := s.Tree.Stats()
	return RestoreStats{
		Processes: st.Processes, Threads: st.Threads, Pages: st.Pages, ComparedPages: st.ComparedPages, SharedPages: st.SharedPages, Bytes: st.Bytes, ForkDur: st.ForkDur, RestoreDur: st.RestoreDur,
	}
}

func (s *standing) Child() int {
	if s.Init() != 0 {
		return s.Init()
	}
	return s.Root()
}

// ContentDigest is a SHA-256 of what is in a file, in hexadecimal, that costs what
// is allocated: holes and zeros are the same.
func ContentDigest(f *os.File) (string, error) { return files.ContentDigest(f) }
