package coordinator

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"

	"godwit/configs"
	"godwit/transport"
	"godwit/wire"
)

// bus is what commands need of the bus.
type link struct {
	nc      *nats.Conn
	records *transport.Records
}

func (l *link) close() { l.nc.Close() }

// connect connects to the bus that the configuration names and opens the
// records.
func (a *app) connect(ctx context.Context) (*link, error) {
	nc, err := a.connectBus()
	if err != nil {
		return nil, err
	}
	records, err := transport.OpenRecords(ctx, nc, a.log)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &link{nc: nc, records: records}, nil
}

// connectTo is connect, and reads the record of a migration.
func (a *app) connectTo(ctx context.Context, id string) (*link, *wire.Record, error) {
	l, err := a.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	rec, _, err := l.records.Get(ctx, id)
	if err != nil {
		l.close()
		return nil, nil, err
	}
	return l, rec, nil
}

// connectBus is connect for commands that need no records.
func (a *app) connectBus() (*nats.Conn, error) {
	cfg, err := a.busConfig()
	if err != nil {
		return nil, err
	}
	nc, err := transport.Connect(cfg)
	if err != nil {
		return nil, busError(err)
	}
	return nc, nil
}

func busError(err error) error {
	if errors.Is(err, transport.ErrUnreachable) {
		return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%w; start it with \"godwit serve\", or name another with --nats-url", err)
	}
	return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%w", err)
}

func (a *app) busConfig() (transport.Config, error) {
	n := a.config.NATS
	cfg := transport.Config{
		URLs: n.URLs, Name: "godwit", NKeySeedFile: n.NKeyFile, CredsFile: n.CredsFile, User: n.User,
		TLSCA: n.TLS.CA, TLSCert: n.TLS.Cert, TLSKey: n.TLS.Key, Logger: a.log,
	}
	if n.PasswordFile != "" {
		text, err := os.ReadFile(n.PasswordFile)
		if err != nil {
			return transport.Config{}, wire.Errorf(wire.Code_CODE_INVALID, "nats.password_file: %w", err)
		}
		cfg.Password = strings.TrimRight(string(text), "\r\n")
	}
	if len(cfg.URLs) == 0 {
		url, private := localBus(a.config.Serve)
		cfg.URLs = []string{url}
		// The bus of this machine made a key for the operator.
		if key := operatorKey(a.config.Serve); !private && cfg.NKeySeedFile == "" && cfg.CredsFile == "" && cfg.User == "" {
			if _, err := os.Stat(key); err == nil {
				cfg.NKeySeedFile = key
			}
		}
	}
	return cfg, nil
}

// operatorKey is where transport/bus keeps the operator's seed.
func operatorKey(s configs.Serve) string { return filepath.Join(s.StoreDir, "keys", "operator.nk") }

// localBus is where the bus that "godwit serve" runs can be reached on this
// machine, and whether it is there for this machine only and so wants no key.
func localBus(s configs.Serve) (url string, private bool) {
	host, port, err := net.SplitHostPort(s.Listen)
	if err != nil { // the configuration was validated
		return "nats://" + s.Listen, false
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case host == "localhost" || err == nil && addr.IsLoopback():
		private = true
	case host == "" || err == nil && addr.IsUnspecified():
		host = "127.0.0.1"
	}
	return "nats://" + net.JoinHostPort(host, port), private
}
