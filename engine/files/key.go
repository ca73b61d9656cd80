package files

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Key names a file by the mount through which it was opened and its inode:
// CRIU's "file[mnt:ino]", both lower-case hexadecimal.
type Key struct {
	Mnt uint64
	Ino uint64
}

// String gives the canonical form, the one that images hold.
func (k Key) String() string { return fmt.Sprintf("file[%x:%x]", k.Mnt, k.Ino) }

// ParseKey parses an external key. The canonical form is hexadecimal without a
// prefix; "0x" and upper case are understood too. A key of decimal digits only
// has two readings, hexadecimal first. The error of a key of another kind says
// that it cannot be had.
func ParseKey(s string) ([]Key, error) {
	in, ok := strings.CutPrefix(s, "file[")
	if !ok {
		if k, _, ok := strings.Cut(s, "["); ok && slices.Contains([]string{"unix", "net", "mnt", "dev", "pid"}, k) {
			return nil, fmt.Errorf("external key %q: keys of kind %s are not carried, only file[mnt:ino] and tty[rdev:dev]", s, k)
		}
		if _, ok, err := parseTTYKey(s); ok {
			if err == nil {
				err = fmt.Errorf("external key %q names a terminal, not a file", s)
			}
			return nil, err
		}
		return nil, fmt.Errorf("external key %q is not of the form file[mnt:ino], both hexadecimal, such as file[72:a3e7]", s)
	}
	in, ok = strings.CutSuffix(in, "]")
	mnt, ino, ok2 := strings.Cut(in, ":")
	if !ok || !ok2 {
		return nil, fmt.Errorf("external key %q is not of the form file[mnt:ino], both hexadecimal, such as file[72:a3e7]", s)
	}
	m, md, err := keyNumber(mnt)
	if err != nil {
		return nil, fmt.Errorf("external key %q: mount id %w", s, err)
	}
	i, id, err := keyNumber(ino)
	if err != nil {
		return nil, fmt.Errorf("external key %q: inode %w", s, err)
	}
	out := []Key{{Mnt: m, Ino: i}}
	if md != nil && id != nil {
		if dec := (Key{Mnt: *md, Ino: *id}); dec != out[0] {
			out = append(out, dec)
		}
	}
	return out, nil
}

// keyNumber reads one number of a key as hexadecimal and, where that is
// possible too, as decimal.
func keyNumber(s string) (hex uint64, dec *uint64, err error) {
	digits, prefixed := strings.CutPrefix(strings.ToLower(s), "0x")
	if digits == "" || strings.ContainsAny(digits, "+-_ ") {
		return 0, nil, fmt.Errorf("%q is not a hexadecimal number", s)
	}
	hex, err = strconv.ParseUint(digits, 16, 64)
	if err != nil {
		return 0, nil, fmt.Errorf("%q is not a hexadecimal number of at most 64 bits", s)
	}
	if n, err := strconv.ParseUint(digits, 10, 64); err == nil && !prefixed {
		dec = &n
	}
	return hex, dec, nil
}

// nearest picks at most three of the candidates that look most like what was
// asked for.
func nearest(want string, have []string) []string {
	have = slices.Clone(have)
	slices.Sort(have)
	have = slices.Compact(have)
	dist := make(map[string]int, len(have))
	for _, h := range have {
		dist[h] = distance(want, h)
	}
	slices.SortStableFunc(have, func(a, b string) int { return dist[a] - dist[b] })
	return have[:min(3, len(have))]
}

// distance is the edit distance of two texts, of which only the first 128 bytes count.
func distance(a, b string) int {
	a, b = a[:min(len(a), 128)], b[:min(len(b), 128)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return row[len(b)]
}
