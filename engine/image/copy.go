package image

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// Copy gives all of src to dst: facts, entries, the seal, data. It is how a
// dump in a directory is streamed, and a stream is kept in a directory. Neither
// end is committed or closed.
func Copy(ctx context.Context, dst Sink, src Source) error {
	set, err := src.Images(ctx)
	if err != nil {
		return err
	}
	if set.Facts != nil {
		if err := dst.Facts(set.Facts); err != nil {
			return err
		}
	}
	for _, name := range set.Files() {
		for _, e := range set.Entries(name) {
			if err := dst.Entry(e); err != nil {
				return fmt.Errorf("copy image %s: %w", name, err)
			}
		}
	}
	if err := dst.Sealed(); err != nil {
		return err
	}
	for {
		id, off, p, err := src.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := dst.Data(id, off, p); err != nil {
			return fmt.Errorf("copy data of %s: %w", id, err)
		}
	}
}
