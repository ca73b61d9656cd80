package procfs

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCPUList(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []uint64
		bad  bool
	}{
		{in: "0\n", want: []uint64{1}},
		{in: "0-3,8\n", want: []uint64{0x10f}},
		{in: "63-64", want: []uint64{1 << 63, 1}},
		{in: "\n"},
		{in: "3-1", bad: true},
		{in: "0-99999999", bad: true},
		{in: "a", bad: true},
		{in: "1,,2", bad: true},
	} {
		got, err := ParseCPUList([]byte(c.in))
		if (err != nil) != c.bad {
			t.Errorf("%q: error %v", c.in, err)
		}
		if d := cmp.Diff(c.want, got); d != "" && !c.bad {
			t.Errorf("%q (-want +got)\n%s", c.in, d)
		}
	}
	mask, err := OnlineCPUs()
	if err != nil || len(mask) == 0 || mask[0] == 0 {
		t.Errorf("CPUs of this host: %x, %v", mask, err)
	}
}

func FuzzParseCPUList(f *testing.F) {
	f.Add([]byte("0-3,8\n"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseCPUList(b) })
}
