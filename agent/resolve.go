package agent

import (
	"context"
	"fmt"
	"path/filepath"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

// Resolve says by what this host would replace the open files of a tree that
// comes from another one, and, if it is told what the tree needs, what it lacks.
func (a *Agent) Resolve(ctx context.Context, req *wire.ResolveRequest) (*wire.ResolveReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	rules, err := a.rules(req.Options)
	if err != nil {
		return nil, err
	}
	rules = append(rules, standing(req.Objects)...)
	reply := &wire.ResolveReply{}
	for _, r := range rules {
		reply.Entries = append(reply.Entries, &wire.Entry{Text: r.Entry.String(), Origin: r.Origin, Asked: r.Asked})
	}
	choices, bad := match(req.Objects, rules)
	for _, c := range choices {
		r, err := resolution(req.Objects, c)
		if err != nil {
			reply.Problems = append(reply.Problems, &wire.Problem{Object: objectOf(r), Reason: fmt.Sprintf("%s: %v", c.Rule, err)})
			continue
		}
		if r.Resolver == external.Proxy {
			r.Proxy = proxyOf(req, r)
		}
		if r.Resolver == external.Carry {
			if r.Have, err = lookCarried(r); err != nil {
				reply.Problems = append(reply.Problems, &wire.Problem{Object: objectOf(r), Reason: fmt.Sprintf("%s: %v", c.Rule, err)})
				continue
			}
		}
		reply.Resolutions = append(reply.Resolutions, r)
	}
	for _, p := range bad {
		w := &wire.Problem{Reason: p.Rule + ": " + p.Reason, Hint: p.Hint}
		if p.Object >= 0 {
			w.Object = nameObject(req.Objects[p.Object])
		}
		reply.Problems = append(reply.Problems, w)
	}
	if req.Look {
		reply.Presences = presences(req.Objects)
	}
	if req.Requirements != nil {
		reply.Codecs = wire.Codecs
		if req.Direct != nil {
			reply.Lane = a.reach(ctx, req.Direct, req.Options.GetLane())
			if err := directly(req.Options.GetLane(), reply.Lane); err != nil {
				reply.Problems = append(reply.Problems, &wire.Problem{Reason: err.Error()})
			}
		}
		if err := a.canPage(req.Options); err != nil {
			reply.Problems = append(reply.Problems, &wire.Problem{Reason: err.Error()})
		}
		lacks, err := a.lacks(ctx, req, reply.Resolutions)
		if err != nil {
			return nil, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
		}
		reply.Problems = append(reply.Problems, lacks...)
	}
	return reply, nil
}

// lacks is what prepare would refuse. What is held for it is let go at once.
func (a *Agent) lacks(ctx context.Context, req *wire.ResolveRequest, resolutions []*wire.Resolution) ([]*wire.Problem, error) {
	prep := &wire.PrepareRequest{Id: req.Id, Source: req.Source, Requirements: req.Requirements, Resolutions: resolutions,
		Options: &wire.MigrateOptions{PidNamespaceNew: req.Options.GetPidNamespaceNew(), Attach: req.Options.GetAttach()}}
	h, err := a.hold(ctx, prep, nil)
	if err == nil {
		d := &destination{session: &session{a: a}, req: prep, held: h}
		err = a.cfg.Engine.Check(ctx, planOf(req.Requirements), d.options())
		h.close(false)
	}
	if err == nil {
		return nil, nil
	}
	f := failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
	if f.Code != wire.Code_CODE_REFUSED {
		return nil, f
	}
	if len(f.Problems) == 0 {
		return []*wire.Problem{{Reason: f.Message}}, nil
	}
	return f.Problems, nil
}

// presences says what this host has at the paths of files that are found by them.
func presences(objects []*wire.OpenObject) []*wire.Presence {
	var out []*wire.Presence
	seen := map[string]bool{}
	for _, o := range objects {
		if o.Path == "" || o.Carry == plan.CarryImage || seen[o.Path] {
			continue
		}
		seen[o.Path] = true
		p := &wire.Presence{Path: o.Path}
		p.State, p.Differences = engine.Presence(plan.Object{Path: o.Path, Mode: o.Mode, Size: o.Size, MTime: o.MtimeNs, Rdev: o.Rdev, BuildID: o.BuildId, SHA256: o.Sha256})
		out = append(out, p)
	}
	return out
}

// rules are the entries in force for a migration: what its caller says, then this
// host's configuration.
func (a *Agent) rules(o *wire.MigrateOptions) ([]external.Rule, error) {
	var out []external.Rule
	ask := func(e external.Entry, origin string) {
		out = append(out, external.Rule{Entry: e, Origin: origin, Asked: true})
	}
	for _, s := range o.GetExternal() {
		e, err := external.Parse(s)
		if err != nil {
			return nil, invalid("--external: %w", err)
		}
		ask(e, "--external")
	}
	for _, in := range o.GetInherit() {
		s, err := external.ParseSelector(in.Key)
		if err != nil {
			return nil, invalid("--inherit %q: %w", in.Key, err)
		}
		e := external.Entry{Selector: s, Resolver: external.Path, Argument: in.Path, Options: external.Options{Forward: in.Forward}}
		if err := e.Check(); err != nil {
			return nil, invalid("--inherit %s: %w", in.Key, err)
		}
		ask(e, "--inherit")
	}
	return append(out, a.cfg.External...), nil
}

// match finds the rule of each key of the objects.
func match(objects []*wire.OpenObject, rules []external.Rule) ([]external.Choice, []external.Problem) {
	return external.Match(externalObjects(objects), rules, func(i int, e external.Entry) error { return serves(objects[i], e) })
}

// serves says why an entry cannot be carried out for an object.
func serves(o *wire.OpenObject, e external.Entry) error {
	if e.Resolver == external.Image {
		return nil
	}
	if err := declarable(o); err != nil {
		return err
	}
	r, ok := resolvers[e.Resolver]
	if !ok {
		return fmt.Errorf("agents of this version have no resolver %s", e.Resolver)
	}
	return r.serves(o, e)
}

// externalObjects is what selectors look at.
func externalObjects(objects []*wire.OpenObject) []external.Object {
	out := make([]external.Object, len(objects))
	for i, o := range objects {
		out[i] = external.Object{Key: o.Key, Kind: o.Kind, Path: o.Path}
		for _, h := range o.Holders {
			out[i].Holders = append(out[i].Holders, external.Holder{Pid: int(h.Pid), Comm: h.Comm, FDs: ints(h.Fds), Roles: h.Roles})
		}
	}
	return out
}

// resolution is a choice in the form that travels. Placeholders are replaced.
func resolution(objects []*wire.OpenObject, c external.Choice) (*wire.Resolution, error) {
	e := c.Rule.Entry
	r := &wire.Resolution{
		Key: c.Key, Resolver: e.Resolver, Argument: e.Argument, Forward: e.Forward, Size: e.Size, Mode: e.Mode, Overwrite: e.Overwrite,
		Limit: e.Limit, Content: e.Content, Entry: e.String(), Origin: c.Rule.Origin,
	}
	path := ""
	for _, i := range c.Objects {
		r.Objects = append(r.Objects, objects[i])
		if path == "" {
			if path = objects[i].Path; path == "" && filepath.IsAbs(objects[i].Peer) {
				path = objects[i].Peer // where a socket is connected to
			}
		}
	}
	switch e.Resolver {
	case external.Path, external.Create, external.Carry:
		if e.Argument == "" {
			e.Argument = "{path}"
		}
		var err error
		if r.Argument, err = e.Expand(path); err != nil {
			return r, err
		}
	}
	return r, nil
}
