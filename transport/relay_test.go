package transport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"godwit/wire"
)

// relayNet carries frames between ends in memory, and loses some.
type relayNet struct {
	mu   sync.Mutex
	ends map[string]*Relay
	rng  *rand.Rand
	lose float64
	down bool
}

func (n *relayNet) put(host string, home bool, r *Relay) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ends[fmt.Sprint(host, home)] = r
}

func (n *relayNet) sender(from string) RelaySend {
	return func(host, id string, toHome bool, frame []byte) error {
		n.mu.Lock()
		down, lost := n.down, n.rng.Float64() < n.lose
		to := n.ends[fmt.Sprint(host, toHome)]
		back := n.ends[fmt.Sprint(from, !toHome)]
		n.mu.Unlock()
		h, payload, err := wire.ParseRelayFrame(bytes.Clone(frame))
		switch {
		case err != nil:
			return err
		case down:
			return errDown
		case lost:
		case to != nil:
			to.Handle(h, payload)
		case h.Type != wire.RelayGone:
			back.Handle(wire.RelayHeader{Type: wire.RelayGone, Epoch: h.Epoch}, nil)
		}
		return nil
	}
}

func newRelayNet(lose float64) *relayNet {
	return &relayNet{ends: map[string]*Relay{}, rng: rand.New(rand.NewPCG(1, 2)), lose: lose}
}

func (n *relayNet) home(window int) *Relay {
	r := NewRelay(RelayConfig{ID: "x", Home: true, Host: "alpha", Reads: true, Writes: true, Send: n.sender("alpha"), Window: window, Chunk: 5000})
	n.put("alpha", true, r)
	r.Activate()
	return r
}

func (n *relayNet) tree(host string, epoch uint32, window int) *Relay {
	r := NewRelay(RelayConfig{ID: "x", Host: host, Peer: "alpha", Epoch: epoch, Reads: true, Writes: true, Send: n.sender(host), Window: window, Chunk: 3000})
	n.put(host, false, r)
	r.Activate()
	return r
}

// feedRelay puts n random bytes and then the end, until stop.
func feedRelay(r *Relay, src io.Reader, sum hash.Hash, stop <-chan struct{}) (ended bool) {
	for {
		n := r.Room(stop)
		if n == 0 {
			return false
		}
		p := make([]byte, min(n, 1+rand.IntN(4000)))
		got, err := io.ReadFull(src, p)
		sum.Write(p[:got])
		r.Put(p[:got])
		if err != nil {
			r.Fin()
			return true
		}
	}
}

func drainRelay(r *Relay, sum hash.Hash, stop <-chan struct{}) (ended bool) {
	for {
		select {
		case <-stop:
			return false
		default:
		}
		p, fin, ok := r.Next(stop)
		switch {
		case !ok:
			return false
		case fin:
			r.Shut()
			return true
		}
		n := 1 + rand.IntN(len(p))
		sum.Write(p[:n])
		r.Took(n)
	}
}

// TestRelay sends bytes both ways while the tree's end moves from host to host and
// frames are lost.
func TestRelay(t *testing.T) {
	for _, lose := range []float64{0, 0.02} {
		t.Run(fmt.Sprint(lose), func(t *testing.T) {
			const size = 2 << 20
			n := newRelayNet(lose)
			home := n.home(40000)
			random := func(seed byte) io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size) }
			var sums [4]hash.Hash
			for i := range sums {
				sums[i] = sha256.New()
			}
			never := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { feedRelay(home, random(1), sums[0], never) })
			wg.Go(func() { drainRelay(home, sums[1], never) })
			up, upDone, downDone := random(2), false, false
			for epoch := uint32(1); ; epoch++ {
				host := []string{"beta", "alpha", "gamma"}[epoch%3]
				tree := n.tree(host, epoch, 30000)
				stop := make(chan struct{})
				var ends sync.WaitGroup
				ends.Go(func() {
					if upDone { // as the new host finds it out again
						tree.Fin()
						return
					}
					upDone = feedRelay(tree, up, sums[2], stop)
				})
				ends.Go(func() { downDone = drainRelay(tree, sums[3], stop) || downDone })
				if epoch < 12 {
					time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
					close(stop)
					ends.Wait()
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					if err := tree.Settle(ctx); err != nil {
						t.Fatal(err)
					}
					cancel()
					tree.Leave()
					continue
				}
				ends.Wait()
				wg.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if !tree.PeerShut(ctx.Done()) || !home.PeerShut(ctx.Done()) || !home.Over() || !tree.Over() {
					t.Error("the relay does not come to its end")
				}
				tree.Leave()
				home.Leave()
				break
			}
			if !upDone || !downDone {
				t.Errorf("ended: up %v, down %v", upDone, downDone)
			}
			for i, j := range map[int]int{0: 3, 2: 1} {
				if !bytes.Equal(sums[i].Sum(nil), sums[j].Sum(nil)) {
					t.Errorf("direction %d: other bytes arrived than were sent", i)
				}
			}
			if st := home.Stats(); st.Sent != size || st.Received != size {
				t.Errorf("home counts %d sent, %d received, want %d", st.Sent, st.Received, size)
			}
		})
	}
}

