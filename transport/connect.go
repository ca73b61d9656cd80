package transport

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Config says how to reach the bus. At most one way to authenticate may be set.
type Config struct {
	// URLs of the cluster's servers, such as nats://10.0.0.1:4222; tls:// for TLS.
	URLs []string
	// Name of this connection, shown by the server's tools.
	Name string

	NKeySeed     string // the seed itself
	NKeySeedFile string // file with a user's nkey seed (bus.Start makes such)
	CredsFile    string // NATS credentials file (JWT and seed)
	User         string // with Password
	Password     string
	Token        string

	TLSCA   string // PEM file with the authorities to trust; empty: the system's
	TLSCert string // PEM files of the client's certificate and key
	TLSKey  string
	// TLSPin demands TLS with the certificate that has this SHA-256, whoever signed it.
	TLSPin []byte

	// Timeout of one attempt to connect; 0 means 3 s.
	Timeout time.Duration
	// InProcess connects without a socket to a server in this process; URLs
	// are not used then.
	InProcess nats.InProcessConnProvider
	Logger    hclog.Logger
}

var (
	// ErrUnreachable: no server of the bus accepted the connection.
	ErrUnreachable = errors.New("the bus cannot be reached")
	// ErrAuth: the bus refused the credentials.
	ErrAuth = errors.New("the bus refused the credentials")
)

const (
	pingInterval = 500 * time.Millisecond
	maxPingsOut  = 2
	// writeTimeout ends a write that the server does not take. It has to be
	// long enough for one chunk on a slow link.
	writeTimeout = 5 * time.Second
)

// Connect connects to the bus. Once that worked the connection is kept up for
// good: it reconnects with growing pauses for ever, and what is published
// while it is down is an error at once instead of being replayed later, since
// every user of it here resends on its own. A server that stopped answering is
// noticed within pingInterval × (maxPingsOut+1). Errors wrap ErrUnreachable,
// ErrAuth or tell which file could not be used.
func Connect(cfg Config) (*nats.Conn, error) {
	log := logger(cfg.Logger)
	opts, err := cfg.options(log)
	if err != nil {
		return nil, err
	}
	where := strings.Join(cfg.URLs, ",")
	if cfg.InProcess != nil {
		where = ""
	} else if where == "" {
		where = nats.DefaultURL
	}
	nc, err := nats.Connect(where, opts...)
	if err != nil {
		return nil, connectError(where, err)
	}
	return nc, nil
}

// ConnectWait is Connect that tries until the bus is there or ctx ends. It
// does not wait for wrong credentials or unusable files to get better.
func ConnectWait(ctx context.Context, cfg Config) (*nats.Conn, error) {
	log := logger(cfg.Logger)
	for n := 1; ; n++ {
		nc, err := Connect(cfg)
		if err == nil || !errors.Is(err, ErrUnreachable) {
			return nc, err
		}
		if n == 1 || n%30 == 0 {
			log.Warn("waiting for the bus", "urls", strings.Join(cfg.URLs, ","), "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (gave up: %w)", err, ctx.Err())
		case <-time.After(reconnectDelay(n)):
		}
	}
}

