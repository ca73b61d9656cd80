package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// check compares a parser's result or its error, "" being none.
func check[T any](t *testing.T, got T, err error, want T, wantErr string) {
	t.Helper()
	switch {
	case wantErr != "":
		if err == nil || !strings.Contains(err.Error(), wantErr) {
			t.Errorf("error %v, want %q", err, wantErr)
		}
	case err != nil:
		t.Error(err)
	default:
		if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

const (
	catStat = "7708 (cat) R 7706 7706 4039 34817 7706 4194304 101 2 3 4 5 6 -7 -8 20 -5 1 0 141589 3133440 388 18446744073709551615 " +
		"94770145902592 94770145922473 140732309457408 0 0 256 65536 4096 16384 0 0 0 17 1 9 2 0 11 -12 94770145938480 94770145940096 " +
		"94771187077120 140732309461502 140732309461522 140732309461530 140732309463019 256\n"
	kthreadStat = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 19 0 0 18446744073709551615 0 0 0 0 0 0 0 2147483647 0 1 0 0 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
)

func TestParseStat(t *testing.T) {
	cat := Stat{
		Pid: 7708, Comm: "cat", State: 'R', PPid: 7706, Pgrp: 7706, Session: 4039, TTYNr: 34817, TTYPgrp: 7706, Flags: 4194304,
		MinFlt: 101, CMinFlt: 2, MajFlt: 3, CMajFlt: 4, UTime: 5, STime: 6, CUTime: -7, CSTime: -8, Priority: 20, Nice: -5, NumThreads: 1,
		StartTime: 141589, VSize: 3133440, RSS: 388, RSSLim: math.MaxUint64, StartCode: 94770145902592, EndCode: 94770145922473,
		StartStack: 140732309457408, Signal: 256, Blocked: 65536, SigIgnore: 4096, SigCatch: 16384, ExitSignal: 17, Processor: 1,
		RTPriority: 9, Policy: 2, GuestTime: 11, CGuestTime: -12, StartData: 94770145938480, EndData: 94770145940096, StartBrk: 94771187077120,
		ArgStart: 140732309461502, ArgEnd: 140732309461522, EnvStart: 140732309461530, EnvEnd: 140732309463019, ExitCode: 256,
	}
	odd := cat
	odd.Comm = "a) S (b\nc 7"
	for _, tc := range []struct {
		name, in string
		want     Stat
		err      string
	}{
		{"ordinary", catStat, cat, ""},
		{"name with parentheses, spaces and a newline", strings.Replace(catStat, "cat", odd.Comm, 1), odd, ""},
		{"kernel thread", kthreadStat, Stat{Pid: 2, Comm: "kthreadd", State: 'S', TTYPgrp: -1, Flags: 2129984, Priority: 20, NumThreads: 1,
			StartTime: 19, RSSLim: math.MaxUint64, SigIgnore: 2147483647, Wchan: 1, Processor: 1}, ""},
		{"a later kernel's field", strings.TrimSuffix(catStat, "\n") + " 77\n", cat, ""},
		{"empty", "", Stat{}, "no command name"},
		{"cut off", catStat[:60], Stat{}, "field"},
		{"no state", "1 (a)", Stat{}, "state"},
		{"wrong way round", ")1(", Stat{}, "no command name"},
		{"no pid", "x (a) R 1", Stat{}, "pid"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseStat([]byte(tc.in))
			check(t, got, err, tc.want, tc.err)
		})
	}
}

const shellStatus = "Name:\ta\\nb\\\\c\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7709\nNgid:\t0\nPid:\t7710\nPPid:\t7706\nTracerPid:\t5\n" +
	"Uid:\t1000\t1001\t1002\t1003\nGid:\t10\t11\t12\t4294967294\nFDSize:\t256\nGroups:\t4 24 4294967294 \nNStgid:\t7709\t1\nNSpid:\t7710\t2\nNSpgid:\t7706\t0\nNSsid:\t4039\t0\n" +
	"Kthread:\t0\nVmPeak:\t    3060 kB\nVmSize:\t    3059 kB\nVmLck:\t       1 kB\nVmPin:\t       2 kB\nVmHWM:\t    1637 kB\nVmRSS:\t    1636 kB\n" +
	"RssAnon:\t     112 kB\nRssFile:\t    1524 kB\nRssShmem:\t       3 kB\nVmData:\t     360 kB\nVmStk:\t     132 kB\nVmExe:\t      20 kB\nVmLib:\t    1528 kB\n" +
	"VmPTE:\t      48 kB\nVmSwap:\t       4 kB\nHugetlbPages:\t    2048 kB\nCoreDumping:\t1\nTHP_enabled:\t1\nuntag_mask:\t0xffffffffffffffff\nThreads:\t2\n" +
	"SigQ:\t3/96364\nSigPnd:\t0000000000000200\nShdPnd:\t0000000000000400\nSigBlk:\t0000000000010000\nSigIgn:\t0000000000001000\nSigCgt:\t8000000000004000\n" +
	"CapInh:\t0000000000000001\nCapPrm:\t000001fffeffffff\nCapEff:\t0000000000000002\nCapBnd:\t0000000000000003\nCapAmb:\t0000000000000004\n" +
	"NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\nSpeculation_Store_Bypass:\tvulnerable\nSpeculationIndirectBranch:\talways enabled\n" +
	"x86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\tshstk \nCpus_allowed:\t3\nCpus_allowed_list:\t0-1\nMems_allowed:\t1\nMems_allowed_list:\t0\n" +
	"voluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t1\n"

func TestParseStatus(t *testing.T) {
	const k = 1024
	full := Status{
		Name: "a\nb\\c", Umask: 0o22, HasUmask: true, State: 'S', Tgid: 7709, Pid: 7710, PPid: 7706, TracerPid: 5,
		Uid: [4]uint32{1000, 1001, 1002, 1003}, Gid: [4]uint32{10, 11, 12, 4294967294}, FDSize: 256, Groups: []uint32{4, 24, 4294967294},
		NStgid: []int{7709, 1}, NSpid: []int{7710, 2}, NSpgid: []int{7706, 0}, NSsid: []int{4039, 0},
		HasMM: true, VmPeak: 3060 * k, VmSize: 3059 * k, VmLck: k, VmPin: 2 * k, VmHWM: 1637 * k, VmRSS: 1636 * k,
		RssAnon: 112 * k, RssFile: 1524 * k, RssShmem: 3 * k, VmData: 360 * k, VmStk: 132 * k, VmExe: 20 * k, VmLib: 1528 * k,
		VmPTE: 48 * k, VmSwap: 4 * k, HugetlbPages: 2048 * k, CoreDumping: true, THPEnabled: true, Threads: 2, SigQueued: 3, SigQueueMax: 96364,
		SigPnd: 0x200, ShdPnd: 0x400, SigBlk: 0x10000, SigIgn: 0x1000, SigCgt: 0x8000000000004000,
		CapInh: 1, CapPrm: 0x1fffeffffff, CapEff: 2, CapBnd: 3, CapAmb: 4, NoNewPrivs: true, Seccomp: 2, SeccompFilters: 3,
		SpeculationStoreBypass: "vulnerable", SpeculationIndirect: "always enabled", ThreadFeatures: []string{"shstk", "wrss"},
		CpusAllowedList: "0-1", MemsAllowedList: "0", VoluntarySwitches: 150, NonvoluntarySwitches: 1,
	}
	const least = "Name:\t x \nState:\tZ (zombie)\nTgid:\t1\nPid:\t1\nPPid:\t0\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n"
	for _, tc := range []struct {
		name, in string
		want     Status
		err      string
	}{
		{"full", shellStatus, full, ""},
		{"zombie", least + "Groups:\t \n", Status{Name: " x ", State: 'Z', Tgid: 1, Pid: 1}, ""},
		{"empty", "", Status{}, "no Name line"},
		{"no colon", "Name\n", Status{}, "no colon"},
		{"three ids", strings.Replace(least, "0\t0\t0\t0", "0\t0\t0", 1), Status{}, "Uid: 3 numbers"},
		{"no number", least + "SigBlk:\txyz\n", Status{}, `SigBlk: "xyz"`},
		{"other unit", least + "VmRSS:\t4 MB\n", Status{}, "not in kB"},
		{"too large", least + "VmRSS:\t99999999999999999999 kB\n", Status{}, "VmRSS"},
		{"no slash", least + "SigQ:\t3\n", Status{}, "no slash"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseStatus([]byte(tc.in))
			check(t, got, err, tc.want, tc.err)
		})
	}
	if got := full.NSPid(); got != 2 {
		t.Errorf("NSPid %d, want 2", got)
	}
}

