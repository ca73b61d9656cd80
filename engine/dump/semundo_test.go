package dump

import (
	"errors"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

// semop makes a call of semop(2) on the calling thread.
func semop(id int, ops []sembuf) unix.Errno {
	b := encodeOps(ops)
	_, _, e := unix.Syscall(unix.SYS_SEMOP, uintptr(id), uintptr(unsafe.Pointer(&b[0])), uintptr(len(ops)))
	return e
}

// TestUndoProbe asks the kernel for adjustments that this process has.
func TestUndoProbe(t *testing.T) {
	runtime.LockOSThread() // a thread that Go makes shares its list of adjustments, but not all do
	defer runtime.UnlockOSThread()
	id, _, e := unix.Syscall(unix.SYS_SEMGET, 0, 5, 0o600)
	if e != 0 {
		t.Fatal(e)
	}
	defer func() {
		if err := sys.SemRemove(int(id)); err != nil {
			t.Error(err)
		}
	}()
	ask := func() (int, error) {
		values, err := sys.SemValues(int(id), 5)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(values); at += undoGroup {
			group := values[at:min(at+undoGroup, len(values))]
			free, err := judge(semop(int(id), undoProbe(at, group)), semop(int(id), valueProbe(at, group)))
			if err != nil || !free {
				return at, err
			}
		}
		after, err := sys.SemValues(int(id), 5)
		if err != nil {
			t.Fatal(err)
		}
		for i := range after {
			if after[i] != values[i] {
				t.Errorf("semaphore %d was %d and is %d", i, values[i], after[i])
			}
		}
		return -1, nil
	}
	for _, c := range []struct {
		name string
		ops  []sembuf
		held int
	}{
		{"nothing was used", nil, -1},
		{"without SEM_UNDO", []sembuf{{0, 7, 0}, {1, semMax, 0}, {4, 1, 0}}, -1},
		{"one up", []sembuf{{0, 1, semUndo}}, 0},
		{"and down again", []sembuf{{0, -1, semUndo}}, -1},
		{"one down", []sembuf{{4, -1, semUndo}}, 3},
		{"and up again", []sembuf{{4, 1, semUndo}}, -1},
		{"all of it", []sembuf{{1, -semMax, semUndo}}, 0},
		{"and back", []sembuf{{1, semMax, semUndo}}, -1},
		{"from nothing", []sembuf{{3, semMax, semUndo}}, 3},
	} {
		if len(c.ops) > 0 {
			if e := semop(int(id), c.ops); e != 0 {
				t.Fatalf("%s: %v", c.name, e)
			}
		}
		if held, err := ask(); err != nil || held != c.held {
			t.Errorf("%s: group %d, %v; want %d", c.name, held, err, c.held)
		}
	}
	// Another value than the one that was read is no answer.
	wrong := []uint16{1, 0, 0}
	if _, err := judge(semop(int(id), undoProbe(0, wrong)), semop(int(id), valueProbe(0, wrong))); !errors.Is(err, errMoves) {
		t.Errorf("wrong values: %v, want %v", err, errMoves)
	}
	if _, err := judge(unix.EACCES, unix.EACCES); !errors.Is(err, unix.EACCES) {
		t.Errorf("no access: %v", err)
	}
}
