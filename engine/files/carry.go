package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// kindCarried carries regular files with their names and content: on another
// host nothing is at their path. In images they are deleted files, of which the
// facts tell that they keep their name.
var kindCarried = &kind{
	name: "POSIX shared memory with a name (shm_open)", note: "in a migration its file moves with the tree if nobody else has it, otherwise it is a regular file",
	typ:   fdinfo.FdTypes_REG,
	takes: func(d *Dumper, o *object) bool { return d.opts.Elsewhere && d.isShm(o) },
	dump:  dumpShm,
	has: func(r *Restorer, x *description) bool {
		g := r.ghosts[r.remaps[x.id]]
		return g != nil && g.carried()
	},
	check: checkRegular,
	open:  openEach(openGhost),
	seal:  sealGhosts,
}

// shmDir is where shm_open(3) and sem_open(3) have their files.
const shmDir = "/dev/shm"

// isShm says whether o is a file of shm_open(3) that has its name.
func (d *Dumper) isShm(o *object) bool {
	if o.ext || o.mode()&unix.S_IFMT != unix.S_IFREG || !strings.HasPrefix(o.linkPath(), shmDir+"/") || d.rootOf(o) != "" {
		return false
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(int(o.file.Fd()), &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
		return false
	}
	path, at := d.locate(o)
	return at == atPath && strings.HasPrefix(path, shmDir+"/")
}

func dumpShm(d *Dumper, o *object) error {
	path, _ := d.locate(o)
	if o.stat.Nlink > 1 {
		d.refuse(o, fmt.Sprintf("it is shared memory with %d names, of which one only can move with the tree", o.stat.Nlink), "remove the others")
		return nil
	}
	who, found, err := d.holder(inode(&o.stat))
	if err != nil {
		return err
	}
	if found {
		d.refuse(o, fmt.Sprintf("it is shared memory that pid %d (%s) outside the tree has %s, too", who.pid, who.comm, who.how()), "end that process, or move it along")
		return nil
	}
	return d.carry(o, path, false)
}

// carry lets o, of which path is the name, travel with its content. replace says
// that it may take the place of another file.
func (d *Dumper) carry(o *object, path string, replace bool) error {
	o.noteHint()
	o.path, o.create = path, !replace
	o.entries = append(o.entries, d.regEntry(o, o.id, path))
	if err := d.addGhost(o, o.id); err != nil {
		return err
	}
	if g := d.ghosts[inode(&o.stat)]; g != nil {
		g.facts.Named = &image.NamedFacts{Path: path, Replace: replace}
	}
	return nil
}

// how says in which way a file is held.
func (x outsider) how() string {
	if x.fd < 0 {
		return "mapped"
	}
	return fmt.Sprintf("open as fd %d", x.fd)
}

// holder finds a process outside the tree that has a file open or mapped.
func (d *Dumper) holder(id inodeID) (outsider, bool, error) {
	if d.holders == nil {
		want := map[inodeID]bool{}
		for _, o := range d.objects {
			if o.file != nil && d.isShm(o) {
				want[inode(&o.stat)] = true
			}
		}
		var err error
		if d.holders, err = findHolders(want, func(pid int) bool { return d.inside[pid] || d.dry() && d.descends(pid) }); err != nil {
			return outsider{}, false, err
		}
	}
	x, ok := d.holders[id]
	return x, ok, nil
}

// findHolders finds for each of some files another process that has it open or
// mapped, except those that skip names.
func findHolders(want map[inodeID]bool, skip func(pid int) bool) (map[inodeID]outsider, error) {
	out := map[inodeID]outsider{}
	pids, err := procfs.Pids()
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	for _, pid := range pids {
		if pid == self || skip(pid) { // this process has files of trees only to dump them
			continue
		}
		comm, _ := procfs.Comm(pid)
		found := func(id inodeID, fd int) {
			if _, ok := out[id]; !ok && want[id] {
				out[id] = outsider{pid: pid, comm: comm, fd: fd}
			}
		}
		if fds, err := procfs.Fds(pid); err == nil { // else it has ended
			for _, fd := range fds {
				if link, err := procfs.FdLink(pid, fd); err != nil || !strings.HasPrefix(link, "/") {
					continue
				}
				var st unix.Stat_t
				if unix.Stat(procfs.Path(pid, "fd", strconv.Itoa(fd)), &st) == nil {
					found(inode(&st), fd)
				}
			}
		}
		maps, err := procfs.ReadMaps(pid)
		if err != nil {
			continue
		}
		for _, m := range maps {
			found(inodeID{unix.Mkdev(m.Major, m.Minor), m.Inode}, -1)
		}
	}
	return out, nil
}

// Moved is a file that left this host with its tree.
type Moved struct {
	Path     string
	Dev, Ino uint64
}

// MovedFiles lists, after Finish, the files that are this tree's alone and have
// no use where it has left.
func (d *Dumper) MovedFiles() []Moved {
	var out []Moved
	for _, g := range d.sortedGhosts() {
		if n := g.facts.Named; n != nil && !n.Replace {
			out = append(out, Moved{Path: n.Path, Dev: g.dev, Ino: g.msg.GetIno()})
		}
	}
	return out
}

// RemoveMoved removes the files, as long as nobody has them and they are at
// their paths. It tells of each that stays.
func RemoveMoved(fs []Moved) error {
	if len(fs) == 0 {
		return nil
	}
	want := map[inodeID]bool{}
	for _, f := range fs {
		want[inodeID{f.Dev, f.Ino}] = true
	}
	holders, err := findHolders(want, func(int) bool { return false })
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range fs {
		var st unix.Stat_t
		if unix.Lstat(f.Path, &st) != nil || uint64(st.Dev) != f.Dev || st.Ino != f.Ino {
			continue
		}
		if x, ok := holders[inodeID{f.Dev, f.Ino}]; ok {
			errs = append(errs, fmt.Errorf("%s stays on this host: pid %d (%s) has it %s", f.Path, x.pid, x.comm, x.how()))
			continue
		}
		if err := unix.Unlink(f.Path); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "unlink", Path: f.Path, Err: err})
		}
	}
	return errors.Join(errs...)
}

