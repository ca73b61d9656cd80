package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// kindBPF carries BPF maps that only the tree uses: arrays and hash tables, with
// their content. A map that a loaded program uses, or somebody outside, would come
// apart from it.
var kindBPF = &kind{
	name: "BPF map (array, hash)", typ: fdinfo.FdTypes_BPFMAP,
	takes:  func(_ *Dumper, o *object) bool { return o.link == bpfMapLink },
	dump:   dumpBPF,
	finish: finishBPF,
	check:  checkBPF,
	open:   openBPFs,
}

const (
	bpfMapLink = "anon_inode:bpf-map"
	maxBPFMap  = 32 << 20 // bytes of keys and values
	// Flags of a map that mean the same for a new one: BPF_F_NO_PREALLOC, _RDONLY,
	// _WRONLY, _ZERO_SEED, _RDONLY_PROG, _WRONLY_PROG, _MMAPABLE. Without the last, a
	// key and a value are as large as they say.
	bpfFlags    = 0x1 | unix.BPF_F_RDONLY | unix.BPF_F_WRONLY | 0x40 | 0x80 | 0x100 | 0x400
	maxBPFName  = 15
	maxBPFEntry = 1 << 20 // bytes of a key or a value
)

// bpfMapState is what the check of a whole map needs.
type bpfMapState struct{ id uint32 }

func dumpBPF(d *Dumper, o *object) error {
	m, err := sys.BPFMapInfoOf(int(o.file.Fd()))
	if err != nil {
		return err
	}
	o.link = fmt.Sprintf("%s (%s, id %d)", bpfMapLink, orNone(m.Name), m.ID)
	if reason := bpfRefusal(&m); reason != "" {
		d.refuse(o, reason, "let the program close it")
		return nil
	}
	progs, err := sys.BPFProgramsUsing(m.ID)
	if err != nil {
		return err
	}
	if len(progs) > 0 {
		d.refuse(o, fmt.Sprintf("the loaded BPF program %d uses the map", progs[0]), "unload the program")
		return nil
	}
	e := &bpfmap_file.BpfmapFileEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Pos: proto.Uint64(uint64(max(o.info.Pos, 0))), Fown: o.fown,
		MapType: proto.Uint32(m.Type), KeySize: proto.Uint32(m.KeySize), ValueSize: proto.Uint32(m.ValueSize), MapId: proto.Uint32(m.ID),
		MaxEntries: proto.Uint32(m.MaxEntries), MapFlags: proto.Uint32(m.Flags), Memlock: proto.Uint64(0), Frozen: proto.Bool(false),
		MapName: proto.String(m.Name), Ifindex: proto.Uint32(0), MntId: proto.Int32(int32(o.info.MntID)), MapExtra: proto.Uint64(m.Extra),
	}
	for _, kv := range o.info.Other {
		n, err := strconv.ParseUint(kv.Value, 0, 64)
		switch {
		case err != nil:
		case kv.Key == "memlock":
			e.Memlock = proto.Uint64(n)
		case kv.Key == "frozen":
			e.Frozen = proto.Bool(n != 0)
		}
	}
	if m.BTF != 0 {
		d.log.Warn("the type information (BTF) of a BPF map does not travel", "map", m.Name, "id", m.ID)
	}
	o.state = &bpfMapState{id: m.ID}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_BPFMAP.Enum(), Id: proto.Uint32(o.id), Bpf: e})
	return nil
}

func bpfRefusal(m *sys.BPFMapInfo) string {
	switch {
	case m.Type != unix.BPF_MAP_TYPE_HASH && m.Type != unix.BPF_MAP_TYPE_ARRAY:
		return fmt.Sprintf("BPF maps of type %d are not carried, only arrays and hash tables", m.Type)
	case m.Ifindex != 0:
		return "the BPF map is on a network device"
	case m.Flags&^bpfFlags != 0:
		return fmt.Sprintf("the BPF map has flags %#x, of which %#x are not carried", m.Flags, m.Flags&^bpfFlags)
	case uint64(m.MaxEntries)*uint64(m.KeySize+m.ValueSize) > maxBPFMap:
		return fmt.Sprintf("the BPF map has room for more than %d MiB", maxBPFMap>>20)
	}
	return ""
}