func TestParseMapping(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Mapping
		err  string
	}{
		{"55d289ea1000-55d289ea3000 r-xp 00002000 fe:1f 247026                     /usr/bin/cat",
			Mapping{Start: 0x55d289ea1000, End: 0x55d289ea3000, Read: true, Exec: true, Offset: 0x2000, Major: 0xfe, Minor: 0x1f, Inode: 247026, Path: "/usr/bin/cat"}, ""},
		{"7f0-800 rw-p 00000000 00:00 0 ", Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true}, ""},
		{"7f0-800 ---p 00000000 00:00 0", Mapping{Start: 0x7f0, End: 0x800}, ""},
		{"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
			Mapping{Start: 0xffffffffff600000, End: 0xffffffffff601000, Exec: true, Path: "[vsyscall]"}, ""},
		{"7f0-800 rw-s 00000000 00:01 1025                       /dev/zero (deleted)",
			Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true, Shared: true, Minor: 1, Inode: 1025, Path: "/dev/zero", Deleted: true}, ""},
		{"7f0-800 rw-s 00000000 00:01 0                          /SYSV00000000 (deleted)",
			Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true, Shared: true, Minor: 1, Path: "/SYSV00000000", Deleted: true}, ""},
		{"7f0-800 rw-s 00000000 00:01 1025                       /memfd:a b\\012 \tc\r (deleted)",
			Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true, Shared: true, Minor: 1, Inode: 1025, Path: "/memfd:a b\n \tc\r", Deleted: true}, ""},
		{"7f0-800 rw-p 00000000 00:00 0                          [anon:x (deleted)", Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true, Path: "[anon:x (deleted)"}, ""},
		{"7f0-800 rw-p 00000000 00:00 0                          /a\\040b\\ ", Mapping{Start: 0x7f0, End: 0x800, Read: true, Write: true, Path: "/a\\040b\\ "}, ""},
		{"", Mapping{}, "no address range"},
		{"7f0 rw-p 0 0:0 0", Mapping{}, "no address range"},
		{"800-7f0 rw-p 0 0:0 0", Mapping{}, "empty address range"},
		{"7f0-800 rwp 0 0:0 0", Mapping{}, "no permissions"},
		{"7f0-800 rw-x 0 0:0 0", Mapping{}, "no permissions"},
		{"7f0-800 rw-p 0 00 0", Mapping{}, "no device"},
		{"7f0-800 rw-p 0 0:0", Mapping{}, "inode"},
		{"7f0-10000000000000000 rw-p 0 0:0 0", Mapping{}, "address range"},
	} {
		t.Run(tc.in, func(t *testing.T) {
			got, err := ParseMapping(tc.in)
			check(t, got, err, tc.want, tc.err)
		})
	}
}

