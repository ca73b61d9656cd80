package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/transport"
	"godwit/transport/bus"
	"godwit/wire"
)

const (
	// directPatience is how long a destination tries to reach a source directly.
	directPatience = time.Second
	// offerLasts is how long an offer holds that no migration makes use of: more than
	// any preflight takes.
	offerLasts = 30 * time.Minute
	// mostAddresses bounds the addresses of an offer.
	mostAddresses = 8
)

// Direct is this host's server for the streams of trees that leave it: one hop
// less than by the cluster. Each migration gets a key of its own, which is sent to the
// destination in control messages, is good for that stream alone and ends with it.
type Direct struct {
	srv       *bus.Direct
	why       string // there is no server
	listen    netip.Addr
	advertise []string
	control   *nats.Conn
	log       hclog.Logger

	mu     sync.Mutex
	offers map[string]*offer // by migration
}

// offer is what one migration may use.
type offer struct {
	subject string
	asked   time.Time
	used    bool // by a stream: it ends with that
}

// DirectConfig says what is offered.
type DirectConfig struct {
	Listen    string   // host:port
	Advertise []string // host or host:port, in place of this host's addresses
	Control   *nats.Conn
	Logger    hclog.Logger
}

// NewDirect starts the server. If that fails the agent works without, and
// says so to whoever asks.
func NewDirect(cfg DirectConfig) *Direct {
	d := &Direct{advertise: cfg.Advertise, control: cfg.Control, log: cfg.Logger, offers: map[string]*offer{}}
	if d.log == nil {
		d.log = hclog.NewNullLogger()
	}
	host, _, err := net.SplitHostPort(cfg.Listen)
	if err == nil {
		d.listen, _ = netip.ParseAddr(host) // of a name only what it listens on is known
		d.srv, err = bus.StartDirect(bus.DirectConfig{Listen: cfg.Listen, TLS: encrypted(cfg.Control), Logger: d.log})
	}
	if err != nil {
		d.why = err.Error()
		d.log.Warn("streams of trees that leave this host go over the cluster", "error", err)
		return d
	}
	d.log.Info("streams of trees that leave this host may be fetched directly", "port", d.srv.Port(), "addresses", strings.Join(d.addresses(), ","), "tls", d.srv.Certificate() != nil)
	return d
}

// encrypted says whether a connection is.
func encrypted(nc *nats.Conn) bool {
	_, err := nc.TLSConnectionState()
	return err == nil
}

// Close ends the server.
func (d *Direct) Close() {
	if d != nil && d.srv != nil {
		d.srv.Shutdown()
	}
}

