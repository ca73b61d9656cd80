package files

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/time"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/plan"
)

// kindGhost carries files of every type without a name: deleted while open, or
// made with O_TMPFILE. Their data, attributes and extended attributes travel.
var kindGhost = &kind{
	name: "deleted file", typ: fdinfo.FdTypes_REG,
	takes: func(d *Dumper, o *object) bool {
		if !strings.HasPrefix(o.link, "/") || o.ext || pseudo(o) {
			return false
		}
		switch o.mode() & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR:
		default: // those that are open for more have kinds of their own
			if !o.isPath() {
				return false
			}
		}
		if _, at := d.locate(o); at != gone {
			return false
		}
		isProc, _, _, err := insideProc(o)
		return err == nil && !isProc
	},
	dump: dumpGhost,
	has: func(r *Restorer, x *description) bool {
		return r.remaps[x.id] != 0 && !isDeviceEntry(x)
	},
	check: checkRegular,
	open:  openEach(openGhost),
	seal:  sealGhosts,
}

// ghost is a deleted file on its way.
type ghost struct {
	id    uint32
	dev   uint64
	msg   *ghost_file.GhostFileEntry
	users []uint32 // ids of the REG entries
	facts image.GhostFacts
}

func dumpGhost(d *Dumper, o *object) error {
	if o.mode()&unix.S_IFMT == unix.S_IFREG {
		if used := uint64(o.stat.Blocks) * 512; used > d.opts.GhostLimit {
			d.lacks(o, fmt.Sprintf("it is a deleted file of %d bytes, more than the limit of %d", used, d.opts.GhostLimit),
				"raise the limit (--ghost-limit), or declare the file external")
			return nil
		}
	}
	o.path, o.dirOnly = d.standingDir(o), true
	o.noteHint()
	o.entries = append(o.entries, d.regEntry(o, o.id, o.linkPath()))
	return d.addGhost(o, o.id)
}

// standingDir is the nearest directory above a deleted file that is still there.
func (d *Dumper) standingDir(o *object) string {
	root := d.rootOf(o)
	for dir := filepath.Dir(o.linkPath()); ; dir = filepath.Dir(dir) {
		if st, err := os.Stat(root + dir); dir == "/" || dir == "." || err == nil && st.IsDir() {
			return dir
		}
	}
}

// addGhost makes the entry regID lead to a ghost with o's attributes and data.
func (d *Dumper) addGhost(o *object, regID uint32) error {
	if d.rootOf(o) != "" && readOnly(o.file) {
		// A writable mount of it can only be had in its own namespace (onWritable).
		d.lacks(o, "it was deleted on a mount that is read-only, in a mount namespace of the tree's own", "mount it read-write, or declare the file external")
		return nil
	}
	g := d.ghosts[inode(&o.stat)]
	if g == nil {
		var err error
		if g, err = d.newGhost(o.file, &o.stat); err != nil {
			return err
		}
		if o.mode()&unix.S_IFMT == unix.S_IFREG && !d.dry() {
			if err := d.addData(o, image.DataID{Kind: image.Ghost, ID: g.id}); err != nil {
				return err
			}
		}
	}
	g.users = append(g.users, regID)
	return nil
}

// newGhost makes the entry of a file that travels with its attributes.
func (d *Dumper) newGhost(f *os.File, st *unix.Stat_t) (*ghost, error) {
	g := &ghost{id: uint32(len(d.ghosts) + 1), dev: uint64(st.Dev)}
	g.msg = &ghost_file.GhostFileEntry{
		Uid: proto.Uint32(st.Uid), Gid: proto.Uint32(st.Gid), Mode: proto.Uint32(st.Mode),
		Dev: proto.Uint32(uint32(st.Dev)), Ino: proto.Uint64(st.Ino),
		Atim: timevalOf(st.Atim), Mtim: timevalOf(st.Mtim),
	}
	g.facts = image.GhostFacts{ID: g.id, AtimeNS: st.Atim.Nano(), MtimeNS: st.Mtim.Nano()}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		g.msg.Chunks = proto.Bool(true)
		g.msg.Size = proto.Uint64(uint64(st.Size))
	case unix.S_IFCHR, unix.S_IFBLK:
		g.msg.Rdev = proto.Uint32(uint32(st.Rdev))
	case unix.S_IFLNK:
		target, err := readlinkAt(f)
		if err != nil {
			return nil, err
		}
		g.msg.SymlnkTarget = proto.String(target)
	}
	var err error
	if g.facts.Xattrs, err = readXattrs(f); err != nil {
		return nil, err
	}
	d.ghosts[inode(st)] = g
	return g, nil
}

