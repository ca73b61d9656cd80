package procfs

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// ParseCPUFlags takes the flags of the first CPU out of /proc/cpuinfo.
func ParseCPUFlags(r io.Reader) ([]string, error) {
	var flags []string
	found := errors.New("found")
	err := eachLine(r, func(line []byte) error {
		key, val, ok := strings.Cut(string(line), ":")
		// arm64 says Features.
		if k := strings.TrimSpace(key); ok && (k == "flags" || k == "Features") {
			flags = strings.Fields(val)
			return found
		}
		return nil
	})
	switch {
	case errors.Is(err, found):
		return flags, nil
	case err != nil:
		return nil, err
	}
	return nil, errors.New("no flags line")
}

// CPUFlags reads the features of this host's CPUs, such as "avx2".
func CPUFlags() ([]string, error) { return stream("/proc/cpuinfo", ParseCPUFlags) }

// MemInfo is /proc/meminfo, bytes.
type MemInfo struct {
	Total, Free, Available, SwapTotal, SwapFree uint64
	HugePageSize                                uint64 // of the default size
	HugePagesFree                               uint64 // number
}

// ParseMemInfo parses /proc/meminfo.
func ParseMemInfo(b []byte) (MemInfo, error) {
	var m MemInfo
	var total bool
	for _, line := range strings.Split(string(b), "\n") {
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		val = strings.TrimSpace(val)
		var err error
		switch key {
		case "MemTotal":
			total = true
			err = kib(&m.Total, val)
		case "MemFree":
			err = kib(&m.Free, val)
		case "MemAvailable":
			err = kib(&m.Available, val)
		case "SwapTotal":
			err = kib(&m.SwapTotal, val)
		case "SwapFree":
			err = kib(&m.SwapFree, val)
		case "Hugepagesize":
			err = kib(&m.HugePageSize, val)
		case "HugePages_Free":
			err = set(&m.HugePagesFree, val, 10)
		}
		if err != nil {
			return MemInfo{}, fmt.Errorf("%s: %w", key, err)
		}
	}
	if !total {
		return MemInfo{}, errors.New("no MemTotal line")
	}
	return m, nil
}

// ReadMemInfo reads /proc/meminfo.
func ReadMemInfo() (MemInfo, error) { return read("/proc/meminfo", ParseMemInfo) }

func word(path string) (string, error) {
	b, err := ReadAll(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// BootID identifies this boot of the kernel; it is the same in all namespaces.
func BootID() (string, error) { return word("/proc/sys/kernel/random/boot_id") }

// KernelRelease is what uname -r says.
func KernelRelease() (string, error) { return word("/proc/sys/kernel/osrelease") }

// PidMax is the number below which all pids lie.
func PidMax() (int, error) {
	s, err := word("/proc/sys/kernel/pid_max")
	if err != nil {
		return 0, err
	}
	var n int
	if err := set(&n, s, 10); err != nil {
		return 0, fmt.Errorf("parse /proc/sys/kernel/pid_max: %w", err)
	}
	return n, nil
}
