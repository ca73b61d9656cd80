package files

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

func open(path string, flags int) int { return must1(unix.Open(path, flags, 0o640)) }

func init() {
	scenes["regular"] = func(dir string) fds {
		p := filepath.Join(dir, "data")
		must(os.WriteFile(p, []byte(strings.Repeat("0123456789", 100)), 0o644))
		out := fds{
			"read":   open(p, unix.O_RDONLY),
			"append": open(p, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT),
			"sync":   open(p, unix.O_RDWR|unix.O_SYNC|unix.O_NONBLOCK),
			"path":   open(p, unix.O_PATH),
			"trunc":  open(filepath.Join(dir, "new"), unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC),
			"dir":    open(dir, unix.O_RDONLY|unix.O_DIRECTORY),
			"null":   open("/dev/null", unix.O_RDWR),
			"zero":   open("/dev/zero", unix.O_RDONLY),
		}
		must(os.Symlink("nowhere", filepath.Join(dir, "link")))
		out["link"] = open(filepath.Join(dir, "link"), unix.O_PATH|unix.O_NOFOLLOW)
		must1(unix.Seek(out["read"], 17, 0))
		must1(unix.Seek(out["append"], 5, 0))
		must1(unix.Seek(out["sync"], 5000, 0)) // behind the end
		must1(unix.Write(out["trunc"], []byte("abc")))
		out["dup"] = must1(unix.FcntlInt(uintptr(out["read"]), unix.F_DUPFD, 60))
		out["cloexec"] = must1(unix.FcntlInt(uintptr(out["read"]), unix.F_DUPFD_CLOEXEC, 70))
		out["again"] = open(p, unix.O_RDONLY) // another description
		must1(unix.Seek(out["again"], 17, 0))
		return out
	}
}

func TestRegular(t *testing.T) {
	c := start(t, "regular")
	want := map[string]look{}
	for name, fd := range c.fds {
		want[name] = lookAt(t, c.pid(), fd)
	}
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	got := map[string]look{}
	for name := range c.fds {
		got[name] = lookAt(t, os.Getpid(), r.fd(c, name))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("descriptors differ (-before +after):\n%s", diff)
	}
	for _, x := range []struct {
		a, b string
		same bool
	}{{"read", "dup", true}, {"read", "cloexec", true}, {"read", "again", false}} {
		ord, err := sys.KcmpFile(os.Getpid(), r.fd(c, x.a), os.Getpid(), r.fd(c, x.b))
		if err != nil {
			t.Fatal(err)
		}
		if (ord == sys.Equal) != x.same {
			t.Errorf("%s and %s are one description: %v, want %v", x.a, x.b, ord == sys.Equal, x.same)
		}
	}
	ds, err := r.Descriptors(1), error(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range ds {
		if want := x.FD == c.fds["cloexec"]; want && !x.Cloexec || x.FD == c.fds["dup"] && x.Cloexec {
			t.Errorf("fd %d: close on exec is %v", x.FD, x.Cloexec)
		}
	}
	if s, err := readFD(t, r.fd(c, "read")); err != nil || !strings.HasPrefix(s, "7890123") {
		t.Errorf("read at the position: %q, %v", s, err)
	}
	if _, err := unix.Write(r.fd(c, "append"), []byte("END")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(c.dir, "data")); err != nil || len(b) != 1003 || string(b[1000:]) != "END" {
		t.Errorf("appended file has %d bytes, %v", len(b), err)
	}
	if b, err := os.ReadFile(filepath.Join(c.dir, "new")); err != nil || string(b) != "abc" {
		t.Errorf("a file once opened with O_TRUNC now holds %q, %v", b, err)
	}
}

func TestRegularLacks(t *testing.T) {
	for _, x := range []struct {
		name   string
		change func(dir string) error
		want   string
	}{
		{"missing", func(dir string) error { return os.Remove(filepath.Join(dir, "data")) }, "no such file"},
		{"other kind", func(dir string) error {
			return errorsFirst(os.Remove(filepath.Join(dir, "data")), unix.Mkfifo(filepath.Join(dir, "data"), 0o600))
		}, "is a fifo here, expected a regular"},
		{"shorter", func(dir string) error { return os.Truncate(filepath.Join(dir, "data"), 10) }, "has 10 bytes here, expected at least 1000"},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := start(t, "regular")
			d := dumpOK(t, Options{}, c)
			files, _, _, _ := d.d.Plan()
			c.kill()
			if err := x.change(c.dir); err != nil {
				t.Fatal(err)
			}
			r, err := NewRestorer(nil, d.set, RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = r.Close() }()
			if err := r.Open(); err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("Open says %v, want %q", err, x.want)
			}
			if ps := CheckDestination(files, nil, nil, nil); len(ps) == 0 && x.name != "shorter" {
				t.Error("CheckDestination finds nothing")
			}
		})
	}
}

func errorsFirst(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func init() {
	scenes["locked"] = func(dir string) fds {
		fd := open(filepath.Join(dir, "lock"), unix.O_RDWR|unix.O_CREAT)
		must(unix.Flock(fd, unix.LOCK_EX))
		return fds{"lock": fd}
	}
	scenes["refused"] = func(dir string) fds {
		out := fds{
			"pidfd": must1(unix.PidfdOpen(os.Getppid(), 0)),
			"proc":  open("/proc/"+itoa(os.Getppid())+"/status", unix.O_RDONLY),
			"ptmx":  open("/dev/ptmx", unix.O_RDWR),
			"vsock": must1(unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)),
		}
		return out
	}
}

func TestRefused(t *testing.T) {
	c := start(t, "refused")
	// A preflight of the running process and a dump must agree.
	pre := NewDumper(nil, Options{External: []string{"file[1:2]", "tty[1:2]", "nonsense"}}, nil)
	defer func() { _ = pre.Close() }()
	if err := pre.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	if err := pre.Finish(); err != nil {
		t.Fatal(err)
	}
	d := dumpAll(t, Options{}, c)
	for _, x := range []string{"vsock sockets", "a pidfd of process", "one process in /proc", "the slave of this terminal has not been opened"} {
		wantProblem(t, pre.Refusal(), x)
		wantProblem(t, d.problems, x)
	}
	for _, x := range []string{"[key file[1:2]]: no process", "nearest: file[", "terminal with this key open of which the master is outside", "not of the form file[mnt:ino]"} {
		wantProblem(t, pre.Refusal(), x)
	}
	for _, p := range d.problems {
		if p.Pid != c.pid() || !p.HasFD || p.Path == "" || p.Hint == "" {
			t.Errorf("a problem without object or hint: %+v", p)
		}
	}
}

func TestLocked(t *testing.T) {
	c := start(t, "locked")
	d := dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "locked (FLOCK WRITE)")
}

func init() {
	scenes["moved"] = func(dir string) fds {
		p := filepath.Join(dir, "first")
		fd := open(p, unix.O_RDWR|unix.O_CREAT)
		must1(unix.Write(fd, []byte("x")))
		must(os.Link(p, filepath.Join(dir, "second")))
		must(os.Remove(p))
		return fds{"f": fd}
	}
}

func TestFoundByOtherName(t *testing.T) {
	c := start(t, "moved")
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	if got := lookAt(t, os.Getpid(), r.fd(c, "f")).Link; got != filepath.Join(c.dir, "second") {
		t.Errorf("restored as %s", got)
	}
}
