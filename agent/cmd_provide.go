package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"godwit/configs"
	"godwit/wire"
)

type provideFlags struct {
	config, host, stateDir string
	fd                     int
	open                   string
	end                    string
	command                []string
}

func cmdProvide() *cobra.Command {
	var f provideFlags
	cmd := &cobra.Command{
		Use:   "provide SELECTOR {--fd N | --open PATH[,FLAG…] | -- COMMAND [ARG…]}",
		Short: "Keep a descriptor ready for a tree that lands here",
		Long: `Hands a descriptor to the agent of this host, for the object of a tree that
SELECTOR names: a key such as file[72:a3e7] or pipe[4711], or fd:PID:N, role:stdin,
path:GLOB, kind:KIND. A migration takes it whose rules say "provide" or "inherit"
for that object. A regular file or a fifo is opened again with the flags that the
program had; anything else is handed on as it is.

The descriptor is N, which was open when this command began (5<>/run/fifo), or a
file that is opened (flags: read, write, rdwr, append, create, excl, truncate,
nonblock, sync, direct, directory, path; read if none says it), or the end of a
pipe of which COMMAND has the other one, on its standard input (--end stdin, for
what the tree writes) or output (--end stdout, for what the tree reads).

The command waits until the tree runs with the descriptor. Interrupted before
(Ctrl-C) it withdraws it. A migration that was aborted gives it back, and the
wait goes on. With COMMAND it then waits for that to end.

Exit codes: 0 used (with COMMAND: the status of that); 1 failed or withdrawn;
2 usage.`,
		Example: `  godwit-agent provide 'file[72:a3e7]' --fd 4 4<>/run/input
  godwit-agent provide path:/var/log/app.log --open /srv/log/app.log,write,append,create
  godwit-agent provide role:stdout -- logger -t app`,
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			if at >= 0 {
				args, f.command = args[:at], args[at:]
			}
			if len(args) != 1 {
				return usageError(cmd, fmt.Errorf("%d selectors are given, expected one", len(args)))
			}
			if err := f.check(cmd, at >= 0); err != nil {
				return usageError(cmd, err)
			}
			if _, err := selectorOf(args[0]); err != nil {
				return usageError(cmd, err)
			}
			return runProvide(cmd.Context(), args[0], f, cmd.ErrOrStderr())
		},
	}
	cmd.Args = cobra.ArbitraryArgs
	fs := cmd.Flags()
	fs.IntVar(&f.fd, "fd", -1, "provide this open descriptor")
	fs.StringVar(&f.open, "open", "", "open and provide a file: `PATH[,FLAG…]`")
	fs.StringVar(&f.end, "end", "stdin", "which `end` COMMAND has of the pipe: stdin (the tree writes) or stdout (the tree reads)")
	fs.StringVar(&f.config, "config", "", "configuration file of the agent (default "+configs.AgentFile+", which may be missing)")
	fs.StringVar(&f.host, "host", "", "name of the agent's host on the bus")
	fs.StringVar(&f.stateDir, "state-dir", "", "directory of the agent, in which its socket is")
	return cmd
}

// check wants exactly one source of the descriptor.
func (f *provideFlags) check(cmd *cobra.Command, dash bool) error {
	given := 0
	for _, g := range []bool{cmd.Flags().Changed("fd"), f.open != "", dash} {
		if g {
			given++
		}
	}
	switch {
	case given != 1:
		return errors.New("give one of --fd, --open and -- COMMAND")
	case dash && len(f.command) == 0:
		return errors.New("there is no command after --")
	case f.end != "stdin" && f.end != "stdout":
		return fmt.Errorf("--end: %q is neither stdin nor stdout", f.end)
	case !dash && cmd.Flags().Changed("end"):
		return errors.New("--end is about the pipe to a COMMAND, and there is none")
	}
	return nil
}

