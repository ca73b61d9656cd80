package files

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
)

func init() {
	scenes["pidfds"] = func(string) fds {
		p := exec.Command("/bin/true")
		must(p.Start())
		out := fds{
			"self": must1(unix.PidfdOpen(os.Getpid(), unix.PIDFD_NONBLOCK)),
			"dead": must1(unix.PidfdOpen(p.Process.Pid, 0)), "same": must1(unix.PidfdOpen(p.Process.Pid, 0)),
		}
		must(p.Wait())
		return out
	}
	scenes["pidfd-outside"] = func(string) fds {
		return fds{"parent": must1(unix.PidfdOpen(os.Getppid(), 0))}
	}
}

// led is the process to which a pidfd of this process leads.
func led(t *testing.T, fd int) int {
	t.Helper()
	i, err := procfs.ReadFdinfo(os.Getpid(), fd)
	if err != nil {
		t.Fatal(err)
	}
	if i.Pidfd == nil {
		t.Fatalf("fd %d is no pidfd", fd)
	}
	return i.Pidfd.Pid
}

func TestPidfds(t *testing.T) {
	c := start(t, "pidfds")
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{Pid: func(pid int) (int, bool) { return os.Getpid(), pid == c.pid() }})
	if got := led(t, r.fd(c, "self")); got != os.Getpid() {
		t.Errorf("pidfd of the process itself leads to %d", got)
	}
	if f := lookAt(t, os.Getpid(), r.fd(c, "self")).Flags; f&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %o are without O_NONBLOCK", f)
	}
	var dead, same unix.Stat_t
	for name, st := range map[string]*unix.Stat_t{"dead": &dead, "same": &same} {
		if got := led(t, r.fd(c, name)); got != pidReaped {
			t.Errorf("%s: pidfd of a reaped process leads to %d", name, got)
		}
		if err := unix.Fstat(r.fd(c, name), st); err != nil {
			t.Fatal(err)
		}
	}
	if dead.Ino != same.Ino {
		t.Error("two pidfds of one reaped process lead to different ones")
	}

	none, err := NewRestorer(nil, d.set, RestoreOptions{Pid: func(int) (int, bool) { return 0, false }})
	if err != nil {
		t.Fatal(err)
	}
	if err := none.Open(); err == nil || !strings.Contains(err.Error(), "not among the images") {
		t.Errorf("a process that does not exist: %v", err)
	}
	if err := none.Close(); err != nil {
		t.Error(err)
	}
	for _, x := range none.all {
		x.entry = proto.CloneOf(x.entry)
		if x.entry.Pidfd != nil {
			x.entry.Pidfd = &pidfd.PidfdEntry{Nspid: proto.Int32(-2)}
			if err := checkPidfd(none, x); err == nil {
				t.Error("pid -2 is taken")
			}
		}
	}
}

func TestPidfdOutside(t *testing.T) {
	d := dumpAll(t, Options{}, start(t, "pidfd-outside"))
	wantProblem(t, d.problems, "outside the tree")
}
