// Package plan owns what a preflight finds out about a tree: what it holds and
// what a destination must have for it. It must not know how it is found out.
package plan

// Plan is what a preflight found; the destination checks Requirements.
type Plan struct {
	Pid         int // root on this host
	Tasks       []Task
	MemoryBytes uint64 // resident private and shared memory, estimate of what travels
	// EarlyBytes are those of MemoryBytes that can travel while the tree runs; NotEarly says
	// why none can, empty if they can.
	EarlyBytes uint64
	NotEarly   string
	Files      []File
	External   []External
	Objects    []Object // everything that is open, mapped or stood on
	Ports      []Port
	XFeatures  uint64   // XCR0 of this CPU
	CPUFlags   []string // of /proc/cpuinfo
	VdsoSHA256 string
	Kernel     string
	Arch       string
	Rlimits    []Rlimit // highest hard limit of each resource below infinity and those at infinity
	// Capabilities are all permitted ones of the tree, bit n for capability n.
	Capabilities uint64
	OpenFiles    int // distinct open file descriptions
}

// Task is one process of the tree.
type Task struct {
	Pid   int   // on this host
	VPid  int   // inside its own pid namespace: what must be free on the destination
	VTids []int // all threads, the leader first
	PPid  int
	Comm  string
	RSS   uint64 // bytes
}

// File is one path that the restore will open.
type File struct {
	Path     string
	Kind     string // "regular", "directory", "chr", "fifo", "socket", "terminal" (one that the restore makes)
	Size     uint64 // bytes
	Mode     uint32 // st_mode
	Rdev     uint64
	Mapped   bool // mapped or executed
	BuildID  string
	Pids     []int
	Writable bool
	Create   bool // the restore makes it; the path must be free
	// Carried: it travels, a directory with all that is in it, and takes the place of
	// what is there. Allocated are the bytes that it needs.
	Carried   bool
	Allocated uint64
}

// External is one file that the destination must be handed.
type External struct {
	Key   string
	Path  string
	Kind  string // "regular", "fifo"
	Flags uint32
	Size  uint64
	Mode  uint32
	// MappedBytes is how much of it, from its begin, mappings show at least in part.
	MappedBytes uint64
}

// Port is one bound socket address.
type Port struct {
	Network string // "tcp", "udp"
	Address string
	Pid     int
}

// Rlimit is a limit that a task has.
type Rlimit struct {
	Resource int
	Cur, Max uint64
	Pid      int
}
