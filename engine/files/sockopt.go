package files

import (
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/sys"
)

// soBufLock is SO_BUF_LOCK (include/uapi/asm-generic/socket.h, Linux 5.15).
const soBufLock = 72

// getOpt reads a number option; a kernel or family that does not have it gives ok false.
func getOpt(fd, level, opt int) (n int, ok bool, err error) {
	n, err = unix.GetsockoptInt(fd, level, opt)
	switch {
	case err == nil:
		return n, true, nil
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.EOPNOTSUPP):
		return 0, false, nil
	}
	return 0, false, fmt.Errorf("option %d of level %d: %w", opt, level, os.NewSyscallError("getsockopt", err))
}

// boolOpts are the yes-or-no options of level SOL_SOCKET, with their fields.
var boolOpts = []struct {
	opt int
	get func(*sk_opts.SkOptsEntry) *bool
	set func(*sk_opts.SkOptsEntry, *bool)
}{
	{unix.SO_REUSEADDR, func(e *sk_opts.SkOptsEntry) *bool { return e.Reuseaddr }, func(e *sk_opts.SkOptsEntry, b *bool) { e.Reuseaddr = b }},
	{unix.SO_REUSEPORT, func(e *sk_opts.SkOptsEntry) *bool { return e.SoReuseport }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoReuseport = b }},
	{unix.SO_PASSCRED, func(e *sk_opts.SkOptsEntry) *bool { return e.SoPasscred }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoPasscred = b }},
	{unix.SO_PASSSEC, func(e *sk_opts.SkOptsEntry) *bool { return e.SoPasssec }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoPasssec = b }},
	{unix.SO_DONTROUTE, func(e *sk_opts.SkOptsEntry) *bool { return e.SoDontroute }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoDontroute = b }},
	{unix.SO_NO_CHECK, func(e *sk_opts.SkOptsEntry) *bool { return e.SoNoCheck }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoNoCheck = b }},
	{unix.SO_BROADCAST, func(e *sk_opts.SkOptsEntry) *bool { return e.SoBroadcast }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoBroadcast = b }},
	{unix.SO_KEEPALIVE, func(e *sk_opts.SkOptsEntry) *bool { return e.SoKeepalive }, func(e *sk_opts.SkOptsEntry, b *bool) { e.SoKeepalive = b }},
}

// numOpts are the number options of level SOL_SOCKET.
var numOpts = []struct {
	opt int
	get func(*sk_opts.SkOptsEntry) *uint32
	set func(*sk_opts.SkOptsEntry, *uint32)
}{
	{unix.SO_PRIORITY, func(e *sk_opts.SkOptsEntry) *uint32 { return e.SoPriority }, func(e *sk_opts.SkOptsEntry, n *uint32) { e.SoPriority = n }},
	{unix.SO_RCVLOWAT, func(e *sk_opts.SkOptsEntry) *uint32 { return e.SoRcvlowat }, func(e *sk_opts.SkOptsEntry, n *uint32) { e.SoRcvlowat = n }},
	{unix.SO_MARK, func(e *sk_opts.SkOptsEntry) *uint32 { return e.SoMark }, func(e *sk_opts.SkOptsEntry, n *uint32) { e.SoMark = n }},
	{unix.SO_OOBINLINE, func(e *sk_opts.SkOptsEntry) *uint32 { return e.SoOobinline }, func(e *sk_opts.SkOptsEntry, n *uint32) { e.SoOobinline = n }},
	{soBufLock, func(e *sk_opts.SkOptsEntry) *uint32 { return e.SoBufLock }, func(e *sk_opts.SkOptsEntry, n *uint32) { e.SoBufLock = n }},
}

