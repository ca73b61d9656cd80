package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/ptrace"
)

// RestoreOptions says how files are made again.
type RestoreOptions struct {
	// Inherit maps keys to open files that back them: file[mnt:ino] of external
	// files, pipe:[ino], socket:[ino], or the path of a file that then is not
	// opened by that path.
	Inherit map[string]Inherit
	// FileLocks sets file locks again; without it images with locks are refused.
	FileLocks bool
	// Pid gives the pid or tid, as this process sees it, of a task by the one that
	// it has in the images; nil means that they are the same.
	Pid func(int) (int, bool)
	// Open opens a path as the tree sees it, with open(2)'s flags; nil opens it as
	// this process sees it. It must not change the flags.
	Open func(path string, flags int, mode uint32) (*os.File, error)
	// Root is the root directory of a tree with mounts of its own, nil for this
	// process's.
	Root *os.File
	// TCPEstablished makes TCP connections again.
	TCPEstablished bool
	// ShellJob puts Terminal in the place of a terminal of which the master was
	// outside the tree. Terminal is the caller's; nil: there is none.
	ShellJob bool
	// TerminalOwned: nobody but the tree uses Terminal, which gets its owner, too.
	TerminalOwned bool
	Terminal      *os.File
	// TCPClose makes sockets that had a TCP connection again as if it had ended.
	TCPClose bool
	// TCPOutside makes those again, too, that lead out of the tree.
	TCPOutside bool
	// LockSkip leaves the network lock of the dump to the caller.
	LockSkip bool
	// OwnNet says that the tree has a network namespace of its own, which is yet to
	// be made.
	OwnNet bool
	plan.FileRestoreOptions
	// ExtUnixSk connects datagram sockets to named ones outside the tree again;
	// without it images with such sockets are refused.
	ExtUnixSk bool
	// Carry is where files that travelled with the tree may be placed.
	Carry []plan.Place
	// Early are files of which content came before the images, with the same places;
	// nil: none.
	Early *EarlyFiles
	// Mark is part of the names of files that wait beside their places.
	Mark string
	// Note, if set, is told of what is made in its place at once, before that: of
	// directories and the like.
	Note func(paths []string) error
	// Actor gives a process that has a pid in the images, of the tree or made for
	// the purpose; 0 is any. nil: this process makes all sockets, and their peers see it.
	Actor func(pid int) (Actor, error)
}

// Inherit is an open file that the caller hands in. It stays the caller's.
type Inherit struct {
	File *os.File
	// Forward gives the processes this very open file description, as it is, in
	// place of one opened again with the recorded flags and position.
	Forward bool
	// AnyKind: another kind of file may stand for what was there, such as a socket
	// for a pipe. It is forwarded, unless it is /dev/null.
	AnyKind bool
}

// Descriptor is one descriptor of a table.
type Descriptor struct {
	FD      int
	Cloexec bool
	x       *description
	spare   bool // of use for Calls only
}

// place is one descriptor of a table.
type place struct {
	filesID uint32
	fd      int
}

// description is one open file description being made again.
type description struct {
	id    uint32
	entry *fdinfo.FileEntry
	kind  *kind
	part  *description // whose REG entry this only is
	at    []place
	file  *os.File
	// isLate: it is made when a process gets it, which then is placed.
	isLate bool
	placed processFD
}

// table is one table of descriptors.
type table struct {
	pid     uint32 // of one process that has it, for messages; 0: unknown
	byFD    map[int]*description
	cloexec map[int]bool
	watches []watch
	spare   map[*description]int // further descriptors, for as long as Calls run
}

