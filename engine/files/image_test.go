package files

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/cli"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/bpfmap-file"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/eventpoll"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fifo"
	file_lock "github.com/checkpoint-restore/go-criu/v8/crit/images/file-lock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fsnotify"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/ns"
	packet_sock "github.com/checkpoint-restore/go-criu/v8/crit/images/packet-sock"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pipe-data"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-netlink"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-packet"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tty"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tun"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/procfs"
)

// Everything that a dump emits goes through a directory, is decoded by go-criu's
// own library, and can be restored from there.
func TestThroughDirectory(t *testing.T) {
	for _, scene := range []string{"regular", "pipes", "fifos", "anon", "epoll", "memfd", "ghost", "unix", "inet", "owner"} {
		t.Run(scene, func(t *testing.T) {
			c := start(t, scene)
			d := dumpOK(t, Options{}, c)
			c.kill()
			dir := t.TempDir()
			sink, err := image.NewDirSink(dir)
			if err != nil {
				t.Fatal(err)
			}
			check := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			check(sink.Facts(d.set.Facts))
			check(sink.Entry(image.Entry{File: image.InventoryFile, Magic: image.MagicInventory, Msg: &inventory.InventoryEntry{ImgVersion: proto.Uint32(2), FdinfoPerId: proto.Bool(true)}}))
			for _, f := range d.set.Files() {
				for _, e := range d.set.Entries(f) {
					check(sink.Entry(e))
				}
			}
			check(sink.Sealed())
			for id, b := range d.data {
				if id.Kind == image.Shmem {
					b = append(bytes.Clone(b), make([]byte, (4096-len(b)%4096)%4096)...)
				}
				if len(b) > 0 {
					check(sink.Data(id, 0, b))
				}
			}
			check(sink.Commit())

			imgs, err := filepath.Glob(filepath.Join(dir, "*.img"))
			check(err)
			for _, p := range imgs {
				if strings.HasPrefix(filepath.Base(p), "pages-") {
					continue
				}
				f, err := os.Open(p)
				check(err)
				typ, err := cli.GetEntryTypeFromImg(f)
				if err != nil {
					t.Fatalf("%s: %v", p, err)
				}
				if _, err := crit.New(f, nil, "", false, false).Decode(typ); err != nil {
					t.Errorf("crit decodes %s: %v", p, err)
				}
				check(f.Close())
			}

			src, err := image.OpenDir(dir)
			check(err)
			defer func() { _ = src.Close() }()
			set, err := src.Images(t.Context())
			check(err)
			r, err := NewRestorer(nil, set, RestoreOptions{})
			check(err)
			defer func() { check(r.Close()) }()
			check(errors.Join(r.Open(), r.OpenUnix()))
			for {
				id, off, p, err := src.Next(t.Context())
				if errors.Is(err, io.EOF) {
					break
				}
				check(err)
				f, err := r.DataFile(id, off, p)
				check(err)
				_, err = f.WriteAt(p, int64(off))
				check(err)
			}
			check(r.Seal())
			ds, err := r.Descriptors(1), error(nil)
			check(err)
			for name, fd := range c.fds {
				if !slices.ContainsFunc(ds, func(d Descriptor) bool { return d.FD == fd }) {
					t.Errorf("%s (fd %d) is missing", name, fd)
				}
			}
		})
	}
}

