package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"godwit/engine"
	"godwit/engine/refuse"
	"godwit/transport"
	"godwit/wire"
)

func TestMigrate(t *testing.T) {
	r := newRig(t, nil)
	progress, err := transport.SubscribeProgress(t.Context(), r.nc, "")
	noErr(t, err)
	id := r.begin()
	rec := r.finished(id)
	r.check("destination")
	want := []string{
		"requested by coordinator", "preflight by coordinator", "freezing by alpha", "final copying by alpha",
		"restoring by beta", "staged by beta", "handing off by beta", "completed by beta",
	}
	if diff := cmp.Diff(want, states(rec)); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	if rec.LandedPid == 0 || rec.Owner != wire.Owner_OWNER_DESTINATION || rec.Error != nil {
		t.Errorf("record: %v", rec)
	}
	s, d := rec.SourceReport, rec.DestinationReport
	if s == nil || d == nil {
		t.Fatalf("reports: source %v, destination %v", s, d)
	}
	const pages = 6 << 20 / pageSize
	if s.Pages != pages || d.Pages != pages || s.Bytes < 6<<20 || d.Bytes < 6<<20 {
		t.Errorf("source %d pages, %d bytes; destination %d pages, %d bytes", s.Pages, s.Bytes, d.Pages, d.Bytes)
	}
	for name, v := range map[string]uint64{
		"source frozen": s.FrozenUs, "freeze": s.FreezeUs, "dump": s.DumpUs, "transfer": s.TransferUs, "rate": s.BytesPerSecond,
		"restore": d.RestoreUs, "destination frozen": d.FrozenUs, "source rss": s.PeakRssBytes, "destination rss": d.PeakRssBytes,
	} {
		if v == 0 {
			t.Errorf("the report lacks %s", name)
		}
	}
	if d.ResumedAtUnixUs <= s.FrozenAtUnixUs {
		t.Errorf("resumed at %d, frozen at %d", d.ResumedAtUnixUs, s.FrozenAtUnixUs)
	}
	select {
	case p := <-progress:
		if p.Id != id {
			t.Errorf("progress of %q", p.Id)
		}
	case <-time.After(time.Minute):
		t.Error("no progress was heard")
	}
	if err := r.start(id, id); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("started again after its end: %v", err)
	}
}

