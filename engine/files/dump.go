package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/netlock"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
)

// Options says how files are dumped.
type Options struct {
	// External are keys of files that the destination provides (ParseKey).
	External []string
	// Carry are files that travel with their content.
	Carry []plan.Carry
	// GhostLimit is the largest allocated size, in bytes, of a deleted file
	// that travels with its data; 0 means 1 GiB.
	GhostLimit uint64
	// TCPEstablished carries TCP connections: those of which both ends are in the
	// tree, and the others as NetworkLock says.
	TCPEstablished bool
	// TCPClose lets all TCP connections come back closed.
	TCPClose bool
	// SkipInFlight leaves connections behind that wait to be accepted.
	SkipInFlight bool
	// NetworkLock is the id of the lock (netlock.New) under which connections that
	// lead out of the tree are carried, or LockSkip; empty refuses them.
	NetworkLock string
	// FileLocks carries file locks; without it they are refused.
	FileLocks bool
	// ShellJob carries a terminal of which the master is outside the tree: the
	// restore uses the one that it is started on.
	ShellJob bool
	// ExtUnixSk carries datagram sockets that are connected to a named one outside
	// the tree: they are connected to that name again.
	ExtUnixSk bool
	// Elsewhere: the tree goes to another host. Files of POSIX shared memory go with it.
	Elsewhere bool
	// Early is what the other side has of files that travel; nil: nothing.
	Early *EarlyCopy
	// Ends: the tree does not run on after the dump. Only then is data that waits
	// in connections not accepted yet carried: to read it, they are accepted.
	Ends bool
	plan.FileOptions
}

// Proc is one process whose files are dumped.
type Proc struct {
	Pid     int    // on this host
	VPid    int    // in its own pid namespace
	Comm    string // for messages
	FilesID uint32 // names the table of descriptors; processes that share one have the same
}

// Data is content that the core streams after the entries are sealed. File is
// the Dumper's, opened for it alone, readable, and open until Close; holes are
// found with SEEK_DATA and SEEK_HOLE.
type Data struct {
	ID   image.DataID
	File *os.File // nil: Open gives it
	Size int64
	// Sum: it is followed by its digest.
	Sum  bool
	path string // in the absence of File
	ino  inodeID

	early   *earlyFile // the content that was sent already; nil: none
	version version
	mapped  bool   // CarriedFile has it
	buf     []byte // of a block
}

