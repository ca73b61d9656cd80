package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// tcpPair starts a tree on h whose TCP connections lead to a peer on other.
func tcpPair(ctx context.Context, t *testing.T, h, other *hosts.Host, args ...string) (tree, peer *workloads.Run) {
	t.Helper()
	dir := newDir(t)
	peer = selfcheck(ctx, t, other, dir, "tcppeer", "7000")
	return selfcheck(ctx, t, h, dir, "tcpout", args...), peer
}

// TestTCPOutside dumps and restores a tree whose TCP connections lead to a peer
// outside of it, which must not notice anything but a pause.
func TestTCPOutside(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, family, address string
		far                   bool // the peer is on another host
		device                string
	}{
		{name: "loopback", family: "4", address: "127.0.0.1"},
		{name: "loopback IPv6", family: "6", address: "::1"},
		{name: "loopback mapped", family: "m", address: "127.0.0.1"},
		{name: "veth", family: "4", far: true},
		{name: "veth mapped", family: "m", far: true},
		{name: "veth by device", family: "4", far: true, device: "eth0"},
		{name: "veth IPv6", family: "6", address: "fd00:5::2", far: true},
		{name: "veth of the link", family: "6", address: "fe80::5:2", far: true, device: "eth0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := deadline(t, 3*time.Minute)
			env := newHosts(t, "alpha", "beta")
			h, other := env.Host("alpha"), env.Host("alpha")
			if tc.far {
				other = env.Host("beta")
				for i, x := range []*hosts.Host{h, other} {
					for _, a := range []string{"fd00:5::", "fe80::5:"} {
						if _, err := x.Run(ctx, "ip", "addr", "add", fmt.Sprintf("%s%d/64", a, i+1), "dev", "eth0", "nodad"); err != nil {
							t.Fatal(err)
						}
					}
				}
				if tc.address == "" {
					tc.address = other.Addr().String()
				}
			}
			args := []string{tc.family, tc.address, "7000"}
			if tc.device != "" {
				args = append(args, tc.device)
			}
			r, peer := tcpPair(ctx, t, h, other, args...)
			for range 10 {
				dumpRestore(ctx, t, r, 1, "--tcp-established")
				reached(ctx, t, other)
				goes(ctx, t, peer, 5)
			}
			tell := time.AfterFunc(time.Minute, func() {
				out, err := other.Run(ctx, "ss", "-tnoime")
				t.Logf("the end takes long: %v\n%s", err, out)
			})
			defer tell.Stop()
			stop(ctx, t, r)
			stop(ctx, t, peer)
		})
	}
}

// unanswered is a timer of ss(8) of a segment, or a probe of the window, that was sent again.
var unanswered = regexp.MustCompile(`timer:\((on|persist),[^,]*,[1-9]`)

