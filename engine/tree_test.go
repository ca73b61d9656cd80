package engine

import (
	"testing"

	"godwit/engine/refuse"
)

func TestSameTrouble(t *testing.T) {
	a := refuse.Problem{Pid: 1, HasFD: true, FD: 3, Path: "socket:[7]", Reason: "the queue holds 12 bytes"}
	for _, tc := range []struct {
		name string
		edit func(*refuse.Problem)
		want bool
	}{
		{"itself", func(*refuse.Problem) {}, true},
		{"a number", func(p *refuse.Problem) { p.Reason = "the queue holds 4096 bytes" }, true},
		{"another reason", func(p *refuse.Problem) { p.Reason = "the queue is locked" }, false},
		{"another object at the number", func(p *refuse.Problem) { p.Path = "socket:[8]" }, false},
		{"another process", func(p *refuse.Problem) { p.Pid = 2 }, false},
	} {
		b := a
		tc.edit(&b)
		if got := sameTrouble(a, b); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