// Open gives the content, for the caller to close.
func (x *Data) Open() (*os.File, error) {
	if x.File != nil {
		return dupFile(x.File)
	}
	f, err := openPath(x.path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || inode(&st) != x.ino {
		_ = f.Close()
		return nil, fmt.Errorf("%s was replaced while it was being carried", x.path)
	}
	return f, nil
}

// holder is one descriptor that leads to an object; fd -1 is none (AddPath).
type holder struct {
	proc *Proc
	fd   int
	role string // of AddPath: "mapping", "exe", "cwd", "root"; "in flight"
}

func (h holder) String() string {
	if h.fd < 0 {
		return fmt.Sprintf("%d:%s", h.proc.VPid, h.role)
	}
	return fmt.Sprintf("%d:%d", h.proc.VPid, h.fd)
}

// object is one open file description of the tree, or one path that is not
// behind a descriptor.
type object struct {
	id      uint32
	file    *os.File // a duplicate; nil after release
	parked  bool     // it can be taken again
	stat    unix.Stat_t
	link    string // text of /proc/PID/fd/N
	flags   int    // F_GETFL
	info    procfs.Fdinfo
	holders []holder
	// inFlight: no process has it, it was sent over a socket (SCM_RIGHTS) and
	// not received yet, or is a connection that was not accepted yet.
	inFlight bool
	kind     *kind
	refused  bool
	// Why it is refused, the first of several reasons; declarable: not if it
	// is declared external.
	reason, hint string
	declarable   bool
	word         string // label
	queued       uint64 // bytes in a pipe or fifo
	peer         string // of a socket, for plans
	peerIno      uint64 // of a unix socket whose other end is outside the tree
	birth        int64  // ns, of what has a key, for plans; 0: not known
	sha256       string // for plans, if it was asked for
	ext          bool
	wish         *wish // that it travels with its content
	key          Key   // valid if hasKey
	hasKey       bool
	fown         *fown.FownEntry

	entries []*fdinfo.FileEntry
	facts   *image.FileFacts
	ttyKey  string // of a terminal outside the tree
	proxied bool   // it is one whose master stays where it is
	path    string // where the restore finds it, if it is found by path
	create  bool   // the restore makes the path
	carries bool   // its content travels to the path
	reach   uint64 // up to where mappings show it, bytes
	inTree  bool   // what the destination must have there is known from a directory
	dirOnly bool   // path is the directory in which it is made or found
	state   any    // of the kind
}

func (o *object) mode() uint32     { return o.stat.Mode }
func (o *object) isPath() bool     { return o.flags&unix.O_PATH != 0 }
func (o *object) readable() bool   { return !o.isPath() && o.flags&unix.O_ACCMODE != unix.O_WRONLY }
func (o *object) writable() bool   { return !o.isPath() && o.flags&unix.O_ACCMODE != unix.O_RDONLY }
func (o *object) first() holder    { return o.holders[0] }
func (o *object) mapped() bool     { return o.held("mapping") || o.held("exe") }
func (o *object) deleted() bool    { return strings.HasSuffix(o.link, deletedSuffix) }
func (o *object) linkPath() string { return strings.TrimSuffix(o.link, deletedSuffix) }

func (o *object) held(role string) bool {
	return slices.ContainsFunc(o.holders, func(h holder) bool { return h.role == role })
}

const deletedSuffix = " (deleted)"

// groupKey are the facts in which two descriptors of one description agree;
// only within a group is kcmp asked.
type groupKey struct {
	dev, ino uint64
	typ      uint32
	flags    int
	pos      int64
}

// pathKey are the facts in which two uses of AddPath agree to share an entry.
type pathKey struct {
	dev, ino uint64
	mnt      int
	flags    int
	link     string
}

// inodeID names an inode on this host.
type inodeID struct{ dev, ino uint64 }

// Dumper collects the files of a tree. Its methods are not for concurrent use.
type Dumper struct {
	log  hclog.Logger
	opts Options
	emit func(image.Entry) error // nil: preflight

	ids      *procfs.IDMap // of a user namespace of the tree's own
	inside   map[int]bool  // processes of the tree, on this host
	vpids    map[int]bool  // the same in their own pid namespace
	tables   map[uint32]*Proc
	order    []uint32 // of tables
	fds      map[uint32][]fdSlot
	pidfds   map[int]int
	objects  []*object
	conns    []conn        // ends of TCP connections, after Finish
	lock     *netlock.Lock // of connections that lead out of the tree
	lockID   string        // of lock, if there was one that is to be kept
	brief    bool          // lock ends with the tree
	groups   map[groupKey]*orderedObjects
	budget   int // of descriptors that may be held
	holding  int
	texts    map[string]string
	paths    map[pathKey]*object
	locks    []heldLock
	lockIDs  map[lockID]bool
	wanted   []*wantedKey
	wishes   []*wish
	wishDirs map[string]*wish // directories that travel, by path
	trees    []plan.File      // directories that travel with what is in them
	vpid     map[int]int      // of the tree's processes, by their pid on this host
	flights  map[*object]*flight
	apart    map[uint32]bool // inodes of sockets that were declared external
	nameless map[string]bool // keys of pipes and other sockets that were; true: found
	externs  map[uint32]bool // inodes of sockets outside the tree that have an entry
	shmids   map[inodeID]uint32
	memfds   map[inodeID]*memfdInode
	ghosts   map[inodeID]*ghost
	links    Links
	remaps   []*linkRemap
	remapOf  map[inodeID]*linkRemap

	terminals  []*terminal
	ttyInfos   []*tty.TtyInfoEntry
	ttyData    []*tty.TtyDataEntry
	ttyFacts   []*image.TTYFacts
	lastTTY    uint32
	ttyUses    []ttyUse
	ttyScanned bool
	wantedTTYs map[string]bool // keys of Options.External; true: found
	proxies    map[string]bool // keys of Options.Proxied; true: found

	hashes   map[inodeID]string  // for plans
	mntns    map[int]bool        // pid → lives in another mount namespace
	root     func(string) string // where paths of the tree are found; nil: by mntns
	others   *outsiders
	holders  map[inodeID]outsider // of shared memory with a name
	netns    inodeID
	fresh    map[sockType][][]byte // options of new sockets
	joined   *[]procfs.MulticastGroup
	packets  map[uint32]packetDiag // by inode
	waiting  int                   // bytes of datagrams that travel
	accepted LostConnections       // that the tree lacks if it runs on
	data     []Data
	// carriedFiles are the regular files that travel with their names; tooMuch: they
	// are more than may.
	carriedFiles   []CarriedFile
	tooMuch        bool
	kept           map[inodeID]string // places that have the content of a file already
	mappedWritable map[inodeID]bool   // nil: not looked at yet
	buf            []byte             // for what is queued in sockets
	refusal        refuse.Refusal
	lastID         uint32
	done           bool
}

// fdSlot is one descriptor of a table.
type fdSlot struct {
	fd      int
	cloexec bool
	obj     *object
}

// wantedKey is one element of Options.External.
type wantedKey struct {
	text  string
	keys  []Key // that it may mean, the canonical reading first; once found, that alone
	found bool
}

// NewDumper begins a dump. Every entry goes to emit, in the order of images; a nil
// emit makes it the preflight of a running tree: nothing is emitted, nothing that
// two readers would notice is done to the tree, and everything that cannot be
// carried is collected for Refusal.
func NewDumper(log hclog.Logger, o Options, emit func(image.Entry) error) *Dumper {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	if o.GhostLimit == 0 {
		o.GhostLimit = 1 << 30
	}
	d := &Dumper{
		log: log.Named("files"), opts: o, emit: emit, lockIDs: map[lockID]bool{},
		inside: map[int]bool{}, vpids: map[int]bool{}, tables: map[uint32]*Proc{}, fds: map[uint32][]fdSlot{}, pidfds: map[int]int{},
		groups: map[groupKey]*orderedObjects{}, budget: fdBudget(), texts: map[string]string{}, paths: map[pathKey]*object{}, shmids: map[inodeID]uint32{},
		vpid: map[int]int{}, flights: map[*object]*flight{}, apart: map[uint32]bool{}, nameless: map[string]bool{}, externs: map[uint32]bool{},
		remapOf: map[inodeID]*linkRemap{},
		memfds:  map[inodeID]*memfdInode{}, ghosts: map[inodeID]*ghost{}, hashes: map[inodeID]string{}, mntns: map[int]bool{}, wantedTTYs: map[string]bool{},
		proxies: map[string]bool{}, kept: map[inodeID]string{},
	}
	proxied := map[string]bool{}
	for s, travels := range o.Proxied {
		key, err := canonicalKey(s)
		if err != nil {
			d.refusal.Add(refuse.Problem{Key: s, Reason: err.Error(), Hint: "plan lists every open file with its key"})
			continue
		}
		proxied[key] = travels
	}
	d.opts.Proxied = proxied
	for _, s := range o.External {
		if key, ok, err := parseTTYKey(s); ok && err == nil {
			d.wantedTTYs[key] = false
			continue
		}
		if ino, ok := parseUnixKey(s); ok {
			d.apart[ino] = true
			continue
		}
		if key, ok := parseNameless(s); ok {
			d.nameless[key] = false
			continue
		}
		keys, err := ParseKey(s)
		if err != nil {
			d.refusal.Add(refuse.Problem{Key: s, Reason: err.Error(), Hint: "plan lists every open file with its key"})
			continue
		}
		d.wanted = append(d.wanted, &wantedKey{text: s, keys: keys})
	}
	d.takeWishes(o.Carry)
	return d
}

func (d *Dumper) dry() bool { return d.emit == nil }

func (d *Dumper) newID() uint32 {
	d.lastID++
	return d.lastID
}

// firstShmID is above all ids of System V segments, which keep theirs in images.
const firstShmID = 1 << 31

// ShmID gives the shmid of a shared memory object, the same for the same inode.
// Memfds and shared anonymous memory are in one space.
func (d *Dumper) ShmID(dev, ino uint64) uint32 {
	k := inodeID{dev, ino}
	if id, ok := d.shmids[k]; ok {
		return id
	}
	id := firstShmID + uint32(len(d.shmids))
	d.shmids[k] = id
	return id
}

// held are the descriptor numbers of this process that dumpers hold: they
// lead into trees being dumped and are nobody's use of them.
var held sync.Map

func hold(fd int, name string) *os.File {
	held.Store(fd, true)
	return os.NewFile(uintptr(fd), name)
}

func release(f *os.File) {
	if f == nil {
		return
	}
	fd := int(f.Fd())
	_ = f.Close()
	held.Delete(fd)
}

// AddProcess takes up all descriptors of a process. A table that was seen before
// (FilesID) only makes the process known. Preconditions: unless this is a
// preflight, the process is stopped.
func (d *Dumper) AddProcess(p Proc) error {
	d.inside[p.Pid], d.vpids[p.VPid] = true, true
	d.vpid[p.Pid] = p.VPid
	if _, ok := d.tables[p.FilesID]; ok {
		return nil
	}
	pp := &p
	fds, err := procfs.Fds(p.Pid)
	if err != nil {
		return fmt.Errorf("list descriptors of pid %d: %w", p.Pid, err)
	}
	d.tables[p.FilesID] = pp
	d.order = append(d.order, p.FilesID)
	if len(fds) == 0 {
		return nil
	}
	pidfd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		return fmt.Errorf("open pidfd of pid %d: %w", p.Pid, os.NewSyscallError("pidfd_open", err))
	}
	defer func() { _ = unix.Close(pidfd) }()
	slices.Sort(fds)
	for _, fd := range fds {
		slot, err := d.addFD(pp, pidfd, fd)
		if err != nil {
			// While the tree runs, descriptors come and go.
			if d.dry() && (errors.Is(err, unix.EBADF) || procfs.Gone(err)) {
				continue
			}
			return fmt.Errorf("look at fd %d of pid %d (%s): %w", fd, p.Pid, p.Comm, err)
		}
		d.fds[p.FilesID] = append(d.fds[p.FilesID], slot)
	}
	return nil
}

