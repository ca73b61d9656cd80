// Package external owns the entries by which people say what becomes of the open
// files of a tree that moves: their grammar, and which object which entry is for.
// It must not know how an object is found or replaced.
//
// An entry is
//
//	SELECTOR[=RESOLVER[:ARGUMENT][,OPTION[=VALUE]…]]
//
// Selectors:
//
//	file[MNT:INO], tty[RDEV:DEV]          CRIU's keys, hexadecimal
//	unix[INO], pipe[INO], socket[INO]     keys of what has no name, decimal
//	fd:PID:N, fd:N                        a descriptor; without a pid it must be the only one
//	role:stdin, role:stdout, role:stderr  descriptors 0, 1 and 2 of every process
//	path:GLOB                             *, ? and [] within a directory, ** across them
//	kind:KIND                             regular, fifo, pipe, tty, unix, tcp and so on
//
// Without a resolver the object is declared external, and what the destination
// has for it decides. A backslash takes the meaning from "=" in selectors, and
// from "," in arguments. In paths {base}, {dir}, {path} and {rest} are parts of the
// path at the source; a { is written {{.
package external

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// maxEntry bounds the text of an entry, in bytes.
const maxEntry = 16 << 10

// Names of resolvers.
const (
	Inherit  = "inherit"  // what was handed to the destination's agent
	Provide  = "provide"  // the same, by "godwit-agent provide"
	Path     = "path"     // the file at a path of the destination
	Create   = "create"   // an empty file or fifo that is made there
	Carry    = "carry"    // the file's content travels, too
	Journal  = "journal"  // a stream to the destination's journald
	Null     = "null"     // /dev/null
	Proxy    = "proxy"    // bytes go on flowing from and to the source
	Terminal = "terminal" // the terminal of whoever asked for the migration
	Image    = "image"    // as without any entry
)

// Values of options.
const (
	Same     = "same"
	Any      = "any"
	GrowOK   = "grow-ok"
	Truncate = "truncate"
)

// Entry is one entry.
type Entry struct {
	Selector Selector
	Resolver string // empty: only declared external
	Argument string
	Options
}

// Options of an entry; what is zero is the resolver's default.
type Options struct {
	Forward   bool   // the description as it is in place of a reopened one
	Size      string // Same, GrowOK, Any or Truncate: how it may differ from the recorded one
	Mode      string // Same or Any: permissions
	Content   string // Any: a mapped program or library may be another one
	Overwrite bool   // also what is newer at the destination
	Limit     uint64 // bytes
}

// rules of a resolver: whether it takes an argument, and which options.
type form struct {
	argument bool
	needed   bool // the argument
	isPath   bool
	options  []string
}

var forms = map[string]form{
	Inherit:  {argument: true, options: []string{"forward", "size", "mode", "content"}},
	Provide:  {argument: true, options: []string{"forward", "size", "mode", "content"}},
	Path:     {argument: true, needed: true, isPath: true, options: []string{"forward", "size", "mode", "content"}},
	Create:   {argument: true, isPath: true, options: []string{"overwrite", "size"}},
	Carry:    {argument: true, isPath: true, options: []string{"overwrite", "limit"}},
	Journal:  {argument: true},
	Null:     {},
	Proxy:    {},
	Terminal: {},
	Image:    {options: []string{"size", "mode"}},
}

// Declares says whether what has a resolver is external: the destination provides
// it. "" is declared, too.
func Declares(resolver string) bool { return resolver != Image && resolver != Carry }