func TestParseSmaps(t *testing.T) {
	const in = `55d289ea1000-55d289ea3000 rw-p 00000000 fe:00 247026                     /usr/bin/cat
Size:                  8 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                   7 kB
Private_Dirty:         1 kB
Anonymous:             2 kB
AnonHugePages:         6 kB
Swap:                  3 kB
Locked:                5 kB
THPeligible:           1
ProtectionKey:         2
VmFlags: rd wr mr mw me ac sd 
7ffc048d4000-7ffc048f5000 rw-p 00000000 00:00 0                          [stack]
KernelPageSize:     2048 kB
VmFlags: rd wr gd
`
	want := []SmapsEntry{
		{
			Mapping:        Mapping{Start: 0x55d289ea1000, End: 0x55d289ea3000, Read: true, Write: true, Major: 0xfe, Inode: 247026, Path: "/usr/bin/cat"},
			KernelPageSize: 4096, Rss: 7168, PrivateDirty: 1024, Anonymous: 2048, AnonHugePages: 6144, Swap: 3072, Locked: 5120,
			THPEligible: true, ProtKey: 2, VmFlags: []string{"rd", "wr", "mr", "mw", "me", "ac", "sd"},
		},
		{
			Mapping:        Mapping{Start: 0x7ffc048d4000, End: 0x7ffc048f5000, Read: true, Write: true, Path: "[stack]"},
			KernelPageSize: 2 << 20, VmFlags: []string{"rd", "wr", "gd"},
		},
	}
	for _, tc := range []struct {
		name, in string
		want     []SmapsEntry
		err      string
	}{
		{"two mappings", in, want, ""},
		{"zombie", "", nil, ""},
		{"amount first", "Rss: 1 kB\n", nil, "line 1: amount before the first mapping"},
		{"no colon", "1-2 rw-p 0 0:0 0\nRss\n", nil, "line 2"},
		{"no amount", "1-2 rw-p 0 0:0 0\nRss:  kB\n", nil, "no amount in kB"},
		{"too large", "1-2 rw-p 0 0:0 0\nRss: 99999999999999999 kB\n", nil, "too large"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseSmaps(strings.NewReader(tc.in))
			check(t, got, err, tc.want, tc.err)
		})
	}
	if !want[1].Has("gd") || want[1].Has("gu") {
		t.Error("Has is wrong")
	}
}

