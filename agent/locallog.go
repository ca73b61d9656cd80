package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"godwit/engine"
)

// localFlags are the options that dump and restore have in common, with CRIU's names.
type localFlags struct {
	cmd       *cobra.Command // nil outside of the program
	log       hclog.Logger   // set by logger
	imagesDir string
	workDir   string
	logFile   string
	verbosity int
	scripts   []string
	stats     bool
	shellJob  bool
	fiemap    bool
	config    configFlags

	logPid       bool
	closeFDs     []int
	unprivileged bool
}

func (f *localFlags) add(cmd *cobra.Command) {
	f.cmd = cmd
	fs := cmd.Flags()
	fs.StringVarP(&f.imagesDir, "images-dir", "D", ".", "directory of the images; a dump makes it if it is missing")
	fs.StringVarP(&f.workDir, "work-dir", "W", "", "directory for the log, pid and statistics files (default: the images' directory)")
	fs.StringVarP(&f.logFile, "log-file", "o", "", "write the log to this file in place of stderr")
	// CRIU's default shows warnings and errors.
	fs.IntVar(&f.verbosity, "verbosity", 2, "1 errors, 2 warnings, 3 information, 4 debug, 5 everything; -v4 is 4, each v without a number one more than 2")
	fs.StringArrayVar(&f.scripts, "action-script", nil, "shell command to call at each stage, with CRTOOLS_SCRIPT_ACTION, CRTOOLS_IMAGE_DIR and CRTOOLS_INIT_PID set; may be repeated")
	fs.BoolVar(&f.stats, "display-stats", false, "print statistics at the end; they are in stats-dump or stats-restore anyway")
	// What follows asks for what is done in any case.
	fs.BoolVarP(&f.shellJob, "shell-job", "j", false, "a tree on a terminal that is not part of it, as a job of a shell: restored, it is in the session of the command, on its standard input")
	fs.BoolVar(&f.logPid, "log-pid", false, "write what concerns one process also to a file of its own, the name of the log file with .PID behind it")
	fs.IntSliceVar(&f.closeFDs, "close", nil, "close this open descriptor before anything else; may be repeated")
	foreignFlags(fs, "libdir,L")
	fs.BoolVar(&f.unprivileged, "unprivileged", false, "work without being root, as far as the rights of the caller go: own processes, with CAP_CHECKPOINT_RESTORE")
	if cmd.Name() != "restore" {
		fs.BoolVar(&f.fiemap, "ghost-fiemap", false, "accepted: holes of deleted files are found without reading them anyway")
	}
	f.config.add(cmd)
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
		if f.workDir == "" && f.cmd != nil && f.cmd.Name() != "restore" {
			// As the dump itself would, a moment later.
			if err := os.Mkdir(f.imagesDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				return nil, nil, fmt.Errorf("make the images' directory for the log file: %w", err)
			}
		}
		file, err := os.OpenFile(f.inWorkDir(f.logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, nil, fmt.Errorf("open the log file: %w", err)
		}
		out, closeLog = file, func() { _ = file.Close() }
	}
	levels := []hclog.Level{hclog.Off, hclog.Error, hclog.Warn, hclog.Info, hclog.Debug, hclog.Trace}
	opts := &hclog.LoggerOptions{Name: "godwit-agent", Level: levels[min(f.verbosity, len(levels)-1)], Output: out}
	f.log = hclog.New(opts)
	if f.logPid {
		if f.logFile == "" {
			closeLog()
			return nil, nil, errors.New("--log-pid needs a log file, by whose name those of the processes are called (--log-file)")
		}
		opts.Output = out
		log := hclog.NewInterceptLogger(opts)
		log.RegisterSink(pidLogs{base: f.inWorkDir(f.logFile), level: opts.Level})
		f.log = log
	}
	if f.cmd != nil {
		f.log.Info("begin", "command", f.cmd.Name(), "version", Version, "pid", os.Getpid(), "images_dir", f.imagesDir)
	}
	return f.log, closeLog, nil
}

// pidLogs writes messages with a pid to the log of that process.
type pidLogs struct {
	base  string
	level hclog.Level
}

