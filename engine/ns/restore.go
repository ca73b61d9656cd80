package ns

import (
	"fmt"
	"os"

	"godwit/engine/image"
	"godwit/engine/ptrace"
)

// Restorable are the kinds of namespaces that can be made again. One of clocks
// is made, or not, as the clocks of the host want it.
const Restorable = Uts | Ipc | Pid | Mnt | Net | Time | User

// RestoreOptions says how namespaces are filled.
type RestoreOptions struct {
	// Pid is the root of the tree, on this host, which lives in the new namespaces.
	Pid int
	// Run executes system calls in it.
	Run func(...*ptrace.Call) error
	// Root is the directory that becomes the root of a tree with mounts of its own;
	// empty: what it was.
	Root string
	// External are paths on this host of external mounts, by their keys.
	External map[string]string
	// Veth are the outer ends of veth pairs, by the names of the inner ones.
	Veth map[string]Veth
	// WeakSysctls passes over settings that this kernel does not have.
	WeakSysctls bool
	// Joined are namespaces that were there before: nothing is made in them.
	Joined Set
	// EmptyNet leaves a network namespace as it is made.
	EmptyNet bool
}

// Veth is the end of a veth pair in the host's network namespace.
type Veth struct {
	Name   string
	Bridge string // that it is a port of, may be empty
}

// Restore fills the new namespaces of a tree. root is the root directory of its
// mount namespace, nil if that is not its own; the caller closes it.
// Preconditions: on the tracer's thread.
func Restore(set *image.Set, im Images, o RestoreOptions) (root *os.File, err error) {
	for _, x := range []struct {
		kind Set
		fill func(*image.Set, uint32) error
	}{
		{Uts, restoreUts},
		{Ipc, restoreIpc},
	} {
		if !im.Own.Has(x.kind) || o.Joined.Has(x.kind) {
			continue
		}
		if err := Do(o.Pid, x.kind, func() error { return x.fill(set, im.ids[x.kind]) }); err != nil {
			return nil, fmt.Errorf("make the %s namespace of the tree: %w", x.kind.Names()[0], err)
		}
	}
	if im.Own.Has(Net) && !o.EmptyNet && !o.Joined.Has(Net) {
		host, err := os.Open("/proc/self/ns/net")
		if err != nil {
			return nil, err
		}
		defer func() { _ = host.Close() }()
		if err := Do(o.Pid, Net, func() error { return restoreNet(set, im.ids[Net], o, host) }); err != nil {
			return nil, fmt.Errorf("make the network of the tree: %w", err)
		}
	}
	if im.Own.Has(Mnt) {
		if root, err = restoreMnt(set, im, o); err != nil {
			return nil, fmt.Errorf("make the mounts of the tree: %w", err)
		}
	}
	return root, nil
}
