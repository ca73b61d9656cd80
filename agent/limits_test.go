package agent

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"godwit/wire"
)

// TestReserve gives places to trees that want to leave.
func TestReserve(t *testing.T) {
	start := func() int {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
		return cmd.Process.Pid
	}
	one, two, three := start(), start(), start()
	a := New(Config{Host: "alpha", Limits: Limits{Outgoing: 2, Incoming: 1}, Timeouts: Timeouts{Prepared: time.Minute}})
	leaves := func(id string, pid int) {
		a.sources[id] = &source{session: &session{id: id}, req: &wire.StartRequest{Pid: int32(pid)}}
	}
	leaves("m1", one)
	for _, c := range []struct {
		id      string
		pid     int
		release bool
		code    wire.Code // unspecified: a place
		text    string
	}{
		{"m1", one, false, 0, ""}, // it has left already
		{"m2", one, false, wire.Code_CODE_CONFLICT, "already being moved by migration m1"},
		{"m2", os.Getpid(), false, wire.Code_CODE_CONFLICT, "is part of the tree of pid"},
		{"m2", two, false, 0, ""},
		{"m2", two, false, 0, ""}, // it has a place
		{"m3", three, false, wire.Code_CODE_BUSY, "alpha lets 2 trees leave at a time, and so many do (migrations m1, m2)"},
		{"m2", two, true, 0, ""},
		{"m3", three, false, 0, ""},
	} {
		_, err := a.Reserve(t.Context(), &wire.ReserveRequest{Protocol: wire.Version, Id: c.id, Pid: int32(c.pid), Release: c.release})
		if c.code == 0 && err != nil || c.code != 0 && (wire.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s, pid %d: %v, want %s %q", c.id, c.pid, err, c.code, c.text)
		}
	}
	// A place that was not used is given on.
	a.reserved["m3"] = time.Now().Add(-time.Second)
	if err := a.mayLeave("m2", two); err != nil {
		t.Errorf("after one has lapsed: %v", err)
	}
	a.sources = map[string]*source{}
	leaves("m9", os.Getpid())
	if err := a.mayLeave("m1", one); wire.CodeOf(err) != wire.Code_CODE_CONFLICT || !strings.Contains(err.Error(), "which migration m9 moves") {
		t.Errorf("a child of a tree that leaves: %v", err)
	}
	a.destinations["m5"] = &destination{}
	if err := a.mayLand(); wire.CodeOf(err) != wire.Code_CODE_BUSY || !strings.Contains(err.Error(), "alpha lets 1 trees land") {
		t.Errorf("landing: %v", err)
	}
}
