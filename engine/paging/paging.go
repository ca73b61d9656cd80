// Package paging owns the memory of processes that run before all of it is there
// (post-copy): it serves the pages that they miss, those that they ask for before
// the others, until nothing is missing. It must not know where pages come from.
package paging

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/sys"
)

// Run is data of consecutive pages.
type Run struct {
	Addr uint64
	Data []byte
}

// Source is where pages come from. Its calls wait for as long as it takes, until ctx ends:
// nothing can be put in the place of a page. They are made by several goroutines. An
// error says that the pages are lost.
type Source interface {
	// Map tells in which pages of a process, from an address on, there is something: runs,
	// ascending, that are complete up to next; next is 0 behind the last.
	Map(ctx context.Context, pid uint32, from uint64) (runs []image.Range, next uint64, err error)
	// Pages gives what there is in [start, end), ascending; the rest is empty. urgent says that a
	// process waits for it.
	Pages(ctx context.Context, pid uint32, start, end uint64, urgent bool) ([]Run, error)
}

const (
	// window is how much around a page that is missed is asked for with it, bytes.
	window = 64 << 10
	// piece is how much is asked for at once when nobody waits for it, bytes.
	piece = 256 << 10
	// ahead is how many pieces are under way at once. What is asked for urgently waits
	// for them on the way.
	ahead = 8
	// shortly after somebody has waited for a page he may wait for another one.
	shortly = 10 * time.Millisecond
	// atOnce is how much is put into memory at once, bytes: a fault waits meanwhile.
	atOnce = 64 << 10
)

// Stats is how far it is.
type Stats struct {
	Left, Put uint64 // bytes that are known to be missing, and that came
	Known     bool   // Left is all that is missing
	Faults    uint64 // pages that were waited for
	// P50 and P99 are percentiles of how long one waited for a page, of the last ones.
	P50, P99 time.Duration
}

// Pager fills the memory of processes.
type Pager struct {
	log hclog.Logger
	src Source

	mu     sync.Mutex
	cond   *sync.Cond // of mu: urgent, spaces or left have changed
	spaces []*space
	urgent int       // requests under way for which somebody waits
	bulk   int       // requests under way for which nobody does
	last   time.Time // of the last request for which somebody waits
	put    uint64
	faults uint64
	times  []time.Duration // of the last faults, a ring
	err    error
	wg     sync.WaitGroup
}

// New makes a pager that serves nobody yet.
func New(log hclog.Logger, src Source) *Pager {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	p := &Pager{log: log, src: src}
	p.cond = sync.NewCond(&p.mu)
	return p
}

// Serve takes over spaces, and begins to serve what they miss. ctx ends the serving, which
// leaves whoever misses a page waiting for good.
func (p *Pager) Serve(ctx context.Context, spaces []Space) error {
	for _, x := range spaces {
		s, err := newSpace(x)
		if err != nil {
			return err
		}
		p.take(ctx, s)
	}
	return nil
}

func (p *Pager) take(ctx context.Context, s *space) {
	p.mu.Lock()
	p.spaces = append(p.spaces, s)
	p.mu.Unlock()
	p.wg.Go(func() { p.listen(ctx, s) })
}

// Fill brings everything that is missing, and returns when nothing is, or everybody has gone.
func (p *Pager) Fill(ctx context.Context) error {
	defer context.AfterFunc(ctx, p.cond.Broadcast)()
	for i := 0; ; i++ {
		p.mu.Lock()
		if i == len(p.spaces) {
			p.mu.Unlock()
			break
		}
		s := p.spaces[i]
		p.mu.Unlock()
		if err := p.fill(ctx, s); err != nil {
			return err
		}
	}
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Stats says how far it is.
func (p *Pager) Stats() Stats {
	p.mu.Lock()
	st := Stats{Put: p.put, Faults: p.faults, Known: true}
	times := slices.Clone(p.times)
	spaces := slices.Clone(p.spaces)
	p.mu.Unlock()
	for _, s := range spaces {
		s.mu.Lock()
		if !s.over {
			st.Left += s.left
			st.Known = st.Known && s.whole
		}
		s.mu.Unlock()
	}
	if n := len(times); n > 0 {
		slices.Sort(times)
		st.P50, st.P99 = times[n/2], times[n*99/100]
	}
	return st
}

// remembered is of how many faults the waiting is known.
const remembered = 4096

// waited notes that somebody has got a page. Preconditions: the space's mu is held.
func (p *Pager) waited(s *space, at uint64) {
	since, ok := s.waits[at]
	if !ok {
		return
	}
	delete(s.waits, at)
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := time.Since(since); len(p.times) < remembered {
		p.times = append(p.times, d)
	} else {
		p.times[p.faults%remembered] = d
	}
	p.faults++
}

// fail ends everything: pages are lost, and whoever misses them waits.
func (p *Pager) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
	p.cond.Broadcast()
}

// gone says that a process, or its memory, is no more.
func gone(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrClosed) }

