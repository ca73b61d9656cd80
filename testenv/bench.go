package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/setup"
	"godwit/testenv/workloads"
)

// benchCase is a tree that is moved once by each mode.
type benchCase struct {
	name, what string
	mib        int // of memory, about
	// argv is its command; bin are the programs, prefix where its files go.
	argv func(bin *workloads.Programs, prefix string) []string
	// both: over both lanes, and compared with more.
	both bool
}

// dirtier is a case of "selfcheck dirtier".
func dirtier(name, what string, mib, rate, threads, fds int) benchCase {
	return benchCase{name: name, what: what, mib: mib, argv: func(bin *workloads.Programs, prefix string) []string {
		args := []string{bin.Selfcheck, "dirtier", prefix}
		for _, n := range []int{mib, rate, threads, fds} {
			args = append(args, strconv.Itoa(n))
		}
		return args
	}}
}

// benchCases are all cases, in their order. A quick run has a quarter of the memory.
func benchCases(quick bool) []benchCase {
	gib, some := 1024, 64
	if quick {
		gib, some = 256, 16
	}
	large := func(n int, rest string) string {
		if quick {
			return fmt.Sprintf("%d MiB, %s", n, rest)
		}
		return fmt.Sprintf("%d GiB, %s", n>>10, rest)
	}
	both := func(c benchCase) benchCase {
		c.both = true
		return c
	}
	return []benchCase{
		both(dirtier("lanes", large(gib, "idle"), gib, 0, 0, 0)),
		dirtier("tiny", "1 MiB, idle", 1, 0, 0, 0),
		dirtier("idle", large(gib, "idle"), gib, 0, 0, 0),
		dirtier("dirty-50", large(gib, "50 MB/s"), gib, 50, 0, 0),
		dirtier("dirty-200", large(gib, "200 MB/s"), gib, 200, 0, 0),
		dirtier("dirty-500", large(gib, "500 MB/s"), gib, 500, 0, 0),
		dirtier("large", large(8*gib, "idle"), 8*gib, 0, 0, 0),
		dirtier("threads-1", "1 idle thread", some, 0, 1, 0),
		dirtier("threads-16", "16 idle threads", some, 0, 16, 0),
		dirtier("threads-256", "256 idle threads", some, 0, 256, 0),
		dirtier("fds-10", "10 descriptors", some, 0, 0, 10),
		dirtier("fds-1000", "1000 descriptors", some, 0, 0, 1000),
		dirtier("fds-10000", "10000 descriptors", some, 0, 0, 10000),
		{name: "redis", what: large(gib, "redis, 3 clients"), mib: gib, argv: func(bin *workloads.Programs, prefix string) []string {
			return []string{bin.Selfcheck, "heart", prefix, "/usr/bin/python3", bin.Drive, prefix + "-redis", "redis", filepath.Dir(prefix), strconv.Itoa(gib)}
		}},
	}
}

// benchDoc is what a run found out.
type benchDoc struct {
	Started     time.Time  `json:"started"`
	Quick       bool       `json:"quick"`
	CPUs        int        `json:"cpus"`
	MemoryBytes uint64     `json:"memory_bytes"`
	Kernel      string     `json:"kernel"`
	Rows        []benchRow `json:"rows"`
}

type benchRow struct {
	Name    string `json:"name"`
	What    string `json:"what"`
	Skipped string `json:"skipped,omitempty"` // why
	Error   string `json:"error,omitempty"`
	// Verified: the workload looked at all of its memory after both moves and
	// found everything as it had left it.
	Verified bool `json:"verified"`
	// QuietGapMS is the longest pause that it saw while nothing was moved.
	QuietGapMS float64 `json:"quiet_gap_ms"`
	MemcpyRate float64 `json:"memcpy_bytes_per_second"`
	TCPRate    float64 `json:"tcp_bytes_per_second"`
	// ImagesMS is how long a dump to a tmpfs and the restore from it took on one host.
	ImagesMS float64     `json:"images_ms,omitempty"`
	Moves    []benchMove `json:"moves"`
}

