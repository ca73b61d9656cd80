package sys

import "golang.org/x/sys/unix"

// HasLandlock tells whether this kernel confines programs by Landlock (landlock(7)).
func HasLandlock() bool {
	v, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	return e == 0 && v > 0
}
