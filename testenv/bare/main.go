// Command bare streams bytes over core NATS and measures that: the baseline of
// the benchmarks for what a migration could do. It sends messages of 512 KiB on two
// connections with a window of 8 MiB, without checksums, and keeps nothing.
//
//	bare send BYTES URL SEED-FILE     over the server at URL
//	bare serve BYTES HOST:PORT        over a server in this process
//	bare receive BYTES URL SEED-FILE
//
// The sender prints how many bytes a second were acknowledged. SEED-FILE may be empty.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const (
	lanes   = 2
	message = 512 << 10
	window  = 8 << 20
	prefix  = "godwit.v1.stream.bare" // what agents may use

	patience = time.Minute
)

func main() {
	debug.SetGCPercent(400) // as agents do
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bare: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return errors.New("usage: send BYTES URL SEED | serve BYTES HOST:PORT | receive BYTES URL SEED")
	}
	n, err := strconv.ParseUint(args[1], 10, 62)
	if err != nil {
		return err
	}
	switch args[0] {
	case "send":
		conns, err := connect(args[2], args[3:])
		if err != nil {
			return err
		}
		return send(conns, n)
	case "serve":
		conns, err := serve(args[2])
		if err != nil {
			return err
		}
		return send(conns, n)
	case "receive":
		conns, err := connect(args[2], args[3:])
		if err != nil {
			return err
		}
		return receive(conns, n)
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func connect(url string, seed []string, more ...nats.Option) (conns []*nats.Conn, err error) {
	opts := append(more, nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	if len(seed) > 0 && seed[0] != "" {
		o, err := nats.NkeyOptionFromSeed(seed[0])
		if err != nil {
			return nil, err
		}
		opts = append(opts, o)
	}
	for range lanes {
		nc, err := nats.Connect(url, opts...)
		if err != nil {
			return nil, err
		}
		conns = append(conns, nc)
	}
	return conns, nil
}

// serve runs a server and connects to it inside this process.
func serve(where string) ([]*nats.Conn, error) {
	host, port, err := net.SplitHostPort(where)
	if err != nil {
		return nil, err
	}
	p, err := strconv.Atoi(port)
	if err != nil {
		return nil, err
	}
	srv, err := server.NewServer(&server.Options{Host: host, Port: p, NoSigs: true, NoLog: true, MaxPending: 64 << 20})
	if err != nil {
		return nil, err
	}
	go srv.Start()
	if !srv.ReadyForConnections(patience) {
		return nil, fmt.Errorf("the server at %s was not ready", where)
	}
	return connect("", nil, nats.InProcessServer(srv))
}

// send sends n bytes and prints the rate.
func send(conns []*nats.Conn, n uint64) error {
	data := make([]byte, 256<<20) // more than caches hold
	for i := range data {
		data[i] = byte(i)
	}
	var acked atomic.Uint64
	moved, begun := make(chan struct{}, 1), make(chan struct{}, 1)
	tell := func(c chan struct{}) {
		select {
		case c <- struct{}{}:
		default:
		}
	}
	if _, err := conns[0].Subscribe(prefix+".ack", func(m *nats.Msg) {
		if len(m.Data) == 8 {
			acked.Store(max(acked.Load(), binary.LittleEndian.Uint64(m.Data)))
			tell(begun)
			tell(moved)
		}
	}); err != nil {
		return err
	}
	select {
	case <-begun: // the receiver is there
	case <-time.After(patience):
		return errors.New("no receiver came")
	}
	wait := func(until uint64) error {
		for acked.Load() < until {
			select {
			case <-moved:
			case <-time.After(patience):
				return errors.New("the receiver is silent")
			}
		}
		return nil
	}
	begin := time.Now()
	var sent uint64
	for k, at := 0, 0; sent < n; k, at = (k+1)%lanes, (at+message)%len(data) {
		if sent > window-message {
			if err := wait(sent - (window - message)); err != nil {
				return err
			}
		}
		if err := conns[k].Publish(fmt.Sprintf("%s.lane%d", prefix, k), data[at:at+message]); err != nil {
			return err
		}
		sent += message
	}
	if err := wait(sent); err != nil {
		return err
	}
	fmt.Printf("%.0f\n", float64(sent)/time.Since(begin).Seconds())
	return nil
}

// receive receives n bytes.
func receive(conns []*nats.Conn, n uint64) error {
	var got atomic.Uint64
	kick, lost := make(chan struct{}, 1), make(chan error, 1)
	for k, nc := range conns {
		if _, err := nc.Subscribe(fmt.Sprintf("%s.lane%d", prefix, k), func(m *nats.Msg) {
			now := got.Add(uint64(len(m.Data)))
			if before := now - uint64(len(m.Data)); before/(window/8) != now/(window/8) || now >= n {
				select {
				case kick <- struct{}{}:
				default:
				}
			}
		}); err != nil {
			return err
		}
		nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			select {
			case lost <- err:
			default:
			}
		})
		for end := time.Now().Add(patience); !nc.IsConnected(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				return errors.New("the server cannot be reached")
			}
		}
		if err := nc.Flush(); err != nil {
			return err
		}
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for quiet := time.Now(); ; {
		select {
		case <-kick:
			quiet = time.Now()
		case <-tick.C: // until the sender has heard that this end is there
			if time.Since(quiet) > patience {
				return errors.New("the sender is silent")
			}
		case err := <-lost:
			return err
		}
		now := got.Load()
		if err := conns[0].Publish(prefix+".ack", binary.LittleEndian.AppendUint64(nil, now)); err != nil {
			return err
		}
		if now >= n {
			_ = conns[0].Flush() // the sender may have gone with its server: it has heard it
			return nil
		}
	}
}