// TestRelayStall: with the bus away nothing ends, and all comes when it is back.
func TestRelayStall(t *testing.T) {
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	defer home.Leave()
	defer tree.Leave()
	never := make(chan struct{})
	if home.Room(never) == 0 {
		t.Fatal("nobody wants anything")
	}
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	home.Put([]byte("while it is away"))
	stop := make(chan struct{})
	time.AfterFunc(200*time.Millisecond, func() { close(stop) })
	if p, fin, ok := tree.Next(stop); ok {
		t.Fatalf("%q, end %v came over a bus that is away", p, fin)
	}
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
	if p, _, ok := tree.Next(never); !ok || string(p) != "while it is away" {
		t.Fatalf("%q, %v", p, ok)
	}
}

// TestRelayGone: an agent that has lost its end means the end of the object.
func TestRelayGone(t *testing.T) {
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	defer home.Leave()
	never := make(chan struct{})
	home.Room(never)
	home.Put([]byte("lost"))
	tree.Leave()
	n.put("beta", false, nil)
	n.mu.Lock()
	delete(n.ends, fmt.Sprint("beta", false))
	n.mu.Unlock()
	if !home.PeerShut(never) || home.Err() == nil || home.Room(never) != 0 {
		t.Errorf("error %v, want that the object is lost", home.Err())
	}
	if _, fin, ok := home.Next(never); !ok || !fin {
		t.Error("no end of file")
	}
}

// TestRelayWindow: neither end keeps more than its window.
func TestRelayWindow(t *testing.T) {
	n := newRelayNet(0)
	home, tree := n.home(10000), n.tree("beta", 1, 6000)
	defer home.Leave()
	defer tree.Leave()
	stop := make(chan struct{})
	time.AfterFunc(500*time.Millisecond, func() { close(stop) })
	feedRelay(home, rand.NewChaCha8([32]byte{}), sha256.New(), stop)
	if got := tree.Stats().Waiting; got > 6000 || got == 0 {
		t.Errorf("%d bytes wait at the tree's end, at most 6000 may", got)
	}
	if got := home.Stats().Waiting; got > 10000 || got == 0 {
		t.Errorf("%d bytes wait at home, at most 10000 may", got)
	}
}

// TestRelayFarewell: an agent that is stopped says so, and is believed at once.
func TestRelayFarewell(t *testing.T) {
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	defer tree.Leave()
	never := make(chan struct{})
	home.Room(never)
	tree.Room(never)
	home.Farewell()
	home.Leave()
	if !tree.PeerShut(never) || !errors.Is(tree.Err(), ErrRelayGone) {
		t.Errorf("error %v, want ErrRelayGone", tree.Err())
	}
}

// TestRelayPutAfterShut: the other end takes no more while bytes are being read for it.
func TestRelayPutAfterShut(t *testing.T) {
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	defer home.Leave()
	defer tree.Leave()
	never := make(chan struct{})
	home.Room(never)
	tree.Shut()
	if !home.PeerShut(never) {
		t.Fatal("nobody says that no more is taken")
	}
	home.Put([]byte("too late"))
	home.Put([]byte("and again"))
	home.Flush(true)
	time.Sleep(2 * relayTick) // a frame is made meanwhile
	if st := home.Stats(); st.Waiting != 0 {
		t.Errorf("%d bytes wait for nobody", st.Waiting)
	}
}

// TestRelayPutBeforeOpen: a tree that moves on before home has answered brings home
// all that it wrote, behind what was written elsewhere.
func TestRelayPutBeforeOpen(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	defer home.Leave()
	tree.Room(ctx.Done())
	want := "written on beta"
	tree.Put([]byte(want))
	if err := tree.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	tree.Leave()
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	tree = n.tree("gamma", 2, 0)
	defer tree.Leave()
	tree.Flush(true)
	for _, s := range []string{", and", " on gamma"} {
		tree.Put([]byte(s))
		want += s
	}
	tree.Fin()
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
	if err := tree.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	got := ""
	for {
		p, fin, ok := home.Next(ctx.Done())
		if !ok || fin {
			break
		}
		got += string(p)
		home.Took(len(p))
	}
	if got != want {
		t.Errorf("home has %q, want %q", got, want)
	}
}

// TestRelayHeir: another home gets what the lost one had not taken, and nothing twice.
func TestRelayHeir(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	n := newRelayNet(0)
	home, tree := n.home(0), n.tree("beta", 1, 0)
	tree.Room(ctx.Done())
	tree.Put([]byte("shown"))
	if err := tree.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	home.Put([]byte("typed"))
	if p, _, ok := tree.Next(ctx.Done()); !ok || string(p) != "typed" {
		t.Fatalf("the tree got %q, %v", p, ok)
	}
	tree.Took(5)
	home.Leave()
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	tree.Put([]byte("written "))
	tree.Put([]byte("meanwhile"))
	tree.Leave()
	heir := tree.Heir(RelayConfig{ID: "x", Host: "beta", Peer: "alpha", Epoch: 2, Reads: true, Writes: true, Send: n.sender("beta"), Chunk: 3000})
	n.put("beta", false, heir)
	heir.Activate()
	defer heir.Leave()
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
	home = n.home(0)
	defer home.Leave()
	heir.Fin()
	home.Put([]byte("typed again"))
	if p, _, ok := heir.Next(ctx.Done()); !ok || string(p) != "typed again" {
		t.Errorf("the tree got %q, %v", p, ok)
	}
	got := ""
	for {
		p, fin, ok := home.Next(ctx.Done())
		if !ok || fin {
			break
		}
		got += string(p)
		home.Took(len(p))
	}
	if got != "written meanwhile" {
		t.Errorf("home has %q", got)
	}
}
