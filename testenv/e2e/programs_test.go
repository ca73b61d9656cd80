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

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/setup"
)

// TestPrograms dumps and restores well-known programs in the middle of their
// work; each has a check of its own that nothing was lost or done twice.
func TestPrograms(t *testing.T) {
	t.Parallel()
	t.Run("postgres", func(t *testing.T) {
		ctx := deadline(t, 3*time.Minute)
		h := newHosts(t, "alpha").Host("alpha")
		postgres(ctx, t, h, newDir(t), func(s *script, n int) { s.rounds(ctx, n) })
	})
}

// TestMigratePostgres moves the server and its clients to and fro. Its files are
// on storage that both hosts have, its socket is each host's own; its shared
// memory, of System V and of POSIX, moves with it.
func TestMigratePostgres(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	to := []*hosts.Host{beta, alpha}
	run := "/run/" + filepath.Base(newDir(t))
	for _, h := range to {
		if _, err := h.Run(ctx, "install", "-d", "-o", "postgres", run); err != nil {
			t.Fatal(err)
		}
	}
	shm := func(h *hosts.Host) string {
		names, err := h.Run(ctx, "ls", "-A", "/dev/shm")
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	postgres(ctx, t, alpha, run, func(s *script, n int) {
		if names := shm(s.h); !strings.Contains(names, "PostgreSQL.") {
			t.Errorf("the server has no POSIX shared memory: %q", names)
		}
		for i := range n {
			time.Sleep(100 * time.Millisecond) // work to be interrupted
			s.migrate(ctx, f, to[i%2])
		}
	})
	for _, h := range to {
		if names := shm(h); names != "" {
			t.Errorf("left in /dev/shm of %s: %s", h.Name(), names)
		}
	}
}

// script is a program of several processes under one shell, whose output goes
// into a file.
type script struct {
	t   *testing.T
	h   *hosts.Host
	pid int
	out string
}

func startScript(ctx context.Context, t *testing.T, h *hosts.Host, dir, text string) *script {
	t.Helper()
	s := &script{t: t, h: h, out: filepath.Join(dir, "out")}
	path := filepath.Join(dir, "script")
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	s.pid, err = h.Start(ctx, hosts.Spec{Args: []string{"/bin/sh", path}, Env: []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}, Stdout: s.out, Stderr: s.out})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// said waits until the output has a line that matches and returns its groups.
func (s *script) said(ctx context.Context, pattern string) []string {
	s.t.Helper()
	re := regexp.MustCompile("(?m)" + pattern)
	for {
		alive := s.h.Alive(s.pid)
		b, err := os.ReadFile(s.out)
		if err != nil {
			s.t.Fatal(err)
		}
		if m := re.FindStringSubmatch(string(b)); m != nil {
			return m
		}
		if !alive || ctx.Err() != nil {
			s.t.Fatalf("the output has no %q (alive: %v):\n%s", pattern, alive, b)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// rounds dumps and restores the tree n times, some work apart.
func (s *script) rounds(ctx context.Context, n int, options ...string) {
	s.t.Helper()
	for i := range n {
		time.Sleep(100 * time.Millisecond) // work to be interrupted
		img := dump(ctx, s.t, s.h, s.pid, options...)
		if i == 0 {
			decodeImages(s.t, img)
		}
		restore(ctx, s.t, s.h, img, s.pid, nil, options...)
		if err := os.RemoveAll(img); err != nil {
			s.t.Fatal(err)
		}
	}
}

// migrate moves the tree and wants that to succeed.
func (s *script) migrate(ctx context.Context, f *fleet.Fleet, to *hosts.Host, args ...string) {
	s.t.Helper()
	m, res, err := f.Migrate(ctx, s.h.Name(), s.pid, to.Name(), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	if res.Code != 0 || m.LandedPID != s.pid {
		s.t.Fatalf("migration: exit code %d, landed as pid %d, want %d: %s%s", res.Code, m.LandedPID, s.pid, res.Stdout, res.Stderr)
	}
	if err := s.h.WaitGone(ctx, s.pid); err != nil {
		s.t.Fatalf("two copies: %v", err)
	}
	s.h = to
}

// postgres is a server with pgbench at work over a unix socket in run, both of one
// tree, which move dumps and restores n times.
func postgres(ctx context.Context, t *testing.T, h *hosts.Host, run string, move func(s *script, n int)) {
	dir := newDir(t)
	s := startScript(ctx, t, h, dir, strings.NewReplacer("DIR", dir, "RUN", run, "BIN", filepath.Dir(setup.Find(setup.Postgres))).Replace(`
set -e
cd DIR
mkdir data && chown postgres:postgres data && chmod 700 data
as() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
as BIN/initdb -D DIR/data -A peer -N >initdb.log 2>&1
setpriv --reuid=postgres --regid=postgres --init-groups BIN/postgres -D DIR/data -k RUN -c listen_addresses= -c fsync=off -c max_connections=20 </dev/null >server.log 2>&1 &
server=$!
until as pg_isready -q -h RUN; do sleep 0.05; done
as createdb -h RUN bench
as pgbench -h RUN -i -q -s 1 bench >init.log 2>&1
bench() {
	echo benching $1
	as pgbench -h RUN -c 4 -j 2 -T 15 $2 bench && code=0 || code=$?
	echo pgbench $1 ended with $code
	until [ -e DIR/next$1 ]; do sleep 0.1; done
}
bench 1
bench 2 "-n -C" # without emptying the history
as psql -h RUN -At bench -c "select 'sums', (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history), (select count(*) from pgbench_history)"
kill -INT $server
wait $server
echo server ended with $?
`))
	t.Cleanup(func() {
		if t.Failed() {
			for _, f := range []string{"server.log", "initdb.log", "init.log", "out"} {
				b, _ := os.ReadFile(filepath.Join(dir, f))
				t.Logf("%s:\n%s", f, b)
			}
		}
		_ = s.h.Kill(s.pid, unix.SIGKILL)
	})
	// First with connections that stay, then with a new one for each transaction.
	for i, n := range []int{10, 5} {
		s.said(ctx, fmt.Sprintf("^benching %d$", i+1))
		move(s, n)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("next%d", i+1)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		s.said(ctx, fmt.Sprintf("^pgbench %d ended with 0$", i+1))
	}
	b, err := os.ReadFile(s.out)
	if err != nil {
		t.Fatal(err)
	}
	done := 0
	for _, m := range regexp.MustCompile(`(?m)^number of transactions actually processed: (\d+)$`).FindAllSubmatch(b, -1) {
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		done += n
	}
	if n := strings.Count(string(b), "number of failed transactions: 0 "); n != 2 {
		t.Errorf("%d of 2 runs had no failed transaction", n)
	}
	sums := s.said(ctx, `^sums\|(-?\d+)\|(-?\d+)\|(-?\d+)\|(-?\d+)\|(\d+)$`)
	for i := 2; i <= 4; i++ {
		if sums[i] != sums[1] {
			t.Errorf("the sums of accounts, branches, tellers and history differ: %v", sums[1:5])
			break
		}
	}
	if sums[5] != strconv.Itoa(done) || done == 0 {
		t.Errorf("the history has %s transactions, pgbench counts %d", sums[5], done)
	}
	s.said(ctx, "^server ended with 0$")
}
