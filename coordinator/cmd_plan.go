package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"godwit/configs/external"
	"godwit/transport"
	"godwit/wire"
)

// planArgs are the arguments of plan.
type planArgs struct {
	migrateArgs
	hash bool
}

func (a *app) cmdPlan() *cobra.Command {
	var args planArgs
	cmd := &cobra.Command{
		Use:   "plan SOURCE:PID DESTINATION",
		Short: "Show what a process tree holds and what would become of it on another host",
		Long: `plan looks at the process PID of host SOURCE, with all its descendants, as migrate
would, and touches nothing. It lists every object that the tree has open, maps,
runs or stands on: who holds it, of what kind it is, whether the destination has
the same at its path (size, mode, time, build-id, with --hash the content), and how
it would be carried: in the image, by its path, by which resolver and by which
entry, or why it is refused.

` + entryHelp,
		Example: `  godwit plan alpha:412 beta
  godwit plan alpha:412 beta --hash --output json
  godwit plan alpha:412 beta --external fd:412:5=path:/srv/input`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, argv []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runPlan(ctx, argv[0], argv[1], args)
		},
		ValidArgsFunction: a.completeMove,
	}
	f := cmd.Flags()
	f.StringArrayVar(&args.external, "external", nil, "`ENTRY` that says what becomes of open files, as migrate has it (repeatable)")
	f.StringArrayVar(&args.inherit, "inherit", nil, "`KEY=PATH[,forward]`, as migrate has it (repeatable)")
	f.StringVar(&args.pidNamespace, "pid-namespace", "same", "`where` the pids are needed: same or new")
	args.streamFlags(f)
	f.BoolVar(&args.hash, "hash", false, "compare the contents of files, which reads all of them on both hosts")
	return cmd
}

func (a *app) runPlan(ctx context.Context, tree, destination string, args planArgs) error {
	source, pid, err := parseMove(tree, destination)
	if err != nil {
		return err
	}
	args.bandwidth, args.mode, args.downtime, args.total, args.noConverge = "0", "auto", 100*time.Millisecond, "0", "freeze"
	options, err := args.options()
	if err != nil {
		return err
	}
	nc, err := a.connectBus()
	if err != nil {
		return err
	}
	defer nc.Close()
	m := &migration{link: &link{nc: nc}, view: quiet{}, rec: &wire.Record{Id: transport.NewID(), Source: source, Destination: destination, Pid: pid, Options: options}}
	s, srcErr := m.survey(ctx, options, looking{look: true, hash: args.hash})
	if ctx.Err() == nil && s.req != nil && s.dstErr == nil {
		presences := s.presences
		s.dstErr = m.askResolve(ctx, s, options, false, s.req)
		s.presences = presences
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = bothErrors(m.rec, together(srcErr, s.lacks()), together(s.dstErr, s.vain()))
	if s.root == nil && s.objects == nil {
		return err
	}
	doc := newPlanDoc(m.rec, s)
	doc.ExitCode = exitCode(err)
	if a.output == outputJSON {
		a.failureShown = true
		doc.Error = newErrorDoc(wire.ErrorOf(err))
		return errors.Join(err, writeJSON(a.stdout, doc))
	}
	return errors.Join(err, doc.print(a.stdout, terminalWidth(a.stdout)))
}

// planDoc is a plan for programs.
type planDoc struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	PID         int32  `json:"pid"`
	Comm        string `json:"comm"`
	Command     string `json:"command"`
	Processes   int    `json:"processes"`
	MemoryBytes uint64 `json:"memory_bytes"`
	// EarlyBytes can travel while the tree runs; NotEarly says why nothing can.
	EarlyBytes uint64 `json:"early_bytes"`
	NotEarly   string `json:"not_early,omitempty"`
	// Lane is what the stream would travel over, Compression how.
	Lane        string          `json:"lane,omitempty"`
	Compression string          `json:"compression"`
	Objects     []planObjectDoc `json:"objects"`
	Error       *errorDoc       `json:"error,omitempty"`
	ExitCode    int             `json:"exit_code"`
}

