package mem

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/sys"
)

func TestWithout(t *testing.T) {
	run := func(a, b uint64) sys.PageRegion { return sys.PageRegion{Start: a, End: b, Categories: 8} }
	for _, c := range []struct {
		name   string
		runs   []sys.PageRegion
		guards []image.Range
		want   []sys.PageRegion
	}{
		{"none", []sys.PageRegion{run(1, 9)}, nil, []sys.PageRegion{run(1, 9)}},
		{"middle", []sys.PageRegion{run(1, 9)}, []image.Range{{Start: 3, End: 4}, {Start: 6, End: 8}}, []sys.PageRegion{run(1, 3), run(4, 6), run(8, 9)}},
		{"ends", []sys.PageRegion{run(1, 9)}, []image.Range{{Start: 0, End: 2}, {Start: 8, End: 12}}, []sys.PageRegion{run(2, 8)}},
		{"whole run", []sys.PageRegion{run(1, 3), run(4, 5), run(6, 7)}, []image.Range{{Start: 4, End: 5}}, []sys.PageRegion{run(1, 3), run(6, 7)}},
		{"one over several runs", []sys.PageRegion{run(1, 3), run(4, 5), run(6, 9)}, []image.Range{{Start: 2, End: 7}}, []sys.PageRegion{run(1, 2), run(7, 9)}},
		{"between runs", []sys.PageRegion{run(1, 3), run(6, 9)}, []image.Range{{Start: 3, End: 6}}, []sys.PageRegion{run(1, 3), run(6, 9)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, without(c.runs, c.guards)); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

// TestGuardsPagemap reads entries as the kernel before 6.17 gives them.
func TestGuardsPagemap(t *testing.T) {
	const guard, present = 1 << 58, 1 << 63
	var b []byte
	for _, e := range []uint64{present, guard, guard, 0, guard, present, guard} {
		b = binary.LittleEndian.AppendUint64(b, e)
	}
	got, err := guardsPagemap(bytes.NewReader(b), 0, 7*arch.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	const p = arch.PageSize
	if d := cmp.Diff([]image.Range{{Start: p, End: 3 * p}, {Start: 4 * p, End: 5 * p}, {Start: 6 * p, End: 7 * p}}, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if _, err := guardsPagemap(bytes.NewReader(b), 0, 8*arch.PageSize); err == nil {
		t.Error("a pagemap that ends too early was taken")
	}
	// The kernel takes the question, or says that it does not know guard regions.
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := guards(f, 0x1000, 0x3000); err != nil {
		t.Error(err)
	}
}

func TestAdjacent(t *testing.T) {
	vmas := []*VMA{
		{Start: 1, End: 2, Prot: 3, Status: Regular | AnonPrivate, Path: "[heap]"},
		{Start: 3, End: 4, Prot: 3, Status: Regular | AnonPrivate, Guards: []image.Range{{Start: 3, End: 4}}},
		{Start: 4, End: 6, Prot: 1, Status: Regular | FilePrivate, Path: "/x"},
		{Start: 6, End: 7, Prot: 2, Status: Regular | AnonPrivate, Guards: []image.Range{{Start: 6, End: 7}}},
		{Start: 7, End: 8, Prot: 3, Status: Regular | FileShared},
		{Start: 8, End: 9, Prot: 3, Status: Regular | AnonPrivate | Vdso},
		{Start: 9, End: 10, Prot: 3, Status: Regular | AnonPrivate},
	}
	want := []*VMA{
		vmas[0],
		{Start: 3, End: 7, Prot: 0, Status: Regular, Guards: []image.Range{{Start: 3, End: 4}, {Start: 6, End: 7}}},
		vmas[6],
	}
	if d := cmp.Diff(want, adjacent(vmas)); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if vmas[1].End != 4 || len(vmas[1].Guards) != 1 {
		t.Errorf("the first of several was changed: %+v", vmas[1])
	}
}