func TestLongLines(t *testing.T) {
	path := "/" + strings.Repeat("d\\012", 40000)
	got, err := ParseMaps(strings.NewReader("1-2 rw-p 0 0:0 5 " + path + "\n3-4 rw-p 0 0:0 0\n"))
	if err != nil || len(got) != 2 || got[0].Path != "/"+strings.Repeat("d\n", 40000) {
		t.Errorf("%d mappings, %v", len(got), err)
	}
	if _, err := ParseMaps(strings.NewReader("1-2 rw-p 0 0:0 5 /" + strings.Repeat("x", 3<<20))); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("endless line: %v", err)
	}
}

const common = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t18\n"

func TestParseFdinfo(t *testing.T) {
	base := func(f func(*Fdinfo)) Fdinfo {
		i := Fdinfo{Flags: 0o2000002, MntID: 17, Ino: 18}
		if f != nil {
			f(&i)
		}
		return i
	}
	for _, tc := range []struct {
		name, in string
		want     Fdinfo
		err      string
	}{
		{"epoll", common + "tfd:        4 events:       1d data:                4  pos:0 ino:3c78 sdev:f\ntfd:        5 events: 8000201d data: ffffffffffffffff  pos:-1 ino:3 sdev:fe00000\n",
			base(func(f *Fdinfo) {
				f.Epoll = []EpollTarget{{FD: 4, Events: 0x1d, Data: 4, Ino: 0x3c78, Sdev: 15},
					{FD: 5, Events: 0x8000201d, Data: math.MaxUint64, Pos: -1, Ino: 3, Sdev: 0xfe00000}}
			}), ""},
		{"eventfd", common + "eventfd-count:               1f\neventfd-id: 7\neventfd-semaphore: 1\n",
			base(func(f *Fdinfo) { f.Eventfd = &EventfdInfo{Count: 0x1f, ID: 7, Semaphore: true} }), ""},
		{"timerfd", common + "clockid: 1\nticks: 4\nsettime flags: 03\nit_value: (99, 999931293)\nit_interval: (5, 7)\n",
			base(func(f *Fdinfo) {
				f.Timerfd = &TimerfdInfo{ClockID: 1, Ticks: 4, Settime: 3, Value: 99999931293, Interval: 5000000007}
			}), ""},
		{"signalfd", common + "sigmask:\t0000000000000201\n", base(func(f *Fdinfo) { f.HasSigmask, f.Sigmask = true, 0x201 }), ""},
		{"inotify", common + "inotify wd:1a ino:3c4a3 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a3c4030000000000\ninotify wd:2 ino:1 sdev:1 mask:2 ignored_mask:0 \n",
			base(func(f *Fdinfo) {
				f.Inotify = []InotifyWatch{
					{WD: 0x1a, Ino: 0x3c4a3, Sdev: 0xfe00000, Mask: 0xfff, Handle: Handle{1, []byte{0xa3, 0xc4, 3, 0, 0, 0, 0, 0}}},
					{WD: 2, Ino: 1, Sdev: 1, Mask: 2},
				}
			}), ""},
		{"fanotify", common + "fanotify flags:1 event-flags:8000\nfanotify ino:3c4a3 sdev:fe00000 mflags:4 mask:2 ignored_mask:8 fhandle-bytes:1 fhandle-type:f f_handle:a3\n" +
			"fanotify mnt_id:12 mflags:0 mask:3b ignored_mask:0\nfanotify sdev:10 mflags:0 mask:1 ignored_mask:0\n",
			base(func(f *Fdinfo) {
				f.Fanotify = &FanotifyInfo{Flags: 1, EventFlags: 0x8000, Marks: []FanotifyMark{
					{Kind: "inode", Ino: 0x3c4a3, Sdev: 0xfe00000, MFlags: 4, Mask: 2, Ignored: 8, Handle: Handle{15, []byte{0xa3}}},
					{Kind: "mount", MntID: 0x12, Mask: 0x3b}, {Kind: "filesystem", Sdev: 16, Mask: 1},
				}}
			}), ""},
		{"pidfd", common + "Pid:\t-1\nNSpid:\t7\t1\n", base(func(f *Fdinfo) { f.Pidfd = &PidfdInfo{Pid: -1, NSpid: []int{7, 1}} }), ""},
		{"locks", common + "lock:\t1: FLOCK  ADVISORY  WRITE 7726 fe:00:9978095 0 EOF\nlock:\t2: OFDLCK ADVISORY  READ -1 fe:00:9978095 5 14\n",
			base(func(f *Fdinfo) {
				f.Locks = []Lock{{ID: 1, Kind: "FLOCK", Mode: "ADVISORY", Type: "WRITE", Pid: 7726, Major: 0xfe, Ino: 9978095, End: math.MaxInt64},
					{ID: 2, Kind: "OFDLCK", Mode: "ADVISORY", Type: "READ", Pid: -1, Major: 0xfe, Ino: 9978095, Start: 5, End: 14}}
			}), ""},
		{"unknown lines", common + "SqMask:\t0x3\nPollList:\nAPI:\taa:0:80000000000001ff\nsomething\n",
			base(func(f *Fdinfo) {
				f.Other = []KeyValue{{"SqMask", "0x3"}, {"PollList", ""}, {"API", "aa:0:80000000000001ff"}, {"something", ""}}
			}), ""},
		{"memory position", "pos:\t-2097152\nflags:\t0\nmnt_id:\t0\nino:\t1\n", Fdinfo{Pos: -2097152, Ino: 1}, ""},
		{"empty", "", Fdinfo{}, ""},
		{"flags not octal", "flags:\t9\n", Fdinfo{}, "line 1: flags"},
		{"time out of range", "it_value: (9999999999, 0)\n", Fdinfo{}, "out of range"},
		{"no time", "it_value: 3\n", Fdinfo{}, "no time"},
		{"handle no hexadecimal", "inotify wd:1 f_handle:xy\n", Fdinfo{}, "not hexadecimal"},
		{"pair without a key", "inotify :1\n", Fdinfo{}, "has no key"},
		{"lock too short", "lock:\t1: POSIX\n", Fdinfo{}, "lock of 2 words"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseFdinfo([]byte(tc.in))
			check(t, got, err, tc.want, tc.err)
		})
	}
}