// TestFailures fails every step of both engines, one at a time.
func TestFailures(t *testing.T) {
	broken := errors.New("the disk is on fire")
	tests := []struct {
		point  string
		state  wire.State
		runs   string
		reason string
	}{
		{"freeze", wire.State_STATE_ABORTED, "source", "on fire"},
		{"dump", wire.State_STATE_ABORTED, "source", "on fire"},
		{"dump-data", wire.State_STATE_ABORTED, "source", "on fire"},
		{"dump-end", wire.State_STATE_ABORTED, "source", "on fire"},
		{"restore", wire.State_STATE_ABORTED, "source", "on fire"},
		{"restore-images", wire.State_STATE_ABORTED, "source", "on fire"},
		{"restore-data", wire.State_STATE_ABORTED, "source", "on fire"},
		{"restore-end", wire.State_STATE_ABORTED, "source", "on fire"},
		{"run", wire.State_STATE_ABORTED, "source", "start the tree: the disk is on fire"},
	}
	r := newRig(t, nil)
	for _, tt := range tests {
		t.Run(tt.point, func(t *testing.T) {
			r.fresh(t)
			r.w.on(tt.point, func(context.Context) error { return broken })
			id := r.create()
			p, err := r.prepare(id)
			noErr(t, err)
			// The destination may fail before the source has even begun.
			if err := r.start(id, p.Stream); err != nil && !strings.HasPrefix(tt.point, "restore") {
				t.Fatal(err)
			}
			rec := r.finished(id)
			r.check(tt.runs)
			if rec.State != tt.state || !strings.Contains(rec.Reason, tt.reason) || rec.Owner != wire.Owner_OWNER_SOURCE {
				t.Errorf("record is %s, owner %s, reason %q, steps %v", rec.State, rec.Owner, rec.Reason, states(rec))
			}
			if rec.Error.GetHost() == "" || rec.Error.GetPhase() == "" {
				t.Errorf("the error lacks host or phase: %v", rec.Error)
			}
			if f, n := r.w.count("freeze"), r.w.count("thaw"); tt.point != "freeze" && n != f {
				t.Errorf("frozen %d times and thawed %d times", f, n)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	r := newRig(t, nil)
	refusal := &engine.Refusal{Doing: "dump of the tree", Problems: []refuse.Problem{
		{Pid: 7, Comm: "sh", FD: 3, HasFD: true, Path: "/dev/fuse", Reason: "cannot be carried", Hint: "close it"},
	}}
	for _, point := range []string{"plan", "check"} {
		r.w.on(point, func(context.Context) error { return fmt.Errorf("look: %w", refusal) })
		id := r.create()
		_, err := r.prepare(id)
		f, ok := errors.AsType[*wire.Failure](err)
		if !ok || f.Code != wire.Code_CODE_REFUSED || len(f.Problems) != 1 || f.Problems[0].Object.Path != "/dev/fuse" || f.Host == "" {
			t.Errorf("%s: %v", point, err)
		}
		r.w.on(point, nil)
	}
	r.until("nothing to be held", func() bool { return !r.dst.busy() })

	id := r.create()
	call := func(edit func(*wire.StartRequest)) error {
		req := &wire.StartRequest{Protocol: wire.Version, Id: id, Pid: r.pid, Destination: "beta", Stream: id}
		edit(req)
		_, err := transport.Call[*wire.StartRequest, *wire.StartReply](t.Context(), r.nc, "alpha", "start", req)
		return err
	}
	for _, tt := range []struct {
		name string
		edit func(*wire.StartRequest)
		code wire.Code
	}{
		{"other version", func(q *wire.StartRequest) { q.Protocol++ }, wire.Code_CODE_VERSION},
		{"no pid", func(q *wire.StartRequest) { q.Pid = 0 }, wire.Code_CODE_INVALID},
		{"no stream", func(q *wire.StartRequest) { q.Stream = "" }, wire.Code_CODE_INVALID},
		{"init", func(q *wire.StartRequest) { q.Pid = 1 }, wire.Code_CODE_REFUSED},
		{"other pid than the record", func(q *wire.StartRequest) { q.Pid++ }, wire.Code_CODE_INVALID},
		{"other destination", func(q *wire.StartRequest) { q.Destination = "gamma" }, wire.Code_CODE_INVALID},
		{"no record", func(q *wire.StartRequest) { q.Id = "nosuch" }, wire.Code_CODE_NOT_FOUND},
		{"leave running", func(q *wire.StartRequest) { q.Options = &wire.MigrateOptions{LeaveRunning: true} }, wire.Code_CODE_INVALID},
	} {
		if err := call(tt.edit); wire.CodeOf(err) != tt.code {
			t.Errorf("start, %s: %v, want %s", tt.name, err, tt.code)
		}
	}
	_, err := transport.Call[*wire.PrepareRequest, *wire.PrepareReply](t.Context(), r.nc, "beta", "prepare",
		&wire.PrepareRequest{Protocol: wire.Version + 1, Id: id, Source: "alpha", Requirements: &wire.Requirements{}})
	if wire.CodeOf(err) != wire.Code_CODE_VERSION {
		t.Errorf("prepare of another version: %v", err)
	}
	_, err = transport.Call[*wire.PreflightRequest, *wire.PreflightReply](t.Context(), r.nc, "alpha", "preflight",
		&wire.PreflightRequest{Protocol: wire.Version, Id: id, Pid: 1 << 30, Destination: "beta"})
	if wire.CodeOf(err) != wire.Code_CODE_NOT_FOUND {
		t.Errorf("preflight of no process: %v", err)
	}
	if err := r.abort("alpha", "nosuch"); wire.CodeOf(err) != wire.Code_CODE_NOT_FOUND {
		t.Errorf("abort of nothing: %v", err)
	}
	if got := r.state(id); got != wire.State_STATE_PREFLIGHT {
		t.Errorf("the record became %s", got)
	}
	if r.w.count("freeze") != 0 {
		t.Error("something was frozen")
	}
	r.check("source")
}

// hold makes the engine wait at a point until the work is ended.
func (w *world) hold(point string) (reached <-chan struct{}) {
	c := make(chan struct{})
	var once sync.Once
	w.on(point, func(ctx context.Context) error {
		once.Do(func() { close(c) })
		<-ctx.Done()
		return ctx.Err()
	})
	return c
}

// TestAbort aborts at every phase, by each way there is.
func TestAbort(t *testing.T) {
	ways := map[string]func(r *rig, id string) error{
		"source":      func(r *rig, id string) error { return r.abort("alpha", id) },
		"destination": func(r *rig, id string) error { return r.abort("beta", id) },
		"record": func(r *rig, id string) error {
			_, err := r.recs.Change(r.t.Context(), id, func(rec *wire.Record) error {
				rec.Reason = "the operator said so"
				return rec.Move(wire.State_STATE_ABORTING, wire.RoleCoordinator, "coordinator", time.Now())
			})
			return err
		},
	}
	r := newRig(t, nil)
	for _, point := range []string{"freeze", "dump", "dump-data", "restore-images", "restore-data", "restore-end"} {
		for way, abort := range ways {
			t.Run(point+"/"+way, func(t *testing.T) {
				r.fresh(t)
				reached := r.w.hold(point)
				id := r.begin()
				<-reached
				if err := abort(r, id); err != nil {
					t.Errorf("abort: %v", err)
				}
				rec := r.finished(id)
				r.check("source")
				if rec.State != wire.State_STATE_ABORTED || !strings.Contains(rec.Reason, "operator said so") {
					t.Errorf("record is %s because of %q; steps %v", rec.State, rec.Reason, states(rec))
				}
			})
		}
	}
}

// TestAbortPrepared aborts and lets expire what was prepared and never started.
func TestAbortPrepared(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Timeouts.Prepared = 2 * time.Second })
	id := r.create()
	_, err := r.prepare(id)
	noErr(t, err)
	noErr(t, r.abort("beta", id))
	if rec := r.finished(id); rec.State != wire.State_STATE_ABORTED {
		t.Errorf("aborted before its start: %s", rec.State)
	}
	id = r.create()
	_, err = r.prepare(id)
	noErr(t, err)
	if rec := r.finished(id); rec.State != wire.State_STATE_ABORTED || !strings.Contains(rec.Reason, "within 2s") {
		t.Errorf("expired: %s, %q", rec.State, rec.Reason)
	}
	if err := r.start(id, id); wire.CodeOf(err) != wire.Code_CODE_ABORTED {
		t.Errorf("start of an expired one: %v", err)
	}
	r.check("source")
}

// TestTooLateToAbort asks for an abort after the commit.
func TestTooLateToAbort(t *testing.T) {
	r := newRig(t, nil)
	running := make(chan struct{})
	goOn := make(chan struct{})
	r.w.on("run", func(context.Context) error {
		close(running)
		<-goOn
		return nil
	})
	id := r.begin()
	<-running
	if err := r.abort("beta", id); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("abort at the destination after the commit: %v", err)
	}
	if err := r.abort("alpha", id); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("abort at the source after the commit: %v", err)
	}
	close(goOn)
	if rec := r.finished(id); rec.State != wire.State_STATE_COMPLETED {
		t.Errorf("record is %s", rec.State)
	}
	r.check("destination")
}

