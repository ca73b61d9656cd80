package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
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

// compare prints the ratios of a row that went over both lanes: of medians.
func (b *bencher) compare(r benchRow) {
	median := func(mode, lane string, of func(m benchMove) float64) float64 {
		var all []float64
		for _, m := range r.Moves {
			if m.Mode == mode && m.Lane == lane {
				all = append(all, of(m))
			}
		}
		slices.Sort(all)
		if len(all) == 0 {
			return 0
		}
		return all[len(all)/2]
	}
	total := func(m benchMove) float64 { return m.TotalMS }
	bare := func(m benchMove) float64 { return m.TotalPerBare }
	for _, mode := range []string{fleet.StopAndCopy, fleet.PreCopy} {
		relayed, direct := median(mode, laneCluster, total), median(mode, laneDirect, total)
		if relayed == 0 || direct == 0 || r.ImagesMS == 0 {
			continue
		}
		b.say("%s, %s: relayed %.0f ms, direct %.0f ms: relayed/direct %.2f; total/bare %.2f relayed, %.2f direct; by images in a tmpfs %.0f ms, with their way over TCP %.0f ms: %.2f and %.2f of direct",
			r.Name, mode, relayed, direct, relayed/direct, median(mode, laneCluster, bare), median(mode, laneDirect, bare),
			r.ImagesMS, r.ImagesMS+r.carryMS(), r.ImagesMS/direct, (r.ImagesMS+r.carryMS())/direct)
	}
}

// carryMS is how long one connection takes for the images of a tree, which are as large as
// what a move without rounds sends.
func (r benchRow) carryMS() float64 {
	if len(r.Moves) == 0 || r.TCPRate == 0 {
		return 0
	}
	return 1000 * float64(r.Moves[0].SentBytes) / r.TCPRate
}
