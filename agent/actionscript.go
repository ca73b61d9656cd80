package agent

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/engine"
	"godwit/engine/procfs"
)

// Stages at which action scripts are called, in this order. Those about a network are
// for a tree with a network namespace of its own, those about namespaces for one
// with any.
const (
	stagePreDump       = "pre-dump"     // nothing was looked at yet
	stageNetworkLock   = "network-lock" // the tree is frozen
	stagePostDump      = "post-dump"    // the images are complete, the tree is frozen
	stagePreRestore    = "pre-restore"  // nothing was made yet
	stageSetup         = engine.StageSetup
	stagePostSetup     = engine.StagePostSetup
	stagePostRestore   = "post-restore"   // the tree stands, nothing of it has run
	stageNetworkUnlock = "network-unlock" // then, or when a dumped tree is about to run on
	stagePreResume     = "pre-resume"     // right after that
	stagePostResume    = "post-resume"    // the tree runs
)

// scriptGrace is how long output of a script that was told to end is waited for.
const scriptGrace = 2 * time.Second

// actionScripts are the shell commands of --action-script.
type actionScripts struct {
	list      []string
	imagesDir string
	out       io.Writer // of the scripts' stdout and stderr
	log       hclog.Logger
}

// run calls every script for a stage, until one fails. pid is the root of the
// tree, 0 while there is none.
func (s actionScripts) run(ctx context.Context, stage string, pid int) error {
	if len(s.list) == 0 {
		return nil
	}
	dir, err := filepath.Abs(s.imagesDir)
	if err != nil {
		return err
	}
	env := append(os.Environ(), "CRTOOLS_SCRIPT_ACTION="+stage, "CRTOOLS_IMAGE_DIR="+dir)
	if pid != 0 {
		env = append(env, "CRTOOLS_INIT_PID="+strconv.Itoa(pid))
	}
	for _, script := range s.list {
		start := time.Now()
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", script)
		cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = env, s.out, s.out, scriptGrace
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("action script %q failed at stage %s: %w", script, stage, err)
		}
		s.log.Debug("action script called", "stage", stage, "script", script, "duration_ms", time.Since(start).Milliseconds())
	}
	return nil
}

// network calls the scripts for a stage of a network if the tree of pid has one of
// its own.
func (s actionScripts) network(ctx context.Context, stage string, pid int) error {
	if len(s.list) == 0 {
		return nil
	}
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	its, err := os.Readlink(procfs.Path(pid, "ns", "net"))
	if procfs.Gone(err) {
		return nil // what comes next tells so
	}
	if err != nil || its == ours {
		return err
	}
	return s.run(ctx, stage, pid)
}