func (cfg Config) options(log hclog.Logger) ([]nats.Option, error) {
	timeout := cfg.Timeout
	if timeout == 0 {
		timeout = 3 * time.Second
	}
	opts := []nats.Option{
		nats.Name(cfg.Name),
		nats.Timeout(timeout),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(),
		nats.CustomReconnectDelay(reconnectDelay),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(maxPingsOut),
		nats.FlusherTimeout(writeTimeout),
		nats.ReconnectOnFlusherError(),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("connection to the bus lost", "name", cfg.Name, "error", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			log.Info("connected to the bus again", "name", cfg.Name, "url", nc.ConnectedUrlRedacted())
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			log.Warn("error on the bus", "name", cfg.Name, "subject", subject, "error", err)
		}),
	}
	ways := 0
	for _, set := range []bool{cfg.NKeySeed != "", cfg.NKeySeedFile != "", cfg.CredsFile != "", cfg.User != "", cfg.Token != ""} {
		if set {
			ways++
		}
	}
	if ways > 1 {
		return nil, errors.New("more than one way to authenticate to the bus is configured: choose one of nkey, creds, user and token")
	}
	switch {
	case cfg.NKeySeed != "":
		opt, err := seedOption(cfg.NKeySeed)
		if err != nil {
			return nil, err
		}
		opts = append(opts, opt)
	case cfg.NKeySeedFile != "":
		opt, err := nats.NkeyOptionFromSeed(cfg.NKeySeedFile)
		if err != nil {
			return nil, fmt.Errorf("use the nkey seed file %s: %w", cfg.NKeySeedFile, err)
		}
		opts = append(opts, opt)
	case cfg.CredsFile != "":
		if _, err := os.Stat(cfg.CredsFile); err != nil {
			return nil, fmt.Errorf("use the credentials file: %w", err)
		}
		opts = append(opts, nats.UserCredentials(cfg.CredsFile))
	case cfg.User != "":
		opts = append(opts, nats.UserInfo(cfg.User, cfg.Password))
	case cfg.Token != "":
		opts = append(opts, nats.Token(cfg.Token))
	}
	if cfg.TLSCA != "" {
		if _, err := os.Stat(cfg.TLSCA); err != nil {
			return nil, fmt.Errorf("use the TLS authorities: %w", err)
		}
		opts = append(opts, nats.RootCAs(cfg.TLSCA))
	}
	if (cfg.TLSCert == "") != (cfg.TLSKey == "") {
		return nil, errors.New("a TLS client certificate needs both the certificate and the key file")
	}
	if cfg.TLSCert != "" {
		opts = append(opts, nats.ClientCert(cfg.TLSCert, cfg.TLSKey))
	}
	if cfg.TLSPin != nil {
		opts = append(opts, nats.Secure(pinned(cfg.TLSPin)))
	}
	if cfg.InProcess != nil {
		opts = append(opts, nats.InProcessServer(cfg.InProcess))
	}
	return opts, nil
}

// seedOption authenticates by a seed that is in no file.
func seedOption(seed string) (nats.Option, error) {
	kp, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, fmt.Errorf("use an nkey: %w", err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("use an nkey: %w", err)
	}
	return nats.Nkey(public, kp.Sign), nil
}

// pinned trusts one certificate alone.
func pinned(digest []byte) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Not the chain is checked but the certificate itself, below, on every handshake.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) > 0 {
				if sum := sha256.Sum256(cs.PeerCertificates[0].Raw); subtle.ConstantTimeCompare(sum[:], digest) == 1 {
					return nil
				}
			}
			return errors.New("the server's certificate is not the one that was announced")
		},
	}
}

// reconnectDelay grows from 50 ms to 2 s and is jittered, so that a fleet does
// not come back in one moment.
func reconnectDelay(attempt int) time.Duration {
	d := 2 * time.Second
	if attempt < 6 {
		d = 50 * time.Millisecond << max(attempt-1, 0)
	}
	return d/2 + rand.N(d/2+1)
}

func connectError(where string, err error) error {
	redacted := redactURLs(where)
	var dns *net.DNSError
	switch {
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired),
		errors.Is(err, nats.ErrAuthRevoked), errors.Is(err, nats.ErrNkeysNotSupported),
		errors.Is(err, nats.ErrAccountAuthExpired):
		return fmt.Errorf("%w at %s: check the credentials that this side is configured with: %w", ErrAuth, redacted, err)
	case errors.As(err, &dns):
		return fmt.Errorf("%w at %s: its name does not resolve: %w", ErrUnreachable, redacted, err)
	case errors.Is(err, nats.ErrNoServers), errors.Is(err, nats.ErrTimeout), errors.Is(err, nats.ErrNoInfoReceived):
		return fmt.Errorf("%w at %s: is a server running there? %w", ErrUnreachable, redacted, err)
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return fmt.Errorf("%w at %s: is a server running there? %w", ErrUnreachable, redacted, err)
	}
	return fmt.Errorf("connect to the bus at %s: %w", redacted, err)
}

// redactURLs takes passwords out of a list of URLs.
func redactURLs(urls string) string {
	if urls == "" {
		return "this process's own server"
	}
	parts := strings.Split(urls, ",")
	for i, p := range parts {
		if at := strings.LastIndexByte(p, '@'); at >= 0 {
			scheme, _, ok := strings.Cut(p, "://")
			if ok {
				parts[i] = scheme + "://***" + p[at:]
			} else {
				parts[i] = "***" + p[at:]
			}
		}
	}
	return strings.Join(parts, ",")
}