// readOnly says whether the mount of a file is read-only.
func readOnly(f *os.File) bool {
	var fs unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Flags&unix.ST_RDONLY != 0
}

// readlinkAt reads the symlink that f, open with O_PATH, is.
func readlinkAt(f *os.File) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", b)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: f.Name(), Err: err}
	}
	return string(b[:n]), nil
}

// readXattrs reads the extended attributes of a file, access control lists
// among them; nil where the file system has none.
func readXattrs(f *os.File) (map[string][]byte, error) {
	p := fmt.Sprintf("/proc/self/fd/%d", f.Fd()) // the file may be O_PATH
	names := make([]byte, 1<<16)
	n, err := unix.Listxattr(p, names)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: f.Name(), Err: err}
	}
	out := map[string][]byte{}
	for _, name := range strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		b := make([]byte, maxXattr)
		n, err := unix.Getxattr(p, name, b)
		switch {
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
			continue // only shown
		case err != nil:
			return nil, &os.PathError{Op: "getxattr " + name, Path: f.Name(), Err: err}
		}
		out[name] = b[:n]
	}
	return out, nil
}

// maxXattr is XATTR_SIZE_MAX (include/uapi/linux/limits.h), also of all names together.
const maxXattr = 1 << 16

func timevalOf(t unix.Timespec) *time.Timeval {
	return &time.Timeval{TvSec: proto.Uint64(uint64(t.Sec)), TvUsec: proto.Uint64(uint64(t.Nsec / 1000))}
}

// sortedGhosts lists the deleted files by their ids.
func (d *Dumper) sortedGhosts() []*ghost {
	gs := make([]*ghost, 0, len(d.ghosts))
	for _, g := range d.ghosts {
		gs = append(gs, g)
	}
	slices.SortFunc(gs, func(a, b *ghost) int { return int(a.id) - int(b.id) })
	return gs
}

// GhostFacts tells, after Finish, what the images have no field for.
func (d *Dumper) GhostFacts() []image.GhostFacts {
	var out []image.GhostFacts
	for _, g := range d.sortedGhosts() {
		out = append(out, g.facts)
	}
	return out
}

func (d *Dumper) emitGhosts() error {
	for _, g := range d.sortedGhosts() {
		for _, id := range g.users {
			e := &remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(id), RemapId: proto.Uint32(g.id), RemapType: remap_file_path.RemapType_GHOST.Enum()}
			if err := d.put(remapImage, remapMagic, e, nil); err != nil {
				return err
			}
		}
		if err := d.put(ghostImage(g.id), ghostMagic, g.msg, nil); err != nil {
			return err
		}
	}
	return nil
}

// ghostFile is a ghost being made again.
type ghostFile struct {
	msg    *ghost_file.GhostFileEntry
	facts  *image.GhostFacts // nil in images of CRIU
	file   *os.File          // open for writing if it is a regular file, until it is sealed
	sealed bool

	// Of one that travels with its name.
	loose bool // no process has it open
	at    spot
	links []spot        // of its further names
	place *plan.Place   // nil: shared memory
	temp  *carriedFile  // nil: it was there
	early *earlyLanding // what came of it before the images; nil: nothing
	sum   digest
}

// ghostOld is the bit that images before CRIU 2.2 set in remap_id in place of a type.
const ghostOld = 1 << 31

