package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
)

// Objects that lead out of the tree and whose bytes the caller goes on carrying
// (plan.FileOptions.Proxied) are dumped like those within the tree, but for their
// other end: the restore makes it, too, and hands it to the caller (plan.Far). What
// waits for the tree stays with the original, which the caller keeps, or travels if
// the other end was the caller's own.

// linkOfKey gives the text of the /proc links to a pipe or socket by its key:
// pipe[12], pipe:[12]; socket[12], socket:[12], unix[12].
func linkOfKey(s string) (string, bool) {
	kind, in, ok := strings.Cut(s, "[")
	in, closed := strings.CutSuffix(in, "]")
	kind = strings.TrimSuffix(kind, ":")
	if kind == "unix" {
		kind = "socket"
	}
	n, err := strconv.ParseUint(in, 10, 64)
	if !ok || !closed || err != nil || kind != "pipe" && kind != "socket" {
		return "", false
	}
	return fmt.Sprintf("%s:[%d]", kind, n), true
}

// canonicalKey gives keys of pipes, sockets and terminals their canonical form.
func canonicalKey(s string) (string, error) {
	if key, ok, err := parseTTYKey(s); ok {
		return key, err
	}
	link, ok := linkOfKey(s)
	if !ok {
		return "", fmt.Errorf("key %q is none of a pipe, socket or terminal: pipe[inode], unix[inode], tty[rdev:dev]", s)
	}
	kind, in, _ := strings.Cut(link, ":")
	if kind == "socket" {
		kind = "unix"
	}
	return kind + in, nil
}

// checkProxied refuses keys of proxied objects that match nothing.
func (d *Dumper) checkProxied() {
	for key := range d.opts.Proxied {
		if !d.proxies[key] {
			d.refusal.Add(refuse.Problem{Key: key, Reason: "no process of the tree has a pipe, stream socket or terminal with this key open"})
		}
	}
}

// pipeProxied says whether a pipe was declared proxied, and what is in it travels.
func (d *Dumper) pipeProxied(ends []*object) (travels, ok bool) {
	key := fmt.Sprintf("pipe[%d]", ends[0].stat.Ino)
	travels, ok = d.opts.Proxied[key]
	if !ok {
		return false, false
	}
	d.proxies[key] = true
	for _, o := range ends {
		o.fact(o.id).External = true
	}
	if why := cannotProxyPipe(ends); why != "" {
		d.refuse(ends[0], why, "hand in another pipe (inherit), or let the program close the end that it does not use")
		travels = false
	}
	return travels, true
}

// cannotProxyPipe says why the bytes of a pipe cannot be carried to and from
// another host; empty: they can.
func cannotProxyPipe(ends []*object) string {
	for _, o := range ends {
		switch {
		case o.flags&unix.O_ACCMODE != ends[0].flags&unix.O_ACCMODE || o.flags&unix.O_ACCMODE == unix.O_RDWR:
			return "the tree has both ends of the pipe open, so that its bytes cannot be told from those of others"
		case o.flags&unix.O_DIRECT != 0:
			return "the pipe is in packet mode, of which a proxy would lose the boundaries"
		}
	}
	return ""
}

func (d *Dumper) socketProxied(o *object) bool {
	_, ok := d.opts.Proxied[fmt.Sprintf("unix[%d]", o.stat.Ino)]
	return ok
}

// proxiedTTY marks the descriptions of a terminal whose master stays where it is.
func (d *Dumper) proxiedTTY(t *terminal) bool {
	for _, o := range t.others {
		key := ttyKey(&o.stat)
		if _, ok := d.opts.Proxied[key]; !ok || !o.state.(*ttyState).hasNode {
			continue
		}
		d.proxies[key] = true
		t.proxied = key
		for _, o := range t.others {
			o.proxied, o.ttyKey = true, key
		}
		return true
	}
	return false
}

// proxiedInput reads what waits in a terminal whose master is the caller's, which
// carries nothing any more; what the tree wrote stays there for the caller.
func (d *Dumper) proxiedInput(t *terminal) error {
	if !d.opts.Proxied[t.proxied] || d.dry() || len(d.refusal.Problems) > 0 {
		return nil
	}
	m := d.opts.Masters[t.proxied]
	if m == nil {
		return fmt.Errorf("the master of %s is not at hand", t.proxied)
	}
	q, err := d.readPair(int(m.Fd()), false)
	if busy := errTTYBusy(""); errors.As(err, &busy) {
		d.passes(t.others[0], fmt.Sprintf("what waits in the terminal cannot be carried at this moment: %s", busy), "retry in a moment")
		return nil
	}
	if err != nil {
		return fmt.Errorf("read what waits in %s: %w", t.proxied, err)
	}
	if in := t.notes(q); len(in) > 0 {
		d.ttyData = append(d.ttyData, &tty.TtyDataEntry{TtyId: proto.Uint32(t.id), Data: in})
	}
	return nil
}

