package files

import (
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// kindTimerfd carries timerfd_create(2): clock, expiry, interval and expiries not
// yet read. Time that passes while the tree is frozen does not count, except for a
// timer that was set to a point in wall-clock time.
var kindTimerfd = &kind{
	name: "timerfd", typ: fdinfo.FdTypes_TIMERFD,
	takes: func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[timerfd]" },
	dump:  dumpTimerfd,
	check: checkTimerfd,
	open:  openEach(openTimerfd),
	seal:  openEach(armTimerfd),
}

func dumpTimerfd(d *Dumper, o *object) error {
	fd := int(o.file.Fd())
	if !d.dry() {
		// A periodic timer counts what it missed only when it is asked
		// (fs/timerfd.c timerfd_gettime); nothing is taken away by that.
		var now unix.ItimerSpec
		if err := unix.TimerfdGettime(fd, &now); err != nil {
			return os.NewSyscallError("timerfd_gettime", err)
		}
	}
	info, err := procfs.ReadFdinfo(os.Getpid(), fd)
	if err != nil {
		return err
	}
	t := info.Timerfd
	if t == nil {
		return errors.New("its fdinfo tells no time")
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_TIMERFD.Enum(), Id: proto.Uint32(o.id), Tfd: &timerfd.TimerfdEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown,
		Clockid: proto.Uint32(uint32(t.ClockID)), Ticks: proto.Uint64(t.Ticks), SettimeFlags: proto.Uint32(t.Settime),
		Vsec: proto.Uint64(t.Value / 1e9), Vnsec: proto.Uint64(t.Value % 1e9),
		Isec: proto.Uint64(t.Interval / 1e9), Insec: proto.Uint64(t.Interval % 1e9),
	}})
	return nil
}

func checkTimerfd(_ *Restorer, x *description) error {
	e := x.entry.GetTfd()
	switch e.GetClockid() {
	case unix.CLOCK_REALTIME, unix.CLOCK_MONOTONIC, unix.CLOCK_BOOTTIME, unix.CLOCK_REALTIME_ALARM, unix.CLOCK_BOOTTIME_ALARM:
	default:
		return fmt.Errorf("clock %d cannot have a timerfd", e.GetClockid())
	}
	if e.GetVnsec() >= 1e9 || e.GetInsec() >= 1e9 || e.GetVsec() > math.MaxInt64/1_000_000_000 || e.GetIsec() > math.MaxInt64/1_000_000_000 {
		return errors.New("its time is out of range")
	}
	if e.GetSettimeFlags()&^(unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET) != 0 {
		return fmt.Errorf("unknown flags %#x of timerfd_settime", e.GetSettimeFlags())
	}
	return nil
}

func openTimerfd(_ *Restorer, x *description) error {
	e := x.entry.GetTfd()
	fd, err := unix.TimerfdCreate(int(e.GetClockid()), unix.TFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("timerfd_create", err)
	}
	x.file = os.NewFile(uintptr(fd), "timerfd")
	return setStatus(x.file, e.GetFlags())
}

// armTimerfd starts the timer, as late as possible: it runs from now on.
func armTimerfd(r *Restorer, x *description) error {
	if x.file == nil {
		return nil
	}
	e := x.entry.GetTfd()
	fd := int(x.file.Fd())
	spec := unix.ItimerSpec{
		Value:    unix.Timespec{Sec: int64(e.GetVsec()), Nsec: int64(e.GetVnsec())},
		Interval: unix.Timespec{Sec: int64(e.GetIsec()), Nsec: int64(e.GetInsec())},
	}
	flags := int(e.GetSettimeFlags())
	armed := spec.Value != (unix.Timespec{})
	if armed && flags&unix.TFD_TIMER_ABSTIME != 0 {
		base, err := r.timeBase(int32(e.GetClockid()))
		if err != nil {
			return err
		}
		spec.Value = unix.NsecToTimespec(addNsec(base, spec.Value.Nano()))
	}
	if armed || spec.Interval != (unix.Timespec{}) || flags != 0 {
		if err := unix.TimerfdSettime(fd, flags, &spec, nil); err != nil {
			return os.NewSyscallError("timerfd_settime", err)
		}
	}
	if n := e.GetTicks(); n != 0 {
		if err := setTicks(fd, n, flags, armed, spec); err != nil {
			return fmt.Errorf("set %d expiries: %w", n, err)
		}
	}
	return nil
}

// setTicks sets the expiries not yet read. A kernel without TFD_IOC_SET_TICKS can
// still have the common case: the one expiry of a timer that is over.
func setTicks(fd int, n uint64, flags int, armed bool, spec unix.ItimerSpec) error {
	err := sys.TimerfdSetTicks(fd, n)
	if !errors.Is(err, unix.ENOTTY) || n != 1 || armed || spec.Interval != (unix.Timespec{}) {
		return err
	}
	spec.Value = unix.Timespec{Nsec: 1}
	return os.NewSyscallError("timerfd_settime", unix.TimerfdSettime(fd, flags&^unix.TFD_TIMER_CANCEL_ON_SET, &spec, nil))
}

// timeBase is the point from which the recorded remaining time of an absolute
// timer counts: now, but for wall-clock timers the moment of the freeze.
func (r *Restorer) timeBase(clock int32) (int64, error) {
	if clock == unix.CLOCK_REALTIME || clock == unix.CLOCK_REALTIME_ALARM {
		if f := r.set.Facts; f != nil && f.RealtimeNS > 0 {
			return f.RealtimeNS, nil
		}
	}
	var now unix.Timespec
	if err := unix.ClockGettime(clock, &now); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return now.Nano(), nil
}

// addNsec adds without overflow.
func addNsec(a, b int64) int64 {
	if b > math.MaxInt64-a {
		return math.MaxInt64
	}
	return a + b
}
