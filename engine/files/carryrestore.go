package files

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
)

// carried says whether the file keeps its name.
func (g *ghostFile) carried() bool { return g.facts != nil && g.facts.Named != nil }

func (g *ghostFile) typ() uint32 { return g.msg.GetMode() & unix.S_IFMT }

// loadCarried takes up a file that travels with its name.
func (r *Restorer) loadCarried(f *image.GhostFacts) error {
	g := r.ghosts[f.ID]
	if g == nil {
		msg, err := image.One[*ghost_file.GhostFileEntry](r.set, ghostImage(f.ID))
		if err != nil {
			return err
		}
		if err := checkGhost(msg, ghostImage(f.ID)); err != nil {
			return err
		}
		g = &ghostFile{msg: msg, loose: true}
		r.ghosts[f.ID] = g
	}
	g.facts = f
	var err error
	if g.at, err = r.spot(g, f.Named.Path); err != nil {
		return fmt.Errorf("%s: file %d: %w", image.FactsFile, f.ID, err)
	}
	if g.typ() != unix.S_IFREG && len(f.Named.Links) > 0 {
		return fmt.Errorf("%s: file %d has further names, but is no regular file", image.FactsFile, f.ID)
	}
	for _, l := range f.Named.Links {
		at, err := r.spot(g, l)
		if err != nil {
			return fmt.Errorf("%s: file %d: %w", image.FactsFile, f.ID, err)
		}
		g.links = append(g.links, at)
	}
	if f.Named.Early != 0 {
		if g.typ() != unix.S_IFREG || !f.Named.Replace {
			return fmt.Errorf("%s: file %d has content that came early, but is no file that is carried", image.FactsFile, f.ID)
		}
		if g.early, err = r.opts.Early.claim(f.Named.Early, f.Named.Path); err != nil {
			return fmt.Errorf("%s: %w", image.FactsFile, err)
		}
	}
	r.named = append(r.named, g)
	return nil
}

// spot is a directory: base, or rel below it, to where no symlink may lead.
type spot struct{ base, rel string }

func (s spot) open() (*os.File, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY
	f, err := openPath(s.base, flags, 0)
	if err != nil || s.rel == "" || s.rel == "." {
		return f, err
	}
	defer func() { _ = f.Close() }()
	how := &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(f.Fd()), s.rel, how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(s.base, s.rel), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(s.base, s.rel)), nil
}

// spot finds out where a carried file goes, which the caller must have allowed.
func (r *Restorer) spot(g *ghostFile, path string) (spot, error) {
	if err := checkName(path); err != nil {
		return spot{}, err
	}
	if !g.facts.Named.Replace && g.typ() == unix.S_IFREG && filepath.Clean(path) == path && strings.HasPrefix(path, shmDir+"/") {
		return spot{base: filepath.Dir(path)}, nil
	}
	at, place, err := spotOf(r.opts.Carry, g.typ(), path)
	g.place = place
	return at, err
}

// spotOf finds out where a file of a type goes, and which of the places allows it.
func spotOf(places []plan.Place, typ uint32, path string) (spot, *plan.Place, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return spot{}, nil, fmt.Errorf("%q is no path of a file", path)
	}
	here := spot{base: filepath.Dir(path)}
	for i := range places {
		p := &places[i]
		switch {
		case path == p.Path && p.Dir == (typ == unix.S_IFDIR):
		case typ == unix.S_IFDIR && strings.HasPrefix(p.Path, path+"/"): // a directory on the way
		case p.Dir && strings.HasPrefix(path, strings.TrimSuffix(p.Path, "/")+"/"):
			rel, err := filepath.Rel(p.Path, filepath.Dir(path))
			return spot{base: p.Path, rel: rel}, p, err
		default:
			continue
		}
		return here, p, nil
	}
	return spot{}, nil, fmt.Errorf("%s comes with the tree, but is not among the files that were agreed on", path)
}

// makeCarried makes all that travelled with the tree, but for the content.
func (r *Restorer) makeCarried() error {
	if err := r.opts.Early.drop(); err != nil {
		return err
	}
	if err := r.noteCarried(); err != nil {
		return err
	}
	var errs []error
	for _, g := range r.named {
		if g.loose && g.typ() == unix.S_IFREG {
			continue // when its content comes
		}
		err := g.make(r)
		if err == nil && g.loose {
			err = g.finish(r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("make %s: %w", g.facts.Named.Path, err))
		}
	}
	return list("make the files that travel with the tree", errs)
}

