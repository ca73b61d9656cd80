package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
)

type restoreFlags struct {
	localFlags
	tcpEstablished bool
	tcpClose       bool
	networkLock    string
	detached       bool
	inherit        []string
	status         statusFlags
	sibling        bool
	tree           int
	execCmd        bool
	command        []string // of execCmd
	lsmProfile     string
	pidNamespace   string
	timeNamespace  string
	fileLocks      bool
	extUnixSk      bool
	leaveStopped   bool
	autoDedup      bool
	files          fileFlags
	namespaces     restoreNamespaces
}

func cmdRestore() *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:   "restore -D DIR",
		Short: "Rebuild a process tree from the images in a directory",
		Long: `Rebuilds the tree whose images are in DIR, with the pids that it had. Without
--restore-detached it then waits for the tree's root and exits with its status
(128 plus the signal's number if a signal ended it; the status of a root in a
pid namespace of its own is not told to the outside, and 0 stands for it).

Exit codes: 0 done; 1 failed or refused, nothing is left of the tree.`,
		Example: `  godwit-agent restore -D /var/tmp/img -d --inherit-fd 'fd[4]:file[72:a3e7]' 4<>/run/fifo`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.command = args
			return f.run(cmd, func(log hclog.Logger) error { return runRestore(cmd.Context(), engine.New(log), f, log) })
		},
	}
	f.add(cmd)
	fs := cmd.Flags()
	fs.BoolVarP(&f.detached, "restore-detached", "d", false, "leave the tree to itself once it runs")
	fs.StringArrayVar(&f.inherit, "inherit-fd", nil, "fd[N]:KEY: the open descriptor N backs the file KEY of the images; may be repeated")
	fs.BoolVarP(&f.sibling, "restore-sibling", "S", false, "make the root a child of this command's parent; needs --restore-detached")
	fs.IntVarP(&f.tree, "tree", "t", 0, "pid of the root; the images tell it, and it is only compared")
	fs.BoolVar(&f.execCmd, "exec-cmd", false, "once the tree runs, execute the command behind -- in the place of this one, as the parent of the root")
	fs.StringVar(&f.lsmProfile, "lsm-profile", "", "TYPE:NAME: the profile of apparmor or selinux that the tree must have, which is that of this command; none is no demand")
	f.status.add(fs)
	fs.BoolVarP(&f.leaveStopped, "leave-stopped", "s", false, "leave the tree stopped (SIGSTOP) until it gets SIGCONT")
	fs.StringVar(&f.pidNamespace, "pid-namespace", "same", "same: the pids must be free here; new: in a pid namespace of its own")
	fs.StringVar(&f.timeNamespace, "time-namespace", "auto", "auto: monotonic and boot-time clocks go on, in a time namespace where this host's are others; new: in any case, from where they stood at the dump; keep: this host's clocks")
	fs.BoolVarP(&f.fileLocks, "file-locks", "l", false, "set file locks and leases again; images that have some need it")
	fs.BoolVarP(&f.extUnixSk, "ext-unix-sk", "x", false, "connect datagram unix sockets to named ones outside the tree again")
	fs.BoolVar(&f.tcpEstablished, "tcp-established", false, "make the TCP connections of the tree again, and unlock the network")
	fs.BoolVar(&f.tcpClose, "tcp-close", false, "make sockets that had a TCP connection again as if it had ended")
	fs.StringVar(&f.networkLock, "network-lock", "nftables", "how the network was locked: nftables, or skip to leave it as it is")
	f.files.add(fs, false)
	fs.BoolVar(&f.autoDedup, "auto-dedup", false, "free the space of pages in the images, and in those that these build on, once the tree runs: they cannot be restored again")
	f.namespaces.add(fs)
	foreignFlags(fs,
		"address",
		"cpu-cap",
		"deprecated",
		"enable-external-masters",
		"enable-external-sharing",
		"enable-fs",
		"lazy-pages",
		"lsm-mount-context",
		"page-server",
		"port",
		"ps-socket",
		"stream",
		"tls",
	)
	return cmd
}