// socket finds the agent's socket by its configuration.
func (f *provideFlags) socket() (string, error) {
	var over []configs.Override
	if f.host != "" {
		over = append(over, configs.Override{Key: "host", Value: f.host, Flag: "--host"})
	}
	if f.stateDir != "" {
		dir, err := filepath.Abs(f.stateDir)
		if err != nil {
			return "", err
		}
		over = append(over, configs.Override{Key: "state_dir", Value: dir, Flag: "--state-dir"})
	}
	cfg, err := configs.LoadAgent(f.config, os.Environ(), over...)
	if err != nil {
		return "", &exitError{code: wire.ExitUsage, err: err}
	}
	host, err := cfg.HostName()
	if err != nil {
		return "", fmt.Errorf("name this host: %w", err)
	}
	return localSocketPath(cfg.StateDir, host), nil
}

// runProvide provides a descriptor and waits until it is used.
func runProvide(ctx context.Context, selector string, f provideFlags, stderr io.Writer) error {
	path, err := f.socket()
	if err != nil {
		return err
	}
	file, what, child, err := f.descriptor(stderr)
	if err != nil {
		return err
	}
	c, err := provide(path, localRequest{Version: localVersion, Do: "provide", Selector: selector, What: what}, file)
	_ = file.Close()
	if err != nil {
		child.stop()
		return err
	}
	defer func() { _ = c.Close() }()
	events := make(chan error, 1)
	go func() { events <- followEvents(c, selector, stderr) }()
	select {
	case err = <-events:
	case <-ctx.Done():
		err = fmt.Errorf("%s: withdrawn; a migration that holds the descriptor already keeps it", selector)
	case <-child.ended():
		err = fmt.Errorf("%s: withdrawn: the command ended before a tree used its pipe", selector)
	}
	if err != nil {
		child.stop()
		return err
	}
	return child.wait(ctx)
}

// provide hands a descriptor to the agent that listens on path.
func provide(path string, req localRequest, file *os.File) (*net.UnixConn, error) {
	name, done, err := shortAddress(path)
	if err != nil {
		return nil, fmt.Errorf("no agent listens on %s: %w; start it, or say which one with --config, --host or --state-dir", path, err)
	}
	defer done()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: name, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("no agent listens on %s: %w; start it, or say which one with --config, --host or --state-dir", path, err)
	}
	b, err := json.Marshal(req)
	if err == nil {
		_, _, err = c.WriteMsgUnix(b, unix.UnixRights(int(file.Fd())), nil)
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("hand the descriptor to the agent on %s: %w", path, err)
	}
	return c, nil
}

// followEvents tells what becomes of a provision until it has been used.
func followEvents(c *net.UnixConn, selector string, stderr io.Writer) error {
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(stderr, selector+": "+format+"\n", args...) }
	for {
		b, files, err := readPacket(c)
		closeAll(files)
		if err != nil {
			return fmt.Errorf("%s: the agent has gone: %w", selector, err)
		}
		var e localEvent
		if err := json.Unmarshal(b, &e); err != nil {
			return fmt.Errorf("%s: read what the agent says: %w", selector, err)
		}
		switch e.Event {
		case eventReady:
			say("ready; waiting for a tree")
		case eventHeld:
			say("held for migration %s, %s", e.Migration, e.Text)
		case eventReleased:
			say("given back, migration %s was not carried out; waiting for a tree", e.Migration)
		case eventUsed:
			say("used by migration %s, %s", e.Migration, e.Text)
			return nil
		case eventRefused:
			return fmt.Errorf("%s: the agent refused: %s", selector, e.Text)
		default:
			return fmt.Errorf("%s: the agent says %q, which this command does not know", selector, e.Event)
		}
	}
}

