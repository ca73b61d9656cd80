package files

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fh"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/procfs"
)

func TestHandles(t *testing.T) {
	for n := range maxHandle + 1 {
		h := procfs.Handle{Type: 1, Data: bytes.Repeat([]byte{7}, n)}
		got, err := handleOf(fhEntry(h, "/x"))
		if err != nil || got.Type != 1 || !bytes.Equal(got.Data, h.Data) {
			t.Fatalf("%d bytes come back as %v, %v", n, got, err)
		}
	}
	for _, e := range []*fh.FhEntry{
		{Bytes: proto.Uint32(maxHandle + 1), Handle: make([]uint64, 32)},
		{Bytes: proto.Uint32(9), Handle: make([]uint64, 1)},
		{Bytes: proto.Uint32(1<<32 - 1)},
	} {
		if h, err := handleOf(e); err == nil {
			t.Errorf("%v is taken for %v", e, h)
		}
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(uint32(8), uint32(1), []byte("12345678"))
	f.Add(uint32(200), uint32(1), []byte{})
	f.Fuzz(func(t *testing.T, n, typ uint32, b []byte) {
		e := fhEntry(procfs.Handle{Data: b[:min(len(b), 4096)]}, "")
		e.Bytes, e.Type = &n, &typ
		if h, err := handleOf(e); err == nil && (len(h.Data) != int(n) || n > maxHandle) {
			t.Errorf("a handle of %d bytes became one of %d", n, len(h.Data))
		}
	})
}

// A watched inode is known by its handle, whatever its path is by now.
func TestFindWatched(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "a")
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	h, err := fileHandle(f)
	if err != nil {
		t.Fatal(err)
	}
	w := watchedInode{sdev: unix.Major(uint64(st.Dev))<<20 | unix.Minor(uint64(st.Dev)), ino: st.Ino, handle: h}
	if err := os.Rename(p, filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, handle := range []procfs.Handle{h, {}} { // with and without a handle
		w.handle = handle
		d := NewDumper(nil, Options{FileOptions: plan.FileOptions{IrmapScanPaths: []string{dir}}}, nil)
		o := &object{holders: []holder{{proc: &Proc{Pid: os.Getpid()}}}}
		got, link := d.findWatched(o, w)
		if got == nil || link != filepath.Join(dir, "b") {
			t.Fatalf("found at %q", link)
		}
		_ = got.Close()
		w.ino += 1 << 40 // the next one may be that of another file
		w.handle.Data = bytes.Repeat([]byte{1}, len(w.handle.Data))
		if got, link := d.findWatched(o, w); got != nil {
			t.Errorf("an inode that is not there was found at %s", link)
		}
		w.ino -= 1 << 40
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestValidate(t *testing.T) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = self.Close() }()
	st, err := self.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mode := uint32(unix.S_IFREG) | uint32(st.Mode().Perm())
	entry := func(change func(*regfile.RegFileEntry)) *regfile.RegFileEntry {
		e := &regfile.RegFileEntry{Flags: proto.Uint32(0), Size: proto.Uint64(uint64(st.Size())), Mode: proto.Uint32(mode)}
		change(e)
		return e
	}
	shrunk := entry(func(e *regfile.RegFileEntry) { e.Size = proto.Uint64(uint64(st.Size()) + 1) })
	grown := entry(func(e *regfile.RegFileEntry) { e.Size = proto.Uint64(uint64(st.Size()) - 1) })
	log := entry(func(e *regfile.RegFileEntry) {
		e.Size, e.Flags = proto.Uint64(1), proto.Uint32(unix.O_WRONLY|unix.O_APPEND)
	})
	other := entry(func(e *regfile.RegFileEntry) { e.BuildId = []uint32{1, 2} })
	perm := entry(func(e *regfile.RegFileEntry) { e.Mode = proto.Uint32(mode ^ 0o022) })
	typ := entry(func(e *regfile.RegFileEntry) { e.Mode = proto.Uint32(unix.S_IFDIR | 0o755) })
	for _, tc := range []struct {
		name string
		o    plan.FileRestoreOptions
		e    *regfile.RegFileEntry
		want string
	}{
		{"shrunk", plan.FileRestoreOptions{}, shrunk, "at least"},
		{"grown", plan.FileRestoreOptions{}, grown, ""},
		{"grown, sizes count", plan.FileRestoreOptions{Validation: plan.ValidateSize}, grown, "expected"},
		{"a log that grew", plan.FileRestoreOptions{Validation: plan.ValidateSize}, log, ""},
		{"other library", plan.FileRestoreOptions{}, other, "another program or library"},
		{"other library, only sizes count", plan.FileRestoreOptions{Validation: plan.ValidateSize}, other, ""},
		{"permissions", plan.FileRestoreOptions{}, perm, ""},
		{"permissions count", plan.FileRestoreOptions{Validation: plan.ValidateBuildID}, perm, "has mode"},
		{"permissions overlooked", plan.FileRestoreOptions{Validation: plan.ValidateBuildID, SkipModeCheck: true}, perm, ""},
		{"another type", plan.FileRestoreOptions{}, typ, "is a regular here"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &Restorer{opts: RestoreOptions{FileRestoreOptions: tc.o}}
			err := r.validate(self, tc.e)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

// Objects stay in order and are found again, however many there are.
func TestOrderedObjects(t *testing.T) {
	var g orderedObjects
	p := &Proc{Pid: os.Getpid()}
	var open []int
	defer func() {
		for _, fd := range open {
			_ = unix.Close(fd)
		}
	}()
	for range 3 * pieceMax {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, fd)
		found, add, err := g.find(&object{holders: []holder{{proc: p, fd: fd}}})
		if err != nil || found != nil {
			t.Fatalf("a new file is taken for fd %v (%v)", found, err)
		}
		add(&object{holders: []holder{{proc: p, fd: fd}}})
	}
	if len(g.pieces) < 3 {
		t.Errorf("%d pieces", len(g.pieces))
	}
	for _, fd := range open {
		found, _, err := g.find(&object{holders: []holder{{proc: p, fd: fd}}})
		if err != nil || found == nil || found.first().fd != fd {
			t.Fatalf("fd %d is taken for %v (%v)", fd, found, err)
		}
	}
}

// What is beyond the budget of descriptors is let go and taken again; kinds that
// must be looked at all at once are refused then.
func TestBudget(t *testing.T) {
	dump := func(c *child, budget int) *Dumper {
		d := NewDumper(nil, Options{}, func(image.Entry) error { return nil })
		t.Cleanup(func() { _ = d.Close() })
		d.budget = budget
		if err := d.AddProcess(c.proc(1)); err != nil {
			t.Fatal(err)
		}
		if err := d.Finish(); err != nil {
			t.Fatal(err)
		}
		return d
	}
	sockets := start(t, "unix")
	sockets.stop()
	if d := dump(sockets, 1); len(d.Refusal()) == 0 || !strings.Contains(d.Refusal()[0].Reason, "can look at 1 at once") {
		t.Errorf("with a budget of 1: %v", d.Refusal())
	}
	c := start(t, "anon")
	c.stop()
	all, few := dump(c, 1000), dump(c, 5)
	if len(few.objects) != len(all.objects) || len(few.Refusal()) > 0 {
		t.Errorf("with a budget of 5 there are %d objects, and %v; want %d", len(few.objects), few.Refusal(), len(all.objects))
	}
	for i, o := range few.objects {
		if !o.parked && i > 5 && o.first().fd >= 0 {
			t.Errorf("object %d was kept", i)
		}
		if len(o.entries) != len(all.objects[i].entries) {
			t.Errorf("object %d (%s) has %d entries, want %d", i, o.link, len(o.entries), len(all.objects[i].entries))
		}
	}
}