func TestParseLocks(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []Lock
		err  string
	}{
		{"1: POSIX  ADVISORY  WRITE 7726 fe:0a:9978095 5 14\n1: -> POSIX  ADVISORY  READ 7727 fe:0a:9978095 0 EOF\n2: LEASE  BREAKING  READ 9 00:1f:3 0 EOF\n",
			[]Lock{
				{ID: 1, Kind: "POSIX", Mode: "ADVISORY", Type: "WRITE", Pid: 7726, Major: 254, Minor: 10, Ino: 9978095, Start: 5, End: 14},
				{ID: 1, Blocked: true, Kind: "POSIX", Mode: "ADVISORY", Type: "READ", Pid: 7727, Major: 254, Minor: 10, Ino: 9978095, End: math.MaxInt64},
				{ID: 2, Kind: "LEASE", Mode: "BREAKING", Type: "READ", Pid: 9, Minor: 0x1f, Ino: 3, End: math.MaxInt64},
			}, ""},
		{"1: POSIX  *NOINODE* READ 5 <none>:0 0 EOF\n", []Lock{{ID: 1, Kind: "POSIX", Mode: "*NOINODE*", Type: "READ", Pid: 5, End: math.MaxInt64}}, ""},
		{"", nil, ""},
		{"1 POSIX ADVISORY WRITE 7726 fe:0a:9978095 5 14\n", nil, "no lock number"},
		{"1: POSIX ADVISORY WRITE 7726 9978095 5 14\n", nil, "no inode"},
		{"1: POSIX ADVISORY WRITE x fe:0a:1 5 14\n", nil, "lock owner"},
	} {
		got, err := ParseLocks(strings.NewReader(tc.in))
		check(t, got, err, tc.want, tc.err)
	}
}

