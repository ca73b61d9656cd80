package freeze

import (
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
)

func TestEffective(t *testing.T) {
	const chld, usr1, winch = 1 << (unix.SIGCHLD - 1), 1 << (unix.SIGUSR1 - 1), 1 << (unix.SIGWINCH - 1)
	for _, tc := range []struct {
		name string
		st   procfs.Status
		want uint64
	}{
		{"none", procfs.Status{}, 0},
		{"a signal that ends the program", procfs.Status{SigPnd: usr1}, usr1},
		{"one that is blocked", procfs.Status{ShdPnd: usr1, SigBlk: usr1}, 0},
		{"one that is ignored", procfs.Status{ShdPnd: usr1, SigIgn: usr1}, 0},
		{"one that does nothing", procfs.Status{ShdPnd: chld | winch}, 0},
		{"one that would do nothing and is caught", procfs.Status{ShdPnd: chld | winch, SigCgt: chld}, chld},
	} {
		if got := effective(&tc.st); got != tc.want {
			t.Errorf("%s: %#x, want %#x", tc.name, got, tc.want)
		}
	}
}
