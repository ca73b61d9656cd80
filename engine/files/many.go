package files

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

// A tree may have more open file descriptions than this process may have
// descriptors. What goes beyond that is let go and taken again by a dump, and
// made only when it is handed to its process by a restore.

// spareFDs are the descriptors that this process needs for other things.
const spareFDs = 512

// fdBudget is how many descriptors may be held at once.
func fdBudget() int {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return spareFDs
	}
	return max(int(min(l.Cur, maxFD))-2*spareFDs, spareFDs)
}

// orderedObjects are objects in kcmp's order, in pieces so that a new one is
// put among many without moving them all.
type orderedObjects struct{ pieces [][]*object }

// pieceMax bounds the length of a piece.
const pieceMax = 512

// ref is a descriptor that leads to o, for kcmp(2): of a process of the tree, or
// of this one if only it has o.
func (o *object) ref() (pid, fd int) {
	if h := o.first(); h.fd >= 0 {
		return h.proc.Pid, h.fd
	}
	return os.Getpid(), int(o.file.Fd())
}

// find looks for the object that is the same description as h. If there is none,
// add puts one there.
func (g *orderedObjects) find(h *object) (found *object, add func(*object), err error) {
	pid, fd := h.ref()
	cmp := func(have *object) int {
		hpid, hfd := have.ref()
		ord, cerr := sys.KcmpFile(hpid, hfd, pid, fd)
		switch {
		case cerr != nil:
			err = cerr
			return 1
		case ord == sys.Less:
			return -1
		case ord == sys.Equal:
			return 0
		}
		return 1
	}
	n, exact := slices.BinarySearchFunc(g.pieces, h, func(p []*object, _ *object) int { return cmp(p[0]) })
	if err == nil && exact {
		return g.pieces[n][0], nil, nil
	}
	if n = max(n-1, 0); len(g.pieces) == 0 {
		g.pieces = [][]*object{nil}
	}
	i, exact := slices.BinarySearchFunc(g.pieces[n], h, func(o *object, _ *object) int { return cmp(o) })
	if err == nil && exact {
		return g.pieces[n][i], nil, nil
	}
	return nil, func(o *object) {
		p := slices.Insert(g.pieces[n], i, o)
		if g.pieces[n] = p; len(p) > pieceMax {
			half := slices.Clone(p[len(p)/2:])
			g.pieces[n] = slices.Clip(p[:len(p)/2])
			g.pieces = slices.Insert(g.pieces, n+1, half)
		}
	}, err
}

// park lets go of o's duplicate if there are too many.
func (d *Dumper) park(o *object) {
	if o.file != nil && o.first().fd >= 0 && d.holding >= d.budget {
		release(o.file)
		o.file, o.parked = nil, true
		d.holding--
	}
}

// need takes the duplicates of parked objects again.
func (d *Dumper) need(objs ...*object) error {
	for _, o := range objs {
		if o.file != nil || !o.parked {
			continue
		}
		h := o.first()
		pidfd, err := unix.PidfdOpen(h.proc.Pid, 0)
		if err != nil {
			return fmt.Errorf("open pidfd of pid %d: %w", h.proc.Pid, os.NewSyscallError("pidfd_open", err))
		}
		n, err := unix.PidfdGetfd(pidfd, h.fd, 0)
		_ = unix.Close(pidfd)
		if errors.Is(err, unix.EMFILE) {
			return fmt.Errorf("the tree has more open files of this kind than this process may hold: raise its limit of open files: %w", err)
		}
		if err != nil {
			return os.NewSyscallError("pidfd_getfd", err)
		}
		f := hold(n, o.link)
		var st unix.Stat_t
		if err := unix.Fstat(n, &st); err != nil || inode(&st) != inode(&o.stat) {
			release(f)
			return fmt.Errorf("fd %d is another file by now: %w", h.fd, unix.EBADF)
		}
		o.file = f
		d.holding++
	}
	return nil
}

// late are the kinds whose descriptions can be made one by one, at any time:
// with what makes them complete. The ends of a pipe come together.
func (r *Restorer) late(x *description) bool {
	if x.part != nil || len(x.at) == 0 || r.needed[x] || r.isForwarded(x) {
		return false
	}
	switch x.kind {
	case kindEventfd, kindTimerfd, kindSignalfd:
		return true
	case kindPipe:
		name := fmt.Sprintf("pipe:[%d]", x.entry.GetPipe().GetPipeId())
		return r.inheritedName(name) == nil && r.far(name) == nil
	case kindRegular:
		return r.inherited(x.entry.GetReg()) == nil && r.linked[x.id] == 0
	}
	return false
}

