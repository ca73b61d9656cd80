package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Freezer is a group that can be frozen, of version 1 or 2.
type Freezer struct {
	dir  string
	v2   bool
	kept bool // it was told to be frozen when it was opened
}

// OpenFreezer takes the directory of a group, where the host has it mounted.
func OpenFreezer(dir string) (*Freezer, error) {
	f := &Freezer{dir: filepath.Clean(dir)}
	_, err := os.Stat(filepath.Join(f.dir, "freezer.state"))
	if errors.Is(err, fs.ErrNotExist) {
		f.v2 = true
		_, err = os.Stat(filepath.Join(f.dir, "cgroup.freeze"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is no control group that can be frozen: it has neither cgroup.freeze nor freezer.state, as the root of a hierarchy has neither", dir)
	}
	if err != nil {
		return nil, err
	}
	asked := "freezer.self_freezing"
	if f.v2 {
		asked = "cgroup.freeze"
	}
	b, err := os.ReadFile(filepath.Join(f.dir, asked))
	f.kept = strings.TrimSpace(string(b)) == "1"
	return f, err
}

// Name is its directory.
func (f *Freezer) Name() string { return f.dir }

// frozen says whether all tasks of the group stand still.
func (f *Freezer) frozen() (bool, error) {
	name := "freezer.state"
	if f.v2 {
		name = "cgroup.events"
	}
	b, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil {
		return false, err
	}
	if f.v2 {
		return strings.Contains("\n"+string(b), "\nfrozen 1\n"), nil
	}
	return strings.TrimSpace(string(b)) == "FROZEN", nil
}

// Tids are the tasks in the group and in those below it.
func (f *Freezer) Tids() (map[int]bool, error) {
	name := "tasks"
	if f.v2 {
		name = "cgroup.threads"
	}
	out := map[int]bool{}
	err := filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != f.dir {
			return nil // removed just now
		}
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, name))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		for _, word := range strings.Fields(string(b)) {
			if tid, err := strconv.Atoi(word); err == nil {
				out[tid] = true
			}
		}
		return err
	})
	return out, err
}

func (f *Freezer) set(frozen bool) error {
	name, value := "freezer.state", "THAWED"
	switch {
	case f.v2 && frozen:
		name, value = "cgroup.freeze", "1"
	case f.v2:
		name, value = "cgroup.freeze", "0"
	case frozen:
		value = "FROZEN"
	}
	return os.WriteFile(filepath.Join(f.dir, name), []byte(value), 0)
}

// Freeze has all tasks stand still, within the time of ctx. Otherwise the group is as before.
func (f *Freezer) Freeze(ctx context.Context) error {
	for {
		// Version 1 catches up with tasks that came meanwhile only when told again.
		if err := f.set(true); err != nil {
			return fmt.Errorf("freeze the control group %s: %w", f.dir, err)
		}
		done, err := f.frozen()
		if done {
			return nil
		}
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("freeze the control group %s: %w", f.dir, err), f.Restore())
		}
		time.Sleep(time.Millisecond)
	}
}

// Thaw lets all tasks go. Those that a tracer has told to stop, stop.
func (f *Freezer) Thaw() error {
	if err := f.set(false); err != nil {
		return fmt.Errorf("thaw the control group %s: %w", f.dir, err)
	}
	return nil
}

// Restore freezes or thaws the group, as it was found; a nil one needs nothing.
func (f *Freezer) Restore() error {
	switch {
	case f == nil:
		return nil
	case !f.kept:
		return f.Thaw()
	}
	if err := f.set(true); err != nil {
		return fmt.Errorf("freeze the control group %s again: %w", f.dir, err)
	}
	return nil
}
