"""workload: what programs that notice when something about them breaks share.

Same files and signals as selfcheck: PREFIX.ready, .log, .ok, .fail, SIGTERM.
"""

import os
import signal
import sys
import threading
import time

prefix = sys.argv[1]
stopping = threading.Event()
on_failure = []  # what to do before the end
records = 0


def verdict(suffix, text):
    try:
        fd = os.open(f"{prefix}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return
    os.write(fd, text.encode())
    os.close(fd)


def fail(text):
    verdict("fail", f"FAIL after {records} records, pid {os.getpid()}: {text}\n")
    for f in on_failure:
        f()
    os._exit(1)


def check(cond, text):
    if not cond:
        fail(text)


def guarded(f):
    def run():
        try:
            f()
        except BaseException as e:  # a thread must not die unnoticed
            fail(f"{type(e).__name__}: {e}")
    return run


def run(loops, end):
    """Runs loops in threads of their own and writes records until SIGTERM, then
    waits for the loops, calls end for the last checks and says OK."""
    global records
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    log = os.open(f"{prefix}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    threads = [threading.Thread(target=guarded(f)) for f in loops]
    for t in threads:
        t.start()
    verdict("ready", "ready\n")
    last = 0
    while not stopping.is_set():
        now = time.monotonic_ns()
        check(now >= last, f"the clock went back from {last} to {now}")
        last = now
        os.write(log, f"{records} {now}\n".encode())
        records += 1
        time.sleep(0.01)
    for t in threads:
        t.join()
    guarded(end)()
    verdict("ok", f"OK {records}\n")
