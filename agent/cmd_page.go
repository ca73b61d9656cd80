package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"godwit/agent/handoff"
	"godwit/engine"
	"godwit/engine/image"
	"godwit/transport"
	"godwit/wire"
)

// pagerCommand is how the agent starts its pagers.
const pagerCommand = "page"

func cmdPage() *cobra.Command {
	return &cobra.Command{
		Use:    pagerCommand,
		Short:  "Bring the memory of a tree that runs here already (started by the daemon)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The agent's end, or that of whoever reads its log, is not the pager's.
			signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGTERM, unix.SIGINT)
			var st unix.Stat_t
			if err := unix.Fstat(pagerFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
				return &exitError{code: wire.ExitUsage, err: errors.New("this command is started by the daemon (godwit-agent run)")}
			}
			if err := unix.SetNonblock(pagerFD, true); err != nil {
				return err
			}
			return runPager(cmd.Context(), os.NewFile(pagerFD, "agent"))
		},
	}
}

// paging is the work of one pager process.
type paging struct {
	order pagerOrder
	agent *pagerProcess // to tell it something
	log   hclog.Logger
	conns [2]*nats.Conn
	far   *transport.PageClient
	hosts []engine.Held
	pager *engine.Pager
	begun time.Time
	took  time.Duration // until all memory was there

	ledger *ledger
	feed   *feed
	why    error // the tree is ended
	failed error // to say so in the record

	mu      sync.Mutex
	trouble error     // why the source does not answer
	since   time.Time // of trouble
	next    time.Time // when the next piece may be asked for, with a bound to the rate
}

// runPager serves what a tree misses until nothing is missing, and then says so in the
// record, whether the agent is there or not.
func runPager(ctx context.Context, conn *os.File) error {
	p := &paging{begun: time.Now()}
	if err := receive(conn, &p.order, nil); err != nil {
		return err
	}
	p.log = hclog.New(&hclog.LoggerOptions{Name: "godwit-pager", Level: hclog.LevelFromString(p.order.LogLevel), Output: os.Stderr, JSONFormat: p.order.LogJSON}).With("migration", p.order.ID)
	boundMemory(pagerMemory)
	bus := p.order.Bus
	bus.Logger = p.log
	streams := &Streams{Bus: bus}
	var err error
	if p.conns, err = streams.pageConns(ctx, p.order.ID); err != nil {
		return err
	}
	defer closeConns(p.conns)
	p.far = &transport.PageClient{Conns: p.conns, ID: p.order.ID, Trouble: p.heard}
	spaces, err := p.spaces(conn)
	if errors.Is(err, errPartnerGone) {
		return nil // nothing is to come later
	}
	p.begun = time.Now()
	p.pager = engine.NewPager(p.log, p)
	if err == nil {
		err = p.pager.Serve(ctx, spaces)
	}
	answer := pagerAnswer{}
	if err != nil {
		answer.Error = err.Error()
	}
	p.agent = &pagerProcess{conn: conn}
	if err := errors.Join(err, p.agent.tell(answer)); err != nil {
		return err
	}
	// What nobody waits for would only be in the way until the tree runs.
	var ran pagerAnswer
	if err := receive(conn, &ran, nil); err != nil {
		p.log.Info("the agent has ended before it said whether the tree runs", "reason", err)
	}
	return p.run(ctx)
}

// pagerMemory is what the garbage collector of a pager aims to stay below, bytes.
const pagerMemory = 64 << 20

// spaces takes over what the agent hands over.
func (p *paging) spaces(conn *os.File) (out []engine.Space, err error) {
	var list pagerSpaces
	if err := receive(conn, &list, nil); err != nil {
		return nil, err
	}
	var files []*os.File
	for len(files) < 2*len(list.Spaces) {
		if err := receive(conn, nil, &files); err != nil {
			return nil, err
		}
	}
	for i, s := range list.Spaces {
		out = append(out, engine.Space{Pid: s.Pid, Host: s.Host.Pid, Ranges: s.Ranges, Uffd: files[2*i], Pagemap: files[2*i+1]})
		p.hosts = append(p.hosts, s.Host)
	}
	return out, nil
}

