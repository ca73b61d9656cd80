// Package cgroup owns the control groups of process trees: in which groups of
// every hierarchy, of version 1 and 2, tasks are, what is set in those groups, and
// putting rebuilt tasks back. It must not know how trees are dumped or rebuilt.
//
// Hierarchies are reached through mounts of this package's own, which nobody else
// sees, so that it does not matter where or whether they are mounted on the host.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Modes of --manage-cgroups, as criu(8) has them.
const (
	Ignore = "ignore" // groups are not looked at
	None   = "cg-none"
	Props  = "props"
	Soft   = "soft"
	Full   = "full"
	Strict = "strict"
)

// ParseMode checks a mode; the empty one is Ignore.
func ParseMode(s string) (string, error) {
	switch s {
	case "":
		return Ignore, nil
	case "none":
		return None, nil
	case Ignore, None, Props, Soft, Full, Strict:
		return s, nil
	}
	return "", fmt.Errorf("%q is no way to handle cgroups: there are %s", s, strings.Join([]string{None, Props, Soft, Full, Strict, Ignore}, ", "))
}

// Set is in which group of each hierarchy a task is: paths by the names of the
// hierarchies: their controllers, or "name=…", or nothing for version 2.
type Set map[string]string

// ReadSet reads where a task is.
func ReadSet(pid, tid int) (Set, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/cgroup", pid, tid))
	if err != nil {
		return nil, err
	}
	return parseSet(b)
}

func parseSet(b []byte) (Set, error) {
	s := Set{}
	for _, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			return nil, fmt.Errorf("line %q of a cgroup file", line)
		}
		s[f[1]] = f[2]
	}
	return s, nil
}

