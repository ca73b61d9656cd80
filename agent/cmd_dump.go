package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"godwit/engine"
	"godwit/engine/image"
)

type dumpFlags struct {
	localFlags
	tcpEstablished bool
	tcpClose       bool
	skipInFlight   bool
	networkLock    string
	tree           int
	leaveRunning   bool
	leaveStopped   bool
	external       []string
	namespaces     dumpNamespaces
	ghostLimit     string
	timeout        int
	fileLocks      bool
	files          fileFlags
	incremental
	extUnixSk   bool
	status      statusFlags
	freezeGroup string
}

func cmdDump() *cobra.Command {
	var f dumpFlags
	cmd := &cobra.Command{
		Use:   "dump -t PID -D DIR",
		Short: "Write the images of a running process tree into a directory",
		Long: `Freezes the tree of PID and writes its images, in CRIU's format, into DIR. After
a dump that succeeded the tree is killed, unless --leave-running or
--leave-stopped is given; after one that failed it runs on and the images are removed.

Exit codes: 0 done; 1 failed or refused, the tree runs on.`,
		Example: `  godwit-agent dump -t 4711 -D /var/tmp/img --external 'file[72:a3e7]'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd, func(log hclog.Logger) error { return runDump(cmd.Context(), engine.New(log), f, log) })
		},
	}
	f.addDump(cmd)
	return cmd
}

// addDump adds the options of dump and pre-dump.
func (f *dumpFlags) addDump(cmd *cobra.Command) {
	f.add(cmd)
	fs := cmd.Flags()
	f.addOptions(fs)
	fs.IntVarP(&f.tree, "tree", "t", 0, "pid of the tree's root")
	fs.BoolVarP(&f.leaveRunning, "leave-running", "R", false, "let the tree run on after the dump")
	fs.BoolVarP(&f.leaveStopped, "leave-stopped", "s", false, "leave the tree stopped (SIGSTOP) after the dump")
	fs.StringArrayVar(&f.external, "external", nil, "what whoever restores provides: file[mnt_id:inode] or tty[rdev:dev], hexadecimal, unix[inode] of a socket whose peer is outside, what fd:PID:N, role:stdin, path:GLOB or kind:KIND names, mnt[MOUNTPOINT]:NAME or net[INODE]:NAME; may be repeated")
	f.namespaces.add(fs)
	fs.StringVar(&f.ghostLimit, "ghost-limit", "", "largest size of a deleted file that is carried, with K, M or G (default 1G)")
	fs.IntVar(&f.timeout, "timeout", 0, "seconds within which all tasks have to stop (default 10)")
	fs.BoolVarP(&f.fileLocks, "file-locks", "l", false, "carry file locks and leases")
	fs.BoolVarP(&f.extUnixSk, "ext-unix-sk", "x", false, "carry datagram unix sockets that are connected to a named one outside the tree")
	fs.BoolVar(&f.tcpEstablished, "tcp-established", false, "carry TCP connections; the network is locked for those that lead out of the tree, from the dump to the restore")
	fs.BoolVar(&f.tcpClose, "tcp-close", false, "let TCP connections come back closed; restore so, too")
	fs.BoolVar(&f.skipInFlight, "skip-in-flight", false, "leave connections behind that wait to be accepted, of unix sockets those from outside the tree")
	fs.StringVar(&f.networkLock, "network-lock", "nftables", "how the network is locked: nftables, which iptables is another name of here, or skip if it is locked by other means")
	fs.StringVar(&f.freezeGroup, "freeze-cgroup", "", "directory of a control group, of version 1 or 2, that all of the tree is in: it is frozen while the tasks are stopped, and left as it was found")
	f.files.add(fs, true)
	f.status.add(fs)
	foreignFlags(fs,
		"address",
		"allow-uprobes",
		"cpu-cap",
		"deprecated",
		"enable-external-masters",
		"enable-external-sharing",
		"enable-fs",
		"lazy-pages",
		"page-server",
		"port",
		"ps-socket",
		"stream",
		"tls",
	)
}

// localMemory bounds the Go memory of the local commands, bytes; each open file
// description of a tree comes on top.
const (
	localMemory       = 96 << 20
	descriptionMemory = 2 << 10
)

// run is the frame of the commands that work without a bus: they need root, keep
// a log, bound their memory and exit as CRIU does.
func (f *localFlags) run(cmd *cobra.Command, do func(hclog.Logger) error) error {
	if err := f.needRights(cmd.Name()); err != nil {
		return localError(err)
	}
	if err := f.closeHanded(); err != nil {
		return localError(err)
	}
	log, closeLog, err := f.logger(cmd.ErrOrStderr())
	if err != nil {
		return localError(err)
	}
	defer closeLog()
	boundMemory(localMemory)
	return localError(f.logged(do(log)))
}

// localError gives the errors of dump and restore CRIU's exit code, whatever
// they are.
func localError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*exitError](err); ok {
		return err
	}
	return &exitError{code: 1, err: err}
}

// options are what the options say to the engine.
func (f *dumpFlags) options() (engine.DumpOptions, error) {
	if f.tree <= 0 {
		return engine.DumpOptions{}, errors.New("no tree is named: give the pid of its root with --tree")
	}
	limit, err := parseSize(f.ghostLimit)
	if err != nil {
		return engine.DumpOptions{}, fmt.Errorf("--ghost-limit: %w", err)
	}
	if f.timeout < 0 {
		return engine.DumpOptions{}, fmt.Errorf("--timeout: %d seconds are negative", f.timeout)
	}
	lock, err := parseNetworkLock(f.networkLock)
	if err != nil {
		return engine.DumpOptions{}, err
	}
	if f.leaveRunning || f.leaveStopped {
		lock = engine.LockSkip // its connections go on
	}
	opts := engine.DumpOptions{TCPEstablished: f.tcpEstablished, TCPClose: f.tcpClose, SkipInFlight: f.skipInFlight, NetworkLock: lock, External: f.external, GhostLimit: limit, FileLocks: f.fileLocks, Timeout: time.Duration(f.timeout) * time.Second}
	opts.ShellJob = f.shellJob
	opts.FreezeGroup = f.freezeGroup
	opts.ExtUnixSk = f.extUnixSk
	if err := f.namespaces.set(&opts); err != nil {
		return opts, err
	}
	opts.Files, err = f.files.dump(f.leaveRunning || f.leaveStopped)
	return opts, err
}

// runDump dumps the tree of f.tree into f.imagesDir. On an error the tree runs
// as before and the directory holds none of its images.
func runDump(ctx context.Context, eng Engine, f dumpFlags, log hclog.Logger) (err error) {
	opts, err := f.options()
	if err != nil {
		return err
	}
	if err := errors.Join(f.status.check(), f.needOwner(f.tree)); err != nil {
		return err
	}
	opts.Ends = !f.leaveRunning && !f.leaveStopped
	if err := f.actions().run(ctx, stagePreDump, 0); err != nil {
		return fmt.Errorf("dump pid %d, nothing of it was touched: %w", f.tree, err)
	}
	if opts, err = selectKeys(ctx, eng, f.tree, opts, log); err != nil {
		return err
	}
	p, err := eng.Plan(ctx, f.tree, opts)
	if err != nil {
		return err
	}
	logPlan(log, p)
	boundMemory(localMemory + int64(p.OpenFiles)*descriptionMemory)
	sink, err := image.NewDirSink(f.imagesDir)
	if err != nil {
		return fmt.Errorf("dump pid %d: %w", f.tree, err)
	}
	if err := f.build(sink); err != nil {
		return fmt.Errorf("dump pid %d, nothing of it was touched: %w", f.tree, errors.Join(err, sink.Withdraw()))
	}
	complete := false
	defer func() {
		if !complete {
			if aerr := sink.Withdraw(); aerr != nil {
				err = fmt.Errorf("%w (and its images could not be removed: %w)", err, aerr)
			}
		}
	}()
	tree, err := eng.Freeze(ctx, f.tree, opts)
	if err != nil {
		return err
	}
	var stats engine.DumpStats
	if err = f.actions().network(ctx, stageNetworkLock, f.tree); err == nil {
		stats, err = tree.Dump(ctx, sink)
	}
	var commit, frozen time.Duration
	defer func() {
		if err == nil {
			if frozen == 0 {
				frozen = time.Since(stats.FrozenAt)
			}
			f.putStats(statsDumpFile, dumpStats(stats, sink, frozen, commit))
		}
	}()
	var thawErr error
	early := f.leaveRunning && len(f.scripts) == 0
	if early && err == nil {
		// Everything has been read: the tree need not wait for the disk.
		thawErr = tree.Thaw()
		frozen = time.Since(stats.FrozenAt)
	}
	if err == nil {
		begin := time.Now()
		err = sink.Commit()
		commit = time.Since(begin)
	}
	if err == nil {
		err = f.actions().run(ctx, stagePostDump, f.tree)
	}
	if err != nil {
		err = fmt.Errorf("dump pid %d, which runs on: %w", f.tree, err)
		f.unlockNetwork(ctx, log)
		if terr := tree.Thaw(); terr != nil {
			err = fmt.Errorf("dump pid %d: %w; and the tree could not be let go, look at it: %w", f.tree, err, terr)
		}
		return err
	}
	log.Info("dumped", "pid", f.tree, "dir", f.imagesDir, "processes", stats.Processes, "threads", stats.Threads,
		"pages", stats.Pages, "bytes", stats.Bytes, "freeze_ms", stats.FreezeDur.Milliseconds(), "dump_ms", stats.DumpDur.Milliseconds())
	if f.leaveRunning || f.leaveStopped {
		f.unlockNetwork(ctx, log)
	}
	if f.leaveRunning && !early {
		thawErr = tree.Thaw()
	}
	complete = true // what fails from here on must not remove the images
	f.written(log)
	f.finish(sink, log)
	if f.leaveStopped && !f.leaveRunning {
		thawErr = tree.ThawStopped()
	}
	if thawErr != nil {
		return fmt.Errorf("dump pid %d: the images are complete, but the tree could not be let go, look at it: %w", f.tree, thawErr)
	}
	if f.leaveRunning || f.leaveStopped {
		return nil
	}
	if err := tree.Kill(); err != nil {
		return fmt.Errorf("dump pid %d: the images are complete, but the tree could not be killed and must not run beside a restored one: %w", f.tree, err)
	}
	return nil
}

// unlockNetwork tells the action scripts that the tree is about to run on.
func (f *dumpFlags) unlockNetwork(ctx context.Context, log hclog.Logger) {
	if err := f.actions().network(context.WithoutCancel(ctx), stageNetworkUnlock, f.tree); err != nil {
		log.Error("the network may still be locked", "error", err)
	}
}

// written tells that the images are complete.
func (f *dumpFlags) written(log hclog.Logger) {
	if f.status.pidfile != "" {
		path := f.inWorkDir(f.status.pidfile)
		if err := os.WriteFile(path, []byte(strconv.Itoa(f.tree)), 0o644); err != nil {
			log.Warn("there is no pid file", "error", err)
		}
	}
	f.status.ready(log)
}

// parseNetworkLock reads a value of --network-lock; empty is the default.
func parseNetworkLock(s string) (engine.NetworkLock, error) {
	switch l := engine.NetworkLock(s); l {
	case engine.LockNone:
		return engine.LockNftables, nil
	case engine.LockNftables, engine.LockSkip:
		return l, nil
	case "iptables":
		// The kernel's rules are the same by whatever they are written, and ours need
		// neither that program nor another.
		return engine.LockNftables, nil
	}
	return "", fmt.Errorf("--network-lock: %q is none of nftables, iptables and skip", s)
}

// parseSize reads a number of bytes with an optional K, M or G (powers of
// 1024), as CRIU's --ghost-limit has it; empty is 0.
func parseSize(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	digits, shift := s, 0
	switch {
	case strings.ContainsAny(s[len(s)-1:], "kK"):
		digits, shift = s[:len(s)-1], 10
	case strings.ContainsAny(s[len(s)-1:], "mM"):
		digits, shift = s[:len(s)-1], 20
	case strings.ContainsAny(s[len(s)-1:], "gG"):
		digits, shift = s[:len(s)-1], 30
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || n > math.MaxUint64>>shift {
		return 0, fmt.Errorf("%q is not a size such as 512K, 10M or 1G", s)
	}
	return n << shift, nil
}
