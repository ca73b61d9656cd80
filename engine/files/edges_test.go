package files

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// The edges of external files, and the tests that look at each:
//
//	id base and case                          TestExternal, TestParseKey; configs/external TestMatch
//	mount id renumbered, inode used again     agent TestChangedBetween, TestInodeUsedAgain
//	same inode by hard links, through O_PATH, O_DIRECTORY, O_DIRECT, O_SYNC, O_DSYNC,
//	  O_NOATIME, O_APPEND                     TestExternalEdges, TestExternalDeletedAndDirectory
//	same inode through two mounts             TestTwoMounts
//	write-open of a running executable,
//	  reopen refused, read-only mount,
//	  sockets handed and expected             TestExternalCannotGive
//	offset beyond the new size, CLOEXEC,
//	  F_SETOWN, F_SETSIG                      TestExternalEdges
//	dup across tasks, separate opens          e2e TestExternalPython, TestPlan
//	deleted external file                     TestExternalDeletedAndDirectory
//	handed descriptor closed, of a wrong
//	  kind, of a wrong mode, given twice      TestExternalRefused; e2e TestExternalScript
//	fifos                                     TestFifos, TestFifoBusy; e2e TestExternalFiles
//	pipes                                     TestExternalPipe
//	files in /proc                            TestPaths
//	cwd, private mapping with dirty pages,
//	  shared mapping, mapping of a file that
//	  is shorter                              e2e TestExternalMapped
//	locks, epoll and inotify                  e2e TestExternalWatched
//	root, exe                                 e2e TestExternalRoot
//	device node with other numbers            TestDeviceNumbers

func init() {
	scenes["edges"] = func(dir string) fds {
		p := filepath.Join(dir, "file")
		must(os.WriteFile(p, []byte(strings.Repeat("0123456789", 1000)), 0o600))
		must(os.Link(p, filepath.Join(dir, "other")))
		out := fds{
			"read":    open(p, unix.O_RDONLY),
			"append":  open(p, unix.O_WRONLY|unix.O_APPEND),
			"both":    open(p, unix.O_RDWR),
			"path":    open(p, unix.O_PATH),
			"sync":    open(p, unix.O_RDWR|unix.O_SYNC),
			"dsync":   open(p, unix.O_WRONLY|unix.O_DSYNC|unix.O_NONBLOCK),
			"noatime": open(p, unix.O_RDONLY|unix.O_NOATIME),
			"link":    open(filepath.Join(dir, "other"), unix.O_RDONLY),
			"owner":   open(p, unix.O_RDONLY),
		}
		if n, err := unix.Open(p, unix.O_RDONLY|unix.O_DIRECT, 0); err == nil { // not every file system knows it
			out["direct"] = n
		}
		must1(unix.Seek(out["both"], 9000, io.SeekStart))
		must1(unix.Seek(out["append"], 7, io.SeekStart))
		out["dup"] = must1(unix.Dup(out["both"]))
		out["cloexec"] = must1(unix.FcntlInt(uintptr(out["both"]), unix.F_DUPFD_CLOEXEC, 50))
		must1(unix.FcntlInt(uintptr(out["owner"]), unix.F_SETOWN, os.Getpid()))
		must1(unix.FcntlInt(uintptr(out["owner"]), 10, int(unix.SIGURG)))
		return out
	}
}

func TestExternalEdges(t *testing.T) {
	c := start(t, "edges")
	key := keyOf(t, c, "read")
	want := map[string]look{}
	for name, fd := range c.fds {
		l := lookAt(t, c.pid(), fd)
		l.Link = ""
		want[name] = l
		if got := keyOf(t, c, name); got != key {
			t.Errorf("%s: key %s, want %s of them all", name, got, key)
		}
	}
	d := dumpOK(t, Options{External: []string{key}}, c)
	_, ext, _, _ := d.d.Plan()
	for _, o := range d.d.Objects() {
		if o.Key == key && (o.Carry != "external" || o.Kind != "regular" || o.Size != 10000) {
			t.Errorf("object: %+v", o)
		}
	}
	c.kill()

	// Much smaller than what was there: positions may lie behind its end.
	there := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(there, []byte("tiny"), 0o600); err != nil {
		t.Fatal(err)
	}
	in := map[string]Inherit{key: {File: mustOpen(t, there, unix.O_RDONLY)}}
	if ps := CheckDestination(nil, ext, nil, in); len(ps) != 0 {
		t.Errorf("CheckDestination: %v", ps)
	}
	r := restore(t, d, RestoreOptions{Inherit: in})
	got := map[string]look{}
	for name := range c.fds {
		l := lookAt(t, os.Getpid(), r.fd(c, name))
		if l.Link != there {
			t.Errorf("%s leads to %s", name, l.Link)
		}
		l.Link = ""
		got[name] = l
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("descriptors (-before +after):\n%s", diff)
	}
	n := r.land(c, 1)
	if own, err := unix.FcntlInt(uintptr(r.fd(c, "owner")), unix.F_GETOWN, 0); err != nil || own != n.pid() {
		t.Errorf("owner %d, %v, want %d", own, err, n.pid())
	}
	if sig, err := unix.FcntlInt(uintptr(r.fd(c, "owner")), 11, 0); err != nil || sig != int(unix.SIGURG) {
		t.Errorf("signal %d, %v", sig, err)
	}
}

