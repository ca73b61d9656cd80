package transport

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

// Memory that is asked for page by page (post-copy) does not go through a stream: each
// request stands for itself, and can be made again. Urgent ones have a connection of
// their own at both ends, so that they need not wait behind the others' data.

// pageLanes are the last parts of the subjects, and the order of connections.
var pageLanes = [2]string{"urgent", "bulk"}

func pagesSubject(id, lane string) string { return Prefix + ".pages." + id + "." + lane }

// pagesAtOnce bounds the requests that a source answers at a time, a lane.
const pagesAtOnce = 8

// replyRoom is what a reply needs beside its data, bytes.
const replyRoom = 16 << 10

// Pages answers requests for memory of one migration.
type Pages struct {
	subs   []*nats.Subscription
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// ServePages lets fn answer, with conns for urgent requests and for the others. room is how
// many bytes of data fit into a reply. An error of fn travels to whoever asked.
func ServePages(conns [2]*nats.Conn, id string, fn func(ctx context.Context, req *wire.PagesRequest, room int) (*wire.PagesReply, error)) (*Pages, error) {
	if err := CheckName(id); err != nil {
		return nil, fmt.Errorf("serve pages: id: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Pages{cancel: cancel}
	for i, nc := range conns {
		room := int(nc.MaxPayload()) - replyRoom
		slots := make(chan struct{}, pagesAtOnce)
		sub, err := nc.Subscribe(pagesSubject(id, pageLanes[i]), func(m *nats.Msg) {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			p.wg.Go(func() {
				defer func() { <-slots }()
				req, reply := &wire.PagesRequest{}, &wire.PagesReply{}
				err := proto.Unmarshal(m.Data, req)
				if err == nil {
					var got *wire.PagesReply
					if got, err = fn(ctx, req, room); got != nil {
						reply = got
					}
				}
				if err != nil {
					reply = &wire.PagesReply{Error: wire.ErrorOf(err)}
				}
				reply.Crc = wire.BodyCRC(reply.Data)
				if b, err := proto.Marshal(reply); err == nil {
					_ = m.Respond(b) // a lost reply is asked for again
				}
			})
		})
		if err == nil {
			err = flush(ctx, nc)
		}
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("serve pages of %s: %w", id, err)
		}
		p.subs = append(p.subs, sub)
	}
	return p, nil
}

// Close ends the answering.
func (p *Pages) Close() {
	for _, s := range p.subs {
		_ = s.Unsubscribe()
	}
	p.cancel()
	p.wg.Wait()
}

const (
	// pageTry is how long one request is waited for.
	pageTry = 5 * time.Second
	// pagePause is the pause before it is made again.
	pagePause = 100 * time.Millisecond
)

// PageClient asks for memory of one migration. It may be used by any goroutines.
type PageClient struct {
	Conns [2]*nats.Conn // for urgent requests and for the others
	ID    string
	// Trouble, if not nil, is told why an answer keeps one waiting, and nil when answers come
	// again.
	Trouble func(error)
}

// Ask asks until there is an answer, or ctx ends. An error of the other side, that of a
// process which is gone, comes as *wire.Failure.
func (c *PageClient) Ask(ctx context.Context, req *wire.PagesRequest, urgent bool) (*wire.PagesReply, error) {
	lane := 1
	if urgent {
		lane = 0
	}
	req.Id = c.ID
	body, err := proto.Marshal(req)
	if err != nil {
		return nil, err
	}
	for {
		reply, err := c.once(ctx, lane, body)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if c.Trouble != nil {
			c.Trouble(err)
		}
		if err == nil {
			return reply, reply.Error.Err()
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pagePause):
		}
	}
}

func (c *PageClient) once(ctx context.Context, lane int, body []byte) (*wire.PagesReply, error) {
	ctx, cancel := context.WithTimeout(ctx, pageTry)
	defer cancel()
	m, err := c.Conns[lane].RequestWithContext(ctx, pagesSubject(c.ID, pageLanes[lane]), body)
	if errors.Is(err, nats.ErrNoResponders) {
		return nil, errors.New("the source's agent does not answer")
	}
	if err != nil {
		return nil, fmt.Errorf("ask the source for memory: %w", err)
	}
	reply := &wire.PagesReply{}
	if err := proto.Unmarshal(m.Data, reply); err != nil {
		return nil, fmt.Errorf("read the source's answer: %w", err)
	}
	if wire.BodyCRC(reply.Data) != reply.Crc {
		return nil, errors.New("memory was damaged on its way")
	}
	return reply, nil
}
