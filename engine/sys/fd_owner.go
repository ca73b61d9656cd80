package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fcntl commands (include/uapi/asm-generic/fcntl.h) and kinds of owners.
const (
	FSetOwnEx   = 15
	fGetOwnEx   = 16
	fGetOwnUIDs = 17 // needs CONFIG_CHECKPOINT_RESTORE
	FSetSig     = 10
	fGetSig     = 11

	OwnerTID  = 0
	OwnerPID  = 1
	OwnerPGRP = 2
)

// FileOwner is who gets the signals of a description (struct f_owner_ex).
type FileOwner struct {
	Type int32 // OwnerTID, OwnerPID, OwnerPGRP
	Pid  int32 // in the caller's pid namespace; 0: nobody
}

func fcntlPtr(name string, fd, cmd int, p unsafe.Pointer) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_FCNTL, uintptr(fd), uintptr(cmd), uintptr(p))
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return os.NewSyscallError("fcntl "+name, e)
	}
}

// GetFileOwner reads the owner of a description.
func GetFileOwner(fd int) (FileOwner, error) {
	var o FileOwner
	err := fcntlPtr("F_GETOWN_EX", fd, fGetOwnEx, unsafe.Pointer(&o))
	return o, err
}

// GetFileOwnerUIDs reads the credentials with which the owner was set.
func GetFileOwnerUIDs(fd int) (uid, euid uint32, err error) {
	var ids [2]uint32
	err = fcntlPtr("F_GETOWNER_UIDS", fd, fGetOwnUIDs, unsafe.Pointer(&ids))
	return ids[0], ids[1], err
}

// GetFileSignal reads the signal sent for a description; 0 means SIGIO.
func GetFileSignal(fd int) (int, error) {
	n, err := unix.FcntlInt(uintptr(fd), fGetSig, 0)
	return n, os.NewSyscallError("fcntl F_GETSIG", err)
}
