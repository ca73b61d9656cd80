package transport

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

// PublishProgress tells whoever listens how far a migration is. It is not
// stored and may get lost; an error only says that this side is cut off.
func PublishProgress(nc *nats.Conn, p *wire.Progress) error {
	if err := CheckName(p.Id); err != nil {
		return fmt.Errorf("publish progress: id: %w", err)
	}
	b, err := proto.Marshal(p)
	if err != nil {
		return fmt.Errorf("publish progress of %s: %w", p.Id, err)
	}
	if err := nc.Publish(progressSubject(p.Id), b); err != nil {
		return fmt.Errorf("publish progress of %s: %w", p.Id, err)
	}
	return nil
}

// SubscribeProgress sends the progress of a migration, or of all if id is
// empty, until ctx ends; then the channel is closed. A reader that is slow
// loses old messages, never new ones.
func SubscribeProgress(ctx context.Context, nc *nats.Conn, id string) (<-chan *wire.Progress, error) {
	subject := progressSubject("*")
	if id != "" {
		if err := CheckName(id); err != nil {
			return nil, fmt.Errorf("listen to progress: id: %w", err)
		}
		subject = progressSubject(id)
	}
	in := make(chan *nats.Msg, 256)
	sub, err := nc.ChanSubscribe(subject, in)
	if err != nil {
		return nil, fmt.Errorf("listen to progress: %w", err)
	}
	if err := flush(ctx, nc); err != nil {
		_ = sub.Unsubscribe()
		return nil, fmt.Errorf("listen to progress: %w", err)
	}
	out := make(chan *wire.Progress, 64)
	go func() {
		defer close(out)
		defer func() { _ = sub.Unsubscribe() }()
		for {
			select {
			case <-ctx.Done():
				return
			case m, ok := <-in:
				if !ok {
					return
				}
				p := &wire.Progress{}
				if err := proto.Unmarshal(m.Data, p); err != nil {
					continue // not one of ours
				}
				select {
				case out <- p:
				default:
					select {
					case <-out:
					default:
					}
					out <- p // only this goroutine sends: there is room now
				}
			}
		}
	}()
	return out, nil
}

// flush waits until the server has seen what was sent, at most 5 s.
func flush(ctx context.Context, nc *nats.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := nc.FlushWithContext(ctx); err != nil {
		return fmt.Errorf("the bus does not answer: %w", err)
	}
	return nil
}