// listen reads what the kernel tells of a space.
func (p *Pager) listen(ctx context.Context, s *space) {
	defer context.AfterFunc(ctx, func() { _ = s.uffd.SetReadDeadline(time.Now()) })()
	buf := make([]byte, eventBuffer)
	for {
		var again []uint64
		var trouble error
		err := s.conn.Read(func(fd uintptr) (some bool) {
			again, some, trouble = p.pull(ctx, s, int(fd), buf)
			return some || trouble != nil
		})
		if err != nil {
			if ctx.Err() == nil && !s.closed() {
				p.fail(fmt.Errorf("listen to what pid %d misses: %w", s.pid, err))
			}
			return
		}
		if trouble != nil {
			p.fail(trouble)
			return
		}
		for _, at := range again {
			p.serve(ctx, s, at)
		}
	}
}

// pull reads what the kernel has to tell of a space now, if anything, and returns the addresses at
// which a page is missing.
func (p *Pager) pull(ctx context.Context, s *space, fd int, buf []byte) (missing []uint64, some bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	events, err := sys.UffdRead(fd, buf)
	for _, e := range events {
		missing = append(missing, p.hear(ctx, s, e)...)
	}
	return missing, len(events) > 0, err
}

// eventBuffer is how much is read of a userfaultfd at once, bytes.
const eventBuffer = 16 * 32

// hear takes note of an event, and returns the addresses at which a page is missing.
// Preconditions: the space's mu is held.
func (p *Pager) hear(ctx context.Context, s *space, e sys.UffdEvent) []uint64 {
	switch e.Kind {
	case sys.UffdFault:
		at := e.Addr &^ (arch.PageSize - 1)
		if _, ok := s.waits[at]; !ok {
			s.waits[at] = time.Now()
		}
		return []uint64{at}
	case sys.UffdFork:
		c, err := s.heir(os.NewFile(uintptr(e.FD), "userfaultfd"))
		if err != nil {
			p.fail(err)
			return nil
		}
		p.take(ctx, c)
	default:
		if err := s.note(e); err != nil && !gone(err) {
			p.fail(err)
		}
	}
	return nil
}

// serve gives somebody the page that he waits for, or asks for it.
func (p *Pager) serve(ctx context.Context, s *space, at uint64) {
	for {
		err, busy := p.try(ctx, s, at)
		switch {
		case busy:
			// The event that it waits for is read by whoever calls this, or by the listener.
			p.drain(ctx, s)
			continue
		case err != nil && !gone(err):
			p.fail(err)
		}
		return
	}
}

// drain reads events that wait, so that memory can be filled again.
func (p *Pager) drain(ctx context.Context, s *space) {
	var more []uint64
	err := s.do(func(fd int) (err error) {
		more, _, err = p.pull(ctx, s, fd, make([]byte, eventBuffer))
		return err
	})
	if err != nil && !gone(err) {
		p.fail(err)
	}
	for _, at := range more {
		go p.serve(ctx, s, at)
	}
	if len(more) == 0 {
		time.Sleep(20 * time.Microsecond) // the event is about to be told
	}
}

func (p *Pager) try(ctx context.Context, s *space, at uint64) (_ error, busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return nil, false
	}
	g, ok := s.find(at)
	if !ok || s.empty(g.from(at)) {
		err := s.put(at, nil, arch.PageSize)
		if errors.Is(err, errBusy) {
			return nil, true
		}
		if err == nil && ok {
			s.settle(g.from(at), g.from(at)+arch.PageSize)
		}
		p.waited(s, at)
		return err, false
	}
	start := g.from(at) &^ (window - 1)
	if s.asked[start] {
		return nil, false // what comes is looked at again
	}
	s.asked[start] = true
	p.mu.Lock()
	p.urgent++
	p.last = time.Now()
	p.mu.Unlock()
	p.wg.Go(func() { p.ask(ctx, s, start) })
	return nil, false
}

// ask brings what somebody waits for, and what is around it.
func (p *Pager) ask(ctx context.Context, s *space, start uint64) {
	runs, err := p.src.Pages(ctx, s.pid, start, start+window, true)
	p.mu.Lock()
	p.urgent--
	p.cond.Broadcast()
	p.mu.Unlock()
	if err == nil {
		err = p.arrive(ctx, s, start, start+window, runs)
	}
	if err != nil {
		if ctx.Err() == nil && !gone(err) {
			p.fail(err)
		}
		return
	}
	// Whoever waits for an empty page in it, or came meanwhile.
	s.mu.Lock()
	delete(s.asked, start)
	var left []uint64
	for at := range s.waits {
		if g, ok := s.find(at); !ok || g.from(at)&^(window-1) == start {
			left = append(left, at)
		}
	}
	s.mu.Unlock()
	for _, at := range left {
		p.serve(ctx, s, at)
	}
}