// Restorer makes the files of a tree again. Its methods are not for concurrent use.
type Restorer struct {
	log    hclog.Logger
	set    *image.Set
	opts   RestoreOptions
	all    []*description // in the order of the image
	byID   map[uint32]*description
	byIno  map[uint32]*description // unix sockets
	tables map[uint32]*table
	facts  map[uint32]*image.FileFacts
	remaps map[uint32]uint32 // to ghosts
	linked map[uint32]uint32 // to entries of the files' other names
	noted  map[uint32]bool
	// needed are those that epolls watch or that are locked, latePipes the ends
	// of pipes that are late, by pipe; both only if there are too many.
	needed    map[*description]bool
	latePipes map[uint32][]*description
	firsts    map[uint32][]*description // by table
	links     Links
	carried   Carried
	named     []*ghostFile           // that travel with their names, directories before what is in them
	filling   *ghostFile             // whose content comes
	spent     map[*plan.Place]uint64 // bytes of content
	ghosts    map[uint32]*ghostFile
	memfds    map[uint32]*memfdFile
	pipes     map[uint32]*queue
	fifos     map[uint32]*queue
	queues    map[uint32][]message
	locks     map[uint32][]*fileLock       // by table
	handed    map[string]*Inherit          // by the name in the image
	conns     map[*description]*connection // TCP, by their ends
	bpf       map[uint32]*bpfMap           // by the id in the images
	tcps      map[tcpPair]bool             // TCP connections of this host
	lockID    string                       // of the dump's network lock; empty: none
	made      []string                     // socket files
	cuts      Cuts

	ttySides map[uint32]*ttySide
	ttys     []*ttyMade
	ttysOpen bool
}

// maxFD bounds descriptor numbers; the kernel's own bound is lower.
const maxFD = 1 << 30

// NewRestorer validates the images, which are untrusted, and matches what was
// handed in. A handed file that nothing wants, and an external file that nothing
// was handed in for, are errors.
func NewRestorer(log hclog.Logger, set *image.Set, o RestoreOptions) (*Restorer, error) {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	if o.Open == nil {
		o.Open = openPath
	}
	r := &Restorer{
		log: log.Named("files"), set: set, opts: o,
		byID: map[uint32]*description{}, byIno: map[uint32]*description{}, tables: map[uint32]*table{}, facts: map[uint32]*image.FileFacts{},
		remaps: map[uint32]uint32{}, linked: map[uint32]uint32{}, noted: map[uint32]bool{}, latePipes: map[uint32][]*description{}, ghosts: map[uint32]*ghostFile{}, memfds: map[uint32]*memfdFile{}, handed: map[string]*Inherit{},
		conns: map[*description]*connection{},
		locks: map[uint32][]*fileLock{}, spent: map[*plan.Place]uint64{},
	}
	if set.Facts != nil {
		for i := range set.Facts.Files {
			r.facts[set.Facts.Files[i].ID] = &set.Facts.Files[i]
		}
	}
	r.opts.Carry = slices.Clone(o.Carry)
	err := checkPlaces(r.opts.Carry)
	if err != nil {
		return nil, err
	}
	if o.Early != nil {
		r.opts.Carry, r.spent = o.Early.places, o.Early.spent
	}
	for _, load := range []func() error{r.loadFiles, r.loadTables, r.loadLocks, r.loadGhosts, r.loadLinked, r.loadMemfds, r.loadSockQueues, r.loadTTYs, r.matchInherit, r.loadConnections, r.loadBPF} {
		if err := load(); err != nil {
			return nil, err
		}
	}
	if r.pipes, err = r.loadQueues(pipesImage); err != nil {
		return nil, err
	}
	if r.fifos, err = r.loadQueues(fifosImage); err != nil {
		return nil, err
	}
	return r, r.check()
}

// Within makes paths be opened as the tree sees them, before Open; root and open
// are as RestoreOptions has them.
func (r *Restorer) Within(open func(path string, flags int, mode uint32) (*os.File, error), root *os.File) {
	r.opts.Open, r.opts.Root = open, root
}

