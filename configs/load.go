package configs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	// Origin is where the value came from: "FILE:LINE:COLUMN", a variable's
	// or a flag's name, or "default".
	Origin string
	// Key is the key as in the file; empty if the problem has none.
	Key string
	// Reason says what is wrong, and what would be right.
	Reason string

	line, col int // in the file; for the order
}

// String is the problem in one line.
func (p Problem) String() string {
	s := p.Origin + ": "
	if p.Key != "" {
		s += p.Key + ": "
	}
	return s + p.Reason
}

// Error is all that is wrong with a configuration.
type Error struct{ Problems []Problem }

// Error is one line a problem.
func (e *Error) Error() string {
	if len(e.Problems) == 1 {
		return "configuration: " + e.Problems[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "configuration: %d problems:", len(e.Problems))
	for _, p := range e.Problems {
		b.WriteString("\n  " + p.String())
	}
	return b.String()
}

// position is a place in a file, counted from 1.
type position struct{ line, col int }

// tableList is an array of tables. Only the file can have one; its tables
// become fields as they are read: external[0].match.
type tableList struct {
	key   string
	value reflect.Value
}

func isTables(v reflect.Value) bool {
	return v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct
}

type field struct {
	key    string
	env    string
	value  reflect.Value
	origin Problem // without Reason
}

// loader fills the fields of one configuration from its sources and collects
// what is wrong.
type loader struct {
	prefix, foreign string // of environment variables: ours, and what to leave alone
	fields          []*field
	tables          []string
	lists           []*tableList
	origins         map[string]Problem // of tables in lists, by key; without Reason
	problems        []Problem
}

func newLoader(config any, prefix, foreign string) *loader {
	l := &loader{prefix: prefix, foreign: foreign, origins: map[string]Problem{}}
	l.addFields(reflect.ValueOf(config).Elem(), "")
	return l
}

func (l *loader) addFields(v reflect.Value, parent string) {
	for i := range v.NumField() {
		key := v.Type().Field(i).Tag.Get("toml")
		if key == "" {
			continue
		}
		if parent != "" {
			key = parent + "." + key
		}
		if isTables(v.Field(i)) {
			l.lists = append(l.lists, &tableList{key: key, value: v.Field(i)})
			for n := range v.Field(i).Len() {
				l.addFields(v.Field(i).Index(n), fmt.Sprintf("%s[%d]", key, n))
			}
			continue
		}
		if v.Field(i).Kind() == reflect.Struct {
			l.tables = append(l.tables, key)
			l.addFields(v.Field(i), key)
			continue
		}
		l.fields = append(l.fields, &field{
			key:    key,
			env:    l.prefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_")),
			value:  v.Field(i),
			origin: Problem{Origin: "default", Key: key},
		})
	}
}

func (l *loader) field(key string) *field {
	for _, f := range l.fields {
		if f.key == key {
			return f
		}
	}
	return nil
}

func (l *loader) add(p Problem, reason string) {
	p.Reason = reason
	l.problems = append(l.problems, p)
}

func (l *loader) list(key string) *tableList {
	for _, t := range l.lists {
		if t.key == key {
			return t
		}
	}
	return nil
}

// bad notes that the value of key is not valid.
func (l *loader) bad(key, format string, args ...any) {
	l.add(l.field(key).origin, fmt.Sprintf(format, args...))
}

// err is what was collected, in the order of the sources.
func (l *loader) err() error {
	if len(l.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(l.problems, func(a, b Problem) int {
		switch {
		case a.line == 0 && b.line == 0:
			return 0
		case a.line == 0:
			return 1
		case b.line == 0:
			return -1
		case a.line != b.line:
			return a.line - b.line
		}
		return a.col - b.col
	})
	return &Error{Problems: l.problems}
}

func (l *loader) load(path, defaultPath string, env []string, overrides []Override) error {
	fileVar := l.prefix + "CONFIG"
	if path == "" {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, fileVar+"="); ok {
				path = v
			}
		}
	}
	named := path != ""
	if !named {
		path = defaultPath
	}
	text, err := os.ReadFile(path)
	switch {
	case err == nil:
		l.file(path, text)
	case named || !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read configuration: %w", err)
	}
	for _, e := range env {
		name, text, ok := strings.Cut(e, "=")
		if ok && name != fileVar {
			l.variable(name, text)
		}
	}
	for _, o := range overrides {
		f := l.field(o.Key)
		if f == nil {
			return fmt.Errorf("flag %s stands for the unknown key %s", o.Flag, o.Key)
		}
		l.text(f, o.Value, o.Flag)
	}
	return nil
}

