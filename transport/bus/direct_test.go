package bus_test

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"godwit/transport"
	"godwit/transport/bus"
)

// TestDirectServer: only the key of a stream opens the server, and only that stream's
// subjects, by the network and in this process, with and without TLS.
func TestDirectServer(t *testing.T) {
	for _, tls := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls %v", tls), func(t *testing.T) {
			d, err := bus.StartDirect(bus.DirectConfig{Listen: "127.0.0.1:0", TLS: tls})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Shutdown()
			seed, err := d.Admit("godwit.v1.stream.one")
			if err != nil {
				t.Fatal(err)
			}
			other, err := d.Admit("godwit.v1.stream.two")
			if err != nil {
				t.Fatal(err)
			}
			cfg := transport.Config{URLs: []string{fmt.Sprintf("nats://127.0.0.1:%d", d.Port())}, NKeySeed: seed, TLSPin: d.Certificate()}
			far, err := transport.Connect(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			if got := far.ConnectedServerName(); got != d.Name() {
				t.Errorf("the server is %q, want %q", got, d.Name())
			}
			if _, err := far.TLSConnectionState(); (err == nil) != tls {
				t.Errorf("TLS: %v", err)
			}
			near, err := transport.Connect(transport.Config{InProcess: d.Conn(), NKeySeed: seed})
			if err != nil {
				t.Fatal(err)
			}
			defer near.Close()
			stranger := cfg
			stranger.NKeySeed = other
			third, err := transport.Connect(stranger)
			if err != nil {
				t.Fatal(err)
			}
			defer third.Close()

			got := make(chan *nats.Msg, 10)
			for _, nc := range []*nats.Conn{far, third} {
				if _, err := nc.ChanSubscribe("godwit.v1.stream.one.lane0", got); err != nil {
					t.Fatal(err)
				}
				if err := nc.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			if err := near.Publish("godwit.v1.stream.one.lane0", []byte("page")); err != nil {
				t.Fatal(err)
			}
			if err := third.Publish("godwit.v1.stream.one.lane0", []byte("forged")); err != nil {
				t.Fatal(err)
			}
			_ = third.Flush()
			_ = near.Flush()
			m := <-got
			if m.Sub == nil || string(m.Data) != "page" {
				t.Errorf("%q arrived", m.Data)
			}
			select {
			case m := <-got:
				t.Errorf("%q arrived, too", m.Data)
			case <-time.After(100 * time.Millisecond):
			}

			for name, bad := range map[string]func(*transport.Config){
				"no key":      func(c *transport.Config) { c.NKeySeed = "" },
				"another key": func(c *transport.Config) { c.NKeySeed = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY" },
				"password":    func(c *transport.Config) { c.NKeySeed, c.User, c.Password = "", "one", "one" },
			} {
				c := cfg
				bad(&c)
				if nc, err := transport.Connect(c); !errors.Is(err, transport.ErrAuth) {
					if nc != nil {
						nc.Close()
					}
					t.Errorf("%s: %v, want %v", name, err, transport.ErrAuth)
				}
			}
			if tls {
				c := cfg
				c.TLSPin = make([]byte, 32)
				if nc, err := transport.Connect(c); err == nil {
					nc.Close()
					t.Error("another certificate was taken")
				}
			}

			d.Revoke("godwit.v1.stream.one")
			for end := time.Now().Add(5 * time.Second); far.IsConnected(); time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("a connection outlives its key")
				}
			}
			if nc, err := transport.Connect(cfg); !errors.Is(err, transport.ErrAuth) {
				if nc != nil {
					nc.Close()
				}
				t.Errorf("a revoked key: %v, want %v", err, transport.ErrAuth)
			}
		})
	}
}

func TestDirectPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if d, err := bus.StartDirect(bus.DirectConfig{Listen: l.Addr().String()}); !errors.Is(err, bus.ErrPortInUse) {
		if d != nil {
			d.Shutdown()
		}
		t.Errorf("%v, want %v", err, bus.ErrPortInUse)
	}
}