// TerminalReader finds a process outside of the tree that reads what is typed on a
// terminal, by its key: one of the process group in the foreground. What waits for
// the root, such as the shell that started it, does not read. 0: there is none.
func TerminalReader(root int, pids []int, key string) (int, error) {
	rdev, dev, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(key, "tty["), "]"), ":")
	r, rerr := strconv.ParseUint(rdev, 16, 64)
	fs, derr := strconv.ParseUint(dev, 16, 64)
	if err := errors.Join(rerr, derr); err != nil || !ok {
		return 0, fmt.Errorf("%q is no key of a terminal", key)
	}
	all, err := procfs.Pids()
	if err != nil {
		return 0, err
	}
	stats := map[int]procfs.Stat{}
	front := 0 // the group in the foreground
	for _, pid := range all {
		st, err := procfs.ReadStat(pid)
		if err != nil || st.Zombie() || uint64(uint32(st.TTYNr)) != r || devptsOf(pid, r) != fs {
			continue
		}
		stats[pid], front = st, st.TTYPgrp
	}
	ours := slices.ContainsFunc(pids, func(pid int) bool { return front != 0 && stats[pid].Pgrp == front })
	waits := map[int]bool{}
	for st, err := procfs.ReadStat(root); ours && err == nil && st.PPid > 1; st, err = procfs.ReadStat(st.PPid) {
		waits[st.PPid] = true
	}
	for pid, st := range stats {
		if st.Pgrp == front && !slices.Contains(pids, pid) && !waits[pid] {
			return pid, nil
		}
	}
	return 0, nil
}

// devptsOf is the file system of the terminals that a process sees.
func devptsOf(pid int, rdev uint64) uint64 {
	var node unix.Stat_t
	if unix.Stat(procfs.Path(pid, "root")+filepath.Join("/dev/pts", strconv.Itoa(int(ptyIndex(rdev)))), &node) != nil {
		return 0
	}
	return uint64(node.Dev)
}

// proxied carries a connected stream socket whose other end the restore gives
// to its caller.
func (t *unixTree) proxied(o *object, st *unixState) error {
	d, u := t.d, &st.diag
	key := fmt.Sprintf("unix[%d]", o.stat.Ino)
	d.proxies[key] = true
	switch {
	case u.typ != unix.SOCK_STREAM:
		d.refuse(o, "it is no stream socket, and a proxy would lose the boundaries of its messages", "include the process that has the other end in the tree")
		return nil
	case u.state != stateEstablished || u.peer == 0:
		d.refuse(o, "it is not connected, so that there is nothing to proxy", "leave it out of the proxied objects")
		return nil
	case t.byIno[u.peer] != nil:
		d.refuse(o, "both ends of the connection are in the tree, so that there is nothing to proxy", "leave it out of the proxied objects")
		return nil
	}
	st.facts.External = true
	st.e.Peer = noPeer
	if fl := d.flights[o]; fl != nil && slices.ContainsFunc(fl.messages, func(m message) bool { return len(m.rights) > 0 || m.oob }) {
		d.passes(o, "descriptors or a byte out of band wait in it, which a proxy cannot carry", "retry when the program has received them")
		return nil
	}
	if !d.opts.Proxied[key] {
		return nil // what waits stays with the original
	}
	return t.queue(o, st)
}

var noPeer = new(uint32)

// far is where the caller wants the other end of an object, by the text of its
// links or the key of a terminal; nil: nowhere.
func (r *Restorer) far(name string) *plan.Far {
	for k, f := range r.opts.Proxied {
		if k == name {
			return f
		}
		if link, ok := linkOfKey(k); ok && link == name {
			return f
		}
	}
	return nil
}

// CloseFar closes the far ends of a restore that failed.
func CloseFar(far map[string]*plan.Far) {
	for _, f := range far {
		if f.File != nil {
			_ = f.File.Close()
			f.File = nil
		}
	}
}

// Duplicates gives a duplicate of one open description of what a key names for
// each access mode in which the processes have it. They are the caller's.
func Duplicates(pids []int, key string) (out []*os.File, err error) {
	defer func() {
		if err != nil {
			for _, f := range out {
				_ = f.Close()
			}
			out = nil
		}
	}()
	modes := map[int]bool{}
	for _, pid := range pids {
		fds, err := procfs.Fds(pid)
		if procfs.Gone(err) {
			continue
		}
		if err != nil {
			return out, err
		}
		for _, fd := range fds {
			if !leadsTo(pid, fd, key) {
				continue
			}
			f, err := duplicate(pid, fd, key)
			if err != nil {
				return out, err
			}
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
			if acc := flags & (unix.O_ACCMODE | unix.O_PATH); err != nil || modes[acc] || acc&unix.O_PATH != 0 {
				_ = f.Close()
				continue
			} else {
				modes[acc] = true
			}
			out = append(out, f)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no process of the tree has %s open", key)
	}
	return out, nil
}

func leadsTo(pid, fd int, key string) bool {
	link, err := procfs.FdLink(pid, fd)
	if err != nil {
		return false
	}
	if want, ok := linkOfKey(key); ok {
		return link == want
	}
	var st unix.Stat_t
	return strings.HasPrefix(link, "/dev/") && unix.Stat(procfs.Path(pid, "fd", strconv.Itoa(fd)), &st) == nil &&
		st.Mode&unix.S_IFMT == unix.S_IFCHR && ttyKey(&st) == key
}

func duplicate(pid, fd int, name string) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of pid %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	defer func() { _ = unix.Close(pidfd) }()
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate fd %d of pid %d: %w", fd, pid, os.NewSyscallError("pidfd_getfd", err))
	}
	return os.NewFile(uintptr(n), name), nil
}

// HeldOutside says which process has what a key names open, besides those of the
// tree and this one; 0: none.
func HeldOutside(pids []int, key string) (int, error) {
	all, err := procfs.Pids()
	if err != nil {
		return 0, err
	}
	for _, pid := range all {
		if pid == os.Getpid() || slices.Contains(pids, pid) {
			continue
		}
		fds, err := procfs.Fds(pid)
		if err != nil {
			if errors.Is(err, unix.EACCES) {
				return 0, err
			}
			continue
		}
		if slices.ContainsFunc(fds, func(fd int) bool { return leadsTo(pid, fd, key) }) {
			return pid, nil
		}
	}
	return 0, nil
}
