package files

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/sys"
)

// kindMqueue carries descriptors of POSIX message queues of the host. The queue
// itself stays where it is, with its messages: others of the host may use it.
var kindMqueue = &kind{
	name: "POSIX message queue", note: "of the host: it stays there with its messages; a migration of its users is refused",
	typ: fdinfo.FdTypes_REG,
	takes: func(_ *Dumper, o *object) bool {
		if o.mode()&unix.S_IFMT != unix.S_IFREG || o.isPath() || o.ext || o.first().fd < 0 && !o.inFlight {
			return false
		}
		is, err := sys.IsMqueue(int(o.file.Fd()))
		return err == nil && is
	},
	dump:  dumpMqueue,
	has:   func(r *Restorer, x *description) bool { return r.facts[x.id] != nil && r.facts[x.id].Mqueue != nil },
	check: checkMqueue,
	open:  openEach(openMqueue),
}

// mqueuePath is where the file system of message queues is mounted (mq_overview(7)).
const mqueuePath = "/dev/mqueue/"

func dumpMqueue(d *Dumper, o *object) error {
	if o.stat.Nlink == 0 {
		d.refuse(o, "it is a POSIX message queue of which the name was removed (mq_unlink)", "let the program close it")
		return nil
	}
	name := path.Base(o.link)
	fd, err := sys.MqOpen(name, unix.O_RDONLY)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("open POSIX message queue /%s: %w", name, err)
	}
	same := false
	if err == nil {
		defer func() { _ = unix.Close(fd) }()
		var st unix.Stat_t
		same = unix.Fstat(fd, &st) == nil && inode(&st) == inode(&o.stat)
	}
	if !same {
		d.refuse(o, "it is a POSIX message queue of another IPC namespace than the agent's", "let the program close it")
		return nil
	}
	if d.opts.Elsewhere {
		d.refuse(o, "it is a POSIX message queue, which stays on this host", "let the program close it")
		return nil
	}
	b := make([]byte, 256)
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		return fmt.Errorf("read the state of POSIX message queue /%s: %w", name, os.NewSyscallError("pread", err))
	}
	if pid := notified(string(b[:n])); d.inside[pid] {
		d.refuse(o, fmt.Sprintf("pid %d is to be told when a message comes to this POSIX message queue (mq_notify), which ends with the process", pid),
			"let the program take that back (mq_notify)")
		return nil
	}
	a, err := sys.MqGetAttr(fd)
	if err != nil {
		return err
	}
	o.fact(o.id).Mqueue = &image.MqueueFacts{Name: name, MaxMessages: a.MaxMsg, MessageSize: a.MsgSize}
	o.entries = append(o.entries, d.regEntry(o, o.id, mqueuePath+name))
	return nil
}

// notified is the process that is told of messages, in the text that a queue gives to
// its readers (mq_overview(7)); 0: none.
func notified(text string) int {
	for _, f := range strings.Fields(text) {
		if s, ok := strings.CutPrefix(f, "NOTIFY_PID:"); ok {
			if pid, err := strconv.Atoi(s); err == nil {
				return pid
			}
		}
	}
	return 0
}

func checkMqueue(r *Restorer, x *description) error {
	m, e := r.facts[x.id].Mqueue, x.entry.GetReg()
	switch {
	case m.Name == "" || len(m.Name) > unix.NAME_MAX || m.Name == "." || m.Name == ".." || strings.ContainsAny(m.Name, "/\x00"):
		return fmt.Errorf("%.64q is no name of a POSIX message queue", m.Name)
	case e.GetExt():
		return errors.New("it is external and a POSIX message queue")
	case e.GetPos() > 1<<63-1:
		return fmt.Errorf("the position %d is out of range", e.GetPos())
	}
	return nil
}

func openMqueue(r *Restorer, x *description) error {
	m, e := r.facts[x.id].Mqueue, x.entry.GetReg()
	fd, err := sys.MqOpen(m.Name, int(e.GetFlags())&(unix.O_ACCMODE|unix.O_NONBLOCK|unix.O_CLOEXEC))
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("POSIX message queue /%s is not on this host: %w", m.Name, err)
	}
	if err != nil {
		return fmt.Errorf("open POSIX message queue /%s: %w", m.Name, err)
	}
	x.file = os.NewFile(uintptr(fd), mqueuePath+m.Name)
	a, err := sys.MqGetAttr(fd)
	if err != nil {
		return err
	}
	if a.MaxMsg != m.MaxMessages || a.MsgSize != m.MessageSize {
		return fmt.Errorf("POSIX message queue /%s takes %d messages of %d bytes here, expected %d of %d: it is another one", m.Name, a.MaxMsg, a.MsgSize, m.MaxMessages, m.MessageSize)
	}
	if err := setPosition(x.file, e.GetPos()); err != nil {
		return err
	}
	return setStatus(x.file, e.GetFlags())
}
