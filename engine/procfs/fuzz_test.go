package procfs

import (
	"bytes"
	"io"
	"testing"
)

// Each target asks that no input makes a parser panic or loop, and what the
// parser promises of what it accepts.

func FuzzStat(f *testing.F) {
	f.Add([]byte(catStat))
	f.Add([]byte(kthreadStat))
	f.Add([]byte("1 (a) b) R 1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := ParseStat(b); err == nil && s.State == 0 {
			t.Error("no state")
		}
	})
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte(shellStatus))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := ParseStatus(b); err == nil && s.State == 0 {
			t.Error("no state")
		}
	})
}

func FuzzSmaps(f *testing.F) {
	f.Add([]byte("55d289ea1000-55d289ea3000 r-xp 00002000 fe:1f 247026        /usr/bin/a\\012b (deleted)\nRss:     8 kB\nVmFlags: rd ex \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := ParseSmaps(bytes.NewReader(b))
		for _, e := range es {
			if err == nil && e.End <= e.Start {
				t.Errorf("%v is empty", e.Mapping)
			}
		}
		if _, err := ParseMaps(bytes.NewReader(b)); err != nil && len(es) == 0 {
			return
		}
	})
}

func FuzzFdinfo(f *testing.F) {
	for _, s := range []string{
		common + "tfd:        4 events:       1d data:                4  pos:0 ino:3c78 sdev:f\n",
		"it_value: (99, 999931293)\nlock:\t1: FLOCK  ADVISORY  WRITE 7726 fe:00:9978095 0 EOF\n",
		"inotify wd:1 ino:3 sdev:f mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a3c4030000000000\n",
		"fanotify flags:1 event-flags:8000\nfanotify mnt_id:12 mflags:0 mask:3b ignored_mask:0\n",
		"eventfd-count: 3\nsigmask:\t1\nPid:\t1\nNSpid:\t1 2\nx: y\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseFdinfo(b) })
}

func FuzzSysV(f *testing.F) {
	f.Add([]byte("  key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n  1508          2   600          1     0     0     0     0          0 1795713436\n"))
	f.Add([]byte("key shmid perms size cpid lpid nattch\n0 5 1600 4096 12 13 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseSysV(bytes.NewReader(b)) })
}

// FuzzTables: the small and the tabular files.
func FuzzTables(f *testing.F) {
	f.Add([]byte("26 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n"))
	f.Add([]byte("Num\n000000000fe6832d: 00000003 00000000 00000000 0001 03  1512 @a\nb\n"))
	f.Add([]byte("  sl\n 8228: 0100007F:1093 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 72313 2\n"))
	f.Add([]byte("1: -> POSIX  ADVISORY  WRITE 7726 fe:0a:9978095 5 14\n"))
	f.Add([]byte("ID: 3\nsignal: 40/0000000000001234\nnotify: signal/pid.3600\nClockID: -6\n"))
	f.Add([]byte("MemTotal: 1 kB\nflags: a b\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := func() io.Reader { return bytes.NewReader(b) }
		_, _ = ParseMountinfo(r())
		_, _ = ParseNetUnix(r())
		_, _ = ParseNetInet(r())
		_, _ = ParseLocks(r())
		_, _ = ParseCPUFlags(r())
		_, _ = ParseTimers(b)
		_, _ = ParseChildren(b)
		_, _ = ParseMemInfo(b)
		_ = ParseCmdline(b)
		if a, err := ParseAuxv(b); err == nil {
			AuxvValue(a, 6)
		}
	})
}
