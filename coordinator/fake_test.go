package coordinator

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/transport/bus"
	"godwit/wire"
)

// testBus is an embedded bus with the records open.
type testBus struct {
	t   *testing.T
	srv *bus.Server
	dir string
	url string
	*link
}

func newBus(t *testing.T) *testBus {
	t.Helper()
	b := &testBus{t: t, dir: t.TempDir(), link: &link{}}
	var err error
	if b.srv, err = bus.Start(bus.Config{Listen: "127.0.0.1:0", StoreDir: b.dir}); err != nil {
		t.Fatal(err)
	}
	b.url = b.srv.URL()
	t.Cleanup(func() { b.srv.Shutdown() })
	b.nc = b.connect()
	if b.records, err = transport.OpenRecords(t.Context(), b.nc, nil); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *testBus) connect() *nats.Conn {
	b.t.Helper()
	nc, err := transport.Connect(transport.Config{URLs: []string{b.url}, Name: b.t.Name()})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(nc.Close)
	return nc
}

// restart stops the bus, and starts it again at the same place after a while.
func (b *testBus) restart(away time.Duration) {
	b.t.Helper()
	b.srv.Shutdown()
	time.Sleep(away)
	var err error
	if b.srv, err = bus.Start(bus.Config{Listen: strings.TrimPrefix(b.url, "nats://"), StoreDir: b.dir}); err != nil {
		b.t.Fatal(err)
	}
}

// quick is a patience for tests.
var quick = rules.Patience{Probe: 300 * time.Millisecond, Dead: 3 * time.Second, Orphan: 5 * time.Second}

// command runs godwit against the bus.
type command struct {
	stdout, stderr lockedBuffer
	interrupts     chan os.Signal
	code           chan int
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (b *testBus) godwit(args ...string) *command {
	b.t.Helper()
	c := &command{interrupts: make(chan os.Signal, 4), code: make(chan int, 1)}
	a := &app{stdout: &c.stdout, stderr: &c.stderr, interrupts: c.interrupts, wait: &quick,
		env: []string{"GODWIT_CONFIG=" + b.config()}}
	args = append([]string{"--nats-url", b.url}, args...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.code <- a.run(context.Background(), args)
	}()
	b.t.Cleanup(func() {
		select {
		case <-done:
		case <-time.After(2 * time.Minute):
			b.t.Errorf("godwit %v does not end", args)
		}
	})
	return c
}

func (b *testBus) config() string {
	path := b.t.TempDir() + "/godwit.toml"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// wait returns the exit code.
func (c *command) wait(t *testing.T) int {
	t.Helper()
	select {
	case code := <-c.code:
		return code
	case <-time.After(2 * time.Minute):
		t.Fatalf("the command does not end\nstdout: %s\nstderr: %s", c.stdout.String(), c.stderr.String())
		return -1
	}
}

// stop is a place where a fake agent can be told to fail or to wait.
type stop string

const (
	atPreflight stop = "preflight"
	atReserve   stop = "reserve"
	atPrepare   stop = "prepare"
	atStart     stop = "start"
	atFreezing  stop = "freezing"
	atCopying   stop = "copying"
	atRestoring stop = "restoring"
	atStaged    stop = "staged"
	atCommitted stop = "committed"
)

// fakeAgent plays an agent: it speaks the protocol and moves the records as
// the real one does, over no tree at all.
type fakeAgent struct {
	t       *testing.T
	host    string
	nc      *nats.Conn
	svc     *transport.Service
	records *transport.Records

	// fail says what goes wrong where; die: the agent vanishes there; hold: it
	// waits there until the channel is closed or it is told to abort.
	fail map[stop]error
	die  stop
	hold map[stop]chan struct{}
	// busy is how often it has no place there.
	busy map[stop]int

	// What the tree holds, and what becomes of it here.
	objects  []*wire.OpenObject
	resolved func(*wire.ResolveRequest) *wire.ResolveReply
	declared []string // at the last preflight
	started  *wire.StartRequest
	handed   []*wire.Resolution

	mu      sync.Mutex
	held    map[string]context.CancelFunc // by migration
	calls   []string
	reached chan stop
	gone    chan struct{}
	once    sync.Once
}

var began = time.Unix(1_700_000_000, 0)

func (b *testBus) agent(host string) *fakeAgent {
	b.t.Helper()
	f := &fakeAgent{t: b.t, host: host, nc: b.connect(), fail: map[stop]error{}, hold: map[stop]chan struct{}{},
		held: map[string]context.CancelFunc{}, reached: make(chan stop, 64), gone: make(chan struct{})}
	var err error
	if f.records, err = transport.OpenRecords(b.t.Context(), f.nc, nil); err != nil {
		b.t.Fatal(err)
	}
	f.svc, err = transport.Serve(f.nc, transport.ServiceConfig{Info: f.info(), Logger: hclog.NewNullLogger()})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { f.vanish() })
	for _, err := range []error{
		transport.Handle(f.svc, "info", func(context.Context, *wire.InfoRequest) (*wire.InfoReply, error) {
			return &wire.InfoReply{Info: f.info()}, nil
		}),
		transport.Handle(f.svc, "ps", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) {
			return &wire.PsReply{Processes: testProcesses()}, nil
		}),
		transport.Handle(f.svc, "preflight", f.preflight),
		transport.Handle(f.svc, "resolve", f.resolve),
		transport.Handle(f.svc, "reserve", f.reserve),
		transport.Handle(f.svc, "prepare", f.prepare),
		transport.Handle(f.svc, "start", f.start),
		transport.Handle(f.svc, "abort", f.abort),
	} {
		if err != nil {
			b.t.Fatal(err)
		}
	}
	return f
}

