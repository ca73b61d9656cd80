package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"godwit/wire"
)

// Version is the release of this build; the linker may set it
// (-ldflags "-X godwit/agent.Version=…").
var Version = "0.1.0-dev"

// exitError is an error that already stands for an exit code. A nil err says
// nothing and only sets the code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// Main runs the command line args (without the program's name) with the given
// standard streams and returns the exit code. Errors are printed to stderr, once.
func Main(args []string, stdout, stderr io.Writer) int {
	// SIGINT and SIGTERM end the work in an orderly way: nothing stays frozen,
	// nothing half built stays behind. A second signal ends the program at once,
	// which a program that holds frozen processes must not make easy, so only
	// the daemon and the commands that hold nothing get that default back.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	root := newRoot(stdout, stderr)
	root.SetArgs(verbosityArgs(args))
	return exitCode(root.ExecuteContext(ctx), stderr)
}

// exitCode prints err as the user is to see it and returns the code for it.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return wire.ExitDone
	}
	code := wire.ExitCode(err)
	if e, ok := errors.AsType[*exitError](err); ok {
		code = e.code
		if e.err == nil {
			return code
		}
	}
	_, _ = fmt.Fprintf(stderr, "godwit-agent: %s\n", err)
	return code
}

func newRoot(stdout, stderr io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "godwit-agent",
		Short: "Moves running process trees between hosts; this is the part on each host",
		Long: `godwit-agent is the daemon of a host (run), and dumps and restores process
trees of this machine without any bus (dump, restore, check, inspect).

Exit codes: 0 done; 1 failed; 2 usage; 3 aborted, the tree runs on at the
source; 4 refused by preflight, nothing was touched; 5 state unknown, an
operator must look. dump and restore use 0 and 1 as CRIU does.`,
		Version:       Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError(cmd, fmt.Errorf("unknown command %q", args[0]))
			}
			return cmd.Help()
		},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(usageError)
	root.Flags().BoolP("version", "V", false, "print the release and the version of CRIU's images that it makes")
	root.SetVersionTemplate("Version: {{.Version}}\nImages: CRIU 4.2\n")
	root.AddCommand(cmdRun(), cmdDump(), cmdPreDump(), cmdRestore(), cmdCheck(), cmdInspect(), cmdProvide(), cmdPage(), cmdNetworkLocks(), cmdVersion())
	var local []*cobra.Command
	for _, c := range root.Commands() {
		if exitsAsCRIU(c) {
			local = append(local, c)
		}
	}
	shareFlags(local...)
	for _, c := range root.Commands() {
		c.Args = usageArgs(c.Args)
		if c.Flags().Lookup("no-default-config") != nil {
			negations(c.Flags())
		}
	}
	return root
}

// usageError marks err as a mistake in the command line of cmd.
func usageError(cmd *cobra.Command, err error) error {
	code := wire.ExitUsage
	if f, ok := errors.AsType[foreignError](err); ok {
		err = f // what the flag parser says around it does not fit
	}
	if exitsAsCRIU(cmd) {
		code = wire.ExitFailed
	}
	return &exitError{code: code, err: fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
}

// exitsAsCRIU are the commands with CRIU's options and exit codes.
func exitsAsCRIU(cmd *cobra.Command) bool {
	return cmd.Name() == "dump" || cmd.Name() == "pre-dump" || cmd.Name() == "restore"
}

func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	if check == nil {
		check = cobra.NoArgs
	}
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError(cmd, err)
		}
		return nil
	}
}

// defaultVerbosity is CRIU's: warnings and errors.
const defaultVerbosity = 2

// Short options of the local commands by whether they take an argument.
const (
	shortBools  = "dRsljShVx"
	shortValues = "tDWorMJ"
)

// verbosityArgs rewrites CRIU's -vN and -vvv, also inside of a cluster such as
// -Rv4, to --verbosity=N, since the flag parser would take what follows v for
// further short flags. Every v without a number adds one to the default.
func verbosityArgs(args []string) []string {
	out := make([]string, 0, len(args))
	level := defaultVerbosity
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			return append(out, args[i:]...)
		}
		if len(a) < 2 || a[0] != '-' || a[1] == '-' {
			out = append(out, a)
			continue
		}
		at := 1
		for at < len(a) && strings.IndexByte(shortBools, a[at]) >= 0 {
			at++
		}
		switch rest := a[at:]; {
		case rest != "" && rest[0] == 'v' && strings.Trim(rest, "v") == "":
			level += len(rest)
		case len(rest) > 1 && rest[0] == 'v' && len(rest) < 6 && strings.Trim(rest[1:], "0123456789") == "":
			level, _ = strconv.Atoi(rest[1:])
		case len(rest) == 1 && strings.Contains(shortValues, rest) && i+1 < len(args):
			// What follows is its argument, whatever it looks like.
			out = append(out, a, args[i+1])
			i++
			continue
		default:
			out = append(out, a)
			continue
		}
		if at > 1 {
			out = append(out, a[:at])
		}
		out = append(out, fmt.Sprintf("--verbosity=%d", level))
	}
	return out
}

// foreignFlags makes options of CRIU that are not carried out known to a
// command, so that one of them is refused by its name in place of being taken
// for a typing error. An entry is "name" or "name,s" with its short form.
func foreignFlags(fs *pflag.FlagSet, names ...string) {
	for _, n := range names {
		name, short, _ := strings.Cut(n, ",")
		f := fs.VarPF(foreign(name), name, short, "")
		f.Hidden = true
		// Without a value of its own the option would swallow the next argument.
		f.NoOptDefVal = "-"
	}
}

type foreign string

func (foreign) String() string     { return "" }
func (foreign) Type() string       { return "" }
func (f foreign) Set(string) error { return foreignError(f) }

// foreignError is an option of CRIU that was given and is not carried out.
type foreignError string

func (e foreignError) Error() string {
	if why := foreignReasons[string(e)]; why != "" {
		return fmt.Sprintf("CRIU's option --%s is not carried out: %s", string(e), why)
	}
	return fmt.Sprintf("CRIU's option --%s is not carried out by this release; leave it out if the tree can do without", string(e))
}

// boundMemory keeps this program's memory within limit bytes: the collector
// lets garbage grow as long as there is room, for throughput, and works harder
// near the limit. The limit covers what Go manages; stacks of threads and the
// binary come on top, about 20 MiB.
func boundMemory(limit int64) {
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(limit)
}
