package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

// RecordsBucket is the key-value bucket of the migrations' records.
const RecordsBucket = "godwit-migrations"

const (
	recordsHistory = 64 // the most that a bucket keeps a key
	// recordsTimeout bounds one operation if its context has no deadline.
	recordsTimeout = 10 * time.Second
)

var (
	// ErrNotFound: there is no such record.
	ErrNotFound = errors.New("no such migration")
	// ErrExists: Create found the id taken.
	ErrExists = errors.New("a migration of that id exists already")
	// ErrConflict: somebody else changed the record first; see ConflictError.
	ErrConflict = errors.New("the record was changed by somebody else")
	// ErrOutcome: the bus did not say whether the change was made, and cannot
	// be asked now. It may be made even later.
	ErrOutcome = errors.New("it is not known whether the record was changed")
)

// ConflictError is a compare-and-set that lost; it is an ErrConflict.
type ConflictError struct {
	Current  *wire.Record // what the record is now; nil if it could not be read
	Revision uint64       // of Current
	id       string
}

func (e *ConflictError) Error() string {
	s := fmt.Sprintf("change migration %s: %s", e.id, ErrConflict)
	if e.Current != nil {
		s += fmt.Sprintf(" (it is %s now)", strings.ToLower(strings.TrimPrefix(e.Current.State.String(), "STATE_")))
	}
	return s
}

// Is makes it an ErrConflict.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// Records are the migrations' records in a JetStream key-value bucket. All
// changes are compare-and-set on the record's revision, so that of two parties
// that both want to decide something only one does.
type Records struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	kv  jetstream.KeyValue
	log hclog.Logger
}

// OpenRecords opens the bucket and makes it if it is not there: file storage,
// 64 revisions a record.
func OpenRecords(ctx context.Context, nc *nats.Conn, log hclog.Logger) (*Records, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open the records: %w", err)
	}
	kv, err := js.KeyValue(ctx, RecordsBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		kv, err = js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket:      RecordsBucket,
			Description: "godwit: one record a migration, changed only by compare-and-set",
			History:     recordsHistory,
			Storage:     jetstream.FileStorage,
		})
		if errors.Is(err, jetstream.ErrBucketExists) {
			kv, err = js.KeyValue(ctx, RecordsBucket)
		}
	}
	if err != nil {
		if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, nats.ErrNoResponders) {
			return nil, fmt.Errorf("open the records: the bus has no JetStream, which they need: %w", err)
		}
		return nil, fmt.Errorf("open the records in bucket %s: %w", RecordsBucket, err)
	}
	return &Records{nc: nc, js: js, kv: kv, log: logger(log).Named("records")}, nil
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, recordsTimeout)
}

// encode is what is stored: the record in JSON with one more member, "write",
// a random number of this very write. Two parties may want the same change in
// the same millisecond; by this number each can tell whether the one that was
// made is its own.
func encode(rec *wire.Record) ([]byte, error) {
	b, err := protojson.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("write migration %s: %w", rec.Id, err)
	}
	// A record has an id, so there is a member before it.
	return fmt.Appendf(b[:len(b)-1], `,"write":"%016x"}`, newSession()), nil
}

func decode(key string, b []byte) (*wire.Record, error) {
	rec := &wire.Record{}
	// "write" is no field, and a later release may have added some: they must
	// not make the record unreadable.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, rec); err != nil {
		return nil, fmt.Errorf("read migration %s: the record is damaged: %w", key, err)
	}
	if rec.Id != key {
		return nil, fmt.Errorf("read migration %s: the record is that of %q", key, rec.Id)
	}
	return rec, nil
}

