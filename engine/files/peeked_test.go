package files

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// words makes a queue of them; those that are empty are told apart by nothing.
func words(ws []string) []peekedMessage {
	var out []peekedMessage
	for _, w := range ws {
		out = append(out, peekedMessage{Digest: peekedDigest("", []byte(w)), Empty: w == ""})
	}
	return out
}

// A queue is received from, sent to and dumped at random. Every dump finds what is
// in it, whatever the kernel hides, or says that it cannot.
func TestRecall(t *testing.T) {
	refused := 0
	for seed := range uint64(3000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		type word struct {
			text   string
			peeked bool
		}
		var queue []word
		var note []string
		for step := range 40 {
			switch rnd.IntN(4) {
			case 0:
				queue = append(queue, word{text: fmt.Sprint(seed, step)})
			case 1:
				queue = append(queue, word{})
			case 2:
				queue = queue[min(len(queue), rnd.IntN(3)):]
			case 3:
				var want, seen []string
				for i := range queue {
					want = append(want, queue[i].text)
					if i == 0 || !queue[i].peeked {
						seen = append(seen, queue[i].text)
					}
					queue[i].peeked = queue[i].text == ""
				}
				out, ok := recall(words(note), words(seen))
				if !ok { // the program is asked to receive
					refused++
					queue, note = nil, nil
					continue
				}
				var got []string
				for _, k := range out {
					if k < 0 {
						got = append(got, note[-1-k])
					} else {
						got = append(got, seen[k])
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("seed %d, step %d: %q is found, of %q; there is %q; a note has %q", seed, step, got, seen, want, note)
				}
				note = want
			}
		}
	}
	if refused == 0 {
		t.Error("no queue began with several empty messages")
	}
}

func init() {
	scenes["empty-datagrams"] = func(string) fds {
		out := fds{}
		pair := must1(unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0))
		seq := must1(unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0))
		out["from"], out["to"], out["seq from"], out["seq to"] = pair[0], pair[1], seq[0], seq[1]
		udp := must1(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0))
		must(unix.Bind(udp, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		out["udp"] = udp
		for _, s := range []string{"", "a", "", "", "b", ""} {
			send(pair[0], s)
			send(seq[0], s)
			must(unix.Sendto(udp, []byte(s), 0, must1(unix.Getsockname(udp))))
		}
		return out
	}
}

// Several dumps of a tree that runs on find the same empty datagrams, each.
func TestEmptyDatagrams(t *testing.T) {
	c := start(t, "empty-datagrams")
	t.Cleanup(func() {
		c.kill()
		forgetGone()
	})
	for round := range 3 {
		d := dumpAll(t, Options{}, c)
		if len(d.problems) > 0 {
			t.Fatalf("dump %d: %v", round, d.problems)
		}
		if n := len(d.set.Entries(skQueuesImage)); n != 12 {
			t.Errorf("dump %d has %d messages of unix sockets, want 12", round, n)
		}
		udp := 0
		for _, f := range d.set.Facts.Files {
			if f.Sock != nil {
				udp += len(f.Sock.Datagrams)
			}
		}
		if udp != 6 {
			t.Errorf("dump %d has %d datagrams of UDP, want 6", round, udp)
		}
	}
}
