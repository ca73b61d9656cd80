package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/apparmor"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/autofs"
	binfmt_misc "github.com/checkpoint-restore/go-criu/v8/crit/images/binfmt-misc"
	bpfmap_data "github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-data"
	bpfmap_file "github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/cpuinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	criu_sa "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-sa"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventpoll"
	ext_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ext-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fifo"
	file_lock "github.com/checkpoint-restore/go-criu/v8/crit/images/file-lock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	ghost_file "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	ipc_msg "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-msg"
	ipc_sem "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-sem"
	ipc_shm "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-shm"
	ipc_var "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-var"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/netdev"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/ns"
	packet_sock "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pidns"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pipe"
	pipe_data "github.com/checkpoint-restore/go-criu/v8/crit/images/pipe-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	remap_file_path "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/rlimit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/signalfd"
	sk_inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	sk_netlink "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	sk_packet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-packet"
	sk_unix "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/stats"
	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timens"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timer"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tun"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/userns"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/utsns"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"github.com/checkpoint-restore/go-criu/v8/magic"
	"google.golang.org/protobuf/proto"
)

// An image file of CRIU 1.1 format, all numbers 32 bits little endian:
//
//	IMG_COMMON or IMG_SERVICE   (not in inventory.img)
//	magic of the type
//	entries: size of the message, message, extra bytes if the type has any
//
// pages-N.img and images of other tools have none of that.

// types maps each magic name to the message of its entries.
var types = map[string]proto.Message{
	"APPARMOR":       &apparmor.ApparmorEntry{},
	"AUTOFS":         &autofs.AutofsEntry{},
	"BINFMT_MISC":    &binfmt_misc.BinfmtMiscEntry{},
	"BPFMAP_DATA":    &bpfmap_data.BpfmapDataEntry{},
	"BPFMAP_FILE":    &bpfmap_file.BpfmapFileEntry{},
	"CGROUP":         &cgroup.CgroupEntry{},
	"CORE":           &criu_core.CoreEntry{},
	"CPUINFO":        &cpuinfo.CpuinfoEntry{},
	"CREDS":          &creds.CredsEntry{},
	"EVENTFD_FILE":   &eventfd.EventfdFileEntry{},
	"EVENTPOLL_FILE": &eventpoll.EventpollFileEntry{},
	"EVENTPOLL_TFD":  &eventpoll.EventpollTfdEntry{},
	"EXT_FILES":      &ext_file.ExtFileEntry{},
	"FANOTIFY_FILE":  &fsnotify.FanotifyFileEntry{},
	"FANOTIFY_MARK":  &fsnotify.FanotifyMarkEntry{},
	"FDINFO":         &fdinfo.FdinfoEntry{},
	"FIFO":           &fifo.FifoEntry{},
	"FIFO_DATA":      &pipe_data.PipeDataEntry{},
	"FILES":          &fdinfo.FileEntry{},
	"FILE_LOCKS":     &file_lock.FileLockEntry{},
	"FS":             &fs.FsEntry{},
	"GHOST_FILE":     &ghost_file.GhostFileEntry{},
	"IDS":            &criu_core.TaskKobjIdsEntry{},
	"INETSK":         &sk_inet.InetSkEntry{},
	"INOTIFY_FILE":   &fsnotify.InotifyFileEntry{},
	"INOTIFY_WD":     &fsnotify.InotifyWdEntry{},
	"INVENTORY":      &inventory.InventoryEntry{},
	"IPCNS_MSG":      &ipc_msg.IpcMsgEntry{},
	"IPCNS_SEM":      &ipc_sem.IpcSemEntry{},
	"IPCNS_SHM":      &ipc_shm.IpcShmEntry{},
	"IPC_VAR":        &ipc_var.IpcVarEntry{},
	"IRMAP_CACHE":    &fh.IrmapCacheEntry{},
	"ITIMERS":        &timer.ItimerEntry{},
	"MEMFD_INODE":    &memfd.MemfdInodeEntry{},
	"MM":             &mm.MmEntry{},
	"MNTS":           &mnt.MntEntry{},
	"NETDEV":         &netdev.NetDeviceEntry{},
	"NETLINK_SK":     &sk_netlink.NetlinkSkEntry{},
	"NETNS":          &netdev.NetnsEntry{},
	"NS_FILES":       &ns.NsFileEntry{},
	"PACKETSK":       &packet_sock.PacketSockEntry{},
	"PIDNS":          &pidns.PidnsEntry{},
	"PIPES":          &pipe.PipeEntry{},
	"PIPES_DATA":     &pipe_data.PipeDataEntry{},
	"POSIX_TIMERS":   &timer.PosixTimerEntry{},
	"PSTREE":         &pstree.PstreeEntry{},
	"REG_FILES":      &regfile.RegFileEntry{},
	"REMAP_FPATH":    &remap_file_path.RemapFilePathEntry{},
	"RLIMIT":         &rlimit.RlimitEntry{},
	"SECCOMP":        &seccomp.SeccompEntry{},
	"SIGACT":         &criu_sa.SaEntry{},
	"SIGNALFD":       &signalfd.SignalfdEntry{},
	"SK_QUEUES":      &sk_packet.SkPacketEntry{},
	"STATS":          &stats.StatsEntry{},
	"TCP_STREAM":     &tcp_stream.TcpStreamEntry{},
	"TIMENS":         &timens.TimensEntry{},
	"TIMERFD":        &timerfd.TimerfdEntry{},
	"TTY_DATA":       &tty.TtyDataEntry{},
	"TTY_FILES":      &tty.TtyFileEntry{},
	"TTY_INFO":       &tty.TtyInfoEntry{},
	"TUNFILE":        &tun.TunfileEntry{},
	"UNIXSK":         &sk_unix.UnixSkEntry{},
	"USERNS":         &userns.UsernsEntry{},
	"UTSNS":          &utsns.UtsnsEntry{},
	"VMAS":           &vma.VmaEntry{},
}

