// Package bus owns the embedded NATS server, for setups without a cluster of
// their own: its options, its users and their keys. It must not know what
// travels over it.
package bus

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"golang.org/x/sys/unix"
)

// Config of the embedded server.
//
// Memory: beside some 20 MiB of its own the server holds at most MaxPending of
// undelivered data for each connection; a stream of godwit keeps within its
// window (8 MiB by default) however slow the other end is, so a migration costs
// the server at most two windows. JetStream keeps its data in files.
type Config struct {
	// Listen is the address, host:port; empty means 127.0.0.1:4222, port 0
	// any free one. On a loopback address everybody on this machine may
	// connect; on any other one keys are required (see Keys).
	Listen string
	// StoreDir holds JetStream's files and the keys; it is made with mode 0700.
	StoreDir string
	// MaxPayload bounds a message, in bytes; 0 means 1 MiB.
	MaxPayload int
	// MaxPending bounds what waits for one connection, in bytes; 0 means 64 MiB.
	MaxPending int64
	// MaxStore bounds JetStream's files, in bytes; 0 means 1 GiB.
	MaxStore int64
	// TLSCert and TLSKey are PEM files; with them clients must use TLS.
	TLSCert, TLSKey string
	// RequireKeys demands keys on a loopback address, too.
	RequireKeys bool
	Logger      hclog.Logger
}

// Keys are the files with the users' secret seeds (mode 0600). Whoever has the
// operator's can command every agent, which means root on their hosts.
type Keys struct {
	Agent    string // for godwit-agent
	Operator string // for godwit
}

// Server is a running embedded server.
type Server struct {
	srv  *server.Server
	keys *Keys
	made bool
	tls  bool
	lock *os.File
	log  hclog.Logger
}

var (
	// ErrPortInUse: another program listens there.
	ErrPortInUse = errors.New("the port is in use")
	// ErrStoreInUse: another server uses the store directory.
	ErrStoreInUse = errors.New("the store directory is in use by another server")
)

const readyTimeout = 10 * time.Second

// Start starts the server and returns once it accepts connections and
// JetStream works.
func Start(cfg Config) (*Server, error) {
	log := cfg.Logger
	if log == nil {
		log = hclog.NewNullLogger()
	}
	log = log.Named("bus")
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:4222"
	}
	host, portText, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("start the bus: the address %q is not host:port: %w", cfg.Listen, err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("start the bus: the port %q is not a number from 0 to 65535", portText)
	}
	if cfg.StoreDir == "" {
		return nil, errors.New("start the bus: no store directory is configured")
	}
	if err := os.MkdirAll(cfg.StoreDir, 0o700); err != nil {
		return nil, fmt.Errorf("start the bus: make the store directory: %w", err)
	}
	lock, err := lockDir(cfg.StoreDir)
	if err != nil {
		return nil, fmt.Errorf("start the bus: %w", err)
	}
	s := &Server{log: log, lock: lock}
	defer func() {
		if err != nil {
			_ = lock.Close()
		}
	}()
	if err = s.start(cfg, host, int(port)); err != nil {
		return nil, err
	}
	log.Info("the bus is ready", "url", s.URL(), "store_dir", cfg.StoreDir, "keys_required", s.keys != nil)
	return s, nil
}

