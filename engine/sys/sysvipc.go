package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IpcPerm is what all System V objects have: struct ipc64_perm
// (include/uapi/asm-generic/ipcbuf.h) without the sequence number.
type IpcPerm struct {
	Key                  int32
	UID, GID, CUID, CGID uint32
	Mode                 uint32 // permissions
}

// Commands of semctl(2) and msgctl(2) (include/uapi/linux/sem.h, ipc.h).
const (
	semGetPid = 11
	semGetAll = 13
	semSetAll = 17

	ipcSet = 1
	// ipcDesc is room for struct semid64_ds and msqid64_ds.
	ipcDesc = 128
	// msqQbytes is the offset of msg_qbytes (asm-generic/msgbuf.h, 64 bits).
	msqQbytes = 48 + 5*8
)

// Files that choose the id of the next object of the writer's IPC namespace.
const (
	semNextID = "/proc/sys/kernel/sem_next_id"
	msgNextID = "/proc/sys/kernel/msg_next_id"
)

// createIPC makes an object with a chosen id as its creator, on a thread of its
// own in the IPC namespace of the calling thread.
// Preconditions: the calling goroutine is locked to its thread if that is in
// another IPC namespace than the process.
func createIPC(next string, id int, p IpcPerm, get func() (int, error)) error {
	ns, err := os.Open("/proc/thread-self/ns/ipc")
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	type result struct {
		id  int
		err error
	}
	done := make(chan result)
	go func() {
		// This thread takes on the creator's ids and ends with the goroutine.
		runtime.LockOSThread()
		var r result
		if r.err = os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWIPC)); r.err == nil {
			r.err = os.WriteFile(next, []byte(strconv.Itoa(id)), 0)
		}
		if r.err == nil {
			r.id, r.err = asCreator(p, get)
			if r.err != nil {
				r.err = errors.Join(r.err, os.WriteFile(next, []byte(strconv.Itoa(ipcNoID)), 0))
			}
		}
		done <- r
	}()
	r := <-done
	if r.err == nil && r.id != id {
		return &takenID{got: r.id, want: id}
	}
	return r.err
}

// takenID says that the kernel gave a new object another id.
type takenID struct{ got, want int }

func (e *takenID) Error() string { return fmt.Sprintf("id %d is taken: %v", e.want, unix.EEXIST) }
func (e *takenID) Unwrap() error { return unix.EEXIST }

// asCreator runs get with the creator's ids.
// Preconditions: the thread is of no use to anybody afterwards.
func asCreator(p IpcPerm, get func() (int, error)) (int, error) {
	keep := ^uintptr(0)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(p.CGID), keep); e != 0 {
		return 0, os.NewSyscallError("setresgid", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(p.CUID), keep); e != 0 {
		return 0, os.NewSyscallError("setresuid", e)
	}
	id, err := get()
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); e != 0 {
		return 0, os.NewSyscallError("setresuid", e)
	}
	return id, err
}

// ipcSetDesc is a descriptor for IPC_SET.
func ipcSetDesc(p IpcPerm) []byte {
	b := make([]byte, ipcDesc)
	le := binary.NativeEndian
	le.PutUint32(b[4:], p.UID)
	le.PutUint32(b[8:], p.GID)
	le.PutUint32(b[20:], p.Mode&0o777)
	return b
}

func semctl(id, n, cmd int, arg unsafe.Pointer) (int, error) {
	r, _, e := unix.Syscall6(unix.SYS_SEMCTL, uintptr(id), uintptr(n), uintptr(cmd), uintptr(arg), 0, 0)
	if e != 0 {
		return 0, os.NewSyscallError("semctl", e)
	}
	return int(r), nil
}

// SemValues reads the values of all n semaphores of a set.
func SemValues(id, n int) ([]uint16, error) {
	v := make([]uint16, n+1)
	_, err := semctl(id, 0, semGetAll, unsafe.Pointer(&v[0]))
	return v[:n], err
}

// SemPid is the last process that changed a semaphore of a set.
func SemPid(id, n int) (int, error) { return semctl(id, n, semGetPid, nil) }

// SemRemove removes a set of semaphores.
func SemRemove(id int) error {
	_, err := semctl(id, 0, unix.IPC_RMID, nil)
	return err
}

