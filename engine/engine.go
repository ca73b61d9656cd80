// Package engine owns the checkpoint and restore of running process trees:
// preflight, freeze, dump, restore, in pure Go by ptrace and remote system
// calls. It must not know NATS, agents or migrations.
//
// Life of a dump:
//
//	Plan (tree runs, nothing touched) → Freeze → Frozen.Dump → Frozen.Kill or Frozen.Thaw
//
// Life of a restore:
//
//	Check (nothing touched) → Restore (tree stands, stopped) → Staged.Run or Staged.Discard
package engine

import (
	"context"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/engine/freeze"
	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/restore"
)

// Engine makes dumps and restores on this host. Its methods may be called
// from any goroutine; several trees may be worked on at once.
type Engine struct {
	log hclog.Logger
}

// New returns an engine; a nil logger logs nothing. It is only usable on a
// kernel that Probe accepts.
func New(log hclog.Logger) *Engine {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	return &Engine{log: log.Named("engine")}
}

// DumpOptions says how a tree is dumped.
type DumpOptions struct {
	// TCPEstablished carries TCP connections; without it they are refused. Those
	// whose other end is outside the tree need NetworkLock, too.
	TCPEstablished bool
	// TCPClose lets TCP connections come back closed; nothing else of them is
	// carried, and they end when the tree is killed.
	TCPClose bool
	// SkipInFlight leaves TCP connections behind that wait to be accepted; without
	// it they are refused.
	SkipInFlight bool
	// NetworkLock says how TCP connections that lead out of the tree are kept from
	// ending between dump and restore: LockNone refuses them. A tree that runs on
	// needs LockSkip.
	NetworkLock NetworkLock
	// External are keys of files that the destination provides: file[mnt:ino],
	// both hexadecimal; of a tree with such namespaces of its own, mounts that it
	// provides, mnt[MOUNTPOINT]:NAME, and the network namespace, net[INODE]:NAME.
	// A file or mount that is not there is a refusal.
	External []string
	// Carry are files that travel with the tree.
	Carry []Carry
	// Cgroups records the control groups of the tree and what is set in them.
	Cgroups    bool
	CgroupDump CgroupDump
	// EmptyNet leaves out what is in a network namespace of the tree's own.
	EmptyNet bool
	// SkipMounts are mount points that a tree with mounts of its own goes without.
	SkipMounts []string
	// Files says how open files are dumped.
	Files FileOptions
	// Live is what the sink has been given of the running tree already (StartLive).
	Live Live
	// Late, with Live, leaves memory out that can come when the tree runs elsewhere
	// already (post-copy): DumpStats.Late says whose.
	Late bool
	// Early is what the sink has been given of the files that travel (EarlyFiles).
	Early *EarlyCopy
	// Timeout bounds the freezing of all tasks; 0 means 10 s.
	Timeout time.Duration
	// FreezeGroup is the directory of a control group, of version 1 or 2, that all of
	// the tree is in; it is frozen until all tasks are stopped. Empty: they are
	// stopped one by one.
	FreezeGroup string
	// Host names this host in Facts and messages; empty means os.Hostname.
	Host string
	// GhostLimit is the largest allocated size, in bytes, of a deleted file
	// that travels with its data; 0 means 1 GiB.
	GhostLimit uint64
	// FileLocks carries file locks and leases; without it they are refused.
	FileLocks bool
	// Confirm, if set, looks at everything that the frozen tree holds and says what
	// must not travel: it changed since a plan was made.
	Confirm func([]plan.Object) []Problem
	// Elsewhere says that the tree goes to another host: what it uses on this one
	// without holding it is refused.
	Elsewhere bool
	// ShellJob carries a tree on a terminal of which the master is outside; the
	// restore uses another terminal in its place.
	ShellJob bool
	// ExtUnixSk carries datagram unix sockets that are connected to a named one
	// outside the tree; without it they are refused.
	ExtUnixSk bool
	// Ends: the tree is killed after the dump. Only then is data carried that waits
	// in connections of unix sockets not accepted yet: to read it they are
	// accepted, and are lost to the tree if it runs on because the dump failed.
	Ends bool
}

// NetworkLock is a way to lock the network for TCP connections.
type NetworkLock string

// The ways.
const (
	LockNone     NetworkLock = ""
	LockNftables NetworkLock = "nftables" // a table of nftables, from the dump to the restore
	LockSkip     NetworkLock = "skip"     // the caller has locked the network
)

