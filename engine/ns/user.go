package ns

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/userns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// Requests of ioctl_nsfs(2) (include/uapi/linux/nsfs.h).
const (
	nsGetUserns = 0xb701
	nsGetParent = 0xb702
)

// Users is a user namespace of the tree's own.
type Users struct {
	IDs   *procfs.IDMap
	facts *image.UsersFacts
}

// ReadUsers reads the user namespace of the root of a tree, which has those of own
// for itself, and refuses what cannot be made again.
func ReadUsers(st *procfs.Status, own Set, refuse func(reason, hint string)) (*Users, error) {
	ids, err := procfs.ReadIDMap(st.Pid)
	if err != nil {
		return nil, err
	}
	u := &Users{IDs: ids, facts: &image.UsersFacts{Groups: st.Groups}}
	b, err := procfs.ReadAll(procfs.Path(st.Pid, "setgroups"))
	if err != nil {
		return nil, err
	}
	u.facts.NoSetgroups = strings.TrimSpace(string(b)) == "deny"
	if !own.Has(Pid) {
		refuse("lives in a user namespace of its own, but not in a pid namespace of its own", "begin it with both: unshare --user --pid --fork")
		return u, nil
	}
	if len(ids.UIDs) == 0 || len(ids.GIDs) == 0 {
		refuse("lives in a user namespace that has no users or groups yet", "retry when they have been mapped (uid_map, gid_map)")
		return u, nil
	}
	mine, err := nsID("/proc/self/ns/user", 0)
	if err != nil {
		return nil, err
	}
	its, err := nsID(procfs.Path(st.Pid, "ns", "user"), 0)
	if err != nil {
		return nil, err
	}
	if parent, err := nsID(procfs.Path(st.Pid, "ns", "user"), nsGetParent); err != nil || parent != mine {
		refuse("lives in a user namespace that was made inside another one", "run an agent inside the outer one")
	}
	for _, k := range kinds {
		if k.kind == User || k.kind == Time || !own.Has(k.kind) {
			continue
		}
		owner, err := nsID(procfs.Path(st.Pid, "ns", k.name), nsGetUserns)
		if err != nil {
			return nil, err
		}
		if owner != its {
			refuse(fmt.Sprintf("lives in a %s namespace of its own that belongs to another user namespace than its own", k.name), "")
		}
	}
	return u, nil
}

// nsID identifies the namespace of a link in /proc, or one that it leads to.
func nsID(path string, request uint) (unix.Stat_t, error) {
	var id unix.Stat_t
	f, err := os.Open(path)
	if err != nil {
		return id, err
	}
	defer func() { _ = f.Close() }()
	fd := int(f.Fd())
	if request != 0 {
		if fd, err = unix.IoctlRetInt(fd, request); err != nil {
			return id, fmt.Errorf("ioctl of %s: %w", path, os.NewSyscallError("ioctl", err))
		}
		defer func() { _ = unix.Close(fd) }()
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return id, os.NewSyscallError("fstat", err)
	}
	return unix.Stat_t{Dev: st.Dev, Ino: st.Ino}, nil
}

// Facts are what CRIU has no field for; nil if there is no such namespace.
func (u *Users) Facts() *image.UsersFacts {
	if u == nil {
		return nil
	}
	return u.facts
}

// Map are the ids of the namespace, nil if there is none.
func (u *Users) Map() *procfs.IDMap {
	if u == nil {
		return nil
	}
	return u.IDs
}

func (u *Users) dump(emit Emit) error {
	extents := func(es []procfs.IDExtent) (out []*userns.UidGidExtent) {
		for _, e := range es {
			out = append(out, &userns.UidGidExtent{First: proto.Uint32(e.Inner), LowerFirst: proto.Uint32(e.Outer), Count: proto.Uint32(e.Count)})
		}
		return out
	}
	return emit(image.Entry{File: image.UsernsFile(User.id()), Magic: image.MagicUserns,
		Msg: &userns.UsernsEntry{UidMap: extents(u.IDs.UIDs), GidMap: extents(u.IDs.GIDs)}})
}

