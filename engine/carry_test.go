package engine_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
)

// shmWorkload has named shared memory mapped and a semaphore of it open.
const shmWorkload = `
import mmap, os, signal, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
os.ftruncate(fd, 1 << 30)
os.pwrite(fd, b"far", (1 << 30) - 3)
m = mmap.mmap(fd, 4096)
m[0:5] = b"hello"
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
st = os.stat(path)
ok = os.pread(fd, 3, (1 << 30) - 3) == b"far" and m[0:5] == b"hello" and os.path.samestat(st, os.fstat(fd)) \
	and st.st_mode == 0o100640 and st.st_size == 1 << 30 and st.st_blocks < 1000
m[0:5] = b"later"
ok = ok and open(path, "rb").read(5) == b"later"
os.unlink(path)
print("ok" if ok else "bad %s" % st, flush=True)
`

// TestShmMoves: a file of shm_open leaves with its tree, is not seen elsewhere
// before the tree runs, goes with a tree that is discarded, and replaces nothing.
func TestShmMoves(t *testing.T) {
	needRoot(t)
	path := fmt.Sprintf("/dev/shm/godwit-test-%d", os.Getpid())
	t.Cleanup(func() { _ = os.Remove(path) })
	p := start(t, strings.ReplaceAll(shmWorkload, "sys.argv[1]", fmt.Sprintf("%q", path)))
	e := engine.New(nil)

	refusedWith(t, e, p.pid, path)
	before := shmNames(t)
	dir := filepath.Join(t.TempDir(), "images")
	p.leave(e, dir, engine.DumpOptions{Elsewhere: true})
	gone := slices.DeleteFunc(slices.Clone(before), func(n string) bool { return n == filepath.Base(path) })
	if after := shmNames(t); !slices.Equal(after, gone) {
		t.Fatalf("after the tree left there is %v, want %v", after, gone)
	}

	s, err := restoreDir(t, e, dir, engine.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is there before the tree runs: %v", err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if after := shmNames(t); !slices.Equal(after, gone) {
		t.Errorf("a discarded tree leaves %v, want %v", after, gone)
	}

	if s, err = restoreDir(t, e, dir, engine.RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("the tree runs although its file cannot be placed: %v", err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("another's file now holds %q (%v)", b, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}

	if s, err = restoreDir(t, e, dir, engine.RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	p.finish()
	if after := shmNames(t); !slices.Equal(after, gone) {
		t.Errorf("in the end there is %v, want %v", after, gone)
	}
}

// refusedWith wants the plan to name another process that has the file open.
func refusedWith(t *testing.T, e *engine.Engine, pid int, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	other := exec.Command("sleep", "1000")
	other.ExtraFiles = []*os.File{f}
	err = other.Start()
	_ = f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = other.Process.Kill(), other.Wait() }()
	_, err = e.Plan(context.Background(), pid, engine.DumpOptions{Elsewhere: true})
	var r *engine.Refusal
	if !errors.As(err, &r) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d (sleep)", other.Process.Pid)) {
		t.Errorf("the plan does not name pid %d: %v", other.Process.Pid, err)
	}
	if _, err := e.Plan(context.Background(), pid, engine.DumpOptions{}); err != nil {
		t.Errorf("a dump for this host is refused: %v", err)
	}
}

// shmNames lists what this test may have put into /dev/shm.
func shmNames(t *testing.T) (out []string) {
	t.Helper()
	es, err := os.ReadDir("/dev/shm")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if strings.HasPrefix(e.Name(), ".godwit-") || strings.HasPrefix(e.Name(), fmt.Sprintf("godwit-test-%d", os.Getpid())) {
			out = append(out, e.Name())
		}
	}
	return out
}

