package transport

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"godwit/transport/bus"
	"godwit/wire"
)

func serve(t *testing.T, nc *nats.Conn, host string) *Service {
	t.Helper()
	s, err := Serve(nc, ServiceConfig{Info: &wire.AgentInfo{Host: host, Protocol: wire.Version, Version: "0.1.0", Kernel: "6.12"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop() })
	return s
}

func TestConnectErrors(t *testing.T) {
	keyed := startBus(t, bus.Config{RequireKeys: true})
	keys, _ := keyed.Keys()
	free := startBus(t, bus.Config{})
	free.Shutdown() // its port refuses connections now
	bad := filepath.Join(t.TempDir(), "bad.nk")
	if err := os.WriteFile(bad, []byte("not a seed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	other := startBus(t, bus.Config{RequireKeys: true})
	otherKeys, _ := other.Keys()
	tests := []struct {
		name string
		cfg  Config
		is   error  // nil: not looked at
		text string // empty: it must work
	}{
		{"agent's key", Config{URLs: []string{keyed.URL()}, NKeySeedFile: keys.Agent}, nil, ""},
		{"operator's key", Config{URLs: []string{keyed.URL()}, NKeySeedFile: keys.Operator}, nil, ""},
		{"in process", Config{InProcess: keyed.Conn(), NKeySeedFile: keys.Operator}, nil, ""},
		{"no key", Config{URLs: []string{keyed.URL()}}, ErrAuth, "check the credentials"},
		{"key of another bus", Config{URLs: []string{keyed.URL()}, NKeySeedFile: otherKeys.Agent}, ErrAuth, "check the credentials"},
		{"wrong password", Config{URLs: []string{strings.Replace(keyed.URL(), "://", "://joe:hush@", 1)}}, ErrAuth, "***@"},
		{"nobody listens", Config{URLs: []string{"nats://127.0.0.1:1"}}, ErrUnreachable, "is a server running there?"},
		{"not a seed", Config{URLs: []string{keyed.URL()}, NKeySeedFile: bad}, nil, bad},
		{"no seed file", Config{NKeySeedFile: "/nonexistent/key"}, nil, "/nonexistent/key"},
		{"no creds file", Config{CredsFile: "/nonexistent/creds"}, os.ErrNotExist, "/nonexistent/creds"},
		{"no CA file", Config{TLSCA: "/nonexistent/ca"}, os.ErrNotExist, "/nonexistent/ca"},
		{"half a certificate", Config{TLSCert: "x"}, nil, "both"},
		{"two ways", Config{User: "a", Token: "b"}, nil, "more than one way"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			nc, err := Connect(tc.cfg)
			if err == nil {
				nc.Close()
			}
			if tc.text == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.text) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v, want %v with %q", err, tc.is, tc.text)
			}
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("the error shows the password: %v", err)
			}
		})
	}
}

func TestConnectWait(t *testing.T) {
	dir := t.TempDir()
	b := startBus(t, bus.Config{StoreDir: dir})
	listen := strings.TrimPrefix(b.URL(), "nats://")
	b.Shutdown()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := ConnectWait(ctx, Config{URLs: []string{"nats://" + listen}}); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no bus: %v", err)
	}
	type result struct {
		nc  *nats.Conn
		err error
	}
	got := make(chan result, 1)
	go func() {
		nc, err := ConnectWait(t.Context(), Config{URLs: []string{"nats://" + listen}})
		got <- result{nc, err}
	}()
	startBus(t, bus.Config{Listen: listen, StoreDir: dir})
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	r.nc.Close()
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"alpha": true, "a-b_C9": true, strings.Repeat("x", 63): true,
		"": false, "a.b": false, "a b": false, "*": false, ">": false, "ä": false, strings.Repeat("x", 64): false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("CheckName(%q): %v", name, err)
		}
	}
}

