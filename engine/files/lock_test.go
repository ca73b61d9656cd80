package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	file_lock "github.com/checkpoint-restore/go-criu/v8/crit/images/file-lock"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

func init() {
	scenes["locks"] = func(dir string) fds {
		out := fds{}
		for _, name := range []string{"posix", "ofd", "flock", "shared", "lease"} {
			mode := unix.O_RDWR
			if name == "lease" {
				must(os.WriteFile(filepath.Join(dir, name), nil, 0o600))
				mode = unix.O_RDONLY
			}
			out[name] = must1(unix.Open(filepath.Join(dir, name), mode|unix.O_CREAT, 0o600))
		}
		must(unix.FcntlFlock(uintptr(out["posix"]), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 5, Len: 7}))
		must(unix.FcntlFlock(uintptr(out["posix"]), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: 100}))
		must(unix.FcntlFlock(uintptr(out["ofd"]), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 1}))
		must(unix.Flock(out["flock"], unix.LOCK_EX))
		must(unix.Flock(out["shared"], unix.LOCK_SH))
		must1(unix.FcntlInt(uintptr(out["lease"]), unix.F_SETLEASE, unix.F_RDLCK))
		out["twice"] = must1(unix.Dup(out["posix"])) // shows the same locks
		return out
	}
}

// ids makes a set say which process has table 1.
func ids(d *dumped, pid int) {
	d.set.Add(image.Entry{File: image.IDsFile(uint32(pid)), Magic: image.MagicIDs, Msg: &criu_core.TaskKobjIdsEntry{
		VmId: proto.Uint32(1), FilesId: proto.Uint32(1), FsId: proto.Uint32(1), SighandId: proto.Uint32(1)}})
}

func locksOf(t *testing.T, d *dumped) []string {
	t.Helper()
	es, err := image.All[*file_lock.FileLockEntry](d.set, image.FileLocksFile)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, fmt.Sprint(e.GetPid(), e.GetFd(), e.GetFlag(), e.GetType(), e.GetStart(), e.GetLen()))
	}
	return out
}

