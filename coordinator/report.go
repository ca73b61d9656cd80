package coordinator

import (
	"fmt"
	"io"
	"strings"
	"time"

	"godwit/wire"
)

// frozen says how long a tree did not run.
type frozen struct {
	// Time is the best figure there is.
	Time time.Duration
	// Clock is where it comes from: "both" (stopped by the source's clock,
	// resumed by the destination's: what an observer outside sees), or
	// "source" (the source's own clock).
	Clock string
}

// clockSlack is how far two hosts' clocks may be apart, seen against what each
// measured by itself, to be taken for one.
const clockSlack = 20 * time.Millisecond

// frozenTime chooses the figure for the time that the tree did not run; false
// if none was reported.
//
// The tree stands from the first stopped task on the source to the last resumed
// one on the destination. That spans two clocks. Each host by itself bounds it:
// the destination counts from the last byte on, so the whole is longer; the
// source until its copy was killed, after the resume, so the whole is shorter.
// A difference of the two clocks that is outside of these bounds is worthless.
func frozenTime(r *wire.Record) (frozen, bool) {
	src, dst := r.SourceReport, r.DestinationReport
	own := microseconds(src.GetFrozenUs())
	if r.State == wire.State_STATE_COMPLETED && src.GetFrozenAtUnixUs() != 0 && dst.GetResumedAtUnixUs() != 0 {
		both := time.Duration(dst.ResumedAtUnixUs-src.FrozenAtUnixUs) * time.Microsecond
		if both >= 0 && both >= microseconds(dst.FrozenUs)-clockSlack && (own == 0 || both <= own+clockSlack) {
			return frozen{both, "both"}, true
		}
	}
	return frozen{own, "source"}, own != 0
}

// migrationDoc is a migration for programs. Times of day are by the clock of
// whoever noted them; milliseconds have fractions.
type migrationDoc struct {
	ID          string `json:"id"`
	State       string `json:"state"`   // as State.Word
	Outcome     string `json:"outcome"` // as outcome
	Source      string `json:"source"`
	Destination string `json:"destination"`
	PID         int32  `json:"pid"`
	LandedPID   int32  `json:"landed_pid,omitempty"`
	Owner       string `json:"owner"` // source or destination: who may run the tree
	Comm        string `json:"comm,omitempty"`
	Command     string `json:"command,omitempty"`
	Tasks       uint32 `json:"tasks,omitempty"`
	Threads     uint32 `json:"threads,omitempty"`
	MemoryBytes uint64 `json:"memory_bytes,omitempty"`
	Coordinator string `json:"coordinator,omitempty"`

	Created *time.Time `json:"created,omitempty"`
	Updated *time.Time `json:"updated,omitempty"`
	TotalMS float64    `json:"total_ms"` // from the request on

	FrozenMS    *float64 `json:"frozen_ms,omitempty"`
	FrozenClock string   `json:"frozen_clock,omitempty"` // as frozen.Clock

	Bytes          uint64 `json:"bytes"`
	Pages          uint64 `json:"pages"`
	ResentBytes    uint64 `json:"resent_bytes"`
	BytesPerSecond uint64 `json:"bytes_per_second"`

	SourceReport      *reportDoc `json:"source_report,omitempty"`
	DestinationReport *reportDoc `json:"destination_report,omitempty"`

	Steps    []stepDoc `json:"steps"`
	Reason   string    `json:"reason,omitempty"`
	Error    *errorDoc `json:"error,omitempty"`
	ExitCode int       `json:"exit_code"` // that of migrate
}

type stepDoc struct {
	State string     `json:"state"`
	Time  *time.Time `json:"time"`
	By    string     `json:"by"`
}

