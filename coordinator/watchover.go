package coordinator

import (
	"context"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/wire"
)

// ward is a migration in flight that the control plane watches over.
type ward struct {
	rec     *wire.Record
	heard   time.Time
	tending bool
	note    string
}

// watchOver logs what happens to migrations and looks after those that fall
// silent, until ctx ends: those whose command has gone before they were
// started are aborted, a destination that died after its commit is marked
// (Stuck), agents that are to abort are reminded. Where a tree runs it never
// decides. It needs no memory of its own: a new control plane finds the
// migrations that the last one left behind in the records.
func watchOver(ctx context.Context, l *link, log hclog.Logger, p rules.Patience) error {
	log = log.Named("watch")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	progress, err := transport.SubscribeProgress(ctx, l.nc, "")
	if err != nil {
		return err
	}
	events, err := l.records.Watch(ctx, "")
	if err != nil {
		return err
	}
	var hears ear
	wards := map[string]*ward{}
	type result struct {
		id string
		t  tended
	}
	results := make(chan result, 16)
	tick := time.NewTicker(max(p.Probe/2, 20*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m, ok := <-progress:
			if !ok {
				return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "the bus ended the progress subscription")
			}
			if w := wards[m.Id]; w != nil {
				w.heard = time.Now()
			}
		case e, ok := <-events:
			if !ok {
				if ctx.Err() != nil {
					return nil
				}
				// The bus was away for longer than it keeps the watch.
				time.Sleep(200 * time.Millisecond)
				if events, err = l.records.Watch(ctx, ""); err != nil {
					log.Warn("watch the migrations; trying again", "error", err)
					dead := make(chan transport.RecordEvent)
					close(dead)
					events = dead
				}
				continue
			}
			r := e.Record
			w := wards[e.ID]
			switch {
			case r == nil:
				delete(wards, e.ID)
				continue
			case w != nil && r.Epoch <= w.rec.Epoch:
				continue
			case w == nil && over(r):
				continue
			case w == nil:
				w = &ward{}
				wards[e.ID] = w
			}
			changed := w.rec == nil || w.rec.State != r.State
			w.rec, w.heard = r, time.Now()
			if changed {
				log.Info(r.State.Word(), "migration", r.Id, "pid", r.Pid, "source", r.Source, "destination", r.Destination)
			}
			if over(r) {
				delete(wards, e.ID)
				if err := failureOf(r); err != nil {
					log.Error("the migration ended", "migration", r.Id, "outcome", outcome(r), "error", err)
				} else {
					log.Info("the migration ended", "migration", r.Id, "outcome", outcome(r), "duration_ms", lasted(r).Milliseconds())
				}
			}
		case res := <-results:
			w := wards[res.id]
			if w == nil {
				continue
			}
			w.tending = false
			if res.t.note != "" && res.t.note != w.note {
				log.Warn(res.t.note, "migration", res.id, "state", w.rec.State.Word())
			}
			w.note = res.t.note
		case now := <-tick.C:
			deaf := hears.deaf(l.nc)
			for id, w := range wards {
				if deaf {
					w.heard = now
				}
				silent := now.Sub(w.heard)
				if w.tending || silent < p.Probe || stuck(w.rec) {
					continue
				}
				w.tending = true
				rec := w.rec
				go func() {
					t := tend(ctx, l, rec, silent, p)
					select {
					case results <- result{id, t}:
					case <-ctx.Done():
					}
				}()
			}
		}
	}
}
