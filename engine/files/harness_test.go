package files

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/refuse"
)

// Tests start this binary again as a child that opens files (a scene) and waits;
// the test dumps it, kills it, and makes its files again.
const (
	envScene = "FILES_TEST_SCENE"
	envReady = "FILES_TEST_READY" // file to write the scene's result to
	envDir   = "FILES_TEST_DIR"
	envCalls = "FILES_TEST_CALLS" // file with calls to execute, for the scene "restored"
)

// fds are descriptor numbers by the names that a scene gives them.
type fds map[string]int

// scenes are the bodies of children; each runs with a directory of its own.
var scenes = map[string]func(dir string) fds{}

func TestMain(m *testing.M) {
	name := os.Getenv(envScene)
	if name == "" {
		os.Exit(m.Run())
	}
	// What this process inherited from whoever runs the tests is no part of them.
	must(unix.CloseRange(200, 1<<31-1, 0))
	var got fds
	if name == "restored" {
		runCalls(os.Getenv(envCalls))
	} else {
		got = scenes[name](os.Getenv(envDir))
	}
	b, err := json.Marshal(got)
	must(err)
	tmp := os.Getenv(envReady) + ".tmp"
	must(os.WriteFile(tmp, b, 0o600))
	must(os.Rename(tmp, os.Getenv(envReady)))
	time.Sleep(10 * time.Minute)
	os.Exit(1)
}

// must is for children: the parent sees their standard error.
func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(2)
	}
}

func must1[T any](v T, err error) T {
	must(err)
	return v
}

type child struct {
	t    *testing.T
	cmd  *exec.Cmd
	dir  string
	fds  fds
	dead bool
}

// start runs a scene until it is ready.
func start(t *testing.T, scene string, files ...*os.File) *child {
	t.Helper()
	return startIn(t, t.TempDir(), scene, nil, files...)
}

func startIn(t *testing.T, dir, scene string, env []string, files ...*os.File) *child {
	t.Helper()
	ready := filepath.Join(t.TempDir(), "ready")
	c := &child{t: t, dir: dir, cmd: exec.Command(os.Args[0])}
	c.cmd.Env = append(append(os.Environ(), envScene+"="+scene, envReady+"="+ready, envDir+"="+dir), env...)
	c.cmd.ExtraFiles = files
	// Files, not pipes: a pipe to the test would be one to the outside.
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stderr.Close() }()
	c.cmd.Stderr = stderr
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(2 * time.Millisecond) {
		b, err := os.ReadFile(ready)
		if err == nil {
			if err := json.Unmarshal(b, &c.fds); err != nil {
				t.Fatal(err)
			}
			break
		}
		st, _ := procfs.ReadStat(c.pid())
		if st.Zombie() || time.Now().After(deadline) {
			msg, _ := os.ReadFile(stderr.Name())
			t.Fatalf("scene %s did not get ready: %s", scene, msg)
		}
	}
	return c
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) kill() {
	if !c.dead {
		c.dead = true
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	}
}