func (d *Dumper) addFD(p *Proc, pidfd, fd int) (fdSlot, error) {
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return fdSlot{}, os.NewSyscallError("pidfd_getfd", err)
	}
	o := &object{holders: []holder{{proc: p, fd: fd}}}
	o.file = hold(n, "duplicate of fd "+strconv.Itoa(fd)+" of pid "+strconv.Itoa(p.Pid))
	keep := false
	defer func() {
		if !keep {
			release(o.file)
		}
	}()
	if err := unix.Fstat(n, &o.stat); err != nil {
		return fdSlot{}, os.NewSyscallError("fstat", err)
	}
	if o.flags, err = unix.FcntlInt(uintptr(n), unix.F_GETFL, 0); err != nil {
		return fdSlot{}, os.NewSyscallError("fcntl F_GETFL", err)
	}
	// Locks, close-on-exec and the links are those of the process's descriptor.
	if o.info, err = procfs.ReadFdinfo(p.Pid, fd); err != nil {
		return fdSlot{}, err
	}
	if o.link, err = procfs.FdLink(p.Pid, fd); err != nil {
		return fdSlot{}, err
	}
	o.link = d.intern(o.link)
	slot := fdSlot{fd: fd, cloexec: o.info.Flags&unix.O_CLOEXEC != 0}
	slot.obj, err = d.identify(o)
	if err != nil {
		return fdSlot{}, err
	}
	d.noteLocks(slot.obj, o.first(), o.info.Locks)
	if keep = slot.obj == o; keep {
		d.holding++
		d.park(o)
	} else {
		slot.obj.holders = append(slot.obj.holders, o.holders...)
	}
	return slot, nil
}

