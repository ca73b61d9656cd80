package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

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
