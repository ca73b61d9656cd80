// Command gocheck is a Go HTTP server that notices when something about it
// breaks; the Go runtime brings its own threads, timers, signal handlers, epoll
// and memory layout along.
//
//	gocheck PREFIX ADDRESS [MIB [keep]]
//
// Same files and signals as selfcheck: PREFIX.ready, .log, .ok, .fail, SIGTERM.
// GET /next counts up by one and answers the number; /sum answers a digest of
// everything that was counted. With keep, connections stay open between requests.
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

var (
	prefix  string
	records atomic.Uint64
	stop    = make(chan struct{})
)

// verdict writes a file that only the first caller makes.
func verdict(suffix, text string) {
	f, err := os.OpenFile(prefix+"."+suffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return
	}
	_, _ = f.WriteString(text)
	_ = f.Close()
}

func fail(format string, args ...any) {
	verdict("fail", fmt.Sprintf("FAIL after %d records, pid %d: %s\n", records.Load(), os.Getpid(), fmt.Sprintf(format, args...)))
	os.Exit(1)
}

// state is what requests change.
type state struct {
	mu  sync.Mutex
	n   uint64
	sum [32]byte
}

func (s *state) next() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	s.sum = sha256.Sum256(fmt.Appendf(s.sum[:], "%d", s.n))
	return s.n
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: gocheck PREFIX ADDRESS [MIB [keep]]")
		os.Exit(2)
	}
	prefix = os.Args[1]
	mib := 64
	if len(os.Args) > 3 {
		n, err := strconv.Atoi(os.Args[3])
		if err != nil {
			fail("size: %v", err)
		}
		mib = n
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	log, err := os.OpenFile(prefix+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		fail("%v", err)
	}
	var s state
	mux := http.NewServeMux()
	mux.HandleFunc("GET /next", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, s.next()) })
	mux.HandleFunc("GET /sum", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, _ = fmt.Fprintf(w, "%d %x", s.n, s.sum)
	})
	l, err := net.Listen("tcp", os.Args[2])
	if err != nil {
		fail("%v", err)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	srv.SetKeepAlivesEnabled(len(os.Args) > 4) // or no connection outlives its request
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			fail("serve: %v", err)
		}
	}()
	var wg sync.WaitGroup
	wg.Go(func() { memory(mib) })
	wg.Go(pipeline)
	wg.Go(timers)
	wg.Go(garbage)
	verdict("ready", "ready\n")
	tick := time.NewTicker(10 * time.Millisecond)
	var last int64
	for done := false; !done; {
		select {
		case <-term:
			done = true
		case <-tick.C:
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
				fail("clock_gettime: %v", err)
			}
			if ts.Nano() < last {
				fail("the clock went back from %d to %d", last, ts.Nano())
			}
			last = ts.Nano()
			if _, err := fmt.Fprintf(log, "%d %d\n", records.Load(), last); err != nil {
				fail("append record: %v", err)
			}
			records.Add(1)
		}
	}
	close(stop)
	wg.Wait()
	verdict("ok", fmt.Sprintf("OK %d\n", records.Load()))
}

func stopping() bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

// memory holds blocks with their digests and rewrites them.
func memory(mib int) {
	type block struct {
		data []byte
		sum  [32]byte
	}
	blocks := make([]block, mib)
	write := func(i, version int) {
		if blocks[i].data == nil {
			blocks[i].data = make([]byte, 1<<20)
		}
		h := sha256.Sum256(fmt.Appendf(nil, "%d %d", i, version))
		for off := 0; off < len(blocks[i].data); off += len(h) {
			copy(blocks[i].data[off:], h[:])
			h[off/len(h)%len(h)]++
		}
		blocks[i].sum = sha256.Sum256(blocks[i].data)
	}
	for i := range blocks {
		write(i, 0)
	}
	for n := 0; !stopping(); n++ {
		i := n * 7 % len(blocks)
		if sha256.Sum256(blocks[i].data) != blocks[i].sum {
			fail("memory block %d changed by itself", i)
		}
		if n%4 == 0 {
			write(i, n)
		}
		time.Sleep(5 * time.Millisecond)
	}
	for i := range blocks {
		if sha256.Sum256(blocks[i].data) != blocks[i].sum {
			fail("memory block %d changed by itself", i)
		}
	}
}

// pipeline sends numbers through goroutines on threads of their own.
func pipeline() {
	in := make(chan int, 16)
	next := in
	for range 8 {
		out := make(chan int, 16)
		go func(in <-chan int, out chan<- int) {
			runtime.LockOSThread()
			for v := range in {
				out <- v + 1
			}
			close(out)
		}(next, out)
		next = out
	}
	go func() {
		defer close(in)
		for n := 0; !stopping(); n++ {
			in <- n
			if n%64 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
	}()
	want := 8
	for v := range next {
		if v != want {
			fail("pipeline brought %d, want %d", v, want)
		}
		want++
	}
}

// timers looks whether sleeps end neither early nor never.
func timers() {
	for !stopping() {
		t0 := time.Now()
		select {
		case <-time.After(300 * time.Millisecond):
		case <-time.After(60 * time.Second):
			fail("a timer of 300 ms did not come within 60 s")
		}
		if d := time.Since(t0); d < 300*time.Millisecond {
			fail("a timer of 300 ms came after %v", d)
		}
	}
}

// garbage keeps the collector, and the signals that it sends, busy.
func garbage() {
	type node struct {
		next *node
		n    int
	}
	for !stopping() {
		var list *node
		for i := range 20000 {
			list = &node{list, i}
		}
		runtime.GC()
		for want := 19999; list != nil; list, want = list.next, want-1 {
			if list.n != want {
				fail("list holds %d, want %d", list.n, want)
			}
		}
		time.Sleep(30 * time.Millisecond)
	}
}