func (s *Server) start(cfg Config, host string, port int) error {
	log := s.log
	opts := &server.Options{
		ServerName:         "godwit",
		Host:               host,
		Port:               port,
		MaxPayload:         1 << 20,
		MaxPending:         64 << 20,
		WriteDeadline:      10 * time.Second,
		PingInterval:       2 * time.Second,
		MaxPingsOut:        3,
		JetStream:          true,
		StoreDir:           cfg.StoreDir,
		JetStreamMaxMemory: 16 << 20,
		JetStreamMaxStore:  1 << 30,
		// A record that was acknowledged must be there after a power loss: who
		// owns a tree hangs on it. Records are few and small.
		SyncAlways:            true,
		NoSigs:                true,
		NoLog:                 false,
		DisableShortFirstPing: true,
	}
	if port == 0 {
		opts.Port = server.RANDOM_PORT
	}
	if cfg.MaxPayload > 0 {
		opts.MaxPayload = int32(min(cfg.MaxPayload, 64<<20))
	}
	if cfg.MaxPending > 0 {
		opts.MaxPending = cfg.MaxPending
	}
	if cfg.MaxStore > 0 {
		opts.JetStreamMaxStore = cfg.MaxStore
	}
	if (cfg.TLSCert == "") != (cfg.TLSKey == "") {
		return errors.New("start the bus: TLS needs both the certificate and the key file")
	}
	if cfg.TLSCert != "" {
		tc, err := server.GenTLSConfig(&server.TLSConfigOpts{CertFile: cfg.TLSCert, KeyFile: cfg.TLSKey})
		if err != nil {
			return fmt.Errorf("start the bus: TLS: %w", err)
		}
		opts.TLSConfig = tc
		s.tls = true
	}
	if cfg.RequireKeys || !loopback(host) {
		users, keys, made, err := loadKeys(filepath.Join(cfg.StoreDir, "keys"))
		if err != nil {
			return fmt.Errorf("start the bus: %w", err)
		}
		opts.Nkeys, s.keys, s.made = users, keys, made
		if !s.tls && !loopback(host) {
			log.Warn("the bus listens on the network without TLS: what moves over it can be read there", "listen", cfg.Listen)
		}
	}
	// The server itself reports a port that it cannot have only in its log,
	// so it is tried first.
	if port != 0 {
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return listenError(cfg.Listen, err)
		}
		if err := l.Close(); err != nil {
			return listenError(cfg.Listen, err)
		}
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("start the bus on %s: %w", cfg.Listen, err)
	}
	capture := &busLog{log: log}
	srv.SetLoggerV2(capture, log.IsDebug(), false, false)
	s.srv = srv
	go srv.Start()
	if !srv.ReadyForConnections(readyTimeout) {
		srv.Shutdown()
		srv.WaitForShutdown()
		if text := capture.fatal.Load(); text != nil {
			err := fmt.Errorf("start the bus on %s: %s", cfg.Listen, *text)
			if strings.Contains(*text, "address already in use") {
				err = listenError(cfg.Listen, errors.New(*text))
			}
			return err
		}
		return fmt.Errorf("start the bus on %s: it was not ready after %s", cfg.Listen, readyTimeout)
	}
	if !srv.JetStreamEnabled() {
		srv.Shutdown()
		srv.WaitForShutdown()
		return fmt.Errorf("start the bus: JetStream did not start with the store directory %s", cfg.StoreDir)
	}
	return nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

func listenError(where string, err error) error {
	if strings.Contains(err.Error(), "address already in use") {
		return fmt.Errorf("start the bus on %s: %w: is another bus or NATS server running there? %w", where, ErrPortInUse, err)
	}
	return fmt.Errorf("start the bus on %s: %w", where, err)
}

// URL is where clients connect to.
func (s *Server) URL() string {
	addr := s.srv.Addr()
	if addr == nil {
		return ""
	}
	scheme := "nats://"
	if s.tls {
		scheme = "tls://"
	}
	return scheme + addr.String()
}

// Keys are the files of the users' keys; nil if the server demands none. made
// says that they were made by this start.
func (s *Server) Keys() (k *Keys, made bool) { return s.keys, s.made }

// Handover is a text for the operator: how agents and commands get their keys;
// empty if none are needed.
func (s *Server) Handover() string {
	if s.keys == nil {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "The bus at %s demands keys. Whoever has one can have root on the hosts of the agents: copy them only over a safe way.\n", s.URL())
	fmt.Fprintf(&b, "For each agent, copy this file to its host (mode 0600, owner root) and name it in agent.toml as the nkey file:\n  %s\n", s.keys.Agent)
	fmt.Fprintf(&b, "For whoever commands migrations, use this one with godwit:\n  %s\n", s.keys.Operator)
	return b.String()
}

// Conn is the way for this process to connect without a socket; see
// transport.Config.InProcess. With keys required it needs the operator's.
func (s *Server) Conn() nats.InProcessConnProvider { return s.srv }

// Shutdown closes all connections, flushes JetStream and returns when all of
// that is done.
func (s *Server) Shutdown() {
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
	_ = s.lock.Close() // gives the lock back
	s.log.Info("the bus has stopped")
}

// lockDir takes the store directory for this server alone: two servers on one
// directory would destroy each other's data. The lock ends with the file.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the store directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrStoreInUse, dir)
		}
		return nil, &os.PathError{Op: "flock", Path: path, Err: err}
	}
	return f, nil
}

