package coordinator

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", path, d)
	}
}

// sample makes records in various states.
func sample() []*wire.Record {
	base := &wire.Record{
		Id: "0a1b2c3d4e5f", Protocol: 1, Source: "alpha", Destination: "beta", Pid: 412, Comm: "redis-server", Command: "redis-server *:6379",
		CreatedUnixMs: began.UnixMilli(), Tasks: 2, Threads: 6, MemoryBytes: 1288490188, Coordinator: "coordinator (pid 9 on ops)",
		Options: &wire.MigrateOptions{External: []string{"file[72:a3e7]", "file[1f:88]", "file[1:2]"}, Inherit: []*wire.Inherit{
			{Key: "file[72:a3e7]", Path: "/run/input.fifo"}, {Key: "file[1f:88]", Path: "/var/log/app.log", Forward: true}}},
	}
	walk := func(r *wire.Record, states ...wire.State) *wire.Record {
		for i, s := range states {
			by := coordinatorName
			switch s {
			case wire.State_STATE_FREEZING, wire.State_STATE_FINAL_COPYING, wire.State_STATE_ABORTED:
				by = r.Source
			case wire.State_STATE_RESTORING, wire.State_STATE_STAGED, wire.State_STATE_HANDING_OFF, wire.State_STATE_COMPLETED:
				by = r.Destination
			}
			r.State = s
			r.Steps = append(r.Steps, &wire.Step{State: s, UnixMs: began.UnixMilli() + int64(i*i*40), By: by})
		}
		return r
	}
	s := func(names ...string) (out []wire.State) {
		for _, n := range names {
			out = append(out, wire.State(wire.State_value["STATE_"+n]))
		}
		return out
	}
	done := walk(proto.CloneOf(base), s("REQUESTED", "PREFLIGHT", "FREEZING", "FINAL_COPYING", "RESTORING", "STAGED", "HANDING_OFF", "COMPLETED")...)
	done.Owner, done.LandedPid = wire.Owner_OWNER_DESTINATION, 412
	done.SourceReport = &wire.Report{Rounds: 3, PrecopyUs: 4_200_000, PrecopyBytes: 1200 << 20, DirtyBytesPerSecond: 50_000_000, CopyNote: "memory is written faster than it travels", FrozenUs: 820_000, FreezeUs: 3_100, DumpUs: 500_000, TransferUs: 600_000, Bytes: 1 << 30, Pages: 1 << 18, ResentBytes: 4096,
		BytesPerSecond: 500 << 20, Lane: "direct 10.0.0.1:4223", Compression: "auto: s2 for 97 %", StreamBytes: 3 << 30, FrozenAtUnixUs: 1_700_000_000_100_000, PeakRssBytes: 92 << 20}
	done.DestinationReport = &wire.Report{FrozenUs: 30_000, RestoreUs: 700_000, ResumeUs: 850, Bytes: 1 << 30, Pages: 1 << 18, ResumedAtUnixUs: 1_700_000_000_912_345, PeakRssBytes: 80 << 20}

	aborted := walk(proto.CloneOf(base), s("REQUESTED", "PREFLIGHT", "FREEZING", "FINAL_COPYING", "RESTORING", "ABORTING", "ABORTED")...)
	aborted.Id, aborted.Comm = "0a1b2c3d4e60", "x\x1b[2J"
	aborted.Reason = "map /usr/lib/libc.so.6: no such file"
	aborted.Error = &wire.Error{Code: wire.Code_CODE_INTERNAL, Message: aborted.Reason, Host: "beta", Phase: "RESTORING"}
	aborted.SourceReport = &wire.Report{FrozenUs: 41_000}

	refused := walk(proto.CloneOf(base), s("REQUESTED", "PREFLIGHT", "ABORTED")...)
	refused.Id = "0a1b2c3d4e61"
	refused.Steps[2].By = coordinatorName
	refused.Reason = "dump refused, nothing was touched"
	refused.Error = wire.ErrorOf(refusal("an established connection"))
	refused.Error.Host, refused.Error.Phase = "alpha", "PREFLIGHT"

	running := walk(proto.CloneOf(base), s("REQUESTED", "PREFLIGHT", "FREEZING", "FINAL_COPYING")...)
	running.Id = "0a1b2c3d4e62"
	return []*wire.Record{done, aborted, refused, running}
}

