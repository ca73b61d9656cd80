package ns

import (
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/utsns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// dumpUts emits host and domain name of the thread's UTS namespace.
func dumpUts(emit Emit) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return os.NewSyscallError("uname", err)
	}
	return emit(image.Entry{File: image.UtsnsFile(Uts.id()), Magic: image.MagicUtsns, Msg: &utsns.UtsnsEntry{
		Nodename:   proto.String(unix.ByteSliceToString(u.Nodename[:])),
		Domainname: proto.String(unix.ByteSliceToString(u.Domainname[:])),
	}})
}

// restoreUts sets the names of the thread's UTS namespace.
func restoreUts(set *image.Set, id uint32) error {
	e, err := image.One[*utsns.UtsnsEntry](set, image.UtsnsFile(id))
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(e.GetNodename())); err != nil {
		return fmt.Errorf("set host name %q: %w", e.GetNodename(), os.NewSyscallError("sethostname", err))
	}
	if err := unix.Setdomainname([]byte(e.GetDomainname())); err != nil {
		return fmt.Errorf("set domain name %q: %w", e.GetDomainname(), os.NewSyscallError("setdomainname", err))
	}
	return nil
}
