package coordinator

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"godwit/wire"
)

func (a *app) cmdAbort() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "abort ID",
		Short: "End a migration; the tree runs on at the source",
		Long: `abort ends a migration that has not reached its commit, and waits until the tree
runs on at the source. After the commit the tree belongs to the destination: the
command then changes nothing and fails. A migration that was aborted before is
no failure.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runAbort(ctx, args[0], wait)
		},
		ValidArgsFunction: a.completeIDs,
	}
	cmd.Flags().DurationVar(&wait, "wait", time.Minute, "`time` to wait for the tree to run again")
	return cmd
}

func (a *app) runAbort(ctx context.Context, id string, wait time.Duration) error {
	if wait <= 0 {
		return usagef("--wait %s: want more than zero", wait)
	}
	l, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	rec, err := askAbort(ctx, l, id, "aborted by the operator", nil)
	if rec == nil || rec.State != wire.State_STATE_ABORTING && rec.State != wire.State_STATE_ABORTED {
		return err
	}
	if err != nil {
		// The record says Aborting: whoever did not hear it reads it there.
		a.log.Warn("an agent could not be told", "migration", id, "error", err)
	}
	return a.awaitAborted(ctx, l, rec, wait, func(r *wire.Record) string {
		return fmt.Sprintf("%s runs on at %s", subject(r), r.Source)
	})
}

// awaitAborted waits until a migration that is about to end has, and prints that; what
// says what has become of the tree.
func (a *app) awaitAborted(ctx context.Context, l *link, rec *wire.Record, wait time.Duration, what func(*wire.Record) string) error {
	f := &follow{link: l, view: quiet{}, wait: a.patience(), grace: wait}
	rec, err := f.run(ctx, rec)
	if err != nil {
		return err
	}
	if rec.State != wire.State_STATE_ABORTED && !lost(rec) {
		return failureOf(rec)
	}
	rec = settle(ctx, l, rec, time.Second)
	if a.output == outputJSON {
		doc := newMigrationDoc(rec, 0)
		doc.ExitCode = wire.ExitDone
		return writeJSON(a.stdout, doc)
	}
	how := "aborted"
	if lost(rec) {
		how = "over"
	}
	s := fmt.Sprintf("Migration %s is %s: %s.", rec.Id, how, what(rec))
	if f, ok := frozenTime(rec); ok {
		s += " It was frozen for " + formatDuration(f.Time) + "."
	}
	_, err = fmt.Fprintln(a.stdout, s)
	return err
}