// TestExternalCannotGive hands in what cannot give what the tree had.
func TestExternalCannotGive(t *testing.T) {
	c := start(t, "edges")
	key := keyOf(t, c, "read")
	d := dumpOK(t, Options{External: []string{key}}, c)
	_, ext, _, _ := d.d.Plan()
	c.kill()

	dir := t.TempDir()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	running := filepath.Join(dir, "running")
	if err := os.WriteFile(running, program, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(running, "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()

	mount := filepath.Join(dir, "mount")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(mount, unix.MNT_DETACH) }()
	frozen := filepath.Join(mount, "file")
	if err := os.WriteFile(frozen, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	socket, peer := os.NewFile(uintptr(pair[0]), "socket"), os.NewFile(uintptr(pair[1]), "peer")
	defer func() { _, _ = socket.Close(), peer.Close() }()

	for name, x := range map[string]struct {
		file *os.File
		want string
	}{
		"a running executable": {mustOpen(t, running, unix.O_RDONLY), "the file is being executed and cannot be written"},
		"read-only mount":      {mustOpen(t, frozen, unix.O_RDONLY), "mount it read-write"},
		"socket":               {socket, "it is a socket, expected a regular"},
		"device":               {mustOpen(t, "/dev/null", unix.O_RDWR), "it is a chr, expected a regular"},
		"directory":            {mustOpen(t, dir, unix.O_RDONLY), "it is a directory, expected a regular"},
	} {
		t.Run(name, func(t *testing.T) {
			in := map[string]Inherit{key: {File: x.file}}
			wantProblem(t, CheckDestination(nil, ext, nil, in), x.want)
			r, err := NewRestorer(nil, d.set, RestoreOptions{Inherit: in})
			if err == nil {
				err = r.Open()
				defer func() { _ = r.Close() }()
			}
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
}

func init() {
	scenes["handed"] = func(string) fds { return fds{"a": 3, "b": 4} }
}

// TestTwoMounts: the same inode through another mount is another key.
func TestTwoMounts(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a", "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(filepath.Join(dir, "a"), filepath.Join(dir, "b"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(filepath.Join(dir, "b"), unix.MNT_DETACH) }()
	f, g := mustOpen(t, filepath.Join(dir, "a", "file"), unix.O_RDWR), mustOpen(t, filepath.Join(dir, "b", "file"), unix.O_RDWR)
	c := start(t, "handed", f, g)
	a, b := keyOf(t, c, "a"), keyOf(t, c, "b")
	if a == b {
		t.Fatalf("one key, %s, for two mounts", a)
	}
	d := dumpOK(t, Options{External: []string{b}}, c)
	c.kill()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, []byte("y"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := restore(t, d, RestoreOptions{Inherit: map[string]Inherit{b: {File: mustOpen(t, there, unix.O_RDONLY)}}})
	for name, want := range map[string]string{"a": f.Name(), "b": there} {
		if got := lookAt(t, os.Getpid(), r.fd(c, name)).Link; got != want {
			t.Errorf("%s leads to %s, want %s", name, got, want)
		}
	}
}

func init() {
	scenes["device"] = func(dir string) fds {
		p := filepath.Join(dir, "device")
		must(unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		return fds{"device": open(p, unix.O_RDWR)}
	}
}

// TestDeviceNumbers puts the node of another device at the path of one.
func TestDeviceNumbers(t *testing.T) {
	dir := t.TempDir()
	c := startIn(t, dir, "device", nil)
	d := dumpOK(t, Options{}, c)
	files, _, _, _ := d.d.Plan()
	c.kill()
	p := filepath.Join(dir, "device")
	if ps := CheckDestination(files, nil, nil, nil); len(ps) != 0 {
		t.Errorf("the same device: %v", ps)
	}
	if err := errors.Join(os.Remove(p), unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))); err != nil {
		t.Fatal(err)
	}
	const want = "device 1:5 here, expected 1:3"
	wantProblem(t, CheckDestination(files, nil, nil, nil), want)
	r, err := NewRestorer(nil, d.set, RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := r.Open(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("restore: %v", err)
	}
}