// loadKeys reads the users' seeds in dir, or makes them.
func loadKeys(dir string) ([]*server.NkeyUser, *Keys, bool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, false, fmt.Errorf("make the directory of the keys: %w", err)
	}
	keys := &Keys{Agent: filepath.Join(dir, "agent.nk"), Operator: filepath.Join(dir, "operator.nk")}
	agent, madeA, err := loadKey(keys.Agent)
	if err != nil {
		return nil, nil, false, err
	}
	operator, madeO, err := loadKey(keys.Operator)
	if err != nil {
		return nil, nil, false, err
	}
	return []*server.NkeyUser{
		{Nkey: agent, Permissions: agentPermissions()},
		{Nkey: operator},
	}, keys, madeA || madeO, nil
}

// loadKey returns the public key that belongs to the seed in the file; a file
// that is not there is made.
func loadKey(path string) (public string, made bool, err error) {
	seed, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		made = true
		kp, err := nkeys.CreateUser()
		if err != nil {
			return "", false, fmt.Errorf("make the key %s: %w", path, err)
		}
		if seed, err = kp.Seed(); err != nil {
			return "", false, fmt.Errorf("make the key %s: %w", path, err)
		}
		if err := writeNew(path, append(seed, '\n')); err != nil {
			return "", false, fmt.Errorf("make the key: %w", err)
		}
	} else if err != nil {
		return "", false, fmt.Errorf("read the key: %w", err)
	} else if fi, err := os.Stat(path); err == nil && fi.Mode().Perm()&0o077 != 0 {
		return "", false, fmt.Errorf("read the key %s: its mode is %04o, so others could read it: chmod 600 it, or delete it for a new one", path, fi.Mode().Perm())
	}
	kp, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(seed))))
	if err != nil {
		return "", false, fmt.Errorf("read the key %s: it is not an nkey seed: %w", path, err)
	}
	defer kp.Wipe()
	public, err = kp.PublicKey()
	if err != nil {
		return "", false, fmt.Errorf("read the key %s: %w", path, err)
	}
	return public, made, nil
}

// writeNew writes a file that must not exist, synced, so that a crash leaves
// no empty key behind under its name.
func writeNew(path string, data []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".key-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	// Unlike a rename, a link does not replace a key that another start made.
	if err = os.Link(tmp.Name(), path); err != nil {
		return err
	}
	return os.Remove(tmp.Name())
}

// agentPermissions lets an agent answer calls, stream, report progress and
// work with records, but call no other agent and manage nothing else.
func agentPermissions() *server.Permissions {
	const bucket = "KV_godwit-migrations"
	return &server.Permissions{
		Publish: &server.SubjectPermission{Allow: []string{
			"_INBOX.>",
			"godwit.v1.stream.>",
			"godwit.v1.relay.>",
			"godwit.v1.pages.>",
			"godwit.v1.progress.>",
			"$SRV.INFO.godwit-agent",
			"$KV.godwit-migrations.>",
			"$JS.API.INFO",
			"$JS.API.STREAM.INFO." + bucket,
			"$JS.API.STREAM.CREATE." + bucket,
			"$JS.API.STREAM.MSG.GET." + bucket,
			"$JS.API.DIRECT.GET." + bucket,
			"$JS.API.DIRECT.GET." + bucket + ".>",
			"$JS.API.CONSUMER.CREATE." + bucket + ".>",
			"$JS.API.CONSUMER.INFO." + bucket + ".>",
			"$JS.API.CONSUMER.DELETE." + bucket + ".>",
			"$JS.API.CONSUMER.MSG.NEXT." + bucket + ".>",
			"$JS.ACK." + bucket + ".>",
			"$JS.FC." + bucket + ".>",
		}},
		Subscribe: &server.SubjectPermission{Allow: []string{
			"_INBOX.>",
			"godwit.v1.agent.>",
			"godwit.v1.stream.>",
			"godwit.v1.relay.>",
			"godwit.v1.pages.>",
			"$SRV.>",
		}},
	}
}

// busLog hands the server's messages on; what it calls a notice is detail here.
type busLog struct {
	log   hclog.Logger
	fatal atomic.Pointer[string]
}

func (l *busLog) Noticef(format string, v ...any) { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l *busLog) Warnf(format string, v ...any)   { l.log.Warn(fmt.Sprintf(format, v...)) }
func (l *busLog) Errorf(format string, v ...any)  { l.log.Error(fmt.Sprintf(format, v...)) }
func (l *busLog) Debugf(format string, v ...any)  { l.log.Trace(fmt.Sprintf(format, v...)) }
func (l *busLog) Tracef(format string, v ...any)  { l.log.Trace(fmt.Sprintf(format, v...)) }

// Fatalf remembers the reason for Start; the server itself stops nothing after it.
func (l *busLog) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.fatal.CompareAndSwap(nil, &text)
	l.log.Error(text)
}
