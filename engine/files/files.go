// Package files owns the open files of process trees: what descriptors,
// mappings, working directories and roots refer to. It turns them into entries
// of CRIU images (files.img, fdinfo-N.img, pipes-data.img, …) and makes them
// again. Sockets are files here. It must not know tracing beyond building
// system calls for others to run, nor memory, nor networks between hosts.
//
// A dump looks at each open file description once, however many descriptors of
// however many processes lead to it (kcmp(2) tells), through a duplicate made by
// pidfd_getfd(2); nothing of the tree changes. A restore makes each description
// in the calling process, for the restore core to push it to every process that
// had it; what only works inside a process comes as ptrace.Calls.
//
// Each kind of file has a file of its own in this package, with its dump, its
// restore and its checks side by side, and one line in the table of kinds.
package files

import (
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"

	"godwit/engine/image"
)

// Image files and their magics, as CRIU 4.2 names them.
const (
	filesImage    = image.FilesFile
	filesMagic    = image.MagicFiles
	fdinfoMagic   = image.MagicFdinfo
	pipesImage    = image.PipesDataFile
	pipesMagic    = image.MagicPipesData
	fifosImage    = image.FifoDataFile
	fifosMagic    = image.MagicFifoData
	memfdImage    = image.MemfdFile
	memfdMagic    = image.MagicMemfdInode
	remapImage    = image.RemapFpathFile
	remapMagic    = image.MagicRemapFpath
	ghostMagic    = image.MagicGhostFile
	skQueuesImage = image.SkQueuesFile
	skQueuesMagic = image.MagicSkQueues
)

func fdinfoImage(filesID uint32) string { return image.FdinfoFile(filesID) }

func ghostImage(id uint32) string { return image.GhostFile(id) }

// kind is one sort of open file.
type kind struct {
	name string
	note string // for Support, may be empty
	typ  fdinfo.FdTypes

	// takes says whether a description that a dump met is of this kind. The
	// first kind of the table that takes it has it.
	takes func(d *Dumper, o *object) bool
	// dump looks at one description and sets its entry, or refuses it. It runs
	// once all processes are known.
	dump func(d *Dumper, o *object) error
	// finish, if set, does what needs all descriptions of the kind together.
	finish func(d *Dumper, os []*object) error

	// has says whether an entry of type typ is of this kind; nil means yes.
	has func(r *Restorer, x *description) bool
	// check, if set, validates one entry of an image, which is untrusted.
	check func(r *Restorer, x *description) error
	// open makes all descriptions of the kind.
	open func(r *Restorer, xs []*description) []error
	// seal, if set, does what must wait until all data is in place.
	seal func(r *Restorer, xs []*description) []error
	// last, if set, does what must wait until processes have all their files.
	last func(r *Restorer, xs []*description) []error
}

// kinds is the table of everything that can be carried, most particular first.
// It is filled by init because the functions refer to it in turn.
var kinds []*kind

func init() {
	kinds = []*kind{
		kindEventfd, kindTimerfd, kindSignalfd, kindEventpoll, kindPidfd, kindBPF,
		kindMemfd, kindMqueue,
		kindPipe, kindFifo,
		kindTun, // sockets may be bound to its addresses
		kindUnix, kindInet, kindNetlink, kindPacket,
		kindCarried, kindGhost, kindTTY, kindDevice, kindRegular,
		kindNamespace, kindInotify, kindFanotify,
	}
}