// finishBPF refuses what is not the tree's alone, and reads the rest.
func finishBPF(d *Dumper, os []*object) error {
	outside, err := d.outsideMaps()
	if err != nil {
		return err
	}
	done := map[uint32]bool{}
	for _, o := range os {
		s, ok := o.state.(*bpfMapState)
		if !ok || o.refused {
			continue
		}
		if x, ok := outside[s.id]; ok {
			d.refuse(o, fmt.Sprintf("process %d (%s), outside the tree, has the BPF map, too", x.pid, x.comm), "move a tree that has both")
			continue
		}
		if d.dry() || done[s.id] {
			continue
		}
		done[s.id] = true
		if err := d.emitBPF(o, s.id); err != nil {
			return fmt.Errorf("read BPF map %d: %w", s.id, err)
		}
	}
	return nil
}

// outsideMaps finds who outside the tree has which BPF map.
func (d *Dumper) outsideMaps() (map[uint32]outsider, error) {
	out := map[uint32]outsider{}
	pids, err := procfs.Pids()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if d.inside[pid] || pid == os.Getpid() || d.dry() && d.descends(pid) {
			continue
		}
		fds, err := procfs.Fds(pid)
		if err != nil {
			continue // ended, or not ours to see
		}
		for _, fd := range fds {
			if link, err := procfs.FdLink(pid, fd); err != nil || link != bpfMapLink {
				continue
			}
			info, err := procfs.ReadFdinfo(pid, fd)
			if err != nil {
				continue
			}
			for _, kv := range info.Other {
				if n, err := strconv.ParseUint(kv.Value, 10, 32); err == nil && kv.Key == "map_id" {
					comm, _ := procfs.Comm(pid)
					out[uint32(n)] = outsider{pid: pid, comm: comm, fd: fd}
				}
			}
		}
	}
	return out, nil
}

