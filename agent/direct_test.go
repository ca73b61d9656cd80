package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"godwit/wire"
)

// gate lets connections through to an address until it is shut.
type gate struct {
	l     net.Listener
	to    string
	mu    sync.Mutex
	conns []net.Conn
	count int // bytes that came from there
}

func newGate(t *testing.T, to string) *gate {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	noErr(t, err)
	g := &gate{l: l, to: to}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			g.mu.Lock()
			g.conns = append(g.conns, c, far)
			g.mu.Unlock()
			go func() { _, _ = io.Copy(far, c); _ = far.Close() }()
			go func() { _, _ = io.Copy(counting{c, g}, far); _ = c.Close() }()
		}
	}()
	t.Cleanup(g.shut)
	return g
}

type counting struct {
	net.Conn
	g *gate
}

func (c counting) Write(p []byte) (int, error) {
	c.g.mu.Lock()
	c.g.count += len(p)
	c.g.mu.Unlock()
	return c.Conn.Write(p)
}

func (g *gate) bytes() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count
}

// shut ends all connections for good.
func (g *gate) shut() {
	_ = g.l.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		_ = c.Close()
	}
}

// directRig is a rig whose agents offer a direct lane, at a gate that leads to alpha's.
func directRig(t *testing.T) (*rig, *gate) {
	t.Helper()
	var own *Direct
	r := newRig(t, func(c *Config) {
		d := NewDirect(DirectConfig{Listen: "127.0.0.1:0", Control: c.Streams.Control, Logger: c.Logger})
		t.Cleanup(d.Close)
		c.Streams.Direct = d
		if c.Host == "alpha" {
			own = d
		}
	})
	g := newGate(t, fmt.Sprintf("127.0.0.1:%d", own.srv.Port()))
	own.advertise = []string{g.l.Addr().String()}
	return r, g
}

// TestDirectLane: the stream takes the direct lane, over the cluster if that cannot be
// reached, and goes on over the cluster if it is lost on the way.
func TestDirectLane(t *testing.T) {
	r, g := directRig(t)
	const memory = 6 << 20
	where := g.l.Addr().String()
	for _, tc := range []struct {
		name    string
		options *wire.MigrateOptions
		before  func()
		during  func()
		lane    string
		least   int // bytes that must have gone directly
		most    int
	}{
		{name: "direct", options: &wire.MigrateOptions{Compression: wire.Compression_COMPRESSION_NONE}, lane: "direct " + where, least: memory, most: memory * 3 / 2},
		{name: "only direct", options: &wire.MigrateOptions{Lane: wire.LaneChoice_LANE_CHOICE_DIRECT, Compression: wire.Compression_COMPRESSION_S2}, lane: "direct " + where, most: memory * 3 / 2},
		{name: "cluster", options: &wire.MigrateOptions{Lane: wire.LaneChoice_LANE_CHOICE_CLUSTER}, lane: "cluster"},
		{name: "cut", options: &wire.MigrateOptions{Compression: wire.Compression_COMPRESSION_NONE}, during: g.shut, lane: "direct " + where + ", then cluster (the direct connections were lost)", least: memory / 4, most: memory * 3 / 4},
		{name: "refused", lane: "cluster (direct: " + where + ": connection refused)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r.fresh(t)
			r.options = tc.options
			before := g.bytes()
			if tc.during != nil {
				// Half has been sent: what is on the way gets lost.
				r.w.on("dump-data", func(context.Context) error { tc.during(); return nil })
			}
			id := r.begin()
			rec := r.finished(id)
			if rec.State != wire.State_STATE_COMPLETED {
				t.Fatalf("it is %s: %s", rec.State.Word(), rec.Reason)
			}
			r.check("destination")
			rep := rec.SourceReport
			if rep.Lane != tc.lane {
				t.Errorf("lane %q, want %q", rep.Lane, tc.lane)
			}
			if n := g.bytes() - before; n < tc.least || n > tc.most {
				t.Errorf("%d bytes went directly, want %d to %d", n, tc.least, tc.most)
			}
			// A window and what was being sent is the most that may be lost.
			if rep.ResentBytes > 3<<20/2 {
				t.Errorf("%d bytes were sent again", rep.ResentBytes)
			}
			if rep.StreamBytes < memory {
				t.Errorf("%d bytes of the stream, the memory alone has %d", rep.StreamBytes, memory)
			}
			if seed := r.src.cfg.Streams.Direct; len(seed.offers) != 0 {
				t.Errorf("%d offers outlive their migrations", len(seed.offers))
			}
		})
	}
	t.Run("only direct, refused", func(t *testing.T) {
		r.fresh(t)
		r.options = &wire.MigrateOptions{Lane: wire.LaneChoice_LANE_CHOICE_DIRECT}
		_, err := r.prepare(r.create())
		if wire.CodeOf(err) != wire.Code_CODE_REFUSED || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("%v, want a refusal that says why", err)
		}
		r.check("source")
	})
}

