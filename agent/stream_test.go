package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pipe-data"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"godwit/engine/image"
	"godwit/wire"
)

// chunkList is a stream in memory: what the sink writes is what the source reads.
type chunkList struct {
	limit    int
	chunks   [][]byte
	at       int
	held     int // chunks given out and not released
	released int
}

func (c *chunkList) MaxChunk() int { return c.limit }

func (c *chunkList) Write(_ context.Context, parts ...[]byte) error {
	b := slices.Concat(parts...)
	if len(b) > c.limit || len(b) == 0 {
		return fmt.Errorf("a chunk of %d bytes, at most %d are allowed", len(b), c.limit)
	}
	c.chunks = append(c.chunks, b)
	return nil
}

func (c *chunkList) Recv(context.Context) ([]byte, error) {
	if c.at == len(c.chunks) {
		return nil, io.EOF
	}
	c.at++
	c.held++
	return slices.Clone(c.chunks[c.at-1]), nil
}

func (c *chunkList) Release() {
	c.held--
	c.released++
}

func inventoryEntry() image.Entry {
	return image.Entry{File: "inventory", Magic: "INVENTORY", Msg: &inventory.InventoryEntry{ImgVersion: proto.Uint32(2)}}
}

func pipeEntry(id uint32, data []byte) image.Entry {
	return image.Entry{File: "pipes-data", Magic: "PIPES_DATA", Extra: data, Msg: &pipe_data.PipeDataEntry{
		PipeId: proto.Uint32(id), Bytes: proto.Uint32(uint32(len(data))),
	}}
}

// mmEntry announces the memory of process 1.
func mmEntry() image.Entry {
	u := proto.Uint64
	return image.Entry{File: "mm-1", Magic: "MM", Msg: &mm.MmEntry{
		MmStartCode: u(1), MmEndCode: u(2), MmStartData: u(3), MmEndData: u(4), MmStartStack: u(5), MmStartBrk: u(6), MmBrk: u(7),
		MmArgStart: u(8), MmArgEnd: u(9), MmEnvStart: u(10), MmEnvEnd: u(11), ExeFileId: proto.Uint32(1),
	}}
}

type datum struct {
	ID  image.DataID
	Off uint64
	Len int
}

// fill makes the content of a byte depend on where it belongs.
func fill(id image.DataID, off uint64, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i++ {
		at := off + uint64(i)
		b[i] = byte(at ^ at>>8 ^ at>>16 ^ uint64(id.ID)*31 ^ uint64(id.Kind)<<5)
	}
	return b
}

func TestStreamRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &chunkList{limit: rapid.SampledFrom([]int{8 << 10, 64 << 10, 512 << 10}).Draw(t, "limit")}
		extras := rapid.SliceOfN(rapid.IntRange(0, 80<<10), 0, 4).Draw(t, "extras")
		var data []datum
		for i, kind := range rapid.SliceOfN(rapid.IntRange(1, 3), 0, 8).Draw(t, "kinds") {
			d := datum{ID: image.DataID{Kind: image.DataKind(kind), ID: uint32(i % 3)}, Off: uint64(i) << 30}
			d.Len = rapid.IntRange(1, 140).Draw(t, "pages") * pageSize
			if d.ID.Kind == image.Ghost {
				d.Len = rapid.IntRange(1, 300<<10).Draw(t, "bytes")
			}
			data = append(data, d)
		}

		sink := newStreamSink(t.Context(), c)
		noErr(t, sink.hello(&wire.Hello{Protocol: wire.Version, Id: "m", Source: "a"}))
		noErr(t, sink.Facts(&image.Facts{Version: 1, Host: "a", Tasks: []image.TaskFacts{{TID: 7}}}))
		noErr(t, sink.Entry(inventoryEntry()))
		for i, n := range extras {
			noErr(t, sink.Entry(pipeEntry(uint32(i), fill(image.DataID{ID: uint32(i)}, 0, n))))
		}
		noErr(t, sink.Sealed())
		for _, d := range data {
			noErr(t, sink.Data(d.ID, d.Off, fill(d.ID, d.Off, d.Len)))
		}
		noErr(t, sink.end(nil))

		src := newStreamSource(c)
		h, err := src.hello(t.Context(), time.Second)
		noErr(t, err)
		if h.Id != "m" {
			t.Fatalf("hello of %q", h.Id)
		}
		set, err := src.Images(t.Context())
		noErr(t, err)
		if set.Facts == nil || set.Facts.Tasks[0].TID != 7 {
			t.Fatalf("facts %+v", set.Facts)
		}
		if got := len(set.Entries("pipes-data")); got != len(extras) {
			t.Fatalf("%d pipe entries, want %d", got, len(extras))
		}
		for i, e := range set.Entries("pipes-data") {
			want := pipeEntry(uint32(i), fill(image.DataID{ID: uint32(i)}, 0, extras[i]))
			if diff := cmp.Diff(want.Msg, e.Msg, protocmp.Transform()); diff != "" || !bytes.Equal(e.Extra, want.Extra) {
				t.Fatalf("entry %d differs: %s", i, diff)
			}
		}
		var got []datum // adjacent pieces joined
		for {
			id, off, p, err := src.Next(t.Context())
			if errors.Is(err, io.EOF) {
				break
			}
			noErr(t, err)
			if !bytes.Equal(p, fill(id, off, len(p))) {
				t.Fatalf("%s at %#x: %d bytes differ", id, off, len(p))
			}
			if n := len(got); n > 0 && got[n-1].ID == id && got[n-1].Off+uint64(got[n-1].Len) == off {
				got[n-1].Len += len(p)
				continue
			}
			got = append(got, datum{ID: id, Off: off, Len: len(p)})
		}
		if diff := cmp.Diff(data, got); diff != "" {
			t.Fatalf("data (-sent +received):\n%s", diff)
		}
		if c.held != 0 || c.released != len(c.chunks) {
			t.Fatalf("%d chunks held, %d of %d released", c.held, c.released, len(c.chunks))
		}
		if sink.pages.Load() != src.pages.Load() {
			t.Fatalf("%d pages sent, %d received", sink.pages.Load(), src.pages.Load())
		}
	})
}

// items makes chunks by hand: what a sink would never send.
func items(its ...*wire.Item) []byte {
	var b []byte
	for _, it := range its {
		m, _ := proto.Marshal(it)
		b = append(wire.DataHeader{Type: wire.RecordItem, Length: uint32(len(m))}.Append(b), m...)
	}
	return b
}

func dataRecord(kind uint8, off uint64, n int) []byte {
	return append(wire.DataHeader{Type: wire.RecordData, Kind: kind, Offset: off, Length: uint32(n)}.Append(nil), make([]byte, n)...)
}

