package explore

import (
	"os"
	"testing"
)

func TestExplore(t *testing.T) {
	for _, paged := range []bool{false, true} {
		f := newModel(paged).explore()
		t.Logf("paged %v: %d states, %d steps", paged, f.states, f.steps)
		if f.problem != "" {
			t.Errorf("%s", f.problem)
			for _, l := range f.trace {
				t.Log(l)
			}
		}
	}
	_ = os.Args
}