// TestDirectLost: a stream that may go nowhere else ends, and the tree runs on.
func TestDirectLost(t *testing.T) {
	r, g := directRig(t)
	r.src.cfg.Streams.IdleTimeout = time.Second
	r.options = &wire.MigrateOptions{Lane: wire.LaneChoice_LANE_CHOICE_DIRECT}
	r.w.on("dump-data", func(context.Context) error { g.shut(); return nil })
	rec := r.finished(r.begin())
	if rec.State != wire.State_STATE_ABORTED || !strings.Contains(rec.Reason, "direct connections") {
		t.Errorf("it is %s: %s", rec.State.Word(), rec.Reason)
	}
	r.check("source")
}

// TestReach: what is not the source's own server is not taken for it.
func TestReach(t *testing.T) {
	r, g := directRig(t)
	offer := r.src.cfg.Streams.Direct.offer("one")
	other := r.dst.cfg.Streams.Direct.offer("two")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	noErr(t, err)
	defer func() { _ = silent.Close() }()
	with := func(edit func(*wire.DirectOffer)) *wire.DirectOffer {
		o := &wire.DirectOffer{Addresses: offer.Addresses, Server: offer.Server, Seed: offer.Seed, Certificate: offer.Certificate}
		edit(o)
		return o
	}
	where := g.l.Addr().String()
	for _, tc := range []struct {
		name  string
		offer *wire.DirectOffer
		want  string
	}{
		{"good", offer, "direct " + where},
		{"second", with(func(o *wire.DirectOffer) { o.Addresses = []string{"127.0.0.1:1", where} }), "direct " + where},
		{"another server", with(func(o *wire.DirectOffer) { o.Addresses, o.Seed = other.Addresses, other.Seed }), "another server answers there"},
		{"another key", with(func(o *wire.DirectOffer) { o.Seed = other.Seed }), "refused the credentials"},
		{"no key", with(func(o *wire.DirectOffer) { o.Seed = "" }), "refused the credentials"},
		{"no offer", nil, "does not know of it"},
		{"nothing", &wire.DirectOffer{}, "makes no sense"},
		{"a reason", &wire.DirectOffer{Reason: "the port is in use"}, "the port is in use"},
		{"no TLS there", with(func(o *wire.DirectOffer) { o.Certificate = make([]byte, 32) }), "cluster (direct: "},
		{"silent", with(func(o *wire.DirectOffer) { o.Addresses = []string{silent.Addr().String()} }), "no answer within"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			begin := time.Now()
			got := r.dst.reach(t.Context(), tc.offer, wire.LaneChoice_LANE_CHOICE_AUTO).Text()
			if !strings.Contains(got, tc.want) {
				t.Errorf("%q, want something about %q", got, tc.want)
			}
			if took := time.Since(begin); took > 5*directPatience {
				t.Errorf("it took %s", took)
			}
		})
	}
}
