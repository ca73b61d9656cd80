// Package agent owns the daemon of a host, godwit-agent: the sessions in which
// this host is the source or the destination of a migration, the files that it
// hands to a tree that lands here, and the commands that use the engine on the
// local machine without any bus. It must not know the coordinator's rules:
// what it knows of a migration is the record and the requests that it gets.
package agent

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/image"
	"godwit/transport"
	"godwit/wire"
)

// Engine is what an agent needs of the engine; *engine.Engine has it.
//
// Each call leaves the processes of this host as they were if it fails, and a
// refusal is a *engine.Refusal.
type Engine interface {
	// Plan looks at the running tree of pid without touching it.
	Plan(ctx context.Context, pid int, o engine.DumpOptions) (*engine.Plan, error)
	// StartLive begins to copy the tree of pid while it runs.
	StartLive(ctx context.Context, pid int, o engine.DumpOptions, sink image.EarlySink) (engine.Live, error)
	// EarlyFiles gives the content of files that travel with the tree of pid while it runs.
	EarlyFiles(ctx context.Context, pid int, o engine.DumpOptions, c *engine.EarlyCopy, sink image.EarlySink) (bytes uint64, err error)
	// Freeze stops every task of the tree of pid.
	Freeze(ctx context.Context, pid int, o engine.DumpOptions) (engine.Tree, error)
	// Check says whether a tree that needs p can land on this host.
	Check(ctx context.Context, p *engine.Plan, o engine.RestoreOptions) error
	// Restore builds a tree up to the point where its tasks could run.
	Restore(ctx context.Context, src image.Source, o engine.RestoreOptions) (engine.Standing, error)
}

var _ Engine = (*engine.Engine)(nil)

// Timeouts end what does not get on; none may be zero.
type Timeouts struct {
	Begin    time.Duration // what a request does before it is answered, at the record
	Freeze   time.Duration // stopping all tasks of a tree
	Frozen   time.Duration // from the freeze to the commit, unless the migration says it
	Prepared time.Duration // until the stream to a prepared destination begins
}

// Config is what an agent is made of.
type Config struct {
	Host    string // name on the bus
	Version string // release
	Engine  Engine
	Records Records
	Streams *Streams
	// Bus carries the bytes of proxies; nil: there are none.
	Bus        *nats.Conn
	Journal    *journal             // nil: nothing is noted
	Pagers     *Pagers              // nil: no memory comes after its tree
	Failpoint  func(string)         // is called at each of Failpoints; nil: none
	Progress   func(*wire.Progress) // publishes; must not wait
	Timeouts   Timeouts
	Limits     Limits
	GhostLimit uint64 // bytes
	// External are the rules of this host for what trees that land here have open.
	External []external.Rule
	Logger   hclog.Logger
}

// Agent holds the sessions of a host. Its methods are the control calls and
// may be called from any goroutine.
type Agent struct {
	cfg     Config
	log     hclog.Logger
	started time.Time

	mu           sync.Mutex
	stopping     bool
	sources      map[string]*source
	destinations map[string]*destination
	landed       map[int]string       // pid of the child of ours: migration
	endings      map[string]*ending   // of trees that landed here, by migration
	reserved     map[string]time.Time // places of migrations that are yet to be started, until when

	provisions *provisions
	proxies    *proxies

	// informing ends when a stopping agent has nothing more to wait for but
	// words that change nothing.
	informing context.Context
	hush      context.CancelFunc
}

// New returns an agent without sessions.
func New(cfg Config) *Agent {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.Progress == nil {
		cfg.Progress = func(*wire.Progress) {}
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger.Named("agent"), started: time.Now(),
		sources: map[string]*source{}, destinations: map[string]*destination{}, landed: map[int]string{}, endings: map[string]*ending{}, reserved: map[string]time.Time{},
	}
	a.provisions = &provisions{log: a.log.Named("provide")}
	a.informing, a.hush = context.WithCancel(context.Background())
	a.proxies = newProxies(cfg.Host, a.log)
	a.proxies.ending = a.endingOf
	return a
}