type benchMove struct {
	Mode           string   `json:"mode"`
	Lane           string   `json:"lane"`
	TotalMS        float64  `json:"total_ms"` // from the request to the record's end
	GapMS          float64  `json:"gap_ms"`   // longest pause that the workload saw
	FrozenMS       *float64 `json:"frozen_ms"`
	PausesMS       float64  `json:"pauses_ms"` // all pauses of 5 ms and more
	MemoryBytes    uint64   `json:"memory_bytes"`
	SentBytes      uint64   `json:"sent_bytes"`
	SentPerMemory  float64  `json:"sent_per_memory"`
	DirtiedRate    float64  `json:"dirtied_bytes_per_second"` // while it ran
	Source         spent    `json:"source"`
	Destination    spent    `json:"destination"`
	Bus            spent    `json:"bus"`
	TotalPerMemcpy float64  `json:"total_per_memcpy"` // of as many bytes as were sent
	TotalPerTCP    float64  `json:"total_per_tcp"`
	GapPerMemcpy   float64  `json:"gap_per_memcpy"`
	GapPerTCP      float64  `json:"gap_per_tcp"`
	// A bare stream of messages over the same lane, right before; 0: not measured.
	BareRate     float64 `json:"bare_bytes_per_second,omitempty"`
	TotalPerBare float64 `json:"total_per_bare,omitempty"`
	// Of the other modes: against stop-and-copy of the same tree.
	TotalPerStop float64         `json:"total_per_stop_and_copy,omitempty"`
	GapPerStop   float64         `json:"gap_per_stop_and_copy,omitempty"`
	Report       json.RawMessage `json:"report"` // what godwit migrate printed
}

// spent is what a process used for one move.
type spent struct {
	PeakRSSBytes uint64  `json:"peak_rss_bytes"`
	CPUSeconds   float64 `json:"cpu_seconds"`
}

// bench measures moves of trees of many kinds. Nothing is asserted but that
// they succeed and that the workloads find their memory whole.
func bench(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	asJSON := fs.Bool("json", false, "one document for programs")
	quick := fs.Bool("quick", false, "a quarter of the memory")
	if err := fs.Parse(args); err != nil {
		return errUsage
	}
	cases := benchCases(*quick)
	for _, n := range fs.Args() {
		if !slices.ContainsFunc(cases, func(c benchCase) bool { return c.name == n }) {
			return fmt.Errorf("there is no benchmark %q; there are %s", n, strings.Join(benchNames(cases), ", "))
		}
	}
	if fs.NArg() > 0 {
		cases = slices.DeleteFunc(cases, func(c benchCase) bool { return !slices.Contains(fs.Args(), c.name) })
	}
	if *asJSON {
		doc, err := runBench(ctx, os.Stderr, cases, *quick)
		if doc != nil {
			e := json.NewEncoder(os.Stdout)
			e.SetIndent("", "  ")
			err = errors.Join(err, e.Encode(doc))
		}
		return err
	}
	_, err := runBench(ctx, os.Stdout, cases, *quick)
	return err
}

func benchNames(cases []benchCase) []string {
	var names []string
	for _, c := range cases {
		names = append(names, c.name)
	}
	return names
}

// bencher is a fleet with what is moved between its hosts.
type bencher struct {
	out   io.Writer
	dir   string
	env   *hosts.Env
	fleet *fleet.Fleet
	bin   *workloads.Programs

	programs *fleet.Binaries
	bare     string // the program of the baseline
}

