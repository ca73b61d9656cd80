package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"godwit/engine"
	"godwit/engine/image"
)

// incremental are the options by which dumps build on each other.
type incremental struct {
	prevImagesDir string
	trackMem      bool
	autoDedup     bool
	preDumpMode   string
}

// Ways of reading of a pre-dump, as the inventory names them.
var preDumpModes = map[string]uint32{"splice": 1, "read": 2}

func (i *incremental) addOptions(fs *pflag.FlagSet) {
	fs.StringVar(&i.prevImagesDir, "prev-images-dir", "", "directory of the images of the dump before, relative to --images-dir and beside or below it: pages that it has are not written again")
	fs.BoolVar(&i.autoDedup, "auto-dedup", false, "give up pages in the dumps before that this one has anew; they can only be built on afterwards")
	fs.BoolVar(&i.trackMem, "track-mem", false, "accepted: a later dump compares pages, which needs no tracking")
	fs.StringVar(&i.preDumpMode, "pre-dump-mode", "splice", "splice or read: accepted, memory is read while the tree runs either way")
}

// build makes a dump build on the one before, if there is one.
func (i *incremental) build(sink *image.DirSink) error {
	switch {
	case i.preDumpMode != "" && preDumpModes[i.preDumpMode] == 0:
		return fmt.Errorf("--pre-dump-mode: %q is neither splice nor read", i.preDumpMode)
	case i.prevImagesDir != "":
		if err := sink.Build(i.prevImagesDir, i.autoDedup); err != nil {
			return fmt.Errorf("--prev-images-dir: %w", err)
		}
	}
	return nil
}

// finish does what comes after a complete dump.
func (i *incremental) finish(sink *image.DirSink, log hclog.Logger) {
	if !i.autoDedup || i.prevImagesDir == "" {
		return
	}
	if err := sink.Dedup(); err != nil {
		log.Warn("the dumps before keep pages that this one has anew", "error", err)
	}
}

func cmdPreDump() *cobra.Command {
	var f dumpFlags
	cmd := &cobra.Command{
		Use:   "pre-dump -t PID -D DIR",
		Short: "Write the memory of a running process tree into a directory, for a dump to build on",
		Long: `Writes the memory of the tree of PID, which runs on meanwhile, into DIR. A later
pre-dump or dump with --prev-images-dir writes only pages that differ, and its
restore takes the others from DIR, which must not be removed before.

Exit codes: 0 done; 1 failed or refused, DIR holds no images. The tree is not stopped.`,
		Example: `  godwit-agent pre-dump -t 4711 -D /var/tmp/img/1
  godwit-agent dump -t 4711 -D /var/tmp/img/2 --prev-images-dir ../1`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd, func(log hclog.Logger) error { return runPreDump(cmd.Context(), engine.New(log), f, log) })
		},
	}
	f.addDump(cmd)
	return cmd
}

// runPreDump writes the memory of the tree of f.tree into f.imagesDir. On an error
// the directory holds none of it.
func runPreDump(ctx context.Context, eng *engine.Engine, f dumpFlags, log hclog.Logger) (err error) {
	f.leaveRunning = true
	opts, err := f.options()
	if err != nil {
		return err
	}
	if err := errors.Join(f.status.check(), f.needOwner(f.tree)); err != nil {
		return err
	}
	if err := f.actions().run(ctx, stagePreDump, 0); err != nil {
		return fmt.Errorf("pre-dump pid %d: %w", f.tree, err)
	}
	if opts, err = selectKeys(ctx, eng, f.tree, opts, log); err != nil {
		return err
	}
	p, err := eng.Plan(ctx, f.tree, opts)
	if err != nil {
		return err
	}
	logPlan(log, p)
	sink, err := image.NewDirSink(f.imagesDir)
	if err != nil {
		return fmt.Errorf("pre-dump pid %d: %w", f.tree, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("pre-dump pid %d: %w", f.tree, errors.Join(err, sink.Withdraw()))
		}
	}()
	sink.PreDump()
	if err := f.build(sink); err != nil {
		return err
	}
	stats, err := eng.PreDump(ctx, f.tree, opts, preDumpModes[f.preDumpMode], sink)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := sink.Commit(); err != nil {
		return err
	}
	f.finish(sink, log)
	f.written(log)
	f.putStats(statsDumpFile, dumpStats(stats, sink, 0, time.Since(begin)))
	memory, shmem := sink.Skipped()
	log.Info("pre-dumped", "pid", f.tree, "dir", f.imagesDir, "processes", stats.Processes, "pages", stats.Pages, "pages_in_parent", memory+shmem)
	return nil
}
