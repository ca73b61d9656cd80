package image

// FactsFile is the name of the file, beside CRIU's images, that holds Facts as
// JSON. It is not an image: it has no magic and crit does not read it.
const FactsFile = "godwit.json"

// FactsVersion is the version of Facts that this build writes and reads.
const FactsVersion = 1

// Facts is what CRIU's images have no field for. A dump made by CRIU has none;
// a restore then uses defaults.
type Facts struct {
	Version int    `json:"version"` // of this structure, 1
	Host    string `json:"host"`
	BootID  string `json:"boot_id"`
	Kernel  string `json:"kernel"`
	Arch    string `json:"arch"` // GOARCH

	// Spoiled: pages of this dump were given up in favour of one that builds on
	// it (--auto-dedup), so that it cannot be restored itself.
	Spoiled bool `json:"spoiled,omitempty"`

	VdsoSHA256 string `json:"vdso_sha256,omitempty"` // of the bytes of [vdso]
	// MonotonicNS and BoottimeNS are the tree's clocks at the freeze, ns.
	MonotonicNS int64 `json:"monotonic_ns"`
	BoottimeNS  int64 `json:"boottime_ns"`
	RealtimeNS  int64 `json:"realtime_ns"`
	// MonotonicOffsetNS and BoottimeOffsetNS say by how much the tree's clocks were
	// ahead of those of its kernel: a time namespace.
	MonotonicOffsetNS int64 `json:"monotonic_offset_ns,omitempty"`
	BoottimeOffsetNS  int64 `json:"boottime_offset_ns,omitempty"`

	// Precopied are the processes, by pid in the images, whose memory is what came
	// before the images (Outline) and what differs from it after them.
	Precopied []uint32 `json:"precopied,omitempty"`
	// Late are those of them of which memory comes when the tree runs already: it is in
	// no data, and the source is asked for it.
	Late []uint32 `json:"late,omitempty"`

	Tasks []TaskFacts `json:"tasks"`
	Files []FileFacts `json:"files,omitempty"`
	// Ghosts are the deleted files.
	Ghosts []GhostFacts `json:"ghosts,omitempty"`
	// Memory is of the processes whose mappings have something that VmaEntry has no field for.
	Memory []MemoryFacts `json:"memory,omitempty"`
	// TTYs are the terminals.
	TTYs []TTYFacts `json:"ttys,omitempty"`
	// SysV are the System V segments of shared memory; their contents are a
	// data set of shared memory by the same id.
	SysV []SysVFacts `json:"sysv,omitempty"`
	// Mounts are of those mounts of a tree's own mount namespace that are bound from
	// what other mounts cover on the host.
	Mounts []MountFacts `json:"mounts,omitempty"`
	// Users belongs to a user namespace of the tree's own.
	Users *UsersFacts `json:"users,omitempty"`
	// NetSysctls are the settings of a tree's own network namespace that differ from
	// those of a new one, in the order in which they are to be set.
	NetSysctls []SysctlFacts `json:"net_sysctls,omitempty"`
}

// UsersFacts belongs to a user namespace of the tree's own.
type UsersFacts struct {
	// NoSetgroups: its processes cannot change their groups (user_namespaces(7)).
	NoSetgroups bool `json:"no_setgroups,omitempty"`
	// Groups are those of the root of the tree, as they are called on the host: they
	// may be of those that the namespace has no name for.
	Groups []uint32 `json:"groups,omitempty"`
}

