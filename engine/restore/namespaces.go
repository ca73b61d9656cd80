package restore

import (
	"fmt"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"

	"godwit/engine/ns"
)

// namespaces finds out which namespaces the tree has for itself; all its
// processes must be in the same ones.
func (m *model) namespaces(inv *inventory.InventoryEntry) error {
	root := m.procs[0]
	m.own = ns.FromImages(inv, root.ids)
	if other := m.own.Own &^ ns.Restorable; other != 0 {
		return fmt.Errorf("images hold a %s namespace of the tree's own, which cannot be made", strings.Join(other.Names(), " and a "))
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

// newPid tells whether the stub is the init of a pid namespace for the tree.
func (t *Tree) newPid() bool { return t.o.NewPidNamespace && !t.model.own.Own.Has(ns.Pid) }
