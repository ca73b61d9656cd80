package coordinator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"godwit/configs"
	"godwit/configs/external"
	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/wire"
)

// migrateArgs are the arguments of migrate.
type migrateArgs struct {
	external     []string
	inherit      []string
	pidNamespace string
	bandwidth    string
	timeout      time.Duration
	mode         string
	downtime     time.Duration
	rounds       uint32
	total        string
	noConverge   string
	lane         string
	compress     string
	detach       bool
	attach       bool
	hangUp       time.Duration
}

func (a *app) cmdMigrate() *cobra.Command {
	var args migrateArgs
	cmd := &cobra.Command{
		Use:   "migrate SOURCE:PID DESTINATION",
		Short: "Move a running process tree to another host",
		Long: `migrate moves the process PID of host SOURCE, with all its descendants, to host
DESTINATION, while it runs. First both hosts are asked whether that can work; if
one refuses, nothing is touched and everything that stands in the way is listed.
Then the tree is copied, rebuilt and let go at the destination. Until the
destination has committed, any failure lets the tree run on at the source.

Memory travels while the tree runs (pre-copy), round by round what was written
meanwhile, until the rest fits --max-downtime; then the tree is frozen. A small
tree is frozen at once: --mode says otherwise. If memory is written faster than it
travels, --on-no-converge says what comes next.

With --mode postcopy or hybrid the tree runs at the destination before its memory is
there, and waits for what it misses. Until all of it has come both hosts are needed:
if one of them or the bus is away, the tree waits; if the source is gone for good, it
is lost.

The stream goes straight from host to host where the destination reaches the source's
agent, else over the cluster (--lane); it is compressed where that is faster
(--compress).

What becomes of open files is said by entries; "godwit plan" shows what there is,
and what becomes of each file.

` + entryHelp + `
--inherit KEY=PATH is --external KEY=path:PATH.

With --attach the tree lands on the terminal of this command, in the foreground of a
session of its own, as if it had been started by ssh -t; ~. at the beginning of a line
hangs up. Should this command be killed, or cut off, the tree waits for
--hang-up-after, in which "godwit attach ID" comes back to it.
` + attachExitHelp + `

An interrupt (Ctrl-C) asks to abort, which works until the commit; a second one
leaves the migration to itself. Progress goes to the standard error, the report
to the standard output; with --output json that is one document.`,
		Example: `  godwit migrate alpha:412 beta
  godwit migrate alpha:412 beta --attach
  godwit migrate alpha:412 beta --external role:stdout=journal --external 'path:/var/log/app/*.log=path:/srv/log/{base}'
  godwit migrate alpha:412 beta --inherit 'file[72:a3e7]=/run/input.fifo' --inherit 'file[1f:88]=/var/log/app.log,forward'`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, argv []string) error {
			return a.runMigrate(cmd.Context(), argv[0], argv[1], args)
		},
		ValidArgsFunction: a.completeMove,
	}
	f := cmd.Flags()
	f.StringArrayVar(&args.external, "external", nil, "`ENTRY` that says what becomes of open files: SELECTOR[=RESOLVER[:ARGUMENT][,OPTION…]] (repeatable)")
	f.StringArrayVar(&args.inherit, "inherit", nil, "`KEY=PATH[,forward]`: the file of the destination for an external key, which it declares, too (repeatable)")
	f.StringVar(&args.pidNamespace, "pid-namespace", "same", "`where` the pids are needed: same, or new for a pid namespace of the tree's own")
	f.StringVar(&args.bandwidth, "bandwidth", "0", "`rate` that the transfer may use, such as 100MiB/s or 800Mbit/s; 0: no cap but the agent's")
	f.DurationVar(&args.timeout, "timeout", 0, "`time` that the tree may be frozen before the commit; 0: the agent's default")
	f.StringVar(&args.mode, "mode", "auto", "`when` memory travels: auto, precopy while the tree runs, stop-and-copy while it is frozen, postcopy when it runs at the destination, or hybrid: once before, and the rest after")
	f.DurationVar(&args.downtime, "max-downtime", 100*time.Millisecond, "`time` that the tree should be frozen at most")
	f.Uint32Var(&args.rounds, "max-rounds", 0, "`number` of rounds of pre-copy; 0: 30")
	f.StringVar(&args.total, "max-total", "0", "`size` of what may travel before the freeze, such as 8GiB; 0: four times the memory")
	f.StringVar(&args.noConverge, "on-no-converge", "freeze", "`what` to do if memory is written faster than it travels: freeze for longer, throttle the tree, postcopy for what is left, or abort")
	args.streamFlags(f)
	f.BoolVar(&args.attach, "attach", false, "give the tree this terminal, in the place of the one that it was started on, until it ends")
	f.DurationVar(&args.hangUp, "hang-up-after", defaultHangUp, "with --attach: "+hangUpHelp)
	f.BoolVar(&args.detach, "detach", false, "return as soon as the source has begun, and print the migration's id")
	return cmd
}

