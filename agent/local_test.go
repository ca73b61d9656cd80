package agent

import (
	"bytes"
	"context"
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

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
	"godwit/engine/plan"
	"godwit/engine/refuse"
	"godwit/wire"
)

func TestParseInheritFD(t *testing.T) {
	tests := []struct {
		in  string
		fd  int
		key string
		ok  bool
	}{
		{"fd[4]:file[72:a3e7]", 4, "file[72:a3e7]", true},
		{"fd[0]:tty[8800:1]", 0, "tty[8800:1]", true},
		{"fd[12]:pipe:[3456]", 12, "pipe:[3456]", true},
		{"fd[5]:/var/log/x]:y", 5, "/var/log/x]:y", true},
		{"fd[4]:", 0, "", false},
		{"fd[]:x", 0, "", false},
		{"fd[-1]:x", 0, "", false},
		{"fd[4]x", 0, "", false},
		{"fd4:x", 0, "", false},
		{"4:file[72:a3e7]", 0, "", false},
		{"fd[99999999999]:x", 0, "", false},
		{"", 0, "", false},
	}
	for _, tt := range tests {
		fd, key, err := parseInheritFD(tt.in)
		if fd != tt.fd || key != tt.key || (err == nil) != tt.ok {
			t.Errorf("%q: %d, %q, %v", tt.in, fd, key, err)
		}
	}
}

func FuzzParseInheritFD(f *testing.F) {
	f.Add("fd[4]:file[72:a3e7]")
	f.Add("fd[4]:")
	f.Fuzz(func(t *testing.T, s string) {
		fd, key, err := parseInheritFD(s)
		if err == nil && (fd < 0 || key == "" || !strings.HasSuffix(s, "]:"+key)) {
			t.Errorf("%q: %d, %q", s, fd, key)
		}
	})
}

