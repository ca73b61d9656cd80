package external

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// selectorKind is a way to name objects.
type selectorKind int

const (
	byKey selectorKind = iota
	byFD
	byRole
	byPath
	byKind
)

// Selector names objects of a tree.
type Selector struct {
	text string // canonical
	by   selectorKind
	keys []string // readings of a key, the likeliest first
	pid  int      // of byFD; 0: not said
	fd   int
	word string   // of byRole and byKind
	glob []string // of byPath, by "/"
}

// String is the selector as ParseSelector reads it.
func (s Selector) String() string { return s.text }

// Roles are those that a selector can name.
var Roles = []string{"stdin", "stdout", "stderr"}

// socketKinds are the kinds that "socket" stands for.
var socketKinds = []string{"unix-stream", "unix-dgram", "unix-seqpacket", "tcp", "udp", "netlink", "packet", "raw", "socket"}

// kindNames are those that a selector can name. "unix" and "socket" are several.
var kindNames = append([]string{"regular", "directory", "fifo", "pipe", "chr", "blk", "tty", "unix", "eventfd", "eventpoll", "timerfd", "signalfd",
	"inotify", "fanotify", "memfd", "pidfd"}, socketKinds...)

// ParseSelector reads a selector.
func ParseSelector(s string) (Selector, error) {
	if len(s) > maxEntry {
		return Selector{}, fmt.Errorf("a selector of %d bytes is too long", len(s))
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return Selector{}, errors.New("the selector holds a control character")
	}
	name, rest, _ := strings.Cut(s, ":")
	switch name {
	case "fd":
		return parseFD(rest)
	case "role":
		if !slices.Contains(Roles, rest) {
			return Selector{}, fmt.Errorf("role %q: want one of %s", clip(rest), strings.Join(Roles, ", "))
		}
		return Selector{text: s, by: byRole, word: rest}, nil
	case "kind":
		if !slices.Contains(kindNames, rest) {
			return Selector{}, fmt.Errorf("kind %q: want one of %s%s", clip(rest), strings.Join(kindNames, ", "), didYouMean(rest, kindNames))
		}
		return Selector{text: s, by: byKind, word: rest}, nil
	case "path":
		return parseGlob(rest)
	}
	if strings.ContainsRune(s, '[') {
		return parseKey(s)
	}
	return Selector{}, errors.New("the selector is none of KEY such as file[72:a3e7], fd:PID:N, fd:N, role:stdin, path:GLOB, kind:KIND")
}

func parseFD(s string) (Selector, error) {
	p := Selector{by: byFD}
	pid, n, has := strings.Cut(s, ":")
	if !has {
		pid, n = "", s
	}
	number := func(s string, low int64) (int, error) {
		v, err := strconv.ParseInt(s, 10, 32)
		if err != nil || v < low || strings.HasPrefix(s, "+") {
			return 0, fmt.Errorf("fd:%s: %q is no number; want fd:PID:N or fd:N", clip(s), clip(s))
		}
		return int(v), nil
	}
	var err error
	if p.fd, err = number(n, 0); err != nil {
		return p, err
	}
	p.text = fmt.Sprintf("fd:%d", p.fd)
	if has {
		if p.pid, err = number(pid, 1); err != nil {
			return p, err
		}
		p.text = fmt.Sprintf("fd:%d:%d", p.pid, p.fd)
	}
	return p, nil
}

func parseGlob(s string) (Selector, error) {
	p := Selector{text: "path:" + s, by: byPath}
	if !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "**/") {
		return p, fmt.Errorf("path %q: want an absolute path, or **/NAME", clip(s))
	}
	p.glob = strings.Split(strings.TrimPrefix(s, "/"), "/")
	for _, part := range p.glob {
		if _, err := path.Match(part, "x"); err != nil {
			return p, fmt.Errorf("path %q: %w", clip(s), err)
		}
	}
	return p, nil
}

