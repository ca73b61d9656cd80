package files

import (
	"strconv"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// NoteInherited notes which descriptions an ancestor of a tree's root has open, too:
// the tree was started with them, and whoever goes on with them does so at the same
// offset. What cannot be looked at is passed over.
func NoteInherited(root int, objects []plan.Object) {
	type place struct{ dev, ino uint64 }
	type open struct {
		pid, fd int
		comm    string
	}
	ancestors := map[place][]open{}
	for pid := root; ; {
		st, err := procfs.ReadStat(pid)
		if err != nil || st.PPid <= 1 {
			break
		}
		pid = st.PPid
		comm, _ := procfs.Comm(pid)
		fds, _ := procfs.Fds(pid)
		for _, fd := range fds {
			var st unix.Stat_t
			if unix.Stat(procfs.Path(pid, "fd", strconv.Itoa(fd)), &st) == nil {
				at := place{uint64(st.Dev), st.Ino}
				ancestors[at] = append(ancestors[at], open{pid, fd, comm})
			}
		}
	}
	for i := range objects {
		o := &objects[i]
		for _, a := range ancestors[place{o.Dev, o.Ino}] {
			if len(o.Holders) == 0 || len(o.Holders[0].FDs) == 0 {
				break
			}
			h := o.Holders[0]
			if same, err := sys.KcmpFile(h.Pid, h.FDs[0], a.pid, a.fd); err == nil && same == sys.Equal {
				o.Inherited = &plan.Holder{Pid: a.pid, Comm: a.comm, FDs: []int{a.fd}}
				break
			}
		}
	}
}
