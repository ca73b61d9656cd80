package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"godwit/configs"
	"godwit/engine"
	"godwit/transport"
	"godwit/wire"
)

// runFlags are the flags of run that override the configuration.
var runFlags = []struct{ flag, key, usage string }{
	{"host", "host", "name of this host on the bus"},
	{"state-dir", "state_dir", "directory of what outlives the agent"},
	{"ghost-limit", "ghost_limit", "largest deleted file that travels with its data"},
	{"nats-url", "nats.urls", "servers of the bus, separated by commas"},
	{"nkey-file", "nats.nkey_file", "file with the seed of the agent's nkey"},
	{"creds-file", "nats.creds_file", "NATS credentials file"},
	{"direct", "direct.enabled", "offer the streams of trees that leave this host directly: true or false"},
	{"direct-listen", "direct.listen", "host:port that direct streams are fetched from"},
	{"direct-advertise", "direct.advertise", "addresses of this host for them, separated by commas"},
	{"window", "limits.window", "how much of a stream may be under way"},
	{"chunk", "limits.chunk", "largest message of a stream"},
	{"lanes", "limits.lanes", "connections of a stream"},
	{"memory-limit", "limits.memory_limit", "what the garbage collector aims to stay below"},
	{"bandwidth", "limits.bandwidth", "cap of a stream, such as 100MiB/s; 0 for none"},
	{"freeze-timeout", "timeouts.freeze", "within which all tasks of a tree must stop"},
	{"frozen-timeout", "timeouts.frozen", "within which a frozen tree must be handed over"},
	{"log-level", "log.level", "trace, debug, info, warn or error"},
	{"log-format", "log.format", "text or json"},
}

