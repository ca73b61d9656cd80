package procfs

//lint:file-ignore ST1003 the fields have the names of the keys in /proc

import (
	"fmt"
	"strings"
)

// Status is /proc/PID/status (proc_pid_status(5)). Amounts are bytes.
type Status struct {
	Name      string // unescaped
	Umask     uint32
	HasUmask  bool // a zombie has none
	State     byte
	Tgid      int
	Ngid      int
	Pid       int
	PPid      int
	TracerPid int
	Uid, Gid  [4]uint32 // real, effective, saved, file system
	FDSize    int
	Groups    []uint32
	// NStgid, NSpid, NSpgid, NSsid: ids from the reader's pid namespace
	// inwards; the last is the one in the process's own.
	NStgid, NSpid, NSpgid, NSsid []int
	Kthread                      bool
	// HasMM: the process has an address space; a zombie or kernel thread has none.
	HasMM                                       bool
	VmPeak, VmSize, VmLck, VmPin, VmHWM, VmRSS  uint64
	RssAnon, RssFile, RssShmem                  uint64
	VmData, VmStk, VmExe, VmLib, VmPTE, VmSwap  uint64
	HugetlbPages                                uint64
	CoreDumping                                 bool
	THPEnabled                                  bool // false: PR_SET_THP_DISABLE
	Threads                                     int
	SigQueued, SigQueueMax                      uint64
	SigPnd, ShdPnd                              uint64 // bit n-1: signal n
	SigBlk, SigIgn, SigCgt                      uint64
	CapInh, CapPrm, CapEff, CapBnd, CapAmb      uint64
	NoNewPrivs                                  bool
	Seccomp                                     int // SECCOMP_MODE_*
	SeccompFilters                              int
	SpeculationStoreBypass, SpeculationIndirect string
	ThreadFeatures                              []string // x86_Thread_features, such as "shstk"
	// Tagged: addresses may have tags in their upper bits (x86 LAM: untag_mask).
	Tagged                                  bool
	CpusAllowedList, MemsAllowedList        string
	VoluntarySwitches, NonvoluntarySwitches uint64
}

// Zombie reports whether the process has exited and waits to be reaped.
func (s *Status) Zombie() bool { return s.State == 'Z' }

// NSPid is the pid in the process's own pid namespace.
func (s *Status) NSPid() int {
	if n := len(s.NSpid); n > 0 {
		return s.NSpid[n-1]
	}
	return s.Pid
}

