package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

// resolver is a way in which a host provides what a tree has open.
type resolver struct {
	// serves says why an object cannot be had in this way; nil: it can. It asks
	// nothing but its arguments: both hosts of a migration come to the same answer.
	serves func(o *wire.OpenObject, e external.Entry) error
	// hold opens, compares and keeps ready what stands for one key, before the tree
	// is frozen. Nothing of this host may be changed that release does not undo.
	hold func(ctx context.Context, q *holdRequest) (*held, error)
	// far: nothing is handed in; the restore makes the object and gives its other
	// end to held.far.
	far bool
}

// resolvers is the table of all, by the names of package external. What is not in
// it is refused. Image is no resolver: what has it is not external. Nor is what
// Carry has, for which nothing is held.
var resolvers map[string]resolver

func init() {
	resolvers = map[string]resolver{
		external.Path:    {serves: servesNamed, hold: holdPath},
		external.Create:  resolverCreate,
		external.Null:    resolverNull,
		external.Provide: resolverProvide,
		external.Inherit: resolverProvide,
		external.Journal: {serves: servesJournal, hold: holdJournal},
		external.Proxy:   {serves: servesProxy, hold: holdProxy, far: true},
		external.Carry:   {serves: servesCarry},
	}
}

// holdRequest is one key that this host is to provide.
type holdRequest struct {
	*wire.Resolution
	agent     *Agent
	migration string
	source    string // host
	// note tells the journal of a file that is made; nil: there is none.
	note func(createdFile) error
	// external are the descriptions with the key that the tree has, one for each
	// combination of open flags.
	external []*wire.ExternalFile
}

// held stands ready for one key.
type held struct {
	file    *os.File // closed by the session
	forward bool     // the description as it is
	anyKind bool     // it may be of another kind than what it stands for
	far     *engine.Far
	// start, if set, is called once the migration is committed, before the tree runs.
	start func(ctx context.Context) error
	// release, if set, undoes what hold did, if the tree does not run here; landed is
	// called if it does.
	release, landed func()
}

// holdings are what a session holds.
type holdings struct {
	files map[string]engine.Inherit
	far   map[string]*engine.Far
	all   []*held
	// terminal stands for that on which the tree was started; nil: nothing does.
	terminal *os.File
}

// close lets go. landed says that the tree runs here.
func (h *holdings) close(landed bool) {
	for _, x := range slices.Backward(h.all) {
		end := x.release
		if landed {
			end = x.landed
		}
		if end != nil {
			end()
		}
		if x.file != nil {
			_ = x.file.Close()
		}
	}
	if !landed {
		engine.CloseFar(h.far)
	}
	h.all, h.files, h.far, h.terminal = nil, nil, nil, nil
}