// offer says how the stream of a migration can be fetched here. Asked again, it is
// the same.
func (d *Direct) offer(id string) *wire.DirectOffer {
	switch {
	case d == nil:
		return &wire.DirectOffer{Reason: "it is switched off there"}
	case d.srv == nil:
		return &wire.DirectOffer{Reason: d.why}
	case encrypted(d.control) && d.srv.Certificate() == nil:
		return &wire.DirectOffer{Reason: "the cluster's connection is encrypted by now, and the direct one would not be"}
	}
	addresses := d.addresses()
	if len(addresses) == 0 {
		return &wire.DirectOffer{Reason: "the host has no address that others could reach"}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for other, o := range d.offers {
		if !o.used && time.Since(o.asked) > offerLasts {
			d.srv.Revoke(o.subject)
			delete(d.offers, other)
		}
	}
	subject := transport.StreamSubject(id)
	seed, err := d.srv.Admit(subject)
	if err != nil {
		return &wire.DirectOffer{Reason: err.Error()}
	}
	o := d.offers[id]
	if o == nil {
		o = &offer{subject: subject}
		d.offers[id] = o
	}
	o.asked = time.Now()
	return &wire.DirectOffer{Addresses: addresses, Server: d.srv.Name(), Seed: seed, Certificate: d.srv.Certificate()}
}

// use makes the connections of the sending end, in this process. An error means that
// nothing of the kind was offered, or is no longer.
func (d *Direct) use(id string, lanes int) ([]*nats.Conn, error) {
	if d == nil || d.srv == nil {
		return nil, errors.New("this agent offers no direct lane")
	}
	d.mu.Lock()
	o := d.offers[id]
	if o == nil {
		d.mu.Unlock()
		return nil, errors.New("the offer has ended")
	}
	o.used = true
	seed, err := d.srv.Admit(o.subject)
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	conns, err := connectLanes(transport.Config{InProcess: d.srv.Conn(), NKeySeed: seed, Logger: d.log}, "stream "+id, lanes)
	if err != nil {
		d.end(id)
	}
	return conns, err
}

// end takes back what was offered to a migration.
func (d *Direct) end(id string) {
	if d == nil || d.srv == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if o := d.offers[id]; o != nil {
		d.srv.Revoke(o.subject)
		delete(d.offers, id)
	}
}

// connectLanes makes the connections of a stream.
func connectLanes(cfg transport.Config, name string, lanes int) ([]*nats.Conn, error) {
	var conns []*nats.Conn
	for k := range lanes {
		cfg.Name = fmt.Sprintf("%s lane %d", name, k)
		nc, err := transport.Connect(cfg)
		if err != nil {
			for _, nc := range conns {
				nc.Close()
			}
			return nil, err
		}
		conns = append(conns, nc)
	}
	return conns, nil
}

// addresses are where others may reach the server, the likeliest first.
func (d *Direct) addresses() []string {
	port := strconv.Itoa(d.srv.Port())
	if len(d.advertise) > 0 {
		var out []string
		for _, a := range d.advertise {
			if _, _, err := net.SplitHostPort(a); err != nil {
				a = net.JoinHostPort(a, port)
			}
			out = append(out, a)
		}
		return out
	}
	var hosts []netip.Addr
	add := func(a netip.Addr) {
		a = a.Unmap().WithZone("")
		if (d.listen.IsUnspecified() || !d.listen.IsValid() || d.listen == a) && !slices.Contains(hosts, a) && (!d.listen.Is4() || a.Is4()) {
			hosts = append(hosts, a)
		}
	}
	if d.listen.IsValid() && !d.listen.IsUnspecified() {
		add(d.listen)
	} else {
		// The one by which the cluster is reached leads to other hosts.
		if own, err := netip.ParseAddrPort(d.control.LocalAddr()); err == nil && reachable(own.Addr()) {
			add(own.Addr())
		}
		all, err := net.InterfaceAddrs()
		if err != nil {
			d.log.Debug("the addresses of this host cannot be listed", "error", err)
		}
		for _, a := range all {
			if n, ok := a.(*net.IPNet); ok {
				if a, ok := netip.AddrFromSlice(n.IP); ok && reachable(a.Unmap()) {
					add(a)
				}
			}
		}
	}
	var out []string
	for _, a := range hosts[:min(len(hosts), mostAddresses)] {
		out = append(out, net.JoinHostPort(a.String(), port))
	}
	return out
}

func reachable(a netip.Addr) bool { return a.IsGlobalUnicast() }

// reach tries what a source offers and says what its stream will travel over.
func (a *Agent) reach(ctx context.Context, o *wire.DirectOffer, choice wire.LaneChoice) *wire.Lane {
	cluster := func(format string, args ...any) *wire.Lane {
		return &wire.Lane{Reason: fmt.Sprintf(format, args...)}
	}
	switch {
	case choice == wire.LaneChoice_LANE_CHOICE_CLUSTER:
		return &wire.Lane{}
	case o == nil:
		return cluster("the source's agent does not know of it")
	case o.Reason != "":
		return cluster("%s", o.Reason)
	case len(o.Addresses) == 0 || len(o.Certificate) != 0 && len(o.Certificate) != 32:
		return cluster("the source's offer makes no sense")
	case len(o.Certificate) == 0 && encrypted(a.cfg.Streams.Control):
		return cluster("the cluster's connection is encrypted, and the direct one would not be")
	}
	ctx, cancel := context.WithTimeout(ctx, directPatience)
	defer cancel()
	addresses := o.Addresses[:min(len(o.Addresses), mostAddresses)]
	failed := make([]error, len(addresses))
	var wg sync.WaitGroup
	for i, address := range addresses {
		wg.Go(func() { failed[i] = a.knock(ctx, o, address) })
	}
	wg.Wait()
	var reasons []string
	for i, err := range failed {
		if err == nil {
			return &wire.Lane{Direct: true, Address: addresses[i]}
		}
		reasons = append(reasons, fmt.Sprintf("%s: %s", addresses[i], brief(err)))
	}
	if len(reasons) > 3 {
		reasons = append(reasons[:3], fmt.Sprintf("and %d more", len(reasons)-3))
	}
	return cluster("%s", strings.Join(reasons, "; "))
}

// knock sees whether the server that was offered answers at an address.
func (a *Agent) knock(ctx context.Context, o *wire.DirectOffer, address string) error {
	// A plain connection tells more of what is in the way.
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	_ = c.Close()
	cfg := directConfig(o, address)
	if end, ok := ctx.Deadline(); ok {
		cfg.Timeout = max(time.Until(end), time.Millisecond)
	}
	cfg.Name = "godwit-agent " + a.cfg.Host + " looks"
	nc, err := transport.Connect(cfg)
	if err != nil {
		return err
	}
	defer nc.Close()
	if nc.ConnectedServerName() != o.Server {
		return errors.New("another server answers there")
	}
	return nil
}

func directConfig(o *wire.DirectOffer, address string) transport.Config {
	cfg := transport.Config{URLs: []string{"nats://" + address}, NKeySeed: o.Seed}
	if len(o.Certificate) > 0 {
		cfg.TLSPin = o.Certificate
	}
	return cfg
}

// brief is why something could not be reached, in a few words.
func brief(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Sprintf("no answer within %s", directPatience)
	}
	return err.Error()
}

