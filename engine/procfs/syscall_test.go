package procfs

import "testing"

func TestParseSyscall(t *testing.T) {
	for _, c := range []struct {
		text   string
		nr     uint64
		ok     bool
		failed bool
	}{
		{"58 0x0 0x1 0x2 0x3 0x4 0x5 0x7ffd 0x7f00\n", 58, true, false},
		{"running\n", 0, false, false},
		{"-1 0x7ffd 0x7f00\n", 0, false, false},
		{"", 0, false, true},
		{"x 0x0\n", 0, false, true},
	} {
		nr, ok, err := ParseSyscall([]byte(c.text))
		if nr != c.nr || ok != c.ok || (err != nil) != c.failed {
			t.Errorf("%q: %d %v %v", c.text, nr, ok, err)
		}
	}
}

func FuzzSyscall(f *testing.F) {
	f.Add([]byte("58 0x0 0x1 0x2 0x3 0x4 0x5 0x7ffd 0x7f00\n"))
	f.Add([]byte("running\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if nr, ok, err := ParseSyscall(b); err != nil && (ok || nr != 0) {
			t.Errorf("an error with %d, %v", nr, ok)
		}
	})
}
