package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"godwit/engine"
)

// criuFeatures are the names that CRIU's check --feature knows. Where the engine
// uses the same of the kernel, it is the name of that probe; where it does not,
// it is empty: a caller who asks wants to know whether it can rely on it here.
var criuFeatures = map[string]string{
	"clone3_set_tid":        "clone3_set_tid",
	"pagemap_scan":          "PAGEMAP_SCAN",
	"timer_cr_ids":          "timer_restore_ids",
	"network_lock_nftables": "nftables",
	"nftables":              "nftables",
	"tcp_half_closed":       "TCP_REPAIR",
	"get_rseq_conf":         "clone3_set_tid", // that probe reads one

	"seccomp_filters": "seccomp_filters",
	"timens":          "time_namespaces",
	"openat2":         "openat2",
	"sk_ns":           "SIOCGSKNS",
	"tun":             "tun",
	"aio_remap":       "aio",
	"loginuid":        "loginuid",

	"membarrier_get_registrations": "membarrier_get_registrations",
	"network_lock_iptables":        "nftables", // whose rules are the same

	"apparmor_stacking": "", "autofs": "", "breakpoints": "", "can_map_vdso": "", "cgroupns": "", "compat_cr": "",
	"external_net_ns": "", "has_ipt_legacy": "", "ipv6_freebind": "", "link_nsid": "",
	"mem_dirty_track": "", "move_mount_set_group": "", "net_diag_raw": "", "newifindex": "",
	"nsid": "", "overlayfs_maps": "",
	"pidfd_store": "", "sk_unix_file": "",
	"uffd": "", "uffd-noncoop": "", "userns": "", "vma_madv": "",
}

// probeFor finds the probe for a name of CRIU's or of our own.
func probeFor(name string, probes []engine.Feature) (engine.Feature, error) {
	own, ofCRIU := criuFeatures[name]
	if !ofCRIU {
		own = name
	}
	for _, p := range probes {
		if p.Name == own {
			return p, nil
		}
	}
	if ofCRIU {
		return engine.Feature{}, fmt.Errorf("%s is not supported: this release does not use it, nor what it is for", name)
	}
	return engine.Feature{}, fmt.Errorf("--feature %s: unknown; known are %s", name, strings.Join(featureNames(probes), ", "))
}

// featureNames are the names that can be answered with yes.
func featureNames(probes []engine.Feature) []string {
	var names []string
	for _, p := range probes {
		names = append(names, p.Name)
	}
	for criu, own := range criuFeatures {
		if own != "" && !slices.Contains(names, criu) {
			names = append(names, criu)
		}
	}
	slices.Sort(names)
	return names
}

// askFeatures answers check --feature: nil if all of them are there.
func askFeatures(names []string, probes []engine.Feature) error {
	var errs []error
	for _, name := range names {
		p, err := probeFor(name, probes)
		switch {
		case err != nil:
		case p.Answer == engine.No:
			err = fmt.Errorf("%s is not supported by this kernel: %w", name, p.Err)
		case p.Answer != engine.Yes:
			err = fmt.Errorf("%s could not be tried out: %w", name, p.Err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