// emitBPF reads a map through a descriptor of its own: the program's may not be
// readable.
func (d *Dumper) emitBPF(o *object, id uint32) error {
	e := o.entries[0].GetBpf()
	fd, err := sys.BPFMapByID(id, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	keySize, valueSize := int(e.GetKeySize()), int(e.GetValueSize())
	var keys, values []byte
	var count uint32
	next := make([]byte, keySize)
	for key := []byte(nil); ; key = slices.Clone(next) {
		if err := sys.BPFMapNext(fd, key, next); errors.Is(err, unix.ENOENT) {
			break
		} else if err != nil {
			return err
		}
		value := make([]byte, valueSize)
		if err := sys.BPFMapLookup(fd, next, value); err != nil {
			return err
		}
		keys, values = append(keys, next...), append(values, value...)
		if count++; count > e.GetMaxEntries() {
			return errors.New("it has more elements than it has room for")
		}
	}
	return d.put(image.BpfmapDataFile, image.MagicBpfmapData, &bpfmap_data.BpfmapDataEntry{
		MapId: proto.Uint32(id), KeysBytes: proto.Uint32(uint32(len(keys))), ValuesBytes: proto.Uint32(uint32(len(values))), Count: proto.Uint32(count),
	}, append(keys, values...))
}

// bpfMap is a map being made again.
type bpfMap struct {
	msg          *bpfmap_data.BpfmapDataEntry
	keys, values []byte
	spec         sys.BPFMapSpec
	frozen       bool
	used         bool // by an entry
}

func (r *Restorer) loadBPF() error {
	r.bpf = map[uint32]*bpfMap{}
	for _, en := range r.set.Entries(image.BpfmapDataFile) {
		m, ok := en.Msg.(*bpfmap_data.BpfmapDataEntry)
		if !ok {
			return fmt.Errorf("image %s: an entry is a %T", image.BpfmapDataFile, en.Msg)
		}
		if r.bpf[m.GetMapId()] != nil {
			return fmt.Errorf("image %s: map %d is there twice", image.BpfmapDataFile, m.GetMapId())
		}
		if uint64(m.GetKeysBytes())+uint64(m.GetValuesBytes()) != uint64(len(en.Extra)) || len(en.Extra) > maxBPFMap {
			return fmt.Errorf("image %s: map %d has %d bytes", image.BpfmapDataFile, m.GetMapId(), len(en.Extra))
		}
		r.bpf[m.GetMapId()] = &bpfMap{msg: m, keys: en.Extra[:m.GetKeysBytes()], values: en.Extra[m.GetKeysBytes():]}
	}
	return nil
}

func checkBPF(r *Restorer, x *description) error {
	e := x.entry.GetBpf()
	spec := sys.BPFMapSpec{Type: e.GetMapType(), KeySize: e.GetKeySize(), ValueSize: e.GetValueSize(), MaxEntries: e.GetMaxEntries(),
		Flags: e.GetMapFlags(), Name: e.GetMapName(), Extra: e.GetMapExtra()}
	m := r.bpf[e.GetMapId()]
	switch {
	case m == nil:
		return fmt.Errorf("image %s does not have map %d", image.BpfmapDataFile, e.GetMapId())
	case m.used && (m.spec != spec || m.frozen != e.GetFrozen()):
		return fmt.Errorf("map %d is two different ones", e.GetMapId())
	case len(spec.Name) > maxBPFName:
		return fmt.Errorf("a map's name has %d bytes", len(spec.Name))
	case spec.KeySize > maxBPFEntry || spec.ValueSize > maxBPFEntry:
		return fmt.Errorf("a map with keys of %d bytes and values of %d", spec.KeySize, spec.ValueSize)
	}
	if reason := bpfRefusal(&sys.BPFMapInfo{Type: spec.Type, KeySize: spec.KeySize, ValueSize: spec.ValueSize, MaxEntries: spec.MaxEntries,
		Flags: spec.Flags, Ifindex: e.GetIfindex()}); reason != "" {
		return errors.New(reason)
	}
	n := uint64(m.msg.GetCount())
	if n > uint64(spec.MaxEntries) || n*uint64(spec.KeySize) != uint64(len(m.keys)) || n*uint64(spec.ValueSize) != uint64(len(m.values)) {
		return fmt.Errorf("map %d has %d elements in %d and %d bytes", e.GetMapId(), n, len(m.keys), len(m.values))
	}
	m.spec, m.frozen, m.used = spec, e.GetFrozen(), true
	return nil
}

// openBPFs makes each map once and opens it for every description that it had.
func openBPFs(r *Restorer, xs []*description) []error {
	made := map[uint32]uint32{} // ids of the new maps by those in the images
	var errs []error
	var keep []int // a map lives as long as one descriptor of it
	defer func() {
		for _, fd := range keep {
			_ = unix.Close(fd)
		}
	}()
	for _, x := range xs {
		e := x.entry.GetBpf()
		id, ok := made[e.GetMapId()]
		if !ok {
			fd, newID, err := r.bpf[e.GetMapId()].make()
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
				continue
			}
			keep = append(keep, fd)
			id, made[e.GetMapId()] = newID, newID
		}
		if err := openBPF(x, id); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
		}
	}
	return errs
}

// make creates and fills a map, and gives a descriptor of it and its id.
func (m *bpfMap) make() (fd int, id uint32, err error) {
	if fd, err = sys.BPFMapCreate(m.spec); err != nil {
		return -1, 0, err
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	info, err := sys.BPFMapInfoOf(fd)
	if err != nil {
		return -1, 0, err
	}
	// The flags of the map may not let the first descriptor write.
	rw, err := sys.BPFMapByID(info.ID, 0)
	if err != nil {
		return -1, 0, err
	}
	defer func() { _ = unix.Close(rw) }()
	k, v := int(m.spec.KeySize), int(m.spec.ValueSize)
	for i := range int(m.msg.GetCount()) {
		if err := sys.BPFMapUpdate(rw, m.keys[i*k:(i+1)*k], m.values[i*v:(i+1)*v]); err != nil {
			return -1, 0, err
		}
	}
	if m.frozen {
		if err := sys.BPFMapFreeze(rw); err != nil {
			return -1, 0, err
		}
	}
	return fd, info.ID, nil
}

func openBPF(x *description, id uint32) error {
	e := x.entry.GetBpf()
	var flags uint32
	switch e.GetFlags() & unix.O_ACCMODE {
	case unix.O_RDONLY:
		flags = unix.BPF_F_RDONLY
	case unix.O_WRONLY:
		flags = unix.BPF_F_WRONLY
	}
	fd, err := sys.BPFMapByID(id, flags)
	if err != nil {
		return err
	}
	x.file = os.NewFile(uintptr(fd), "BPF map")
	return setStatus(x.file, e.GetFlags())
}