func (f *fakeAgent) info() *wire.AgentInfo {
	return &wire.AgentInfo{Host: f.host, Protocol: wire.Version, Version: "0.1.0", Kernel: "6.12.0", Arch: "amd64",
		MemoryBytes: 16 << 30, AvailableBytes: 12 << 30, Cpus: 8, StartedUnix: began.Unix(), Pid: 77}
}

// vanish takes the agent off the bus without a word.
func (f *fakeAgent) vanish() {
	f.once.Do(func() {
		close(f.gone)
		f.nc.Close()
		f.mu.Lock()
		for _, cancel := range f.held {
			cancel()
		}
		f.mu.Unlock()
	})
}

// at is called at each place; false: go no further.
func (f *fakeAgent) at(ctx context.Context, s stop) error {
	f.mu.Lock()
	err, hold, die := f.fail[s], f.hold[s], f.die == s
	if f.busy[s] > 0 {
		f.busy[s]--
		err = wire.Errorf(wire.Code_CODE_BUSY, "%s has no place", f.host)
	}
	f.mu.Unlock()
	select {
	case f.reached <- s:
	default:
	}
	if die {
		f.vanish()
		return context.Canceled
	}
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.gone:
			return context.Canceled
		}
	}
	return err
}

func (f *fakeAgent) called(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what)
}

func (f *fakeAgent) wasCalled(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.calls, what)
}

func (f *fakeAgent) preflight(ctx context.Context, req *wire.PreflightRequest) (*wire.PreflightReply, error) {
	f.called("preflight")
	root := &wire.Process{Pid: req.Pid, Comm: "redis-server", Command: "redis-server *:6379"}
	if err := f.at(ctx, atPreflight); err != nil {
		if wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND {
			root = nil
		}
		reply := &wire.PreflightReply{Root: root, Objects: f.objects}
		if wire.CodeOf(err) == wire.Code_CODE_REFUSED {
			reply.Requirements = requirements(req.Pid)
		}
		return reply, err
	}
	f.mu.Lock()
	f.declared = req.Options.GetExternal()
	f.mu.Unlock()
	direct := &wire.DirectOffer{Addresses: []string{"10.0.0.1:4223"}, Seed: "secret"}
	return &wire.PreflightReply{Root: root, Objects: f.objects, Direct: direct, Requirements: requirements(req.Pid)}, nil
}

func requirements(pid int32) *wire.Requirements {
	return &wire.Requirements{
		MemoryBytes: 1 << 30, EarlyBytes: 1000 << 20,
		Tasks: []*wire.RequiredTask{{Pid: pid, Tids: []int32{pid, pid + 1, pid + 2}}, {Pid: pid + 9, Tids: []int32{pid + 9}}},
	}
}

// fakeLane is the lane to who offers this.
func fakeLane(o *wire.DirectOffer) *wire.Lane {
	if o.GetSeed() != "secret" {
		return &wire.Lane{Reason: "nothing was offered"}
	}
	return &wire.Lane{Direct: true, Address: o.Addresses[0]}
}

