package files

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// The kernel hides an empty datagram that was peeked at once from whoever peeks
// behind the head of a queue (net/core/datagram.c __skb_try_recv_from_queue): from the
// next dump, if the tree runs on after this one. So each dump notes what it saw, and
// the next finds in the note what it cannot see.

// peekedDir has a file for each socket, named by its cookie, which no other socket has
// before the host is booted again.
const peekedDir = "/run/godwit/peeked"

const maxPeeked = 64 << 20 // bytes of a note

// peekedQueue is what a dump saw in the queue of a datagram socket.
type peekedQueue struct {
	Pid      int             `json:"pid"` // of a process that had the socket, and when that began
	Start    uint64          `json:"start"`
	Messages []peekedMessage `json:"messages"`
}

// peekedMessage is one of a queue. Digest is of all that is known of it.
type peekedMessage struct {
	Digest string `json:"digest"`
	// Empty says that it has no content; then From and what follows are its own.
	Empty    bool                `json:"empty,omitempty"`
	Rights   bool                `json:"rights,omitempty"` // it has descriptors
	From     []byte              `json:"from,omitempty"`   // of a unix socket
	Cred     *image.Credentials  `json:"cred,omitempty"`
	Datagram *image.SockDatagram `json:"datagram,omitempty"` // of UDP
}

// peekedDigest is of what tells one message from another, whatever is asked of a socket.
func peekedDigest(from string, data []byte) string {
	h := sha256.Sum256(append(append([]byte(from), 0), data...))
	return hex.EncodeToString(h[:12])
}

func peekedUDP(m image.SockDatagram) peekedMessage {
	p := peekedMessage{Digest: peekedDigest(m.From, m.Data), Empty: len(m.Data) == 0}
	if p.Empty {
		p.Datagram = &m
	}
	return p
}

func peekedUnix(m *peeked) peekedMessage {
	p := peekedMessage{Digest: peekedDigest(m.from, m.data), Empty: len(m.data) == 0}
	if p.Empty {
		p.Rights, p.From, p.Cred = len(m.fds) > 0, []byte(m.from), m.cred
	}
	return p
}

// recall puts what is hidden between what is seen of a queue, by the note of an
// earlier dump. Of that, the program may have received the first messages, and others
// may have come behind. out has the index of each in seen, or in old if it is negative:
// -1 stands for the first. ok is false if it cannot be told how many empty ones are
// still at the head, of which one is seen.
func recall(old, seen []peekedMessage) (out []int, ok bool) {
	for c := range old { // as much as can still be there
		out, ok := recallFrom(old, seen, c)
		if !ok {
			continue
		}
		if c+1 < len(old) && old[c].Empty {
			if _, fewer := recallFrom(old, seen, c+1); fewer {
				return nil, false
			}
		}
		return out, true
	}
	for i := range seen {
		out = append(out, i)
	}
	return out, true
}

// recallFrom takes the messages from old[c] on to be the first that wait.
func recallFrom(old, seen []peekedMessage, c int) (out []int, ok bool) {
	at := 0
	for i := c; i < len(old); i++ {
		switch {
		case at < len(seen) && seen[at].Digest == old[i].Digest && (i == c || !old[i].Empty):
			out = append(out, at) // an empty one at the head is always seen
			at++
		case old[i].Empty && i > c:
			out = append(out, -1-i)
		default:
			return nil, false
		}
	}
	for ; at < len(seen); at++ {
		out = append(out, at)
	}
	return out, true
}

// remember notes what is in a queue, for the next dump, and gives it with what this
// one could not see; out is as of recall. Preconditions: the socket is of datagrams.
func (d *Dumper) remember(o *object, fd int, seen []peekedMessage) (_ []peekedMessage, _ []int, err error) {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return nil, nil, os.NewSyscallError("getsockopt SO_COOKIE", err)
	}
	name := filepath.Join(peekedDir, fmt.Sprintf("%x", cookie))
	note, err := readPeeked(name)
	known := err == nil
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.log.Warn("a note of an earlier dump cannot be read: empty datagrams may be lost", "socket", o.link, "error", err)
	}
	old := note.Messages
	out, ok := recall(old, seen)
	if !ok {
		d.passes(o, "several empty datagrams wait at its head, which an earlier dump has seen, and the kernel shows only one of them", "retry when the program has received them")
		return old, nil, nil
	}
	next := peekedQueue{Pid: o.first().proc.Pid}
	hides := false
	for i, k := range out {
		m := peekedMessage{}
		if k < 0 {
			m = old[-1-k]
		} else {
			m = seen[k]
		}
		hides = hides || i > 0 && m.Empty
		next.Messages = append(next.Messages, m)
	}
	switch {
	case hides:
		if st, err := procfs.ReadStat(next.Pid); err == nil {
			next.Start = st.StartTime
		}
		err = writePeeked(name, next)
	case known:
		err = os.Remove(name)
	default:
		err = nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("note what is in the queue of %s: %w", o.link, err)
	}
	return old, out, nil
}

func readPeeked(name string) (q peekedQueue, err error) {
	st, err := os.Stat(name)
	if err != nil {
		return q, err
	}
	if st.Size() > maxPeeked {
		return q, fmt.Errorf("%s has %d bytes", name, st.Size())
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return q, err
	}
	if err := json.Unmarshal(b, &q); err != nil {
		return peekedQueue{}, fmt.Errorf("read %s: %w", name, err)
	}
	return q, nil
}

func writePeeked(name string, q peekedQueue) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s.%d", name, os.Getpid())
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// forgetGone removes the notes of processes that have ended.
func forgetGone() {
	names, _ := filepath.Glob(filepath.Join(peekedDir, "*"))
	for _, name := range names {
		q, err := readPeeked(name)
		if err != nil {
			continue
		}
		if st, err := procfs.ReadStat(q.Pid); err != nil && procfs.Gone(err) || err == nil && st.StartTime != q.Start {
			_ = os.Remove(name)
		}
	}
	_ = os.Remove(peekedDir) // if it is empty
}

// withHidden gives the datagrams of a UDP socket with those that are hidden.
func (d *Dumper) withHidden(o *object, fd int, ms []image.SockDatagram) ([]image.SockDatagram, error) {
	var seen []peekedMessage
	for _, m := range ms {
		seen = append(seen, peekedUDP(m))
	}
	old, out, err := d.remember(o, fd, seen)
	if err != nil {
		return nil, err
	}
	var all []image.SockDatagram
	for _, k := range out {
		switch {
		case k >= 0:
			all = append(all, ms[k])
		case old[-1-k].Datagram != nil:
			all = append(all, *old[-1-k].Datagram)
		}
	}
	return all, nil
}

// withHiddenUnix gives the messages of a unix socket with those that are hidden.
func (d *Dumper) withHiddenUnix(o *object, fd int, ms []peeked) ([]peeked, error) {
	var seen []peekedMessage
	for i := range ms {
		seen = append(seen, peekedUnix(&ms[i]))
	}
	old, out, err := d.remember(o, fd, seen)
	if err != nil {
		return nil, err
	}
	var all []peeked
	for _, k := range out {
		if k >= 0 {
			all = append(all, ms[k])
			continue
		}
		m := old[-1-k]
		if m.Rights {
			d.passes(o, "an empty datagram with descriptors waits in it, which an earlier dump has seen and the kernel shows no more", "retry when the program has received it")
		}
		all = append(all, peeked{message: message{from: string(m.From), cred: m.Cred}})
	}
	return all, nil
}
