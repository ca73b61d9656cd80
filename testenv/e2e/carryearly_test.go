package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// busyFiles is a program that changes files in every way all the time, and knows what
// must be in them: in place, by a mapping, at the end, truncated, replaced by rename.
// One large file is only read, by one descriptor, another one nobody has open.
const busyFiles = `
import hashlib, mmap, os, signal, sys, time, zlib
run, size = sys.argv[1], int(sys.argv[2]); os.umask(0)
os.makedirs(run + "/work/sub"); os.chdir(run + "/work")
def make(path, mib):
    h = hashlib.sha256()
    with open(path, "wb") as f:
        for i in range(mib):
            b = os.urandom(1 << 20); h.update(b); f.write(b)
    return h.hexdigest()
data = make("data", size)
kept = os.open("data", os.O_RDONLY)
quiet = make("sub/quiet", 2)
with open("sub/sparse", "wb") as f: f.truncate(1 << 40); f.seek(1 << 39); f.write(b"deep")
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
place, inplace = os.open("inplace", os.O_RDWR | os.O_CREAT), bytearray(os.urandom(3 << 20))
os.pwrite(place, inplace, 0)
os.ftruncate(os.open("mapped", os.O_RDWR | os.O_CREAT), 1 << 20)
mapped = mmap.mmap(os.open("mapped", os.O_RDWR), 1 << 20)
short, shorter = os.open("short", os.O_RDWR | os.O_CREAT), b""
made = os.open(run + "-made", os.O_WRONLY | os.O_CREAT)
os.mkfifo("sub/fifo", 0o620)
n, asked, ending = 0, 0, False
def ask(*_): global asked; asked += 1
def end(*_): global ending; ending = True
signal.signal(signal.SIGUSR1, ask); signal.signal(signal.SIGTERM, end)
def digest(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()
def check(ok, what):
    if not ok: print("bad:", what, flush=True); sys.exit(1)
def look():
    for i, l in enumerate(open("log")):
        a, b = l.split()
        check(int(a) == i and int(b) == zlib.crc32(a.encode()), "log line %d" % i)
    check(i == n - 1, "the log has %d lines of %d" % (i + 1, n))
    check(open("inplace", "rb").read() == inplace, "inplace")
    check(open("mapped", "rb").read(8) == n.to_bytes(8, "little"), "mapped")
    check(open("short", "rb").read() == shorter, "short")
    check(open("renamed").read() == str(n - 1) * 1000, "renamed")
    check(digest("data") == data and os.path.samestat(os.stat("data"), os.fstat(kept)), "data")
    check(digest("sub/quiet") == quiet, "quiet")
    st = os.stat("sub/sparse"); d = os.open("sub/sparse", os.O_RDONLY)
    check(st.st_size == 1 << 40 and st.st_blocks <= 16 and os.pread(d, 4, 1 << 39) == b"deep", "sparse %s" % (st,)); os.close(d)
    check(os.stat("sub/fifo").st_mode == 0o10620, "fifo")
    left = [x for d, ds, fs in os.walk(run) for x in ds + fs if x.startswith(".godwit")]
    check(left == [], left)
print("up", flush=True)
while not ending:
    os.write(log, b"%d %d\n" % (n, zlib.crc32(b"%d" % n)))
    at = n * 7919 % (3 << 20)
    inplace[at] = n & 255; os.pwrite(place, inplace[at:at + 1], at)
    shorter = os.urandom(n * 331 % 5000); os.ftruncate(short, 0); os.pwrite(short, shorter, 0)
    with open("sub/new", "w") as f: f.write(str(n) * 1000)
    os.rename("sub/new", "renamed")
    n += 1
    mapped[0:8] = n.to_bytes(8, "little")
    if asked: asked -= 1; look(); print("looked", flush=True)
    time.sleep(0.002)
look()
print("fine", n, flush=True)
`

