package mem

import (
	"strings"
	"testing"
	"unsafe"

	mmimg "github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
)

// TestRingLen compares sizes of rings with those that the kernel makes.
func TestRingLen(t *testing.T) {
	cpus, err := possibleCPUs()
	if err != nil {
		t.Fatal(err)
	}
	for _, events := range []uint32{1, 8, 62, 63, 64, 65, 126, 127, 500, 3000} {
		var ctx uint64
		if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, uintptr(events), uintptr(unsafe.Pointer(&ctx)), 0); e != 0 {
			t.Fatalf("io_setup(%d): %v", events, e)
		}
		// The context's name is the address of its ring.
		head := *(**[4]uint32)(unsafe.Pointer(&ctx))
		nr := head[ringNr/4]
		if _, _, e := unix.Syscall(unix.SYS_IO_DESTROY, uintptr(ctx), 0, 0); e != 0 {
			t.Fatalf("io_destroy: %v", e)
		}
		size := ringLen(events, cpus)
		if got := ringEvents(size); got != nr {
			t.Errorf("%d events: a ring of %d bytes has %d, the kernel's has %d", events, size, got, nr)
		}
		if again := ringLen(ringRequest(size), cpus); again != size {
			t.Errorf("%d events: a ring of %d bytes is made again with %d bytes", events, size, again)
		}
		if r := ringRequest(size); r > max(events, uint32(cpus)*4) {
			t.Errorf("%d events: %d are asked for, more than there were", events, r)
		}
	}
}

func TestCheckRings(t *testing.T) {
	cpus, err := possibleCPUs()
	if err != nil {
		t.Fatal(err)
	}
	size := ringLen(1, cpus)
	ring := func(n uint64) *VMA { return &VMA{Start: 0x10000, End: 0x10000 + n, Status: Regular | AioRing} }
	entry := func(id, n uint64) *mmimg.AioRingEntry {
		return &mmimg.AioRingEntry{Id: proto.Uint64(id), NrReq: proto.Uint32(1), RingLen: proto.Uint32(uint32(n))}
	}
	plain := &VMA{Start: 0x10000, End: 0x11000, Status: Regular | AnonPrivate}
	for _, c := range []struct {
		name string
		vmas []*VMA
		es   []*mmimg.AioRingEntry
		want string // part of the error
	}{
		{"none", []*VMA{plain}, nil, ""},
		{"one", []*VMA{ring(size)}, []*mmimg.AioRingEntry{entry(0x10000, size)}, ""},
		{"no entry", []*VMA{ring(size)}, nil, "in another place"},
		{"of another size", []*VMA{ring(size)}, []*mmimg.AioRingEntry{entry(0x10000, size+arch.PageSize)}, "in another place"},
		{"not mapped", []*VMA{plain}, []*mmimg.AioRingEntry{entry(0x10000, size)}, "mapped nowhere"},
		{"too large", []*VMA{ring(maxRing + arch.PageSize)}, []*mmimg.AioRingEntry{entry(0x10000, maxRing+arch.PageSize)}, "in another place"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := CheckRings(c.vmas, c.es)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	// What a host of fewer CPUs made may be too small for this one.
	if n := ringLen(1, 64); n == ringLen(1, 1) {
		t.Errorf("a host of 64 CPUs makes rings of %d bytes, like one of one", n)
	}
}
