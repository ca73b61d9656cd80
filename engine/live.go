package engine

import (
	"context"
	"fmt"

	"godwit/engine/dump"
	"godwit/engine/freeze"
	"godwit/engine/image"
)

// ErrNotLive says that nothing of a tree can be copied while it runs; it can be
// dumped all the same.
var ErrNotLive = dump.ErrNotLive

// Live copies memory of a running tree to a sink, for a dump that then carries only the
// difference (StartLive, DumpOptions.Live).
type Live interface {
	// Round gives the sink what was written since the last round, the first time all
	// there is, and says how many bytes that were. The tree runs meanwhile.
	Round(ctx context.Context, sink image.Sink) (bytes uint64, err error)
	// Pending is how many bytes a round would give now.
	Pending() (bytes uint64, err error)
	// Close ends the copy. It may be called again. The tree, if it is still there, runs
	// on with nothing left of it.
	Close() error
}

// StartLive begins such a copy. The tree is frozen for some milliseconds. If it fails the
// tree runs as before; with ErrNotLive the sink has been given nothing.
func (e *Engine) StartLive(ctx context.Context, pid int, o DumpOptions, sink image.EarlySink) (Live, error) {
	if err := e.source(pid); err != nil {
		return nil, err
	}
	d, err := o.internal()
	if err != nil {
		return nil, err
	}
	l, err := dump.StartLive(ctx, e.log, pid, d, func() (*freeze.Tree, error) { return freeze.FreezeIn(ctx, pid, o.freezeTimeout(), o.FreezeGroup) }, sink)
	if err != nil {
		return nil, err
	}
	return &live{l}, nil
}

// live is a Live.
type live struct{ *dump.Live }

// internalLive is what a dump needs of the one that it continues.
func (o *DumpOptions) internalLive() (*dump.Live, error) {
	if o.Live == nil {
		return nil, nil
	}
	l, ok := o.Live.(*live)
	if !ok {
		return nil, fmt.Errorf("a %T is no copy that this engine began", o.Live)
	}
	return l.Live, nil
}
