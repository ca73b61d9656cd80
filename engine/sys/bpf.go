package sys

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BPFMapInfo is what is needed of struct bpf_map_info (include/uapi/linux/bpf.h).
type BPFMapInfo struct {
	Type, ID, KeySize, ValueSize, MaxEntries, Flags uint32
	Name                                            string
	Ifindex, BTF                                    uint32
	Extra                                           uint64
}

// BPFMapSpec is what a map is made from.
type BPFMapSpec struct {
	Type, KeySize, ValueSize, MaxEntries, Flags uint32
	Name                                        string
	Extra                                       uint64
}

// bpf makes one bpf(2) call. attr is the beginning of union bpf_attr; keep are
// what addresses in it point to.
func bpf(cmd int, name string, attr []byte, keep ...[]byte) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
		runtime.KeepAlive(keep)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR, unix.EAGAIN:
			continue
		}
		return 0, os.NewSyscallError("bpf "+name, e)
	}
}

func put32(b []byte, at int, n uint32) { binary.NativeEndian.PutUint32(b[at:], n) }
func put64(b []byte, at int, n uint64) { binary.NativeEndian.PutUint64(b[at:], n) }
func get32(b []byte, at int) uint32    { return binary.NativeEndian.Uint32(b[at:]) }
func get64(b []byte, at int) uint64    { return binary.NativeEndian.Uint64(b[at:]) }

func putBytes(b []byte, at int, p []byte) {
	put64(b, at, uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))))
}

// BPFMapInfoOf reads the properties of a map.
func BPFMapInfoOf(fd int) (BPFMapInfo, error) {
	info := make([]byte, 96)
	if err := bpfInfo(fd, info); err != nil {
		return BPFMapInfo{}, err
	}
	name, _, _ := bytes.Cut(info[24:40], []byte{0})
	return BPFMapInfo{
		Type: get32(info, 0), ID: get32(info, 4), KeySize: get32(info, 8), ValueSize: get32(info, 12), MaxEntries: get32(info, 16),
		Flags: get32(info, 20), Name: string(name), Ifindex: get32(info, 40), BTF: get32(info, 64), Extra: get64(info, 80),
	}, nil
}

func bpfInfo(fd int, info []byte, keep ...[]byte) error {
	attr := make([]byte, 16)
	put32(attr, 0, uint32(fd))
	put32(attr, 4, uint32(len(info)))
	putBytes(attr, 8, info)
	_, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, "OBJ_GET_INFO_BY_FD", attr, append(keep, info)...)
	return err
}

// BPFMapCreate makes a map.
func BPFMapCreate(m BPFMapSpec) (int, error) {
	attr := make([]byte, 72)
	for i, n := range []uint32{m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags} {
		put32(attr, 4*i, n)
	}
	copy(attr[28:43], m.Name)
	put64(attr, 64, m.Extra)
	return bpf(unix.BPF_MAP_CREATE, "MAP_CREATE", attr)
}

// BPFMapByID opens a map; flags are those of its file (BPF_F_RDONLY, BPF_F_WRONLY).
func BPFMapByID(id, flags uint32) (int, error) {
	attr := make([]byte, 12)
	put32(attr, 0, id)
	put32(attr, 8, flags)
	return bpf(unix.BPF_MAP_GET_FD_BY_ID, "MAP_GET_FD_BY_ID", attr)
}

// bpfElem does a command on one element: a is a key, b a value or the next key.
func bpfElem(fd, cmd int, name string, a, b []byte) error {
	attr := make([]byte, 32)
	put32(attr, 0, uint32(fd))
	putBytes(attr, 8, a)
	putBytes(attr, 16, b)
	_, err := bpf(cmd, name, attr, a, b)
	return err
}

// BPFMapNext gives the key after one, into next; ENOENT: there is none. key nil asks
// for the first.
func BPFMapNext(fd int, key, next []byte) error {
	return bpfElem(fd, unix.BPF_MAP_GET_NEXT_KEY, "MAP_GET_NEXT_KEY", key, next)
}

// BPFMapLookup reads the value of a key.
func BPFMapLookup(fd int, key, value []byte) error {
	return bpfElem(fd, unix.BPF_MAP_LOOKUP_ELEM, "MAP_LOOKUP_ELEM", key, value)
}

// BPFMapUpdate sets the value of a key.
func BPFMapUpdate(fd int, key, value []byte) error {
	return bpfElem(fd, unix.BPF_MAP_UPDATE_ELEM, "MAP_UPDATE_ELEM", key, value)
}

// BPFMapFreeze makes a map read-only for programs outside the kernel.
func BPFMapFreeze(fd int) error {
	attr := make([]byte, 4)
	put32(attr, 0, uint32(fd))
	_, err := bpf(unix.BPF_MAP_FREEZE, "MAP_FREEZE", attr)
	return err
}

// BPFProgramsUsing lists the ids of the loaded programs that use a map.
func BPFProgramsUsing(mapID uint32) ([]uint32, error) {
	var out []uint32
	for id := uint32(0); ; {
		attr := make([]byte, 12)
		put32(attr, 0, id)
		if _, err := bpf(unix.BPF_PROG_GET_NEXT_ID, "PROG_GET_NEXT_ID", attr); err != nil {
			if errors.Is(err, unix.ENOENT) {
				return out, nil
			}
			return nil, err
		}
		id = get32(attr, 4)
		ids, err := bpfMapsOf(id)
		if err != nil {
			return nil, err
		}
		for _, m := range ids {
			if m == mapID {
				out = append(out, id)
				break
			}
		}
	}
}

// bpfMapsOf lists the maps of a program; none of one that is gone.
func bpfMapsOf(prog uint32) ([]uint32, error) {
	attr := make([]byte, 12)
	put32(attr, 0, prog)
	fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, "PROG_GET_FD_BY_ID", attr)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	// struct bpf_prog_info: nr_map_ids at 52, their address at 56. The first call
	// tells how many there are.
	const nrAt, idsAt = 52, 56
	info := make([]byte, 64)
	if err := bpfInfo(fd, info); err != nil {
		return nil, err
	}
	n := get32(info, nrAt)
	if n == 0 {
		return nil, nil
	}
	ids := make([]byte, 4*n)
	info = make([]byte, 64)
	put32(info, nrAt, n)
	putBytes(info, idsAt, ids)
	if err := bpfInfo(fd, info, ids); err != nil {
		return nil, err
	}
	var out []uint32
	for i := range min(n, get32(info, nrAt)) {
		out = append(out, get32(ids, int(4*i)))
	}
	return out, nil
}
