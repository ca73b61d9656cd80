package coordinator

import (
	"context"
	"errors"
	"slices"

	"google.golang.org/protobuf/proto"

	"godwit/configs/external"
	"godwit/transport"
	"godwit/wire"
)

// survey is what two hosts say of a tree before anything is touched or held.
type survey struct {
	root    *wire.Process
	req     *wire.Requirements // nil: the source cannot say; it may refuse all the same
	objects []*wire.OpenObject
	// What becomes of external objects, and the entries in force.
	resolutions []*wire.Resolution
	entries     []*wire.Entry
	problems    []*wire.Problem // what entries ask for in vain
	presences   []*wire.Presence
	direct      *wire.DirectOffer // of the source
	lane        *wire.Lane        // if the destination tried it
	dstErr      error             // the destination cannot be asked
}

// looking says how closely a survey looks.
type looking struct {
	look bool // tell where files are at the destination
	hash bool // compare contents
}

// survey asks the source what the tree holds, the destination what becomes of
// that, and the source again if that changed anything. The error is the source's.
func (m *migration) survey(ctx context.Context, o *wire.MigrateOptions, how looking) (*survey, error) {
	s := &survey{}
	first, err := m.askSource(ctx, declaring(o, nil), how.hash)
	s.root, s.req, s.objects = first.GetRoot(), first.GetRequirements(), first.GetObjects()
	s.direct = first.GetDirect()
	if ctx.Err() != nil {
		return s, err
	}
	if len(s.objects) == 0 && err != nil {
		call, cancel := context.WithTimeout(ctx, preflightTimeout)
		defer cancel()
		_, dstErr := transport.Call[*wire.InfoRequest, *wire.InfoReply](call, m.link.nc, m.rec.Destination, "info", &wire.InfoRequest{})
		s.dstErr = withHosts(ctx, m.link.nc, m.rec.Destination, dstErr)
		return s, err
	}
	s.dstErr = m.askResolve(ctx, s, o, how.look, nil)
	if s.dstErr != nil || ctx.Err() != nil || !changes(s.resolutions) {
		return s, err
	}
	second, err := m.askSource(ctx, declaring(o, s.resolutions), false, s.resolutions...)
	s.req, s.direct = second.GetRequirements(), second.GetDirect()
	return s, err
}

// declaring is the options with what is declared external in place of the entries
// that say so.
func declaring(o *wire.MigrateOptions, resolutions []*wire.Resolution) *wire.MigrateOptions {
	o = proto.CloneOf(o)
	if o == nil {
		o = &wire.MigrateOptions{}
	}
	o.External, o.Inherit, o.Proxied = declared(resolutions), nil, nil
	for _, r := range resolutions {
		if r.Proxy != nil {
			o.Proxied = append(o.Proxied, r.Proxy)
		}
	}
	return o
}

// changes says whether resolutions make anything other than it is without.
func changes(resolutions []*wire.Resolution) bool {
	return slices.ContainsFunc(resolutions, func(r *wire.Resolution) bool { return r.Resolver != external.Image })
}

// declared are the keys that resolutions make external.
func declared(resolutions []*wire.Resolution) []string {
	var keys []string
	for _, r := range resolutions {
		if external.Declares(r.Resolver) && r.Proxy == nil {
			keys = append(keys, r.Key)
		}
	}
	return keys
}

func (m *migration) askSource(ctx context.Context, o *wire.MigrateOptions, hash bool, resolutions ...*wire.Resolution) (*wire.PreflightReply, error) {
	r := m.rec
	patience := preflightTimeout
	if hash {
		patience = hashTimeout
	}
	call, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	reply, err := transport.Call[*wire.PreflightRequest, *wire.PreflightReply](call, m.link.nc, r.Source, "preflight", &wire.PreflightRequest{
		Protocol: wire.Version, Id: r.Id, Pid: r.Pid, Options: o, Destination: r.Destination, Discover: true, Hash: hash, Resolutions: resolutions,
	})
	err = withHosts(ctx, m.link.nc, r.Source, err)
	if err == nil && reply.Requirements == nil {
		err = wire.Errorf(wire.Code_CODE_INTERNAL, "the answer does not say what the tree needs").At(r.Source, wire.State_STATE_PREFLIGHT.Phase())
	}
	return reply, err
}

// askResolve asks the destination what becomes of the objects of s.
func (m *migration) askResolve(ctx context.Context, s *survey, o *wire.MigrateOptions, look bool, needs *wire.Requirements) error {
	r := m.rec
	patience := preflightTimeout
	if look {
		patience = hashTimeout // as far as the source asked for it
	}
	call, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	reply, err := transport.Call[*wire.ResolveRequest, *wire.ResolveReply](call, m.link.nc, r.Destination, "resolve", &wire.ResolveRequest{
		Protocol: wire.Version, Id: r.Id, Source: r.Source, Objects: s.objects, Options: o, Look: look, Requirements: needs, Direct: s.direct,
	})
	if needs != nil {
		s.lane = reply.GetLane()
	}
	s.resolutions, s.entries, s.problems, s.presences = reply.GetResolutions(), reply.GetEntries(), reply.GetProblems(), reply.GetPresences()
	return withHosts(ctx, m.link.nc, r.Destination, err)
}

// lacks is what cannot be carried and what no entry makes external, as a refusal of
// the source; nil: nothing.
func (s *survey) lacks() error {
	f := &wire.Failure{Code: wire.Code_CODE_REFUSED, Message: "what leads out of the tree is not carried, nothing was touched"}
	for _, o := range s.objects {
		if o.Declarable && !slices.ContainsFunc(s.resolutions, func(r *wire.Resolution) bool { return r.Key == o.Key && r.Resolver != external.Image }) {
			f.Problems = append(f.Problems, &wire.Problem{Object: nameObject(o), Reason: o.Reason, Hint: o.Hint})
		}
	}
	if len(f.Problems) == 0 {
		return nil
	}
	return f
}

// vain is what entries ask for in vain, as a refusal of the destination; nil:
// nothing.
func (s *survey) vain() error {
	if len(s.problems) == 0 {
		return nil
	}
	return &wire.Failure{Code: wire.Code_CODE_REFUSED, Message: "what is to become of open files cannot be done, nothing was touched", Problems: s.problems}
}

// together puts two refusals of one host into one; another error goes first.
func together(a, b error) error {
	f, ok := errors.AsType[*wire.Failure](a)
	g, ok2 := errors.AsType[*wire.Failure](b)
	switch {
	case a == nil:
		return b
	case b == nil || !ok || !ok2 || f.Code != wire.Code_CODE_REFUSED:
		return a
	}
	all := *f
	all.Problems = slices.Concat(f.Problems, g.Problems)
	return &all
}

// nameObject is an object for messages.
func nameObject(o *wire.OpenObject) *wire.Object {
	x := &wire.Object{Key: o.Key, Path: o.Path}
	if x.Path == "" {
		x.Path = o.Link
	}
	if len(o.Holders) > 0 {
		h := o.Holders[0]
		x.Pid, x.Comm = h.Pid, h.Comm
		if len(h.Fds) > 0 {
			x.Fd, x.HasFd = h.Fds[0], true
		}
	}
	return x
}