func TestParseTimers(t *testing.T) {
	const in = "ID: 3\nsignal: 40/0000000000001234\nnotify: signal/pid.3600\nClockID: -6\nID: 2\nsignal: 0/ffffffffffffffff\nnotify: none/tid.3601\nClockID: 0\nLater: 1\n"
	for _, tc := range []struct {
		in   string
		want []Timer
		err  string
	}{
		{in, []Timer{{ID: 3, Signal: 40, Value: 0x1234, Notify: "signal", Pid: 3600, Clock: -6},
			{ID: 2, Value: math.MaxUint64, Notify: "none", ByTID: true, Pid: 3601}}, ""},
		{"", nil, ""},
		{"signal: 4/0\n", nil, "before the first timer"},
		{"ID: 1\nsignal: 4\n", nil, "no slash"},
		{"ID: 1\nnotify: signal/4\n", nil, "names no receiver"},
		{"ID 1\n", nil, "no colon"},
	} {
		got, err := ParseTimers([]byte(tc.in))
		check(t, got, err, tc.want, tc.err)
	}
}

func TestParseMountinfo(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []Mount
		err  string
	}{
		{"26 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard\n27 26 0:24 /a\\040b /mnt/c\\012d\\134e ro - fuse.sshfs  ro,size=4k\n",
			[]Mount{
				{ID: 26, Parent: 1, Major: 254, Root: "/", Point: "/", Options: "rw,relatime", Tags: []string{"shared:1", "master:2"}, FSType: "ext4", Source: "/dev/vda", SuperOptions: "rw,discard"},
				{ID: 27, Parent: 26, Minor: 24, Root: "/a b", Point: "/mnt/c\nd\\e", Options: "ro", FSType: "fuse.sshfs", SuperOptions: "ro,size=4k"},
			}, ""},
		{"26 1 254:0 / / rw\n", nil, "mount of 6 fields"},
		{"26 1 254:0 / / rw a b c d e\n", nil, "without a file system"},
		{"26 1 254 / / rw - ext4 /dev/vda rw\n", nil, "no device"},
		{"x 1 254:0 / / rw - ext4 /dev/vda rw\n", nil, "mount id"},
	} {
		got, err := ParseMountinfo(strings.NewReader(tc.in))
		check(t, got, err, tc.want, tc.err)
	}
}

func TestParseNetUnix(t *testing.T) {
	const head = "Num       RefCount Protocol Flags    Type St Inode Path\n"
	for _, tc := range []struct {
		in   string
		want []UnixSocket
		err  string
	}{
		{head + "000000000fe6832d: 00000003 00000000 00000000 0001 03  1512\n" +
			"0000000071a3e5d8: 00000002 00000000 00000000 0002 01 72310 /tmp/x y\nz\n" +
			"000000002dda4e50: 00000002 00000000 00010000 0001 01 72309 @ab c@d\n" +
			"000000002dda4e51: 00000002 00000000 00010000 0005 01 72308  lead\n",
			[]UnixSocket{
				{RefCount: 3, Type: 1, State: 3, Inode: 1512},
				{RefCount: 2, Type: 2, State: 1, Inode: 72310, Path: "/tmp/x y\nz"},
				{RefCount: 2, Flags: 0x10000, Type: 1, State: 1, Inode: 72309, Path: "@ab c@d"},
				{RefCount: 2, Flags: 0x10000, Type: 5, State: 1, Inode: 72308, Path: " lead"},
			}, ""},
		{head, nil, ""},
		{"", nil, ""},
		{"x\n", nil, "no heading"},
		{head + "garbage\n", nil, "no socket number"},
	} {
		got, err := ParseNetUnix(strings.NewReader(tc.in))
		check(t, got, err, tc.want, tc.err)
		if len(got) > 2 && (got[1].Listening() || !got[2].Listening()) {
			t.Error("Listening is wrong")
		}
	}
}