// RestoreOptions says how and where a tree is rebuilt.
type RestoreOptions struct {
	// Root is the directory that becomes the root of a tree with mounts of its own;
	// empty: what it was.
	Root string
	// External are mounts that this host provides, mnt[NAME]:PATH, and names of outer
	// ends of veth pairs, veth[INNER]:OUTER or veth[INNER]:OUTER@BRIDGE.
	External []string
	// Cgroups says how the control groups of the tree are made again.
	Cgroups Cgroups
	// Join are open namespaces in which the tree is made, by kind: ipc, net, uts.
	Join map[string]*os.File
	// EmptyNet makes nothing in a network namespace of the tree's own.
	EmptyNet bool
	// WeakSysctls passes over settings that this kernel does not have.
	WeakSysctls bool
	// Stage is called with the root of a tree with namespaces of its own at StageSetup
	// and StagePostSetup; an error ends the restore. It may be nil.
	Stage func(stage string, pid int) error
	// TCPEstablished makes TCP connections again; without it images with
	// connections are refused.
	TCPEstablished bool
	// TCPClose makes sockets that had a TCP connection again as if it had ended.
	TCPClose bool
	// NetworkLock is LockNftables to end the lock of the dump, if any, when the tree
	// is let go, LockSkip to leave it alone; with LockNone images whose connections
	// lead out of the tree are refused.
	NetworkLock NetworkLock
	// Inherit maps an external key to an open file that backs it.
	Inherit map[string]Inherit
	// Carry is where files that travelled with the tree may be placed; what comes for
	// another place is an error.
	Carry []Place
	// Mark is part of the names under which files wait beside their places (MarkOf):
	// what an agent that died has left can be told by it (RemoveMarked).
	Mark string
	// Note, if set, is told of directories and the like that travel with the tree, before
	// they are made in their places.
	Note func(paths []string) error
	// Files says how files are found again.
	Files FileRestoreOptions
	// Paging serves the memory that comes when the tree runs already; nil: images that
	// want that are refused. It is called once, with what is missing, and returns when that is
	// served; from then on it owns the files.
	Paging func([]Space) error
	// NewPidNamespace lands the tree in a pid namespace (and a mount
	// namespace with its own /proc) of its own.
	NewPidNamespace bool
	// FileLocks sets file locks and leases again; without it images that
	// have some are refused.
	FileLocks bool
	// TimeNamespace says what becomes of the clocks that count from boot.
	TimeNamespace Clocks
	// ShellJob lands a tree whose session leader is outside in this process's
	// session, with Terminal in the place of the terminal that it had.
	ShellJob bool
	Terminal *os.File // the caller's; nil: there is none
	// Lead makes the root, if it did not lead its session, the leader of a new one,
	// whose controlling terminal is Terminal.
	Lead bool
	// Sibling makes the root a child of this process's parent, and not of this process.
	Sibling bool
	// ExtUnixSk connects datagram unix sockets to named ones outside the tree
	// again; without it images with such sockets are refused.
	ExtUnixSk bool
	// Host names this host in messages; empty means os.Hostname.
	Host string
}

// Clocks says what becomes of CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree.
type Clocks = restore.Clocks

// Stages of a restore (RestoreOptions.Stage).
const (
	StageSetup     = restore.StageSetup
	StagePostSetup = restore.StagePostSetup
)

// Choices of Clocks.
const (
	ClocksAuto = restore.ClocksAuto
	ClocksNew  = restore.ClocksNew
	ClocksKeep = restore.ClocksKeep
)

// Cgroups says how control groups are made again.
type Cgroups struct {
	// Mode is one of criu(8)'s modes of --manage-cgroups; empty: tasks stay in the
	// groups of this process.
	Mode string
	// Roots are groups that take the place of the root task's, by hierarchy, such as
	// "memory"; that of "*" is for all others.
	Roots map[string]string
	// Yard is a directory that has each hierarchy mounted in a directory with the
	// names of its controllers; empty: mounts of the engine's own are used.
	Yard string
}

// CgroupDump says what is recorded of control groups.
type CgroupDump struct {
	// Roots are the topmost groups that are recorded, by hierarchy; that of "*" is for
	// all others. Without one it is that of the root task.
	Roots map[string]string
	// Props are specifications of further settings, as criu(8) has them for --cgroup-props.
	Props []string
	// Controllers are the only hierarchies that are recorded; empty: all.
	Controllers []string
	// Yard is as in Cgroups.
	Yard string
}

// Inherit is what the caller hands in for one external key. The file stays the caller's.
type Inherit struct {
	File *os.File
	// Forward gives the process this very open file description in place of
	// a reopened one.
	Forward bool
	// AnyKind: another kind of file may stand for what was there, such as a socket
	// for a pipe. It is forwarded, unless it is /dev/null.
	AnyKind bool
}

// Carry, Content and Place are those of package plan.
type (
	Carry   = plan.Carry
	Content = plan.Content
	Place   = plan.Place
)

