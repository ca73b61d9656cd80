package dump

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/engine/files"
	"godwit/engine/image"
)

// EarlyFiles gives the sink the content of the files that travel with the running tree
// below pid, as far as the other side does not have it, and notes in to what it has.
// What of the tree cannot be looked at now is an error that is ErrNotLive.
func EarlyFiles(ctx context.Context, log hclog.Logger, pid int, o Options, to *files.EarlyCopy, sink image.EarlySink) (bytes uint64, err error) {
	var since time.Time
	var list []files.CarriedFile
	err = patiently(ctx, pid, func() (err error) {
		since = time.Now()
		list, err = earlyFiles(ctx, log, pid, o)
		return err
	})
	switch {
	case err == nil:
		return to.Look(ctx, list, since, sink)
	case ctx.Err() != nil:
		return 0, ctx.Err()
	}
	return 0, fmt.Errorf("%w: %w", ErrNotLive, err)
}

func earlyFiles(ctx context.Context, log hclog.Logger, pid int, o Options) (_ []files.CarriedFile, err error) {
	c, err := look(ctx, log, pid, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	return c.files.EarlyFiles(), nil
}
