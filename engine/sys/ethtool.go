package sys

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of SIOCETHTOOL (include/uapi/linux/ethtool.h).
const (
	ethtoolStrings  = 0x1b
	ethtoolSetInfo  = 0x37
	ethtoolFeatures = 0x3a
	ethFeatureNames = 4 // ETH_SS_FEATURES
	maxFeatures     = 1024
)

// ifreqData is struct ifreq with a pointer.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

func ethtool(fd int, name string, b []byte) error {
	r := ifreqData{data: unsafe.Pointer(&b[0])}
	copy(r.name[:unix.IFNAMSIZ-1], name)
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r)))
	runtime.KeepAlive(b)
	if e != 0 {
		return os.NewSyscallError("ioctl SIOCETHTOOL", e)
	}
	return nil
}

// NetFeatures tells which features a network interface makes use of, by the names
// that ethtool(8) has for them. fd is any socket.
func NetFeatures(fd int, name string) (map[string]bool, error) {
	ne := binary.NativeEndian
	info := make([]byte, 20) // struct ethtool_sset_info with one number
	ne.PutUint32(info, ethtoolSetInfo)
	ne.PutUint64(info[8:], 1<<ethFeatureNames)
	if err := ethtool(fd, name, info); err != nil {
		return nil, err
	}
	n := int(ne.Uint32(info[16:]))
	if n > maxFeatures {
		return nil, fmt.Errorf("interface %s has %d features", name, n)
	}
	names := make([]byte, 12+32*n) // struct ethtool_gstrings
	ne.PutUint32(names, ethtoolStrings)
	ne.PutUint32(names[4:], ethFeatureNames)
	ne.PutUint32(names[8:], uint32(n))
	if err := ethtool(fd, name, names); err != nil {
		return nil, err
	}
	blocks := (n + 31) / 32
	words := make([]byte, 8+16*blocks) // struct ethtool_gfeatures
	ne.PutUint32(words, ethtoolFeatures)
	ne.PutUint32(words[4:], uint32(blocks))
	if err := ethtool(fd, name, words); err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for i := range n {
		text, _, _ := bytes.Cut(names[12+32*i:12+32*i+32], []byte{0})
		active := ne.Uint32(words[8+16*(i/32)+8:])
		out[string(text)] = active>>(i%32)&1 != 0
	}
	return out, nil
}

// TunFilterLen tells how many instructions the filter of a TAP interface has
// (TUNATTACHFILTER). Where they are is an address of the program that attached it.
func TunFilterLen(fd int) (int, error) {
	var prog unix.SockFprog
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETFILTER, uintptr(unsafe.Pointer(&prog))); e != 0 {
		return 0, os.NewSyscallError("ioctl TUNGETFILTER", e)
	}
	return int(prog.Len), nil
}
