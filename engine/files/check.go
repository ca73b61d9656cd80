package files

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
	"godwit/engine/refuse"
)

// CheckDestination is the preflight of a destination: what a restore of a tree
// with these files will lack on this host, all of it in one list. It opens files
// only to look at them, and sockets only to see whether their addresses are free.
// inherit is as RestoreOptions has it: keys, or paths that then need not exist.
func CheckDestination(files []plan.File, ext []plan.External, ports []plan.Port, inherit map[string]Inherit) []refuse.Problem {
	return CheckWith(nil, files, ext, ports, inherit)
}

// CheckWith is CheckDestination with a policy, as RestoreOptions has it.
func CheckWith(policy func(name, path string) plan.FilePolicy, files []plan.File, ext []plan.External, ports []plan.Port, inherit map[string]Inherit) []refuse.Problem {
	c := &destination{inherit: inherit, used: map[string]bool{}, policy: policy}
	for _, f := range files {
		c.file(f)
	}
	for _, x := range ext {
		c.external(x)
	}
	c.unused(files, ext)
	for _, p := range ports {
		c.port(p)
	}
	return c.problems
}

type destination struct {
	inherit  map[string]Inherit
	used     map[string]bool
	need     map[uint64]uint64                       // bytes for what travels, by file system
	policy   func(name, path string) plan.FilePolicy // nil: none
	problems []refuse.Problem
}

func (c *destination) add(p refuse.Problem) { c.problems = append(c.problems, p) }

func pidOf(pids []int) int {
	if len(pids) == 0 {
		return 0
	}
	return pids[0]
}

func (c *destination) file(f plan.File) {
	p := refuse.Problem{Pid: pidOf(f.Pids), Path: f.Path}
	fail := func(reason, hint string) {
		p.Reason, p.Hint = reason, hint
		c.add(p)
	}
	for _, k := range []string{f.Path, strings.TrimPrefix(f.Path, "/")} {
		if in, ok := c.inherit[k]; ok {
			c.used[k] = true
			c.handed(p, in, f.Mode, handedFlags(f.Writable))
			return
		}
	}
	var st unix.Stat_t
	err := unix.Lstat(f.Path, &st)
	if f.Kind == KindTerminal {
		if err == nil {
			fail(terminalTaken(f.Path), terminalTakenHint)
		} else if unix.Stat("/dev/ptmx", &st) != nil {
			fail("there are no pseudoterminals here", "mount devpts on /dev/pts")
		}
		return
	}
	if f.Create {
		c.create(f, err, fail)
		return
	}
	if f.Carried {
		c.carried(f, &st, err, fail)
		return
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		fail("the "+f.Kind+" does not exist here", missingHint(f))
		return
	case err != nil:
		fail(fmt.Sprintf("it cannot be looked at: %v", err), "")
		return
	case f.Kind != "unknown" && modeKind(st.Mode) != f.Kind:
		fail(fmt.Sprintf("it is a %s here, expected a %s", modeKind(st.Mode), f.Kind), "")
		return
	}
	switch f.Kind {
	case "chr":
		if f.Rdev != uint64(st.Rdev) {
			fail(fmt.Sprintf("it is device %d:%d here, expected %d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)),
				unix.Major(f.Rdev), unix.Minor(f.Rdev)), "")
		}
	case "regular":
		c.regular(f, &st, fail)
	case "fifo":
		c.fifo(f, fail)
	}
}

func missingHint(f plan.File) string {
	switch f.Kind {
	case "regular":
		if f.Mapped {
			return "install the same program and libraries here"
		}
		return "copy it here, or declare it external and supply a file"
	case "directory":
		return "make it: mkdir -p " + f.Path
	case "fifo":
		return "make it: mkfifo " + f.Path + ", or declare it external and supply one"
	case "chr":
		return fmt.Sprintf("make it: mknod %s c %d %d", f.Path, unix.Major(f.Rdev), unix.Minor(f.Rdev))
	}
	return ""
}

func (c *destination) create(f plan.File, err error, fail func(reason, hint string)) {
	switch {
	case err == nil:
		fail("the path is taken here, and the restore must make a "+f.Kind+" there", "end the program that owns it, or remove it")
		return
	case !errors.Is(err, unix.ENOENT):
		fail(fmt.Sprintf("it cannot be looked at: %v", err), "")
		return
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Dir(f.Path), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		fail("the directory in which the restore must make a "+f.Kind+" does not exist here", "make it: mkdir -p "+filepath.Dir(f.Path))
	}
}

