package hosts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

func run(t *testing.T, h *Host, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := h.Run(ctx, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func TestHostsAreApart(t *testing.T) {
	needRoot(t)
	e := ForTest(t, "alpha", "beta")
	a, b := e.Host("alpha"), e.Host("beta")
	if got := run(t, a, "hostname"); got != "alpha" {
		t.Errorf("hostname of alpha: %q", got)
	}
	for _, dir := range []string{"/tmp", "/run", "/dev/shm"} {
		run(t, a, "sh", "-c", "echo a >"+dir+"/mark")
		if _, err := os.Stat(b.Path(dir + "/mark")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s/mark of alpha is on beta: %v", dir, err)
		}
		if _, err := os.Stat(dir + "/mark"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s/mark of alpha is on the machine: %v", dir, err)
		}
	}
	if err := os.WriteFile(filepath.Join(e.Dir(), "both"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*Host{a, b} {
		if got := run(t, h, "cat", filepath.Join(e.Dir(), "both")); got != "x" {
			t.Errorf("%s: shared file holds %q", h.Name(), got)
		}
	}
	if got := run(t, a, "cat", "/proc/1/comm"); got == "" {
		t.Error("alpha has no pid 1")
	}
	if got := run(t, a, "sh", "-c", "ls /sys/class/net >/dev/null; ip -br link | wc -l"); got != "2" {
		t.Errorf("alpha has %s interfaces, want lo and eth0", got)
	}
}

func TestNetwork(t *testing.T) {
	needRoot(t)
	e := ForTest(t, "alpha", "beta", "client")
	a, b, c := e.Host("alpha"), e.Host("beta"), e.Host("client")
	service := Net.Addr()
	for range 100 {
		service = service.Next()
	}
	serve := func(h *Host) net.PacketConn {
		var pc net.PacketConn
		if err := h.Do(func() (err error) {
			pc, err = net.ListenPacket("udp4", "0.0.0.0:7000")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = pc.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				n, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = pc.WriteTo(append(buf[:n:n], h.Name()...), from)
			}
		}()
		return pc
	}
	serve(a)
	serve(b)
	ask := func(tries int) string {
		// Not connected: the answer comes from the first address of the host.
		var conn net.PacketConn
		if err := c.Do(func() (err error) {
			conn, err = net.ListenPacket("udp4", "0.0.0.0:0")
			return err
		}); err != nil {
			return err.Error()
		}
		defer func() { _ = conn.Close() }()
		to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(service, 7000))
		buf := make([]byte, 64)
		for range tries {
			_ = conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := conn.WriteTo([]byte("hi "), to); err != nil {
				continue
			}
			if n, _, err := conn.ReadFrom(buf); err == nil {
				return string(buf[:n])
			}
		}
		return "no answer"
	}
	for _, step := range []struct {
		from, to *Host
		want     string
	}{{nil, a, "hi alpha"}, {a, b, "hi beta"}, {b, a, "hi alpha"}} {
		if step.from != nil {
			if err := step.from.RemoveAddress(service); err != nil {
				t.Fatal(err)
			}
		}
		if err := step.to.AddAddress(service); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(step.want, ask(300)); diff != "" {
			t.Errorf("service address at %s (-want +got):\n%s", step.to.Name(), diff)
		}
	}
	if err := a.Unplug(); err != nil {
		t.Fatal(err)
	}
	if got := ask(5); got == "hi alpha" {
		t.Errorf("an unplugged host answers")
	}
	if err := a.Plug(); err != nil {
		t.Fatal(err)
	}
	if got := ask(300); got != "hi alpha" {
		t.Errorf("after Plug: %s", got)
	}
}

func TestStartAndPids(t *testing.T) {
	needRoot(t)
	e := ForTest(t, "alpha", "beta")
	a := e.Host("alpha")
	log := filepath.Join(e.Dir(), "log")
	pid, err := a.Start(t.Context(), Spec{Args: []string{"sh", "-c", "ls -l /proc/$$/fd; echo pid $$; sleep 1000 & wait"}, Stdout: log, Stderr: log})
	if err != nil {
		t.Fatal(err)
	}
	var text string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline) && !strings.Contains(text, "pid "); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		text = string(b)
	}
	if !strings.Contains(text, fmt.Sprintf("pid %d\n", pid)) {
		t.Errorf("started pid %d, the process says:\n%s", pid, text)
	}
	if strings.Contains(text, " 3 ->") && strings.Contains(text, "pipe:") {
		t.Errorf("inherited descriptors:\n%s", text)
	}
	outer, err := a.Outer(pid)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := a.Inner(outer); err != nil || back != pid {
		t.Errorf("Inner(Outer(%d)) = %d, %v", pid, back, err)
	}
	if pid < 1000 || pid > 1100 {
		t.Errorf("alpha counts pids from 1000 on and gave %d", pid)
	}
	if err := a.NextPid(t.Context(), 4321); err != nil {
		t.Fatal(err)
	}
	// The spawning helpers take a few.
	if next, err := a.Start(t.Context(), Spec{Args: []string{"sleep", "1000"}}); err != nil || next < 4321 || next > 4400 {
		t.Errorf("after NextPid(4321) the next process has pid %d, %v", next, err)
	}
	if _, err := e.Host("beta").Outer(pid); !errors.Is(err, ErrNoProcess) {
		t.Errorf("beta has pid %d: %v", pid, err)
	}
	if pp, err := parent(outer); err != nil || pp != a.InitPid() {
		t.Errorf("parent is %d, %v; want init %d", pp, err, a.InitPid())
	}
	if err := a.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := a.WaitGone(ctx, pid); err != nil {
		t.Error(err)
	}
}

func TestCommandStatus(t *testing.T) {
	needRoot(t)
	a := ForTest(t, "alpha").Host("alpha")
	for _, tc := range []struct {
		name string
		args []string
		want int
	}{
		{"zero", []string{"true"}, 0},
		{"status", []string{"sh", "-c", "exit 7"}, 7},
		{"signal", []string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
		{"missing", []string{"/no/such/program"}, 127},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := a.Command(t.Context(), tc.args[0], tc.args[1:]...)
			err := cmd.Run()
			var ee *exec.ExitError
			got := 0
			if errors.As(err, &ee) {
				got = ee.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if got != tc.want {
				t.Errorf("exit status %d, want %d", got, tc.want)
			}
		})
	}
	t.Run("signals are handed on", func(t *testing.T) {
		cmd := a.Command(t.Context(), "sh", "-c", `trap "exit 9" TERM; echo up; while :; do sleep 0.05; done`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		var ee *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &ee) || ee.ExitCode() != 9 {
			t.Errorf("after SIGTERM: %v, want exit status 9", err)
		}
	})
}

// TestDeathOfMaker checks that nothing is left when the program that made the
// hosts is killed: the test starts itself as that program.
func TestDeathOfMaker(t *testing.T) {
	needRoot(t)
	if dir := os.Getenv("HOSTS_TEST_MAKER"); dir != "" {
		e, err := New(dir, "alpha")
		if err != nil {
			t.Fatal(err)
		}
		pid, err := e.Host("alpha").Start(t.Context(), Spec{Args: []string{"sleep", "1000"}})
		if err != nil {
			t.Fatal(err)
		}
		outer, err := e.Host("alpha").Outer(pid)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("PIDS %d %d\n", e.Host("alpha").InitPid(), outer)
		time.Sleep(10 * time.Minute)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDeathOfMaker$", "-test.v")
	cmd.Env = append(os.Environ(), "HOSTS_TEST_MAKER="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var initPid, pid int
	var text strings.Builder
	buf := make([]byte, 4096)
	for pid == 0 {
		n, err := out.Read(buf)
		text.Write(buf[:n])
		if i := strings.Index(text.String(), "PIDS "); i >= 0 {
			_, _ = fmt.Sscanf(text.String()[i:], "PIDS %d %d", &initPid, &pid)
		}
		if err != nil {
			t.Fatalf("maker: %v\n%s", err, text.String())
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		gone := errors.Is(unix.Kill(pid, 0), unix.ESRCH) && errors.Is(unix.Kill(initPid, 0), unix.ESRCH)
		if gone {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("init %d or process %d outlives the program that made them", initPid, pid)
		}
	}
}
