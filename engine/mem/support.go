package mem

import (
	"maps"
	"slices"

	"godwit/engine/plan"
	"godwit/engine/procfs"
)

// specimens are one mapping of each kind, as /proc/PID/smaps shows it.
var specimens = []struct {
	kind string
	m    procfs.SmapsEntry
}{
	{"private anonymous memory, heap and stacks", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Write: true}}},
	{"private mappings of files, with the pages that were written", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Inode: 9, Path: "/lib/x"}}},
	{"shared mappings of files", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/x"}}},
	{"shared anonymous memory", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/dev/zero", Deleted: true}}},
	{"memfds", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/memfd:x", Deleted: true}}},
	{"[vdso] and [vvar]", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Path: "[vdso]"}}},
	{"System V shared memory", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/SYSV00000000", Deleted: true}}},
	{"private anonymous huge pages (MAP_HUGETLB)", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Write: true, Inode: 9, Path: "/anon_hugepage", Deleted: true}, KernelPageSize: 2 << 20, VmFlags: []string{"ht"}}},
	{"shared anonymous huge pages", procfs.SmapsEntry{Mapping: procfs.Mapping{Shared: true, Inode: 9, Path: "/anon_hugepage", Deleted: true}, KernelPageSize: 2 << 20, VmFlags: []string{"ht"}}},
	{"huge pages of hugetlbfs and memfds (MFD_HUGETLB)", procfs.SmapsEntry{Mapping: procfs.Mapping{Shared: true, Inode: 9, Path: "/dev/hugepages/x"}, KernelPageSize: 2 << 20, VmFlags: []string{"ht"}}},
	{"System V segments of huge pages", procfs.SmapsEntry{Mapping: procfs.Mapping{Shared: true, Inode: 9, Path: "/SYSV00000000", Deleted: true}, KernelPageSize: 2 << 20, VmFlags: []string{"ht"}}},
	{"rings of asynchronous I/O (io_setup), with events that were not read yet", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Write: true, Shared: true, Inode: 9, Path: "/[aio]", Deleted: true}}},
	{"rings of io_uring", procfs.SmapsEntry{Mapping: procfs.Mapping{Shared: true, Inode: 9, Path: "anon_inode:[io_uring]"}}},
	{"rings of packet sockets", procfs.SmapsEntry{Mapping: procfs.Mapping{Shared: true, Inode: 9, Path: "socket:[1]"}}},
	{"locked memory (mlock)", flagged("lo")},
	{"advice such as MADV_DONTFORK and MADV_HUGEPAGE", flagged("dc")},
	{"guard regions (MADV_GUARD_INSTALL)", flagged("gu")},
	{"sealed mappings (mseal)", flagged("sl")},
	{"memory that the kernel may drop (MAP_DROPPABLE)", flagged("dp")},
	{"memory that is locked as it is used, and new mappings locked (mlockall)", flagged("lf")},
	{"names of anonymous memory (PR_SET_VMA_ANON_NAME)", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Path: "[anon:x]"}}},
	{"memory hidden from the kernel (memfd_secret)", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Shared: true, Inode: 9, Path: "/secretmem", Deleted: true}}},
	{"memory with a protection key (pkey_mprotect)", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Write: true}, ProtKey: 1}},
	{"code of probes (uprobes)", procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Path: "[uprobes]"}}},
}

func flagged(flag string) procfs.SmapsEntry {
	return procfs.SmapsEntry{Mapping: procfs.Mapping{Read: true, Write: true}, VmFlags: []string{"rd", "wr", flag}}
}

// Support lists kinds of memory and whether Classify takes them.
func Support() []plan.Support {
	var out, refused []plan.Support
	for _, s := range specimens {
		if _, reason := Classify(&s.m); reason != "" {
			refused = append(refused, plan.Support{Kind: s.kind, Refused: true, Note: "refused as " + reason})
		} else {
			out = append(out, plan.Support{Kind: s.kind})
		}
	}
	seen := map[string]bool{}
	for _, f := range slices.Sorted(maps.Keys(refusedFlags)) {
		m := flagged(f)
		if _, reason := Classify(&m); reason != "" && !seen[reason] {
			seen[reason] = true
			refused = append(refused, plan.Support{Kind: reason, Refused: true})
		}
	}
	out = append(out, plan.Support{Kind: "memory that parent and child share since a fork (copy on write)", Note: "stays shared, unless the tree has files of its own processes in /proc or pidfds open"})
	out = append(out, plan.Support{Kind: "settings of a whole address space: merging (PR_SET_MEMORY_MERGE), no written code (PR_SET_MDWE), no huge pages, membarrier registrations"})
	return append(out, refused...)
}
