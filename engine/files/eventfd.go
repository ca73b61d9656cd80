package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// kindEventfd carries eventfd(2) with its counter.
var kindEventfd = &kind{
	name: "eventfd", typ: fdinfo.FdTypes_EVENTFD,
	takes: func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[eventfd]" },
	dump:  dumpEventfd,
	check: checkEventfd,
	open:  openEach(openEventfd),
}

func dumpEventfd(_ *Dumper, o *object) error {
	if o.info.Eventfd == nil {
		return errors.New("its fdinfo tells no counter")
	}
	flags := uint32(o.flags)
	if o.info.Eventfd.Semaphore {
		// The bit is free: an eventfd is always O_RDWR, never O_WRONLY.
		flags |= unix.EFD_SEMAPHORE
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_EVENTFD.Enum(), Id: proto.Uint32(o.id), Efd: &eventfd.EventfdFileEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(flags), Fown: o.fown, Counter: proto.Uint64(o.info.Eventfd.Count),
	}})
	return nil
}

func checkEventfd(_ *Restorer, x *description) error {
	if x.entry.GetEfd().GetCounter() == math.MaxUint64 {
		return errors.New("its counter has overflowed, which cannot be made again")
	}
	return nil
}

func openEventfd(_ *Restorer, x *description) error {
	e := x.entry.GetEfd()
	flags := unix.EFD_CLOEXEC
	if e.GetFlags()&unix.EFD_SEMAPHORE != 0 {
		flags |= unix.EFD_SEMAPHORE
	}
	fd, err := unix.Eventfd(0, flags)
	if err != nil {
		return os.NewSyscallError("eventfd2", err)
	}
	x.file = os.NewFile(uintptr(fd), "eventfd")
	if n := e.GetCounter(); n != 0 { // eventfd2 takes 32 bits only
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], n)
		if _, err := unix.Write(fd, b[:]); err != nil {
			return fmt.Errorf("set its counter to %d: %w", n, os.NewSyscallError("write", err))
		}
	}
	return setStatus(x.file, e.GetFlags())
}
