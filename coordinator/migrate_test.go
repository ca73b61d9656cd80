package coordinator

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/transport"
	"godwit/wire"
)

// migrated runs migrate with JSON output and returns its document and code.
func (b *testBus) migrated(args ...string) (migrationDoc, int, string) {
	b.t.Helper()
	c := b.godwit(append([]string{"-o", "json", "migrate"}, args...)...)
	code := c.wait(b.t)
	var d migrationDoc
	if err := json.Unmarshal([]byte(c.stdout.String()), &d); err != nil {
		b.t.Fatalf("output is no document: %v\n%s\n%s", err, c.stdout.String(), c.stderr.String())
	}
	return d, code, c.stderr.String()
}

func states(d migrationDoc) string {
	var s []string
	for _, x := range d.Steps {
		s = append(s, x.State)
	}
	return strings.Join(s, ", ")
}

func refusal(reason string) error {
	f := wire.Errorf(wire.Code_CODE_REFUSED, "dump refused, nothing was touched")
	f.Problems = []*wire.Problem{{Object: &wire.Object{Pid: 412, Comm: "redis-server", HasFd: true, Fd: 7, Path: "socket:[99]"}, Reason: reason, Hint: "close it"}}
	return f
}

func TestMigrate(t *testing.T) {
	tests := []struct {
		name    string
		setup   func(b *testBus, src, dst *fakeAgent)
		args    []string
		code    int
		outcome string
		states  string
		err     string // part of stderr
	}{
		{
			name: "success", code: 0, outcome: "completed",
			states: "requested, preflight, freezing, final copying, restoring, staged, handing off, completed",
		},
		{
			name:  "the source refuses",
			setup: func(_ *testBus, src, _ *fakeAgent) { src.fail[atPreflight] = refusal("an established connection") },
			code:  4, outcome: "refused", states: "requested, preflight, aborted",
			err: "alpha: preflight: dump refused, nothing was touched\n  - pid 412 (redis-server) fd 7 socket:[99]: an established connection; close it\n",
		},
		{
			name:  "the destination refuses",
			setup: func(_ *testBus, _, dst *fakeAgent) { dst.fail[atPrepare] = refusal("the pid is taken by cron") },
			code:  4, outcome: "refused", states: "requested, preflight, aborted", err: "beta: preflight: dump refused",
		},
		{
			name: "both hosts are busy for a while",
			setup: func(_ *testBus, src, dst *fakeAgent) {
				src.busy, dst.busy = map[stop]int{atReserve: 2}, map[stop]int{atPrepare: 2}
			},
			code: 0, outcome: "completed", states: "requested, preflight, freezing, final copying, restoring, staged, handing off, completed",
		},
		{
			name: "no such process",
			setup: func(_ *testBus, src, _ *fakeAgent) {
				src.fail[atPreflight] = wire.Errorf(wire.Code_CODE_NOT_FOUND, "there is no process with pid 412")
			},
			code: 1, outcome: "failed", states: "requested, preflight, aborted",
			err: "alpha: preflight: there is no process with pid 412; the tree of pid 412 on alpha was not touched",
		},
		{
			name:  "no source",
			setup: func(_ *testBus, src, _ *fakeAgent) { src.vanish() },
			code:  1, outcome: "failed", states: "requested, preflight, aborted",
			err: "agent alpha does not answer: is it running and connected to the bus?; the hosts on the bus are beta",
		},
		{
			name:  "no destination",
			setup: func(_ *testBus, _, dst *fakeAgent) { dst.vanish() },
			code:  1, outcome: "failed", states: "requested, preflight, aborted", err: "the hosts on the bus are alpha",
		},
		{
			name:  "neither",
			setup: func(_ *testBus, src, dst *fakeAgent) { src.vanish(); dst.vanish() },
			code:  1, outcome: "failed", states: "requested, preflight, aborted",
			err: "preflight: alpha says: agent alpha does not answer: is it running and connected to the bus?; there is no agent on the bus at all; beta says: agent beta",
		},
		{
			name: "the source refuses at the start",
			setup: func(_ *testBus, src, _ *fakeAgent) {
				src.fail[atStart] = wire.Errorf(wire.Code_CODE_INTERNAL, "no more descriptors")
			},
			code: 1, outcome: "failed", states: "requested, preflight, aborted", err: "no more descriptors",
		},
		{
			name: "freezing fails",
			setup: func(_ *testBus, src, _ *fakeAgent) {
				src.fail[atFreezing] = wire.Errorf(wire.Code_CODE_INTERNAL, "pid 413 does not stop")
			},
			code: 3, outcome: "aborted", states: "requested, preflight, freezing, aborting, aborted",
			err: "was aborted (alpha: freezing: pid 413 does not stop); pid 412 (redis-server) runs on at alpha",
		},
		{
			name: "copying fails",
			setup: func(_ *testBus, src, dst *fakeAgent) {
				src.fail[atCopying] = wire.Errorf(wire.Code_CODE_INTERNAL, "read memory of pid 413: no such process")
				dst.hold[atRestoring] = make(chan struct{})
			},
			code: 3, outcome: "aborted", err: "alpha: final copying: read memory of pid 413",
		},
		{
			name: "restoring fails",
			setup: func(_ *testBus, _, dst *fakeAgent) {
				dst.fail[atRestoring] = wire.Errorf(wire.Code_CODE_INTERNAL, "map /usr/lib/libc.so.6: no such file")
			},
			code: 3, outcome: "aborted", states: "requested, preflight, freezing, final copying, restoring, aborting, aborted",
			err: "beta: restoring: map /usr/lib/libc.so.6: no such file",
		},
		{
			name: "staged, then failed",
			setup: func(_ *testBus, _, dst *fakeAgent) {
				dst.fail[atStaged] = wire.Errorf(wire.Code_CODE_INTERNAL, "out of memory")
			},
			code: 3, outcome: "aborted", states: "requested, preflight, freezing, final copying, restoring, staged, aborting, aborted",
			err: "beta: staged: out of memory",
		},
		{
			name: "given back after the commit",
			setup: func(_ *testBus, _, dst *fakeAgent) {
				dst.fail[atCommitted] = wire.Errorf(wire.Code_CODE_INTERNAL, "pid 412 died before it ran")
			},
			code: 3, outcome: "aborted", states: "requested, preflight, freezing, final copying, restoring, staged, handing off, returning, aborted",
			err: "beta: handing off: pid 412 died before it ran",
		},
		{
			name:  "the destination dies before the commit",
			setup: func(_ *testBus, _, dst *fakeAgent) { dst.die = atRestoring },
			code:  3, outcome: "aborted", states: "requested, preflight, freezing, final copying, restoring, aborting, aborted",
			err: "no sign of life of beta",
		},
		{
			name:  "the destination dies after the commit",
			setup: func(_ *testBus, _, dst *fakeAgent) { dst.die = atCommitted },
			code:  5, outcome: "stuck", states: "requested, preflight, freezing, final copying, restoring, staged, handing off, stuck",
			err: "beta has committed to run pid 412 (redis-server) and does not answer",
		},
		{
			name: "both die",
			setup: func(_ *testBus, src, dst *fakeAgent) {
				src.die = atCopying
				dst.die = atRestoring
			},
			code: 5, outcome: "running", err: "no sign of life of alpha and beta",
		},
		{
			name: "another migration of the tree",
			setup: func(b *testBus, _, _ *fakeAgent) {
				r := newMigration("alpha", 412, "gamma", nil)
				r.Id = "earlier"
				if _, err := b.records.Create(b.t.Context(), r); err != nil {
					b.t.Fatal(err)
				}
			},
			code: 1, err: `migration earlier already moves pid 412 of alpha to gamma: it is requested since`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBus(t)
			src, dst := b.agent("alpha"), b.agent("beta")
			if tt.setup != nil {
				tt.setup(b, src, dst)
			}
			d, code, stderr := b.migrated(append([]string{"alpha:412", "beta"}, tt.args...)...)
			if code != tt.code || d.Outcome != tt.outcome || d.ExitCode != code {
				t.Errorf("exit code %d (%d in the document), outcome %q; want %d, %q\n%s", code, d.ExitCode, d.Outcome, tt.code, tt.outcome, stderr)
			}
			if tt.states != "" && states(d) != tt.states {
				t.Errorf("states %q, want %q", states(d), tt.states)
			}
			if !strings.Contains(stderr, tt.err) || (tt.code != 0) != (stderr != "") {
				t.Errorf("stderr %q\ndoes not contain %q", stderr, tt.err)
			}
			if tt.code == 4 || tt.outcome == "failed" {
				if src.wasCalled("start") && tt.name != "the source refuses at the start" {
					t.Error("the source was started")
				}
				if dst.wasCalled("prepare") && tt.name == "the source refuses at the start" && !dst.wasCalled("abort") {
					t.Error("the prepared destination was not told")
				}
			}
			if tt.outcome == "completed" {
				want := migrationDoc{PID: 412, LandedPID: 412, Tasks: 2, Threads: 4, MemoryBytes: 1 << 30, Bytes: 1<<30 + 4096, Pages: 1 << 18,
					BytesPerSecond: 1 << 30, FrozenClock: "both", Owner: "destination", Comm: "redis-server"}
				got := migrationDoc{PID: d.PID, LandedPID: d.LandedPID, Tasks: d.Tasks, Threads: d.Threads, MemoryBytes: d.MemoryBytes, Bytes: d.Bytes,
					Pages: d.Pages, BytesPerSecond: d.BytesPerSecond, FrozenClock: d.FrozenClock, Owner: d.Owner, Comm: d.Comm}
				if x := cmp.Diff(want, got); x != "" {
					t.Error(x)
				}
				if d.FrozenMS == nil || *d.FrozenMS != 812 || d.TotalMS <= 0 || d.SourceReport == nil || d.DestinationReport == nil {
					t.Errorf("report: %+v", d)
				}
			}
		})
	}
}