// startBusy starts it with so many MiB of data that only its host has.
func startBusy(ctx context.Context, t *testing.T, h *hosts.Host, mib int) (s *script, run string) {
	t.Helper()
	dir := newDir(t)
	run = "/run/" + filepath.Base(dir)
	prog := filepath.Join(dir, "prog.py")
	if err := os.WriteFile(prog, []byte(busyFiles), 0o644); err != nil {
		t.Fatal(err)
	}
	s = startScript(ctx, t, h, dir, fmt.Sprintf("exec /usr/bin/python3 %s %s %d\n", prog, run, mib))
	t.Cleanup(func() {
		if b, _ := os.ReadFile(s.out); t.Failed() {
			t.Logf("the program said:\n%s", b)
		}
		_ = s.h.Kill(s.pid, unix.SIGKILL)
	})
	s.said(ctx, "^up$")
	return s, run
}

// looks lets the program compare all files with what must be in them; times counts.
func (s *script) looks(ctx context.Context, times int) {
	s.t.Helper()
	if err := s.h.Kill(s.pid, unix.SIGUSR1); err != nil {
		s.t.Fatal(err)
	}
	s.said(ctx, fmt.Sprintf(`(?s)\A(.*?^looked$){%d}`, times))
}

func (s *script) fine(ctx context.Context) {
	s.t.Helper()
	if err := s.h.Kill(s.pid, unix.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	s.said(ctx, `^fine \d+$`)
}

// early are the arguments that let its files travel.
func early(run string, more ...string) []string {
	return append([]string{"--external", "path:" + run + "/**=carry", "--external", "path:" + run + "-made=create,overwrite"}, more...)
}

// nothingLeft wants a host to have nothing of a program's files.
func nothingLeft(t *testing.T, h *hosts.Host, run string) {
	t.Helper()
	es, err := os.ReadDir(h.Path(filepath.Dir(run)))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if strings.HasPrefix(e.Name(), filepath.Base(run)) || strings.HasPrefix(e.Name(), ".godwit") {
			t.Errorf("%s has %s", h.Name(), e.Name())
		}
	}
}

