package procfs

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
)

// MulticastGroup is a group that some socket of a network namespace, or the
// kernel itself, has joined on an interface.
type MulticastGroup struct {
	Index     uint32 // of the interface
	Interface string
	Group     netip.Addr
}

// ParseIGMP parses /proc/net/igmp: a line for each interface, and below it one
// for each of its groups.
func ParseIGMP(r io.Reader) ([]MulticastGroup, error) {
	var out []MulticastGroup
	var at MulticastGroup
	header := true
	err := eachLine(r, func(b []byte) error {
		line := string(b)
		if header {
			header = false
			return nil
		}
		word, rest := field(line)
		if !strings.HasPrefix(line, "\t") {
			if err := set(&at.Index, word, 10); err != nil {
				return fmt.Errorf("index: %w", err)
			}
			at.Interface, _ = field(rest)
			// Long names leave no space before the colon.
			at.Interface = strings.TrimSuffix(at.Interface, ":")
			return nil
		}
		if at.Interface == "" {
			return errors.New("a group of no interface")
		}
		n, err := number(word, 16, 32)
		if err != nil {
			return fmt.Errorf("group: %w", err)
		}
		var a [4]byte // the number is the address, in network order, as the host reads it
		binary.NativeEndian.PutUint32(a[:], uint32(n))
		g := at
		g.Group = netip.AddrFrom4(a)
		out = append(out, g)
		return nil
	})
	return out, err
}

// ParseIGMP6 parses /proc/net/igmp6.
func ParseIGMP6(r io.Reader) ([]MulticastGroup, error) {
	var out []MulticastGroup
	err := eachLine(r, func(b []byte) error {
		line := string(b)
		word, rest := field(line)
		var g MulticastGroup
		if err := set(&g.Index, word, 10); err != nil {
			return fmt.Errorf("index: %w", err)
		}
		g.Interface, rest = field(rest)
		word, _ = field(rest)
		a, err := hex.DecodeString(word)
		if err != nil || len(a) != 16 || g.Interface == "" {
			return fmt.Errorf("%q is no group", clip(word))
		}
		g.Group = netip.AddrFrom16([16]byte(a))
		out = append(out, g)
		return nil
	})
	return out, err
}

// MulticastGroups lists the groups of the calling thread's network namespace.
func MulticastGroups() ([]MulticastGroup, error) {
	var out []MulticastGroup
	for path, parse := range map[string]func(io.Reader) ([]MulticastGroup, error){
		"/proc/thread-self/net/igmp": ParseIGMP, "/proc/thread-self/net/igmp6": ParseIGMP6,
	} {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // a kernel without that protocol
		}
		if err != nil {
			return nil, err
		}
		gs, err := parse(f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", path, err)
		}
		out = append(out, gs...)
	}
	return out, nil
}
