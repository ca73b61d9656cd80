// Package coordinator owns the operator's command line and the control plane,
// godwit: it asks agents to move process trees, keeps watch over the records of
// migrations, and shows what goes on. It must not know how a tree is dumped or
// restored, nor import the engine: what it knows of a host is what the host's
// agent says.
package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"godwit/configs"
	"godwit/coordinator/rules"
	"godwit/wire"
)

// Version is the release of this build; the linker may set it
// (-ldflags "-X godwit/coordinator.Version=…").
var Version = "0.1.0-dev"

const exitCodes = `
Exit codes: 0 done; 1 failed; 2 usage; 3 aborted, the tree runs on at the
source; 4 refused by preflight, nothing was touched; 5 state unknown, an
operator must look.`

// app is what all commands share.
type app struct {
	stdout, stderr io.Writer
	env            []string
	// interrupts gets a value for each SIGINT or SIGTERM.
	interrupts <-chan os.Signal
	// uncatch, if not nil, gives signals back their default action.
	uncatch func()

	// From the command line.
	configFile  string
	natsURLs    []string
	credentials string
	output      string
	logLevel    string

	// wait replaces defaultPatience, for tests.
	wait *rules.Patience

	// From PersistentPreRunE on.
	started bool
	config  *configs.Coordinator
	log     hclog.Logger
	// failureShown: a command's document already says why it failed, for
	// programs; people get it on stderr all the same.
	failureShown bool
}

// usageError is a mistake in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// Main runs godwit with the given arguments (without the program's name) and
// streams and returns the exit code. Errors are printed to stderr once; with
// --output json they are a document on stdout, too.
func Main(args []string, stdout, stderr io.Writer) int {
	interrupts := make(chan os.Signal, 4)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupts)
	a := &app{stdout: stdout, stderr: stderr, env: os.Environ(), interrupts: interrupts,
		uncatch: func() { signal.Stop(interrupts) }}
	return a.run(context.Background(), args)
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return wire.ExitDone
	}
	if !a.started { // what cobra says about a command line
		if _, ok := errors.AsType[*usageError](err); !ok {
			err = &usageError{err}
		}
	}
	code := exitCode(err)
	if s, ok := errors.AsType[*statusError](err); ok && s.text == "" {
		return code // the program has said what there is to say
	}
	_, _ = fmt.Fprintf(a.stderr, "godwit: %s\n", err)
	if a.output == outputJSON && !a.failureShown {
		_ = writeJSON(a.stdout, struct {
			Error    *errorDoc `json:"error"`
			ExitCode int       `json:"exit_code"`
		}{newErrorDoc(wire.ErrorOf(err)), code})
	}
	return code
}

func exitCode(err error) int {
	if err == nil {
		return wire.ExitDone
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return wire.ExitUsage
	}
	if s, ok := errors.AsType[*statusError](err); ok {
		return s.code
	}
	if _, ok := errors.AsType[*configs.Error](err); ok {
		return wire.ExitUsage
	}
	return wire.ExitCode(err)
}

const (
	outputText = "text"
	outputJSON = "json"
)

