package sys

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestShmCreate(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("choosing the id of a System V segment needs root")
		}
		t.Skip("choosing the id of a System V segment needs root")
	}
	// An id of the highest generation, which a fresh host does not reach by itself.
	const id = 32767<<15 | 30123
	want := unix.SysvShmDesc{Segsz: 5000, Perm: unix.SysvIpcPerm{Key: 0x60d31701, Uid: 11, Gid: 12, Cuid: 13, Cgid: 14, Mode: 0o640 | ShmLocked}}
	if err := ShmCreate(id, &want, 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := ShmRemove(id); err != nil {
			t.Error(err)
		}
		if _, err := ShmStat(id); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EIDRM) {
			t.Errorf("a removed segment gives %v", err)
		}
	}()
	got, err := ShmStat(id)
	if err != nil {
		t.Fatal(err)
	}
	got.Perm.Seq = 0
	if got.Perm != want.Perm || got.Segsz != want.Segsz || got.Nattch != 0 {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := ShmCreate(id, &want, 0); !errors.Is(err, unix.EEXIST) {
		t.Errorf("the same key and id again: %v", err)
	}
	other := want
	other.Perm.Key = 0
	if err := ShmCreate(id, &other, 0); !errors.Is(err, unix.EEXIST) {
		t.Errorf("the same id again: %v", err)
	}
	f, err := ShmFile(id, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := f.Stat(); err != nil || st.Size() != 5000 {
		t.Errorf("its file: %v, %v", st, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got, err := ShmStat(id); err != nil || got.Nattch != 0 {
		t.Errorf("%d attachments are left, %v", got.Nattch, err)
	}
	if b, err := os.ReadFile(shmNextID); err != nil || string(b) != "-1\n" {
		t.Errorf("the next id is %q, %v", b, err)
	}
}
