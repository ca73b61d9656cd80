package e2e

import (
	"path/filepath"
	"testing"
	"time"
)

// privileged are the commands of selfcheck that an ordinary user cannot run,
// with what they do that he may not.
var privileged = map[string]string{
	"attributes":  "sets securebits",
	"creds":       "becomes another user",
	"dropped":     "is root first",
	"ghosts":      "gives files away",
	"hugeshared":  "reserves huge pages",
	"hugetlb":     "reserves huge pages",
	"inotify":     "gives files away",
	"linkremap":   "mounts",
	"mmstate":     "locks all memory",
	"multicast":   "sets routes",
	"netlink":     "sets privileged options",
	"packet":      "opens packet sockets",
	"ping":        "lets groups ping",
	"rawsock":     "opens raw sockets",
	"seccomp":     "installs filters without no_new_privs",
	"sysvshm":     "becomes another user",
	"udpopts":     "sets privileged options",
	"zombiekinds": "becomes another user",
	"utsipc":      "makes namespaces",
}

// TestObjectsOfUser is TestObjects with programs of an ordinary user without any
// capability: what comes back has his rights and no more.
func TestObjectsOfUser(t *testing.T) {
	ctx := deadline(t, 8*time.Minute)
	cmds, err := programs.Commands(ctx)
	if err != nil {
		t.Fatal(err)
	}
	h := newHosts(t, "alpha").Host("alpha")
	for _, c := range cmds {
		o := objects[c]
		if o.elsewhere || privileged[c] != "" {
			continue
		}
		t.Run(c, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			prefix := filepath.Join(newDir(t), c)
			args := append([]string{programs.Selfcheck, c, prefix}, o.args...)
			r := start(ctx, t, h, prefix, append([]string{"setpriv", "--reuid", "1234", "--regid", "2345", "--clear-groups", "--inh-caps=-all", "--"}, args...)...)
			dumpRestore(ctx, t, r, 2, o.options...)
			stop(ctx, t, r)
		})
	}
}
