package files

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
)

// kindPidfd carries pidfd_open(2)'s descriptors of processes, zombies and threads
// of the tree, and those of processes that ended and were reaped.
var kindPidfd = &kind{
	name: "pidfd", typ: fdinfo.FdTypes_PIDFD,
	takes: func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[pidfd]" && o.info.Pidfd != nil },
	dump:  dumpPidfd,
	check: checkPidfd,
	open:  openPidfds,
}

// pidReaped stands for the pid of a process that was reaped, here as in fdinfo.
const pidReaped = -1

func dumpPidfd(d *Dumper, o *object) error {
	pid := pidReaped
	if host := o.info.Pidfd.Pid; host != pidReaped {
		st, err := procfs.ReadStatus(host)
		switch {
		case host != 0 && procfs.Gone(err) && d.dry():
			return nil // it ended just now
		case err != nil && host != 0:
			return fmt.Errorf("look at pid %d, to which a pidfd leads: %w", host, err)
		case host == 0 || !d.inside[st.Tgid] && (!st.Zombie() || !d.inside[st.PPid]):
			d.refuse(o, fmt.Sprintf("it is a pidfd of process %d (%s), outside the tree", host, st.Name), "let the program close it, or move a tree that has both")
			return nil
		}
		pid = st.NSPid()
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_PIDFD.Enum(), Id: proto.Uint32(o.id), Pidfd: &pidfd.PidfdEntry{
		Id: proto.Uint32(o.id), Ino: proto.Uint32(uint32(o.stat.Ino)), Flags: proto.Uint32(uint32(o.flags)), Nspid: proto.Int32(int32(pid)), Fown: o.fown,
	}})
	return nil
}

func checkPidfd(_ *Restorer, x *description) error {
	if pid := x.entry.GetPidfd().GetNspid(); pid != pidReaped && pid <= 0 {
		return fmt.Errorf("%d is not the pid of a process", pid)
	}
	return nil
}

// openPidfds opens the pidfds of the tree's processes, which are there already
// but have not run. Those of one reaped process lead to one reaped process again.
func openPidfds(r *Restorer, xs []*description) []error {
	var errs []error
	reaped := map[uint32][]*description{}
	for _, x := range xs {
		e := x.entry.GetPidfd()
		if e.GetNspid() == pidReaped {
			reaped[e.GetIno()] = append(reaped[e.GetIno()], x)
			continue
		}
		pid, ok := int(e.GetNspid()), true
		if r.opts.Pid != nil {
			pid, ok = r.opts.Pid(pid)
		}
		if !ok {
			errs = append(errs, fmt.Errorf("%s: it is a pidfd of process %d, which is not among the images", r.who(x), e.GetNspid()))
			continue
		}
		if err := openPidfd(x, pid); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
		}
	}
	for _, same := range reaped {
		err := WithStillborn(func(pid int) error {
			for _, x := range same {
				if err := openPidfd(x, pid); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: make a pidfd of a process that has ended: %w", r.who(same[0]), err))
		}
	}
	return errs
}

func openPidfd(x *description, pid int) error {
	flags := x.entry.GetPidfd().GetFlags()
	// PIDFD_NONBLOCK and PIDFD_THREAD are these bits (include/uapi/linux/pidfd.h).
	fd, err := unix.PidfdOpen(pid, int(flags)&(unix.PIDFD_NONBLOCK|unix.O_EXCL))
	if err != nil {
		return fmt.Errorf("open a pidfd of process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	x.file = os.NewFile(uintptr(fd), "pidfd")
	return setStatus(x.file, flags)
}

// WithStillborn calls f with a process that has never run and is reaped
// afterwards: it is this program, stopped at its exec by ptrace(2).
func WithStillborn(f func(pid int) error) error {
	runtime.LockOSThread() // the tracer
	defer runtime.UnlockOSThread()
	p, err := os.StartProcess("/proc/self/exe", []string{"godwit-stillborn"}, &os.ProcAttr{
		Env: []string{}, Sys: &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}})
	if err != nil {
		return err
	}
	err = f(p.Pid)
	return errors.Join(err, end(p))
}

// end kills a child and reaps it.
func end(p *os.Process) error {
	if err := unix.Kill(p.Pid, unix.SIGKILL); err != nil {
		return os.NewSyscallError("kill", err)
	}
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(p.Pid, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return os.NewSyscallError("wait4", err)
		case ws.Exited() || ws.Signaled():
			return p.Release()
		}
	}
}
