package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// typist is a terminal made by script(1), with somebody who types.
type typist struct {
	t    *testing.T
	h    *hosts.Host
	pid  int // of script
	keys *os.File
	out  string // what the terminal shows
}

// newTypist runs a command of sh on a new terminal.
func newTypist(ctx context.Context, t *testing.T, h *hosts.Host, command string) *typist {
	t.Helper()
	dir := newDir(t)
	p := &typist{t: t, h: h, out: filepath.Join(dir, "typescript")}
	fifo := filepath.Join(dir, "keys")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.keys, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	p.pid, err = h.Start(ctx, hosts.Spec{Args: []string{"script", "-q", "-f", "-c", command, p.out}, Stdin: fifo,
		Env: append(os.Environ(), "SHELL=/bin/sh", "TERM=xterm-256color", "LC_ALL=C.UTF-8", "PS1=$ ", "HISTFILE=")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.keys.Close()
		_ = h.Kill(p.pid, unix.SIGKILL)
	})
	return p
}

func (p *typist) types(text string) {
	p.t.Helper()
	if _, err := p.keys.WriteString(text); err != nil {
		p.t.Fatal(err)
	}
}

// sees waits until the terminal shows a text behind the first from bytes, and says
// where that ends.
func (p *typist) sees(ctx context.Context, from int, want string) int {
	p.t.Helper()
	for {
		b, _ := os.ReadFile(p.out)
		b = b[min(from, len(b)):]
		if i := strings.Index(string(b), want); i >= 0 {
			return from + i + len(want)
		}
		if ctx.Err() != nil {
			p.t.Fatalf("the terminal does not show %q but %q", want, b)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (p *typist) shown() int {
	b, _ := os.ReadFile(p.out)
	return len(b)
}

// file waits for a file that the program makes.
func (p *typist) file(ctx context.Context, path string) {
	p.t.Helper()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if ctx.Err() != nil {
			b, _ := os.ReadFile(p.out)
			p.t.Fatalf("no %s; the terminal shows %q", filepath.Base(path), b)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// child is the program that a shell on the terminal started.
func (p *typist) child(ctx context.Context, prefix, arg string) *workloads.Run {
	p.t.Helper()
	r := &workloads.Run{Host: p.h, Prefix: prefix}
	p.file(ctx, prefix+".ready")
	out, err := p.h.Run(ctx, "pgrep", "-x", "-f", strings.TrimSpace(fmt.Sprintf("%s shelljob %s %s", programs.Selfcheck, prefix, arg)))
	if err != nil {
		p.t.Fatal(err)
	}
	if r.Pid, err = strconv.Atoi(strings.TrimSpace(out)); err != nil {
		p.t.Fatal(err)
	}
	return r
}

// TestShellJob moves a program from the terminal of one shell to another's.
func TestShellJob(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, h, fmt.Sprintf("stty rows 24 cols 80; %s shelljob %s job; :", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	p.types("hello\n")
	p.sees(ctx, 0, "you said hello")
	o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t))
	if o.code != 1 || !strings.Contains(o.stderr, "its terminal is not part of the tree") || !strings.Contains(o.stderr, "--shell-job") {
		t.Errorf("dump without --shell-job: exit code %d, %q", o.code, o.stderr)
	}
	goes(ctx, t, r, 5)
	for round := range 10 {
		img := dump(ctx, t, h, r.Pid, "-j")
		if round == 0 {
			decodeImages(t, img)
			for _, args := range [][]string{{"restore", "-D", img, "-d"}, {"restore", "-D", img, "-d", "-j"}} {
				o := agentCmd(ctx, t, h, nil, args...)
				if o.code != 1 || !strings.Contains(o.stderr, "--shell-job") {
					t.Errorf("%v without terminal: exit code %d, %q", args, o.code, o.stderr)
				}
			}
		}
		p = newTypist(ctx, t, h, fmt.Sprintf("stty rows %d cols 80; %s restore -D %s -j; stty -a; echo over; sleep 1000", 24+round, binaries.Agent, img))
		p.types(fmt.Sprintf("round %d\n", round))
		at := p.sees(ctx, 0, fmt.Sprintf("you said round %d\r\n", round))
		goes(ctx, t, r, 5)
		p.types("size\n")
		p.sees(ctx, at, fmt.Sprintf("size %d 80, told %d times", 24+round, round))
	}
	// The shell gets its terminal back as it was.
	at := p.shown()
	stop(ctx, t, r)
	p.sees(ctx, at, "over")
	b, err := os.ReadFile(p.out)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b[at:]), " echo ") || !strings.Contains(string(b[at:]), " icanon ") {
		t.Errorf("the terminal is left as %s", b[at:])
	}
}

// TestShellJobOfBash dumps the job in the foreground of an interactive shell and
// restores it in the same shell, in the foreground.
func TestShellJobOfBash(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, h, "exec bash --norc --noediting -i")
	p.types(fmt.Sprintf("%s shelljob %s job\n", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	for round := range 10 {
		at := p.shown()
		img := dump(ctx, t, h, r.Pid, "--shell-job")
		p.sees(ctx, at, "$ ")
		at = p.shown()
		p.types(fmt.Sprintf("echo $((%d+1000)); %s restore -D %s -j\n", round, binaries.Agent, img))
		at = p.sees(ctx, at, fmt.Sprintf("%d\r\n", round+1000))
		for !h.Alive(r.Pid) {
			if ctx.Err() != nil {
				b, _ := os.ReadFile(p.out)
				t.Fatalf("it is not restored; the terminal shows %q", b)
			}
			time.Sleep(2 * time.Millisecond)
		}
		p.types("still here\n")
		p.sees(ctx, at, "you said still here")
		goes(ctx, t, r, 5)
	}
	at := p.shown()
	stop(ctx, t, r)
	p.types("echo $((20+22)) over\n")
	p.sees(ctx, at, "42 over")
}

// TestExternalTerminal hands in another terminal for the one that a tree had.
func TestExternalTerminal(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, h, fmt.Sprintf("%s shelljob %s; :", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "")
	keyOf := regexp.MustCompile(`--external (tty\[[0-9a-f]+:[0-9a-f]+\])`)
	// The second time as a standard file of the command, which it goes on using.
	for _, fd := range []int{4, 0} {
		o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t))
		key := keyOf.FindStringSubmatch(o.stderr)
		if o.code != 1 || key == nil {
			t.Fatalf("dump of a terminal: exit code %d, %q", o.code, o.stderr)
		}
		o = agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "--external", "tty[1:2]")
		if o.code != 1 || !strings.Contains(o.stderr, "no process of the tree has a terminal with this key open") || !strings.Contains(o.stderr, "nearest: "+key[1]) {
			t.Errorf("dump with a wrong key: exit code %d, %q", o.code, o.stderr)
		}
		img := dump(ctx, t, h, r.Pid, "--external", key[1])
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d"); o.code != 1 || !strings.Contains(o.stderr, "external terminal "+key[1]+" was not handed in") {
			t.Errorf("restore without the terminal: exit code %d, %q", o.code, o.stderr)
		}
		p = newTypist(ctx, t, h, fmt.Sprintf("stty -echo -icanon min 0 time 1; %s restore -D %s -d -v4 --inherit-fd 'fd[%d]:%s' %d<>/dev/tty; echo back; sleep 1000", binaries.Agent, img, fd, key[1], fd))
		at := p.sees(ctx, p.sees(ctx, 0, "restored"), "back")
		p.types("hello\n")
		p.sees(ctx, at, "you said hello")
		goes(ctx, t, r, 5)
	}
	stop(ctx, t, r)
}