// run brings everything, and sees to the record.
func (p *paging) run(ctx context.Context) error {
	nc := p.conns[0]
	recs, err := openRecords(ctx, nc, p.log)
	if err != nil {
		// The tree waits for what it misses; the record can wait, too.
		p.log.Error("the records cannot be used", "error", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ticked := make(chan struct{})
	go func() {
		defer close(ticked)
		p.report(ctx)
	}()
	for err != nil && ctx.Err() == nil {
		time.Sleep(time.Second)
		recs, err = openRecords(ctx, nc, p.log)
	}
	l := &ledger{records: recs, id: p.order.ID, host: p.order.Host, role: wire.RoleDestination, log: p.log}
	p.ledger = l
	p.feed = l.follow(ctx, func(r *wire.Record) {
		if why, over := handoff.PagingOver(handoff.Saw(r)); over {
			cancel(pagerWhy[why])
		}
	})
	handoff.Pager.Run(handoff.Pager.First, func(at handoff.Step) handoff.Event { return p.perform(ctx, at) })
	return p.failed
}

// perform carries out the action of a step of handoff.Pager.
func (p *paging) perform(ctx context.Context, at handoff.Step) handoff.Event {
	switch at.Do {
	case handoff.Fill:
		return p.fill(ctx)
	case handoff.Release:
		// Unless the agent has ended, it holds the memory, too.
		if err := p.agent.tell(pagerAnswer{}); err != nil {
			p.log.Debug("the agent has ended", "error", err)
			return handoff.Untold
		}
		return handoff.Told
	case handoff.Complete:
		return p.complete()
	case handoff.Await:
		select {
		case <-p.feed.changed:
		case <-time.After(recordPoll / 4):
		}
		return handoff.News
	case handoff.Kill:
		p.log.Error("the tree is ended", "reason", p.why)
		killed, left := killTrees(p.hosts)
		if len(left) > 0 {
			p.log.Error("processes could not be killed, and wait for memory that does not come", "pids", left)
			return handoff.Unkilled
		}
		p.log.Warn("the processes of the tree were killed", "processes", killed)
		return handoff.Killed
	case handoff.Concede:
		if _, p.failed = p.ledger.move(forever(), wire.State_STATE_COMPLETED, nil); p.failed != nil {
			return handoff.Refused
		}
		return handoff.Told
	case handoff.Complain:
		return p.complain()
	case handoff.Hang:
		select {}
	}
	panic("a pager does not " + string(at.Do))
}

// pagerWhy is why the work of a pager ends, by what it saw.
var pagerWhy = map[handoff.Event]error{
	handoff.SawAborted: errors.New("the migration has ended in another way"), // the tree runs elsewhere, or nowhere
	handoff.SawGivenUp: errors.New("an operator declared the source dead, with which memory of the tree is lost"),
}

// fill brings everything.
func (p *paging) fill(ctx context.Context) handoff.Event {
	p.why = p.pager.Fill(ctx)
	st := p.pager.Stats()
	p.took = time.Since(p.begun)
	if ctx.Err() != nil {
		p.why = context.Cause(ctx)
	}
	for event, why := range pagerWhy {
		if errors.Is(p.why, why) {
			return event
		}
	}
	if p.why != nil {
		return handoff.Failed
	}
	p.log.Info("all memory is here", "bytes", st.Put, "faults", st.Faults, "duration_ms", p.took.Milliseconds())
	return handoff.AllHere
}

// complete says in the record that all is there.
func (p *paging) complete() handoff.Event {
	rec, err := p.ledger.read(forever())
	if err == nil && !wire.Terminal(rec.State) && !handoff.MayComplete(handoff.Saw(rec)) {
		if event, over := handoff.PagingOver(handoff.Saw(rec)); over {
			p.why = pagerWhy[event]
			return event
		}
		return handoff.Refused
	}
	st := p.pager.Stats()
	rec, err = p.ledger.move(forever(), wire.State_STATE_COMPLETED, func(r *wire.Record) {
		if r.DestinationReport == nil {
			r.DestinationReport = &wire.Report{}
		}
		d := r.DestinationReport
		d.PagingUs, d.PagedBytes, d.Faults, d.FaultP50Us, d.FaultP99Us = us(p.took), st.Put, st.Faults, us(st.P50), us(st.P99)
		// Whoever declared the source dead meanwhile has lost nothing by it.
		r.Error, r.Reason = nil, ""
	})
	switch {
	case err == nil || rec.GetState() == wire.State_STATE_COMPLETED:
		return handoff.Told
	case wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND:
		return handoff.Unreadable
	case rec != nil:
		if event, over := handoff.PagingOver(handoff.Saw(rec)); over {
			p.why = pagerWhy[event]
			return event
		}
	}
	return handoff.Refused
}

// complain says in the record that the tree has ended for want of memory, unless the agent
// could not let it run and gives it back.
func (p *paging) complain() handoff.Event {
	f := wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "memory of the tree could not be brought to %s, where it has ended: %w; its copy at %s stays frozen as it was when it was handed over: godwit resolve %s --destination-is-dead lets it run on from there", p.order.Host, p.why, p.order.Source, p.order.ID)
	_, p.failed = p.ledger.note(forever(), func(r *wire.Record) {
		if r.State == wire.State_STATE_PAGING {
			r.Error, r.Reason = wire.ErrorOf(f), f.Error()
		}
	})
	if p.failed != nil {
		return handoff.Untold
	}
	return handoff.Told
}

// report publishes how far it is until ctx ends.
func (p *paging) report(ctx context.Context) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	warned := time.Time{}
	for {
		st := p.pager.Stats()
		m := &wire.Progress{
			Id: p.order.ID, Host: p.order.Host, State: wire.State_STATE_PAGING, BytesDone: st.Put, BytesTotal: st.Put + st.Left,
			PagesDone: st.Put / 4096, UnixMs: time.Now().UnixMilli(),
		}
		if sec := time.Since(p.begun).Seconds(); st.Put >= 1<<20 {
			m.BytesPerSecond = uint64(float64(st.Put) / sec)
		}
		m.Message = fmt.Sprintf("%s missing, %d pages waited for (median %s, 99 %% in %s)", mib(st.Left), st.Faults, st.P50.Round(10*time.Microsecond), st.P99.Round(10*time.Microsecond))
		p.mu.Lock()
		trouble, since := p.trouble, p.since
		p.mu.Unlock()
		if trouble != nil && time.Since(since) > progressEvery {
			m.Message = fmt.Sprintf("the tree waits for %s: %v", p.order.Source, trouble)
			if time.Since(warned) > 10*time.Second {
				warned = time.Now()
				p.log.Warn("what the tree misses cannot be had; whoever needs it waits", "source", p.order.Source, "reason", trouble, "missing_bytes", st.Left)
			}
		}
		if err := transport.PublishProgress(p.conns[0], m); err != nil {
			p.log.Trace("progress lost", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// heard notes why the source does not answer, or that it does.
func (p *paging) heard(trouble error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if trouble != nil && p.trouble == nil {
		p.since = time.Now()
	}
	p.trouble = trouble
}

// Map implements engine.PageSource.
func (p *paging) Map(ctx context.Context, pid uint32, from uint64) ([]image.Range, uint64, error) {
	r, err := p.far.Ask(ctx, &wire.PagesRequest{Pid: pid, Start: from, Map: true}, false)
	return pageRanges(r), r.GetNext(), err
}

func pageRanges(r *wire.PagesReply) (out []image.Range) {
	for _, x := range r.GetRanges() {
		out = append(out, image.Range{Start: x.Start, End: x.End})
	}
	return out
}

// Pages implements engine.PageSource.
func (p *paging) Pages(ctx context.Context, pid uint32, start, end uint64, urgent bool) (out []engine.PageRun, err error) {
	for start < end {
		if !urgent {
			if err := p.pace(ctx, end-start); err != nil {
				return nil, err
			}
		}
		r, err := p.far.Ask(ctx, &wire.PagesRequest{Pid: pid, Start: start, End: end}, urgent)
		if err != nil {
			return nil, err
		}
		data := r.Data
		for _, x := range pageRanges(r) {
			if n := x.End - x.Start; x.Start < x.End && n <= uint64(len(data)) {
				out = append(out, engine.PageRun{Addr: x.Start, Data: data[:n:n]})
				data = data[n:]
				continue
			}
			return nil, fmt.Errorf("the answer of %s has %#x-%#x, but not what is there", p.order.Source, x.Start, x.End)
		}
		if r.Next == 0 {
			break
		}
		if r.Next <= start {
			return nil, fmt.Errorf("the answer of %s goes up to %#x only", p.order.Source, r.Next)
		}
		start = r.Next
	}
	return slices.Clip(out), nil
}

// pace waits until so many bytes more may be asked for.
func (p *paging) pace(ctx context.Context, n uint64) error {
	if p.order.Bandwidth == 0 {
		return nil
	}
	p.mu.Lock()
	at := p.next
	if now := time.Now(); at.Before(now) {
		at = now
	}
	p.next = at.Add(time.Duration(float64(n) / float64(p.order.Bandwidth) * float64(time.Second)))
	p.mu.Unlock()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Until(at)):
		return nil
	}
}
