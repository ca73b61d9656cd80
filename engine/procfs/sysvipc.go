package procfs

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// SysVObject is one line of a file in /proc/sysvipc: a set of semaphores, a
// message queue or a segment of the reader's IPC namespace.
type SysVObject struct {
	Key                  int32
	ID                   int
	Mode                 uint32 // octal in the file
	UID, GID, CUID, CGID uint32
	Size                 uint64 // semaphores of a set, bytes in a queue or segment
	Messages             uint64 // of a queue
	Attached             uint64 // of a segment
	// Creator, Last and LastReader are processes in the reader's pid namespace, 0
	// for none: of a segment who made it and last attached or detached it, of a
	// queue who last sent and received.
	Creator, Last, LastReader int
}

// ParseSysV parses a file of /proc/sysvipc by the names in its first line.
func ParseSysV(r io.Reader) ([]SysVObject, error) {
	var out []SysVObject
	var head []string
	err := eachLine(r, func(line []byte) error {
		f := strings.Fields(string(line))
		if head == nil {
			head = f
			return nil
		}
		if len(f) != len(head) {
			return fmt.Errorf("%d fields below a head of %d", len(f), len(head))
		}
		var o SysVObject
		var errs []error
		for i, name := range head {
			switch name {
			case "key":
				errs = append(errs, set(&o.Key, f[i], 10))
			case "semid", "msqid", "shmid":
				errs = append(errs, set(&o.ID, f[i], 10))
			case "perms":
				errs = append(errs, set(&o.Mode, f[i], 8))
			case "uid":
				errs = append(errs, set(&o.UID, f[i], 10))
			case "gid":
				errs = append(errs, set(&o.GID, f[i], 10))
			case "cuid":
				errs = append(errs, set(&o.CUID, f[i], 10))
			case "cgid":
				errs = append(errs, set(&o.CGID, f[i], 10))
			case "nsems", "cbytes", "size":
				errs = append(errs, set(&o.Size, f[i], 10))
			case "qnum":
				errs = append(errs, set(&o.Messages, f[i], 10))
			case "nattch":
				errs = append(errs, set(&o.Attached, f[i], 10))
			case "cpid":
				errs = append(errs, set(&o.Creator, f[i], 10))
			case "lspid", "lpid":
				errs = append(errs, set(&o.Last, f[i], 10))
			case "lrpid":
				errs = append(errs, set(&o.LastReader, f[i], 10))
			}
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
		out = append(out, o)
		return nil
	})
	return out, err
}

// SysV lists the objects of a kind, "sem", "msg" or "shm", in the IPC namespace
// of the calling thread; none if the kernel has no such objects.
func SysV(kind string) ([]SysVObject, error) {
	out, err := stream("/proc/sysvipc/"+kind, ParseSysV)
	if Gone(err) {
		return nil, nil
	}
	return out, err
}
