package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/engine"
	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/transport"
	"godwit/transport/bus"
	"godwit/wire"
)

// world is the one tree that the tests move, and where it runs. It notes every
// breach of the rule that no two copies run at once.
type world struct {
	mu         sync.Mutex
	source     string // running, frozen, killed
	landed     string // "", built, running, discarded
	violations []string
	hooks      map[string]func(context.Context) error
	passed     map[string]int
}

func newWorld() *world {
	return &world{source: "running", hooks: map[string]func(context.Context) error{}, passed: map[string]int{}}
}

// at runs the hook of a point that the fake engine reached.
func (w *world) at(ctx context.Context, point string) error {
	w.mu.Lock()
	w.passed[point]++
	hook := w.hooks[point]
	w.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx)
}

func (w *world) on(point string, fn func(context.Context) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hooks[point] = fn
}

func (w *world) count(point string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.passed[point]
}

func (w *world) set(side *string, to string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*side = to
	if w.source == "running" && w.landed == "running" {
		w.violations = append(w.violations, "two copies run")
	}
	if w.source == "killed" && w.landed != "running" {
		w.violations = append(w.violations, "the source was killed while the landed copy was "+w.landed)
	}
}

// runs says where the tree runs now.
func (w *world) runs() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.violations) > 0 {
		return strings.Join(w.violations, "; ")
	}
	switch {
	case w.source == "running":
		return "source"
	case w.landed == "running" && w.source == "killed":
		return "destination"
	}
	return fmt.Sprintf("source %s, destination %s", w.source, w.landed)
}

// fakeEngine is an engine whose trees are in a world.
type fakeEngine struct {
	w     *world
	bytes int // of memory
}

func (e *fakeEngine) Plan(ctx context.Context, pid int, o engine.DumpOptions) (*engine.Plan, error) {
	if err := e.w.at(ctx, "plan"); err != nil {
		return nil, err
	}
	return &engine.Plan{
		Pid: pid, MemoryBytes: uint64(e.bytes), Arch: "amd64", OpenFiles: 3,
		Tasks: []plan.Task{{Pid: pid, VPid: pid, VTids: []int{pid, pid + 1}, Comm: "sleep"}},
		Files: []plan.File{{Path: "/etc/passwd", Kind: "regular", Pids: []int{pid}}},
	}, nil
}

func (e *fakeEngine) StartLive(context.Context, int, engine.DumpOptions, image.EarlySink) (engine.Live, error) {
	return nil, engine.ErrNotLive
}

func (e *fakeEngine) EarlyFiles(context.Context, int, engine.DumpOptions, *engine.EarlyCopy, image.EarlySink) (uint64, error) {
	return 0, engine.ErrNotLive
}

func (e *fakeEngine) Freeze(ctx context.Context, pid int, o engine.DumpOptions) (engine.Tree, error) {
	if err := e.w.at(ctx, "freeze"); err != nil {
		return nil, err
	}
	e.w.set(&e.w.source, "frozen")
	return &fakeTree{e: e, frozen: time.Now()}, nil
}

func (e *fakeEngine) Check(ctx context.Context, p *engine.Plan, o engine.RestoreOptions) error {
	return e.w.at(ctx, "check")
}

func (e *fakeEngine) Restore(ctx context.Context, src image.Source, o engine.RestoreOptions) (engine.Standing, error) {
	if err := e.w.at(ctx, "restore"); err != nil {
		return nil, err
	}
	set, err := src.Images(ctx)
	if err != nil {
		return nil, err
	}
	if n := len(set.Entries("inventory")); n != 1 || set.Facts == nil {
		return nil, fmt.Errorf("%d inventory entries, facts %v", n, set.Facts)
	}
	if err := e.w.at(ctx, "restore-images"); err != nil {
		return nil, err
	}
	got := 0
	for n := 0; ; n++ {
		id, off, p, err := src.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(p, fill(id, off, len(p))) || off != uint64(got) {
			return nil, fmt.Errorf("%d bytes of %s at %#x are not what was sent", len(p), id, off)
		}
		got += len(p)
		if n == 2 {
			if err := e.w.at(ctx, "restore-data"); err != nil {
				return nil, err
			}
		}
	}
	if got != e.bytes {
		return nil, fmt.Errorf("%d bytes of %d", got, e.bytes)
	}
	if err := e.w.at(ctx, "restore-end"); err != nil {
		return nil, err
	}
	e.w.set(&e.w.landed, "built")
	return &fakeStanding{e: e}, nil
}

