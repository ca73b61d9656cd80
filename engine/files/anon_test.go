package files

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

func timer(clock, flags int, value, interval time.Duration, create int) int {
	fd := must1(unix.TimerfdCreate(clock, create))
	spec := &unix.ItimerSpec{Value: unix.NsecToTimespec(int64(value)), Interval: unix.NsecToTimespec(int64(interval))}
	if flags&unix.TFD_TIMER_ABSTIME != 0 {
		var now unix.Timespec
		must(unix.ClockGettime(int32(clock), &now))
		spec.Value = unix.NsecToTimespec(now.Nano() + int64(value))
	}
	must(unix.TimerfdSettime(fd, flags, spec, nil))
	return fd
}

func init() {
	scenes["anon"] = func(string) fds {
		out := fds{
			"event":     must1(unix.Eventfd(7, unix.EFD_NONBLOCK)),
			"semaphore": must1(unix.Eventfd(3, unix.EFD_SEMAPHORE|unix.EFD_CLOEXEC)),
			"big":       must1(unix.Eventfd(0, 0)),
			"oneshot":   timer(unix.CLOCK_MONOTONIC, 0, time.Hour, 0, unix.TFD_NONBLOCK),
			"periodic":  timer(unix.CLOCK_BOOTTIME, 0, time.Hour, 2*time.Hour, 0),
			"absolute":  timer(unix.CLOCK_REALTIME, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, time.Hour, 0, 0),
			"expired":   timer(unix.CLOCK_MONOTONIC, 0, time.Nanosecond, 0, 0),
			"ticking":   timer(unix.CLOCK_REALTIME, unix.TFD_TIMER_ABSTIME, -10*time.Hour+time.Minute, 2*time.Hour, 0),
			"disarmed":  must1(unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0)),
		}
		must1(unix.Write(out["big"], binary.NativeEndian.AppendUint64(nil, 1<<63)))
		var set unix.Sigset_t
		set.Val[0] = 1<<(unix.SIGUSR1-1) | 1<<(unix.SIGCHLD-1) | 1<<63
		out["signal"] = must1(unix.Signalfd(-1, &set, unix.SFD_NONBLOCK))
		return out
	}
}

// state is what fdinfo tells of a descriptor, times rounded to what cannot be
// lost on the way.
type anonState struct {
	Link    string
	Flags   uint32
	Eventfd *procfs.EventfdInfo
	Timerfd *procfs.TimerfdInfo
	Sigmask uint64
}

func anonLook(t *testing.T, pid, fd int) anonState {
	t.Helper()
	info, err := procfs.ReadFdinfo(pid, fd)
	if err != nil {
		t.Fatal(err)
	}
	if info.Eventfd != nil {
		info.Eventfd.ID = 0
	}
	if info.Timerfd != nil {
		const minute = uint64(time.Minute)
		info.Timerfd.Value = (info.Timerfd.Value + minute/2) / minute
	}
	return anonState{lookAt(t, pid, fd).Link, info.Flags &^ unix.O_CLOEXEC, info.Eventfd, info.Timerfd, info.Sigmask}
}

func TestAnonymous(t *testing.T) {
	c := start(t, "anon")
	d := dumpOK(t, Options{}, c)
	want := map[string]anonState{} // after the dump, which makes the kernel count ticks
	for name, fd := range c.fds {
		want[name] = anonLook(t, c.pid(), fd)
	}
	if got := want["ticking"].Timerfd.Ticks; got != 5 {
		t.Errorf("the periodic timer has %d ticks, want 5", got)
	}
	c.kill()
	r := restore(t, d, RestoreOptions{})
	got := map[string]anonState{}
	for name := range c.fds {
		got[name] = anonLook(t, os.Getpid(), r.fd(c, name))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
	for name, want := range map[string]uint64{"event": 7, "semaphore": 1, "expired": 1, "ticking": 5, "big": 1 << 63} {
		b := make([]byte, 8)
		if _, err := unix.Read(r.fd(c, name), b); err != nil || binary.NativeEndian.Uint64(b) != want {
			t.Errorf("%s reads %d, %v, want %d", name, binary.NativeEndian.Uint64(b), err, want)
		}
	}
	if _, err := unix.Read(r.fd(c, "oneshot"), make([]byte, 8)); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a timer that has not expired reads %v", err)
	}
}