func TestInheritFDs(t *testing.T) {
	r, w, err := os.Pipe()
	noErr(t, err)
	defer func() { _, _ = r.Close(), w.Close() }()
	// As if it had come through an exec.
	dup, err := unix.Dup(int(r.Fd()))
	noErr(t, err)
	defer func() { _ = unix.Close(dup) }()
	entry := func(fd int, key string) string { return fmt.Sprintf("fd[%d]:%s", fd, key) }

	held, err := inheritFDs([]string{entry(dup, "file[1:2]")})
	if err != nil || int(held["file[1:2]"].File.Fd()) != dup {
		t.Errorf("held %v, %v", held, err)
	}
	for _, tt := range []struct {
		name    string
		entries []string
		want    string
	}{
		{"not open", []string{entry(1000, "x")}, "descriptor 1000 is not open"},
		{"of the runtime", []string{entry(int(w.Fd()), "x")}, "is not open"},
		{"key twice", []string{entry(dup, "x"), entry(dup, "x")}, "given twice"},
		{"descriptor twice", []string{entry(dup, "x"), entry(dup, "y")}, "already backs x"},
		{"form", []string{"fd4:x"}, "not of the form"},
	} {
		if _, err := inheritFDs(tt.entries); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	// inheritFDs made an os.File of dup, which must not be closed twice.
	_ = held["file[1:2]"].File.Close()
	dup = -1
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]uint64{"": 0, "0": 0, "4096": 4096, "512K": 512 << 10, "10m": 10 << 20, "1G": 1 << 30} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"K", "-1", "1T", "1.5M", "99999999999G", "1 M"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestVerbosityArgs(t *testing.T) {
	for _, tt := range []struct{ in, want []string }{
		{[]string{"dump", "-v4", "-t", "1"}, []string{"dump", "--verbosity=4", "-t", "1"}},
		{[]string{"-v"}, []string{"--verbosity=3"}},
		{[]string{"-vvv"}, []string{"--verbosity=5"}},
		{[]string{"-v", "-v"}, []string{"--verbosity=3", "--verbosity=4"}},
		{[]string{"-v0"}, []string{"--verbosity=0"}},
		{[]string{"-Rjv4", "-lv"}, []string{"-Rj", "--verbosity=4", "-l", "--verbosity=5"}},
		{[]string{"-o", "-v4", "-v1"}, []string{"-o", "-v4", "--verbosity=1"}},
		{[]string{"-t", "12", "-D/tmp/v4"}, []string{"-t", "12", "-D/tmp/v4"}},
		{[]string{"-vx", "--verbosity=2", "--", "-v4"}, []string{"-vx", "--verbosity=2", "--", "-v4"}},
	} {
		if diff := cmp.Diff(tt.want, verbosityArgs(tt.in)); diff != "" {
			t.Errorf("%v:\n%s", tt.in, diff)
		}
	}
}

// TestCommandLine runs whole command lines that end before the engine is asked.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"--version", 0, Version, ""},
		{"version", 0, "protocol 1", ""},
		{"nonsense", 2, "", `unknown command "nonsense"`},
		{"--nonsense", 2, "", "unknown flag"},
		{"", 0, "Usage:", ""},
		{"dump --nonsense", 1, "", "unknown flag: --nonsense"},
		{"run --nonsense", 2, "", "unknown flag: --nonsense"},
		{"run --config /nonexistent/x.toml", 2, "", "/nonexistent/x.toml"},
		{"run --window 3furlongs", 2, "", "--window"},
		{"dump extra", 1, "", "extra"},
		{"dump -D " + dir, 1, "", "give the pid of its root with --tree"},
		{"restore -D " + dir + "/none", 1, "", "use the images' directory"},
		{"dump -t 0 --network-lock iptables -D " + dir, 1, "", "give the pid of its root with --tree"},
		{"dump -t 1 --stream -D " + dir, 1, "", "CRIU's option --stream is not carried out"},
		{"dump -t 0 -SdM auto --exec-cmd --join-ns net:1 -D " + dir, 1, "", "give the pid of its root with --tree"},
		{"dump -t 0 --lsm-profile=none:x --timeout x -D " + dir, 1, "", "invalid argument"},
		{"restore -Rls -t 1 --timeout 3 --ghost-limit 1M --freeze-cgroup /x --skip-mnt /y -D " + dir + "/none", 1, "", "use the images' directory"},
		{"dump -t 0 --close 999 -D " + dir, 1, "", "--close: descriptor 999 is not open"},
		{"restore -L /usr/lib/criu -D " + dir, 1, "", "CRIU's option --libdir is not carried out: there are no plugins"},
		{"check --feature list", 0, "network_lock_nftables\n", ""},
		{"restore -t x", 1, "", "invalid argument"},
		{"restore --ps-socket=3", 1, "", "CRIU's option --ps-socket is not carried out: there is no page server"},
		{"restore -S -D " + dir, 1, "", "--restore-sibling makes sense only with --restore-detached"},
		{"restore --exec-cmd -D " + dir, 1, "", "no command is given behind --"},
		{"restore -d --exec-cmd -D " + dir + " -- true", 1, "", "give one of them"},
		{"restore --exec-cmd -D " + dir + " -- /nonexistent/x", 1, "", "--exec-cmd: "},
		{"restore -D " + dir + " -- true", 1, "", `"true" is no option`},
		{"restore -D " + dir + " --lsm-profile odd:x", 1, "", "none of apparmor, selinux and none"},
		{"restore -D " + dir + " --lsm-profile selinux:", 1, "", "not of the form TYPE:NAME"},
		{"restore -D " + dir + "/none --lsm-profile none", 1, "", "use the images' directory"},
		{"restore -D " + dir + " --status-fd 999", 1, "", "descriptor 999 is not open"},
		{"restore -D " + dir + " --status-fd x", 1, "", "no number of a descriptor"},
		{"restore -D " + dir + " --log-pid", 1, "", "--log-pid needs a log file"},
		{"restore -D " + dir + " --cgroup-root x", 1, "", "not of the form [CONTROLLER:]/PATH"},
		{"dump -t 1 -D " + dir + " --cgroup-root memory", 1, "", "not of the form [CONTROLLER:]/PATH"},
		{"dump -t 2000000000 -D " + dir + " --cgroup-props nonsense", 1, "", "line 1"},
		{"dump -t 1 -D " + dir + " --cgroup-props-file /nonexistent/x", 1, "", "--cgroup-props-file"},
		{"-V", 0, "Version: " + Version + "\nImages: CRIU 4.2\n", ""},
		{"dump -Rjv3 -D " + dir, 1, "", "give the pid of its root with --tree"},
		{"restore -dj --images-dir=" + dir + "/none", 1, "", "use the images' directory"},
		{"dump --config " + dir + "/none.conf", 1, "", dir + "/none.conf"},
		{"restore -D " + dir + " --action-script false", 1, "", "action script \"false\" failed at stage pre-restore: exit status 1"},
		{"dump -t 1 -D " + dir + " --action-script false", 1, "", "action script \"false\" failed at stage pre-dump: exit status 1"},
		{"dump -t 1 --ghost-limit 3x -D " + dir, 1, "", "--ghost-limit"},
		{"restore --network-lock odd", 1, "", "none of nftables, iptables and skip"},
		{"restore -D " + dir + " --pid-namespace odd", 1, "", "neither same nor new"},
		{"restore -D " + dir + " --inherit-fd fd[999]:file[1:2]", 1, "", "descriptor 999 is not open"},
		{"restore -D " + dir + " -d", 1, "", "it is no dump"},
		{"inspect", 2, "", "--tree"},
		{"inspect -t 1 --output xml", 2, "", "neither text nor json"},
		{"network-locks --output xml", 2, "", "neither text nor json"},
		{"network-locks --remove nobodys", 1, "", "there is no network lock nobodys"},
		{"check --output xml", 2, "", "neither text nor json"},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			if os.Geteuid() != 0 {
				needsRoot(t)
			}
			var out, errs bytes.Buffer
			code := Main(strings.Fields(tt.args), &out, &errs)
			if code != tt.code || !strings.Contains(out.String(), tt.stdout) || !strings.Contains(errs.String(), tt.stderr) {
				t.Errorf("exit code %d, want %d; stdout %q; stderr %q", code, tt.code, &out, &errs)
			}
			if tt.stderr != "" && strings.Count(errs.String(), tt.stderr) != 1 {
				t.Errorf("said more than once: %q", &errs)
			}
		})
	}
}

