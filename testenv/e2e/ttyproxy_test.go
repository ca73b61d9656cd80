package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// talker answers lines, and tells of signals and sizes.
const talker = `
import fcntl, os, signal, struct, sys, termios
def size(*_):
    print("size", *struct.unpack("HHHH", fcntl.ioctl(1, termios.TIOCGWINSZ, bytes(8)))[:2], flush=True)
def hup(*_):
    open(sys.argv[1] + ".hup", "w").close()
    os._exit(0)
own = os.open("/dev/tty", os.O_RDWR)
signal.signal(signal.SIGINT, lambda *_: os.write(own, b"interrupted\n"))
signal.signal(signal.SIGWINCH, size)
signal.signal(signal.SIGHUP, hup)
with open(sys.argv[1] + ".pid", "w") as f: f.write("%d\n" % os.getpid())
print("up", flush=True)
while True:
    line = sys.stdin.readline()
    if line.startswith("quit"): sys.exit(int(line.split()[1]))
    print("you said", line.strip() if line else "nothing", flush=True)
`

// ttyProxy is a talker on a terminal that stays on alpha.
type ttyProxy struct {
	*typist
	f      *fleet.Fleet
	host   *hosts.Host
	root   int
	prefix string
	pts    string
}

func newTTYProxy(ctx context.Context, t *testing.T, f *fleet.Fleet, alpha *hosts.Host, command string) *ttyProxy {
	t.Helper()
	dir := newDir(t)
	prog := filepath.Join(dir, "talker.py")
	if err := os.WriteFile(prog, []byte(talker), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &ttyProxy{f: f, host: alpha, prefix: filepath.Join(dir, "talker")}
	p.typist = newTypist(ctx, t, alpha, strings.ReplaceAll(command, "TALKER", fmt.Sprintf("python3 %s %s", prog, p.prefix)))
	p.file(ctx, p.prefix+".pid")
	p.sees(ctx, 0, "up")
	b, err := os.ReadFile(p.prefix + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	if p.root, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		t.Fatal(err)
	}
	out, err := alpha.Run(ctx, "readlink", fmt.Sprintf("/proc/%d/fd/0", p.root))
	if err != nil {
		t.Fatal(err)
	}
	p.pts = strings.TrimSpace(out)
	return p
}

func (p *ttyProxy) move(ctx context.Context, to *hosts.Host, args ...string) {
	p.t.Helper()
	m, res, err := p.f.Migrate(ctx, p.host.Name(), p.root, to.Name(), args...)
	if err != nil || res.Code != 0 || m.State != "completed" {
		p.t.Fatalf("%s to %s: %v, exit code %d: %s%s", p.host.Name(), to.Name(), err, res.Code, res.Stdout, res.Stderr)
	}
	p.host, p.root = to, m.LandedPID
}

// talks types a line, an interrupt and, from another process, another size.
func (p *ttyProxy) talks(ctx context.Context, alpha *hosts.Host, rows int) {
	p.t.Helper()
	at := p.shown()
	p.types(fmt.Sprintf("hello %d\n", rows))
	p.sees(ctx, at, fmt.Sprintf("you said hello %d\r\n", rows))
	p.types("\x03")
	p.sees(ctx, at, "interrupted")
	if _, err := alpha.Run(ctx, "stty", "-F", p.pts, "rows", strconv.Itoa(rows)); err != nil {
		p.t.Fatal(err)
	}
	p.sees(ctx, at, fmt.Sprintf("size %d ", rows))
	p.types("\x04")
	p.sees(ctx, at, "you said nothing")
	if got := p.text(at); strings.Count(got, "hello") != 2 { // echoed once
		p.t.Errorf("the terminal shows %q", got)
	}
}

// TestTerminalProxy moves programs whose terminal stays where they were started.
func TestTerminalProxy(t *testing.T) {
	ctx := deadline(t, time.Minute)
	e := newHosts(t, "alpha", "beta", "gamma", "hub")
	f, err := fleet.Start(ctx, e, binaries, newDir(t), "hub", []string{"alpha", "beta", "gamma"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, n := range []string{"alpha", "beta", "gamma"} {
			if t.Failed() {
				t.Logf("end of the log of %s:\n%s", n, f.Log(n))
			}
		}
	})
	alpha, beta, gamma := e.Host("alpha"), e.Host("beta"), e.Host("gamma")
	proxy := []string{"--external", "kind:tty=proxy"}

	t.Run("there, on and back", func(t *testing.T) {
		p := newTTYProxy(ctx, t, f, alpha, "stty rows 24 cols 80; setsid -f -c TALKER; sleep 1000")
		p.talks(ctx, alpha, 20)
		p.move(ctx, beta, proxy...)
		for i, to := range []*hosts.Host{gamma, alpha, beta} {
			p.talks(ctx, alpha, 30+i)
			p.types("beg")
			p.move(ctx, to)
			p.types("un\n")
			p.sees(ctx, 0, "you said begun\r\n")
		}
		p.types("quit 0\n")
		for {
			if out, err := alpha.Run(ctx, "stty", "-F", p.pts, "-a"); err != nil {
				t.Fatal(err)
			} else if strings.Contains(out, " icanon") {
				break
			}
		}
	})
	t.Run("its shell waits", func(t *testing.T) {
		p := newTTYProxy(ctx, t, f, alpha, "stty rows 24 cols 80; trap : INT; TALKER; echo status $?; stty -a; sleep 1000")
		p.talks(ctx, alpha, 20)
		p.types("begun ")
		p.move(ctx, beta, proxy...)
		at := p.shown()
		p.types("and ended\n")
		p.sees(ctx, at, "you said begun and ended\r\n")
		p.talks(ctx, alpha, 30)
		p.move(ctx, gamma)
		p.talks(ctx, alpha, 31)
		// The stand-in has its pid.
		if _, res, err := f.Migrate(ctx, "gamma", p.root, "alpha"); err != nil || res.Code != 4 || !strings.Contains(res.Stdout, strconv.Itoa(p.root)) {
			t.Errorf("back home: %v, exit code %d, %s%s", err, res.Code, res.Stdout, res.Stderr)
		}
		p.talks(ctx, alpha, 32)
		p.types("quit 7\n")
		at = p.sees(ctx, 0, "status 7\r\n")
		p.sees(ctx, at, " icanon ")
	})
	t.Run("in the background", func(t *testing.T) {
		p := &ttyProxy{typist: newTypist(ctx, t, alpha, "exec bash --norc -i"), f: f, host: alpha}
		p.types("(while :; do echo ti''ck; sleep 0.1; done) & echo pid $!.\n")
		at := p.sees(ctx, 0, "\r\npid ")
		p.sees(ctx, at, ".")
		number, _, _ := strings.Cut(p.text(at), ".")
		var err error
		if p.root, err = strconv.Atoi(number); err != nil {
			t.Fatal(err)
		}
		if res, err := f.Run(ctx, "plan", fmt.Sprintf("alpha:%d", p.root), "beta", "--external", "kind:tty=proxy"); err != nil || res.Code != 0 || !strings.Contains(res.Stdout, "(bash) reads what is typed") {
			t.Errorf("plan: %v, exit code %d, %s%s", err, res.Code, res.Stdout, res.Stderr)
		}
		p.move(ctx, beta, proxy...)
		at = p.sees(ctx, p.shown(), "tick\r")
		p.types("jo''bs\n")
		at = p.sees(ctx, at, "Running")
		p.sees(ctx, at, "tick\r")
		p.types("exit\nexit\n")
		if err := beta.WaitGone(ctx, p.root); err != nil { // of the hang-up
			t.Error(err)
		}
	})
	t.Run("what both hosts lack", func(t *testing.T) {
		prefix := filepath.Join(newDir(t), "sharing")
		line := fmt.Sprintf("mkfifo /tmp/fifo; exec 7>/tmp/only-here 8<>/tmp/fifo; %s sharing %s files; :", programs.Selfcheck, prefix)
		sh, err := workloads.Launch(ctx, alpha, prefix, "/bin/sh", "-c", line)
		if err == nil {
			err = sh.WaitFile(ctx, "ready")
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"plan", "migrate"} {
			res, err := f.Run(ctx, command, fmt.Sprintf("alpha:%d", sh.Pid), "beta", "--external", "kind:fifo=proxy")
			if err != nil || res.Code != 4 || !containsAll(res.Stderr, []string{
				"on alpha: thread ", "has descriptors of its own", "on beta: --external kind:fifo=proxy: the bytes of a fifo cannot be carried on", "/tmp/only-here: on beta: "}) {
				t.Errorf("%s: %v, exit code %d, %s", command, err, res.Code, res.Stderr)
			}
		}
		if err := alpha.Kill(sh.Pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("hang-up", func(t *testing.T) {
		p := newTTYProxy(ctx, t, f, alpha, "stty rows 24 cols 80; exec TALKER")
		p.move(ctx, beta, proxy...)
		p.talks(ctx, alpha, 30)
		if err := alpha.Kill(p.pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.file(ctx, p.prefix+".hup")
		if err := beta.WaitGone(ctx, p.root); err != nil {
			t.Error(err)
		}
	})
}
