# Uses memory of which pages come late in every way that there is, and knows what must be in it.
import ctypes, errno, mmap, os, random, sys, threading

PAGE = 4096
N = int(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
for f in (libc.munmap, libc.madvise, libc.mprotect):
    f.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + ([ctypes.c_int] if f is not libc.munmap else [])

def fresh(pages):
    a = libc.mmap(None, pages * PAGE, 3, 0x22, -1, 0)
    assert a not in (None, 2**64 - 1)
    return a

base = fresh(N)
fd = libc.syscall(323, 0o2000000 | 0o4000)  # userfaultfd(O_CLOEXEC|O_NONBLOCK)
assert fd >= 0, ctypes.get_errno()
print(fd, base, flush=True)
sys.stdin.readline()
os.close(fd)

# What is at each page: None: not mapped; 0: zeros; a number: that, 512 times.
def first(i):
    return 0 if i % 3 == 2 else i + 1
model = {base + i * PAGE: first(i) for i in range(N)}

def check(a):
    got = ctypes.string_at(a, PAGE)
    want = model[a].to_bytes(8, "little") * 512
    if got != want:
        print("page %x has %r, want %d" % (a, got[:16], model[a]), flush=True)
        os._exit(3)

def span():
    a = rng.choice(list(model))
    n = 1
    while n < rng.randrange(1, 40) and a + n * PAGE in model:
        n += 1
    return a, n

def ok(r):
    assert r not in (-1, 2**64 - 1), os.strerror(ctypes.get_errno())

kids = []
for step in range(int(sys.argv[3])):
    what = rng.randrange(12)
    a, n = span()
    if what < 5:
        for i in range(n):
            check(a + i * PAGE)
    elif what < 7:
        for i in range(n):
            v = rng.randrange(1, 1 << 40)
            ctypes.memmove(a + i * PAGE, v.to_bytes(8, "little") * 512, PAGE)
            model[a + i * PAGE] = v
    elif what == 7:
        ok(libc.madvise(a, n * PAGE, 4))
        for i in range(n):
            model[a + i * PAGE] = 0
    elif what == 8:
        to = fresh(n)
        if libc.mremap(a, n * PAGE, n * PAGE, 3, to) != to:
            # Two mappings: the kernel keeps those apart that have pages missing.
            assert ctypes.get_errno() == errno.EFAULT
            n = 0
        for i in range(n):
            model[to + i * PAGE] = model.pop(a + i * PAGE)
    elif what == 9 and len(model) > N // 2:
        ok(libc.munmap(a, n * PAGE))
        for i in range(n):
            del model[a + i * PAGE]
    elif what == 10 and len(kids) < 6:
        pid = os.fork()
        if pid == 0:
            some = list(model)
            rng.shuffle(some)
            for a in some[: N // 4]:
                check(a)
            os._exit(0)
        kids.append(pid)
    elif what == 11:
        ok(libc.mprotect(a, n * PAGE, 1))
        for i in range(n):
            check(a + i * PAGE)
        ok(libc.mprotect(a, n * PAGE, 3))
crowd = [threading.Thread(target=lambda: [check(a) for a in list(model)]) for _ in range(4)]
[t.start() for t in crowd]
[t.join() for t in crowd]
for pid in kids:
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit(4)
print("fine", flush=True)
