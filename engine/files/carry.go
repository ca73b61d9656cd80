package files

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
)

// kindCarried carries regular files and directories with their names and content:
// on another host something else may be at their path, or nothing. In images they
// are deleted files, of which the facts tell that they keep their name.
var kindCarried = &kind{
	name: "POSIX shared memory with a name (shm_open)", note: "in a migration its file moves with the tree if nobody else has it, otherwise it is a regular file",
	typ: fdinfo.FdTypes_REG,
	takes: func(d *Dumper, o *object) bool {
		return d.opts.Elsewhere && d.isShm(o) || d.mayCarry(o)
	},
	dump: func(d *Dumper, o *object) error {
		if d.opts.Elsewhere && d.isShm(o) {
			return d.dumpShm(o)
		}
		return d.dumpWished(o)
	},
	has: func(r *Restorer, x *description) bool {
		g := r.ghosts[r.remaps[x.id]]
		return g != nil && g.carried()
	},
	check: checkRegular,
	open:  openEach(openGhost),
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

func (d *Dumper) dumpShm(o *object) error {
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
	o.create = true
	return d.carry(o, path, false)
}

// carry lets o travel with its content, to path. replace says that it may take
// the place of another file.
func (d *Dumper) carry(o *object, path string, replace bool) error {
	o.noteHint()
	o.path = path
	o.entries = append(o.entries, d.regEntry(o, o.id, path))
	if err := d.addGhost(o, o.id); err != nil {
		return err
	}
	if g := d.ghosts[inode(&o.stat)]; g != nil {
		if g.facts.Named != nil {
			return nil
		}
		g.facts.Named = &image.NamedFacts{Path: path, Replace: replace}
		if !replace || o.mode()&unix.S_IFMT != unix.S_IFREG {
			return nil
		}
		from, _ := d.locate(o)
		d.noteCarried(from, path, &o.stat)
		for i := range d.data {
			if id := d.data[i].ID; id.Kind == image.Ghost && id.ID == g.id {
				d.data[i].Sum = true
				d.builds(g, &d.data[i], &o.stat)
			}
		}
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