// intern gives one string for all equal ones.
func (d *Dumper) intern(s string) string {
	if !strings.HasPrefix(s, "anon_inode:") {
		return s
	}
	if t, ok := d.texts[s]; ok {
		return t
	}
	d.texts[s] = s
	return s
}

// identify finds the object that is the same description as o, or takes o up as
// a new one.
func (d *Dumper) identify(o *object) (*object, error) {
	k := groupKey{dev: uint64(o.stat.Dev), ino: o.stat.Ino, typ: o.mode() & unix.S_IFMT, flags: o.flags, pos: o.info.Pos}
	g := d.groups[k]
	if g == nil {
		g = &orderedObjects{}
		d.groups[k] = g
	}
	found, add, err := g.find(o)
	if err != nil && !d.dry() {
		return nil, err
	}
	if found != nil {
		return found, nil
	}
	o.id = d.newID()
	d.objects = append(d.objects, o)
	add(o)
	d.match(o)
	return o, nil
}

// AddPath registers what is held without a descriptor: a mapping, an executable, a
// working directory or a root (role "mapping", "exe", "cwd", "root"), or a file that
// is watched ("watch"). f was opened by
// the caller, who keeps it, through /proc/PID/map_files or the like, perhaps with
// O_PATH; link is the text of that link; flags are those to open it with again.
// It returns the id that its entry gets in files.img: the same for the same file
// and flags.
func (d *Dumper) AddPath(p Proc, role string, f *os.File, link string, flags int) (uint32, error) {
	o, err := d.addPath(p, role, f, link, flags)
	if err != nil {
		return 0, err
	}
	return o.id, nil
}