// Resolvers are the names of all, sorted.
func Resolvers() []string {
	var names []string
	for n := range forms {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

var optionValues = map[string][]string{
	"size":    {Same, GrowOK, Any, Truncate},
	"mode":    {Same, Any},
	"content": {Any},
}

// Parse reads an entry.
func Parse(s string) (Entry, error) {
	e, err := parse(s)
	if err != nil {
		return Entry{}, fmt.Errorf("entry %q: %w", clip(s), err)
	}
	return e, nil
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

func parse(s string) (e Entry, err error) {
	if len(s) > maxEntry {
		return e, fmt.Errorf("it has %d bytes, more than %d", len(s), maxEntry)
	}
	selector, rest, has := cut(s, '=')
	if e.Selector, err = ParseSelector(selector); err != nil || !has {
		return e, err
	}
	head, options, _ := cut(rest, ',')
	name, argument, hasArgument := strings.Cut(head, ":")
	e.Resolver = name
	if e.Argument, err = unescape(argument); err != nil {
		return e, err
	}
	if hasArgument && argument == "" {
		return e, errors.New("nothing follows the colon")
	}
	for more := options != "" || strings.HasSuffix(rest, ","); more; {
		var o string
		o, options, more = cut(options, ',')
		name, value, has := strings.Cut(o, "=")
		if err := e.set(name, value, has); err != nil {
			return e, err
		}
	}
	return e, e.Check()
}

// set sets one option of the text.
func (e *Entry) set(name, value string, has bool) error {
	switch name {
	case "forward", "overwrite":
		if has {
			return fmt.Errorf("option %s takes no value", name)
		}
		if name == "forward" {
			e.Forward = true
		} else {
			e.Overwrite = true
		}
		return nil
	case "size", "mode", "content":
		if err := checkOption(name, value); err != nil {
			return err
		}
		*map[string]*string{"size": &e.Size, "mode": &e.Mode, "content": &e.Content}[name] = value
		return nil
	case "limit":
		n, err := parseSize(value)
		if err != nil {
			return fmt.Errorf("limit=%q: %w", clip(value), err)
		}
		e.Limit = n
		return nil
	}
	return fmt.Errorf("unknown option %q%s", clip(name), didYouMean(name, []string{"forward", "overwrite", "size", "mode", "content", "limit"}))
}

var sizeUnits = []struct {
	name string
	n    uint64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"B", 1}, {"", 1}}

// parseSize reads a number of bytes above zero, with a unit or without.
func parseSize(s string) (uint64, error) {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(digits), 10, 64)
		if err != nil || n == 0 || n > 1<<62/u.n {
			break
		}
		return n * u.n, nil
	}
	return 0, errors.New("want a size such as 64MiB")
}

// Check says whether the resolver exists and takes what the entry gives it.
func (e Entry) Check() error {
	_, err := e.Fault()
	return err
}

// Fault is what Check finds, and which part of the entry it is about:
// "resolver", "argument" or the name of an option.
func (e Entry) Fault() (part string, _ error) {
	f, ok := forms[e.Resolver]
	if !ok {
		return "resolver", fmt.Errorf("unknown resolver %q%s; there are %s", clip(e.Resolver), didYouMean(e.Resolver, Resolvers()), strings.Join(Resolvers(), ", "))
	}
	switch {
	case e.Argument != "" && !f.argument:
		return "argument", fmt.Errorf("resolver %s takes no argument", e.Resolver)
	case e.Argument == "" && f.needed:
		return "argument", fmt.Errorf("resolver %s needs an argument: %s:/PATH", e.Resolver, e.Resolver)
	}
	if f.isPath && e.Argument != "" {
		if err := checkPath(e.Argument); err != nil {
			return "argument", err
		}
	}
	given := map[string]bool{"forward": e.Forward, "overwrite": e.Overwrite, "size": e.Size != "", "mode": e.Mode != "", "content": e.Content != "", "limit": e.Limit != 0}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if given[name] && !slices.Contains(f.options, name) {
			return name, fmt.Errorf("resolver %s has no option %s", e.Resolver, name)
		}
	}
	for _, o := range []struct{ name, value string }{{"size", e.Size}, {"mode", e.Mode}, {"content", e.Content}} {
		if err := checkOption(o.name, o.value); err != nil && o.value != "" {
			return o.name, err
		}
	}
	return "", nil
}

// checkOption says whether an option has a value with that name.
func checkOption(name, value string) error {
	if !slices.Contains(optionValues[name], value) {
		return fmt.Errorf("%s=%q: want one of %s%s", name, clip(value), strings.Join(optionValues[name], ", "), didYouMean(value, optionValues[name]))
	}
	return nil
}

// brace is how a { that begins no placeholder is written.
const brace = "{{"

var placeholders = []string{"{base}", "{dir}", "{path}", "{rest}"}

