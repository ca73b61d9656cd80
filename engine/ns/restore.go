package ns

import (
	"fmt"

	"godwit/engine/image"
)

// Restorable are the kinds of namespaces that can be made again. One of clocks
// is made, or not, as the clocks of the host want it.
const Restorable = Uts | Ipc | Time

// Restore fills the new namespaces in which a process of the tree lives.
func Restore(set *image.Set, im Images, pid int) error {
	for _, x := range []struct {
		kind Set
		fill func(*image.Set, uint32) error
	}{
		{Uts, restoreUts},
		{Ipc, restoreIpc},
	} {
		if !im.Own.Has(x.kind) {
			continue
		}
		if err := Do(pid, x.kind, func() error { return x.fill(set, im.ids[x.kind]) }); err != nil {
			return fmt.Errorf("make the %s namespace of the tree: %w", x.kind.Names()[0], err)
		}
	}
	return nil
}
