package restore

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// TestLead gives trees another leader of their session.
func TestLead(t *testing.T) {
	type member struct{ pid, sid, pgid uint32 }
	for _, tc := range []struct {
		name            string
		tree, want      []member
		fg, wantFG, sid uint32 // of the terminal
	}{
		{"a job", []member{{10, 5, 10}, {11, 5, 10}, {12, 5, 12}}, []member{{10, 10, 10}, {11, 10, 10}, {12, 10, 12}}, 12, 12, 10},
		{"in the background", []member{{10, 5, 10}}, []member{{10, 10, 10}}, 5, 10, 10},
		{"part of a pipeline", []member{{10, 5, 9}, {11, 5, 9}}, []member{{10, 10, 10}, {11, 10, 10}}, 9, 10, 10},
		{"in the group of a child", []member{{10, 5, 11}, {11, 5, 11}}, []member{{10, 10, 10}, {11, 10, 11}}, 11, 11, 10},
		{"with a session below", []member{{10, 5, 10}, {11, 11, 11}}, []member{{10, 10, 10}, {11, 11, 11}}, 10, 10, 10},
		{"a leader", []member{{10, 10, 10}, {11, 10, 11}}, []member{{10, 10, 10}, {11, 10, 11}}, 11, 11, 10},
	} {
		t.Run(tc.name, func(t *testing.T) {
			set := image.NewSet()
			for i, m := range tc.tree {
				parent := uint32(0)
				if i > 0 {
					parent = tc.tree[0].pid
				}
				set.Add(image.Entry{File: image.PstreeFile, Msg: &pstree.PstreeEntry{Pid: proto.Uint32(m.pid), Ppid: proto.Uint32(parent), Sid: proto.Uint32(m.sid), Pgid: proto.Uint32(m.pgid)}})
			}
			set.Add(image.Entry{File: image.TtyInfoFile, Msg: &tty.TtyInfoEntry{Sid: proto.Uint32(tc.tree[0].sid), Pgrp: proto.Uint32(tc.fg)}})
			if err := lead(set); err != nil {
				t.Fatal(err)
			}
			var got []member
			for _, e := range set.Entries(image.PstreeFile) {
				p := e.Msg.(*pstree.PstreeEntry)
				got = append(got, member{p.GetPid(), p.GetSid(), p.GetPgid()})
			}
			if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(member{})); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			tt := set.Entries(image.TtyInfoFile)[0].Msg.(*tty.TtyInfoEntry)
			if tt.GetSid() != tc.sid || tt.GetPgrp() != tc.wantFG {
				t.Errorf("terminal of session %d with group %d in the foreground, want %d, %d", tt.GetSid(), tt.GetPgrp(), tc.sid, tc.wantFG)
			}
		})
	}
}
