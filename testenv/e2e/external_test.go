package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// agentRules writes a configuration with rules for the agents of a fleet.
func agentRules(t *testing.T, rules string) string {
	t.Helper()
	path := filepath.Join(newDir(t), "agent.toml")
	if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// copyTo gives a host a copy of another's file.
func copyTo(t *testing.T, from *hosts.Host, path string, to *hosts.Host, dest string) {
	t.Helper()
	b, err := os.ReadFile(from.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	writeTo(t, to, dest, string(b))
}

func writeTo(t *testing.T, h *hosts.Host, path, text string) {
	t.Helper()
	if err := os.MkdirAll(h.Path(filepath.Dir(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Path(path), []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func size(t *testing.T, h *hosts.Host, path string) int64 {
	t.Helper()
	st, err := os.Stat(h.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// wantLink wants a descriptor, or cwd, of a process to lead somewhere.
func wantLink(t *testing.T, h *hosts.Host, pid int, what, want string) {
	t.Helper()
	got, err := os.Readlink(h.Path(fmt.Sprintf("/proc/%d/%s", pid, what)))
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("%s of pid %d leads to %s, want %s", what, pid, got, want)
	}
}

// openFDs counts the descriptors of a host's agent that lead to regular files,
// fifos and pipes outside of what it always has.
func openFDs(t *testing.T, f *fleet.Fleet, h *hosts.Host, part string) int {
	t.Helper()
	dir := h.Path(fmt.Sprintf("/proc/%d/fd", f.AgentPid(h.Name())))
	des, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, de := range des {
		if link, err := os.Readlink(filepath.Join(dir, de.Name())); err == nil && strings.Contains(link, part) {
			n++
		}
	}
	return n
}

// noFDs waits until the agent has nothing open whose name holds part.
func noFDs(ctx context.Context, t *testing.T, f *fleet.Fleet, h *hosts.Host, part string) {
	t.Helper()
	for openFDs(t, f, h, part) > 0 {
		select {
		case <-ctx.Done():
			t.Fatalf("the agent of %s still has %d descriptors of %s", h.Name(), openFDs(t, f, h, part), part)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// refusedMigration wants a migration to be refused with all the texts, and the
// tree to run on untouched.
func refusedMigration(ctx context.Context, t *testing.T, f *fleet.Fleet, r *workloads.Run, to string, args []string, want ...string) {
	t.Helper()
	goes(ctx, t, r, 5) // what it opens to say that it is ready is closed by then
	before := traces(t, r.Host, r.Pid)
	n := count(t, r)
	m, res, err := f.Migrate(ctx, r.Host.Name(), r.Pid, to, args...)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 4 {
		t.Fatalf("exit code %d, want 4: %s%s", res.Code, res.Stdout, res.Stderr)
	}
	var all []string
	if m.Error != nil {
		for _, p := range m.Error.Problems {
			fd := ""
			if p.FD != nil {
				fd = fmt.Sprintf("fd %d ", *p.FD)
			}
			all = append(all, fmt.Sprintf("pid %d (%s) %s%s [%s]: %s; %s", p.PID, p.Comm, fd, p.Path, p.Key, p.Reason, p.Hint))
		}
	}
	for _, w := range want {
		if !strings.Contains(strings.Join(all, "\n"), w) {
			t.Errorf("the refusal does not say %q:\n%s\n%s", w, strings.Join(all, "\n"), res.Stdout)
		}
	}
	if after := traces(t, r.Host, r.Pid); after != before {
		t.Errorf("the process was touched:\n%s\n%s", before, after)
	}
	goes(ctx, t, r, 5)
	if gap := longestGap(t, r, n); gap > smallGap {
		t.Errorf("the process stood for %v though nothing was to be touched", gap)
	}
}

// provider is a running godwit-agent provide.
type provider struct {
	t   *testing.T
	cmd *exec.Cmd
	mu  sync.Mutex
	out bytes.Buffer
}

func (p *provider) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *provider) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// startProvide starts it on a host and waits until the agent keeps the descriptor.
func startProvide(ctx context.Context, t *testing.T, h *hosts.Host, files []*os.File, selector string, args ...string) *provider {
	t.Helper()
	p := &provider{t: t}
	p.cmd = h.Command(ctx, binaries.Agent, append([]string{"provide", "--host", h.Name(), "--state-dir", "/run/godwit-agent", selector}, args...)...)
	p.cmd.ExtraFiles, p.cmd.Stderr = files, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	p.waits(ctx, "ready; waiting for a tree", 1)
	return p
}

// waits waits until it has said something n times.
func (p *provider) waits(ctx context.Context, text string, n int) {
	p.t.Helper()
	for strings.Count(p.said(), text) < n {
		select {
		case <-ctx.Done():
			p.t.Fatalf("provide has not said %q %d times: %s", text, n, p.said())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// ends waits for its end.
func (p *provider) ends(code int) {
	p.t.Helper()
	_ = p.cmd.Wait()
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("provide: exit code %d, want %d: %s", got, code, p.said())
	}
}

// TestExternalRules moves a tree to and fro between hosts that keep its files, its
// working directory and what it has mapped at other paths, by their configuration alone.
func TestExternalRules(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, `
[[external]]
match = ["path:/run/here/**"]
resolver = "path"
argument = "/run/there/{rest}"
size = "grow-ok"
mode = "any"

[[external]]
match = ["path:/run/there/**"]
resolver = "path"
argument = "/run/here/{rest}"
size = "grow-ok"
`))
	if err := os.MkdirAll(alpha.Path("/run/here/sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := selfcheck(ctx, t, alpha, newDir(t), "rehomed", "/run/here/sub/data")
	refusedMigration(ctx, t, f, r, "beta", nil, "/run/here/sub/data", "/run/there/sub/data", "no such file")
	writeTo(t, beta, "/run/there/sub/data", "short")
	refusedMigration(ctx, t, f, r, "beta", nil, "has 5 bytes here, expected at least ", "size=any")
	copyTo(t, alpha, "/run/here/sub/data", beta, "/run/there/sub/data")
	if err := os.Chmod(beta.Path("/run/there/sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	// What the source appends until it is frozen is missing in the copy.
	if err := os.WriteFile(beta.Path("/run/there/sub/data"), append(readFile(t, beta, "/run/there/sub/data"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	migrate(ctx, t, f, r, beta)
	wantLink(t, beta, r.Pid, "fd/11", "/run/there/sub/data")
	wantLink(t, beta, r.Pid, "cwd", "/run/there/sub")
	was := size(t, alpha, "/run/here/sub/data")
	goes(ctx, t, r, 10)
	if now := size(t, alpha, "/run/here/sub/data"); now != was {
		t.Errorf("the file that was left grew from %d to %d bytes", was, now)
	}
	if size(t, beta, "/run/there/sub/data") <= 1<<20+4096 {
		t.Error("nothing was appended at the destination")
	}
	copyTo(t, beta, "/run/there/sub/data", alpha, "/run/here/sub/data")
	if err := os.Truncate(alpha.Path("/run/here/sub/data"), 8<<20); err != nil {
		t.Fatal(err)
	}
	migrate(ctx, t, f, r, alpha)
	wantLink(t, alpha, r.Pid, "fd/13", "/run/here/sub/data")
	stop(ctx, t, r)
}

func readFile(t *testing.T, h *hosts.Host, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(h.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestExternalResolvers moves a tree whose file is replaced in each way, and sees
// that it is refused if that cannot be done, and that nothing is left then.
func TestExternalResolvers(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	plain := func(ctx context.Context, t *testing.T, path string) *workloads.Run {
		return selfcheck(ctx, t, alpha, newDir(t), "rehomed", path, "plain")
	}
	t.Run("create", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := plain(ctx, t, "/run/made")
		args := []string{"--external", "path:/run/made=create:/run/dir/made"}
		refusedMigration(ctx, t, f, r, "beta", args, "the directory does not exist here", "mkdir -p /run/dir")
		writeTo(t, beta, "/run/dir/made", "somebody's")
		refusedMigration(ctx, t, f, r, "beta", args, "there is something at this path here already", "overwrite")
		if err := os.Remove(beta.Path("/run/dir/made")); err != nil {
			t.Fatal(err)
		}
		// Another file cannot be had, so this one is removed again.
		refusedMigration(ctx, t, f, r, "beta", append(args, "--external", "path:**/rehomed.log=path:/run/dir/nothing"), "no such file")
		if _, err := os.Lstat(beta.Path("/run/dir/made")); !os.IsNotExist(err) {
			t.Errorf("a refused migration left a file: %v", err)
		}
		noFDs(ctx, t, f, beta, "/run/dir")
		migrate(ctx, t, f, r, beta, args...)
		st, err := os.Stat(beta.Path("/run/dir/made"))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o640 {
			t.Errorf("mode %v, want 0640", st.Mode())
		}
		wantLink(t, beta, r.Pid, "fd/10", "/run/dir/made")
		noFDs(ctx, t, f, beta, "/run/dir")
		// Back over what is there, which is emptied first.
		was := size(t, alpha, "/run/made")
		migrate(ctx, t, f, r, alpha, "--external", "path:/run/dir/*=create:/run/made,overwrite")
		if now := size(t, alpha, "/run/made"); now >= was && was > 100 {
			t.Errorf("the file has %d bytes and had %d: it was not emptied", now, was)
		}
		stop(ctx, t, r)
	})
	t.Run("null", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := plain(ctx, t, "/run/nowhere")
		refusedMigration(ctx, t, f, r, "beta", nil, "/run/nowhere", "does not exist here")
		// Each description becomes one of its own, with its flags.
		migrate(ctx, t, f, r, beta, "--external", "path:/run/nowhere=null")
		wantLink(t, beta, r.Pid, "fd/11", "/dev/null")
		wantLink(t, beta, r.Pid, "fd/12", "/dev/null")
		stop(ctx, t, r)
	})
	t.Run("provide", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := plain(ctx, t, "/run/given")
		args := []string{"--external", "fd:10=provide"}
		refusedMigration(ctx, t, f, r, "beta", args, "fd 10 /run/given", "nobody provides a file for it", "godwit-agent provide 'file[")
		writeTo(t, beta, "/run/gift", strings.Repeat("x", 1<<20))
		if err := unix.Mkfifo(beta.Path("/run/gift.fifo"), 0o600); err != nil {
			t.Fatal(err)
		}
		// Of a wrong kind; and with the one who keeps it, the descriptor goes.
		wrong := startProvide(ctx, t, beta, nil, "path:/run/giv*", "--open", "/run/gift.fifo,rdwr")
		refusedMigration(ctx, t, f, r, "beta", args, "is a fifo, expected a regular", "/run/gift.fifo")
		wrong.waits(ctx, "given back", 1)
		if err := wrong.cmd.Process.Signal(unix.SIGINT); err != nil {
			t.Fatal(err)
		}
		wrong.ends(1)
		if !strings.Contains(wrong.said(), "withdrawn") {
			t.Errorf("it said %s", wrong.said())
		}
		refusedMigration(ctx, t, f, r, "beta", args, "nobody provides a file for it")
		// Too narrow to be handed on as it is.
		narrow := startProvide(ctx, t, beta, nil, "path:/run/given", "--open", "/run/gift")
		refusedMigration(ctx, t, f, r, "beta", []string{"--external", "fd:10=provide,forward"}, "is open for reading, expected for reading and writing")
		refusedMigration(ctx, t, f, r, "beta", []string{"--external", "fd:10=provide,size=same"}, "has 1048576 bytes here, expected ")
		if err := os.Chmod(beta.Path("/run/gift"), 0o600); err != nil {
			t.Fatal(err)
		}
		refusedMigration(ctx, t, f, r, "beta", []string{"--external", "fd:10=provide,mode=same"}, "has mode 0600 here, expected 0640")
		narrow.waits(ctx, "given back", 3)
		// Two for one object.
		other := startProvide(ctx, t, beta, nil, "fd:10", "--open", "/run/gift,rdwr")
		refusedMigration(ctx, t, f, r, "beta", args, "2 files are provided for it", "fd:10")
		if err := other.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		other.ends(1)
		// Opened again with the recorded flags and positions, whatever it was opened for.
		migrate(ctx, t, f, r, beta, args...)
		narrow.ends(0)
		if !strings.Contains(narrow.said(), "used by migration") {
			t.Errorf("it said %s", narrow.said())
		}
		wantLink(t, beta, r.Pid, "fd/11", "/run/gift")
		if size(t, beta, "/run/gift") <= 1<<20 {
			t.Error("nothing was appended to the file that was provided")
		}
		noFDs(ctx, t, f, beta, "/run/gift")
		stop(ctx, t, r)
	})
}

// TestExternalAbort: what was made and taken for a migration is given back when that
// is aborted while memory is copied.
func TestExternalAbort(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, `
[[external]]
match = ["path:/run/src/log"]
resolver = "create"
argument = "/run/dst/log"

[[external]]
match = ["path:/run/src/in"]
resolver = "provide"
`))
	writeTo(t, beta, "/run/dst/gift", "")
	writeTo(t, alpha, "/run/src/log", "")
	writeTo(t, alpha, "/run/src/in", "")
	prefix := filepath.Join(newDir(t), "mem")
	pid, err := alpha.Start(ctx, hosts.Spec{Args: []string{programs.Selfcheck, "mem", prefix, "256"}, Env: []string{"PATH=" + os.Getenv("PATH")},
		Stdin: "/run/src/in", Stdout: "/run/src/log", Stderr: "/run/src/log"})
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Pid: pid, Prefix: prefix}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	p := startProvide(ctx, t, beta, nil, "role:stdin", "--open", "/run/dst/gift")
	m := launch(ctx, t, f, r, "beta")
	p.waits(ctx, "held for migration "+m.id, 1)
	if _, err := os.Lstat(beta.Path("/run/dst/log")); err != nil {
		t.Errorf("nothing is held ready while memory is copied: %v", err)
	}
	res, err := f.Run(ctx, "abort", m.id)
	if err != nil {
		t.Fatal(err)
	}
	if code := m.wait(t); res.Code != 0 || code != 3 {
		t.Errorf("abort: exit code %d, migrate: %d, want 3: %s%s", res.Code, code, res.Stderr, m.stderr.String())
	}
	goes(ctx, t, r, 10)
	p.waits(ctx, "given back, migration "+m.id, 1)
	for {
		if _, err := os.Lstat(beta.Path("/run/dst/log")); os.IsNotExist(err) {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the file that was made is still there")
		}
		time.Sleep(5 * time.Millisecond)
	}
	// The one that is provided stays, of the other nothing is left.
	noFDs(ctx, t, f, beta, "/run/dst/log")
	if n := openFDs(t, f, beta, "/run/dst"); n != 1 {
		t.Errorf("the agent has %d descriptors below /run/dst, want the provided one", n)
	}
	migrate(ctx, t, f, r, beta)
	p.ends(0)
	wantLink(t, beta, r.Pid, "fd/0", "/run/dst/gift")
	wantLink(t, beta, r.Pid, "fd/1", "/run/dst/log")
	stop(ctx, t, r)
}

// record is what the workload streams copies at once.
func record(name string, n int) string { return fmt.Sprintf("%-6s%9d\n", name, n) }

// feeder writes numbered lines into a fifo of a host until it is stopped.
type feeder struct {
	stopped chan struct{}
	done    chan error
	sent    int
}

func feedLines(h *hosts.Host, path, name string) *feeder {
	fd := &feeder{stopped: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		f, err := os.OpenFile(h.Path(path), os.O_RDWR, 0)
		if err != nil {
			fd.done <- err
			return
		}
		defer func() { _ = f.Close() }()
		for {
			select {
			case <-fd.stopped:
				fd.done <- nil
				return
			case <-time.After(time.Millisecond):
			}
			if err := f.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				fd.done <- err
				return
			}
			line := record(name, fd.sent)
			n, err := f.WriteString(line)
			switch {
			case n == len(line):
				fd.sent++
			case n == 0 && os.IsTimeout(err): // full: nobody reads here now
			default:
				fd.done <- fmt.Errorf("write %q: %d, %w", line, n, err)
				return
			}
		}
	}()
	return fd
}

// TestExternalStreams moves a filter whose standard input and output are fifos, each
// host's own, to and fro while lines flow: those of each host arrive there, in order
// and once, and what waits in a fifo when the filter leaves it is there when it is back.
func TestExternalStreams(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t, "--config", agentRules(t, `
[[external]]
match = ["role:stdin", "role:stdout"]
resolver = "path"
argument = "{path}"
`))
	both := []*hosts.Host{alpha, beta}
	var feeds []*feeder
	var outs []*os.File
	got := make([]bytes.Buffer, 2)
	for _, h := range both {
		// A mount of the host's that the tree does not see.
		for _, p := range []string{"/run/in", "/run/out"} {
			if err := unix.Mkfifo(h.Path(p), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		feeds = append(feeds, feedLines(h, "/run/in", h.Name()))
		out, err := os.OpenFile(h.Path("/run/out"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = out.Close() })
		outs = append(outs, out)
	}
	prefix := filepath.Join(newDir(t), "streams")
	pid, err := alpha.Start(ctx, hosts.Spec{Args: []string{programs.Selfcheck, "streams", prefix}, Env: []string{"PATH=" + os.Getenv("PATH")},
		Stdin: "/run/in", Stdout: "/run/out", Stderr: "/dev/null"})
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Pid: pid, Prefix: prefix}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	read := func(i, lines int) {
		t.Helper()
		buf := make([]byte, 4096)
		for want := bytes.Count(got[i].Bytes(), []byte("\n")) + lines; bytes.Count(got[i].Bytes(), []byte("\n")) < want; {
			if err := outs[i].SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			n, err := outs[i].Read(buf)
			if err != nil {
				t.Fatalf("lines of %s: %v", both[i].Name(), err)
			}
			got[i].Write(buf[:n])
		}
	}
	at := 0
	for range 6 {
		read(at, 20)
		migrate(ctx, t, f, r, both[1-at])
		at = 1 - at
		read(at, 20)
	}
	stop(ctx, t, r)
	for i, fd := range feeds {
		close(fd.stopped)
		if err := <-fd.done; err != nil {
			t.Error(err)
		}
		n := 0
		for line := range strings.Lines(got[i].String()) {
			if want := record(both[i].Name(), n); line != want {
				t.Fatalf("line %d of %s is %q, want %q", n, both[i].Name(), line, want)
			}
			n++
		}
	}
}

// TestExternalStandard hands in descriptors 0, 1 and 2 on their own numbers, pipes to
// commands included, for a program that uses these and the next ones.
func TestExternalStandard(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, p := range []string{"/run/in", "/run/out"} {
		if err := unix.Mkfifo(alpha.Path(p), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hold, err := os.OpenFile(alpha.Path("/run/in"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hold.Close() }()
	out, err := os.OpenFile(alpha.Path("/run/out"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	prefix := filepath.Join(newDir(t), "streams")
	pid, err := alpha.Start(ctx, hosts.Spec{Args: []string{programs.Selfcheck, "streams", prefix}, Env: []string{"PATH=" + os.Getenv("PATH")},
		Stdin: "/run/in", Stdout: "/run/out", Stderr: "/run/out"})
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Pid: pid, Prefix: prefix}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	args := []string{"--external", "role:stdin=provide", "--external", "role:stdout=provide"}
	refusedMigration(ctx, t, f, r, "beta", args, "fd 0 /run/in", "fd 1 /run/out", "nobody provides a file for it")
	// A pipe from which nothing can be read cannot be the input.
	bad := startProvide(ctx, t, beta, nil, "role:stdin", "--", "sleep", "1000")
	refusedMigration(ctx, t, f, r, "beta", args, "is open for writing, expected for reading")
	if err := bad.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	bad.ends(1)
	// A full fifo takes nothing of what the tree writes.
	if err := unix.Mkfifo(beta.Path("/run/full"), 0o600); err != nil {
		t.Fatal(err)
	}
	full, err := os.OpenFile(beta.Path("/run/full"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = full.Close() }()
	if _, err := full.Write(make([]byte, 1<<16)); err != nil {
		t.Fatal(err)
	}
	refusedMigration(ctx, t, f, r, "beta", []string{"--external", "role:stdout=path:/run/full", "--external", "role:stdin=null"}, "is full: 65536 bytes are in it")

	lines := filepath.Join(newDir(t), "lines")
	in := startProvide(ctx, t, beta, nil, "role:stdin", "--end", "stdout", "--", "sh", "-c", "printf %015d\\\\n 1 2 3; exec sleep 1000")
	got := startProvide(ctx, t, beta, nil, "role:stdout", "--", "sh", "-c", "cat >"+lines+"; exit 7")
	migrate(ctx, t, f, r, beta, args...)
	waitText(ctx, t, lines, fmt.Sprintf("%015d\n%015d\n%015d\n", 1, 2, 3))
	stop(ctx, t, r)
	got.ends(7) // that of the command, whose input ended with the tree
	_ = in.cmd.Process.Kill()
}

// TestFilePolicy: a checkpoint of a program that went on writing is restored only if
// that is allowed, and with truncate no record is there twice.
func TestFilePolicy(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "numbered", "/run/records")
	img := newDir(t)
	mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img, "-R")
	was := size(t, h, "/run/records")
	goes(ctx, t, r, 20)
	if err := h.Kill(r.Pid, unix.SIGKILL); err != nil { // it crashes
		t.Fatal(err)
	}
	if err := h.WaitGone(ctx, r.Pid); err != nil {
		t.Fatal(err)
	}
	if now := size(t, h, "/run/records"); now <= was {
		t.Fatalf("the file had %d bytes at the dump and has %d", was, now)
	}
	for _, bad := range [][]string{{"--file-validation", "filesize"}, {"--file-policy", "path:/run/*=image,size=same"}} {
		o := agentCmd(ctx, t, h, nil, append([]string{"restore", "-D", img, "-d"}, bad...)...)
		if o.code != 1 || !strings.Contains(o.stderr, "/run/records") || !strings.Contains(o.stderr, "expected") {
			t.Errorf("%v: exit code %d, %s", bad, o.code, o.stderr)
		}
	}
	if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d", "--file-policy", "kind:fifo=image,size=any"); o.code != 1 || !strings.Contains(o.stderr, "not of the form") {
		t.Errorf("exit code %d, %s", o.code, o.stderr)
	}
	// What the workload recorded of itself after the dump is taken back, too.
	restore(ctx, t, h, img, r.Pid, nil, "--file-validation", "filesize", "--file-policy", "path:/run/records=image,size=truncate",
		"--file-policy", "path:**/numbered.log=image,size=truncate", "--file-policy", "path:/**=image,size=any")
	goes(ctx, t, r, 10)
	stop(ctx, t, r) // it counts its records
	for n, line := range strings.Split(strings.TrimSpace(string(readFile(t, h, "/run/records"))), "\n") {
		if line != fmt.Sprintf("%022d", n) {
			t.Fatalf("record %d is %q", n, line)
		}
	}
}

// TestExternalHidden: a null device of a mount that the tree does not see needs no
// word; a file on a mount that is attached nowhere is found to need one, and a log that
// was only inherited and goes on growing, or a file that others change, lands as told.
func TestExternalHidden(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	if _, err := alpha.Run(ctx, "sh", "-c", "mkdir /run/dev /run/dir && mount -t tmpfs dev /run/dev && mknod -m 666 /run/dev/null c 1 3 && mount -t tmpfs dir /run/dir && echo text >/run/dir/file && mkdir /run/busy && echo 12345678901 >/run/busy/state"); err != nil {
		t.Fatal(err)
	}
	open := func(path string, flags int) *os.File {
		fd, err := unix.Open(alpha.Path(path), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fd), path)
		t.Cleanup(func() { _ = file.Close() })
		return file
	}
	null, hidden, busy := open("/run/dev/null", unix.O_RDWR), open("/run/dir/file", unix.O_RDONLY), open("/run/busy/state", unix.O_RDONLY)
	if _, err := alpha.Run(ctx, "umount", "-l", "/run/dev", "/run/dir"); err != nil {
		t.Fatal(err)
	}
	prefix := filepath.Join(newDir(t), "counter")
	r, err := workloads.LaunchWith(ctx, alpha, prefix, []*os.File{null, hidden, busy}, programs.Selfcheck, "counter", prefix)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	writeTo(t, beta, "/run/busy/state", "123")
	refusedMigration(ctx, t, f, r, "beta", nil, "fd 4 ", "it is on a mount that is nowhere any more", "declare the file external")
	writeTo(t, beta, "/run/instead", "text\n")
	there := []string{"--external", "fd:4=path:/run/instead"}
	refusedMigration(ctx, t, f, r, "beta", there, "/run/busy/state", "has 3 bytes here, expected at least 12")
	migrate(ctx, t, f, r, beta, append(there, "--external", "path:/run/busy/*=image,size=any")...)
	wantLink(t, beta, r.Pid, "fd/4", "/run/instead")
	wantLink(t, beta, r.Pid, "fd/5", "/run/busy/state")
	stop(ctx, t, r)
}

// socketPair is two connected unix sockets.
func socketPair(t *testing.T, typ int) (ours, theirs *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs = os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	t.Cleanup(func() { _, _ = ours.Close(), theirs.Close() })
	return ours, theirs
}

// TestExternalNameless: a pipe from, and a socket to, a process outside the tree are
// replaced by the null device and by a socket that is handed in.
func TestExternalNameless(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	prefix := filepath.Join(newDir(t), "counter")
	script := `
import os, socket, subprocess, sys
r, w = os.pipe()
a, b = socket.socketpair()
p = subprocess.Popen(sys.argv[2:], pass_fds=(r, b.fileno()))
with open(sys.argv[1] + ".new", "w") as f: f.write("%d %d %d\n" % (p.pid, r, b.fileno()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
b.close()
p.wait()
`
	if _, err := alpha.Start(ctx, hosts.Spec{Args: []string{"/usr/bin/python3", "-c", script, prefix + ".fds", programs.Selfcheck, "counter", prefix},
		Env: []string{"PATH=" + os.Getenv("PATH")}}); err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: alpha, Prefix: prefix}
	var pipe, sock int
	for {
		b, err := os.ReadFile(prefix + ".fds")
		if err == nil {
			if _, err := fmt.Sscan(string(b), &r.Pid, &pipe, &sock); err != nil {
				t.Fatal(err)
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	refusedMigration(ctx, t, f, r, "beta", nil, fmt.Sprintf("fd %d pipe:[", pipe), fmt.Sprintf("fd %d socket:[", sock))
	args := []string{"--external", fmt.Sprintf("fd:%d=null", pipe), "--external", "kind:unix=provide"}
	_, wrong := socketPair(t, unix.SOCK_DGRAM)
	p := startProvide(ctx, t, beta, []*os.File{wrong}, "kind:unix-stream", "--fd", "3")
	refusedMigration(ctx, t, f, r, "beta", args, "is a unix-dgram, expected a unix-stream")
	if err := p.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.ends(1)
	ours, theirs := socketPair(t, unix.SOCK_STREAM)
	p = startProvide(ctx, t, beta, []*os.File{theirs}, fmt.Sprintf("fd:%d", sock), "--fd", "3")
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	migrate(ctx, t, f, r, beta, args...)
	p.ends(0)
	wantLink(t, beta, r.Pid, fmt.Sprintf("fd/%d", pipe), "/dev/null")
	if _, err := ours.WriteString("there"); err != nil { // it is held by the tree alone
		t.Errorf("the socket that was handed in is not held: %v", err)
	}
	stop(ctx, t, r)
}
