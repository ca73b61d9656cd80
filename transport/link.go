package transport

import (
	"errors"
	"fmt"
	"sync"

	"github.com/nats-io/nats.go"
)

// link is what one end of a stream needs of one connection. Tests put faults
// between the ends through it.
type link interface {
	// send hands a frame over and does not keep it. It may block while the
	// connection is congested. An error means that the frame is lost, and
	// perhaps others sent shortly before it.
	send(subject string, frame []byte) error
	// subscribe calls fn for each frame, one at a time. fn owns the frame.
	subscribe(subject string, fn func(frame []byte)) (stop func(), err error)
	// lives grows each time that the connection was lost and made again:
	// frames in between may be lost. up is whether it stands now. Neither blocks.
	lives() uint64
	up() bool
	// maxPayload is the largest frame.
	maxPayload() int
	// close gives the link back; the connection stays.
	close()
}

// natsLink is a link over a NATS connection.
type natsLink struct {
	nc *nats.Conn
	// status is fed by the connection. Asking the connection itself would
	// wait for its lock, which a congested write holds.
	status chan nats.Status

	mu        sync.Mutex
	n         uint64
	connected bool
}

// pendingLimit bounds what waits in a subscription. Callbacks never wait, so
// it is only met when the whole process stalls; a loss then is a gap, which is
// found and sent again.
const pendingLimit = 48 << 20

func newNATSLink(nc *nats.Conn) *natsLink {
	l := &natsLink{nc: nc, status: nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED)}
	l.connected = nc.IsConnected()
	return l
}

func (l *natsLink) send(subject string, frame []byte) error {
	return l.nc.Publish(subject, frame)
}

func (l *natsLink) subscribe(subject string, fn func([]byte)) (func(), error) {
	sub, err := l.nc.Subscribe(subject, func(m *nats.Msg) { fn(m.Data) })
	if err != nil {
		return nil, fmt.Errorf("subscribe to %s: %w", subject, err)
	}
	if err := sub.SetPendingLimits(-1, pendingLimit); err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to %s: %w", subject, err), sub.Unsubscribe())
	}
	return func() { _ = sub.Unsubscribe() }, nil
}

// read takes in what the connection told.
//
// Preconditions: mu is held.
func (l *natsLink) read() {
	for {
		select {
		case s, ok := <-l.status:
			if !ok {
				l.connected = false
				l.status = nil
				return
			}
			if s == nats.CONNECTED {
				l.n++
			}
			l.connected = s == nats.CONNECTED
		default:
			// Events are dropped if too many wait. A connection that is down
			// is not being written to, so it can be asked.
			if !l.connected && l.status != nil && l.nc.IsConnected() {
				l.connected = true
				l.n++
			}
			return
		}
	}
}

func (l *natsLink) lives() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read()
	return l.n
}

func (l *natsLink) up() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read()
	return l.connected
}

func (l *natsLink) maxPayload() int { return int(l.nc.MaxPayload()) }

func (l *natsLink) close() {
	l.mu.Lock()
	status := l.status
	l.mu.Unlock()
	if status != nil {
		l.nc.RemoveStatusListener(status)
	}
}

func natsLinks(conns []*nats.Conn) []link {
	ls := make([]link, len(conns))
	for i, nc := range conns {
		ls[i] = newNATSLink(nc)
	}
	return ls
}

// livesOf is the sum over links.
func livesOf(ls []link) uint64 {
	var n uint64
	for _, l := range ls {
		n += l.lives()
	}
	return n
}
