package agent

import (
	"bytes"
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/transport"
	"godwit/transport/bus"
	"godwit/wire"
)

// TestMain makes the test binary act as the whole program where a test starts
// it so: descriptors, signals and locks are of a process.
func TestMain(m *testing.M) {
	if os.Getenv("GODWIT_TEST_PROGRAM") != "" {
		os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr))
	}
	// What the test's own parent left open would be in every process that a
	// test starts, and cannot be carried.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "GODWIT_TEST_PROGRAM=1")
	return cmd
}

// output is written by a process and read by a test.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func TestDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		needsRoot(t)
	}
	srv, err := bus.Start(bus.Config{Listen: "127.0.0.1:0", StoreDir: t.TempDir()})
	noErr(t, err)
	defer srv.Shutdown()
	state, url := t.TempDir(), srv.URL()
	args := func(host, state string) []string {
		return []string{"run", "--host", host, "--state-dir", state, "--nats-url", url}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	log := &output{}
	daemon := program(ctx, args("alpha", state)...)
	daemon.Stderr = log
	noErr(t, daemon.Start())
	for !strings.Contains(log.String(), "ready: host=alpha") {
		if ctx.Err() != nil {
			t.Fatalf("not ready: %s", log)
		}
		time.Sleep(5 * time.Millisecond)
	}
	nc, err := transport.Connect(transport.Config{URLs: []string{url}})
	noErr(t, err)
	defer nc.Close()
	reply, err := transport.Call[*wire.InfoRequest, *wire.InfoReply](ctx, nc, "alpha", "info", &wire.InfoRequest{})
	noErr(t, err)
	if reply.Info.GetPid() != uint32(daemon.Process.Pid) || reply.Info.GetProtocol() != wire.Version {
		t.Errorf("info: %v", reply.Info)
	}
	// A tree that holds the agent itself cannot leave.
	_, err = transport.Call[*wire.PreflightRequest, *wire.PreflightReply](ctx, nc, "alpha", "preflight",
		&wire.PreflightRequest{Protocol: wire.Version, Id: "x", Pid: int32(os.Getpid()), Destination: "beta"})
	if wire.CodeOf(err) != wire.Code_CODE_REFUSED || !strings.Contains(err.Error(), "agent itself") {
		t.Errorf("preflight of the agent: %v", err)
	}
	for _, tt := range []struct{ name, state, want string }{
		{"same host, same state", state, "runs on this machine"},
		{"same host on the bus", t.TempDir(), "another agent has the same host name"},
	} {
		out, err := program(ctx, args("alpha", tt.state)...).CombinedOutput()
		if e, ok := err.(*exec.ExitError); !ok || e.ExitCode() != 1 || !strings.Contains(string(out), tt.want) {
			t.Errorf("%s: %v, %s", tt.name, err, out)
		}
	}
	noErr(t, daemon.Process.Signal(unix.SIGTERM))
	if err := daemon.Wait(); err != nil || !strings.Contains(log.String(), "stopped") {
		t.Errorf("SIGTERM: %v\n%s", err, log)
	}
	// Without a bus it waits, and leaves when told to.
	srv.Shutdown()
	log = &output{}
	daemon = program(ctx, args("alpha", state)...)
	daemon.Stderr = log
	noErr(t, daemon.Start())
	for !strings.Contains(log.String(), "waiting for the bus") {
		if ctx.Err() != nil {
			t.Fatalf("does not wait for the bus: %s", log)
		}
		time.Sleep(5 * time.Millisecond)
	}
	noErr(t, daemon.Process.Signal(unix.SIGTERM))
	if err := daemon.Wait(); err != nil {
		t.Errorf("SIGTERM while waiting for the bus: %v\n%s", err, log)
	}
}

// TestDumpRestore takes a real process through the program, with a fifo and a
// log as external files, both commands as people type them.
func TestDumpRestore(t *testing.T) {
	if os.Geteuid() != 0 {
		needsRoot(t)
	}
	dir := t.TempDir()
	img := filepath.Join(dir, "img")
	noErr(t, os.Mkdir(img, 0o700))
	fifo, log := filepath.Join(dir, "fifo"), filepath.Join(dir, "log")
	noErr(t, unix.Mkfifo(fifo, 0o600))
	held, err := os.OpenFile(fifo, os.O_RDWR, 0) // the outside that keeps the fifo open
	noErr(t, err)
	defer func() { _ = held.Close() }()
	logFile, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	noErr(t, err)
	in, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	noErr(t, err)
	noErr(t, unix.SetNonblock(int(in.Fd()), false))
	cmd := exec.Command("/bin/sh", "-c", "while read l; do echo got $l; done")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, logFile, logFile
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	noErr(t, cmd.Start())
	noErr(t, in.Close())
	noErr(t, logFile.Close())
	pid := cmd.Process.Pid
	// Whatever becomes of it, it is no longer there afterwards.
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	say := func(word, want string) {
		t.Helper()
		_, err := held.WriteString(word + "\n")
		noErr(t, err)
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
			b, _ := os.ReadFile(log)
			if string(b) == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("log %q, want %q", b, want)
			}
		}
	}
	say("one", "got one\n")

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	run := func(cmd *exec.Cmd) (int, string) {
		out, _ := cmd.CombinedOutput()
		return cmd.ProcessState.ExitCode(), string(out)
	}
	key := externalKey(t, pid, 0)
	if code, out := run(program(ctx, "dump", "-t", strconv.Itoa(pid), "-D", img, "--external", "file[1:1]")); code != 1 || !strings.Contains(out, "file[1:1]") {
		t.Errorf("a key that matches nothing: exit code %d, %s", code, out)
	}
	say("two", "got one\ngot two\n")
	if code, out := run(program(ctx, "dump", "-t", strconv.Itoa(pid), "-D", img, "--external", key)); code != 0 {
		t.Fatalf("dump: exit code %d, %s", code, out)
	}
	_, _ = cmd.Process.Wait() // its pid must be free
	if code, out := run(program(ctx, "restore", "-D", img, "-d")); code != 1 || !strings.Contains(out, key) || !strings.Contains(out, fifo) {
		t.Errorf("restore without the fifo: exit code %d, %s", code, out)
	}
	_, err = held.WriteString("three\n") // while nobody is there to read it
	noErr(t, err)
	restore := program(ctx, "restore", "-D", img, "-d", "--pidfile", "pid", "--inherit-fd", "fd[4]:"+key)
	restore.ExtraFiles = []*os.File{nil, held} // 3 closed, 4 the fifo
	if code, out := run(restore); code != 0 {
		t.Fatalf("restore: exit code %d, %s", code, out)
	}
	if b, _ := os.ReadFile(filepath.Join(img, "pid")); string(b) != strconv.Itoa(pid) {
		t.Errorf("pid file: %q, want %d", b, pid)
	}
	say("four", "got one\ngot two\ngot three\ngot four\n")
}

// externalKey is the key of a descriptor as a person would find it.
func externalKey(t *testing.T, pid, fd int) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "fdinfo", strconv.Itoa(fd)))
	noErr(t, err)
	num := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		if n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64); err == nil {
			num[k] = n
		}
	}
	return "file[" + strconv.FormatUint(num["mnt_id"], 16) + ":" + strconv.FormatUint(num["ino"], 16) + "]"
}
