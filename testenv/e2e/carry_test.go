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
)

// carriedProgram is run by a Python of its own, with libraries of its own, and
// keeps files of all kinds below the directory run. It must never have the
// database open for writing while it moves: sqlite remembers the inode number.
const carriedProgram = `
import mmap, os, signal, sqlite3, sys, time
run = sys.argv[1]
os.chdir(run + "/work")
log = os.open("app.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
with open("state", "wb") as f: f.truncate(4096)
state = mmap.mmap(os.open("state", os.O_RDWR), 4096)
with open("sparse", "wb") as f:
    f.truncate(10 << 30); f.seek(3 << 30); f.write(b"deep" * 1024)
sparse = os.open("sparse", os.O_RDONLY)
os.mkdir("sub", 0o710); os.symlink("../app.log", "sub/link")
with open("sub/tagged", "w") as f: f.write("nobody has it open")
os.setxattr("sub/tagged", "user.tag", b"blue"); os.utime("sub/tagged", ns=(10**18, 10**18 + 5))
def change(rows):
    db = sqlite3.connect("db")
    with db: db.executemany("insert into t values (?)", ((i,) for i in range(rows)))
    db.close()
db = sqlite3.connect("db"); db.execute("create table t (i)"); db.commit(); db.close()
reader = sqlite3.connect("db"); reader.execute("select count(*) from t").fetchone()
ticks, asked, ending = 0, 0, False
def ask(*_): global asked; asked += 1
def end(*_): global ending; ending = True
signal.signal(signal.SIGUSR1, ask); signal.signal(signal.SIGTERM, end)
print("up", flush=True)
while not ending:
    os.write(log, b"%d\n" % ticks)
    ticks += 1
    state[0:8] = ticks.to_bytes(8, "little")
    if asked:
        asked -= 1
        change(100)
        rows, = reader.execute("select count(*) from t").fetchone()
        whole, = reader.execute("pragma integrity_check").fetchone()
        print("rows", rows, whole, flush=True)
    time.sleep(0.005)
def check(ok, what):
    if not ok: print("bad:", what, flush=True); sys.exit(1)
check(open(run + "/work/app.log").read() == "".join("%d\n" % i for i in range(ticks)), "log")
check(os.path.samestat(os.stat("app.log"), os.fstat(log)) and os.stat("app.log").st_mode == 0o100640, "the log is another file")
check(int.from_bytes(open("state", "rb").read(8), "little") == ticks, "state")
st = os.stat("sparse")
check(os.path.samestat(st, os.fstat(sparse)) and st.st_size == 10 << 30 and st.st_blocks <= 16, "sparse %s" % (st,))
check(os.pread(sparse, 8, (3 << 30) + 4092) == b"deep\0\0\0\0", "content of the sparse file")
check(os.getxattr("sub/tagged", "user.tag") == b"blue" and os.stat("sub/tagged").st_mtime_ns == 10**18 + 5, "what nobody has open")
check(os.readlink("sub/link") == "../app.log" and os.stat("sub").st_mode == 0o40710, "directory")
check(os.getcwd() == run + "/work", os.getcwd())
left = [n for d, ds, fs in os.walk(run) for n in ds + fs if n.startswith(".godwit")]
check(left == [], left)
print("fine", ticks, flush=True)
`

// carriedApp is such a program, with everything that it needs below run on one host.
type carriedApp struct {
	*script
	run  string
	rows int
}

