package procfs

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Fdinfo is /proc/PID/fdinfo/FD (proc_pid_fdinfo(5)).
type Fdinfo struct {
	Pos   int64
	Flags uint32 // open flags of the description, O_CLOEXEC of the descriptor
	MntID int
	Ino   uint64
	Locks []Lock

	Eventfd *EventfdInfo
	Timerfd *TimerfdInfo
	Epoll   []EpollTarget
	Inotify []InotifyWatch
	// Sigmask of a signalfd, bit n-1: signal n; valid if HasSigmask.
	Sigmask    uint64
	HasSigmask bool
	Fanotify   *FanotifyInfo
	Pidfd      *PidfdInfo

	// Other are the lines with keys that this package does not know, such as
	// those of io_uring, userfaultfd, DRM and BPF descriptors.
	Other []KeyValue
}

// KeyValue is one unparsed line.
type KeyValue struct{ Key, Value string }

// EventfdInfo belongs to an eventfd.
type EventfdInfo struct {
	Count     uint64
	ID        int
	Semaphore bool
}

// TimerfdInfo belongs to a timerfd; times are ns.
type TimerfdInfo struct {
	ClockID  int
	Ticks    uint64
	Settime  uint32 // flags of timerfd_settime: 1 absolute, 2 cancel on set
	Value    uint64 // until the next expiry, 0: disarmed
	Interval uint64
}

// EpollTarget is one "tfd" line: one watched file of an epoll descriptor.
type EpollTarget struct {
	FD     int // when it was added: the descriptor may since mean another file
	Events uint32
	Data   uint64
	Pos    int64
	Ino    uint64
	Sdev   uint32 // kernel's internal device number: major << 20 | minor
}

// Handle is a file handle as open_by_handle_at(2) takes it.
type Handle struct {
	Type int32
	Data []byte
}

// InotifyWatch is one watch of an inotify descriptor.
type InotifyWatch struct {
	WD     int32
	Ino    uint64
	Sdev   uint32
	Mask   uint32
	Handle Handle
}

// FanotifyInfo belongs to a fanotify group.
type FanotifyInfo struct {
	Flags, EventFlags uint32
	Marks             []FanotifyMark
}

// FanotifyMark is one mark; which of MntID, Ino and Sdev are set depends on Kind.
type FanotifyMark struct {
	Kind    string // "inode", "mount" or "filesystem"
	Ino     uint64
	Sdev    uint32
	MntID   int
	MFlags  uint32
	Mask    uint32
	Ignored uint32
	Handle  Handle
}

// PidfdInfo belongs to a pidfd.
type PidfdInfo struct {
	Pid   int   // -1: reaped; 0: not in the reader's pid namespace
	NSpid []int // from the reader's pid namespace inwards
}

// ParseFdinfo parses an fdinfo file.
func ParseFdinfo(b []byte) (Fdinfo, error) {
	var f Fdinfo
	for no, line := range strings.Split(string(b), "\n") {
		if line == "" {
			continue
		}
		if err := f.line(line); err != nil {
			return Fdinfo{}, fmt.Errorf("line %d: %w", no+1, err)
		}
	}
	return f, nil
}

