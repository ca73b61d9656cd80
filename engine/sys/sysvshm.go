package sys

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bits of the mode of a System V segment beyond its permissions
// (include/linux/shm.h), and operations (include/uapi/linux/ipc.h, shm.h).
const (
	ShmDest    = 0o1000 // removed: it goes with its last attachment
	ShmLocked  = 0o2000
	ShmHugetlb = 0o4000 // of shmget

	ShmHugeShift = 26
	ShmHugeMask  = 0x3f

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

// ShmPage is the size, in bytes, of the pages that flags of shmget ask for.
func ShmPage(huge uint32) uint64 {
	if huge&ShmHugetlb == 0 {
		return 4096
	}
	return 1 << (huge >> ShmHugeShift & ShmHugeMask)
}

// ShmCreate makes a segment with a chosen id, and the key (0: none), owner,
// creator, permissions and lock of want. It fails with EEXIST if the id or the
// key is taken. huge are the flags that say which huge pages it consists of, 0 for
// none. The id needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
// Preconditions: those of a thread in another IPC namespace, see createIPC.
func ShmCreate(id int, want *unix.SysvShmDesc, huge uint32) (err error) {
	p := IpcPerm{Key: want.Perm.Key, CUID: want.Perm.Cuid, CGID: want.Perm.Cgid}
	err = createIPC(shmNextID, id, p, func() (int, error) {
		r, _, e := unix.RawSyscall(unix.SYS_SHMGET, uintptr(uint32(want.Perm.Key)), uintptr(want.Segsz), ipcCreat|ipcExcl|uintptr(want.Perm.Mode&0o777|huge))
		if e != 0 {
			return 0, os.NewSyscallError("shmget", e)
		}
		return int(r), nil
	})
	var taken *takenID
	if errors.As(err, &taken) {
		return errors.Join(err, ShmRemove(taken.got))
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ShmRemove(id))
		}
	}()
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

// ShmFile opens the memory of a segment as a file, through a short attachment. page
// is the size of its pages, in bytes.
func ShmFile(id int, page uint64) (*os.File, error) {
	b, err := unix.SysvShmAttach(id, 0, 0)
	if err != nil {
		return nil, os.NewSyscallError("shmat", err)
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	size := (uintptr(len(b)) + uintptr(page) - 1) &^ (uintptr(page) - 1)
	f, ferr := os.OpenFile("/proc/self/map_files/"+hex(start)+"-"+hex(start+size), os.O_RDWR, 0)
	if err := unix.SysvShmDetach(b); err != nil && ferr == nil {
		return nil, errors.Join(os.NewSyscallError("shmdt", err), f.Close())
	}
	return f, ferr
}