// descriptor gives what is to be provided, what to call it, and the command at
// the other end, which is nil if there is none.
func (f *provideFlags) descriptor(stderr io.Writer) (file *os.File, what string, child *pipeCommand, err error) {
	switch {
	case f.open != "":
		path, flags, err := parseOpen(f.open)
		if err != nil {
			return nil, "", nil, &exitError{code: wire.ExitUsage, err: err}
		}
		fd, err := openCreating(path, flags)
		return fd, path, nil, err
	case f.command != nil:
		return startPipeCommand(f.command, f.end, stderr)
	}
	if err := handedIn(f.fd); err != nil {
		return nil, "", nil, &exitError{code: wire.ExitUsage, err: fmt.Errorf("--fd %d: %w", f.fd, err)}
	}
	what, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.fd))
	if err != nil {
		what = ""
	}
	n, err := unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, "", nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return os.NewFile(uintptr(n), what), fmt.Sprintf("descriptor %d, %s", f.fd, strings.ToValidUTF8(what, "?")), nil, nil
}

// openWords are the flags of --open.
var openWords = map[string]int{
	"read": unix.O_RDONLY, "write": unix.O_WRONLY, "rdwr": unix.O_RDWR, "append": unix.O_APPEND, "create": unix.O_CREAT,
	"excl": unix.O_EXCL, "truncate": unix.O_TRUNC, "nonblock": unix.O_NONBLOCK, "sync": unix.O_SYNC, "direct": unix.O_DIRECT,
	"directory": unix.O_DIRECTORY, "path": unix.O_PATH,
}

// parseOpen takes PATH[,FLAG…] apart. A path may hold commas: flags are the
// words at the end that are known.
func parseOpen(s string) (path string, flags int, err error) {
	access := ""
	for {
		i := strings.LastIndexByte(s, ',')
		if i < 0 {
			break
		}
		word := s[i+1:]
		bit, ok := openWords[word]
		if !ok {
			break
		}
		if word == "read" || word == "write" || word == "rdwr" {
			if access != "" && access != word {
				return "", 0, fmt.Errorf("--open: %s and %s do not go together; say rdwr for both", word, access)
			}
			access = word
		}
		flags |= bit
		s = s[:i]
	}
	if s == "" {
		return "", 0, errors.New("--open: the path is empty")
	}
	return s, flags, nil
}

// openCreating opens a file with exactly these flags.
func openCreating(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0o644)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// pipeCommand is a command at the other end of a pipe that is provided.
type pipeCommand struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait, once done is closed
}

// startPipeCommand starts a command whose standard input or output is a pipe,
// and gives the other end of that.
func startPipeCommand(argv []string, end string, stderr io.Writer) (*os.File, string, *pipeCommand, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, "", nil, os.NewSyscallError("pipe2", err)
	}
	rd, wr := os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe")
	c := &pipeCommand{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, stderr
	ours, theirs := wr, rd
	if end == "stdin" {
		c.cmd.Stdin = rd
	} else {
		ours, theirs = rd, wr
		c.cmd.Stdout = wr
	}
	err := c.cmd.Start()
	_ = theirs.Close()
	if err != nil {
		_ = ours.Close()
		return nil, "", nil, fmt.Errorf("start the command: %w", err)
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.done)
	}()
	return ours, fmt.Sprintf("pipe to pid %d, %s", c.cmd.Process.Pid, filepath.Base(argv[0])), c, nil
}

// ended is closed when the command has ended; never without a command.
func (c *pipeCommand) ended() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.done
}

// stop ends the command.
func (c *pipeCommand) stop() {
	if c == nil {
		return
	}
	_ = c.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(5 * time.Second):
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}

// wait gives the status of the command as that of this one. Told to stop it
// leaves the command alone: the tree needs it.
func (c *pipeCommand) wait(ctx context.Context) error {
	if c == nil {
		return nil
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return fmt.Errorf("told to stop waiting: the command runs on as pid %d, for the tree", c.cmd.Process.Pid)
	}
	if ee, ok := errors.AsType[*exec.ExitError](c.err); ok {
		return &exitError{code: exitStatus(unix.WaitStatus(ee.Sys().(syscall.WaitStatus)))}
	}
	return c.err
}