// needsRoot skips a test that needs root, which is a failure where all must run.
func needsRoot(t *testing.T) {
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

func TestRunDump(t *testing.T) {
	broken := errors.New("the disk is on fire")
	refusal := &engine.Refusal{Doing: "dump of pid 12", Problems: []refuse.Problem{{Pid: 12, Reason: "a"}, {Pid: 13, Reason: "b"}}}
	tests := []struct {
		name  string
		point string
		fail  error
		leave bool
		runs  string // what became of the source
		files bool
		want  string
	}{
		{name: "killed after it", runs: "killed", files: true},
		{name: "left running", leave: true, runs: "running", files: true},
		{name: "refused", point: "plan", fail: refusal, runs: "running", want: "pid 13: b"},
		{name: "freeze fails", point: "freeze", fail: broken, runs: "running", want: "on fire"},
		{name: "dump fails", point: "dump-data", fail: broken, runs: "running", want: "on fire"},
		{name: "thaw fails", point: "thaw", fail: broken, leave: true, runs: "frozen", files: true, want: "could not be let go"},
		{name: "kill fails", point: "kill", fail: broken, runs: "frozen", files: true, want: "could not be killed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			if tt.point != "" {
				w.on(tt.point, func(context.Context) error { return tt.fail })
			}
			f := dumpFlags{tree: 12, leaveRunning: tt.leave}
			f.imagesDir = t.TempDir()
			err := runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if w.source != tt.runs {
				t.Errorf("the tree is %s, want %s", w.source, tt.runs)
			}
			names, _ := filepath.Glob(f.imagesDir + "/*")
			if got := len(names) > 0; got != tt.files {
				t.Errorf("images: %v", names)
			}
			if tt.files {
				src, err := image.OpenDir(f.imagesDir)
				noErr(t, err)
				n := 0
				for {
					id, off, p, err := src.Next(t.Context())
					if errors.Is(err, io.EOF) {
						break
					}
					noErr(t, err)
					if !bytes.Equal(p, fill(id, off, len(p))) {
						t.Fatalf("%d bytes at %#x differ", len(p), off)
					}
					n += len(p)
				}
				if n != 1<<20 {
					t.Errorf("%d bytes in the images", n)
				}
				noErr(t, src.Close())
			}
		})
	}
}

