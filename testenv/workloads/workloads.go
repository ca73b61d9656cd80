// Package workloads builds and drives programs that notice by themselves when
// a counter goes back, a byte is lost or doubled, a timer misfires or anything
// else about them changes: selfcheck (C, one command for each object of the
// kernel), pycheck (Python), gocheck and ledger (Go), and drive (Python), which
// runs real programs and checks their work.
//
// They all speak the same way. PREFIX.ready appears when a program is set up,
// PREFIX.log gets numbered records with CLOCK_MONOTONIC all the time,
// PREFIX.fail says what broke, and after SIGTERM and its last checks a program
// leaves "OK <records>" in PREFIX.ok.
//
// It must not know agents, engines or how a tree is moved.
package workloads

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
)

//go:embed selfcheck python
var sources embed.FS

// Programs are the built programs, by path.
type Programs struct {
	Selfcheck, Pycheck, Drive, Gocheck string
}

// Build compiles all programs into dir; it needs gcc and go, and to be called
// somewhere inside the module.
func Build(ctx context.Context, dir string) (*Programs, error) {
	src := filepath.Join(dir, "src")
	err := fs.WalkDir(sources, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := sources.ReadFile(p)
		if err != nil {
			return err
		}
		to := filepath.Join(src, p)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, b, 0o644)
	})
	if err != nil {
		return nil, fmt.Errorf("write sources of the workloads: %w", err)
	}
	p := &Programs{
		Selfcheck: filepath.Join(dir, "selfcheck"),
		Pycheck:   filepath.Join(src, "python", "pycheck.py"),
		Drive:     filepath.Join(src, "python", "drive.py"),
		Gocheck:   filepath.Join(dir, "gocheck"),
	}
	cs, err := filepath.Glob(filepath.Join(src, "selfcheck", "*.c"))
	if err != nil {
		return nil, err
	}
	gcc := append([]string{"gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", p.Selfcheck}, cs...)
	if err := build(ctx, "selfcheck", gcc...); err != nil {
		return nil, err
	}
	if err := build(ctx, "gocheck", "go", "build", "-o", p.Gocheck, "godwit/testenv/workloads/gocheck"); err != nil {
		return nil, err
	}
	return p, nil
}

// BuildLedger builds the workload of the demo alone, for which go is enough.
func BuildLedger(ctx context.Context, dir string) (string, error) {
	p := filepath.Join(dir, "ledger")
	return p, build(ctx, "ledger", "go", "build", "-o", p, "godwit/testenv/workloads/ledger")
}

func build(ctx context.Context, what string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", what, err, out)
	}
	return nil
}

// Commands lists the commands of selfcheck that carry one kind of object each.
func (p *Programs) Commands(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, p.Selfcheck, "-l").Output()
	if err != nil {
		return nil, fmt.Errorf("list commands of selfcheck: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// Refused are the kinds of "selfcheck hold PREFIX KIND" that nobody can carry yet.
var Refused = []string{"vsock", "tapfilter", "mrouter", "bpfprog", "bpffilter", "pidfd", "pty", "namespace", "tcp", "uring", "secretmem"}

// Run is one running workload. Its pid inside the host stays the same wherever
// it is moved.
type Run struct {
	Host   *hosts.Host // where it is believed to run; a test that moves it changes this
	Pid    int         // inside the host
	Prefix string
	read   int // records seen so far
}

// Start starts argv detached on h and waits until it is set up. argv must have
// prefix among its arguments, in a directory that every host sees.
func Start(ctx context.Context, h *hosts.Host, prefix string, argv ...string) (*Run, error) {
	r, err := Launch(ctx, h, prefix, argv...)
	if err != nil {
		return nil, err
	}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		return nil, err
	}
	return r, nil
}

// Launch is Start without the waiting.
func Launch(ctx context.Context, h *hosts.Host, prefix string, argv ...string) (*Run, error) {
	return LaunchWith(ctx, h, prefix, nil, argv...)
}

// LaunchWith is Launch with open files, which become descriptors 3 and on.
func LaunchWith(ctx context.Context, h *hosts.Host, prefix string, files []*os.File, argv ...string) (*Run, error) {
	if err := os.MkdirAll(filepath.Dir(prefix), 0o755); err != nil {
		return nil, err
	}
	// A workload may have given up root by the time it writes its verdict.
	if err := os.Chmod(filepath.Dir(prefix), 0o777); err != nil {
		return nil, err
	}
	pid, err := h.Start(ctx, hosts.Spec{Args: argv, Env: []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}, Stdout: prefix + ".out", Stderr: prefix + ".out", Files: files})
	if err != nil {
		return nil, err
	}
	return &Run{Host: h, Pid: pid, Prefix: prefix}, nil
}

// WaitFile waits for PREFIX.suffix; PREFIX.fail or the end of the process is an error.
func (r *Run) WaitFile(ctx context.Context, suffix string) error {
	for {
		if _, err := os.Stat(r.Prefix + "." + suffix); err == nil {
			return nil
		}
		if err := r.Failed(); err != nil {
			return err
		}
		if !r.Host.Alive(r.Pid) {
			if _, err := os.Stat(r.Prefix + "." + suffix); err == nil {
				return nil
			}
			out, _ := os.ReadFile(r.Prefix + ".out")
			return fmt.Errorf("%s (pid %d on %s) ended without a verdict: %s", filepath.Base(r.Prefix), r.Pid, r.Host.Name(), bytes.TrimSpace(out))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s.%s: %w", filepath.Base(r.Prefix), suffix, ctx.Err())
		case <-time.After(3 * time.Millisecond):
		}
	}
}