// carried says whether the file keeps its name.
func (g *ghostFile) carried() bool { return g.facts != nil && g.facts.Named != nil }

// checkNamed validates what the facts tell of a carried file.
func (g *ghostFile) checkNamed() error {
	n := g.facts.Named
	if n == nil {
		return nil
	}
	if err := checkName(n.Path); err != nil {
		return err
	}
	if filepath.Clean(n.Path) != n.Path || n.Path == "/" {
		return fmt.Errorf("%q is no path of a file", n.Path)
	}
	if g.msg.GetMode()&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%s has mode %#o, which is no regular file's", n.Path, g.msg.GetMode())
	}
	return nil
}

// createNamed makes a carried file beside its place, under a name of its own.
func (g *ghostFile) createNamed(r *Restorer) error {
	n := g.facts.Named
	dir, err := r.opts.Open(filepath.Dir(n.Path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make %s: %w", n.Path, err)
	}
	temp := ".godwit-" + randomName()
	fd, err := unix.Openat(int(dir.Fd()), temp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		_ = dir.Close()
		return fmt.Errorf("make %s: %w", n.Path, &os.PathError{Op: "create", Path: temp, Err: err})
	}
	g.file = os.NewFile(uintptr(fd), n.Path)
	c := carriedFile{dir: dir, temp: temp, name: filepath.Base(n.Path), replace: n.Replace}
	r.carried.all = append(r.carried.all, &c)
	return g.attributes(r, false)
}

// Carried are the files that were made for a tree, beside their places until it
// is let go. Either Commit or Remove ends them.
type Carried struct{ all []*carriedFile }

type carriedFile struct {
	dir        *os.File // O_PATH
	temp, name string
	replace    bool // what is at name
	placed     bool
	replaced   bool // and what was there is at temp
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
		if err := x.place(); err != nil {
			return &os.PathError{Op: "place", Path: filepath.Join(x.dir.Name(), x.name), Err: err}
		}
	}
	return nil
}

func (x *carriedFile) place() error {
	fd := int(x.dir.Fd())
	if x.replace {
		err := unix.Renameat2(fd, x.temp, fd, x.name, unix.RENAME_EXCHANGE)
		if err == nil {
			x.placed, x.replaced = true, true
			return nil
		}
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	err := unix.Renameat2(fd, x.temp, fd, x.name, unix.RENAME_NOREPLACE)
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
	for _, x := range c.all {
		fd, name := int(x.dir.Fd()), x.temp
		switch {
		case x.replaced:
			errs = append(errs, c.fail("put back", x.name, unix.Renameat2(fd, x.temp, fd, x.name, unix.RENAME_EXCHANGE)))
		case x.placed:
			name = x.name
		}
		errs = append(errs, c.fail("unlink", name, unix.Unlinkat(fd, name, 0)))
		_ = x.dir.Close()
	}
	c.all = nil
	return errors.Join(errs...)
}

func (c *Carried) fail(op, name string, err error) error {
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: op, Path: name, Err: err}
}

// Close leaves the files where they are, and removes what they replaced. It may
// be called twice, and on nil.
func (c *Carried) Close() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, x := range c.all {
		if x.replaced {
			errs = append(errs, c.fail("unlink", x.temp, unix.Unlinkat(int(x.dir.Fd()), x.temp, 0)))
		}
		_ = x.dir.Close()
	}
	c.all = nil
	return errors.Join(errs...)
}
