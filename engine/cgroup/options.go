package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"godwit/engine/sys"
)

// DumpOptions say what is recorded.
type DumpOptions struct {
	// Roots are the topmost groups, by hierarchy, that are recorded with all below
	// them; that of "*" is for all others. Without one it is the root task's.
	Roots map[string]string
	// Props are settings besides, or in place of, those that are carried anyway.
	Props []Spec
	// Controllers are the only hierarchies that are looked at; empty: all.
	Controllers []string
	// Yard is a directory that has the hierarchies mounted; empty: they are mounted here.
	Yard string
}

// Spec is about settings of one controller.
type Spec struct {
	Controller string
	Replace    bool // those of the controller that are carried anyway are not
	Names      []string
}

// dumps says whether a hierarchy is recorded.
func (o DumpOptions) dumps(name string) bool {
	if len(o.Controllers) == 0 {
		return true
	}
	return slices.ContainsFunc(o.Controllers, func(c string) bool {
		return c == name || slices.Contains(strings.Split(name, ","), c)
	})
}

// settings are the files that are read in a hierarchy. Version 2 has all controllers in one.
func (o DumpOptions) settings(name string) []string {
	out := settings
	for _, p := range o.Props {
		if name != "" && !slices.Contains(strings.Split(name, ","), p.Controller) {
			continue
		}
		out = slices.Clone(out)
		if p.Replace {
			out = slices.DeleteFunc(out, func(s string) bool { return strings.HasPrefix(s, p.Controller+".") })
		}
		for _, n := range p.Names {
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out
}

// top is the topmost group of a hierarchy that is recorded; at is the root task's.
func (o DumpOptions) top(name, at string) (string, error) {
	root, ok := o.Roots[name]
	if !ok {
		root, ok = o.Roots["*"]
	}
	if !ok {
		return at, nil
	}
	root = path.Clean("/" + root)
	if at != root && !strings.HasPrefix(at, strings.TrimSuffix(root, "/")+"/") {
		return "", fmt.Errorf("the root of the tree is in the cgroup %s of the hierarchy %q, which is not below %s (--cgroup-root)", at, name, root)
	}
	return root, nil
}

// safeProp matches settings that images may name: those of a controller, of which
// a group that images make can only restrict what is in it.
var safeProp = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[A-Za-z0-9_]+)+$`)

// carriable says whether a setting may be read and written again: nothing that moves,
// kills or stops tasks.
func carriable(name string) bool {
	if slices.Contains(settings, name) {
		return true
	}
	controller, _, _ := strings.Cut(name, ".")
	return safeProp.MatchString(name) && controller != "cgroup" && controller != "freezer"
}

// maxProps bounds the text of a specification, in bytes.
const maxProps = 1 << 20

// ParseProps reads a specification of settings, a simple form of YAML:
//
//	"cpu":
//	 - "strategy": "merge"
//	 - "properties": ["cpu.shares", "cpu.rt_period_us"]
func ParseProps(text string) (out []Spec, err error) {
	if len(text) > maxProps {
		return nil, fmt.Errorf("a specification of cgroup settings of %d bytes is too long", len(text))
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line == "---" || line == "..." || line[0] == '#' {
			continue
		}
		if err := propsLine(&out, line); err != nil {
			return nil, fmt.Errorf("specification of cgroup settings, line %d: %w", n, err)
		}
	}
	for _, p := range out {
		if len(p.Names) == 0 && !p.Replace {
			return nil, fmt.Errorf("specification of cgroup settings: %q has no properties", p.Controller)
		}
	}
	return out, nil
}

func propsLine(out *[]Spec, line string) error {
	item, isItem := strings.CutPrefix(line, "-")
	key, value, ok := strings.Cut(strings.TrimSpace(item), ":")
	key, kerr := unquote(key)
	value = strings.TrimSpace(value)
	switch {
	case !ok || kerr != nil:
		return fmt.Errorf("%q is not of the form \"NAME\": VALUE", line)
	case !isItem && value == "":
		if strings.ContainsAny(key, "/ ") || key == "" {
			return fmt.Errorf("%q is no name of a controller", key)
		}
		*out = append(*out, Spec{Controller: key})
		return nil
	case len(*out) == 0:
		return fmt.Errorf("%q comes before the name of a controller", line)
	}
	p := &(*out)[len(*out)-1]
	switch key {
	case "strategy":
		s, err := unquote(value)
		if err != nil || s != "merge" && s != "replace" {
			return fmt.Errorf("the strategy %s is neither \"merge\" nor \"replace\"", value)
		}
		p.Replace = s == "replace"
	case "properties":
		list, open := strings.CutPrefix(value, "[")
		list, closed := strings.CutSuffix(list, "]")
		if !open || !closed {
			return fmt.Errorf("%q is not of the form [\"NAME\", …]", value)
		}
		if strings.TrimSpace(list) == "" {
			return nil
		}
		for _, word := range strings.Split(list, ",") {
			name, err := unquote(word)
			if err != nil || !carriable(name) {
				return fmt.Errorf("%s is no setting of a cgroup that can be carried", strings.TrimSpace(word))
			}
			p.Names = append(p.Names, name)
		}
	default:
		return fmt.Errorf("%q is neither strategy nor properties", key)
	}
	return nil
}

func unquote(s string) (string, error) {
	s = strings.TrimSpace(s)
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' || strings.ContainsAny(s[1:len(s)-1], "\"\\") {
		return "", errors.New("no name in double quotes")
	}
	return s[1 : len(s)-1], nil
}

// open gives a directory with a hierarchy: one of the yard, or a mount of its own.
func open(yard, name string) (*os.File, error) {
	if yard == "" {
		return sys.MountCgroup(name)
	}
	names := []string{name, strings.TrimPrefix(name, "name=")}
	if name == "" {
		names = []string{"unified", "cgroup2"}
	}
	var last error
	for _, n := range names {
		f, err := os.Open(filepath.Join(yard, n))
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		last = err
	}
	return nil, fmt.Errorf("the yard has no directory of the cgroup hierarchy %q (--cgroup-yard): %w", name, last)
}
