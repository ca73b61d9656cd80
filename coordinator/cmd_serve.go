package coordinator

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"

	"godwit/transport"
	"godwit/transport/bus"
)

func (a *app) cmdServe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the control plane: the message bus, and the watch over migrations",
		Long: `serve runs the message bus for agents and commands, and watches over migrations
whose commands have gone. On a loopback address, the default, the bus wants no
credentials. On any other it does, for whoever can command an agent is root on
its host: keys are made on the first start, and the output tells how to hand
them to agents. With --nats-url it uses a NATS cluster that is there instead;
JetStream must be enabled in it.

It stays in the foreground and ends on SIGTERM or SIGINT. Migrations are not
harmed by that: the agents go on when the bus is back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.untilInterrupt(cmd.Context())
			defer cancel()
			return a.runServe(ctx)
		},
	}
	f := cmd.Flags()
	f.String("listen", "", "`address` of the bus, host:port (default 127.0.0.1:4222)")
	f.String("store-dir", "", "`directory` of records and keys (default /var/lib/godwit)")
	annotate(f, "listen", "serve.listen")
	annotate(f, "store-dir", "serve.store_dir")
	return cmd
}

// readyDoc is what serve says when it is ready, for programs.
type readyDoc struct {
	Event       string `json:"event"` // "ready"
	URL         string `json:"url"`
	Embedded    bool   `json:"embedded"`
	StoreDir    string `json:"store_dir,omitempty"`
	AgentKey    string `json:"agent_key_file,omitempty"`
	OperatorKey string `json:"operator_key_file,omitempty"`
	KeysMade    bool   `json:"keys_made,omitempty"` // by this start
	InFlight    int    `json:"in_flight"`
}

func (a *app) runServe(ctx context.Context) error {
	cfg, err := a.busConfig()
	if err != nil {
		return err
	}
	ready := readyDoc{Event: "ready"}
	handover := ""
	if len(a.config.NATS.URLs) == 0 {
		boundServer()
		srv, err := bus.Start(bus.Config{Listen: a.config.Serve.Listen, StoreDir: a.config.Serve.StoreDir, Logger: a.log})
		if err != nil {
			return err
		}
		defer srv.Shutdown()
		cfg = transport.Config{Name: "godwit serve", InProcess: srv.Conn(), Logger: a.log}
		ready.URL, ready.Embedded, ready.StoreDir = srv.URL(), true, a.config.Serve.StoreDir
		if keys, made := srv.Keys(); keys != nil {
			cfg.NKeySeedFile = keys.Operator
			ready.AgentKey, ready.OperatorKey, ready.KeysMade = keys.Agent, keys.Operator, made
			handover = srv.Handover()
		}
	}
	nc, err := transport.ConnectWait(ctx, cfg)
	if err != nil {
		return busError(err)
	}
	defer nc.Close()
	if !ready.Embedded {
		ready.URL = nc.ConnectedUrlRedacted()
	}
	records, err := transport.OpenRecords(ctx, nc, a.log)
	if err != nil {
		return err
	}
	l := &link{nc: nc, records: records}
	recs, err := records.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range recs {
		if over(r) {
			continue
		}
		ready.InFlight++
		a.log.Info("a migration is in flight", "migration", r.Id, "pid", r.Pid, "source", r.Source, "destination", r.Destination, "state", r.State.Word())
	}
	if err := a.printReady(ready, handover); err != nil {
		return err
	}
	err = watchOver(ctx, l, a.log, a.patience())
	if ctx.Err() != nil {
		a.log.Info("stopping", "reason", context.Cause(ctx))
		return nil
	}
	return err
}

func (a *app) printReady(d readyDoc, handover string) error {
	if a.output == outputJSON {
		return writeJSON(a.stdout, d)
	}
	s := "godwit is ready: the bus is at " + d.URL
	if d.InFlight > 0 {
		s += ", " + plural(d.InFlight, "migration") + " in flight"
	}
	if _, err := fmt.Fprintln(a.stdout, s); err != nil {
		return err
	}
	if handover == "" {
		return nil
	}
	if !d.KeysMade {
		_, err := fmt.Fprintf(a.stdout, "It demands keys: %s for agents, %s for godwit.\n", d.AgentKey, d.OperatorKey)
		return err
	}
	_, err := fmt.Fprint(a.stdout, handover)
	return err
}

// boundServer lets garbage of the embedded server grow, which passes every page
// of every migration on, and bounds the memory that it may take for that.
func boundServer() {
	const limit = 256 << 20 // bytes
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(limit)
}