func (d *Dumper) addPath(p Proc, role string, f *os.File, link string, flags int) (*object, error) {
	d.inside[p.Pid], d.vpids[p.VPid] = true, true
	o := &object{link: link, flags: flags &^ unix.O_CLOEXEC, holders: []holder{{proc: &p, fd: -1, role: role}}}
	n, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", link, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err))
	}
	o.file = hold(n, link)
	keep := false
	defer func() {
		if !keep {
			release(o.file)
		}
	}()
	if err := unix.Fstat(n, &o.stat); err != nil {
		return nil, fmt.Errorf("stat %s: %w", link, os.NewSyscallError("fstat", err))
	}
	if o.info, err = procfs.ReadFdinfo(os.Getpid(), n); err != nil {
		return nil, err
	}
	o.info.Pos = 0
	k := pathKey{dev: uint64(o.stat.Dev), ino: o.stat.Ino, mnt: o.info.MntID, flags: o.flags, link: link}
	if have, ok := d.paths[k]; ok {
		have.holders = append(have.holders, o.holders...)
		return have, nil
	}
	keep = true
	o.id = d.newID()
	d.paths[k] = o
	d.objects = append(d.objects, o)
	d.match(o)
	return o, nil
}

// AddMapping is AddPath of a mapping that reaches to the offset end of its file.
func (d *Dumper) AddMapping(p Proc, f *os.File, link string, flags int, end uint64) (uint32, error) {
	o, err := d.addPath(p, "mapping", f, link, flags)
	if err != nil {
		return 0, err
	}
	o.reach = max(o.reach, min(end, uint64(max(o.stat.Size, 0))))
	return o.id, nil
}

// match gives o its external key. Only what can be opened again through its
// descriptor has one: regular files, directories and fifos.
func (d *Dumper) match(o *object) {
	switch o.mode() & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFIFO:
	default:
		return
	}
	if !strings.HasPrefix(o.link, "/") || strings.HasPrefix(o.link, memfdPrefix) {
		return
	}
	o.key, o.hasKey = Key{Mnt: uint64(o.info.MntID), Ino: o.stat.Ino}, true
}

// problem records why o cannot be carried.
func (d *Dumper) problem(o *object, reason, hint string) {
	h := o.first()
	p := refuse.Problem{Pid: h.proc.Pid, Comm: h.proc.Comm, FD: h.fd, HasFD: h.fd >= 0, Path: o.link, Reason: reason, Hint: hint}
	if h.fd < 0 && h.role != "" && h.role != "mapping" {
		p.Path = h.role + " " + o.link
	}
	if o.hasKey || (o.mode()&unix.S_IFMT == unix.S_IFREG && strings.HasPrefix(o.link, "/") && !strings.HasPrefix(o.link, memfdPrefix)) {
		p.Key = Key{Mnt: uint64(o.info.MntID), Ino: o.stat.Ino}.String()
	}
	if o.declarable {
		p.Key, p.Declarable = o.externalKey(), true
	}
	if o.reason == "" {
		o.reason, o.hint = reason, hint
	}
	d.refusal.Add(p)
}