// carried looks whether a file that travels can be placed.
func (c *destination) carried(f plan.File, st *unix.Stat_t, err error, fail func(reason, hint string)) {
	switch {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		fail(fmt.Sprintf("it is to travel here, where it cannot be looked at: %v", err), "")
		return
	case modeKind(st.Mode) != f.Kind:
		fail(fmt.Sprintf("it is to travel here, where a %s is in its place, expected a %s", modeKind(st.Mode), f.Kind), "remove what is there")
		return
	}
	dir := filepath.Dir(f.Path)
	for ; ; dir = filepath.Dir(dir) {
		if err = unix.Stat(dir, st); !errors.Is(err, unix.ENOENT) || dir == "/" {
			break
		}
	}
	var fs unix.Statfs_t
	if err == nil {
		err = unix.Statfs(dir, &fs)
	}
	switch {
	case err != nil:
		fail(fmt.Sprintf("it is to travel here, where %s cannot be looked at: %v", dir, err), "")
		return
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		fail(fmt.Sprintf("it is to travel here, where %s is no directory", dir), "remove what is there")
		return
	case fs.Flags&unix.ST_RDONLY != 0:
		fail(fmt.Sprintf("it is to travel here, where the file system of %s is mounted read-only", dir), "mount it read-write, or copy the file there")
		return
	}
	if c.need == nil {
		c.need = map[uint64]uint64{}
	}
	c.need[uint64(st.Dev)] += f.Allocated
	if need, free := c.need[uint64(st.Dev)], fs.Bavail*uint64(fs.Bsize); need > free && f.Allocated > 0 {
		fail(fmt.Sprintf("it is to travel here, where the file system of %s has %d bytes free and %d are needed for what travels", dir, free, need), "make room")
	}
}

