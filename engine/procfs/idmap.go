package procfs

import (
	"fmt"
	"slices"
	"strings"
)

// IDExtent is a line of /proc/PID/uid_map: Count ids of a user namespace from Inner
// on are those from Outer on of whoever reads it (user_namespaces(7)).
type IDExtent struct{ Inner, Outer, Count uint32 }

// IDMap says who the users and groups of a user namespace are outside of it. That
// of nil is the same everywhere.
type IDMap struct{ UIDs, GIDs []IDExtent }

// MaxIDExtents is how many extents the kernel takes (UID_GID_MAP_MAX_EXTENTS).
const MaxIDExtents = 340

// overflow is what the kernel shows for an id that is not in the map
// (/proc/sys/kernel/overflowuid).
const overflow = 65534

// ReadIDMap reads the maps of the user namespace of a process.
func ReadIDMap(pid int) (*IDMap, error) {
	m := &IDMap{}
	for name, to := range map[string]*[]IDExtent{"uid_map": &m.UIDs, "gid_map": &m.GIDs} {
		b, err := ReadAll(Path(pid, name))
		if err != nil {
			return nil, err
		}
		if *to, err = ParseIDMap(b); err != nil {
			return nil, fmt.Errorf("%s of pid %d: %w", name, pid, err)
		}
	}
	return m, nil
}

// ParseIDMap parses a uid_map or gid_map.
func ParseIDMap(b []byte) ([]IDExtent, error) {
	var out []IDExtent
	for line := range strings.Lines(string(b)) {
		var e IDExtent
		fs := strings.Fields(line)
		if len(fs) != 3 {
			return nil, fmt.Errorf("%d words in line %d, want 3", len(fs), len(out)+1)
		}
		for i, to := range []*uint32{&e.Inner, &e.Outer, &e.Count} {
			if err := set(to, fs[i], 10); err != nil {
				return nil, fmt.Errorf("line %d: %w", len(out)+1, err)
			}
		}
		out = append(out, e)
	}
	return out, CheckIDMap(out)
}

// CheckIDMap wants extents that the kernel would take.
func CheckIDMap(es []IDExtent) error {
	if len(es) > MaxIDExtents {
		return fmt.Errorf("%d extents, at most %d", len(es), MaxIDExtents)
	}
	for i, e := range es {
		if e.Count == 0 || e.Inner+e.Count-1 < e.Inner || e.Outer+e.Count-1 < e.Outer {
			return fmt.Errorf("extent %d of %d ids from %d on is impossible", i+1, e.Count, e.Inner)
		}
	}
	return nil
}

func inner(es []IDExtent, id uint32) uint32 {
	for _, e := range es {
		if id >= e.Outer && id-e.Outer < e.Count {
			return e.Inner + (id - e.Outer)
		}
	}
	return overflow
}

// UID and GID give what an id outside is inside.
func (m *IDMap) UID(outer uint32) uint32 {
	if m == nil {
		return outer
	}
	return inner(m.UIDs, outer)
}

// GID is UID for groups.
func (m *IDMap) GID(outer uint32) uint32 {
	if m == nil {
		return outer
	}
	return inner(m.GIDs, outer)
}

// Groups is GID for many.
func (m *IDMap) Groups(outer []uint32) []uint32 {
	if m == nil {
		return outer
	}
	out := slices.Clone(outer)
	for i, g := range out {
		out[i] = m.GID(g)
	}
	return out
}

// Inside gives a status as somebody inside would read it.
func (m *IDMap) Inside(st Status) Status {
	if m == nil {
		return st
	}
	for i := range st.Uid {
		st.Uid[i], st.Gid[i] = m.UID(st.Uid[i]), m.GID(st.Gid[i])
	}
	st.Groups = m.Groups(st.Groups)
	return st
}