// openPath opens a path as this process sees it, without the runtime's poller.
func openPath(path string, flags int, mode uint32) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// entryParts gives what all types of entries have, by type.
func entryParts(e *fdinfo.FileEntry) (id uint32, owner *fown.FownEntry, flags uint32, ok bool) {
	type common interface {
		GetId() uint32
		GetFown() *fown.FownEntry
		GetFlags() uint32
	}
	var c common
	switch e.GetType() {
	case fdinfo.FdTypes_REG:
		c, ok = e.GetReg(), e.Reg != nil
	case fdinfo.FdTypes_PIPE:
		c, ok = e.GetPipe(), e.Pipe != nil
	case fdinfo.FdTypes_FIFO:
		return e.GetFifo().GetId(), nil, 0, e.Fifo != nil // its REG entry has the rest
	case fdinfo.FdTypes_NS:
		return e.GetNsf().GetId(), noOwner(), e.GetNsf().GetFlags(), e.Nsf != nil // it cannot have an owner
	case fdinfo.FdTypes_EVENTFD:
		c, ok = e.GetEfd(), e.Efd != nil
	case fdinfo.FdTypes_EVENTPOLL:
		c, ok = e.GetEpfd(), e.Epfd != nil
	case fdinfo.FdTypes_SIGNALFD:
		c, ok = e.GetSgfd(), e.Sgfd != nil
	case fdinfo.FdTypes_TIMERFD:
		c, ok = e.GetTfd(), e.Tfd != nil
	case fdinfo.FdTypes_PIDFD:
		c, ok = e.GetPidfd(), e.Pidfd != nil
	case fdinfo.FdTypes_UNIXSK:
		c, ok = e.GetUsk(), e.Usk != nil
	case fdinfo.FdTypes_INETSK:
		c, ok = e.GetIsk(), e.Isk != nil
	case fdinfo.FdTypes_NETLINKSK:
		c, ok = e.GetNlsk(), e.Nlsk != nil
	case fdinfo.FdTypes_PACKETSK:
		c, ok = e.GetPsk(), e.Psk != nil
	case fdinfo.FdTypes_TUNF:
		return e.GetTunf().GetId(), e.GetReg().GetFown(), e.GetReg().GetFlags(), e.Tunf != nil // REG is another entry's
	case fdinfo.FdTypes_BPFMAP:
		c, ok = e.GetBpf(), e.Bpf != nil
	case fdinfo.FdTypes_MEMFD:
		c, ok = e.GetMemfd(), e.Memfd != nil
	case fdinfo.FdTypes_FANOTIFY:
		c, ok = e.GetFfy(), e.Ffy != nil
	case fdinfo.FdTypes_INOTIFY:
		c, ok = e.GetIfy(), e.Ify != nil
	case fdinfo.FdTypes_TTY:
		c, ok = e.GetTty(), e.Tty != nil
	}
	if !ok {
		return 0, nil, 0, false
	}
	return c.GetId(), c.GetFown(), c.GetFlags(), true
}

// ownerOf gives the owner and flags of a description; those of a fifo are in its
// REG entry.
func (r *Restorer) ownerOf(x *description) (*fown.FownEntry, uint32) {
	if reg := r.fifoReg(x); reg != nil {
		return reg.GetFown(), reg.GetFlags()
	}
	_, o, flags, _ := entryParts(x.entry)
	return o, flags
}

func (r *Restorer) fifoReg(x *description) *regfile.RegFileEntry {
	if x.entry.GetType() != fdinfo.FdTypes_FIFO {
		return nil
	}
	return r.regOf(x)
}

func (r *Restorer) loadFiles() error {
	es, err := image.All[*fdinfo.FileEntry](r.set, filesImage)
	if err != nil {
		return err
	}
	for _, e := range es {
		id, _, _, ok := entryParts(e)
		switch {
		case !ok:
			return fmt.Errorf("image %s: file %d is of type %s, which is not carried, or its entry is empty", filesImage, e.GetId(), e.GetType())
		case id != e.GetId():
			return fmt.Errorf("image %s: file %d calls itself %d inside", filesImage, e.GetId(), id)
		case r.byID[id] != nil:
			if r.byID[id].entry = joinTun(r.byID[id].entry, e); r.byID[id].entry == nil {
				return fmt.Errorf("image %s: file %d is there twice", filesImage, id)
			}
			continue
		}
		x := &description{id: id, entry: e}
		r.byID[id] = x
		if u := e.GetUsk(); u != nil && r.byIno[u.GetIno()] == nil {
			r.byIno[u.GetIno()] = x
		}
		r.all = append(r.all, x)
	}
	return nil
}