func (f *fakeAgent) resolve(_ context.Context, req *wire.ResolveRequest) (*wire.ResolveReply, error) {
	f.called("resolve")
	reply := &wire.ResolveReply{}
	if f.resolved != nil {
		reply = f.resolved(req)
		if req.Requirements != nil {
			reply.Lane = fakeLane(req.Direct)
		}
	}
	if lack, ok := errors.AsType[*wire.Failure](f.fail[atPrepare]); ok && req.Requirements != nil {
		reply.Problems = append(reply.Problems, lack.Problems...)
	}
	return reply, nil
}

func (f *fakeAgent) session(id string) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	f.mu.Lock()
	f.held[id] = cancel
	f.mu.Unlock()
	return ctx
}

func (f *fakeAgent) end(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if cancel := f.held[id]; cancel != nil {
		cancel()
		delete(f.held, id)
	}
}

// move moves the record; false if it cannot be done (any more).
func (f *fakeAgent) move(id string, role wire.Role, to wire.State, edit func(*wire.Record)) bool {
	select {
	case <-f.gone:
		return false
	default:
	}
	_, err := f.records.Change(context.Background(), id, func(r *wire.Record) error {
		if err := r.Move(to, role, f.host, time.Now()); err != nil {
			return err
		}
		if edit != nil {
			edit(r)
		}
		return nil
	})
	return err == nil
}

func (f *fakeAgent) blame(s wire.State, err error) func(*wire.Record) {
	fl := wire.ErrorOf(err).Err().(*wire.Failure).At(f.host, s.Phase())
	return func(r *wire.Record) {
		if r.Error == nil && r.Reason == "" {
			r.Reason, r.Error = fl.Message, fl.Proto()
		}
	}
}