// noteCarried tells of what is going to be made in its place.
func (r *Restorer) noteCarried() error {
	if r.opts.Note == nil {
		return nil
	}
	var paths []string
	for _, g := range r.named {
		if t := g.typ(); t == unix.S_IFREG || t == unix.S_IFLNK {
			continue
		}
		if dir, err := g.at.open(); err == nil {
			there, err := present(int(dir.Fd()), filepath.Base(g.facts.Named.Path), g.typ())
			_ = dir.Close()
			if there || err != nil {
				continue // which its making finds, too
			}
		}
		paths = append(paths, g.facts.Named.Path)
	}
	if len(paths) == 0 {
		return nil
	}
	return r.opts.Note(paths)
}

// make makes a carried file: directories and fifos in their places, everything
// else beside it, under a name of its own.
func (g *ghostFile) make(r *Restorer) error {
	if g.file != nil || g.sealed {
		return nil
	}
	dir, err := g.at.open()
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	name := filepath.Base(g.facts.Named.Path)
	c := &carriedFile{at: g.at, name: name, temp: TempName(r.opts.Mark), typ: g.typ(), replace: g.facts.Named.Replace}
	fd, flags := int(dir.Fd()), unix.O_PATH
	switch g.typ() {
	case unix.S_IFREG:
		flags = unix.O_RDWR
		if g.early != nil {
			err = r.opts.Early.take(g.early, fd, c.temp)
		} else {
			err = mknodAt(fd, c.temp, unix.S_IFREG|0o600)
		}
	case unix.S_IFLNK:
		err = unix.Symlinkat(g.msg.GetSymlnkTarget(), fd, c.temp)
	default:
		var there bool
		if there, err = present(fd, name, g.typ()); there {
			if flags |= unix.O_NOFOLLOW; g.typ() == unix.S_IFDIR {
				flags = unix.O_PATH | unix.O_DIRECTORY
			}
			n, err := unix.Openat(fd, name, flags|unix.O_CLOEXEC, 0)
			if err == nil {
				g.file = os.NewFile(uintptr(n), g.facts.Named.Path)
			}
			return err
		}
		if err == nil && g.typ() == unix.S_IFDIR {
			err = unix.Mkdirat(fd, name, 0o700)
		} else if err == nil {
			err = mknodAt(fd, name, g.typ()|0o600)
		}
		c.temp, c.placed = name, true
	}
	if err != nil {
		return noRoom(err)
	}
	r.carried.all = append(r.carried.all, c)
	n, err := unix.Openat(fd, c.temp, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	g.file = os.NewFile(uintptr(n), g.facts.Named.Path)
	g.temp = c
	for i, at := range g.links {
		if err := g.link(r, fd, at, filepath.Base(g.facts.Named.Links[i])); err != nil {
			return err
		}
	}
	return noRoom(g.attributes(r, false))
}

// link gives a file one more name, beside its place; dir is where the first is.
func (g *ghostFile) link(r *Restorer, dir int, at spot, name string) error {
	c := &carriedFile{at: at, name: name, temp: TempName(r.opts.Mark), typ: unix.S_IFREG, replace: g.temp.replace}
	err := c.in(func(fd int) error { return unix.Linkat(dir, g.temp.temp, fd, c.temp, 0) })
	if err != nil {
		return fmt.Errorf("link %s: %w", c.path(), err)
	}
	r.carried.all = append(r.carried.all, c)
	return nil
}

func mknodAt(dir int, name string, mode uint32) error {
	return unix.Mknodat(dir, name, mode, 0)
}

// present says whether something of a type is at a name; something else is an error.
func present(dir int, name string, typ uint32) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, err
	case st.Mode&unix.S_IFMT != typ:
		if typ == unix.S_IFDIR && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return true, nil // to a directory: whatever needs one finds out
		}
		return false, fmt.Errorf("a %s is in its place, expected a %s", modeKind(st.Mode), modeKind(typ))
	}
	return true, nil
}

// noRoom says what ENOSPC means.
func noRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("the file system here is full: %w", err)
	}
	return err
}

