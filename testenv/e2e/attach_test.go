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

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
)

// attachTo moves a tree to a new terminal on the hub, as somebody types it there.
func attachTo(ctx context.Context, t *testing.T, f *fleet.Fleet, rows int, from *hosts.Host, pid int, to *hosts.Host) *typist {
	t.Helper()
	line := f.LineOnHub("migrate", fmt.Sprintf("%s:%d", from.Name(), pid), to.Name(), "--attach")
	p := newTypist(ctx, t, f.Hub, fmt.Sprintf("stty rows %d cols 100; %s; echo exit code $?; stty -a; sleep 1000", rows, line))
	p.sees(ctx, 0, "attached")
	return p
}

// left waits for the end of an attachment, and looks at the terminal.
func (p *typist) left(ctx context.Context) {
	p.t.Helper()
	at := p.sees(ctx, 0, "exit code 0\r\n")
	p.sees(ctx, at, " echo ")
	p.sees(ctx, at, " icanon ")
}

// text is what the terminal shows behind the first from bytes.
func (p *typist) text(from int) string {
	b, _ := os.ReadFile(p.out)
	return string(b[min(from, len(b)):])
}

// program waits for the process of a name.
func program(ctx context.Context, t *testing.T, h *hosts.Host, name string) int {
	t.Helper()
	for {
		out, err := h.Run(ctx, "pgrep", "-x", name)
		if pid, perr := strconv.Atoi(strings.TrimSpace(out)); err == nil && perr == nil {
			return pid
		}
		if ctx.Err() != nil {
			t.Fatalf("%s has no %s", h.Name(), name)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestAttach moves a job of a shell to the terminals of those who ask for it.
func TestAttach(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	prefix := filepath.Join(newDir(t), "shelljob")
	p := newTypist(ctx, t, alpha, fmt.Sprintf("stty rows 24 cols 80; %s shelljob %s job; echo over; sleep 1000", programs.Selfcheck, prefix))
	r := p.child(ctx, prefix, "job")
	p.types("hello\n")
	p.sees(ctx, 0, "you said hello")

	tree := "alpha:" + strconv.Itoa(r.Pid)
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{4, "its terminal is not part of the tree", []string{"migrate", tree, "beta"}},
		{2, "--attach wants a terminal", []string{"migrate", tree, "beta", "--attach"}},
		{2, "--detach", []string{"migrate", tree, "beta", "--attach", "--detach"}},
	} {
		o, err := f.Run(ctx, c.args...)
		if err != nil || o.Code != c.code || !strings.Contains(o.Stderr, c.want) {
			t.Errorf("%v: exit code %d, %q, %v", c.args, o.Code, o.Stderr, err)
		}
	}
	from, to := alpha, beta
	for round := range 10 {
		q := attachTo(ctx, t, f, 30+round, from, r.Pid, to)
		r.Host = to
		if round == 0 {
			p.sees(ctx, 0, "over")
		} else {
			p.left(ctx)
		}
		p = q
		p.types(fmt.Sprintf("round %d\n", round))
		at := p.sees(ctx, 0, fmt.Sprintf("you said round %d\r\n", round))
		goes(ctx, t, r, 5)
		p.types("size\n")
		p.sees(ctx, at, fmt.Sprintf("size %d 100, told ", 30+round))
		if held := proxies(ctx, t, f, to.Name()); !strings.Contains(held, "the terminal of migration") {
			t.Errorf("the agent of %s does not tell of the terminal: %s", to.Name(), held)
		}
		from, to = to, from
	}
	// Another size while it runs.
	at := p.shown()
	if _, err := f.Hub.Run(ctx, "sh", "-c", fmt.Sprintf("stty -F /proc/$(pgrep -P %d)/fd/0 rows 50", p.pid)); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(p.text(at), "size 50 100") {
		if ctx.Err() != nil {
			t.Fatalf("the new size is not seen: %q", p.text(at))
		}
		p.types("size\n")
		time.Sleep(20 * time.Millisecond)
	}
	// A tilde is a byte like others elsewhere, and is typed twice at the beginning.
	p.types("a~.\n")
	p.sees(ctx, at, "you said a~.\r\n")
	p.types("~~.\n")
	p.sees(ctx, at, "you said ~.\r\n")
	stop(ctx, t, r)
	p.left(ctx)
}

// TestAttachEditor moves an editor, which draws its screen anew, and hangs up.
func TestAttachEditor(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	dir := newDir(t)
	text := filepath.Join(dir, "text")
	p := newTypist(ctx, t, alpha, "stty rows 24 cols 80; vim -u NONE -n "+text)
	p.sees(ctx, 0, "~")
	p.types("ifirst line\r")
	p.sees(ctx, 0, "first line")
	pid := program(ctx, t, alpha, "vim")
	p = attachTo(ctx, t, f, 24, alpha, pid, beta)
	p.sees(ctx, 0, "first line") // drawn again
	p.types("second line\x1b:w\r")
	p.sees(ctx, 0, "written")
	p = attachTo(ctx, t, f, 24, beta, pid, alpha)
	p.sees(ctx, 0, "second line")
	p.types("othird line\x1b:wq\r")
	p.left(ctx)
	if b, err := os.ReadFile(text); err != nil || string(b) != "first line\nsecond line\nthird line\n" {
		t.Errorf("the file is %q, %v", b, err)
	}

	// Whoever hangs up ends what was attached, as with a line to the host.
	newTypist(ctx, t, alpha, "stty rows 24 cols 80; exec less /etc/services")
	pid = program(ctx, t, alpha, "less")
	p = attachTo(ctx, t, f, 24, alpha, pid, beta)
	p.sees(ctx, 0, "ftp")
	p.types("\r~.")
	p.left(ctx)
	if err := beta.WaitGone(ctx, pid); err != nil {
		t.Errorf("the program runs on after the line was hung up: %v", err)
	}
}

// TestAttachCut kills commands that trees are attached to: one tree is hung up
// after a while, somebody comes back to the other.
func TestAttachCut(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	cut := func(args ...string) (*ttyProxy, string) {
		t.Helper()
		p := newTTYProxy(ctx, t, f, alpha, "stty rows 24 cols 80; exec TALKER")
		line := f.LineOnHub(append([]string{"migrate", fmt.Sprintf("alpha:%d", p.root), "beta", "--attach"}, args...)...)
		p.typist = newTypist(ctx, t, f.Hub, "stty rows 30 cols 90; exec "+line)
		p.types("one\n")
		p.sees(ctx, 0, "you said one\r\n")
		out, err := f.Hub.Run(ctx, "pgrep", "-P", strconv.Itoa(p.pid))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Hub.Run(ctx, "kill", "-9", strings.TrimSpace(out)); err != nil {
			t.Fatal(err)
		}
		hist, err := f.History(ctx)
		if err != nil || len(hist) == 0 {
			t.Fatalf("history: %v, %v", hist, err)
		}
		return p, hist[len(hist)-1].ID
	}
	lost, _ := cut("--hang-up-after", "5s")
	left, id := cut()
	// Without --attach it is not moved on, and nothing is touched.
	if _, res, err := f.Migrate(ctx, "beta", left.root, "alpha"); err != nil || res.Code != 4 || !strings.Contains(res.Stdout, "--attach") {
		t.Errorf("on without --attach: %v, exit code %d, %s%s", err, res.Code, res.Stdout, res.Stderr)
	}
	back := f.LineOnHub("attach", id)
	p := newTypist(ctx, t, f.Hub, fmt.Sprintf("until %s; do c=$?; [ $c = 1 ] || break; sleep 0.3; done; echo exit code $c", back))
	p.sees(ctx, 0, "attached; ~.")
	p.types("two\n")
	p.sees(ctx, 0, "you said two\r\n")
	p.types("quit 9\n")
	p.sees(ctx, 0, "exit code 9\r\n")
	lost.file(ctx, lost.prefix+".hup")
	if err := beta.WaitGone(ctx, lost.root); err != nil {
		t.Error(err)
	}
}