// Accept is hclog's: args are keys and values.
func (p pidLogs) Accept(name string, level hclog.Level, msg string, args ...any) {
	for i := 0; i+1 < len(args); i += 2 {
		if pid, ok := args[i+1].(int); ok && args[i] == "pid" && msg != "begin" {
			out := appendFile(fmt.Sprintf("%s.%d", p.base, pid))
			hclog.New(&hclog.LoggerOptions{Name: name, Level: p.level, Output: out}).Log(level, msg, args...)
			return
		}
	}
}

// appendFile is a file that is open only while something is written to it: there
// may be as many as processes.
type appendFile string

func (a appendFile) Write(b []byte) (int, error) {
	f, err := os.OpenFile(string(a), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := f.Write(b)
	return n, errors.Join(err, f.Close())
}

// logged puts the error of a command into its log file as well, if there is one.
func (f *localFlags) logged(err error) error {
	if err != nil && f.logFile != "" {
		f.log.Error("failed", "error", err)
	}
	return err
}

// logPlan notes what a tree holds.
func logPlan(log hclog.Logger, p *engine.Plan) {
	for _, t := range p.Tasks {
		log.Debug("process planned", "pid", t.Pid, "parent", t.PPid, "comm", t.Comm, "threads", len(t.VTids), "rss_bytes", t.RSS)
	}
	for _, x := range p.External {
		log.Debug("external file planned", "key", x.Key, "kind", x.Kind, "path", x.Path)
	}
	log.Info("the tree can be carried", "pid", p.Pid, "processes", len(p.Tasks), "open_files", p.OpenFiles, "memory_bytes", p.MemoryBytes)
}

// actions are the action scripts.
func (f *localFlags) actions() actionScripts {
	a := actionScripts{list: f.scripts, imagesDir: f.imagesDir, out: io.Discard, log: f.log}
	if f.cmd != nil {
		a.out = f.cmd.ErrOrStderr()
	}
	if a.log == nil {
		a.log = hclog.NewNullLogger()
	}
	return a
}

// putStats writes a file of statistics into the work directory, and prints them if
// that was asked for. What was done stands without them: an error is only logged.
func (f *localFlags) putStats(name string, e *stats.StatsEntry) {
	err := writeStats(f.inWorkDir(name), e)
	if f.stats && f.cmd != nil {
		err = errors.Join(err, displayStats(f.cmd.OutOrStdout(), e))
	}
	if err != nil && f.log != nil {
		f.log.Warn("the statistics are lost", "file", f.inWorkDir(name), "error", err)
	}
}

// needRoot refuses early what would fail on the first system call.
func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: it reads and builds processes of other users", what)
	}
	return nil
}

// needRights is needRoot for a caller who may be content with less.
func (f *localFlags) needRights(what string) error {
	if !f.unprivileged || os.Geteuid() == 0 {
		if err := needRoot(what); err != nil {
			return fmt.Errorf("%w; --unprivileged does with CAP_CHECKPOINT_RESTORE what that allows", err)
		}
		return nil
	}
	has, err := effective(unix.CAP_CHECKPOINT_RESTORE)
	if err == nil && !has {
		err = errors.New("it needs CAP_CHECKPOINT_RESTORE, which this command does not have (setcap cap_checkpoint_restore=ep on the program gives it)")
	}
	if err != nil {
		return fmt.Errorf("%s --unprivileged: %w", what, err)
	}
	return nil
}

// closeHanded closes descriptors that this command was started with.
func (f *localFlags) closeHanded() error {
	for _, fd := range f.closeFDs {
		if err := handedIn(fd); err != nil {
			return fmt.Errorf("--close: %w", err)
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("--close %d: %w", fd, err)
		}
	}
	return nil
}

// needOwner refuses a process of somebody else, which a caller who is not root cannot trace.
func (f *localFlags) needOwner(pid int) error {
	if !f.unprivileged || os.Geteuid() == 0 {
		return nil
	}
	may, err := effective(unix.CAP_SYS_PTRACE)
	if may || err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		return fmt.Errorf("no process has pid %d: %w", pid, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("--unprivileged: pid %d is not to be traced by user %d (its files in /proc are user %d's), which takes CAP_SYS_PTRACE; this command does not have that", pid, os.Geteuid(), st.Uid)
	}
	return nil
}

// effective says whether this program has a capability.
func effective(capability int) (bool, error) {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return false, os.NewSyscallError("capget", err)
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0, nil
}