// Failed returns what the workload complained about, if it did.
func (r *Run) Failed() error {
	b, err := os.ReadFile(r.Prefix + ".fail")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// The file is made first and written then.
	for range 100 {
		if bytes.HasSuffix(b, []byte("\n")) {
			break
		}
		time.Sleep(time.Millisecond)
		if b, err = os.ReadFile(r.Prefix + ".fail"); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %s", filepath.Base(r.Prefix), bytes.TrimSpace(b))
}

// Record is one line of PREFIX.log.
type Record struct {
	N  uint64
	At time.Duration // CLOCK_MONOTONIC
}

// ParseRecords reads records; a last line that is still being written does not count.
func ParseRecords(b []byte) ([]Record, error) {
	var rs []Record
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		n, at, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
		if !ok {
			return nil, fmt.Errorf("record %d: %q has no time", len(rs), line)
		}
		un, err := strconv.ParseUint(n, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", len(rs), err)
		}
		ns, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("record %d: %w", len(rs), err)
		}
		rs = append(rs, Record{un, time.Duration(ns)})
	}
	return rs, nil
}

// CheckRecords looks for lost, doubled and reordered records.
func CheckRecords(rs []Record) error {
	for i, r := range rs {
		if r.N != uint64(i) {
			return fmt.Errorf("record %d carries number %d: records were lost or doubled", i, r.N)
		}
		if i > 0 && r.At < rs[i-1].At {
			return fmt.Errorf("record %d is %v older than the one before it", i, rs[i-1].At-r.At)
		}
	}
	return nil
}

// MaxGap is the longest pause between two records.
func MaxGap(rs []Record) time.Duration {
	var gap time.Duration
	for i := 1; i < len(rs); i++ {
		gap = max(gap, rs[i].At-rs[i-1].At)
	}
	return gap
}

// Heartbeats is what the heart of "selfcheck dirtier" saw from one question to
// the next, by CLOCK_REALTIME and in nanoseconds.
type Heartbeats struct {
	Since     int64  `json:"since_ns"`
	Until     int64  `json:"until_ns"`
	Beats     uint64 `json:"beats"`
	Longest   int64  `json:"longest_ns"`    // pause between two beats
	LongestAt int64  `json:"longest_at_ns"` // when it began
	Gaps      uint64 `json:"gaps"`          // pauses of 5 ms and more
	GapsSum   int64  `json:"gaps_ns"`       // all of them together
	Dirtied   uint64 `json:"dirtied_bytes"` // in whole pages, by the first process
}

// Heartbeats asks a running dirtier what it saw since it was last asked.
func (r *Run) Heartbeats(ctx context.Context) (*Heartbeats, error) {
	if err := os.Remove(r.Prefix + ".gap"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := r.Host.Kill(r.Pid, unix.SIGUSR1); err != nil {
		return nil, errors.Join(err, r.Failed())
	}
	if err := r.WaitFile(ctx, "gap"); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(r.Prefix + ".gap")
	if err != nil {
		return nil, err
	}
	var h Heartbeats
	if err := json.Unmarshal(b, &h); err != nil {
		return nil, fmt.Errorf("%s: heartbeats %q: %w", filepath.Base(r.Prefix), b, err)
	}
	return &h, nil
}

// Records reads and checks all records written so far.
func (r *Run) Records() ([]Record, error) {
	b, err := os.ReadFile(r.Prefix + ".log")
	if err != nil {
		return nil, err
	}
	rs, err := ParseRecords(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(r.Prefix), err)
	}
	if err := CheckRecords(rs); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(r.Prefix), err)
	}
	return rs, nil
}

// Goes waits until n more records were written, which shows that the workload
// runs and is content.
func (r *Run) Goes(ctx context.Context, n int) error {
	rs, err := r.Records()
	if err != nil {
		return err
	}
	want := max(len(rs), r.read) + n
	for {
		if err := r.Failed(); err != nil {
			return err
		}
		if rs, err = r.Records(); err != nil {
			return err
		}
		if len(rs) >= want {
			r.read = len(rs)
			return nil
		}
		if !r.Host.Alive(r.Pid) {
			if err := r.Failed(); err != nil {
				return err
			}
			return fmt.Errorf("%s: pid %d is not running on host %s", filepath.Base(r.Prefix), r.Pid, r.Host.Name())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s (pid %d on %s) writes no records: %d, want %d: %w", filepath.Base(r.Prefix), r.Pid, r.Host.Name(), len(rs), want, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Stop ends the workload and returns its verdict: nil only if it said OK and
// its records are complete.
func (r *Run) Stop(ctx context.Context) error {
	if err := r.Failed(); err != nil {
		return err
	}
	if err := r.Host.Kill(r.Pid, unix.SIGTERM); err != nil {
		return errors.Join(err, r.Failed())
	}
	if err := r.WaitFile(ctx, "ok"); err != nil {
		return err
	}
	if err := r.Host.WaitGone(ctx, r.Pid); err != nil {
		return err
	}
	if err := r.Failed(); err != nil {
		return err
	}
	rs, err := r.Records()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(r.Prefix + ".ok")
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("OK %d\n", len(rs)); string(b) != want {
		return fmt.Errorf("%s says %q, its log has %d records", filepath.Base(r.Prefix), b, len(rs))
	}
	return nil
}