// Neither a dump nor a restore leaves a descriptor behind, nor does a failed one.
func TestNoLeaks(t *testing.T) {
	for _, scene := range []string{"regular", "pipes", "fifos", "anon", "memfd", "ghost", "unix", "inet", "refused", "unix-refused", "tcp"} {
		t.Run(scene, func(t *testing.T) {
			c := start(t, scene)
			before, err := procfs.Fds(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			d := dumpAll(t, Options{}, c)
			open := func() {
				r, err := NewRestorer(nil, d.set, RestoreOptions{})
				if err != nil {
					return
				}
				if err := errors.Join(r.Open(), r.OpenUnix()); err == nil {
					_ = r.Seal()
				}
				if err := errors.Join(r.Close(), r.Close()); err != nil {
					t.Error(err)
				}
			}
			open() // may fail: the child still has paths and ports
			c.kill()
			open()
			after, err := procfs.Fds(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range after {
				if !slices.Contains(before, fd) {
					link, _ := procfs.FdLink(os.Getpid(), fd)
					if link == "anon_inode:[pidfd]" || strings.HasPrefix(link, "/proc/") {
						continue // of os/exec and of the listing itself
					}
					t.Errorf("fd %d (%s) is left open", fd, link)
				}
			}
		})
	}
}

// Mappings, programs and directories are files without descriptors.
func TestPaths(t *testing.T) {
	c := start(t, "memfd")
	d := &dumped{set: image.NewSet(), data: map[image.DataID][]byte{}}
	x := NewDumper(nil, Options{}, func(e image.Entry) error { d.set.Add(e); return nil })
	defer func() { _ = x.Close() }()
	c.stop()
	if err := x.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	ids := map[string]uint32{}
	add := func(role, path string, flags int) uint32 {
		t.Helper()
		p := procfs.Path(c.pid(), path)
		link, err := os.Readlink(p)
		if err != nil {
			t.Fatal(err)
		}
		f := mustOpen(t, p, unix.O_PATH)
		id, err := x.AddPath(c.proc(1), role, f, link, flags)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	ids["exe"] = add("exe", "exe", unix.O_RDONLY)
	ids["cwd"] = add("cwd", "cwd", unix.O_RDONLY|unix.O_DIRECTORY)
	ids["root"] = add("root", "root", unix.O_RDONLY|unix.O_DIRECTORY)
	ids["sealed"] = add("mapping", "fd/"+itoa(c.fds["sealed"]), unix.O_RDWR)
	if again := add("mapping", "exe", unix.O_RDONLY); again != ids["exe"] {
		t.Errorf("the program as mapping is file %d, as program %d", again, ids["exe"])
	}
	if err := x.Finish(); err != nil || len(x.Refusal()) > 0 {
		t.Fatal(err, x.Refusal())
	}
	files, _, _, _ := x.Plan()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(files, func(f plan.File) bool { return f.Path == self })
	if i < 0 || !files[i].Mapped || files[i].Kind != "regular" || files[i].Size == 0 {
		t.Errorf("the plan does not tell of the program: %+v", files)
	}
	for _, y := range x.Data() {
		b, err := io.ReadAll(io.NewSectionReader(y.File, 0, y.Size))
		if err != nil {
			t.Fatal(err)
		}
		d.data[y.ID] = b
	}
	r, err := NewRestorer(nil, d.set, RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if err := errors.Join(r.Open(), r.OpenUnix()); err != nil {
		t.Fatal(err)
	}
	for name, id := range ids {
		if _, err := r.File(id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The core maps shared before the data comes; the write seal must still hold.
	f, err := r.File(ids["sealed"])
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	for id, b := range d.data {
		f, err := r.DataFile(id, 0, b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Seal(); err != nil {
		t.Fatal(err)
	}
	if string(m[:3]) != "sss" {
		t.Errorf("the mapping shows %q", m[:3])
	}
}

// Images that must be refused, each with a clear error.
func TestCorruptImages(t *testing.T) {
	reg := func(id uint32, name string) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: &id, Reg: &regfile.RegFileEntry{Id: &id, Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: noOwner(), Name: &name}}
	}
	fd := func(n, id uint32, typ fdinfo.FdTypes) *fdinfo.FdinfoEntry {
		return &fdinfo.FdinfoEntry{Id: &id, Fd: &n, Flags: proto.Uint32(0), Type: typ.Enum()}
	}
	ify := func(ws ...*fsnotify.InotifyWdEntry) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_INOTIFY.Enum(), Id: proto.Uint32(1), Ify: &fsnotify.InotifyFileEntry{Id: proto.Uint32(1), Fown: noOwner(), Wd: ws}}
	}
	ffy := func(flags uint32, ms ...*fsnotify.FanotifyMarkEntry) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_FANOTIFY.Enum(), Id: proto.Uint32(1), Ffy: &fsnotify.FanotifyFileEntry{Id: proto.Uint32(1), Fown: noOwner(), Faflags: &flags, Mark: ms}}
	}
	nsf := func(id, flag uint32) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_NS.Enum(), Id: proto.Uint32(1), Nsf: &ns.NsFileEntry{Id: proto.Uint32(1), NsId: &id, NsCflag: &flag, Flags: proto.Uint32(0)}}
	}
	type entries map[string][]proto.Message
	for _, x := range []struct {
		name string
		in   entries
		want string
	}{
		{"no file", entries{"fdinfo-1": {fd(3, 9, fdinfo.FdTypes_REG)}}, "leads to file 9, which image files does not have"},
		{"other type", entries{"files": {reg(1, "/x")}, "fdinfo-1": {fd(3, 1, fdinfo.FdTypes_PIPE)}}, "of type PIPE, but file 1 is of type REG"},
		{"twice", entries{"files": {reg(1, "/x"), reg(1, "/y")}}, "file 1 is there twice"},
		{"fd twice", entries{"files": {reg(1, "/x")}, "fdinfo-1": {fd(3, 1, fdinfo.FdTypes_REG), fd(3, 1, fdinfo.FdTypes_REG)}}, "fd 3 is there twice"},
		{"fd range", entries{"files": {reg(1, "/x")}, "fdinfo-1": {fd(1<<31, 1, fdinfo.FdTypes_REG)}}, "out of range"},
		{"relative", entries{"files": {reg(1, "etc/passwd")}}, "not absolute"},
		{"nul", entries{"files": {reg(1, "/x\x00y")}}, "NUL"},
		{"empty entry", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1)}}}, "is empty"},
		{"unknown type", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_TUNF.Enum(), Id: proto.Uint32(1)}}}, "type TUNF, which is not carried"},
		{"no reg of a fifo", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_FIFO.Enum(), Id: proto.Uint32(1), Fifo: &fifo.FifoEntry{Id: proto.Uint32(1), PipeId: proto.Uint32(1), RegfId: proto.Uint32(4)}}}}, "file entry 4 is missing"},
		{"fifo of itself", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_FIFO.Enum(), Id: proto.Uint32(1), Fifo: &fifo.FifoEntry{Id: proto.Uint32(1), PipeId: proto.Uint32(1), RegfId: proto.Uint32(1)}}}}, "file entry 1 is missing"},
		{"epoll", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_EVENTPOLL.Enum(), Id: proto.Uint32(1), Epfd: &eventpoll.EventpollFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(0), Fown: noOwner(),
			Tfd: []*eventpoll.EventpollTfdEntry{{Id: proto.Uint32(1), Tfd: proto.Uint32(8), Events: proto.Uint32(1), Data: proto.Uint64(1)}}}}}, "fdinfo-1": {fd(3, 1, fdinfo.FdTypes_EVENTPOLL)}},
			"watches fd 8, which no process"},
		{"memfd inode", entries{"files": {&fdinfo.FileEntry{Type: fdinfo.FdTypes_MEMFD.Enum(), Id: proto.Uint32(1), Memfd: &memfd.MemfdFileEntry{Id: proto.Uint32(1), InodeId: proto.Uint32(4), Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: noOwner()}}}}, "has no memfd 4"},
		{"ghost", entries{"remap-fpath": {&remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(1), RemapId: proto.Uint32(3), RemapType: remap_file_path.RemapType_GHOST.Enum()}}}, "whose image ghost-file-3 is missing"},
		{"ghost of no type", entries{"remap-fpath": {&remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(1), RemapId: proto.Uint32(3), RemapType: remap_file_path.RemapType_GHOST.Enum()}},
			"ghost-file-3": {&ghost_file.GhostFileEntry{Mode: proto.Uint32(0o050000)}}}, "are not carried"},
		{"ghost symlink to nowhere", entries{"remap-fpath": {&remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(1), RemapId: proto.Uint32(3), RemapType: remap_file_path.RemapType_GHOST.Enum()}},
			"ghost-file-3": {&ghost_file.GhostFileEntry{Mode: proto.Uint32(unix.S_IFLNK)}}}, "is no target of a symlink"},
		{"linked remap", entries{"remap-fpath": {&remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(1), RemapId: proto.Uint32(3), RemapType: remap_file_path.RemapType_LINKED.Enum()}}}, "cannot be found under the name of file"},
		{"watch 0", entries{"files": {ify(&fsnotify.InotifyWdEntry{Wd: proto.Uint32(0), FHandle: &fh.FhEntry{}})}}, "watch number 0 is out of range"},
		{"watch twice", entries{"files": {ify(&fsnotify.InotifyWdEntry{Wd: proto.Uint32(3), FHandle: &fh.FhEntry{}}, &fsnotify.InotifyWdEntry{Wd: proto.Uint32(3), FHandle: &fh.FhEntry{}})}}, "watch 3 is there twice"},
		{"handle", entries{"files": {ify(&fsnotify.InotifyWdEntry{Wd: proto.Uint32(1), FHandle: &fh.FhEntry{Bytes: proto.Uint32(500)}})}}, "file handle of 500 bytes"},
		{"group that decides", entries{"files": {ffy(unix.FAN_CLASS_CONTENT)}}, "fanotify group are not carried"},
		{"mark on nothing", entries{"files": {ffy(0, &fsnotify.FanotifyMarkEntry{Type: fsnotify.MarkType_INODE.Enum()})}}, "mark 1: what it is on is missing"},
		{"mark that decides", entries{"files": {ffy(0, &fsnotify.FanotifyMarkEntry{Type: fsnotify.MarkType_MOUNT.Enum(), Me: &fsnotify.FanotifyMountMarkEntry{}, Mask: proto.Uint32(unix.FAN_OPEN_PERM)})}}, "mask 0x10000 is not carried"},
		{"namespace of no kind", entries{"files": {nsf(1, 7)}}, "namespaces of kind 0x7 do not exist"},
		{"namespace of nobody", entries{"files": {nsf(5, unix.CLONE_NEWNET)}}, "no process of the images lives in net namespace 5"},
		{"pipe bytes", entries{"pipes-data": {&pipe_data.PipeDataEntry{PipeId: proto.Uint32(1), Bytes: proto.Uint32(5)}}}, "tells of 5 bytes, but there are 0"},
		{"queue", entries{"sk-queues": {&sk_packet.SkPacketEntry{IdFor: proto.Uint32(1), Length: proto.Uint32(0)}}}, "which is no unix socket"},
	} {
		t.Run(x.name, func(t *testing.T) {
			set := image.NewSet()
			for file, ms := range x.in {
				for _, m := range ms {
					set.Add(image.Entry{File: file, Msg: m})
				}
			}
			_, err := NewRestorer(nil, set, RestoreOptions{})
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
}

// FuzzImages feeds NewRestorer with arbitrary entries: whatever they say, it
// returns, with or without an error.
func FuzzImages(f *testing.F) {
	seed := func(ms ...proto.Message) {
		var b []byte
		for _, m := range ms {
			p, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
			if err != nil {
				f.Fatal(err)
			}
			i := slices.IndexFunc(fuzzed, func(x fuzzEntry) bool { return x.msg.ProtoReflect().Descriptor() == m.ProtoReflect().Descriptor() })
			b = append(append(b, byte(i), byte(len(p))), p...)
		}
		f.Add(b)
	}
	seed(&fdinfo.FdinfoEntry{Id: proto.Uint32(1), Fd: proto.Uint32(3), Flags: proto.Uint32(0), Type: fdinfo.FdTypes_FIFO.Enum()},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_FIFO.Enum(), Id: proto.Uint32(1), Fifo: &fifo.FifoEntry{Id: proto.Uint32(1), PipeId: proto.Uint32(1), RegfId: proto.Uint32(2)}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(2), Reg: &regfile.RegFileEntry{Id: proto.Uint32(2), Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: noOwner(), Name: proto.String("/a")}})
	seed(&fdinfo.FileEntry{Type: fdinfo.FdTypes_EVENTPOLL.Enum(), Id: proto.Uint32(1), Epfd: &eventpoll.EventpollFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(0), Fown: noOwner(),
		Tfd: []*eventpoll.EventpollTfdEntry{{Id: proto.Uint32(2), Tfd: proto.Uint32(8), Events: proto.Uint32(1), Data: proto.Uint64(1)}}}})
	seed(&criu_core.TaskKobjIdsEntry{FilesId: proto.Uint32(1)}, &fdinfo.FdinfoEntry{Id: proto.Uint32(1), Fd: proto.Uint32(3), Flags: proto.Uint32(0), Type: fdinfo.FdTypes_REG.Enum()},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1), Reg: &regfile.RegFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: noOwner(), Name: proto.String("/a")}},
		&file_lock.FileLockEntry{Flag: proto.Uint32(lockPosix), Type: proto.Uint32(1), Pid: proto.Int32(7), Fd: proto.Int32(3), Start: proto.Int64(0), Len: proto.Int64(0)})
	seed(ttyInfo(1, 0x884d, nil), ttyInfo(2, 0x502, nil), ttyFile(10, 2, unix.O_RDWR), ttyFile(11, 1, 0), &tty.TtyDataEntry{TtyId: proto.Uint32(1), Data: []byte("x")})
	seed(&memfd.MemfdInodeEntry{InodeId: proto.Uint64(1), Name: proto.String("m")})
	seed(&bpfmap_data.BpfmapDataEntry{MapId: proto.Uint32(1), KeysBytes: proto.Uint32(4), ValuesBytes: proto.Uint32(4), Count: proto.Uint32(1)},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_BPFMAP.Enum(), Id: proto.Uint32(1), Bpf: &bpfmap_file.BpfmapFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(2), Fown: noOwner(),
			MapType: proto.Uint32(1), KeySize: proto.Uint32(4), ValueSize: proto.Uint32(4), MapId: proto.Uint32(1), MaxEntries: proto.Uint32(2)}})
	seed(&fdinfo.FileEntry{Type: fdinfo.FdTypes_TUNF.Enum(), Id: proto.Uint32(1), Tunf: &tun.TunfileEntry{Id: proto.Uint32(1), Netdev: proto.String("t")}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1), Reg: &regfile.RegFileEntry{Id: proto.Uint32(1), Flags: proto.Uint32(2), Pos: proto.Uint64(0), Fown: noOwner(), Name: proto.String("/dev/net/tun"), Mode: proto.Uint32(unix.S_IFCHR)}})
	seed(&fdinfo.FileEntry{Type: fdinfo.FdTypes_NETLINKSK.Enum(), Id: proto.Uint32(1), Nlsk: &sk_netlink.NetlinkSkEntry{Id: proto.Uint32(1), Groups: []uint32{1}, Fown: noOwner(), Opts: &sk_opts.SkOptsEntry{}}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_PACKETSK.Enum(), Id: proto.Uint32(2), Psk: &packet_sock.PacketSockEntry{Id: proto.Uint32(2), Type: proto.Uint32(3), Fown: noOwner(), Opts: &sk_opts.SkOptsEntry{}}})
	f.Fuzz(func(_ *testing.T, b []byte) {
		set := image.NewSet()
		for len(b) >= 2 {
			x, n := fuzzed[int(b[0])%len(fuzzed)], min(int(b[1]), len(b)-2)
			m := x.msg.ProtoReflect().New().Interface()
			if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(b[2:2+n], m); err == nil {
				e := image.Entry{File: x.file, Msg: m}
				if d, ok := m.(*bpfmap_data.BpfmapDataEntry); ok { // as many bytes as a file would have to have
					e.Extra = make([]byte, min(uint64(d.GetKeysBytes())+uint64(d.GetValuesBytes()), 1<<10))
				}
				set.Add(e)
			}
			b = b[2+n:]
		}
		r, err := NewRestorer(nil, set, RestoreOptions{FileLocks: true})
		if err == nil {
			_, _ = r.Calls(1)
			_ = r.Close()
		}
	})
}

type fuzzEntry struct {
	file string
	msg  proto.Message
}

var fuzzed = []fuzzEntry{
	{"files", &fdinfo.FileEntry{}}, {"fdinfo-1", &fdinfo.FdinfoEntry{}}, {"remap-fpath", &remap_file_path.RemapFilePathEntry{}},
	{"ghost-file-1", &ghost_file.GhostFileEntry{}}, {"memfd", &memfd.MemfdInodeEntry{}}, {"pipes-data", &pipe_data.PipeDataEntry{}},
	{"sk-queues", &sk_packet.SkPacketEntry{}}, {image.FileLocksFile, &file_lock.FileLockEntry{}}, {"ids-7", &criu_core.TaskKobjIdsEntry{}},
	{image.BpfmapDataFile, &bpfmap_data.BpfmapDataEntry{}}, {image.TtyInfoFile, &tty.TtyInfoEntry{}}, {image.TtyDataFile, &tty.TtyDataEntry{}},
}
