package restore

import (
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/timens"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// Clocks says what becomes of CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree,
// which count from the boot of a host.
type Clocks int

const (
	// ClocksAuto lets a tree go on with the clocks that it has had: they are this
	// host's if it has not booted since and the tree was in no time namespace
	// of its own, else those of a time namespace.
	ClocksAuto Clocks = iota
	// ClocksNew makes a time namespace in which the clocks go on where they stood
	// at the dump, as CRIU does.
	ClocksNew
	// ClocksKeep gives the tree this host's clocks.
	ClocksKeep
)

// clocks are readings of a tree's clocks, ns; offset says how far they were
// ahead of those of the kernel that booted as boot, empty for unknown.
type clocks struct {
	monotonic, boottime int64
	offset              procfs.TimeOffsets
	boot                string
}

// readClocks gives the clocks of the images, nil if they have none.
func readClocks(set *image.Set, id uint32) (*clocks, error) {
	var c *clocks
	if es, err := image.All[*timens.TimensEntry](set, image.TimensFile(id)); err == nil && len(es) == 1 {
		c = &clocks{}
		for _, x := range []struct {
			at *timens.Timespec
			to *int64
		}{{es[0].GetMonotonic(), &c.monotonic}, {es[0].GetBoottime(), &c.boottime}} {
			// The kernel takes half of what a clock can count (KTIME_SEC_MAX).
			if x.at.GetTvSec() > math.MaxInt64/2_000_000_000 || x.at.GetTvNsec() >= 1e9 {
				return nil, fmt.Errorf("images hold a clock of %d.%d s", x.at.GetTvSec(), x.at.GetTvNsec())
			}
			*x.to = int64(x.at.GetTvSec())*1e9 + int64(x.at.GetTvNsec())
		}
	}
	f := set.Facts
	if f == nil {
		return c, nil
	}
	if c == nil && f.MonotonicNS > 0 && f.BoottimeNS > 0 {
		c = &clocks{monotonic: f.MonotonicNS, boottime: f.BoottimeNS}
	}
	if c != nil {
		c.boot, c.offset = f.BootID, procfs.TimeOffsets{Monotonic: f.MonotonicOffsetNS, Boottime: f.BoottimeOffsetNS}
	}
	return c, nil
}

// plan says with which offsets to the kernel's clocks, which read kernel, a
// time namespace is to be made, if any. own are those of this process.
func (c *clocks) plan(how Clocks, boot string, own, kernel procfs.TimeOffsets) (o procfs.TimeOffsets, needed bool) {
	switch {
	case c == nil || how == ClocksKeep:
		return own, false
	case how == ClocksAuto && c.boot == boot:
		return c.offset, c.offset != own
	}
	return procfs.TimeOffsets{Monotonic: c.monotonic - kernel.Monotonic, Boottime: c.boottime - kernel.Boottime}, true
}

// setClocks has everything that is cloned from the stub live in a time namespace
// where it needs one.
// Preconditions: nothing has been cloned yet but processes for early memory.
func (t *Tree) setClocks() error {
	own, err := procfs.ReadTimeOffsets(os.Getpid())
	if err != nil {
		return err
	}
	boot, err := procfs.BootID()
	if err != nil {
		return err
	}
	kernel := procfs.TimeOffsets{Monotonic: -own.Monotonic, Boottime: -own.Boottime}
	for clock, to := range map[int32]*int64{unix.CLOCK_MONOTONIC: &kernel.Monotonic, unix.CLOCK_BOOTTIME: &kernel.Boottime} {
		var now unix.Timespec
		if err := unix.ClockGettime(clock, &now); err != nil {
			return os.NewSyscallError("clock_gettime", err)
		}
		*to += now.Nano()
	}
	o, needed := t.model.clocks.plan(t.o.TimeNamespace, boot, own, kernel)
	if !needed {
		return nil
	}
	const hint = "this host cannot continue the clocks of the tree (--time-namespace keep gives it the host's, which jump)"
	if err := t.stub.remote.Run(ptrace.NewCall("make a time namespace", unix.SYS_UNSHARE, ptrace.Int(unix.CLONE_NEWTIME))); err != nil {
		return fmt.Errorf("%s: %w", hint, err)
	}
	text := fmt.Sprintf("monotonic %s\nboottime %s\n", seconds(o.Monotonic), seconds(o.Boottime))
	if err := os.WriteFile(procfs.Path(t.stub.remote.Tid, "timens_offsets"), []byte(text), 0); err != nil {
		return errors.Join(fmt.Errorf("%s: set its time namespace", hint), err)
	}
	if err := t.clockGrafts(); err != nil {
		return fmt.Errorf("%s: %w", hint, err)
	}
	t.log.Debug("tree lives in a time namespace", "monotonic_offset_ms", o.Monotonic/1e6, "boottime_offset_ms", o.Boottime/1e6)
	return nil
}

// clockGrafts has processes that were made before the clocks were known live in the
// time namespace of those that are cloned from the stub.
func (t *Tree) clockGrafts() error {
	var f *os.File
	for _, p := range t.model.procs {
		if p.graft == nil {
			continue
		}
		if f == nil {
			var err error
			if f, err = os.Open(procfs.Path(t.stub.remote.Tid, "ns", "time_for_children")); err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
		}
		if err := t.setns(p.remote(), f, unix.CLONE_NEWTIME, "enter the time namespace"); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// seconds writes an offset as timens_offsets wants it: nanoseconds are never negative.
func seconds(ns int64) string {
	sec := ns / 1e9
	if ns %= 1e9; ns < 0 {
		sec, ns = sec-1, ns+1e9
	}
	return fmt.Sprintf("%d %d", sec, ns)
}
