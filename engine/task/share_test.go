package task

import (
	"errors"
	"slices"
	"testing"
)

func TestShare(t *testing.T) {
	yes := func(n int, at ...int) []bool {
		b := make([]bool, n)
		for _, i := range at {
			b[i] = true
		}
		return b
	}
	for _, c := range []struct {
		name        string
		parent      []int
		id          []uint32
		with, leave []bool
		bad         int // process of the error, 0 for none
	}{
		{"nobody", []int{-1, 0, 1}, []uint32{1, 2, 3}, yes(3), yes(3), 0},
		{"parent and child", []int{-1, 0}, []uint32{1, 1}, yes(2, 1), yes(2), 0},
		{"siblings", []int{-1, 0, 0}, []uint32{1, 2, 2}, yes(3, 1, 2), yes(3, 0), 0},
		{"grandparent and grandchild", []int{-1, 0, 1}, []uint32{1, 2, 1}, yes(3, 1, 2), yes(3, 1), 0},
		{"cousins", []int{-1, 0, 0, 1, 2}, []uint32{1, 2, 3, 4, 4}, yes(5, 1, 2, 3, 4), yes(5, 0, 1, 2), 0},
		{"two groups side by side", []int{-1, 0, 0, 1, 2}, []uint32{1, 2, 3, 2, 3}, yes(5, 3, 4), yes(5), 0},
		{"two groups in a chain", []int{-1, 0, 1, 2}, []uint32{1, 2, 1, 2}, nil, nil, 1},
		{"through a group", []int{-1, 0, 1, 2}, []uint32{1, 2, 2, 1}, nil, nil, 1},
		{"zombies", []int{-1, 0, 0}, []uint32{1, 0, 0}, yes(3), yes(3), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			with, leave, err := Share(c.parent, c.id)
			var bad *SharingError
			if errors.As(err, &bad) != (c.bad != 0) || bad != nil && bad.Process != c.bad {
				t.Fatalf("got %v", err)
			}
			if !slices.Equal(with, c.with) || !slices.Equal(leave, c.leave) {
				t.Errorf("with %v, leave %v; want %v and %v", with, leave, c.with, c.leave)
			}
		})
	}
}
