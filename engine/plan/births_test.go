package plan

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBirths(t *testing.T) {
	kin := func(pid, sid, parent int) Kin { return Kin{Pid: pid, Sid: sid, Parent: parent} }
	for _, c := range []struct {
		name string
		kin  []Kin
		want []int
	}{
		{"none", nil, []int{}},
		{"one", []Kin{kin(1, 1, -1)}, []int{0}},
		{"each family before the next", []Kin{kin(1, 1, -1), kin(2, 1, 0), kin(3, 1, 0), kin(4, 1, 1), kin(5, 1, 3)}, []int{0, 1, 3, 4, 2}},
		// 2 began a session when it had 4 already.
		{"born before the session", []Kin{kin(1, 1, -1), kin(2, 2, 0), kin(3, 2, 1), kin(4, 1, 1)}, []int{0, 1, 3, 2}},
		{"root in a session of others", []Kin{kin(7, 3, -1), kin(8, 3, 0), kin(9, 9, 0)}, []int{0, 1, 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, Births(c.kin)); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}