func init() {
	scenes["epoll"] = func(string) fds {
		out := fds{"ep": must1(unix.EpollCreate1(0)), "outer": must1(unix.EpollCreate1(unix.EPOLL_CLOEXEC))}
		add := func(ep, fd int, ev uint32, data uint64) {
			must(unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: ev, Fd: int32(data), Pad: int32(data >> 32)}))
		}
		ev := func(n uint, flags int) int { return must1(unix.Eventfd(n, unix.EFD_NONBLOCK|flags)) }
		out["a"], out["b"], out["c"], out["d"] = ev(1, 0), ev(0, 0), ev(0, 0), ev(0, 0)
		ep := out["ep"]
		// A one-shot event that has been delivered, first: nothing else is ready yet.
		add(ep, out["a"], unix.EPOLLIN|unix.EPOLLONESHOT, 0xdeadbeef12345678)
		if n := must1(unix.EpollWait(ep, make([]unix.EpollEvent, 4), 0)); n != 1 {
			must(errors.New("no event"))
		}
		add(ep, out["b"], unix.EPOLLIN|unix.EPOLLET&0xffffffff, 2)
		add(ep, out["c"], unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLEXCLUSIVE, 3)
		add(out["outer"], ep, unix.EPOLLIN, 4)
		// A number that now means another file, whose file lives on under another.
		x := ev(0, 0)
		add(ep, x, unix.EPOLLIN, 5)
		out["moved"] = must1(unix.Dup(x))
		must(unix.Dup3(out["d"], x, unix.O_CLOEXEC))
		add(ep, x, unix.EPOLLOUT, 6)
		out["x"] = x
		// A number that is closed.
		y := ev(0, 0)
		add(ep, y, unix.EPOLLIN, 7)
		out["keep"] = must1(unix.Dup(y))
		must(unix.Close(y))
		var set unix.Sigset_t
		set.Val[0] = 1 << (unix.SIGUSR1 - 1)
		out["signal"] = must1(unix.Signalfd(-1, &set, unix.SFD_NONBLOCK))
		add(ep, out["signal"], unix.EPOLLIN, 8)
		return out
	}
}

// epollLook lists what an epoll watches, without what a move may change.
func epollLook(t *testing.T, pid, fd int) []procfs.EpollTarget {
	t.Helper()
	info, err := procfs.ReadFdinfo(pid, fd)
	if err != nil {
		t.Fatal(err)
	}
	for i := range info.Epoll {
		info.Epoll[i].Ino, info.Epoll[i].Sdev = 0, 0
	}
	slices.SortFunc(info.Epoll, func(a, b procfs.EpollTarget) int { return int(a.Data&0xff) - int(b.Data&0xff) })
	return info.Epoll
}

func TestEpoll(t *testing.T) {
	c := start(t, "epoll")
	want := map[string][]procfs.EpollTarget{"ep": epollLook(t, c.pid(), c.fds["ep"]), "outer": epollLook(t, c.pid(), c.fds["outer"])}
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	n := r.land(c, 1)
	got := map[string][]procfs.EpollTarget{"ep": epollLook(t, n.pid(), c.fds["ep"]), "outer": epollLook(t, n.pid(), c.fds["outer"])}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("watched files differ (-before +after):\n%s", diff)
	}
	// A second dump of the restored one must come to the same images.
	d2 := dumpAll(t, Options{}, n)
	if len(d2.problems) > 0 {
		t.Error(d2.problems[0])
	}
	for x, fd := range r.Restorer.tables[1].spare {
		if ord, err := sys.KcmpFile(os.Getpid(), int(x.file.Fd()), n.pid(), fd); err == nil && ord == sys.Equal {
			t.Errorf("fd %d is left over", fd)
		}
	}
	// The number x means what it meant, close-on-exec included.
	if info, err := procfs.ReadFdinfo(n.pid(), c.fds["x"]); err != nil || info.Flags&unix.O_CLOEXEC == 0 {
		t.Errorf("fd x: %+v, %v", info, err)
	}
	// The spent one-shot event stays spent; writing to the moved file is reported.
	ep := r.fd(c, "ep")
	if _, err := unix.Write(r.fd(c, "moved"), []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	evs := make([]unix.EpollEvent, 8)
	k, err := unix.EpollWait(ep, evs, 0)
	if err != nil {
		t.Fatal(err)
	}
	var data []int32
	for _, e := range evs[:k] {
		data = append(data, e.Fd)
	}
	slices.Sort(data)
	// c and x are writable, moved is readable.
	if diff := cmp.Diff([]int32{3, 5, 6}, data); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func init() {
	scenes["owner"] = func(string) fds {
		a, b := newPipe(unix.O_NONBLOCK)
		must1(unix.FcntlInt(uintptr(a), unix.F_SETOWN, os.Getpid()))
		must1(unix.FcntlInt(uintptr(a), 10, int(unix.SIGURG)))
		must1(unix.FcntlInt(uintptr(a), unix.F_SETFL, unix.O_ASYNC|unix.O_NONBLOCK))
		return fds{"r": a, "w": b}
	}
}

func TestOwner(t *testing.T) {
	c := start(t, "owner")
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	n := r.land(c, 1)
	fd := r.fd(c, "r")
	if own, err := unix.FcntlInt(uintptr(fd), unix.F_GETOWN, 0); err != nil || own != n.pid() {
		t.Errorf("owner %d, %v, want %d", own, err, n.pid())
	}
	if sig, err := unix.FcntlInt(uintptr(fd), 11, 0); err != nil || sig != int(unix.SIGURG) {
		t.Errorf("signal %d, %v", sig, err)
	}
	if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || fl&unix.O_ASYNC == 0 || fl&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, %v", fl, err)
	}
}
