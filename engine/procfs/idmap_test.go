package procfs

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIDMap(t *testing.T) {
	es, err := ParseIDMap([]byte("         0       1000          1\n         1     100000      65536\n"))
	want := []IDExtent{{0, 1000, 1}, {1, 100000, 65536}}
	if err != nil || !slices.Equal(es, want) {
		t.Fatalf("%v, %v, want %v", es, err, want)
	}
	m := &IDMap{UIDs: es, GIDs: es[:1]}
	got := m.Inside(Status{Uid: [4]uint32{1000, 100000, 165535, 165536}, Gid: [4]uint32{1000, 0, 1001, 999}, Groups: []uint32{1000, 27}})
	if diff := cmp.Diff(Status{Uid: [4]uint32{0, 1, 65536, overflow}, Gid: [4]uint32{0, overflow, overflow, overflow}, Groups: []uint32{0, overflow}}, got); diff != "" {
		t.Errorf("inside (-want +got):\n%s", diff)
	}
	var none *IDMap
	if none.UID(7) != 7 || none.GID(8) != 8 || none.Inside(Status{Uid: [4]uint32{7}}).Uid[0] != 7 {
		t.Error("without a map ids change")
	}
	for _, bad := range []string{"0 1\n", "0 1 2 3\n", "0 0 0\n", "4294967295 0 2\n", "0 4294967295 2\n", "x 0 1\n", "0 -1 1\n"} {
		if es, err := ParseIDMap([]byte(bad)); err == nil {
			t.Errorf("%q gives %v", bad, es)
		}
	}
}

func FuzzIDMap(f *testing.F) {
	f.Add([]byte("         0          0 4294967295\n"))
	f.Add([]byte("0 1000 1\n1 100000 65536\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := ParseIDMap(b)
		if err != nil {
			return
		}
		m := &IDMap{UIDs: es}
		for _, e := range es {
			if got := m.UID(e.Outer); got == overflow && e.Inner != overflow && len(es) == 1 {
				t.Errorf("%d of %v is nobody", e.Outer, es)
			}
		}
	})
}
