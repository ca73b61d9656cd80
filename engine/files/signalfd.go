package files

import (
	"errors"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/signalfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// kindSignalfd carries signalfd(2). Which process's signals it reads is decided
// by who reads it, so it may be made anywhere.
var kindSignalfd = &kind{
	name: "signalfd", typ: fdinfo.FdTypes_SIGNALFD,
	takes: func(_ *Dumper, o *object) bool { return o.link == "anon_inode:[signalfd]" },
	dump:  dumpSignalfd,
	open:  openEach(openSignalfd),
}

func dumpSignalfd(_ *Dumper, o *object) error {
	if !o.info.HasSigmask {
		return errors.New("its fdinfo tells no signals")
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_SIGNALFD.Enum(), Id: proto.Uint32(o.id), Sgfd: &signalfd.SignalfdEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown, Sigmask: proto.Uint64(o.info.Sigmask),
	}})
	return nil
}

func openSignalfd(_ *Restorer, x *description) error {
	var set unix.Sigset_t
	set.Val[0] = x.entry.GetSgfd().GetSigmask()
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("signalfd4", err)
	}
	x.file = os.NewFile(uintptr(fd), "signalfd")
	return setStatus(x.file, x.entry.GetSgfd().GetFlags())
}