// refuse records that o cannot be carried at all.
func (d *Dumper) refuse(o *object, reason, hint string) {
	if !o.refused {
		o.refused = true
		d.problem(o, reason, hint)
	}
}

// passes is refuse for what passes as soon as the program goes on.
func (d *Dumper) passes(o *object, reason, hint string) {
	if !o.refused {
		d.refuse(o, reason, hint)
		d.refusal.Problems[len(d.refusal.Problems)-1].Passing = true
	}
}

// Finish looks at everything that was added, emits the entries, and checks what
// needs the whole tree: both ends of pipes and connections, targets of epoll,
// keys that match nothing. What cannot be carried is in Refusal afterwards; the
// error is for what went wrong.
func (d *Dumper) Finish() error {
	if d.done {
		return errors.New("files: Finish called twice")
	}
	d.done = true
	if !d.dry() {
		forgetGone()
	}
	if err := d.findInFlight(); err != nil {
		return fmt.Errorf("look at what is in flight in unix sockets: %w", err)
	}
	d.checkKeys()
	d.checkUnixKeys()
	d.matchWishes()
	byKind := map[*kind][]*object{}
	early := len(d.objects)
	for i := 0; i < len(d.objects); i++ { // watches add the files that they are on
		o := d.objects[i]
		if i >= early {
			d.matchLate(o)
		}
		if err := d.dumpObject(o); err != nil {
			if d.dry() && (errors.Is(err, unix.EBADF) || procfs.Gone(err)) {
				continue
			}
			h := o.first()
			return fmt.Errorf("dump fd %d of pid %d (%s), %s: %w", h.fd, h.proc.Pid, h.proc.Comm, o.link, err)
		}
		if o.kind != nil {
			byKind[o.kind] = append(byKind[o.kind], o)
		}
	}
	d.unmatchedKeys()
	for _, k := range kinds {
		if os := byKind[k]; len(os) > 0 && k.finish != nil {
			if k != kindPipe { // which takes one pipe after the other
				if len(os) > d.budget {
					d.refuse(os[0], fmt.Sprintf("it is one of %d open files of kind %s, of which this agent can look at %d at once", len(os), k.name, d.budget),
						"raise the agent's limit of open files (ulimit -n, LimitNOFILE)")
					continue
				}
				if err := d.need(os...); err != nil && !d.dry() {
					return fmt.Errorf("dump %ss: %w", k.name, err)
				}
			}
			if err := k.finish(d, os); err != nil {
				return fmt.Errorf("dump %ss: %w", k.name, err)
			}
		}
	}
	if err := d.checkSessions(); err != nil {
		return err
	}
	if err := d.carryTrees(); err != nil {
		return err
	}
	d.checkTTYKeys()
	d.checkProxied()
	d.checkNameless()
	for _, o := range d.objects {
		release(o.file)
		o.file = nil
	}
	if d.dry() {
		return nil
	}
	return d.emitEntries()
}

func (d *Dumper) dumpObject(o *object) error {
	if err := d.need(o); err != nil {
		return err
	}
	defer d.park(o)
	for _, k := range kinds {
		if k.takes(d, o) {
			o.kind = k
			break
		}
	}
	o.word = o.label()
	if o.hasKey {
		o.birth = birth(o.file)
		if d.opts.Hash && o.mode()&unix.S_IFMT == unix.S_IFREG {
			o.sha256 = d.hash(o)
		}
	}
	if o.kind == kindPipe || o.kind == kindFifo {
		if n, err := unix.IoctlGetInt(int(o.file.Fd()), unix.TIOCINQ); err == nil {
			o.queued = uint64(n)
		}
	}
	if o.kind == nil {
		what, hint := unsupported(o)
		d.refuse(o, what, hint)
		return nil
	}
	var err error
	if o.fown, err = d.dumpOwner(o); err != nil {
		return err
	}
	err = o.kind.dump(d, o)
	if d.dry() && o.kind.finish == nil {
		o.entries = nil // nobody wants them
	}
	return err
}