func TestDuplicates(t *testing.T) {
	r := newRig(t, nil)
	id := r.create()
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if p, err := r.prepare(id); err != nil || p.Stream != id {
				t.Errorf("prepare: %v", err)
			}
		})
	}
	wg.Wait()
	frozen := r.w.hold("dump")
	for range 5 {
		wg.Go(func() {
			if err := r.start(id, id); err != nil {
				t.Errorf("start: %v", err)
			}
		})
	}
	wg.Wait()
	<-frozen
	if err := r.start(id, "other"); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("start with another stream: %v", err)
	}
	if _, err := r.prepare(id); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("prepare of what is under way: %v", err)
	}
	other := r.create()
	_, err := r.prepare(other)
	noErr(t, err)
	if err := r.start(other, other); wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
		t.Errorf("a second migration of the same tree: %v", err)
	}
	noErr(t, r.abort("beta", other))
	if n := r.w.count("freeze"); n != 1 {
		t.Errorf("frozen %d times", n)
	}
	noErr(t, r.abort("alpha", id))
	r.finished(id)
	r.check("source")
}

func TestBusRestart(t *testing.T) {
	for _, point := range []string{"freeze", "dump", "dump-data", "dump-end", "restore-images", "restore-data", "restore-end", "run"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, nil)
			var once sync.Once
			r.w.on(point, func(context.Context) error {
				once.Do(func() { r.restartBus(100 * time.Millisecond) })
				return nil
			})
			id := r.create()
			p, err := r.prepare(id)
			noErr(t, err)
			// The answer may be lost with the bus; the tree moves all the same.
			if err := r.start(id, p.Stream); err != nil && wire.CodeOf(err) != wire.Code_CODE_UNAVAILABLE {
				t.Errorf("start: %v", err)
			}
			r.until("the restart", func() bool { return r.w.count(point) > 0 })
			rec := r.finished(id)
			r.check("destination")
			if rec.State != wire.State_STATE_COMPLETED {
				t.Errorf("record is %s: %s", rec.State, rec.Reason)
			}
		})
	}
}

