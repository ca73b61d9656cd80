"""drive: runs a real program under load, as its child, and checks its work.

    python3 drive.py PREFIX PROGRAM DIR [MIB]

Same files and signals as selfcheck: PREFIX.ready, .log, .ok, .fail, SIGTERM.
PROGRAM is the name of one of the classes below; DIR holds its files; MIB is how
much redis holds, beside what its clients do. The tree
that is moved is this process with the program and all its clients.

While PREFIX.hold exists, PREFIX.held appears and no new work is begun (only
sqlite looks at it).
"""

import hashlib
import http.client
import json
import lzma
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from workload import check, fail, guarded, on_failure, prefix, run, stopping, verdict

program, work = sys.argv[2:4]


def path(name):
    return os.path.join(work, name)


def write(name, text):
    with open(path(name), "w") as f:
        f.write(text)
    return path(name)


started = []


@on_failure.append
def end_all():
    for p in started:
        if p.poll() is None:
            p.kill()


def spawn(argv, **kw):
    """Starts a program whose diagnostics go to DIR/stderr."""
    with open(path("stderr"), "a") as err:
        p = subprocess.Popen(argv, stderr=err, cwd=work, **kw)
    started.append(p)
    return p


def ended(p, want=0):
    code = p.wait(timeout=60)
    check(code == want, f"{p.args[0]} ended with {code}, want {want}")


def listening(port):
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    fail(f"nothing listens on port {port}")


class Work:
    """One program. threads are loops of one step each; begin and end frame them."""

    threads = []

    def begin(self):
        pass

    def end(self):
        pass


