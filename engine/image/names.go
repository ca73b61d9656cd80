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
	TtyDataFile      = "tty-data"
)

// Extension is what every image file ends in.
const Extension = ".img"

// CoreFile names the registers and states of a thread; the leader's has the pid.
func CoreFile(tid uint32) string { return fmt.Sprintf("core-%d", tid) }

// IDsFile names the ids of what a process shares with others.
func IDsFile(pid uint32) string { return fmt.Sprintf("ids-%d", pid) }

// MMFile names the address space of a process.
func MMFile(pid uint32) string { return fmt.Sprintf("mm-%d", pid) }

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
	MagicTtyData      = "TTY_DATA"
	MagicTCPStream    = "TCP_STREAM"
)

// checkName refuses what is no plain file name: entries may come from a network.
func checkName(name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("image name %q has %d bytes, want 1 to 64", clip(name), len(name))
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
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