func (l *loader) variable(name, text string) {
	if !strings.HasPrefix(name, l.prefix) || l.foreign != "" && strings.HasPrefix(name, l.foreign) {
		return
	}
	var names []string
	for _, f := range l.fields {
		if strings.Contains(f.key, "[") {
			continue // of a table in a list
		}
		if f.env == name {
			l.text(f, text, name)
			return
		}
		names = append(names, f.env)
	}
	// The coordinator's prefix is the product's name, so that others may use
	// it too: there only what looks like a slip of the pen is an error.
	near := nearest(name, names)
	if l.foreign != "" && near == "" {
		return
	}
	l.add(Problem{Origin: "environment variable " + name}, "unknown variable"+didYouMean(near))
}

// text sets f from a variable or a flag.
func (l *loader) text(f *field, text, origin string) {
	if strings.HasPrefix(origin, l.prefix) {
		origin = "environment variable " + origin
	}
	f.origin = Problem{Origin: origin, Key: f.key}
	var v any = text
	switch f.value.Interface().(type) {
	case []string:
		list := []any{}
		for s := range strings.SplitSeq(text, ",") {
			if s = strings.TrimSpace(s); s != "" {
				list = append(list, s)
			}
		}
		v = list
	case int:
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			l.add(f.origin, fmt.Sprintf("%q is not a whole number", text))
			return
		}
		v = n
	}
	if err := set(f.value, v); err != nil {
		l.add(f.origin, err.Error())
	}
}

// set gives v, of a type that TOML has, to a field.
func set(dst reflect.Value, v any) error {
	switch p := dst.Addr().Interface().(type) {
	case interface{ UnmarshalText([]byte) error }:
		switch v := v.(type) {
		case string:
			if err := p.UnmarshalText([]byte(v)); err != nil {
				return fmt.Errorf("%q: %w", v, err)
			}
			return nil
		case int64:
			if dst.Kind() == reflect.Uint64 { // Size, Rate: bytes
				if v < 0 {
					return fmt.Errorf("%d is negative", v)
				}
				dst.SetUint(uint64(v))
				return nil
			}
			return fmt.Errorf(`%d has no unit; want a time with its unit, such as "10s"`, v)
		}
		if dst.Kind() == reflect.Uint64 {
			return fmt.Errorf(`%s; want a size with its unit, such as "4MiB"`, isA(v))
		}
		return fmt.Errorf(`%s; want a time with its unit, such as "10s"`, isA(v))
	case *string:
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("%s; want a string", isA(v))
		}
		*p = s
	case *bool:
		b, ok := v.(bool)
		if !ok {
			return fmt.Errorf("%s; want true or false", isA(v))
		}
		*p = b
	case *int:
		n, ok := v.(int64)
		if !ok {
			return fmt.Errorf("%s; want a whole number", isA(v))
		}
		*p = int(n)
	case *[]string:
		list, ok := v.([]any)
		if !ok {
			return fmt.Errorf("%s; want a list of strings", isA(v))
		}
		out := make([]string, 0, len(list))
		for _, e := range list {
			s, ok := e.(string)
			if !ok {
				return fmt.Errorf("an element %s; want a list of strings", isA(e))
			}
			out = append(out, s)
		}
		*p = out
	default:
		// A field of a type that no file can set is a bug of this package.
		panic(fmt.Sprintf("configs: field of type %s", dst.Type()))
	}
	return nil
}

// isA says what kind of value v is, in TOML's words.
func isA(v any) string {
	switch v.(type) {
	case string:
		return "is a string"
	case int64:
		return "is an integer"
	case float64:
		return "is a float"
	case bool:
		return "is a boolean"
	case []any:
		return "is an array"
	case map[string]any:
		return "is a table"
	}
	return "is a date or time"
}

// file reads the text of one TOML file.
func (l *loader) file(path string, text []byte) {
	var root map[string]any
	if err := toml.Unmarshal(text, &root); err != nil {
		p := Problem{Origin: path}
		if d, ok := errors.AsType[*toml.DecodeError](err); ok {
			p.line, p.col = d.Position()
			p.Origin = fmt.Sprintf("%s:%d:%d", path, p.line, p.col)
			p.Key = strings.Join(d.Key(), ".")
		}
		l.add(p, strings.TrimPrefix(err.Error(), "toml: "))
		return
	}
	at := positions(text)
	l.table(path, at, "", root)
}