// runRestore rebuilds the tree and, unless f.detached, waits for its root,
// whose status other than 0 is an *exitError.
func runRestore(ctx context.Context, eng Engine, f restoreFlags, log hclog.Logger) error {
	lock, err := parseNetworkLock(f.networkLock)
	if err != nil {
		return err
	}
	opts := engine.RestoreOptions{TCPEstablished: f.tcpEstablished, TCPClose: f.tcpClose, NetworkLock: lock, FileLocks: f.fileLocks, ExtUnixSk: f.extUnixSk}
	if err := f.namespaces.set(&opts); err != nil {
		return err
	}
	if opts.Files, err = f.files.restore(); err != nil {
		return err
	}
	if len(f.scripts) > 0 {
		opts.Stage = func(stage string, pid int) error { return f.actions().run(ctx, stage, pid) }
	}
	switch f.pidNamespace {
	case "same", "":
	case "new":
		opts.NewPidNamespace = true
	default:
		return fmt.Errorf("--pid-namespace: %q is neither same nor new", f.pidNamespace)
	}
	switch f.timeNamespace {
	case "auto", "":
	case "new":
		opts.TimeNamespace = engine.ClocksNew
	case "keep":
		opts.TimeNamespace = engine.ClocksKeep
	default:
		return fmt.Errorf("--time-namespace: %q is none of auto, new and keep", f.timeNamespace)
	}
	if f.sibling && !f.detached {
		return errors.New("--restore-sibling makes sense only with --restore-detached: the root is no child of this command, which could wait for it")
	}
	opts.Sibling = f.sibling
	program, err := findCommand(f.execCmd, f.command, f.detached)
	if err := errors.Join(err, checkProfile(f.lsmProfile), f.status.check()); err != nil {
		return err
	}
	if err := f.checkDir(); err != nil {
		return err
	}
	held, err := inheritFDs(f.inherit)
	if err != nil {
		return err
	}
	opts.Inherit = held
	defer func() {
		for _, in := range held {
			_ = in.File.Close()
		}
	}()
	for _, in := range held {
		unix.CloseOnExec(int(in.File.Fd())) // they are not for action scripts
	}
	if err := f.actions().run(ctx, stagePreRestore, 0); err != nil {
		return fmt.Errorf("restore from %s: %w", f.imagesDir, err)
	}
	var terminal *ownTerminal
	if f.shellJob {
		opts.ShellJob = true
		if terminal, err = openTerminal(); err != nil {
			return err
		}
		if terminal != nil {
			opts.Terminal = terminal.file
			defer func() { _ = terminal.file.Close() }()
		}
	}
	src, err := image.OpenDir(f.imagesDir)
	if err != nil {
		return fmt.Errorf("restore from %s: %w", f.imagesDir, err)
	}
	defer func() { _ = src.Close() }()
	if f.autoDedup {
		src.Track()
	}
	tree, err := eng.Restore(ctx, src, opts)
	if err != nil {
		return errors.Join(fmt.Errorf("restore from %s: %w", f.imagesDir, err), terminal.back())
	}
	if err := startRestored(ctx, tree, f); err != nil {
		if derr := tree.Discard(); derr != nil {
			err = fmt.Errorf("%w (and what was built could not be removed: %w)", err, derr)
		}
		return errors.Join(fmt.Errorf("restore from %s: %w", f.imagesDir, err), terminal.back())
	}
	if f.autoDedup {
		if err := src.Dedup(); err != nil {
			log.Warn("the images keep their pages", "error", err)
		}
	}
	f.putStats(statsRestoreFile, restoreStats(tree.Stats()))
	if err := f.actions().run(ctx, stagePostResume, tree.Root()); err != nil {
		log.Error("the tree runs all the same", "pid", tree.Root(), "error", err)
	}
	log.Info("restored", "pid", tree.Root(), "dir", f.imagesDir, "processes", len(tree.Pids()))
	if f.tree != 0 && f.tree != tree.Root() {
		log.Warn("the root has another pid than the one that was named", "pid", tree.Root(), "tree", f.tree)
	}
	f.status.ready(log)
	if f.detached {
		return nil
	}
	if f.execCmd {
		return fmt.Errorf("execute %s (the tree runs as pid %d): %w", program, tree.Root(), syscall.Exec(program, f.command, os.Environ()))
	}
	ended := make(chan error, 1)
	go func() {
		status, err := waitChild(tree.Child())
		if code := exitStatus(status); err == nil && code != 0 {
			err = &exitError{code: code}
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		if berr := terminal.back(); berr != nil {
			log.Error("the tree has ended", "error", berr)
		}
		return err
	case <-ctx.Done():
		return fmt.Errorf("told to stop waiting: the restored tree runs on as pid %d", tree.Root())
	}
}

// startRestored writes the pid file and lets the tree go, in this order, so
// that a pid file that cannot be written is found while nothing has run yet.
func startRestored(ctx context.Context, tree engine.Standing, f restoreFlags) error {
	if f.status.pidfile != "" {
		path := f.inWorkDir(f.status.pidfile)
		if err := os.WriteFile(path, []byte(strconv.Itoa(tree.Root())), 0o644); err != nil {
			return fmt.Errorf("write the pid file: %w", err)
		}
	}
	scripts, err := f.actions(), ctx.Err()
	if err == nil {
		err = scripts.run(ctx, stagePostRestore, tree.Root())
	}
	if err == nil {
		err = scripts.network(ctx, stageNetworkUnlock, tree.Root())
	}
	if err == nil {
		err = scripts.run(ctx, stagePreResume, tree.Root())
	}
	if err == nil {
		if f.leaveStopped {
			err = tree.RunStopped()
		} else {
			err = tree.Run()
		}
	}
	if err != nil && f.status.pidfile != "" {
		_ = os.Remove(f.inWorkDir(f.status.pidfile))
	}
	return err
}

// inheritFDs takes over the descriptors that entries of the form fd[N]:KEY name.
func inheritFDs(entries []string) (held map[string]engine.Inherit, err error) {
	fds := map[string]int{}
	taken := map[int]string{}
	var errs []error
	for _, e := range entries {
		fd, key, err := parseInheritFD(e)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if _, twice := fds[key]; twice {
			errs = append(errs, fmt.Errorf("--inherit-fd %s: the key %s is given twice", e, key))
			continue
		}
		if other, twice := taken[fd]; twice {
			errs = append(errs, fmt.Errorf("--inherit-fd %s: descriptor %d already backs %s", e, fd, other))
			continue
		}
		if err := handedIn(fd); err != nil {
			errs = append(errs, fmt.Errorf("--inherit-fd %s: %w", e, err))
			continue
		}
		taken[fd] = key
		if fd <= unix.Stderr {
			// This command goes on using it.
			if fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, unix.Stderr+1); err != nil {
				errs = append(errs, fmt.Errorf("--inherit-fd %s: %w", e, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)))
				continue
			}
		}
		fds[key] = fd
	}
	if err := errors.Join(errs...); err != nil {
		// The descriptors are the caller's until all of them are good; they are
		// not closed here. The program ends anyway.
		return nil, err
	}
	// Not before: a file that nobody has closes its descriptor some day.
	held = map[string]engine.Inherit{}
	for key, fd := range fds {
		held[key] = engine.Inherit{File: os.NewFile(uintptr(fd), fmt.Sprintf("fd[%d]", fd)), Forward: false}
	}
	return held, nil
}

// handedIn says whether descriptor fd was open when this program started. One
// that Go's runtime opened since then does not count: it opens all of its own
// with O_CLOEXEC, and a descriptor with that flag cannot have come through an exec.
func handedIn(fd int) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return fmt.Errorf("descriptor %d is not open; open it for this command, such as %d<>/path", fd, fd)
	}
	return nil
}

// parseInheritFD takes fd[N]:KEY apart.
func parseInheritFD(s string) (fd int, key string, err error) {
	bad := fmt.Errorf("--inherit-fd %s: not of the form fd[N]:KEY, such as fd[4]:file[72:a3e7]", s)
	rest, ok := strings.CutPrefix(s, "fd[")
	if !ok {
		return 0, "", bad
	}
	num, key, ok := strings.Cut(rest, "]:")
	if !ok || key == "" {
		return 0, "", bad
	}
	n, err := strconv.ParseUint(num, 10, 31)
	if err != nil {
		return 0, "", bad
	}
	return int(n), key, nil
}
