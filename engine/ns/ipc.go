package ns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	ipc_desc "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-desc"
	ipc_msg "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-msg"
	ipc_sem "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-sem"
	ipc_shm "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-shm"
	ipc_var "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-var"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// ipcVars are the settings of an IPC namespace below /proc/sys that IpcVarEntry
// has a number for.
func ipcVars(e *ipc_var.IpcVarEntry) []struct {
	path string
	u32  **uint32
	u64  **uint64
} {
	return []struct {
		path string
		u32  **uint32
		u64  **uint64
	}{
		{"kernel/msgmax", &e.MsgCtlmax, nil},
		{"kernel/msgmnb", &e.MsgCtlmnb, nil},
		{"kernel/msgmni", &e.MsgCtlmni, nil},
		{"kernel/auto_msgmni", &e.AutoMsgmni, nil},
		{"kernel/shmmax", nil, &e.ShmCtlmax},
		{"kernel/shmall", nil, &e.ShmCtlall},
		{"kernel/shmmni", &e.ShmCtlmni, nil},
		{"kernel/shm_rmid_forced", &e.ShmRmidForced, nil},
		{"fs/mqueue/queues_max", &e.MqQueuesMax, nil},
		{"fs/mqueue/msg_max", &e.MqMsgMax, nil},
		{"fs/mqueue/msgsize_max", &e.MqMsgsizeMax, nil},
		{"fs/mqueue/msg_default", &e.MqMsgDefault, nil},
		{"fs/mqueue/msgsize_default", &e.MqMsgsizeDefault, nil},
	}
}

const semVar = "/proc/sys/kernel/sem"

// dumpIpc emits what the thread's IPC namespace holds. Segments of shared memory
// are the caller's, who needs their contents.
func dumpIpc(emit Emit, shm []image.SysVFacts) error {
	e := &ipc_var.IpcVarEntry{}
	b, err := os.ReadFile(semVar)
	if err != nil {
		return err
	}
	for _, f := range strings.Fields(string(b)) {
		n, err := strconv.ParseUint(f, 10, 32)
		if err != nil {
			return fmt.Errorf("read %s: %w", semVar, err)
		}
		e.SemCtls = append(e.SemCtls, uint32(n))
	}
	for _, v := range ipcVars(e) {
		b, err := os.ReadFile("/proc/sys/" + v.path)
		if errors.Is(err, os.ErrNotExist) {
			b, err = []byte("0"), nil
		}
		if err != nil {
			return err
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return fmt.Errorf("read /proc/sys/%s: %w", v.path, err)
		}
		if v.u64 != nil {
			*v.u64 = &n
		} else {
			*v.u32 = proto.Uint32(uint32(min(n, math.MaxUint32)))
		}
	}
	if err := emit(image.Entry{File: image.IpcVarFile(Ipc.id()), Magic: image.MagicIPCVar, Msg: e}); err != nil {
		return err
	}
	for i := range shm {
		s := &shm[i]
		e := &ipc_shm.IpcShmEntry{
			Desc: desc(s.ID, s.Key, s.UID, s.GID, s.CUID, s.CGID, s.Mode&0o777), Size: proto.Uint64(s.Size), InPagemaps: proto.Bool(true),
		}
		if s.Huge != 0 {
			e.HugetlbFlag = proto.Uint32(s.Huge)
		}
		err := emit(image.Entry{File: image.IpcShmFile(Ipc.id()), Magic: image.MagicIPCShm, Msg: e})
		if err != nil {
			return err
		}
	}
	return errors.Join(dumpSem(emit), dumpMsg(emit))
}

func desc(id uint32, key int32, uid, gid, cuid, cgid, mode uint32) *ipc_desc.IpcDescEntry {
	return &ipc_desc.IpcDescEntry{Key: proto.Uint32(uint32(key)), Uid: &uid, Gid: &gid, Cuid: &cuid, Cgid: &cgid, Mode: &mode, Id: &id}
}

func descOf(o procfs.SysVObject) *ipc_desc.IpcDescEntry {
	return desc(uint32(o.ID), o.Key, o.UID, o.GID, o.CUID, o.CGID, o.Mode&0o777)
}

