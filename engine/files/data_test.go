package files

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

const allowSealing = unix.MFD_ALLOW_SEALING

func init() {
	scenes["memfd"] = func(string) fds {
		out := fds{
			"plain":  must1(unix.MemfdCreate("plain one", 0)),
			"sealed": must1(unix.MemfdCreate("sealed", allowSealing)),
			"empty":  must1(unix.MemfdCreate("", allowSealing|unix.MFD_NOEXEC_SEAL)),
		}
		must1(unix.Write(out["plain"], []byte("content")))
		must(unix.Ftruncate(out["plain"], 10000)) // the rest is a hole
		must1(unix.Write(out["sealed"], bytes.Repeat([]byte("s"), 5000)))
		must(unix.Fchmod(out["sealed"], 0o700))
		must1(unix.FcntlInt(uintptr(out["sealed"]), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL))
		out["plain-ro"] = open("/proc/self/fd/"+itoa(out["plain"]), unix.O_RDONLY)
		out["plain-append"] = open("/proc/self/fd/"+itoa(out["plain"]), unix.O_RDWR|unix.O_APPEND)
		out["plain-dup"] = must1(unix.Dup(out["plain"]))
		must1(unix.Seek(out["plain-ro"], 3, 0))
		return out
	}
	scenes["ghost"] = func(dir string) fds {
		out := fds{}
		p := filepath.Join(dir, "ghost")
		out["rw"] = open(p, unix.O_RDWR|unix.O_CREAT)
		out["ro"] = open(p, unix.O_RDONLY)
		must1(unix.Write(out["rw"], []byte("boo")))
		must1(unix.Pwrite(out["rw"], []byte("far"), 1<<20)) // sparse
		must(unix.Fchmod(out["rw"], 0o4755))
		must(os.Remove(p))
		must(os.WriteFile(p, []byte("another file of that name"), 0o600))
		out["tmp"] = must1(unix.Open(dir, unix.O_RDWR|unix.O_TMPFILE, 0o600))
		must1(unix.Write(out["tmp"], []byte("nameless")))
		sub := filepath.Join(dir, "sub")
		must(os.Mkdir(sub, 0o751))
		out["dir"] = open(sub, unix.O_RDONLY|unix.O_DIRECTORY)
		must(os.Remove(sub))
		return out
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestMemfd(t *testing.T) {
	c := start(t, "memfd")
	want := map[string]look{}
	for name, fd := range c.fds {
		want[name] = lookAt(t, c.pid(), fd)
	}
	d := dumpOK(t, Options{}, c)
	c.kill()
	if len(d.data) != 3 {
		t.Errorf("%d contents, want 3", len(d.data))
	}
	r := restore(t, d, RestoreOptions{})
	got := map[string]look{}
	for name := range c.fds {
		got[name] = lookAt(t, os.Getpid(), r.fd(c, name))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
	stat := func(name string) (st unix.Stat_t) {
		if err := unix.Fstat(r.fd(c, name), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := stat("plain"); st.Size != 10000 || st.Ino != stat("plain-ro").Ino {
		t.Errorf("size %d, inode %d and %d", st.Size, st.Ino, stat("plain-ro").Ino)
	}
	if st := stat("sealed"); st.Size != 5000 || st.Mode&0o7777 != 0o700 {
		t.Errorf("size %d, mode %o", st.Size, st.Mode)
	}
	for name, want := range map[string]int{"plain": unix.F_SEAL_SEAL, "sealed": unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL, "empty": unix.F_SEAL_EXEC} {
		if n, err := unix.FcntlInt(uintptr(r.fd(c, name)), unix.F_GET_SEALS, 0); err != nil || n != want {
			t.Errorf("seals of %s: %#x, %v, want %#x", name, n, err, want)
		}
	}
	if s, err := readFD(t, r.fd(c, "plain-ro")); err != nil || len(s) != 9997 || s[:4] != "tent" {
		t.Errorf("content %.10q, %v", s, err)
	}
	if _, err := unix.Pwrite(r.fd(c, "sealed"), []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("the sealed memfd can be written: %v", err)
	}
}

// A memfd with a write seal that is mapped, shared: the seal comes after the data,
// which comes after the mapping.
func TestMemfdMappedBeforeSeal(t *testing.T) {
	c := start(t, "memfd")
	// What the core does for a mapping: AddPath.
	d2 := NewDumper(nil, Options{}, nil)
	defer func() { _ = d2.Close() }()
	f := mustOpen(t, "/proc/"+itoa(c.pid())+"/fd/"+itoa(c.fds["sealed"]), unix.O_RDONLY)
	id, err := d2.AddPath(c.proc(1), "mapping", f, "/memfd:sealed (deleted)", unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	again, err := d2.AddPath(c.proc(1), "mapping", f, "/memfd:sealed (deleted)", unix.O_RDWR)
	if err != nil || again != id {
		t.Errorf("the same mapping is file %d and %d, %v", id, again, err)
	}
	if err := d2.Finish(); err != nil || len(d2.Refusal()) > 0 {
		t.Fatal(err, d2.Refusal())
	}
}

func TestGhost(t *testing.T) {
	c := start(t, "ghost")
	d := dumpOK(t, Options{}, c)
	c.kill()
	r := restore(t, d, RestoreOptions{})
	var st, ro unix.Stat_t
	if err := errors.Join(unix.Fstat(r.fd(c, "rw"), &st), unix.Fstat(r.fd(c, "ro"), &ro)); err != nil {
		t.Fatal(err)
	}
	if st.Nlink != 0 || st.Size != 1<<20+3 || st.Mode != unix.S_IFREG|0o4755 || st.Ino != ro.Ino {
		t.Errorf("nlink %d, size %d, mode %o, inodes %d %d", st.Nlink, st.Size, st.Mode, st.Ino, ro.Ino)
	}
	if pos := lookAt(t, os.Getpid(), r.fd(c, "rw")).Pos; pos != 3 {
		t.Errorf("position %d", pos)
	}
	if s, err := readFD(t, r.fd(c, "ro")); err != nil || !strings.HasPrefix(s, "boo\x00") {
		t.Errorf("content %.10q, %v", s, err)
	}
	b := make([]byte, 3)
	if _, err := unix.Pread(r.fd(c, "ro"), b, 1<<20); err != nil || string(b) != "far" {
		t.Errorf("far content %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(c.dir, "ghost")); err != nil || string(b) != "another file of that name" {
		t.Errorf("the file that took the name: %q, %v", b, err)
	}
	if es, err := os.ReadDir(c.dir); err != nil || len(es) != 1 {
		t.Errorf("left in the directory: %v, %v", es, err)
	}
	// A file of O_TMPFILE can still be given a name.
	if err := unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+itoa(r.fd(c, "tmp")), unix.AT_FDCWD, filepath.Join(c.dir, "named"), unix.AT_SYMLINK_FOLLOW); err != nil {
		t.Errorf("link the nameless file: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(c.dir, "named")); err != nil || string(b) != "nameless" {
		t.Errorf("%q, %v", b, err)
	}
	if err := unix.Fstat(r.fd(c, "dir"), &st); err != nil || st.Mode != unix.S_IFDIR|0o751 || st.Nlink > 1 {
		t.Errorf("deleted directory: mode %o, nlink %d, %v", st.Mode, st.Nlink, err)
	}
	if got := lookAt(t, os.Getpid(), r.fd(c, "dir")).Link; got != filepath.Join(c.dir, "sub")+" (deleted)" {
		t.Errorf("deleted directory is %s", got)
	}
}

func TestGhostLimit(t *testing.T) {
	c := start(t, "ghost")
	d := dumpAll(t, Options{GhostLimit: 4096}, c)
	wantProblem(t, d.problems, "more than the limit of 4096")
}

// Two processes share descriptions and tables of descriptors.
func TestAcrossProcesses(t *testing.T) {
	p := filepath.Join(t.TempDir(), "shared")
	if err := os.WriteFile(p, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, p, os.O_RDONLY)
	other := mustOpen(t, p, os.O_RDONLY)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("between"); err != nil {
		t.Fatal(err)
	}
	a := start(t, "idle", f, r) // fds 3, 4
	b := start(t, "idle", other, f, w)
	if err := errors.Join(r.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	d := dumpOK(t, Options{}, a, b)
	a.kill()
	b.kill()
	x := restore(t, d, RestoreOptions{})
	same := func(p, q *os.File) bool {
		ord, err := sys.KcmpFile(os.Getpid(), int(p.Fd()), os.Getpid(), int(q.Fd()))
		return err == nil && ord == sys.Equal
	}
	if !same(x.tables[1][3], x.tables[2][4]) || same(x.tables[1][3], x.tables[2][3]) {
		t.Error("sharing across processes is not as before")
	}
	if s, err := readFD(t, int(x.tables[1][4].Fd())); err != nil || s != "between" {
		t.Errorf("%q, %v", s, err)
	}
	if _, _, _, n := d.d.Plan(); n >= len(x.tables[1])+len(x.tables[2]) {
		t.Errorf("%d descriptions of %d and %d descriptors, some of which share one", n, len(x.tables[1]), len(x.tables[2]))
	}
}