type planObjectDoc struct {
	Key     string      `json:"key,omitempty"`
	Kind    string      `json:"kind"`
	Path    string      `json:"path,omitempty"`
	Link    string      `json:"link"`
	Flags   uint32      `json:"flags"`
	Offset  int64       `json:"offset"`
	Mode    uint32      `json:"mode"`
	Size    uint64      `json:"size"`
	MTimeNS int64       `json:"mtime_ns,omitempty"`
	Dev     uint64      `json:"dev"`
	Ino     uint64      `json:"ino"`
	Rdev    uint64      `json:"rdev,omitempty"`
	BuildID string      `json:"build_id,omitempty"`
	SHA256  string      `json:"sha256,omitempty"`
	Queued  uint64      `json:"queued,omitempty"`
	Peer    string      `json:"peer,omitempty"`
	Holders []holderDoc `json:"holders"`
	// Inherited is an ancestor of the tree that has the same description.
	Inherited *holderDoc `json:"inherited,omitempty"`
	// Reader, outside the tree, reads what is typed on a terminal, which the tree does
	// not get if the terminal is proxied.
	Reader *holderDoc `json:"reader,omitempty"`
	// Carry is "image", "path", "external" or "refused".
	Carry string `json:"carry"`
	// Of what is external: the resolver, its argument, and the entry that decided with
	// the place where it stands.
	Resolver string `json:"resolver,omitempty"`
	Argument string `json:"argument,omitempty"`
	Entry    string `json:"entry,omitempty"`
	Origin   string `json:"origin,omitempty"`
	// At the destination: "same", "differs" or "missing"; empty: it does not matter. What
	// travels with its content is "made" there, "replaced", or "kept" since it is the same.
	Presence    string   `json:"presence,omitempty"`
	Differences []string `json:"differences,omitempty"`
	Reason      string   `json:"reason,omitempty"`
	Hint        string   `json:"hint,omitempty"`
}

type holderDoc struct {
	PID      int32    `json:"pid"`
	InnerPID int32    `json:"inner_pid"`
	Comm     string   `json:"comm"`
	FDs      []int32  `json:"fds,omitempty"`
	Roles    []string `json:"roles,omitempty"`
}

func newPlanDoc(r *wire.Record, s *survey) *planDoc {
	d := &planDoc{Source: r.Source, Destination: r.Destination, PID: r.Pid, Comm: s.root.GetComm(), Command: s.root.GetCommand(),
		Processes: len(s.req.GetTasks()), MemoryBytes: s.req.GetMemoryBytes(), EarlyBytes: s.req.GetEarlyBytes(), NotEarly: s.req.GetNotEarly(), Objects: []planObjectDoc{}}
	if s.lane != nil {
		d.Lane = printable(s.lane.Text())
	}
	d.Compression = strings.ToLower(strings.TrimPrefix(r.Options.GetCompression().String(), "COMPRESSION_"))
	resolved := map[string]*wire.Resolution{}
	for _, x := range s.resolutions {
		resolved[x.Key] = x
	}
	there := map[string]*wire.Presence{}
	for _, p := range s.presences {
		there[p.Path] = p
	}
	for _, o := range s.objects {
		x := newPlanObjectDoc(o, resolved[o.Key], there[o.Path])
		if x.Resolver == external.Carry {
			x.Presence, x.Differences = carriedPresence(o, resolved[o.Key], s.req)
		}
		d.Objects = append(d.Objects, x)
	}
	return d
}

func newPlanObjectDoc(o *wire.OpenObject, r *wire.Resolution, p *wire.Presence) planObjectDoc {
	d := planObjectDoc{Key: o.Key, Kind: o.Kind, Path: o.Path, Link: o.Link, Flags: o.Flags, Offset: o.Offset, Mode: o.Mode, Size: o.Size,
		MTimeNS: o.MtimeNs, Dev: o.Dev, Ino: o.Ino, Rdev: o.Rdev, BuildID: o.BuildId, SHA256: o.Sha256, Queued: o.Queued, Peer: o.Peer,
		Carry: o.Carry, Presence: p.GetState(), Differences: p.GetDifferences(), Reason: o.Reason, Hint: o.Hint}
	for _, h := range o.Holders {
		d.Holders = append(d.Holders, holderDoc{PID: h.Pid, InnerPID: h.InnerPid, Comm: h.Comm, FDs: h.Fds, Roles: h.Roles})
	}
	if h := o.Inherited; h != nil {
		d.Inherited = &holderDoc{PID: h.Pid, Comm: h.Comm, FDs: h.Fds}
	}
	if h := o.Reader; h != nil {
		d.Reader = &holderDoc{PID: h.Pid, Comm: h.Comm}
	}
	if r == nil || o.Key == "" {
		return d
	}
	d.Resolver, d.Argument, d.Entry, d.Origin = r.Resolver, r.Argument, r.Entry, r.Origin
	if r.Resolver != external.Image {
		d.Carry, d.Reason, d.Hint = "external", "", ""
	}
	return d
}

