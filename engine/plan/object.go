package plan

// How an object is carried.
const (
	CarryImage    = "image"    // all of it travels
	CarryPath     = "path"     // what is at its path at the destination
	CarryExternal = "external" // the destination provides it for its key
	CarryRefused  = "refused"
)

// Object is an open file description of a tree, or a file that it maps, runs or
// stands on.
type Object struct {
	// Key names what it leads to: file[mnt:ino], tty[rdev:dev], unix[ino], pipe[ino],
	// socket[ino], as in CRIU where that has one. Several objects may have the same;
	// empty: it can never be external.
	Key    string `json:"key,omitempty"`
	Kind   string `json:"kind"` // "regular", "fifo", "pipe", "unix-stream", "tcp", "eventfd" and the like
	Path   string `json:"path,omitempty"`
	Link   string `json:"link"` // text of the link in /proc
	Flags  uint32 `json:"flags"`
	Offset int64  `json:"offset"` // bytes
	Mode   uint32 `json:"mode"`   // st_mode
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Size   uint64 `json:"size"` // bytes; regular files
	MTime  int64  `json:"mtime_ns,omitempty"`
	// Birth is when it was made, in ns since 1970; 0: not known.
	Birth   int64    `json:"birth_ns,omitempty"`
	Dev     uint64   `json:"dev"`
	Ino     uint64   `json:"ino"`
	Rdev    uint64   `json:"rdev,omitempty"`
	BuildID string   `json:"build_id,omitempty"` // hexadecimal; ELF files that are mapped
	SHA256  string   `json:"sha256,omitempty"`   // hexadecimal; regular files, if it was asked for
	Queued  uint64   `json:"queued,omitempty"`   // bytes in a pipe, fifo or unix socket that leads out of the tree
	Peer    string   `json:"peer,omitempty"`     // of a socket: name or address of the other end
	PeerIno uint64   `json:"-"`                  // of a unix socket: of the other end, outside the tree
	Holders []Holder `json:"holders"`
	// Inherited is an ancestor of the tree that has the same description: the tree was
	// started with it.
	Inherited *Holder `json:"inherited,omitempty"`
	Carry     string  `json:"carry"`
	Reason    string  `json:"reason,omitempty"` // why it is refused
	Hint      string  `json:"hint,omitempty"`
	// Declarable: it is refused, but not if it is declared external.
	Declarable bool `json:"declarable,omitempty"`
}

// Holder is a process that has an object.
type Holder struct {
	Pid  int    `json:"pid"` // on this host
	VPid int    `json:"inner_pid"`
	Comm string `json:"comm"`
	FDs  []int  `json:"fds,omitempty"`
	// Roles are stdin, stdout, stderr (descriptors 0, 1, 2), mapping, exe, cwd, root, watch.
	Roles []string `json:"roles,omitempty"`
}

// What a host has at the path of an object.
const (
	PresenceSame    = "same"
	PresenceDiffers = "differs"
	PresenceMissing = "missing"
)