// fill takes in that a piece of a carried file is about to be written, and gives
// the file to write it to.
func (r *Restorer) fill(id image.DataID, off uint64, b []byte) (*os.File, error) {
	g := r.ghosts[id.ID]
	if err := r.fillNext(g); err != nil {
		return nil, err
	}
	if end := off + uint64(len(b)); end < off || end > g.msg.GetSize() {
		return nil, fmt.Errorf("images hold data of %s behind its end", g.facts.Named.Path)
	}
	if g.early != nil {
		if err := r.opts.Early.charge(g.early, off, len(b)); err != nil {
			return nil, err
		}
	} else if p := g.place; p != nil {
		if r.spent[p] += uint64(len(b)); r.spent[p] > p.Limit {
			return nil, fmt.Errorf("what comes for %s has more than the limit of %d bytes", p.Path, p.Limit)
		}
	}
	g.sum.add(off, b)
	return g.file, nil
}

// fillNext takes in that content of a file comes, and no more of the one before.
func (r *Restorer) fillNext(g *ghostFile) error {
	if r.filling != g {
		if err := r.filled(); err != nil {
			return err
		}
		r.filling = g
	}
	if err := g.make(r); err != nil {
		return fmt.Errorf("make %s: %w", g.facts.Named.Path, err)
	}
	return nil
}

// filled ends the file whose content came last, if nobody has it open.
func (r *Restorer) filled() error {
	g := r.filling
	r.filling = nil
	if g == nil || !g.loose {
		return nil
	}
	return g.finish(r)
}

// finish gives a carried file what comes after its content, and looks at what it
// is to replace.
func (g *ghostFile) finish(r *Restorer) error {
	if g.sealed {
		return nil
	}
	err := g.make(r)
	if err == nil && g.temp != nil { // else it was there
		err = g.attributes(r, true)
		g.temp.times, _ = g.times()
	}
	if err == nil && g.typ() == unix.S_IFREG {
		err = g.meet()
	}
	if err != nil {
		return fmt.Errorf("finish %s: %w", g.facts.Named.Path, noRoom(err))
	}
	if g.typ() == unix.S_IFREG || g.loose {
		g.sealed = true
		return g.file.Close()
	}
	return nil
}