type fakeTree struct {
	e      *fakeEngine
	frozen time.Time
}

func (t *fakeTree) Dump(ctx context.Context, sink image.Sink) (engine.DumpStats, error) {
	st := engine.DumpStats{Processes: 1, Threads: 2, FrozenAt: t.frozen, FreezeDur: time.Millisecond}
	err := t.dump(ctx, sink)
	st.Pages, st.Bytes, st.DumpDur = uint64(t.e.bytes/pageSize), uint64(t.e.bytes), time.Since(t.frozen)
	return st, err
}

func (t *fakeTree) dump(ctx context.Context, sink image.Sink) error {
	if err := t.e.w.at(ctx, "dump"); err != nil {
		return err
	}
	if err := sink.Facts(&image.Facts{Version: 1, Host: "alpha"}); err != nil {
		return err
	}
	if err := sink.Entry(inventoryEntry()); err != nil {
		return err
	}
	if err := sink.Entry(mmEntry()); err != nil {
		return err
	}
	if err := sink.Sealed(); err != nil {
		return err
	}
	id := image.DataID{Kind: image.Memory, ID: 1}
	const step = 16 * pageSize
	for off := 0; off < t.e.bytes; off += step {
		if off >= t.e.bytes/2 && off < t.e.bytes/2+step {
			if err := t.e.w.at(ctx, "dump-data"); err != nil {
				return err
			}
		}
		if err := sink.Data(id, uint64(off), fill(id, uint64(off), min(step, t.e.bytes-off))); err != nil {
			return err
		}
	}
	return t.e.w.at(ctx, "dump-end")
}

func (t *fakeTree) Hold(note func([]engine.Held) error) error {
	return errors.Join(note(nil), t.e.w.at(context.Background(), "hold"))
}

func (t *fakeTree) Thaw() error {
	if err := t.e.w.at(context.Background(), "thaw"); err != nil {
		return err
	}
	t.e.w.set(&t.e.w.source, "running")
	return nil
}

func (t *fakeTree) ThawStopped() error { return t.Thaw() }

func (t *fakeTree) Pids() []int { return []int{1 << 22} }

func (t *fakeTree) Kill() error {
	if err := t.e.w.at(context.Background(), "kill"); err != nil {
		return err
	}
	t.e.w.set(&t.e.w.source, "killed")
	return nil
}

func (t *fakeTree) KillButRoot() (engine.StandIn, error) { return nil, t.Kill() }

type fakeStanding struct{ e *fakeEngine }

func (s *fakeStanding) Root() int   { return 1 << 22 } // above every pid
func (s *fakeStanding) Child() int  { return s.Root() }
func (s *fakeStanding) Pids() []int { return []int{s.Root()} }

func (s *fakeStanding) Waiting() ([]engine.Waiting, error) { return nil, nil }

func (s *fakeStanding) Stats() engine.RestoreStats {
	return engine.RestoreStats{Processes: 1, Threads: 2, Pages: uint64(s.e.bytes / pageSize), ForkDur: 3 * time.Millisecond, RestoreDur: 5 * time.Millisecond}
}

func (s *fakeStanding) Run() error {
	if err := s.e.w.at(context.Background(), "run"); err != nil {
		return err
	}
	s.e.w.set(&s.e.w.landed, "running")
	return nil
}

func (s *fakeStanding) RunStopped() error { return s.Run() }

func (s *fakeStanding) Discard() error {
	if err := s.e.w.at(context.Background(), "discard"); err != nil {
		return err
	}
	s.e.w.set(&s.e.w.landed, "discarded")
	return nil
}

// racingRecords lets tests get between a party and its record.
type racingRecords struct {
	Records
	mu     sync.Mutex
	before func(from, to wire.State)       // in a move, before it is written
	after  func(to wire.State) error       // after it was written: an answer that got lost
	deny   func(from, to wire.State) error // in place of writing
}