// runBench runs cases and writes a line for each move to out. The document is
// nil only if nothing could be run.
func runBench(ctx context.Context, out io.Writer, cases []benchCase, quick bool) (doc *benchDoc, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the benchmarks make namespaces and trace processes: run them as root")
	}
	needs := slices.DeleteFunc(slices.Clone(setup.Workloads), func(n setup.Need) bool {
		return !slices.Contains([]string{"gcc", "libc6-dev", "linux-libc-dev", "python3", "redis-server"}, n.Package)
	})
	if err := setup.Ensure(ctx, out, slices.Concat(setup.Hosts, needs)); err != nil {
		return nil, err
	}
	b := &bencher{out: out}
	if b.dir, err = os.MkdirTemp("/var/tmp", "godwit-bench-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return nil, err
	}
	if b.bin, err = workloads.Build(ctx, filepath.Join(b.dir, "bin")); err != nil {
		return nil, err
	}
	if b.programs, err = fleet.Build(ctx, filepath.Join(b.dir, "bin")); err != nil {
		return nil, err
	}
	if err := b.buildBare(ctx); err != nil {
		return nil, err
	}
	unmount, err := b.mountTmpfs()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	if b.env, err = hosts.New(b.dir, "alpha", "beta", "hub"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.env.Close()) }()
	if b.fleet, err = fleet.Start(ctx, b.env, b.programs, filepath.Join(b.dir, "fleet"), "hub", []string{"alpha", "beta"}); err != nil {
		return nil, err
	}
	doc = &benchDoc{Started: time.Now().UTC(), Quick: quick, CPUs: runtime.NumCPU()}
	if doc.MemoryBytes, err = memInfo("MemTotal"); err != nil {
		return nil, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	doc.Kernel = unix.ByteSliceToString(uts.Release[:])
	b.say("%d CPUs, %.0f GiB, Linux %s\n", doc.CPUs, float64(doc.MemoryBytes)/(1<<30), doc.Kernel)
	b.head()
	var errs []error
	for _, c := range cases {
		row := b.row(ctx, c)
		doc.Rows = append(doc.Rows, row)
		b.tell(row)
		b.compare(row)
		if row.Error != "" {
			errs = append(errs, fmt.Errorf("%s: %s", c.name, row.Error))
		}
		if ctx.Err() != nil {
			return doc, errors.New("interrupted")
		}
	}
	return doc, errors.Join(errs...)
}

func (b *bencher) say(format string, args ...any) { _, _ = fmt.Fprintf(b.out, format+"\n", args...) }

// columns of the table, which is Markdown.
var columns = []struct {
	title string
	width int
}{
	{"tree", 30}, {"mode, lane", 22}, {"total ms", 8}, {"gap ms", 8}, {"quiet ms", 8}, {"sent/memory", 11}, {"RSS MiB src+dst", 15},
	{"CPU s src+dst+bus", 17}, {"total/memcpy", 12}, {"total/TCP", 9}, {"gap/TCP", 8}, {"total/bare", 10}, {"total/stop", 10}, {"gap/stop", 8}, {"MB/s dirtied", 12},
}

func (b *bencher) head() {
	title, line := "|", "|"
	for _, c := range columns {
		title += fmt.Sprintf(" %-*s |", c.width, c.title)
		line += strings.Repeat("-", c.width+2) + "|"
	}
	b.say("%s\n%s", title, line)
}

func (b *bencher) cells(cells ...string) {
	line := "|"
	for i, c := range cells {
		line += fmt.Sprintf(" %-*s |", columns[i].width, c)
	}
	b.say("%s", line)
}