func cmdRun() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon: answer the bus, move trees from and to this host",
		Long: `Connects to the bus (and waits for it if it is away), registers this host and
carries out what coordinators ask for.

On SIGTERM, migrations that have not reached their commit are aborted, their
trees run on at the source; those past it are brought to their end first. Trees
that landed here live on without the agent.

Exit codes: 0 stopped as asked; 1 failed; 2 usage.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var over []configs.Override
			for _, f := range runFlags {
				if fl := cmd.Flags().Lookup(f.flag); fl.Changed {
					over = append(over, configs.Override{Key: f.key, Value: fl.Value.String(), Flag: "--" + f.flag})
				}
			}
			cfg, err := configs.LoadAgent(file, os.Environ(), over...)
			if err != nil {
				return &exitError{code: wire.ExitUsage, err: err}
			}
			return runDaemon(cmd.Context(), cfg, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (default "+configs.AgentFile+", which may be missing)")
	for _, f := range runFlags {
		cmd.Flags().String(f.flag, "", f.usage)
	}
	return cmd
}

// runDaemon runs the agent until ctx ends and its sessions have come to their end.
func runDaemon(ctx context.Context, cfg *configs.Agent, stderr io.Writer) (err error) {
	if err := needRoot("run"); err != nil {
		return err
	}
	host, err := cfg.HostName()
	if err != nil {
		return fmt.Errorf("name this host: %w", err)
	}
	boundMemory(int64(cfg.Limits.MemoryLimit))
	log := hclog.New(&hclog.LoggerOptions{
		Name: "godwit-agent", Level: hclog.LevelFromString(cfg.Log.Level), Output: stderr, JSONFormat: cfg.Log.Format == "json",
	})
	unlock, err := lockState(cfg, host)
	if err != nil {
		return err
	}
	defer unlock()
	bus, err := busConfig(cfg, host, log)
	if err != nil {
		return err
	}
	nc, err := transport.ConnectWait(ctx, bus)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to stop before the bus was there
		}
		return err
	}
	defer nc.Close()
	recs, err := openRecords(ctx, nc, log)
	if err != nil {
		return err
	}
	// Bytes of proxies must not hold up requests.
	relays := bus
	relays.Name += " proxies"
	rc, err := transport.ConnectWait(ctx, relays)
	if err != nil {
		return err
	}
	defer rc.Close()
	fail, err := failpoint(os.Getenv(FailpointEnv))
	if err != nil {
		return &exitError{code: wire.ExitUsage, err: err}
	}
	var direct *Direct
	if cfg.Direct.Enabled {
		direct = NewDirect(DirectConfig{Listen: cfg.Direct.Listen, Advertise: cfg.Direct.Advertise, Control: nc, Logger: log})
		defer direct.Close()
	}
	a := New(Config{
		Host: host, Version: Version, Engine: engine.New(log), Records: recs, Bus: rc,
		Streams: &Streams{
			Bus: bus, Control: nc, Direct: direct, ChunkSize: int(cfg.Limits.Chunk), Window: int(cfg.Limits.Window), Lanes: cfg.Limits.Lanes,
			Bandwidth: uint64(cfg.Limits.Bandwidth), IdleTimeout: cfg.Timeouts.Idle.D(), Logger: log,
		},
		Progress: func(p *wire.Progress) {
			if err := transport.PublishProgress(nc, p); err != nil {
				log.Trace("progress lost", "error", err)
			}
		},
		Timeouts: Timeouts{
			Begin: 10 * time.Second, Freeze: cfg.Timeouts.Freeze.D(), Frozen: cfg.Timeouts.Frozen.D(), Prepared: cfg.Timeouts.Prepared.D(),
		},
		Limits:     Limits{Outgoing: cfg.Limits.Outgoing, Incoming: cfg.Limits.Incoming},
		GhostLimit: uint64(cfg.GhostLimit), External: cfg.Rules(), Logger: log,
		Pagers:    &Pagers{Bus: bus, LogLevel: cfg.Log.Level, LogJSON: cfg.Log.Format == "json"},
		Failpoint: fail, Journal: &journal{dir: cfg.StatePath("journal-" + host)},
	})
	a.Recover()
	info, err := a.describe()
	if err != nil {
		return err
	}
	svc, err := transport.Serve(nc, transport.ServiceConfig{Info: info, Logger: log})
	if err != nil {
		return err
	}
	if err := a.Serve(svc); err != nil {
		return errors.Join(err, svc.Stop())
	}
	local, err := listenLocal(localSocketPath(cfg.StateDir, host))
	if err != nil {
		return errors.Join(err, svc.Stop())
	}
	defer func() { _ = local.Close() }()
	go a.serveLocal(local)
	// Ready means that a call made from now on finds the subscriptions.
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		log.Warn("the bus is away", "error", err)
	}
	log.Info("ready", "host", host, "version", Version, "bus", nc.ConnectedUrlRedacted(), "pid", os.Getpid())
	<-ctx.Done()
	log.Info("stopping")
	// While sessions end the calls are still answered, so that a coordinator
	// is told what goes on instead of finding nobody.
	err = a.Stop(context.Background())
	if serr := svc.Stop(); err == nil {
		err = serr
	}
	log.Info("stopped")
	return err
}

// openRecords waits for JetStream, which may come up later than its server.
func openRecords(ctx context.Context, nc *nats.Conn, log hclog.Logger) (*transport.Records, error) {
	for n := 0; ; n++ {
		recs, err := transport.OpenRecords(ctx, nc, log)
		if err == nil || n == 10 {
			return recs, err
		}
		log.Warn("waiting for the records", "error", err)
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

// busConfig says how connections to the bus are made.
func busConfig(cfg *configs.Agent, host string, log hclog.Logger) (transport.Config, error) {
	c := transport.Config{
		URLs: cfg.NATS.URLs, Name: "godwit-agent " + host, NKeySeedFile: cfg.NATS.NKeyFile, CredsFile: cfg.NATS.CredsFile,
		User: cfg.NATS.User, TLSCA: cfg.NATS.TLS.CA, TLSCert: cfg.NATS.TLS.Cert, TLSKey: cfg.NATS.TLS.Key, Logger: log,
	}
	if cfg.NATS.PasswordFile != "" {
		b, err := os.ReadFile(cfg.NATS.PasswordFile)
		if err != nil {
			return transport.Config{}, fmt.Errorf("read the password for the bus: %w", err)
		}
		c.Password = strings.TrimRight(string(b), "\r\n")
	}
	return c, nil
}

// lockState makes sure that no other agent of this host name runs on this
// machine, even while the bus, which tells of one elsewhere, is away.
func lockState(cfg *configs.Agent, host string) (unlock func(), err error) {
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	path := filepath.Join(cfg.StateDir, "agent-"+host+".lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	// A lock of the process, not of the open file: the trees that land here are
	// children of the agent and outlive it.
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another agent of host %s runs on this machine (%s is locked); stop it or choose another host name and state directory: %w", host, path, err)
	}
	return func() { _ = f.Close() }, nil
}