func TestMigrateUsage(t *testing.T) {
	b := newBus(t)
	for _, tt := range []struct{ args, err string }{
		{"migrate alpha:1", "accepts 2 arg(s), received 1"},
		{"migrate alpha beta", `"alpha" is not HOST:PID`},
		{"migrate alpha:x beta", `"x" is not the pid of a process`},
		{"migrate alpha:0 beta", `"0" is not the pid of a process`},
		{"migrate al.pha:1 beta", "source host"},
		{"migrate alpha:1 be.ta", "destination host"},
		{"migrate alpha:1 alpha", "source and destination are the same host"},
		{"migrate alpha:1 beta --inherit x", "want KEY=PATH"},
		{"migrate alpha:1 beta --inherit file[1:2]=a", "must be absolute"},
		{"migrate alpha:1 beta --inherit file[1:2]=/a --inherit file[1:2]=/b", "given twice"},
		{"migrate alpha:1 beta --external file[1:2] --external file[1:2]", "given twice"},
		{"migrate alpha:1 beta --external a", "the selector is none of"},
		{"migrate alpha:1 beta --external fd:5=pat:/x", "did you mean path"},
		{"migrate alpha:1 beta --inherit x=/a", "the selector is none of"},
		{"plan alpha:1 alpha", "source and destination are the same host"},
		{"plan alpha:1 beta --external role:in=null", "want one of stdin, stdout, stderr"},
		{"migrate alpha:1 beta --pid-namespace other", "want same or new"},
		{"migrate alpha:1 beta --bandwidth fast", "want bytes or bits per second"},
		{"migrate alpha:1 beta --timeout -1s", "--timeout"},
		{"migrate alpha:1 beta --mode live", "want auto, precopy, stop-and-copy, postcopy or hybrid"},
		{"migrate alpha:1 beta --on-no-converge wait", "want freeze, throttle, postcopy or abort"},
		{"migrate alpha:1 beta --lane short", "want auto, direct or cluster"},
		{"migrate alpha:1 beta --compress lz4", "want auto, none, s2 or zstd"},
		{"plan alpha:1 beta --lane short", "want auto, direct or cluster"},
		{"migrate alpha:1 beta --max-downtime 0", "want at least 1ms"},
		{"migrate alpha:1 beta --max-total much", "--max-total"},
		{"migrate alpha:1 beta --nonsense", "unknown flag: --nonsense; see godwit migrate --help"},
		{"nonsense", `unknown command "nonsense"`},
		{"hosts -o xml", "want text or json"},
		{"hosts --log-level loud", `log.level: "loud"; want one of`},
		{"hosts --credentials /does/not/exist", "no such file"},
		{"hosts --config /does/not/exist", "no such file"},
	} {
		c := b.godwit(strings.Fields(tt.args)...)
		if code := c.wait(t); code != 2 || !strings.Contains(c.stderr.String(), tt.err) {
			t.Errorf("godwit %s: exit code %d, %q", tt.args, code, c.stderr.String())
		}
	}
}

