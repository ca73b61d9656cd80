package engine

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/dump"
	"godwit/engine/netlock"
	"godwit/engine/procfs"
	"godwit/engine/restore"
	"godwit/engine/sys"
)

// Answer is the outcome of a probe.
type Answer string

// The outcomes.
const (
	Yes     Answer = "yes"
	No      Answer = "no"
	Unclear Answer = "unclear" // the probe itself failed
)

// Feature is something that the engine uses of this host.
type Feature struct {
	Name     string
	Answer   Answer
	Required bool   // without it no tree can be dumped or restored
	Use      string // what it is for, and what happens without it
	Err      error  // why not
}

// Probe tries out what the engine uses; it touches nothing but itself and a
// process that it makes and ends.
func Probe() []Feature {
	list := []struct {
		name, use string
		required  bool
		try       func() error
	}{
		{"kcmp", "telling which descriptors share an open file", true, func() error {
			_, err := sys.KcmpTask(os.Getpid(), os.Getpid(), sys.KcmpVM)
			return err
		}},
		{"pidfd_getfd", "looking at the open files of a tree", true, probeGetfd},
		{"map_files", "opening mapped files", true, probeMapFiles},
		{"PR_SET_MM_MAP", "rebuilding address spaces", true, probeMMMap},
		{"vdso", "executing system calls in other processes", true, func() error {
			_, err := dump.VdsoIdentity()
			return err
		}},
		{"clone3_set_tid", "tracing, and giving processes their recorded pids", true, restore.SelfTest},
		{"PAGEMAP_SCAN", "finding populated pages; slower without", false, probeScan},
		{"userfaultfd_wp_async", "memory that travels while the tree runs (pre-copy, Linux 6.7); stop-and-copy without", false, sys.UffdProbe},
		{"userfaultfd_events", "memory that comes when the tree runs already (post-copy); refused without", false, sys.UffdServeProbe},
		{"timer_restore_ids", "POSIX timers with their ids (Linux 6.16); trees that hold some are refused without", false, func() error {
			_, err := unix.PrctlRetInt(77, 2, 0, 0, 0)
			return os.NewSyscallError("prctl", err)
		}},
		{"TCP_REPAIR", "TCP connections; trees that hold some are refused without", false, probeTCPRepair},
		{"seccomp_filters", "programs with seccomp filters; refused without", false, probeSeccomp},
		{"time_namespaces", "clocks that go on on another host (--time-namespace)", false, func() error {
			_, err := os.Stat("/proc/self/ns/time_for_children")
			return err
		}},
		{"openat2", "opening files inside the root of a tree", false, probeOpenat2},
		{"SIOCGSKNS", "telling in which network namespace a socket is; trees with sockets are refused without", false, probeSocketNamespace},
		{"membarrier_get_registrations", "registrations for membarrier (Linux 6.3)", false, func() error {
			_, _, errno := unix.RawSyscall(unix.SYS_MEMBARRIER, membarrierGetRegistrations, 0, 0)
			if errno != 0 {
				return os.NewSyscallError("membarrier", errno)
			}
			return nil
		}},
		{"tun", "TUN and TAP devices; trees that hold some are refused without", false, func() error {
			f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
			if err != nil {
				return err
			}
			return f.Close()
		}},
		{"aio", "memory-mapped rings of io_setup; trees that hold some are refused without", false, probeAIO},
		{"loginuid", "the user who logged in", false, func() error {
			_, err := os.ReadFile("/proc/self/loginuid")
			return err
		}},
		{"nftables", "keeping TCP connections that lead out of a tree between dump and restore (--network-lock nftables)", false, netlock.Probe},
	}
	out := make([]Feature, 0, len(list))
	for _, p := range list {
		f := Feature{Name: p.name, Use: p.use, Required: p.required, Answer: Yes}
		if f.Err = p.try(); f.Err != nil {
			f.Answer = Unclear
			for _, e := range []error{unix.ENOSYS, unix.EINVAL, unix.ENOTTY, unix.EPERM, unix.EACCES, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, os.ErrNotExist} {
				if errors.Is(f.Err, e) {
					f.Answer = No
				}
			}
		}
		out = append(out, f)
	}
	return out
}

func probeGetfd() error {
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	fd, err := unix.PidfdGetfd(pidfd, pidfd, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	return os.NewSyscallError("close", unix.Close(fd))
}

func probeMapFiles() error {
	maps, err := procfs.ReadMaps(os.Getpid())
	if err != nil {
		return err
	}
	for _, m := range maps {
		if m.Inode != 0 && m.Path != "" && m.Path[0] == '/' {
			f, err := os.Open(fmt.Sprintf("/proc/self/map_files/%x-%x", m.Start, m.End))
			if err != nil {
				return err
			}
			return f.Close()
		}
	}
	return errors.New("this program has no file mapping")
}

func probeMMMap() error {
	size, err := sys.MMMapSize()
	if err != nil {
		return err
	}
	if size != 104 {
		return fmt.Errorf("struct prctl_mm_map has %d bytes, want 104: %w", size, unix.EINVAL)
	}
	return nil
}

func probeScan() error {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return err
	}
	_, _, err = sys.PagemapScan(int(f.Fd()), 0x1000, 0x2000, 0, 0, sys.PageIsPresent, 0, make([]sys.PageRegion, 1))
	return errors.Join(err, f.Close())
}

// membarrierGetRegistrations is MEMBARRIER_CMD_GET_REGISTRATIONS
// (include/uapi/linux/membarrier.h).
const membarrierGetRegistrations = 1 << 9

// probeSeccomp asks for a filter at no address: only a kernel that has filters looks there.
func probeSeccomp() error {
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0)
	if errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EACCES) {
		return nil
	}
	return errors.Join(os.NewSyscallError("prctl PR_SET_SECCOMP", err), unix.EINVAL)
}

func probeOpenat2() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return os.NewSyscallError("openat2", err)
	}
	return os.NewSyscallError("close", unix.Close(fd))
}

func probeSocketNamespace() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	its, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return os.NewSyscallError("ioctl SIOCGSKNS", err)
	}
	return os.NewSyscallError("close", unix.Close(its))
}

// probeAIO destroys a ring that does not exist.
func probeAIO() error {
	_, _, errno := unix.RawSyscall(unix.SYS_IO_DESTROY, 0, 0, 0)
	if errno == unix.EINVAL || errno == 0 {
		return nil
	}
	return os.NewSyscallError("io_destroy", errno)
}

func probeTCPRepair() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_ON); err != nil {
		return os.NewSyscallError("setsockopt TCP_REPAIR", err)
	}
	_, err = sys.GetTCPWindow(fd)
	return err
}