// loadGhosts reads which entries lead to ghosts.
func (r *Restorer) loadGhosts() error {
	ms, err := image.All[*remap_file_path.RemapFilePathEntry](r.set, remapImage)
	if err != nil {
		return err
	}
	for _, m := range ms {
		id := m.GetRemapId()
		if m.RemapType == nil && id&ghostOld != 0 {
			id &^= ghostOld
		} else if m.RemapType != nil && m.GetRemapType() == remap_file_path.RemapType_LINKED {
			r.linked[m.GetOrigId()] = id
			continue
		} else if m.GetRemapType() != remap_file_path.RemapType_GHOST {
			return fmt.Errorf("image %s: file %d is remapped by %s, which is not carried", remapImage, m.GetOrigId(), m.GetRemapType())
		}
		if id == 0 {
			return fmt.Errorf("image %s: ghost id 0", remapImage)
		}
		if _, ok := r.ghosts[id]; !ok {
			es := r.set.Entries(ghostImage(id))
			if len(es) == 0 {
				return fmt.Errorf("image %s: file %d needs ghost %d, whose image %s is missing", remapImage, m.GetOrigId(), id, ghostImage(id))
			}
			msg, ok := es[0].Msg.(*ghost_file.GhostFileEntry)
			if !ok {
				return fmt.Errorf("image %s: first entry is a %T", ghostImage(id), es[0].Msg)
			}
			if err := checkGhost(msg, ghostImage(id)); err != nil {
				return err
			}
			r.ghosts[id] = &ghostFile{msg: msg}
		}
		r.remaps[m.GetOrigId()] = id
	}
	return r.loadGhostFacts()
}

// checkGhost validates a ghost's entry.
func checkGhost(msg *ghost_file.GhostFileEntry, file string) error {
	switch msg.GetMode() & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFIFO, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFSOCK:
	case unix.S_IFLNK:
		if n := len(msg.GetSymlnkTarget()); n == 0 || n >= unix.PathMax || strings.IndexByte(msg.GetSymlnkTarget(), 0) >= 0 {
			return fmt.Errorf("image %s: %q is no target of a symlink", file, msg.GetSymlnkTarget())
		}
	default:
		return fmt.Errorf("image %s: deleted files of mode %#o are not carried", file, msg.GetMode())
	}
	if msg.GetSize() > 1<<63-1 {
		return fmt.Errorf("image %s: size %d is out of range", file, msg.GetSize())
	}
	return nil
}

func (r *Restorer) loadGhostFacts() error {
	if r.set.Facts == nil {
		return nil
	}
	for i := range r.set.Facts.Ghosts {
		f := &r.set.Facts.Ghosts[i]
		for name, value := range f.Xattrs {
			if name == "" || len(name) > 255 || strings.IndexByte(name, 0) >= 0 || len(value) > maxXattr {
				return fmt.Errorf("%s: deleted file %d has an extended attribute that is not possible", image.FactsFile, f.ID)
			}
		}
		if f.Named != nil {
			if err := r.loadCarried(f); err != nil {
				return err
			}
			continue
		}
		g := r.ghosts[f.ID]
		if g == nil {
			return fmt.Errorf("%s tells of deleted file %d, which is not there", image.FactsFile, f.ID)
		}
		g.facts = f
	}
	return nil
}

func openGhost(r *Restorer, x *description) error {
	e := x.entry.GetReg()
	// A deleted file may be handed in, too.
	if in := r.inherited(e); in != nil {
		return openRegular(r, x)
	}
	g := r.ghosts[r.remaps[x.id]]
	if err := g.create(r, e); err != nil {
		return err
	}
	f, err := r.reopenRecorded(x, g.file, e)
	if err != nil {
		return err
	}
	x.file = f
	r.setHint(x)
	return setPosition(f, e.GetPos())
}