var nameUnescaper = strings.NewReplacer(`\\`, `\`, `\n`, "\n")

// ParseStatus parses a status file. Name, State, Tgid, Pid, PPid and the user
// and group ids must be there; other lines may be missing.
func ParseStatus(b []byte) (Status, error) {
	var s Status
	seen := map[string]bool{}
	for no, line := range strings.Split(string(b), "\n") {
		if line == "" {
			continue
		}
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			return Status{}, fmt.Errorf("line %d has no colon", no+1)
		}
		val = strings.TrimPrefix(val, "\t")
		if err := s.set(key, val); err != nil {
			return Status{}, fmt.Errorf("%s: %w", clip(key), err)
		}
		seen[key] = true
	}
	for _, key := range []string{"Name", "State", "Tgid", "Pid", "PPid", "Uid", "Gid"} {
		if !seen[key] {
			return Status{}, fmt.Errorf("no %s line", key)
		}
	}
	s.HasMM = seen["VmSize"]
	return s, nil
}

func (s *Status) set(key, val string) error {
	word := strings.TrimSpace(val)
	switch key {
	case "Name":
		s.Name = nameUnescaper.Replace(val)
	case "Umask":
		s.HasUmask = true
		return set(&s.Umask, word, 8)
	case "State":
		if word == "" {
			return fmt.Errorf("it is empty")
		}
		s.State = word[0]
	case "Tgid":
		return set(&s.Tgid, word, 10)
	case "Ngid":
		return set(&s.Ngid, word, 10)
	case "Pid":
		return set(&s.Pid, word, 10)
	case "PPid":
		return set(&s.PPid, word, 10)
	case "TracerPid":
		return set(&s.TracerPid, word, 10)
	case "Uid":
		return quad(&s.Uid, word)
	case "Gid":
		return quad(&s.Gid, word)
	case "FDSize":
		return set(&s.FDSize, word, 10)
	case "Groups":
		for _, f := range strings.Fields(word) {
			var g uint32
			if err := set(&g, f, 10); err != nil {
				return err
			}
			s.Groups = append(s.Groups, g)
		}
	case "NStgid":
		return ints(&s.NStgid, word)
	case "NSpid":
		return ints(&s.NSpid, word)
	case "NSpgid":
		return ints(&s.NSpgid, word)
	case "NSsid":
		return ints(&s.NSsid, word)
	case "Kthread":
		return flag(&s.Kthread, word)
	case "VmPeak":
		return kib(&s.VmPeak, word)
	case "VmSize":
		return kib(&s.VmSize, word)
	case "VmLck":
		return kib(&s.VmLck, word)
	case "VmPin":
		return kib(&s.VmPin, word)
	case "VmHWM":
		return kib(&s.VmHWM, word)
	case "VmRSS":
		return kib(&s.VmRSS, word)
	case "RssAnon":
		return kib(&s.RssAnon, word)
	case "RssFile":
		return kib(&s.RssFile, word)
	case "RssShmem":
		return kib(&s.RssShmem, word)
	case "VmData":
		return kib(&s.VmData, word)
	case "VmStk":
		return kib(&s.VmStk, word)
	case "VmExe":
		return kib(&s.VmExe, word)
	case "VmLib":
		return kib(&s.VmLib, word)
	case "VmPTE":
		return kib(&s.VmPTE, word)
	case "VmSwap":
		return kib(&s.VmSwap, word)
	case "HugetlbPages":
		return kib(&s.HugetlbPages, word)
	case "CoreDumping":
		return flag(&s.CoreDumping, word)
	case "THP_enabled":
		return flag(&s.THPEnabled, word)
	case "Threads":
		return set(&s.Threads, word, 10)
	case "SigQ":
		queued, limit, ok := strings.Cut(word, "/")
		if !ok {
			return fmt.Errorf("%q has no slash", clip(word))
		}
		if err := set(&s.SigQueued, queued, 10); err != nil {
			return err
		}
		return set(&s.SigQueueMax, limit, 10)
	case "SigPnd":
		return set(&s.SigPnd, word, 16)
	case "ShdPnd":
		return set(&s.ShdPnd, word, 16)
	case "SigBlk":
		return set(&s.SigBlk, word, 16)
	case "SigIgn":
		return set(&s.SigIgn, word, 16)
	case "SigCgt":
		return set(&s.SigCgt, word, 16)
	case "CapInh":
		return set(&s.CapInh, word, 16)
	case "CapPrm":
		return set(&s.CapPrm, word, 16)
	case "CapEff":
		return set(&s.CapEff, word, 16)
	case "CapBnd":
		return set(&s.CapBnd, word, 16)
	case "CapAmb":
		return set(&s.CapAmb, word, 16)
	case "NoNewPrivs":
		return flag(&s.NoNewPrivs, word)
	case "Seccomp":
		return set(&s.Seccomp, word, 10)
	case "Seccomp_filters":
		return set(&s.SeccompFilters, word, 10)
	case "Speculation_Store_Bypass":
		s.SpeculationStoreBypass = word
	case "SpeculationIndirectBranch":
		s.SpeculationIndirect = word
	case "untag_mask":
		s.Tagged = word != "0xffffffffffffffff"
	case "x86_Thread_features":
		s.ThreadFeatures = strings.Fields(word)
	case "Cpus_allowed_list":
		s.CpusAllowedList = word
	case "Mems_allowed_list":
		s.MemsAllowedList = word
	case "voluntary_ctxt_switches":
		return set(&s.VoluntarySwitches, word, 10)
	case "nonvoluntary_ctxt_switches":
		return set(&s.NonvoluntarySwitches, word, 10)
	}
	return nil
}

func quad(dst *[4]uint32, s string) error {
	f := strings.Fields(s)
	if len(f) != 4 {
		return fmt.Errorf("%d numbers, want 4", len(f))
	}
	for i := range dst {
		if err := set(&dst[i], f[i], 10); err != nil {
			return err
		}
	}
	return nil
}

func ints(dst *[]int, s string) error {
	*dst = nil
	for _, f := range strings.Fields(s) {
		var n int
		if err := set(&n, f, 10); err != nil {
			return err
		}
		*dst = append(*dst, n)
	}
	return nil
}

func flag(dst *bool, s string) error {
	n, err := number(s, 10, 32)
	*dst = n != 0
	return err
}

// kib parses "12 kB", which is 12 × 1024 bytes.
func kib(dst *uint64, s string) error {
	num, unit := field(s)
	n, err := number(num, 10, 54) // fits in 64 bits as bytes
	if err != nil {
		return err
	}
	if strings.TrimSpace(unit) != "kB" {
		return fmt.Errorf("%q is not in kB", clip(s))
	}
	*dst = n << 10
	return nil
}

// ReadStatus reads /proc/PID/status.
func ReadStatus(pid int) (Status, error) { return read(Path(pid, "status"), ParseStatus) }

// ReadTaskStatus reads the status file of one thread: its own pending and
// blocked signals, credentials and seccomp mode.
func ReadTaskStatus(pid, tid int) (Status, error) {
	return read(TaskPath(pid, tid, "status"), ParseStatus)
}
