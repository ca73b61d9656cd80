package coordinator

import (
	"context"
	"os"
	"time"

	"github.com/nats-io/nats.go"

	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/wire"
)

const (
	// followPoll is how often a record is read although nothing was heard.
	followPoll = time.Second
	// cutOffPatience is how long a command waits for the bus to come back.
	cutOffPatience = 2 * time.Minute
)

// follow accompanies one migration to its end.
type follow struct {
	link *link
	view view
	wait rules.Patience
	// interrupts, if not nil: the first asks to abort, the second leaves.
	interrupts <-chan os.Signal
	// grace bounds, if not 0, the whole.
	grace time.Duration

	rec         *wire.Record
	heard       time.Time // last sign of the migration
	read        time.Time // last time that the record could be read
	ear         ear
	interrupted int
	note        string // last one of tending
}

// run returns the record as it ended, or as it was last seen with an error:
// CODE_UNKNOWN_STATE if the outcome is not known to this command. How the
// migration ended is in the record alone (failureOf).
func (f *follow) run(ctx context.Context, rec *wire.Record) (*wire.Record, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	progress, err := transport.SubscribeProgress(ctx, f.link.nc, rec.Id)
	if err != nil {
		return rec, err
	}
	// Wide enough that neither goroutine waits for this one for good.
	records := make(chan *wire.Record, 16)
	go f.records(ctx, rec.Id, records)
	notes := make(chan tended, 1)
	tending := false
	aborted := make(chan error, 1)

	f.heard, f.read = time.Now(), time.Now()
	f.see(rec)
	tick := time.NewTicker(followPoll)
	defer tick.Stop()
	var end <-chan time.Time
	if f.grace > 0 {
		t := time.NewTimer(f.grace)
		defer t.Stop()
		end = t.C
	}
	for !over(f.rec) {
		select {
		case <-ctx.Done():
			return f.rec, f.left(context.Cause(ctx).Error())
		case <-end:
			return f.rec, f.left("it has not ended after " + formatDuration(f.grace))
		case r := <-records:
			f.read = time.Now()
			f.see(r)
		case p, ok := <-progress:
			if !ok {
				progress = nil
				continue
			}
			f.heard = time.Now()
			f.view.progress(p)
		case <-f.interrupts:
			f.interrupted++
			if f.interrupted > 1 {
				return f.rec, f.left("this command was interrupted")
			}
			if wire.Committed(f.rec.State) {
				f.view.note(f.rec.Id, "too late to abort: the tree belongs to "+f.rec.Destination+" now; waiting for it (interrupt again to leave)")
				continue
			}
			f.view.note(f.rec.Id, "aborting, the tree will run on at "+f.rec.Source+" (interrupt again to leave)")
			id := f.rec.Id
			go func() {
				_, err := askAbort(ctx, f.link, id, "interrupted by the operator", nil)
				aborted <- err
			}()
		case err := <-aborted:
			if err != nil {
				f.view.note(f.rec.Id, err.Error())
			}
		case t := <-notes:
			tending = false
			if t.note != "" && t.note != f.note {
				f.view.note(f.rec.Id, t.note)
			}
			f.note = t.note
			if t.verdict == rules.Lost {
				return f.rec, f.left(t.note)
			}
		case <-tick.C:
			now := time.Now()
			if away := now.Sub(f.read); away > cutOffPatience {
				return f.rec, f.left("the bus has not answered for " + formatDuration(away))
			}
			if f.ear.deaf(f.link.nc) {
				f.heard = now
			}
			silent := now.Sub(f.heard)
			if silent >= f.wait.Probe && !tending {
				tending = true
				rec := f.rec
				go func() { notes <- tend(ctx, f.link, rec, silent, f.wait) }()
			}
		}
	}
	return f.rec, nil
}

// left is the error of a command that does not know how it goes on.
func (f *follow) left(why string) error {
	return wire.Errorf(wire.Code_CODE_UNKNOWN_STATE,
		"migration %s was last seen %s, and its outcome is not known here (%s); see \"godwit watch %s\" and \"godwit history %s\"",
		f.rec.Id, f.rec.State.Word(), why, f.rec.Id, f.rec.Id)
}

// see takes over a record if it is newer.
func (f *follow) see(r *wire.Record) {
	if r == nil || f.rec != nil && r.Epoch <= f.rec.Epoch {
		return
	}
	f.rec = r
	f.heard = time.Now()
	f.view.record(r)
}

// records sends the record on every change, and now and then without one: as a
// sign that the bus is there, and in case that the watch is deaf.
func (f *follow) records(ctx context.Context, id string, out chan<- *wire.Record) {
	send := func(r *wire.Record) {
		select {
		case out <- r:
		case <-ctx.Done():
		}
	}
	poll := time.NewTicker(followPoll)
	defer poll.Stop()
	var events <-chan transport.RecordEvent
	for ctx.Err() == nil {
		if events == nil {
			if e, err := f.link.records.Watch(ctx, id); err == nil {
				events = e
			}
		}
		select {
		case <-ctx.Done():
		case e, ok := <-events:
			if !ok {
				events = nil
				time.Sleep(100 * time.Millisecond)
				continue
			}
			send(e.Record)
		case <-poll.C:
			get, cancel := context.WithTimeout(ctx, 2*time.Second)
			r, _, err := f.link.records.Get(get, id)
			cancel()
			if err == nil {
				send(r)
			}
		}
	}
}

// ear knows whether this side could have heard anything.
type ear struct{ reconnects uint64 }

// deaf reports whether the connection is down or was since the last call: the
// silence of others then means nothing, and they may need a moment, too, until
// they are back on the bus.
func (e *ear) deaf(nc *nats.Conn) bool {
	n := nc.Stats().Reconnects
	was := n != e.reconnects
	e.reconnects = n
	return was || !nc.IsConnected()
}

// settle waits a moment for the reports of a migration that has completed: the
// source writes its own when it has killed its copy, after the end. Without
// them the record is as complete as it will get.
func settle(ctx context.Context, l *link, rec *wire.Record, wait time.Duration) *wire.Record {
	complete := func(r *wire.Record) bool {
		if r.State == wire.State_STATE_COMPLETED {
			return r.SourceReport != nil && r.DestinationReport != nil
		}
		return r.SourceReport != nil || !touched(r)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for !complete(rec) {
		select {
		case <-ctx.Done():
			return rec
		case <-time.After(20 * time.Millisecond):
		}
		if r, _, err := l.records.Get(ctx, rec.Id); err == nil {
			rec = r
		}
	}
	return rec
}

// reportWait is how long settle waits for the reports. Killing a large tree
// takes the kernel a while.
const reportWait = 5 * time.Second