// FileOptions, FileRestoreOptions and what belongs to them are those of package plan.
type (
	FileOptions        = plan.FileOptions
	FileRestoreOptions = plan.FileRestoreOptions
	FileValidation     = plan.FileValidation
	FilePolicy         = plan.FilePolicy
	SizeRule           = plan.SizeRule
	ModeRule           = plan.ModeRule
)

// Values of SizeRule and ModeRule.
const (
	SizeDefault  = plan.SizeDefault
	SizeByUse    = plan.SizeByUse
	SizeSame     = plan.SizeSame
	SizeGrown    = plan.SizeGrown
	SizeAny      = plan.SizeAny
	SizeTruncate = plan.SizeTruncate
	ModeDefault  = plan.ModeDefault
	ModeSame     = plan.ModeSame
	ModeAny      = plan.ModeAny
)

// Values of FileValidation.
const (
	ValidateUse     = plan.ValidateUse
	ValidateSize    = plan.ValidateSize
	ValidateBuildID = plan.ValidateBuildID
)

// Plan is what a preflight found out about a tree; see package plan.
type Plan = plan.Plan

// DumpStats says what a dump did.
type DumpStats struct {
	Processes int
	Threads   int
	Pages     uint64 // of 4096 bytes: memory and shared memory
	// ShmemPages are those of Pages that belong to shared memory, memfds included.
	ShmemPages uint64
	Scanned    uint64 // pages looked at in private mappings
	Bytes      uint64 // data, all kinds
	// CarriedBytes are those of Bytes that are content of files which travel with their
	// names (DumpOptions.Carry).
	CarriedBytes uint64
	FreezeDur    time.Duration
	DumpDur      time.Duration
	DataDur      time.Duration // of DumpDur: reading all data and giving it to the sink
	FrozenAt     time.Time     // first task stopped
	// Late are the processes whose memory is to be asked for (NewPages), by their pids in
	// the images; nil: none.
	Late map[uint32]Late
}

// RestoreStats says what a restore did.
type RestoreStats struct {
	Processes int
	Threads   int    // of all processes
	Pages     uint64 // of 4096 bytes, of private mappings
	// ComparedPages are those of Pages that were compared with what a child had of
	// its parent, SharedPages those of them that were equal and not written.
	ComparedPages, SharedPages uint64
	Bytes                      uint64        // data, all kinds
	ForkDur                    time.Duration // making all processes and threads
	RestoreDur                 time.Duration // from the read images to a tree that stands
}

// Tree is a frozen tree (Freeze).
type Tree interface {
	// Dump writes the tree's images and data to the sink. The tree stays frozen
	// and, whatever happens, unchanged; only if it was frozen at a moment when
	// it cannot be carried is it let go and frozen again, before anything is
	// written. It may be called once.
	Dump(ctx context.Context, sink image.Sink) (DumpStats, error)
	// Hold, after Dump, keeps the tree stopped even if this process dies. note gets,
	// before that, what another process needs to take the tree up (NewLeftover).
	Hold(note func([]Held) error) error
	// Thaw lets the tree run on as if nothing had happened.
	Thaw() error
	// ThawStopped is Thaw that leaves every process stopped by SIGSTOP.
	ThawStopped() error
	// Kill ends every task of the tree, without any of them running again.
	Kill() error
	// KillButRoot is Kill that leaves the root, stopped for good and emptied, for
	// whoever waits for it here; nil: it was killed, too.
	KillButRoot() (StandIn, error)
	// Pids are all processes on this host.
	Pids() []int
}

// StandIn is the root of a tree that runs elsewhere.
type StandIn interface {
	Pid() int
	// Lives: nobody has killed it.
	Lives() bool
	// End lets it exit with a status, 0 to 255. It may be called again.
	End(status int) error
}

// Held is a process of a tree that stays stopped without a tracer, and Leftover
// such a tree, of which the tracer has died; see package freeze.
type (
	Held     = freeze.Held
	Leftover = freeze.Leftover
)

// NewLeftover takes up what Hold told of; processes that are no more are left out.
func NewLeftover(held []Held) *Leftover { return freeze.NewLeftover(held) }

// Standing is a rebuilt tree of which no task has run yet (Restore).
type Standing interface {
	// Root is the pid of the root process on this host.
	Root() int
	// Pids are all processes on this host.
	Pids() []int
	// Waiting lists the files that Run places.
	Waiting() ([]Waiting, error)
	// Run lets all tasks go. After it returned nil the tree is its own.
	Run() error
	// RunStopped is Run that leaves every process stopped by SIGSTOP, before
	// its first instruction.
	RunStopped() error
	// Child is the process that is a child of this one and stays a zombie
	// unless it is reaped: the root, or the init of its new pid namespace, which
	// ends after it with status 0.
	Child() int
	// Stats says what the restore did.
	Stats() RestoreStats
	// Discard kills the rebuilt tree; nothing of it has run.
	Discard() error
}
