package e2e

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/cli"
	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// rawImage matches the names of images that are memory or other programs'.
var rawImage = regexp.MustCompile("^(pages|tmpfs-dev|ifaddr|route6?|rule)-")

// decodeImages reads every image of a dump with go-criu's own decoder.
func decodeImages(t *testing.T, dir string) {
	t.Helper()
	if n := decodeAll(t, dir); n < 5 {
		t.Errorf("only %d images in %s", n, dir)
	}
}

// decodeAll decodes the images in a directory and counts them.
func decodeAll(t *testing.T, dir string) (decoded int) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.img"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if rawImage.MatchString(filepath.Base(name)) {
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		err = reencode(f)
		_ = f.Close()
		if err != nil {
			t.Errorf("image %s: %v", filepath.Base(name), err)
		}
		decoded++
	}
	return decoded
}

// reencode reads an image with crit and writes it again: the bytes must be the same.
func reencode(f *os.File) error {
	typ, err := cli.GetEntryTypeFromImg(f)
	if err != nil {
		return fmt.Errorf("crit does not know it: %w", err)
	}
	img, err := crit.New(f, nil, "", false, false).Decode(typ)
	if err != nil {
		return fmt.Errorf("crit cannot read it: %w", err)
	}
	out, err := os.CreateTemp("", "crit")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(out.Name()) }()
	defer func() { _ = out.Close() }()
	if img.Magic == "IPCNS_SHM" || img.Magic == "IPCNS_MSG" || img.Magic == "GHOST_FILE" && len(img.Entries) > 1 {
		// go-criu 8.3 looks for segments behind their entries even where they are in
		// pages, loses all messages of a queue but one, and of a deleted file in
		// pieces has the last piece only.
		return nil
	}
	if err := crit.New(nil, out, "", false, false).Encode(img); err != nil {
		return fmt.Errorf("crit cannot write it: %w", err)
	}
	want, err := os.ReadFile(f.Name())
	if err != nil {
		return err
	}
	got, err := os.ReadFile(out.Name())
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		same := 0
		for same < min(len(got), len(want)) && got[same] == want[same] {
			same++
		}
		return fmt.Errorf("crit writes %d bytes, it has %d; they differ from byte %d on", len(got), len(want), same)
	}
	return nil
}

// object is what a command of selfcheck needs besides dump and restore.
type object struct {
	options   []string // of dump and restore
	args      []string // of the command
	elsewhere bool     // it has tests of its own
	rounds    int      // 0: 10
}

// objects has the commands of selfcheck that need anything.
var objects = map[string]object{
	"aiobusy":    {elsewhere: true},
	"aiochild":   {elsewhere: true},
	"container":  {elsewhere: true},
	"deadleader": {elsewhere: true},
	"epollall":   {options: []string{"--tcp-established"}},
	"execed":     {elsewhere: true},
	"netns":      {elsewhere: true},
	"external":   {elsewhere: true},
	"heart":      {elsewhere: true},
	"forker":     {elsewhere: true},
	"linkremap":  {options: []string{"--link-remap"}},
	"hold":       {elsewhere: true},
	"landlocked": {args: []string{"free"}},
	"locks":      {options: []string{"--file-locks"}},
	"futexes":    {rounds: 100},
	"manyfds":    {elsewhere: true},
	"mem":        {elsewhere: true},
	"numbered":   {elsewhere: true},
	"rehomed":    {elsewhere: true},
	"rseq":       {rounds: 100},
	"sharing":    {elsewhere: true},
	"sigsender":  {elsewhere: true},
	"sigtarget":  {elsewhere: true},
	"shelljob":   {elsewhere: true},
	"stdnull":    {elsewhere: true},
	"streams":    {elsewhere: true},
	"tcpconn":    {options: []string{"--tcp-established"}},
	"tcpclose":   {options: []string{"--tcp-close"}},
	"tcpflight":  {elsewhere: true},
	"tcpopts":    {options: []string{"--tcp-established"}},
	"tcpout":     {elsewhere: true},
	"tcppeer":    {elsewhere: true},
	"posixqueue": {elsewhere: true},
	"proxyfeed":  {elsewhere: true},
	"proxyflow":  {elsewhere: true},
	"proxywork":  {elsewhere: true},

	"userns":     {elsewhere: true},
	"unixbusy":   {elsewhere: true},
	"unixlogger": {elsewhere: true},
	"unixpeer":   {elsewhere: true},
	"unixserver": {elsewhere: true},
}

