package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
)

func TestOutlineCheck(t *testing.T) {
	proc := func(pid, parent, sid uint32) OutlineProc {
		return OutlineProc{Pid: pid, Parent: parent, Sid: sid, ExitSignal: 17}
	}
	for name, tt := range map[string]struct {
		procs []OutlineProc
		ok    bool
	}{
		"one":                {[]OutlineProc{proc(7, 0, 3)}, true},
		"a family":           {[]OutlineProc{proc(7, 0, 7), proc(9, 7, 7), proc(8, 9, 8), proc(12, 8, 8)}, true},
		"none":               {nil, false},
		"pid 0":              {[]OutlineProc{proc(0, 0, 0)}, false},
		"init":               {[]OutlineProc{proc(1, 0, 1)}, false},
		"a pid too large":    {[]OutlineProc{proc(5<<20, 0, 1)}, false},
		"no root":            {[]OutlineProc{proc(7, 3, 7)}, false},
		"two roots":          {[]OutlineProc{proc(7, 0, 7), proc(8, 0, 7)}, false},
		"a child first":      {[]OutlineProc{proc(7, 0, 7), proc(9, 8, 7), proc(8, 7, 7)}, false},
		"twice":              {[]OutlineProc{proc(7, 0, 7), proc(7, 7, 7)}, false},
		"another session":    {[]OutlineProc{proc(7, 0, 7), proc(9, 7, 5)}, false},
		"no signal":          {[]OutlineProc{{Pid: 7, Sid: 7, ExitSignal: 65}}, false},
		"processes too many": {make([]OutlineProc, maxOutline+1), false},
	} {
		if err := (&Outline{Procs: tt.procs}).Check(); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRegions(t *testing.T) {
	want := []Region{
		{Range{0x1000, 0x3000}, 3, 0x22, 0},
		{Range{0x7fff_ffff_0000, 1 << 47}, 1, 0x122, 1 << 14},
	}
	var b []byte
	for _, r := range want {
		b = AppendRegion(b, r)
	}
	got, err := ParseRegions(b)
	if err != nil || len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

// FuzzEarly: what is read is sound, and written as it came.
func FuzzEarly(f *testing.F) {
	f.Add(AppendRegion(nil, Region{Range{0x1000, 0x3000}, 3, 0x22, 0}))
	f.Add(AppendRange(AppendRange(nil, Range{0x1000, 0x3000}), Range{0, 0x1000}))
	f.Add([]byte(`{"boot_id":"x","procs":[{"pid":7,"sid":7,"exit_signal":0},{"pid":8,"parent":7,"sid":7,"exit_signal":17}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		sound := func(r Range) {
			if r.Start >= r.End || r.Start%4096 != 0 || r.End%4096 != 0 || r.End > 1<<47 {
				t.Fatalf("range %x-%x", r.Start, r.End)
			}
		}
		rs, err := ParseRanges(b)
		if err != nil && !errors.Is(err, ErrMalformed) {
			t.Fatal(err)
		}
		var again []byte
		for _, r := range rs {
			sound(r)
			again = AppendRange(again, r)
		}
		if err == nil && !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
		regions, err := ParseRegions(b)
		if err != nil && !errors.Is(err, ErrMalformed) {
			t.Fatal(err)
		}
		again = nil
		for _, r := range regions {
			sound(r.Range)
			again = AppendRegion(again, r)
		}
		if err == nil && !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
		var o Outline
		if json.Unmarshal(b, &o) != nil || o.Check() != nil {
			return
		}
		for i, p := range o.Procs {
			if (p.Parent == 0) != (i == 0) {
				t.Fatalf("process %d has parent %d", i, p.Parent)
			}
		}
	})
}
