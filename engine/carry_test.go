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
	ctx := context.Background()
	o := engine.DumpOptions{Elsewhere: true}

	refusedWith(t, e, p.pid, path)
	before := shmNames(t)
	dir := filepath.Join(t.TempDir(), "images")
	tree, err := e.Freeze(ctx, p.pid, o)
	if err != nil {
		t.Fatal(err)
	}
	sink, err := image.NewDirSink(dir)
	if err == nil {
		_, err = tree.Dump(ctx, sink)
	}
	if err == nil {
		err = sink.Commit()
	}
	if err == nil {
		err = tree.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
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
