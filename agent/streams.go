package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/transport"
	"godwit/wire"
)

// Streams opens the streams of sessions, each on connections of its own:
// beside bulk data on one connection everything else would wait.
type Streams struct {
	// Bus is how a connection for data is made; Name is the agent's host.
	Bus     transport.Config
	Control *nats.Conn
	// Direct is this host's server for streams that begin here; nil: there is none.
	Direct *Direct

	ChunkSize   int
	Window      int
	Lanes       int
	Bandwidth   uint64 // cap of every stream, bytes per second; 0: none
	IdleTimeout time.Duration
	OpenTimeout time.Duration
	Logger      hclog.Logger
}

// sendStream is the sending end of a session's stream with its connections.
type sendStream struct {
	*transport.Sender
	close func()
}

// Close waits until everything has been applied by the receiver.
func (s *sendStream) Close(ctx context.Context) error {
	err := s.Sender.Close(ctx)
	if err == nil {
		s.close()
	}
	return err
}

// Abort ends the stream with an error that the receiver gets; after Close it
// does nothing.
func (s *sendStream) Abort(err error) {
	s.Sender.Abort(err)
	s.close()
}

// recvStream is the receiving end of a session's stream with its connections.
type recvStream struct {
	*transport.Receiver
	close func()
}

// Close leaves the stream: with err it is aborted, without the sender is told
// that everything was applied.
func (r *recvStream) Close(err error) {
	if err != nil {
		r.Abort(err)
		r.close()
		return
	}
	// The sender's last word may take as long as the bus is away.
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_ = r.Receiver.Close(ctx)
		r.close()
	}()
}

// connections are those of one end of a stream.
type connections struct {
	data, direct []*nats.Conn
	once         sync.Once
}

func (c *connections) close() {
	c.once.Do(func() {
		for _, nc := range slices.Concat(c.data, c.direct) {
			nc.Close()
		}
	})
}

func (s *Streams) lanes() int {
	if s.Lanes <= 0 {
		return transport.DefaultLanes
	}
	return s.Lanes
}

// connect makes the connections over the cluster.
func (s *Streams) connect(ctx context.Context, id string) (*connections, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	conns, err := connectLanes(s.Bus, s.Bus.Name+" stream "+id, s.lanes())
	return &connections{data: conns}, err
}

// sendOptions is how a stream is to be sent.
type sendOptions struct {
	rate        uint64     // lowers the cap, bytes per second; 0: none
	lane        *wire.Lane // becomes what is used
	only        bool       // that lane will do
	compression transport.Compression
}

// Send opens the sending end; it returns once the receiver has answered.
func (s *Streams) Send(ctx context.Context, id, stream, peer string, o sendOptions) (outStream, error) {
	conns, err := s.connect(ctx, id)
	if err != nil {
		return nil, err
	}
	if o.lane.GetDirect() {
		if conns.direct, err = s.Direct.use(id, s.lanes()); err != nil && o.only {
			conns.close()
			return nil, fmt.Errorf("take the direct lane: %w", err)
		} else if err != nil {
			o.lane.Direct, o.lane.Reason = false, err.Error()
		}
	}
	if s.Bandwidth != 0 && (o.rate == 0 || o.rate > s.Bandwidth) {
		o.rate = s.Bandwidth
	}
	out, err := transport.NewSender(ctx, transport.SenderConfig{
		Data: conns.data, Direct: conns.direct, OnlyDirect: o.only, Control: s.Control, Subject: transport.StreamSubject(stream), ID: id, Peer: "agent " + peer,
		ChunkSize: s.ChunkSize, Window: s.Window, Lanes: s.Lanes, Rate: o.rate, Compression: o.compression,
		IdleTimeout: s.IdleTimeout, OpenTimeout: s.OpenTimeout, Logger: s.Logger,
	})
	if err != nil {
		conns.close()
		if errors.Is(err, context.Canceled) {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return &sendStream{Sender: out, close: conns.close}, nil
}

// Receive opens the receiving end; from when it returns a sender may open its
// own. offer is the source's, at the address of lane.
func (s *Streams) Receive(ctx context.Context, id, stream, peer string, open time.Duration, lane *wire.Lane, offer *wire.DirectOffer) (inStream, error) {
	conns, err := s.connect(ctx, id)
	if err != nil {
		return nil, err
	}
	if lane.GetDirect() {
		cfg := directConfig(offer, lane.Address)
		cfg.Timeout, cfg.Logger = directPatience, s.Logger
		if conns.direct, err = connectLanes(cfg, s.Bus.Name+" stream "+id, s.lanes()); err != nil {
			conns.close()
			return nil, fmt.Errorf("connect to %s directly: %w", lane.Address, err)
		}
	}
	in, err := transport.NewReceiver(ctx, transport.ReceiverConfig{
		Data: conns.data, Direct: conns.direct, Control: s.Control, Subject: transport.StreamSubject(stream), ID: id, Peer: "agent " + peer,
		Window: s.Window, Lanes: s.Lanes, IdleTimeout: s.IdleTimeout, OpenTimeout: open, Logger: s.Logger,
	})
	if err != nil {
		conns.close()
		return nil, err
	}
	return &recvStream{Receiver: in, close: conns.close}, nil
}