var magics = sync.OnceValue(magic.LoadMagic)

// NewMessage returns an empty message of the entries of an image type.
func NewMessage(magic string) (proto.Message, error) {
	m, ok := types[magic]
	if !ok {
		return nil, fmt.Errorf("no message is known for image type %q", clip(magic))
	}
	return m.ProtoReflect().New().Interface(), nil
}

// extraLen is how many bytes follow an entry outside protobuf. ok is false for
// types of which all that follows the first message is one raw piece.
func extraLen(magic string, m proto.Message) (n uint64, ok bool) {
	switch m := m.(type) {
	case *pipe_data.PipeDataEntry:
		return uint64(m.GetBytes()), true
	case *sk_packet.SkPacketEntry:
		return uint64(m.GetLength()), true
	case *tcp_stream.TcpStreamEntry:
		return uint64(m.GetInqLen()) + uint64(m.GetOutqLen()), true
	case *bpfmap_data.BpfmapDataEntry:
		return uint64(m.GetKeysBytes()) + uint64(m.GetValuesBytes()), true
	}
	switch m := m.(type) {
	case *ipc_sem.IpcSemEntry:
		return (uint64(m.GetNsems())*2 + 7) &^ 7, true
	case *ipc_shm.IpcShmEntry:
		if m.GetInPagemaps() {
			return 0, true
		}
		return (m.GetSize() + 3) &^ 3, true
	}
	return 0, magic != MagicIPCMsg // messages with heads of their own
}

// Check tells whether e can stand in an image file: a plain name, a known type,
// the message of that type with all its required fields, and as many extra
// bytes as it says. Lists of pages are no entries: they are made from data.
func (e Entry) Check() error {
	if err := checkName(e.File); err != nil {
		return err
	}
	fail := func(format string, a ...any) error {
		return fmt.Errorf("image %s: %w", e.File, fmt.Errorf(format, a...))
	}
	if e.Magic == MagicRaw {
		switch {
		case e.Msg != nil || !isRaw(e.File):
			return fail("it cannot be of another program's form")
		case len(e.Extra) > MaxMessage:
			return fail("%d bytes, at most %d are carried", len(e.Extra), MaxMessage)
		}
		return nil
	}
	want, ok := types[e.Magic]
	if !ok {
		return fail("no message is known for type %q", clip(e.Magic))
	}
	if e.Msg == nil {
		return fail("entry without a message")
	}
	if w, got := want.ProtoReflect().Descriptor().FullName(), e.Msg.ProtoReflect().Descriptor().FullName(); w != got {
		return fail("type %s holds %s, not %s", e.Magic, w, got)
	}
	if err := proto.CheckInitialized(e.Msg); err != nil {
		return fail("%w", err)
	}
	if n, ok := extraLen(e.Magic, e.Msg); ok && uint64(len(e.Extra)) != n {
		return fail("%d extra bytes, its message says %d", len(e.Extra), n)
	}
	return nil
}

// AppendHead appends what the file of an image type starts with.
func AppendHead(b []byte, magic string) ([]byte, error) {
	if magic == MagicRaw {
		return b, nil
	}
	v, ok := magics().ByName[magic]
	if !ok || v > math.MaxUint32 {
		return nil, fmt.Errorf("image type %q has no magic", clip(magic))
	}
	switch magic {
	case MagicInventory:
	case "STATS", "IRMAP_CACHE":
		b = binary.LittleEndian.AppendUint32(b, uint32(magics().ByName["IMG_SERVICE"]))
	default:
		b = binary.LittleEndian.AppendUint32(b, uint32(magics().ByName["IMG_COMMON"]))
	}
	return binary.LittleEndian.AppendUint32(b, uint32(v)), nil
}

// MaxMessage bounds one message of an image, in bytes: an address space of a
// million mappings takes about this much.
const MaxMessage = 64 << 20

var errTooLarge = errors.New("message is larger than an image can hold")

// AppendMessage appends the size of m and m.
func AppendMessage(b []byte, m proto.Message) ([]byte, error) {
	at := len(b)
	b = append(b, 0, 0, 0, 0)
	// Deterministic: the same tree gives the same bytes.
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	n := len(b) - at - 4
	if n > MaxMessage {
		return nil, fmt.Errorf("encode %s of %d bytes: %w", m.ProtoReflect().Descriptor().FullName(), n, errTooLarge)
	}
	binary.LittleEndian.PutUint32(b[at:], uint32(n))
	return b, nil
}

// AppendEntry appends one entry with its extra bytes.
func AppendEntry(b []byte, e Entry) ([]byte, error) {
	if e.Magic == MagicRaw {
		return append(b, e.Extra...), nil
	}
	b, err := AppendMessage(b, e.Msg)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", e.File, err)
	}
	return append(b, e.Extra...), nil
}
