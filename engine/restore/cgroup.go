package restore

import (
	"errors"
	"fmt"

	cgimg "github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"

	"godwit/engine/cgroup"
	"godwit/engine/image"
)

// readCgroups checks what the images say of control groups, if they are wanted.
func (t *Tree) readCgroups(set *image.Set) error {
	if t.o.Cgroups.Mode == cgroup.Ignore || t.o.Cgroups.Mode == "" {
		return nil
	}
	if len(set.Entries(image.CgroupFile)) == 0 {
		return errors.New("the images do not say in which cgroups the tree was: dump it with --manage-cgroups, or restore it without")
	}
	e, err := image.One[*cgimg.CgroupEntry](set, image.CgroupFile)
	if err != nil {
		return err
	}
	inv, err := image.One[*inventory.InventoryEntry](set, image.InventoryFile)
	if err != nil {
		return err
	}
	t.cgroups, err = cgroup.New(e, inv.GetRootCgSet(), t.o.Cgroups)
	return err
}

// enterCgroups makes the groups and puts all tasks into theirs, before they have
// memory that is charged to one.
func (t *Tree) enterCgroups() error {
	if t.cgroups == nil {
		return nil
	}
	if err := t.cgroups.Make(); err != nil {
		return fmt.Errorf("make the cgroups of the tree: %w", err)
	}
	for _, p := range t.model.procs {
		if p.zombie {
			continue
		}
		leader := p.core().GetTc().GetCgSet()
		if err := t.cgroups.Move(p.remote().Tid, leader, true); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		for _, th := range p.threads[1:] {
			id := th.core.GetThreadCore().GetCgSet()
			if id == 0 || id == leader {
				continue
			}
			if err := t.cgroups.Move(th.remote.Tid, id, false); err != nil {
				return fmt.Errorf("thread %d of %s: %w", th.vtid, p, err)
			}
		}
	}
	return nil
}

// leaveCgroups gives up what was held of groups; without a tree, those that were
// made go.
func (t *Tree) leaveCgroups(discard bool) (err error) {
	if t.cgroups == nil {
		return nil
	}
	if discard {
		err = t.cgroups.Undo()
	}
	t.cgroups.Close()
	t.cgroups = nil
	return err
}
