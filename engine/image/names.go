package image

import (
	"fmt"
	"strconv"
	"strings"
)

// Names of image files without ".img", as CRIU 4.2 has them. Files of one
// process carry its pid in the images' pid namespace.
const (
	InventoryFile    = "inventory"
	PstreeFile       = "pstree"
	FilesFile        = "files"
	PipesDataFile    = "pipes-data"
	FifoDataFile     = "fifo-data"
	SkQueuesFile     = "sk-queues"
	MemfdFile        = "memfd"
	RemapFpathFile   = "remap-fpath"
	EventpollTfdFile = "eventpoll-tfd"
	InotifyWdFile    = "inotify-wd"
	FanotifyMarkFile = "fanotify-mark"
	FileLocksFile    = "file-locks"
	SeccompFile      = "seccomp"
	CgroupFile       = "cgroup"
	TtyInfoFile      = "tty-info"
	BpfmapDataFile   = "bpfmap-data"
	TtyDataFile      = "tty-data"
)

// Names of the images of namespaces, each by the id that it has in IDs.

// UtsnsFile names host and domain name of a UTS namespace.
func UtsnsFile(id uint32) string { return fmt.Sprintf("utsns-%d", id) }

// IpcVarFile names the settings of an IPC namespace, IpcSemFile and so on its objects.
func IpcVarFile(id uint32) string { return fmt.Sprintf("ipcns-var-%d", id) }

func IpcSemFile(id uint32) string { return fmt.Sprintf("ipcns-sem-%d", id) }

func IpcMsgFile(id uint32) string { return fmt.Sprintf("ipcns-msg-%d", id) }

func IpcShmFile(id uint32) string { return fmt.Sprintf("ipcns-shm-%d", id) }

// MountpointsFile names the mounts of a mount namespace.
func MountpointsFile(id uint32) string { return fmt.Sprintf("mountpoints-%d", id) }

// PidnsFile names a pid namespace.
func PidnsFile(id uint32) string { return fmt.Sprintf("pidns-%d", id) }

// NetnsFile names the settings of a network namespace, NetdevFile its devices.
func NetnsFile(id uint32) string { return fmt.Sprintf("netns-%d", id) }

func NetdevFile(id uint32) string { return fmt.Sprintf("netdev-%d", id) }

// IfaddrFile, RouteFile, Route6File and RuleFile name what "ip addr save" and
// the like write of a network namespace.
func IfaddrFile(id uint32) string { return fmt.Sprintf("ifaddr-%d", id) }

func RouteFile(id uint32) string { return fmt.Sprintf("route-%d", id) }

func Route6File(id uint32) string { return fmt.Sprintf("route6-%d", id) }

func RuleFile(id uint32) string { return fmt.Sprintf("rule-%d", id) }

// TmpfsFile names the content of a tmpfs, a compressed tar archive, by the
// number of its device.
func TmpfsFile(dev uint32) string { return fmt.Sprintf("tmpfs-dev-%d.tar.gz", dev) }

// UsernsFile names the maps of a user namespace.
func UsernsFile(id uint32) string { return fmt.Sprintf("userns-%d", id) }

// Extension is what every image file ends in.
const Extension = ".img"

// CoreFile names the registers and states of a thread; the leader's has the pid.
func CoreFile(tid uint32) string { return fmt.Sprintf("core-%d", tid) }

// IDsFile names the ids of what a process shares with others.
func IDsFile(pid uint32) string { return fmt.Sprintf("ids-%d", pid) }

// MMFile names the address space of a process.
func MMFile(pid uint32) string { return fmt.Sprintf("mm-%d", pid) }

// TimensFile names the clocks of a tree by the id of its time namespace.
func TimensFile(id uint32) string { return fmt.Sprintf("timens-%d", id) }

// FSFile names root, cwd and umask of a process.
func FSFile(pid uint32) string { return fmt.Sprintf("fs-%d", pid) }

// FdinfoFile names a table of descriptors by its files_id of IDs.
func FdinfoFile(filesID uint32) string { return fmt.Sprintf("fdinfo-%d", filesID) }

// PagemapFile names the list of the pages of a process.
func PagemapFile(pid uint32) string { return fmt.Sprintf("pagemap-%d", pid) }