// TestRunDumpFullDisk dumps into a file system that is too small.
func TestRunDumpFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		needsRoot(t)
	}
	dir := t.TempDir()
	noErr(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	w := newWorld()
	f := dumpFlags{tree: 12}
	f.imagesDir = dir
	err := runDump(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger())
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "runs on") {
		t.Errorf("error %v", err)
	}
	if w.source != "running" {
		t.Errorf("the tree is %s", w.source)
	}
	if names, _ := filepath.Glob(dir + "/*"); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

func TestRunRestore(t *testing.T) {
	dir := t.TempDir()
	d := dumpFlags{tree: 12}
	d.imagesDir = dir
	noErr(t, runDump(t.Context(), &fakeEngine{w: newWorld(), bytes: 1 << 20}, d, hclog.NewNullLogger()))
	tests := []struct {
		name    string
		point   string
		pidfile string
		landed  string
		want    string
	}{
		{name: "detached", pidfile: "pid", landed: "running"},
		{name: "restore fails", point: "restore-end", landed: "", want: "on fire"},
		{name: "run fails", point: "run", pidfile: "pid", landed: "discarded", want: "on fire"},
		{name: "no pid file", pidfile: "no/such/dir", landed: "discarded", want: "write the pid file"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			w.source = "killed by the dump"
			if tt.point != "" {
				w.on(tt.point, func(context.Context) error { return errors.New("the disk is on fire") })
			}
			f := restoreFlags{detached: true, status: statusFlags{pidfile: tt.pidfile}}
			f.imagesDir, f.workDir = dir, t.TempDir()
			err := runRestore(t.Context(), &fakeEngine{w: w, bytes: 1 << 20}, f, hclog.NewNullLogger())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if w.landed != tt.landed {
				t.Errorf("the tree is %q, want %q", w.landed, tt.landed)
			}
			b, _ := os.ReadFile(filepath.Join(f.workDir, "pid"))
			if got, want := string(b), map[bool]string{true: strconv.Itoa(1 << 22), false: ""}[tt.want == ""]; got != want {
				t.Errorf("pid file %q, want %q", got, want)
			}
		})
	}
}

func TestWaitChild(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137, "sleep 0.1; exit 3": 3} {
		cmd := exec.Command("sh", "-c", script)
		noErr(t, cmd.Start())
		ws, err := waitChild(cmd.Process.Pid)
		if err != nil || exitStatus(ws) != want {
			t.Errorf("%s: status %d, %v", script, exitStatus(ws), err)
		}
		if err := unix.Kill(cmd.Process.Pid, 0); err != unix.ESRCH {
			t.Errorf("%s: pid %d is still there: %v", script, cmd.Process.Pid, err)
		}
		_ = cmd.Process.Release()
	}
}