func startCarried(ctx context.Context, t *testing.T, h *hosts.Host) *carriedApp {
	t.Helper()
	dir := newDir(t)
	run := "/run/" + filepath.Base(dir)
	prog := filepath.Join(dir, "prog.py")
	if err := os.WriteFile(prog, []byte(carriedProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	s := startScript(ctx, t, h, dir, strings.NewReplacer("RUN", run, "PROG", prog).Replace(`
set -e
mkdir -m 751 RUN && mkdir RUN/bin RUN/lib RUN/work
cp -p /usr/bin/python3 RUN/bin/app
ldd RUN/bin/app | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | while read lib; do cp -pL $lib RUN/lib; done
cp -pL "$(ldd RUN/bin/app | sed -n 's/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p')" RUN/bin/ld.so
exec RUN/bin/ld.so --library-path RUN/lib RUN/bin/app PROG RUN
`))
	t.Cleanup(func() {
		if b, _ := os.ReadFile(s.out); t.Failed() {
			t.Logf("the program said:\n%s", b)
		}
		_ = s.h.Kill(s.pid, unix.SIGKILL)
	})
	s.said(ctx, "^up$")
	return &carriedApp{script: s, run: run}
}

// works lets the program change its database.
func (a *carriedApp) works(ctx context.Context) {
	a.t.Helper()
	if err := a.h.Kill(a.pid, unix.SIGUSR1); err != nil {
		a.t.Fatal(err)
	}
	a.rows += 100
	a.said(ctx, fmt.Sprintf("^rows %d ok$", a.rows))
}

// refused wants a migration to be refused with a word, and the tree to go on.
func (a *carriedApp) refused(ctx context.Context, f *fleet.Fleet, to *hosts.Host, want string, args ...string) {
	a.t.Helper()
	_, res, err := f.Migrate(ctx, a.h.Name(), a.pid, to.Name(), args...)
	if err != nil {
		a.t.Fatal(err)
	}
	if res.Code != 4 || !strings.Contains(res.Stdout, want) {
		a.t.Errorf("exit code %d, want 4 and %q: %s%s", res.Code, want, res.Stdout, res.Stderr)
	}
	a.works(ctx)
}

// TestMigrateCarry: a program lands, with its libraries, its data and its log, on a
// host that has none of them, or others.
func TestMigrateCarry(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	a := startCarried(ctx, t, alpha)
	rule := "path:" + a.run + "/**=carry"
	a.works(ctx)
	a.refused(ctx, f, beta, "does not exist here")
	a.refused(ctx, f, beta, "more than the limit", "--external", rule+",limit=1MiB")
	if _, err := os.Lstat(beta.Path(a.run)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused migration leaves %s: %v", a.run, err)
	}
	for i, h := range []*hosts.Host{beta, alpha, beta} {
		a.migrate(ctx, f, h, "--external", rule)
		a.works(ctx)
		if st, err := os.Stat(h.Path(a.run)); err != nil || st.Mode().Perm() != 0o751 {
			t.Errorf("move %d: %s of %s: %v, %v", i, a.run, h.Name(), st, err)
		}
	}

	// Another library is newer on the way back.
	lib := filepath.Join(a.run, "lib", "libz.so.1")
	if _, err := alpha.Run(ctx, "sh", "-c", fmt.Sprintf("rm %[1]s && cp -L %[2]s %[1]s && touch %[1]s", lib, filepath.Join(a.run, "lib", "libm.so.6"))); err != nil {
		t.Fatal(err)
	}
	a.refused(ctx, f, alpha, "build-id")
	a.refused(ctx, f, alpha, "newer", "--external", rule)
	a.migrate(ctx, f, alpha, "--external", rule+",overwrite")
	a.works(ctx)

	// Where there is too little room nothing is begun.
	if _, err := beta.Run(ctx, "sh", "-c", fmt.Sprintf("rm -r %[1]s && mkdir %[1]s && mount -t tmpfs -o size=4m small %[1]s", a.run)); err != nil {
		t.Fatal(err)
	}
	a.refused(ctx, f, beta, "bytes free", "--external", rule)
	if es, err := os.ReadDir(beta.Path(a.run)); err != nil || len(es) > 0 {
		t.Errorf("a refused migration leaves %v (%v)", es, err)
	}
	if err := a.h.Kill(a.pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	a.said(ctx, `^fine \d+$`)
}
