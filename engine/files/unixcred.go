package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Actor is a process that executes system calls for the Restorer and is shown as
// the one that did so: with its pid, and the credentials that it assumes.
type Actor interface {
	// Pid is the one on this host.
	Pid() int
	// Give puts files into it and returns their numbers there.
	Give(files []*os.File) ([]int, error)
	Run(calls ...*ptrace.Call) error
	// Self are its own ids, as it calls them.
	Self() (uid, gid uint32, groups []uint32, err error)
}

// dumpPeerCred reads whom SO_PEERCRED shows; nil: nobody.
func (d *Dumper) dumpPeerCred(o *object) (*image.Credentials, error) {
	fd := int(o.file.Fd())
	u, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	if u.Pid == 0 && u.Uid == ^uint32(0) {
		return nil, nil
	}
	c := &image.Credentials{PID: d.vpidOf(uint32(u.Pid)), UID: u.Uid, GID: u.Gid}
	if c.Groups, err = sys.PeerGroups(fd); errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOPROTOOPT) {
		err = nil
	}
	c.UID, c.GID, c.Groups = d.ids.UID(c.UID), d.ids.GID(c.GID), d.ids.Groups(c.Groups)
	return c, err
}

// maxCredGroups is NGROUPS_MAX (include/uapi/linux/limits.h).
const maxCredGroups = 65536

// maxPid is above all pids of a 64-bit kernel (include/linux/threads.h).
const maxPid = 4 << 20

func checkCred(c *image.Credentials) error {
	switch {
	case c == nil:
	case c.PID >= maxPid:
		return fmt.Errorf("credentials of pid %d, which cannot be", c.PID)
	case len(c.Groups) > maxCredGroups:
		return fmt.Errorf("credentials with %d groups", len(c.Groups))
	case c.UID == ^uint32(0) || c.GID == ^uint32(0):
		return errors.New("credentials without a user or group")
	}
	return nil
}

func sameCred(a, b *image.Credentials) bool {
	return a == b || a != nil && b != nil && a.PID == b.PID && a.UID == b.UID && a.GID == b.GID && slices.Equal(a.Groups, b.Groups)
}

func put32s(vs []uint32) []byte {
	var b []byte
	for _, v := range vs {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

func groupCall(groups []uint32) *ptrace.Call {
	if len(groups) == 0 {
		return ptrace.NewCall("set groups", unix.SYS_SETGROUPS, ptrace.Int(0), ptrace.Int(0))
	}
	return ptrace.NewCall("set groups", unix.SYS_SETGROUPS, ptrace.Int(len(groups)), ptrace.Bytes(put32s(groups)))
}

// act executes calls in the actor of c with its effective credentials; the access
// to files is this process's (setfsuid(2)). The actor has its own back afterwards.
func act(a Actor, c *image.Credentials, calls ...*ptrace.Call) error {
	const keep = -1
	uid, gid, own, err := a.Self()
	if err != nil {
		return err
	}
	groups := func(gs []uint32) []*ptrace.Call {
		if slices.Equal(c.Groups, own) { // which a user namespace may forbid
			return nil
		}
		return []*ptrace.Call{groupCall(gs)}
	}
	set := func(what string, nr uintptr, id uint32) *ptrace.Call {
		return ptrace.NewCall(what, nr, ptrace.Int(keep), ptrace.Int(id), ptrace.Int(keep))
	}
	all := append(groups(c.Groups),
		set("assume a group", unix.SYS_SETRESGID, c.GID),
		set("assume a user", unix.SYS_SETRESUID, c.UID),
		ptrace.NewCall("keep the access to files", unix.SYS_SETFSUID, ptrace.Int(uid)))
	all = append(all, calls...)
	all = append(all,
		set("be root again", unix.SYS_SETRESUID, uid),
		set("have root's group again", unix.SYS_SETRESGID, gid))
	return a.Run(append(all, groups(own)...)...)
}

// take gets a descriptor out of the actor.
func take(a Actor, fd int, name string) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(a.Pid(), 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_getfd", err)
	}
	return os.NewFile(uintptr(n), name), nil
}

func closeCall(fd int) *ptrace.Call {
	return ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(fd))
}

