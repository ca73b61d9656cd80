package transport

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"godwit/transport/bus"
	"godwit/wire"
)

func openRecords(t *testing.T, url string) *Records {
	t.Helper()
	r, err := OpenRecords(t.Context(), connect(t, url, "records"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRecords(t *testing.T) {
	ctx := t.Context()
	b := startBus(t, bus.Config{})
	r, other := openRecords(t, b.URL()), openRecords(t, b.URL())
	if _, _, err := r.Get(ctx, "m1"); !errors.Is(err, ErrNotFound) || wire.CodeOf(err) != wire.Code_CODE_NOT_FOUND {
		t.Errorf("absent record: %v", err)
	}
	if _, _, err := r.Get(ctx, "m.1"); err == nil {
		t.Error("a bad id was accepted")
	}
	rec := &wire.Record{Id: "m1", State: wire.State_STATE_REQUESTED, Source: "alpha", Destination: "beta", Pid: 12}
	rev, err := r.Create(ctx, rec)
	if err != nil || rec.Epoch != 1 || rec.CreatedUnixMs == 0 {
		t.Fatalf("create: %v, %v", rec, err)
	}
	if _, err := other.Create(ctx, proto.CloneOf(rec)); !errors.Is(err, ErrExists) {
		t.Errorf("create again: %v", err)
	}
	got, gotRev, err := other.Get(ctx, "m1")
	if err != nil || gotRev != rev {
		t.Fatalf("get: revision %d, want %d, %v", gotRev, rev, err)
	}
	if diff := cmp.Diff(rec, got, protocmp.Transform()); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}

	// Of two that update one revision the second gets what the first made.
	rec.State = wire.State_STATE_STAGED
	rev2, err := r.Update(ctx, rec, rev)
	if err != nil || rec.Epoch != 2 {
		t.Fatalf("update: %v, %v", rec, err)
	}
	got.State = wire.State_STATE_ABORTED
	_, err = other.Update(ctx, got, rev)
	c, ok := errors.AsType[*ConflictError](err)
	if !ok || !errors.Is(err, ErrConflict) || c.Revision != rev2 || got.Epoch != 1 {
		t.Fatalf("stale update: %v", err)
	}
	if diff := cmp.Diff(rec, c.Current, protocmp.Transform()); diff != "" {
		t.Errorf("current record of the conflict (-want +got):\n%s", diff)
	}
	if !strings.Contains(err.Error(), "it is staged now") {
		t.Errorf("conflict: %v", err)
	}

	// An error of the function leaves the record alone and comes with it.
	boom := errors.New("not from there")
	cur, err := r.Change(ctx, "m1", func(rec *wire.Record) error { rec.Reason = "x"; return boom })
	if err != boom || cur.Reason != "" || cur.Epoch != 2 {
		t.Errorf("change that fails: %v, %v", cur, err)
	}
	if cur, err = r.Change(ctx, "m1", func(*wire.Record) error { return nil }); err != nil || cur.Epoch != 2 {
		t.Errorf("change of nothing: %v, %v", cur, err)
	}
	hist, err := r.History(ctx, "m1")
	if err != nil || len(hist) != 2 || hist[0].State != wire.State_STATE_REQUESTED || hist[1].State != wire.State_STATE_STAGED {
		t.Errorf("history: %v, %v", hist, err)
	}
	if _, err := r.History(ctx, "m9"); !errors.Is(err, ErrNotFound) {
		t.Errorf("history of nothing: %v", err)
	}
	if _, err := r.Create(ctx, &wire.Record{Id: "m0"}); err != nil {
		t.Fatal(err)
	}
	list, err := r.List(ctx)
	if err != nil || len(list) != 2 || list[0].Id != "m1" && list[0].CreatedUnixMs != list[1].CreatedUnixMs {
		t.Errorf("list: %v, %v", list, err)
	}
	if err := r.Delete(ctx, "m0"); err != nil {
		t.Fatal(err)
	}
	if list, err = r.List(ctx); err != nil || len(list) != 1 {
		t.Errorf("list after the delete: %v, %v", list, err)
	}
}

// Many parties change one record at once: every change is made exactly once.
func TestRecordsRace(t *testing.T) {
	b := startBus(t, bus.Config{})
	first := openRecords(t, b.URL())
	if _, err := first.Create(t.Context(), &wire.Record{Id: "m"}); err != nil {
		t.Fatal(err)
	}
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 6 {
		r := openRecords(t, b.URL())
		wg.Go(func() {
			for range 10 {
				if _, err := r.Change(t.Context(), "m", func(rec *wire.Record) error { rec.Tasks++; return nil }); err != nil {
					t.Errorf("change: %v", err)
				}
			}
			// Only one may be the owner.
			_, err := r.Change(t.Context(), "m", func(rec *wire.Record) error {
				if rec.Comm != "" {
					return errors.New("taken")
				}
				rec.Comm = fmt.Sprint(i)
				return nil
			})
			if err == nil {
				won.Add(1)
			}
		})
	}
	wg.Wait()
	rec, _, err := first.Get(t.Context(), "m")
	if err != nil || rec.Tasks != 60 || rec.Epoch != 62 || won.Load() != 1 {
		t.Errorf("after 61 changes: %v, %d won, %v", rec, won.Load(), err)
	}
}

func TestRecordsWatch(t *testing.T) {
	dir := t.TempDir()
	b := startBus(t, bus.Config{StoreDir: dir})
	listen := strings.TrimPrefix(b.URL(), "nats://")
	r := openRecords(t, b.URL())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	rec := &wire.Record{Id: "m1"}
	if _, err := r.Create(ctx, rec); err != nil {
		t.Fatal(err)
	}
	one, err := r.Watch(ctx, "m1")
	if err != nil {
		t.Fatal(err)
	}
	all, err := r.Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	next := func(ch <-chan RecordEvent) RecordEvent {
		t.Helper()
		select {
		case ev, ok := <-ch:
			if !ok {
				t.Fatal("the watch ended")
			}
			return ev
		case <-ctx.Done():
			t.Fatal("no event")
		}
		panic("unreachable")
	}
	for _, ch := range []<-chan RecordEvent{one, all} {
		if ev := next(ch); ev.ID != "m1" || ev.Record.GetEpoch() != 1 {
			t.Errorf("first event %v", ev)
		}
	}
	if _, err := r.Create(ctx, &wire.Record{Id: "m2"}); err != nil {
		t.Fatal(err)
	}
	if ev := next(all); ev.ID != "m2" {
		t.Errorf("event %v", ev)
	}
	// Changes go on being seen after the bus was down.
	b.Shutdown()
	startBus(t, bus.Config{Listen: listen, StoreDir: dir})
	for {
		if _, err := r.Change(ctx, "m1", func(rec *wire.Record) error { rec.Reason = "later"; return nil }); err == nil {
			break
		} else if ctx.Err() != nil {
			t.Fatal(err)
		}
		<-time.After(50 * time.Millisecond)
	}
	if ev := next(one); ev.Record.GetReason() != "later" {
		t.Errorf("event after the restart %v", ev)
	}
	if err := r.Delete(ctx, "m1"); err != nil {
		t.Fatal(err)
	}
	if ev := next(one); ev.ID != "m1" || ev.Record != nil {
		t.Errorf("event of the delete %v", ev)
	}
	cancel()
	for range one { // it closes
	}
}

// What the bus never answered must not be taken for refused.
func TestRecordsUnknownOutcome(t *testing.T) {
	b := startBus(t, bus.Config{})
	r := openRecords(t, b.URL())
	rec := &wire.Record{Id: "m1"}
	rev, err := r.Create(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	rec.Reason = "made"
	if _, err := r.Update(t.Context(), rec, rev); err != nil {
		t.Fatal(err)
	}
	e, err := r.kv.Get(t.Context(), "m1")
	if err != nil {
		t.Fatal(err)
	}
	// The write was made, only its answer got lost.
	if _, err := r.settle(t.Context(), "m1", e.Value(), rev, context.DeadlineExceeded); err != nil {
		t.Errorf("a write that was made: %v", err)
	}
	// Somebody else's was made in its place, although it says the same.
	same, err := encode(rec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.settle(t.Context(), "m1", same, rev, context.DeadlineExceeded); !errors.Is(err, ErrConflict) {
		t.Errorf("a write that lost: %v", err)
	}
	b.Shutdown()
	if _, err := r.settle(t.Context(), "m1", same, rev, context.DeadlineExceeded); !errors.Is(err, ErrOutcome) {
		t.Errorf("a bus that is gone: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.Update(ctx, rec, rev); err == nil || errors.Is(err, ErrOutcome) || !strings.Contains(err.Error(), "nothing was sent") {
		t.Errorf("update without a bus: %v", err)
	}
}

func TestProgress(t *testing.T) {
	b := startBus(t, bus.Config{})
	nc := connect(t, b.URL(), "agent")
	ctx, cancel := context.WithCancel(t.Context())
	one, err := SubscribeProgress(ctx, connect(t, b.URL(), "one"), "m1")
	if err != nil {
		t.Fatal(err)
	}
	all, err := SubscribeProgress(ctx, connect(t, b.URL(), "all"), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"m2", "m1"} {
		if err := PublishProgress(nc, &wire.Progress{Id: id, BytesDone: 5}); err != nil {
			t.Fatal(err)
		}
	}
	if p := <-one; p.Id != "m1" || p.BytesDone != 5 {
		t.Errorf("one got %v", p)
	}
	if p := <-all; p.Id != "m2" {
		t.Errorf("all got %v", p)
	}
	if err := PublishProgress(nc, &wire.Progress{Id: "a b"}); err == nil {
		t.Error("a bad id was accepted")
	}
	cancel()
	for range one {
	}
}