// Tree is the directory that a selector names with everything below it, as
// path:/srv/app/** does.
func (s Selector) Tree() (dir string, ok bool) {
	n := len(s.glob) - 1
	if s.by != byPath || n < 1 || s.glob[n] != "**" {
		return "", false
	}
	for _, part := range s.glob[:n] {
		if part == "" || part == "." || part == ".." || strings.ContainsAny(part, `*?[\`) {
			return "", false
		}
	}
	return "/" + strings.Join(s.glob[:n], "/"), true
}

const keyHint = "want file[MNT:INO] or tty[RDEV:DEV], hexadecimal as in CRIU, or unix[INO], pipe[INO], socket[INO]"

// parseKey reads a key. The two numbers of CRIU's keys are hexadecimal, an inode
// alone is decimal; where the other reading is possible, too, it comes second.
func parseKey(s string) (Selector, error) {
	bad := func() (Selector, error) { return Selector{}, fmt.Errorf("key %q: %s", clip(s), keyHint) }
	kind, in, _ := strings.Cut(s, "[")
	kind = strings.TrimSuffix(kind, ":") // pipe:[12], as /proc has it
	in, ok := strings.CutSuffix(in, "]")
	if !ok {
		return bad()
	}
	p := Selector{by: byKey}
	switch kind {
	case "file", "tty":
		a, b, ok := strings.Cut(in, ":")
		if !ok {
			return bad()
		}
		x, errA := readings(a, 16)
		y, errB := readings(b, 16)
		if err := errors.Join(errA, errB); err != nil {
			return bad()
		}
		p.keys = []string{fmt.Sprintf("%s[%x:%x]", kind, x[0], y[0])}
		if len(x) > 1 && len(y) > 1 && (x[0] != x[1] || y[0] != y[1]) {
			p.keys = append(p.keys, fmt.Sprintf("%s[%x:%x]", kind, x[1], y[1]))
		}
	case "unix", "pipe", "socket":
		x, err := readings(in, 10)
		if err != nil {
			return bad()
		}
		for _, n := range x {
			p.keys = append(p.keys, fmt.Sprintf("%s[%d]", kind, n))
		}
		p.keys = slices.Compact(p.keys)
	default:
		return bad()
	}
	p.text = s
	return p, nil
}

// readings are the numbers that a text can mean, that of the base first.
func readings(s string, base int) ([]uint64, error) {
	digits, prefixed := strings.CutPrefix(strings.ToLower(s), "0x")
	if digits == "" || strings.ContainsAny(digits, "+-_ ") {
		return nil, fmt.Errorf("%q is no number", clip(s))
	}
	hex, err := strconv.ParseUint(digits, 16, 64)
	if err != nil {
		return nil, err
	}
	dec, err := strconv.ParseUint(digits, 10, 64)
	switch {
	case prefixed || err != nil:
		return []uint64{hex}, nil
	case base == 16:
		return []uint64{hex, dec}, nil
	}
	return []uint64{dec, hex}, nil
}

// matchGlob says whether the parts of a path are those of a glob.
func matchGlob(glob, parts []string) bool {
	// reach[i]: the glob up to here matches the first i parts.
	reach := make([]bool, len(parts)+1)
	reach[0] = true
	for _, g := range glob {
		next := make([]bool, len(parts)+1)
		if g == "**" {
			for i, any := 0, false; i <= len(parts); i++ {
				any = any || reach[i]
				next[i] = any
			}
		} else {
			for i := range parts {
				if reach[i] {
					ok, err := path.Match(g, parts[i])
					next[i+1] = err == nil && ok
				}
			}
		}
		reach = next
	}
	return reach[len(parts)]
}

// isKind says whether a kind is the one named, or one of those.
func isKind(name, kind string) bool {
	switch name {
	case "unix":
		return strings.HasPrefix(kind, "unix-")
	case "socket":
		return slices.Contains(socketKinds, kind)
	}
	return name == kind
}
