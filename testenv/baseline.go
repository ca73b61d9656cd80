package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// Lanes of a move.
const (
	laneCluster = "cluster"
	laneDirect  = "direct"
)

// buildBare builds the program of the baseline.
func (b *bencher) buildBare(ctx context.Context) error {
	b.bare = filepath.Join(b.dir, "bin", "bare")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.bare, "godwit/testenv/bare")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build bare: %w\n%s", err, out)
	}
	return nil
}

// bareRate is how many bytes a second a stream of messages carries between two
// hosts over the bus of the fleet, or from a server in the sender.
func (b *bencher) bareRate(ctx context.Context, from, to *hosts.Host, lane string, n uint64) (float64, error) {
	count := strconv.FormatUint(n, 10)
	seed, err := b.fleet.OperatorKey()
	if err != nil {
		return 0, err
	}
	sending, url := []string{"send", count, b.fleet.URL(), seed}, b.fleet.URL()
	if lane == laneDirect {
		where := fmt.Sprintf("%s:4333", from.Addr())
		sending, url, seed = []string{"serve", count, where}, "nats://"+where, ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var out, said [2]bytes.Buffer
	cmds := [2]*exec.Cmd{to.Command(ctx, b.bare, "receive", count, url, seed), from.Command(ctx, b.bare, sending...)}
	for i, cmd := range cmds {
		cmd.Stdout, cmd.Stderr = &out[i], &said[i]
		if err := cmd.Start(); err != nil {
			cancel()
			return 0, err
		}
	}
	var errs []error
	for i, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("bare: %w: %s", err, strings.TrimSpace(said[i].String())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(out[1].String()), 64)
}

// throughImages has a tree dumped to a tmpfs and restored from it on its host, and says how
// long that took.
func (b *bencher) throughImages(ctx context.Context, r *workloads.Run) (took time.Duration, err error) {
	dir := filepath.Join(b.dir, "tmpfs", "images")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	begin := time.Now()
	for _, args := range [][]string{
		{"dump", "-t", strconv.Itoa(r.Pid), "-D", dir},
		{"restore", "-D", dir, "-d"},
	} {
		var said bytes.Buffer
		cmd := r.Host.Command(ctx, b.programs.Agent, args...)
		cmd.Stderr = &said
		if err := cmd.Run(); err != nil {
			return 0, fmt.Errorf("godwit-agent %s: %w: %s", args[0], err, strings.TrimSpace(said.String()))
		}
	}
	took = time.Since(begin)
	return took, r.Goes(ctx, 20)
}

// mountTmpfs makes a tmpfs that all hosts see: those made later do.
func (b *bencher) mountTmpfs() (unmount func() error, err error) {
	path := filepath.Join(b.dir, "tmpfs")
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", path, "tmpfs", 0, "mode=0700"); err != nil {
		return nil, &os.PathError{Op: "mount", Path: path, Err: err}
	}
	return func() error { return unix.Unmount(path, 0) }, nil
}

// compare prints the ratios of a row that went over both lanes.
func (b *bencher) compare(r benchRow) {
	find := func(mode, lane string) *benchMove {
		for i := range r.Moves {
			if m := &r.Moves[i]; m.Mode == mode && m.Lane == lane {
				return m
			}
		}
		return nil
	}
	for _, mode := range []string{"stop-and-copy", "precopy"} {
		c, d := find(mode, laneCluster), find(mode, laneDirect)
		if c == nil || d == nil {
			continue
		}
		s := fmt.Sprintf("%s, %s: the relayed move takes %.2f times the direct one", r.Name, mode, c.TotalMS/d.TotalMS)
		s += fmt.Sprintf("; of a bare stream %.2f times over the cluster, %.2f times directly", c.TotalPerBare, d.TotalPerBare)
		if r.ImagesMS > 0 {
			s += fmt.Sprintf("; dump to tmpfs and restore take %.2f times the direct move", r.ImagesMS/d.TotalMS)
		}
		b.say("%s", s)
	}
}