func (b *bencher) tell(r benchRow) {
	tree := r.Name + ": " + r.What
	ratio := func(f float64) string {
		if f == 0 {
			return "-"
		}
		return strconv.FormatFloat(f, 'f', 2, 64)
	}
	mib := func(n uint64) uint64 { return n >> 20 }
	for _, m := range r.Moves {
		b.cells(tree, m.Mode+", "+m.Lane, fmt.Sprintf("%.0f", m.TotalMS), fmt.Sprintf("%.1f", m.GapMS), fmt.Sprintf("%.1f", r.QuietGapMS), ratio(m.SentPerMemory),
			fmt.Sprintf("%d+%d", mib(m.Source.PeakRSSBytes), mib(m.Destination.PeakRSSBytes)),
			fmt.Sprintf("%.2f+%.2f+%.2f", m.Source.CPUSeconds, m.Destination.CPUSeconds, m.Bus.CPUSeconds),
			ratio(m.TotalPerMemcpy), ratio(m.TotalPerTCP), ratio(m.GapPerTCP), ratio(m.TotalPerBare), ratio(m.TotalPerStop), ratio(m.GapPerStop), fmt.Sprintf("%.0f", m.DirtiedRate/1e6))
	}
	if r.Skipped != "" {
		b.cells(tree, "skipped: "+r.Skipped)
	}
	if r.Error != "" {
		b.cells(tree, "failed: "+strings.Join(strings.Fields(r.Error), " ")) // one line
	}
}

// row runs one case. Its workload is gone when it returns.
func (b *bencher) row(ctx context.Context, c benchCase) benchRow {
	row := benchRow{Name: c.name, What: c.what}
	size := uint64(c.mib) << 20
	free, err := memInfo("MemAvailable")
	if err != nil {
		row.Error = err.Error()
		return row
	}
	// Both copies are there until the commit; something is left for the rest.
	if need := 2*size + size/8 + 1<<30; free < need {
		row.Skipped = fmt.Sprintf("it needs %.1f GiB of memory, %.1f GiB are available", float64(need)/(1<<30), float64(free)/(1<<30))
		return row
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := b.measure(ctx, c, &row); err != nil {
		row.Error = err.Error()
	}
	return row
}

func (b *bencher) measure(ctx context.Context, c benchCase, row *benchRow) (err error) {
	size := uint64(c.mib) << 20
	prefix := filepath.Join(b.dir, "work", c.name, "w")
	alpha, beta := b.env.Host("alpha"), b.env.Host("beta")
	r, err := workloads.Start(ctx, alpha, prefix, c.argv(b.bin, prefix)...)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil { // it may be anywhere, or nowhere
			_ = errors.Join(alpha.Kill(r.Pid, unix.SIGKILL), beta.Kill(r.Pid, unix.SIGKILL))
		}
		err = errors.Join(err, os.RemoveAll(filepath.Dir(prefix)))
	}()
	if c.name == "redis" {
		inner := &workloads.Run{Host: alpha, Pid: r.Pid, Prefix: prefix + "-redis"}
		if err := inner.WaitFile(ctx, "ready"); err != nil {
			return err
		}
	}
	if err := r.Goes(ctx, 20); err != nil {
		return err
	}
	if row.MemcpyRate, err = memcpyRate(max(size, 256<<20)); err != nil {
		return err
	}
	if row.TCPRate, err = tcpRate(alpha, beta, max(size, 256<<20)); err != nil {
		return err
	}
	if _, err := r.Heartbeats(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Second):
	}
	quiet, err := r.Heartbeats(ctx)
	if err != nil {
		return err
	}
	row.QuietGapMS = float64(quiet.Longest) / 1e6
	for _, t := range todo(c) {
		to := beta
		if r.Host == beta {
			to = alpha
		}
		var bare float64
		if c.both {
			if bare, err = b.bareRate(ctx, r.Host, to, t.lane, max(size, 256<<20)); err != nil {
				return err
			}
		}
		m, err := b.move(ctx, r, to, t, size, row)
		if err != nil {
			return fmt.Errorf("%s: %w", t.mode, err)
		}
		if sent := float64(m.SentBytes); bare > 0 && sent > 0 {
			m.BareRate, m.TotalPerBare = bare, m.TotalMS/(1000*sent/bare)
		}
		for _, stop := range row.Moves {
			if t.mode != fleet.StopAndCopy && stop.Mode == fleet.StopAndCopy && stop.Lane == m.Lane {
				m.TotalPerStop, m.GapPerStop = m.TotalMS/stop.TotalMS, m.GapMS/stop.GapMS
			}
		}
		row.Moves = append(row.Moves, *m)
	}
	if c.both {
		if err := warm(size + 256<<20); err != nil {
			return err
		}
		took, err := b.throughImages(ctx, r)
		if err != nil {
			return err
		}
		row.ImagesMS = float64(took.Microseconds()) / 1000
	}
	if err := r.Stop(ctx); err != nil {
		return err
	}
	row.Verified = true
	return nil
}

