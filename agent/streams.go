package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/transport"
)

// Streams opens the streams of sessions, each on connections of its own:
// beside bulk data on one connection everything else would wait.
type Streams struct {
	// Bus is how a connection for data is made; Name is the agent's host.
	Bus     transport.Config
	Control *nats.Conn

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

// connect makes the connections of a stream.
func (s *Streams) connect(ctx context.Context, id string) ([]*nats.Conn, func(), error) {
	lanes := s.Lanes
	if lanes <= 0 {
		lanes = transport.DefaultLanes
	}
	var conns []*nats.Conn
	var once sync.Once
	closeAll := func() {
		once.Do(func() {
			for _, nc := range conns {
				nc.Close()
			}
		})
	}
	for k := range lanes {
		if err := ctx.Err(); err != nil {
			closeAll()
			return nil, nil, context.Cause(ctx)
		}
		cfg := s.Bus
		cfg.Name = fmt.Sprintf("%s stream %s lane %d", s.Bus.Name, id, k)
		nc, err := transport.Connect(cfg)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		conns = append(conns, nc)
	}
	return conns, closeAll, nil
}

// Send opens the sending end; it returns once the receiver has answered. rate
// lowers the cap of this stream.
func (s *Streams) Send(ctx context.Context, id, stream, peer string, rate uint64) (outStream, error) {
	conns, closeAll, err := s.connect(ctx, id)
	if err != nil {
		return nil, err
	}
	if s.Bandwidth != 0 && (rate == 0 || rate > s.Bandwidth) {
		rate = s.Bandwidth
	}
	out, err := transport.NewSender(ctx, transport.SenderConfig{
		Data: conns, Control: s.Control, Subject: transport.StreamSubject(stream), ID: id, Peer: "agent " + peer,
		ChunkSize: s.ChunkSize, Window: s.Window, Lanes: s.Lanes, Rate: rate,
		IdleTimeout: s.IdleTimeout, OpenTimeout: s.OpenTimeout, Logger: s.Logger,
	})
	if err != nil {
		closeAll()
		if errors.Is(err, context.Canceled) {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	return &sendStream{Sender: out, close: closeAll}, nil
}

// Receive opens the receiving end; from when it returns a sender may open its own.
func (s *Streams) Receive(ctx context.Context, id, stream, peer string, open time.Duration) (inStream, error) {
	conns, closeAll, err := s.connect(ctx, id)
	if err != nil {
		return nil, err
	}
	in, err := transport.NewReceiver(ctx, transport.ReceiverConfig{
		Data: conns, Control: s.Control, Subject: transport.StreamSubject(stream), ID: id, Peer: "agent " + peer,
		Window: s.Window, Lanes: s.Lanes, IdleTimeout: s.IdleTimeout, OpenTimeout: open, Logger: s.Logger,
	})
	if err != nil {
		closeAll()
		return nil, err
	}
	return &recvStream{Receiver: in, close: closeAll}, nil
}
