package sys

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bits of the mode of a System V segment beyond its permissions
// (include/linux/shm.h), and operations (include/uapi/linux/ipc.h, shm.h).
const (
	ShmDest    = 0o1000 // removed: it goes with its last attachment
	ShmLocked  = 0o2000
	ShmHugetlb = 0o4000

	ShmRdonly = 0o10000 // of shmat
	ShmExec   = 0o100000

	shmLock   = 11
	ipcCreat  = 0o1000
	ipcExcl   = 0o2000
	ipcNoID   = -1
	shmNextID = "/proc/sys/kernel/shm_next_id"
)

// ShmStat reads what a System V segment is.
func ShmStat(id int) (d unix.SysvShmDesc, err error) {
	_, err = unix.SysvShmCtl(id, unix.IPC_STAT, &d)
	return d, os.NewSyscallError("shmctl IPC_STAT", err)
}

// ShmRemove removes a segment; it lives on until its last attachment goes.
func ShmRemove(id int) error {
	_, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	return os.NewSyscallError("shmctl IPC_RMID", err)
}

// ShmCreate makes a segment with a chosen id, and the key (0: none), owner,
// creator, permissions and lock of want. It fails with EEXIST if the id or the
// key is taken. The id needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
func ShmCreate(id int, want *unix.SysvShmDesc) (err error) {
	type result struct {
		id  int
		err error
	}
	done := make(chan result)
	go func() {
		// This thread takes on the creator's ids and ends with the goroutine.
		runtime.LockOSThread()
		var r result
		if r.err = os.WriteFile(shmNextID, []byte(strconv.Itoa(id)), 0); r.err == nil {
			r.id, r.err = shmGetAs(want)
			if r.err != nil {
				r.err = errors.Join(r.err, os.WriteFile(shmNextID, []byte(strconv.Itoa(ipcNoID)), 0))
			}
		}
		done <- r
	}()
	r := <-done
	if r.err != nil {
		return r.err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ShmRemove(r.id))
		}
	}()
	if r.id != id {
		return fmt.Errorf("id %d is taken: %w", id, unix.EEXIST)
	}
	set := *want
	set.Perm.Mode &= 0o777
	if _, err := unix.SysvShmCtl(id, unix.IPC_SET, &set); err != nil {
		return os.NewSyscallError("shmctl IPC_SET", err)
	}
	if want.Perm.Mode&ShmLocked != 0 {
		if _, err := unix.SysvShmCtl(id, shmLock, nil); err != nil {
			return os.NewSyscallError("shmctl SHM_LOCK", err)
		}
	}
	return nil
}

// shmGetAs makes a segment as its creator.
// Preconditions: the thread is of no use to anybody afterwards.
func shmGetAs(want *unix.SysvShmDesc) (int, error) {
	keep := ^uintptr(0)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(want.Perm.Cgid), keep); e != 0 {
		return 0, os.NewSyscallError("setresgid", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(want.Perm.Cuid), keep); e != 0 {
		return 0, os.NewSyscallError("setresuid", e)
	}
	id, _, e := unix.RawSyscall(unix.SYS_SHMGET, uintptr(uint32(want.Perm.Key)), uintptr(want.Segsz), ipcCreat|ipcExcl|uintptr(want.Perm.Mode&0o777))
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); e != 0 {
		return 0, os.NewSyscallError("setresuid", e)
	}
	if e != 0 {
		return 0, os.NewSyscallError("shmget", e)
	}
	return int(id), nil
}

// ShmFile opens the memory of a segment as a file, through a short attachment.
func ShmFile(id int) (*os.File, error) {
	b, err := unix.SysvShmAttach(id, 0, 0)
	if err != nil {
		return nil, os.NewSyscallError("shmat", err)
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	size := (uintptr(len(b)) + 4095) &^ 4095
	f, ferr := os.OpenFile("/proc/self/map_files/"+hex(start)+"-"+hex(start+size), os.O_RDWR, 0)
	if err := unix.SysvShmDetach(b); err != nil && ferr == nil {
		return nil, errors.Join(os.NewSyscallError("shmdt", err), f.Close())
	}
	return f, ferr
}
