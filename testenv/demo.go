package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/setup"
	"godwit/testenv/workloads"
)

// Paths on the demo's hosts. The fifo and the log are files of one host each,
// under other names on the destination: nothing carries them over.
const (
	fifoAlpha, fifoBeta = "/run/orders.fifo", "/run/beta-orders.fifo"
	logAlpha, logBeta   = "/run/audit.log", "/run/beta-audit.log"
	servicePort         = 7000
)

// demoBase is where the demo puts what it builds; not /tmp, which is another one
// on each host.
var demoBase = "/var/tmp"

// demo moves a running ledger, with its worker, from alpha to beta.
func demo(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	keep := fs.Bool("keep", false, "leave the hosts there to look around, until Ctrl-C")
	memory := fs.Int("memory", 256, "memory of the workload, MiB")
	if err := fs.Parse(args); err != nil || fs.NArg() > 0 || *memory < 1 {
		return errUsage
	}
	return runDemo(ctx, os.Stdout, *memory, *keep)
}

// show is the demo: its hosts, what runs on them, and what was seen.
type show struct {
	out     io.Writer
	dir     string
	env     *hosts.Env
	fleet   *fleet.Fleet
	bin     *fleet.Binaries
	ledger  string
	service netip.Addr

	run    *workloads.Run
	client *talker
	lines  int // sent through the fifos
}

func (s *show) say(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format+"\n", args...) }
func (s *show) head(title string)              { s.say("\n── %s", title) }

func runDemo(ctx context.Context, out io.Writer, memory int, keep bool) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes namespaces and traces processes: run it as root")
	}
	if err := setup.Ensure(ctx, out, setup.Hosts); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(demoBase, "godwit-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	s := &show{out: out, dir: dir, service: hosts.Net.Addr()}
	for range 100 {
		s.service = s.service.Next()
	}
	if err := s.build(ctx); err != nil {
		return err
	}
	s.env, err = hosts.New(dir, "alpha", "beta", "hub", "client")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.env.Close())
		if ctx.Err() != nil {
			s.say("\nInterrupted; the hosts and everything on them are gone.")
		}
	}()
	for _, step := range []func(context.Context) error{
		s.start,
		func(ctx context.Context) error { return s.workload(ctx, memory) },
		s.plan,
		s.move,
		s.proof,
		func(ctx context.Context) error { return s.end(ctx, keep) },
	} {
		if err := step(ctx); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return err
		}
	}
	return nil
}

func (s *show) build(ctx context.Context) (err error) {
	begin := time.Now()
	s.say("Building godwit, godwit-agent and the workload …")
	if s.bin, err = fleet.Build(ctx, filepath.Join(s.dir, "bin")); err != nil {
		return err
	}
	if s.ledger, err = workloads.BuildLedger(ctx, filepath.Join(s.dir, "bin")); err != nil {
		return err
	}
	s.say("built in %.1f s", time.Since(begin).Seconds())
	return nil
}

func (s *show) start(ctx context.Context) (err error) {
	s.head("Hosts")
	if s.fleet, err = fleet.Start(ctx, s.env, s.bin, filepath.Join(s.dir, "fleet"), "hub", []string{"alpha", "beta"}); err != nil {
		return err
	}
	for _, h := range []struct{ name, role string }{
		{"alpha", "source, with its agent"}, {"beta", "destination, with its agent"},
		{"hub", "coordinator and message bus"}, {"client", "the workload's client"},
	} {
		s.say("  %-7s %-10s  %s", h.name, s.env.Host(h.name).Addr(), h.role)
	}
	s.say("Each has its own network, mounts, pids, /proc, /tmp and /run.")
	return nil
}