// TaskFacts belongs to one thread.
type TaskFacts struct {
	TID uint32 `json:"tid"` // in the images' pid namespace
	// Affinity are the words of the CPU mask, lowest first; none means that the
	// task was free to run on every CPU of its host.
	Affinity   []uint64 `json:"affinity,omitempty"`
	TimerSlack uint64   `json:"timer_slack_ns,omitempty"`
	IOPrio     uint32   `json:"ioprio,omitempty"`
	XFeatures  uint64   `json:"xfeatures,omitempty"` // XSTATE_BV
	// StopSeen: the parent of a stopped process has been told so by waitpid.
	StopSeen bool `json:"stop_seen,omitempty"`

	// Sched is what a task has asked of the scheduler beside policy, priority and
	// niceness.
	Sched *SchedFacts `json:"sched,omitempty"`
	// Personality is that of a thread which has another one than the first.
	Personality *uint32 `json:"personality,omitempty"`
	// IOFlusher: prctl(2), PR_SET_IO_FLUSHER.
	IOFlusher bool `json:"io_flusher,omitempty"`
	// TSC is PR_TSC_SIGSEGV for a task that may not read the time stamp counter.
	TSC uint32 `json:"tsc,omitempty"`
	// NoCPUID: the instruction raises SIGSEGV (arch_prctl(2), ARCH_SET_CPUID).
	NoCPUID bool `json:"no_cpuid,omitempty"`
	// MCEKill is the policy of PR_MCE_KILL, none for the host's.
	MCEKill *uint32 `json:"mce_kill,omitempty"`
	// Speculation are the values of PR_SET_SPECULATION_CTRL by feature, 0 for one
	// that the task has not set.
	Speculation []uint32 `json:"speculation,omitempty"`
	// Dispatch is the syscall user dispatch (PR_SET_SYSCALL_USER_DISPATCH).
	Dispatch *DispatchFacts `json:"dispatch,omitempty"`
	// NUMA is the memory policy of the thread (set_mempolicy(2)).
	NUMA *NUMAFacts `json:"numa,omitempty"`

	// FS are the directories and the umask of a thread that has its own.
	FS *FSFacts `json:"fs,omitempty"`

	// What follows belongs to a process and is in the facts of its first thread.

	// Owner is who a process that has ended was.
	Owner *OwnerFacts `json:"owner,omitempty"`
	// ExitSignal is what its parent gets at its end, 0 for nothing; none means SIGCHLD.
	ExitSignal *uint32 `json:"exit_signal,omitempty"`
	// CoredumpFilter is /proc/PID/coredump_filter.
	CoredumpFilter *uint32 `json:"coredump_filter,omitempty"`
	// Autogroup is the niceness of its session (sched(7)).
	Autogroup int32 `json:"autogroup,omitempty"`
	// XPermission are the features of extended state that it has asked leave to use
	// (arch_prctl(2), ARCH_REQ_XCOMP_PERM), a mask.
	XPermission uint64 `json:"xpermission,omitempty"`
	// LDT are the descriptors of modify_ldt(2), 8 bytes each as the CPU has them.
	LDT []byte `json:"ldt,omitempty"`
}

// SchedFacts are fields of struct sched_attr (sched_setattr(2)).
type SchedFacts struct {
	Flags uint64 `json:"flags,omitempty"` // SCHED_FLAG_RESET_ON_FORK, …
	// Runtime, ns, is the budget of SCHED_DEADLINE, and the slice that a task of
	// an ordinary policy has asked for, 0 for the host's.
	Runtime  uint64 `json:"runtime_ns,omitempty"`
	Deadline uint64 `json:"deadline_ns,omitempty"`
	Period   uint64 `json:"period_ns,omitempty"`
	UtilMin  uint32 `json:"util_min,omitempty"`
	UtilMax  uint32 `json:"util_max,omitempty"`
}

// DispatchFacts is struct ptrace_sud_config (include/uapi/linux/ptrace.h).
type DispatchFacts struct {
	Mode     uint64 `json:"mode"`
	Selector uint64 `json:"selector,omitempty"`
	Offset   uint64 `json:"offset,omitempty"`
	Len      uint64 `json:"len,omitempty"`
}

// OwnerFacts are ids of users and groups: real, effective, saved, file system.
type OwnerFacts struct {
	UID [4]uint32 `json:"uid"`
	GID [4]uint32 `json:"gid"`
}

// FSFacts is what CRIU has as fs_entry for a process: ids of files.
type FSFacts struct {
	Cwd   uint32 `json:"cwd"`
	Root  uint32 `json:"root"`
	Umask uint32 `json:"umask"`
}

// NUMAFacts is a memory policy.
type NUMAFacts struct {
	Mode  uint32   `json:"mode"`            // MPOL_* with its flags
	Nodes []uint64 `json:"nodes,omitempty"` // words of the mask, lowest first
}