// create makes the deleted file: under its old name if that is free, for the
// sake of the link in /proc, and without one otherwise. A file of O_TMPFILE
// (whose name the kernel makes from its inode) can still be given a name, so it
// becomes one again.
func (g *ghostFile) create(r *Restorer, e *regfile.RegFileEntry) error {
	switch {
	case g.file != nil:
		return nil
	case g.carried():
		return g.make(r)
	}
	name := e.GetName()
	err := r.inParent(name, func(dir int, base string) (err error) {
		if g.msg.GetMode()&unix.S_IFMT == unix.S_IFREG {
			tmp := strings.HasPrefix(base, "#") && base == fmt.Sprintf("#%d", g.msg.GetIno())
			g.file, err = createRegular(dir, base, name, tmp)
		} else {
			g.file, err = g.createOther(dir, base, name)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("make the deleted file %s again: %w", name, err)
	}
	return g.attributes(r, false)
}

// inParent calls f with the directory of a deleted file. What is missing of that
// directory is made, and removed afterwards. If it cannot be written to because
// it is mounted read-only, f gets it through a mount of its own, writable and
// seen by nobody.
func (r *Restorer) inParent(name string, f func(dir int, base string) error) error {
	dir, made, err := r.openParent(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	err = onWritable(dir, func(fd int) error { return f(fd, filepath.Base(name)) })
	for i := len(made) - 1; i >= 0; i-- {
		m := made[i]
		err = errors.Join(err, onWritable(m.in, func(fd int) error { return unix.Unlinkat(fd, m.base, unix.AT_REMOVEDIR) }), m.in.Close())
	}
	return err
}

// madeDir is a directory that was made for a moment.
type madeDir struct {
	in   *os.File
	base string
}

// openParent opens a directory with O_PATH, making what is missing. Where
// something else stands in the way, the directory above that has to do.
func (r *Restorer) openParent(dir string) (_ *os.File, made []madeDir, err error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	f, err := r.opts.Open(dir, flags, 0)
	switch {
	case err == nil:
		return f, nil, nil
	case errors.Is(err, unix.ENOTDIR) && dir != "/":
		return r.openParent(filepath.Dir(dir))
	case !errors.Is(err, unix.ENOENT) || dir == "/":
		return nil, nil, err
	}
	up, made, err := r.openParent(filepath.Dir(dir))
	if err != nil {
		return nil, nil, err
	}
	base := filepath.Base(dir)
	var fd int
	err = onWritable(up, func(in int) (err error) {
		if err = unix.Mkdirat(in, base, 0o700); err != nil {
			return &os.PathError{Op: "mkdir", Path: dir, Err: err}
		}
		if fd, err = unix.Openat(int(up.Fd()), base, flags|unix.O_NOFOLLOW, 0); err != nil {
			_ = unix.Unlinkat(in, base, unix.AT_REMOVEDIR)
			return &os.PathError{Op: "open", Path: dir, Err: err}
		}
		return nil
	})
	if err != nil {
		return up, made, nil // a mountpoint, a place where nothing can be made: its name does not matter so much
	}
	return os.NewFile(uintptr(fd), dir), append(made, madeDir{in: up, base: base}), nil
}

// onWritable calls f with a directory, and again with a writable mount of it if
// it is on a read-only one.
func onWritable(dir *os.File, f func(fd int) error) error {
	err := f(int(dir.Fd()))
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	clone, cerr := unix.OpenTree(int(dir.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if cerr != nil {
		return err
	}
	defer func() { _ = unix.Close(clone) }()
	if unix.MountSetattr(clone, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}) != nil {
		return err
	}
	return f(clone)
}

func createRegular(dir int, base, name string, tmp bool) (*os.File, error) {
	fail := func(op string, err error) (*os.File, error) { return nil, &os.PathError{Op: op, Path: name, Err: err} }
	if tmp {
		if fd, err := unix.Openat(dir, ".", unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600); err == nil {
			return os.NewFile(uintptr(fd), name), nil
		} // not every file system knows O_TMPFILE
	}
	for try := 0; ; try++ {
		fd, err := unix.Openat(dir, base, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		switch {
		case err == nil:
			if err := unix.Unlinkat(dir, base, 0); err != nil {
				_ = unix.Close(fd)
				return fail("unlink", err)
			}
			return os.NewFile(uintptr(fd), name), nil
		case !errors.Is(err, unix.EEXIST) || try > 0:
			return fail("create", err)
		}
		base = ".godwit-" + randomName()
	}
}

// createOther makes what is no regular file and removes its name at once.
func (g *ghostFile) createOther(dir int, base, name string) (*os.File, error) {
	fail := func(op string, err error) (*os.File, error) { return nil, &os.PathError{Op: op, Path: name, Err: err} }
	typ := g.msg.GetMode() & unix.S_IFMT
	for try := 0; ; try++ {
		var err error
		switch typ {
		case unix.S_IFDIR:
			err = unix.Mkdirat(dir, base, 0o700)
		case unix.S_IFLNK:
			err = unix.Symlinkat(g.msg.GetSymlnkTarget(), dir, base)
		default:
			err = unix.Mknodat(dir, base, typ|0o600, int(g.msg.GetRdev()))
		}
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || try > 0 {
			return fail("make", err)
		}
		base = ".godwit-" + randomName()
	}
	fd, err := unix.Openat(dir, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	flags := 0
	if typ == unix.S_IFDIR {
		flags = unix.AT_REMOVEDIR
	}
	errUn := unix.Unlinkat(dir, base, flags)
	if err != nil {
		return fail("open", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if errUn != nil {
		_ = f.Close()
		return fail("unlink", errUn)
	}
	return f, nil
}

func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// attributes gives the file its owner, mode and size; at the end, after its
// data, also its extended attributes and times, and its owner again, because
// writing clears set-id bits.
func (g *ghostFile) attributes(r *Restorer, end bool) error {
	p := fmt.Sprintf("/proc/self/fd/%d", g.file.Fd()) // the file may be O_PATH
	fail := func(op string, err error) error { return &os.PathError{Op: op, Path: g.file.Name(), Err: err} }
	if err := unix.Chown(p, int(g.msg.GetUid()), int(g.msg.GetGid())); err != nil {
		return fail("chown", err)
	}
	typ := g.msg.GetMode() & unix.S_IFMT
	if typ != unix.S_IFLNK {
		if err := unix.Chmod(p, g.msg.GetMode()&0o7777); err != nil {
			return fail("chmod", err)
		}
	}
	if typ == unix.S_IFREG && g.msg.Size != nil {
		if err := unix.Ftruncate(int(g.file.Fd()), int64(g.msg.GetSize())); err != nil {
			return fail("truncate", err)
		}
	}
	if !end {
		return nil
	}
	if g.facts != nil {
		for name, value := range g.facts.Xattrs {
			err := unix.Setxattr(p, name, value, 0)
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
				r.log.Warn("an extended attribute of a deleted file cannot be had here", "path", g.file.Name(), "name", name, "error", err)
			} else if err != nil {
				return fail("setxattr "+name, err)
			}
		}
	}
	times, ok := g.times()
	if !ok {
		return nil
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, times, 0); err != nil {
		return fail("set the times of", err)
	}
	return nil
}

// times are those of the last access and modification. The image has
// microseconds, the facts all of them.
func (g *ghostFile) times() ([]unix.Timespec, bool) {
	if g.facts != nil {
		return []unix.Timespec{unix.NsecToTimespec(g.facts.AtimeNS), unix.NsecToTimespec(g.facts.MtimeNS)}, true
	}
	if g.msg.Atim == nil || g.msg.Mtim == nil {
		return nil, false
	}
	return []unix.Timespec{
		{Sec: int64(g.msg.GetAtim().GetTvSec()), Nsec: int64(g.msg.GetAtim().GetTvUsec()%1e6) * 1000},
		{Sec: int64(g.msg.GetMtim().GetTvSec()), Nsec: int64(g.msg.GetMtim().GetTvUsec()%1e6) * 1000},
	}, true
}

func sealGhosts(r *Restorer, _ []*description) []error {
	var errs []error
	errs = append(errs, r.filled())
	for _, g := range r.named {
		errs = append(errs, g.finish(r))
	}
	for _, g := range r.ghosts {
		if g.file == nil || g.sealed || g.carried() {
			continue
		}
		errs = append(errs, g.attributes(r, true))
		if g.msg.GetMode()&unix.S_IFMT == unix.S_IFREG {
			// A file open for writing cannot become the executable of a process.
			errs = append(errs, g.file.Close())
			g.sealed = true
		}
	}
	return errs
}
