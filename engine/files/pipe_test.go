package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

func newPipe(flags int) (r, w int) {
	var p [2]int
	must(unix.Pipe2(p[:], flags))
	return p[0], p[1]
}

func init() {
	scenes["pipes"] = func(string) fds {
		out := fds{}
		out["r"], out["w"] = newPipe(0)
		must1(unix.Write(out["w"], []byte("hello ")))
		must1(unix.Write(out["w"], []byte("pipe")))
		must1(unix.FcntlInt(uintptr(out["w"]), unix.F_SETPIPE_SZ, 1<<18))
		// No writer left: data, then end of file.
		r, w := newPipe(unix.O_NONBLOCK)
		must1(unix.Write(w, []byte("last words")))
		must(unix.Close(w))
		out["eof"] = r
		// No reader left: EPIPE.
		r, w = newPipe(unix.O_NONBLOCK)
		must(unix.Close(r))
		out["epipe"] = w
		// Packets.
		out["pr"], out["pw"] = newPipe(unix.O_DIRECT | unix.O_NONBLOCK)
		for _, s := range []string{"one", "twotwo", "3"} {
			must1(unix.Write(out["pw"], []byte(s)))
		}
		// Full.
		out["fr"], out["fw"] = newPipe(unix.O_NONBLOCK)
		for {
			if _, err := unix.Write(out["fw"], make([]byte, 4096)); err != nil {
				break
			}
		}
		// A third description of the first pipe, and a duplicate.
		out["rw"] = open(fmt.Sprintf("/proc/self/fd/%d", out["r"]), unix.O_RDWR)
		out["w2"] = must1(unix.Dup(out["w"]))
		return out
	}
}

func TestPipes(t *testing.T) {
	c := start(t, "pipes")
	flags := map[string]int{}
	for name, fd := range c.fds {
		flags[name] = lookAt(t, c.pid(), fd).Flags
	}
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	got := map[string]int{}
	for name := range c.fds {
		got[name] = lookAt(t, os.Getpid(), r.fd(c, name)).Flags
	}
	if diff := cmp.Diff(flags, got); diff != "" {
		t.Errorf("flags differ (-before +after):\n%s", diff)
	}
	if n, err := unix.FcntlInt(uintptr(r.fd(c, "r")), unix.F_GETPIPE_SZ, 0); err != nil || n != 1<<18 {
		t.Errorf("size of the pipe: %d, %v", n, err)
	}
	if s, err := readFD(t, r.fd(c, "r")); err != nil || s != "hello pipe" {
		t.Errorf("data of the pipe: %q, %v", s, err)
	}
	if _, err := unix.Write(r.fd(c, "rw"), []byte("x")); err != nil {
		t.Error(err)
	}
	if s, err := readFD(t, r.fd(c, "r")); err != nil || s != "x" {
		t.Errorf("through the third description: %q, %v", s, err)
	}
	if ord, err := sys.KcmpFile(os.Getpid(), r.fd(c, "w"), os.Getpid(), r.fd(c, "w2")); err != nil || ord != sys.Equal {
		t.Errorf("duplicates are %v, %v", ord, err)
	}
	if e := events(t, r.fd(c, "eof")); e != unix.POLLIN|unix.POLLHUP {
		t.Errorf("poll of the end without writer: %#x", e)
	}
	if s, err := readFD(t, r.fd(c, "eof")); err != nil || s != "last words" {
		t.Errorf("data before the end: %q, %v", s, err)
	}
	if s, err := readFD(t, r.fd(c, "eof")); err != nil || s != "" {
		t.Errorf("end of file: %q, %v", s, err)
	}
	if e := events(t, r.fd(c, "epipe")); e&unix.POLLERR == 0 {
		t.Errorf("poll of the end without reader: %#x", e)
	}
	for _, want := range []string{"one", "twotwo", "3"} {
		if s, err := readFD(t, r.fd(c, "pr")); err != nil || s != want {
			t.Errorf("packet %q, %v, want %q", s, err, want)
		}
	}
	if _, err := readFD(t, r.fd(c, "pr")); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("after the packets: %v", err)
	}
	if _, err := unix.Write(r.fd(c, "fw"), []byte("x")); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("the full pipe takes more: %v", err)
	}
}

// The dump takes nothing out: what it read is still there for a second dump, and
// for the program.
func TestPipeDumpTwice(t *testing.T) {
	c := start(t, "pipes")
	a, b := dumpOK(t, Options{}, c), dumpOK(t, Options{}, c)
	if diff := cmp.Diff(extras(a, pipesImage), extras(b, pipesImage)); diff != "" {
		t.Errorf("the second dump differs:\n%s", diff)
	}
}

