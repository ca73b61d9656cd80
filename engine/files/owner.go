package files

import (
	"encoding/binary"
	"fmt"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// dumpOwner reads who gets the signals of a description (F_SETOWN, F_SETSIG).
// The pid is translated into the innermost pid namespace of its bearer.
func (d *Dumper) dumpOwner(o *object) (*fown.FownEntry, error) {
	if o.isPath() || o.first().fd < 0 && !o.inFlight {
		return noOwner(), nil // no owner is possible, or nobody's description
	}
	fd := int(o.file.Fd())
	sig, err := sys.GetFileSignal(fd)
	if err != nil {
		return nil, err
	}
	ow, err := sys.GetFileOwner(fd)
	if err != nil {
		return nil, err
	}
	if ow.Pid == 0 && sig == 0 {
		return noOwner(), nil
	}
	e := &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(uint32(sig)), PidType: proto.Uint32(0), Pid: proto.Uint32(0)}
	if ow.Pid == 0 {
		return e, nil
	}
	if o.inFlight {
		// It is set by a process that has the description.
		d.passes(o, "it is in flight in a unix socket and sends signals", "retry when the program has received it")
		return e, nil
	}
	pid, state := d.innerPid(ow)
	switch state {
	case ownerGone: // the kernel would signal nobody
		return e, nil
	case ownerOutside:
		d.refuse(o, fmt.Sprintf("its signals go to process or group %d, outside the tree", ow.Pid),
			"end or include that process, or let the program clear the owner (F_SETOWN 0)")
		return e, nil
	}
	e.PidType = proto.Uint32(uint32(ow.Type))
	e.Pid = proto.Uint32(uint32(pid))
	// Without CONFIG_CHECKPOINT_RESTORE the ids cannot be read; they then stay
	// those of root, which sets the owner in the restored process.
	if uid, euid, err := sys.GetFileOwnerUIDs(fd); err == nil {
		e.Uid, e.Euid = proto.Uint32(uid), proto.Uint32(euid)
	}
	return e, nil
}

type ownerState int

const (
	ownerInside ownerState = iota
	ownerOutside
	ownerGone
)

// innerPid translates a pid as this process sees it into the one that its
// bearer sees in its own pid namespace.
func (d *Dumper) innerPid(ow sys.FileOwner) (int, ownerState) {
	if ow.Type != sys.OwnerPGRP {
		st, err := procfs.ReadStatus(int(ow.Pid))
		if err != nil || len(st.NSpid) == 0 {
			return 0, ownerGone
		}
		if !d.inside[st.Tgid] {
			return 0, ownerOutside
		}
		return st.NSPid(), ownerInside
	}
	// The leader of a process group may have ended: ask the members.
	for pid := range d.inside {
		st, err := procfs.ReadStatus(pid)
		if err != nil {
			continue
		}
		if n := len(st.NSpgid); n > 0 && st.NSpgid[0] == int(ow.Pid) {
			return st.NSpgid[n-1], ownerInside
		}
	}
	return 0, ownerOutside
}

// noOwner is that of most files. It must not be changed.
func noOwner() *fown.FownEntry { return nobody }

var nobody = &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)}

func checkOwner(e *fown.FownEntry) error {
	if e == nil {
		return fmt.Errorf("owner of signals is missing")
	}
	if e.GetPidType() > sys.OwnerPGRP {
		return fmt.Errorf("owner of signals is of unknown type %d", e.GetPidType())
	}
	if e.GetSignum() > 64 {
		return fmt.Errorf("signal %d of its owner does not exist", e.GetSignum())
	}
	return nil
}

// ownerCalls makes the calls that give the description behind fd its owner,
// signal and O_ASYNC. They must run in the process: the pid counts in its pid
// namespace, and the kernel remembers the descriptor number for siginfo.
func ownerCalls(fd int, e *fown.FownEntry, flags uint32) []*ptrace.Call {
	var out []*ptrace.Call
	if sig := e.GetSignum(); sig != 0 {
		out = append(out, ptrace.NewCall(fmt.Sprintf("fcntl F_SETSIG %d of fd %d", sig, fd), unix.SYS_FCNTL,
			ptrace.Int(fd), ptrace.Int(sys.FSetSig), ptrace.Int(sig)))
	}
	if e.GetPid() != 0 {
		var b [8]byte
		binary.NativeEndian.PutUint32(b[:], e.GetPidType())
		binary.NativeEndian.PutUint32(b[4:], e.GetPid())
		out = append(out, ptrace.NewCall(fmt.Sprintf("fcntl F_SETOWN_EX %d of fd %d", e.GetPid(), fd), unix.SYS_FCNTL,
			ptrace.Int(fd), ptrace.Int(sys.FSetOwnEx), ptrace.Bytes(b[:])))
	}
	if flags&unix.O_ASYNC != 0 {
		out = append(out, ptrace.NewCall(fmt.Sprintf("fcntl F_SETFL O_ASYNC of fd %d", fd), unix.SYS_FCNTL,
			ptrace.Int(fd), ptrace.Int(unix.F_SETFL), ptrace.Int(flags&settable)))
	}
	return out
}