func TestGoldenTables(t *testing.T) {
	var b bytes.Buffer
	infos := []*wire.AgentInfo{
		{Host: "alpha", Protocol: wire.Version, Version: "0.1.0", Kernel: "6.12.0-13", Arch: "amd64", MemoryBytes: 16 << 30, AvailableBytes: 12<<30 + 400<<20, Cpus: 8, StartedUnix: began.Unix(), Migrations: 1,
			Proxies: []*wire.ProxyState{{Home: true}, {Home: true}, {}}},
		{Host: "beta", Protocol: wire.Version + 1, Version: "0.2.0", Kernel: "6.18.1", Arch: "amd64", MemoryBytes: 512 << 20, AvailableBytes: 1 << 20, Cpus: 64},
		{Host: "beta", Protocol: wire.Version, Version: "0.1.0"},
	}
	if err := printHosts(&b, infos, began.Add(3*time.Hour+25*time.Minute)); err != nil {
		t.Fatal(err)
	}
	golden(t, "hosts", b.String())

	b.Reset()
	var shown []*wire.Process
	for _, p := range testProcesses() {
		if !p.KernelThread {
			shown = append(shown, p)
		}
	}
	printProcesses(&b, shown, 0)
	golden(t, "ps", b.String())
	b.Reset()
	printProcesses(&b, shown, 60)
	for line := range strings.Lines(b.String()) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 60 {
			t.Errorf("line of %d columns on a terminal of 60: %q", n, line)
		}
	}

	b.Reset()
	if err := printHistory(&b, sample(), 3, time.UTC); err != nil {
		t.Fatal(err)
	}
	golden(t, "history", b.String())
	for i, name := range []string{"completed", "aborted", "refused"} {
		b.Reset()
		if err := printMigration(&b, sample()[i], time.UTC); err != nil {
			t.Fatal(err)
		}
		golden(t, "history-"+name, b.String())
	}
	b.Reset()
	if err := writeJSON(&b, newMigrationDoc(sample()[0], 0)); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(&b, newMigrationDoc(sample()[2], 0)); err != nil {
		t.Fatal(err)
	}
	golden(t, "migrations.json", b.String())
}

func TestFailureOf(t *testing.T) {
	var got strings.Builder
	recs := sample()
	stuckOne := proto.CloneOf(recs[3])
	stuckOne.State = wire.State_STATE_STUCK
	notThawed := proto.CloneOf(recs[3])
	notThawed.State = wire.State_STATE_ABORTING
	notThawed.Error = &wire.Error{Code: wire.Code_CODE_UNKNOWN_STATE, Message: "the tree of pid 412 could not be let go, look at it", Host: "alpha", Phase: "ABORTING"}
	byHand := proto.CloneOf(recs[3])
	byHand.State, byHand.Reason = wire.State_STATE_ABORTED, "aborted by the operator"
	for _, r := range append(recs, stuckOne, notThawed, byHand) {
		err := failureOf(r)
		got.WriteString(outcome(r) + "\n")
		if err != nil {
			got.WriteString(strings.TrimSpace(err.Error()) + "\n")
		}
		got.WriteString("exit code " + string(rune('0'+exitCode(err))) + "\n\n")
	}
	golden(t, "failures", got.String())
}