func (s *show) workload(ctx context.Context, memory int) (err error) {
	alpha := s.env.Host("alpha")
	if _, err := alpha.Run(ctx, "mkfifo", fifoAlpha); err != nil {
		return err
	}
	if err := alpha.AddAddress(s.service); err != nil {
		return err
	}
	prefix := filepath.Join(s.dir, "work", "ledger")
	s.run, err = workloads.Start(ctx, alpha, prefix, s.ledger, prefix, fmt.Sprintf("0.0.0.0:%d", servicePort), fifoAlpha, logAlpha, strconv.Itoa(memory))
	if err != nil {
		return err
	}
	s.client, err = newTalker(s.env.Host("client"), netip.AddrPortFrom(s.service, servicePort))
	if err != nil {
		return err
	}
	go s.client.talk(ctx)
	if err := s.feed(ctx, "alpha", fifoAlpha, logAlpha, 0, 200); err != nil {
		return err
	}
	// Enough answers to know that they come steadily.
	if err := s.client.wait(ctx, 300); err != nil {
		return err
	}
	s.head("Workload")
	s.say("  ledger and its worker, pid %d on alpha, %d MiB, serves UDP on %s:%d", s.run.Pid, memory, s.service, servicePort)
	s.say("  client writes entry after entry; each is acknowledged with the digest of all so far")
	s.say("  lines that come through %s are appended to %s: %d until now", fifoAlpha, logAlpha, s.lines)
	return nil
}

