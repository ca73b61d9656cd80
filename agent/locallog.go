package agent

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
)

// localFlags are the options that dump and restore have in common, with CRIU's names.
type localFlags struct {
	imagesDir string
	workDir   string
	logFile   string
	verbosity int
}

func (f *localFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVarP(&f.imagesDir, "images-dir", "D", ".", "directory of the images; a dump makes it if it is missing")
	fs.StringVarP(&f.workDir, "work-dir", "W", "", "directory for the log and pid files (default: the images' directory)")
	fs.StringVarP(&f.logFile, "log-file", "o", "", "write the log to this file in place of stderr")
	// CRIU's default shows warnings and errors.
	fs.IntVar(&f.verbosity, "verbosity", 2, "1 errors, 2 warnings, 3 information, 4 debug, 5 everything; also -v, -vv … and -v4")
}

// inWorkDir is a path that is meant relative to the working directory, as CRIU does.
func (f *localFlags) inWorkDir(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	dir := f.workDir
	if dir == "" {
		dir = f.imagesDir
	}
	return filepath.Join(dir, path)
}

// checkDir says early and clearly that the images' directory is not there.
func (f *localFlags) checkDir() error {
	fi, err := os.Stat(f.imagesDir)
	if err != nil {
		return fmt.Errorf("use the images' directory: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("use the images' directory: %s is not a directory", f.imagesDir)
	}
	return nil
}

// logger opens the log; close it after use.
func (f *localFlags) logger(stderr io.Writer) (log hclog.Logger, closeLog func(), err error) {
	if f.verbosity < 0 {
		return nil, nil, fmt.Errorf("verbosity %d is negative", f.verbosity)
	}
	out, closeLog := stderr, func() {}
	if f.logFile != "" {
		file, err := os.OpenFile(f.inWorkDir(f.logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, nil, fmt.Errorf("open the log file: %w", err)
		}
		out, closeLog = file, func() { _ = file.Close() }
	}
	levels := []hclog.Level{hclog.Off, hclog.Error, hclog.Warn, hclog.Info, hclog.Debug, hclog.Trace}
	return hclog.New(&hclog.LoggerOptions{
		Name: "godwit-agent", Level: levels[min(f.verbosity, len(levels)-1)], Output: out,
	}), closeLog, nil
}

// needRoot refuses early what would fail on the first system call.
func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: it reads and builds processes of other users", what)
	}
	return nil
}