func (r *racingRecords) Change(ctx context.Context, id string, fn func(*wire.Record) error) (*wire.Record, error) {
	r.mu.Lock()
	before, after, deny := r.before, r.after, r.deny
	r.mu.Unlock()
	moved := wire.State_STATE_UNSPECIFIED
	rec, err := r.Records.Change(ctx, id, func(rec *wire.Record) error {
		from := rec.State
		if err := fn(rec); err != nil {
			return err
		}
		if from == rec.State {
			return nil
		}
		moved = rec.State
		if deny != nil {
			if err := deny(from, rec.State); err != nil {
				return err
			}
		}
		if before != nil {
			before(from, rec.State)
		}
		return nil
	})
	if err == nil && after != nil && moved != wire.State_STATE_UNSPECIFIED {
		if err := after(moved); err != nil {
			return nil, err
		}
	}
	return rec, err
}

// node is one agent on the bus.
type node struct {
	*Agent
	nc   *nats.Conn
	svc  *transport.Service
	recs *racingRecords
}

// rig is a bus with two agents and what a coordinator does.
type rig struct {
	t      *testing.T
	w      *world
	bus    *bus.Server
	busCfg bus.Config
	nc     *nats.Conn
	recs   *transport.Records
	src    *node
	dst    *node
	pid    int32
	// options are those of migrations, preps the answers of the destination.
	options *wire.MigrateOptions
	preps   map[string]*wire.PrepareReply
}

func testLogger(t *testing.T) hclog.Logger {
	if !testing.Verbose() {
		return hclog.NewNullLogger()
	}
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: os.Stderr, Name: t.Name()})
}

// newRig starts everything. edit may change the configuration of both agents.
func newRig(t *testing.T, edit func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, w: newWorld(), preps: map[string]*wire.PrepareReply{}}
	r.busCfg = bus.Config{Listen: freePort(t), StoreDir: t.TempDir()}
	r.startBus()
	t.Cleanup(func() { r.bus.Shutdown() })
	var err error
	r.nc, err = transport.Connect(transport.Config{URLs: []string{r.bus.URL()}, Name: "coordinator"})
	noErr(t, err)
	t.Cleanup(r.nc.Close)
	r.recs, err = transport.OpenRecords(t.Context(), r.nc, nil)
	noErr(t, err)
	r.src = r.newNode("alpha", edit)
	r.dst = r.newNode("beta", edit)

	// A real process, for what preflight reads of it.
	sleep := exec.Command("sleep", "300")
	noErr(t, sleep.Start())
	t.Cleanup(func() {
		_ = sleep.Process.Kill()
		_ = sleep.Wait()
	})
	r.pid = int32(sleep.Process.Pid)
	return r
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	noErr(t, err)
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func (r *rig) startBus() {
	r.t.Helper()
	var err error
	for range 3000 {
		if r.bus, err = bus.Start(r.busCfg); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond) // the port may still be going
	}
	noErr(r.t, err)
}

// restartBus ends the server and starts it again, with its store, after a pause.
func (r *rig) restartBus(pause time.Duration) {
	r.bus.Shutdown()
	time.Sleep(pause)
	r.startBus()
}

func (r *rig) newNode(host string, edit func(*Config)) *node {
	r.t.Helper()
	log := testLogger(r.t).Named(host)
	busCfg := transport.Config{URLs: []string{r.bus.URL()}, Name: host}
	nc, err := transport.Connect(busCfg)
	noErr(r.t, err)
	recs, err := transport.OpenRecords(r.t.Context(), nc, log)
	noErr(r.t, err)
	n := &node{nc: nc, recs: &racingRecords{Records: recs}}
	cfg := Config{
		Host: host, Version: "1.2.3", Engine: &fakeEngine{w: r.w, bytes: 6 << 20}, Records: n.recs,
		Streams: &Streams{
			Bus: busCfg, Control: nc, Window: 512 << 10, ChunkSize: 64 << 10, Lanes: 2,
			IdleTimeout: 5 * time.Second, OpenTimeout: 10 * time.Second, Logger: log,
		},
		Progress: func(p *wire.Progress) { _ = transport.PublishProgress(nc, p) },
		Timeouts: Timeouts{Begin: 30 * time.Second, Freeze: 10 * time.Second, Frozen: 2 * time.Minute, Prepared: 10 * time.Second},
		Logger:   log,
	}
	if edit != nil {
		edit(&cfg)
	}
	n.Agent = New(cfg)
	info, err := n.describe()
	noErr(r.t, err)
	n.svc, err = transport.Serve(nc, transport.ServiceConfig{Info: info, Logger: log})
	noErr(r.t, err)
	noErr(r.t, n.Serve(n.svc))
	noErr(r.t, nc.Flush()) // so that calls over other connections find it
	r.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := n.Stop(ctx); err != nil {
			r.t.Errorf("stop %s: %v", host, err)
		}
		_ = n.svc.Stop()
		nc.Close()
	})
	return n
}

