package procfs

//lint:file-ignore ST1003 the fields have the names of the keys in /proc

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

// Mapping is one line of /proc/PID/maps.
type Mapping struct {
	Start, End                uint64
	Read, Write, Exec, Shared bool
	Offset                    uint64 // bytes into the file
	Major, Minor              uint32
	Inode                     uint64 // 0: not backed by an inode
	// Path is the path as the process's root has it, or a name such as
	// "[heap]", "[anon:x]", "anon_inode:…", "" for anonymous memory. Escaped
	// newlines are undone; a name that holds the text \012 itself looks the
	// same, so that whoever must be sure compares with map_files. The suffix
	// " (deleted)" is taken off into Deleted, with the same ambiguity.
	Path    string
	Deleted bool
}

// Len is the size in bytes.
func (m *Mapping) Len() uint64 { return m.End - m.Start }

// Perms gives the permissions as the kernel prints them, such as "rw-p".
func (m *Mapping) Perms() string {
	b := []byte("---p")
	if m.Read {
		b[0] = 'r'
	}
	if m.Write {
		b[1] = 'w'
	}
	if m.Exec {
		b[2] = 'x'
	}
	if m.Shared {
		b[3] = 's'
	}
	return string(b)
}

// Prot gives the permissions as PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4.
func (m *Mapping) Prot() uint32 {
	var p uint32
	if m.Read {
		p |= 1
	}
	if m.Write {
		p |= 2
	}
	if m.Exec {
		p |= 4
	}
	return p
}

func (m Mapping) String() string {
	s := fmt.Sprintf("%x-%x %s", m.Start, m.End, m.Perms())
	if m.Path != "" {
		s += " " + m.Path
	}
	if m.Deleted {
		s += " (deleted)"
	}
	return s
}

const deletedSuffix = " (deleted)"

// ParseMapping parses one line of maps.
func ParseMapping(line string) (Mapping, error) {
	var m Mapping
	rng, rest := field(line)
	start, end, ok := strings.Cut(rng, "-")
	if !ok {
		return Mapping{}, fmt.Errorf("%q is no address range", clip(rng))
	}
	if err := errors.Join(set(&m.Start, start, 16), set(&m.End, end, 16)); err != nil {
		return Mapping{}, fmt.Errorf("address range: %w", err)
	}
	if m.End <= m.Start {
		return Mapping{}, fmt.Errorf("%q is an empty address range", clip(rng))
	}
	perms, rest := field(rest)
	if len(perms) != 4 || !oneOf(perms[0], 'r') || !oneOf(perms[1], 'w') || !oneOf(perms[2], 'x') ||
		(perms[3] != 'p' && perms[3] != 's') {
		return Mapping{}, fmt.Errorf("%q are no permissions", clip(perms))
	}
	m.Read, m.Write, m.Exec, m.Shared = perms[0] == 'r', perms[1] == 'w', perms[2] == 'x', perms[3] == 's'
	off, rest := field(rest)
	dev, rest := field(rest)
	ino, rest := field(rest)
	if err := set(&m.Offset, off, 16); err != nil {
		return Mapping{}, fmt.Errorf("offset: %w", err)
	}
	var err error
	if m.Major, m.Minor, err = device(dev); err != nil {
		return Mapping{}, err
	}
	if err := set(&m.Inode, ino, 10); err != nil {
		return Mapping{}, fmt.Errorf("inode: %w", err)
	}
	// A path begins with a slash, a bracket or a letter, never with a space.
	path := strings.TrimLeft(rest, " ")
	// Only a file can have been deleted: "[anon:x (deleted)" cannot. The inode
	// does not tell: the first System V segment has number 0.
	if strings.HasPrefix(path, "/") && strings.HasSuffix(path, deletedSuffix) {
		m.Deleted = true
		path = strings.TrimSuffix(path, deletedSuffix)
	}
	m.Path = unescape(path, "\n")
	return m, nil
}

func oneOf(c, want byte) bool { return c == want || c == '-' }

// device parses "fe:01", both hexadecimal.
func device(s string) (major, minor uint32, err error) {
	a, b, ok := strings.Cut(s, ":")
	if !ok {
		return 0, 0, fmt.Errorf("%q is no device", clip(s))
	}
	if err := errors.Join(set(&major, a, 16), set(&minor, b, 16)); err != nil {
		return 0, 0, fmt.Errorf("device: %w", err)
	}
	return major, minor, nil
}

