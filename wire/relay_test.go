package wire

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
)

// TestTerminalPayloads: sizes and endings come out as they went in, and nothing else does.
func TestTerminalPayloads(t *testing.T) {
	want := &WindowSize{Rows: 24, Columns: 65535, YPixels: 7}
	if got, ok := ParseSize(SizePayload(want)); !ok || !proto.Equal(got, want) {
		t.Errorf("the size is %v, %v", got, ok)
	}
	if e, status, ok := ParseEnd(EndPayload(EndingExited, 137)); !ok || e != EndingExited || status != 137 {
		t.Errorf("the ending is %d with %d, %v", e, status, ok)
	}
	for _, bad := range [][]byte{nil, {2}, {4, 0}, {2, 0, 0}, make([]byte, 7)} {
		if _, ok := ParseSize(bad); ok {
			t.Errorf("%v is a size", bad)
		}
		if _, _, ok := ParseEnd(bad); ok {
			t.Errorf("%v is an ending", bad)
		}
	}
}

func TestRelayFrame(t *testing.T) {
	want := RelayHeader{Type: RelayData, Flags: RelayFin | RelayResend, Epoch: 7, Offset: 10, End: 1 << 40, Base: 9, Taken: 1 << 33, Limit: 1<<33 + 5}
	frame := want.Frame([]byte("some bytes"))
	got, payload, err := ParseRelayFrame(frame)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" || string(payload) != "some bytes" {
		t.Errorf("payload %q, header (-want +got):\n%s", payload, diff)
	}
	for i := range frame {
		bad := bytes.Clone(frame)
		bad[i] ^= 0x10
		if _, _, err := ParseRelayFrame(bad); !errors.Is(err, ErrCorrupt) {
			t.Errorf("byte %d changed: %v, want ErrCorrupt", i, err)
		}
	}
	for name, h := range map[string]RelayHeader{
		"type":   {Type: 9},
		"flags":  {Type: RelayState, Flags: 64},
		"base":   {Type: RelayState, Base: 2, End: 1},
		"taken":  {Type: RelayState, Taken: 2, Limit: 1},
		"offset": {Type: RelayData, Offset: 3, End: 2},
		"length": {Type: RelayData, Offset: 1, End: 2},
	} {
		if _, _, err := ParseRelayFrame(h.Frame([]byte("ab"))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
}

func FuzzParseRelayFrame(f *testing.F) {
	f.Add(RelayHeader{Type: RelayAttach, Epoch: 1}.Frame([]byte("beta")))
	f.Add(RelayHeader{Type: RelayData, Offset: 3, End: 5, Base: 3, Limit: 100}.Frame([]byte("xy")))
	f.Add(RelayHeader{Type: RelayState, Flags: RelayFin, End: 5, Base: 5, Taken: 7, Limit: 7}.Frame(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := ParseRelayFrame(b)
		if err == nil && !bytes.Equal(h.Frame(payload), b) {
			t.Errorf("frame %x is read as %+v", b, h)
		}
	})
}
