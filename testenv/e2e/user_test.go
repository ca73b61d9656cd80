package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"godwit/testenv/workloads"
)

// TestObjectsOfUser is TestObjects with programs of an ordinary user without any
// capability: what comes back has his rights and no more. Commands that he may
// not run, as the command itself says before anything is dumped, are left out.
func TestObjectsOfUser(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 15*time.Minute)
	cmds, err := programs.Commands(ctx)
	if err != nil {
		t.Fatal(err)
	}
	h := newHosts(t, "alpha").Host("alpha")
	tried, ran := 0, 0
	for _, c := range cmds {
		o := objects[c]
		if o.elsewhere {
			continue
		}
		t.Run(c, func(t *testing.T) {
			tried++
			ctx := deadline(t, time.Minute)
			prefix := filepath.Join(newDir(t), c)
			args := append([]string{"setpriv", "--reuid", "1234", "--regid", "2345", "--clear-groups", "--inh-caps=-all", "--",
				programs.Selfcheck, c, prefix}, o.args...)
			r, err := workloads.Start(ctx, h, prefix, args...)
			if err == nil {
				err = r.Goes(ctx, 5) // a child of it may say so a moment later
			}
			if err != nil && forbidden(err.Error()) {
				t.Logf("not for an ordinary user: %v", err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			dumpRestore(ctx, t, r, 2, o.options...)
			stop(ctx, t, r)
			ran++
		})
	}
	if 2*ran < tried {
		t.Errorf("only %d of %d commands ran", ran, tried)
	}
}

// forbidden tells whether a program says that it lacks a privilege, or what only
// a privilege could have given it.
func forbidden(text string) bool {
	for _, s := range []string{"Operation not permitted", "Permission denied", "Cannot allocate memory", "no route for groups"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}