// planLate puts off what this process cannot hold all at once.
func (r *Restorer) planLate() {
	budget, n := fdBudget(), 0
	for _, x := range r.all {
		if x.part == nil {
			n++
		}
	}
	if n <= budget {
		return
	}
	r.needed = map[*description]bool{}
	for _, t := range r.tables {
		for _, w := range t.watches {
			r.needed[w.file] = true
		}
	}
	for _, ms := range r.queues {
		for _, m := range ms {
			for _, id := range m.rights {
				r.needed[r.byID[id]] = true
			}
		}
	}
	for _, ls := range r.locks {
		for _, l := range ls {
			r.needed[l.x] = true
		}
	}
	pipes := map[uint32]bool{} // with an end that cannot wait
	for _, x := range r.all {
		if x.isLate = r.late(x); !x.isLate && x.kind == kindPipe {
			pipes[x.entry.GetPipe().GetPipeId()] = true
		}
	}
	for _, x := range r.all {
		if x.kind == kindPipe && pipes[x.entry.GetPipe().GetPipeId()] {
			x.isLate = false
		}
		if x.isLate && x.kind == kindPipe {
			id := x.entry.GetPipe().GetPipeId()
			r.latePipes[id] = append(r.latePipes[id], x)
		}
	}
}

// Hold opens the files of some descriptors of a table; Let says that its
// process has them. Both take what Descriptors gave.
func (r *Restorer) Hold(filesID uint32, ds []Descriptor) ([]*os.File, error) {
	fs := make([]*os.File, len(ds))
	for i, d := range ds {
		if err := r.makeLate(d.x); err != nil {
			return nil, fmt.Errorf("%s: %w", r.who(d.x), err)
		}
		if fs[i] = d.x.file; fs[i] == nil {
			return nil, fmt.Errorf("%s is not open", r.who(d.x))
		}
	}
	return fs, nil
}

// makeLate makes a description that was put off, or takes it from a process
// that has it already.
func (r *Restorer) makeLate(x *description) error {
	if x.file != nil || !x.isLate {
		return nil
	}
	if x.placed.pid != 0 {
		pidfd, err := unix.PidfdOpen(x.placed.pid, 0)
		if err != nil {
			return os.NewSyscallError("pidfd_open", err)
		}
		defer func() { _ = unix.Close(pidfd) }()
		n, err := unix.PidfdGetfd(pidfd, x.placed.fd, 0)
		if err != nil {
			return os.NewSyscallError("pidfd_getfd", err)
		}
		x.file = os.NewFile(uintptr(n), r.who(x))
		return nil
	}
	xs := []*description{x}
	if x.kind == kindPipe {
		xs = r.latePipes[x.entry.GetPipe().GetPipeId()]
	}
	errs := x.kind.open(r, xs)
	if x.kind.seal != nil && errors.Join(errs...) == nil {
		errs = x.kind.seal(r, xs)
	}
	return errors.Join(errs...)
}

// Let closes what no other descriptor of the table needs. What further tables
// have is taken from this one's process then.
func (r *Restorer) Let(filesID uint32, ds []Descriptor) {
	for _, d := range ds {
		if !d.x.isLate || d.x.file == nil {
			continue
		}
		n := 0
		for _, p := range d.x.at {
			if p.filesID == filesID {
				n++
			}
		}
		if n == 1 {
			_ = d.x.file.Close()
			d.x.file = nil
		}
	}
}

// Placed says that the process pid of this host has all descriptors of a table.
func (r *Restorer) Placed(filesID uint32, pid int, ds []Descriptor) {
	for _, d := range ds {
		if !d.x.isLate || d.spare {
			continue
		}
		d.x.placed = processFD{pid: pid, fd: d.FD}
		if d.x.file != nil {
			_ = d.x.file.Close()
			d.x.file = nil
		}
	}
}

// processFD is a descriptor of a process that is being restored.
type processFD struct{ pid, fd int }

// Last does what must come when nothing more happens to any file.
func (r *Restorer) Last() error {
	var errs []error
	for _, k := range kinds {
		if k.last != nil {
			errs = append(errs, k.last(r, r.byKind(k))...)
		}
	}
	return list("finish the files of the tree", errs)
}