// dumpSockOpts reads the options of level SOL_SOCKET and a filter; what has no
// field in the entry becomes facts.
func (d *Dumper) dumpSockOpts(o *object) (*sk_opts.SkOptsEntry, error) {
	fd := int(o.file.Fd())
	e := &sk_opts.SkOptsEntry{}
	snd, _, err := getOpt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return nil, err
	}
	rcv, _, err := getOpt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return nil, err
	}
	e.SoSndbuf, e.SoRcvbuf = proto.Uint32(uint32(snd)), proto.Uint32(uint32(rcv))
	st, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_SNDTIMEO", err)
	}
	rt, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_RCVTIMEO", err)
	}
	e.SoSndTmoSec, e.SoSndTmoUsec = proto.Uint64(uint64(st.Sec)), proto.Uint64(uint64(st.Usec))
	e.SoRcvTmoSec, e.SoRcvTmoUsec = proto.Uint64(uint64(rt.Sec)), proto.Uint64(uint64(rt.Usec))
	for _, b := range boolOpts {
		n, ok, err := getOpt(fd, unix.SOL_SOCKET, b.opt)
		if err != nil {
			return nil, err
		}
		if ok {
			b.set(e, proto.Bool(n != 0))
		}
	}
	for _, x := range numOpts {
		n, ok, err := getOpt(fd, unix.SOL_SOCKET, x.opt)
		if err != nil {
			return nil, err
		}
		if ok {
			x.set(e, proto.Uint32(uint32(n)))
		}
	}
	if l, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER); err == nil && l.Onoff != 0 {
		e.SoLinger = proto.Uint32(uint32(l.Linger))
	}
	dev, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
	if err == nil && dev != "" {
		e.SoBoundDev = proto.String(dev)
	}
	if err := d.dumpFilter(o, e); err != nil {
		return nil, err
	}
	return e, d.dumpSockExtra(o)
}

// dumpFilter reads a classic filter. A TCP connection is muted by a filter while
// its stream is read, so that one of its own stands in the way.
func (d *Dumper) dumpFilter(o *object, e *sk_opts.SkOptsEntry) error {
	fd := int(o.file.Fd())
	prog, err := sys.GetFilter(fd)
	switch {
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EACCES):
		d.refuse(o, "an eBPF program is attached to it (SO_ATTACH_BPF)", "detach it (SO_DETACH_BPF)")
		return nil
	case err != nil:
		return err
	case len(prog) == 0:
		return nil
	}
	if _, err := unix.Getpeername(fd); err == nil {
		if k, err := sockTypeOf(fd); err == nil && k.inet() && k.typ == unix.SOCK_STREAM {
			d.refuse(o, "a socket filter is attached to a connection", "detach it (SO_DETACH_FILTER)")
			return nil
		}
	}
	for _, f := range prog {
		e.SoFilter = append(e.SoFilter, uint64(f.Code)|uint64(f.Jt)<<16|uint64(f.Jf)<<24|uint64(f.K)<<32)
	}
	return nil
}

// checkSockOpts validates options, which are untrusted.
func checkSockOpts(e *sk_opts.SkOptsEntry) error {
	switch {
	case e == nil:
		return errors.New("its options are missing")
	case len(e.GetSoFilter()) > unix.BPF_MAXINSNS:
		return fmt.Errorf("a socket filter of %d instructions", len(e.GetSoFilter()))
	}
	return nil
}

func restoreFilter(fd int, e *sk_opts.SkOptsEntry) error {
	if len(e.GetSoFilter()) == 0 {
		return nil
	}
	prog := make([]unix.SockFilter, len(e.GetSoFilter()))
	for i, w := range e.GetSoFilter() {
		prog[i] = unix.SockFilter{Code: uint16(w), Jt: uint8(w >> 16), Jf: uint8(w >> 24), K: uint32(w >> 32)}
	}
	return sys.SetFilter(fd, prog)
}

// restoreSockOpts sets the options that matter before bind(2) and the rest alike.
// reuse is SO_REUSEADDR for as long as the socket is being bound.
func (r *Restorer) restoreSockOpts(x *description, e *sk_opts.SkOptsEntry, reuse *bool) error {
	if err := restoreCRIUOpts(int(x.file.Fd()), e, reuse); err != nil {
		return err
	}
	return r.restoreSockExtra(x)
}

