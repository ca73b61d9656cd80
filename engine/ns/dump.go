package ns

import (
	"fmt"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidns"

	"godwit/engine/image"
)

// Dumped is what a dump of namespaces needs to know of the tree.
type Dumped struct {
	Pid int // the root, on this host
	Own Set
	// Shm are the segments of shared memory in an IPC namespace of its own.
	Shm []image.SysVFacts
	// Mounts are those of a mount namespace of its own.
	Mounts *Mounts
	// Users is its own user namespace, nil for none.
	Users *Users
	// Net is what its own network namespace holds, nil for nothing.
	Net *Network
}

// Dump emits the images of the namespaces that a tree has of its own.
func Dump(d Dumped, emit Emit) error {
	for _, x := range []struct {
		kind Set
		dump func() error
	}{
		{Uts, func() error { return dumpUts(emit) }},
		{Ipc, func() error { return dumpIpc(emit, d.Shm) }},
	} {
		if !d.Own.Has(x.kind) {
			continue
		}
		if err := Do(d.Pid, x.kind, x.dump); err != nil {
			return fmt.Errorf("dump the %s namespace of pid %d: %w", x.kind.Names()[0], d.Pid, err)
		}
	}
	if d.Own.Has(Pid) {
		if err := emit(image.Entry{File: image.PidnsFile(Pid.id()), Magic: image.MagicPidns, Msg: &pidns.PidnsEntry{}}); err != nil {
			return err
		}
	}
	if d.Users != nil {
		if err := d.Users.dump(emit); err != nil {
			return err
		}
	}
	if d.Net != nil {
		if err := d.Net.dump(emit); err != nil {
			return err
		}
	}
	if d.Own.Has(Mnt) {
		if err := d.Mounts.dump(emit); err != nil {
			return fmt.Errorf("dump the mounts of pid %d: %w", d.Pid, err)
		}
	}
	return nil
}
