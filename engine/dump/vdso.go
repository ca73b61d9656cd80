package dump

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"os"
	"sync"

	"godwit/engine/procfs"
)

// VdsoIdentity names the layout of this kernel's [vdso] and [vvar]: a program
// holds addresses inside them, so that source and destination must agree. It
// hashes the build id, the symbols with their addresses and the sizes, not the
// code, which the kernel patches for the CPU.
var VdsoIdentity = sync.OnceValues(func() (string, error) {
	maps, err := procfs.ReadMaps(os.Getpid())
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, m := range maps {
		switch m.Path {
		case "[vvar]", "[vvar_vclock]":
			_, _ = fmt.Fprintf(h, "%s %d\n", m.Path, m.Len())
		case "[vdso]":
			_, _ = fmt.Fprintf(h, "%s %d\n", m.Path, m.Len())
			b, err := readSelf(m.Start, m.Len())
			if err != nil {
				return "", fmt.Errorf("read [vdso]: %w", err)
			}
			f, err := elf.NewFile(bytes.NewReader(b))
			if err != nil {
				return "", fmt.Errorf("read [vdso]: %w", err)
			}
			if s := f.Section(".note"); s != nil {
				if note, err := s.Data(); err == nil {
					h.Write(note)
				}
			}
			syms, err := f.DynamicSymbols()
			if err != nil {
				return "", fmt.Errorf("read symbols of [vdso]: %w", err)
			}
			for _, s := range syms {
				_, _ = fmt.Fprintf(h, "%s %x %x\n", s.Name, s.Value, s.Size)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
})

func readSelf(addr, n uint64) ([]byte, error) {
	f, err := os.Open("/proc/self/mem")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, n)
	_, err = f.ReadAt(b, int64(addr))
	return b, err
}
