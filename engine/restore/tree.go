package restore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/ns"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// TakenError says that a pid which a tree needs belongs to somebody else.
type TakenError struct {
	Pid    int
	Holder string // who has it, as a person wants to read it
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("pid %d is taken on this host by %s; end that process or land the tree in a pid namespace of its own (--pid-namespace new)", e.Pid, e.Holder)
}

// PidTaken names the holder of a pid.
func PidTaken(pid int) *TakenError {
	e := &TakenError{Pid: pid, Holder: "a process group or session of that number"}
	if comm, err := procfs.Comm(pid); err == nil {
		e.Holder = fmt.Sprintf("pid %d (%s)", pid, comm)
		if st, err := procfs.ReadStatus(pid); err == nil && st.Tgid != pid {
			e.Holder = fmt.Sprintf("a thread of pid %d (%s)", st.Tgid, comm)
		}
	}
	return e
}

// Stages at which Options.Stage is called.
const (
	StageSetup     = "setup-namespaces"      // the namespaces are there, and empty
	StagePostSetup = "post-setup-namespaces" // they have what they had
)

// stage tells the caller of a stage if the tree has namespaces of its own.
func (t *Tree) stage(name string) error {
	if t.o.Stage == nil || t.model.own.Own == 0 {
		return nil
	}
	return t.o.Stage(name, t.root)
}

// rootProcess makes the root.
func (t *Tree) rootProcess(set *image.Set) error {
	root := t.model.procs[0]
	flags, exitSignal := t.rootFlags()
	r, err := t.firstProcess(root, flags, exitSignal)
	if err != nil {
		return fmt.Errorf("make %s: %w", root, err)
	}
	t.root = r.Tid
	root.leader().remote = r
	o := t.o.Namespaces
	if err := t.stage(StageSetup); err != nil {
		return err
	}
	t.rootDir, err = ns.Restore(set, t.model.own, ns.RestoreOptions{
		Pid: t.root, Root: o.Root, External: o.Mounts, Veth: o.Veth, WeakSysctls: o.WeakSysctls, EmptyNet: o.EmptyNet, Joined: t.joined,
		Run: func(calls ...*ptrace.Call) error { return r.Run(calls...) },
	})
	if err != nil {
		return err
	}
	if err := t.stage(StagePostSetup); err != nil {
		return err
	}
	if t.newPid() || t.rootDir != nil {
		t.files.Within(t.openInside, t.rootDir)
	}
	if err := t.files.OpenTerminals(); err != nil {
		return err
	}
	if t.newPid() {
		t.init = t.stub.remote.Tid
	}
	return nil
}

// rootFlags are those with which the root is cloned from the stub.
func (t *Tree) rootFlags() (flags, exitSignal uint64) {
	if t.newPid() {
		// The stub is the init of the namespace and stays the root's parent.
		return 0, uint64(unix.SIGCHLD)
	}
	return unix.CLONE_PARENT, 0
}

func (t *Tree) firstProcess(root *process, flags, exitSignal uint64) (*ptrace.Remote, error) {
	if root.graft != nil {
		return root.remote(), nil
	}
	if t.o.Sibling {
		return t.adoptSibling()
	}
	if err := t.joinAll(t.stub.remote); err != nil {
		return nil, err
	}
	flags |= uint64(t.model.own.Own &^ ns.Time &^ t.joined) // setClocks
	return t.cloneRoot(flags, exitSignal)
}

// cloneRoot clones the root from the stub, and makes it the root of its user namespace.
func (t *Tree) cloneRoot(flags, exitSignal uint64) (*ptrace.Remote, error) {
	vpid := t.model.procs[0].vpid
	if t.users == nil {
		return t.clone(t.stub.remote, flags, exitSignal, vpid)
	}
	before, after, err := t.users.Bearers()
	if err != nil {
		return nil, err
	}
	if err := t.stub.remote.Run(before); err != nil {
		return nil, err
	}
	r, err := t.clone(t.stub.remote, flags, exitSignal, vpid)
	if err := errors.Join(err, t.stub.remote.Run(after)); err != nil {
		return nil, err
	}
	if err := t.users.Fill(r.Tid); err != nil {
		return nil, err
	}
	return r, r.Run(t.users.Become()...)
}