// ParseMaps parses a maps file.
func ParseMaps(r io.Reader) ([]Mapping, error) {
	var out []Mapping
	err := eachLine(r, func(line []byte) error {
		m, err := ParseMapping(string(line))
		if err != nil {
			return err
		}
		out = append(out, m)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// ReadMaps reads /proc/PID/maps; a zombie has none. Unless the process is
// stopped, it may change while it is read.
func ReadMaps(pid int) ([]Mapping, error) { return stream(Path(pid, "maps"), ParseMaps) }

// SmapsEntry is one mapping of /proc/PID/smaps. Amounts are bytes.
type SmapsEntry struct {
	Mapping
	KernelPageSize uint64
	Rss            uint64
	PrivateDirty   uint64
	Elsewhere      uint64 // resident and mapped elsewhere, too
	Anonymous      uint64
	Swap           uint64
	Locked         uint64
	AnonHugePages  uint64
	// VmFlags are the two-letter mnemonics of fs/proc/task_mmu.c
	// show_smap_vma_flags, such as "rd", "wr", "gd" (grows down), "gu" (guard).
	VmFlags     []string
	ProtKey     uint32
	THPEligible bool
}

// Has reports whether flag is among VmFlags.
func (e *SmapsEntry) Has(flag string) bool {
	for _, f := range e.VmFlags {
		if f == flag {
			return true
		}
	}
	return false
}

// ParseSmaps parses a smaps file.
func ParseSmaps(r io.Reader) ([]SmapsEntry, error) {
	var out []SmapsEntry
	// The few mnemonics come again and again: one string each.
	flags := map[string]string{}
	err := eachLine(r, func(b []byte) error {
		// A key starts with a capital letter, an address never does.
		if len(b) == 0 || b[0] < 'A' || b[0] > 'Z' {
			m, err := ParseMapping(string(b))
			if err != nil {
				return err
			}
			out = append(out, SmapsEntry{Mapping: m})
			return nil
		}
		if len(out) == 0 {
			return errors.New("amount before the first mapping")
		}
		e := &out[len(out)-1]
		i := 0
		for i < len(b) && b[i] != ':' {
			i++
		}
		if i == len(b) {
			return fmt.Errorf("%q has no colon", clip(string(b)))
		}
		val := b[i+1:]
		var err error
		switch string(b[:i]) {
		case "KernelPageSize":
			e.KernelPageSize, err = kibBytes(val)
		case "Rss":
			e.Rss, err = kibBytes(val)
		case "Private_Dirty":
			e.PrivateDirty, err = kibBytes(val)
		case "Shared_Clean", "Shared_Dirty":
			var n uint64
			n, err = kibBytes(val)
			e.Elsewhere += n
		case "Anonymous":
			e.Anonymous, err = kibBytes(val)
		case "Swap":
			e.Swap, err = kibBytes(val)
		case "Locked":
			e.Locked, err = kibBytes(val)
		case "AnonHugePages":
			e.AnonHugePages, err = kibBytes(val)
		case "THPeligible":
			err = flag(&e.THPEligible, strings.TrimSpace(string(val)))
		case "ProtectionKey":
			err = set(&e.ProtKey, strings.TrimSpace(string(val)), 10)
		case "VmFlags":
			for len(val) > 0 {
				for len(val) > 0 && val[0] == ' ' {
					val = val[1:]
				}
				n := 0
				for n < len(val) && val[n] != ' ' {
					n++
				}
				if n > 0 {
					f, ok := flags[string(val[:n])]
					if !ok {
						f = string(val[:n])
						flags[f] = f
					}
					e.VmFlags = append(e.VmFlags, f)
				}
				val = val[n:]
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", clip(string(b[:i])), err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// kibBytes parses "   12 kB" without making a string: a smaps file has 20
// such lines a mapping.
func kibBytes(b []byte) (uint64, error) {
	i := 0
	for i < len(b) && (b[i] == ' ' || b[i] == '\t') {
		i++
	}
	var n uint64
	first := i
	for ; i < len(b) && b[i] >= '0' && b[i] <= '9'; i++ {
		if n > math.MaxUint64>>14 { // ten times and kB fit
			return 0, fmt.Errorf("%q is too large", clip(string(b)))
		}
		n = n*10 + uint64(b[i]-'0')
	}
	if i == first || string(b[i:]) != " kB" {
		return 0, fmt.Errorf("%q is no amount in kB", clip(string(b)))
	}
	return n << 10, nil
}

// ReadSmaps reads /proc/PID/smaps, which costs the kernel 11–20 ms a resident
// GiB. A zombie has none.
func ReadSmaps(pid int) ([]SmapsEntry, error) { return stream(Path(pid, "smaps"), ParseSmaps) }
