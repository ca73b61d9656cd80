package files

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/sys"
)

const memfdPrefix = "/memfd:"

// kindMemfd carries memory files of memfd_create(2): their name, seals and
// content. Descriptors and mappings of one memfd share its inode entry.
var kindMemfd = &kind{
	name: "memfd", typ: fdinfo.FdTypes_MEMFD,
	takes: func(_ *Dumper, o *object) bool {
		return o.mode()&unix.S_IFMT == unix.S_IFREG && strings.HasPrefix(o.link, memfdPrefix) && o.stat.Nlink == 0
	},
	dump:  dumpMemfd,
	check: checkMemfd,
	open:  openMemfds,
	seal:  sealMemfds,
}

// memfdInode is a memory file on its way.
type memfdInode struct {
	msg *memfd.MemfdInodeEntry
}

func dumpMemfd(d *Dumper, o *object) error {
	page, huge, err := sys.HugePages(o.file)
	if err != nil {
		return err
	}
	k := inode(&o.stat)
	m, ok := d.memfds[k]
	if !ok {
		seals, err := d.seals(o)
		if err != nil {
			return err
		}
		m = &memfdInode{msg: &memfd.MemfdInodeEntry{
			Name: proto.String(strings.TrimPrefix(o.linkPath(), memfdPrefix)),
			Uid:  proto.Uint32(o.stat.Uid), Gid: proto.Uint32(o.stat.Gid),
			Size: proto.Uint64(uint64(o.stat.Size)), Shmid: proto.Uint32(d.ShmID(uint64(o.stat.Dev), o.stat.Ino)),
			Seals: proto.Uint32(uint32(seals)), InodeId: proto.Uint64(uint64(len(d.memfds) + 1)),
			Mode: proto.Uint32(o.mode()),
		}}
		if huge {
			m.msg.HugetlbFlag = proto.Uint32(unix.MFD_HUGETLB | uint32(bits.TrailingZeros64(page))<<unix.MFD_HUGE_SHIFT)
		}
		d.memfds[k] = m
		if !d.dry() {
			if err := d.addData(o, image.DataID{Kind: image.Shmem, ID: m.msg.GetShmid()}); err != nil {
				return err
			}
		}
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_MEMFD.Enum(), Id: proto.Uint32(o.id), Memfd: &memfd.MemfdFileEntry{
		Id: proto.Uint32(o.id), Flags: proto.Uint32(uint32(o.flags)), Pos: proto.Uint64(uint64(max(o.info.Pos, 0))),
		Fown: o.fown, InodeId: proto.Uint32(uint32(m.msg.GetInodeId())),
	}})
	return nil
}

// seals reads the seals of a memfd, whatever o was opened for.
func (d *Dumper) seals(o *object) (int, error) {
	f := o.file
	if o.isPath() || o.first().fd < 0 { // may have been opened with O_PATH
		r, err := reopen(f, unix.O_RDONLY)
		if err != nil {
			return 0, err
		}
		defer func() { _ = r.Close() }()
		f = r
	}
	n, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	return n, os.NewSyscallError("fcntl F_GET_SEALS", err)
}

func (d *Dumper) emitMemfds() error {
	ms := make([]*memfd.MemfdInodeEntry, 0, len(d.memfds))
	for _, m := range d.memfds {
		ms = append(ms, m.msg)
	}
	slices.SortFunc(ms, func(a, b *memfd.MemfdInodeEntry) int { return int(a.GetInodeId()) - int(b.GetInodeId()) })
	for _, m := range ms {
		if err := d.put(memfdImage, memfdMagic, m, nil); err != nil {
			return err
		}
	}
	return nil
}

// memfdFile is a memory file being made again.
type memfdFile struct {
	msg  *memfd.MemfdInodeEntry
	file *os.File // open for writing, until it is sealed
}

const allSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_FUTURE_WRITE | unix.F_SEAL_EXEC

func (r *Restorer) loadMemfds() error {
	ms, err := image.All[*memfd.MemfdInodeEntry](r.set, memfdImage)
	if err != nil {
		return err
	}
	shmids := map[uint32]bool{}
	for _, m := range ms {
		bad := func(format string, a ...any) error {
			return fmt.Errorf("image %s: memfd %d: %s", memfdImage, m.GetInodeId(), fmt.Sprintf(format, a...))
		}
		switch id := m.GetInodeId(); {
		case id > 1<<32-1:
			return bad("the inode id is out of range")
		case r.memfds[uint32(id)] != nil:
			return bad("the inode id is there twice")
		case m.GetHugetlbFlag()&^hugeFlags != 0:
			return bad("unknown flags %#x of huge pages", m.GetHugetlbFlag())
		case m.GetSize() > 1<<63-1:
			return bad("size %d is out of range", m.GetSize())
		case m.GetSeals()&^allSeals != 0:
			return bad("unknown seals %#x", m.GetSeals())
		case len(m.GetName()) > 249 || strings.IndexByte(m.GetName(), 0) >= 0:
			return bad("the name is no name of a memfd")
		case shmids[m.GetShmid()]:
			return bad("its shmid %d is another's too", m.GetShmid())
		}
		shmids[m.GetShmid()] = true
		r.memfds[uint32(m.GetInodeId())] = &memfdFile{msg: m}
	}
	return nil
}

