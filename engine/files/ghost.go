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
)

// kindGhost carries regular files and directories without a name: deleted while
// open, or made with O_TMPFILE. Their data travels.
var kindGhost = &kind{
	name: "deleted file", typ: fdinfo.FdTypes_REG,
	takes: func(d *Dumper, o *object) bool {
		if !strings.HasPrefix(o.link, "/") || o.ext || pseudo(o) {
			return false
		}
		switch o.mode() & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR:
		default:
			return false
		}
		if _, at := d.locate(o); at != gone {
			return false
		}
		isProc, _, _, err := insideProc(o)
		return err == nil && !isProc
	},
	dump:  dumpGhost,
	has:   func(r *Restorer, x *description) bool { return r.remaps[x.id] != 0 },
	check: checkRegular,
	open:  openEach(openGhost),
	seal:  sealGhosts,
}

// ghost is a deleted file on its way.
type ghost struct {
	id    uint32
	msg   *ghost_file.GhostFileEntry
	users []uint32 // ids of the REG entries
}

func dumpGhost(d *Dumper, o *object) error {
	if o.mode()&unix.S_IFMT == unix.S_IFREG {
		if used := uint64(o.stat.Blocks) * 512; used > d.opts.GhostLimit {
			d.refuse(o, fmt.Sprintf("it is a deleted file of %d bytes, more than the limit of %d", used, d.opts.GhostLimit),
				"raise the limit (--ghost-limit), or declare the file external")
			return nil
		}
	}
	dir := filepath.Dir(o.linkPath())
	if st, err := os.Stat(d.rootOf(o) + dir); err != nil || !st.IsDir() {
		d.refuse(o, "the directory in which it was deleted is gone too", "make the directory "+dir+" again, or declare the file external")
		return nil
	}
	o.path = dir
	o.entries = append(o.entries, d.regEntry(o, o.id, o.linkPath()))
	return d.addGhost(o, o.id)
}

// addGhost makes the entry regID lead to a ghost with o's attributes and data.
func (d *Dumper) addGhost(o *object, regID uint32) error {
	k := inode(&o.stat)
	g, ok := d.ghosts[k]
	if !ok {
		g = &ghost{id: uint32(len(d.ghosts) + 1)}
		g.msg = &ghost_file.GhostFileEntry{
			Uid: proto.Uint32(o.stat.Uid), Gid: proto.Uint32(o.stat.Gid), Mode: proto.Uint32(o.mode()),
			Dev: proto.Uint32(uint32(o.stat.Dev)), Ino: proto.Uint64(o.stat.Ino),
			Atim: timevalOf(o.stat.Atim), Mtim: timevalOf(o.stat.Mtim),
		}
		if o.mode()&unix.S_IFMT == unix.S_IFREG {
			g.msg.Chunks = proto.Bool(true)
			g.msg.Size = proto.Uint64(uint64(o.stat.Size))
			if !d.dry() {
				if err := d.addData(o, image.DataID{Kind: image.Ghost, ID: g.id}); err != nil {
					return err
				}
			}
		}
		d.ghosts[k] = g
	}
	g.users = append(g.users, regID)
	return nil
}

func timevalOf(t unix.Timespec) *time.Timeval {
	return &time.Timeval{TvSec: proto.Uint64(uint64(t.Sec)), TvUsec: proto.Uint64(uint64(t.Nsec / 1000))}
}

func (d *Dumper) emitGhosts() error {
	gs := make([]*ghost, 0, len(d.ghosts))
	for _, g := range d.ghosts {
		gs = append(gs, g)
	}
	slices.SortFunc(gs, func(a, b *ghost) int { return int(a.id) - int(b.id) })
	for _, g := range gs {
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
	file   *os.File // open for writing if it is a regular file, until it is sealed
	sealed bool
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
		} else if m.GetRemapType() != remap_file_path.RemapType_GHOST {
			return fmt.Errorf("image %s: file %d is remapped by %s, only GHOST is carried", remapImage, m.GetOrigId(), m.GetRemapType())
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
			switch msg.GetMode() & unix.S_IFMT {
			case unix.S_IFREG, unix.S_IFDIR, unix.S_IFIFO:
			default:
				return fmt.Errorf("image %s: deleted files of mode %#o are not carried", ghostImage(id), msg.GetMode())
			}
			if msg.GetSize() > 1<<63-1 {
				return fmt.Errorf("image %s: size %d is out of range", ghostImage(id), msg.GetSize())
			}
			r.ghosts[id] = &ghostFile{msg: msg}
		}
		r.remaps[m.GetOrigId()] = id
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
	return setPosition(f, e.GetPos())
}

