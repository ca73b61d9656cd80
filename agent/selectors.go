package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"

	"godwit/configs/external"
	"godwit/engine"
)

// isSelector says whether a declaration names objects by something else than a key.
func isSelector(s string) bool {
	name, _, ok := strings.Cut(s, ":")
	return ok && slices.Contains([]string{"fd", "role", "path", "kind"}, name)
}

// selectKeys puts the keys of what they name in the place of selectors (fd:PID:N,
// role:stdin, path:GLOB, kind:KIND) among what is declared external. What the tree
// opens from then on is not declared: the dump sees it as it is.
func selectKeys(ctx context.Context, eng Engine, pid int, o engine.DumpOptions, log hclog.Logger) (engine.DumpOptions, error) {
	var rules []external.Rule
	var keys []string
	for _, s := range o.External {
		if !isSelector(s) {
			keys = append(keys, s)
			continue
		}
		e, err := external.Parse(s)
		if err == nil && e.Resolver != "" {
			err = fmt.Errorf("entry %q: a selector stands alone here; what becomes of it is said where the tree is restored", s)
		}
		if err != nil {
			return o, invalid("--external: %w", err)
		}
		rules = append(rules, external.Rule{Entry: e, Origin: "--external", Asked: true})
	}
	if rules == nil {
		return o, nil
	}
	o.External = keys
	p, err := eng.Plan(ctx, pid, o)
	if _, refused := errors.AsType[*engine.Refusal](err); err != nil && !refused {
		return o, err
	}
	choices, bad := external.Match(externalObjects(openObjects(p.Objects)), rules, nil)
	r := &engine.Refusal{Doing: fmt.Sprintf("dump of pid %d", pid)}
	for _, b := range bad {
		r.Add(engine.Problem{Reason: b.Rule + ": " + b.Reason, Hint: b.Hint})
	}
	for _, c := range choices {
		log.Info("external selector resolved", "given", c.Rule.Entry.String(), "key", c.Key)
		if !slices.Contains(o.External, c.Key) {
			o.External = append(o.External, c.Key)
		}
	}
	return o, r.Err()
}
