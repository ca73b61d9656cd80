package mem

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/procfs"
)

func TestApplyFacts(t *testing.T) {
	const p = arch.PageSize
	for _, c := range []struct {
		name string
		f    image.MemoryFacts
		want string // part of the error, empty for none
	}{
		{"nothing", image.MemoryFacts{}, ""},
		{"guards in two mappings", image.MemoryFacts{Guards: []image.Range{{Start: p, End: 2 * p}, {Start: 3 * p, End: 4 * p}, {Start: 8 * p, End: 9 * p}}}, ""},
		{"odd address", image.MemoryFacts{Guards: []image.Range{{Start: p + 1, End: 2 * p}}}, "whole pages"},
		{"empty", image.MemoryFacts{Guards: []image.Range{{Start: p, End: p}}}, "whole pages"},
		{"out of order", image.MemoryFacts{Guards: []image.Range{{Start: 3 * p, End: 4 * p}, {Start: p, End: 2 * p}}}, "overlaps"},
		{"over the edge", image.MemoryFacts{Guards: []image.Range{{Start: 3 * p, End: 5 * p}}}, "not inside"},
		{"in [vdso]", image.MemoryFacts{Guards: []image.Range{{Start: 20 * p, End: 21 * p}}}, "not inside"},
		{"behind everything", image.MemoryFacts{Guards: []image.Range{{Start: 30 * p, End: 31 * p}}}, "not inside"},
		{"sealed", image.MemoryFacts{Sealed: []image.Range{{Start: p, End: 4 * p}, {Start: 8 * p, End: 9 * p}}}, ""},
		{"partly sealed", image.MemoryFacts{Sealed: []image.Range{{Start: p, End: 2 * p}}}, "is no mapping"},
		{"locked on use", image.MemoryFacts{OnFault: []image.Range{{Start: p, End: 4 * p}}}, ""},
		{"locked on use in part", image.MemoryFacts{OnFault: []image.Range{{Start: p, End: 3 * p}}}, "is no mapping"},
		{"named twice", image.MemoryFacts{Names: []image.NamedRange{{Range: image.Range{Start: p, End: 4 * p}, Name: "a"}, {Range: image.Range{Start: p, End: 4 * p}, Name: "b"}}}, "is no mapping"},
		{"named", image.MemoryFacts{Names: []image.NamedRange{{Range: image.Range{Start: p, End: 4 * p}, Name: "glibc: malloc"}}}, ""},
		{"name of no kernel", image.MemoryFacts{Names: []image.NamedRange{{Range: image.Range{Start: p, End: 4 * p}, Name: "a]"}}}, "no name"},
		{"long name", image.MemoryFacts{Names: []image.NamedRange{{Range: image.Range{Start: p, End: 4 * p}, Name: strings.Repeat("x", 80)}}}, "no name"},
		{"new mappings locked", image.MemoryFacts{LockFuture: 6}, ""},
		{"everything locked", image.MemoryFacts{LockFuture: 3}, "unknown flags"},
		{"locked on use without more", image.MemoryFacts{LockFuture: 4}, "unknown flags"},
		{"huge pages", image.MemoryFacts{THPDisable: 3}, ""},
		{"huge pages of the future", image.MemoryFacts{THPDisable: 7}, "unknown flags"},
		{"denied code", image.MemoryFacts{MDWE: 3}, ""},
		{"denied code of the future", image.MemoryFacts{MDWE: 4}, "unknown flags"},
		{"merged", image.MemoryFacts{Merge: true}, ""},
		{"[vdso] sealed", image.MemoryFacts{Sealed: []image.Range{{Start: 20 * p, End: 22 * p}}}, "is no mapping"},
	} {
		t.Run(c.name, func(t *testing.T) {
			vmas := []*VMA{
				{Start: p, End: 4 * p, Status: Regular | AnonPrivate},
				{Start: 8 * p, End: 9 * p, Status: Regular | FilePrivate},
				{Start: 20 * p, End: 22 * p, Status: Regular | Vdso | AnonPrivate},
			}
			err := ApplyFacts(vmas, &c.f)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("got %v, want an error with %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := image.MemoryFacts{LockFuture: c.f.LockFuture, THPDisable: c.f.THPDisable, MDWE: c.f.MDWE, Merge: c.f.Merge}
			AddFacts(&got, vmas)
			if d := cmp.Diff(c.f, got); d != "" || HasFacts(&got) != (c.name != "nothing") {
				t.Errorf("does not come back (-want +got)\n%s", d)
			}
		})
	}
}

// What smaps shows comes back as the flags of the calls that make it.
func TestClassifyState(t *testing.T) {
	rw := func(path string, shared bool, flags ...string) *procfs.SmapsEntry {
		e := &procfs.SmapsEntry{Mapping: procfs.Mapping{Start: 0x1000, End: 0x2000, Read: true, Write: true, Shared: shared, Path: path}, VmFlags: flags}
		if shared {
			e.Inode = 5
		}
		return e
	}
	for _, c := range []struct {
		name   string
		m      *procfs.SmapsEntry
		flags  int
		advice uint64
		named  string
		fault  bool
		refuse string
	}{
		{"droppable", rw("", false, "nr", "wf", "dd", "dp"), Droppable | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE, 0, "", false, ""},
		{"advised", rw("", false, "wf", "dd"), unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, 1<<unix.MADV_WIPEONFORK | 1<<unix.MADV_DONTDUMP, "", false, ""},
		{"locked on use", rw("", false, "lo", "lf"), unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_LOCKED, 0, "", true, ""},
		{"named", rw("[anon:a [b]", false), unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, 0, "a [b", false, ""},
		{"shared and named", rw("[anon_shmem:x]", true), unix.MAP_SHARED | unix.MAP_ANONYMOUS, 0, "x", false, ""},
		{"probed", rw("[uprobes]", false), 0, 0, "", false, "uprobes"},
		{"secret", rw("/secretmem", true, "lo", "dd"), 0, 0, "", false, "memfd_secret"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, why := Classify(c.m)
			if c.refuse != "" {
				if !strings.Contains(why, c.refuse) {
					t.Fatalf("refused as %q", why)
				}
				return
			}
			if why != "" || v.Flags != c.flags || v.Madvise != c.advice || v.Name != c.named || v.OnFault != c.fault {
				t.Errorf("got %+v, refused as %q", v, why)
			}
		})
	}
}