// LoadUsers reads the user namespace of images, nil if the tree has none of its own.
func LoadUsers(set *image.Set, im Images) (*Users, error) {
	if !im.Own.Has(User) {
		return nil, nil
	}
	file := image.UsernsFile(im.ids[User])
	e, err := image.One[*userns.UsernsEntry](set, file)
	if err != nil {
		return nil, err
	}
	u := &Users{IDs: &procfs.IDMap{}, facts: &image.UsersFacts{}}
	if set.Facts != nil && set.Facts.Users != nil {
		u.facts = set.Facts.Users
	}
	if len(u.facts.Groups) > maxGroups {
		return nil, fmt.Errorf("%s: %d groups", image.FactsFile, len(u.facts.Groups))
	}
	for _, x := range []struct {
		from []*userns.UidGidExtent
		to   *[]procfs.IDExtent
	}{{e.GetUidMap(), &u.IDs.UIDs}, {e.GetGidMap(), &u.IDs.GIDs}} {
		if len(x.from) == 0 || len(x.from) > procfs.MaxIDExtents {
			return nil, fmt.Errorf("image %s: %d extents of users or groups", file, len(x.from))
		}
		for _, f := range x.from {
			*x.to = append(*x.to, procfs.IDExtent{Inner: f.GetFirst(), Outer: f.GetLowerFirst(), Count: f.GetCount()})
		}
		if err := procfs.CheckIDMap(*x.to); err != nil {
			return nil, fmt.Errorf("image %s: %w", file, err)
		}
	}
	return u, nil
}

// maxGroups is NGROUPS_MAX (include/uapi/linux/limits.h).
const maxGroups = 65536

// Base are a user and a group of the namespace, its root's if it has one, as whom the
// processes of the tree are built.
func (u *Users) Base() (uid, gid uint32) {
	first := func(es []procfs.IDExtent) uint32 {
		for _, e := range es {
			if e.Inner == 0 {
				return 0
			}
		}
		return es[0].Inner
	}
	return first(u.IDs.UIDs), first(u.IDs.GIDs)
}

// Bearers are the calls by which the process that the root of the tree is cloned from
// gets the groups that the tree has from before it had a namespace, and loses them.
func (u *Users) Bearers() (before, after *ptrace.Call, err error) {
	own, err := os.Getgroups()
	if err != nil {
		return nil, nil, err
	}
	call := func(what string, groups []byte, n int) *ptrace.Call {
		arg := ptrace.Int(0)
		if n > 0 {
			arg = ptrace.Bytes(groups)
		}
		return ptrace.NewCall(what, unix.SYS_SETGROUPS, ptrace.Int(n), arg)
	}
	var mine []byte
	for _, g := range own {
		mine = le32(mine, uint32(g))
	}
	var its []byte
	for _, g := range u.facts.Groups {
		its = le32(its, g)
	}
	return call("take the groups of the tree", its, len(u.facts.Groups)), call("have the own groups again", mine, len(own)), nil
}

func le32(b []byte, v uint32) []byte {
	return append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

// Fill maps the ids of the new namespace in which the process pid lives.
func (u *Users) Fill(pid int) error {
	text := func(es []procfs.IDExtent) string {
		var b strings.Builder
		for _, e := range es {
			fmt.Fprintf(&b, "%d %d %d\n", e.Inner, e.Outer, e.Count)
		}
		return b.String()
	}
	var files [][2]string
	if u.facts.NoSetgroups {
		files = append(files, [2]string{"setgroups", "deny"})
	}
	files = append(files, [2]string{"uid_map", text(u.IDs.UIDs)}, [2]string{"gid_map", text(u.IDs.GIDs)})
	for _, f := range files {
		if err := os.WriteFile(procfs.Path(pid, f[0]), []byte(f[1]), 0); err != nil {
			return fmt.Errorf("map the users of the tree: %w", err)
		}
	}
	return nil
}

// Become are the calls by which a process in the namespace becomes its base user.
func (u *Users) Become() []*ptrace.Call {
	uid, gid := u.Base()
	return []*ptrace.Call{
		ptrace.NewCall("be the root of its groups", unix.SYS_SETRESGID, ptrace.Int(gid), ptrace.Int(gid), ptrace.Int(gid)),
		ptrace.NewCall("be the root of its users", unix.SYS_SETRESUID, ptrace.Int(uid), ptrace.Int(uid), ptrace.Int(uid)),
	}
}

var errOwner = errors.New("a tree with a user namespace of its own has a pid namespace of its own, too")

// Check wants namespaces that can be made together.
func (im Images) Check() error {
	if im.Own.Has(User) && !im.Own.Has(Pid) {
		return errOwner
	}
	return nil
}
