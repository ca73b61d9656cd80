package files

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/refuse"
)

// maxCarried bounds how many files of directories travel with a tree: their
// entries are in the memory of both hosts.
const maxCarried = 50_000

// wish is one element of Options.Carry.
type wish struct {
	plan.Carry
	keys []Key
}

// takeWishes takes up Options.Carry.
func (d *Dumper) takeWishes(all []plan.Carry) {
	for _, c := range all {
		w := &wish{Carry: c}
		if w.Limit == 0 {
			w.Limit = plan.DefaultCarryLimit
		}
		var err error
		switch {
		case c.Dir != "":
			if err = checkName(c.Dir); err == nil && filepath.Clean(c.Dir) != c.Dir {
				err = fmt.Errorf("%q is no plain path of a directory", c.Dir)
			}
		default:
			w.keys, err = ParseKey(c.Key)
		}
		if err != nil {
			d.refusal.Add(refuse.Problem{Key: c.Key, Path: c.Dir, Reason: err.Error()})
			continue
		}
		d.wishes = append(d.wishes, w)
	}
}

// matchWishes finds the objects that are to travel with their content. Those
// that are external do not: that was said of them, too.
func (d *Dumper) matchWishes() {
	dirs := map[string]*wish{}
	for _, w := range d.wishes {
		if w.Dir != "" {
			dirs[w.Dir] = w
			continue
		}
		found := false
		for _, o := range d.objects {
			if !o.hasKey || !slices.Contains(w.keys, o.key) {
				continue
			}
			found = true
			switch o.mode() & unix.S_IFMT {
			case unix.S_IFDIR:
				dirs[o.linkPath()] = w
			case unix.S_IFREG:
			default:
				d.refuse(o, "it is a "+modeKind(o.mode())+", and only regular files and directories travel with their content", "choose another resolver for it")
			}
			o.wish = w
		}
		if !found {
			d.log.Info("a file that was to travel is no longer open", "key", w.Key)
		}
	}
	d.wishDirs = dirs
	for _, o := range d.objects {
		if o.wish == nil && !o.ext && strings.HasPrefix(o.link, "/") {
			d.wishBelow(o, dirs)
		}
	}
}

// wishLate lets a file that something watches travel, if that is wished of it or of
// the directory that it is in.
func (d *Dumper) wishLate(o *object) {
	if o.mode()&unix.S_IFMT == unix.S_IFREG {
		if i := slices.IndexFunc(d.wishes, func(w *wish) bool { return w.Dir == "" && slices.Contains(w.keys, o.key) }); i >= 0 {
			o.wish = d.wishes[i]
			return
		}
	}
	if strings.HasPrefix(o.link, "/") {
		d.wishBelow(o, d.wishDirs)
	}
}

// wishBelow lets what the tree has open in a directory that travels, travel as
// part of it.
func (d *Dumper) wishBelow(o *object, dirs map[string]*wish) {
	path := o.linkPath()
	for dir := path; dir != "/"; dir = filepath.Dir(dir) {
		w := dirs[dir]
		if w == nil {
			continue
		}
		switch o.mode() & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR:
			below := plan.Carry{Overwrite: w.Overwrite, Limit: w.Limit}
			if w.To != "" {
				below.To = filepath.Join(w.To, strings.TrimPrefix(path, dir))
			}
			o.wish = &wish{Carry: below}
		case unix.S_IFIFO:
			o.inTree = w.To == ""
		}
		return
	}
}

// mayCarry says whether o is a file that is to travel and can: a deleted one
// travels anyway.
func (d *Dumper) mayCarry(o *object) bool {
	if o.wish == nil || o.ext || o.mode()&unix.S_IFMT != unix.S_IFREG && o.mode()&unix.S_IFMT != unix.S_IFDIR {
		return false
	}
	if isProc, _, _, err := insideProc(o); err != nil || isProc {
		return false
	}
	_, at := d.locate(o)
	return at != gone
}

