package task

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"google.golang.org/protobuf/proto"

	"godwit/engine/sys"
)

// insn is one struct sock_filter.
func insn(code uint16, k uint32) []byte {
	b := make([]byte, sys.SeccompInsnSize)
	binary.LittleEndian.PutUint16(b, code)
	binary.LittleEndian.PutUint32(b[4:], k)
	return b
}

func TestFiltersAreKeptOnce(t *testing.T) {
	var f Filters
	if f.Image() != nil {
		t.Error("no filter makes an image")
	}
	allow, deny := insn(6, 0x7fff0000), insn(6, 0x50001)
	first := f.add(allow, 0, nil)
	second := f.add(deny, 0, &first)
	if got := f.add(allow, 0, nil); got != first {
		t.Errorf("the first filter became number %d and %d", first, got)
	}
	if got := f.add(deny, 0, &first); got != second {
		t.Errorf("the second filter became number %d and %d", second, got)
	}
	if f.add(deny, 2, &first) == second || f.add(deny, 0, nil) == second || f.add(allow, 0, &first) == first {
		t.Error("filters that differ were taken for one")
	}
	chain, err := Chain(f.Image(), second)
	if err != nil || len(chain) != 2 || string(chain[0].GetFilter()) != string(allow) || string(chain[1].GetFilter()) != string(deny) {
		t.Errorf("the chain of the second filter is %v (%v)", chain, err)
	}
}

func TestAsksSupervisor(t *testing.T) {
	for _, c := range []struct {
		name string
		prog []byte
		want bool
	}{
		{"allow", insn(6, 0x7fff0000), false},
		{"user notification", append(insn(0x20, 0), insn(6, 0x7fc00000)...), true},
		{"its number in a load", append(insn(0x20, 0x7fc00000), insn(6, 0)...), false},
	} {
		if got := asksSupervisor(c.prog); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestChainRefusesNonsense(t *testing.T) {
	good := insn(6, 0)
	filter := func(prog []byte, prev *uint32) *seccomp.SeccompFilter {
		return &seccomp.SeccompFilter{Filter: prog, Prev: prev}
	}
	for _, c := range []struct {
		name string
		list []*seccomp.SeccompFilter
		want string
	}{
		{"none", nil, "filter 0 of 0"},
		{"empty", []*seccomp.SeccompFilter{filter(nil, nil)}, "0 bytes"},
		{"half an instruction", []*seccomp.SeccompFilter{filter(good[:5], nil)}, "5 bytes"},
		{"too long", []*seccomp.SeccompFilter{filter(make([]byte, 8*4097), nil)}, "bytes"},
		{"on one that is not there", []*seccomp.SeccompFilter{filter(good, proto.Uint32(7))}, "filter 7 of 1"},
		{"on itself", []*seccomp.SeccompFilter{filter(good, proto.Uint32(0))}, "more than"},
	} {
		if _, err := Chain(&seccomp.SeccompEntry{SeccompFilters: c.list}, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
		}
	}
}

// FuzzChain follows arbitrary lists of filters.
func FuzzChain(f *testing.F) {
	b, err := proto.Marshal(&seccomp.SeccompEntry{SeccompFilters: []*seccomp.SeccompFilter{{Filter: insn(6, 0)}, {Filter: insn(6, 0), Prev: proto.Uint32(0)}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, uint32(1))
	f.Fuzz(func(t *testing.T, raw []byte, last uint32) {
		e := &seccomp.SeccompEntry{}
		if proto.Unmarshal(raw, e) != nil {
			return
		}
		chain, err := Chain(e, last)
		if err == nil && (len(chain) == 0 || chain[0].Prev != nil || chain[len(chain)-1] != e.GetSeccompFilters()[last]) {
			t.Fatalf("a chain of %d filters", len(chain))
		}
	})
}