// entryHelp tells of entries in the help of commands.
const entryHelp = `An entry is SELECTOR[=RESOLVER[:ARGUMENT][,OPTION[=VALUE]...]].
Selectors: a key, file[MNT:INO], tty[RDEV:DEV], pipe[INO], unix[INO] or socket[INO], as
CRIU and /proc have them; fd:PID:N, or fd:N if one process alone has it; role:stdin,
role:stdout, role:stderr; path:GLOB, where ** goes across directories; kind:KIND.
Resolvers: path:PATH, a file of the destination ({base}, {dir} and {path} are those of
the source, {{ is one {); create, an empty file or fifo there; carry, the content travels, too;
inherit or provide, what "godwit-agent provide" keeps ready there; journal, a stream
to its journald; null; proxy, the bytes go on flowing from and to the source; image,
as without any entry. Without a resolver the destination's [[external]] rules decide,
or what it was provided with. Options: forward, size=same|grow-ok|any|truncate,
mode=same|any, content=any, overwrite, limit=SIZE.
`

// completeMove completes SOURCE:PID DESTINATION.
func (a *app) completeMove(cmd *cobra.Command, argv []string, prefix string) ([]string, cobra.ShellCompDirective) {
	switch len(argv) {
	case 0:
		names := a.hostNames(cmd, prefix)
		for i := range names {
			names[i] += ":"
		}
		return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	case 1:
		return a.hostNames(cmd, prefix), cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// parseMove reads SOURCE:PID and DESTINATION.
func parseMove(tree, destination string) (source string, pid int32, err error) {
	if source, pid, err = parseTree(tree); err != nil {
		return "", 0, err
	}
	if err := transport.CheckName(destination); err != nil {
		return "", 0, usagef("destination host: %w", err)
	}
	if source == destination {
		return "", 0, usagef("source and destination are the same host, %s", source)
	}
	return source, pid, nil
}

// parseTree reads HOST:PID.
func parseTree(s string) (host string, pid int32, err error) {
	host, text, ok := strings.Cut(s, ":")
	if !ok {
		return "", 0, usagef("%q is not HOST:PID", s)
	}
	if err := transport.CheckName(host); err != nil {
		return "", 0, usagef("%q: source host: %w", s, err)
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n <= 0 {
		return "", 0, usagef("%q: %q is not the pid of a process", s, text)
	}
	return host, int32(n), nil
}

// parseInherit reads KEY=PATH[,forward].
func parseInherit(s string) (*wire.Inherit, error) {
	key, path, ok := strings.Cut(s, "=")
	if !ok || key == "" || path == "" {
		return nil, usagef("--inherit %q: want KEY=PATH or KEY=PATH,forward", s)
	}
	if _, err := external.ParseSelector(key); err != nil {
		return nil, usagef("--inherit %q: %w", s, err)
	}
	path, forward := strings.CutSuffix(path, ",forward")
	if !filepath.IsAbs(path) {
		return nil, usagef("--inherit %q: the path %q is one of the destination and must be absolute", s, path)
	}
	return &wire.Inherit{Key: key, Path: path, Forward: forward}, nil
}

// options makes the options of a migration out of the arguments.
func (m *migrateArgs) options() (*wire.MigrateOptions, error) {
	o := &wire.MigrateOptions{}
	for _, k := range m.external {
		if _, err := external.Parse(k); err != nil {
			return nil, usagef("--external: %w", err)
		}
		if slices.Contains(o.External, k) {
			return nil, usagef("--external %s is given twice", k)
		}
		o.External = append(o.External, k)
	}
	for _, s := range m.inherit {
		in, err := parseInherit(s)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(o.Inherit, func(i *wire.Inherit) bool { return i.Key == in.Key }) {
			return nil, usagef("--inherit is given twice for %s", in.Key)
		}
		o.Inherit = append(o.Inherit, in)
		if !slices.Contains(o.External, in.Key) {
			o.External = append(o.External, in.Key)
		}
	}
	switch m.pidNamespace {
	case "same":
	case "new":
		o.PidNamespaceNew = true
	default:
		return nil, usagef("--pid-namespace %q: want same or new", m.pidNamespace)
	}
	rate, err := configs.ParseRate(m.bandwidth)
	if err != nil {
		return nil, usagef("--bandwidth %q: %w", m.bandwidth, err)
	}
	o.Bandwidth = uint64(rate)
	if m.timeout < 0 || m.timeout > 0 && m.timeout < time.Millisecond {
		return nil, usagef("--timeout %s: want at least 1ms, or 0 for the agent's default", m.timeout)
	}
	o.TimeoutMs = uint64(m.timeout.Milliseconds())
	return o, m.copying(o)
}

// copying says when memory travels.
func (m *migrateArgs) copying(o *wire.MigrateOptions) error {
	var ok bool
	if o.CopyMode, ok = copyModes[m.mode]; !ok {
		return usagef("--mode %q: want auto, precopy, stop-and-copy, postcopy or hybrid", m.mode)
	}
	if o.NoConverge, ok = noConverge[m.noConverge]; !ok {
		return usagef("--on-no-converge %q: want freeze, throttle, postcopy or abort", m.noConverge)
	}
	if m.downtime < time.Millisecond {
		return usagef("--max-downtime %s: want at least 1ms", m.downtime)
	}
	o.MaxDowntimeMs, o.MaxRounds = uint64(m.downtime.Milliseconds()), m.rounds
	total, err := configs.ParseSize(m.total)
	if err != nil {
		return usagef("--max-total %q: %w", m.total, err)
	}
	o.MaxCopyBytes = uint64(total)
	if o.Lane, ok = laneChoices[m.lane]; !ok {
		return usagef("--lane %q: want auto, direct or cluster", m.lane)
	}
	if o.Compression, ok = compressions[m.compress]; !ok {
		return usagef("--compress %q: want auto, none, s2 or zstd", m.compress)
	}
	return nil
}

// streamFlags are the flags about the stream.
func (m *migrateArgs) streamFlags(f *pflag.FlagSet) {
	f.StringVar(&m.lane, "lane", "auto", "`way` of the stream: auto, direct from host to host or not at all, or over the cluster")
	f.StringVar(&m.compress, "compress", "auto", "`codec` of the stream: auto, by measurement on the way, none, s2 or zstd")
}

// laneChoices are the values of --lane, compressions those of --compress.
var (
	laneChoices = map[string]wire.LaneChoice{
		"auto": wire.LaneChoice_LANE_CHOICE_AUTO, "direct": wire.LaneChoice_LANE_CHOICE_DIRECT, "cluster": wire.LaneChoice_LANE_CHOICE_CLUSTER,
	}
	compressions = map[string]wire.Compression{
		"auto": wire.Compression_COMPRESSION_AUTO, "none": wire.Compression_COMPRESSION_NONE, "s2": wire.Compression_COMPRESSION_S2, "zstd": wire.Compression_COMPRESSION_ZSTD,
	}
)

// copyModes are the values of --mode, noConverge those of --on-no-converge.
var (
	copyModes = map[string]wire.CopyMode{
		"auto": wire.CopyMode_COPY_MODE_AUTO, "precopy": wire.CopyMode_COPY_MODE_PRECOPY, "stop-and-copy": wire.CopyMode_COPY_MODE_STOP,
		"postcopy": wire.CopyMode_COPY_MODE_POSTCOPY, "hybrid": wire.CopyMode_COPY_MODE_HYBRID,
	}
	noConverge = map[string]wire.NoConverge{
		"freeze": wire.NoConverge_NO_CONVERGE_FREEZE, "throttle": wire.NoConverge_NO_CONVERGE_THROTTLE, "abort": wire.NoConverge_NO_CONVERGE_ABORT,
		"postcopy": wire.NoConverge_NO_CONVERGE_POSTCOPY,
	}
)

// errInterrupted is the cause of a migration that the operator ended before
// the agents had begun.
var errInterrupted = wire.Errorf(wire.Code_CODE_ABORTED, "interrupted by the operator")

func (a *app) runMigrate(ctx context.Context, tree, destination string, args migrateArgs) error {
	source, pid, err := parseMove(tree, destination)
	if err != nil {
		return err
	}
	options, err := args.options()
	if err != nil {
		return err
	}
	var in, out *os.File
	if args.attach {
		if args.detach || a.output == outputJSON {
			return usagef("--attach goes neither with --detach nor with --output json")
		}
		if err := checkHangUp(args.hangUp); err != nil {
			return err
		}
		if in, out, err = a.ownTerminal(); err != nil {
			return err
		}
	}
	start := time.Now()
	l, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	var v view = quiet{}
	if a.output == outputText && !args.detach {
		v = newTextView(a.stderr, false)
	}
	defer v.close()

	m := &migration{link: l, view: v, rec: newMigration(source, pid, destination, options)}
	var at *attachment
	if args.attach {
		if at, err = attach(l, m.rec, in, out, args.hangUp, ""); err != nil {
			return err
		}
		defer func() { _ = at.close() }()
		m.rec.Options.Attach = at.asked
	}
	begun := make(chan struct{})
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-a.interrupts:
			cancel(errInterrupted)
		case <-begun:
		}
	}()
	err = m.begin(work)
	close(begun)
	if err == nil && work.Err() != nil { // in the last moment
		err = m.fail(ctx, context.Cause(work))
	}
	if !m.created {
		return err
	}
	if err == nil && args.detach {
		return a.printDetached(m.rec)
	}
	if err != nil && (!m.sent || wire.Terminal(m.rec.State)) {
		return a.finish(ctx, l, v, m.rec, time.Since(start), err)
	}
	if err != nil {
		// The source may have begun; the record tells how that ends.
		v.note(m.rec.Id, err.Error())
	}
	if current, _, gerr := l.records.Get(ctx, m.rec.Id); gerr == nil {
		m.rec = current
	}
	f := &follow{link: l, view: v, wait: a.patience(), interrupts: a.interrupts}
	rec, err := f.run(ctx, m.rec)
	err = a.finish(ctx, l, v, rec, time.Since(start), err)
	if at != nil && err == nil {
		return at.serve(ctx, a.interrupts)
	}
	return err
}

func (a *app) printDetached(r *wire.Record) error {
	if a.output == outputJSON {
		return writeJSON(a.stdout, newMigrationDoc(r, 0))
	}
	_, err := fmt.Fprintln(a.stdout, r.Id)
	return err
}

// finish prints the report of a migration and returns the error for its exit
// code; err is why this command stopped following it, or nil.
func (a *app) finish(ctx context.Context, l *link, v view, rec *wire.Record, total time.Duration, err error) error {
	if wire.Terminal(rec.State) {
		rec = settle(ctx, l, rec, reportWait)
	}
	v.close()
	// What the record says is the whole story, with the reason of whoever was
	// first to fail.
	if f := failureOf(rec); f != nil && (err == nil || wire.Terminal(rec.State)) {
		err = f
	}
	if a.output == outputJSON {
		a.failureShown = true
		doc := newMigrationDoc(rec, total)
		doc.ExitCode = exitCode(err)
		if err != nil && doc.Error == nil {
			doc.Error = newErrorDoc(wire.ErrorOf(err))
		}
		return errors.Join(err, writeJSON(a.stdout, doc))
	}
	if err != nil {
		return err
	}
	return printReport(a.stdout, rec, total)
}

// patience is how long commands bear silence.
func (a *app) patience() rules.Patience {
	if a.wait != nil {
		return *a.wait
	}
	return defaultPatience
}