// dumpWished carries a file or directory with its content.
func (d *Dumper) dumpWished(o *object) error {
	path, at := d.locate(o)
	w := o.wish
	switch {
	case d.rootOf(o) != "":
		d.refuse(o, "it is to travel with its content, but is in a mount namespace of the tree's own", "leave it to its namespace")
		return nil
	case at == unlinked && o.mode()&unix.S_IFMT == unix.S_IFDIR:
		d.refuseLost(o)
		return nil
	case at == unlinked: // its other names stay with another file
		o.path, o.dirOnly = d.standingDir(o), true
		o.entries = append(o.entries, d.regEntry(o, o.id, o.linkPath()))
		return d.addGhost(o, o.id)
	case w.To != "":
		path = w.To
	default:
		if err := d.carryParents(path); err != nil {
			return err
		}
	}
	if o.mode()&unix.S_IFMT == unix.S_IFDIR {
		o.inTree = true
		return d.carry(o, path, true)
	}
	same, err := d.sameThere(o)
	switch used := uint64(o.stat.Blocks) * 512; {
	case err != nil:
		return err
	case same:
		d.kept[inode(&o.stat)] = path
		o.noteHint()
		o.path = path
		e := d.regEntry(o, o.id, path)
		if o.mapped() {
			st := &regularState{buildID: objectBuildID(o)}
			o.state, e.Reg.BuildId = st, buildIDWords(st.buildID)
		}
		o.entries = append(o.entries, e)
		return nil
	case used > w.Limit:
		d.refuse(o, fmt.Sprintf("it is to travel with its content of %d bytes, more than the limit of %d", used, w.Limit), "raise the limit (carry,limit=SIZE), or copy it there")
		return nil
	case w.Have != nil && !w.Overwrite && w.Have.MTimeNS > o.stat.Mtim.Nano():
		d.refuse(o, fmt.Sprintf("the file at the destination is newer, of %s against %s here, and has another content",
			time.Unix(0, w.Have.MTimeNS).UTC().Format(time.RFC3339), time.Unix(0, o.stat.Mtim.Nano()).UTC().Format(time.RFC3339)),
			"say that it may be replaced (carry,overwrite), or remove it there")
		return nil
	}
	o.carries = true
	if o.mapped() { // for plans; whoever carries it need not compare
		o.state = &regularState{buildID: objectBuildID(o)}
	}
	return d.carry(o, path, true)
}

// sameThere says whether the destination has the content of o already.
func (d *Dumper) sameThere(o *object) (bool, error) {
	h := o.wish.Have
	if h == nil || h.Size != uint64(o.stat.Size) || h.Digest == "" {
		return false, nil
	}
	sum, err := d.contentSum(o)
	return sum == h.Digest, err
}

// sums are the digests of files that were read, so that they need not be read
// while the tree is frozen.
var sums sync.Map // of version → string

// contentSum is the ContentDigest of o. What the tree may
// write is read each time: writes through mappings do not always show in times.
func (d *Dumper) contentSum(o *object) (string, error) {
	written := slices.ContainsFunc(d.objects, func(x *object) bool { return x.writable() && inode(&x.stat) == inode(&o.stat) })
	v := versionOf(&o.stat)
	if s, ok := sums.Load(v); ok && !written {
		return s.(string), nil
	}
	f, err := reopen(o.file, unix.O_RDONLY)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", o.link, err)
	}
	defer func() { _ = f.Close() }()
	sum, err := ContentDigest(f)
	if err == nil && !written && time.Since(time.Unix(0, o.stat.Ctim.Nano())) > time.Second { // a clock tick has passed
		sums.Store(v, sum)
	}
	return sum, err
}

