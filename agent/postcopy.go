package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"

	"godwit/engine"
	"godwit/transport"
	"godwit/wire"
)

// Post-copy: the tree runs at the destination while memory of it is still in the frozen
// copy at the source, which answers requests for it until the record says Completed.
//
//	tree ─ misses a page ─ userfaultfd │ pager ═ requests over the bus ═ source session ─ frozen copy
//
// The pager (pager.go) is a process of its own: what a process misses must never be
// filled by the kernel, with zeros, because an agent has ended.

// wantsPaging says whether memory may come when the tree runs already.
func wantsPaging(o *wire.MigrateOptions) bool {
	switch o.GetCopyMode() {
	case wire.CopyMode_COPY_MODE_POSTCOPY, wire.CopyMode_COPY_MODE_HYBRID:
		return true
	case wire.CopyMode_COPY_MODE_STOP:
		return false
	}
	return o.GetNoConverge() == wire.NoConverge_NO_CONVERGE_POSTCOPY
}

// pageConns makes the connections for pages, which must not wait for each other nor for
// anything else.
func (s *Streams) pageConns(ctx context.Context, id string) (conns [2]*nats.Conn, err error) {
	for i, lane := range []string{"urgent", "bulk"} {
		cfg := s.Bus
		cfg.Name = fmt.Sprintf("%s pages %s %s", s.Bus.Name, id, lane)
		if conns[i], err = transport.ConnectWait(ctx, cfg); err != nil {
			closeConns(conns)
			return conns, err
		}
	}
	return conns, nil
}

func closeConns(conns [2]*nats.Conn) {
	for _, nc := range conns {
		if nc != nil {
			nc.Close()
		}
	}
}

// served are pages of a frozen tree that can be asked for.
type served struct {
	pages *engine.Pages
	serve *transport.Pages
	conns [2]*nats.Conn
}

// readyPages makes the connections over which memory is to be served, for which no frozen
// tree should have to wait.
func (s *source) readyPages(ctx context.Context) error {
	conns, err := s.a.cfg.Streams.pageConns(ctx, s.id)
	if err == nil {
		s.served = &served{conns: conns}
	}
	return err
}

// servePages lets the destination ask for memory of processes, by their pids in the images.
// Preconditions: readyPages.
func (s *source) servePages(late map[uint32]engine.Late) (err error) {
	v := s.served
	v.pages = engine.NewPages(late)
	v.serve, err = transport.ServePages(v.conns, s.id, v.answer)
	return err
}

// close ends the serving; nil: there is none.
func (v *served) close() error {
	if v == nil {
		return nil
	}
	if v.serve != nil {
		v.serve.Close()
	}
	closeConns(v.conns)
	if v.pages == nil {
		return nil
	}
	return v.pages.Close()
}

// rangeRoom is how much a range takes in an answer, bytes, at most.
const rangeRoom = 24

func (v *served) answer(ctx context.Context, req *wire.PagesRequest, room int) (*wire.PagesReply, error) {
	reply := &wire.PagesReply{}
	if req.Map {
		runs, next, err := v.pages.Map(ctx, req.Pid, req.Start, min(room/rangeRoom, 1<<15))
		for _, r := range runs {
			reply.Ranges = append(reply.Ranges, &wire.PageRange{Start: r.Start, End: r.End})
		}
		reply.Next = next
		return reply, pagesError(err)
	}
	end := req.End
	// What a page takes, with a range for each.
	const perPage = 4096 + rangeRoom
	if fits := req.Start + uint64(max(room/perPage, 1))*4096; end > fits {
		end, reply.Next = fits, fits
	}
	data, runs, err := v.pages.Read(ctx, req.Pid, req.Start, end, make([]byte, 0, end-min(req.Start, end)))
	if err != nil {
		return nil, pagesError(err)
	}
	for _, r := range runs {
		reply.Ranges = append(reply.Ranges, &wire.PageRange{Start: r.Start, End: r.End})
	}
	reply.Data = data
	return reply, nil
}

func pagesError(err error) error {
	if errors.Is(err, engine.ErrNoPages) {
		return wire.Errorf(wire.Code_CODE_NOT_FOUND, "%w", err)
	}
	return err
}
