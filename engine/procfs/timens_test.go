package procfs

import (
	"os"
	"testing"
)

func TestParseTimeOffsets(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       TimeOffsets
		ok         bool
	}{
		{"none", "monotonic           0         0\nboottime            0         0\n", TimeOffsets{}, true},
		{"ahead and behind", "monotonic  1000  5\nboottime -3 999999999\n", TimeOffsets{1000_000000005, -2_000000001}, true},
		{"one clock", "monotonic 0 0\n", TimeOffsets{}, false},
		{"twice", "monotonic 0 0\nmonotonic 0 0\nboottime 0 0\n", TimeOffsets{}, false},
		{"nanoseconds", "monotonic 0 1000000000\nboottime 0 0\n", TimeOffsets{}, false},
		{"too far", "monotonic 9000000000 0\nboottime 0 0\n", TimeOffsets{}, false},
		{"no number", "monotonic x 0\nboottime 0 0\n", TimeOffsets{}, false},
		{"words", "monotonic 0\nboottime 0 0\n", TimeOffsets{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseTimeOffsets([]byte(c.text))
			if (err == nil) != c.ok || got != c.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if _, err := ReadTimeOffsets(os.Getpid()); err != nil {
		t.Error(err)
	}
}

func FuzzTimeOffsets(f *testing.F) {
	f.Add([]byte("monotonic  1000  5\nboottime -3 999999999\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		const most = (1<<33 + 1) * 1_000_000_000
		if o, err := ParseTimeOffsets(b); err == nil && max(o.Monotonic, -o.Monotonic, o.Boottime, -o.Boottime) > most {
			t.Errorf("%v is out of range", o)
		}
	})
}