// Serve lets the agent answer the control calls of its host.
func (a *Agent) Serve(svc *transport.Service) error {
	return firstError(
		a.proxies.listen(a.cfg.Bus),
		func() error { return transport.Handle(svc, "info", a.Info) },
		func() error { return transport.Handle(svc, "ps", a.Ps) },
		func() error { return transport.Handle(svc, "preflight", a.Preflight) },
		func() error { return transport.Handle(svc, "resolve", a.Resolve) },
		func() error { return transport.Handle(svc, "prepare", a.Prepare) },
		func() error { return transport.Handle(svc, "reserve", a.Reserve) },
		func() error { return transport.Handle(svc, "start", a.Start) },
		func() error { return transport.Handle(svc, "resize", a.Resize) },
		func() error { return transport.Handle(svc, "attach", a.Attach) },
		func() error { return transport.Handle(svc, "abort", a.Abort) },
	)
}

func firstError(fns ...func() error) error {
	for _, fn := range fns {
		if err := fn(); err != nil {
			return err
		}
	}
	return nil
}

// Abort ends a migration before its commit; the reply comes when the tree runs
// at the source again, as far as this host is concerned.
func (a *Agent) Abort(ctx context.Context, req *wire.AbortRequest) (*wire.AbortReply, error) {
	var ss []*session
	a.mu.Lock()
	if s := a.sources[req.Id]; s != nil {
		ss = append(ss, s.session)
	}
	if d := a.destinations[req.Id]; d != nil {
		ss = append(ss, d.session)
	}
	a.mu.Unlock()
	if len(ss) == 0 {
		return nil, wire.Errorf(wire.Code_CODE_NOT_FOUND, "this agent holds nothing of migration %q", req.Id)
	}
	reason := req.Reason
	if reason == "" {
		reason = "aborted on request"
	}
	for _, s := range ss {
		if err := s.abort(ctx, reason); err != nil {
			return nil, failure(err, a.cfg.Host, s.phase())
		}
	}
	return &wire.AbortReply{}, nil
}

// Stop takes no new sessions, aborts those before their commit and waits for
// all: a tree that is frozen here and may run elsewhere must not be let go,
// which this process's end would do. It returns early only if ctx ends, with
// what it left behind.
func (a *Agent) Stop(ctx context.Context) error {
	a.mu.Lock()
	a.stopping = true
	ss := a.sessions()
	a.mu.Unlock()
	for _, s := range ss {
		s.cancel(&wire.Failure{Code: wire.Code_CODE_ABORTED, Message: "the agent of " + a.cfg.Host + " is being stopped"})
	}
	// Words that only inform get a little time, then the agent leaves without.
	timer := time.AfterFunc(3*time.Second, a.hush)
	defer timer.Stop()
	tell := time.NewTicker(5 * time.Second)
	defer tell.Stop()
	for _, s := range ss {
		for waiting := true; waiting; {
			select {
			case <-s.done:
				waiting = false
			case <-tell.C:
				a.log.Warn("waiting to stop: a migration past its commit, or whose record cannot be read, must come to its end first",
					"migration", s.id, "role", s.role.String(), "phase", s.phase().Word())
			case <-ctx.Done():
				return fmt.Errorf("stop the agent: migration %s is still %s: %w", s.id, s.phase().Word(), context.Cause(ctx))
			}
		}
	}
	a.hush()
	a.proxies.close()
	return nil
}

// sessions lists all. Preconditions: mu is held.
func (a *Agent) sessions() []*session {
	var ss []*session
	for _, s := range a.sources {
		ss = append(ss, s.session)
	}
	for _, d := range a.destinations {
		ss = append(ss, d.session)
	}
	return ss
}

func errStopping(host string) error {
	return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "the agent of %s is being stopped", host)
}

// adopt takes care of a tree that landed here: one process of it is a child of
// this one, and nobody else could reap it. When the agent ends, init does.
func (a *Agent) adopt(child, root int, id string) {
	a.mu.Lock()
	a.landed[child] = id
	a.mu.Unlock()
	end := a.lands(id)
	go func() {
		status, err := waitChild(child)
		a.mu.Lock()
		delete(a.landed, child)
		a.mu.Unlock()
		if err == nil && child == root {
			a.ends(id, end, exitStatus(status))
		} else {
			a.ends(id, end, -1)
		}
		if err != nil {
			a.log.Debug("a landed tree is not ours to reap", "pid", child, "migration", id, "error", err)
			return
		}
		a.log.Info("a landed tree has ended", "pid", child, "migration", id, "exit_status", exitStatus(status))
	}()
}

// within says whether this process is in the tree of pid.
func (a *Agent) within(pid int) bool {
	self := os.Getpid()
	return self == pid || below(self, pid)
}
