package coordinator

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

func (a *app) cmdHistory() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "history [ID]",
		Short: "List migrations, or tell everything about one",
		Long: `history lists the migrations, the latest last: those in flight, and how the
others ended. With an ID it tells all steps of one, what each host measured, and
what went wrong.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			if len(args) == 1 {
				return a.runHistoryOf(ctx, args[0])
			}
			return a.runHistory(ctx, limit)
		},
		ValidArgsFunction: a.completeIDs,
	}
	cmd.Flags().IntVarP(&limit, "limit", "n", 50, "the latest `N` only; 0: all")
	return cmd
}

func (a *app) runHistory(ctx context.Context, limit int) error {
	if limit < 0 {
		return usagef("--limit %d: want 0 or more", limit)
	}
	l, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	recs, err := l.records.List(ctx)
	if err != nil {
		return err
	}
	left := 0
	if limit > 0 && len(recs) > limit {
		left = len(recs) - limit
		recs = recs[left:]
	}
	if a.output == outputJSON {
		docs := []*migrationDoc{}
		for _, r := range recs {
			docs = append(docs, newMigrationDoc(r, 0))
		}
		return writeJSON(a.stdout, struct {
			Migrations []*migrationDoc `json:"migrations"`
			LeftOff    int             `json:"left_off"` // older ones
		}{docs, left})
	}
	return printHistory(a.stdout, recs, left, time.Local)
}

func printHistory(w io.Writer, recs []*wire.Record, left int, zone *time.Location) error {
	if len(recs) == 0 {
		_, err := fmt.Fprintln(w, "No migration has been asked for yet.")
		return err
	}
	t := newTable(w, "ID", "STARTED", "FROM", "TO", "COMMAND", "STATE", "OUTCOME", "TOTAL", "FROZEN", "BYTES")
	rightAlign(t, 8, 9, 10)
	for _, r := range recs {
		froze, bytes := "-", "-"
		if f, ok := frozenTime(r); ok {
			froze = formatDuration(f.Time)
		}
		if n := transferOf(r).GetBytes(); n != 0 {
			bytes = formatBytes(n)
		}
		t.AppendRow(table.Row{
			r.Id, time.UnixMilli(r.CreatedUnixMs).In(zone).Format(time.DateTime), fmt.Sprintf("%s:%d", r.Source, r.Pid), r.Destination,
			printable(r.Comm), r.State.Word(), outcome(r), formatDuration(lasted(r)), froze, bytes,
		})
	}
	t.Render()
	if left > 0 {
		if _, err := fmt.Fprintf(w, "%d older ones are not shown; --limit 0 shows all.\n", left); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) runHistoryOf(ctx context.Context, id string) error {
	l, rec, err := a.connectTo(ctx, id)
	if err != nil {
		return err
	}
	defer l.close()
	if a.output == outputJSON {
		return writeJSON(a.stdout, newMigrationDoc(rec, 0))
	}
	return printMigration(a.stdout, rec, time.Local)
}

// printMigration tells everything about one migration.
func printMigration(w io.Writer, r *wire.Record, zone *time.Location) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("migration", "%s", r.Id)
	line("tree", "%s on %s → %s", subject(r), r.Source, r.Destination)
	if r.Command != "" {
		line("command", "%s", printable(r.Command))
	}
	if r.Tasks != 0 {
		line("size", "%s, %s, %s of memory", plural(r.Tasks, "process"), plural(r.Threads, "thread"), formatBytes(r.MemoryBytes))
	}
	if o := r.Options; o != nil {
		for _, k := range o.External {
			how := "provided by " + r.Destination
			if i := slices.IndexFunc(o.Inherit, func(in *wire.Inherit) bool { return in.Key == k }); i >= 0 {
				how = o.Inherit[i].Path
				if o.Inherit[i].Forward {
					how += ", forwarded"
				}
			}
			line("external", "%s: %s", k, how)
		}
		if o.PidNamespaceNew {
			line("pids", "in a namespace of their own")
		}
	}
	line("asked by", "%s", r.Coordinator)
	owner := r.Source
	if r.Owner == wire.Owner_OWNER_DESTINATION {
		owner = r.Destination
		if r.LandedPid != 0 {
			owner += fmt.Sprintf(", pid %d", r.LandedPid)
		}
	}
	line("outcome", "%s", outcome(r))
	line("tree is at", "%s", owner)
	b.WriteString("steps\n")
	for i, s := range r.Steps {
		since := ""
		if i > 0 {
			since = "+" + formatDuration(time.Duration(s.UnixMs-r.Steps[i-1].UnixMs)*time.Millisecond)
		}
		fmt.Fprintf(&b, "  %s  %10s  %-14s by %s\n", time.UnixMilli(s.UnixMs).In(zone).Format("2006-01-02 15:04:05.000"), since, s.State.Word(), s.By)
	}
	if r.Reason != "" {
		line("reason", "%s", r.Reason)
	}
	if f := r.GetError().Failure(); f != nil {
		line("error", "%s", strings.ReplaceAll(f.Error(), "\n", "\n  "))
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return err
	}
	if r.State == wire.State_STATE_COMPLETED {
		shown := proto.CloneOf(r)
		shown.Error = nil // stands above already
		return printReport(w, shown, 0)
	}
	return nil
}
