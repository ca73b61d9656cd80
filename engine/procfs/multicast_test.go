package procfs

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	igmpFile = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n" +
		"\t\t\t\t010000E0     1 0:00000000\t\t0\n7\ta-name-of-15byt:     2      V3\n\t\t\t\tFB0000E0     2 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n"
	igmp6File = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n4    eth0            ff050000000000000000000000001234     2 00000004 0\n"
)

func TestMulticast(t *testing.T) {
	got, err := ParseIGMP(strings.NewReader(igmpFile))
	if err != nil {
		t.Fatal(err)
	}
	all := netip.MustParseAddr("224.0.0.1")
	want := []MulticastGroup{{1, "lo", all}, {7, "a-name-of-15byt", netip.MustParseAddr("224.0.0.251")}, {7, "a-name-of-15byt", all}}
	eq := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if d := cmp.Diff(want, got, eq); d != "" {
		t.Error(d)
	}
	got, err = ParseIGMP6(strings.NewReader(igmp6File))
	if err != nil {
		t.Fatal(err)
	}
	want = []MulticastGroup{{1, "lo", netip.MustParseAddr("ff02::1")}, {4, "eth0", netip.MustParseAddr("ff05::1234")}}
	if d := cmp.Diff(want, got, eq); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"h\n\t\t010000E0 1\n", "h\nx\tlo :\n", "h\n1\tlo :\n\t\tzz 1\n"} {
		if _, err := ParseIGMP(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	if _, err := ParseIGMP6(strings.NewReader("1 lo ff02 1\n")); err == nil {
		t.Error("a group of 2 bytes is accepted")
	}
	if _, err := MulticastGroups(); err != nil {
		t.Error(err)
	}
}

func FuzzMulticast(f *testing.F) {
	f.Add(igmpFile)
	f.Add(igmp6File)
	f.Fuzz(func(t *testing.T, s string) {
		for _, parse := range []func() ([]MulticastGroup, error){
			func() ([]MulticastGroup, error) { return ParseIGMP(strings.NewReader(s)) },
			func() ([]MulticastGroup, error) { return ParseIGMP6(strings.NewReader(s)) },
		} {
			gs, err := parse()
			for _, g := range gs {
				if err == nil && (g.Interface == "" || !g.Group.IsValid()) {
					t.Errorf("%v is no group", g)
				}
			}
		}
	})
}