// waitEarly waits until content has come to a host before the images.
func waitEarly(ctx context.Context, t *testing.T, h *hosts.Host, run string) {
	t.Helper()
	for ctx.Err() == nil {
		es, _ := filepath.Glob(h.Path(filepath.Dir(run)) + "/.godwit-*")
		for _, e := range es {
			var st unix.Stat_t
			if unix.Stat(e, &st) == nil && st.Blocks > 4096 {
				return
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
	t.Fatal("nothing comes before the freeze")
}

// TestMigrateCarryEarly: what a program reads and writes travels while it runs, so that
// next to nothing of it is left for the freeze; whatever ends that leaves nothing.
func TestMigrateCarryEarly(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	const mib = 200
	s, run := startBusy(ctx, t, alpha, mib)

	begin := func() (id string, wait func() error) {
		old, err := f.History(ctx)
		if err != nil {
			t.Fatal(err)
		}
		cmd := f.Godwit(ctx, append([]string{"migrate", fmt.Sprintf("alpha:%d", s.pid), "beta", "--bandwidth", "20MiB"}, early(run)...)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitEarly(ctx, t, beta, run)
		now, err := f.History(ctx)
		if err != nil || len(now) != len(old)+1 {
			t.Fatalf("%d migrations, were %d: %v", len(now), len(old), err)
		}
		return now[len(old)].ID, cmd.Wait
	}
	id, wait := begin()
	if res, err := f.Run(ctx, "abort", id); err != nil || res.Code != 0 {
		t.Fatalf("abort: %+v, %v", res, err)
	}
	if err := wait(); err == nil {
		t.Error("a migration that was aborted succeeds")
	}
	awaitEmpty(ctx, t, journalDir(beta))
	nothingLeft(t, beta, run)

	_, wait = begin()
	if err := f.StopAgent(ctx, "beta", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if es, _ := filepath.Glob(beta.Path("/run") + "/.godwit-*"); len(es) == 0 {
		t.Error("an agent that is killed leaves nothing: there is nothing to test")
	}
	if err := f.StartAgent(ctx, "beta"); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err == nil {
		t.Error("a migration whose destination died succeeds")
	}
	if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
		t.Fatal(err)
	}
	awaitEmpty(ctx, t, journalDir(beta))
	nothingLeft(t, beta, run)
	s.looks(ctx, 1)

	for i, h := range []*hosts.Host{beta, alpha} {
		mode, atLeast := fleet.StopAndCopy, uint64(mib<<20)
		if h == alpha {
			mode, atLeast = fleet.PreCopy, 0 // it has the large one
		}
		m, res, err := f.Migrate(ctx, s.h.Name(), s.pid, h.Name(), early(run, "--mode", mode)...)
		if err != nil || res.Code != 0 {
			t.Fatalf("migrate: %v, %+v", err, res)
		}
		s.h = h
		r := m.SourceReport
		if r == nil || r.EarlyFileBytes < atLeast || r.FrozenFileBytes > 12<<20 {
			t.Errorf("move %d: %+v: want %d bytes of files before the freeze, and few in it", i, r, atLeast)
		}
		t.Logf("%+v, frozen for %v ms", r, *m.FrozenMS)
		s.looks(ctx, 2+i)
	}
	for _, h := range []string{"alpha", "beta"} {
		if rss, err := f.PeakRSS(h); err != nil || rss > 128<<20 {
			t.Errorf("the agent of %s took %d bytes (%v)", h, rss, err)
		}
	}
	s.fine(ctx)
}

// TestCarryAgentDies: an agent that is killed and started again leaves of the files that
// it made for a tree those of a tree that runs.
func TestCarryAgentDies(t *testing.T) {
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	for _, c := range []struct {
		point, old string // old: a file that is to be replaced
		lands      bool
	}{
		{"destination.built", "", false},
		{"destination.handing", "older", false},
		{"destination.ran", "older", true},
	} {
		t.Run(c.point, func(t *testing.T) {
			hist := failAt(ctx, t, f, beta, c.point)
			s, run := startBusy(ctx, t, alpha, 1)
			log := beta.Path(run + "/work/log")
			if c.old != "" {
				err := os.MkdirAll(filepath.Dir(log), 0o755)
				if err == nil {
					err = os.WriteFile(log, []byte(c.old), 0o600)
				}
				past := time.Unix(1, 0)
				if err := errors.Join(err, os.Chtimes(log, past, past)); err != nil {
					t.Fatal(err)
				}
			}
			cmd := f.Godwit(ctx, append([]string{"migrate", fmt.Sprintf("alpha:%d", s.pid), "beta", "-o", "json"}, early(run)...)...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if err := beta.WaitGone(ctx, f.AgentPid("beta")); err != nil {
				t.Fatal(err)
			}
			if err := f.StartAgent(ctx, "beta"); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if err := f.WaitHosts(ctx, "alpha", "beta"); err != nil {
				t.Fatal(err)
			}
			if lands := runsAt(ctx, t, f, &workloads.Run{}, len(hist), alpha, beta) == "completed"; lands != c.lands {
				t.Fatalf("landed: %v, want %v", lands, c.lands)
			}
			awaitEmpty(ctx, t, journalDir(beta))
			if c.lands {
				s.h = beta
			} else if c.old == "" {
				nothingLeft(t, beta, run)
			} else {
				b, err := os.ReadFile(log)
				es, _ := os.ReadDir(filepath.Dir(log))
				if string(b) != c.old || err != nil || len(es) != 1 {
					t.Errorf("beside %q (%v) there are %v", b, err, es)
				}
			}
			s.looks(ctx, 1)
			s.fine(ctx)
		})
	}
}
