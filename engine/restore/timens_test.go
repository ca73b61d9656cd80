package restore

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/timens"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

func TestClocksPlan(t *testing.T) {
	none := procfs.TimeOffsets{}
	ahead := procfs.TimeOffsets{Monotonic: 1000, Boottime: 2000}
	kernel := procfs.TimeOffsets{Monotonic: 50, Boottime: 70}
	for _, c := range []struct {
		name   string
		c      *clocks
		how    Clocks
		own    procfs.TimeOffsets
		want   procfs.TimeOffsets
		needed bool
	}{
		{"no clocks known", nil, ClocksNew, none, none, false},
		{"same host", &clocks{60, 80, none, "here"}, ClocksAuto, none, none, false},
		{"same kernel, both ahead", &clocks{1060, 2080, ahead, "here"}, ClocksAuto, ahead, ahead, false},
		{"same kernel, tree ahead", &clocks{1060, 2080, ahead, "here"}, ClocksAuto, none, ahead, true},
		{"same kernel, agent ahead", &clocks{60, 80, none, "here"}, ClocksAuto, ahead, none, true},
		{"other host, older", &clocks{60, 80, none, "there"}, ClocksAuto, none, procfs.TimeOffsets{Monotonic: 10, Boottime: 10}, true},
		{"other host, younger", &clocks{6, 8, none, "there"}, ClocksAuto, ahead, procfs.TimeOffsets{Monotonic: -44, Boottime: -62}, true},
		{"unknown host", &clocks{60, 80, none, ""}, ClocksAuto, none, procfs.TimeOffsets{Monotonic: 10, Boottime: 10}, true},
		{"asked for", &clocks{40, 80, none, "here"}, ClocksNew, none, procfs.TimeOffsets{Monotonic: -10, Boottime: 10}, true},
		{"forbidden", &clocks{60, 80, ahead, "there"}, ClocksKeep, none, none, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, needed := c.c.plan(c.how, "here", c.own, kernel)
			if got != c.want || needed != c.needed {
				t.Errorf("got %v, %v; want %v, %v", got, needed, c.want, c.needed)
			}
		})
	}
}

func TestReadClocks(t *testing.T) {
	at := func(sec, nsec uint64) *timens.Timespec {
		return &timens.Timespec{TvSec: proto.Uint64(sec), TvNsec: proto.Uint64(nsec)}
	}
	set := image.NewSet()
	if c, err := readClocks(set, 8); c != nil || err != nil {
		t.Errorf("no images give %v, %v", c, err)
	}
	set.Add(image.Entry{File: image.TimensFile(8), Magic: image.MagicTimens, Msg: &timens.TimensEntry{Monotonic: at(3, 5), Boottime: at(4, 6)}})
	if c, err := readClocks(set, 8); err != nil || c.monotonic != 3_000000005 || c.boottime != 4_000000006 {
		t.Errorf("got %v, %v", c, err)
	}
	for _, bad := range []*timens.Timespec{at(1<<63, 0), at(0, 1e9)} {
		set := image.NewSet()
		set.Add(image.Entry{File: image.TimensFile(8), Magic: image.MagicTimens, Msg: &timens.TimensEntry{Monotonic: bad, Boottime: at(0, 0)}})
		if _, err := readClocks(set, 8); err == nil {
			t.Errorf("a clock of %v is taken", bad)
		}
	}
}

func TestSeconds(t *testing.T) {
	for ns, want := range map[int64]string{0: "0 0", 1: "0 1", -1: "-1 999999999", 2e9: "2 0", -2e9: "-2 0", -15e8: "-2 500000000"} {
		if got := seconds(ns); got != want {
			t.Errorf("%d ns are %q, want %q", ns, got, want)
		}
	}
}