func (d *Dumper) emitEntries() error {
	for _, o := range d.objects {
		if o.refused {
			continue
		}
		for _, e := range o.entries {
			if err := d.put(filesImage, filesMagic, e, nil); err != nil {
				return err
			}
		}
	}
	for _, id := range d.order {
		for _, s := range d.fds[id] {
			if s.obj.refused || s.obj.kind == nil {
				continue
			}
			e := &fdinfo.FdinfoEntry{Id: proto.Uint32(s.obj.id), Flags: proto.Uint32(0), Type: s.obj.kind.typ.Enum(), Fd: proto.Uint32(uint32(s.fd))}
			if s.cloexec {
				e.Flags = proto.Uint32(unix.FD_CLOEXEC)
			}
			if err := d.put(fdinfoImage(id), fdinfoMagic, e, nil); err != nil {
				return err
			}
		}
	}
	if err := d.emitTTYs(); err != nil {
		return err
	}
	if err := d.emitLocks(); err != nil {
		return err
	}
	if err := d.emitMemfds(); err != nil {
		return err
	}
	if err := d.emitLinks(); err != nil {
		return err
	}
	return d.emitGhosts()
}

func (d *Dumper) put(file, magic string, m proto.Message, extra []byte) error {
	if err := d.emit(image.Entry{File: file, Magic: magic, Msg: m, Extra: extra}); err != nil {
		return fmt.Errorf("write image %s: %w", file, err)
	}
	return nil
}

// checkKeys marks what was declared external.
func (d *Dumper) checkKeys() {
	at := map[Key][]*object{}
	for _, o := range d.objects {
		if o.hasKey {
			at[o.key] = append(at[o.key], o)
		}
	}
	for _, w := range d.wanted {
		for _, k := range w.keys {
			for _, o := range at[k] {
				o.ext = true
			}
			if len(at[k]) > 0 {
				d.foundKey(w, k)
				break
			}
		}
	}
}

func (d *Dumper) foundKey(w *wantedKey, k Key) {
	w.found = true
	w.keys = []Key{k}
	if k.String() != w.text {
		d.log.Info("external key resolved", "given", w.text, "key", k.String())
	}
}

// matchLate says what becomes of a file that something watches, which nobody need
// have open.
func (d *Dumper) matchLate(o *object) {
	if !o.hasKey {
		return
	}
	for _, w := range d.wanted {
		if slices.Contains(w.keys, o.key) {
			if o.ext = true; !w.found {
				d.foundKey(w, o.key)
			}
			return
		}
	}
	d.wishLate(o)
}

// unmatchedKeys refuses keys that nothing has.
func (d *Dumper) unmatchedKeys() {
	var have []string
	at := map[string]*object{}
	for _, o := range d.objects {
		if o.hasKey && at[o.key.String()] == nil {
			have = append(have, o.key.String())
			at[o.key.String()] = o
		}
	}
	for _, w := range d.wanted {
		if w.found {
			continue
		}
		p := refuse.Problem{Key: w.text, Reason: "no process of the tree has a regular file, directory or fifo with this key open"}
		if near := nearest(w.keys[0].String(), have); len(near) > 0 {
			for i, s := range near {
				h := at[s].first()
				what := h.role
				if h.fd >= 0 {
					what = fmt.Sprintf("fd %d", h.fd)
				}
				near[i] = fmt.Sprintf("%s (%s, pid %d %s)", s, at[s].link, h.proc.Pid, what)
			}
			p.Hint = "nearest: " + strings.Join(near, ", ")
		}
		d.refusal.Add(p)
	}
}

// Refusal lists everything that cannot be carried, after Finish.
func (d *Dumper) Refusal() []refuse.Problem { return d.refusal.Problems }

// Data lists the contents that must be streamed: of memfds (Shmem) and of
// deleted regular files (Ghost). Preflights have none.
func (d *Dumper) Data() []Data { return d.data }