// awaitState waits until the record is in one of the states.
func (f *fakeAgent) awaitState(ctx context.Context, id string, states ...wire.State) (wire.State, bool) {
	for {
		r, _, err := f.records.Get(context.Background(), id)
		if err == nil && slices.Contains(states, r.State) {
			return r.State, true
		}
		select {
		case <-f.gone:
			return 0, false
		case <-ctx.Done():
			return 0, false
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (f *fakeAgent) reserve(ctx context.Context, _ *wire.ReserveRequest) (*wire.ReserveReply, error) {
	f.called("reserve")
	if err := f.at(ctx, atReserve); err != nil {
		return nil, err
	}
	return &wire.ReserveReply{}, nil
}

func (f *fakeAgent) prepare(ctx context.Context, req *wire.PrepareRequest) (*wire.PrepareReply, error) {
	f.called("prepare")
	f.mu.Lock()
	f.handed = req.Resolutions
	f.mu.Unlock()
	if err := f.at(ctx, atPrepare); err != nil {
		return nil, err
	}
	id := req.Id
	work := f.session(id)
	go func() {
		defer f.end(id)
		abort := func(s wire.State, err error) {
			if !f.move(id, wire.RoleDestination, wire.State_STATE_ABORTING, f.blame(s, err)) {
				return
			}
		}
		if _, ok := f.awaitState(work, id, wire.State_STATE_FINAL_COPYING); !ok {
			return
		}
		if !f.move(id, wire.RoleDestination, wire.State_STATE_RESTORING, nil) {
			return
		}
		if err := f.at(work, atRestoring); err != nil {
			abort(wire.State_STATE_RESTORING, err)
			return
		}
		if !f.move(id, wire.RoleDestination, wire.State_STATE_STAGED, nil) {
			return
		}
		if err := f.at(work, atStaged); err != nil {
			abort(wire.State_STATE_STAGED, err)
			return
		}
		if !f.move(id, wire.RoleDestination, wire.State_STATE_HANDING_OFF, nil) {
			return
		}
		if err := f.at(context.Background(), atCommitted); err != nil {
			f.move(id, wire.RoleDestination, wire.State_STATE_RETURNING, f.blame(wire.State_STATE_HANDING_OFF, err))
			return
		}
		f.move(id, wire.RoleDestination, wire.State_STATE_COMPLETED, func(r *wire.Record) {
			r.LandedPid = r.Pid
			r.DestinationReport = &wire.Report{FrozenUs: 30_000, RestoreUs: 700_000, ResumeUs: 2_000, Bytes: 1 << 30, Pages: 1 << 18,
				ResumedAtUnixUs: 1_700_000_000_812_000, PeakRssBytes: 80 << 20}
		})
	}()
	return &wire.PrepareReply{Stream: id, Lane: fakeLane(req.Direct), Codecs: []string{"s2"}}, nil
}

func (f *fakeAgent) start(ctx context.Context, req *wire.StartRequest) (*wire.StartReply, error) {
	f.called("start")
	f.mu.Lock()
	f.started = req
	f.mu.Unlock()
	id := req.Id
	if err := f.at(ctx, atStart); err != nil {
		return nil, err
	}
	work := f.session(id)
	if !f.move(id, wire.RoleSource, wire.State_STATE_FREEZING, nil) {
		f.end(id)
		return nil, wire.Errorf(wire.Code_CODE_ABORTED, "the migration was aborted")
	}
	report := &wire.Report{FrozenUs: 820_000, FreezeUs: 3_000, DumpUs: 500_000, TransferUs: 600_000, Bytes: 1<<30 + 4096, Pages: 1 << 18,
		BytesPerSecond: 1 << 30, FrozenAtUnixUs: 1_700_000_000_000_000, PeakRssBytes: 92 << 20}
	go func() {
		defer f.end(id)
		phase := wire.State_STATE_FREEZING
		err := f.at(work, atFreezing)
		if err == nil && f.move(id, wire.RoleSource, wire.State_STATE_FINAL_COPYING, nil) {
			phase = wire.State_STATE_FINAL_COPYING
			_ = transport.PublishProgress(f.nc, &wire.Progress{Id: id, Host: f.host, State: phase, BytesDone: 1 << 29, BytesTotal: 1 << 30, BytesPerSecond: 1 << 29})
			err = f.at(work, atCopying)
		}
		if err != nil {
			f.move(id, wire.RoleSource, wire.State_STATE_ABORTING, f.blame(phase, err))
		}
		s, ok := f.awaitState(context.Background(), id, wire.State_STATE_COMPLETED, wire.State_STATE_ABORTING, wire.State_STATE_RETURNING, wire.State_STATE_ABORTED)
		if !ok {
			return
		}
		if s == wire.State_STATE_COMPLETED {
			_, _ = f.records.Change(context.Background(), id, func(r *wire.Record) error { r.SourceReport = report; return nil })
			return
		}
		f.move(id, wire.RoleSource, wire.State_STATE_ABORTED, func(r *wire.Record) { r.SourceReport = &wire.Report{FrozenUs: 41_000} })
	}()
	return &wire.StartReply{}, nil
}

func (f *fakeAgent) abort(_ context.Context, req *wire.AbortRequest) (*wire.AbortReply, error) {
	f.called("abort")
	f.mu.Lock()
	cancel := f.held[req.Id]
	f.mu.Unlock()
	if cancel == nil {
		return nil, wire.Errorf(wire.Code_CODE_NOT_FOUND, "this agent holds nothing of migration %q", req.Id)
	}
	cancel()
	return &wire.AbortReply{}, nil
}

func testProcesses() []*wire.Process {
	return []*wire.Process{
		{Pid: 2, Comm: "kthreadd", State: "S", Threads: 1, KernelThread: true},
		{Pid: 1, Comm: "init", Command: "/sbin/init", RssBytes: 9 << 20, Threads: 1, OpenFiles: 40, State: "S"},
		{Pid: 412, Ppid: 1, Comm: "redis-server", Command: "redis-server *:6379", RssBytes: 1 << 30, Threads: 5, OpenFiles: 12, Uid: 107, State: "S"},
		{Pid: 500, Ppid: 1, Comm: "sh", Command: "sh -c while :; do sleep 1; done", RssBytes: 1 << 20, Threads: 1, OpenFiles: 3, State: "S"},
		{Pid: 501, Ppid: 500, Comm: "sleep", Command: "sleep 1", RssBytes: 900 << 10, Threads: 1, OpenFiles: 3, State: "S"},
		{Pid: 430, Ppid: 412, Comm: "evil", Command: "evil \x1b[31mred\nline", RssBytes: 100, Threads: 1, OpenFiles: 1, State: "Z"},
	}
}
