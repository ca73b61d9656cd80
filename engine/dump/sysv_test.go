package dump

import (
	"errors"
	"strings"
	"testing"

	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/refuse"
)

func TestSegmentsOfOthers(t *testing.T) {
	for _, c := range []struct {
		name           string
		attach, inside uint64
		refused        bool
	}{{"all in the tree", 3, 3, false}, {"one outside", 4, 3, true}} {
		t.Run(c.name, func(t *testing.T) {
			x := newCollector(nil, Options{}, 10, nil)
			x.segments[7] = &segment{facts: image.SysVFacts{ID: 7}, attach: c.attach, inside: c.inside, first: &process{pid: 10}, vma: &mem.VMA{Start: 0x1000, End: 0x2000}}
			if err := x.finishSysV(); err != nil {
				t.Fatal(err)
			}
			err := x.err()
			var r *refuse.Refusal
			if errors.As(err, &r) != c.refused {
				t.Fatalf("got %v, want refusal %v", err, c.refused)
			}
			if c.refused && !strings.Contains(err.Error(), "System V segment 7 is attached 4 times, but only 3 times in the tree") {
				t.Errorf("the refusal says %q", err)
			}
			if err := x.close(); err != nil {
				t.Error(err)
			}
		})
	}
}
