package restore

import (
	"fmt"
	"maps"
	"os"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/ns"
	"godwit/engine/ptrace"
)

// namespaces finds out which namespaces the tree has for itself; all its
// processes must be in the same ones.
func (m *model) namespaces(inv *inventory.InventoryEntry) error {
	root := m.procs[0]
	m.own = ns.FromImages(inv, root.ids)
	if other := m.own.Own &^ ns.Restorable; other != 0 {
		return fmt.Errorf("images hold a %s namespace of the tree's own, which cannot be made", strings.Join(other.Names(), " and a "))
	}
	if err := m.own.Check(); err != nil {
		return fmt.Errorf("images are wrong: %w", err)
	}
	if m.own.Own.Has(ns.Pid) != (root.vpid == 1) || root.vpid != 1 && m.ids[1] {
		return fmt.Errorf("images hold pid 1 although the tree has no pid namespace of its own, or the other way round")
	}
	for _, p := range m.procs {
		if !p.zombie && !m.own.Same(root.ids, p.ids) {
			return fmt.Errorf("images of %s: it is in another namespace than the root, which cannot be made", p)
		}
	}
	return nil
}

// NamespaceOptions says how namespaces of a tree's own are made.
type NamespaceOptions struct {
	// Root and Mounts are where a tree with mounts of its own has its root and its
	// external mounts, by their keys.
	Root   string
	Mounts map[string]string
	// Veth are the outer ends of veth pairs, by the names of the inner ones.
	Veth map[string]ns.Veth
	// Join are namespaces in which the tree is made, whether it had such of its own or not.
	Join        map[ns.Set]*os.File
	WeakSysctls bool // settings that this kernel does not have are passed over
	EmptyNet    bool // nothing is made in a network namespace of its own
}

// findJoined finds out which namespaces of the tree are there already.
func (t *Tree) findJoined(set *image.Set) error {
	t.join = maps.Clone(t.o.Namespaces.Join)
	if key := t.model.own.NetKey(set); key != "" && t.model.own.Own.Has(ns.Net) && t.join[ns.Net] == nil {
		in, ok := t.o.Inherit[key]
		if !ok {
			return fmt.Errorf("the network namespace of the tree is external: hand it in (--inherit-fd 'fd[N]:%s', with the namespace open as descriptor N)", key)
		}
		if t.join == nil {
			t.join = map[ns.Set]*os.File{}
		}
		t.join[ns.Net] = in.File
		// It is no file of the tree.
		t.o.Inherit = maps.Clone(t.o.Inherit)
		delete(t.o.Inherit, key)
	}
	for kind := range t.join {
		t.joined |= kind
	}
	return nil
}

// joinAll has a process, and everything that is cloned from it, live in namespaces
// that are there.
// Preconditions: nothing has been cloned from it yet.
func (t *Tree) joinAll(r *ptrace.Remote) error {
	for kind, f := range t.join {
		if err := t.setns(r, f, int(kind), fmt.Sprintf("join the %s namespace %s", kind.Names()[0], f.Name())); err != nil {
			return err
		}
	}
	return nil
}

// setns takes a process into a namespace.
func (t *Tree) setns(r *ptrace.Remote, f *os.File, kind int, what string) error {
	nums, err := t.ch.give(r, []*os.File{f})
	if err != nil {
		return err
	}
	return r.Run(ptrace.NewCall(what, unix.SYS_SETNS, ptrace.Int(nums[0]), ptrace.Int(kind)),
		ptrace.NewCall("close", unix.SYS_CLOSE, ptrace.Int(nums[0])))
}

// inside are the namespaces, other than this process's, in which objects of the
// tree are made.
func (t *Tree) inside() ns.Set { return (t.model.own.Own | t.joined) & (ns.Net | ns.Ipc) }

// newPid tells whether the stub is the init of a pid namespace for the tree.
func (t *Tree) newPid() bool { return t.o.NewPidNamespace && !t.model.own.Own.Has(ns.Pid) }