func (l *loader) table(path string, at map[string]position, parent string, t map[string]any) {
	for name, v := range t {
		key := keyName(name)
		if parent != "" {
			key = parent + "." + key
		}
		pos := at[key]
		p := Problem{Key: key, line: pos.line, col: pos.col, Origin: fmt.Sprintf("%s:%d:%d", path, pos.line, pos.col)}
		sub, isTable := v.(map[string]any)
		switch f := l.field(key); {
		case f != nil:
			f.origin = p
			if err := set(f.value, v); err != nil {
				l.add(p, err.Error())
			}
		case slices.Contains(l.tables, key):
			if !isTable {
				l.add(p, isA(v)+"; want a table")
				continue
			}
			l.table(path, at, key, sub)
		case l.list(key) != nil:
			l.tableList(path, at, p, l.list(key), v)
		default:
			var known []string
			for _, f := range l.fields {
				known = append(known, f.key)
			}
			if isTable {
				known = l.tables
			}
			for _, t := range l.lists {
				known = append(known, t.key)
			}
			l.add(p, "unknown key"+didYouMean(nearest(key, known)))
		}
	}
}

// tableList reads an array of tables.
func (l *loader) tableList(path string, at map[string]position, p Problem, t *tableList, v any) {
	elements, ok := v.([]any)
	if !ok {
		l.add(p, fmt.Sprintf("%s; want tables, each below [[%s]]", isA(v), t.key))
		return
	}
	for _, e := range elements {
		if _, ok := e.(map[string]any); !ok {
			l.add(p, fmt.Sprintf("an element %s; want tables, each below [[%s]]", isA(e), t.key))
			return
		}
	}
	t.value.Set(reflect.MakeSlice(t.value.Type(), len(elements), len(elements)))
	for i, e := range elements {
		key := fmt.Sprintf("%s[%d]", t.key, i)
		pos := at[key]
		origin := Problem{Key: key, line: pos.line, col: pos.col, Origin: fmt.Sprintf("%s:%d:%d", path, pos.line, pos.col)}
		l.origins[key] = origin
		first := len(l.fields)
		l.addFields(t.value.Index(i), key)
		for _, f := range l.fields[first:] {
			f.origin = Problem{Key: f.key, line: pos.line, col: pos.col, Origin: origin.Origin}
		}
		l.table(path, at, key, e.(map[string]any))
	}
}

// keyName is a part of a key as TOML writes it, so that a quoted dot does not
// separate tables.
func keyName(name string) string {
	for _, c := range name {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return strconv.Quote(name)
		}
	}
	if name == "" {
		return `""`
	}
	return name
}

// positions finds where each key of a TOML text that is known to be well
// formed stands: dotted key to the place of its last part.
func positions(text []byte) map[string]position {
	at := make(map[string]position)
	var p unstable.Parser
	p.Reset(text)
	var table []string
	counts := map[string]int{} // of the tables of an array so far
	note := func(prefix []string, key unstable.Iterator) []string {
		path := slices.Clone(prefix)
		for key.Next() {
			n := key.Node()
			path = append(path, keyName(string(n.Data)))
			k := strings.Join(path, ".")
			if _, seen := at[k]; !seen {
				at[k] = place(text, n.Raw.Offset)
			}
		}
		return path
	}
	var value func(prefix []string, n *unstable.Node)
	value = func(prefix []string, n *unstable.Node) {
		switch n.Kind {
		case unstable.InlineTable:
			for it := n.Children(); it.Next(); {
				kv := it.Node()
				value(note(prefix, kv.Key()), kv.Value())
			}
		case unstable.Array:
			i := 0
			for it := n.Children(); it.Next(); i++ {
				if it.Node().Kind != unstable.InlineTable {
					continue
				}
				of := slices.Clone(prefix)
				of[len(of)-1] += fmt.Sprintf("[%d]", i)
				at[strings.Join(of, ".")] = at[strings.Join(prefix, ".")]
				value(of, it.Node())
			}
		}
	}
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table:
			table = note(nil, e.Key())
		case unstable.ArrayTable:
			table = note(nil, e.Key())
			k := strings.Join(table, ".")
			last := len(table) - 1
			table[last] = fmt.Sprintf("%s[%d]", table[last], counts[k])
			counts[k]++
			for it := e.Key(); it.Next(); {
				at[strings.Join(table, ".")] = place(text, it.Node().Raw.Offset)
			}
		case unstable.KeyValue:
			value(note(table, e.Key()), e.Value())
		}
	}
	return at
}

// place turns an offset into a line and a column of characters.
func place(text []byte, offset uint32) position {
	before := text[:min(int(offset), len(text))]
	start := bytes.LastIndexByte(before, '\n') + 1
	return position{line: bytes.Count(before, []byte{'\n'}) + 1, col: len([]rune(string(before[start:]))) + 1}
}
