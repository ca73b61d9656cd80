package coordinator

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/wire"
)

func (a *app) cmdWatch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch [ID]",
		Short: "Show migrations while they go on",
		Long: `watch shows one migration, or all that are in flight, until they end. With an ID
the exit code is that of the migration, as migrate would have given it. With
--output json it writes one document a line: each change of state, progress.

Leaving it (Ctrl-C) changes nothing about a migration.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			if len(args) == 1 {
				return a.runWatch(ctx, args[0])
			}
			return a.runWatchAll(ctx)
		},
		ValidArgsFunction: a.completeIDs,
	}
}

func (a *app) liveView(many bool) view {
	if a.output == outputJSON {
		return jsonView{a.stdout}
	}
	return newTextView(a.stdout, many)
}

func (a *app) runWatch(ctx context.Context, id string) error {
	l, rec, err := a.connectTo(ctx, id)
	if err != nil {
		return err
	}
	defer l.close()
	v := a.liveView(false)
	defer v.close()
	if !over(rec) {
		f := &follow{link: l, view: v, wait: a.patience()}
		if rec, err = f.run(ctx, rec); err != nil {
			return err
		}
	}
	rec = settle(ctx, l, rec, reportWait)
	v.close()
	if a.output == outputJSON {
		a.failureShown = true
		if err := writeJSON(a.stdout, eventDoc{Event: "end", Time: time.Now().UTC(), ID: rec.Id, Migration: newMigrationDoc(rec, 0)}); err != nil {
			return err
		}
		return failureOf(rec)
	}
	if err := failureOf(rec); err != nil {
		return err
	}
	return printReport(a.stdout, rec, 0)
}

// runWatchAll shows every migration that is in flight now or begins while one
// is.
func (a *app) runWatchAll(ctx context.Context) error {
	l, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer l.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	recs, err := l.records.List(ctx)
	if err != nil {
		return err
	}
	epoch := map[string]uint64{} // of migrations in flight
	live := map[string]bool{}
	for _, r := range recs {
		if over(r) {
			epoch[r.Id] = r.Epoch
		} else {
			live[r.Id] = true
		}
	}
	v := a.liveView(true)
	defer v.close()
	if len(live) == 0 {
		if a.output == outputJSON {
			return nil // no event
		}
		_, err := fmt.Fprintln(a.stdout, "No migration is in flight.")
		return err
	}
	progress, err := transport.SubscribeProgress(ctx, l.nc, "")
	if err != nil {
		return err
	}
	events, err := l.records.Watch(ctx, "")
	if err != nil {
		return err
	}
	for len(live) > 0 {
		select {
		case <-ctx.Done():
			return wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "stopped watching (%w); %s", context.Cause(ctx), plural(len(live), "migration")+" still in flight")
		case p, ok := <-progress:
			if !ok {
				progress = nil
				continue
			}
			v.progress(p)
		case e, ok := <-events:
			if !ok {
				return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "the bus ended the watch; see \"godwit history\"")
			}
			r := e.Record
			if r == nil || r.Epoch <= epoch[e.ID] {
				continue
			}
			_, known := epoch[e.ID]
			epoch[e.ID] = r.Epoch
			if over(r) && known && !live[e.ID] {
				continue // the report of one that had ended
			}
			v.record(r)
			live[e.ID] = true
			if over(r) {
				delete(live, e.ID)
				if err := failureOf(r); err != nil {
					v.note(r.Id, err.Error())
				}
			}
		}
	}
	return nil
}