// laneRounds is how often a tree is moved in each way where lanes are compared.
const laneRounds = 3

// way is how a tree is moved.
type way struct{ mode, lane string }

// todo are the moves of a case: there, back, and there again.
func todo(c benchCase) []way {
	if c.both {
		all := []way{{fleet.StopAndCopy, laneCluster}, {fleet.StopAndCopy, laneDirect}, {fleet.PreCopy, laneCluster}, {fleet.PreCopy, laneDirect}}
		return slices.Repeat(all, laneRounds)
	}
	return []way{{fleet.StopAndCopy, "auto"}, {fleet.PreCopy, "auto"}, {fleet.PostCopy, "auto"}}
}

// move moves a workload and measures that.
func (b *bencher) move(ctx context.Context, r *workloads.Run, to *hosts.Host, w way, size uint64, row *benchRow) (*benchMove, error) {
	from := r.Host
	if err := warm(size + 256<<20); err != nil {
		return nil, err
	}
	m := &benchMove{Mode: w.mode}
	used := []struct {
		host *hosts.Host
		pid  int
		to   *spent
	}{{from, b.fleet.AgentPid(from.Name()), &m.Source}, {to, b.fleet.AgentPid(to.Name()), &m.Destination}, {b.fleet.Hub, b.fleet.ServePid(), &m.Bus}}
	for _, u := range used {
		// 5: the peak begins anew (proc_pid_clear_refs(5)).
		if err := os.WriteFile(u.host.Path(fmt.Sprintf("/proc/%d/clear_refs", u.pid)), []byte("5"), 0); err != nil {
			return nil, err
		}
		cpu, err := cpuSeconds(u.host, u.pid)
		if err != nil {
			return nil, err
		}
		u.to.CPUSeconds = -cpu
	}
	if _, err := r.Heartbeats(ctx); err != nil {
		return nil, err
	}
	doc, res, err := b.fleet.Migrate(ctx, from.Name(), r.Pid, to.Name(), "--mode", w.mode, "--lane", w.lane)
	if err != nil {
		return nil, err
	}
	if res.Code != 0 {
		return nil, fmt.Errorf("godwit migrate: exit code %d, %s %s", res.Code, doc.Reason, strings.TrimSpace(res.Stderr))
	}
	r.Host = to
	if doc.SourceReport == nil {
		return nil, errors.New("godwit migrate: the report says nothing of the source")
	}
	m.Lane, _, _ = strings.Cut(doc.SourceReport.Lane, " ")
	beats, err := r.Heartbeats(ctx)
	if err != nil {
		return nil, err
	}
	if err := from.WaitGone(ctx, r.Pid); err != nil {
		return nil, err
	}
	for _, u := range used {
		cpu, err := cpuSeconds(u.host, u.pid)
		if err != nil {
			return nil, err
		}
		u.to.CPUSeconds += cpu
		if u.to.PeakRSSBytes, err = fleet.PeakRSS(u.host, u.pid); err != nil {
			return nil, err
		}
	}
	m.TotalMS, m.FrozenMS, m.MemoryBytes, m.SentBytes, m.Report = doc.TotalMS, doc.FrozenMS, doc.MemoryBytes, doc.Bytes, json.RawMessage(res.Stdout)
	if d := doc.DestinationReport; d != nil {
		m.SentBytes += d.PagedBytes
	}
	m.GapMS, m.PausesMS = float64(beats.Longest)/1e6, float64(beats.GapsSum)/1e6
	if run := float64(beats.Until-beats.Since-beats.Longest) / 1e9; run > 0 {
		m.DirtiedRate = float64(beats.Dirtied) / run
	}
	if m.MemoryBytes > 0 {
		m.SentPerMemory = float64(m.SentBytes) / float64(m.MemoryBytes)
	}
	if sent := float64(m.SentBytes); sent > 0 {
		memcpy, tcp := 1000*sent/row.MemcpyRate, 1000*sent/row.TCPRate
		m.TotalPerMemcpy, m.TotalPerTCP = m.TotalMS/memcpy, m.TotalMS/tcp
		m.GapPerMemcpy, m.GapPerTCP = m.GapMS/memcpy, m.GapMS/tcp
	}
	return m, r.Goes(ctx, 20)
}