func TestHold(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "log"), filepath.Join(dir, "fifo")
	noErr(t, os.WriteFile(file, []byte("hello"), 0o600))
	noErr(t, unix.Mkfifo(fifo, 0o600))
	ext := func(kind string, flags int) []*wire.ExternalFile {
		return []*wire.ExternalFile{{Key: "file[1:2]", Path: "/src/x", Kind: kind, Flags: uint32(flags)}}
	}
	hold := func(ext []*wire.ExternalFile, in ...*wire.Inherit) (*holdings, error) {
		return New(Config{}).hold(t.Context(), &wire.PrepareRequest{Options: &wire.MigrateOptions{Inherit: in}, Requirements: &wire.Requirements{Externals: ext}}, nil)
	}
	tests := []struct {
		name    string
		path    string
		forward bool
		ext     []*wire.ExternalFile
		flags   int // of the opened description
		bad     string
	}{
		{"regular read", file, false, ext("regular", unix.O_RDONLY), unix.O_RDONLY, ""},
		{"regular append reopened", file, false, ext("regular", unix.O_WRONLY|unix.O_APPEND), unix.O_WRONLY, ""},
		{"regular append forwarded", file, true, ext("regular", unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_TRUNC), unix.O_WRONLY | unix.O_APPEND, ""},
		{"O_PATH", file, false, ext("regular", unix.O_PATH), unix.O_PATH, ""},
		{"fifo without a peer", fifo, false, ext("fifo", unix.O_RDONLY), unix.O_RDWR | unix.O_NONBLOCK, ""},
		{"fifo forwarded to a writer", fifo, true, ext("fifo", unix.O_WRONLY), unix.O_WRONLY, ""},
		{"fifo forwarded to a non-blocking reader", fifo, true, ext("fifo", unix.O_RDONLY|unix.O_NONBLOCK), unix.O_RDONLY | unix.O_NONBLOCK, ""},
		{"wrong kind", file, false, ext("fifo", unix.O_RDONLY), 0, "it is a regular here, the tree has a fifo open"},
		{"missing", filepath.Join(dir, "none"), false, ext("regular", unix.O_RDONLY), 0, "no such file"},
		{"relative", "log", false, ext("regular", unix.O_RDONLY), 0, "not absolute"},
		{"unknown key", file, false, nil, 0, "no external file of the tree has this key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, err := hold(tt.ext, &wire.Inherit{Key: "file[1:2]", Path: tt.path, Forward: tt.forward})
			if tt.bad != "" {
				f, ok := errors.AsType[*wire.Failure](err)
				if !ok || f.Code != wire.Code_CODE_REFUSED || !strings.Contains(f.Error(), tt.bad) || !strings.Contains(f.Error(), "file[1:2]") {
					t.Errorf("error %v, want %q", err, tt.bad)
				}
				return
			}
			noErr(t, err)
			defer h.close(true)
			in := h.files["file[1:2]"]
			got, err := unix.FcntlInt(in.File.Fd(), unix.F_GETFL, 0)
			noErr(t, err)
			if got &= unix.O_ACCMODE | keptFlags | unix.O_PATH; got != tt.flags || in.Forward != tt.forward {
				t.Errorf("flags %#o, want %#o", got, tt.flags)
			}
		})
	}
	if _, err := hold(ext("regular", 0), &wire.Inherit{Key: "file[1:2]", Path: file}, &wire.Inherit{Key: "file[1:2]", Path: file}); err == nil || !strings.Contains(err.Error(), "handed in twice") {
		t.Errorf("twice: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "hello" {
		t.Errorf("the file became %q", b)
	}
}

func fullPlan() *engine.Plan {
	return &engine.Plan{
		Pid: 12, MemoryBytes: 5 << 20, XFeatures: 7, CPUFlags: []string{"avx", "avx2"}, VdsoSHA256: "ab", Kernel: "6.18", Arch: "amd64",
		OpenFiles: 9, Capabilities: 1<<40 | 1,
		Tasks: []plan.Task{
			{Pid: 12, VPid: 2, VTids: []int{2, 3}, Comm: "redis"},
			{Pid: 13, VPid: 4, VTids: []int{4}, Comm: "sh"},
		},
		Files: []plan.File{
			{Path: "/bin/x", Kind: "regular", Size: 1234567, Mode: 0o100755, Mapped: true, BuildID: "ff", Pids: []int{12, 13, 14, 15, 16, 17}},
			{Path: "/run/s", Kind: "socket", Create: true, Pids: []int{12}},
			{Path: "/dev/null", Kind: "chr", Rdev: 259, Writable: true, Pids: []int{13}},
		},
		External: []plan.External{{Key: "file[72:a3e7]", Path: "/run/fifo", Kind: "fifo", Flags: 2, Size: 0, Mode: 0o10600}},
		Ports:    []plan.Port{{Network: "tcp", Address: "127.0.0.1:6379", Pid: 12}},
		Rlimits:  []plan.Rlimit{{Resource: 7, Cur: 1024, Max: 4096, Pid: 12}},
	}
}