// MemoryFacts belongs to the address space of one process.
type MemoryFacts struct {
	PID uint32 `json:"pid"` // in the images' pid namespace
	// Guards are the guard regions (MADV_GUARD_INSTALL), ascending.
	Guards []Range `json:"guards,omitempty"`
	// Sealed are the mappings under mseal(2), ascending, each one VMA.
	Sealed []Range `json:"sealed,omitempty"`
	// OnFault are the locked mappings that are locked as they are used
	// (MLOCK_ONFAULT), ascending, each one VMA.
	OnFault []Range `json:"on_fault,omitempty"`
	// Names are those of anonymous mappings (PR_SET_VMA_ANON_NAME), ascending,
	// each of one VMA.
	Names []NamedRange `json:"names,omitempty"`
	// LockFuture are the flags of mlockall(2) by which new mappings are locked:
	// MCL_FUTURE, MCL_ONFAULT; 0: they are not.
	LockFuture uint32 `json:"lock_future,omitempty"`
	// THPDisable is what PR_GET_THP_DISABLE gives if it is more than 1: flags that
	// go with it.
	THPDisable uint32 `json:"thp_disable,omitempty"`
	// Merge is PR_SET_MEMORY_MERGE.
	Merge bool `json:"memory_merge,omitempty"`
	// MDWE are the flags of PR_SET_MDWE.
	MDWE uint32 `json:"mdwe,omitempty"`
}

// NamedRange is a Range with a name.
type NamedRange struct {
	Range
	Name string `json:"name"`
}

// SysVFacts is a System V segment: struct shmid_ds of shmctl(2).
type SysVFacts struct {
	ID   uint32 `json:"id"`
	Key  int32  `json:"key,omitempty"`
	Size uint64 `json:"size"` // bytes
	Mode uint32 `json:"mode"` // with SHM_DEST and SHM_LOCKED
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	CUID uint32 `json:"cuid"` // of the creator
	CGID uint32 `json:"cgid"`
	// Huge are the flags of shmget(2) that say which huge pages it consists of:
	// SHM_HUGETLB and the logarithm of their size << SHM_HUGE_SHIFT; 0: none.
	Huge uint32 `json:"hugetlb_flag,omitempty"`
}

// MountFacts belongs to one mount (by mnt_id in mountpoints).
type MountFacts struct {
	ID      uint32 `json:"id"`
	Covered int    `json:"covered"` // how many mounts cover its source on the host
}

// SysctlFacts is one setting below /proc/sys.
type SysctlFacts struct {
	Path  string `json:"path"` // such as net/ipv4/ip_forward
	Value string `json:"value"`
}

// Range is a range of addresses, page-aligned.
type Range struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"` // behind the last byte
}

// TTYFacts belongs to a terminal (by id of its slave, or only, side in tty-info.img).
type TTYFacts struct {
	ID uint32 `json:"id"`
	// Master is the id of the master's side; 0: it is not part of the tree.
	Master uint32 `json:"master,omitempty"`
	Mode   uint32 `json:"mode,omitempty"` // permissions of the slave's node
	// Input says what the bytes of the slave's side in tty-data.img are; without
	// it they are lines, or no lines, as the settings say.
	Input []TTYPiece `json:"input,omitempty"`
	// Stopped says how output was stopped: "char", "call", or not at all.
	Stopped string `json:"stopped,omitempty"`
	// Without are the processes of its session that gave it up (TIOCNOTTY).
	Without []uint32 `json:"without,omitempty"`
}

// TTYPiece is a part of a terminal's input.
type TTYPiece struct {
	Len int `json:"len"` // bytes
	// End is what follows: "line" (the last byte ends a line), "eof" (an end of
	// file), "open" (the line goes on), "raw" (there are no lines), "new" (not
	// processed yet).
	End string `json:"end"`
}

// FileFacts belongs to one file entry (by id in files.img).
type FileFacts struct {
	ID   uint32 `json:"id"`
	Path string `json:"path,omitempty"` // where an external file was on the source
	Dev  uint64 `json:"dev,omitempty"`
	Ino  uint64 `json:"ino,omitempty"`
	// External: a pipe or socket without a name for which one must be handed in.
	External bool `json:"external,omitempty"`
	// MappedBytes is how many bytes an external file must have: mappings reach so far.
	MappedBytes uint64 `json:"mapped_bytes,omitempty"`
	// Rdev is the device number of a character device.
	Rdev uint64 `json:"rdev,omitempty"`
	// Quiet: a reader of a fifo that poll(2) does not tell of a hang-up although
	// no writer may be there, because it has met none since it was opened.
	Quiet bool `json:"quiet,omitempty"`
	// WriteHint is that of F_SET_RW_HINT; 0: none.
	WriteHint uint64 `json:"write_hint,omitempty"`
	// Watches are the files that an inotify or fanotify file watches.
	Watches []WatchFacts `json:"watches,omitempty"`
	// Overflow: events waited in an inotify file; IN_Q_OVERFLOW stands for them.
	Overflow bool `json:"overflow,omitempty"`
	// Unix is of unix sockets.
	Unix *UnixFacts `json:"unix,omitempty"`
	// Holders are "pid:fd" texts for messages.
	Holders []string `json:"holders,omitempty"`
	// Sock is of a socket that has something sk_opts_entry and its kin have no field for.
	Sock *SockFacts `json:"sock,omitempty"`
	// Tun is of a descriptor of /dev/net/tun that is attached to an interface.
	Tun *TunFacts `json:"tun,omitempty"`
	// Mqueue is of a descriptor of a POSIX message queue.
	Mqueue *MqueueFacts `json:"mqueue,omitempty"`
}

