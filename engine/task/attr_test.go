package task

import (
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

func TestDescriptor(t *testing.T) {
	for _, c := range []struct {
		name string
		raw  uint64
		want []uint32 // struct user_desc
	}{
		// Present, DPL 3, data, writable, accessed, 32 bits, useable.
		{"data", 0x1255f335_67894321, []uint32{3, 0x12356789, 0x54321, 0x41}},
		// Code, execute only, limit in pages.
		{"code", 0x00c0f900_0000ffff, []uint32{3, 0, 0xffff, 0x1d}},
		{"not present", 0x0000_7300_0000_0000, []uint32{3, 0, 0, 0x20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := descriptor(3, c.raw)
			var got []uint32
			for ; len(b) > 0; b = b[4:] {
				got = append(got, binary.LittleEndian.Uint32(b))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got %#x, want %#x", got, c.want)
			}
		})
	}
}

func TestCheckFacts(t *testing.T) {
	for _, c := range []struct {
		name string
		f    *image.TaskFacts
		want string // part of the error, empty for none
	}{
		{"none", nil, ""},
		{"ordinary", &image.TaskFacts{LDT: make([]byte, 16), Speculation: make([]uint32, 3), ExitSignal: proto.Uint32(64), XPermission: xTileData}, ""},
		{"exit signal", &image.TaskFacts{ExitSignal: proto.Uint32(65)}, "signal 65"},
		{"half a descriptor", &image.TaskFacts{LDT: make([]byte, 12)}, "12 bytes"},
		{"long table", &image.TaskFacts{LDT: make([]byte, 8*8193)}, "65544 bytes"},
		{"speculation", &image.TaskFacts{Speculation: make([]uint32, 4)}, "4 features"},
		{"nodes", &image.TaskFacts{NUMA: &image.NUMAFacts{Nodes: make([]uint64, 17)}}, "17 words"},
		{"extended state", &image.TaskFacts{XPermission: 1 << 19}, "unknown features"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := CheckFacts(c.f)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestSchedFacts(t *testing.T) {
	own, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		a    unix.SchedAttr
		want *image.SchedFacts
	}{
		{"the host's slice", unix.SchedAttr{Runtime: own.Runtime}, nil},
		{"a slice", unix.SchedAttr{Runtime: own.Runtime + 1}, &image.SchedFacts{Runtime: own.Runtime + 1}},
		{"idle", unix.SchedAttr{Policy: 5, Runtime: own.Runtime + 1}, nil},
		{"deadline", unix.SchedAttr{Policy: 6, Runtime: 1, Deadline: 2, Period: 3}, &image.SchedFacts{Runtime: 1, Deadline: 2, Period: 3}},
		{"reset on fork", unix.SchedAttr{Policy: 1, Priority: 5, Flags: 1}, &image.SchedFacts{Flags: 1}},
		{"clamps of the host", unix.SchedAttr{Runtime: own.Runtime, Util_max: 1024}, nil},
		{"clamps", unix.SchedAttr{Runtime: own.Runtime, Util_min: 5, Util_max: 500}, &image.SchedFacts{UtilMin: 5, UtilMax: 500}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := schedFacts(&c.a)
			if err != nil || (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
			// What is read comes back the same.
			core := &criu_core.ThreadCoreEntry{SchedPolicy: &c.a.Policy, SchedPrio: &c.a.Priority}
			back := schedAttr(core, &image.TaskFacts{Sched: got})
			if got != nil && (back.Deadline != c.a.Deadline || back.Period != c.a.Period || back.Util_min != c.a.Util_min || back.Flags&1 != c.a.Flags) {
				t.Errorf("it comes back as %+v", back)
			}
		})
	}
}

func TestAutogroup(t *testing.T) {
	nice, err := autogroup(os.Getpid())
	if err != nil || nice < -20 || nice > 19 {
		t.Errorf("niceness %d of this session, %v", nice, err)
	}
	if own, err := niceness(0); err != nil || own < -20 || own > 19 {
		t.Errorf("niceness %d of this thread, %v", own, err)
	}
}
