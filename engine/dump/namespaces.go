package dump

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"godwit/engine/ns"
	"godwit/engine/procfs"
)

// carried are the kinds of namespaces that a tree may have of its own.
const carried = ns.Uts | ns.Ipc | ns.Pid | ns.Mnt | ns.Net | ns.Time | ns.User

// setOwn finds out which namespaces the tree has of its own.
func (c *collector) setOwn(root *process) error {
	self, err := ns.ReadLinks(os.Getpid(), os.Getpid())
	if err != nil {
		return err
	}
	if c.links, err = ns.ReadLinks(root.pid, root.pid); err != nil {
		return err
	}
	c.own = self.Differ(c.links)
	if c.own.Has(ns.Pid) && root.vpid != 1 && len(root.status.NSpid) > 1 {
		// It landed in a pid namespace of its own, and for its /proc in a mount
		// namespace: both are made anew by the next restore, if that is asked for.
		c.own &^= ns.Pid | ns.Mnt
	}
	if c.own.Has(ns.User) {
		c.userns, err = ns.ReadUsers(&root.status, c.own, func(reason, hint string) { c.refuse(root, "", reason, hint) })
		if err != nil {
			return err
		}
		c.files.SetIDs(c.userns.Map())
	}
	if c.own.Has(ns.Net) && c.o.Networks[c.links[ns.Net]] == "" {
		c.files.LockBriefly()
	}
	if !c.own.Has(ns.Mnt) {
		return nil
	}
	c.mounts, err = ns.ReadMounts(root.pid, c.o.Mounts, func(path, reason, hint string) { c.refuse(root, path, reason, hint) })
	if err == nil {
		c.files.SetRoot(c.mounts.Path)
	}
	return err
}

// namespaces refuses a process that lives in namespaces that cannot be made again.
func (c *collector) namespaces(p *process) error {
	if p == c.procs[0] {
		for _, name := range (c.own &^ carried).Names() {
			c.refuse(p, "", "lives in another "+name+" namespace than the agent", "run an agent inside the container")
		}
	}
	for _, tid := range p.tids {
		l, err := ns.ReadLinks(p.pid, tid)
		if procfs.Gone(err) && tid != p.pid {
			continue
		}
		if err != nil {
			return err
		}
		for _, name := range c.links.Differ(l).Names() {
			if tid == p.pid {
				c.refuse(p, "", fmt.Sprintf("lives in another %s namespace than the root of the tree, pid %d", name, c.procs[0].pid), "dump the part of the tree inside by itself")
			} else {
				c.refuse(p, "", fmt.Sprintf("thread %d is in a %s namespace of its own (unshare), which cannot be carried", tid, name), "")
			}
		}
	}
	for _, name := range []string{"pid", "time"} {
		its, err := procfs.Readlink(procfs.Path(p.pid), "ns/"+name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // not configured in this kernel
		}
		if err != nil {
			return err
		}
		// The link is empty as long as a new pid namespace has no first process.
		children, err := procfs.Readlink(procfs.Path(p.pid), "ns/"+name+"_for_children")
		if err == nil && children == its {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.refuse(p, "", "makes its children in another "+name+" namespace (unshare or setns), which cannot be carried", "")
	}
	return nil
}

// network reads the network namespace of the tree's own.
// Preconditions: on a thread inside.
func (c *collector) network() (err error) {
	if !c.own.Has(ns.Net) || c.o.EmptyNet {
		return nil
	}
	root := c.procs[0]
	if key := c.o.Networks[c.links[ns.Net]]; key != "" {
		c.net = ns.ExternalNet(key)
		return nil
	}
	c.net, err = ns.ReadNet(func(path, reason, hint string) { c.refuse(root, path, reason, hint) })
	if err != nil {
		return fmt.Errorf("read the network namespace of pid %d: %w", root.pid, err)
	}
	return nil
}