// TestShellJobTwice restores the same images twice, with a log that has grown
// meanwhile; however the program ends, its terminal is left as it was.
func TestShellJobTwice(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, h, fmt.Sprintf("%s shelljob %s job; :", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	img := dump(ctx, t, h, r.Pid, "-j")
	p = newTypist(ctx, t, h, fmt.Sprintf(`for i in 1 2; do %s restore -D %s -j; echo "ended with $?"; stty -a; echo over; done; sleep 1000`, binaries.Agent, img))
	at := 0
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSEGV} {
		p.types("hello\n")
		from := at
		at = p.sees(ctx, at, "you said hello")
		if err := h.Kill(r.Pid, sig); err != nil {
			t.Fatal(err)
		}
		at = p.sees(ctx, at, fmt.Sprintf("ended with %d", 128+int(sig)))
		at = p.sees(ctx, at, "over")
		b, err := os.ReadFile(p.out)
		if err != nil {
			t.Fatal(err)
		}
		if s := string(b[from:at]); !strings.Contains(s, " echo ") || !strings.Contains(s, " icanon ") {
			t.Errorf("the terminal is left as %s", s)
		}
	}
}

// TestShellJobInherit hands in a file as a standard descriptor of the command that
// restores a job of a terminal.
func TestShellJobInherit(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	prefix := filepath.Join(dir, "shelljob")
	p := newTypist(ctx, t, h, fmt.Sprintf("exec 5<>%s/first; %s shelljob %s job; sleep 1000", dir, programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	for i := range 3 {
		k := key(t, h, r.Pid, 5)
		img := dump(ctx, t, h, r.Pid, "-j", "--external", k)
		other := fmt.Sprintf("%s/other%d", dir, i)
		p = newTypist(ctx, t, h, fmt.Sprintf("%s restore -D %s -j --inherit-fd fd[%d]:%s %d<>%s; echo over; sleep 1000", binaries.Agent, img, 1+i%2, k, 1+i%2, other))
		p.types("hello\n")
		p.sees(ctx, 0, "you said hello")
		goes(ctx, t, r, 5)
		if to, err := h.Run(ctx, "readlink", fmt.Sprintf("/proc/%d/fd/5", r.Pid)); err != nil || strings.TrimSpace(to) != other {
			t.Errorf("round %d: the file is %q, %v", i, to, err)
		}
	}
	stop(ctx, t, r)
	p.sees(ctx, 0, "over")
}

// TestShellJobLeader moves the leader of a terminal's session: it takes the new
// terminal from the session that has it.
func TestShellJobLeader(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, h, fmt.Sprintf("exec %s shelljob %s job", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	for range 5 {
		img := dump(ctx, t, h, r.Pid, "-j")
		p = newTypist(ctx, t, h, fmt.Sprintf("%s restore -D %s -j -d; sleep 1000", binaries.Agent, img))
		p.types("hello\n")
		p.sees(ctx, 0, "you said hello")
		goes(ctx, t, r, 5)
	}
	stop(ctx, t, r)
}

// TestSiblings moves two trees of one session and process group, one after the other.
func TestSiblings(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"sh", "-c",
		`for i in a b; do "$0" tree "$1/$i" & echo $! >"$1/$i.pid"; done; wait; wait; sleep 1000`, programs.Selfcheck, dir}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Kill(pid, unix.SIGKILL) }()
	var runs []*workloads.Run
	for _, name := range []string{"a", "b"} {
		r := &workloads.Run{Host: h, Prefix: filepath.Join(dir, name)}
		for r.Pid == 0 {
			b, _ := os.ReadFile(r.Prefix + ".pid")
			if _, err := fmt.Sscan(string(b), &r.Pid); err != nil && ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		if err := r.WaitFile(ctx, "ready"); err != nil {
			t.Fatal(err)
		}
		runs = append(runs, r)
	}
	for range 2 {
		var imgs []string
		for _, r := range runs {
			imgs = append(imgs, dump(ctx, t, h, r.Pid))
		}
		for i, r := range runs {
			restore(ctx, t, h, imgs[i], r.Pid, nil)
			goes(ctx, t, r, 5)
		}
	}
	for _, r := range runs {
		stop(ctx, t, r)
	}
}

// tmux runs a command of tmux on a host.
func tmux(ctx context.Context, t *testing.T, h *hosts.Host, args ...string) string {
	t.Helper()
	out, err := h.Run(ctx, "env", append([]string{"-u", "TMUX", "TERM=xterm-256color", "LC_ALL=C.UTF-8", "tmux", "-f", "/dev/null"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(out, "\n")
}

// work is a tmux server with programs in its windows.
type work struct {
	pid  int
	tick int // the last number that the first window has shown
}

func newWork(ctx context.Context, t *testing.T, h *hosts.Host) *work {
	t.Helper()
	tmux(ctx, t, h, "new-session", "-d", "-s", "work", "-x", "80", "-y", "24", "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done")
	tmux(ctx, t, h, "new-window", "-t", "work", "bash --norc -i")
	tmux(ctx, t, h, "new-window", "-t", "work", "less /etc/services")
	tmux(ctx, t, h, "new-window", "-t", "work", "vim -u NONE -n /etc/services")
	// The shell has a job that is stopped and one in the background.
	tmux(ctx, t, h, "send-keys", "-t", "work:1", "PS1='> '", "Enter", "sleep 1000 &", "Enter", "sleep 2000", "Enter")
	w := &work{}
	var err error
	if w.pid, err = strconv.Atoi(tmux(ctx, t, h, "display", "-p", "#{pid}")); err != nil {
		t.Fatal(err)
	}
	for strings.TrimSpace(tmux(ctx, t, h, "display", "-p", "-t", "work:1", "#{pane_current_command}")) != "sleep" {
		time.Sleep(5 * time.Millisecond)
	}
	tmux(ctx, t, h, "send-keys", "-t", "work:1", "C-z")
	w.until(ctx, t, h, 1, "Stopped")
	w.until(ctx, t, h, 2, "Network services")
	w.until(ctx, t, h, 3, "Network services")
	return w
}

// until waits until a window shows a text.
func (w *work) until(ctx context.Context, t *testing.T, h *hosts.Host, window int, want string) string {
	t.Helper()
	for {
		out := tmux(ctx, t, h, "capture-pane", "-p", "-t", fmt.Sprintf("work:%d", window))
		if strings.Contains(out, want) {
			return out
		}
		if ctx.Err() != nil {
			t.Fatalf("window %d does not show %q but %q", window, want, out)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// check uses all windows.
func (w *work) check(ctx context.Context, t *testing.T, h *hosts.Host, round int) {
	t.Helper()
	var nums []int
	for _, line := range strings.Fields(strings.ReplaceAll(w.until(ctx, t, h, 0, "tick"), "tick ", "")) {
		n, err := strconv.Atoi(line)
		if err != nil {
			t.Fatalf("the first window shows %q", line)
		}
		nums = append(nums, n)
	}
	for i := range nums[1:] {
		if nums[i+1] != nums[i]+1 {
			t.Fatalf("the first window shows %v", nums)
		}
	}
	if last := nums[len(nums)-1]; last < w.tick {
		t.Fatalf("the first window shows %d, and has shown %d", last, w.tick)
	}
	w.tick = nums[len(nums)-1]
	w.until(ctx, t, h, 0, fmt.Sprintf("tick %d", w.tick+2))
	// Keys reach the programs, the shell knows its jobs, and brings one to the front.
	tmux(ctx, t, h, "send-keys", "-t", "work:1", fmt.Sprintf("clear; jobs; echo seen $((%d+2000))", round), "Enter")
	out := w.until(ctx, t, h, 1, fmt.Sprintf("seen %d", round+2000))
	if !strings.Contains(out, "Running") || !strings.Contains(out, "Stopped") {
		t.Fatalf("jobs of the shell: %q", out)
	}
	tmux(ctx, t, h, "send-keys", "-t", "work:1", fmt.Sprintf("fg; echo back $((%d+1000))", round), "Enter")
	for strings.TrimSpace(tmux(ctx, t, h, "display", "-p", "-t", "work:1", "#{pane_current_command}")) != "sleep" {
		if ctx.Err() != nil {
			t.Fatal("no job comes to the front")
		}
		time.Sleep(5 * time.Millisecond)
	}
	tmux(ctx, t, h, "send-keys", "-t", "work:1", "C-z")
	w.until(ctx, t, h, 1, fmt.Sprintf("back %d", round+1000))
	tmux(ctx, t, h, "send-keys", "-t", "work:2", "g", fmt.Sprintf("%dj", 3*round+5))
	tmux(ctx, t, h, "send-keys", "-t", "work:3", fmt.Sprintf(":normal ggOround %d", round), "Enter")
	w.until(ctx, t, h, 3, fmt.Sprintf("round %d", round))
}

// attach looks at the session with a client of tmux.
func (w *work) attach(ctx context.Context, t *testing.T, h *hosts.Host) {
	t.Helper()
	tmux(ctx, t, h, "select-window", "-t", "work:0")
	p := newTypist(ctx, t, h, "stty rows 24 cols 80; unset TMUX; tmux attach -t work; echo left; sleep 1000")
	at := p.sees(ctx, 0, "tick")
	// Detach; tmux drops keys that come while it still asks what the terminal is.
	for ctx.Err() == nil {
		p.types("\x02d")
		for range 100 {
			if b, _ := os.ReadFile(p.out); strings.Contains(string(b[min(at, len(b)):]), "left") {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	p.sees(ctx, at, "left")
}

func TestTmux(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	w := newWork(ctx, t, h)
	w.check(ctx, t, h, 0)
	for round := range 10 {
		img := dump(ctx, t, h, w.pid)
		if round == 0 {
			decodeImages(t, img)
		}
		restore(ctx, t, h, img, w.pid, nil)
		w.check(ctx, t, h, round+1)
		if err := os.RemoveAll(img); err != nil {
			t.Fatal(err)
		}
	}
	w.attach(ctx, t, h)
	// In a pid namespace of its own it has terminals of its own, whoever has those
	// of the same numbers here.
	img := dump(ctx, t, h, w.pid)
	other := newTypist(ctx, t, h, "echo here; sleep 1000")
	other.sees(ctx, 0, "here")
	if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d"); o.code != 1 || !strings.Contains(o.stderr, "is in use here, and the tree needs a terminal of that number") {
		t.Fatalf("restore with a terminal that is taken: exit code %d, %q", o.code, o.stderr)
	}
	mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "--pid-namespace", "new")
	w.check(ctx, t, h, 12)
	w.attach(ctx, t, h)
	tmux(ctx, t, h, "kill-server")
}

// TestMigrateTmux moves a tmux server with all that runs under it to and fro.
func TestMigrateTmux(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	w := newWork(ctx, t, alpha)
	// The directory of its socket is there, as on a host where tmux has run.
	if _, err := beta.Run(ctx, "install", "-d", "-m", "700", "/tmp/tmux-0"); err != nil {
		t.Fatal(err)
	}
	from, to := alpha, beta
	for round := range 10 {
		m, res, err := f.Migrate(ctx, from.Name(), w.pid, to.Name())
		if err != nil {
			t.Fatal(err)
		}
		if res.Code != 0 || m.Owner != "destination" {
			t.Fatalf("round %d: exit code %d, state %s: %s%s", round, res.Code, m.State, res.Stdout, res.Stderr)
		}
		from, to = to, from
		w.check(ctx, t, from, round)
	}
	w.attach(ctx, t, from)
	// A terminal of the same number on the other host is found before anything is touched.
	other := newTypist(ctx, t, to, "echo here; sleep 1000")
	other.sees(ctx, 0, "here")
	_, res, err := f.Migrate(ctx, from.Name(), w.pid, to.Name())
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 4 || !strings.Contains(res.Stdout+res.Stderr, "is in use here, and the tree needs a terminal of that number") {
		t.Errorf("migration to a host where the terminal is taken: exit code %d, %s%s", res.Code, res.Stdout, res.Stderr)
	}
	w.check(ctx, t, from, 11)
	tmux(ctx, t, from, "kill-server")
}

// spawner runs a shell on a terminal of its own (pty.spawn of Python), and has it
// compute for ever.
const spawner = `
import os, pty, sys
pid, m = pty.fork()
if pid == 0:
    os.execvp("bash", ["bash", "--norc", "--noediting"])
def until(text):
    got = b""
    while not got.endswith(text):
        got += os.read(m, 1)
    return got
os.write(m, b"PS1=; stty -echo\n")
os.write(m, b"echo re''ady\n")
until(b"ready\r\n")
os.write(m, b"sleep 1000 & echo job $!\n")
until(b"job "); job = int(until(b"\r\n"))
n = 0
out = open(sys.argv[1], "a")
while not os.path.exists(sys.argv[1] + ".stop"):
    n += 1
    # All in one: what waits in the terminal is large now and then.
    os.write(m, b"echo start; seq 400; echo sum $((%d*3)); jobs -p\n" % n)
    until(b"start\r\n")
    got = until(b"sum %d\r\n" % (3*n))
    want = b"".join(b"%d\r\n" % i for i in range(1, 401)) + b"sum %d\r\n" % (3*n)
    if got != want:
        print("bad", n, got, file=out, flush=True); sys.exit(1)
    if int(until(b"\r\n")) != job:
        print("bad job", file=out, flush=True); sys.exit(1)
    print(n, file=out, flush=True)
os.write(m, b"kill %1; wait; exit\n")
pid, status = os.waitpid(pid, 0)
print("end", status, file=out, flush=True)
`

func TestPythonSpawn(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	out := filepath.Join(newDir(t), "out")
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", "-c", spawner, out}, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	last := func() (int, string) {
		b, _ := os.ReadFile(out)
		lines := strings.Fields(string(b))
		if len(lines) == 0 {
			return 0, string(b)
		}
		n, _ := strconv.Atoi(lines[len(lines)-1])
		return n, string(b)
	}
	goesOn := func() {
		t.Helper()
		from, _ := last()
		for {
			n, all := last()
			if n >= from+5 {
				return
			}
			if strings.Contains(all, "bad") || strings.Contains(all, "Error") || ctx.Err() != nil {
				t.Fatalf("after round %d it said %q", from, all[max(0, len(all)-2000):])
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	goesOn()
	for range 10 {
		img := dump(ctx, t, h, pid)
		restore(ctx, t, h, img, pid, nil)
		goesOn()
		mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(pid), "-D", newDir(t), "-R")
		goesOn()
	}
	if err := os.WriteFile(out+".stop", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	waitSuffix(ctx, t, out, "end 0\n")
}

// waitSuffix waits until a file ends in a text.
func waitSuffix(ctx context.Context, t *testing.T, path, want string) {
	t.Helper()
	for {
		b, _ := os.ReadFile(path)
		if strings.HasSuffix(string(b), want) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s ends in %q, want %q", path, b[max(0, len(b)-200):], want)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
