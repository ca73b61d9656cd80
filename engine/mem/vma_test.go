package mem

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
)

func TestClassify(t *testing.T) {
	const private, shared = unix.MAP_PRIVATE, unix.MAP_SHARED
	for _, c := range []struct {
		name    string
		m       procfs.Mapping
		flags   []string
		size    uint64 // of a page
		key     uint32 // for protection
		want    *VMA
		refused bool
	}{
		{name: "heap", m: procfs.Mapping{Read: true, Write: true, Path: "[heap]"}, flags: []string{"rd", "wr", "ac"},
			want: &VMA{Accounted: true, Prot: 3, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate | Heap}},
		{name: "stack", m: procfs.Mapping{Read: true, Write: true, Path: "[stack]"}, flags: []string{"gd"},
			want: &VMA{Prot: 3, Flags: private | unix.MAP_ANONYMOUS | unix.MAP_GROWSDOWN, Status: Regular | AnonPrivate | Stack}},
		{name: "named anonymous", m: procfs.Mapping{Path: "[anon:Go: heap]"}, flags: []string{"nr", "hg"},
			want: &VMA{Flags: private | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE, Status: Regular | AnonPrivate, Madvise: 1 << unix.MADV_HUGEPAGE, Name: "Go: heap"}},
		{name: "shared anonymous", m: procfs.Mapping{Read: true, Write: true, Shared: true, Inode: 7, Path: "/dev/zero", Deleted: true}, flags: []string{"mw"},
			want: &VMA{Prot: 3, Flags: shared | unix.MAP_ANONYMOUS, Status: Regular | AnonShared, OpenFlags: unix.O_RDWR}},
		{name: "library", m: procfs.Mapping{Read: true, Exec: true, Inode: 8, Offset: 0x1000, Path: "/lib/x.so"}, flags: []string{"mw"},
			want: &VMA{Prot: 5, Flags: private, Status: Regular | FilePrivate, Offset: 0x1000}},
		{name: "read-only shared file", m: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/data"}, flags: []string{"sh"},
			want: &VMA{Prot: 1, Flags: shared, Status: Regular | FileShared}},
		{name: "memfd", m: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/memfd:x", Deleted: true}, flags: []string{"mw"},
			want: &VMA{Prot: 1, Flags: shared, Status: Regular | FileShared | Memfd, OpenFlags: unix.O_RDWR}},
		{name: "vdso", m: procfs.Mapping{Read: true, Exec: true, Path: "[vdso]"},
			want: &VMA{Prot: 5, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate | Vdso}},
		{name: "vvar is no device memory", m: procfs.Mapping{Read: true, Path: "[vvar]"}, flags: []string{"io", "pf"},
			want: &VMA{Prot: 1, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate | Vvar}},
		{name: "vsyscall", m: procfs.Mapping{Exec: true, Path: "[vsyscall]"}},
		{name: "device", m: procfs.Mapping{Shared: true, Inode: 3, Path: "/dev/dri/card0"}, flags: []string{"io", "pf"}, refused: true},
		{name: "huge pages", m: procfs.Mapping{Path: "/anon_hugepage", Deleted: true, Inode: 4}, flags: []string{"ht"}, size: 2 << 20,
			want: &VMA{Flags: private | unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | 21<<unix.MAP_HUGE_SHIFT, Status: Regular | AnonPrivate}},
		{name: "shared huge pages", m: procfs.Mapping{Shared: true, Path: "/anon_hugepage", Deleted: true, Inode: 4}, flags: []string{"ht", "mw"}, size: 2 << 20,
			want: &VMA{Flags: shared | unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | 21<<unix.MAP_HUGE_SHIFT, Status: Regular | AnonShared, OpenFlags: unix.O_RDWR}},
		{name: "file of huge pages", m: procfs.Mapping{Path: "/huge/x", Inode: 4}, flags: []string{"ht"}, size: 2 << 20,
			want: &VMA{Flags: private, Status: Regular | FilePrivate}},
		{name: "System V of huge pages", m: procfs.Mapping{Shared: true, Path: "/SYSV00000000", Deleted: true, Inode: 4}, flags: []string{"ht"}, size: 2 << 20,
			want: &VMA{Flags: shared | unix.MAP_ANONYMOUS, Status: Regular | AnonShared | Sysvipc}},
		{name: "System V", m: procfs.Mapping{Shared: true, Path: "/SYSV00000000", Deleted: true, Inode: 4}, flags: []string{"mw"},
			want: &VMA{Flags: shared | unix.MAP_ANONYMOUS, Status: Regular | AnonShared | Sysvipc, OpenFlags: unix.O_RDWR}},
		{name: "System V, number 0", m: procfs.Mapping{Shared: true, Path: "/SYSV00000000", Deleted: true},
			want: &VMA{Flags: shared | unix.MAP_ANONYMOUS, Status: Regular | AnonShared | Sysvipc}},
		{name: "userfaultfd", m: procfs.Mapping{Read: true}, flags: []string{"um"}, refused: true},
		{name: "AIO ring", m: procfs.Mapping{Read: true, Write: true, Shared: true, Path: "/[aio]", Deleted: true, Inode: 4}, flags: []string{"mw"},
			want: &VMA{Prot: 3, Flags: shared, Status: Regular | AioRing, OpenFlags: unix.O_RDWR}},
		{name: "part of an AIO ring", m: procfs.Mapping{Read: true, Write: true, Shared: true, Offset: 0x1000, Path: "/[aio]", Deleted: true, Inode: 4}, refused: true},
		{name: "AIO ring that cannot be written", m: procfs.Mapping{Read: true, Shared: true, Path: "/[aio]", Deleted: true, Inode: 4}, refused: true},
		{name: "shadow stack", m: procfs.Mapping{Read: true}, flags: []string{"rd", "ss"}, refused: true},
		{name: "protection key", m: procfs.Mapping{Read: true, Write: true}, key: 3, refused: true},
		{name: "protection key of a file", m: procfs.Mapping{Read: true, Exec: true, Inode: 8, Path: "/lib/x.so"}, key: 1, refused: true},
		{name: "only to be executed", m: procfs.Mapping{Exec: true}, key: 1,
			want: &VMA{Prot: 4, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate}},
		{name: "perf ring", m: procfs.Mapping{Shared: true, Path: "anon_inode:[perf_event]", Inode: 4}, refused: true},
		{name: "socket ring", m: procfs.Mapping{Shared: true, Path: "socket:[12]", Inode: 12}, refused: true},
		{name: "guard regions", m: procfs.Mapping{Read: true}, flags: []string{"gu"},
			want: &VMA{Prot: 1, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate, Guarded: true}},
		{name: "sealed", m: procfs.Mapping{Read: true}, flags: []string{"sl"},
			want: &VMA{Prot: 1, Flags: private | unix.MAP_ANONYMOUS, Status: Regular | AnonPrivate, Sealed: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why := Classify(&procfs.SmapsEntry{Mapping: c.m, VmFlags: c.flags, KernelPageSize: c.size, ProtKey: c.key})
			if (why != "") != c.refused {
				t.Fatalf("refused with %q, want refusal %v", why, c.refused)
			}
			if c.refused {
				return
			}
			if got != nil {
				got.Path, got.Ino, got.Dev = "", 0, 0
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func FuzzFromImage(f *testing.F) {
	good, err := proto.Marshal((&VMA{Start: 0x1000, End: 0x3000, Prot: 3, Flags: unix.MAP_PRIVATE, Status: Regular | AnonPrivate}).ToImage())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, good)
	f.Add(good, []byte{})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var es []*vma.VmaEntry
		for _, raw := range [][]byte{a, b} {
			e := &vma.VmaEntry{}
			if proto.Unmarshal(raw, e) == nil {
				es = append(es, e)
			}
		}
		vs, err := FromImage(es)
		if err != nil {
			return
		}
		var last uint64
		for _, v := range vs {
			if v.Start < last || v.Start >= v.End || v.Start%4096 != 0 || v.End%4096 != 0 {
				t.Fatalf("accepted %+v", v)
			}
			last = v.End
		}
	})
}
