package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// threeScript waits for lines in a fifo and tells for each how three descriptions
// of one file stand, and with whom they are shared: the child has two of them, and
// another one that it opened itself.
const threeScript = `
import ctypes, fcntl, os, signal, sys
fifo, three = sys.argv[1:]
kcmp = lambda p, q, a, b: int(ctypes.CDLL(None).syscall(312, p, q, 0, a, b) == 0)
f = os.open(fifo, os.O_RDWR)
assert f == 3, f
os.dup2(os.open(__file__, os.O_RDONLY), 5)
for n, flags in (10, os.O_RDONLY), (11, os.O_WRONLY | os.O_APPEND), (12, os.O_RDWR):
    fd = os.open(three, flags)
    os.dup2(fd, n)
    os.close(fd)
os.lseek(12, 100, os.SEEK_SET)
r, w = os.pipe()
me, child = os.getpid(), os.fork()
if child == 0:
    os.close(12)
    os.dup2(os.open(three, os.O_RDONLY), 5)
    os.write(w, b"x")
    os.close(r)
    os.close(w)
    while True:
        signal.pause()
os.close(w)
os.read(r, 2)
os.close(r)
n, rest = 0, b""
while True:
    rest += os.read(3, 4096)
    while b"\n" in rest:
        line, rest = rest.split(b"\n", 1)
        n += 1
        if line == b"write":
            os.write(11, b"more")
        if line == b"read":
            line += b" " + os.pread(12, 4, os.lseek(12, 0, os.SEEK_CUR))
        fds = ["%o@%d" % (fcntl.fcntl(x, fcntl.F_GETFL) & 0o7777, os.lseek(x, 0, os.SEEK_CUR)) for x in (10, 11, 12)]
        same = [kcmp(me, child, 10, 10), kcmp(me, child, 11, 11), kcmp(me, me, 10, 11), kcmp(me, me, 10, 12), kcmp(me, me, 11, 12), kcmp(me, child, 10, 5)]
        print(n, line.decode(), *fds, *same, flush=True)
`

// three is such a script.
type three struct {
	t    *testing.T
	pid  int
	out  string
	said string
	n    int
}

func startThree(ctx context.Context, t *testing.T, h *hosts.Host, dir string) *three {
	t.Helper()
	if _, err := h.Run(ctx, "mkfifo", "/tmp/fifo"); err != nil {
		t.Fatal(err)
	}
	writeTo(t, h, "/tmp/three", strings.Repeat("abcd", 50))
	path := filepath.Join(dir, "three.py")
	if err := os.WriteFile(path, []byte(threeScript), 0o644); err != nil {
		t.Fatal(err)
	}
	s := &three{t: t, out: filepath.Join(dir, "out")}
	var err error
	if s.pid, err = h.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", path, "/tmp/fifo", "/tmp/three"}, Stdout: s.out}); err != nil {
		t.Fatal(err)
	}
	return s
}

// says sends a line and waits for what the script tells of it; end is the offset of
// the description that appends.
func (s *three) says(ctx context.Context, fifo *os.File, line, tells string, end int) {
	s.t.Helper()
	if _, err := fifo.WriteString(line + "\n"); err != nil {
		s.t.Fatal(err)
	}
	s.n++
	if tells != "" {
		line += " " + tells
	}
	s.said += fmt.Sprintf("%d %s %o@0 %o@%d %o@100 1 1 0 0 0 0\n", s.n, line, unix.O_RDONLY, unix.O_WRONLY|unix.O_APPEND, end, unix.O_RDWR)
	waitText(ctx, s.t, s.out, s.said)
}