// feed sends n numbered lines through a fifo of a host and waits until they are
// in the log there, whose first line is number first.
func (s *show) feed(ctx context.Context, host, fifo, log string, first, n int) error {
	h := s.env.Host(host)
	f, err := os.OpenFile(h.Path(fifo), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for range n {
		if _, err := fmt.Fprintln(f, s.lines); err != nil {
			return err
		}
		s.lines++
	}
	for {
		b, err := os.ReadFile(h.Path(log))
		if err != nil {
			return err
		}
		got := strings.Fields(string(b))
		for i, l := range got {
			if l != strconv.Itoa(first+i) {
				return fmt.Errorf("line %d of %s on %s is %q, want %d", i, log, host, l, first+i)
			}
		}
		if len(got) == s.lines-first {
			return nil
		}
		if err := s.run.Failed(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// keys are the external keys of the ledger's fifo and log.
func (s *show) keys() (fifo, log string, err error) {
	fds, err := os.ReadDir(s.run.Host.Path(fmt.Sprintf("/proc/%d/fd", s.run.Pid)))
	if err != nil {
		return "", "", err
	}
	for _, de := range fds {
		p := s.run.Host.Path(fmt.Sprintf("/proc/%d/fd/%s", s.run.Pid, de.Name()))
		link, err := os.Readlink(p)
		if err != nil {
			return "", "", err
		}
		if link != fifoAlpha && link != logAlpha {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			return "", "", &os.PathError{Op: "stat", Path: p, Err: err}
		}
		info, err := os.ReadFile(s.run.Host.Path(fmt.Sprintf("/proc/%d/fdinfo/%s", s.run.Pid, de.Name())))
		if err != nil {
			return "", "", err
		}
		mnt := -1
		for line := range strings.Lines(string(info)) {
			if rest, ok := strings.CutPrefix(line, "mnt_id:"); ok {
				if mnt, err = strconv.Atoi(strings.TrimSpace(rest)); err != nil {
					return "", "", err
				}
			}
		}
		k := fmt.Sprintf("file[%x:%x]", mnt, st.Ino)
		if link == fifoAlpha {
			fifo = k
		} else {
			log = k
		}
	}
	if fifo == "" || log == "" {
		return "", "", fmt.Errorf("pid %d has no fifo or no log open", s.run.Pid)
	}
	return fifo, log, nil
}

func (s *show) plan(ctx context.Context) error {
	fifo, log, err := s.keys()
	if err != nil {
		return err
	}
	s.head("Plan: what alpha's agent finds, without touching anything")
	text, err := s.env.Host("alpha").Run(ctx, s.bin.Agent, "inspect", "-t", strconv.Itoa(s.run.Pid), "--external", fifo, "--external", log)
	if err != nil {
		return err
	}
	s.say("%s", indent(strings.TrimSpace(text)))
	s.say("\n  The fifo and the log exist on alpha only. On beta other files take their place:")
	s.say("    %-14s %s, reopened with the flags that the process had", fifo, fifoBeta)
	s.say("    %-14s %s, forwarded as beta's agent opened it", log, logBeta)
	return nil
}

func indent(s string) string { return "  " + strings.ReplaceAll(s, "\n", "\n  ") }

func (s *show) move(ctx context.Context) error {
	alpha, beta := s.env.Host("alpha"), s.env.Host("beta")
	fifo, log, err := s.keys()
	if err != nil {
		return err
	}
	if _, err := beta.Run(ctx, "sh", "-c", "mkfifo "+fifoBeta+" && : >"+logBeta); err != nil {
		return err
	}
	args := []string{"migrate", fmt.Sprintf("alpha:%d", s.run.Pid), "beta",
		"--inherit", fifo + "=" + fifoBeta, "--inherit", log + "=" + logBeta + ",forward"}
	s.head("godwit " + strings.Join(args, " "))
	s.client.mark()
	cmd := s.fleet.Godwit(ctx, args...)
	cmd.Stdout, cmd.Stderr = s.out, s.out // progress in its place among the rest
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the migration failed: %w; %v", err, s.run.Failed())
	}
	// The tree's address follows it; godwit moves processes, not networks.
	if err := alpha.RemoveAddress(s.service); err != nil {
		return err
	}
	if err := beta.AddAddress(s.service); err != nil {
		return err
	}
	s.say("address %s moved from alpha to beta", s.service)
	s.run.Host = beta
	first := s.lines
	if err := s.feed(ctx, "beta", fifoBeta, logBeta, first, 200); err != nil {
		return err
	}
	s.say("lines %d to %d went through beta's fifo into beta's log", first, s.lines-1)
	if err := s.client.wait(ctx, 300); err != nil {
		return err
	}
	return s.run.Goes(ctx, 100)
}

func (s *show) proof(ctx context.Context) error {
	alpha, beta := s.env.Host("alpha"), s.env.Host("beta")
	hist, err := s.fleet.History(ctx)
	if err != nil {
		return err
	}
	if len(hist) == 0 || hist[0].FrozenMS == nil {
		return errors.New("godwit history does not know the migration")
	}
	m := hist[0]
	rs, err := s.run.Records()
	if err != nil {
		return err
	}
	c := s.client.seen()
	var bad []error
	if c.err != nil {
		bad = append(bad, c.err)
	}
	if err := s.run.Failed(); err != nil {
		bad = append(bad, err)
	}
	if alpha.Alive(s.run.Pid) {
		bad = append(bad, fmt.Errorf("pid %d still runs on alpha", s.run.Pid))
	}
	if !beta.Alive(s.run.Pid) {
		bad = append(bad, fmt.Errorf("pid %d does not run on beta", s.run.Pid))
	}
	s.head("What happened")
	s.say("  moved      %d processes, %d threads, %.0f MiB in %.2f s; frozen for %.0f ms", m.Tasks, m.Threads, float64(m.Bytes)/(1<<20), m.TotalMS/1000, *m.FrozenMS)
	s.say("  workload   %d records of its own, numbered without a hole; longest pause between two %d ms", len(rs), workloads.MaxGap(rs).Milliseconds())
	s.say("  client     %d entries acknowledged, %d of them since the migration began; none lost, none entered twice,", c.acked, c.acked-c.atMark)
	s.say("             no counter went back; server and client agree on the digest %x…", c.sum[:6])
	s.say("             longest wait for an answer %d ms, %d requests were repeated meanwhile", c.longest.Milliseconds(), c.repeats)
	s.say("  fifo, log  %d lines in order: alpha's log ends where beta's begins, no byte lost or doubled", s.lines)
	s.say("  one copy   pid %d runs on beta and is gone from alpha", s.run.Pid)
	s.say("  errors     %d", len(bad))
	return errors.Join(bad...)
}

func (s *show) end(ctx context.Context, keep bool) error {
	if keep {
		s.head("Look around (Ctrl-C ends everything)")
		for _, n := range s.env.Names() {
			s.say("  a shell on %-7s nsenter -t %d -a sh", n, s.env.Host(n).InitPid())
		}
		s.say("  processes of beta  %s", s.fleet.GodwitLine("ps", "beta"))
		s.say("  all migrations     %s", s.fleet.GodwitLine("history"))
		s.say("  and back           %s", s.fleet.GodwitLine("migrate", fmt.Sprintf("beta:%d", s.run.Pid), "alpha", "--help"))
		s.say("  logs               %s", s.fleet.Dir)
		<-ctx.Done()
		return ctx.Err()
	}
	s.client.stop()
	if err := s.run.Stop(ctx); err != nil {
		return err
	}
	s.say("\nThe workload checked everything once more and ended well; the hosts are taken down. To look around: go run ./testenv demo --keep")
	return nil
}

// talker is the client: it writes entry after entry, repeats what is not
// answered, and compares each acknowledgement with what it knows itself.
type talker struct {
	conn net.PacketConn
	to   *net.UDPAddr
	done chan struct{}
	once sync.Once

	mu sync.Mutex
	sight
}

// sight is what a talker has seen.
type sight struct {
	acked, atMark uint64
	repeats       int
	longest       time.Duration
	sum           [32]byte
	err           error
}

func newTalker(h *hosts.Host, to netip.AddrPort) (*talker, error) {
	t := &talker{to: net.UDPAddrFromAddrPort(to), done: make(chan struct{})}
	// Not connected: answers come from the host's own address.
	return t, h.Do(func() (err error) {
		t.conn, err = net.ListenPacket("udp4", "0.0.0.0:0")
		return err
	})
}

func (t *talker) talk(ctx context.Context) {
	defer func() { _ = t.conn.Close() }()
	buf := make([]byte, 512)
	for seq := uint64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-t.done:
			return
		default:
		}
		begin := time.Now()
		want := sha256.Sum256(binary.BigEndian.AppendUint64(append([]byte(nil), t.sum[:]...), seq))
		repeats := -1
		for answered := false; !answered; {
			repeats++
			if ctx.Err() != nil {
				return
			}
			if time.Since(begin) > 30*time.Second {
				t.fail(fmt.Errorf("entry %d is not acknowledged within 30 s", seq))
				return
			}
			// No route, for a moment, is like no answer.
			_, _ = t.conn.WriteTo(fmt.Appendf(nil, "put %d", seq), t.to)
			_ = t.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			for {
				n, _, err := t.conn.ReadFrom(buf)
				if err != nil {
					break
				}
				var got, count uint64
				var sum string
				if _, err := fmt.Sscanf(string(buf[:n]), "ok %d %d %s", &got, &count, &sum); err != nil {
					t.fail(fmt.Errorf("entry %d: the server answers %q", seq, buf[:n]))
					return
				}
				if got < seq {
					continue // a late answer to a repeated request
				}
				if got != seq || count != seq+1 || sum != fmt.Sprintf("%x", want) {
					t.fail(fmt.Errorf("entry %d: the server answers entry %d, count %d, digest %.12s…; want count %d, digest %.12x…", seq, got, count, sum, seq+1, want))
					return
				}
				answered = true
				break
			}
		}
		t.mu.Lock()
		t.acked, t.sum = seq+1, want
		t.repeats += repeats
		t.longest = max(t.longest, time.Since(begin))
		t.mu.Unlock()
		seq++
		time.Sleep(time.Millisecond)
	}
}

func (t *talker) fail(err error) {
	t.mu.Lock()
	t.err = err
	t.mu.Unlock()
}

// mark notes that the migration begins.
func (t *talker) mark() {
	t.mu.Lock()
	t.atMark = t.acked
	t.mu.Unlock()
}

func (t *talker) seen() sight {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sight
}

// wait waits for n more acknowledged entries.
func (t *talker) wait(ctx context.Context, n uint64) error {
	for want := t.seen().acked + n; ; {
		c := t.seen()
		if c.err != nil {
			return c.err
		}
		if c.acked >= want {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (t *talker) stop() { t.once.Do(func() { close(t.done) }) }