// names are the hierarchies, sorted.
func (s Set) names() []string {
	out := make([]string, 0, len(s))
	for n := range s {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

func (s Set) equal(o Set) bool {
	if len(s) != len(o) {
		return false
	}
	for n, p := range s {
		if o[n] != p {
			return false
		}
	}
	return true
}

// dir is where this process finds a group of a hierarchy.
func dir(root *os.File, group string) string {
	return fmt.Sprintf("/proc/self/fd/%d%s", root.Fd(), path.Clean("/"+group))
}

// settings are the files of a group that are carried, in the order in which they
// are set: what bounds what comes first.
var settings = []string{
	"cgroup.clone_children", "cgroup.type", "cpuset.cpus", "cpuset.mems", "cpuset.cpus.partition", "cpuset.cpu_exclusive", "cpuset.mem_exclusive",
	"cgroup.max.depth", "cgroup.max.descendants", "cgroup.subtree_control",
	"memory.min", "memory.low", "memory.high", "memory.max", "memory.swap.max", "memory.swap.high", "memory.zswap.max", "memory.oom.group",
	"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.swappiness",
	"cpu.weight", "cpu.max", "cpu.max.burst", "cpu.idle", "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.cfs_burst_us",
	"pids.max", "io.weight", "io.max", "blkio.weight", "notify_on_release", "net_cls.classid", "net_prio.ifpriomap",
}

// Collector gathers the groups of a tree.
type Collector struct {
	sets []Set
}

// Add notes where a task is and gives the number of its set.
func (c *Collector) Add(pid, tid int, o DumpOptions) (uint32, error) {
	s, err := ReadSet(pid, tid)
	if err != nil {
		return 0, err
	}
	maps.DeleteFunc(s, func(name, _ string) bool { return !o.dumps(name) })
	i := slices.IndexFunc(c.sets, s.equal)
	if i < 0 {
		i = len(c.sets)
		c.sets = append(c.sets, s)
	}
	return uint32(i + 1), nil
}

// Image gives all sets, and the groups below that of the root, the first that was
// added, with what is set in them.
func (c *Collector) Image(o DumpOptions) (*cgroup.CgroupEntry, error) {
	if len(c.sets[0]) == 0 {
		return nil, fmt.Errorf("the tree is in no hierarchy that is to be recorded (--cgroup-dump-controller %s)", strings.Join(o.Controllers, ", "))
	}
	out := &cgroup.CgroupEntry{}
	for i, s := range c.sets {
		e := &cgroup.CgSetEntry{Id: proto.Uint32(uint32(i + 1))}
		for _, n := range s.names() {
			e.Ctls = append(e.Ctls, &cgroup.CgMemberEntry{Name: proto.String(n), Path: proto.String(s[n])})
		}
		out.Sets = append(out.Sets, e)
	}
	for _, n := range c.sets[0].names() {
		root, err := open(o.Yard, n)
		if err != nil {
			return nil, err
		}
		e := &cgroup.CgControllerEntry{Cnames: []string{n}}
		err = c.groups(e, root, n, o)
		if err := errors.Join(err, root.Close()); err != nil {
			return nil, err
		}
		out.Controllers = append(out.Controllers, e)
	}
	return out, nil
}

// groups adds the group of a hierarchy that the root task is in, or the one above it
// that is asked for, with all below it, unless that is the whole hierarchy. Others that tasks are in are not the
// tree's own: they have to be there.
func (c *Collector) groups(e *cgroup.CgControllerEntry, root *os.File, name string, o DumpOptions) error {
	p, err := o.top(name, c.sets[0][name])
	if err != nil || p == "/" {
		return err
	}
	g, err := readGroup(dir(root, p), strings.TrimPrefix(p, "/"), o.settings(name))
	if err != nil {
		return err
	}
	e.Dirs = append(e.Dirs, g)
	return nil
}

func readGroup(at, name string, settings []string) (*cgroup.CgroupDirEntry, error) {
	var st unix.Stat_t
	if err := unix.Stat(at, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	g := &cgroup.CgroupDirEntry{DirName: &name, DirPerms: perms(&st)}
	for _, s := range settings {
		b, err := os.ReadFile(at + "/" + s)
		if err != nil {
			continue // this hierarchy does not have it
		}
		if err := unix.Stat(at+"/"+s, &st); err != nil {
			return nil, &os.PathError{Op: "stat", Path: s, Err: err}
		}
		g.Properties = append(g.Properties, &cgroup.CgroupPropEntry{Name: proto.String(s), Value: proto.String(strings.TrimSuffix(string(b), "\n")), Perms: perms(&st)})
	}
	des, err := os.ReadDir(at)
	if err != nil {
		return nil, err
	}
	for _, de := range des {
		if !de.IsDir() {
			continue
		}
		sub, err := readGroup(at+"/"+de.Name(), de.Name(), settings)
		if err != nil {
			return nil, err
		}
		g.Children = append(g.Children, sub)
	}
	return g, nil
}

func perms(st *unix.Stat_t) *cgroup.CgroupPerms {
	return &cgroup.CgroupPerms{Mode: proto.Uint32(st.Mode), Uid: proto.Uint32(st.Uid), Gid: proto.Uint32(st.Gid)}
}

// Options say how groups are made.
type Options struct {
	Mode string
	// Roots are groups that take the place of the root task's, by hierarchy; that
	// of "*" is for all others.
	Roots map[string]string
	// Yard is as in DumpOptions.
	Yard string
}

// Restorer puts tasks into groups.
type Restorer struct {
	o     Options
	sets  map[uint32]Set
	root  Set // of the root task
	dirs  map[string][]*cgroup.CgroupDirEntry
	made  []string // groups, the deepest last
	roots map[string]*os.File
}

// New checks an image of groups, which is untrusted. root is the set of the root task.
func New(e *cgroup.CgroupEntry, root uint32, o Options) (*Restorer, error) {
	r := &Restorer{o: o, sets: map[uint32]Set{}, dirs: map[string][]*cgroup.CgroupDirEntry{}, roots: map[string]*os.File{}}
	for _, s := range e.GetSets() {
		set := Set{}
		for _, m := range s.GetCtls() {
			if err := checkPath(m.GetPath()); err != nil {
				return nil, err
			}
			set[m.GetName()] = m.GetPath()
		}
		r.sets[s.GetId()] = set
	}
	for _, c := range e.GetControllers() {
		if len(c.GetCnames()) > 0 {
			r.dirs[strings.Join(c.GetCnames(), ",")] = c.GetDirs()
		}
	}
	if r.root = r.sets[root]; r.root == nil {
		return nil, fmt.Errorf("images hold no cgroup set %d", root)
	}
	return r, nil
}

// checkPath refuses paths that lead out of a hierarchy.
func checkPath(p string) error {
	if strings.ContainsRune(p, 0) || len(p) >= unix.PathMax || slices.Contains(strings.Split(p, "/"), "..") {
		return fmt.Errorf("images hold the impossible cgroup %q", p)
	}
	return nil
}

// place is where a group of the images is made: those outside of the root task's
// stay where they are.
func (r *Restorer) place(name, group string) string {
	to, ok := r.o.Roots[name]
	if !ok {
		to, ok = r.o.Roots["*"]
	}
	old := path.Clean("/" + r.root[name])
	if d := r.dirs[name]; len(d) == 1 {
		old = path.Clean("/" + d[0].GetDirName()) // the topmost that was recorded
	}
	group = path.Clean("/" + group)
	rel, below := strings.CutPrefix(group, strings.TrimSuffix(old, "/")+"/")
	switch {
	case !ok, group != old && !below:
		return group
	case group == old:
		return path.Clean("/" + to)
	}
	return path.Join("/", to, rel)
}

// Make makes the groups, as the mode has it. After an error Undo removes what was made.
func (r *Restorer) Make() error {
	for name := range r.root {
		root, err := open(r.o.Yard, name)
		if err != nil {
			return err
		}
		r.roots[name] = root
		if to := r.place(name, r.root[name]); len(r.dirs[name]) == 0 && to != path.Clean(r.root[name]) && r.o.Mode != None && r.o.Mode != Props {
			if err := r.mkdir(name, to); err != nil {
				return fmt.Errorf("cgroup hierarchy %q: %w", name, err)
			}
		}
		for _, d := range r.dirs[name] {
			if err := r.group(name, "", d); err != nil {
				return fmt.Errorf("cgroup hierarchy %q: %w", name, err)
			}
		}
	}
	return nil
}

// group makes one group and those below it.
func (r *Restorer) group(name, above string, d *cgroup.CgroupDirEntry) error {
	p := path.Join("/", above, d.GetDirName())
	if err := checkPath(d.GetDirName()); err != nil {
		return err
	}
	at := dir(r.roots[name], r.place(name, p))
	_, err := os.Stat(at)
	isNew := errors.Is(err, fs.ErrNotExist)
	switch {
	case err != nil && !isNew:
		return err
	case isNew && (r.o.Mode == None || r.o.Mode == Props):
		return fmt.Errorf("the cgroup %s does not exist; make it, or choose another way (--manage-cgroups soft)", r.place(name, p))
	case !isNew && r.o.Mode == Strict:
		return fmt.Errorf("the cgroup %s exists already; remove it, or choose another way (--manage-cgroups soft)", r.place(name, p))
	case isNew:
		if err := r.mkdir(name, r.place(name, p)); err != nil {
			return err
		}
	}
	if r.o.Mode == Full || r.o.Mode == Strict || r.o.Mode == Props || r.o.Mode == Soft && isNew {
		if err := set(at, d.GetProperties()); err != nil {
			return err
		}
	}
	if isNew && d.GetDirPerms() != nil {
		q := d.GetDirPerms()
		if err := errors.Join(os.Lchown(at, int(q.GetUid()), int(q.GetGid())), unix.Chmod(at, q.GetMode()&0o777)); err != nil {
			return err
		}
	}
	for _, c := range d.GetChildren() {
		if err := r.group(name, p, c); err != nil {
			return err
		}
	}
	return nil
}

// mkdir makes a group and those above it. Those of cpusets are of no use before
// they have processors.
func (r *Restorer) mkdir(name, group string) error {
	var at string
	for _, part := range strings.Split(strings.Trim(group, "/"), "/") {
		at = path.Join("/", at, part)
		p := dir(r.roots[name], at)
		err := os.Mkdir(p, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("make the cgroup %s: %w", at, err)
		}
		r.made = append(r.made, p)
		if name == "cpuset" {
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				b, err := os.ReadFile(path.Dir(p) + "/" + f)
				if err == nil {
					err = os.WriteFile(p+"/"+f, b, 0)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// set writes what is set in a group, where it differs.
func set(at string, props []*cgroup.CgroupPropEntry) error {
	for _, p := range props {
		if !carriable(p.GetName()) {
			return fmt.Errorf("%q is no setting of a cgroup that is carried", p.GetName())
		}
		have, err := os.ReadFile(at + "/" + p.GetName())
		if err != nil {
			return err
		}
		value := p.GetValue()
		if strings.TrimSuffix(string(have), "\n") == value || value == "" {
			continue
		}
		switch p.GetName() {
		case "cgroup.subtree_control":
			value = "+" + strings.Join(strings.Fields(value), " +")
		case "cgroup.type":
			if value != "threaded" {
				continue // follows from the others
			}
		}
		for _, line := range strings.Split(value, "\n") {
			if err := os.WriteFile(at+"/"+p.GetName(), []byte(line), 0); err != nil {
				return fmt.Errorf("set %s to %q: %w", p.GetName(), line, err)
			}
		}
	}
	return nil
}

// Move puts a task into the groups of a set; leader says that it is a process,
// with all its threads.
func (r *Restorer) Move(tid int, id uint32, leader bool) error {
	s := r.sets[id]
	if s == nil {
		return fmt.Errorf("images hold no cgroup set %d", id)
	}
	for name, group := range s {
		root := r.roots[name]
		if root == nil {
			return fmt.Errorf("cgroup set %d is in the hierarchy %q, in which the root is not", id, name)
		}
		file := "cgroup.procs"
		switch {
		case !leader && name == "":
			file = "cgroup.threads"
		case !leader:
			file = "tasks"
		}
		f := dir(root, r.place(name, group)) + "/" + file
		if err := os.WriteFile(f, fmt.Appendf(nil, "%d", tid), 0); err != nil {
			return fmt.Errorf("put task %d into the cgroup %s of the hierarchy %q: %w", tid, r.place(name, group), name, err)
		}
	}
	return nil
}

// Undo removes the groups that were made, which are empty.
func (r *Restorer) Undo() error {
	var errs []error
	for _, p := range slices.Backward(r.made) {
		if err := unix.Rmdir(p); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "remove the cgroup", Path: p, Err: err})
		}
	}
	r.made = nil
	return errors.Join(errs...)
}

// Close gives up the mounts.
func (r *Restorer) Close() {
	for _, f := range r.roots {
		_ = f.Close()
	}
	clear(r.roots)
}
