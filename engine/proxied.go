package engine

import (
	"os"

	"godwit/engine/files"
	"godwit/engine/plan"
)

// Far is the other end of an object that a restore made anew
// (FileRestoreOptions.Proxied).
type Far = plan.Far

// CloseFar closes the far ends of a tree that does not run.
func CloseFar(far map[string]*Far) { files.CloseFar(far) }

// Duplicates gives a duplicate of one open description of what a key (pipe[inode],
// unix[inode], tty[rdev:dev]) names for each access mode in which the processes have
// it. They are the caller's. Preconditions: the processes are frozen.
func Duplicates(pids []int, key string) ([]*os.File, error) { return files.Duplicates(pids, key) }

// TerminalReader says which process, outside of the tree of root, reads what is typed
// on the terminal of a key (tty[rdev:dev]); 0: none.
func TerminalReader(root int, pids []int, key string) (int, error) {
	return files.TerminalReader(root, pids, key)
}

// HeldOutside says which process has what a key names open, besides those of the
// tree and this one; 0: none.
func HeldOutside(pids []int, key string) (int, error) { return files.HeldOutside(pids, key) }
