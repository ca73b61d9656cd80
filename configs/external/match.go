package external

import (
	"fmt"
	"slices"
	"strings"
)

// Object is one object of a tree, as far as selectors look at it.
type Object struct {
	Key     string // empty: it has none, and cannot be external
	Kind    string
	Path    string // empty: it has none
	Holders []Holder
}

// Holder is a process that has an object.
type Holder struct {
	Pid   int
	Comm  string
	FDs   []int
	Roles []string
}

// name is the object for people.
func (o Object) name() string {
	var b strings.Builder
	if len(o.Holders) > 0 {
		h := o.Holders[0]
		fmt.Fprintf(&b, "pid %d (%s) ", h.Pid, h.Comm)
		if len(h.FDs) > 0 {
			fmt.Fprintf(&b, "fd %d ", h.FDs[0])
		} else if len(h.Roles) > 0 {
			b.WriteString(h.Roles[0] + " ")
		}
	}
	switch {
	case o.Path != "":
		b.WriteString(o.Path)
	case o.Key != "":
		b.WriteString(o.Key)
	default:
		b.WriteString(o.Kind)
	}
	return b.String()
}

// Rule is an entry and where it stands.
type Rule struct {
	Entry
	Origin string // "--external", "agent.toml:12:1"
	// Asked: somebody wants it for this tree, so that it must be for something
	// and must not contradict others that are asked for.
	Asked bool
}

func (r Rule) String() string { return r.Origin + " " + r.Entry.String() }

// Choice says which rule a key has.
type Choice struct {
	Key     string
	Rule    Rule
	Objects []int // with the key
}

// Problem is something that an entry asks for in vain.
type Problem struct {
	Object int    // index, -1: none
	Rule   string // origin and text
	Reason string
	Hint   string
}

// Match finds the rule of each key, in the order of the objects: the first that is
// for one of those with the key. Rules that were asked for come first and must
// not differ. serves, if not nil, says why a resolver cannot serve an object: for
// a rule that nobody asked for it then counts as not there.
func Match(objects []Object, rules []Rule, serves func(object int, e Entry) error) ([]Choice, []Problem) {
	m := &matcher{objects: objects, byKey: map[string][]int{}, serves: serves}
	for i, o := range objects {
		if o.Key == "" {
			continue
		}
		if m.byKey[o.Key] == nil {
			m.keys = append(m.keys, o.Key)
		}
		m.byKey[o.Key] = append(m.byKey[o.Key], i)
	}
	chosen := map[string]Rule{}
	for _, asked := range []bool{true, false} {
		for _, r := range rules {
			if r.Asked != asked {
				continue
			}
			for _, key := range m.matched(r) {
				m.choose(chosen, key, r)
			}
		}
	}
	var out []Choice
	for _, key := range m.keys {
		if r, ok := chosen[key]; ok {
			out = append(out, Choice{Key: key, Rule: r, Objects: m.byKey[key]})
		}
	}
	return out, m.problems
}

type matcher struct {
	objects  []Object
	keys     []string
	byKey    map[string][]int
	serves   func(int, Entry) error
	problems []Problem
}

func (m *matcher) problem(object int, r Rule, reason, hint string) {
	m.problems = append(m.problems, Problem{Object: object, Rule: r.String(), Reason: reason, Hint: hint})
}

func (m *matcher) choose(chosen map[string]Rule, key string, r Rule) {
	old, taken := chosen[key]
	if taken && old.Resolver != "" || taken && r.Resolver == "" {
		if r.Asked && r.Resolver != "" && old.Outcome() != r.Outcome() {
			m.problem(m.byKey[key][0], r, fmt.Sprintf("two entries say different things of it: %s and %s", old.Entry, r.Entry), "keep one of them")
		}
		return
	}
	if m.serves != nil && r.Resolver != "" {
		for _, i := range m.byKey[key] {
			if err := m.serves(i, r.Entry); err != nil {
				if r.Asked {
					m.problem(i, r, err.Error(), "")
				}
				return
			}
		}
	}
	chosen[key] = r
}