// TestBusGone takes the bus away until both ends have given the stream up: a tree of which
// the destination lacks something runs on, one of which it has all stays frozen until the
// record can be read again.
func TestBusGone(t *testing.T) {
	for point, runs := range map[string]string{"dump-data": "source", "restore-end": "source frozen, destination "} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(c *Config) { c.Streams.IdleTimeout = time.Second })
			down := make(chan struct{})
			var once sync.Once
			r.w.on(point, func(context.Context) error {
				once.Do(func() {
					r.bus.Shutdown()
					close(down)
				})
				return nil
			})
			id := r.begin()
			<-down
			time.Sleep(2 * time.Second) // the idle timeout and more
			if got := r.w.runs(); !strings.HasPrefix(got, runs) {
				t.Errorf("without the bus: %s", got)
			}
			r.startBus()
			rec := r.finished(id)
			r.check(map[wire.State]string{wire.State_STATE_ABORTED: "source", wire.State_STATE_COMPLETED: "destination"}[rec.State])
			if point == "dump-data" && (rec.State != wire.State_STATE_ABORTED || rec.Reason == "") {
				t.Errorf("record is %s: %s", rec.State, rec.Reason)
			}
		})
	}
}

func TestStop(t *testing.T) {
	for _, point := range []string{"freeze", "dump-data", "restore-data", "restore-end"} {
		for _, who := range []string{"alpha", "beta"} {
			t.Run(point+"/"+who, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, nil)
				reached := r.w.hold(point)
				id := r.begin()
				<-reached
				n := map[string]*node{"alpha": r.src, "beta": r.dst}[who]
				noErr(t, n.Stop(t.Context()))
				if n.busy() {
					t.Error("stopped with a session in flight")
				}
				rec := r.finished(id)
				r.check("source")
				if rec.State != wire.State_STATE_ABORTED || !strings.Contains(rec.Reason, "agent of "+who+" is being stopped") {
					t.Errorf("record is %s because of %q", rec.State, rec.Reason)
				}
				if err := r.start(id, id); err == nil {
					t.Error("a stopping agent started something")
				}
			})
		}
	}
}