// stop freezes a child, as a dump does.
func (c *child) stop() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		c.t.Fatal(err)
	}
	for {
		st, err := procfs.ReadStat(c.pid())
		if err != nil {
			c.t.Fatal(err)
		}
		if st.State == 'T' {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (c *child) proc(filesID uint32) Proc {
	return Proc{Pid: c.pid(), VPid: c.pid(), Comm: "child", FilesID: filesID}
}

// dumped is the outcome of a dump.
type dumped struct {
	set      *image.Set
	data     map[image.DataID][]byte
	problems []refuse.Problem
	d        *Dumper
}

// reencode sends a message through its wire form, as images do.
func reencode(t *testing.T, m proto.Message) proto.Message {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	out := m.ProtoReflect().New().Interface()
	if err := proto.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func dumpAll(t *testing.T, o Options, cs ...*child) *dumped {
	t.Helper()
	out := &dumped{set: image.NewSet(), data: map[image.DataID][]byte{}}
	d := NewDumper(nil, o, func(e image.Entry) error {
		e.Msg = reencode(t, e.Msg)
		e.Extra = bytes.Clone(e.Extra)
		out.set.Add(e)
		return nil
	})
	out.d = d
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i, c := range cs {
		c.stop()
		if err := d.AddProcess(c.proc(uint32(i + 1))); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Finish(); err != nil {
		t.Fatal(err)
	}
	out.problems = d.Refusal()
	_ = d.TakeAccepted()
	for _, x := range d.Data() {
		b, err := io.ReadAll(io.NewSectionReader(x.File, 0, x.Size))
		if err != nil {
			t.Fatal(err)
		}
		out.data[x.ID] = b
	}
	out.set.Facts = &image.Facts{Version: 1, BootID: bootID(), RealtimeNS: time.Now().UnixNano(), Files: d.Facts()}
	return out
}

// dumpOK dumps what must be carried.
func dumpOK(t *testing.T, o Options, cs ...*child) *dumped {
	t.Helper()
	out := dumpAll(t, o, cs...)
	for _, p := range out.problems {
		t.Errorf("refused: %s", p)
	}
	if t.Failed() {
		t.FailNow()
	}
	return out
}

// restored is the outcome of a restore.
type restored struct {
	t *testing.T
	*Restorer
	tables map[uint32]map[int]*os.File
}

func restore(t *testing.T, d *dumped, o RestoreOptions) *restored {
	t.Helper()
	r, err := NewRestorer(nil, d.set, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(r.Open(), r.OpenUnix()); err != nil {
		t.Fatal(err)
	}
	for id, b := range d.data {
		f, err := r.DataFile(id, 0, b)
		if err != nil || f == nil {
			t.Fatalf("no file for data %s: %v", id, err)
		}
		if id.Kind == image.Shmem { // whole pages, as the core has them
			b = append(bytes.Clone(b), make([]byte, (4096-len(b)%4096)%4096)...)
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(r.Seal(), r.Last()); err != nil {
		t.Fatal(err)
	}
	out := &restored{t: t, Restorer: r, tables: map[uint32]map[int]*os.File{}}
	for id := range r.tables {
		ds := r.Descriptors(id)
		fs, err := r.Hold(id, ds)
		if err != nil {
			t.Fatal(err)
		}
		out.tables[id] = map[int]*os.File{}
		for i, d := range ds {
			out.tables[id][d.FD] = fs[i]
		}
	}
	return out
}

// fd is the number, in this process, of what the child had as name.
func (r *restored) fd(c *child, name string) int {
	r.t.Helper()
	n, ok := c.fds[name]
	if !ok {
		r.t.Fatalf("the scene has no %s", name)
	}
	for _, tab := range r.tables {
		if f := tab[n]; f != nil {
			return int(f.Fd())
		}
	}
	r.t.Fatalf("%s (fd %d) was not restored", name, n)
	return -1
}

// look is what can be seen of a descriptor.
type look struct {
	Link  string
	Flags int
	Pos   int64
}

func lookAt(t *testing.T, pid, fd int) look {
	t.Helper()
	info, err := procfs.ReadFdinfo(pid, fd)
	if err != nil {
		t.Fatal(err)
	}
	link, err := procfs.FdLink(pid, fd)
	if err != nil {
		t.Fatal(err)
	}
	return look{Link: link, Flags: int(info.Flags) &^ unix.O_CLOEXEC, Pos: info.Pos}
}

func readFD(t *testing.T, fd int) (string, error) {
	t.Helper()
	b := make([]byte, 1<<20)
	n, err := unix.Read(fd, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// readable polls for events without waiting.
func events(t *testing.T, fd int) int16 {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT | unix.POLLRDHUP}}
	if _, err := unix.Poll(p, 0); err != nil {
		t.Fatal(err)
	}
	return p[0].Revents
}

// callsText is the form in which calls go to the scene "restored". The test
// binary imports no unsafe, so that it executes the few that there are by name.
func callsText(calls []*ptrace.Call) string {
	var b strings.Builder
	for _, c := range calls {
		fmt.Fprintf(&b, "%d", c.Nr)
		for _, a := range c.Args {
			if a.In != nil {
				fmt.Fprintf(&b, " %x", a.In)
			} else {
				fmt.Fprintf(&b, " %d", int64(a.Val))
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func runCalls(path string) {
	for line := range strings.Lines(string(must1(os.ReadFile(path)))) {
		w := strings.Fields(line)
		n := func(i int) int { return must1(strconv.Atoi(w[i+1])) }
		in := func(i int) []byte {
			var b []byte
			_, err := fmt.Sscanf(w[i+1], "%x", &b)
			must(err)
			return b
		}
		var err error
		switch nr := must1(strconv.Atoi(w[0])); nr {
		case unix.SYS_EPOLL_CTL:
			b := in(3)
			ev := &unix.EpollEvent{Events: binary.NativeEndian.Uint32(b)}
			d := binary.NativeEndian.Uint64(b[len(b)-8:])
			ev.Fd, ev.Pad = int32(d), int32(d>>32)
			err = unix.EpollCtl(n(0), n(1), n(2), ev)
		case unix.SYS_EPOLL_PWAIT:
			var got int
			if got, err = unix.EpollWait(n(0), make([]unix.EpollEvent, n(2)), n(3)); err == nil && got != 1 {
				err = fmt.Errorf("%d events", got)
			}
		case unix.SYS_DUP3:
			err = unix.Dup3(n(0), n(1), n(2))
		case unix.SYS_CLOSE:
			err = unix.Close(n(0))
		case unix.SYS_LISTEN:
			err = unix.Listen(n(0), n(1))
		case unix.SYS_FLOCK:
			err = unix.Flock(n(0), n(1))
		case unix.SYS_FCNTL:
			cmd, arg := n(1), 0
			if cmd == unix.F_SETLK || cmd == unix.F_OFD_SETLK {
				b := in(2)
				must(unix.FcntlFlock(uintptr(n(0)), cmd, &unix.Flock_t{Type: int16(binary.NativeEndian.Uint16(b)),
					Start: int64(binary.NativeEndian.Uint64(b[8:])), Len: int64(binary.NativeEndian.Uint64(b[16:]))}))
				continue
			}
			if cmd == 15 { // F_SETOWN_EX
				b := in(2)
				cmd, arg = unix.F_SETOWN, int(binary.NativeEndian.Uint32(b[4:]))
				if arg == must1(strconv.Atoi(os.Getenv("FILES_TEST_PID"))) {
					arg = os.Getpid()
				}
			} else {
				arg = n(2)
			}
			_, err = unix.FcntlInt(uintptr(n(0)), cmd, arg)
		default:
			err = errors.New("no such call in tests")
		}
		if err != nil {
			must(fmt.Errorf("%s: %w", line, err))
		}
	}
}

// land gives the restored files to a process under the numbers that they had,
// and lets it execute the calls.
func (r *restored) land(old *child, filesID uint32) *child {
	r.t.Helper()
	calls, err := r.Calls(filesID)
	if err != nil {
		r.t.Fatal(err)
	}
	path := filepath.Join(r.t.TempDir(), "calls")
	if err := os.WriteFile(path, []byte(callsText(calls)), 0o600); err != nil {
		r.t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	var extra []*os.File
	tab := r.tables[filesID]
	top := 2
	for fd := range tab {
		top = max(top, fd)
	}
	for fd := 3; fd <= top; fd++ {
		f := tab[fd]
		if f == nil {
			f = null
		}
		extra = append(extra, f)
	}
	return startIn(r.t, old.dir, "restored", []string{envCalls + "=" + path, "FILES_TEST_PID=" + strconv.Itoa(old.pid())}, extra...)
}

func wantProblem(t *testing.T, ps []refuse.Problem, text string) {
	t.Helper()
	if !slices.ContainsFunc(ps, func(p refuse.Problem) bool { return strings.Contains(p.String(), text) }) {
		t.Errorf("no problem says %q among %d:", text, len(ps))
		for _, p := range ps {
			t.Log(p)
		}
	}
}
