package configs

import (
	"strings"

	"godwit/configs/external"
)

// External is a rule about open files of trees that land on the agent's host, as
// an entry of the command line is for one migration.
type External struct {
	// Match are selectors; the rule is for what any of them names.
	Match []string `toml:"match"`
	// Resolver and Argument say what becomes of it.
	Resolver string `toml:"resolver"`
	Argument string `toml:"argument"`
	// Options of the resolver; what is empty is its default.
	Forward   bool   `toml:"forward"`
	Size      string `toml:"size"`
	Mode      string `toml:"mode"`
	Content   string `toml:"content"`
	Overwrite bool   `toml:"overwrite"`
	Limit     Size   `toml:"limit"`

	origin string // FILE:LINE
}

// Rules are the rules as entries, in the order of the file: one a selector.
// Preconditions: the configuration is valid.
func (c *Agent) Rules() []external.Rule {
	var out []external.Rule
	for _, x := range c.External {
		for _, m := range x.Match {
			if s, err := external.ParseSelector(m); err == nil {
				e := x.entry()
				e.Selector = s
				out = append(out, external.Rule{Entry: e, Origin: x.origin})
			}
		}
	}
	return out
}

func (x *External) entry() external.Entry {
	return external.Entry{Resolver: x.Resolver, Argument: x.Argument, Options: external.Options{
		Forward: x.Forward, Size: x.Size, Mode: x.Mode, Content: x.Content, Overwrite: x.Overwrite, Limit: uint64(x.Limit),
	}}
}

func (x *External) validate(l *loader, key string) {
	x.origin, _, _ = strings.Cut(l.origins[key].Origin, ": ")
	if i := strings.LastIndexByte(x.origin, ':'); i > 0 {
		x.origin = x.origin[:i] // the column is that of the brackets
	}
	if len(x.Match) == 0 {
		l.bad(key+".match", "is empty; want selectors, such as [\"path:/var/log/app/*.log\"]")
	}
	for _, m := range x.Match {
		if _, err := external.ParseSelector(m); err != nil {
			l.bad(key+".match", "%q: %v", m, err)
		}
	}
	if x.Resolver == "" {
		l.bad(key+".resolver", "is empty; want one of %s", strings.Join(external.Resolvers(), ", "))
		return
	}
	if at, err := x.entry().Fault(); err != nil {
		l.bad(key+"."+at, "%v", err)
	}
}
