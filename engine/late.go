package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/hashicorp/go-hclog"

	"godwit/engine/arch"
	"godwit/engine/dump"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/paging"
	"godwit/engine/sys"
)

// Late is a process whose memory is still where it was frozen, Space where it is
// yet to come, and Pager fills such spaces.
type (
	Late       = dump.Late
	Space      = paging.Space
	Pager      = paging.Pager
	PagerStats = paging.Stats
	PageRun    = paging.Run
	PageSource = paging.Source
)

// NewPager makes a pager that takes pages from src.
func NewPager(log hclog.Logger, src PageSource) *Pager { return paging.New(log, src) }

// CanPage says why memory cannot come later on this host; nil: it can.
func CanPage() error {
	if err := sys.UffdServeProbe(); err != nil {
		return fmt.Errorf("the kernel does not let this agent serve missing memory (userfaultfd): %w", err)
	}
	return nil
}

// Pages gives the memory of a tree that stays frozen while it runs elsewhere already.
// Its methods may be called from any goroutine.
type Pages struct{ procs map[uint32]*pages }

// pages are those of one process.
type pages struct {
	mu     sync.Mutex
	who    Late
	reader *mem.Reader // nil: not opened yet
}

// ErrNoPages says that memory is asked for that is not, or no more, there.
var ErrNoPages = errors.New("that memory is not there")

// NewPages gives the memory of processes, by their pids in the images.
func NewPages(who map[uint32]Late) *Pages {
	p := &Pages{procs: map[uint32]*pages{}}
	for pid, h := range who {
		p.procs[pid] = &pages{who: h}
	}
	return p
}

// Close ends it.
func (p *Pages) Close() (err error) {
	for _, x := range p.procs {
		x.mu.Lock()
		if x.reader != nil {
			err = errors.Join(err, x.reader.Close())
			x.reader = nil
		}
		x.who = Late{}
		x.mu.Unlock()
	}
	return err
}

// with calls fn with the memory of a process.
func (p *Pages) with(pid uint32, fn func(r *mem.Reader, ranges []image.Range) error) error {
	x := p.procs[pid]
	if x == nil {
		return fmt.Errorf("pid %d: %w", pid, ErrNoPages)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.who.Lives() {
		return fmt.Errorf("pid %d has ended: %w", pid, ErrNoPages)
	}
	if x.reader == nil {
		var err error
		if x.reader, err = mem.NewReader(x.who.Pid); err != nil {
			return err
		}
	}
	if x.who.Ranges == nil {
		if err := x.look(); err != nil {
			return err
		}
	}
	err := fn(x.reader, x.who.Ranges)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("pid %d: %w: %w", pid, ErrNoPages, err)
	}
	return err
}

// look finds out what memory can be asked for.
func (x *pages) look() error {
	vmas, _, err := mem.Read(x.who.Pid, nil)
	if err != nil {
		return err
	}
	x.who.Ranges = []image.Range{}
	for _, v := range vmas {
		if v.Late() {
			x.who.Ranges = append(x.who.Ranges, image.Range{Start: v.Start, End: v.End})
		}
	}
	return nil
}

// Map tells where, from an address on, a process has memory of its own: up to n runs, and
// where to go on; 0: that is all.
func (p *Pages) Map(_ context.Context, pid uint32, from uint64, n int) (runs []image.Range, next uint64, err error) {
	err = p.with(pid, func(r *mem.Reader, ranges []image.Range) error {
		runs, next, err = r.Map(ranges, from, n)
		return err
	})
	return runs, next, err
}

// Most is how much is given at once, bytes.
const Most = 512 << 10

// Read appends the pages of [start, end) that hold something to b, and returns where they are.
func (p *Pages) Read(ctx context.Context, pid uint32, start, end uint64, b []byte) (_ []byte, runs []image.Range, err error) {
	if start >= end || start%arch.PageSize != 0 || end%arch.PageSize != 0 || end-start > Most || end > arch.TaskSize {
		return b, nil, fmt.Errorf("pages %#x-%#x cannot be asked for", start, end)
	}
	err = p.with(pid, func(r *mem.Reader, ranges []image.Range) error {
		b, runs, err = r.Take(ranges, start, end, b)
		return err
	})
	return b, slices.Clip(runs), err
}