// Create stores a new record and returns its revision. It sets rec.Epoch to 1
// and both times to now. ErrExists if the id is taken.
func (r *Records) Create(ctx context.Context, rec *wire.Record) (uint64, error) {
	if err := CheckName(rec.Id); err != nil {
		return 0, fmt.Errorf("create a migration: id: %w", err)
	}
	now := time.Now().UnixMilli()
	rec.Epoch, rec.CreatedUnixMs, rec.UpdatedUnixMs = 1, now, now
	b, err := encode(rec)
	if err != nil {
		return 0, err
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	rev, err := r.kv.Create(ctx, rec.Id, b)
	if err != nil {
		rev, err = r.settle(ctx, rec.Id, b, 0, err)
	}
	if errors.Is(err, ErrConflict) {
		return 0, fmt.Errorf("create migration %s: %w", rec.Id, ErrExists)
	}
	return rev, err
}

// Get returns the record and its revision; ErrNotFound if there is none.
func (r *Records) Get(ctx context.Context, id string) (*wire.Record, uint64, error) {
	if err := CheckName(id); err != nil {
		return nil, 0, fmt.Errorf("read a migration: id: %w", err)
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	e, err := r.kv.Get(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, 0, &wire.Failure{Code: wire.Code_CODE_NOT_FOUND, Message: fmt.Sprintf("read migration %s: %s", id, ErrNotFound), Cause: ErrNotFound}
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read migration %s: %w", id, err)
	}
	rec, err := decode(id, e.Value())
	if err != nil {
		return nil, 0, err
	}
	return rec, e.Revision(), nil
}

// Update replaces the record if its revision still is the given one and
// returns the new revision. It adds one to rec.Epoch and sets the time of the
// change, in rec itself, and leaves rec as it was if it fails. A
// *ConflictError (ErrConflict) tells what the record became in between;
// ErrOutcome means that nobody knows.
func (r *Records) Update(ctx context.Context, rec *wire.Record, revision uint64) (uint64, error) {
	if err := CheckName(rec.Id); err != nil {
		return 0, fmt.Errorf("change a migration: id: %w", err)
	}
	next := proto.CloneOf(rec)
	next.Epoch++
	next.UpdatedUnixMs = time.Now().UnixMilli()
	b, err := encode(next)
	if err != nil {
		return 0, err
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	rev, err := r.kv.Update(ctx, rec.Id, b, revision)
	if err != nil {
		if rev, err = r.settle(ctx, rec.Id, b, revision, err); err != nil {
			return 0, err
		}
	}
	rec.Epoch, rec.UpdatedUnixMs = next.Epoch, next.UpdatedUnixMs
	return rev, nil
}

func conflict(id string, e jetstream.KeyValueEntry) *ConflictError {
	c := &ConflictError{id: id}
	if cur, err := decode(id, e.Value()); err == nil {
		c.Current, c.Revision = cur, e.Revision()
	}
	return c
}

// settle finds out what became of the write of b over the given revision by
// reading the record back, for up to 3 s: its answer is missing, or it lost.
// The client sends again by itself when it heard nothing, so the one that it
// lost to may be this very write.
func (r *Records) settle(ctx context.Context, id string, b []byte, revision uint64, cause error) (uint64, error) {
	if errors.Is(cause, nats.ErrReconnectBufExceeded) || errors.Is(cause, nats.ErrMaxPayload) || errors.Is(cause, nats.ErrConnectionClosed) {
		return 0, fmt.Errorf("change migration %s: nothing was sent: %w", id, cause)
	}
	if apiErr, ok := errors.AsType[*jetstream.APIError](cause); ok && !errors.Is(cause, jetstream.ErrKeyExists) {
		return 0, fmt.Errorf("change migration %s: the bus refused it: %w", id, apiErr)
	}
	// The caller's time may be what ran out; the question is too important to
	// leave it at that.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		e, err := r.kv.Get(ctx, id)
		switch {
		case err == nil && bytes.Equal(e.Value(), b):
			return e.Revision(), nil
		case err == nil && e.Revision() != revision:
			return 0, conflict(id, e)
		}
		// Unchanged, or absent: the write may still be on its way.
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return 0, fmt.Errorf("change migration %s: %w: %w", id, ErrOutcome, cause)
}

// Change reads the record, lets fn change it and stores it by compare-and-set;
// if somebody else was faster, it does so again on what the record is then. fn
// must judge the record that it is given, each time. It returns the record as
// it is stored now. An error of fn ends it, and comes with the record that fn
// was given as it was read. If fn changes nothing, nothing is written.
func (r *Records) Change(ctx context.Context, id string, fn func(*wire.Record) error) (*wire.Record, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	rec, rev, err := r.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	for {
		next := proto.CloneOf(rec)
		if err := fn(next); err != nil {
			return rec, err
		}
		next.Id, next.Epoch = rec.Id, rec.Epoch
		if proto.Equal(rec, next) {
			return rec, nil
		}
		_, err := r.Update(ctx, next, rev)
		if err == nil {
			return next, nil
		}
		c, ok := errors.AsType[*ConflictError](err)
		if !ok || ctx.Err() != nil {
			return rec, err
		}
		if rec, rev = c.Current, c.Revision; rec == nil {
			if rec, rev, err = r.Get(ctx, id); err != nil {
				return nil, err
			}
		}
	}
}

// Delete removes a record and its history.
func (r *Records) Delete(ctx context.Context, id string) error {
	if err := CheckName(id); err != nil {
		return fmt.Errorf("delete a migration: id: %w", err)
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := r.kv.Purge(ctx, id); err != nil {
		return fmt.Errorf("delete migration %s: %w", id, err)
	}
	return nil
}

// List returns all records, oldest first. A damaged record is logged and left out.
func (r *Records) List(ctx context.Context) ([]*wire.Record, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	w, err := r.kv.WatchAll(ctx, jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("list the migrations: %w", err)
	}
	defer func() { _ = w.Stop() }()
	var out []*wire.Record
	for {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("list the migrations: %w", ctx.Err())
		case e, ok := <-w.Updates():
			if !ok {
				return nil, fmt.Errorf("list the migrations: %w", ErrDisconnected)
			}
			if e == nil { // all there is has been sent
				slices.SortFunc(out, func(a, b *wire.Record) int {
					if a.CreatedUnixMs != b.CreatedUnixMs {
						return int(a.CreatedUnixMs - b.CreatedUnixMs)
					}
					return strings.Compare(a.Id, b.Id)
				})
				return out, nil
			}
			rec, err := decode(e.Key(), e.Value())
			if err != nil {
				r.log.Warn("record left out", "id", e.Key(), "error", err)
				continue
			}
			out = append(out, rec)
		}
	}
}

// History returns the kept revisions of a record (at most 64), oldest first.
func (r *Records) History(ctx context.Context, id string) ([]*wire.Record, error) {
	if err := CheckName(id); err != nil {
		return nil, fmt.Errorf("read a migration's history: id: %w", err)
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	es, err := r.kv.History(ctx, id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, &wire.Failure{Code: wire.Code_CODE_NOT_FOUND, Message: fmt.Sprintf("read the history of migration %s: %s", id, ErrNotFound), Cause: ErrNotFound}
	}
	if err != nil {
		return nil, fmt.Errorf("read the history of migration %s: %w", id, err)
	}
	var out []*wire.Record
	for _, e := range es {
		if e.Operation() != jetstream.KeyValuePut {
			continue
		}
		rec, err := decode(id, e.Value())
		if err != nil {
			return nil, err
		}
		out = append(out, rec)
	}
	return out, nil
}

// RecordEvent is one change that Watch saw.
type RecordEvent struct {
	ID       string
	Record   *wire.Record // nil: the record was deleted
	Revision uint64
}

// Watch sends the current record of a migration, or of all if id is empty, and
// every later change, in order, until ctx ends; then the channel is closed.
// After a reconnect it goes on at once where it was. The reader must keep
// reading.
func (r *Records) Watch(ctx context.Context, id string) (<-chan RecordEvent, error) {
	key := jetstream.AllKeys
	if id != "" {
		if err := CheckName(id); err != nil {
			return nil, fmt.Errorf("watch a migration: id: %w", err)
		}
		key = id
	}
	l := newNATSLink(r.nc) // before the watcher, so that no reconnect is missed
	w, err := r.kv.Watch(ctx, key)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("watch the migrations: %w", err)
	}
	out := make(chan RecordEvent, 16)
	go r.watch(ctx, key, l, w, out)
	return out, nil
}

// watch feeds out. The client's own watcher finds out only after some 20 s
// that a restarted server does not know it any more; a frozen tree must not
// wait for that, so each reconnect makes a new watcher.
func (r *Records) watch(ctx context.Context, key string, l *natsLink, w jetstream.KeyWatcher, out chan<- RecordEvent) {
	defer close(out)
	defer l.close()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var lives uint64
	var last uint64 // newest revision that was sent
	cancelLast := func() {}
	defer func() { cancelLast() }()
	for {
		again := w == nil
		var updates <-chan jetstream.KeyValueEntry
		if w != nil {
			updates = w.Updates()
		}
		select {
		case <-ctx.Done():
			stopWatcher(w)
			return
		case <-tick.C:
			if n := l.lives(); n != lives {
				lives, again = n, true
			}
		case e, ok := <-updates:
			if !ok {
				w = nil // the next tick makes a new one
				break
			}
			if e == nil || e.Revision() <= last { // end of what was there, or seen before
				break
			}
			last = e.Revision()
			ev := RecordEvent{ID: e.Key(), Revision: e.Revision()}
			if e.Operation() == jetstream.KeyValuePut {
				rec, err := decode(e.Key(), e.Value())
				if err != nil {
					r.log.Warn("record left out", "id", e.Key(), "error", err)
					break
				}
				ev.Record = rec
			}
			select {
			case <-ctx.Done():
			case out <- ev:
			}
		}
		if !again || !l.up() {
			continue
		}
		stopWatcher(w)
		cancelLast()
		// Until it is made again with a later tick there is none.
		w, cancelLast = r.newWatcher(ctx, key, last)
	}
}

// newWatcher makes a watcher of what comes after a revision, nil if that does
// not work now. The watcher ends with the returned function.
func (r *Records) newWatcher(ctx context.Context, key string, last uint64) (jetstream.KeyWatcher, context.CancelFunc) {
	var opts []jetstream.WatchOpt
	if last > 0 {
		opts = append(opts, jetstream.ResumeFromRevision(last+1))
	}
	ctx, cancel := context.WithCancel(ctx)
	// The context is the watcher's whole life, so it bounds the making by a timer.
	timer := time.AfterFunc(2*time.Second, cancel)
	w, err := r.kv.Watch(ctx, key, opts...)
	if err != nil || !timer.Stop() {
		stopWatcher(w)
		cancel()
		return nil, func() {}
	}
	return w, cancel
}

// stopWatcher ends a watcher, if there is one, and lets go whatever it still
// wants to hand over.
func stopWatcher(w jetstream.KeyWatcher) {
	if w == nil {
		return
	}
	_ = w.Stop()
	go func() {
		for range w.Updates() {
		}
	}()
}