// processes makes all processes below the root, with their sessions and groups.
func (t *Tree) processes(ctx context.Context) error {
	root := t.model.procs[0]
	// A session whose leader is not in the tree is the stub's: the number
	// differs, what belongs together stays together.
	root.curSid = root.sid
	if err := t.grow(ctx, root, root.remote()); err != nil {
		return err
	}
	if err := t.latecomers(ctx); err != nil {
		return err
	}
	if err := t.groups(); err != nil {
		return err
	}
	if err := t.foreground(); err != nil {
		return err
	}
	for _, p := range t.model.procs {
		if p.remote() == nil {
			return fmt.Errorf("%s belongs to a session (%d) that its place in the tree does not lead to", p, p.sid)
		}
		t.pids = append(t.pids, p.remote().Tid)
		if p.leave != 0 {
			if err := p.remote().Run(ptrace.NewCall("share no longer", unix.SYS_UNSHARE, ptrace.Int(p.leave))); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
		}
	}
	return nil
}

// exitSignal is what the parent of a process gets when it ends.
func (p *process) exitSignal() uint64 {
	if f := p.leader().facts; f != nil && f.ExitSignal != nil {
		return uint64(*f.ExitSignal)
	}
	return uint64(unix.SIGCHLD)
}

// grow makes the descendants of p, which exists: first those that were born
// before p began its own session, then the others.
func (t *Tree) grow(ctx context.Context, p *process, r *ptrace.Remote) error {
	p.leader().remote = r
	before := p.curSid
	switch {
	case p.sid != p.vpid:
	case p.graft != nil: // began its session when it was made
		p.curSid = p.sid
		if err := t.takeTerminal(p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	default:
		for _, c := range p.children {
			if c.sid == before && c.sid != p.vpid {
				if err := t.child(ctx, p, c); err != nil {
					return err
				}
			}
		}
		if err := r.Run(ptrace.NewCall("begin a session", unix.SYS_SETSID)); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		p.curSid = p.sid
		if err := t.takeTerminal(p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	for _, c := range p.children {
		if c.graft != nil {
			c.curSid = c.sid
			if err := t.grow(ctx, c, c.remote()); err != nil {
				return err
			}
			continue
		}
		if c.remote() == nil && (c.sid == p.curSid || c.sid == c.vpid) {
			if err := t.child(ctx, p, c); err != nil {
				return err
			}
		}
	}
	for _, c := range p.children {
		if c.remote() == nil {
			if err := t.stepchild(ctx, p, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tree) child(ctx context.Context, p, c *process) error {
	if err := t.ripen(ctx, p, c); err != nil {
		return err
	}
	c.curSid, c.heritage = p.curSid, p.bequest()
	r, err := t.clone(p.remote(), c.with, c.exitSignal(), c.vpid)
	if err != nil {
		return fmt.Errorf("make %s: %w", c, err)
	}
	return t.grow(ctx, c, r)
}

// stepchild makes a child c of p that is in a session which p is not in: in
// the original tree its own parent, of that session, has ended. It is cloned,
// as a sibling, by a child of p in that session, or comes late.
func (t *Tree) stepchild(ctx context.Context, p, c *process) error {
	if s := p.childIn(c); s != nil {
		return t.sibling(ctx, s, s.remote(), c)
	}
	t.late = append(t.late, latecomer{p, c})
	return nil
}

// childIn finds a child of p that can clone c, which is in its session, as a sibling.
func (p *process) childIn(c *process) *process {
	for _, s := range p.children {
		// One that is to be a zombie has not exited yet.
		if s.remote() != nil && s.curSid == c.sid && s.with&c.with == c.with && s.exitSignal() == c.exitSignal() {
			return s
		}
	}
	return nil
}

// below tells whether p is an ancestor of q, or q itself.
func (p *process) below(q *process) bool {
	for ; q != nil; q = q.parent {
		if q == p {
			return true
		}
	}
	return false
}

// latecomer is a child of p that is to be made when all are there who can be
// made in order.
type latecomer struct{ p, c *process }

// latecomers makes those who came late, and their descendants.
func (t *Tree) latecomers(ctx context.Context) error {
	for len(t.late) > 0 {
		pending := t.late
		t.late = nil
		progress := false
		for _, x := range pending {
			if x.c.remote() != nil {
				progress = true
				continue
			}
			done, err := t.latecomer(ctx, x, pending)
			if err != nil {
				return err
			}
			progress = progress || done
			if !done {
				t.late = append(t.late, x)
			}
		}
		if !progress {
			c := t.late[0].c
			return fmt.Errorf("%s is in the session of pid %d, which its place in the tree does not lead to; such a tree cannot be rebuilt", c, c.sid)
		}
	}
	return nil
}

// latecomer makes one of them, if that can be done now.
func (t *Tree) latecomer(ctx context.Context, x latecomer, pending []latecomer) (bool, error) {
	p, c := x.p, x.c
	if s := p.childIn(c); s != nil {
		return true, t.sibling(ctx, s, s.remote(), c)
	}
	for _, from := range t.model.procs {
		if from.remote() != nil && from.curSid == c.sid && p.below(from) {
			return true, t.orphan(ctx, p, from, c)
		}
	}
	if t.model.ids[c.sid] {
		return false, nil // the leader may come yet
	}
	for _, y := range pending {
		if y.c.remote() == nil && y.c.sid == c.sid && y.p != p && p.below(y.p) {
			return false, nil // the session begins further down
		}
	}
	return true, t.beginSession(ctx, p, c)
}

// beginSession makes c, and other children of p, by a helper that begins their
// session, whose leader has ended, and ends.
func (t *Tree) beginSession(ctx context.Context, p, c *process) error {
	h, err := t.clone(p.remote(), c.with, c.exitSignal(), c.sid)
	if err != nil {
		return fmt.Errorf("begin session %d of %s: %w", c.sid, c, err)
	}
	if err := h.Run(ptrace.NewCall("begin a session", unix.SYS_SETSID)); err != nil {
		return err
	}
	for _, s := range p.children {
		if s.remote() == nil && s.sid == c.sid && c.with&s.with == s.with && s.exitSignal() == c.exitSignal() {
			if err := t.sibling(ctx, p, h, s); err != nil {
				return err
			}
		}
	}
	return t.endHelper(p, h)
}

// orphan makes a child c of p in the session of from, who is further down: by
// a helper that ends and leaves it to p, as its own parent has once left it.
func (t *Tree) orphan(ctx context.Context, p, from, c *process) error {
	if c.with != 0 || c.exitSignal() != uint64(unix.SIGCHLD) {
		return fmt.Errorf("%s, an orphan, shares something with its new parent, or tells it of its end in another way; such a tree cannot be rebuilt", c)
	}
	subreaper := func(on int) error {
		return p.remote().Run(ptrace.NewCall("take orphans", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_CHILD_SUBREAPER), ptrace.Int(on)))
	}
	if err := subreaper(1); err != nil {
		return err
	}
	h, err := t.cloneSpare(from.remote(), c.vpid)
	if err != nil {
		return fmt.Errorf("make a helper for %s: %w", c, err)
	}
	c.curSid, c.heritage = c.sid, from.bequest()
	n, err := t.clone(h, 0, uint64(unix.SIGCHLD), c.vpid)
	if err != nil {
		return fmt.Errorf("make %s: %w", c, err)
	}
	if err := t.endHelper(from, h); err != nil {
		return err
	}
	st, err := procfs.ReadStat(n.Tid)
	if err != nil {
		return err
	}
	if st.PPid != p.remote().Tid {
		return fmt.Errorf("%s was left to pid %d and not to %s", c, st.PPid, p)
	}
	if err := subreaper(0); err != nil {
		return err
	}
	return t.grow(ctx, c, n)
}

// cloneSpare makes a helper whose pid, near another one, the tree has no use for.
func (t *Tree) cloneSpare(r *ptrace.Remote, near int) (*ptrace.Remote, error) {
	used := map[int]bool{}
	for _, p := range t.model.procs {
		used[p.sid], used[p.pgid] = true, true
	}
	var last error
	for d := 1; d < 1000; d++ {
		for _, id := range []int{near + d, near - d} {
			if id < 2 || used[id] || t.model.ids[id] || living(id) {
				continue
			}
			h, err := t.clone(r, 0, uint64(unix.SIGCHLD), id)
			if err == nil {
				return h, nil
			}
			if last = err; !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EINVAL) {
				return nil, err
			}
		}
	}
	return nil, fmt.Errorf("no pid is free near %d: %w", near, last)
}

// sibling clones c out of r's target, which has the address space of from.
func (t *Tree) sibling(ctx context.Context, from *process, r *ptrace.Remote, c *process) error {
	c.curSid, c.heritage = c.sid, from.bequest()
	n, err := t.clone(r, unix.CLONE_PARENT|c.with, 0, c.vpid)
	if err != nil {
		return fmt.Errorf("make %s: %w", c, err)
	}
	return t.grow(ctx, c, n)
}

// endHelper kills a child of p that is not part of the tree and has p reap it.
func (t *Tree) endHelper(p *process, h *ptrace.Remote) error {
	if err := unix.Kill(h.Tid, unix.SIGKILL); err != nil {
		return os.NewSyscallError("kill", err)
	}
	if err := reap(h.Tid); err != nil {
		return err
	}
	t.forget(h.Tid)
	p.reapChild = true
	return p.remote().Run(ptrace.NewCall("reap a helper", unix.SYS_WAIT4, ptrace.Int(-1), ptrace.Int(0), ptrace.Int(unix.WALL|unix.WNOHANG), ptrace.Int(0)))
}

func (t *Tree) forget(tid int) {
	for i, x := range t.live {
		if x == tid {
			t.live = append(t.live[:i], t.live[i+1:]...)
			return
		}
	}
}

// groups puts processes into their groups: leaders first. A group whose leader
// has ended is begun by a helper, unless it is the one in which the root came.
func (t *Tree) groups() error {
	setpgid := func(r *ptrace.Remote, pgid int) error {
		return r.Run(ptrace.NewCall(fmt.Sprintf("join process group %d", pgid), unix.SYS_SETPGID, ptrace.Int(0), ptrace.Int(pgid)))
	}
	root := t.model.procs[0]
	outside := 0
	if root.pgid != root.vpid && root.sid != root.vpid && !t.model.ids[root.pgid] {
		outside = root.pgid
	}
	members := map[int][]*process{}
	there := map[int]bool{} // groups that exist without their leader
	var order []int
	for _, p := range t.model.procs {
		if p.remote() == nil {
			continue
		}
		switch {
		case p.sid == p.vpid: // began a session, and with it a group
		case p.pgid == p.vpid:
			if err := setpgid(p.remote(), 0); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
		case p.pgid == outside && p.curSid == root.curSid:
		case t.model.byPid[p.pgid] == nil && inGroup(p):
			// Begun by a helper together with the session.
			there[p.pgid] = true
		default:
			if members[p.pgid] == nil {
				order = append(order, p.pgid)
			}
			members[p.pgid] = append(members[p.pgid], p)
		}
	}
	for _, pgid := range order {
		first := members[pgid][0]
		var h *ptrace.Remote
		if t.model.byPid[pgid] == nil && !there[pgid] {
			var err error
			if h, err = t.clone(first.remote(), 0, uint64(unix.SIGCHLD), pgid); err != nil {
				return fmt.Errorf("begin process group %d of %s: %w", pgid, first, err)
			}
			if err := setpgid(h, 0); err != nil {
				return err
			}
		}
		for _, p := range members[pgid] {
			if err := setpgid(p.remote(), pgid); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
		}
		if h != nil {
			if err := t.endHelper(first, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// outliveAgent takes the signal at the death of its parent from the root: that
// parent is not part of the tree, and the one that it gets, this process, ends
// or loses the thread that made it at once (prctl(2), PR_SET_PDEATHSIG).
func (m *model) outliveAgent(log hclog.Logger) {
	for _, th := range m.procs[0].threads {
		if sig := th.core.GetThreadCore().GetPdeathSig(); sig != 0 {
			log.Warn("the root's signal at the death of its parent is not set again: the parent is another one",
				"pid", m.procs[0].vpid, "tid", th.vtid, "signal", unix.SignalName(unix.Signal(sig)))
			th.core.ThreadCore.PdeathSig = nil
		}
	}
}

// inGroup tells whether a process is in its group already, by the numbers of
// its own pid namespace.
func inGroup(p *process) bool {
	st, err := procfs.ReadStatus(p.remote().Tid)
	return err == nil && len(st.NSpgid) > 0 && st.NSpgid[len(st.NSpgid)-1] == p.pgid
}

// zombies makes the processes that have exited exit again.
func (t *Tree) zombies() error {
	for i := len(t.model.procs) - 1; i >= 0; i-- {
		p := t.model.procs[i]
		if !p.zombie {
			continue
		}
		if err := t.exit(p); err != nil {
			return fmt.Errorf("make %s a zombie: %w", p, err)
		}
		p.parent.reapChild = true
	}
	return nil
}

func (t *Tree) exit(p *process) error {
	r := p.remote()
	status := unix.WaitStatus(p.core().GetTc().GetExitCode())
	calls := []*ptrace.Call{ptrace.NewCall("set name", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_NAME), ptrace.Str(p.comm()))}
	if f := p.leader().facts; f != nil && f.Owner != nil {
		calls = append(calls, task.OwnerCalls(f.Owner)...)
	}
	if !status.Signaled() {
		calls = append(calls, ptrace.NewCall("exit", unix.SYS_EXIT_GROUP, ptrace.Int(status.ExitStatus())))
		err := r.Run(calls...)
		if !errors.Is(err, ptrace.ErrGone) {
			return errors.Join(err, errors.New("it did not exit"))
		}
		t.forget(r.Tid)
		return nil
	}
	// No core file is written for a death that was reported long ago.
	calls = append(calls, ptrace.NewCall("forbid core files", unix.SYS_PRLIMIT64, ptrace.Int(0), ptrace.Int(unix.RLIMIT_CORE), ptrace.Bytes(make([]byte, 16)), ptrace.Int(0)))
	if err := r.Run(calls...); err != nil {
		return err
	}
	if err := sys.PtraceSetSigMask(r.Tid, 0); err != nil {
		return err
	}
	if err := unix.Kill(r.Tid, status.Signal()); err != nil {
		return os.NewSyscallError("kill", err)
	}
	for {
		// The signal is reported to us first and then delivered.
		if err := sys.PtraceCont(r.Tid, int(status.Signal())); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		s, err := ptrace.Wait(r.Tid)
		if err != nil {
			return err
		}
		if s.Ended() {
			t.forget(r.Tid)
			return nil
		}
	}
}

// drainSIGCHLD takes the signals that ended helpers and zombies left pending.
func drainSIGCHLD() *ptrace.Call {
	set := binary.LittleEndian.AppendUint64(nil, 1<<(uint(unix.SIGCHLD)-1))
	c := ptrace.NewCall("take SIGCHLD", unix.SYS_RT_SIGTIMEDWAIT, ptrace.Bytes(set), ptrace.Int(0), ptrace.Bytes(make([]byte, 16)), ptrace.Int(8))
	c.MayFail = true
	return c
}
