package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

func init() {
	scenes["external"] = func(dir string) fds {
		log := filepath.Join(dir, "log")
		must(os.WriteFile(log, []byte("old line\n"), 0o644))
		fifo := filepath.Join(dir, "fifo")
		must(unix.Mkfifo(fifo, 0o600))
		out := fds{
			"log":  open(log, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_TRUNC),
			"read": open(log, unix.O_RDONLY),
			"fifo": open(fifo, unix.O_RDWR|unix.O_NONBLOCK),
		}
		must1(unix.Write(out["log"], []byte("0123456789")))
		must1(unix.Seek(out["read"], 4, 0))
		must1(unix.Write(out["fifo"], []byte("stays")))
		out["dup"] = must1(unix.Dup(out["log"]))
		return out
	}
}

// keyOf makes the key as the operator would, from /proc and stat.
func keyOf(t *testing.T, c *child, name string) string {
	t.Helper()
	info, err := procfs.ReadFdinfo(c.pid(), c.fds[name])
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(procfs.Path(c.pid(), "fd", fmt.Sprint(c.fds[name])), &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("file[%x:%x]", info.MntID, st.Ino)
}

func TestExternal(t *testing.T) {
	for _, forward := range []bool{false, true} {
		t.Run(fmt.Sprintf("forward=%v", forward), func(t *testing.T) {
			c := start(t, "external")
			logKey, fifoKey := keyOf(t, c, "log"), keyOf(t, c, "fifo")
			log, fifo := lookAt(t, c.pid(), c.fds["log"]), lookAt(t, c.pid(), c.fds["fifo"])
			// Upper case and 0x are understood.
			d := dumpOK(t, Options{External: []string{strings.ToUpper(logKey[5:]), fifoKey}[1:]}, c)
			_ = d
			d = dumpOK(t, Options{External: []string{"file[0x" + strings.ToUpper(strings.Replace(logKey[5:], ":", ":0x", 1)), fifoKey}}, c)
			_, ext, _, _ := d.d.Plan()
			c.kill()

			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "log"), []byte("there\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
				t.Fatal(err)
			}
			// A forwarded file must be open as it was; a reopened one only somehow.
			flags := os.O_RDONLY
			if forward {
				flags = os.O_RDWR | os.O_APPEND
			}
			handedLog := mustOpen(t, filepath.Join(dir, "log"), flags)
			handedFifo := mustOpen(t, filepath.Join(dir, "fifo"), os.O_RDWR)
			in := map[string]Inherit{logKey: {File: handedLog, Forward: forward}, fifoKey: {File: handedFifo, Forward: forward}}

			if ps := CheckDestination(nil, ext, nil, in); len(ps) != 0 {
				t.Errorf("CheckDestination: %v", ps)
			}
			r := restore(t, d, RestoreOptions{Inherit: in})
			if !forward {
				got := lookAt(t, os.Getpid(), r.fd(c, "log"))
				// O_CREAT and O_TRUNC do not stay in the flags of a description.
				want := look{Link: filepath.Join(dir, "log"), Flags: log.Flags, Pos: log.Pos}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("log (-want +got):\n%s", diff)
				}
				got = lookAt(t, os.Getpid(), r.fd(c, "fifo"))
				want = look{Link: filepath.Join(dir, "fifo"), Flags: fifo.Flags}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("fifo (-want +got):\n%s", diff)
				}
				if s, err := readFD(t, r.fd(c, "read")); err != nil || s != "e\n" {
					t.Errorf("read from position 4: %q, %v", s, err)
				}
			}
			same := func(a, b int) bool {
				ord, err := sys.KcmpFile(os.Getpid(), a, os.Getpid(), b)
				return err == nil && ord == sys.Equal
			}
			if !same(r.fd(c, "log"), r.fd(c, "dup")) || same(r.fd(c, "log"), r.fd(c, "read")) != forward {
				t.Error("sharing of descriptions is not as before")
			}
			if same(r.fd(c, "log"), int(handedLog.Fd())) != forward || same(r.fd(c, "fifo"), int(handedFifo.Fd())) != forward {
				t.Errorf("the handed description itself, want %v", forward)
			}
			if _, err := unix.Write(r.fd(c, "log"), []byte("more\n")); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || string(b) != "there\nmore\n" {
				t.Errorf("log at the destination: %q, %v", b, err)
			}
			// What was in the fifo stays outside.
			if e := events(t, r.fd(c, "fifo")); e&unix.POLLIN != 0 {
				t.Error("the external fifo's bytes travelled")
			}
		})
	}
}

