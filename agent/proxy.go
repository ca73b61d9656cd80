package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/transport"
	"godwit/wire"
)

// Proxies keep the bytes flowing of pipes, sockets and terminals whose other end
// stays on the host that a tree has left (home) when the tree runs elsewhere.
//
//	producer ─► original pipe ─► pump ═ relay over the bus ═ pump ─► new pipe ─► tree
//	            └──────── home's agent ────────┘   └── the agent of the tree's host ──┘
//
// Home keeps a duplicate of what the tree had and reads it only once the migration is
// completed; an aborted one has read nothing. When the tree moves on, no chain grows:
// what waits for it travels with the image, what it has written is brought home
// first, and the next host attaches to the same home.

// proxies are those of an agent.
type proxies struct {
	host string
	log  hclog.Logger
	bus  *transport.RelayBus
	// ending says how the tree ended that landed here with a migration; false: it runs.
	ending func(migration string) (wire.Ending, uint8, bool)

	mu    sync.Mutex
	homes map[string]*proxy
	trees map[string]*proxy
	moved map[string]time.Time // ids of trees' ends that another host has taken over
}

// proxy is one end of one.
type proxy struct {
	ps        *proxies
	info      *wire.Proxy
	migration string
	home      bool
	log       hclog.Logger
	relay     *transport.Relay
	pump      *pump
	key       string // of a tree's end: the object of this host that it is behind
	ended     sync.Once
	term      *homeTerminal // of a home's end that is a terminal
	finished  sync.Once
	overAt    time.Time // of a tree's terminal: when it ended
	// patience bounds, if not 0, the silence of the other end.
	patience time.Duration
}

// movedFor is how long it is remembered that another host has taken an end over.
const movedFor = 10 * time.Minute

// listen lets the ends hear what comes over the bus.
func (ps *proxies) listen(nc *nats.Conn) func() error {
	return func() (err error) {
		if nc != nil {
			ps.bus, err = transport.NewRelayBus(nc, ps.host, ps.deliver)
		}
		return err
	}
}

func newProxies(host string, log hclog.Logger) *proxies {
	return &proxies{host: host, log: log.Named("proxy"), homes: map[string]*proxy{}, trees: map[string]*proxy{}, moved: map[string]time.Time{}}
}

// deliver gives a frame to the end that it is for; false: there is none.
func (ps *proxies) deliver(id string, toHome bool, frame []byte) bool {
	ps.mu.Lock()
	p := ps.trees[id]
	if toHome {
		p = ps.homes[id]
	}
	_, moved := ps.moved[id]
	ps.mu.Unlock()
	if p == nil {
		return moved && !toHome
	}
	h, payload, err := wire.ParseRelayFrame(frame)
	if err != nil {
		ps.log.Debug("a frame was dropped", "proxy", id, "error", err)
		return true // what is lost is sent again
	}
	if h.Type == wire.RelaySize || h.Type == wire.RelayEnd {
		p.told(h, payload)
		return true
	}
	p.relay.Handle(h, payload)
	return true
}

// send gives a frame to the bus, or to the end of this host.
func (ps *proxies) send(host, id string, toHome bool, frame []byte) error {
	if host == ps.host {
		if !ps.deliver(id, toHome, frame) {
			if h, _, err := wire.ParseRelayFrame(frame); err == nil && h.Type != wire.RelayGone {
				ps.deliver(id, !toHome, wire.RelayHeader{Type: wire.RelayGone, Epoch: h.Epoch}.Frame(nil))
			}
		}
		return nil
	}
	return ps.bus.Send(host, id, toHome, frame)
}