// TestObjects dumps and restores a program for each kind of object that a
// process can hold; it notices itself what comes back different.
func TestObjects(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 8*time.Minute)
	cmds, err := programs.Commands(ctx)
	if err != nil {
		t.Fatal(err)
	}
	h := newHosts(t, "alpha").Host("alpha")
	for _, c := range cmds {
		o := objects[c]
		if o.elsewhere {
			continue
		}
		t.Run(c, func(t *testing.T) {
			ctx := deadline(t, time.Duration(2+o.rounds/25)*time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), c, o.args...)
			dumpRestore(ctx, t, r, cmp.Or(o.rounds, 10), o.options...)
			goes(ctx, t, r, 20)
			stop(ctx, t, r)
		})
	}
	t.Run("creds of root", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "creds", "root")
		dumpRestore(ctx, t, r, 3)
		stop(ctx, t, r)
	})
	// TCP connections are carried only if that is asked for, at both ends; those of
	// a tree that runs on lose nothing by a dump.
	t.Run("tcpconn left running", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "tcpconn")
		img := newDir(t)
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img); o.code != 1 || !strings.Contains(o.stderr, "with --tcp-established") {
			t.Errorf("dump without --tcp-established: exit code %d, %q", o.code, o.stderr)
		}
		for range 3 {
			img = newDir(t)
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img, "-R", "--tcp-established")
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d"); o.code != 1 || !strings.Contains(o.stderr, "restore with --tcp-established") {
			t.Errorf("restore without --tcp-established: exit code %d, %q", o.code, o.stderr)
		}
	})
	// Locks are carried only if that is asked for, at both ends, and never taken
	// from somebody else.
	t.Run("locks refused", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		r := selfcheck(ctx, t, h, dir, "locks")
		fails := func(want string, args ...string) {
			t.Helper()
			if o := agentCmd(ctx, t, h, nil, args...); o.code != 1 || !strings.Contains(o.stderr, want) {
				t.Errorf("%v: exit code %d, %q; want 1 and %q", args, o.code, o.stderr, want)
			}
		}
		img := newDir(t)
		fails("give --file-locks", "dump", "-t", fmt.Sprint(r.Pid), "-D", img)
		goes(ctx, t, r, 10)
		img = dump(ctx, t, h, r.Pid, "-l")
		fails("give --file-locks", "restore", "-D", img, "-d")
		other, err := os.Open(filepath.Join(dir, "locks.flock"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(other.Fd()), unix.LOCK_SH); err != nil {
			t.Fatal(err)
		}
		fails("its write flock cannot be set again", "restore", "-D", img, "-d", "-l")
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		restore(ctx, t, h, img, r.Pid, nil, "-l")
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// What nobody holds in a namespace of the tree's own is not lost.
	t.Run("posixqueue refused", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "posixqueue")
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, "POSIX message queue") {
			t.Errorf("dump with a POSIX message queue: exit code %d, %q", o.code, o.stderr)
		}
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// An empty datagram that one dump has seen is hidden from the next by the kernel.
	for _, c := range []string{"udpqueue", "unixdgram"} {
		t.Run(c+" left running", func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), c)
			for range 3 {
				for range 2 {
					mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
					goes(ctx, t, r, 5)
				}
				dumpRestore(ctx, t, r, 1)
			}
			stop(ctx, t, r)
		})
	}
	t.Run("mqueue notify", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "mqueue", "notify")
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, "mq_notify") {
			t.Errorf("dump of a program with mq_notify: exit code %d, %q", o.code, o.stderr)
		}
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// How far a semaphore is put back when its user ends is told by nothing.
	t.Run("semundo held", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "semundo", "held")
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, "SEM_UNDO") {
			t.Errorf("dump of a program with SEM_UNDO: exit code %d, %q", o.code, o.stderr)
		}
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// Requests that do not end, and rings that are of no use, are refused.
	for _, x := range []struct{ command, want string }{
		{"aiobusy", "with 3 requests under way"}, {"aiochild", "belongs to no context of this process"},
	} {
		t.Run(x.command+" refused", func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), x.command)
			for range 3 {
				if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, x.want) {
					t.Errorf("dump: exit code %d, %q", o.code, o.stderr)
				}
				goes(ctx, t, r, 10)
			}
			stop(ctx, t, r)
		})
	}
	// What has no first thread any more is refused before it is touched.
	t.Run("deadleader", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "deadleader")
		kid, err := os.ReadFile(r.Prefix + ".kid")
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range []string{fmt.Sprint(r.Pid), strings.TrimSpace(string(kid))} {
			for _, verb := range []string{"dump", "pre-dump"} {
				if o := agentCmd(ctx, t, h, nil, verb, "-t", pid, "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, "nothing was touched") || !strings.Contains(o.stderr, "its first thread has exited while others run") {
					t.Errorf("%s of pid %s: exit code %d, %q", verb, pid, o.code, o.stderr)
				}
				goes(ctx, t, r, 10)
			}
		}
		stop(ctx, t, r)
	})
	// A sandbox that cannot be made again is not left out.
	t.Run("landlocked refused", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "landlocked")
		for range 3 {
			if o := agentCmd(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)); o.code != 1 || !strings.Contains(o.stderr, "is confined by Landlock") {
				t.Errorf("dump: exit code %d, %q", o.code, o.stderr)
			}
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
	})
	t.Run("aioring left running", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "aioring")
		for range 10 {
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
			goes(ctx, t, r, 20)
		}
		stop(ctx, t, r)
	})
	// That there were threads, and what came to nothing, is not held.
	for _, how := range []string{"threads", "exec"} {
		t.Run("semundo "+how, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "semundo", how)
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
			goes(ctx, t, r, 10)
			dumpRestore(ctx, t, r, 3)
			stop(ctx, t, r)
		})
	}
	// Forks go on while the freeze runs after them.
	t.Run("forker", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "forker")
		dumpRestore(ctx, t, r, 10)
		stop(ctx, t, r)
	})
	// What was dumped with --leave-running goes on as if nothing had happened,
	// and what is restored later is a second life of the same tree.
	t.Run("leave running", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		prefix := filepath.Join(dir, "syscalls")
		r := start(ctx, t, h, prefix, programs.Selfcheck, "syscalls", prefix)
		for range 5 {
			img := newDir(t)
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", img, "-R")
			goes(ctx, t, r, 30)
		}
		// Calls that were interrupted before, by dumps that left them to the kernel.
		for range 10 {
			mustAgent(ctx, t, h, nil, "dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t), "-R")
			dumpRestore(ctx, t, r, 1)
			goes(ctx, t, r, 10)
		}
		stop(ctx, t, r)
	})
	t.Run("pid namespace", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		r := selfcheck(ctx, t, h, newDir(t), "sessions")
		img := dump(ctx, t, h, r.Pid)
		pidfile := filepath.Join(img, "pid")
		mustAgent(ctx, t, h, nil, "restore", "-D", img, "-d", "--pid-namespace", "new", "--pidfile", pidfile)
		b, err := os.ReadFile(pidfile)
		if err != nil {
			t.Fatal(err)
		}
		inner := r.Pid
		if _, err := fmt.Sscan(string(b), &r.Pid); err != nil {
			t.Fatalf("pid file: %v", err)
		}
		st, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/status", r.Pid)))
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("NSpid:\t%d\t%d\n", r.Pid, inner); !strings.Contains(string(st), want) {
			t.Errorf("status has no line %q:\n%s", want, st)
		}
		goes(ctx, t, r, 20)
		stop(ctx, t, r)
	})
}