func mustOpen(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	// Not os.OpenFile, which opens fifos non-blocking.
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestExternalRefused(t *testing.T) {
	c := start(t, "external")
	logKey, fifoKey := keyOf(t, c, "log"), keyOf(t, c, "fifo")
	d := dumpOK(t, Options{External: []string{logKey, fifoKey}}, c)
	_, ext, _, _ := d.d.Plan()
	c.kill()
	dir := t.TempDir()
	plainFile := filepath.Join(dir, "plain")
	if err := os.WriteFile(plainFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	reg, fifo := mustOpen(t, plainFile, os.O_RDONLY), mustOpen(t, filepath.Join(dir, "fifo"), os.O_RDWR)
	closed, err := os.Open(plainFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name  string
		in    map[string]Inherit
		want  string
		check string // of CheckDestination
	}{
		{"nothing", nil, "external file " + logKey + " was not handed in: supply it", "nothing was supplied for this external regular"},
		{"one missing", map[string]Inherit{logKey: {File: reg}}, "external file " + fifoKey + " was not handed in", "nothing was supplied for this external fifo"},
		{"kind", map[string]Inherit{logKey: {File: fifo}, fifoKey: {File: fifo}}, "it is a fifo, expected a regular", "it is a fifo, expected a regular"},
		{"kind of fifo", map[string]Inherit{logKey: {File: reg}, fifoKey: {File: reg}}, "it is a regular, expected a fifo", "it is a regular, expected a fifo"},
		{"mode forwarded", map[string]Inherit{logKey: {File: reg, Forward: true}, fifoKey: {File: fifo}}, "it is open for reading, expected for writing", "it is open for reading"},
		{"closed", map[string]Inherit{logKey: {File: closed}, fifoKey: {File: fifo}}, "it is not open", "it is not open"},
		{"unmatched", map[string]Inherit{logKey: {File: reg}, fifoKey: {File: fifo}, "file[1:1]": {File: reg}}, "handed file file[1:1]: the images have no file of that name; nearest: file[", "the tree has no such file"},
		{"twice", map[string]Inherit{logKey: {File: reg}, fifoKey: {File: fifo}, strings.ToUpper(logKey[:4]) + logKey[4:]: {File: reg}}, "no file of that name", "the tree has no such file"},
		{"twice hex", map[string]Inherit{logKey: {File: reg}, fifoKey: {File: fifo}, "file[0x" + logKey[5:]: {File: reg}}, "another one was handed in", ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			if x.check != "" {
				wantProblem(t, CheckDestination(nil, ext, nil, x.in), x.check)
			}
			r, err := NewRestorer(nil, d.set, RestoreOptions{Inherit: x.in})
			if err == nil {
				err = r.Open()
				defer func() { _ = r.Close() }()
			}
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
			if x.name == "nothing" {
				for _, s := range []string{fmt.Sprintf("fd %d of pid %d", c.fds["log"], c.pid()), filepath.Join(c.dir, "log"), filepath.Join(c.dir, "fifo")} {
					if !strings.Contains(err.Error(), s) {
						t.Errorf("the error does not name %q: %v", s, err)
					}
				}
			}
		})
	}
}

// A file may also be handed in for a path; its recorded flags and position are kept.
func TestInheritPath(t *testing.T) {
	c := start(t, "external")
	d := dumpOK(t, Options{}, c)
	files, _, _, _ := d.d.Plan()
	c.kill()
	p := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(p, []byte("elsewhere"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(c.dir, "log")); err != nil {
		t.Fatal(err)
	}
	// CRIU writes such a path without its first slash.
	in := map[string]Inherit{strings.TrimPrefix(filepath.Join(c.dir, "log"), "/"): {File: mustOpen(t, p, os.O_RDONLY)}}
	if ps := CheckDestination(files, nil, nil, in); len(ps) != 0 {
		t.Errorf("CheckDestination: %v", ps)
	}
	r := restore(t, d, RestoreOptions{Inherit: in})
	if s, err := readFD(t, r.fd(c, "read")); err != nil || s != "where" {
		t.Errorf("read %q, %v", s, err)
	}
	if _, err := unix.Write(r.fd(c, "dup"), []byte("!")); err != nil {
		t.Error(err)
	}
}

func TestExternalDeletedAndDirectory(t *testing.T) {
	c := start(t, "exotic")
	key, dirKey := keyOf(t, c, "gone"), keyOf(t, c, "dir")
	d := dumpOK(t, Options{External: []string{key, dirKey}}, c)
	c.kill()
	if len(d.data) != 0 {
		t.Error("the content of an external file travels")
	}
	there := t.TempDir()
	p := filepath.Join(there, "f")
	if err := os.WriteFile(p, []byte("xyz"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := restore(t, d, RestoreOptions{Inherit: map[string]Inherit{key: {File: mustOpen(t, p, unix.O_PATH)}, dirKey: {File: mustOpen(t, there, unix.O_RDONLY)}}})
	if s, err := readFD(t, r.fd(c, "gone")); err != nil || s != "yz" {
		t.Errorf("read %q, %v", s, err)
	}
	if got := lookAt(t, os.Getpid(), r.fd(c, "dir")).Link; got != there {
		t.Errorf("directory %s", got)
	}
}

func init() {
	scenes["exotic"] = func(dir string) fds {
		p := filepath.Join(dir, "gone")
		must(os.WriteFile(p, []byte("abcdef"), 0o600))
		out := fds{"gone": open(p, unix.O_RDWR), "dir": open(dir, unix.O_RDONLY|unix.O_DIRECTORY)}
		must1(unix.Seek(out["gone"], 1, 0))
		must(os.Remove(p))
		return out
	}
}

func TestPlanExternal(t *testing.T) {
	c := start(t, "external")
	key := keyOf(t, c, "fifo")
	d := NewDumper(nil, Options{External: []string{key}}, nil)
	defer func() { _ = d.Close() }()
	if err := d.AddProcess(c.proc(1)); err != nil {
		t.Fatal(err)
	}
	if err := d.Finish(); err != nil {
		t.Fatal(err)
	}
	_, ext, _, _ := d.Plan()
	want := []plan.External{{Key: key, Path: filepath.Join(c.dir, "fifo"), Kind: "fifo", Flags: unix.O_RDWR | unix.O_NONBLOCK | unix.O_LARGEFILE | 0o100000, Mode: unix.S_IFIFO | 0o600}}
	if diff := cmp.Diff(want, ext); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