// create makes the deleted file: under its old name if that is free, for the
// sake of the link in /proc, and without one otherwise. A file of O_TMPFILE
// (whose name the kernel makes from its inode) can still be given a name, so it
// becomes one again.
func (g *ghostFile) create(r *Restorer, e *regfile.RegFileEntry) error {
	if g.file != nil {
		return nil
	}
	name := e.GetName()
	var err error
	switch g.msg.GetMode() & unix.S_IFMT {
	case unix.S_IFREG:
		tmp := strings.HasPrefix(filepath.Base(name), "#") && filepath.Base(name) == fmt.Sprintf("#%d", g.msg.GetIno())
		g.file, err = createRegular(r, name, tmp)
	default:
		g.file, err = createOther(r, name, g.msg.GetMode())
	}
	if err != nil {
		return fmt.Errorf("make the deleted file %s again: %w", name, err)
	}
	return g.attributes(false)
}

func createRegular(r *Restorer, name string, tmp bool) (*os.File, error) {
	if !tmp {
		f, err := r.opts.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return f, r.unlink(name, f)
		}
		if !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	dir := filepath.Dir(name)
	f, err := r.opts.Open(dir, unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return f, err
	}
	// Not every file system knows O_TMPFILE.
	name = filepath.Join(dir, ".godwit-"+randomName())
	f, err = r.opts.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return f, r.unlink(name, f)
}

// createOther makes a directory or fifo and removes its name at once.
func createOther(r *Restorer, name string, mode uint32) (*os.File, error) {
	dir, err := r.opts.Open(filepath.Dir(name), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	base := filepath.Base(name)
	isDir := mode&unix.S_IFMT == unix.S_IFDIR
	for try := 0; ; try++ {
		if isDir {
			err = unix.Mkdirat(int(dir.Fd()), base, 0o700)
		} else {
			err = unix.Mknodat(int(dir.Fd()), base, unix.S_IFIFO|0o600, 0)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || try > 0 {
			return nil, &os.PathError{Op: "make", Path: filepath.Join(dir.Name(), base), Err: err}
		}
		base = ".godwit-" + randomName()
	}
	fd, err := unix.Openat(int(dir.Fd()), base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	flags := 0
	if isDir {
		flags = unix.AT_REMOVEDIR
	}
	errUn := unix.Unlinkat(int(dir.Fd()), base, flags)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir.Name(), base), Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	if errUn != nil {
		_ = f.Close()
		return nil, &os.PathError{Op: "unlink", Path: filepath.Join(dir.Name(), base), Err: errUn}
	}
	return f, nil
}

func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// unlink removes the name under which f was just made, in f's own file system view.
func (r *Restorer) unlink(name string, f *os.File) error {
	dir, err := r.opts.Open(filepath.Dir(name), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	defer func() { _ = dir.Close() }()
	if err := unix.Unlinkat(int(dir.Fd()), filepath.Base(name), 0); err != nil {
		return errors.Join(&os.PathError{Op: "unlink", Path: name, Err: err}, f.Close())
	}
	return nil
}

// attributes gives the file its owner, mode and size; at the end, after its
// data, also its times, and its owner again, because writing clears set-id bits.
func (g *ghostFile) attributes(end bool) error {
	p := fmt.Sprintf("/proc/self/fd/%d", g.file.Fd()) // the file may be O_PATH
	if err := unix.Chown(p, int(g.msg.GetUid()), int(g.msg.GetGid())); err != nil {
		return &os.PathError{Op: "chown", Path: g.file.Name(), Err: err}
	}
	if err := unix.Chmod(p, g.msg.GetMode()&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: g.file.Name(), Err: err}
	}
	if g.msg.GetMode()&unix.S_IFMT == unix.S_IFREG && g.msg.Size != nil {
		if err := unix.Ftruncate(int(g.file.Fd()), int64(g.msg.GetSize())); err != nil {
			return &os.PathError{Op: "truncate", Path: g.file.Name(), Err: err}
		}
	}
	if !end || g.msg.Atim == nil || g.msg.Mtim == nil {
		return nil
	}
	times := []unix.Timespec{
		{Sec: int64(g.msg.GetAtim().GetTvSec()), Nsec: int64(g.msg.GetAtim().GetTvUsec()%1e6) * 1000},
		{Sec: int64(g.msg.GetMtim().GetTvSec()), Nsec: int64(g.msg.GetMtim().GetTvUsec()%1e6) * 1000},
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, times, 0); err != nil {
		return &os.PathError{Op: "set the times of", Path: g.file.Name(), Err: err}
	}
	return nil
}

func sealGhosts(r *Restorer, _ []*description) []error {
	var errs []error
	for _, g := range r.ghosts {
		if g.file == nil || g.sealed {
			continue
		}
		errs = append(errs, g.attributes(true))
		if g.msg.GetMode()&unix.S_IFMT == unix.S_IFREG {
			// A file open for writing cannot become the executable of a process.
			errs = append(errs, g.file.Close())
			g.sealed = true
		}
	}
	return errs
}