func (r *Restorer) loadTables() error {
	for _, name := range r.set.Files() {
		num, ok := strings.CutPrefix(name, "fdinfo-")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(num, 10, 32)
		if err != nil || fdinfoImage(uint32(n)) != name {
			return fmt.Errorf("image %s: its name has no number", name)
		}
		es, err := image.All[*fdinfo.FdinfoEntry](r.set, name)
		if err != nil {
			return err
		}
		t := &table{byFD: map[int]*description{}, cloexec: map[int]bool{}, spare: map[*description]int{}}
		r.tables[uint32(n)] = t
		for _, e := range es {
			x := r.byID[e.GetId()]
			fd := int(e.GetFd())
			switch {
			case e.GetFd() >= maxFD:
				return fmt.Errorf("image %s: fd %d is out of range", name, e.GetFd())
			case t.byFD[fd] != nil:
				return fmt.Errorf("image %s: fd %d is there twice", name, fd)
			case x == nil:
				return fmt.Errorf("image %s: fd %d leads to file %d, which image %s does not have", name, fd, e.GetId(), filesImage)
			case x.entry.GetType() != e.GetType():
				return fmt.Errorf("image %s: fd %d leads to a file of type %s, but file %d is of type %s", name, fd, e.GetType(), e.GetId(), x.entry.GetType())
			}
			t.byFD[fd] = x
			t.cloexec[fd] = e.GetFlags()&unix.FD_CLOEXEC != 0
			x.at = append(x.at, place{uint32(n), fd})
		}
	}
	for _, name := range r.set.Files() {
		num, ok := strings.CutPrefix(name, "ids-")
		if !ok {
			continue
		}
		pid, err := strconv.ParseUint(num, 10, 32)
		if err != nil {
			continue
		}
		for _, e := range r.set.Entries(name) {
			if ids, ok := e.Msg.(*criu_core.TaskKobjIdsEntry); ok {
				if t := r.tables[ids.GetFilesId()]; t != nil && t.pid == 0 {
					t.pid = uint32(pid)
				}
			}
		}
	}
	return nil
}

// check finds the kind of every description and validates it. External files
// that are not there are all told in one error.
func (r *Restorer) check() error {
	var errs []error
	for _, x := range r.all {
		for _, k := range kinds {
			if k.typ == x.entry.GetType() && (k.has == nil || k.has(r, x)) {
				x.kind = k
				break
			}
		}
		if x.kind == nil {
			errs = append(errs, fmt.Errorf("%s: files of type %s are not carried", r.who(x), x.entry.GetType()))
		}
	}
	for _, x := range r.all {
		if x.kind == nil {
			continue
		}
		if f := r.facts[x.id]; f != nil && f.Sock != nil {
			if err := checkSockFacts(f.Sock); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
				continue
			}
		}
		if x.kind.check != nil {
			if err := x.kind.check(r, x); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
				continue
			}
		}
		if o, _ := r.ownerOf(x); x.kind != kindFifo {
			if err := checkOwner(o); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
			}
		}
	}
	for orig := range r.remaps {
		if r.byID[orig] == nil {
			errs = append(errs, fmt.Errorf("image %s: file %d is not there", remapImage, orig))
		}
	}
	if err := list("the files in the images cannot be restored", errs); err != nil {
		return err
	}
	if err := r.planTTYs(); err != nil {
		return err
	}
	r.planWatches()
	for _, t := range r.tables {
		t.placeSpares()
	}
	return nil
}

// list makes one error of several. What is said twice, of a fifo and of the
// file that it is, is listed once.
func list(doing string, errs []error) error {
	said := map[string]bool{}
	errs = slices.DeleteFunc(slices.Clone(errs), func(e error) bool {
		if e == nil || said[e.Error()] {
			return true
		}
		said[e.Error()] = true
		return false
	})
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%s: %w", doing, errs[0])
	}
	return &listError{doing: doing, errs: errs}
}

type listError struct {
	doing string
	errs  []error
}

func (e *listError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, for %d reasons:", e.doing, len(e.errs))
	for _, x := range e.errs {
		b.WriteString("\n  - " + x.Error())
	}
	return b.String()
}

func (e *listError) Unwrap() []error { return e.errs }