// MqueueFacts is a POSIX message queue, which stays where it is.
type MqueueFacts struct {
	Name        string `json:"name"`         // without a slash
	MaxMessages int64  `json:"max_messages"` // that it holds
	MessageSize int64  `json:"message_size"` // bytes, at most
}

// TunFacts is the interface of a TUN or TAP descriptor, by its name in the entry.
type TunFacts struct {
	Flags uint32 `json:"flags"` // of TUNSETIFF, and IFF_PERSIST
	// Owner and Group may attach to it; -1: nobody but who may administer networks.
	Owner       int32     `json:"owner"`
	Group       int32     `json:"group"`
	VnetHdrSize int       `json:"vnet_hdr_size,omitempty"` // bytes
	Sndbuf      int       `json:"sndbuf,omitempty"`        // bytes
	BigEndian   bool      `json:"big_endian,omitempty"`    // its virtio headers
	LittleEnd   bool      `json:"little_endian,omitempty"`
	Offload     uint32    `json:"offload,omitempty"` // TUN_F_*
	Link        LinkFacts `json:"link"`
}

// LinkFacts is the configuration of a network interface.
type LinkFacts struct {
	Index      uint32 `json:"index"`
	MTU        uint32 `json:"mtu"`
	TxQueueLen uint32 `json:"tx_queue_len"` // packets
	Up         bool   `json:"up,omitempty"`
	NoCarrier  bool   `json:"no_carrier,omitempty"`
	Address    []byte `json:"address,omitempty"` // of the hardware
	Master     string `json:"master,omitempty"`  // the bridge or bond that it is part of
	// AddrGenMode is how IPv6 makes addresses (IN6_ADDR_GEN_MODE_*); nil: it has no IPv6.
	AddrGenMode *uint8        `json:"addr_gen_mode,omitempty"`
	Addresses   []LinkAddress `json:"addresses,omitempty"`
	Routes      []LinkRoute   `json:"routes,omitempty"`
}

// LinkAddress is struct ifaddrmsg with its attributes.
type LinkAddress struct {
	Local     string `json:"local"`
	Peer      string `json:"peer,omitempty"` // of a point-to-point link
	Prefix    uint8  `json:"prefix"`         // length, bits
	Broadcast string `json:"broadcast,omitempty"`
	Label     string `json:"label,omitempty"`
	Scope     uint8  `json:"scope,omitempty"`
	Flags     uint32 `json:"flags,omitempty"` // IFA_F_*
}

