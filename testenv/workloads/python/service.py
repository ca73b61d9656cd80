"""A service as systemd starts one, and what it talks to.

  service.py service PREFIX LOG   stdout and stderr on journald's socket, stdin
                                  /dev/null, a log opened O_APPEND, a connection to a daemon
  service.py journald OUT         a stand-in for journald: its stream socket, and the state
                                  of each stream; a line of OUT is "IDENTIFIER PRIORITY PREFIX TEXT"
  service.py daemon               answers each line with itself, at /run/daemon.sock
"""
import os
import signal
import socket
import sys
import threading
import time

JOURNAL = "/run/systemd/journal"
DAEMON = "/run/daemon.sock"


def listen(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    s = socket.socket(socket.AF_UNIX)
    s.bind(path)
    s.listen(16)
    while True:
        c, _ = s.accept()
        yield c


def stream(c, out):
    f = c.makefile("r")
    head = [f.readline().rstrip("\n") for _ in range(7)]
    ident, unit, priority, prefix = head[:4]
    st = os.fstat(c.fileno())
    state = f"{JOURNAL}/streams/{st.st_dev}:{st.st_ino}"
    with open(state + ".tmp", "w") as s:
        s.write(f"# This is private data. Do not parse\nPRIORITY={priority}\nLEVEL_PREFIX={prefix}\nFORWARD_TO_SYSLOG={head[4]}\n"
                f"FORWARD_TO_KMSG={head[5]}\nFORWARD_TO_CONSOLE={head[6]}\nSTREAM_ID=0\nIDENTIFIER={ident}\nUNIT={unit}\n")
    os.rename(state + ".tmp", state)
    for line in f:
        with open(out, "a") as o:
            o.write(f"{ident} {priority} {prefix} {line}")
    os.unlink(state)


def journald(out):
    os.makedirs(JOURNAL + "/streams", exist_ok=True)
    for c in listen(JOURNAL + "/stdout"):
        threading.Thread(target=stream, args=(c, out), daemon=True).start()


def echo(c):
    for line in c.makefile("r"):
        try:
            c.sendall(line.encode())
        except OSError:
            return


def daemon():
    for c in listen(DAEMON):
        threading.Thread(target=echo, args=(c,), daemon=True).start()


def connect(path):
    s = socket.socket(socket.AF_UNIX)
    for _ in range(3000):
        try:
            s.connect(path)
            return s
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"nobody listens at {path}")


def service(prefix, log):
    def fail(why):
        with open(prefix + ".fail", "x") as f:
            f.write(why + "\n")
        os._exit(1)

    j = connect(JOURNAL + "/stdout")
    j.shutdown(socket.SHUT_RD)
    j.sendall(b"mysvc\nmy.service\n5\n0\n0\n0\n0\n")
    os.dup2(j.fileno(), 1)
    os.dup2(j.fileno(), 2)
    os.close(j.detach())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    d = connect(DAEMON)
    d.settimeout(20)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    records = os.open(prefix + ".log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    got = b""
    n = 0
    while not stopped:
        os.write(1 + n % 2, f"line {n}\n".encode())
        os.write(out, f"{n}\n".encode())
        d.sendall(f"{n}\n".encode())
        while not got.endswith(f"{n}\n".encode()):
            # A question may be lost with the connection: it is asked again.
            d.settimeout(1)
            try:
                more = d.recv(1000)
            except TimeoutError:
                d.sendall(f"{n}\n".encode())
                continue
            if not more:
                fail("the daemon hung up")
            got = (got + more)[-100:]
        os.write(records, f"{n} {time.monotonic_ns()}\n".encode())
        if n == 0:
            open(prefix + ".ready", "w").close()
        n += 1
        time.sleep(0.01)
    with open(prefix + ".ok", "w") as f:
        f.write(f"OK {n}\n")


if __name__ == "__main__":
    {"service": service, "journald": journald, "daemon": daemon}[sys.argv[1]](*sys.argv[2:])