func TestPython(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "pycheck")
	r := start(ctx, t, h, prefix, "/usr/bin/python3", programs.Pycheck, prefix, "64")
	dumpRestore(ctx, t, r, 10)
	stop(ctx, t, r)
}

func TestGoServer(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	prefix := filepath.Join(newDir(t), "gocheck")
	r := start(ctx, t, h, prefix, programs.Gocheck, prefix, "127.0.0.1:8080", "32")
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
			return h.Dial(network, addr, time.Minute)
		},
	}}
	get := func(path string) string {
		t.Helper()
		resp, err := client.Get("http://127.0.0.1:8080" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	n := 0
	for range 10 {
		for range 20 {
			n++
			if got := get("/next"); got != fmt.Sprint(n) {
				t.Fatalf("the server counts %s, want %d", got, n)
			}
		}
		before := get("/sum")
		quiet(ctx, t, h, 8080)
		dumpRestore(ctx, t, r, 1)
		if after := get("/sum"); after != before {
			t.Fatalf("digest was %s and is %s", before, after)
		}
	}
	quiet(ctx, t, h, 8080)
	stop(ctx, t, r)
}

// quiet waits until no connection to a port of a host is open: those cannot be
// carried, and the last of a client may not be over when its answer is there.
func quiet(ctx context.Context, t *testing.T, h *hosts.Host, port int) {
	t.Helper()
	for {
		open := 0
		for _, f := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile(h.Path("/proc/1/net/" + f))
			if err != nil {
				t.Fatal(err)
			}
			for i, line := range strings.Split(string(b), "\n") {
				fs := strings.Fields(line)
				// State 0A is listening, 06 is a closed connection that waits.
				if i > 0 && len(fs) > 9 && strings.HasSuffix(fs[1], fmt.Sprintf(":%04X", port)) && fs[3] != "0A" && fs[3] != "06" {
					open++
				}
			}
		}
		if open == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("connections stay open")
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// redis starts redis-server on a host, with a million keys and one of each type.
func redis(ctx context.Context, t *testing.T, h *hosts.Host, dir string) (pid int) {
	t.Helper()
	out := filepath.Join(dir, "redis.out")
	pid, err := h.Start(ctx, hosts.Spec{
		Args: []string{"/usr/bin/redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
			"--enable-debug-command", "yes", "--dir", dir, "--daemonize", "no"},
		Stdout: out, Stderr: out,
	})
	if err != nil {
		t.Fatal(err)
	}
	for {
		if o, err := h.Run(ctx, "redis-cli", "ping"); err == nil && strings.TrimSpace(o) == "PONG" {
			break
		}
		if !h.Alive(pid) {
			b, _ := os.ReadFile(out)
			t.Fatalf("redis-server ended: %s", b)
		}
		select {
		case <-ctx.Done():
			t.Fatal("redis-server does not answer")
		case <-time.After(10 * time.Millisecond):
		}
	}
	for _, args := range [][]string{
		{"debug", "populate", "1000000", "key", "64"},
		{"rpush", "list", "a", "b", "c"}, {"sadd", "set", "x", "y"}, {"zadd", "zset", "1", "one", "2.5", "two"},
		{"hset", "hash", "f", "v", "g", "w"}, {"xadd", "stream", "1-1", "k", "v"}, {"setbit", "bits", "100000", "1"}, {"pfadd", "hll", "a", "b", "c"},
		{"set", "expiring", "v", "EX", "100000"},
	} {
		redisDo(ctx, t, h, args...)
	}
	return pid
}

func redisDo(ctx context.Context, t *testing.T, h *hosts.Host, args ...string) string {
	t.Helper()
	out, err := h.Run(ctx, "redis-cli", args...)
	if err != nil {
		t.Fatal(err)
	}
	out = strings.TrimSpace(out)
	if strings.HasPrefix(out, "ERR") {
		t.Fatalf("redis-cli %v: %s", args, out)
	}
	return out
}

func TestRedis(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	pid := redis(ctx, t, h, newDir(t))
	want := redisDo(ctx, t, h, "debug", "digest")
	for i := range 10 {
		quiet(ctx, t, h, 6379)
		img := dump(ctx, t, h, pid)
		if i == 0 {
			decodeImages(t, img)
		}
		restore(ctx, t, h, img, pid, nil)
		if err := os.RemoveAll(img); err != nil {
			t.Fatal(err)
		}
		if got := redisDo(ctx, t, h, "debug", "digest"); got != want {
			t.Fatalf("round %d: digest was %s and is %s", i+1, want, got)
		}
	}
	// It still takes writes.
	if got := redisDo(ctx, t, h, "incr", "rounds"); got != "1" {
		t.Errorf("a new counter is %s", got)
	}
	if got := redisDo(ctx, t, h, "dbsize"); got != "1000009" {
		t.Errorf("%s keys, want 1000009", got)
	}
}

// TestExternalScript is the worked example of CRIU's first report: a script
// that is blocked on a fifo which the restorer hands in as descriptor 4.
func TestExternalScript(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	dir := newDir(t)
	out := filepath.Join(dir, "out")
	if _, err := h.Run(ctx, "mkfifo", "/tmp/fifo"); err != nil {
		t.Fatal(err)
	}
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{"sh", "-c", `exec 3<>/tmp/fifo; n=0; echo up; while read line <&3; do n=$((n+1)); echo $n $line; done`}, Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	waitText(ctx, t, out, "up\n")
	send := func(text string) {
		t.Helper()
		f, err := os.OpenFile(h.Path("/tmp/fifo"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	send("before\n")
	waitText(ctx, t, out, "up\n1 before\n")
	k := key(t, h, pid, 3)
	img := dump(ctx, t, h, pid, "--external", k)
	// Another fifo takes its place.
	if _, err := h.Run(ctx, "sh", "-c", "rm /tmp/fifo; mkfifo /tmp/other"); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(h.Path("/tmp/other"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	restore(ctx, t, h, img, pid, []*os.File{null, f}, "--inherit-fd", "fd[4]:"+k)
	if _, err := f.WriteString("after\n"); err != nil {
		t.Fatal(err)
	}
	waitText(ctx, t, out, "up\n1 before\n2 after\n")

	n, said := 2, "up\n1 before\n2 after\n"
	t.Run("mistakes", func(t *testing.T) {
		for _, tc := range []struct {
			name string
			args []string
			want []string // parts of the message
		}{
			{"unmatched key", []string{"dump", "-t", fmt.Sprint(pid), "--external", "file[1:2]"}, []string{"file[1:2]"}},
			{"not a key", []string{"dump", "-t", fmt.Sprint(pid), "--external", "file[zz:2]"}, []string{"file[zz:2]"}},
			{"nothing handed in", []string{"restore"}, []string{k}},
			{"closed descriptor", []string{"restore", "--inherit-fd", "fd[77]:" + k}, []string{"77"}},
			{"another key", []string{"restore", "--inherit-fd", "fd[4]:file[1:2]"}, []string{"file[1:2]"}},
		} {
			if tc.args[0] == "restore" && h.Alive(pid) {
				// Its pid must be free for the mistake to be the only one.
				if err := h.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if err := h.WaitGone(ctx, pid); err != nil {
					t.Fatal(err)
				}
			}
			t.Run(tc.name, func(t *testing.T) {
				ctx := deadline(t, 20*time.Second)
				d := img
				if tc.args[0] == "dump" {
					d = newDir(t)
				}
				o := agentCmd(ctx, t, h, []*os.File{null, f}, append(append([]string{}, tc.args...), "-D", d)...)
				if o.code == 0 {
					t.Fatalf("it succeeded:\n%s", o.stdout)
				}
				for _, w := range tc.want {
					if !strings.Contains(o.stderr, w) {
						t.Errorf("the message does not name %s: %s", w, o.stderr)
					}
				}
			})
			if tc.args[0] == "dump" {
				if _, err := f.WriteString("still\n"); err != nil {
					t.Fatal(err)
				}
				n++
				said += fmt.Sprintf("%d still\n", n)
				waitText(ctx, t, out, said)
			}
		}
	})
	// After all the mistakes the images are still good.
	restore(ctx, t, h, img, pid, []*os.File{null, f}, "--inherit-fd", "fd[4]:"+k)
	if _, err := f.WriteString("again\n"); err != nil {
		t.Fatal(err)
	}
	waitText(ctx, t, out, said+fmt.Sprintf("%d again\n", 2))
}

// TestExternalFiles hands in a fifo and an append-only log that are others than
// those of the dump, for each way in which the fifo can be open.
func TestExternalFiles(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, mode := range []string{"r", "rw", "n"} {
		t.Run(mode, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			w := newFeed(ctx, t, h, "/tmp/fifo-"+mode)
			r, logs := external(ctx, t, h, newDir(t), w, mode)
			w.send(20)
			waitLines(ctx, t, h, logs, 20)
			for round := range 3 {
				fifoKey, logKey := key(t, h, r.Pid, 4), key(t, h, r.Pid, 5)
				img := dump(ctx, t, h, r.Pid, "--external", fifoKey, "--external", logKey)
				next := fmt.Sprintf("/tmp/log-%s-%d", mode, round)
				if _, err := h.Run(ctx, "mv", logs, next); err != nil {
					t.Fatal(err)
				}
				logs = next
				w.replace(ctx, fmt.Sprintf("/tmp/fifo-%s-%d", mode, round))
				logFile, err := os.OpenFile(h.Path(logs), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				restore(ctx, t, h, img, r.Pid, []*os.File{w.f, logFile}, "--inherit-fd", "fd[3]:"+fifoKey, "--inherit-fd", "fd[4]:"+logKey)
				_ = logFile.Close()
				w.send(20)
				waitLines(ctx, t, h, logs, 20*(round+2))
				goes(ctx, t, r, 5)
			}
			stop(ctx, t, r)
		})
	}
}

// feed writes numbered lines into a fifo of a host.
type feed struct {
	t    *testing.T
	h    *hosts.Host
	path string
	f    *os.File
	next int
}

func newFeed(ctx context.Context, t *testing.T, h *hosts.Host, path string) *feed {
	t.Helper()
	w := &feed{t: t, h: h}
	w.replace(ctx, path)
	t.Cleanup(func() { _ = w.f.Close() })
	return w
}

// replace makes another fifo the one that is written from now on.
func (w *feed) replace(ctx context.Context, path string) {
	w.t.Helper()
	if w.f != nil {
		_ = w.f.Close()
	}
	if _, err := w.h.Run(ctx, "mkfifo", path); err != nil {
		w.t.Fatal(err)
	}
	var err error
	// Both ways, so that it waits for no reader.
	if w.f, err = os.OpenFile(w.h.Path(path), os.O_RDWR, 0); err != nil {
		w.t.Fatal(err)
	}
	w.path = path
}

func (w *feed) send(n int) {
	w.t.Helper()
	for range n {
		if _, err := fmt.Fprintf(w.f, "%d\n", w.next); err != nil {
			w.t.Fatal(err)
		}
		w.next++
	}
}

// external starts a program that copies the feed into a log on the host's own
// file system and returns the log's path.
func external(ctx context.Context, t *testing.T, h *hosts.Host, dir string, w *feed, mode string) (*workloads.Run, string) {
	t.Helper()
	logs := w.path + ".log"
	return selfcheck(ctx, t, h, dir, "external", w.path, logs, mode), logs
}

// waitLines waits until a log of a host has exactly the lines 0 to n-1.
func waitLines(ctx context.Context, t *testing.T, h *hosts.Host, path string, n int) {
	t.Helper()
	for {
		b, err := os.ReadFile(h.Path(path))
		if err != nil {
			t.Fatal(err)
		}
		rs, err := workloads.ParseRecords(b)
		if err == nil {
			err = workloads.CheckRecords(rs)
		}
		if err != nil {
			t.Fatalf("log %s: %v", path, err)
		}
		if len(rs) == n {
			return
		}
		if len(rs) > n {
			t.Fatalf("log %s has %d lines, want %d", path, len(rs), n)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("log %s has %d lines, want %d", path, len(rs), n)
		case <-time.After(3 * time.Millisecond):
		}
	}
}

func waitText(ctx context.Context, t *testing.T, path, want string) {
	t.Helper()
	for {
		b, err := os.ReadFile(path)
		if err == nil && string(b) == want {
			return
		}
		if len(b) > len(want) {
			t.Fatalf("%s holds %q, want %q", path, b, want)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s holds %q, want %q", path, b, want)
		case <-time.After(3 * time.Millisecond):
		}
	}
}