class nginx(Work):
    """A master and four workers; clients that keep connections and clients that do not."""

    port = 8091

    def begin(self):
        os.makedirs(path("www"), exist_ok=True)
        self.want = {}
        for i in range(8):
            body = hashlib.sha256(str(i).encode()).digest() * (1 << i + 2)
            with open(path(f"www/{i}"), "wb") as f:
                f.write(body)
            self.want[i] = hashlib.sha256(body).digest()
        temp = "".join(f"{k}_temp_path {path(k)};" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        conf = write("nginx.conf", f"""user root; worker_processes 4; daemon off;
            pid {path("pid")}; error_log {path("error")};
            events {{ worker_connections 128; }}
            http {{ {temp} access_log {path("access")}; keepalive_requests 1000000;
            server {{ listen 127.0.0.1:{self.port}; root {path("www")}; }} }}""")
        self.p = spawn(["nginx", "-e", path("error"), "-c", conf])
        listening(self.port)
        self.done = [0] * 6
        self.threads = [self.client(i) for i in range(6)]

    def client(self, n):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

        def step():
            i = self.done[n] % 8
            c.request("GET", f"/{i}")
            r = c.getresponse()
            body = r.read()
            check(r.status == 200 and hashlib.sha256(body).digest() == self.want[i], f"GET /{i}: {r.status}, {len(body)} bytes")
            self.done[n] += 1
            if n % 2 and self.done[n] % 50 == 0:
                c.close()
        return step

    def end(self):
        self.p.send_signal(signal.SIGQUIT)
        ended(self.p)
        with open(path("access")) as f:
            logged = sum(1 for line in f)
        check(logged == sum(self.done), f"{logged} requests were logged, {sum(self.done)} answered")


class node(Work):
    """Timers, a worker thread, file and crypto jobs of the pool, an HTTP server."""

    port = 8092

    def begin(self):
        js = write("server.js", """
const http = require('http'), crypto = require('crypto'), fs = require('fs');
const { Worker } = require('worker_threads');
const fatal = e => { console.error(e); process.exit(1); };
let n = 0, ticks = 0, chain = 0, jobs = 0;
setInterval(() => { ticks++; }, 5);
const w = new Worker(`
const { parentPort } = require('worker_threads'), crypto = require('crypto');
let h = Buffer.alloc(32), i = 0;
setInterval(() => {
  for (let k = 0; k < 50; k++) { h = crypto.createHash('sha256').update(h).digest(); i++; }
  parentPort.postMessage([i, h.toString('hex')]);
}, 2);`, { eval: true });
let h = Buffer.alloc(32), i = 0;
w.on('error', fatal);
w.on('message', ([at, hex]) => {
  for (; i < at; i++) h = crypto.createHash('sha256').update(h).digest();
  if (h.toString('hex') !== hex) fatal('chain differs at ' + at);
  chain = at;
});
const job = () => crypto.pbkdf2('godwit', 'salt', 2000, 16, 'sha256', (e, k) => {
  if (e || k.toString('hex') !== process.argv[2]) fatal('pbkdf2 ' + (e || k.toString('hex')));
  fs.readFile(__filename, (e, b) => { if (e || b.length === 0) fatal(e || 'empty'); jobs++; setTimeout(job, 1); });
});
for (let k = 0; k < 4; k++) job();
http.createServer((q, r) => r.end(JSON.stringify({ n: ++n, ticks, chain, jobs }))).listen(8092, '127.0.0.1');
process.on('SIGTERM', () => process.exit(0));
""")
        key = hashlib.pbkdf2_hmac("sha256", b"godwit", b"salt", 2000, 16).hex()
        self.p = spawn(["node", js, key], env={**os.environ, "UV_USE_IO_URING": "0"})
        listening(self.port)
        self.c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        self.last = {"n": 0, "ticks": 0, "chain": 0, "jobs": 0}
        self.first = None
        self.threads = [self.step]

    def step(self):
        self.c.request("GET", "/")
        got = json.loads(self.c.getresponse().read())
        check(got["n"] == self.last["n"] + 1 and all(got[k] >= v for k, v in self.last.items()), f"{got} after {self.last}")
        self.last = got
        self.first = self.first or got
        time.sleep(0.002)

    def end(self):
        check(all(self.last[k] > v for k, v in self.first.items()), f"{self.first} became only {self.last}")
        self.p.terminate()
        ended(self.p)


class java(Work):
    """300 threads on the G1 collector, asked through pipes."""

    def begin(self):
        write("Load.java", """
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
public class Load {
  static final AtomicLongArray counts = new AtomicLongArray(300);
  static final ConcurrentHashMap<Integer, long[]> map = new ConcurrentHashMap<>();
  static volatile boolean stop;
  static void fatal(String s) { System.err.println(s); Runtime.getRuntime().halt(1); }
  public static void main(String[] a) throws Exception {
    List<Thread> ts = new ArrayList<>();
    for (int k = 0; k < 300; k++) {
      final int id = k;
      Thread t = new Thread(() -> {
        Random r = new Random(id);
        List<byte[]> garbage = new ArrayList<>();
        while (!stop) {
          long n = counts.incrementAndGet(id);
          long[] v = map.compute(id, (x, o) -> new long[] {n, n * 7});
          if (v[1] != v[0] * 7 || v[0] != n) fatal("thread " + id + " has " + v[0] + " at " + n);
          byte[] b = new byte[1000 + r.nextInt(20000)];
          Arrays.fill(b, (byte) id);
          garbage.add(b);
          for (byte x : garbage.get(garbage.size() / 2)) if (x != (byte) id) fatal("memory of thread " + id);
          if (garbage.size() > 20) garbage.clear();
          try { Thread.sleep(20 + r.nextInt(20)); } catch (InterruptedException e) { fatal(e.toString()); }
        }
      });
      t.start();
      ts.add(t);
    }
    Scanner in = new Scanner(System.in);
    while (in.hasNextLine()) {
      String line = in.nextLine();
      long sum = 0;
      for (int k = 0; k < 300; k++) sum += counts.get(k);
      System.out.println(line + " " + sum);
      if (line.equals("gc")) System.gc();
    }
    stop = true;
    for (Thread t : ts) t.join();
  }
}
""")
        subprocess.run(["javac", "-d", work, path("Load.java")], check=True)
        self.p = spawn(["java", "-XX:+UseG1GC", "-Xmx256m", "-XX:-UsePerfData", "-cp", work, "Load"],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.n, self.sum = 0, -1
        self.step()
        self.threads = [self.step]

    def step(self):
        self.n += 1
        word = "gc" if self.n % 100 == 0 else str(self.n)
        self.p.stdin.write(f"{word}\n".encode())
        self.p.stdin.flush()
        got = self.p.stdout.readline().split()
        check(len(got) == 2 and got[0].decode() == word and int(got[1]) >= self.sum, f"asked {word} after {self.sum}: {got}")
        self.sum = int(got[1])
        time.sleep(0.01)

    def end(self):
        check(self.sum > 300, f"300 threads did {self.sum} rounds")
        self.p.stdin.close()
        ended(self.p)


class redis(Work):
    """A client that pipelines."""

    port = 8093

    def begin(self):
        self.p = spawn(["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--dir", work,
                        "--enable-debug-command", "local"], stdout=subprocess.DEVNULL)
        listening(self.port)
        if len(sys.argv) > 4:
            with socket.create_connection(("127.0.0.1", self.port)) as s:
                s.sendall(f"DEBUG POPULATE {int(sys.argv[4]) * 220} key 4096\r\n".encode())
                got = s.makefile("rb").readline()
                check(got == b"+OK\r\n", f"DEBUG POPULATE gave {got}")
        self.done = [0] * 3
        self.threads = [self.client(i) for i in range(3)]

    def client(self, n):
        s = socket.create_connection(("127.0.0.1", self.port))
        f = s.makefile("rb")

        def step():
            s.sendall(f"INCR c{n}\r\n".encode() * 200)
            for _ in range(200):
                self.done[n] += 1
                got = f.readline()
                check(got == f":{self.done[n]}\r\n".encode(), f"INCR {self.done[n]} gave {got}")
            time.sleep(0.002)
        return step

    def end(self):
        self.p.terminate()
        ended(self.p)


class sqlite(Work):
    """Transactions, some of which are rolled back, by the command line tool."""

    def begin(self):
        self.p = spawn(["sqlite3", "-batch", path("db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask("CREATE TABLE t (n INTEGER PRIMARY KEY, s TEXT);")
        self.rows, self.turn = 0, 0
        self.threads = [self.step]

    def ask(self, sql):
        self.p.stdin.write(f"{sql} SELECT 'end';\n".encode())
        self.p.stdin.flush()
        out = []
        while True:
            line = self.p.stdout.readline().decode().rstrip("\n")
            if line == "end":
                return out
            check(self.p.poll() is None, f"sqlite3 ended in {sql}")
            out.append(line)

    def step(self):
        self.turn += 1
        self.ask("BEGIN IMMEDIATE;")
        self.ask("".join(f"INSERT INTO t VALUES ({self.rows + i}, '{'x' * (i % 50)}');" for i in range(100)))
        if os.path.exists(f"{prefix}.hold"):
            verdict("held", "held\n")
            while os.path.exists(f"{prefix}.hold"):
                time.sleep(0.01)
            os.remove(f"{prefix}.held")
        if self.turn % 3:
            self.ask("COMMIT;")
            self.rows += 100
        else:
            self.ask("ROLLBACK;")
        got = self.ask("SELECT count(*), sum(n) FROM t;")
        want = f"{self.rows}|{self.rows * (self.rows - 1) // 2 if self.rows else ''}"
        check(got == [want], f"the table has {got}, want {want}")

    def end(self):
        got = self.ask("PRAGMA integrity_check;")
        check(got == ["ok"], f"integrity: {got}")
        self.p.stdin.close()
        ended(self.p)


class xz(Work):
    """A stream through pipes, compared as it comes out."""

    def begin(self):
        self.p = spawn(["xz", "-1", "-T2", "--block-size=1MiB", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.sent, self.sum = 0, hashlib.sha256()
        self.got, self.back = 0, hashlib.sha256()
        self.random = random.Random(1)
        self.unpacker = lzma.LZMADecompressor()
        self.reader = threading.Thread(target=guarded(self.read))
        self.reader.start()
        self.threads = [self.step]

    def step(self):
        block = self.random.randbytes(1 << 14) + bytes(1 << 14)
        self.sum.update(block)
        self.p.stdin.write(block)
        self.sent += len(block)
        time.sleep(0.001)

    def read(self):
        while b := self.p.stdout.read1(1 << 16):
            plain = self.unpacker.decompress(b)
            self.got += len(plain)
            self.back.update(plain)

    def end(self):
        self.p.stdin.close()
        self.reader.join()
        ended(self.p)
        check(self.got == self.sent and self.back.digest() == self.sum.digest(), f"{self.sent} bytes went in, {self.got} came out, or others")


class make(Work):
    """A C project that is compiled by four jobs, again and again."""

    def begin(self):
        names = [f"f{i}" for i in range(40)]
        for i, n in enumerate(names):
            write(n + ".c", f"#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint {n}(int x) {{ return x * {i} + (int)strlen(\"{n}\"); }}\n")
        calls = " + ".join(f"{n}(3)" for n in names)
        write("main.c", "#include <stdio.h>\n" + "".join(f"int {n}(int);\n" for n in names) + f"int main(void) {{ printf(\"%d\\n\", {calls}); return 0; }}\n")
        objects = " ".join(n + ".o" for n in names + ["main"])
        write("Makefile", f"prog: {objects}\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -O2 -c -o $@ $<\nclean:\n\trm -f *.o prog\n")
        self.want = sum(3 * i + len(n) for i, n in enumerate(names))
        os.makedirs(path("tmp"), exist_ok=True)
        self.threads = [self.step]

    def step(self):
        env = {**os.environ, "TMPDIR": path("tmp")}
        for target in ("clean", "prog"):
            with open(path("out"), "a") as out:
                ended(spawn(["make", "-j4", target], stdout=out, env=env))
        got = subprocess.run([path("prog")], capture_output=True, check=True).stdout
        check(int(got) == self.want, f"the program says {got}, want {self.want}")
        started.clear()


class bash(Work):
    """A script with jobs that are stopped, continued, waited for and piped."""

    def begin(self):
        script = write("jobs.sh", r"""
set -m
caught=0
trap 'caught=$((caught + 1))' USR1
while read -r n; do
  sleep 0.05 &
  job=$!
  kill -STOP $job
  sum=$(seq 1 300 | { s=0; while read -r x; do s=$((s + x)); done; echo $s; })
  kill -CONT $job
  kill -USR1 $$
  (exit 7) & wait $!; code=$?
  wait $job || exit 1
  echo "$n $sum $code $caught"
done
""")
        self.p = spawn(["bash", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.n = 0
        self.threads = [self.step]

    def step(self):
        self.n += 1
        self.p.stdin.write(f"{self.n}\n".encode())
        self.p.stdin.flush()
        got = self.p.stdout.readline().decode().strip()
        check(got == f"{self.n} 45150 7 {self.n}", f"round {self.n}: {got!r}")

    def end(self):
        self.p.stdin.close()
        ended(self.p)


class python(Work):
    """An asyncio server with clients, timers, threads of a pool and processes."""

    def begin(self):
        script = write("loop.py", """
import asyncio, hashlib, sys, time
served, ticks, late = 0, 0, 0
async def serve(r, w):
    global served
    while line := await r.readline():
        w.write(hashlib.sha256(line).hexdigest().encode() + b"\\n")
        await w.drain()
        served += 1
    w.close()
async def client(i):
    r, w = await asyncio.open_connection("127.0.0.1", 8094)
    n = 0
    while True:
        line = f"{i} {n}\\n".encode()
        w.write(line)
        got = await asyncio.wait_for(r.readline(), 30)
        assert got.decode().strip() == hashlib.sha256(line).hexdigest(), (i, n, got)
        n += 1
        await asyncio.sleep(0.002)
async def tick():
    global ticks
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - before >= 0.0099
        ticks += 1
async def pool():
    loop = asyncio.get_running_loop()
    want = hashlib.pbkdf2_hmac("sha256", b"godwit", b"salt", 500)
    while True:
        got = await loop.run_in_executor(None, hashlib.pbkdf2_hmac, "sha256", b"godwit", b"salt", 500)
        assert got == want
async def cat():
    p = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    n = 0
    while True:
        p.stdin.write(f"{n}\\n".encode())
        got = await asyncio.wait_for(p.stdout.readline(), 30)
        assert int(got) == n, (got, n)
        n += 1
        await asyncio.sleep(0.001)
async def short():
    while True:
        p = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
        assert await p.wait() == 7
async def ask():
    r = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(r), sys.stdin)
    while await r.readline():
        print(served, ticks, flush=True)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 8094)
    work = [asyncio.ensure_future(c) for c in [*map(client, range(20)), tick(), pool(), cat(), short()]]
    asked = asyncio.ensure_future(ask())
    done, _ = await asyncio.wait([*work, asked], return_when=asyncio.FIRST_COMPLETED)
    for d in done:
        d.result()
    assert asked in done
    sys.stdout.flush()
    import os
    os._exit(0)
asyncio.run(main())
""")
        self.p = spawn(["python3", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.last = (-1, -1)
        self.threads = [self.step]

    def step(self):
        self.p.stdin.write(b"?\n")
        self.p.stdin.flush()
        got = tuple(map(int, self.p.stdout.readline().split()))
        check(len(got) == 2 and got[0] >= self.last[0] and got[1] >= self.last[1], f"{got} after {self.last}")
        self.last = got
        time.sleep(0.01)

    def end(self):
        check(min(self.last) > 0, f"it did {self.last}")
        self.p.stdin.close()
        ended(self.p)


def repeat(step):
    while not stopping.is_set():
        step()


os.makedirs(work, exist_ok=True)
if not shutil.which({"sqlite": "sqlite3", "redis": "redis-server", "python": "python3"}.get(program, program)):
    fail(f"{program} is not installed")
it = {c.__name__: c for c in Work.__subclasses__()}[program]()
guarded(it.begin)()
run([lambda step=step: repeat(step) for step in it.threads], it.end)