func (a *app) newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "godwit",
		Short: "Moves running process trees between hosts",
		Long: `godwit moves running process trees from one host to another, while they run.
Each host runs godwit-agent; "godwit serve" runs the message bus between them,
unless there is a NATS cluster to use.
` + exitCodes,
		Version:       Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.started = true
			switch cmd.Name() {
			case "help", "completion", "bash", "fish", "powershell", "zsh", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd:
				return nil // a broken configuration does not matter to them
			}
			return a.setup(cmd)
		},
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see %s --help", err, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.configFile, "config", "", "configuration `file` (default "+configs.CoordinatorFile+", if it exists)")
	f.StringSliceVar(&a.natsURLs, "nats-url", nil, "`URL` of the bus; repeat it for a cluster's other servers")
	f.StringVar(&a.credentials, "credentials", "", "`file` with the seed of an nkey, or with NATS credentials, for the bus")
	f.StringVarP(&a.output, "output", "o", outputText, "`format` of the output: text or json")
	f.StringVar(&a.logLevel, "log-level", "", "trace, debug, info, warn or error")
	root.AddCommand(
		a.cmdServe(), a.cmdHosts(), a.cmdPs(), a.cmdPlan(), a.cmdMigrate(), a.cmdAttach(), a.cmdWatch(), a.cmdAbort(), a.cmdResolve(), a.cmdHistory(), a.cmdVersion(),
	)
	for _, c := range root.Commands() {
		c.Long = strings.TrimRight(c.Long, "\n") + "\n" + exitCodes
		args := c.Args
		c.Args = func(cmd *cobra.Command, a []string) error {
			if args == nil {
				return nil
			}
			if err := args(cmd, a); err != nil {
				return usagef("%s: %w; usage: %s", cmd.Name(), err, cmd.UseLine())
			}
			return nil
		}
	}
	return root
}

// setup reads the configuration. Flags of single commands that stand for a key
// have an annotation with it.
func (a *app) setup(cmd *cobra.Command) error {
	if a.output != outputText && a.output != outputJSON {
		bad := a.output
		a.output = outputText
		return usagef("--output %q: want text or json", bad)
	}
	var overrides []configs.Override
	add := func(key, value, flag string) {
		overrides = append(overrides, configs.Override{Key: key, Value: value, Flag: flag})
	}
	if len(a.natsURLs) > 0 {
		add("nats.urls", strings.Join(a.natsURLs, ","), "--nats-url")
	}
	if a.credentials != "" {
		path, err := filepath.Abs(a.credentials)
		if err != nil {
			return fmt.Errorf("--credentials: %w", err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return usagef("--credentials: %w", err)
		}
		// Those of the file would stand in the way.
		key, other := "nats.nkey_file", "nats.creds_file"
		if strings.Contains(string(text), "BEGIN NATS USER JWT") {
			key, other = other, key
		}
		add(key, path, "--credentials")
		for _, k := range []string{other, "nats.user", "nats.password_file"} {
			add(k, "", "--credentials")
		}
	}
	if a.logLevel != "" {
		add("log.level", a.logLevel, "--log-level")
	}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if key := f.Annotations[configKey]; key != nil {
			value := f.Value.String()
			if strings.HasSuffix(key[0], "_dir") {
				if abs, err := filepath.Abs(value); err == nil && value != "" {
					value = abs
				}
			}
			add(key[0], value, "--"+f.Name)
		}
	})
	config, err := configs.LoadCoordinator(a.configFile, a.env, overrides...)
	if err != nil {
		if _, ok := errors.AsType[*configs.Error](err); !ok && a.configFile != "" {
			err = &usageError{err}
		}
		return err
	}
	a.config = config
	level := config.Log.Level
	if a.logLevel == "" && level == "info" && cmd.Name() != "serve" {
		// A command speaks for itself: only what is degraded is worth a line.
		level = "warn"
	}
	a.log = hclog.New(&hclog.LoggerOptions{
		Name: "godwit", Level: hclog.LevelFromString(level), Output: a.stderr, JSONFormat: config.Log.Format == "json",
	})
	return nil
}

// configKey is the annotation of a flag that stands for a key of the
// configuration.
const configKey = "godwit_config_key"

func annotate(f *pflag.FlagSet, name, key string) {
	if err := f.SetAnnotation(name, configKey, []string{key}); err != nil {
		panic(err) // no such flag: a bug of this package
	}
}

// untilInterrupt returns a context that ends with the first signal.
func (a *app) untilInterrupt(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-ctx.Done():
		case s := <-a.interrupts:
			cancel(fmt.Errorf("got the signal %s", s))
			if a.uncatch != nil {
				a.uncatch() // who is in a hurry can kill it
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}