func extras(d *dumped, file string) []string {
	var out []string
	for _, e := range d.set.Entries(file) {
		out = append(out, string(e.Extra))
	}
	return out
}

func TestPipeOutside(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	scene := start(t, "idle", r)
	d := dumpAll(t, Options{}, scene)
	wantProblem(t, d.problems, fmt.Sprintf("the pipe is also held by pid %d", os.Getpid()))
	// With nobody else it is carried.
	if err := errors.Join(r.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	if d := dumpAll(t, Options{}, scene); len(d.problems) != 0 {
		t.Errorf("refused: %s", d.problems[0])
	}
}

func init() {
	scenes["idle"] = func(string) fds { return fds{} }
	scenes["fifos"] = func(dir string) fds {
		out := fds{}
		mk := func(name string) string {
			p := filepath.Join(dir, name)
			must(unix.Mkfifo(p, 0o640))
			return p
		}
		p := mk("both")
		out["both-r"] = open(p, unix.O_RDONLY|unix.O_NONBLOCK)
		out["both-w"] = open(p, unix.O_WRONLY)
		must1(unix.Write(out["both-w"], []byte("in the fifo")))
		p = mk("rdwr")
		out["rdwr"] = open(p, unix.O_RDWR)
		must1(unix.Write(out["rdwr"], []byte("self")))
		// A reader that has not met a writer.
		out["quiet"] = open(mk("quiet"), unix.O_RDONLY|unix.O_NONBLOCK)
		// A reader whose writer has left.
		p = mk("left")
		out["left"] = open(p, unix.O_RDONLY|unix.O_NONBLOCK)
		w := open(p, unix.O_WRONLY)
		must1(unix.Write(w, []byte("bye")))
		must(unix.Close(w))
		// The same, blocking.
		p = mk("leftb")
		h := open(p, unix.O_RDWR)
		out["leftb"] = open(p, unix.O_RDONLY)
		must(unix.Close(h))
		// A writer whose reader has left.
		p = mk("alone")
		rd := open(p, unix.O_RDONLY|unix.O_NONBLOCK)
		out["alone"] = open(p, unix.O_WRONLY)
		must(unix.Close(rd))
		// Deleted.
		p = mk("deleted")
		out["deleted"] = open(p, unix.O_RDWR|unix.O_NONBLOCK)
		must1(unix.Write(out["deleted"], []byte("ghost")))
		must(os.Remove(p))
		return out
	}
}

func TestFifos(t *testing.T) {
	c := start(t, "fifos")
	// The numbers are the same here only by chance, so poll there is asked of a duplicate.
	before := map[string]int16{}
	want := map[string]look{}
	pidfd, err := unix.PidfdOpen(c.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	for name, fd := range c.fds {
		n, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = events(t, n)
		want[name] = lookAt(t, c.pid(), fd)
		_ = unix.Close(n)
	}
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	after := map[string]int16{}
	got := map[string]look{}
	for name := range c.fds {
		after[name] = events(t, r.fd(c, name))
		got[name] = lookAt(t, os.Getpid(), r.fd(c, name))
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("poll answers differ (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("descriptors differ (-before +after):\n%s", diff)
	}
	for name, text := range map[string]string{"both-r": "in the fifo", "rdwr": "self", "left": "bye", "leftb": "", "deleted": "ghost"} {
		if s, err := readFD(t, r.fd(c, name)); err != nil || s != text {
			t.Errorf("%s holds %q, %v, want %q", name, s, err, text)
		}
	}
	if s, err := readFD(t, r.fd(c, "left")); err != nil || s != "" {
		t.Errorf("end of the fifo: %q, %v", s, err)
	}
}

func TestFifoBusy(t *testing.T) {
	c := start(t, "fifos")
	d := dumpOK(t, Options{}, c)
	files, _, _, _ := d.d.Plan()
	c.kill()
	f, err := os.OpenFile(filepath.Join(c.dir, "both"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteString("strange"); err != nil {
		t.Fatal(err)
	}
	wantProblem(t, CheckDestination(files, nil, nil, nil), "the fifo is in use here: 7 bytes")
	r, err := NewRestorer(nil, d.set, RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if err := r.Open(); err == nil || !strings.Contains(err.Error(), "is in use here: 7 bytes are in it") {
		t.Errorf("Open says %v", err)
	}
}
