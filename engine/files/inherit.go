package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"golang.org/x/sys/unix"
)

// matchInherit finds out which entry of the images each handed file is for.
func (r *Restorer) matchInherit() error {
	names := map[string]bool{} // what can be asked for
	for _, x := range r.all {
		switch e := x.entry; e.GetType() {
		case fdinfo.FdTypes_REG:
			names[e.GetReg().GetName()] = true
		case fdinfo.FdTypes_PIPE:
			names[fmt.Sprintf("pipe:[%d]", e.GetPipe().GetPipeId())] = true
		case fdinfo.FdTypes_UNIXSK:
			names[fmt.Sprintf("socket:[%d]", e.GetUsk().GetIno())] = true
		case fdinfo.FdTypes_INETSK:
			names[fmt.Sprintf("socket:[%d]", e.GetIsk().GetIno())] = true
		}
	}
	for _, s := range r.ttySides {
		if s.e.GetType() == tty.TtyType_EXT_TTY {
			names[extTTYKey(s.e)] = true
		}
	}
	given := make([]string, 0, len(r.opts.Inherit))
	for k := range r.opts.Inherit {
		given = append(given, k)
	}
	slices.Sort(given)
	var errs []error
	for _, k := range given {
		in := r.opts.Inherit[k]
		name, ok := inheritName(k, names)
		switch {
		case !ok:
			errs = append(errs, unmatched(k, names))
		case r.handed[name] != nil:
			errs = append(errs, fmt.Errorf("handed file %s: another one was handed in for %s too", k, name))
		case in.File == nil:
			errs = append(errs, fmt.Errorf("handed file %s: there is no file", k))
		default:
			if err := isOpen(in.File); err != nil {
				errs = append(errs, fmt.Errorf("handed file %s: %w", k, err))
				continue
			}
			in.Forward = in.Forward || in.AnyKind && !isNull(in.File)
			r.handed[name] = &in
		}
	}
	for k := range r.opts.Proxied {
		if _, ok := inheritName(k, names); !ok && !r.hasSlave(k) {
			errs = append(errs, fmt.Errorf("the other end of %s is wanted, but the images have no such file", k))
		}
	}
	return list("handed files cannot be used", errs)
}

// hasSlave says whether the images have the slave of a pseudoterminal by its key.
func (r *Restorer) hasSlave(key string) bool {
	for _, s := range r.ttySides {
		if s.e.GetType() == tty.TtyType_PTY && !isMaster(s.e) && extTTYKey(s.e) == key {
			return true
		}
	}
	return false
}

// inheritName resolves what the caller called a key.
func inheritName(k string, names map[string]bool) (string, bool) {
	if names[k] {
		return k, true
	}
	if link, ok := linkOfKey(k); ok {
		for n := range names {
			if have, ok := linkOfKey(n); ok && have == link {
				return n, true
			}
		}
	}
	if key, ok, err := parseTTYKey(k); ok {
		return key, err == nil && names[key]
	}
	if strings.HasPrefix(k, "file[") {
		keys, err := ParseKey(k)
		if err != nil {
			return "", false
		}
		for _, c := range keys {
			if names[c.String()] {
				return c.String(), true
			}
		}
		return "", false
	}
	// CRIU writes paths without the first slash.
	if !strings.HasPrefix(k, "/") && names["/"+k] {
		return "/" + k, true
	}
	return "", false
}

func unmatched(k string, names map[string]bool) error {
	if strings.HasPrefix(k, "file[") {
		if _, err := ParseKey(k); err != nil {
			return err
		}
	}
	var have []string
	for n := range names {
		// What looks like a key is compared with keys, a path with paths.
		if strings.Contains(n, "[") == strings.Contains(k, "[") {
			have = append(have, n)
		}
	}
	near := nearest(k, have)
	if len(near) == 0 {
		return fmt.Errorf("handed file %s: the images have no file of that name", k)
	}
	return fmt.Errorf("handed file %s: the images have no file of that name; nearest: %s", k, strings.Join(near, ", "))
}

// isNull says whether f is the null device, which can be opened again with any
// flags.
func isNull(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && nullDevice(&st)
}

func nullDevice(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

func isOpen(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("it is not open: %w", os.NewSyscallError("fstat", err))
	}
	return nil
}

func (r *Restorer) inherited(e *regfile.RegFileEntry) *Inherit { return r.handed[e.GetName()] }

func (r *Restorer) inheritedName(name string) *Inherit { return r.handed[name] }