// leave dumps the tree and ends it.
func (p *program) leave(e *engine.Engine, dir string, o engine.DumpOptions) {
	p.t.Helper()
	ctx := context.Background()
	tree, err := e.Freeze(ctx, p.pid, o)
	if err != nil {
		p.t.Fatal(err)
	}
	sink, err := image.NewDirSink(dir)
	if err == nil {
		_, err = tree.Dump(ctx, sink)
	}
	if err == nil {
		err = sink.Commit()
	}
	if err != nil {
		_ = tree.Thaw()
		p.t.Fatal(err)
	}
	if err := tree.Kill(); err != nil {
		p.t.Fatal(err)
	}
}

// carryWorkload stands in a directory with everything that directories have, and
// has a log, a mapped file and a fifo open.
const carryWorkload = `
import mmap, os, signal
base = %q
os.makedirs(base + "/deep/down"); os.chmod(base, 0o751)
os.chdir(base + "/deep")
open("closed", "w").write("nobody has it open")
os.link("closed", "down/link")
os.symlink("closed", "sym"); os.symlink("/nowhere", "down/dangling")
os.mkfifo("fifo", 0o640)
os.chown("closed", 12, 34); os.chmod("closed", 0o4711)
os.utime("closed", ns=(10**18 + 1, 10**18 + 2))
try: os.setxattr("closed", "user.color", b"green"); xattrs = True
except OSError: xattrs = False
with open("sparse", "wb") as f:
    f.truncate(10 << 30); f.seek(5 << 30); f.write(b"x" * 4096)
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
data = os.open("down/data", os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(data, 8192)
shared = mmap.mmap(data, 8192)
shared[0:4] = b"mine"
fifo = os.open("fifo", os.O_RDWR)
os.write(fifo, b"in the fifo"); os.write(log, b"one\n")
bad = []
def check(ok, what):
    if not ok: bad.append(what)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
os.write(log, b"two\n")
shared[4:8] = b"more"
check(open(base + "/deep/log").read() == "one\ntwo\n", "log")
check(os.path.samestat(os.stat(base + "/deep/log"), os.fstat(log)), "the log is another file")
check(os.pread(data, 8, 0) == b"minemore" and open("down/data", "rb").read(8) == b"minemore", "data")
check(os.getcwd() == base + "/deep", "cwd " + os.getcwd())
check(os.stat(base).st_mode == 0o40751, "mode of a directory on the way")
st = os.stat("closed")
check(open("closed").read() == "nobody has it open" and (st.st_uid, st.st_gid, st.st_mode, st.st_mtime_ns) == (12, 34, 0o104711, 10**18 + 2), "closed %%s" %% (st,))
check(os.path.samefile("closed", "down/link") and st.st_nlink == 2, "hard link")
check(os.readlink("sym") == "closed" and os.readlink("down/dangling") == "/nowhere", "symlink")
check(not xattrs or os.getxattr("closed", "user.color") == b"green", "xattr")
st = os.stat("sparse")
check(st.st_size == 10 << 30 and st.st_blocks < 100 and os.pread(os.open("sparse", os.O_RDONLY), 3, 5 << 30) == b"xxx", "sparse %%s" %% (st,))
check(os.read(fifo, 100) == b"in the fifo", "fifo")
check(os.path.samestat(os.stat("fifo"), os.fstat(fifo)), "the fifo is another")
left = [n for d, ds, fs in os.walk(base) for n in ds + fs if n.startswith(".godwit")]
check(left == [], left)
print("\n".join(map(str, bad)) or "ok", flush=True)
`