// start sets to work what must not work before the commit.
func (h *holdings) start(ctx context.Context) error {
	for _, x := range h.all {
		if x.start != nil {
			if err := x.start(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// hold makes everything ready that is to stand for external keys. All failures
// come back as one refusal that lists each. note, if not nil, is told of what is made.
// Preconditions: the caller closes the result.
func (a *Agent) hold(ctx context.Context, req *wire.PrepareRequest, note func(createdFile) error) (*holdings, error) {
	h := &holdings{files: map[string]engine.Inherit{}, far: map[string]*engine.Far{}}
	var bad []*wire.Problem
	known := req.Requirements.GetExternals()
	for _, r := range resolutions(req) {
		q := &holdRequest{Resolution: r, agent: a, migration: req.Id, source: req.Source, note: note}
		for _, e := range known {
			if e.Key == r.Key {
				q.external = append(q.external, e)
			}
		}
		x, err := h.hold(ctx, q, known)
		if err != nil {
			bad = append(bad, q.problem(err))
			continue
		}
		h.all = append(h.all, x)
		if x.far != nil {
			h.far[r.Key] = x.far
			continue
		}
		h.files[r.Key] = engine.Inherit{File: x.file, Forward: x.forward, AnyKind: x.anyKind}
	}
	if at := req.Options.GetAttach(); at != nil && bad == nil {
		x, err := a.holdAttachment(req.Id, at)
		if err != nil {
			h.close(false)
			return nil, err
		}
		h.all, h.terminal = append(h.all, x), x.file
	}
	if bad != nil {
		h.close(false)
		return nil, &wire.Failure{
			Code: wire.Code_CODE_REFUSED, Message: "files for the external keys cannot be provided, nothing was touched", Problems: bad,
		}
	}
	return h, nil
}

func (h *holdings) hold(ctx context.Context, q *holdRequest, known []*wire.ExternalFile) (*held, error) {
	_, twice := h.files[q.Key]
	if _, far := h.far[q.Key]; far {
		twice = true
	}
	r, ok := resolvers[q.Resolver]
	switch {
	case q.Key == "":
		return nil, hintedf("give KEY=PATH", "no key is named for it")
	case q.Resolver == "":
		return nil, hintedf(supplyHint(q.Key), "it was declared external, and no rule of this host says what stands for it")
	case !ok:
		return nil, hintedf("there are "+strings.Join(resolverNames(), ", "), "this agent has no resolver %q", q.Resolver)
	case len(q.external) == 0 && !r.far:
		return nil, hintedf("declared and found are: "+keysOf(known), "no external file of the tree has this key")
	case twice:
		return nil, hintedf("name one file for it", "the key is handed in twice")
	}
	return r.hold(ctx, q)
}

// supplyHint says how an external object can be supplied.
func supplyHint(key string) string {
	return fmt.Sprintf("say what is: --external '%s=path:/PATH', an [[external]] table in the agent's configuration, or godwit-agent provide '%s'", key, key)
}

func resolverNames() []string {
	names := []string{external.Image}
	for n := range resolvers {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// hintedError is an error with a remedy.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }

func hintedf(hint, format string, args ...any) error {
	return &hintedError{err: fmt.Errorf(format, args...), hint: hint}
}

// problem is what stands in the way of holding a key.
func (q *holdRequest) problem(err error) *wire.Problem {
	p := &wire.Problem{Object: objectOf(q.Resolution), Reason: err.Error()}
	if p.Object.Path == "" && len(q.external) > 0 {
		p.Object.Path = q.external[0].Path
	}
	if q.Argument != "" {
		p.Reason = q.Argument + ": " + p.Reason
	}
	if h, ok := errors.AsType[*hintedError](err); ok {
		p.Hint = h.hint
	}
	return p
}

// objectOf names what a resolution is for, as it was at the source.
func objectOf(r *wire.Resolution) *wire.Object {
	if len(r.Objects) == 0 {
		return &wire.Object{Key: r.Key}
	}
	return nameObject(r.Objects[0])
}

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

// resolutions are those of a request. What Inherit says is one with a path.
func resolutions(req *wire.PrepareRequest) []*wire.Resolution {
	out := slices.Clone(req.Resolutions)
	for _, in := range req.Options.GetInherit() {
		if slices.ContainsFunc(req.Resolutions, func(r *wire.Resolution) bool { return r.Key == in.Key }) {
			continue
		}
		out = append(out, &wire.Resolution{Key: in.Key, Resolver: external.Path, Argument: in.Path, Forward: in.Forward})
	}
	return slices.DeleteFunc(out, func(r *wire.Resolution) bool { return !external.Declares(r.Resolver) })
}

// servesNamed serves what can be opened at a path.
func servesNamed(o *wire.OpenObject, e external.Entry) error {
	switch {
	case slices.Contains([]string{"regular", "directory", "fifo", "pipe", "tty", "chr"}, o.Kind):
		return nil
	case o.Kind == "unix-stream" && (filepath.IsAbs(o.Peer) || e.Argument != ""):
		return nil
	case strings.HasPrefix(o.Kind, "unix-"), o.Kind == "tcp", o.Kind == "udp":
		return fmt.Errorf("a socket cannot be opened at a path")
	}
	return fmt.Errorf("what is of kind %s cannot be opened at a path", o.Kind)
}

// flags are the recorded open flags of all descriptions with the key: those of the
// first, with an access mode that is enough for all.
func (q *holdRequest) flags() int {
	flags := int(q.external[0].Flags)
	for _, e := range q.external[1:] {
		if int(e.Flags)&unix.O_ACCMODE != flags&unix.O_ACCMODE && int(e.Flags)&unix.O_PATH == 0 {
			flags = flags&^unix.O_ACCMODE | unix.O_RDWR
		}
		if int(e.Flags)&unix.O_PATH == 0 {
			flags &^= unix.O_PATH
		}
	}
	return flags
}

// declarable says whether an object may be declared external: it has a key, and is
// not wholly inside the tree.
func declarable(o *wire.OpenObject) error {
	switch {
	case o.Key == "":
		return fmt.Errorf("what is of kind %s is never external", o.Kind)
	case o.Carry != plan.CarryImage, o.Path != "":
		return nil
	}
	return fmt.Errorf("all of it is in the tree and travels with the image")
}