func TestMigrateOptions(t *testing.T) {
	got, err := (&migrateArgs{
		external: []string{"file[1:2]"}, inherit: []string{"file[3:4]=/run/a,b=c", "file[5:6]=/x,forward", "file[1:2]=/y"},
		pidNamespace: "new", bandwidth: "100MB/s", timeout: 1500 * time.Millisecond,
		mode: "precopy", downtime: 30 * time.Millisecond, rounds: 7, total: "8GiB", noConverge: "abort",
		lane: "direct", compress: "zstd",
	}).options()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"external":["file[1:2]","file[3:4]","file[5:6]"],"inherit":[{"key":"file[3:4]","path":"/run/a,b=c"},` +
		`{"key":"file[5:6]","path":"/x","forward":true},{"key":"file[1:2]","path":"/y"}],"pid_namespace_new":true,"timeout_ms":1500,"bandwidth":100000000,` +
		`"copy_mode":1,"max_downtime_ms":30,"max_rounds":7,"max_copy_bytes":8589934592,"no_converge":2,"lane":1,"compression":3}`
	if b, _ := json.Marshal(got); string(b) != want {
		t.Errorf("options %s\nwant    %s", b, want)
	}
}

// TestMigrateLane: what the source offers goes to the destination, what that chose to the source,
// and no key into the record.
func TestMigrateLane(t *testing.T) {
	b := newBus(t)
	alpha := b.agent("alpha")
	b.agent("beta")
	c := b.godwit("migrate", "alpha:412", "beta", "--lane", "direct", "--compress", "s2")
	if code := c.wait(t); code != 0 || !strings.Contains(c.stderr.String(), "lane: direct 10.0.0.1:4223") {
		t.Errorf("exit code %d, %s", code, c.stderr.String())
	}
	r := alpha.started
	if !r.GetLane().GetDirect() || r.Lane.Address != "10.0.0.1:4223" || !slices.Equal(r.Codecs, []string{"s2"}) ||
		r.Options.Lane != wire.LaneChoice_LANE_CHOICE_DIRECT || r.Options.Compression != wire.Compression_COMPRESSION_S2 {
		t.Errorf("the source was told %v", r)
	}
	recs, err := b.records.List(t.Context())
	if err != nil || len(recs) != 1 || strings.Contains(recs[0].String(), "secret") {
		t.Errorf("records %v, %v", recs, err)
	}
}

func await(t *testing.T, f *fakeAgent, s stop) {
	t.Helper()
	for {
		select {
		case r := <-f.reached:
			if r == s {
				return
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s never got to %s", f.host, s)
		}
	}
}

func TestInterrupt(t *testing.T) {
	tests := []struct {
		name   string
		at     stop
		source bool // who is held there
		code   int
		states string
	}{
		{"in preflight", atPreflight, true, 3, "requested, preflight, aborted"},
		{"while preparing", atPrepare, false, 3, "requested, preflight, aborted"},
		{"while starting", atStart, true, 3, "requested, preflight, aborted"},
		{"freezing", atFreezing, true, 3, "requested, preflight, freezing, aborting, aborted"},
		{"restoring", atRestoring, false, 3, "requested, preflight, freezing, final copying, restoring, aborting, aborted"},
		{"staged", atStaged, false, 3, "requested, preflight, freezing, final copying, restoring, staged, aborting, aborted"},
		{"after the commit", atCommitted, false, 0, "requested, preflight, freezing, final copying, restoring, staged, handing off, completed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBus(t)
			src, dst := b.agent("alpha"), b.agent("beta")
			held := src
			if !tt.source {
				held = dst
			}
			hold := make(chan struct{})
			held.hold[tt.at] = hold
			c := b.godwit("migrate", "alpha:412", "beta")
			await(t, held, tt.at)
			if tt.at == atCommitted || tt.at == atStaged {
				// The command must have seen the state that it decides on.
				waitFor(t, func() bool {
					return strings.Contains(c.stderr.String(), map[stop]string{atCommitted: "handing off", atStaged: "staged"}[tt.at])
				})
			}
			c.interrupts <- syscall.SIGINT
			if tt.at == atCommitted {
				waitFor(t, func() bool { return strings.Contains(c.stderr.String(), "too late to abort") })
				close(hold)
			}
			if code := c.wait(t); code != tt.code {
				t.Errorf("exit code %d, want %d\n%s", code, tt.code, c.stderr.String())
			}
			recs, err := b.records.List(t.Context())
			if err != nil || len(recs) != 1 {
				t.Fatal(recs, err)
			}
			if got := states(*newMigrationDoc(recs[0], 0)); got != tt.states {
				t.Errorf("states %q, want %q", got, tt.states)
			}
			if tt.code == 3 && !strings.Contains(c.stderr.String(), "runs on at alpha") {
				t.Errorf("does not say where the tree runs: %s", c.stderr.String())
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		t.Parallel()
		b := newBus(t)
		b.agent("alpha")
		dst := b.agent("beta")
		hold := make(chan struct{})
		dst.hold[atCommitted] = hold
		c := b.godwit("migrate", "alpha:412", "beta")
		await(t, dst, atCommitted)
		waitFor(t, func() bool { return strings.Contains(c.stderr.String(), "handing off") })
		c.interrupts <- syscall.SIGINT
		c.interrupts <- syscall.SIGINT
		if code := c.wait(t); code != 5 || !strings.Contains(c.stderr.String(), "this command was interrupted") {
			t.Errorf("exit code %d\n%s", code, c.stderr.String())
		}
		close(hold)
		waitFor(t, func() bool {
			recs, err := b.records.List(t.Context())
			return err == nil && len(recs) == 1 && recs[0].State == wire.State_STATE_COMPLETED
		})
	})
}

func waitFor(t *testing.T, cond func() bool) {
	t.Helper()
	for range 2000 {
		if cond() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the condition never came true")
}

func TestMigrateText(t *testing.T) {
	b := newBus(t)
	b.agent("alpha")
	b.agent("beta")
	c := b.godwit("migrate", "alpha:412", "beta")
	if code := c.wait(t); code != 0 {
		t.Fatal(code, c.stderr.String())
	}
	for _, want := range []string{
		"requested\n", "preflight\n", "  pid 412 (redis-server) of alpha: 2 processes, 4 threads, 1.00 GiB\n", "freezing (alpha)\n", "final copying (alpha)\n",
		"handing off (beta): committed, the tree now belongs to beta\n", "completed (beta)\n",
	} {
		if !strings.Contains(c.stderr.String(), want) {
			t.Errorf("progress lacks %q:\n%s", want, c.stderr.String())
		}
	}
	for _, want := range []string{"pid 412 (redis-server) moved from alpha to beta as pid 412\n", "frozen time  812 ms, from the first stopped task", "1.00 GiB, 262144 pages, 1.00 GiB/s"} {
		if !strings.Contains(c.stdout.String(), want) {
			t.Errorf("report lacks %q:\n%s", want, c.stdout.String())
		}
	}
}

func TestDetachWatchAbortHistory(t *testing.T) {
	b := newBus(t)
	b.agent("alpha")
	dst := b.agent("beta")
	hold := make(chan struct{})
	dst.hold[atRestoring] = hold
	c := b.godwit("migrate", "alpha:412", "beta", "--detach")
	if code := c.wait(t); code != 0 || c.stderr.String() != "" {
		t.Fatal(code, c.stderr.String())
	}
	id := strings.TrimSpace(c.stdout.String())
	if err := transport.CheckName(id); err != nil {
		t.Fatalf("no id: %q", id)
	}
	await(t, dst, atRestoring)

	watch := b.godwit("-o", "json", "watch", id)
	all := b.godwit("watch")
	waitFor(t, func() bool {
		return strings.Contains(watch.stdout.String(), `"restoring"`) && strings.Contains(all.stdout.String(), "restoring")
	})
	abort := b.godwit("abort", id)
	if code := abort.wait(t); code != 0 || !strings.HasPrefix(abort.stdout.String(), "Migration "+id+" is aborted: pid 412 (redis-server) runs on at alpha. It was frozen for 41.0 ms.") {
		t.Errorf("abort: %d %q %q", code, abort.stdout.String(), abort.stderr.String())
	}
	if code := watch.wait(t); code != 3 {
		t.Errorf("watch: exit code %d", code)
	}
	var last eventDoc
	for line := range strings.Lines(watch.stdout.String()) {
		last = eventDoc{}
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Errorf("watch: %q: %v", line, err)
		}
	}
	if last.Event != "end" || last.Migration.Outcome != "aborted" || last.Migration.ExitCode != 3 {
		t.Errorf("watch ends with %+v", last)
	}
	if code := all.wait(t); code != 0 || !strings.Contains(all.stdout.String(), "runs on at alpha") {
		t.Errorf("watch of all: %d %s %s", code, all.stdout.String(), all.stderr.String())
	}
	// Once more is no failure.
	abort = b.godwit("-o", "json", "abort", id)
	var d migrationDoc
	if code := abort.wait(t); code != 0 || json.Unmarshal([]byte(abort.stdout.String()), &d) != nil || d.State != "aborted" {
		t.Errorf("abort again: %d %q", code, abort.stdout.String())
	}
	// After the end nothing can be aborted.
	delete(dst.hold, atRestoring)
	done, code, _ := b.migrated("alpha:412", "beta")
	if code != 0 {
		t.Fatal(code)
	}
	abort = b.godwit("abort", done.ID)
	if code := abort.wait(t); code != 1 || !strings.Contains(abort.stderr.String(), "is completed and can no longer be aborted: the tree runs on beta as pid 412") {
		t.Errorf("abort of a completed one: %d %q", code, abort.stderr.String())
	}
	abort = b.godwit("-o", "json", "abort", "nothing")
	if code := abort.wait(t); code != 1 || !strings.Contains(abort.stdout.String(), `"code":"not_found"`) {
		t.Errorf("abort of no migration: %d %q %q", code, abort.stderr.String(), abort.stdout.String())
	}

	history := b.godwit("-o", "json", "history")
	var list struct{ Migrations []migrationDoc }
	if code := history.wait(t); code != 0 || json.Unmarshal([]byte(history.stdout.String()), &list) != nil || len(list.Migrations) != 2 {
		t.Fatalf("history: %d %q", code, history.stdout.String())
	}
	if got := list.Migrations[0].Outcome + ", " + list.Migrations[1].Outcome; got != "aborted, completed" {
		t.Errorf("outcomes %s", got)
	}
	one := b.godwit("history", id)
	if code := one.wait(t); code != 0 || !strings.Contains(one.stdout.String(), "aborting       by coordinator") || !strings.Contains(one.stdout.String(), "reason       aborted by the operator") {
		t.Errorf("history of one: %d\n%s", code, one.stdout.String())
	}
	if none := b.godwit("watch"); none.wait(t) != 0 || none.stdout.String() != "No migration is in flight.\n" {
		t.Errorf("watch of none: %q", none.stdout.String())
	}
}

// TestBusRestart: a bus that goes away for longer than anybody may be silent
// does not make the command give up, nor anybody else count as dead.
func TestBusRestart(t *testing.T) {
	for _, at := range []stop{atRestoring, atCommitted} {
		t.Run(string(at), func(t *testing.T) {
			t.Parallel()
			b := newBus(t)
			b.agent("alpha")
			dst := b.agent("beta")
			hold := make(chan struct{})
			dst.hold[at] = hold
			c := b.godwit("migrate", "alpha:412", "beta")
			await(t, dst, at)
			b.restart(2 * quick.Dead)
			waitFor(t, dst.nc.IsConnected)
			close(hold)
			if code := c.wait(t); code != 0 || !strings.Contains(c.stderr.String(), "completed") {
				t.Errorf("exit code %d\n%s", code, c.stderr.String())
			}
		})
	}
}

// TestRivals: of several migrations of one tree that are asked for at once
// exactly one goes on.
func TestRivals(t *testing.T) {
	b := newBus(t)
	src := b.agent("alpha")
	hold := make(chan struct{})
	src.hold[atPreflight] = hold
	for _, host := range []string{"beta", "gamma", "delta"} {
		b.agent(host)
	}
	var cs []*command
	for _, host := range []string{"beta", "gamma", "delta"} {
		cs = append(cs, b.godwit("migrate", "alpha:412", host))
	}
	waitFor(t, func() bool {
		n := 0
		for _, c := range cs {
			n += len(c.code)
		}
		return n == 2
	})
	close(hold)
	won := 0
	for _, c := range cs {
		switch code := c.wait(t); {
		case code == 0:
			won++
		case code != 1 || !strings.Contains(c.stderr.String(), "already moves pid 412 of alpha"):
			t.Errorf("exit code %d: %s", code, c.stderr.String())
		}
	}
	if won != 1 {
		t.Errorf("%d went on", won)
	}
}

func TestStillNeeded(t *testing.T) {
	files := func(paths ...string) *wire.Requirements {
		r := &wire.Requirements{}
		for _, p := range paths {
			r.Files = append(r.Files, &wire.RequiredFile{Path: p, Kind: "regular"})
		}
		return r
	}
	req := files("/lib/a", "/tmp/1", "/log")
	stillNeeded(req, nil)
	if len(req.Files) != 3 {
		t.Errorf("a first look lost files: %v", req.Files)
	}
	earlier := files("/log", "/lib/a", "/tmp/2")
	earlier.Files[0].Kind = "fifo" // another object at the same path
	stillNeeded(req, earlier)
	if len(req.Files) != 1 || req.Files[0].Path != "/lib/a" {
		t.Errorf("left are %v, want /lib/a alone", req.Files)
	}
}