func TestStreamMalformed(t *testing.T) {
	hello := &wire.Item{Item: &wire.Item_Hello{Hello: &wire.Hello{Protocol: wire.Version}}}
	entry := func(file, magic string, msg []byte) *wire.Item {
		return &wire.Item{Item: &wire.Item_Entry{Entry: &wire.ImageEntry{File: file, Magic: magic, Message: msg}}}
	}
	done := func(n uint64) *wire.Item {
		return &wire.Item{Item: &wire.Item_ImagesDone{ImagesDone: &wire.ImagesDone{Entries: n}}}
	}
	end := func(n uint64) *wire.Item {
		return &wire.Item{Item: &wire.Item_End{End: &wire.StreamEnd{DataBytes: n}}}
	}
	gaveUp := &wire.Item{Item: &wire.Item_End{End: &wire.StreamEnd{Error: &wire.Error{Code: wire.Code_CODE_INTERNAL, Message: "pid 3 died"}}}}
	facts := &wire.Item{Item: &wire.Item_Facts{Facts: []byte(`{"version":1}`)}}
	allData := &wire.Item{Item: &wire.Item_DataDone{DataDone: &wire.DataDone{}}}
	early := &wire.Item{Item: &wire.Item_EarlyFile{EarlyFile: &wire.EarlyFile{Id: 1, Path: "/srv/a", Size: 12}}}
	early2 := &wire.Item{Item: &wire.Item_EarlyFile{EarlyFile: &wire.EarlyFile{Id: 2, Path: "/srv/b"}}}
	outline := &wire.Item{Item: &wire.Item_Outline{Outline: []byte(`{"procs":[{"pid":7,"sid":7}]}`)}}
	more := wire.DataHeader{Type: wire.RecordItem, Flags: wire.FlagMore, Length: 1}
	tests := []struct {
		name   string
		chunks [][]byte
		want   string
	}{
		{"empty", nil, "EOF"},
		{"no greeting", [][]byte{items(done(0))}, "does not start with a greeting"},
		{"data first", [][]byte{dataRecord(1, 0, pageSize)}, "does not start with a greeting"},
		{"no end of images", [][]byte{items(hello, facts)}, "ends among the images"},
		{"end among images", [][]byte{items(hello, end(0))}, "ends among the images"},
		{"data among images", [][]byte{items(hello), dataRecord(1, 0, pageSize)}, "data before the images"},
		{"facts twice", [][]byte{items(hello, facts, facts)}, "facts come twice"},
		{"facts no JSON", [][]byte{items(hello, &wire.Item{Item: &wire.Item_Facts{Facts: []byte("{")}})}, "facts"},
		{"unknown image", [][]byte{items(hello, entry("x", "NOSUCH", nil))}, "NOSUCH"},
		{"image name with a path", [][]byte{items(hello, entry("../x", "INVENTORY", []byte{8, 2}))}, "../x"},
		{"message lacks a field", [][]byte{items(hello, entry("inventory", "INVENTORY", nil))}, "required"},
		{"entries missing", [][]byte{items(hello, done(3))}, "0 entries of 3"},
		{"two greetings", [][]byte{items(hello, hello)}, "unexpected item"},
		{"empty item", [][]byte{items(hello, &wire.Item{})}, "kind that this release does not know"},
		{"item cut off", [][]byte{items(hello), append(more.Append(nil), 1)}, "ends inside an item"},
		{"data inside an item", [][]byte{items(hello), append(more.Append(nil), 1), dataRecord(1, 0, pageSize)}, "data inside an item"},
		{"record cut off", [][]byte{items(hello), {1, 2, 3}}, "malformed stream record"},
		{"no end", [][]byte{items(hello, done(0))}, "ends without an end"},
		{"sum wrong", [][]byte{items(hello, done(0), end(7))}, "0 bytes of data arrived, 7 were sent"},
		{"after the end", [][]byte{items(hello, done(0), end(0)), dataRecord(1, 0, pageSize)}, "goes on after its end"},
		{"half a page", [][]byte{items(hello, done(0)), dataRecord(1, 0, 100)}, "not whole pages"},
		{"odd address", [][]byte{items(hello, done(0)), dataRecord(2, 12, pageSize)}, "not whole pages"},
		{"unknown data", [][]byte{items(hello, done(0)), dataRecord(9, 0, pageSize)}, "unknown kind 9"},
		{"image after the seal", [][]byte{items(hello, done(0), facts)}, "unexpected item"},
		{"data after all data", [][]byte{items(hello, done(0), allData), dataRecord(1, 0, pageSize)}, "data after all data"},
		{"all data twice", [][]byte{items(hello, done(0), allData, allData)}, "done twice"},
		{"no end after all data", [][]byte{items(hello, done(0), allData)}, "ends without an end"},
		{"holes before the images", [][]byte{items(hello, outline), dataRecord(6, 0, 16)}, "at the wrong time"},
		{"layout after the images", [][]byte{items(hello, outline, done(0)), dataRecord(5, 0, 32)}, "at the wrong time"},
		{"early data without an outline", [][]byte{items(hello), dataRecord(1, 0, pageSize)}, "data before the images"},
		{"two outlines", [][]byte{items(hello, outline, outline)}, "unexpected item"},
		{"outline late", [][]byte{items(hello, facts, outline)}, "unexpected item"},
		{"outline no JSON", [][]byte{items(hello, &wire.Item{Item: &wire.Item_Outline{Outline: []byte("{")}})}, "outline"},
		{"half an early page", [][]byte{items(hello, outline), dataRecord(1, 0, 100)}, "not whole pages"},
		{"early data cut off", [][]byte{items(hello, outline)}, "ends before the images"},
		{"source gave up after the outline", [][]byte{items(hello, outline, gaveUp)}, "pid 3 died"},
		{"content of no file", [][]byte{items(hello, outline), dataRecord(60, 0, 7)}, "at the wrong time"},
		{"memory without an outline", [][]byte{items(hello, early), dataRecord(1, 0, pageSize)}, "at the wrong time"},
		{"early content after the images", [][]byte{items(hello, early, facts, done(0)), dataRecord(60, 0, 7)}, "at the wrong time"},
		{"an early file late", [][]byte{items(hello, facts, early)}, "unexpected item"},
		{"an early file nowhere", [][]byte{items(hello, &wire.Item{Item: &wire.Item_EarlyFile{EarlyFile: &wire.EarlyFile{Id: 1, Path: "/srv/../etc/x"}}})}, "malformed"},
		{"a short early digest", [][]byte{items(hello, early), dataRecord(4, 0, 7)}, "has 7 bytes"},
		{"early content cut off", [][]byte{items(hello, early), dataRecord(60, 0, 7)}, "ends before the images"},
		{"source gave up", [][]byte{items(hello, done(0), gaveUp)}, "pid 3 died"},
		{"source gave up early", [][]byte{items(hello, gaveUp)}, "pid 3 died"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := readAllOf(&chunkList{chunks: tt.chunks})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
	if err := readAllOf(&chunkList{chunks: [][]byte{items(hello, facts, done(0), end(0))}}); err != nil {
		t.Errorf("a sound stream: %v", err)
	}
	if err := readAllOf(&chunkList{chunks: [][]byte{items(hello, early), dataRecord(60, 5, 7), items(outline), dataRecord(5, 0, 32), items(early2), dataRecord(61, 0, 16), dataRecord(4, 0, 32), items(facts, done(0)),
		dataRecord(61, 0, 16), dataRecord(3, 0, 9), dataRecord(4, 0, 32), items(end(7 + 32 + 16 + 32 + 16 + 9 + 32))}}); err != nil {
		t.Errorf("a sound stream with early files: %v", err)
	}
	if err := readAllOf(&chunkList{chunks: [][]byte{items(hello, outline), dataRecord(5, 0, 32), dataRecord(1, 0, pageSize), items(facts, done(0)), dataRecord(6, 0, 16), items(end(pageSize + 48))}}); err != nil {
		t.Errorf("a sound stream with early memory: %v", err)
	}
}

// readAllOf reads a stream as a restore would; nil after a sound end.
func readAllOf(c chunkReader) error {
	src := newStreamSource(c)
	ctx := context.Background()
	if _, err := src.hello(ctx, time.Minute); err != nil {
		return err
	}
	for {
		_, err := src.Early(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if _, err := src.Images(ctx); err != nil {
		return err
	}
	for {
		if _, _, _, err := src.Next(ctx); err != nil {
			if errors.Is(err, io.EOF) && src.noData && src.ended == nil {
				continue
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// FuzzStreamSource feeds chunks, each after its length in two bytes, to the reader.
func FuzzStreamSource(f *testing.F) {
	c := &chunkList{limit: 8 << 10}
	sink := newStreamSink(context.Background(), c)
	_ = sink.hello(&wire.Hello{Protocol: wire.Version, Id: "m", Source: "a"})
	_ = sink.File(&image.EarlyFile{ID: 1, Path: "/srv/a", Size: 5})
	_ = sink.Data(image.DataID{Kind: image.Content, ID: 1}, 0, []byte("early"))
	_ = sink.Facts(&image.Facts{Version: 1})
	_ = sink.Entry(inventoryEntry())
	_ = sink.Entry(pipeEntry(1, make([]byte, 9000)))
	_ = sink.Sealed()
	_ = sink.Data(image.DataID{Kind: image.Memory, ID: 1}, 0x1000, make([]byte, 3*pageSize))
	_ = sink.end(nil)
	var seed []byte
	for _, b := range c.chunks {
		seed = append(binary.LittleEndian.AppendUint16(seed, uint16(len(b))), b...)
	}
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &chunkList{}
		for len(b) > 2 {
			n := min(int(binary.LittleEndian.Uint16(b)), len(b)-2)
			c.chunks = append(c.chunks, b[2:2+n])
			b = b[2+n:]
		}
		_ = readAllOf(c)
		if c.held > 1 {
			t.Errorf("%d chunks held at once", c.held)
		}
	})
}

// noErr ends a test on an error. It serves rapid's tests, too.
func noErr(t interface {
	Helper()
	Fatalf(string, ...any)
}, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}