func TestRequirements(t *testing.T) {
	want := fullPlan()
	req := requirements(want)
	if req.PageSize == 0 {
		t.Error("no page size")
	}
	// What a destination has no use for does not travel.
	if diff := cmp.Diff(want, planOf(req), cmpopts.IgnoreFields(plan.Task{}, "PPid", "RSS")); diff != "" {
		t.Errorf("plan (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(&engine.Plan{}, planOf(&wire.Requirements{})); diff != "" {
		t.Errorf("empty plan (-want +got):\n%s", diff)
	}
}

func TestPrintPlan(t *testing.T) {
	var b bytes.Buffer
	noErr(t, printPlan(&b, fullPlan()))
	const want = `Tree of pid 12: 2 processes, 3 threads, 5.00 MiB of memory, 9 open files (amd64, 6.18)

Processes
 PID  INNER PID  PARENT  THREADS  MEMORY  COMMAND 
  12          2       0        2  0 B     redis   
  13          4       0        1  0 B     sh      

Files that must be at the destination
 KIND     USE        SIZE      PIDS                    PATH      
 regular  mapped     1.18 MiB  12 13 14 15 and 2 more  /bin/x    
 socket   made anew  0 B       12                      /run/s    
 chr      written    0 B       13                      /dev/null 

External files, to be handed in at the destination
 KEY            KIND  FLAGS  PATH HERE 
 file[72:a3e7]  fifo  02     /run/fifo 

Ports that must be free at the destination
 NETWORK  ADDRESS         PID 
 tcp      127.0.0.1:6379   12 
`
	trim := func(s string) []string {
		lines := strings.Split(s, "\n")
		for i := range lines {
			lines[i] = strings.TrimRight(lines[i], " ")
		}
		return slices.Clip(lines)
	}
	if diff := cmp.Diff(trim(want), trim(b.String())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFailure(t *testing.T) {
	refusal := &engine.Refusal{Doing: "dump of pid 12", Problems: []refuse.Problem{{Pid: 12, Comm: "sh", FD: 3, HasFD: true, Key: "k", Reason: "no", Hint: "do"}}}
	tests := []struct {
		name string
		err  error
		want *wire.Error
	}{
		{"plain", errors.New("boom"), &wire.Error{Code: wire.Code_CODE_INTERNAL, Message: "boom"}},
		{"no process", fmt.Errorf("freeze: %w", unix.ESRCH), &wire.Error{Code: wire.Code_CODE_NOT_FOUND, Message: "freeze: no such process"}},
		{"deadline", fmt.Errorf("wait: %w", context.DeadlineExceeded), &wire.Error{Code: wire.Code_CODE_UNAVAILABLE, Message: "wait: context deadline exceeded"}},
		{"refusal", fmt.Errorf("look: %w", refusal), &wire.Error{
			Code: wire.Code_CODE_REFUSED, Message: "dump of pid 12 refused, nothing was touched",
			Problems: []*wire.Problem{{Object: &wire.Object{Pid: 12, Comm: "sh", Fd: 3, HasFd: true, Key: "k"}, Reason: "no", Hint: "do"}},
		}},
		{"failure of the other host", fmt.Errorf("copy: %w", &wire.Failure{Code: wire.Code_CODE_ABORTED, Host: "beta", Phase: "RESTORING", Message: "stop"}),
			&wire.Error{Code: wire.Code_CODE_ABORTED, Host: "beta", Phase: "RESTORING", Message: "copy: stop"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := failure(tt.err, "alpha", wire.State_STATE_FREEZING).Proto()
			if tt.want.Host == "" {
				tt.want.Host, tt.want.Phase = "alpha", "FREEZING"
			}
			if got.String() != tt.want.String() {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}