func checkMemfd(r *Restorer, x *description) error {
	e := x.entry.GetMemfd()
	if r.memfds[e.GetInodeId()] == nil {
		return fmt.Errorf("image %s has no memfd %d", memfdImage, e.GetInodeId())
	}
	if e.GetPos() > 1<<63-1 {
		return fmt.Errorf("the position %d is out of range", e.GetPos())
	}
	return nil
}

func openMemfds(r *Restorer, xs []*description) []error {
	// Memory that no file entry names would have no content to go to.
	var errs []error
	for _, m := range r.memfds {
		if err := m.create(); err != nil {
			errs = append(errs, fmt.Errorf("make memfd %q: %w", m.msg.GetName(), err))
		}
	}
	if len(errs) > 0 {
		return errs
	}
	return openEach(openMemfd)(r, xs)
}

// hugeFlags are the flags of memfd_create that say which huge pages it takes.
const hugeFlags = unix.MFD_HUGETLB | unix.MFD_HUGE_MASK<<unix.MFD_HUGE_SHIFT

// create makes the memory file empty, with its size.
func (m *memfdFile) create() error {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if h := m.msg.GetHugetlbFlag(); h != 0 {
		flags |= int(h) | unix.MFD_HUGETLB
	}
	// Both settings of the mode get their say by chmod; without one of them the
	// kernel (6.3 and later) complains in its log.
	fd, err := unix.MemfdCreate(m.msg.GetName(), flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EACCES) { // vm.memfd_noexec = 2
		fd, err = unix.MemfdCreate(m.msg.GetName(), flags|unix.MFD_NOEXEC_SEAL)
	}
	if errors.Is(err, unix.EINVAL) { // before 6.3
		fd, err = unix.MemfdCreate(m.msg.GetName(), flags)
	}
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	m.file = os.NewFile(uintptr(fd), memfdPrefix+m.msg.GetName())
	if err := unix.Ftruncate(fd, int64(m.msg.GetSize())); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	if err := unix.Fchown(fd, int(m.msg.GetUid()), int(m.msg.GetGid())); err != nil {
		return os.NewSyscallError("fchown", err)
	}
	if m.msg.Mode != nil {
		if err := unix.Fchmod(fd, m.msg.GetMode()&0o7777); err != nil {
			return os.NewSyscallError("fchmod", err)
		}
	}
	return nil
}

func openMemfd(r *Restorer, x *description) error {
	e := x.entry.GetMemfd()
	m := r.memfds[e.GetInodeId()]
	flags := reopenFlags(int(e.GetFlags()), false)
	if m.msg.GetSeals()&unix.F_SEAL_WRITE != 0 && len(x.at) == 0 && flags&unix.O_ACCMODE == unix.O_RDWR {
		// Nobody has it as a descriptor, so it is there to be mapped. A shared
		// mapping through a writable description, even a read-only one, keeps the
		// write seal from being put on after the data has come (mm/memfd.c).
		flags = flags&^unix.O_ACCMODE | unix.O_RDONLY
	}
	f, err := reopen(m.file, flags)
	if err != nil {
		return hinted(err)
	}
	x.file = f
	return setPosition(f, e.GetPos())
}

func sealMemfds(r *Restorer, _ []*description) []error {
	var errs []error
	for _, m := range r.memfds {
		if m.file == nil {
			continue
		}
		if err := m.seal(); err != nil {
			errs = append(errs, fmt.Errorf("seal memfd %q: %w", m.msg.GetName(), err))
		}
	}
	return errs
}

func (m *memfdFile) seal() error {
	// Data comes in whole pages: cut what the last one had too much.
	if err := unix.Ftruncate(int(m.file.Fd()), int64(m.msg.GetSize())); err != nil {
		return os.NewSyscallError("ftruncate", err)
	}
	if s := m.msg.GetSeals(); s != 0 {
		if _, err := unix.FcntlInt(m.file.Fd(), unix.F_ADD_SEALS, int(s)); err != nil {
			return os.NewSyscallError("fcntl F_ADD_SEALS", err)
		}
	}
	// A file open for writing cannot become the executable of a process.
	f := m.file
	m.file = nil
	return f.Close()
}
