package ns

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What is in a tmpfs travels as tar makes it, compressed: names relative to its
// root, in PAX form. Sockets stay out, as tar leaves them out: whoever is bound to
// one makes it again.

// node names an inode, for hard links.
type node struct {
	dev, ino uint64
}

// pack makes an archive of a directory tree. f is O_PATH and nothing is mounted on it.
func pack(f *os.File) ([]byte, error) {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	p := &packer{w: tar.NewWriter(z), seen: map[node]string{}}
	dir, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	if err := p.dir(dir, "."); err != nil {
		return nil, err
	}
	if err := errors.Join(p.w.Close(), z.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

type packer struct {
	w    *tar.Writer
	seen map[node]string
}

func (p *packer) dir(d *os.File, name string) error {
	if err := p.entry(d, ".", name); err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		sub := path.Join(name, n)
		var st unix.Stat_t
		if err := unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: sub, Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFSOCK:
			continue
		case unix.S_IFDIR:
			fd, err := unix.Openat(int(d.Fd()), n, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NOATIME, 0)
			if err != nil {
				return &os.PathError{Op: "open", Path: sub, Err: err}
			}
			f := os.NewFile(uintptr(fd), sub)
			if err := errors.Join(p.dir(f, sub), f.Close()); err != nil {
				return err
			}
			continue
		}
		if err := p.entry(d, n, sub); err != nil {
			return err
		}
	}
	return nil
}

// entry adds one file, named name in the archive and base in d.
func (p *packer) entry(d *os.File, base, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), AccessTime: time.Unix(st.Atim.Unix()), PAXRecords: map[string]string{},
	}
	var f *os.File
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(d.Fd()), base, b)
		if err != nil {
			return &os.PathError{Op: "readlink", Path: name, Err: err}
		}
		h.Linkname = string(b[:n])
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	id := node{st.Dev, st.Ino}
	if first, ok := p.seen[id]; ok && h.Typeflag != tar.TypeDir {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		return p.w.WriteHeader(h)
	}
	if st.Nlink > 1 {
		p.seen[id] = name
	}
	if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir {
		fd, err := unix.Openat(int(d.Fd()), base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NOATIME, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		f = os.NewFile(uintptr(fd), name)
		defer func() { _ = f.Close() }()
		if err := attributes(f, h); err != nil {
			return err
		}
	}
	if err := p.w.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.CopyN(p.w, f, h.Size)
	return err
}

// xattr is how PAX archives name an extended attribute.
const xattr = "SCHILY.xattr."

func attributes(f *os.File, h *tar.Header) error {
	b := make([]byte, 64<<10)
	n, err := unix.Flistxattr(int(f.Fd()), b)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: f.Name(), Err: err}
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		v := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(int(f.Fd()), name, v)
		if err != nil {
			return &os.PathError{Op: "getxattr " + name, Path: f.Name(), Err: err}
		}
		h.PAXRecords[xattr+name] = string(v[:n])
	}
	return nil
}

// unpack fills an empty directory from an archive, which is untrusted: nothing
// of it can reach outside of the directory.
func unpack(dir string, archive []byte) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	z, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		return err
	}
	r := tar.NewReader(z)
	var dirs []*tar.Header // their times are set last
	left := int64(maxTmpfs)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		h.Name = path.Clean(h.Name)
		if left -= h.Size; left < 0 {
			return fmt.Errorf("the archive holds more than %d MiB", maxTmpfs>>20)
		}
		if err := place(root, h, r); err != nil {
			return fmt.Errorf("make %s: %w", h.Name, err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := root.Chtimes(dirs[i].Name, dirs[i].AccessTime, dirs[i].ModTime); err != nil {
			return err
		}
	}
	return nil
}

// place makes one file of an archive.
func place(root *os.Root, h *tar.Header, r io.Reader) error {
	switch h.Typeflag {
	case tar.TypeLink:
		return root.Link(path.Clean(h.Linkname), h.Name)
	case tar.TypeSymlink:
		if err := root.Symlink(h.Linkname, h.Name); err != nil {
			return err
		}
		return root.Lchown(h.Name, h.Uid, h.Gid)
	case tar.TypeDir:
		if err := root.Mkdir(h.Name, 0o700); err != nil && (h.Name != "." || !errors.Is(err, os.ErrExist)) {
			return err
		}
	case tar.TypeReg:
		f, err := root.OpenFile(h.Name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		if err := special(root, h); err != nil {
			return err
		}
	default:
		return fmt.Errorf("it is of unknown type %q", h.Typeflag)
	}
	if err := root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
		return err
	}
	// os.FileMode has set-id and sticky bits of its own.
	mode := os.FileMode(h.Mode & 0o777)
	for bit, m := range map[int64]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if h.Mode&bit != 0 {
			mode |= m
		}
	}
	if err := root.Chmod(h.Name, mode); err != nil {
		return err
	}
	if err := setAttributes(root, h); err != nil {
		return err
	}
	return root.Chtimes(h.Name, h.AccessTime, h.ModTime)
}

// special makes a fifo or device.
func special(root *os.Root, h *tar.Header) error {
	dir, err := root.Open(path.Dir(h.Name))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	mode, dev := uint32(unix.S_IFIFO), 0
	switch h.Typeflag {
	case tar.TypeChar:
		mode = unix.S_IFCHR
	case tar.TypeBlock:
		mode = unix.S_IFBLK
	}
	if mode != unix.S_IFIFO {
		dev = int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	}
	return os.NewSyscallError("mknodat", unix.Mknodat(int(dir.Fd()), path.Base(h.Name), mode|0o600, dev))
}

func setAttributes(root *os.Root, h *tar.Header) error {
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattr)
		if !ok {
			continue
		}
		f, err := root.Open(h.Name)
		if err != nil {
			return err
		}
		err = unix.Fsetxattr(int(f.Fd()), name, []byte(v), 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return &os.PathError{Op: "setxattr " + name, Path: h.Name, Err: err}
		}
	}
	return nil
}