// TestStopAfterCommit: past the commit an agent brings the migration to its end
// before it leaves.
func TestStopAfterCommit(t *testing.T) {
	r := newRig(t, nil)
	running, goOn := make(chan struct{}), make(chan struct{})
	r.w.on("run", func(context.Context) error {
		close(running)
		<-goOn
		return nil
	})
	id := r.begin()
	<-running
	stopped := make(chan error, 2)
	go func() { stopped <- r.src.Stop(context.Background()) }()
	go func() { stopped <- r.dst.Stop(context.Background()) }()
	select {
	case err := <-stopped:
		t.Errorf("an agent left in the middle of the handoff: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	close(goOn)
	noErr(t, <-stopped)
	noErr(t, <-stopped)
	r.check("destination")
	if got := r.state(id); got != wire.State_STATE_COMPLETED {
		t.Errorf("record is %s", got)
	}
}

// TestRaces lets somebody else change the record in the very moment in which a
// party wants to.
func TestRaces(t *testing.T) {
	t.Run("abort wins against the commit", func(t *testing.T) {
		r := newRig(t, nil)
		var once sync.Once
		var id string
		r.dst.recs.before = func(_, to wire.State) {
			if to == wire.State_STATE_HANDING_OFF {
				once.Do(func() { r.move(id, wire.State_STATE_ABORTING) })
			}
		}
		id = r.create()
		p, err := r.prepare(id)
		noErr(t, err)
		noErr(t, r.start(id, p.Stream))
		rec := r.finished(id)
		r.check("source")
		if rec.State != wire.State_STATE_ABORTED || r.w.count("run") != 0 || r.w.count("discard") != 1 {
			t.Errorf("record is %s, run %d times, discarded %d times", rec.State, r.w.count("run"), r.w.count("discard"))
		}
	})
	t.Run("commit wins against the source's abort", func(t *testing.T) {
		r := newRig(t, nil)
		// The source wants to abort after all was copied, and while it does
		// the destination commits.
		goOn, trying, sent := make(chan struct{}), make(chan struct{}), make(chan struct{})
		r.src.cfg.Failpoint = func(point string) {
			if point == "source.sent" {
				close(sent)
			}
		}
		r.dst.recs.before = func(_, to wire.State) {
			if to == wire.State_STATE_STAGED {
				<-trying
			}
		}
		var once sync.Once
		r.src.recs.before = func(_, to wire.State) {
			if to == wire.State_STATE_ABORTING {
				once.Do(func() {
					close(trying)
					<-goOn
				})
			}
		}
		id := r.begin()
		<-sent
		aborted := make(chan error, 1)
		go func() { aborted <- r.abort("alpha", id) }()
		r.until("the commit", func() bool { return r.state(id) >= wire.State_STATE_HANDING_OFF })
		close(goOn)
		if err := <-aborted; wire.CodeOf(err) != wire.Code_CODE_CONFLICT {
			t.Errorf("abort: %v", err)
		}
		rec := r.finished(id)
		r.check("destination")
		if rec.State != wire.State_STATE_COMPLETED || r.w.count("thaw") != 0 {
			t.Errorf("record is %s, thawed %d times", rec.State, r.w.count("thaw"))
		}
	})
	// Every answer of the bus gets lost once: the change was made all the same.
	t.Run("answers lost", func(t *testing.T) {
		r := newRig(t, nil)
		for _, n := range []*node{r.src, r.dst} {
			var mu sync.Mutex
			lost := map[wire.State]bool{}
			n.recs.after = func(to wire.State) error {
				mu.Lock()
				defer mu.Unlock()
				if lost[to] {
					return nil
				}
				lost[to] = true
				return fmt.Errorf("%s: %w", to, transport.ErrOutcome)
			}
		}
		rec := r.finished(r.begin())
		r.check("destination")
		want := []string{
			"requested by coordinator", "preflight by coordinator", "freezing by alpha", "final copying by alpha",
			"restoring by beta", "staged by beta", "handing off by beta", "completed by beta",
		}
		if diff := cmp.Diff(want, states(rec)); diff != "" {
			t.Errorf("steps (-want +got):\n%s", diff)
		}
	})
	// The commit's outcome stays unknown for a while: neither side may do anything.
	t.Run("commit unknown", func(t *testing.T) {
		r := newRig(t, nil)
		var mu sync.Mutex
		blind := true
		tried := make(chan struct{}, 100)
		r.dst.recs.deny = func(_, to wire.State) error {
			mu.Lock()
			defer mu.Unlock()
			if to == wire.State_STATE_HANDING_OFF && blind {
				tried <- struct{}{}
				return transport.ErrOutcome
			}
			return nil
		}
		id := r.begin()
		<-tried
		<-tried
		if got := r.w.runs(); got != "source frozen, destination built" {
			t.Errorf("while nobody knows: %s", got)
		}
		mu.Lock()
		blind = false
		mu.Unlock()
		if rec := r.finished(id); rec.State != wire.State_STATE_COMPLETED {
			t.Errorf("record is %s", rec.State)
		}
		r.check("destination")
	})
}

// TestRecordVanishes: a frozen tree whose record is gone stays frozen, for it
// may run elsewhere, until the record is there again.
func TestRecordVanishes(t *testing.T) {
	r := newRig(t, nil)
	running, goOn := make(chan struct{}), make(chan struct{})
	r.w.on("run", func(context.Context) error {
		close(running)
		<-goOn
		return nil
	})
	id := r.begin()
	<-running
	rec, _, err := r.recs.Get(t.Context(), id)
	noErr(t, err)
	noErr(t, r.recs.Delete(t.Context(), id))
	if err := r.abort("alpha", id); err == nil {
		t.Error("abort without a record succeeded")
	}
	if got := r.w.runs(); got != "source frozen, destination built" {
		t.Errorf("without a record: %s", got)
	}
	back := proto.CloneOf(rec)
	_, err = r.recs.Create(t.Context(), back)
	noErr(t, err)
	close(goOn)
	r.finished(id)
	r.check("destination")
}

func TestFrozenTimeout(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Timeouts.Frozen = 300 * time.Millisecond })
	r.w.hold("restore-end")
	rec := r.finished(r.begin())
	r.check("source")
	if rec.State != wire.State_STATE_ABORTED || !strings.Contains(rec.Reason, "frozen for 300ms") {
		t.Errorf("record is %s because of %q", rec.State, rec.Reason)
	}
}