func openFifo(t *testing.T, h *hosts.Host, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(h.Path(path), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func containsAll(s string, all []string) bool {
	return !slices.ContainsFunc(all, func(want string) bool { return !strings.Contains(s, want) })
}

// TestExternalPython is the example of the report that external files come from: a
// script in Python on a fifo, and three descriptions of one file, of which one
// handed descriptor is the mapping.
func TestExternalPython(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	s := startThree(ctx, t, h, newDir(t))
	fifo := openFifo(t, h, "/tmp/fifo")
	s.says(ctx, fifo, "before", "", 0)
	s.says(ctx, fifo, "write", "", 204)
	fifoKey, threeKey := key(t, h, s.pid, 3), key(t, h, s.pid, 10)
	shown := mustAgent(ctx, t, h, nil, "inspect", "-t", fmt.Sprint(s.pid), "--external", "path:/tmp/thr*", "--output", "json")
	var doc struct{ Objects []planned }
	if err := json.Unmarshal([]byte(shown.stdout), &doc); err != nil {
		t.Fatalf("%v: %s", err, shown.stdout)
	}
	carried := map[string]string{}
	for _, o := range doc.Objects {
		carried[o.Key] = o.Kind + " " + o.Carry
	}
	if carried[fifoKey] != "fifo path" || carried[threeKey] != "regular external" {
		t.Errorf("inspect: the fifo is %q, the file %q", carried[fifoKey], carried[threeKey])
	}
	shown = mustAgent(ctx, t, h, nil, "inspect", "-t", fmt.Sprint(s.pid))
	for _, want := range []string{fifoKey, threeKey, "exe", "cwd", "/tmp/three"} {
		if !strings.Contains(shown.stdout, want) {
			t.Errorf("inspect does not show %s:\n%s", want, shown.stdout)
		}
	}
	for selector, want := range map[string][]string{
		"path:/tmp/thre":                  {"4", "nothing that the tree holds matches", "nearest: path:/tmp/three"},
		"role:stdin=proxy":                {"2", "a selector stands alone here"},
		"fd:" + fmt.Sprint(s.pid) + ":99": {"4", "nearest: fd:"},
		"kind:fifi":                       {"2", "did you mean fifo"},
	} {
		if o := agentCmd(ctx, t, h, nil, "inspect", "-t", fmt.Sprint(s.pid), "--external", selector); fmt.Sprint(o.code) != want[0] || !containsAll(o.stderr, want[1:]) {
			t.Errorf("inspect --external %s: exit code %d, %q, want %q", selector, o.code, o.stderr, want)
		}
	}
	img := dump(ctx, t, h, s.pid, "--external", "kind:fifo", "--external", "path:/tmp/three")
	if _, err := h.Run(ctx, "sh", "-c", "mv /tmp/three /tmp/gone; rm /tmp/fifo; mkfifo /tmp/other"); err != nil {
		t.Fatal(err)
	}
	writeTo(t, h, "/tmp/four", strings.Repeat("wxyz", 60))
	four, err := os.Open(h.Path("/tmp/four"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = four.Close() }()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	fifo = openFifo(t, h, "/tmp/other")
	restore(ctx, t, h, img, s.pid, []*os.File{null, fifo, four}, "--inherit-fd", "fd[4]:"+fifoKey, "--inherit-fd", "fd[5]:"+threeKey)
	s.says(ctx, fifo, "after", "", 204)
	s.says(ctx, fifo, "read", "wxyz", 204)
	s.says(ctx, fifo, "write", "", 244)
	if b, err := os.ReadFile(h.Path("/tmp/four")); err != nil || string(b) != strings.Repeat("wxyz", 60)+"more" {
		t.Errorf("the handed file holds %q, %v", b, err)
	}
}

// planned is what godwit plan says of one object.
type planned struct {
	Key, Kind, Path, Link, Carry, Resolver, Argument, Origin, Presence, Reason string
	Flags                                                                      uint32
	Offset                                                                     int64
	BuildID                                                                    string `json:"build_id"`
	SHA256                                                                     string
	Differences                                                                []string
	Holders                                                                    []struct {
		PID   int
		FDs   []int
		Roles []string
	}
	Inherited struct {
		PID int
		FDs []int
	}
}

func planOf(ctx context.Context, t *testing.T, f *fleet.Fleet, code, pid int, args ...string) (objects []planned, text string) {
	t.Helper()
	res, err := f.Run(ctx, append([]string{"plan", fmt.Sprintf("alpha:%d", pid), "beta", "--output", "json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Objects []planned }
	if err := json.Unmarshal([]byte(res.Stdout), &doc); err != nil || res.Code != code {
		t.Fatalf("exit code %d, want %d, %v: %s%s", res.Code, code, err, res.Stdout, res.Stderr)
	}
	return doc.Objects, res.Stderr
}

// inspected is what godwit-agent inspect says of the objects of a tree.
func inspected(ctx context.Context, t *testing.T, h *hosts.Host, pid int, args ...string) []planned {
	t.Helper()
	o := mustAgent(ctx, t, h, nil, append([]string{"inspect", "-t", fmt.Sprint(pid), "--output", "json"}, args...)...)
	var doc struct{ Objects []planned }
	if err := json.Unmarshal([]byte(o.stdout), &doc); err != nil {
		t.Fatalf("%v: %s", err, o.stdout)
	}
	return doc.Objects
}

// TestPlan shows what there is, refuses what is asked for in vain, and moves the
// tree by selectors.
func TestPlan(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	s := startThree(ctx, t, alpha, newDir(t))
	fifo := openFifo(t, alpha, "/tmp/fifo")
	s.says(ctx, fifo, "before", "", 0)

	objects, said := planOf(ctx, t, f, 4, s.pid)
	for _, want := range []string{"/tmp/three: the regular does not exist here", "/tmp/fifo: the fifo does not exist here"} {
		if !strings.Contains(said, want) {
			t.Errorf("the refusal does not say %q: %s", want, said)
		}
	}
	var descriptions []string
	for _, o := range objects {
		fds := 0
		for _, h := range o.Holders {
			fds += len(h.FDs)
		}
		switch {
		case o.Path == "/tmp/three":
			descriptions = append(descriptions, fmt.Sprintf("%o@%d %d %s %s", o.Flags&0o7777, o.Offset, fds, o.Presence, o.Carry))
		case o.Link == "/dev/null" && (o.Presence != "same" || o.Carry != "path" || len(o.Holders[0].Roles) == 0):
			t.Errorf("stdin or stderr: %+v", o)
		case strings.HasPrefix(filepath.Base(o.Path), "libc.so") && (o.Presence != "same" || o.BuildID == ""):
			t.Errorf("the C library: %+v", o)
		case o.Path == "/tmp/fifo" && (o.Presence != "missing" || o.Kind != "fifo" || o.Key != key(t, alpha, s.pid, 3)):
			t.Errorf("the fifo: %+v", o)
		}
	}
	slices.Sort(descriptions)
	if want := []string{"0@0 2 missing path", "0@0 2 missing path", "2001@0 2 missing path", "2@100 1 missing path"}; !slices.Equal(descriptions, want) {
		t.Errorf("descriptions of the file: %q, want %q", descriptions, want)
	}

	for _, c := range []struct {
		entries []string
		want    []string
	}{
		{[]string{"fd:5=path:/tmp/x"}, []string{"several processes have a descriptor 5", fmt.Sprintf("fd:%d:5", s.pid)}},
		{[]string{"file[1:2]=path:/tmp/x"}, []string{"nothing that the tree holds matches file[1:2]", "nearest: file["}},
		{[]string{"path:/tmp/thre=path:/tmp/x"}, []string{"nearest: path:/tmp/three"}},
		{[]string{"fd:10=path:/tmp/x", "path:/tmp/three=path:/tmp/y"}, []string{"two entries say different things of it", "/tmp/three"}},
		{[]string{"fd:10"}, []string{"it was declared external, and no rule of this host says what stands for it", "fd 10", "/tmp/three", "godwit-agent provide"}},
	} {
		var args []string
		for _, e := range c.entries {
			args = append(args, "--external", e)
		}
		_, said := planOf(ctx, t, f, 4, s.pid, args...)
		_, res, err := f.Migrate(ctx, "alpha", s.pid, "beta", args...)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range c.want {
			if !strings.Contains(said, w) || res.Code != 4 || !strings.Contains(res.Stderr, w) {
				t.Errorf("%q: exit code %d, want 4 and %q: the plan said %s, the migration %s", c.entries, res.Code, w, said, res.Stderr)
			}
		}
	}
	s.says(ctx, fifo, "still", "", 0)

	if _, err := beta.Run(ctx, "mkfifo", "/tmp/in"); err != nil {
		t.Fatal(err)
	}
	writeTo(t, beta, "/tmp/three", strings.Repeat("wxyz", 60))
	args := []string{"--external", "path:/tmp/thr*=path:{dir}/{base}", "--external", fmt.Sprintf("fd:%d:3=path:/tmp/in", s.pid)}
	objects, _ = planOf(ctx, t, f, 0, s.pid, append(args, "--hash")...)
	for _, o := range objects {
		if o.Path == "/tmp/three" && (o.Carry != "external" || o.Resolver != "path" || o.Argument != "/tmp/three" || o.Origin != "--external" || o.Presence != "differs" || o.SHA256 == "") {
			t.Errorf("the file: %+v", o)
		}
	}
	if _, res, err := f.Migrate(ctx, "alpha", s.pid, "beta", args...); err != nil || res.Code != 0 {
		t.Fatalf("migrate: exit code %d, %v: %s%s", res.Code, err, res.Stdout, res.Stderr)
	}
	fifo = openFifo(t, beta, "/tmp/in")
	s.says(ctx, fifo, "after", "", 0)
	s.says(ctx, fifo, "read", "wxyz", 0)
	s.says(ctx, fifo, "write", "", 244)
}

// mappedScript tells what it sees in mappings of a file, one private with a page of
// its own and one shared, and in its working directory.
const mappedScript = `
import mmap, os, sys
fifo, path, place = sys.argv[1:]
f = os.open(fifo, os.O_RDWR)
assert f == 3, f
fd = os.open(path, os.O_RDWR)
shared, private = mmap.mmap(fd, 8192), mmap.mmap(fd, 8192, access=mmap.ACCESS_COPY)
os.close(fd)
private[0:5] = b"dirty"
os.chdir(place)
rest = b""
while True:
    rest += os.read(3, 4096)
    while b"\n" in rest:
        line, rest = rest.split(b"\n", 1)
        if line == b"write":
            shared[4096:4101] = b"wrote"
        see = [private[0:5], private[4096:4101], shared[0:5], shared[4096:4101]]
        print(line.decode(), *(x.decode() for x in see), *sorted(os.listdir(".")), flush=True)
`

// TestExternalMapped hands in another file for one that is mapped, and another
// directory for the working directory: pages of a private mapping's own travel, all
// else is that of the other file.
func TestExternalMapped(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	script, out := filepath.Join(dir, "mapped.py"), filepath.Join(dir, "out")
	if err := os.WriteFile(script, []byte(mappedScript), 0o644); err != nil {
		t.Fatal(err)
	}
	page := func(s string) string { return s + strings.Repeat(".", 4096-len(s)) }
	writeTo(t, h, "/tmp/file", page("first")+page("later"))
	writeTo(t, h, "/tmp/here/old", "")
	writeTo(t, h, "/tmp/there/new", "")
	writeTo(t, h, "/tmp/copy", page("FIRST")+page("LATER"))
	if _, err := h.Run(ctx, "mkfifo", "/tmp/fifo"); err != nil {
		t.Fatal(err)
	}
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", script, "/tmp/fifo", "/tmp/file", "/tmp/here"}, Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	fifo := openFifo(t, h, "/tmp/fifo")
	said := ""
	says := func(line, sees string) {
		t.Helper()
		if _, err := fifo.WriteString(line + "\n"); err != nil {
			t.Fatal(err)
		}
		said += line + " " + sees + "\n"
		waitText(ctx, t, out, said)
	}
	says("before", "dirty later first later old")
	keys, roles := map[string]string{}, map[string]bool{}
	for _, o := range inspected(ctx, t, h, pid, "--external", key(t, h, pid, 3)) {
		keys[o.Path] = o.Key
		for _, h := range o.Holders {
			for _, r := range h.Roles {
				roles[o.Path+" "+r] = true
			}
		}
	}
	for _, want := range []string{"/tmp/file mapping", "/tmp/here cwd", "/ root"} {
		if !roles[want] {
			t.Errorf("nothing is listed as %s: %v", want, roles)
		}
	}
	img := dump(ctx, t, h, pid, "--external", keys["/tmp/fifo"], "--external", keys["/tmp/file"], "--external", keys["/tmp/here"])
	files := []*os.File{fifo}
	for _, path := range []string{"/tmp/copy", "/tmp/there"} {
		f, err := os.Open(h.Path(path))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		files = append(files, f)
	}
	if _, err := h.Run(ctx, "rm", "-r", "/tmp/file", "/tmp/here"); err != nil {
		t.Fatal(err)
	}
	given := []string{"--inherit-fd", "fd[3]:" + keys["/tmp/fifo"], "--inherit-fd", "fd[4]:" + keys["/tmp/file"], "--inherit-fd", "fd[5]:" + keys["/tmp/here"]}
	writeTo(t, h, "/tmp/short", page("FIRST")+"LATER")
	short, err := os.Open(h.Path("/tmp/short"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = short.Close() }()
	o := agentCmd(ctx, t, h, []*os.File{files[0], short, files[2]}, append([]string{"restore", "-D", img, "-d"}, given...)...)
	if o.code != 1 || !strings.Contains(o.stderr, "it has 4101 bytes, of which the tree has 8192 mapped") {
		t.Errorf("a shorter file: exit code %d, %s", o.code, o.stderr)
	}
	restore(ctx, t, h, img, pid, files, given...)
	says("after", "dirty LATER FIRST LATER new")
	says("write", "dirty wrote FIRST wrote new")
	if b, err := os.ReadFile(h.Path("/tmp/copy")); err != nil || string(b[4096:4101]) != "wrote" || string(b[:5]) != "FIRST" {
		t.Errorf("the handed file: %v", err)
	}
}

// watchingScript has locks of two kinds on a file, and waits for what comes through
// a fifo, and for changes of the file.
const watchingScript = `
import ctypes, fcntl, os, select, sys
fifo = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
files = [os.open(sys.argv[2], os.O_RDWR) for _ in range(2)]
fcntl.flock(files[0], fcntl.LOCK_EX)
fcntl.lockf(files[1], fcntl.LOCK_EX, 10)
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
assert libc.inotify_add_watch(watch, sys.argv[2].encode(), 2) == 1
ready = select.epoll()
for fd in fifo, watch:
    ready.register(fd, select.EPOLLIN)
while True:
    for fd, events in ready.poll():
        assert events == select.EPOLLIN, events
        got = os.read(fd, 4096)
        print("modified" if fd == watch else got.decode().strip(), flush=True)
`

// TestExternalWatched hands in other files for one that is locked and watched by
// inotify, and for a fifo that is watched by epoll.
func TestExternalWatched(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	script, out := filepath.Join(dir, "watching.py"), filepath.Join(dir, "out")
	if err := os.WriteFile(script, []byte(watchingScript), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Run(ctx, "mkfifo", "/tmp/fifo0", "/tmp/fifo1", "/tmp/fifo2"); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		writeTo(t, h, fmt.Sprintf("/tmp/file%d", i), strings.Repeat("x", 100))
	}
	fifo := openFifo(t, h, "/tmp/fifo0")
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", script, "/tmp/fifo0", "/tmp/file0"}, Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	said := ""
	says := func(line string) {
		t.Helper()
		said += line + "\n"
		waitText(ctx, t, out, said)
	}
	check := func(i int) {
		t.Helper()
		if _, err := fmt.Fprintf(fifo, "line %d\n", i); err != nil {
			t.Fatal(err)
		}
		says(fmt.Sprintf("line %d", i))
		file := fmt.Sprintf("/tmp/file%d", i)
		if _, err := h.Run(ctx, "sh", "-c", "printf y >>"+file); err != nil {
			t.Fatal(err)
		}
		says("modified")
		for what, program := range map[string]string{"flock": "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "lockf": "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)"} {
			if o, err := h.Run(ctx, "/usr/bin/python3", "-c", fmt.Sprintf("import fcntl; f = open(%q, 'r+'); %s", file, program)); err == nil || !strings.Contains(o+err.Error(), "BlockingIOError") {
				t.Errorf("%s is not locked by %s: %s, %v", file, what, o, err)
			}
		}
	}
	check(0)
	for i := 1; i < 3; i++ {
		keys := []string{key(t, h, pid, 3), key(t, h, pid, 4)}
		img := dump(ctx, t, h, pid, "--file-locks", "--external", keys[0], "--external", keys[1])
		if err := fifo.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Run(ctx, "rm", fmt.Sprintf("/tmp/file%d", i-1), fmt.Sprintf("/tmp/fifo%d", i-1)); err != nil {
			t.Fatal(err)
		}
		fifo = openFifo(t, h, fmt.Sprintf("/tmp/fifo%d", i))
		file, err := os.OpenFile(h.Path(fmt.Sprintf("/tmp/file%d", i)), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		restore(ctx, t, h, img, pid, []*os.File{fifo, file}, "--file-locks", "--inherit-fd", "fd[3]:"+keys[0], "--inherit-fd", "fd[4]:"+keys[1])
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		check(i)
	}
}

// TestExternalRoot hands in another root directory and another copy of the program.
func TestExternalRoot(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	if _, err := h.Run(ctx, "sh", "-ec", "mkdir -p /tmp/jail1/out /tmp/jail2/out; cp "+programs.Gocheck+" /tmp/jail1/gocheck; cp -p /tmp/jail1/gocheck /tmp/jail2"); err != nil {
		t.Fatal(err)
	}
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"chroot", "/tmp/jail1", "/gocheck", "/out/go", "127.0.0.1:8080", "8"}})
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: h, Prefix: h.Path("/tmp/jail1/out/go"), Pid: pid}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{}
	for _, o := range inspected(ctx, t, h, pid) {
		for _, h := range o.Holders {
			for _, r := range h.Roles {
				keys[r] = o.Key
			}
		}
	}
	img := dump(ctx, t, h, pid, "--external", keys["root"], "--external", keys["exe"])
	var files []*os.File
	for _, path := range []string{"/tmp/jail2", "/tmp/jail2/gocheck"} {
		f, err := os.Open(h.Path(path))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		files = append(files, f)
	}
	if _, err := h.Run(ctx, "rm", "/tmp/jail1/gocheck"); err != nil {
		t.Fatal(err)
	}
	restore(ctx, t, h, img, pid, files, "--inherit-fd", "fd[3]:"+keys["root"], "--inherit-fd", "fd[4]:"+keys["exe"])
	goes(ctx, t, r, 10)
	for link, want := range map[string]string{"root": "/tmp/jail2", "exe": "/tmp/jail2/gocheck"} {
		if got, err := h.Run(ctx, "readlink", fmt.Sprintf("/proc/%d/%s", pid, link)); err != nil || strings.TrimSpace(got) != want {
			t.Errorf("%s leads to %q, %v, want %s", link, got, err, want)
		}
	}
	// What it makes now is below the new root, what it had open is where it was.
	if _, err := h.Run(ctx, "ln", "/tmp/jail1/out/go.log", "/tmp/jail2/out"); err != nil {
		t.Fatal(err)
	}
	r.Prefix = h.Path("/tmp/jail2/out/go")
	stop(ctx, t, r)
}

// TestInheritedLog moves a program that has a log of its parent's open, which it never
// used and which grows all the time.
func TestInheritedLog(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	dir := newDir(t)
	prefix, log := filepath.Join(dir, "threads"), filepath.Join(dir, "log")
	parent, err := alpha.Start(ctx, hosts.Spec{Args: []string{"bash", "-c", `exec 7>"$3"; "$1" threads "$2" & while :; do echo a line of the parent >&7; sleep 0.01; done`,
		"-", programs.Selfcheck, prefix, log}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = alpha.Kill(parent, unix.SIGKILL) }()
	r := &workloads.Run{Host: alpha, Prefix: prefix, Pid: program(ctx, t, alpha, "selfcheck")}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d bash", parent)
	objects, _ := planOf(ctx, t, f, 0, r.Pid)
	for _, o := range objects {
		if (o.Path == log) != (o.Inherited.PID == parent && slices.Equal(o.Inherited.FDs, []int{7})) && len(o.Holders[0].FDs) > 0 && o.Link != "/dev/null" {
			t.Errorf("%s is inherited from %+v", o.Link, o.Inherited)
		}
	}
	for _, cmd := range [][]string{{"plan", fmt.Sprintf("alpha:%d", r.Pid), "beta"}, {"plan", fmt.Sprintf("alpha:%d", r.Pid), "beta", "--hash"}} {
		if res, err := f.Run(ctx, cmd...); err != nil || res.Code != 0 || !strings.Contains(res.Stdout, want) {
			t.Errorf("%v: exit code %d, %s%s, %v", cmd, res.Code, res.Stdout, res.Stderr, err)
		}
	}
	if o := mustAgent(ctx, t, alpha, nil, "inspect", "-t", fmt.Sprint(r.Pid)); !strings.Contains(o.stdout, "inherited from "+want) {
		t.Errorf("inspect does not say what is inherited: %s", o.stdout)
	}
	migrate(ctx, t, f, r, beta)
	before, err := os.Stat(log)
	if err != nil {
		t.Fatal(err)
	}
	for grown := before; grown.Size() <= before.Size(); time.Sleep(time.Millisecond) {
		if grown, err = os.Stat(log); err != nil || ctx.Err() != nil {
			t.Fatalf("the parent's log does not grow any more: %v", err)
		}
	}
	stop(ctx, t, r)
}

// policyScript has a file of each sort open and says, for each line of the fifo, what
// it has written so far to all of them.
const policyScript = `
import os, sys
fifo = os.open(sys.argv[1] + "/orders", os.O_RDONLY)
files = [os.open(sys.argv[1] + "/" + n, os.O_RDWR | os.O_APPEND) for n in ("state.db", "events.log", "scratch.tmp")]
n, rest = 0, b""
while True:
    rest += os.read(fifo, 4096)
    while b"\n" in rest:
        line, rest = rest.split(b"\n", 1)
        n += 1
        for f in files:
            os.write(f, line + b"\n")
        print(line.decode(), n, flush=True)
`

// TestPolicyFile moves a tree by rules of globs in the destination's configuration:
// what is saved, what is redirected, what is made anew and what is thrown away.
func TestPolicyFile(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, `
[[external]]
match = ["path:/srv/app/*.db"]
resolver = "carry"

[[external]]
match = ["path:/srv/app/*.log"]
resolver = "path"
argument = "/tmp/elsewhere/{base}"
size = "any"

[[external]]
match = ["path:/srv/app/*.tmp"]
resolver = "null"

[[external]]
match = ["kind:fifo"]
resolver = "create"
`))
	dir := newDir(t)
	script, out := filepath.Join(dir, "policy.py"), filepath.Join(dir, "out")
	if err := os.WriteFile(script, []byte(policyScript), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*hosts.Host{alpha, beta} {
		if _, err := h.Run(ctx, "sh", "-ec", "mount -t tmpfs none /srv; mkdir /srv/app"); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"state.db", "events.log", "scratch.tmp"} {
		writeTo(t, alpha, "/srv/app/"+n, "old\n")
	}
	if _, err := alpha.Run(ctx, "mkfifo", "/srv/app/orders"); err != nil {
		t.Fatal(err)
	}
	pid, err := alpha.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", script, "/srv/app"}, Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	fifo := openFifo(t, alpha, "/srv/app/orders")
	say := func(line string, n int) {
		t.Helper()
		if _, err := fifo.WriteString(line + "\n"); err != nil {
			t.Fatal(err)
		}
		want := ""
		for i := range n {
			want += []string{"before 1\n", "after 2\n"}[i]
		}
		waitText(ctx, t, out, want)
	}
	say("before", 1)
	writeTo(t, beta, "/tmp/elsewhere/events.log", "there\n")
	m, res, err := f.Migrate(ctx, "alpha", pid, "beta")
	if err != nil || res.Code != 0 || m.State != "completed" {
		t.Fatalf("exit code %d: %s%s, %v", res.Code, res.Stdout, res.Stderr, err)
	}
	if err := fifo.Close(); err != nil {
		t.Fatal(err)
	}
	fifo = openFifo(t, beta, "/srv/app/orders")
	say("after", 2)
	for path, want := range map[string]string{"/srv/app/state.db": "old\nbefore\nafter\n", "/tmp/elsewhere/events.log": "there\nafter\n"} {
		if got := string(readFile(t, beta, path)); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if _, err := os.Stat(beta.Path("/srv/app/scratch.tmp")); err == nil {
		t.Error("what was to be thrown away is at the destination")
	}
	wantLink(t, beta, pid, "fd/6", "/dev/null")
}
