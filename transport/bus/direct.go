package bus

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Direct is a server in this process for the streams that begin here: core NATS
// alone, without any storage. Whoever connects needs the key of one stream, made for
// it and forgotten after it, and may do nothing but send and receive on that
// stream's subjects.
type Direct struct {
	srv         *server.Server
	certificate []byte
	keys        *directKeys
}

// DirectConfig of a direct server.
type DirectConfig struct {
	// Listen is host:port; port 0 is any free one.
	Listen string
	// TLS has clients that are not in this process use TLS, with a certificate that
	// is made for this server; see Direct.Certificate.
	TLS    bool
	Logger hclog.Logger
}

// directConns bounds the connections of a direct server.
const directConns = 512

// StartDirect starts a direct server and returns once it accepts connections.
// Errors wrap ErrPortInUse if another program has the port.
func StartDirect(cfg DirectConfig) (*Direct, error) {
	log := cfg.Logger
	if log == nil {
		log = hclog.NewNullLogger()
	}
	host, portText, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("start the direct lane: the address %q is not host:port: %w", cfg.Listen, err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("start the direct lane: the port %q is not a number from 0 to 65535", portText)
	}
	d := &Direct{keys: &directKeys{bySubject: map[string]*directKey{}, byKey: map[string]*directKey{}}}
	opts := &server.Options{
		ServerName: "godwit-direct-" + rand.Text(), Host: host, Port: int(port),
		MaxPayload: 1 << 20, MaxPending: 64 << 20, MaxConn: directConns, WriteDeadline: 10 * time.Second,
		PingInterval: 2 * time.Second, MaxPingsOut: 3, DisableShortFirstPing: true,
		NoSigs: true, NoSystemAccount: true, AlwaysEnableNonce: true, CustomClientAuthentication: d.keys,
	}
	if port == 0 {
		opts.Port = server.RANDOM_PORT
	}
	if cfg.TLS {
		cert, err := ownCertificate(opts.ServerName)
		if err != nil {
			return nil, fmt.Errorf("start the direct lane: %w", err)
		}
		sum := sha256.Sum256(cert.Certificate[0])
		d.certificate = sum[:]
		opts.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
		opts.TLSTimeout = 5
	}
	if port != 0 { // the server itself reports this only in its log
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return nil, directError(cfg.Listen, err)
		}
		if err := l.Close(); err != nil {
			return nil, directError(cfg.Listen, err)
		}
	}
	if d.srv, err = server.NewServer(opts); err != nil {
		return nil, directError(cfg.Listen, err)
	}
	capture := &busLog{log: log.Named("direct")}
	d.srv.SetLoggerV2(capture, false, false, false)
	d.keys.drop = func(id uint64) { _ = d.srv.DisconnectClientByID(id) } // it may have left
	go d.srv.Start()
	if !d.srv.ReadyForConnections(readyTimeout) {
		d.Shutdown()
		if text := capture.fatal.Load(); text != nil {
			return nil, directError(cfg.Listen, errors.New(*text))
		}
		return nil, directError(cfg.Listen, fmt.Errorf("it was not ready after %s", readyTimeout))
	}
	return d, nil
}

func directError(where string, err error) error {
	return fmt.Errorf("start the direct lane: %w", listenError(where, err))
}

// ownCertificate makes a certificate that nobody has signed: clients are told its
// digest, and that is what they check.
func ownCertificate(name string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().AddDate(20, 0, 0), // as long as the process
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &x509.Certificate{Subject: pkix.Name{CommonName: name}}, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Name is what the server calls itself: a random one.
func (d *Direct) Name() string { return d.srv.Name() }

// Port that it listens on.
func (d *Direct) Port() int {
	if a, ok := d.srv.Addr().(*net.TCPAddr); ok {
		return a.Port
	}
	return 0
}

// Certificate is the SHA-256 of its certificate; nil: it speaks no TLS.
func (d *Direct) Certificate() []byte { return d.certificate }

// Conn is the way for this process to connect; see transport.Config.InProcess.
func (d *Direct) Conn() nats.InProcessConnProvider { return d.srv }

// Admit returns the seed of the key for the stream on subject and below it. As long as it is
// not revoked it is the same.
func (d *Direct) Admit(subject string) (seed string, err error) { return d.keys.admit(subject) }

// Revoke makes the key of a stream worthless and ends its connections.
func (d *Direct) Revoke(subject string) { d.keys.revoke(subject) }

// Shutdown ends it with all connections.
func (d *Direct) Shutdown() {
	d.srv.Shutdown()
	d.srv.WaitForShutdown()
}

// directKeys says who may connect.
type directKeys struct {
	drop func(id uint64)

	mu        sync.Mutex
	bySubject map[string]*directKey
	byKey     map[string]*directKey // public
}

// directKey is good for one stream.
type directKey struct {
	subject, seed, public string
	conns                 []uint64 // that used it
}

func (k *directKeys) admit(subject string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := k.bySubject[subject]; old != nil {
		return old.seed, nil
	}
	kp, err := nkeys.CreateUser()
	if err != nil {
		return "", fmt.Errorf("make a key for a stream: %w", err)
	}
	defer kp.Wipe()
	seed, err := kp.Seed()
	if err != nil {
		return "", fmt.Errorf("make a key for a stream: %w", err)
	}
	public, err := kp.PublicKey()
	if err != nil {
		return "", fmt.Errorf("make a key for a stream: %w", err)
	}
	key := &directKey{subject: subject, seed: string(seed), public: public}
	k.bySubject[subject], k.byKey[public] = key, key
	return key.seed, nil
}

func (k *directKeys) revoke(subject string) {
	k.mu.Lock()
	key := k.bySubject[subject]
	if key == nil {
		k.mu.Unlock()
		return
	}
	delete(k.bySubject, subject)
	delete(k.byKey, key.public)
	conns := slices.Clone(key.conns)
	k.mu.Unlock()
	for _, id := range conns {
		k.drop(id)
	}
}

// Check implements server.Authentication: whoever connects has signed the server's nonce
// with the key of a stream, and gets what belongs to that.
func (k *directKeys) Check(c server.ClientAuthentication) bool {
	o := c.GetOpts()
	k.mu.Lock()
	defer k.mu.Unlock()
	key := k.byKey[o.Nkey]
	if key == nil || len(c.GetNonce()) == 0 {
		return false
	}
	sig, err := base64.RawURLEncoding.DecodeString(o.Sig)
	if err != nil {
		return false
	}
	pub, err := nkeys.FromPublicKey(key.public)
	if err != nil || pub.Verify(c.GetNonce(), sig) != nil {
		return false
	}
	all := &server.SubjectPermission{Allow: []string{key.subject + ".>"}}
	c.RegisterUser(&server.User{Username: key.public, Permissions: &server.Permissions{Publish: all, Subscribe: all}})
	key.conns = append(key.conns, c.GetID())
	return true
}