func (f *Fdinfo) line(line string) error {
	if rest, ok := strings.CutPrefix(line, "inotify "); ok {
		return f.inotify(rest)
	}
	if rest, ok := strings.CutPrefix(line, "fanotify "); ok {
		return f.fanotify(rest)
	}
	key, val, ok := strings.Cut(line, ":")
	if !ok {
		f.Other = append(f.Other, KeyValue{Key: line})
		return nil
	}
	word := strings.TrimSpace(val)
	var err error
	switch key {
	case "pos":
		err = set(&f.Pos, word, 10)
	case "flags":
		err = set(&f.Flags, word, 8)
	case "mnt_id":
		err = set(&f.MntID, word, 10)
	case "ino":
		err = set(&f.Ino, word, 10)
	case "lock":
		var l Lock
		if l, err = ParseLock(word); err == nil {
			f.Locks = append(f.Locks, l)
		}
	case "eventfd-count":
		err = set(&f.eventfd().Count, word, 16)
	case "eventfd-id":
		err = set(&f.eventfd().ID, word, 10)
	case "eventfd-semaphore":
		err = flag(&f.eventfd().Semaphore, word)
	case "sigmask":
		f.HasSigmask = true
		err = set(&f.Sigmask, word, 16)
	case "clockid":
		err = set(&f.timerfd().ClockID, word, 10)
	case "ticks":
		err = set(&f.timerfd().Ticks, word, 10)
	case "settime flags":
		err = set(&f.timerfd().Settime, word, 8)
	case "it_value":
		f.timerfd().Value, err = timespec(word)
	case "it_interval":
		f.timerfd().Interval, err = timespec(word)
	case "tfd":
		err = f.epoll(line)
	case "Pid":
		err = set(&f.pidfd().Pid, word, 10)
	case "NSpid":
		err = ints(&f.pidfd().NSpid, word)
	default:
		f.Other = append(f.Other, KeyValue{Key: key, Value: strings.TrimPrefix(val, "\t")})
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func (f *Fdinfo) eventfd() *EventfdInfo {
	if f.Eventfd == nil {
		f.Eventfd = &EventfdInfo{}
	}
	return f.Eventfd
}

func (f *Fdinfo) timerfd() *TimerfdInfo {
	if f.Timerfd == nil {
		f.Timerfd = &TimerfdInfo{}
	}
	return f.Timerfd
}

func (f *Fdinfo) pidfd() *PidfdInfo {
	if f.Pidfd == nil {
		f.Pidfd = &PidfdInfo{}
	}
	return f.Pidfd
}

// timespec parses "(99, 999931293)", seconds and ns, into ns.
func timespec(s string) (uint64, error) {
	in, ok1 := strings.CutPrefix(s, "(")
	in, ok2 := strings.CutSuffix(in, ")")
	a, b, ok3 := strings.Cut(in, ",")
	if !ok1 || !ok2 || !ok3 {
		return 0, fmt.Errorf("%q is no time", clip(s))
	}
	var sec, ns uint64
	if err := errors.Join(set(&sec, strings.TrimSpace(a), 10), set(&ns, strings.TrimSpace(b), 10)); err != nil {
		return 0, err
	}
	// ktime_t holds at most 2^63-1 ns.
	if sec > 9223372036 || ns >= 1e9 {
		return 0, fmt.Errorf("%q is out of range", clip(s))
	}
	return sec*1e9 + ns, nil
}

// words splits "a:1 b: 2" into pairs: the tfd line has spaces behind some of
// its colons, the others have none.
func words(s string) ([]KeyValue, error) {
	var out []KeyValue
	for s = strings.TrimLeft(s, " \t"); s != ""; s = strings.TrimLeft(s, " \t") {
		i := strings.IndexByte(s, ':')
		if i <= 0 {
			return nil, fmt.Errorf("%q has no key", clip(s))
		}
		var kv KeyValue
		kv.Key, s = s[:i], s[i+1:]
		kv.Value, s = field(s)
		out = append(out, kv)
	}
	return out, nil
}

func (f *Fdinfo) epoll(line string) error {
	kvs, err := words(line)
	if err != nil {
		return err
	}
	var t EpollTarget
	for _, kv := range kvs {
		switch kv.Key {
		case "tfd":
			err = set(&t.FD, kv.Value, 10)
		case "events":
			err = set(&t.Events, kv.Value, 16)
		case "data":
			err = set(&t.Data, kv.Value, 16)
		case "pos":
			err = set(&t.Pos, kv.Value, 10)
		case "ino":
			err = set(&t.Ino, kv.Value, 16)
		case "sdev":
			err = set(&t.Sdev, kv.Value, 16)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
	}
	f.Epoll = append(f.Epoll, t)
	return nil
}

// handle takes the three words of show_mark_fhandle (fs/notify/fdinfo.c).
func handle(h *Handle, kv KeyValue) error {
	switch kv.Key {
	case "fhandle-type":
		n, err := number(kv.Value, 16, 32)
		h.Type = int32(n)
		return err
	case "f_handle":
		b, err := hex.DecodeString(kv.Value)
		if err != nil {
			return fmt.Errorf("%q is not hexadecimal", clip(kv.Value))
		}
		h.Data = b
	}
	return nil
}

func (f *Fdinfo) inotify(rest string) error {
	kvs, err := words(rest)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	var w InotifyWatch
	for _, kv := range kvs {
		switch kv.Key {
		case "wd":
			var n uint64
			n, err = number(kv.Value, 16, 31)
			w.WD = int32(n)
		case "ino":
			err = set(&w.Ino, kv.Value, 16)
		case "sdev":
			err = set(&w.Sdev, kv.Value, 16)
		case "mask":
			err = set(&w.Mask, kv.Value, 16)
		default:
			err = handle(&w.Handle, kv)
		}
		if err != nil {
			return fmt.Errorf("inotify %s: %w", kv.Key, err)
		}
	}
	f.Inotify = append(f.Inotify, w)
	return nil
}

func (f *Fdinfo) fanotify(rest string) error {
	kvs, err := words(rest)
	if err != nil {
		return fmt.Errorf("fanotify: %w", err)
	}
	if f.Fanotify == nil {
		f.Fanotify = &FanotifyInfo{}
	}
	var m FanotifyMark
	var group bool
	for _, kv := range kvs {
		switch kv.Key {
		case "flags":
			group = true
			err = set(&f.Fanotify.Flags, kv.Value, 16)
		case "event-flags":
			group = true
			err = set(&f.Fanotify.EventFlags, kv.Value, 16)
		case "ino":
			m.Kind = "inode"
			err = set(&m.Ino, kv.Value, 16)
		case "mnt_id":
			m.Kind = "mount"
			var n uint64
			n, err = number(kv.Value, 16, 31)
			m.MntID = int(n)
		case "sdev":
			if m.Kind == "" {
				m.Kind = "filesystem"
			}
			err = set(&m.Sdev, kv.Value, 16)
		case "mflags":
			err = set(&m.MFlags, kv.Value, 16)
		case "mask":
			err = set(&m.Mask, kv.Value, 16)
		case "ignored_mask":
			err = set(&m.Ignored, kv.Value, 16)
		default:
			err = handle(&m.Handle, kv)
		}
		if err != nil {
			return fmt.Errorf("fanotify %s: %w", kv.Key, err)
		}
	}
	if !group {
		f.Fanotify.Marks = append(f.Fanotify.Marks, m)
	}
	return nil
}

// ReadFdinfo reads /proc/PID/fdinfo/FD. All threads that share the table of
// files share this, else use ReadTaskFdinfo.
func ReadFdinfo(pid, fd int) (Fdinfo, error) {
	return read(Path(pid, "fdinfo", itoa(fd)), ParseFdinfo)
}

// ReadTaskFdinfo reads the fdinfo of one thread's table of files.
func ReadTaskFdinfo(pid, tid, fd int) (Fdinfo, error) {
	return read(TaskPath(pid, tid, "fdinfo", itoa(fd)), ParseFdinfo)
}