func TestLocks(t *testing.T) {
	c := start(t, "locks")
	// Locks of others on the same files are not the tree's.
	other := mustOpen(t, filepath.Join(c.dir, "shared"), unix.O_RDWR)
	if err := unix.Flock(int(other.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	d := dumpOK(t, Options{FileLocks: true}, c)
	p := c.pid()
	want := []string{
		fmt.Sprint(p, c.fds["posix"], lockPosix, unix.F_WRLCK, 5, 7),
		fmt.Sprint(p, c.fds["posix"], lockPosix, unix.F_RDLCK, 100, 0),
		fmt.Sprint(p, c.fds["ofd"], lockOFD, unix.F_RDLCK, 0, 1),
		fmt.Sprint(p, c.fds["flock"], lockFlock, unix.F_WRLCK, 0, 0),
		fmt.Sprint(p, c.fds["shared"], lockFlock, unix.F_RDLCK, 0, 0),
		fmt.Sprint(p, c.fds["lease"], lockLease, unix.F_RDLCK, 0, 0),
	}
	if diff := cmp.Diff(want, locksOf(t, d)); diff != "" {
		t.Errorf("locks (-want +got):\n%s", diff)
	}
	ids(d, p)

	if _, err := NewRestorer(nil, d.set, RestoreOptions{}); err == nil || !strings.Contains(err.Error(), "--file-locks") {
		t.Errorf("without the option: %v", err)
	}
	// The first holder lives.
	r, err := NewRestorer(nil, d.set, RestoreOptions{FileLocks: true})
	if err != nil {
		t.Fatal(err)
	}
	err = r.Open()
	if cerr := r.Close(); cerr != nil {
		t.Error(cerr)
	}
	for _, want := range []string{"for 2 reasons", "write POSIX lock of bytes 5 to 11", "write flock", fmt.Sprintf("pid %d (files.test)", p)} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("while the locks are held, no error says %q: %v", want, err)
		}
	}
	c.kill()
	n := restore(t, d, RestoreOptions{FileLocks: true}).land(c, 1)
	for name, kinds := range map[string][]string{
		"posix": {"POSIX WRITE 5", "POSIX READ 100"}, "ofd": {"OFDLCK READ 0"}, "flock": {"FLOCK WRITE 0"}, "shared": {"FLOCK READ 0"}, "lease": {"LEASE READ 0"},
	} {
		i, err := procfs.ReadFdinfo(n.pid(), c.fds[name])
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, l := range i.Locks {
			got = append(got, fmt.Sprint(l.Kind, " ", l.Type, " ", l.Start))
		}
		if diff := cmp.Diff(kinds, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestLocksRefused(t *testing.T) {
	c := start(t, "locks")
	d := dumpAll(t, Options{}, c)
	if n := len(d.problems); n != 5 { // files, not locks
		t.Errorf("%d problems, want 5: %v", n, d.problems)
	}
	wantProblem(t, d.problems, "--file-locks")
	if got := locksOf(t, d); got != nil {
		t.Errorf("locks in the images of a refused dump: %v", got)
	}
	c.kill()

	c = start(t, "locks")
	// Somebody opens the leased file: the holder, which is stopped, has not answered.
	c.stop()
	if fd, err := unix.Open(filepath.Join(c.dir, "lease"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		_ = unix.Close(fd)
		t.Fatal("the lease did not keep the file")
	}
	d = dumpAll(t, Options{FileLocks: true}, c)
	wantProblem(t, d.problems, "is being broken")
	if len(d.problems) != 1 {
		t.Errorf("problems: %v", d.problems)
	}
}

// Images are untrusted.
func TestHostileLocks(t *testing.T) {
	c := start(t, "locks")
	d := dumpOK(t, Options{FileLocks: true}, c)
	p := c.pid()
	c.kill()
	lock := func(flag, typ uint32, pid, fd int, start, n int64) *file_lock.FileLockEntry {
		return &file_lock.FileLockEntry{Flag: &flag, Type: &typ, Pid: proto.Int32(int32(pid)), Fd: proto.Int32(int32(fd)), Start: &start, Len: &n}
	}
	fd := c.fds["posix"]
	for name, x := range map[string]struct {
		e    *file_lock.FileLockEntry
		want string
	}{
		"good":            {lock(lockPosix, unix.F_WRLCK, p, fd, 5, 1<<62), ""},
		"unknown kind":    {lock(3, unix.F_WRLCK, p, fd, 0, 0), "its kind 3"},
		"unlock":          {lock(lockFlock, unix.F_UNLCK, p, fd, 0, 0), "its type 2"},
		"negative start":  {lock(lockPosix, unix.F_WRLCK, p, fd, -1, 0), "0 bytes at -1"},
		"negative length": {lock(lockPosix, unix.F_WRLCK, p, fd, 0, -5), "-5 bytes at 0"},
		"overflow":        {lock(lockOFD, unix.F_WRLCK, p, fd, 1<<62, 1<<62), "bytes at"},
		"no process":      {lock(lockFlock, unix.F_WRLCK, 0, fd, 0, 0), "no descriptors"},
		"no descriptor":   {lock(lockFlock, unix.F_WRLCK, p, 999, 0, 0), "no such descriptor"},
	} {
		t.Run(name, func(t *testing.T) {
			set := image.NewSet()
			for _, f := range d.set.Files() {
				for _, e := range d.set.Entries(f) {
					if f != image.FileLocksFile {
						set.Add(e)
					}
				}
			}
			bad := &dumped{set: set}
			ids(bad, p)
			set.Add(image.Entry{File: image.FileLocksFile, Magic: image.MagicFileLocks, Msg: x.e})
			r, err := NewRestorer(nil, set, RestoreOptions{FileLocks: true})
			if err == nil {
				err = r.Close()
			}
			if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
}