// memInfo is a line of /proc/meminfo, in bytes.
func memInfo(name string) (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", name)
}

// cpuSeconds is what a process has used so far, in user and in system mode
// (proc_pid_stat(5); a tick is 10 ms on every architecture that Go runs on).
func cpuSeconds(h *hosts.Host, pid int) (float64, error) {
	b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/stat", pid)))
	if err != nil {
		return 0, err
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("stat of pid %d is too short: %q", pid, s)
	}
	var ticks uint64
	for _, t := range f[11:13] {
		n, err := strconv.ParseUint(t, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("stat of pid %d: %w", pid, err)
		}
		ticks += n
	}
	return float64(ticks) / 100, nil
}

// pages maps and touches n bytes.
func pages(n uint64) ([]byte, error) {
	p, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	return p, os.NewSyscallError("mmap", err)
}

// warm makes the machine have n free bytes that were just in use. A virtual
// machine may have given idle memory back to its host, and then the first touch
// of it would be measured instead of the migration.
func warm(n uint64) error {
	p, err := pages(n)
	if err != nil {
		return err
	}
	return os.NewSyscallError("munmap", unix.Munmap(p))
}

// piece is how much the baselines hold at a time: more than caches do.
const piece = 256 << 20

// memcpyRate is how many bytes a second one thread copies from memory to memory.
func memcpyRate(n uint64) (float64, error) {
	from, err := pages(piece)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(from) }()
	to, err := pages(piece)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(to) }()
	for i := range from {
		from[i] = byte(i) // else all of it is the one page of zeros
	}
	begin, done := time.Now(), uint64(0)
	for ; done < n; done += piece {
		copy(to, from)
	}
	return float64(done) / time.Since(begin).Seconds(), nil
}

// tcpRate is how many bytes a second one connection carries between two hosts.
func tcpRate(from, to *hosts.Host, n uint64) (rate float64, err error) {
	const write = 512 << 10
	src, err := pages(piece)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(src) }()
	var l net.Listener
	if err := to.Do(func() (err error) {
		l, err = net.Listen("tcp4", to.Addr().String()+":0")
		return err
	}); err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }()
	received := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			received <- err
			return
		}
		defer func() { _ = c.Close() }()
		buf := make([]byte, write)
		for left := n; left > 0 && err == nil; {
			var k int
			k, err = c.Read(buf)
			left -= min(left, uint64(k))
		}
		received <- err
	}()
	c, err := from.Dial("tcp4", l.Addr().String(), 10*time.Second)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	begin, at := time.Now(), 0
	for left := n; left > 0; {
		k := min(left, write)
		if _, err := c.Write(src[at : at+int(k)]); err != nil {
			return 0, err
		}
		left -= k
		at = (at + write) % piece
	}
	if err := <-received; err != nil {
		return 0, err
	}
	return float64(n) / time.Since(begin).Seconds(), nil
}