// reportDoc is what one agent measured by its own clock.
type reportDoc struct {
	FrozenMS       float64    `json:"frozen_ms"`
	FreezeMS       float64    `json:"freeze_ms"`
	DumpMS         float64    `json:"dump_ms"`
	TransferMS     float64    `json:"transfer_ms"`
	RestoreMS      float64    `json:"restore_ms"`
	ResumeMS       float64    `json:"resume_ms"`
	Bytes          uint64     `json:"bytes"`
	Pages          uint64     `json:"pages"`
	ResentBytes    uint64     `json:"resent_bytes"`
	BytesPerSecond uint64     `json:"bytes_per_second"`
	FrozenAt       *time.Time `json:"frozen_at,omitempty"`
	ResumedAt      *time.Time `json:"resumed_at,omitempty"`
	PeakRSSBytes   uint64     `json:"peak_rss_bytes"`

	// Of pre-copy, by the source.
	Rounds              uint32  `json:"rounds,omitempty"`
	PrecopyMS           float64 `json:"precopy_ms,omitempty"`
	PrecopyBytes        uint64  `json:"precopy_bytes,omitempty"`
	DirtyBytesPerSecond uint64  `json:"dirty_bytes_per_second,omitempty"`
	CopyNote            string  `json:"copy_note,omitempty"`

	// Of post-copy, by the destination.
	PagingMS   float64 `json:"paging_ms,omitempty"`
	PagedBytes uint64  `json:"paged_bytes,omitempty"`
	Faults     uint64  `json:"faults,omitempty"`
	FaultP50MS float64 `json:"fault_p50_ms,omitempty"`
	FaultP99MS float64 `json:"fault_p99_ms,omitempty"`

	// Of the stream, by the source; StreamBytes are before compression.
	Lane        string `json:"lane,omitempty"`
	Compression string `json:"compression,omitempty"`
	StreamBytes uint64 `json:"stream_bytes,omitempty"`
	// Of files that travel with their content, by the source.
	EarlyFileBytes  uint64 `json:"early_file_bytes,omitempty"`
	FrozenFileBytes uint64 `json:"frozen_file_bytes,omitempty"`
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func newReportDoc(r *wire.Report) *reportDoc {
	if r == nil {
		return nil
	}
	ms := func(us uint64) float64 { return float64(us) / 1000 }
	at := func(us int64) *time.Time {
		if us == 0 {
			return nil
		}
		t := time.UnixMicro(us).UTC()
		return &t
	}
	return &reportDoc{
		FrozenMS: ms(r.FrozenUs), FreezeMS: ms(r.FreezeUs), DumpMS: ms(r.DumpUs), TransferMS: ms(r.TransferUs),
		RestoreMS: ms(r.RestoreUs), ResumeMS: ms(r.ResumeUs), Bytes: r.Bytes, Pages: r.Pages, ResentBytes: r.ResentBytes,
		BytesPerSecond: r.BytesPerSecond, FrozenAt: at(r.FrozenAtUnixUs), ResumedAt: at(r.ResumedAtUnixUs), PeakRSSBytes: r.PeakRssBytes,
		Rounds: r.Rounds, PrecopyMS: ms(r.PrecopyUs), PrecopyBytes: r.PrecopyBytes, DirtyBytesPerSecond: r.DirtyBytesPerSecond, CopyNote: r.CopyNote,
		PagingMS: ms(r.PagingUs), PagedBytes: r.PagedBytes, Faults: r.Faults, FaultP50MS: ms(r.FaultP50Us), FaultP99MS: ms(r.FaultP99Us),
		Lane: r.Lane, Compression: r.Compression, StreamBytes: r.StreamBytes,
		EarlyFileBytes: r.EarlyFileBytes, FrozenFileBytes: r.FrozenFileBytes,
	}
}

// newMigrationDoc describes a migration; total is how long it took, as the
// caller measured it, or 0 for what the record's steps say.
func newMigrationDoc(r *wire.Record, total time.Duration) *migrationDoc {
	if total == 0 {
		total = lasted(r)
	}
	d := &migrationDoc{
		ID: r.Id, State: r.State.Word(), Outcome: outcome(r), Source: r.Source, Destination: r.Destination,
		PID: r.Pid, LandedPID: r.LandedPid, Owner: "source", Comm: r.Comm, Command: r.Command,
		Tasks: r.Tasks, Threads: r.Threads, MemoryBytes: r.MemoryBytes, Coordinator: r.Coordinator,
		Created: stamp(r.CreatedUnixMs), Updated: stamp(r.UpdatedUnixMs), TotalMS: milliseconds(total),
		SourceReport: newReportDoc(r.SourceReport), DestinationReport: newReportDoc(r.DestinationReport),
		Steps: []stepDoc{}, Reason: r.Reason, Error: newErrorDoc(r.Error), ExitCode: exitCode(failureOf(r)),
	}
	if r.Owner == wire.Owner_OWNER_DESTINATION {
		d.Owner = "destination"
	}
	if f, ok := frozenTime(r); ok {
		ms := milliseconds(f.Time)
		d.FrozenMS, d.FrozenClock = &ms, f.Clock
	}
	sent := transferOf(r)
	d.Bytes, d.Pages, d.ResentBytes, d.BytesPerSecond = sent.GetBytes(), sent.GetPages(), sent.GetResentBytes(), sent.GetBytesPerSecond()
	for _, s := range r.Steps {
		d.Steps = append(d.Steps, stepDoc{State: s.State.Word(), Time: stamp(s.UnixMs), By: s.By})
	}
	return d
}

// transferOf is the report to take the figures of the stream from: the
// source's, which has counted what was resent, or the destination's.
func transferOf(r *wire.Record) *wire.Report {
	if r.SourceReport.GetBytes() != 0 {
		return r.SourceReport
	}
	return r.DestinationReport
}

// printReport prints a migration that has completed, for people.
func printReport(w io.Writer, r *wire.Record, total time.Duration) error {
	if total == 0 {
		total = lasted(r)
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	landed := ""
	if r.LandedPid != 0 {
		landed = fmt.Sprintf(" as pid %d", r.LandedPid)
	}
	fmt.Fprintf(&b, "%s moved from %s to %s%s\n", subject(r), r.Source, r.Destination, landed)
	line("migration", "%s", r.Id)
	if r.Tasks != 0 {
		line("tree", "%s, %s, %s of memory", plural(r.Tasks, "process"), plural(r.Threads, "thread"), formatBytes(r.MemoryBytes))
	}
	line("total time", "%s", formatDuration(total))
	src, dst := r.SourceReport, r.DestinationReport
	if f, ok := frozenTime(r); ok {
		how := "from the first stopped task on " + r.Source + " to the last resumed one on " + r.Destination
		if f.Clock != "both" {
			how = "by the clock of " + r.Source + " alone, until it had killed its copy; the hosts' clocks differ"
			if dst.GetResumedAtUnixUs() == 0 {
				how = "by the clock of " + r.Source
			}
		}
		line("frozen time", "%s, %s", formatDuration(f.Time), how)
	}
	if src != nil {
		line("  "+r.Source, "%s", joined(" · ",
			timed("frozen", src.FrozenUs), timed("freeze", src.FreezeUs), timed("dump", src.DumpUs), timed("transfer", src.TransferUs)))
	}
	if dst != nil {
		line("  "+r.Destination, "%s", joined(" · ",
			timed("frozen since the last byte", dst.FrozenUs), timed("restore", dst.RestoreUs), timed("resume", dst.ResumeUs)))
	}
	if src.GetRounds() != 0 {
		s := fmt.Sprintf("%s in %s, %s while the tree ran", formatBytes(src.PrecopyBytes), plural(src.Rounds, "round"), formatDuration(microseconds(src.PrecopyUs)))
		if src.DirtyBytesPerSecond != 0 {
			s += fmt.Sprintf(", which wrote to %s of new pages", formatRate(src.DirtyBytesPerSecond))
		}
		line("pre-copy", "%s", s)
	}
	if dst.GetPagingUs() != 0 {
		s := fmt.Sprintf("%s in %s while the tree ran at %s", formatBytes(dst.PagedBytes), formatDuration(microseconds(dst.PagingUs)), r.Destination)
		if dst.Faults != 0 {
			s += fmt.Sprintf(", which waited for %s: half of them within %s, 99 %% within %s", plural(dst.Faults, "page"), formatDuration(microseconds(dst.FaultP50Us)), formatDuration(microseconds(dst.FaultP99Us)))
		}
		line("post-copy", "%s", s)
	}
	if src.GetEarlyFileBytes() != 0 || src.GetFrozenFileBytes() != 0 {
		line("files", "%s of their content while the tree ran, %s while it was frozen", formatBytes(src.EarlyFileBytes), formatBytes(src.FrozenFileBytes))
	}
	if note := src.GetCopyNote(); note != "" {
		line("note", "%s", printable(note))
	}
	if sent := transferOf(r); sent != nil {
		s := fmt.Sprintf("%s, %s, %s", formatBytes(sent.Bytes), plural(sent.Pages, "page"), formatRate(sent.BytesPerSecond))
		if sent.ResentBytes != 0 {
			s += fmt.Sprintf(" (%s of it sent again)", formatBytes(sent.ResentBytes))
		}
		line("transferred", "%s", s)
	}
	if src.GetLane() != "" {
		line("lane", "%s", printable(src.Lane))
	}
	if src.GetCompression() != "" && src.GetStreamBytes() > 0 {
		line("compression", "%s, %s on the wire for %s of memory and images", printable(src.Compression), formatBytes(src.Bytes-min(src.Bytes, src.ResentBytes)), formatBytes(src.StreamBytes))
	}
	if wire.Committed(r.State) {
		for _, p := range r.Options.GetProxied() {
			line("still needed", "%s, for the bytes of %s (godwit ps %s --proxies)", p.Home, printable(p.Object), p.Home)
		}
	}
	if src.GetPeakRssBytes() != 0 || dst.GetPeakRssBytes() != 0 {
		line("agents used", "%s on %s, %s on %s", formatBytes(src.GetPeakRssBytes()), r.Source, formatBytes(dst.GetPeakRssBytes()), r.Destination)
	}
	if r.Error != nil {
		if f := r.Error.Failure(); f != nil {
			line("but", "%s", strings.ReplaceAll(f.Error(), "\n", "\n    "))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func timed(what string, us uint64) string {
	if us == 0 {
		return ""
	}
	return what + " " + formatDuration(microseconds(us))
}

// joined joins what is not empty.
func joined(sep string, parts ...string) string {
	var have []string
	for _, p := range parts {
		if p != "" {
			have = append(have, p)
		}
	}
	return strings.Join(have, sep)
}
