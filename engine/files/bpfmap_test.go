package files

import (
	"os"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/sys"
)

func init() {
	scenes["bpf-inherited"] = func(string) fds { return fds{"map": 3} }
	scenes["bpf"] = func(string) fds {
		return fds{
			"hash":   must1(sys.BPFMapCreate(sys.BPFMapSpec{Type: unix.BPF_MAP_TYPE_HASH, KeySize: 4, ValueSize: 4, MaxEntries: 4})),
			"percpu": must1(sys.BPFMapCreate(sys.BPFMapSpec{Type: unix.BPF_MAP_TYPE_PERCPU_ARRAY, KeySize: 4, ValueSize: 4, MaxEntries: 4})),
			"large":  must1(sys.BPFMapCreate(sys.BPFMapSpec{Type: unix.BPF_MAP_TYPE_ARRAY, KeySize: 4, ValueSize: 1 << 16, MaxEntries: 1 << 10})),
			"node":   must1(sys.BPFMapCreate(sys.BPFMapSpec{Type: unix.BPF_MAP_TYPE_HASH, KeySize: 4, ValueSize: 4, MaxEntries: 4, Flags: 1 | 4})),
		}
	}
}

func TestBPFRefused(t *testing.T) {
	d := dumpAll(t, Options{}, start(t, "bpf"))
	wantProblem(t, d.problems, "BPF maps of type 6")
	wantProblem(t, d.problems, "more than 32 MiB")
	wantProblem(t, d.problems, "0x4 are not carried")
	if len(d.problems) != 3 {
		t.Errorf("%d problems, want 3", len(d.problems))
	}
}

// Two processes outside each other's tree must not share a map.
func TestBPFOutside(t *testing.T) {
	a := start(t, "bpf")
	pidfd, err := unix.PidfdOpen(a.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	fd, err := unix.PidfdGetfd(pidfd, a.fds["hash"], 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "map")
	defer func() { _ = f.Close() }()
	b := start(t, "bpf-inherited", f)
	d := dumpAll(t, Options{}, b)
	wantProblem(t, d.problems, "outside the tree, has the BPF map")
}

func TestBPFHostile(t *testing.T) {
	sound := func() (*image.Set, *bpfmap_file.BpfmapFileEntry, *bpfmap_data.BpfmapDataEntry) {
		s := image.NewSet()
		m := &bpfmap_data.BpfmapDataEntry{MapId: proto.Uint32(1), KeysBytes: proto.Uint32(8), ValuesBytes: proto.Uint32(16), Count: proto.Uint32(2)}
		s.Add(image.Entry{File: image.BpfmapDataFile, Magic: image.MagicBpfmapData, Msg: m, Extra: make([]byte, 24)})
		return s, &bpfmap_file.BpfmapFileEntry{MapId: proto.Uint32(1), MapType: proto.Uint32(1), KeySize: proto.Uint32(4),
			ValueSize: proto.Uint32(8), MaxEntries: proto.Uint32(2)}, m
	}
	try := func(s *image.Set, e *bpfmap_file.BpfmapFileEntry) error {
		r := &Restorer{set: s}
		if err := r.loadBPF(); err != nil {
			return err
		}
		return checkBPF(r, &description{entry: &fdinfo.FileEntry{Bpf: e}})
	}
	if s, e, _ := sound(); try(s, e) != nil {
		t.Fatalf("a sound map: %v", try(s, e))
	}
	for _, x := range []struct {
		want  string
		spoil func(*image.Set, *bpfmap_file.BpfmapFileEntry, *bpfmap_data.BpfmapDataEntry)
	}{
		{"does not have map 2", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.MapId = proto.Uint32(2)
		}},
		{"there twice", func(s *image.Set, _ *bpfmap_file.BpfmapFileEntry, m *bpfmap_data.BpfmapDataEntry) {
			s.Add(image.Entry{File: image.BpfmapDataFile, Msg: m, Extra: make([]byte, 24)})
		}},
		{"has 24 bytes", func(_ *image.Set, _ *bpfmap_file.BpfmapFileEntry, m *bpfmap_data.BpfmapDataEntry) {
			m.ValuesBytes = proto.Uint32(1 << 31)
		}},
		{"3 elements", func(_ *image.Set, _ *bpfmap_file.BpfmapFileEntry, m *bpfmap_data.BpfmapDataEntry) {
			m.Count = proto.Uint32(3)
		}},
		{"elements in", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.KeySize = proto.Uint32(8)
		}},
		{"of type 3", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.MapType = proto.Uint32(3)
		}},
		{"more than 32", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.MaxEntries = proto.Uint32(1 << 31)
		}},
		{"keys of", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.KeySize, e.ValueSize = proto.Uint32(1<<31), proto.Uint32(1<<31)
		}},
		{"name has 16", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.MapName = proto.String(strings.Repeat("x", 16))
		}},
		{"network device", func(_ *image.Set, e *bpfmap_file.BpfmapFileEntry, _ *bpfmap_data.BpfmapDataEntry) {
			e.Ifindex = proto.Uint32(1)
		}},
	} {
		s, e, m := sound()
		x.spoil(s, e, m)
		if err := try(s, e); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%v, want %q", err, x.want)
		}
	}
}