// arrive puts what came of [start, end) where it is missing.
func (p *Pager) arrive(ctx context.Context, s *space, start, end uint64, runs []Run) error {
	at := start
	for _, r := range runs {
		n := uint64(len(r.Data))
		if r.Addr < at || n == 0 || n%arch.PageSize != 0 || r.Addr%arch.PageSize != 0 || r.Addr+n > end {
			return fmt.Errorf("pages of pid %d came in disorder: %d bytes at %#x in %#x-%#x", s.pid, n, r.Addr, start, end)
		}
		if err := p.place(ctx, s, at, r.Addr, nil); err != nil {
			return err
		}
		for off := uint64(0); off < n; off += atOnce {
			to := min(n, off+atOnce)
			if err := p.place(ctx, s, r.Addr+off, r.Addr+to, r.Data[off:to]); err != nil {
				return err
			}
		}
		at = r.Addr + n
	}
	return p.place(ctx, s, at, end, nil)
}

// place settles pages, by their first addresses: with data it puts what is not settled.
func (p *Pager) place(ctx context.Context, s *space, start, end uint64, b []byte) error {
	for start < end {
		err := func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.over {
				return os.ErrClosed
			}
			if b == nil {
				s.settle(start, end)
				return nil
			}
			type part struct{ at, origin, n uint64 }
			var parts []part
			s.settled.Absent(start, end, func(a, b uint64) {
				s.places(a, b, func(at, origin, n uint64) { parts = append(parts, part{at, origin, n}) })
			})
			for _, x := range parts {
				if err := s.put(x.at, b[x.origin-start:x.origin-start+x.n], x.n); err != nil {
					return err
				}
				s.settle(x.origin, x.origin+x.n)
				for at := x.at; at < x.at+x.n && len(s.waits) > 0; at += arch.PageSize {
					p.waited(s, at)
				}
				p.mu.Lock()
				p.put += x.n
				p.mu.Unlock()
			}
			s.settle(start, end)
			return nil
		}()
		if errors.Is(err, errBusy) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			p.drain(ctx, s)
			continue
		}
		return err
	}
	return nil
}

// fill brings everything that a space misses.
func (p *Pager) fill(ctx context.Context, s *space) error {
	err := p.survey(ctx, s)
	if err == nil {
		err = p.bring(ctx, s)
	}
	if err != nil && !gone(err) {
		return err
	}
	if err != nil {
		p.log.Info("a process is gone before all of its memory had come", "pid", s.pid)
	} else {
		p.log.Debug("nothing is missing", "pid", s.pid)
	}
	s.end()
	return nil
}

// survey finds out what a space misses.
func (p *Pager) survey(ctx context.Context, s *space) error {
	s.mu.Lock()
	err := s.look(make([]sys.PageRegion, 2048))
	from, whole := s.mapped, s.whole
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("look at what pid %d has already: %w", s.pid, err)
	}
	for !whole {
		runs, next, err := p.src.Map(ctx, s.pid, from)
		if err != nil {
			return err
		}
		if next != 0 && next <= from {
			return fmt.Errorf("the map of pid %d goes on at %#x behind %#x", s.pid, next, from)
		}
		whole = next == 0
		from = next
		s.mu.Lock()
		s.know(runs, next, whole)
		s.mu.Unlock()
	}
	return nil
}

// bring asks for everything that is missing, a piece after the other.
func (p *Pager) bring(ctx context.Context, s *space) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	var err error
	for at := uint64(0); ; {
		start, end, ok := s.missing(at)
		if !ok || ctx.Err() != nil {
			break
		}
		at = end
		if err = p.calm(ctx); err != nil {
			break
		}
		wg.Go(func() {
			defer p.done()
			runs, err := p.src.Pages(ctx, s.pid, start, end, false)
			if err == nil {
				err = p.arrive(ctx, s, start, end, runs)
			}
			if err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// missing gives the next piece, from an address on, that has something missing.
func (s *space) missing(from uint64) (start, end uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.left == 0 {
		return 0, 0, false
	}
	for at := from; ; {
		a, b, more := s.there.Next(at)
		if !more || ok && a >= start+piece {
			return start, end, ok
		}
		at = b
		s.settled.Absent(a, b, func(a, b uint64) {
			switch {
			case !ok:
				start, end, ok = a, min(b, a+piece), true
			case a < start+piece:
				end = min(b, start+piece)
			}
		})
	}
}

// calm waits until another piece may be asked for, and counts it: not while somebody waits
// for a page, and one after the other shortly after.
func (p *Pager) calm(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ctx.Err() == nil && p.err == nil {
		most := ahead
		if time.Since(p.last) < shortly {
			most = 1
		}
		if p.urgent == 0 && p.bulk < most {
			p.bulk++
			return nil
		}
		p.cond.Wait()
	}
	if p.err != nil {
		return p.err
	}
	return ctx.Err()
}

// done says that a piece has come.
func (p *Pager) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bulk--
	p.cond.Broadcast()
}
