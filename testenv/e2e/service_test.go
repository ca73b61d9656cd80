package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// TestMigrateService moves a service as systemd starts one to and fro, with one table
// of rules and no flags: standard output on journald's socket, stdin /dev/null, a log
// opened O_APPEND, a connection to a daemon of the host.
func TestMigrateService(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, `
[[external]]
match = ["kind:unix-stream"]
resolver = "path"
argument = "{path}"
`))
	dir := newDir(t)
	script := filepath.Join(filepath.Dir(programs.Drive), "service.py")
	journal := func(h *hosts.Host) string { return filepath.Join(dir, "journal-"+h.Name()) }
	for _, h := range []*hosts.Host{alpha, beta} {
		for _, argv := range [][]string{{"journald", journal(h)}, {"daemon"}} {
			pid, err := h.Start(ctx, hosts.Spec{Args: append([]string{"/usr/bin/python3", script}, argv...), Stderr: filepath.Join(dir, "stderr")})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = h.Kill(pid, unix.SIGKILL) })
		}
	}
	prefix, log := filepath.Join(dir, "service"), filepath.Join(dir, "app.log")
	r, err := workloads.Start(ctx, alpha, prefix, "/usr/bin/python3", script, "service", prefix, log)
	if err != nil {
		t.Fatal(err)
	}
	goes(ctx, t, r, 5)
	for _, h := range []*hosts.Host{beta, alpha, beta} {
		migrate(ctx, t, f, r, h)
	}
	stop(ctx, t, r)

	// The journals of both hosts together have every line, and under one name.
	b, err := os.ReadFile(prefix + ".ok")
	if err != nil {
		t.Fatal(err)
	}
	var want int
	if _, err := fmt.Sscanf(string(b), "OK %d", &want); err != nil || want < 30 {
		t.Fatalf("%q: %v", b, err)
	}
	seen := map[string]int{}
	for lines := 0; lines < want; {
		clear(seen)
		lines = 0
		for _, h := range []*hosts.Host{alpha, beta} {
			b, err := os.ReadFile(journal(h))
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for l := range strings.Lines(string(b)) {
				seen[strings.TrimSuffix(l, "\n")]++
				n++
			}
			if n < 10 {
				t.Fatalf("the journal of %s has %d lines only", h.Name(), n)
			}
			lines += n
		}
		if ctx.Err() != nil {
			t.Fatalf("the journals have %d lines, want %d", lines, want)
		}
	}
	for n := range want {
		if l := fmt.Sprintf("mysvc 5 0 line %d", n); seen[l] != 1 {
			t.Errorf("%q is there %d times", l, seen[l])
		}
	}
	if b, err = os.ReadFile(log); err != nil || len(strings.Fields(string(b))) != want {
		t.Errorf("the log has %d lines, want %d: %v", len(strings.Fields(string(b))), want, err)
	}
}
