package engine

import (
	"context"
	"fmt"

	"godwit/engine/dump"
	"godwit/engine/files"
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
	// Look reads how memory is laid out, for a freeze that follows within a moment and
	// need not read it then.
	Look() error
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

// EarlyCopy is what a sink has been given of files that travel with a running tree
// (DumpOptions.Carry), for a dump that then carries only the difference (DumpOptions.Early).
type EarlyCopy struct{ copy *files.EarlyCopy }

// NewEarlyCopy returns one of which the sink has been given nothing.
func NewEarlyCopy() *EarlyCopy { return &EarlyCopy{files.NewEarlyCopy()} }

// Files is of how many files the sink has been given something.
func (c *EarlyCopy) Files() int { return c.copy.Len() }

// Again gives the sink what was written to the files that the last look found (EarlyFiles),
// and says how many bytes that were. The tree runs meanwhile.
func (c *EarlyCopy) Again(ctx context.Context, sink image.EarlySink) (bytes uint64, err error) {
	return c.copy.Again(ctx, sink)
}

// EarlyFiles looks which files travel with the running tree below pid and gives the sink
// what it lacks of their content. It says how many bytes that were. After ErrNotLive the
// tree can be dumped all the same.
func (e *Engine) EarlyFiles(ctx context.Context, pid int, o DumpOptions, c *EarlyCopy, sink image.EarlySink) (bytes uint64, err error) {
	if err := e.source(pid); err != nil {
		return 0, err
	}
	d, err := o.internal()
	if err != nil {
		return 0, err
	}
	return dump.EarlyFiles(ctx, e.log, pid, d, c.copy, sink)
}