// who names a description in messages: its process, descriptor and path.
func (r *Restorer) who(x *description) string {
	if x.part != nil {
		x = x.part
	}
	path := ""
	id := x.id
	if reg := x.entry.GetReg(); reg != nil {
		path = reg.GetName()
	} else if reg := r.fifoReg(x); reg != nil {
		path, id = reg.GetName(), reg.GetId()
	} else if reg := r.ttyReg(x); reg != nil {
		path, id = reg.GetName(), reg.GetId()
	}
	f := r.facts[id]
	if f != nil && f.Path != "" {
		path = f.Path
	}
	s := fmt.Sprintf("file %d (%s)", x.id, strings.ToLower(x.entry.GetType().String()))
	switch {
	case len(x.at) > 0:
		s = fmt.Sprintf("fd %d", x.at[0].fd)
		if pid := r.tables[x.at[0].filesID].pid; pid != 0 {
			s += r.process(strconv.Itoa(int(pid)))
		} else if f != nil && len(f.Holders) > 0 {
			pid, _, _ := strings.Cut(f.Holders[0], ":")
			s += r.process(pid)
		}
	case f != nil && len(f.Holders) > 0:
		pid, role, _ := strings.Cut(f.Holders[0], ":")
		s = role + r.process(pid)
	}
	if path != "" {
		s += ", " + path
	}
	return s
}

// process names a process by its pid in the images.
func (r *Restorer) process(pid string) string {
	s := " of pid " + pid
	for _, e := range r.set.Entries("core-" + pid) {
		if c, ok := e.Msg.(*criu_core.CoreEntry); ok && c.GetTc().GetComm() != "" {
			return s + " (" + c.GetTc().GetComm() + ")"
		}
	}
	return s
}

// openEach makes descriptions that do not depend on each other.
func openEach(open func(*Restorer, *description) error) func(*Restorer, []*description) []error {
	return func(r *Restorer, xs []*description) []error {
		var errs []error
		for _, x := range xs {
			if err := open(r, x); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.who(x), err))
			}
		}
		return errs
	}
}

// byKind lists the descriptions of a kind that are to be made.
func (r *Restorer) byKind(k *kind) []*description {
	var out []*description
	for _, x := range r.all {
		if x.kind == k && x.part == nil && !x.isLate {
			out = append(out, x)
		}
	}
	return out
}

// Open makes every description but unix sockets (OpenUnix): with its flags, position, queued data, size,
// address and state. Memory files and deleted files are empty but of full size.
// Everything that fails is told in one error; Close then cleans up.
func (r *Restorer) Open() error {
	r.planLate()
	if err := r.makeCarried(); err != nil {
		return err
	}
	var errs []error
	for _, k := range kinds {
		if k == kindUnix {
			continue
		}
		if xs := r.byKind(k); len(xs) > 0 {
			errs = append(errs, k.open(r, xs)...)
		} else if k == kindMemfd && len(r.memfds) > 0 {
			errs = append(errs, k.open(r, nil)...)
		}
	}
	errs = append(errs, r.probeLocks()...)
	return list("open the files of the tree", errs)
}

// OpenUnix makes the unix sockets, with what is in flight in them, after Open and
// once there are processes to act (RestoreOptions.Actor).
func (r *Restorer) OpenUnix() error {
	xs := r.byKind(kindUnix)
	if len(xs) == 0 {
		return nil
	}
	return list("open the unix sockets of the tree", kindUnix.open(r, xs))
}

// Seal finishes what must wait until all data is written (DataFile): sizes,
// seals, times; and it starts timers. DataFile's files are closed by it.
func (r *Restorer) Seal() error {
	var errs []error
	for _, k := range kinds {
		if k.seal == nil {
			continue
		}
		errs = append(errs, k.seal(r, r.byKind(k))...)
	}
	return list("finish the files of the tree", errs)
}

// DataFile is where a piece of the content of id goes, at its offset; nil if the
// content is not a file's. It is open for writing from Open to Seal.
func (r *Restorer) DataFile(id image.DataID, off uint64, b []byte) (*os.File, error) {
	switch id.Kind {
	case image.Shmem:
		for _, m := range r.memfds {
			if m.msg.GetShmid() == id.ID {
				return m.file, nil
			}
		}
	case image.Ghost:
		g := r.ghosts[id.ID]
		switch {
		case g == nil || g.sealed || g.typ() != unix.S_IFREG:
		case g.carried():
			return r.fill(id, off, b)
		default:
			return g.file, nil
		}
	}
	return nil, nil
}