// add makes an end, which stays idle until begin. files are its own from then on.
func (ps *proxies) add(info *wire.Proxy, migration string, home bool, files []*os.File) (*proxy, error) {
	closeAll := func() {
		for _, f := range files {
			_ = f.Close()
		}
	}
	if ps.bus == nil {
		closeAll()
		return nil, errors.New("this agent has no bus for proxies")
	}
	var reads, writes bool
	for _, f := range files {
		r, w, err := directions(f)
		if err != nil {
			closeAll()
			return nil, err
		}
		reads, writes = reads || r, writes || w
	}
	if info.Terminal && home { // it is opened anew
		reads, writes = !info.OutputOnly, true
	}
	peer := info.Home
	if home {
		peer = ""
	}
	p := &proxy{ps: ps, info: info, migration: migration, home: home, log: ps.log.With("proxy", info.Id, "migration", migration, "object", info.Object)}
	p.relay = transport.NewRelay(transport.RelayConfig{
		ID: info.Id, Home: home, Host: ps.host, Peer: peer, Epoch: info.Epoch, Reads: reads, Writes: writes,
		Send: ps.send, Chunk: ps.bus.Chunk(), Logger: p.log,
	})
	var err error
	if p.pump, err = newPump(p.relay, files, !home); err != nil {
		closeAll()
		return nil, fmt.Errorf("proxy %s: %w", info.Object, err)
	}
	if info.Terminal && home {
		p.term = newHomeTerminal(p.pump.out, info, p.log)
		if info.OutputOnly {
			p.pump.in = nil
		}
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if home {
		ps.homes[info.Id] = p
	} else {
		ps.trees[info.Id] = p
		delete(ps.moved, info.Id)
	}
	return p, nil
}

// directions says which ways bytes go through a file.
func directions(f *os.File) (reads, writes bool, err error) {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return false, false, os.NewSyscallError("fcntl F_GETFL", err)
	}
	acc := flags & unix.O_ACCMODE
	return acc != unix.O_WRONLY, acc != unix.O_RDONLY, nil
}

// begin lets the bytes flow.
func (p *proxy) begin() error {
	if p.term != nil {
		p.relay.Put(p.term.begin())
	}
	if err := p.pump.start(); err != nil {
		return err
	}
	p.relay.Activate()
	side := "tree"
	if p.home {
		side = "home"
	}
	p.log.Info("proxy runs", "end", side, "peer", p.info.Home)
	go p.attend(side)
	return nil
}

