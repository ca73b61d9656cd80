package ns

import (
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

// FuzzMessages: no row of netlink messages makes the parsers panic.
func FuzzMessages(f *testing.F) {
	rt := appendAttr(make([]byte, unix.SizeofRtMsg), unix.RTA_OIF, []byte{1, 0, 0, 0})
	f.Add(appendMsg(nil, unix.RTM_NEWROUTE, 0, 1, rt))
	f.Add(appendMsg(nil, unix.RTM_NEWADDR, 0, 1, append(appendAttr(make([]byte, unix.SizeofIfAddrmsg), unix.IFA_FLAGS, []byte{128, 0, 0, 0}), 1, 2)))
	f.Add(appendMsg(nil, unix.RTM_NEWLINK, 0, 1, appendText(ifinfo(1, 0, 0), unix.IFLA_IFNAME, "lo")))
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := splitMsgs(b)
		if err != nil {
			return
		}
		for _, m := range ms {
			_ = loopback6(m)
			if data, err := settable(m); err == nil && len(data) > len(m.data)+16 {
				t.Errorf("%d bytes became %d", len(m.data), len(data))
			}
			_, _ = parseDevice(m.data)
		}
	})
}

// TestSettings: only settings of a network namespace are written.
func TestSettings(t *testing.T) {
	for _, p := range []string{"kernel/hostname", "net/../kernel/hostname", "net/ipv4/../../kernel/hostname", "/etc/passwd", ""} {
		if err := setSysctls([]image.SysctlFacts{{Path: p, Value: "x"}}, true); err == nil {
			t.Errorf("%q was set", p)
		}
	}
}