// Cut empties ranges of a file whose content came before the images, and that differs.
func (r *Restorer) Cut(id uint32, b []byte) error {
	g := r.ghosts[id]
	if g == nil || g.early == nil || g.sealed {
		return fmt.Errorf("images cut file %d, of which nothing came before them", id)
	}
	if err := r.fillNext(g); err != nil {
		return err
	}
	return r.opts.Early.cut(g.early, g.file, b)
}

// File gives the open file of an entry: a mapping, an executable, a working
// directory, a root. It is the Restorer's.
func (r *Restorer) File(id uint32) (*os.File, error) {
	x := r.byID[id]
	switch {
	case x == nil:
		return nil, fmt.Errorf("image %s has no file %d", filesImage, id)
	case x.file == nil:
		return nil, fmt.Errorf("%s is not open", r.who(x))
	}
	return x.file, nil
}

// Descriptors lists a table of descriptors, in ascending order. Besides the
// table's own there may be further ones, which Calls use and close.
func (r *Restorer) Descriptors(filesID uint32) []Descriptor {
	t := r.tables[filesID]
	if t == nil {
		return nil // CRIU writes no image for a process without descriptors
	}
	out := make([]Descriptor, 0, len(t.byFD)+len(t.spare))
	for fd, x := range t.byFD {
		out = append(out, Descriptor{FD: fd, Cloexec: t.cloexec[fd], x: x})
	}
	for x, fd := range t.spare {
		out = append(out, Descriptor{FD: fd, Cloexec: true, x: x, spare: true})
	}
	slices.SortFunc(out, func(a, b Descriptor) int { return a.FD - b.FD })
	return out
}

// Calls makes the system calls that one process with the table must execute once
// its descriptors are in place, before it drops its credentials: epoll_ctl, locks,
// owners of signals, listen (which records who listens). Pids in them are as in the images.
func (r *Restorer) Calls(filesID uint32) ([]*ptrace.Call, error) {
	t := r.tables[filesID]
	if t == nil {
		return nil, nil
	}
	out := r.epollCalls(filesID)
	spare := make([]int, 0, len(t.spare))
	for _, fd := range t.spare {
		spare = append(spare, fd)
	}
	slices.Sort(spare)
	for _, fd := range spare {
		out = append(out, ptrace.NewCall(fmt.Sprintf("close fd %d", fd), unix.SYS_CLOSE, ptrace.Int(fd)))
	}
	out = append(out, r.lockCalls(filesID)...)
	for _, x := range r.firstIn(filesID) {
		o, flags := r.ownerOf(x)
		out = append(out, ownerCalls(x.at[0].fd, o, flags)...)
		if x.kind == kindUnix {
			out = append(out, r.listenCalls(x)...)
		}
	}
	return out, nil
}

// firstIn lists the descriptions that have their first descriptor in a table,
// which does for a description what must be done once.
func (r *Restorer) firstIn(filesID uint32) []*description {
	if r.firsts == nil {
		r.firsts = map[uint32][]*description{}
		for _, x := range r.all {
			if x.part == nil && len(x.at) > 0 && !r.isForwarded(x) {
				r.firsts[x.at[0].filesID] = append(r.firsts[x.at[0].filesID], x)
			}
		}
	}
	return r.firsts[filesID]
}

// Made lists the socket files that were made: they are to go with a tree that does
// not come to life.
func (r *Restorer) Made() []string { return r.made }

// Close closes everything that was made and not handed on. It may be called twice.
func (r *Restorer) Close() error {
	r.links.Close()
	r.cuts.Close()
	errs := []error{r.carried.Remove()}
	for _, x := range r.all {
		if x.file != nil {
			errs = append(errs, x.file.Close())
			x.file = nil
		}
	}
	for _, c := range r.conns {
		if c.file == nil { // or they are a Landing's
			c.closeRaw()
		}
	}
	errs = append(errs, r.closeTTYs())
	for _, g := range r.ghosts {
		if g.file != nil && !g.sealed {
			errs = append(errs, g.file.Close())
		}
		g.file = nil
	}
	for _, m := range r.memfds {
		if m.file != nil {
			errs = append(errs, m.file.Close())
			m.file = nil
		}
	}
	return errors.Join(errs...)
}
