package restore

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/ns"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// A root that is a sibling of this process, a child of its parent, cannot be cloned
// out of the stub, which is a child of this process: only this process itself can
// make one. It begins with a program like the stub, and everything else of the
// tree is cloned out of it.

// checkSibling refuses what a root that is a sibling cannot be.
func (t *Tree) checkSibling() error {
	root := t.model.procs[0]
	switch {
	case !t.o.Sibling:
		return nil
	case t.newPid():
		return errors.New("the root cannot be a sibling of the restorer (--restore-sibling) in a pid namespace whose first process is its parent (--pid-namespace new)")
	case t.model.own.Own.Has(ns.User):
		return errors.New("the root cannot be a sibling of the restorer (--restore-sibling) in a user namespace of its own")
	case root.sid != root.vpid && !t.o.ShellJob:
		return fmt.Errorf("%s is in a session whose leader is not in the tree: as a sibling of the restorer it can only be in the restorer's session (--shell-job)", root)
	}
	return nil
}

// sowSibling makes the root.
// Preconditions: on the tracer's thread; the stub exists.
func (t *Tree) sowSibling() error {
	root := t.model.procs[0]
	exe, err := stubFile()
	if err != nil {
		return fmt.Errorf("make the stub program: %w", err)
	}
	defer func() { _ = exe.Close() }()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	flags := uint64(t.model.own.Own &^ ns.Time &^ t.joined)
	var s *sys.Sibling
	for start := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		if s, err = sys.NewSibling(flags, root.vpid, exe, null, t.ch.theirs); err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || living(root.vpid) || time.Since(start) > reapWait {
			return fmt.Errorf("make %s: %w", root, t.explain(err, root.vpid))
		}
	}
	t.seed = &stub{remote: &ptrace.Remote{Tid: s.Pid}}
	if err := sys.PtraceSeize(s.Pid, sessionOptions|sys.PtraceOptionTraceExec); err != nil {
		return errors.Join(fmt.Errorf("trace %s: %w", root, err), s.Abandon())
	}
	t.live = append(t.live, s.Pid)
	if err := s.Go(); err != nil {
		return err
	}
	st, err := ptrace.Wait(s.Pid)
	if err != nil {
		return err
	}
	if st.Event != unix.PTRACE_EVENT_EXEC {
		return &ptrace.StopError{Want: fmt.Sprintf("%s to execute the stub program", root), Got: st}
	}
	if err := errors.Join(sys.PtraceSetOptions(s.Pid, sessionOptions), sys.PtraceInterrupt(s.Pid), sys.PtraceCont(s.Pid, 0)); err != nil {
		return err
	}
	if err := t.seed.learn(); err != nil {
		return fmt.Errorf("take over %s: %w", root, err)
	}
	return nil
}

// adoptSibling gives the root what it would have from the stub.
func (t *Tree) adoptSibling() (*ptrace.Remote, error) {
	s := t.seed
	if err := s.prepare(t.spare); err != nil {
		return nil, err
	}
	// All processes begin with its mappings.
	t.stub.special, t.stub.rest = s.special, s.rest
	if err := t.joinAll(s.remote); err != nil {
		return nil, err
	}
	return s.remote, t.joinClocks(s.remote)
}

// joinClocks takes a process into the time namespace that the stub has for its children.
func (t *Tree) joinClocks(r *ptrace.Remote) error {
	f, err := os.Open(procfs.Path(t.stub.remote.Tid, "ns", "time_for_children"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // not configured in this kernel
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	its, err := os.Readlink(procfs.Path(t.stub.remote.Tid, "ns", "time"))
	if err != nil {
		return err
	}
	if to, err := os.Readlink(procfs.Path(t.stub.remote.Tid, "ns", "time_for_children")); err != nil || to == its {
		return err
	}
	return t.setns(r, f, unix.CLONE_NEWTIME, "join the time namespace")
}
