// locks: file locks of every kind and leases. Whether one is still held shows
// from outside only: a child that holds none of them probes.
#include "selfcheck.h"
#include <sys/file.h>
#include <sys/wait.h>

static pid_t holder, posix_owner;

// range asks, through a description of its own, who is in the way.
static struct flock range(int fd, int type, off_t start, off_t len) {
	struct flock l = {.l_type = type, .l_start = start, .l_len = len};
	SYS(fcntl(fd, F_OFD_GETLK, &l));
	return l;
}

static void want(int fd, const char *what, int type, off_t start, off_t len, int kind, off_t first, off_t n, pid_t pid) {
	struct flock l = range(fd, type, start, len);
	CHECK(l.l_type == kind, "%s: a lock of type %d is in the way, want %d", what, l.l_type, kind);
	if (kind == F_UNLCK) return;
	CHECK(l.l_start == first && l.l_len == n, "%s: bytes %ld, %ld of them, want %ld, %ld", what, l.l_start, l.l_len, first, n);
	CHECK(l.l_pid == pid, "%s: held by %d, want %d", what, l.l_pid, pid);
}

static int fresh(const char *name) { return SYS(open(path_of(name), O_RDWR | O_CLOEXEC)); }

// No descriptor of the POSIX-locked file may be opened and closed by its owner,
// or the locks are gone: they are looked at by the child, and the other way round.
static void probe(void) {
	int fd = fresh("posix");
	want(fd, "write lock", F_RDLCK, 0, 10, F_WRLCK, 0, 10, posix_owner);
	want(fd, "gap", F_WRLCK, 10, 10, F_UNLCK, 0, 0, 0);
	want(fd, "read lock against a reader", F_RDLCK, 20, 10, F_UNLCK, 0, 0, 0);
	want(fd, "read lock against a writer", F_WRLCK, 15, 10, F_RDLCK, 20, 30, posix_owner);
	want(fd, "gap", F_WRLCK, 50, 10, F_UNLCK, 0, 0, 0);
	want(fd, "lock to the end", F_WRLCK, 1L << 40, 1, F_WRLCK, 100, 0, posix_owner);
	close(fd);
	fd = fresh("ofd");
	want(fd, "OFD lock", F_RDLCK, 0, 0, F_WRLCK, 5, 3, -1);
	close(fd);
	fd = fresh("flock");
	CHECK(flock(fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK, "a file locked by flock can be locked");
	close(fd);
	fd = fresh("shared");
	CHECK(flock(fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK, "a file with a shared flock can be locked");
	SYS(flock(fd, LOCK_SH | LOCK_NB));
	close(fd);
}

static void locks_check(void) {
	recheck();
	expect_alive(holder);
	// Both still have what they hold: asking for it again changes nothing.
	SYS(flock(23, LOCK_EX | LOCK_NB));
	CHECK(SYS(fcntl(25, F_GETLEASE)) == F_WRLCK, "the write lease is %d", fcntl(25, F_GETLEASE));
	CHECK(SYS(fcntl(26, F_GETLEASE)) == F_RDLCK, "the read lease is %d", fcntl(26, F_GETLEASE));
	CHECK(SYS(fcntl(27, F_GETLEASE)) == F_UNLCK, "a file without lease has one of type %d", fcntl(27, F_GETLEASE));
}

static int lockfile(int at, const char *name, int flags) {
	return at_fd(at, SYS(open(path_of(name), flags | O_CREAT, 0644)));
}

// The unrelated process locks bytes that nobody of the tree has, of the same
// file. It is no part of the tree: its locks must neither travel nor disturb.
static void bystander(void) {
	int up[2];
	char c;
	SYS(pipe(up));
	pid_t mid = SYS(fork());
	if (mid == 0) {
		if (fork() != 0) _exit(0);
		// Its parent is gone: it belongs to init, in a session of its own.
		setsid();
		signal(SIGTERM, SIG_DFL);
		int w = up[1];
		for (int i = 3; i < 100; i++) if (i != w) close(i);
		int fd = SYS(open(path_of("posix"), O_RDWR));
		struct flock l = {.l_type = F_WRLCK, .l_start = 60, .l_len = 5};
		SYS(fcntl(fd, F_SETLK, &l));
		l = (struct flock){.l_type = F_RDLCK, .l_start = 65, .l_len = 5};
		int fd2 = SYS(open(path_of("posix"), O_RDWR));
		SYS(fcntl(fd2, F_OFD_SETLK, &l));
		int fd3 = SYS(open(path_of("shared"), O_RDWR));
		SYS(flock(fd3, LOCK_SH));
		SYS(write(w, "x", 1));
		close(w);
		// It ends after the tree, whose root is away now and then, and says so.
		while (access(path_of("ok"), F_OK) && access(path_of("fail"), F_OK)) usleep(10000);
		_exit(0);
	}
	close(up[1]);
	CHECK(read_all(up[0], &c, 1) == 1, "the bystander did not get ready");
	close(up[0]);
	SYS(waitpid(mid, NULL, 0));
}

COMMAND(locks) {
	lockfile(20, "posix", O_RDWR);
	lockfile(21, "ofd", O_RDWR | O_CLOEXEC);
	lockfile(23, "flock", O_RDONLY);
	lockfile(24, "shared", O_WRONLY);
	lockfile(25, "leased", O_RDONLY);
	close(lockfile(26, "read", O_WRONLY));
	lockfile(26, "read", O_RDONLY);
	lockfile(27, "plain", O_RDWR);
	if (arg_count == 0) bystander();
	signal(SIGRTMIN + 3, SIG_IGN);
	struct flock l = {.l_type = F_WRLCK, .l_len = 10};
	SYS(fcntl(20, F_SETLK, &l));
	l = (struct flock){.l_type = F_RDLCK, .l_start = 20, .l_len = 30};
	SYS(fcntl(20, F_SETLK, &l));
	l = (struct flock){.l_type = F_WRLCK, .l_start = 100};
	SYS(fcntl(20, F_SETLK, &l));
	SYS(dup3(20, 28, O_CLOEXEC)); // shows the same locks
	l = (struct flock){.l_type = F_WRLCK, .l_start = 5, .l_len = 3};
	SYS(fcntl(21, F_OFD_SETLK, &l));
	SYS(flock(23, LOCK_EX));
	SYS(flock(24, LOCK_SH));
	SYS(fcntl(25, F_SETSIG, SIGRTMIN + 3));
	SYS(fcntl(25, F_SETLEASE, F_WRLCK));
	SYS(fcntl(26, F_SETLEASE, F_RDLCK));
	for (int i = 20; i <= 28; i++)
		if (i != 22) remember("locked file", i);
	posix_owner = getpid();
	holder = child();
	if (holder == 0)
		for (;; orphan_check()) {
			probe();
			nap_ms(5);
		}
	loop(locks_check);
	end_child(holder);
}