func TestFrozenTime(t *testing.T) {
	const at = 1_700_000_000_000_000
	tests := []struct {
		name     string
		src, dst *wire.Report
		state    wire.State
		want     frozen
		ok       bool
	}{
		{"no report", nil, nil, wire.State_STATE_COMPLETED, frozen{0, "source"}, false},
		{"one clock", &wire.Report{FrozenUs: 820_000, FrozenAtUnixUs: at}, &wire.Report{FrozenUs: 30_000, ResumedAtUnixUs: at + 800_000}, wire.State_STATE_COMPLETED, frozen{800 * time.Millisecond, "both"}, true},
		{"the destination's clock is behind", &wire.Report{FrozenUs: 820_000, FrozenAtUnixUs: at}, &wire.Report{FrozenUs: 30_000, ResumedAtUnixUs: at - 3_000_000}, wire.State_STATE_COMPLETED, frozen{820 * time.Millisecond, "source"}, true},
		{"the destination's clock is a little behind", &wire.Report{FrozenUs: 820_000, FrozenAtUnixUs: at}, &wire.Report{FrozenUs: 300_000, ResumedAtUnixUs: at + 200_000}, wire.State_STATE_COMPLETED, frozen{820 * time.Millisecond, "source"}, true},
		{"the destination's clock is ahead", &wire.Report{FrozenUs: 820_000, FrozenAtUnixUs: at}, &wire.Report{FrozenUs: 30_000, ResumedAtUnixUs: at + 60_000_000}, wire.State_STATE_COMPLETED, frozen{820 * time.Millisecond, "source"}, true},
		{"aborted", &wire.Report{FrozenUs: 41_000, FrozenAtUnixUs: at}, nil, wire.State_STATE_ABORTED, frozen{41 * time.Millisecond, "source"}, true},
		{"only the destination has reported", nil, &wire.Report{FrozenUs: 30_000, ResumedAtUnixUs: at}, wire.State_STATE_COMPLETED, frozen{0, "source"}, false},
	}
	for _, tt := range tests {
		got, ok := frozenTime(&wire.Record{State: tt.state, SourceReport: tt.src, DestinationReport: tt.dst})
		if got != tt.want || ok != tt.ok {
			t.Errorf("%s: %v, %v; want %v, %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 10 << 10: "10.0 KiB", 1000 << 10: "0.98 MiB", 999 << 20: "999 MiB", 1 << 40: "1.00 TiB", 1 << 63: "8192 PiB"} {
		if got := formatBytes(n); got != want {
			t.Errorf("formatBytes(%d) = %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0 µs", 850 * time.Microsecond: "850 µs", 3100 * time.Microsecond: "3.10 ms", 812345 * time.Microsecond: "812 ms",
		1234 * time.Millisecond: "1.23 s", 90 * time.Second: "90.0 s", 150 * time.Second: "2 m 30 s", 3 * time.Hour: "3 h 00 m", 240 * time.Hour: "10 d", -time.Second: "-1.00 s",
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("formatDuration(%d) = %q, want %q", d, got, want)
		}
	}
}

// TestTerminalView plays a migration on a terminal and checks the screen that
// is left, and that no line is too wide.
func TestTerminalView(t *testing.T) {
	var raw bytes.Buffer
	now := began
	v := &textView{w: &raw, width: 80, now: func() time.Time { return now }, start: began}
	rec := sample()[3]
	v.record(rec)
	for i := range 5 {
		now = now.Add(200 * time.Millisecond)
		v.progress(&wire.Progress{Id: rec.Id, Host: "alpha", State: rec.State, BytesDone: uint64(i+1) << 27, BytesTotal: 1 << 30, BytesPerSecond: 500 << 20})
		v.progress(&wire.Progress{Id: rec.Id, Host: "beta", State: rec.State, BytesDone: 1, BytesTotal: 1 << 30})
	}
	live := screen(t, raw.String(), 80)
	if want := "final copying ████████░░░░░  62 %  640 MiB of 1.00 GiB, 500 MiB/s, 770 ms left"; live[len(live)-1] != want {
		t.Errorf("bar:\n%s\nwant\n%s", live[len(live)-1], want)
	}
	v.note(rec.Id, "no sign of life of beta, waiting")
	rec.State = wire.State_STATE_ABORTED
	rec.Steps = append(rec.Steps, &wire.Step{State: wire.State_STATE_ABORTED, By: "alpha"})
	v.record(rec)
	v.close()
	golden(t, "terminal", strings.Join(screen(t, raw.String(), 80), "\n")+"\n")

	raw.Reset()
	v = newTextView(&raw, true)
	v.now, v.start = func() time.Time { return now }, began
	v.record(sample()[0])
	v.record(sample()[3])
	v.progress(&wire.Progress{Id: sample()[3].Id, Host: "alpha", BytesDone: 60, BytesTotal: 1 << 30, BytesPerSecond: 1000})
	now = now.Add(plainEvery)
	v.progress(&wire.Progress{Id: sample()[3].Id, Host: "alpha", BytesDone: 50 << 20, BytesTotal: 1 << 30, BytesPerSecond: 5 << 20})
	v.close()
	golden(t, "plain", raw.String())
}

// screen is what a terminal shows after raw: lines, cursor up, clear to the end.
func screen(t *testing.T, raw string, width int) []string {
	t.Helper()
	var lines []string
	for raw != "" {
		if strings.HasPrefix(raw, "\x1b[") {
			end := strings.IndexAny(raw[2:], "AJ") + 2
			if raw[end] == 'A' {
				n := int(raw[2] - '0')
				lines = lines[:len(lines)-n]
			}
			raw = raw[end+1:]
			continue
		}
		if raw[0] == '\r' {
			raw = raw[1:]
			continue
		}
		line, rest, ok := strings.Cut(raw, "\n")
		if !ok {
			t.Fatalf("a line without an end: %q", raw)
		}
		if n := len([]rune(line)); n >= width {
			t.Errorf("line of %d columns: %q", n, line)
		}
		lines = append(lines, line)
		raw = rest
	}
	return lines
}

func TestJSONView(t *testing.T) {
	var b bytes.Buffer
	v := jsonView{&b}
	v.record(sample()[0])
	v.progress(&wire.Progress{Id: "x", Host: "alpha", BytesDone: 1, State: wire.State_STATE_FINAL_COPYING})
	v.note("x", "text")
	var events []string
	for line := range strings.Lines(b.String()) {
		var e eventDoc
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("%q: %v", line, err)
		}
		events = append(events, e.Event)
	}
	if d := cmp.Diff([]string{"state", "progress", "note"}, events); d != "" {
		t.Error(d)
	}
}