// directly is a refusal if only a direct lane will do and there is none.
func directly(choice wire.LaneChoice, lane *wire.Lane) error {
	if choice != wire.LaneChoice_LANE_CHOICE_DIRECT || lane.GetDirect() {
		return nil
	}
	reason := lane.GetReason()
	if reason == "" {
		reason = "the destination's agent does not know of it"
	}
	return wire.Errorf(wire.Code_CODE_REFUSED, "the stream cannot travel directly, as --lane direct asks, nothing was touched: %s", reason)
}

// codecsOf are those of a list that this build knows, too.
func codecsOf(names []string) []wire.Codec {
	var out []wire.Codec
	for _, c := range []wire.Codec{wire.CodecS2, wire.CodecZstd} {
		if slices.Contains(names, c.String()) {
			out = append(out, c)
		}
	}
	return out
}

// compression is what a request asks for, of what the destination knows.
func compression(c wire.Compression, known []string) (transport.Compression, error) {
	one := map[wire.Compression]wire.Codec{
		wire.Compression_COMPRESSION_NONE: wire.CodecNone, wire.Compression_COMPRESSION_S2: wire.CodecS2, wire.Compression_COMPRESSION_ZSTD: wire.CodecZstd,
	}
	if c == wire.Compression_COMPRESSION_AUTO {
		return transport.Compression{Auto: true, Codecs: codecsOf(known)}, nil
	}
	codec, ok := one[c]
	if !ok {
		return transport.Compression{}, invalid("the request asks for compression %d, which this agent does not know", c)
	}
	if codec != wire.CodecNone && !slices.Contains(codecsOf(known), codec) {
		return transport.Compression{}, wire.Errorf(wire.Code_CODE_REFUSED, "the destination's agent does not know the compression %s, nothing was touched", codec)
	}
	return transport.Compression{Codec: codec}, nil
}