// TestTrouble: what cannot be undone is said, not glossed over.
func TestTrouble(t *testing.T) {
	t.Run("thaw", func(t *testing.T) {
		r := newRig(t, nil)
		r.w.on("dump-end", func(context.Context) error { return errors.New("pid 3 died") })
		r.w.on("thaw", func(context.Context) error { return errors.New("detach: no such process") })
		rec := r.finished(r.begin())
		if rec.State != wire.State_STATE_ABORTING || rec.Error.GetCode() != wire.Code_CODE_UNKNOWN_STATE {
			t.Errorf("record is %s, error %v", rec.State, rec.Error)
		}
	})
	t.Run("neither started nor removed", func(t *testing.T) {
		r := newRig(t, nil)
		r.w.on("run", func(context.Context) error { return errors.New("half of it runs") })
		r.w.on("discard", func(context.Context) error { return errors.New("cannot kill") })
		id := r.begin()
		r.until("the destination to give up", func() bool { return !r.dst.busy() })
		rec, _, err := r.recs.Get(t.Context(), id)
		noErr(t, err)
		if rec.State != wire.State_STATE_HANDING_OFF || rec.Error.GetCode() != wire.Code_CODE_UNKNOWN_STATE {
			t.Errorf("record is %s, error %v", rec.State, rec.Error)
		}
		if got := r.w.runs(); got != "source frozen, destination built" {
			t.Errorf("%s", got)
		}
		// An operator looked and fenced the destination.
		_, err = r.recs.Change(t.Context(), id, func(rec *wire.Record) error {
			if err := rec.Move(wire.State_STATE_STUCK, wire.RoleCoordinator, "operator", time.Now()); err != nil {
				return err
			}
			return rec.Move(wire.State_STATE_RETURNING, wire.RoleCoordinator, "operator", time.Now())
		})
		noErr(t, err)
		r.finished(id)
		r.check("source")
	})
}

func TestInfoAndPs(t *testing.T) {
	r := newRig(t, nil)
	agents, err := transport.Discover(t.Context(), r.nc)
	noErr(t, err)
	if len(agents) != 2 || agents[0].Host == agents[1].Host || agents[0].MemoryBytes == 0 || agents[0].Kernel == "" {
		t.Errorf("agents: %v", agents)
	}
	reply, err := transport.Call[*wire.PsRequest, *wire.PsReply](t.Context(), r.nc, "alpha", "ps", &wire.PsRequest{})
	noErr(t, err)
	for _, p := range reply.Processes {
		if p.Pid == r.pid {
			if p.Comm != "sleep" || p.Command != "sleep 300" || p.OpenFiles < 3 || p.Threads != 1 || p.RssBytes == 0 {
				t.Errorf("sleep is described as %v", p)
			}
			return
		}
	}
	t.Errorf("pid %d is not among %d processes", r.pid, len(reply.Processes))
}