// addData opens o's file once more for reading its content: its own description's
// offset and access mode stay out of it.
func (d *Dumper) addData(o *object, id image.DataID) error {
	f, err := reopen(o.file, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("open the content of %s: %w", o.link, err)
	}
	d.data = append(d.data, Data{ID: id, File: f, Size: o.stat.Size})
	return nil
}

// Facts tells, after Finish, what the images have no field for.
func (d *Dumper) Facts() []image.FileFacts {
	var out []image.FileFacts
	for _, o := range d.objects {
		if o.facts == nil || o.refused {
			continue
		}
		for i, h := range o.holders {
			if i == 8 { // enough for a message
				break
			}
			o.facts.Holders = append(o.facts.Holders, h.String())
		}
		out = append(out, *o.facts)
		o.facts.Holders = nil
	}
	return out
}

// fact sets the facts of an object.
func (o *object) fact(id uint32) *image.FileFacts {
	f := &image.FileFacts{ID: id, Path: o.linkPath(), Dev: uint64(o.stat.Dev), Ino: o.stat.Ino}
	if o.facts != nil {
		f.Sock = o.facts.Sock
	}
	o.facts = f
	return f
}

// Plan tells, after Finish, what the destination must have: paths, files for
// external keys, free socket addresses; and how many open file descriptions
// there are.
func (d *Dumper) Plan() (files []plan.File, ext []plan.External, ports []plan.Port, descriptions int) {
	byPath := map[string]int{}
	byKey := map[string]bool{}
	for _, o := range d.objects {
		if o.first().fd >= 0 || o.inFlight {
			descriptions++
		}
		if o.refused || o.kind == nil {
			continue
		}
		if o.ext {
			name := o.externalKey()
			k := fmt.Sprintf("%s %o", name, o.flags)
			if !byKey[k] {
				byKey[k] = true
				ext = append(ext, plan.External{Key: name, Path: o.link, Kind: o.externalKind(),
					Flags: uint32(o.flags), Size: uint64(o.stat.Size), Mode: o.mode(), MappedBytes: o.reach})
			}
			continue
		}
		if s, ok := o.state.(*inetState); ok {
			if p, ok := s.port(o); ok {
				ports = append(ports, p)
			}
		}
		if o.path == "" || o.inTree {
			continue
		}
		i, ok := byPath[o.path]
		if !ok {
			i = len(files)
			byPath[o.path] = i
			f := plan.File{Path: o.path, Kind: modeKind(o.mode()), Mode: o.mode(), Rdev: uint64(o.stat.Rdev)}
			if o.dirOnly { // the directory it is made in
				f = plan.File{Path: o.path, Kind: "directory", Mode: unix.S_IFDIR}
			}
			files = append(files, f)
		}
		f := &files[i]
		if !o.isPath() { // whose size matters to nobody
			f.Size = uint64(o.stat.Size)
		}
		f.Create = f.Create || o.create
		if o.carries {
			f.Carried, f.Allocated = true, uint64(o.stat.Blocks)*512
		}
		f.Writable = f.Writable || o.writable()
		if o.mapped() && !f.Mapped {
			f.Mapped = true
			if id, ok := o.state.(*regularState); ok {
				f.BuildID = id.buildID
			}
		}
		for _, h := range o.holders {
			if !slices.Contains(f.Pids, h.proc.Pid) {
				f.Pids = append(f.Pids, h.proc.Pid)
			}
		}
	}
	return append(append(files, d.trees...), d.terminalPlan()...), ext, ports, descriptions
}

// modeKind names the type of a file as package plan does.
func modeKind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "regular"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFCHR:
		return "chr"
	case unix.S_IFBLK:
		return "blk"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFLNK:
		return "symlink"
	}
	return "unknown"
}

// Close lets go of everything that the dump holds of the tree. It may be called twice.
func (d *Dumper) Close() error {
	for _, o := range d.objects {
		release(o.file)
		o.file = nil
	}
	d.TakeConnections().Close()
	errs := []error{d.links.Remove()}
	if n := d.TakeAccepted(); n > 0 {
		errs = append(errs, n)
	}
	for _, x := range d.data {
		if x.File != nil {
			errs = append(errs, x.File.Close())
		}
	}
	d.data = nil
	return errors.Join(errs...)
}