// restoreCRIUOpts sets those that CRIU's message has.
func restoreCRIUOpts(fd int, e *sk_opts.SkOptsEntry, reuse *bool) error {
	// The filter first: what it drops must not come while the rest is set.
	if err := restoreFilter(fd, e); err != nil {
		return err
	}
	set := func(opt, n int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, n); err != nil {
			return fmt.Errorf("option %d: %w", opt, os.NewSyscallError("setsockopt", err))
		}
		return nil
	}
	// The kernel doubles what is set. The number that is read of an untouched
	// socket need not be even: then it must not be set.
	for _, b := range []struct {
		force, opt int
		want       uint32
	}{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, e.GetSoSndbuf()}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, e.GetSoRcvbuf()}} {
		have, _, err := getOpt(fd, unix.SOL_SOCKET, b.opt)
		if err != nil {
			return err
		}
		if b.want != 0 && uint32(have) != b.want {
			if err := set(b.force, int(b.want/2)); err != nil {
				return err
			}
		}
	}
	for _, b := range boolOpts {
		v := b.get(e)
		if b.opt == unix.SO_REUSEADDR && reuse != nil {
			v = reuse
		}
		if v == nil {
			continue
		}
		if err := setIfOther(fd, b.opt, btoi(*v)); err != nil {
			return err
		}
	}
	for _, x := range numOpts {
		if v := x.get(e); v != nil {
			if err := setIfOther(fd, x.opt, int(*v)); err != nil {
				return err
			}
		}
	}
	if e.SoLinger != nil {
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(e.GetSoLinger())}); err != nil {
			return os.NewSyscallError("setsockopt SO_LINGER", err)
		}
	}
	for _, t := range []struct {
		opt       int
		sec, usec uint64
	}{{unix.SO_SNDTIMEO, e.GetSoSndTmoSec(), e.GetSoSndTmoUsec()}, {unix.SO_RCVTIMEO, e.GetSoRcvTmoSec(), e.GetSoRcvTmoUsec()}} {
		if t.sec|t.usec == 0 {
			continue
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, t.opt, &unix.Timeval{Sec: int64(t.sec), Usec: int64(t.usec)}); err != nil {
			return fmt.Errorf("option %d: %w", t.opt, os.NewSyscallError("setsockopt", err))
		}
	}
	if dev := e.GetSoBoundDev(); dev != "" {
		if err := unix.BindToDevice(fd, dev); err != nil {
			return fmt.Errorf("bind to network device %s: %w", dev, os.NewSyscallError("setsockopt SO_BINDTODEVICE", err))
		}
	}
	return nil
}

// setIfOther sets an option of level SOL_SOCKET unless it is so already: some
// cannot be set on every kind of socket, not even to what they are.
func setIfOther(fd, opt, want int) error {
	have, ok, err := getOpt(fd, unix.SOL_SOCKET, opt)
	if err != nil || (ok && have == want) {
		return err
	}
	if !ok && want == 0 {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, want); err != nil {
		return fmt.Errorf("option %d: %w", opt, os.NewSyscallError("setsockopt", err))
	}
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// refuseOtherNetns refuses what lives in another network namespace than this process:
// it would be made in the wrong one. other says that it does.
func (d *Dumper) refuseOtherNetns(o *object) (other bool, err error) {
	if d.netns == (inodeID{}) {
		var st unix.Stat_t
		if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
			return false, &os.PathError{Op: "stat", Path: "/proc/thread-self/ns/net", Err: err}
		}
		d.netns = inode(&st)
	}
	ns, err := netnsOf(o.file)
	if err != nil {
		return false, err
	}
	defer func() { _ = ns.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	if other = inode(&st) != d.netns; other {
		d.refuse(o, "it is in another network namespace", "run the agent in the network namespace of the tree")
	}
	return other, nil
}
