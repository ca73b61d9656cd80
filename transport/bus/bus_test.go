package bus_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"godwit/transport"
	"godwit/transport/bus"
	"godwit/wire"
)

func start(t *testing.T, cfg bus.Config) *bus.Server {
	t.Helper()
	if cfg.StoreDir == "" {
		cfg.StoreDir = t.TempDir()
	}
	b, err := bus.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Shutdown)
	return b
}

func TestStartErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	running := t.TempDir()
	start(t, bus.Config{Listen: "127.0.0.1:0", StoreDir: running})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	openKeys := t.TempDir()
	if err := os.Mkdir(filepath.Join(openKeys, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(openKeys, "keys", "agent.nk"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		cfg  bus.Config
		is   error
		text string
	}{
		{"port in use", bus.Config{Listen: l.Addr().String(), StoreDir: t.TempDir()}, bus.ErrPortInUse, l.Addr().String()},
		{"store in use", bus.Config{Listen: "127.0.0.1:0", StoreDir: running}, bus.ErrStoreInUse, running},
		{"store is a file", bus.Config{Listen: "127.0.0.1:0", StoreDir: file}, nil, file},
		{"no store", bus.Config{Listen: "127.0.0.1:0"}, nil, "no store directory"},
		{"no port", bus.Config{Listen: "127.0.0.1", StoreDir: t.TempDir()}, nil, "not host:port"},
		{"port is a word", bus.Config{Listen: "127.0.0.1:nats", StoreDir: t.TempDir()}, nil, "not a number"},
		{"address of another machine", bus.Config{Listen: "192.0.2.1:4222", StoreDir: t.TempDir()}, nil, "192.0.2.1"},
		{"key that others can read", bus.Config{Listen: "127.0.0.1:0", StoreDir: openKeys, RequireKeys: true}, nil, "others could read it"},
		{"half of TLS", bus.Config{Listen: "127.0.0.1:0", StoreDir: t.TempDir(), TLSCert: "x"}, nil, "both"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			b, err := bus.Start(tc.cfg)
			if err == nil {
				b.Shutdown()
			}
			if err == nil || !strings.Contains(err.Error(), tc.text) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v, want %v with %q", err, tc.is, tc.text)
			}
		})
	}
}

// A failed start gives the store directory back.
func TestStartAgain(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := bus.Start(bus.Config{Listen: l.Addr().String(), StoreDir: dir}); !errors.Is(err, bus.ErrPortInUse) {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := bus.Start(bus.Config{Listen: l.Addr().String(), StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	b.Shutdown()
}

func TestLoopbackIsFree(t *testing.T) {
	b := start(t, bus.Config{Listen: "localhost:0"})
	nc, err := transport.Connect(transport.Config{URLs: []string{b.URL()}})
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	if k, _ := b.Keys(); k != nil || b.Handover() != "" {
		t.Errorf("keys %v on loopback", k)
	}
}

func TestNetworkNeedsKeys(t *testing.T) {
	dir := t.TempDir()
	b, err := bus.Start(bus.Config{Listen: "0.0.0.0:0", StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(b.URL(), "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	url := "nats://127.0.0.1:" + port
	if _, err := transport.Connect(transport.Config{URLs: []string{url}}); !errors.Is(err, transport.ErrAuth) {
		t.Errorf("without a key: %v", err)
	}
	keys, made := b.Keys()
	if keys == nil || !made {
		t.Fatalf("keys %v, made %t", keys, made)
	}
	for _, path := range []string{keys.Agent, keys.Operator} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o", path, fi.Mode().Perm())
		}
		if !strings.Contains(b.Handover(), path) {
			t.Errorf("the handover does not name %s", path)
		}
	}
	before, err := os.ReadFile(keys.Agent)
	if err != nil {
		t.Fatal(err)
	}
	b.Shutdown()
	b = start(t, bus.Config{Listen: "0.0.0.0:" + port, StoreDir: dir})
	if _, made := b.Keys(); made {
		t.Error("the keys were made a second time")
	}
	if after, err := os.ReadFile(keys.Agent); err != nil || string(after) != string(before) {
		t.Errorf("the agent's key changed: %v", err)
	}
}

// With its key an agent can do all that it has to, and command nobody.
func TestAgentPermissions(t *testing.T) {
	b := start(t, bus.Config{Listen: "127.0.0.1:0", RequireKeys: true})
	keys, _ := b.Keys()
	conn := func(key string) *nats.Conn {
		t.Helper()
		nc, err := transport.Connect(transport.Config{URLs: []string{b.URL()}, NKeySeedFile: key})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	agent, operator := conn(keys.Agent), conn(keys.Operator)
	svc, err := transport.Serve(agent, transport.ServiceConfig{Info: &wire.AgentInfo{Host: "alpha"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = svc.Stop() }()
	if err := transport.Handle(svc, "ps", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) { return &wire.PsReply{}, nil }); err != nil {
		t.Fatal(err)
	}
	call := func(nc *nats.Conn, limit time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		_, err := transport.Call[*wire.PsRequest, *wire.PsReply](ctx, nc, "alpha", "ps", &wire.PsRequest{})
		return err
	}
	if err := call(operator, time.Minute); err != nil {
		t.Errorf("the operator calls: %v", err)
	}
	if err := call(agent, 400*time.Millisecond); err == nil {
		t.Error("an agent could call an agent")
	}

	// The agent opens the records first: the bucket has to be made by it.
	mine, err := transport.OpenRecords(ctx, agent, nil)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := transport.OpenRecords(ctx, operator, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Create(ctx, &wire.Record{Id: "m1"}); err != nil {
		t.Fatal(err)
	}
	events, err := mine.Watch(ctx, "m1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Change(ctx, "m1", func(r *wire.Record) error { r.Reason = "x"; return nil }); err != nil {
		t.Errorf("the agent changes a record: %v", err)
	}
	for ev := range events {
		if ev.Record.GetReason() == "x" {
			break
		}
	}
	if _, err := mine.List(ctx); err != nil {
		t.Errorf("the agent lists: %v", err)
	}
	if _, err := mine.History(ctx, "m1"); err != nil {
		t.Errorf("the agent reads the history: %v", err)
	}

	progress, err := transport.SubscribeProgress(ctx, operator, "m1")
	if err != nil {
		t.Fatal(err)
	}
	if err := transport.PublishProgress(agent, &wire.Progress{Id: "m1"}); err != nil {
		t.Fatal(err)
	}
	if p := <-progress; p.GetId() != "m1" {
		t.Errorf("progress %v", p)
	}

	recv, err := transport.NewReceiver(ctx, transport.ReceiverConfig{Data: []*nats.Conn{conn(keys.Agent)}, Control: conn(keys.Agent), Subject: transport.StreamSubject("m1"), ID: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	defer recv.Abort(nil)
	send, err := transport.NewSender(ctx, transport.SenderConfig{Data: []*nats.Conn{conn(keys.Agent)}, Control: conn(keys.Agent), Subject: transport.StreamSubject("m1"), ID: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	defer send.Abort(nil)
	if err := send.Write(ctx, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, err := recv.Recv(ctx); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}