// attend tells of stalls and of the end.
func (p *proxy) attend(side string) {
	stalled, tick, begun := false, time.Second, time.Now()
	if p.pump.tty {
		tick = sizePoll
	}
	for over := false; !over; {
		select {
		case <-p.relay.Done():
			over = true
		case <-time.After(tick):
		}
		lost := p.relay.Err() != nil
		st := p.relay.Stats()
		silent := !st.Heard.IsZero() && time.Since(st.Heard) > transport.RelayStalled
		if heard := latest(begun, st.Heard); p.patience > 0 && !st.Over && time.Since(heard) > p.patience {
			p.log.Warn("nothing was heard of the other end for too long: the terminal hangs up", "peer", st.Peer, "patience", p.patience)
			lost = true
		}
		if p.term != nil && !st.Over && !lost {
			p.follow(st.Peer)
			if p.term.stand != nil && !p.term.stand.Lives() {
				p.log.Info("what stood in for the root of the tree was killed: its terminal hangs up", "pid", p.term.stand.Pid())
				p.relay.Farewell()
				lost = true
			}
		}
		switch {
		case st.Over:
		case silent && !stalled:
			p.log.Warn("nothing is heard of the other end; the program waits", "end", side, "peer", st.Peer)
		case stalled && !silent:
			p.log.Info("the other end is heard again", "end", side, "peer", st.Peer)
		}
		stalled = silent
		over = over || lost // nobody asks any more
		if p.pump.tty && (st.Over || lost) {
			p.finish()
		}
		if p.pump.tty && !p.home {
			p.tellEnd(st)
		}
		if st.Over {
			p.ended.Do(func() {
				if err := p.relay.Err(); err != nil {
					p.log.Error("proxy lost: the program meets the end of its object", "end", side, "error", err)
					return
				}
				p.log.Info("proxy ended", "end", side, "peer", st.Peer, "sent_bytes", st.Sent, "received_bytes", st.Received)
			})
		}
	}
	p.drop()
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// finish closes a terminal that has ended: that of a tree hangs up, and what stands
// in for a root that has left ends.
func (p *proxy) finish() {
	p.finished.Do(func() {
		p.term.end()
		p.pump.close()
		p.term.leave()
	})
}

// drop takes an end off the list and closes its files.
func (p *proxy) drop() {
	p.ended.Do(func() {})
	p.ps.mu.Lock()
	list := p.ps.trees
	if p.home {
		list = p.ps.homes
	}
	if list[p.info.Id] == p {
		delete(list, p.info.Id)
	}
	p.ps.mu.Unlock()
	p.relay.Leave()
	p.finished.Do(func() {
		p.term.end()
		p.pump.close()
		if p.term != nil && p.term.stand != nil {
			_ = p.term.stand.End(statusUnknown)
		}
	})
}

// hand forgets a tree's end that another host has taken over.
func (p *proxy) hand() {
	p.ps.mu.Lock()
	p.ps.moved[p.info.Id] = time.Now()
	for id, at := range p.ps.moved {
		if time.Since(at) > movedFor {
			delete(p.ps.moved, id)
		}
	}
	p.ps.mu.Unlock()
	p.log.Info("the tree's end moves on", "received_bytes", p.relay.Stats().Received, "sent_bytes", p.relay.Stats().Sent)
	p.drop()
}

// hold stops what is given to the tree: what waits there is about to be dumped.
func (p *proxy) hold() { p.pump.halt() }

// settle brings home what the tree has written. Preconditions: the tree is frozen, and
// the proxy held.
func (p *proxy) settle(ctx context.Context) error {
	p.pump.drain()
	if err := p.relay.Settle(ctx); err != nil {
		return fmt.Errorf("bring the bytes of %s home to %s: %w", p.info.Object, p.info.Home, err)
	}
	return nil
}

// release lets the bytes of a tree flow that stays.
func (p *proxy) release() {
	p.relay.Flush(false)
	if err := p.pump.start(); err != nil {
		p.log.Error("the proxy could not be started again", "error", err)
	}
}

// of finds the tree's end that is behind an object of this host; nil: there is none.
func (ps *proxies) of(key string) *proxy {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.trees {
		if p.key == key && !p.relay.Over() {
			return p
		}
	}
	return nil
}

// list describes all ends that are in use.
func (ps *proxies) list() []*wire.ProxyState {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var out []*wire.ProxyState
	for _, m := range []map[string]*proxy{ps.homes, ps.trees} {
		for _, p := range m {
			st := p.relay.Stats()
			if st.Over {
				continue
			}
			s := &wire.ProxyState{Id: p.info.Id, Migration: p.migration, Object: p.info.Object, Home: p.home, Peer: st.Peer,
				SentBytes: st.Sent, ReceivedBytes: st.Received, WaitingBytes: st.Waiting, State: "waits"}
			switch {
			case st.Opened && time.Since(st.Heard) > transport.RelayStalled:
				s.State = "stalled"
			case st.Opened:
				s.State = "flows"
			}
			out = append(out, s)
		}
	}
	return out
}

// close ends all: the other ends meet the end of their objects.
func (ps *proxies) close() {
	ps.mu.Lock()
	var all []*proxy
	for _, m := range []map[string]*proxy{ps.homes, ps.trees} {
		for _, p := range m {
			all = append(all, p)
		}
	}
	ps.mu.Unlock()
	for _, p := range all {
		if !p.relay.Over() {
			p.log.Warn("the agent ends, and with it a proxy that is in use", "peer", p.relay.Stats().Peer)
			p.relay.Farewell()
		}
		p.drop()
	}
	if ps.bus != nil {
		_ = ps.bus.Close()
	}
}

// proxyID names a proxy by the migration that began it and its object.
func proxyID(migration, key string) string {
	sum := sha256.Sum256([]byte(migration + " " + key))
	return hex.EncodeToString(sum[:10])
}

// servesProxy serves what has bytes that flow.
func servesProxy(o *wire.OpenObject, _ external.Entry) error {
	switch o.Kind {
	case "pipe", "unix-stream":
		return nil
	case "tty":
		switch {
		case !isTerminal(o.Key):
			return errors.New("the bytes of this terminal cannot be carried on: only those of pseudoterminals that are open by their own name")
		case o.Carry == plan.CarryImage:
			return errors.New("its other end is in the tree, too, or another terminal takes its place (--attach), so that there is nothing to proxy")
		}
		return nil
	case "fifo":
		return errors.New("the bytes of a fifo cannot be carried on, since anybody may open it at any time by its name: take one of the destination (path or create), or use a pipe")
	}
	return fmt.Errorf("the bytes of what is of kind %s cannot be carried on: only those of pipes, of stream unix sockets and of pseudoterminals", o.Kind)
}

// holdProxy makes the tree's end ready. It attaches to home once the migration is
// committed, and is answered when home knows that it is completed.
func holdProxy(_ context.Context, q *holdRequest) (*held, error) {
	if q.Proxy.GetId() == "" || q.Proxy.GetHome() == "" || q.Proxy.GetEpoch() == 0 {
		return nil, errors.New("the resolution does not say which proxy it is")
	}
	if err := transport.CheckName(q.Proxy.Id); err != nil {
		return nil, err
	}
	ps, x := q.agent.proxies, &held{far: &engine.Far{}}
	var p *proxy
	x.start = func(context.Context) (err error) {
		if x.far.File == nil {
			return fmt.Errorf("proxy %s: the tree was built without it", q.Proxy.Object)
		}
		if p, err = ps.add(q.Proxy, q.migration, false, []*os.File{x.far.File}); err != nil {
			return err
		}
		x.far.File, p.key = nil, x.far.Key
		return p.begin()
	}
	x.release = func() {
		if p != nil {
			p.drop()
		}
	}
	return x, nil
}

// proxyOf says which proxy an object has: that which it is of already, or a new one.
func proxyOf(req *wire.ResolveRequest, r *wire.Resolution) *wire.Proxy {
	for _, o := range r.Objects {
		if o.Proxy != nil {
			return o.Proxy
		}
	}
	what := nameObject(r.Objects[0])
	text := what.Path
	if what.Pid != 0 {
		text = fmt.Sprintf("%s, fd %d of pid %d (%s)", text, what.Fd, what.Pid, what.Comm)
	}
	p := &wire.Proxy{Id: proxyID(req.Id, r.Key), Home: req.Source, Epoch: 1, Key: r.Key, Object: text}
	for _, o := range r.Objects {
		p.Terminal = p.Terminal || o.Kind == "tty"
		p.OutputOnly = p.OutputOnly || o.Reader != nil
	}
	return p
}

// standing are the rules that what is proxied already goes on being so.
func standing(objects []*wire.OpenObject) []external.Rule {
	var out []external.Rule
	for _, o := range objects {
		if o.Proxy == nil {
			continue
		}
		if sel, err := external.ParseSelector(o.Key); err == nil {
			out = append(out, external.Rule{Entry: external.Entry{Selector: sel, Resolver: external.Proxy}, Origin: "proxied from " + o.Proxy.Home})
		}
	}
	return out
}

// standIns marks the objects behind which a proxy is whose tree's end the next host
// can take over: nobody else here has them.
func (a *Agent) standIns(p *engine.Plan, objects []*wire.OpenObject) error {
	var pids []int
	for _, t := range p.Tasks {
		pids = append(pids, t.Pid)
	}
	for _, o := range objects {
		x := a.proxies.of(o.Key)
		if x == nil {
			if err := lookReader(p.Pid, pids, o); err != nil {
				return err
			}
			continue
		}
		other, err := engine.HeldOutside(pids, o.Key)
		if err != nil {
			return err
		}
		if other == 0 {
			o.Proxy = proto.CloneOf(x.info)
			o.Proxy.Epoch++
			o.Proxy.Key = o.Key
		}
	}
	return nil
}

// lookReader notes who reads what is typed on a terminal, if that is nobody of the tree.
func lookReader(root int, pids []int, o *wire.OpenObject) error {
	if o.Kind != "tty" || !isTerminal(o.Key) || o.Carry == plan.CarryImage {
		return nil
	}
	pid, err := engine.TerminalReader(root, pids, o.Key)
	if err != nil || pid == 0 {
		return err
	}
	if x, err := process(pid); err == nil {
		o.Reader = &wire.Holder{Pid: x.Pid, Comm: x.Comm}
	}
	return nil
}

func (a *Agent) departing(id string, wanted []*wire.Proxy) *departing {
	return &departing{ps: a.proxies, id: id, wanted: wanted}
}

// departing are the proxies of a tree that leaves this host.
type departing struct {
	ps     *proxies
	id     string // of the migration
	wanted []*wire.Proxy
	rehome []*proxy // tree's ends here, which the next host takes over
	homes  []*proxy // ends that begin
}

// proxied is what the dump is to do with the objects.
func (d *departing) proxied() map[string]bool {
	out := map[string]bool{}
	for _, w := range d.wanted {
		out[w.Key] = d.ps.of(w.Key) != nil && d.ps.of(w.Key).info.Id == w.Id
	}
	return out
}

// masters are those of the terminals whose tree's end is here.
func (d *departing) masters() map[string]*os.File {
	out := map[string]*os.File{}
	for _, w := range d.wanted {
		if p := d.ps.of(w.Key); p != nil && p.info.Id == w.Id && p.pump.tty {
			out[w.Key] = p.pump.out
		}
	}
	return out
}

// standsIn says whether something has to stay in the place of the root.
func (d *departing) standsIn(root int) bool {
	return slices.ContainsFunc(d.homes, func(p *proxy) bool { return p.term != nil }) && waitsForRoot(root)
}

// frozen stops what flows into the tree.
func (d *departing) frozen() {
	for _, w := range d.wanted {
		if p := d.ps.of(w.Key); p != nil && p.info.Id == w.Id {
			p.hold()
			d.rehome = append(d.rehome, p)
		}
	}
}

// dumped keeps what the tree has, and brings home what it wrote.
func (d *departing) dumped(ctx context.Context, pids []int) error {
	for _, p := range d.rehome {
		if err := p.settle(ctx); err != nil {
			return err
		}
	}
	for _, w := range d.wanted {
		if w.Home != d.ps.host || w.Epoch != 1 {
			continue
		}
		files, err := engine.Duplicates(pids, w.Key)
		if err != nil {
			return fmt.Errorf("keep %s: %w", w.Object, err)
		}
		p, err := d.ps.add(w, d.id, true, files)
		if err != nil {
			return err
		}
		d.homes = append(d.homes, p)
	}
	return nil
}

// gone begins the proxies: the tree runs elsewhere. stand, if any, stays until its
// terminal ends.
func (d *departing) gone(stand engine.StandIn) {
	for _, p := range d.homes {
		if p.term != nil {
			p.term.stand, stand = stand, nil
			break
		}
	}
	for _, p := range d.rehome {
		p.hand()
	}
	for _, p := range d.homes {
		if err := p.begin(); err != nil {
			p.log.Error("the proxy could not be begun", "error", err)
			p.drop()
		}
	}
}

// stays leaves everything as it was.
func (d *departing) stays() {
	for _, p := range d.homes {
		p.drop()
	}
	for _, p := range d.rehome {
		p.release()
	}
	d.homes, d.rehome = nil, nil
}
