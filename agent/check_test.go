package agent

import (
	"errors"
	"io"
	"strings"
	"testing"

	"godwit/engine"
)

func testProbes() []engine.Feature {
	return []engine.Feature{
		{Name: "clone3_set_tid", Answer: engine.Yes, Required: true},
		{Name: "PAGEMAP_SCAN", Answer: engine.No, Err: errors.New("inappropriate ioctl")},
		{Name: "timer_restore_ids", Answer: engine.Unclear, Err: errors.New("it rains")},
	}
}

func TestAskFeatures(t *testing.T) {
	for _, tt := range []struct{ names, want string }{
		{"clone3_set_tid", ""},
		{"get_rseq_conf", ""},
		{"pagemap_scan", "not supported by this kernel: inappropriate ioctl"},
		{"PAGEMAP_SCAN", "not supported by this kernel"},
		{"timer_cr_ids", "could not be tried out: it rains"},
		{"mem_dirty_track", "this release does not use it"},
		{"clone3_set_tid uffd", "uffd is not supported"},
		{"tun", "tun is not supported: this release does not use it"}, // for want of a probe of that name
		{"frobnicate", "unknown; known are PAGEMAP_SCAN, aio_remap, clone3_set_tid, get_rseq_conf, loginuid, membarrier_get_registrations, network_lock_iptables, network_lock_nftables, nftables, openat2, pagemap_scan, seccomp_filters, sk_ns, tcp_half_closed, timens, timer_cr_ids, timer_restore_ids, tun"},
	} {
		err := askFeatures(strings.Fields(tt.names), testProbes())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.names, err, tt.want)
		}
		if code := exitCode(err, io.Discard); code != 0 && code != 1 {
			t.Errorf("%s: exit code %d", tt.names, code)
		}
	}
}

// TestCRIUFeatures finds names whose probe does not exist.
func TestCRIUFeatures(t *testing.T) {
	probes := engine.Probe()
	for criu, own := range criuFeatures {
		if _, err := probeFor(criu, probes); (err == nil) != (own != "") {
			t.Errorf("%s: %v", criu, err)
		}
	}
}

func TestReportFeatures(t *testing.T) {
	ok := testProbes()[:1]
	lacking := append(testProbes(), engine.Feature{Name: "kcmp", Answer: engine.No, Required: true})
	for _, tt := range []struct {
		name   string
		probes []engine.Feature
		all    bool
		good   bool
		want   string
	}{
		{"all there", ok, true, true, ""},
		{"optional missing", testProbes(), false, true, ""},
		{"optional missing, all asked for", testProbes(), true, false, "it lacks PAGEMAP_SCAN, timer_restore_ids"},
		{"required missing", lacking, false, false, "cannot dump or restore: it lacks kcmp"},
		{"required missing, all asked for", lacking, true, false, "cannot dump or restore: it lacks kcmp"},
	} {
		var out strings.Builder
		err := reportFeatures(tt.probes, tt.all, "text", &out)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if strings.HasSuffix(out.String(), looksGood) != tt.good {
			t.Errorf("%s: printed %q", tt.name, out.String())
		}
	}
}