// matched are the keys that a rule is for. What was asked for and leads to
// nothing is a problem.
func (m *matcher) matched(r Rule) []string {
	hits := m.hits(r.Selector)
	if len(hits) == 0 {
		if r.Asked {
			m.problem(-1, r, "nothing that the tree holds matches "+r.Selector.text, m.nearest(r.Selector))
		}
		return nil
	}
	var keys []string
	keyless := -1
	for _, i := range hits {
		switch k := m.objects[i].Key; {
		case k == "":
			keyless = i
		case !slices.Contains(keys, k):
			keys = append(keys, k)
		}
	}
	if !r.Asked {
		return keys
	}
	if s := r.Selector; s.by == byFD && s.pid == 0 && (len(keys) > 1 || len(hits) > 1 && keyless >= 0) {
		var which []string
		for _, i := range hits {
			for _, h := range m.objects[i].Holders {
				if slices.Contains(h.FDs, s.fd) {
					which = append(which, fmt.Sprintf("fd:%d:%d (%s)", h.Pid, s.fd, m.objects[i].name()))
				}
			}
		}
		m.problem(-1, r, fmt.Sprintf("several processes have a descriptor %d, for different objects", s.fd), "say which: "+list(which, 6))
		return nil
	}
	if keyless >= 0 && len(keys) == 0 && r.Resolver != Image {
		m.problem(keyless, r, "it is of kind "+m.objects[keyless].Kind+", which is never external", "it travels with the image")
	}
	return keys
}

// hits are the objects that a selector names.
func (m *matcher) hits(s Selector) []int {
	if s.by == byKey {
		for _, k := range s.keys {
			if hits := m.byKey[k]; len(hits) > 0 {
				return hits
			}
		}
		return nil
	}
	var hits []int
	for i, o := range m.objects {
		if s.names(o) {
			hits = append(hits, i)
		}
	}
	return hits
}

// Matches says whether the object is one that the selector names.
func (s Selector) Matches(o Object) bool {
	if s.by == byKey {
		return slices.Contains(s.keys, o.Key)
	}
	return s.names(o)
}

// names says whether the object is one that the selector names; not of keys.
func (s Selector) names(o Object) bool {
	switch s.by {
	case byFD:
		return slices.ContainsFunc(o.Holders, func(h Holder) bool {
			return (s.pid == 0 || s.pid == h.Pid) && slices.Contains(h.FDs, s.fd)
		})
	case byRole:
		return slices.ContainsFunc(o.Holders, func(h Holder) bool { return slices.Contains(h.Roles, s.word) })
	case byPath:
		return strings.HasPrefix(o.Path, "/") && matchGlob(s.glob, strings.Split(o.Path[1:], "/"))
	}
	return isKind(s.word, o.Kind)
}

// nearest names what was probably meant.
func (m *matcher) nearest(s Selector) string {
	var have []string
	at := map[string]string{}
	add := func(text string, o Object) {
		if at[text] == "" {
			have = append(have, text)
			at[text] = o.name()
		}
	}
	for _, o := range m.objects {
		switch s.by {
		case byKey:
			if o.Key != "" {
				add(o.Key, o)
			}
		case byFD:
			for _, h := range o.Holders {
				for _, n := range h.FDs {
					add(fmt.Sprintf("fd:%d:%d", h.Pid, n), o)
				}
			}
		case byPath:
			if o.Path != "" {
				add("path:"+o.Path, o)
			}
		case byKind:
			add("kind:"+o.Kind, o)
		}
	}
	have = have[:min(len(have), 10000)]
	want := s.text
	if s.by == byKey {
		want = s.keys[0]
	}
	var near []string
	for _, text := range closest(want, have, 3) {
		near = append(near, fmt.Sprintf("%s (%s)", text, at[text]))
	}
	if len(near) == 0 {
		return ""
	}
	return "nearest: " + strings.Join(near, ", ")
}

func list(all []string, most int) string {
	if len(all) > most {
		return strings.Join(all[:most], ", ") + fmt.Sprintf(" and %d more", len(all)-most)
	}
	return strings.Join(all, ", ")
}

// closest picks the candidates that look most like what was asked for.
func closest(want string, have []string, most int) []string {
	have = slices.Clone(have)
	slices.Sort(have)
	have = slices.Compact(have)
	dist := make(map[string]int, len(have))
	for _, h := range have {
		dist[h] = Distance(want, h)
	}
	slices.SortStableFunc(have, func(a, b string) int { return dist[a] - dist[b] })
	return have[:min(most, len(have))]
}

// didYouMean suggests a name that is not far from what was given.
func didYouMean(given string, names []string) string {
	near := closest(given, names, 1)
	if len(near) == 0 || Distance(given, near[0]) > len(near[0])/3+1 {
		return ""
	}
	return "; did you mean " + near[0] + "?"
}

// Distance is Levenshtein's, of the first 128 bytes.
func Distance(a, b string) int {
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
				cost = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
