package agent

import (
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
	"google.golang.org/protobuf/proto"

	"godwit/engine"
	"godwit/engine/image"
)

// Names of the files of statistics, without a suffix, as CRIU has them. They
// are put into the work directory beside the log.
const (
	statsDumpFile    = "stats-dump"
	statsRestoreFile = "stats-restore"
)

// dumpStats are the statistics of a dump in CRIU's form. frozen is the time from the
// first stopped task until the tree ran on or was gone, commit that of bringing the images to
// the disk. Memory is read and given to the images in one go, which is
// memdump_time; what is left for memwrite_time is commit.
func dumpStats(s engine.DumpStats, sink *image.DirSink, frozen, commit time.Duration) *stats.StatsEntry {
	memory, shmem := sink.Skipped()
	return &stats.StatsEntry{Dump: &stats.DumpStatsEntry{
		FreezingTime: micros(s.FreezeDur), FrozenTime: micros(frozen), MemdumpTime: micros(s.DataDur), MemwriteTime: micros(commit),
		PagesScanned: proto.Uint64(s.Scanned), PagesSkippedParent: proto.Uint64(memory), PagesWritten: proto.Uint64(s.Pages - s.ShmemPages - memory),
		PagesLazy: proto.Uint64(0), ShpagesSkippedParent: proto.Uint64(shmem), ShpagesWritten: proto.Uint64(s.ShmemPages - shmem),
	}}
}

// restoreStats are the statistics of a restore in CRIU's form.
func restoreStats(s engine.RestoreStats) *stats.StatsEntry {
	return &stats.StatsEntry{Restore: &stats.RestoreStatsEntry{
		PagesCompared: proto.Uint64(s.ComparedPages), PagesSkippedCow: proto.Uint64(s.SharedPages), PagesRestored: proto.Uint64(s.Pages - s.SharedPages),
		ForkingTime: micros(s.ForkDur), RestoreTime: micros(s.RestoreDur),
	}}
}

// micros is a duration in a field of 32 bits, which ends at 71 minutes.
func micros(d time.Duration) *uint32 {
	return proto.Uint32(uint32(min(max(d.Microseconds(), 0), math.MaxUint32)))
}

// writeStats writes a file of statistics that crit decodes.
func writeStats(path string, e *stats.StatsEntry) error {
	b, err := image.AppendHead(nil, "STATS")
	if err != nil {
		return err
	}
	if b, err = image.AppendMessage(b, e); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// displayStats prints the statistics for a person, as --display-stats wants it.
func displayStats(w io.Writer, e *stats.StatsEntry) error {
	type row struct {
		name  string
		value uint64
		unit  string
	}
	var what string
	var rows []row
	if d := e.GetDump(); d != nil {
		what = "dump"
		rows = []row{
			{"Freezing time", uint64(d.GetFreezingTime()), " us"}, {"Frozen time", uint64(d.GetFrozenTime()), " us"},
			{"Memory dump time", uint64(d.GetMemdumpTime()), " us"}, {"Memory write time", uint64(d.GetMemwriteTime()), " us"},
			{"Memory pages scanned", d.GetPagesScanned(), ""}, {"Memory pages skipped from parent", d.GetPagesSkippedParent(), ""},
			{"Memory pages written", d.GetPagesWritten(), ""},
			{"Shared memory pages written", d.GetShpagesWritten(), ""},
		}
	} else {
		d := e.GetRestore()
		what = "restore"
		rows = []row{
			{"Pages compared", d.GetPagesCompared(), ""}, {"Pages skipped COW", d.GetPagesSkippedCow(), ""}, {"Pages restored", d.GetPagesRestored(), ""}, {"Forking time", uint64(d.GetForkingTime()), " us"},
			{"Restore time", uint64(d.GetRestoreTime()), " us"},
		}
	}
	text := "Displaying " + what + " stats:\n"
	for _, r := range rows {
		text += fmt.Sprintf("%s: %d%s\n", r.name, r.value, r.unit)
	}
	_, err := io.WriteString(w, text)
	return err
}