// reached waits until the other ends of all connections of a host have answered: each
// try that a lock of the network swallows doubles the time to the next.
func reached(ctx context.Context, t *testing.T, h *hosts.Host) {
	t.Helper()
	for {
		out, err := h.Run(ctx, "ss", "-Htno", "exclude", "syn-sent")
		if err != nil {
			t.Fatal(err)
		}
		if !unanswered.MatchString(out) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("segments are not answered:\n%s", out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestTCPExternalNetwork is the same for a tree in a network namespace that
// outlives it, as a runtime for containers makes it.
func TestTCPExternalNetwork(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	if _, err := h.Run(ctx, "sh", "-ec", "ip netns add box; ip link add v0 type veth peer name v1 netns box; ip addr add 10.79.0.1/24 dev v0; ip link set v0 up; "+
		"ip -n box addr add 10.79.0.2/24 dev v1; ip -n box link set v1 up; ip -n box link set lo up"); err != nil {
		t.Fatal(err)
	}
	box, err := os.Open(h.Path("/run/netns/box"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = box.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(box.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	dir := newDir(t)
	peer := selfcheck(ctx, t, h, dir, "tcppeer", "7000")
	prefix := filepath.Join(dir, "tcpout")
	r := start(ctx, t, h, prefix, "nsenter", "--net=/run/netns/box", programs.Selfcheck, "tcpout", prefix, "4", "10.79.0.1", "7000")
	for range 5 {
		img := dump(ctx, t, h, r.Pid, "--tcp-established", "--external", fmt.Sprintf("net[%d]:box", st.Ino))
		tables, err := h.Run(ctx, "nsenter", "--net=/run/netns/box", binaries.Agent, "network-locks")
		if err != nil || !strings.Contains(tables, "10.79.0.1:7000") {
			t.Errorf("locked in the namespace: %q, %v", tables, err)
		}
		goes(ctx, t, peer, 20)
		restore(ctx, t, h, img, r.Pid, []*os.File{box}, "--tcp-established", "--inherit-fd", "fd[3]:box")
		goes(ctx, t, r, 10)
		goes(ctx, t, peer, 5)
		if tables, err = h.Run(ctx, "nsenter", "--net=/run/netns/box", binaries.Agent, "network-locks"); err != nil || tables != "" {
			t.Errorf("locked after the restore: %q, %v", tables, err)
		}
	}
	stop(ctx, t, r)
	stop(ctx, t, peer)
}

// locks lists the network locks of a host by their names.
func locks(ctx context.Context, t *testing.T, h *hosts.Host) map[string][]string {
	t.Helper()
	var list []struct {
		ID          string
		Connections []string
	}
	if err := json.Unmarshal([]byte(mustAgent(ctx, t, h, nil, "network-locks", "--output", "json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, l := range list {
		out[l.ID] = l.Connections
	}
	return out
}

// TestNetworkLock is about the time between a dump and its restore.
func TestNetworkLock(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	env := newHosts(t, "alpha", "beta")
	h, other := env.Host("alpha"), env.Host("beta")
	unlocked := func(t *testing.T, when string) {
		t.Helper()
		if ls := locks(ctx, t, h); len(ls) > 0 {
			t.Errorf("%s the network is locked: %v", when, ls)
		}
	}
	r, peer := tcpPair(ctx, t, h, other, "4", other.Addr().String(), "7000")
	t.Run("left running", func(t *testing.T) {
		for range 3 {
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R", "--tcp-established")
			unlocked(t, "after a dump that leaves the tree running")
			goes(ctx, t, r, 10)
		}
	})
	t.Run("failed dump", func(t *testing.T) {
		o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--tcp-established",
			"--action-script", `test "$CRTOOLS_SCRIPT_ACTION" != post-dump`)
		if o.code != 1 {
			t.Errorf("exit code %d", o.code)
		}
		unlocked(t, "after a failed dump")
		goes(ctx, t, r, 10)
	})
	t.Run("killed dump", func(t *testing.T) {
		reached := filepath.Join(newDir(t), "reached")
		cmd := h.Command(ctx, binaries.Agent, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--tcp-established",
			"--action-script", `if test "$CRTOOLS_SCRIPT_ACTION" = post-dump; then echo $PPID > `+reached+`; exec sleep 1000; fi`)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		agent := 0
		for agent == 0 {
			b, err := os.ReadFile(reached)
			if err == nil && strings.HasSuffix(string(b), "\n") {
				if agent, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
					t.Fatal(err)
				}
			}
			if ctx.Err() != nil {
				t.Fatal("the dump does not come to its end")
			}
			time.Sleep(5 * time.Millisecond)
		}
		if err := h.Kill(agent, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Error("the killed dump succeeded")
		}
		goes(ctx, t, r, 10)
		unlocked(t, "after a killed dump")
	})
	t.Run("restore", func(t *testing.T) {
		img := dump(ctx, t, h, r.Pid, "--tcp-established")
		ls := locks(ctx, t, h)
		if len(ls) != 1 {
			t.Fatalf("locks: %v, want one", ls)
		}
		for _, conns := range ls {
			want := other.Addr().String() + ":7000"
			if !slices.ContainsFunc(conns, func(c string) bool { return strings.HasSuffix(c, want) }) {
				t.Errorf("locked are %v, want one to %s", conns, want)
			}
		}
		fails := func(h *hosts.Host, want string, args ...string) {
			t.Helper()
			o := agentCmd(ctx, t, h, nil, append([]string{"restore", "-D", img, "-d"}, args...)...)
			if o.code != 1 || !strings.Contains(o.stderr, want) {
				t.Errorf("restore %v: exit code %d, %q; want 1 and %q", args, o.code, o.stderr, want)
			}
		}
		fails(h, "restore with --tcp-established")
		fails(other, "this host does not have the address", "--tcp-established")
		fails(h, "failed at stage pre-resume", "--tcp-established", "--action-script", `test "$CRTOOLS_SCRIPT_ACTION" != pre-resume`)
		restore(ctx, t, h, img, r.Pid, nil, "--tcp-established")
		goes(ctx, t, r, 10)
		goes(ctx, t, peer, 10)
		unlocked(t, "after the restore")
		fails(h, "this host has a TCP connection from", "--tcp-established", "--pid-namespace", "new")
		goes(ctx, t, r, 10)
	})
	t.Run("long", func(t *testing.T) {
		img := dump(ctx, t, h, r.Pid, "--tcp-established")
		goes(ctx, t, peer, 200) // its retransmissions come to nothing
		restore(ctx, t, h, img, r.Pid, nil, "--tcp-established")
		goes(ctx, t, r, 100)
	})
	stop(ctx, t, r)
	stop(ctx, t, peer)
	t.Run("forgotten", func(t *testing.T) {
		r, peer := tcpPair(ctx, t, h, other, "4", other.Addr().String(), "7000")
		dump(ctx, t, h, r.Pid, "--tcp-established")
		for id := range locks(ctx, t, h) {
			mustAgent(ctx, t, h, nil, "network-locks", "--remove", id)
			if o := agentCmd(ctx, t, h, nil, "network-locks", "--remove", id); o.code != 1 || !strings.Contains(o.stderr, "there is no network lock") {
				t.Errorf("removed again: exit code %d, %q", o.code, o.stderr)
			}
		}
		unlocked(t, "after the removal")
		// The peer is told at last, and ends.
		if err := other.WaitGone(ctx, peer.Pid); err != nil {
			t.Fatal(err)
		}
	})
}

// TestTCPInFlight leaves connections behind that nobody has accepted.
func TestTCPInFlight(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "tcpflight", "7100")
	for range 3 {
		c, err := h.Dial("tcp", "127.0.0.1:7100", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "--tcp-established")
		if o.code != 1 || !strings.Contains(o.stderr, "--skip-in-flight") {
			t.Errorf("dump without --skip-in-flight: exit code %d, %q", o.code, o.stderr)
		}
		img := dump(ctx, t, h, r.Pid, "--tcp-established", "--skip-in-flight")
		restore(ctx, t, h, img, r.Pid, nil, "--tcp-established")
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection that was left behind: %v", err)
		}
		_ = c.Close()
	}
	c, err := h.Dial("tcp", "127.0.0.1:7100", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	stop(ctx, t, r)
}

// TestTCPClose wants images of --tcp-close restored so, and not otherwise; the peer
// outside sees the end at the dump.
func TestTCPClose(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "tcpclose")
	img := dump(ctx, t, h, r.Pid, "--tcp-close")
	if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d", "--tcp-established"); o.code != 1 || !strings.Contains(o.stderr, "was dumped with --tcp-close") {
		t.Errorf("restore without --tcp-close: exit code %d, %q", o.code, o.stderr)
	}
	restore(ctx, t, h, img, r.Pid, nil, "--tcp-close")
	goes(ctx, t, r, 10)
	// What was carried whole can be closed, too.
	img = dump(ctx, t, h, r.Pid, "--tcp-established")
	restore(ctx, t, h, img, r.Pid, nil, "--tcp-close")
	goes(ctx, t, r, 10)
	stop(ctx, t, r)
}

// TestHTTPClients asks a Go server all the time over connections that are kept
// open, while it is dumped and restored: no request fails and none is done twice.
func TestHTTPClients(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "gocheck")
	r := start(ctx, t, h, prefix, programs.Gocheck, prefix, "127.0.0.1:8080", "8", "keep")
	var done atomic.Bool
	var wg sync.WaitGroup
	var mu sync.Mutex
	var got []int
	ask := func(c net.Conn, in *bufio.Reader) error {
		if _, err := io.WriteString(c, "GET /next HTTP/1.1\r\nHost: alpha\r\n\r\n"); err != nil {
			return err
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(string(b))
		mu.Lock()
		defer mu.Unlock()
		got = append(got, n)
		return err
	}
	for range 4 {
		c, err := h.Dial("tcp", "127.0.0.1:8080", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		in := bufio.NewReader(c)
		if err := ask(c, in); err != nil { // it has been accepted
			t.Fatal(err)
		}
		wg.Go(func() {
			for !done.Load() {
				if err := ask(c, in); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	dumpRestore(ctx, t, r, 10, "--tcp-established")
	done.Store(true)
	wg.Wait()
	slices.Sort(got)
	for i, n := range got {
		if n != i+1 {
			t.Fatalf("answer %d is %d", i+1, n)
		}
	}
	if len(got) < 100 {
		t.Errorf("only %d requests", len(got))
	}
	stop(ctx, t, r)
}

// TestRedisPipeline keeps a pipeline of commands full on one connection, and
// redis-cli at work on another, while the server is dumped and restored.
func TestRedisPipeline(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	pid, err := h.Start(ctx, hosts.Spec{
		Args:   []string{"/usr/bin/redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", dir, "--daemonize", "no"},
		Stdout: filepath.Join(dir, "redis.out"), Stderr: filepath.Join(dir, "redis.out"),
	})
	if err != nil {
		t.Fatal(err)
	}
	for {
		if o, err := h.Run(ctx, "redis-cli", "ping"); err == nil && strings.TrimSpace(o) == "PONG" {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("redis-server does not answer")
		}
		time.Sleep(10 * time.Millisecond)
	}
	c, err := h.Dial("tcp", "127.0.0.1:6379", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	// redis-cli --pipe takes commands as they come.
	cli := h.Command(ctx, "redis-cli", "--pipe")
	in, err := cli.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cli.Stdout, cli.Stderr = &out, &out
	if err := cli.Start(); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var wg sync.WaitGroup
	var sent, piped atomic.Int64
	wg.Go(func() {
		for !done.Load() {
			if _, err := io.WriteString(c, strings.Repeat("INCR pipeline\r\n", 100)); err != nil {
				t.Error(err)
				break
			}
			sent.Add(100)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		for !done.Load() {
			if _, err := io.WriteString(in, strings.Repeat("INCR piped\r\n", 10)); err != nil {
				t.Error(err)
				break
			}
			piped.Add(10)
			time.Sleep(time.Millisecond)
		}
		_ = in.Close()
	})
	var answers atomic.Int64
	wg.Go(func() {
		for s := bufio.NewScanner(c); s.Scan(); {
			if n := answers.Add(1); s.Text() != fmt.Sprintf(":%d", n) {
				t.Errorf("answer %d is %q", n, s.Text())
				return
			}
		}
	})
	for range 10 {
		img := dump(ctx, t, h, pid, "--tcp-established")
		before := answers.Load()
		restore(ctx, t, h, img, pid, nil, "--tcp-established")
		for answers.Load() < before+1000 {
			if ctx.Err() != nil {
				t.Fatal("the pipeline stands still")
			}
			time.Sleep(time.Millisecond)
		}
		if err := os.RemoveAll(img); err != nil {
			t.Fatal(err)
		}
	}
	done.Store(true)
	wg.Wait()
	if err := cli.Wait(); err != nil {
		t.Errorf("redis-cli: %v: %s", err, out.String())
	}
	if want := fmt.Sprintf("errors: 0, replies: %d", piped.Load()); !strings.Contains(out.String(), want) {
		t.Errorf("redis-cli says %q, want %q", out.String(), want)
	}
	if answers.Load() != sent.Load() {
		t.Errorf("%d answers to %d commands", answers.Load(), sent.Load())
	}
	for key, want := range map[string]int64{"pipeline": sent.Load(), "piped": piped.Load()} {
		if got := redisDo(ctx, t, h, "get", key); got != fmt.Sprint(want) {
			t.Errorf("%s is %s, want %d", key, got, want)
		}
	}
}