// ContentDigest is a SHA-256, in hexadecimal, of the size of a file, and of its
// pages that are not zero with their offsets. It is the same for a file with holes
// and one with zeros in their place, and costs what is allocated.
func ContentDigest(f *os.File) (string, error) {
	own, err := reopen(f, unix.O_RDONLY) // a descriptor of its own: seeking moves nobody's position
	if err != nil {
		return "", err
	}
	defer func() { _ = own.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(own.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	h := sha256.New()
	h.Write(binary.LittleEndian.AppendUint64(nil, uint64(st.Size)))
	buf := make([]byte, 256<<10)
	for at := int64(0); at < st.Size; {
		data, err := dataFrom(own, at, st.Size)
		if err != nil {
			return "", err
		}
		if data < 0 {
			break
		}
		at = max(at, data&^(digestPage-1))
		n, err := own.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if n == 0 {
			break // it was truncated
		}
		for b := buf[:n]; len(b) > 0; {
			page := b[:min(len(b), digestPage)]
			if b = b[len(page):]; !zero(page) {
				h.Write(binary.LittleEndian.AppendUint64(nil, uint64(at)))
				h.Write(page)
			}
			at += int64(len(page))
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

const digestPage = 4096

func zero(p []byte) bool { return bytes.Count(p, []byte{0}) == len(p) }

// carryParents lets the directories above path travel, with their attributes, for
// those that a destination lacks.
func (d *Dumper) carryParents(path string) error {
	dir := filepath.Dir(path)
	if dir == "/" {
		return nil
	}
	if err := d.carryParents(dir); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	_, err := d.carryLoose(dir, dir, &st)
	return err
}

// carryLoose lets the file at path, which nobody needs to have open, travel to
// another path. It is nil for a file that travels already.
func (d *Dumper) carryLoose(path, to string, st *unix.Stat_t) (*ghost, error) {
	if g := d.ghosts[inode(st)]; g != nil {
		return nil, nil
	}
	flags := unix.O_PATH | unix.O_NOFOLLOW
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		flags = unix.O_PATH
	}
	f, err := openPath(path, flags, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	g, err := d.newGhost(f, st)
	if err != nil {
		return nil, err
	}
	g.facts.Named = &image.NamedFacts{Path: to, Replace: true}
	return g, nil
}

// carriedTree is a directory that travels with all that is in it.
type carriedTree struct {
	w        *wish
	dir, to  string
	files    int
	bytes    uint64
	dev      uint64
	own      map[inodeID]bool // socket files of the tree, which it makes itself
	refusals map[string]bool
}

// carryTrees lets what is in the directories that are to travel come along.
func (d *Dumper) carryTrees() error {
	var trees []*carriedTree
	for _, w := range d.wishes {
		if w.Dir != "" {
			trees = append(trees, &carriedTree{w: w, dir: w.Dir, to: cmp.Or(w.To, w.Dir)})
		}
	}
	for _, o := range d.objects {
		if o.inTree && !o.refused && o.mode()&unix.S_IFMT == unix.S_IFDIR {
			trees = append(trees, &carriedTree{w: o.wish, dir: o.linkPath(), to: o.path})
		}
	}
	slices.SortStableFunc(trees, func(a, b *carriedTree) int { return strings.Compare(a.dir, b.dir) })
	own := map[inodeID]bool{}
	for _, s := range d.SocketFiles() {
		own[inodeID{s.Dev, s.Ino}] = true
	}
	var done []*carriedTree
	for _, t := range trees {
		if slices.ContainsFunc(done, func(x *carriedTree) bool {
			return (x.dir == t.dir || strings.HasPrefix(t.dir, x.dir+"/")) && x.w.To == "" && t.w.To == ""
		}) {
			continue
		}
		done = append(done, t)
		t.own = own
		if err := d.carryTree(t); err != nil {
			return fmt.Errorf("carry the directory %s: %w", t.dir, err)
		}
	}
	return nil
}

func (d *Dumper) carryTree(t *carriedTree) error {
	var st unix.Stat_t
	if err := unix.Lstat(t.dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: t.dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || t.dir == "/" {
		d.refuseTree(t, t.dir, "it is to travel with all that is in it, but is no directory that can")
		return nil
	}
	t.dev = uint64(st.Dev)
	if t.w.To == "" {
		if err := d.carryParents(t.dir); err != nil {
			return err
		}
	}
	if err := d.carryBelow(t, t.dir, t.to, &st); err != nil {
		return err
	}
	switch {
	case t.files > maxCarried:
		d.tooMuch = true
		d.refuseTree(t, t.dir, fmt.Sprintf("it is to travel with all that is in it, which are more than %d files", maxCarried))
	case t.bytes > t.w.Limit:
		d.tooMuch = true
		d.refuseTree(t, t.dir, fmt.Sprintf("it is to travel with its content of %d bytes, more than the limit of %d", t.bytes, t.w.Limit))
	}
	d.trees = append(d.trees, plan.File{Path: t.to, Kind: "directory", Mode: st.Mode, Carried: true, Allocated: t.bytes})
	return nil
}

func (d *Dumper) refuseTree(t *carriedTree, path, reason string) {
	if len(t.refusals) >= 16 {
		return // enough to know
	}
	if t.refusals == nil {
		t.refusals = map[string]bool{}
	}
	t.refusals[path] = true
	d.refusal.Add(refuse.Problem{Path: path, Reason: reason, Hint: "narrow the rule, or raise its limit (carry,limit=SIZE)"})
}

// carryBelow carries a file and, if it is a directory, what is in it.
func (d *Dumper) carryBelow(t *carriedTree, path, to string, st *unix.Stat_t) error {
	t.files++
	if t.files > maxCarried || t.own[inode(st)] {
		return nil
	}
	typ := st.Mode & unix.S_IFMT
	switch {
	case uint64(st.Dev) != t.dev && (typ == unix.S_IFDIR || typ == unix.S_IFREG):
		d.refuseTree(t, path, "it is to travel with the directory that it is in, but another file system is mounted there")
		return nil
	case typ == unix.S_IFCHR, typ == unix.S_IFBLK:
		d.refuseTree(t, path, "it is to travel with the directory that it is in, but is a device")
		return nil
	}
	if d.kept[inode(st)] == to {
		return nil // it is at its place already
	}
	known := d.ghosts[inode(st)]
	if known != nil && typ == unix.S_IFREG && known.facts.Named != nil && known.facts.Named.Path != to {
		known.facts.Named.Links = append(known.facts.Named.Links, to)
	}
	g, err := d.carryLoose(path, to, st)
	if errors.Is(err, unix.ENOENT) {
		return nil // others may write there
	}
	if err != nil {
		return err
	}
	switch typ {
	case unix.S_IFREG:
		t.bytes += uint64(st.Blocks) * 512
		if g == nil {
			return nil
		}
		d.noteCarried(path, to, st)
		if !d.dry() {
			x := Data{ID: image.DataID{Kind: image.Ghost, ID: g.id}, Size: st.Size, Sum: true, path: path, ino: inode(st)}
			d.builds(g, &x, st)
			d.data = append(d.data, x)
		}
	case unix.S_IFDIR:
		return d.carryEntries(t, path, to)
	}
	return nil
}

func (d *Dumper) carryEntries(t *carriedTree, path, to string) error {
	es, err := os.ReadDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range es {
		p := filepath.Join(path, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			return &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if err := d.carryBelow(t, p, filepath.Join(to, e.Name()), &st); err != nil {
			return err
		}
	}
	return nil
}
