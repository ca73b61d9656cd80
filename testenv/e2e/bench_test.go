package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/workloads"
)

// BenchmarkLeaveRunning dumps a small process, of 5 MiB and few descriptors,
// which runs on. Figures are medians: what the process itself saw of the freeze,
// the whole command, and both as multiples of fork+exec of /bin/true in the
// same run.
func BenchmarkLeaveRunning(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp(base, "b")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	prefix := filepath.Join(dir, "mem")
	small := exec.CommandContext(ctx, programs.Selfcheck, "mem", prefix, "5")
	small.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := small.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		_ = small.Process.Kill()
		_ = small.Wait()
	}()
	records := func() []workloads.Record {
		raw, err := os.ReadFile(prefix + ".log")
		if err != nil && !os.IsNotExist(err) {
			b.Fatal(err)
		}
		rs, err := workloads.ParseRecords(raw)
		if err != nil {
			b.Fatal(err)
		}
		return rs
	}
	wait := func(n int) []workloads.Record {
		for {
			rs := records()
			if len(rs) >= n {
				return rs
			}
			if ctx.Err() != nil {
				b.Fatal(ctx.Err())
			}
			time.Sleep(time.Millisecond)
		}
	}
	wait(20)

	timed := func(argv ...string) time.Duration {
		begin := time.Now()
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %v\n%s", argv, err, out)
		}
		return time.Since(begin)
	}
	var gaps, commands, baseline []time.Duration
	for i := 0; b.Loop(); i++ {
		baseline = append(baseline, timed("/bin/true"))
		n := len(records())
		commands = append(commands, timed(binaries.Agent, "dump", "-t", strconv.Itoa(small.Process.Pid), "-D", filepath.Join(dir, strconv.Itoa(i)), "-R"))
		rs := wait(len(records()) + 5)
		gaps = append(gaps, workloads.MaxGap(rs[max(n-1, 0):]))
	}
	unit := median(baseline)
	b.ReportMetric(median(gaps).Seconds()*1000, "gap-ms")
	b.ReportMetric(median(commands).Seconds()*1000, "command-ms")
	b.ReportMetric(float64(median(gaps))/float64(unit), "gap/true")
	b.ReportMetric(float64(median(commands))/float64(unit), "command/true")
}

func median(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[len(ds)/2]
}