// PagemapShmemFile names the list of the pages of a shared object.
func PagemapShmemFile(shmid uint32) string { return fmt.Sprintf("pagemap-shmem-%d", shmid) }

// PagesFile names the pages themselves by the id in the head of their list.
func PagesFile(pagesID uint32) string { return fmt.Sprintf("pages-%d", pagesID) }

// GhostFile names a deleted file; CRIU writes this id in hexadecimal.
func GhostFile(id uint32) string { return fmt.Sprintf("ghost-file-%x", id) }

// Magics are the names of image types in go-criu's magic table, for Entry.Magic.
const (
	MagicInventory    = "INVENTORY"
	MagicPstree       = "PSTREE"
	MagicCore         = "CORE"
	MagicIDs          = "IDS"
	MagicMM           = "MM"
	MagicFS           = "FS"
	MagicFdinfo       = "FDINFO"
	MagicFiles        = "FILES"
	MagicPipesData    = "PIPES_DATA"
	MagicFifoData     = "FIFO_DATA"
	MagicSkQueues     = "SK_QUEUES"
	MagicMemfdInode   = "MEMFD_INODE"
	MagicRemapFpath   = "REMAP_FPATH"
	MagicGhostFile    = "GHOST_FILE"
	MagicEventpollTfd = "EVENTPOLL_TFD"
	MagicInotifyWd    = "INOTIFY_WD"
	MagicFanotifyMark = "FANOTIFY_MARK"
	MagicFileLocks    = "FILE_LOCKS"
	MagicSeccomp      = "SECCOMP"
	MagicCgroup       = "CGROUP"
	MagicPagemap      = "PAGEMAP"
	MagicTtyInfo      = "TTY_INFO"
	MagicBpfmapData   = "BPFMAP_DATA"
	MagicTtyData      = "TTY_DATA"
	MagicTCPStream    = "TCP_STREAM"
	MagicTimens       = "TIMENS"
	MagicUtsns        = "UTSNS"
	MagicIPCVar       = "IPC_VAR"
	MagicIPCSem       = "IPCNS_SEM"
	MagicIPCMsg       = "IPCNS_MSG"
	MagicIPCShm       = "IPCNS_SHM"
	MagicMnts         = "MNTS"
	MagicPidns        = "PIDNS"
	MagicNetns        = "NETNS"
	MagicNetdev       = "NETDEV"
	MagicUserns       = "USERNS"

	// MagicRaw is no magic: what is in the file has another program's form.
	MagicRaw = ""
)

// isRaw tells whether an image is in another program's form.
func isRaw(name string) bool {
	for _, p := range rawPrefixes {
		if strings.HasPrefix(name, p) {
			return !strings.HasPrefix(name, "pages-")
		}
	}
	return false
}

// checkName refuses what is no plain file name: entries may come from a network.
func checkName(name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("image name %q has %d bytes, want 1 to 64", clip(name), len(name))
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.' && i > 0:
		default:
			return fmt.Errorf("image name %q has a byte that no image name has", clip(name))
		}
	}
	return nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// dataFile is the file (a list of pages or a ghost file) that leads to a data set.
func dataFile(id DataID) string {
	switch id.Kind {
	case Memory:
		return PagemapFile(id.ID)
	case Shmem:
		return PagemapShmemFile(id.ID)
	case Ghost:
		return GhostFile(id.ID)
	}
	return ""
}

// dataOf is the reverse of dataFile. ok is false for names of other files; a
// name that only looks like one is an error.
func dataOf(name string) (id DataID, ok bool, err error) {
	base := 10
	var num string
	switch {
	case strings.HasPrefix(name, "pagemap-shmem-"):
		id.Kind, num = Shmem, name[len("pagemap-shmem-"):]
	case strings.HasPrefix(name, "pagemap-"):
		id.Kind, num = Memory, name[len("pagemap-"):]
	case strings.HasPrefix(name, "ghost-file-"):
		id.Kind, num, base = Ghost, name[len("ghost-file-"):], 16
	default:
		return DataID{}, false, nil
	}
	n, err := strconv.ParseUint(num, base, 32)
	id.ID = uint32(n)
	// One set must not be there twice, as pagemap-1 and pagemap-01.
	if err != nil || dataFile(id) != name {
		return DataID{}, false, fmt.Errorf("image %s%s: %q is no id", name, Extension, clip(num))
	}
	return id, true, nil
}
