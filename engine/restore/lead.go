package restore

import (
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// lead changes the images of a tree whose session had its leader outside, such as
// a job of a shell: the root leads the session, and the group that it was in. A
// group outside the tree that was in the foreground gives way to the root's.
func lead(set *image.Set) error {
	tree, err := image.All[*pstree.PstreeEntry](set, image.PstreeFile)
	if err != nil || len(tree) == 0 {
		return err
	}
	root := tree[0]
	sid, pgid := root.GetSid(), root.GetPgid()
	pids, groups := map[uint32]bool{}, map[uint32]bool{}
	for _, e := range tree {
		pids[e.GetPid()] = true
	}
	if pids[sid] {
		return nil
	}
	for _, e := range tree {
		if e.GetSid() == sid {
			e.Sid = proto.Uint32(root.GetPid())
		}
		if e == root || e.GetPgid() == pgid && !pids[pgid] {
			e.Pgid = proto.Uint32(root.GetPid())
		}
		groups[e.GetPgid()] = true
	}
	terms, err := image.All[*tty.TtyInfoEntry](set, image.TtyInfoFile)
	if err != nil {
		return err
	}
	for _, t := range terms {
		if t.GetSid() != sid {
			continue
		}
		t.Sid = proto.Uint32(root.GetPid())
		if !groups[t.GetPgrp()] {
			t.Pgrp = proto.Uint32(root.GetPid())
		}
	}
	return nil
}