// create makes the record of a migration in Preflight.
func (r *rig) create() string {
	r.t.Helper()
	rec := &wire.Record{Id: transport.NewID(), Source: "alpha", Destination: "beta", Pid: r.pid}
	rec.Start("coordinator", time.Now())
	_, err := r.recs.Create(r.t.Context(), rec)
	noErr(r.t, err)
	r.move(rec.Id, wire.State_STATE_PREFLIGHT)
	return rec.Id
}

// move changes the record as the coordinator.
func (r *rig) move(id string, to wire.State) {
	r.t.Helper()
	_, err := r.recs.Change(r.t.Context(), id, func(rec *wire.Record) error {
		return rec.Move(to, wire.RoleCoordinator, "coordinator", time.Now())
	})
	noErr(r.t, err)
}

func (r *rig) prepare(id string) (*wire.PrepareReply, error) {
	pre, err := transport.Call[*wire.PreflightRequest, *wire.PreflightReply](r.t.Context(), r.nc, "alpha", "preflight",
		&wire.PreflightRequest{Protocol: wire.Version, Id: id, Pid: r.pid, Destination: "beta", Options: r.options})
	if err != nil {
		return nil, err
	}
	prep, err := transport.Call[*wire.PrepareRequest, *wire.PrepareReply](r.t.Context(), r.nc, "beta", "prepare",
		&wire.PrepareRequest{Protocol: wire.Version, Id: id, Source: "alpha", Requirements: pre.Requirements, Direct: pre.Direct, Options: r.options})
	r.preps[id] = prep
	return prep, err
}

func (r *rig) start(id, stream string) error {
	_, err := transport.Call[*wire.StartRequest, *wire.StartReply](r.t.Context(), r.nc, "alpha", "start",
		&wire.StartRequest{Protocol: wire.Version, Id: id, Pid: r.pid, Destination: "beta", Stream: stream, Lane: r.preps[id].GetLane(), Codecs: r.preps[id].GetCodecs(), Options: r.options})
	return err
}

func (r *rig) abort(host, id string) error {
	_, err := transport.Call[*wire.AbortRequest, *wire.AbortReply](r.t.Context(), r.nc, host, "abort", &wire.AbortRequest{Id: id, Reason: "the operator said so"})
	return err
}

// begin prepares and starts a migration and ends the test if that fails.
func (r *rig) begin() string {
	r.t.Helper()
	id := r.create()
	p, err := r.prepare(id)
	noErr(r.t, err)
	noErr(r.t, r.start(id, p.Stream))
	return id
}

// finished waits until both agents are done with a migration and returns its record.
func (r *rig) finished(id string) *wire.Record {
	r.t.Helper()
	r.until("the sessions to end", func() bool { return !r.src.busy() && !r.dst.busy() })
	var rec *wire.Record
	r.until("the record", func() (ok bool) {
		var err error
		rec, _, err = r.recs.Get(r.t.Context(), id)
		return err == nil // it may take a moment after a restart of the bus
	})
	return rec
}

// fresh is a new tree for the next case on the same bus.
func (r *rig) fresh(t *testing.T) {
	r.t = t
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	r.w.source, r.w.landed = "running", ""
	clear(r.w.hooks)
	clear(r.w.passed)
}

func (n *node) busy() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.sources)+len(n.destinations) > 0
}

// until waits for a condition.
func (r *rig) until(what string, cond func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited too long for %s; the tree runs at: %s", what, r.w.runs())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (r *rig) state(id string) wire.State {
	rec, _, err := r.recs.Get(r.t.Context(), id)
	if err != nil {
		return wire.State_STATE_UNSPECIFIED
	}
	return rec.State
}

// check ends the test if the tree does not run where it should.
func (r *rig) check(where string) {
	r.t.Helper()
	if got := r.w.runs(); got != where {
		r.t.Errorf("the tree runs at: %s, want %s", got, where)
	}
}

func states(rec *wire.Record) []string {
	var out []string
	for _, s := range rec.Steps {
		out = append(out, s.State.Word()+" by "+s.By)
	}
	return slices.Clip(out)
}