// checkPath says whether a path with placeholders can become an absolute one.
func checkPath(s string) error {
	if strings.ContainsRune(s, 0) {
		return errors.New("the path holds a NUL")
	}
	if !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "{dir}") && !strings.HasPrefix(s, "{path}") {
		return fmt.Errorf("the path %q is one of the destination and must be absolute", clip(s))
	}
	for rest := s; ; {
		i := strings.IndexByte(rest, '{')
		if i < 0 {
			return nil
		}
		if rest = rest[i:]; strings.HasPrefix(rest, brace) {
			rest = rest[len(brace):]
			continue
		}
		p := slices.IndexFunc(placeholders, func(p string) bool { return strings.HasPrefix(rest, p) })
		if p < 0 {
			name, _, _ := strings.Cut(rest, "}")
			return fmt.Errorf("%q is no placeholder; there are %s, and {{ is one {", clip(name+"}"), strings.Join(placeholders, ", "))
		}
		rest = rest[len(placeholders[p]):]
	}
}

// Expand replaces the placeholders of the entry's argument by parts of the path that
// the object had at the source.
func (e Entry) Expand(source string) (string, error) {
	if !strings.Contains(e.Argument, "{") {
		return path.Clean(e.Argument), nil
	}
	plain := strings.ReplaceAll(e.Argument, brace, "")
	if source == "" && strings.Contains(plain, "{") {
		return "", fmt.Errorf("%s needs the path that the object has at the source, and it has none", e.Argument)
	}
	rest, ok := e.Selector.rest(source)
	if !ok && strings.Contains(plain, "{rest}") {
		return "", fmt.Errorf("%s needs a selector path:GLOB that matches", e.Argument)
	}
	s := strings.NewReplacer(brace, "{", "{base}", path.Base(source), "{dir}", path.Dir(source), "{path}", source, "{rest}", rest).Replace(e.Argument)
	if !strings.HasPrefix(s, "/") {
		return "", fmt.Errorf("%s becomes %q, which is not absolute", e.Argument, clip(s))
	}
	return path.Clean(s), nil
}

// rest is what follows the directories in a path that the selector names without
// wildcards.
func (s Selector) rest(p string) (string, bool) {
	if s.by != byPath {
		return "", false
	}
	parts := strings.Split(strings.TrimPrefix(p, "/"), "/")
	for _, g := range s.glob {
		if len(parts) == 0 || g != parts[0] || strings.ContainsAny(g, "*?[") {
			break
		}
		parts = parts[1:]
	}
	return strings.Join(parts, "/"), true
}

// String is the entry as Parse reads it.
func (e Entry) String() string {
	var b strings.Builder
	b.WriteString(e.Selector.text)
	if e.Resolver == "" {
		return b.String()
	}
	b.WriteString("=" + e.Resolver)
	if e.Argument != "" {
		b.WriteString(":" + escape(e.Argument))
	}
	b.WriteString(e.Options.String())
	return b.String()
}

// String is the options as they follow a resolver, each behind a comma.
func (o Options) String() string {
	var b strings.Builder
	if o.Forward {
		b.WriteString(",forward")
	}
	if o.Overwrite {
		b.WriteString(",overwrite")
	}
	for _, x := range []struct{ name, value string }{{"size", o.Size}, {"mode", o.Mode}, {"content", o.Content}} {
		if x.value != "" {
			b.WriteString("," + x.name + "=" + x.value)
		}
	}
	if o.Limit != 0 {
		fmt.Fprintf(&b, ",limit=%d", o.Limit)
	}
	return b.String()
}

// Outcome is what an entry does, whatever it is for.
func (e Entry) Outcome() string {
	e.Selector = Selector{}
	return e.String()
}

// cut is strings.Cut at the first sep that no backslash stands before.
func cut(s string, sep byte) (before, after string, found bool) {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// unescape takes the backslashes out of an argument.
func unescape(s string) (string, error) {
	if !strings.Contains(s, `\`) {
		return s, nil
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' {
			if i++; i == len(s) {
				return "", errors.New("it ends with a backslash")
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), nil
}

func escape(s string) string { return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s) }
