package wire

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestRecordsOfAPayload(t *testing.T) {
	var p []byte
	want := []DataHeader{
		{Type: RecordItem, Flags: FlagMore, Length: 3},
		{Type: RecordItem, Length: 0},
		{Type: RecordData, Kind: 2, ID: 9, Offset: 1 << 40, Length: 5},
	}
	bodies := []string{"abc", "", "pages"}
	for i, h := range want {
		p = append(h.Append(p), bodies[i]...)
	}
	for i := 0; len(p) > 0; i++ {
		h, body, rest, err := NextRecord(p)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want[i], h); diff != "" || string(body) != bodies[i] {
			t.Errorf("record %d: body %q, header %s", i, body, diff)
		}
		p = rest
	}
}

func TestBadRecords(t *testing.T) {
	good := append(DataHeader{Type: RecordData, Kind: 1, Length: 4}.Append(nil), "data"...)
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return b
	}
	for name, p := range map[string][]byte{
		"empty":                    nil,
		"short header":             good[:DataHeaderLen-1],
		"short body":               good[:len(good)-1],
		"type 0":                   change(0, 0),
		"type 3":                   change(0, 3),
		"item with a kind":         change(0, 1),
		"data without a kind":      change(1, 0),
		"data with flags":          change(2, 1),
		"reserved":                 change(20, 1),
		"length beyond":            change(18, 1),
		"beyond the address space": append(DataHeader{Type: RecordData, Kind: 1, Offset: ^uint64(0), Length: 4}.Append(nil), "data"...),
	} {
		if _, _, _, err := NextRecord(p); !errors.Is(err, ErrBadRecord) {
			t.Errorf("%s: %v, want ErrBadRecord", name, err)
		}
	}
}

func TestFrames(t *testing.T) {
	h := FrameHeader{Type: FrameData, Lane: 1, Lanes: 3, Stream: StreamKey("m1"), Session: 77, Epoch: 2, Seq: 10}
	f := h.Frame([]byte("payload"))
	got, payload, err := ParseFrame(f)
	if err != nil || string(payload) != "payload" {
		t.Fatalf("%q, %v", payload, err)
	}
	h.Length, h.BodyCRC = 7, BodyCRC([]byte("payload"))
	if diff := cmp.Diff(h, got); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	// Every single changed bit is found.
	for i := range f {
		for bit := range 8 {
			b := bytes.Clone(f)
			b[i] ^= 1 << bit
			_, _, err := ParseFrame(b)
			want := ErrCorrupt
			if i == 4 {
				want = ErrFrameVersion
			}
			if !errors.Is(err, want) {
				t.Fatalf("byte %d bit %d: %v, want %v", i, bit, err, want)
			}
		}
	}
	for n := range f {
		if _, _, err := ParseFrame(f[:n]); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	for name, bad := range map[string]FrameHeader{
		"wrong lane": {Type: FrameData, Lane: 0, Lanes: 3, Seq: 10},
		"no lanes":   {Type: FramePing},
		"many lanes": {Type: FramePing, Lanes: MaxLanes + 1},
		"type":       {Type: 9, Lanes: 1},
	} {
		if _, _, err := ParseFrame(bad.Frame(nil)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if StreamKey("a") == StreamKey("b") {
		t.Error("stream keys collide")
	}
}

func TestFrameBodies(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := AckBody{
			Peer:   rapid.Uint64().Draw(t, "peer"),
			Window: rapid.Uint64().Draw(t, "window"),
			Resend: rapid.Bool().Draw(t, "resend"),
			Done:   rapid.Bool().Draw(t, "done"),
			Cut:    rapid.Bool().Draw(t, "cut"),
			Next:   rapid.SliceOfN(rapid.Uint64(), 1, MaxLanes).Draw(t, "next"),
		}
		got, err := ParseAckBody(a.Append(nil))
		if diff := cmp.Diff(a, got); diff != "" || err != nil {
			t.Errorf("ack: %v %s", err, diff)
		}
		ft := FrameTotal{Chunks: a.Peer, Bytes: a.Window}
		copy(ft.Digest[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "digest"))
		gott, err := ParseFrameTotal(ft.Append(nil))
		if diff := cmp.Diff(ft, gott); diff != "" || err != nil {
			t.Errorf("total: %v %s", err, diff)
		}
	})
	for _, b := range [][]byte{nil, make([]byte, 17), append(make([]byte, 16), 8, 0), append(make([]byte, 16), 0, 1)} {
		if _, err := ParseAckBody(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("ack %x: %v", b, err)
		}
	}
	if _, err := ParseFrameTotal(make([]byte, 47)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("total: %v", err)
	}
}

func FuzzParseFrame(f *testing.F) {
	f.Add(FrameHeader{Type: FrameData, Lanes: 1}.Frame([]byte("x")))
	f.Add(FrameHeader{Type: FrameAck, Lanes: 2, Seq: 1}.Frame(AckBody{Peer: 1, Next: []uint64{2, 3}}.Append(nil)))
	f.Add(FrameHeader{Type: FrameEnd, Lanes: 1}.Frame(FrameTotal{Chunks: 1}.Append(nil)))
	f.Add([]byte("gdwt"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := ParseFrame(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFrameVersion) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if again := h.Frame(payload); !bytes.Equal(again, b) {
			t.Fatalf("%x was read, %x written", b, again)
		}
		if a, err := ParseAckBody(payload); err == nil && !bytes.Equal(a.Append(nil), payload) {
			t.Fatalf("acknowledgement %x differs when written again", payload)
		}
		if ft, err := ParseFrameTotal(payload); err == nil && !bytes.Equal(ft.Append(nil), payload) {
			t.Fatalf("total %x differs when written again", payload)
		}
	})
}

func FuzzNextRecord(f *testing.F) {
	f.Add(append(DataHeader{Type: RecordData, Kind: 1, ID: 5, Offset: 4096, Length: 4}.Append(nil), "data"...))
	f.Add(append(DataHeader{Type: RecordItem, Flags: FlagMore, Length: 1}.Append(nil), "x"...))
	f.Add(make([]byte, DataHeaderLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		var again []byte
		rest := b
		for len(rest) > 0 {
			h, body, r, err := NextRecord(rest)
			if err != nil {
				if !errors.Is(err, ErrBadRecord) {
					t.Fatalf("untyped error %v", err)
				}
				return
			}
			again = append(h.Append(again), body...)
			rest = r
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("%x was read, %x written", b, again)
		}
	})
}