func dumpSem(emit Emit) error {
	sets, err := procfs.SysV("sem")
	if err != nil {
		return err
	}
	for _, o := range sets {
		values, err := sys.SemValues(o.ID, int(o.Size))
		if err != nil {
			return fmt.Errorf("read System V semaphores %d: %w", o.ID, err)
		}
		extra := make([]byte, 0, (len(values)*2+7)&^7)
		for _, v := range values {
			extra = binary.LittleEndian.AppendUint16(extra, v)
		}
		err = emit(image.Entry{File: image.IpcSemFile(Ipc.id()), Magic: image.MagicIPCSem,
			Msg: &ipc_sem.IpcSemEntry{Desc: descOf(o), Nsems: proto.Uint32(uint32(len(values)))}, Extra: extra[:cap(extra)]})
		if err != nil {
			return err
		}
	}
	return nil
}

// dumpMsg emits queues with their messages, each with a head of its own.
func dumpMsg(emit Emit) error {
	queues, err := procfs.SysV("msg")
	if err != nil {
		return err
	}
	var all []byte
	for _, o := range queues {
		var ms []byte
		n := 0
		for ; ; n++ {
			m, err := sys.MsgPeek(o.ID, n, int(o.Size))
			if errors.Is(err, unix.ENOMSG) {
				break
			}
			if err != nil {
				return fmt.Errorf("read System V message queue %d: %w", o.ID, err)
			}
			if ms, err = image.AppendMessage(ms, &ipc_msg.IpcMsg{Mtype: proto.Uint64(uint64(m.Type)), Msize: proto.Uint32(uint32(len(m.Data)))}); err != nil {
				return err
			}
			ms = append(ms, m.Data...)
			ms = append(ms, make([]byte, -len(m.Data)&7)...)
		}
		qbytes, err := sys.MsgQbytes(o.ID)
		if err != nil {
			return err
		}
		e := &ipc_msg.IpcMsgEntry{Desc: descOf(o), Qbytes: proto.Uint32(uint32(qbytes)), Qnum: proto.Uint32(uint32(n))}
		if all, err = image.AppendMessage(all, e); err != nil {
			return err
		}
		all = append(all, ms...)
	}
	if len(queues) == 0 {
		return nil
	}
	// The first entry is read as one, what follows it as its extra bytes.
	first, rest, err := firstMsg(all)
	if err != nil {
		return err
	}
	return emit(image.Entry{File: image.IpcMsgFile(Ipc.id()), Magic: image.MagicIPCMsg, Msg: first, Extra: rest})
}

func firstMsg(b []byte) (*ipc_msg.IpcMsgEntry, []byte, error) {
	e := &ipc_msg.IpcMsgEntry{}
	rest, err := cut(b, e)
	return e, rest, err
}

// cut takes a message with its size off b.
func cut(b []byte, m proto.Message) ([]byte, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("%d bytes where a message should be", len(b))
	}
	n := binary.LittleEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, fmt.Errorf("a message of %d bytes, %d are left", n, len(b)-4)
	}
	return b[4+n:], proto.Unmarshal(b[4:4+n], m)
}

// PosixQueues names the POSIX message queues of the thread's IPC namespace, as its
// file system lists them.
func PosixQueues() ([]string, error) {
	fs, err := unix.Fsopen("mqueue", 1) // FSOPEN_CLOEXEC
	if errors.Is(err, unix.ENODEV) {
		return nil, nil // this kernel has none
	}
	if err != nil {
		return nil, os.NewSyscallError("fsopen mqueue", err)
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, os.NewSyscallError("fsconfig create", err)
	}
	root, err := unix.Fsmount(fs, 1, 0) // FSMOUNT_CLOEXEC
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	defer func() { _ = unix.Close(root) }()
	des, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", root))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, de := range des {
		names = append(names, "/"+de.Name())
	}
	return names, nil
}

// queue is a message queue of an image.
type queue struct {
	entry    *ipc_msg.IpcMsgEntry
	messages []sys.Message
}

// parseQueues parses what follows the first entry of an image of queues.
func parseQueues(e *ipc_msg.IpcMsgEntry, b []byte) (out []queue, err error) {
	for {
		q := queue{entry: e}
		if n := e.GetQnum(); uint64(n) > uint64(len(b))/8 {
			return nil, fmt.Errorf("message queue %d of %d messages in %d bytes", e.GetDesc().GetId(), n, len(b))
		}
		for range e.GetQnum() {
			m := &ipc_msg.IpcMsg{}
			if b, err = cut(b, m); err != nil {
				return nil, fmt.Errorf("message queue %d: %w", e.GetDesc().GetId(), err)
			}
			size := (uint64(m.GetMsize()) + 7) &^ 7
			if size > uint64(len(b)) || m.GetMtype() == 0 || m.GetMtype() > math.MaxInt64 {
				return nil, fmt.Errorf("message queue %d: an impossible message of type %d, %d bytes", e.GetDesc().GetId(), m.GetMtype(), m.GetMsize())
			}
			q.messages = append(q.messages, sys.Message{Type: int64(m.GetMtype()), Data: b[:m.GetMsize()]})
			b = b[size:]
		}
		out = append(out, q)
		if len(b) == 0 {
			return out, nil
		}
		if e, b, err = firstMsg(b); err != nil {
			return nil, err
		}
	}
}