// meet compares a file with what it is to replace: what is newer stays, unless
// that may be overwritten, and what is the same, too.
func (g *ghostFile) meet() error {
	if !g.facts.Named.Replace {
		return nil
	}
	dir, err := g.at.open()
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	there, err := present(int(dir.Fd()), g.temp.name, unix.S_IFREG)
	if err != nil || !there {
		return err
	}
	fd, err := unix.Openat(int(dir.Fd()), g.temp.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	old := os.NewFile(uintptr(fd), g.facts.Named.Path)
	defer func() { _ = old.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	newer := !g.place.Overwrite && st.Mtim.Nano() > g.facts.MtimeNS
	same := g.early.knows(&st, g.msg.GetSize())
	if !same && uint64(st.Size) == g.msg.GetSize() && (newer || g.early == nil) { // else it is replaced, which needs no reading
		a, aerr := ContentDigest(old)
		b, berr := ContentDigest(g.file)
		if err := errors.Join(aerr, berr); err != nil {
			return err
		}
		same = a == b
	}
	switch {
	case same && g.loose && len(g.links) == 0:
		g.temp.keep = true
	case !same && newer:
		return errNewer
	}
	return nil
}

// CheckSum compares the digest of what came of a file with that of what was sent.
func (r *Restorer) CheckSum(id uint32, sum []byte) error {
	g := r.ghosts[id]
	if g == nil || !g.carried() {
		return fmt.Errorf("images hold the digest of file %d, which does not travel", id)
	}
	if got := g.sum.total(); !bytes.Equal(got, sum) {
		return fmt.Errorf("%s arrived with another content than it was sent with", g.facts.Named.Path)
	}
	return nil
}

// digest is a SHA-256 of a file's data, of where they are, not of its holes. In
// how many pieces data comes makes no difference.
type digest struct {
	h    hash.Hash
	next uint64
}

func (d *digest) add(off uint64, b []byte) {
	if d.h == nil {
		d.h = sha256.New()
		d.next = ^uint64(0)
	}
	if off != d.next {
		d.h.Write(binary.LittleEndian.AppendUint64(nil, off))
	}
	d.h.Write(b)
	d.next = off + uint64(len(b))
}

func (d *digest) total() []byte {
	if d.h == nil {
		d.h = sha256.New()
	}
	return d.h.Sum(nil)
}

// Summed is a sink that follows each file with its digest.
type Summed struct {
	image.Sink
	sum  digest
	some bool // something was given
}

// Data implements image.Sink.
func (s *Summed) Data(id image.DataID, off uint64, p []byte) error {
	s.some = true
	if id.Kind != image.Cut {
		s.sum.add(off, p)
	}
	return s.Sink.Data(id, off, p)
}

// End sends the digest of the ghost id.
func (s *Summed) End(id uint32) error {
	return s.Sink.Data(image.DataID{Kind: image.Digest, ID: id}, 0, s.sum.total())
}

// Carried are the files that were made for a tree, beside their places until it
// is let go. Either Close or Remove ends them.
type Carried struct{ all []*carriedFile }

type carriedFile struct {
	at         spot
	temp, name string
	typ        uint32
	replace    bool // what is at name
	keep       bool // what is at name, which is the same
	placed     bool
	replaced   bool // and what was there is at temp
	times      []unix.Timespec
}

// TakeCarried gives the files that have to be placed before the tree runs.
func (r *Restorer) TakeCarried() *Carried {
	c := r.carried
	r.carried = Carried{}
	return &c
}

// Place gives the files their names. What they replace is kept beside them until
// Close. It may be called on nil.
func (c *Carried) Place() error {
	if c == nil {
		return nil
	}
	for _, x := range c.all {
		if x.placed || x.keep {
			continue
		}
		if err := x.in(x.place); err != nil {
			return &os.PathError{Op: "place", Path: x.path(), Err: err}
		}
	}
	for _, x := range c.all {
		if x.typ != unix.S_IFDIR || x.times == nil {
			continue // what is put into a directory changes its times
		}
		if err := x.in(func(dir int) error { return unix.UtimesNanoAt(dir, x.name, x.times, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
			return &os.PathError{Op: "set the times of", Path: x.path(), Err: err}
		}
	}
	return nil
}

func (x *carriedFile) path() string { return filepath.Join(x.at.base, x.at.rel, x.name) }

// in calls f with the directory of x.
func (x *carriedFile) in(f func(dir int) error) error {
	dir, err := x.at.open()
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return f(int(dir.Fd()))
}

func (x *carriedFile) place(dir int) error {
	if x.replace {
		if _, err := present(dir, x.name, x.typ); err != nil {
			return err
		}
		err := unix.Renameat2(dir, x.temp, dir, x.name, unix.RENAME_EXCHANGE)
		if err == nil {
			x.placed, x.replaced = true, true
			return nil
		}
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	err := unix.Renameat2(dir, x.temp, dir, x.name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: another program has made it meanwhile", err)
	}
	x.placed = err == nil
	return err
}

// Remove removes the files; what they replaced is there again. It may be called
// twice, and on nil.
func (c *Carried) Remove() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, x := range slices.Backward(c.all) {
		errs = append(errs, x.fail("remove", x.in(x.remove)))
	}
	c.all = nil
	return errors.Join(errs...)
}

func (x *carriedFile) remove(dir int) error {
	name, flags := x.temp, 0
	switch {
	case x.replaced:
		if err := unix.Renameat2(dir, x.temp, dir, x.name, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
	case x.placed:
		name = x.name
	}
	if x.typ == unix.S_IFDIR {
		flags = unix.AT_REMOVEDIR
	}
	err := unix.Unlinkat(dir, name, flags)
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil // others use it already
	}
	return err
}

func (x *carriedFile) fail(op string, err error) error {
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: op, Path: x.path(), Err: err}
}

// Close leaves the files where they are, and removes what they replaced. It may
// be called twice, and on nil.
func (c *Carried) Close() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, x := range c.all {
		if x.replaced || x.keep {
			errs = append(errs, x.fail("unlink", x.in(func(dir int) error { return unix.Unlinkat(dir, x.temp, 0) })))
		}
	}
	c.all = nil
	return errors.Join(errs...)
}

// checkPlaces validates what the caller allows to be made.
func checkPlaces(ps []plan.Place) error {
	for i := range ps {
		p := &ps[i]
		if p.Limit == 0 {
			p.Limit = plan.DefaultCarryLimit
		}
		if err := checkName(p.Path); err != nil {
			return err
		}
		if filepath.Clean(p.Path) != p.Path {
			return fmt.Errorf("%q is no plain path", p.Path)
		}
	}
	return nil
}