// TestCarryTree: a directory travels with everything that is in it, onto a host
// that has none of it, or another state.
func TestCarryTree(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name  string
		there func(base string) error
		fails string
	}{
		{"nothing there", os.RemoveAll, ""},
		{"older there", func(base string) error {
			old := time.Unix(1000, 0)
			for name, text := range map[string]string{"closed": "other", "log": "some other log that is longer", "down/data": "z"} {
				p := filepath.Join(base, "deep", name)
				if err := errors.Join(os.Remove(p), os.WriteFile(p, []byte(text), 0o600), os.Chtimes(p, old, old)); err != nil {
					return err
				}
			}
			return nil
		}, ""},
		{"same there", func(string) error { return nil }, ""},
		{"newer there", func(base string) error {
			return os.WriteFile(filepath.Join(base, "deep", "closed"), []byte("newer"), 0o600)
		}, "newer"},
		{"another kind there", func(base string) error {
			p := filepath.Join(base, "deep", "down", "data")
			return errors.Join(os.Remove(p), os.Mkdir(p, 0o700))
		}, "directory"},
		{"a symlink on the way", func(base string) error {
			p := filepath.Join(base, "deep", "down")
			return errors.Join(os.Rename(p, base+"/elsewhere"), os.Symlink(base+"/elsewhere", p))
		}, "deep/down"},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			base := filepath.Join(t.TempDir(), "srv")
			p := start(t, fmt.Sprintf(carryWorkload, base))
			e := engine.New(nil)
			dir := filepath.Join(t.TempDir(), "images")
			p.leave(e, dir, engine.DumpOptions{Elsewhere: true, Carry: []engine.Carry{{Dir: base}}})
			if err := c.there(base); err != nil {
				t.Fatal(err)
			}
			before := listing(t, filepath.Dir(base))
			for _, places := range [][]engine.Place{nil, {{Path: base, Dir: false}}, {{Path: base + "/deep/down", Dir: true}}, {{Path: base, Dir: true, Limit: 100}}} {
				if s, err := restoreDir(t, e, dir, engine.RestoreOptions{Carry: places}); err == nil {
					t.Errorf("placed although only %v was agreed on", places)
					_ = s.Discard()
				}
				if d := cmp.Diff(before, listing(t, filepath.Dir(base))); d != "" {
					t.Errorf("a failed restore leaves (-before +after):\n%s", d)
				}
			}
			s, err := restoreDir(t, e, dir, engine.RestoreOptions{Carry: []engine.Place{{Path: base, Dir: true}}})
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("the restore says %v, want %q", err, c.fails)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if s != nil {
				if err := s.Discard(); err != nil {
					t.Error(err)
				}
			}
			if d := cmp.Diff(before, listing(t, filepath.Dir(base))); d != "" {
				t.Errorf("a discarded tree leaves (-before +after):\n%s", d)
			}
			if c.fails != "" {
				return
			}
			if s, err = restoreDir(t, e, dir, engine.RestoreOptions{Carry: []engine.Place{{Path: base, Dir: true}}}); err != nil {
				t.Fatal(err)
			}
			if err := s.Run(); err != nil {
				t.Fatal(err)
			}
			p.finish()
		})
	}
}

// TestCarryNoRoom: a file system that fills up while a file comes ends the
// restore with the reason, and nothing is left.
func TestCarryNoRoom(t *testing.T) {
	needRoot(t)
	base := filepath.Join(t.TempDir(), "srv")
	p := start(t, fmt.Sprintf(`
import os, signal
os.makedirs(%[1]q + "/in")
f = open(%[1]q + "/in/large", "w+b"); f.write(os.urandom(3 << 20)); f.flush()
print("up", flush=True)
signal.pause()
`, base))
	e := engine.New(nil)
	dir := filepath.Join(t.TempDir(), "images")
	p.leave(e, dir, engine.DumpOptions{Elsewhere: true, Carry: []engine.Carry{{Dir: base}}})
	if err := os.RemoveAll(base); err != nil {
		t.Fatal(err)
	}
	room := filepath.Dir(base)
	if err := unix.Mount("tmpfs", room, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(room, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := restoreDir(t, e, dir, engine.RestoreOptions{Carry: []engine.Place{{Path: base, Dir: true}}})
	if err == nil {
		_ = s.Discard()
	}
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), base+"/in/large: the file system here is full") {
		t.Errorf("the restore says %v", err)
	}
	if es, err := os.ReadDir(room); err != nil || len(es) > 0 {
		t.Errorf("a failed restore leaves %v (%v)", es, err)
	}
}

// listing is what is in a directory, with what tells files apart.
func listing(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		out = append(out, fmt.Sprintf("%s %o %d %d", path, st.Mode, st.Ino, st.Size))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