func TestParseNetInet(t *testing.T) {
	ap := netip.MustParseAddrPort
	const head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	for _, tc := range []struct {
		in   string
		want []InetSocket
		err  string
	}{
		{head + "   0: 00000000000000000000000001000000:1092 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     7        0 72312 1 00000000113b1685 100 0 0 10 0\n" +
			"   1: 0000000000000000FFFF00000100007F:A2B5 B80D01200000000067452301EFCDAB89:DBFA 06 00000000:00000000 03:00000EAC 00000000     0        0 0 3 0000000043730b43\n",
			[]InetSocket{
				{Local: ap("[::1]:4242"), Remote: ap("[::]:0"), State: TCPListen, UID: 7, Inode: 72312},
				{Local: ap("[::ffff:127.0.0.1]:41653"), Remote: ap("[2001:db8::123:4567:89ab:cdef]:56314"), State: 6, Timer: 3},
			}, ""},
		{head + " 8228: 0100007F:1093 08080808:0035 01 0000000A:0000000B 00:00000000 00000000     0        0 72313 2 000000002d2d234c 0         \n",
			[]InetSocket{{Local: ap("127.0.0.1:4243"), Remote: ap("8.8.8.8:53"), State: TCPEstablished, TxQueue: 10, RxQueue: 11, Inode: 72313}}, ""},
		{"", nil, ""},
		{"x", nil, "no heading"},
		{head + "1: 0100007F:1093\n", nil, "socket of 2 fields"},
		{head + "1: 0100007:1093 0:0 1 0:0 0:0 0 0 0 0\n", nil, "no address"},
	} {
		got, err := ParseNetInet(strings.NewReader(tc.in))
		check(t, got, err, tc.want, tc.err)
	}
}

func TestSmallParsers(t *testing.T) {
	auxv, err := ParseAuxv([]byte{6, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	check(t, auxv, err, []uint64{6, 4096, 0, 0}, "")
	if v, ok := AuxvValue(auxv, 6); v != 4096 || !ok {
		t.Errorf("AT_PAGESZ %d %v", v, ok)
	}
	_, err = ParseAuxv(make([]byte, 15))
	check[any](t, nil, err, nil, "no pairs of words")

	for _, tc := range []struct {
		in   string
		want []string
	}{{"", nil}, {"a\x00b c\x00\x00", []string{"a", "b c", ""}}, {"nginx: worker", []string{"nginx: worker"}}} {
		check(t, ParseCmdline([]byte(tc.in)), nil, tc.want, "")
	}
	kids, err := ParseChildren([]byte("12 13 "))
	check(t, kids, err, []int{12, 13}, "")
	_, err = ParseChildren([]byte("12 x"))
	check[any](t, nil, err, nil, `"x"`)

	flags, err := ParseCPUFlags(strings.NewReader("processor\t: 0\nflags\t\t: fpu  avx2\nflags\t\t: other\n"))
	check(t, flags, err, []string{"fpu", "avx2"}, "")
	_, err = ParseCPUFlags(strings.NewReader("processor\t: 0\n"))
	check[any](t, nil, err, nil, "no flags line")

	mem, err := ParseMemInfo([]byte("MemTotal:       24683620 kB\nMemAvailable:   2 kB\nHugePages_Free:        3\nHugepagesize:       2048 kB\nX\n"))
	check(t, mem, err, MemInfo{Total: 24683620 << 10, Available: 2048, HugePagesFree: 3, HugePageSize: 2 << 20}, "")
	_, err = ParseMemInfo([]byte("MemFree: 1 kB\n"))
	check(t, MemInfo{}, err, MemInfo{}, "no MemTotal")

	for link, want := range map[string]bool{"socket:[12]": true, "socket:[12": false, "pipe:[12]": false, "socket:[]": false, "/socket:[12]": false} {
		if n, ok := SocketInode(link); ok != want || ok && n != 12 {
			t.Errorf("SocketInode(%q) = %d, %v", link, n, ok)
		}
	}
}

func TestGone(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {io.EOF, false}, {os.ErrPermission, false},
		{fmt.Errorf("x: %w", &os.PathError{Op: "open", Err: syscall.ENOENT}), true},
		{fmt.Errorf("x: %w", &os.PathError{Op: "read", Err: syscall.ESRCH}), true},
		{errors.Join(io.EOF, os.ErrNotExist), true},
	} {
		if Gone(tc.err) != tc.want {
			t.Errorf("Gone(%v) = %v", tc.err, !tc.want)
		}
	}
}

func TestUnescapeLeavesTheRest(t *testing.T) {
	for in, want := range map[string]string{"": "", `\`: `\`, `\01`: `\01`, `a\012`: "a\n", `\134012`: `\012`, `\999`: `\999`, `\040\012`: "\\040\n"} {
		esc := "\n"
		if in == `\134012` {
			esc = "\n\\"
		}
		if got := unescape(in, esc); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
	if !bytes.Equal([]byte(clip(strings.Repeat("x", 70))), []byte(strings.Repeat("x", 64)+"…")) {
		t.Error("clip is wrong")
	}
}