// actor finds who acts for c; nil: nobody but this process can.
func (u *unixOpener) actor(c *image.Credentials) (Actor, error) {
	if c == nil || u.r.opts.Actor == nil {
		return nil, nil
	}
	a, err := u.r.opts.Actor(int(c.PID))
	if err != nil && c.PID != 0 {
		u.r.log.Warn("the pid that made a connection of a unix socket is another process here: its peer sees a pid that has ended", "pid", c.PID, "error", err)
		a, err = u.r.opts.Actor(0)
	}
	return a, err
}

// listenAs makes f a listener of which those who connect see c.
func (u *unixOpener) listenAs(f *os.File, c *image.Credentials, backlog int) error {
	a, err := u.actor(c)
	if err != nil {
		return err
	}
	if a == nil {
		return os.NewSyscallError("listen", unix.Listen(int(f.Fd()), backlog))
	}
	fds, err := a.Give([]*os.File{f})
	if err != nil {
		return err
	}
	return act(a, c, ptrace.NewCall("listen", unix.SYS_LISTEN, ptrace.Int(fds[0]), ptrace.Int(backlog)), closeCall(fds[0]))
}

// connectAs connects f to a name as c; whoever accepts sees c.
func (u *unixOpener) connectAs(f *os.File, c *image.Credentials, to address) error {
	a, err := u.actor(c)
	if err != nil {
		return err
	}
	if a == nil {
		return u.reach(to, func(name []byte) error { return sys.ConnectUnix(int(f.Fd()), name) })
	}
	give := []*os.File{f}
	if to.dir != "" {
		d, err := u.dirOf(to)
		if err != nil {
			return err
		}
		defer func() { _ = d.Close() }()
		give = append(give, d)
	}
	fds, err := a.Give(give)
	if err != nil {
		return err
	}
	sa := append(binary.NativeEndian.AppendUint16(nil, unix.AF_UNIX), to.name...)
	calls := []*ptrace.Call{ptrace.NewCall(fmt.Sprintf("connect to %q", to.name), unix.SYS_CONNECT, ptrace.Int(fds[0]), ptrace.Bytes(sa), ptrace.Int(len(sa))), closeCall(fds[0])}
	if to.dir != "" {
		calls = append([]*ptrace.Call{ptrace.NewCall("enter "+to.dir, unix.SYS_FCHDIR, ptrace.Int(fds[1]))}, calls...)
		calls = append(calls, ptrace.NewCall("leave "+to.dir, unix.SYS_CHDIR, ptrace.Str("/")), closeCall(fds[1]))
	}
	return act(a, c, calls...)
}

// pairAs makes a socket pair of which both ends see c.
func (u *unixOpener) pairAs(typ uint32, c *image.Credentials) (a, b *os.File, err error) {
	actor, err := u.actor(c)
	if err != nil {
		return nil, nil, err
	}
	var p [2]int
	if actor == nil {
		if p, err = unix.Socketpair(unix.AF_UNIX, int(typ)|unix.SOCK_CLOEXEC, 0); err != nil {
			return nil, nil, os.NewSyscallError("socketpair", err)
		}
		return socketFile(p[0]), socketFile(p[1]), nil
	}
	out := make([]byte, 8)
	err = act(actor, c, ptrace.NewCall("make a socket pair", unix.SYS_SOCKETPAIR, ptrace.Int(unix.AF_UNIX), ptrace.Int(typ|unix.SOCK_CLOEXEC), ptrace.Int(0), ptrace.Buf(out)))
	if err != nil {
		return nil, nil, err
	}
	for i := range p {
		p[i] = int(int32(binary.NativeEndian.Uint32(out[4*i:])))
	}
	defer func() { err = errors.Join(err, actor.Run(closeCall(p[0]), closeCall(p[1]))) }()
	if a, err = take(actor, p[0], "unix socket"); err != nil {
		return nil, nil, err
	}
	if b, err = take(actor, p[1], "unix socket"); err != nil {
		return nil, nil, errors.Join(err, a.Close())
	}
	return a, b, nil
}