// checkExternal validates an external entry: its key, and that a file was handed in.
func (r *Restorer) checkExternal(name string, x *description) error {
	if keys, err := ParseKey(name); err != nil {
		return err
	} else if keys[0].String() != name {
		return fmt.Errorf("external key %q is not in its canonical form %s", name, keys[0])
	}
	if r.handed[name] == nil {
		return fmt.Errorf("external file %s was not handed in: supply it, such as --inherit-fd fd[4]:%s with the file open as descriptor 4", name, name)
	}
	return nil
}

// checkHanded says whether a handed file can stand for the recorded one.
func (r *Restorer) checkHanded(_ *description, e *regfile.RegFileEntry, in *Inherit) error {
	if err := handedKind(in, e.Mode, e.GetMode()); err != nil {
		return fmt.Errorf("the file handed in for %s: %w", e.GetName(), err)
	}
	if f := r.facts[e.GetId()]; f != nil {
		if err := coversMappings(in.File, f.MappedBytes); err != nil {
			return fmt.Errorf("the file handed in for %s: %w", e.GetName(), err)
		}
	}
	if in.Forward {
		if err := forwardAccess(in.File, e.GetFlags()); err != nil {
			return fmt.Errorf("the file handed in for %s: %w", e.GetName(), err)
		}
	}
	return nil
}

func handedKind(in *Inherit, has *uint32, mode uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(in.File.Fd()), &st); err != nil {
		return fmt.Errorf("it is not open: %w", os.NewSyscallError("fstat", err))
	}
	if in.AnyKind {
		return nil
	}
	if has != nil && st.Mode&unix.S_IFMT != mode&unix.S_IFMT {
		return fmt.Errorf("it is a %s, expected a %s", modeKind(st.Mode), modeKind(mode))
	}
	return nil
}

// forwardAccess says whether a description allows what the recorded one did.
func forwardAccess(f *os.File, flags uint32) error {
	fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_GETFL", err)
	}
	if flags&unix.O_PATH != 0 {
		return nil
	}
	want, have := int(flags)&unix.O_ACCMODE, fl&unix.O_ACCMODE
	if fl&unix.O_PATH != 0 || (have != unix.O_RDWR && have != want) {
		return fmt.Errorf("it is open %s, expected %s, and it is to be forwarded as it is", accessName(fl), accessName(int(flags)))
	}
	return nil
}

func accessName(flags int) string {
	switch {
	case flags&unix.O_PATH != 0:
		return "as a path only"
	case flags&unix.O_ACCMODE == unix.O_RDONLY:
		return "for reading"
	case flags&unix.O_ACCMODE == unix.O_WRONLY:
		return "for writing"
	}
	return "for reading and writing"
}

// forward makes x the handed description itself.
func (r *Restorer) forward(x *description, in *Inherit) error {
	f, err := dupFile(in.File)
	if err != nil {
		return err
	}
	x.file = f
	return nil
}

// isForwarded says whether x is a description of somebody else, whose owner and
// flags are not ours to set.
func (r *Restorer) isForwarded(x *description) bool {
	var name string
	switch e := x.entry; e.GetType() {
	case fdinfo.FdTypes_REG:
		name = e.GetReg().GetName()
	case fdinfo.FdTypes_FIFO:
		name = r.regOf(x).GetName()
	case fdinfo.FdTypes_PIPE:
		name = fmt.Sprintf("pipe:[%d]", e.GetPipe().GetPipeId())
	case fdinfo.FdTypes_UNIXSK:
		name = fmt.Sprintf("socket:[%d]", e.GetUsk().GetIno())
	case fdinfo.FdTypes_INETSK:
		name = fmt.Sprintf("socket:[%d]", e.GetIsk().GetIno())
	case fdinfo.FdTypes_TTY:
		name = extTTYKey(r.ttySides[e.GetTty().GetTtyInfoId()].e)
	}
	in := r.handed[name]
	return in != nil && (in.Forward || strings.HasPrefix(name, "socket:"))
}

// openHandedSocket gives a socket that was handed in for this one (CRIU's key
// socket:[inode]): always the description itself, a socket cannot be opened again.
func (r *Restorer) openHandedSocket(x *description, ino uint32) (bool, error) {
	in := r.handed[fmt.Sprintf("socket:[%d]", ino)]
	if in == nil {
		return false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(in.File.Fd()), &st); err != nil {
		return true, os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK && !in.AnyKind {
		return true, errors.New("the file handed in for it is a " + modeKind(st.Mode) + ", expected a socket")
	}
	return true, r.forward(x, in)
}