// LinkRoute is struct rtmsg with its attributes.
type LinkRoute struct {
	Family    uint8  `json:"family"`
	Dst       string `json:"dst,omitempty"` // none: the default route
	DstLen    uint8  `json:"dst_len,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	Source    string `json:"source,omitempty"` // preferred
	Table     uint32 `json:"table"`
	Priority  uint32 `json:"priority,omitempty"`
	TOS       uint8  `json:"tos,omitempty"`
	Protocol  uint8  `json:"protocol,omitempty"`
	Scope     uint8  `json:"scope,omitempty"`
	Type      uint8  `json:"type,omitempty"`
	Flags     uint32 `json:"flags,omitempty"`   // RTNH_F_*
	Metrics   []byte `json:"metrics,omitempty"` // attributes RTAX_*
	Preferred *uint8 `json:"pref,omitempty"`    // RTA_PREF
}

// SockFacts is what a socket has besides the fields of its entry.
type SockFacts struct {
	// UID owns the socket: firewalls and SO_REUSEPORT look at it; 0: root.
	UID uint32 `json:"uid,omitempty"`
	// Type is SOCK_DGRAM of a netlink socket that is not SOCK_RAW.
	Type int `json:"type,omitempty"`
	// Options are those that differ from a fresh socket's.
	Options []SockOption `json:"options,omitempty"`
	// Interfaces are the names of the network interfaces whose indexes are in the entry.
	Interfaces map[uint32]string `json:"interfaces,omitempty"`
	// Datagrams wait to be received, in this order.
	Datagrams []SockDatagram `json:"datagrams,omitempty"`
	// Groups are the multicast groups that it has joined.
	Groups []SockGroup `json:"groups,omitempty"`
}

// SockDatagram is a datagram of UDP with what the kernel tells of it.
type SockDatagram struct {
	From string `json:"from"`         // address and port of its sender
	To   string `json:"to,omitempty"` // the address it was sent to, if the socket asks for it
	TTL  uint8  `json:"ttl,omitempty"`
	TOS  uint8  `json:"tos,omitempty"`
	Data []byte `json:"data,omitempty"`
}

// SockOption is one option of setsockopt(2).
type SockOption struct {
	Level  int    `json:"level"`
	Option int    `json:"option"`
	Value  []byte `json:"value,omitempty"` // in the byte order of the host
	// Interface is the name of the network interface whose index Value would be.
	Interface string `json:"interface,omitempty"`
}

// SockGroup is the membership of a socket in a multicast group of IPv4 or IPv6.
type SockGroup struct {
	Group     string `json:"group"`
	Interface string `json:"interface"`
	// Exclude: datagrams of all senders but Sources come; else only those of Sources.
	Exclude bool     `json:"exclude,omitempty"`
	Sources []string `json:"sources,omitempty"`
}

// WatchFacts is one watch or mark and the entry of its file in files.img.
type WatchFacts struct {
	Number uint32 `json:"number"` // of the watch, or the place of the mark in its list
	File   uint32 `json:"file"`
	// Filesystem: a mark on the whole file system that the file is on.
	Filesystem bool `json:"filesystem,omitempty"`
}

// GhostFacts belongs to a deleted file (ghost-file-ID.img).
type GhostFacts struct {
	ID uint32 `json:"id"`
	// AtimeNS and MtimeNS are the times of the last access and modification,
	// in ns since 1970.
	AtimeNS int64 `json:"atime_ns"`
	MtimeNS int64 `json:"mtime_ns"`
	// Xattrs are the extended attributes by name.
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
	// Named is of a file that is not deleted: it travels with its name.
	Named *NamedFacts `json:"named,omitempty"`
}

// NamedFacts belongs to a file that travels with its name and content.
type NamedFacts struct {
	Path string `json:"path"`
	// Replace: it may take the place of another file.
	Replace bool `json:"replace,omitempty"`
	// Early is the EarlyFile that its content builds on; 0: none.
	Early uint32 `json:"early,omitempty"`
	// Links are further names of the same file.
	Links []string `json:"links,omitempty"`
}

// UnixFacts belongs to a unix socket.
type UnixFacts struct {
	// PeerCred is what SO_PEERCRED says; none: the socket has no such peer.
	PeerCred *Credentials `json:"peer_cred,omitempty"`
	// Connector is who connected the socket, as far as is known, if it waits to be
	// accepted: what the other end will see.
	Connector *Credentials `json:"connector,omitempty"`
	// PeerName is the name of a peer that is closed, as the kernel has it.
	PeerName []byte `json:"peer_name,omitempty"`
	// Reset: an error, ECONNRESET, waits to be reported.
	Reset bool `json:"reset,omitempty"`
	// External: its peer, outside the tree, was declared external.
	External bool `json:"external,omitempty"`
	// Pending are the connections that wait to be accepted here, in order, by the
	// inode of the client's socket or, if that is not all there is to tell, of
	// the one that is to be accepted, which has an entry then.
	Pending []uint32 `json:"pending,omitempty"`
	// Messages is what the entries of the socket in sk-queues.img have no field for.
	Messages []MessageFacts `json:"messages,omitempty"`
	// Root is the directory that the bound path was meant in; empty: "/".
	Root string `json:"root,omitempty"`
}

// Credentials are those of a process as the peer of its sockets sees them.
type Credentials struct {
	PID    uint32   `json:"pid,omitempty"` // in the images' pid namespace; 0: unknown
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
}

// MessageFacts belongs to one message in a socket's queue.
type MessageFacts struct {
	Index int `json:"index"` // among the entries of this socket
	// From is the name of the sender, as the kernel has it.
	From []byte `json:"from,omitempty"`
	// Cred are the credentials that came with it (SCM_CREDENTIALS).
	Cred *Credentials `json:"cred,omitempty"`
	// OOB: its one byte was sent out of band.
	OOB bool `json:"oob,omitempty"`
}