func (c *destination) regular(f plan.File, st *unix.Stat_t, fail func(reason, hint string)) {
	size := uint64(st.Size)
	p := plan.FilePolicy{}
	if c.policy != nil {
		p = c.policy(f.Path, f.Path)
	}
	if why := differentMode(p.Mode, st.Mode, f.Mode); why != "" {
		fail("it "+why, "change it, or say mode=any")
		return
	}
	if p.Size != plan.SizeDefault && !f.Mapped {
		if why := differentSize(p.Size, size, f.Size, !f.Writable); why != "" {
			fail("it "+why, "copy the file here, or say size=any")
			return
		}
	}
	switch {
	case f.Mapped && f.BuildID != "":
		h, err := openPath(f.Path, unix.O_PATH, 0)
		if err != nil {
			fail(fmt.Sprintf("it cannot be opened: %v", err), "")
			return
		}
		id := buildID(h)
		_ = h.Close()
		if id != f.BuildID {
			fail(fmt.Sprintf("it is mapped, and its build-id is %s here, expected %s", orNone(id), f.BuildID), "install the same version here")
			return
		}
		fallthrough
	case f.Mapped && !f.Writable:
		if size != f.Size {
			fail(fmt.Sprintf("it is mapped, and has %d bytes here, expected %d", size, f.Size), "install the same version here")
			return
		}
	case f.Mapped && size < f.Size, !f.Writable && size < f.Size && p.Size == plan.SizeDefault:
		fail(fmt.Sprintf("it has %d bytes here, expected at least %d", size, f.Size), "copy the file here")
		return
	}
	if f.Writable {
		h, err := openPath(f.Path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			fail(fmt.Sprintf("it cannot be opened for writing here: %v", hinted(err)), "")
			return
		}
		_ = h.Close()
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// fifo refuses a fifo in which somebody else's bytes are.
func (c *destination) fifo(f plan.File, fail func(reason, hint string)) {
	h, err := openPath(f.Path, unix.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		fail(fmt.Sprintf("it cannot be opened here: %v", err), "")
		return
	}
	defer func() { _ = h.Close() }()
	if n, err := unix.IoctlGetInt(int(h.Fd()), unix.TIOCINQ); err == nil && n > 0 {
		fail(fmt.Sprintf("the fifo is in use here: %d bytes are in it", n), "end the programs that use it, or declare it external")
	}
}

func handedFlags(writable bool) uint32 {
	if writable {
		return unix.O_WRONLY
	}
	return unix.O_RDONLY
}

// handed checks that a file that was handed in can stand for the recorded one.
func (c *destination) handed(p refuse.Problem, in Inherit, mode, flags uint32) {
	if in.File == nil {
		p.Reason = "the file handed in for it is missing"
		c.add(p)
		return
	}
	if err := handedKind(&in, &mode, mode); err != nil {
		p.Reason = fmt.Sprintf("the file handed in for it cannot be used: %v", err)
		c.add(p)
		return
	}
	var err error
	switch {
	case in.Forward, in.AnyKind:
		err = forwardAccess(in.File, flags)
	case mode&unix.S_IFMT == unix.S_IFSOCK: // which is always forwarded
	case mode&unix.S_IFMT != unix.S_IFIFO: // opening a fifo would be noticed, and never fails for its access
		var f *os.File
		if f, err = reopen(in.File, reopenFlags(int(flags), mode&unix.S_IFMT == unix.S_IFDIR)&^unix.O_NOATIME|unix.O_NONBLOCK); err == nil {
			_ = f.Close()
		}
	}
	if err != nil {
		p.Reason = fmt.Sprintf("the file handed in for it cannot give the recorded access: %v", hinted(err))
		c.add(p)
	}
}

// coversMappings says why a file is too short for what the tree has mapped of the one
// that it stands for: touched behind its end, memory kills (SIGBUS).
func coversMappings(f *os.File, bytes uint64) error {
	if f == nil || bytes == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("it is not open: %w", os.NewSyscallError("fstat", err))
	}
	if have := uint64(max(st.Size, 0)); st.Mode&unix.S_IFMT == unix.S_IFREG && have < bytes {
		return fmt.Errorf("it has %d bytes, of which the tree has %d mapped", have, bytes)
	}
	return nil
}

func (c *destination) external(x plan.External) {
	p := refuse.Problem{Path: x.Path, Key: x.Key}
	for k, in := range c.inherit {
		if name, ok := inheritName(k, map[string]bool{x.Key: true}); ok && name == x.Key {
			c.used[k] = true
			if err := coversMappings(in.File, x.MappedBytes); err != nil {
				p.Reason = fmt.Sprintf("the file handed in for it cannot be used: %v", err)
				c.add(p)
				return
			}
			c.handed(p, in, x.Mode, x.Flags)
			return
		}
	}
	p.Reason = "nothing was supplied for this external " + x.Kind
	p.Hint = fmt.Sprintf("supply it: provide %s on the destination, or --inherit-fd fd[4]:%s with the file open as descriptor 4", x.Key, x.Key)
	c.add(p)
}

// unused refuses what was handed in for nothing.
func (c *destination) unused(files []plan.File, ext []plan.External) {
	var names []string
	for _, x := range ext {
		names = append(names, x.Key)
	}
	for _, f := range files {
		names = append(names, f.Path)
	}
	for k := range c.inherit {
		if c.used[k] || strings.HasPrefix(k, "pipe:[") || strings.HasPrefix(k, "socket:[") {
			continue // the plan does not list pipes and sockets
		}
		p := refuse.Problem{Key: k, Reason: "a file was handed in for it, but the tree has no such file"}
		like := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return strings.Contains(n, "[") != strings.Contains(k, "[") })
		if near := nearest(k, like); len(near) > 0 {
			p.Hint = "nearest: " + strings.Join(near, ", ")
		}
		c.add(p)
	}
}

// port tries to bind the address. SO_REUSEADDR, as in the restore, overlooks
// connections that are over, not listeners.
func (c *destination) port(x plan.Port) {
	p := refuse.Problem{Pid: x.Pid, Path: x.Network + " " + x.Address}
	if err := tryBind(x); err != nil {
		p.Reason = fmt.Sprintf("the address cannot be bound here: %v", bindError(err))
		c.add(p)
	}
}

func tryBind(x plan.Port) error {
	ap, err := netip.ParseAddrPort(x.Address)
	if err != nil {
		return err
	}
	family, addr := uint32(unix.AF_INET6), ap.Addr().WithZone("")
	if addr.Is4() {
		family = unix.AF_INET
	}
	sa, err := sockaddr(family, wordsOf(addr.AsSlice()), uint32(ap.Port()), ap.Addr().Zone())
	if err != nil {
		return err
	}
	typ := unix.SOCK_STREAM
	if x.Network == "udp" {
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(int(family), typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if family == unix.AF_INET6 && !addr.IsUnspecified() {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if typ == unix.SOCK_STREAM {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
		}
	}
	return unix.Bind(fd, sa)
}