func TestCalls(t *testing.T) {
	b := startBus(t, bus.Config{})
	agent, caller := connect(t, b.URL(), "agent"), connect(t, b.URL(), "caller")
	s := serve(t, agent, "alpha")
	release := make(chan struct{})
	defer close(release)
	handle := func(method string, fn func(context.Context, *wire.PsRequest) (*wire.PsReply, error)) {
		t.Helper()
		if err := Handle(s, method, fn); err != nil {
			t.Fatal(err)
		}
	}
	process := &wire.Process{Pid: 7, Comm: "redis-server"}
	problem := &wire.Problem{Object: &wire.Object{Pid: 7, Comm: "x", Fd: 3, HasFd: true, Path: "/dev/kvm"}, Reason: "cannot be carried", Hint: "close it"}
	handle("ps", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) {
		return &wire.PsReply{Processes: []*wire.Process{process}}, nil
	})
	handle("refuse", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) {
		f := wire.Errorf(wire.Code_CODE_REFUSED, "dump of pid 7 refused")
		f.Problems = []*wire.Problem{problem}
		return nil, fmt.Errorf("preflight: %w", f)
	})
	handle("both", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) {
		return &wire.PsReply{Processes: []*wire.Process{process}}, errors.New("half of it")
	})
	handle("panic", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) { panic("broken") })
	handle("nothing", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) { return nil, nil })
	handle("wait", func(ctx context.Context, _ *wire.PsRequest) (*wire.PsReply, error) {
		if _, ok := ctx.Deadline(); !ok {
			return nil, errors.New("the handler has no deadline")
		}
		<-release
		return nil, nil
	})
	handle("big", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) {
		noise := make([]byte, 2<<20)
		_, _ = rand.Read(noise) // never fails
		return &wire.PsReply{Processes: []*wire.Process{{Command: hex.EncodeToString(noise)}}}, nil
	})
	long := &wire.PsReply{Processes: []*wire.Process{{Command: strings.Repeat("x", 2<<20)}}}
	handle("long", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) { return proto.CloneOf(long), nil })
	tests := []struct {
		name, host, method string
		want               *wire.PsReply
		code               wire.Code // unspecified: no error
		is                 error
		text               string
	}{
		{"works", "alpha", "ps", &wire.PsReply{Processes: []*wire.Process{process}}, 0, nil, ""},
		{"refusal", "alpha", "refuse", nil, wire.Code_CODE_REFUSED, nil, "alpha: preflight: dump of pid 7 refused\n  - pid 7 (x) fd 3 /dev/kvm: cannot be carried; close it"},
		{"reply and error", "alpha", "both", &wire.PsReply{Processes: []*wire.Process{process}}, wire.Code_CODE_INTERNAL, nil, "alpha: half of it"},
		{"panic", "alpha", "panic", nil, wire.Code_CODE_INTERNAL, nil, "alpha: the agent's handler of panic broke: broken"},
		{"nil reply", "alpha", "nothing", &wire.PsReply{}, 0, nil, ""},
		{"timeout", "alpha", "wait", nil, wire.Code_CODE_UNAVAILABLE, ErrNoAnswer, "agent alpha gave no answer in time to wait"},
		{"reply that is packed", "alpha", "long", long, 0, nil, ""},
		{"reply too big", "alpha", "big", nil, wire.Code_CODE_INTERNAL, nil, "the bus allows 1048576"},
		{"no agent", "beta", "ps", nil, wire.Code_CODE_UNAVAILABLE, ErrNoAgent, "agent beta does not answer: is it running and connected to the bus?"},
		{"bad host", "be.ta", "ps", nil, wire.Code_CODE_INVALID, nil, "be.ta"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			limit := time.Minute
			if errors.Is(tc.is, ErrNoAnswer) {
				limit = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			got, err := Call[*wire.PsRequest, *wire.PsReply](ctx, caller, tc.host, tc.method, &wire.PsRequest{})
			if wire.CodeOf(err) != tc.code || tc.is != nil && !errors.Is(err, tc.is) {
				t.Fatalf("error %v (%s), want %s", err, wire.CodeOf(err), tc.code)
			}
			if err != nil && !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %q, want %q in it", err, tc.text)
			}
			if tc.want != nil {
				got.Error = nil
				if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
					t.Errorf("reply (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestCallWaitsForTheBus(t *testing.T) {
	dir := t.TempDir()
	b := startBus(t, bus.Config{StoreDir: dir})
	listen := strings.TrimPrefix(b.URL(), "nats://")
	caller, agent := connect(t, b.URL(), "caller"), connect(t, b.URL(), "agent")
	s := serve(t, agent, "alpha")
	if err := Handle(s, "ps", func(context.Context, *wire.PsRequest) (*wire.PsReply, error) { return &wire.PsReply{}, nil }); err != nil {
		t.Fatal(err)
	}
	b.Shutdown()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := Call[*wire.PsRequest, *wire.PsReply](ctx, caller, "alpha", "ps", &wire.PsRequest{})
	if !errors.Is(err, ErrDisconnected) || wire.CodeOf(err) != wire.Code_CODE_UNAVAILABLE {
		t.Errorf("bus down: %v, want ErrDisconnected", err)
	}
	startBus(t, bus.Config{Listen: listen, StoreDir: dir})
	for { // until both have reconnected
		_, err := Call[*wire.PsRequest, *wire.PsReply](t.Context(), caller, "alpha", "ps", &wire.PsRequest{})
		if err == nil {
			break
		}
		if !errors.Is(err, ErrNoAgent) {
			t.Fatal(err)
		}
	}
}

func TestDuplicateHost(t *testing.T) {
	b := startBus(t, bus.Config{})
	first := serve(t, connect(t, b.URL(), "first"), "alpha")
	nc := connect(t, b.URL(), "second")
	if _, err := Serve(nc, ServiceConfig{Info: &wire.AgentInfo{Host: "alpha"}}); !errors.Is(err, ErrDuplicateHost) {
		t.Errorf("second agent alpha: %v, want ErrDuplicateHost", err)
	}
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	serve(t, nc, "alpha")
	if _, err := Serve(nc, ServiceConfig{Info: &wire.AgentInfo{Host: "no host"}}); err == nil {
		t.Error("a host name with a space was accepted")
	}
}

func TestDiscover(t *testing.T) {
	b := startBus(t, bus.Config{})
	nc := connect(t, b.URL(), "caller")
	got, err := Discover(t.Context(), nc)
	if err != nil || len(got) != 0 {
		t.Fatalf("empty bus: %v, %v", got, err)
	}
	beta := serve(t, connect(t, b.URL(), "beta"), "beta")
	serve(t, connect(t, b.URL(), "alpha"), "alpha") // serves no "info"
	if err := Handle(beta, "info", func(context.Context, *wire.InfoRequest) (*wire.InfoReply, error) {
		return &wire.InfoReply{Info: &wire.AgentInfo{Host: "beta", Migrations: 3}}, nil
	}); err != nil {
		t.Fatal(err)
	}
	got, err = Discover(t.Context(), nc)
	if err != nil {
		t.Fatal(err)
	}
	want := []*wire.AgentInfo{
		{Host: "alpha", Protocol: wire.Version, Version: "0.1.0", Kernel: "6.12"},
		{Host: "beta", Migrations: 3},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("agents (-want +got):\n%s", diff)
	}
}

func TestStopEndsCalls(t *testing.T) {
	b := startBus(t, bus.Config{})
	s := serve(t, connect(t, b.URL(), "agent"), "alpha")
	in := make(chan struct{})
	if err := Handle(s, "ps", func(ctx context.Context, _ *wire.PsRequest) (*wire.PsReply, error) {
		close(in)
		<-ctx.Done()
		return nil, ctx.Err()
	}); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := Call[*wire.PsRequest, *wire.PsReply](t.Context(), connect(t, b.URL(), "caller"), "alpha", "ps", &wire.PsRequest{})
		answered <- err
	}()
	<-in
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err == nil || !strings.Contains(err.Error(), "canceled") {
		t.Errorf("a call in flight at the stop got %v", err)
	}
}

func TestNewID(t *testing.T) {
	seen := map[string]bool{}
	last := ""
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	for i := range 200 {
		id := newID(now.Add(time.Duration(i) * 10 * time.Millisecond))
		if CheckName(id) != nil || len(id) != 12 || id <= last || seen[id] {
			t.Fatalf("id %q after %q", id, last)
		}
		seen[id], last = true, id
	}
	if later := newID(now.AddDate(80, 0, 0)); later <= last {
		t.Errorf("an id of 2106, %s, sorts before one of 2026, %s", later, last)
	}
}