// SemCreate makes a set of semaphores with a chosen id and their values. It
// fails with EEXIST if the id or the key is taken.
// Preconditions: those of a thread in another IPC namespace, see createIPC.
func SemCreate(id int, p IpcPerm, values []uint16) error {
	err := createIPC(semNextID, id, p, func() (int, error) {
		r, _, e := unix.RawSyscall(unix.SYS_SEMGET, uintptr(uint32(p.Key)), uintptr(len(values)), ipcCreat|ipcExcl|uintptr(p.Mode&0o777))
		if e != 0 {
			return 0, os.NewSyscallError("semget", e)
		}
		return int(r), nil
	})
	var taken *takenID
	if errors.As(err, &taken) {
		return errors.Join(err, SemRemove(taken.got))
	}
	if err != nil {
		return err
	}
	set := ipcSetDesc(p)
	if _, err = semctl(id, 0, ipcSet, unsafe.Pointer(&set[0])); err == nil && len(values) > 0 {
		_, err = semctl(id, 0, semSetAll, unsafe.Pointer(&values[0]))
	}
	if err != nil {
		return errors.Join(err, SemRemove(id))
	}
	return nil
}

// Message is one of a System V message queue.
type Message struct {
	Type int64 // positive
	Data []byte
}

// msgCopy is MSG_COPY (include/uapi/linux/msg.h): look at the message of a number.
const msgCopy = 0o40000

// MsgPeek copies message number n, counted from 0, of at most size bytes. It
// fails with ENOMSG behind the last.
func MsgPeek(id, n, size int) (Message, error) {
	b := make([]byte, 8+size)
	for {
		r, _, e := unix.Syscall6(unix.SYS_MSGRCV, uintptr(id), uintptr(unsafe.Pointer(&b[0])), uintptr(size), uintptr(n), unix.IPC_NOWAIT|msgCopy, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return Message{}, os.NewSyscallError("msgrcv", e)
		}
		return Message{Type: int64(binary.NativeEndian.Uint64(b)), Data: b[8 : 8+r]}, nil
	}
}

// MsgRemove removes a message queue.
func MsgRemove(id int) error {
	_, _, e := unix.Syscall(unix.SYS_MSGCTL, uintptr(id), unix.IPC_RMID, 0)
	if e != 0 {
		return os.NewSyscallError("msgctl IPC_RMID", e)
	}
	return nil
}

// MsgCreate makes a message queue with a chosen id and its messages. It fails
// with EEXIST if the id or the key is taken.
// Preconditions: those of a thread in another IPC namespace, see createIPC.
func MsgCreate(id int, p IpcPerm, qbytes uint64, ms []Message) error {
	err := createIPC(msgNextID, id, p, func() (int, error) {
		r, _, e := unix.RawSyscall(unix.SYS_MSGGET, uintptr(uint32(p.Key)), ipcCreat|ipcExcl|uintptr(p.Mode&0o777), 0)
		if e != 0 {
			return 0, os.NewSyscallError("msgget", e)
		}
		return int(r), nil
	})
	var taken *takenID
	if errors.As(err, &taken) {
		return errors.Join(err, MsgRemove(taken.got))
	}
	if err != nil {
		return err
	}
	set := ipcSetDesc(p)
	binary.NativeEndian.PutUint64(set[msqQbytes:], qbytes)
	if _, _, e := unix.Syscall(unix.SYS_MSGCTL, uintptr(id), ipcSet, uintptr(unsafe.Pointer(&set[0]))); e != 0 {
		return errors.Join(os.NewSyscallError("msgctl IPC_SET", e), MsgRemove(id))
	}
	for _, m := range ms {
		if err := msgSend(id, m); err != nil {
			return errors.Join(err, MsgRemove(id))
		}
	}
	return nil
}

func msgSend(id int, m Message) error {
	b := append(binary.NativeEndian.AppendUint64(nil, uint64(m.Type)), m.Data...)
	for {
		_, _, e := unix.Syscall6(unix.SYS_MSGSND, uintptr(id), uintptr(unsafe.Pointer(&b[0])), uintptr(len(m.Data)), unix.IPC_NOWAIT, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return os.NewSyscallError("msgsnd", e)
		}
		return nil
	}
}

// MsgQbytes is how many bytes a message queue takes.
func MsgQbytes(id int) (uint64, error) {
	b := make([]byte, ipcDesc)
	_, _, e := unix.Syscall(unix.SYS_MSGCTL, uintptr(id), unix.IPC_STAT, uintptr(unsafe.Pointer(&b[0])))
	if e != 0 {
		return 0, os.NewSyscallError("msgctl IPC_STAT", e)
	}
	return binary.NativeEndian.Uint64(b[msqQbytes:]), nil
}
