package dump

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/engine/files"
	"godwit/engine/image"
	"godwit/engine/procfs"
)

// EarlyFiles gives the sink the content of the files that travel with the running tree
// below pid, as far as the other side does not have it, and notes in to what it has.
// What of the tree cannot be looked at now is an error that is ErrNotLive.
func EarlyFiles(ctx context.Context, log hclog.Logger, pid int, o Options, to *files.EarlyCopy, sink image.EarlySink) (bytes uint64, err error) {
	for until := time.Now().Add(quietWait); ; time.Sleep(2 * time.Millisecond) {
		since := time.Now()
		list, err := earlyFiles(ctx, log, pid, o)
		passing := procfs.Gone(err) && !ended(pid) || errors.Is(err, fs.ErrPermission)
		switch {
		case err == nil:
			return to.Look(ctx, list, since, sink)
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case !passing || time.Now().After(until):
			return 0, fmt.Errorf("%w: %w", ErrNotLive, err)
		}
	}
}

func earlyFiles(ctx context.Context, log hclog.Logger, pid int, o Options) (_ []files.CarriedFile, err error) {
	c, err := look(ctx, log, pid, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	return c.files.EarlyFiles(), nil
}
