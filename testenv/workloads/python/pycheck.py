"""pycheck: a Python process that notices when something about it breaks.

    python3 pycheck.py PREFIX [MIB]

Same files and signals as selfcheck: PREFIX.ready, .log, .ok, .fail, SIGTERM.
It holds MIB megabytes in arrays of numbers and in plain objects, and works on
them in two threads.
"""

import array
import hashlib
import sys
import threading
import time

from workload import check, run, stopping

mib = int(sys.argv[2]) if len(sys.argv) > 2 else 64

# Half of the memory are doubles in large arrays, computed by rows.
ROW = 1 << 17
rows = [array.array("d", (i * 0.5 + r for i in range(ROW))) for r in range(max(1, mib // 2))]
versions = [0] * len(rows)
total = ROW * (ROW - 1) / 4.0


def row_sum(r):
    return sum(rows[r])


# A quarter are bytes with their digest, the rest small objects.
blobs = []
for i in range(max(1, mib // 4)):
    b = bytearray(hashlib.sha256(str(i).encode()).digest() * (1 << 15))
    blobs.append((b, hashlib.sha256(b).hexdigest()))
objects = {f"key-{i}": (i, str(i * 7), [i, i + 1]) for i in range(mib * 500)}
lock = threading.Lock()
counters = [0, 0]


def rewrite():
    """Adds one to every number of a row; the sum tells whether any was missed."""
    r = 0
    while not stopping.is_set():
        with lock:
            row = rows[r]
            rows[r] = array.array("d", (x + 1 for x in row))
            versions[r] += 1
        counters[0] += 1
        r = (r + 1) % len(rows)
        time.sleep(0.005)


def inspect():
    n = 0
    while not stopping.is_set():
        r = n % len(rows)
        with lock:
            got = row_sum(r)
            want = total + ROW * r + ROW * versions[r]
        check(abs(got - want) < 1e-3 * ROW, f"row {r}: sum {got}, want {want}")
        b, digest = blobs[n % len(blobs)]
        check(hashlib.sha256(b).hexdigest() == digest, f"blob {n % len(blobs)} changed")
        for i in range(n * 100 % (mib * 500), min(n * 100 % (mib * 500) + 100, mib * 500)):
            check(objects[f"key-{i}"] == (i, str(i * 7), [i, i + 1]), f"object {i} changed")
        counters[1] += 1
        n += 1
        time.sleep(0.01)


def end():
    check(min(counters) > 0, f"threads did {counters} rounds")
    for r in range(len(rows)):
        want = total + ROW * r + ROW * versions[r]
        check(abs(row_sum(r) - want) < 1e-3 * ROW, f"row {r}: sum {row_sum(r)}, want {want}")


run([rewrite, inspect], end)