// restoreIpc fills the thread's IPC namespace, which is new, but for shared memory.
func restoreIpc(set *image.Set, id uint32) error {
	if err := restoreIpcVars(set, id); err != nil {
		return err
	}
	for _, x := range set.Entries(image.IpcSemFile(id)) {
		e, ok := x.Msg.(*ipc_sem.IpcSemEntry)
		if !ok || uint64(len(x.Extra)) < 2*uint64(e.GetNsems()) {
			return fmt.Errorf("image %s: an impossible entry", x.File)
		}
		values := make([]uint16, e.GetNsems())
		for i := range values {
			values[i] = binary.LittleEndian.Uint16(x.Extra[2*i:])
		}
		if err := sys.SemCreate(int(e.GetDesc().GetId()), perm(e.GetDesc()), values); err != nil {
			return fmt.Errorf("make System V semaphores %d: %w", e.GetDesc().GetId(), err)
		}
	}
	for _, x := range set.Entries(image.IpcMsgFile(id)) {
		e, ok := x.Msg.(*ipc_msg.IpcMsgEntry)
		if !ok {
			return fmt.Errorf("image %s: an impossible entry", x.File)
		}
		qs, err := parseQueues(e, x.Extra)
		if err != nil {
			return fmt.Errorf("image %s: %w", x.File, err)
		}
		for _, q := range qs {
			d := q.entry.GetDesc()
			if err := sys.MsgCreate(int(d.GetId()), perm(d), uint64(q.entry.GetQbytes()), q.messages); err != nil {
				return fmt.Errorf("make System V message queue %d: %w", d.GetId(), err)
			}
		}
	}
	return nil
}

func perm(d *ipc_desc.IpcDescEntry) sys.IpcPerm {
	return sys.IpcPerm{Key: int32(d.GetKey()), UID: d.GetUid(), GID: d.GetGid(), CUID: d.GetCuid(), CGID: d.GetCgid(), Mode: d.GetMode() & 0o777}
}

func restoreIpcVars(set *image.Set, id uint32) error {
	e, err := image.One[*ipc_var.IpcVarEntry](set, image.IpcVarFile(id))
	if err != nil {
		return err
	}
	write := func(path, text string) error {
		if old, err := os.ReadFile(path); err == nil && strings.Join(strings.Fields(string(old)), " ") == text {
			return nil
		}
		return os.WriteFile(path, []byte(text), 0)
	}
	if len(e.GetSemCtls()) == 4 {
		s := e.GetSemCtls()
		if err := write(semVar, fmt.Sprintf("%d %d %d %d", s[0], s[1], s[2], s[3])); err != nil {
			return err
		}
	}
	for _, v := range ipcVars(e) {
		text := ""
		switch {
		case v.u64 != nil && *v.u64 != nil:
			text = strconv.FormatUint(**v.u64, 10)
		case v.u32 != nil && *v.u32 != nil:
			text = strconv.FormatUint(uint64(**v.u32), 10)
		default:
			continue
		}
		if err := write("/proc/sys/"+v.path, text); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Segments gives the segments of shared memory in an image of CRIU, whose contents
// are in lists of pages.
func (im Images) Segments(set *image.Set) (out []image.SysVFacts, err error) {
	for _, x := range set.Entries(image.IpcShmFile(im.ids[Ipc])) {
		e, ok := x.Msg.(*ipc_shm.IpcShmEntry)
		if !ok || !e.GetInPagemaps() {
			return nil, fmt.Errorf("image %s: segment %d is not in lists of pages", x.File, e.GetDesc().GetId())
		}
		d := e.GetDesc()
		out = append(out, image.SysVFacts{ID: d.GetId(), Key: int32(d.GetKey()), Size: e.GetSize(), Mode: d.GetMode() & 0o777,
			UID: d.GetUid(), GID: d.GetGid(), CUID: d.GetCuid(), CGID: d.GetCgid(), Huge: e.GetHugetlbFlag()})
	}
	return out, nil
}
