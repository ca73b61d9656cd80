package procfs

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseCPUList turns a list such as "0-3,8" (Documentation/admin-guide/
// kernel-parameters.rst, "cpu lists") into words of a mask, lowest first.
func ParseCPUList(b []byte) ([]uint64, error) {
	const maxCPU = 8192 // CONFIG_NR_CPUS is no larger anywhere
	var mask []uint64
	text := strings.TrimSpace(string(b))
	if text == "" {
		return nil, nil
	}
	for _, part := range strings.Split(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		lo, err := strconv.ParseUint(first, 10, 32)
		hi := lo
		if err == nil && isRange {
			hi, err = strconv.ParseUint(last, 10, 32)
		}
		if err != nil || lo > hi || hi >= maxCPU {
			return nil, fmt.Errorf("%q is not a list of CPUs", clip(text))
		}
		for cpu := lo; cpu <= hi; cpu++ {
			for uint64(len(mask)) <= cpu/64 {
				mask = append(mask, 0)
			}
			mask[cpu/64] |= 1 << (cpu % 64)
		}
	}
	return mask, nil
}

// OnlineCPUs is the mask of the CPUs that are in use on this host.
func OnlineCPUs() ([]uint64, error) { return read("/sys/devices/system/cpu/online", ParseCPUList) }

// PossibleCPUs is the mask of the CPUs that this host may ever use.
func PossibleCPUs() ([]uint64, error) {
	return read("/sys/devices/system/cpu/possible", ParseCPUList)
}
