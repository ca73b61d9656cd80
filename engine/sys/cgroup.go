package sys

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// MountCgroup makes a mount of a cgroup hierarchy that only its descriptor leads to.
// Its name is that of its controllers, with commas between them, or "name=…", or
// nothing for version 2.
func MountCgroup(name string) (*os.File, error) {
	fstype := "cgroup"
	if name == "" {
		fstype = "cgroup2"
	}
	fsfd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen "+fstype, err)
	}
	defer func() { _ = unix.Close(fsfd) }()
	if title, ok := strings.CutPrefix(name, "name="); ok {
		err = errors.Join(unix.FsconfigSetFlag(fsfd, "none"), unix.FsconfigSetString(fsfd, "name", title))
	} else if name != "" {
		for _, c := range strings.Split(name, ",") {
			err = errors.Join(err, unix.FsconfigSetFlag(fsfd, c))
		}
	}
	if err == nil {
		err = unix.FsconfigCreate(fsfd)
	}
	var fd int
	if err == nil {
		fd, err = unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("mount the cgroup hierarchy %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "cgroup "+name), nil
}