// carriedPresence says what becomes of a place to which something travels with its
// content. needs, which was made with that in view, may be nil: the source refuses.
func carriedPresence(o *wire.OpenObject, r *wire.Resolution, needs *wire.Requirements) (string, []string) {
	if o.Kind == "directory" {
		return "made", []string{"with its content, unless it is there"}
	}
	travels := slices.ContainsFunc(needs.GetFiles(), func(f *wire.RequiredFile) bool { return f.Path == r.Argument && f.Carried })
	switch h := r.Have; {
	case h == nil:
		return "made", []string{"with its content, " + formatBytes(o.Size)}
	case !travels && needs != nil:
		return "kept", []string{"it has the same content"}
	case h.MtimeNs > o.MtimeNs:
		return "replaced", []string{"with its content, " + formatBytes(o.Size) + ", although it is newer"}
	}
	return "replaced", []string{"with its content, " + formatBytes(o.Size)}
}

// print prints the plan; width bounds a line, 0 does not.
func (d *planDoc) print(w io.Writer, width int) error {
	if _, err := fmt.Fprintf(w, "pid %d (%s) of %s to %s: %s, %s of memory, %s\n%s\n%s\n", d.PID, printable(d.Comm), d.Source, d.Destination,
		plural(d.Processes, "process"), formatBytes(d.MemoryBytes), plural(len(d.Objects), "object"), d.copyText(), d.streamText()); err != nil {
		return err
	}
	t := newTable(w, "HELD BY", "KIND", "KEY", "OBJECT", "AT "+strings.ToUpper(d.Destination), "CARRIED")
	for _, o := range d.Objects {
		t.AppendRow(table.Row{o.holdersText(), o.Kind, o.Key, printable(o.name()), o.presenceText(), o.carryText()})
	}
	if width > 0 {
		t.Style().Size.WidthMax = width
	}
	t.Render()
	return nil
}

// copyText says when the memory travels.
func (d *planDoc) copyText() string {
	switch {
	case d.NotEarly != "":
		return "its memory travels while the tree is frozen: " + printable(d.NotEarly)
	case d.MemoryBytes < wire.PrecopyWorth:
		return "its memory travels while the tree is frozen, which takes no longer than all else (--mode precopy: while it runs)"
	}
	return fmt.Sprintf("%s of its memory travels while the tree runs, round by round what was written meanwhile, the rest while it is frozen", formatBytes(min(d.EarlyBytes, d.MemoryBytes)))
}

// streamText says how the stream would travel.
func (d *planDoc) streamText() string {
	s := ""
	if d.Lane != "" {
		s = "lane: " + d.Lane + "\n"
	}
	s += "compression: " + d.Compression
	if d.Compression == "auto" {
		s += ", by what is measured on the way"
	}
	return s + "\n"
}

func (o *planObjectDoc) name() string {
	name := o.Path
	if name == "" {
		name = o.Link
	}
	if o.Peer != "" {
		name += " to " + o.Peer
	}
	return name
}

func (o *planObjectDoc) presenceText() string {
	if len(o.Differences) == 0 {
		return o.Presence
	}
	return o.Presence + ": " + strings.Join(o.Differences, "; ")
}

func (o *planObjectDoc) carryText() string {
	by := ""
	if o.Entry != "" {
		by = fmt.Sprintf(" (%s %s)", o.Origin, o.Entry)
	}
	switch o.Carry {
	case "image":
		return "in the image" + by
	case "path":
		return "by its path" + by
	case "refused":
		return "refused: " + o.Reason + by
	}
	s := o.Resolver
	if s == "" {
		s = "external, by nothing yet"
	}
	if o.Argument != "" {
		s += " " + o.Argument
	}
	if s += by; o.Queued > 0 && o.Resolver != external.Proxy {
		s += fmt.Sprintf("; %s in it stay behind", plural(int(o.Queued), "byte"))
	}
	if h := o.Reader; h != nil && o.Resolver == external.Proxy {
		s += fmt.Sprintf("; output only: pid %d (%s) reads what is typed", h.PID, printable(h.Comm))
	}
	return s
}

func (o *planObjectDoc) holdersText() string {
	s := holdersText(o.Holders)
	if h := o.Inherited; h != nil {
		s += fmt.Sprintf(", inherited from %d %s", h.PID, printable(h.Comm))
	}
	return s
}

// holdersText is who holds an object: pids with their descriptors and roles.
func holdersText(hs []holderDoc) string {
	var out []string
	for i, h := range hs {
		if i == 3 {
			out = append(out, fmt.Sprintf("and %d more", len(hs)-i))
			break
		}
		s := fmt.Sprintf("%d %s", h.PID, printable(h.Comm))
		for _, n := range h.FDs[:min(len(h.FDs), 4)] {
			s += fmt.Sprintf(" %d", n)
		}
		if len(h.FDs) > 4 {
			s += " …"
		}
		for _, r := range h.Roles {
			if !slices.Contains(external.Roles, r) {
				s += " " + r
			}
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}
