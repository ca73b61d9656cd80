// Descriptors in states that few programs have: namespaces, files of /proc and
// /sys, paths only, every flag of open(2), and epolls of all sorts.
#include "selfcheck.h"
#include <dirent.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>

// ---- nsfd: descriptors of the namespaces in which the tree lives

static const char *ns_names[] = {"mnt", "net", "pid", "uts", "ipc", "user", "cgroup", "time"};

static void nsfd_check(void) {
	recheck();
	for (int i = 0; i < 8; i++) {
		char p[64];
		struct stat a, b;
		snprintf(p, sizeof p, "/proc/self/ns/%s", ns_names[i]);
		SYS(stat(p, &a));
		SYS(fstat(20 + i, &b));
		CHECK(a.st_ino == b.st_ino && a.st_dev == b.st_dev, "fd %d is not the %s namespace of this process", 20 + i, ns_names[i]);
	}
	// It is one, not only a file that looks like it.
	CHECK(SYS(ioctl(21, 0xb703)) == 0x40000000, "kind of the network namespace"); // NS_GET_NSTYPE
}

COMMAND(nsfd) {
	for (int i = 0; i < 8; i++) {
		char p[64];
		snprintf(p, sizeof p, "/proc/self/ns/%s", ns_names[i]);
		at_fd(20 + i, SYS(open(p, O_RDONLY | (i % 2 ? O_CLOEXEC : 0))));
		remember(ns_names[i], 20 + i);
	}
	loop(nsfd_check);
}

// ---- procfd: files of /proc and /sys, own and common ones

static int proc_child, proc_flags[64];

static void begins(const char *what, int fd, const char *want) {
	char b[4096] = {0};
	ssize_t n = SYS(pread(fd, b, sizeof b - 1, 0));
	CHECK(n > 0 && strncmp(b, want, strlen(want)) == 0, "%s begins with %.*s, want %s", what, (int)strcspn(b, "\n"), b, want);
}

static void procfd_check(void) {
	// Inodes of /proc are other ones each time.
	for (int i = 20; i <= 30; i++) {
		int f = SYS(fcntl(i, F_GETFL)) << 1 | SYS(fcntl(i, F_GETFD));
		CHECK(f == proc_flags[i], "flags of fd %d were %o and are %o", i, proc_flags[i], f);
	}
	expect_alive(proc_child);
	char want[64];
	snprintf(want, sizeof want, "%d (", getpid());
	begins("own stat", 20, want);
	snprintf(want, sizeof want, "%d (", proc_child);
	begins("stat of a child", 21, want);
	unsigned char c = 0;
	static volatile uint64_t cell;
	cell = now_ns();
	uint64_t got;
	CHECK(SYS(pread(22, &got, 8, (off_t)(intptr_t)&cell)) == 8 && got == cell, "/proc/self/mem shows %lx, want %lx", got, cell);
	CHECK(SYS(pread(23, &c, 1, 0)) == 1, "/proc/sys");
	begins("hostname", 24, "");
	CHECK(SYS(pread(25, &c, 1, 0)) == 1, "/sys");
	begins("meminfo", 26, "MemTotal");
	CHECK(SYS(lseek(26, 0, SEEK_CUR)) == 100, "position in /proc/meminfo is %ld", lseek(26, 0, SEEK_CUR));
	int fd = SYS(openat(27, "comm", O_RDONLY | O_CLOEXEC));
	begins("comm through a directory", fd, "selfcheck");
	close(fd);
	DIR *d = fdopendir(SYS(dup(28)));
	CHECK(d, "open /proc/self/fd");
	rewinddir(d);
	int n = 0;
	while (readdir(d)) n++;
	closedir(d);
	CHECK(n > 8, "/proc/self/fd has %d entries", n);
	CHECK(SYS(pread(30, &c, 1, 0)) == 1, "name of a thread");
}

COMMAND(procfd) {
	proc_child = child();
	if (proc_child == 0)
		for (;; orphan_check()) nap_ms(50);
	char p[64];
	at_fd(20, SYS(open("/proc/self/stat", O_RDONLY)));
	snprintf(p, sizeof p, "/proc/%d/stat", proc_child);
	at_fd(21, SYS(open(p, O_RDONLY | O_CLOEXEC)));
	at_fd(22, SYS(open("/proc/self/mem", O_RDWR)));
	at_fd(23, SYS(open("/proc/sys/kernel/pid_max", O_RDONLY)));
	at_fd(24, SYS(open("/proc/sys/kernel/hostname", O_RDONLY)));
	at_fd(25, SYS(open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY)));
	at_fd(26, SYS(open("/proc/meminfo", O_RDONLY)));
	SYS(lseek(26, 100, SEEK_SET));
	at_fd(27, SYS(open("/proc/self", O_RDONLY | O_DIRECTORY)));
	at_fd(28, SYS(open("/proc/self/fd", O_RDONLY | O_DIRECTORY)));
	at_fd(29, SYS(open("/proc/self/task", O_RDONLY | O_DIRECTORY)));
	snprintf(p, sizeof p, "/proc/self/task/%d/comm", getpid());
	at_fd(30, SYS(open(p, O_RDONLY)));
	for (int i = 20; i <= 30; i++) proc_flags[i] = SYS(fcntl(i, F_GETFL)) << 1 | SYS(fcntl(i, F_GETFD));
	loop(procfd_check);
	end_child(proc_child);
}

// ---- opath: paths only, of files of every type

static struct stat opath_was[64];

static void opath_check(void) {
	recheck();
	for (int i = 20; i <= 28; i++) {
		struct stat st;
		SYS(fstat(i, &st));
		CHECK((i == 28 || st.st_ino == opath_was[i].st_ino) && st.st_mode == opath_was[i].st_mode, "path fd %d is another file", i);
		char c;
		CHECK(read(i, &c, 1) < 0 && errno == EBADF, "path fd %d can be read", i);
	}
	char b[32] = {0};
	CHECK(readlinkat(23, "", b, sizeof b - 1) == 4 && strcmp(b, "file") == 0, "symlink leads to %s", b);
	close(SYS(openat(21, "inside", O_RDONLY | O_CLOEXEC)));
}

COMMAND(opath) {
	close(SYS(open(path_of("file"), O_CREAT | O_RDWR | O_CLOEXEC, 0600)));
	SYS(mkdir(path_of("d"), 0700));
	close(SYS(open(path_of("d/inside"), O_CREAT | O_RDWR | O_CLOEXEC, 0600)));
	SYS(mkfifo(path_of("fifo"), 0600));
	SYS(symlink("file", path_of("link")));
	int s = SYS(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	SYS(mknod(path_of("sock"), S_IFSOCK | 0600, 0));
	close(s);
	const char *names[] = {"file", "d", "fifo", "link", "sock"};
	for (int i = 0; i < 5; i++) at_fd(20 + i, SYS(open(path_of(names[i]), O_PATH | O_NOFOLLOW | (i % 2 ? O_CLOEXEC : 0))));
	at_fd(25, SYS(open("/dev/null", O_PATH)));
	at_fd(26, SYS(open(path_of("file"), O_PATH)));
	at_fd(27, SYS(open("/", O_PATH | O_DIRECTORY)));
	at_fd(28, SYS(open("/proc/self/status", O_PATH)));
	for (int i = 20; i <= 28; i++) {
		SYS(fstat(i, &opath_was[i]));
		if (i != 28) remember("path", i); // an inode of /proc is another one each time
	}
	loop(opath_check);
}

// ---- openflags: every flag that stays with an open file, and hints

#ifndef F_SET_RW_HINT
#define F_GET_RW_HINT 1035
#define F_SET_RW_HINT 1036
#endif

static volatile sig_atomic_t async_signals;
static int async_fd, async_code;

static void on_async(int sig, siginfo_t *si, void *ctx) {
	(void)sig, (void)ctx;
	async_signals++;
	async_fd = si->si_fd;
	async_code = si->si_code;
}

static void openflags_check(void) {
	recheck();
	void *b = NULL;
	CHECK(posix_memalign(&b, 4096, 4096) == 0, "memory");
	CHECK(SYS(pread(20, b, 4096, 0)) == 4096, "O_DIRECT: read");
	CHECK(((char *)b)[17] == 17, "O_DIRECT: wrong byte");
	free(b);
	uint64_t hint = 0;
	SYS(fcntl(25, F_GET_RW_HINT, &hint));
	CHECK(hint == 2, "write hint of a deleted file is %lu", hint);
	sig_atomic_t before = async_signals;
	CHECK(SYS(write(31, "x", 1)) == 1, "write");
	for (int i = 0; i < 200 && async_signals == before; i++) nap_ms(1);
	CHECK(async_signals > before, "no signal for O_ASYNC");
	CHECK(async_fd == 30 && async_code == POLL_IN, "signal for fd %d with code %d, want 30 and %d", async_fd, async_code, POLL_IN);
	char c;
	CHECK(SYS(read(30, &c, 1)) == 1, "read");
}

COMMAND(openflags) {
	char *f = path_of("data"), page[4096];
	for (int i = 0; i < 4096; i++) page[i] = i;
	int fd = SYS(open(f, O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	CHECK(SYS(write(fd, page, sizeof page)) == sizeof page, "write");
	close(fd);
	at_fd(20, SYS(open(f, O_RDONLY | O_DIRECT)));
	at_fd(21, SYS(open(f, O_RDWR | O_SYNC)));
	at_fd(22, SYS(open(f, O_WRONLY | O_DSYNC | O_APPEND)));
	at_fd(23, SYS(open(f, O_RDONLY | O_NOATIME | O_NONBLOCK)));
	at_fd(24, SYS(open(f, O_RDONLY | O_LARGEFILE | O_NOFOLLOW)));
	at_fd(25, SYS(open(path_of("hinted"), O_RDWR | O_CREAT, 0644)));
	SYS(unlink(path_of("hinted")));
	uint64_t hint = 2; // RWH_WRITE_LIFE_SHORT
	SYS(fcntl(25, F_SET_RW_HINT, &hint));
	at_fd(26, SYS(open(f, 3))); // access mode 3: ioctl(2) only
	int p[2];
	SYS(pipe2(p, O_NONBLOCK));
	at_fd(30, p[0]);
	at_fd(31, p[1]);
	struct sigaction sa = {.sa_sigaction = on_async, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGRTMIN + 4, &sa, NULL);
	SYS(fcntl(30, F_SETSIG, SIGRTMIN + 4));
	struct f_owner_ex own = {F_OWNER_TID, gettid()};
	SYS(fcntl(30, F_SETOWN_EX, &own));
	SYS(fcntl(30, F_SETFL, O_NONBLOCK | O_ASYNC));
	for (int i = 20; i <= 26; i++) remember("file with flags", i);
	remember("pipe with signals", 30);
	remember("pipe", 31);
	loop(openflags_check);
}

// ---- epollmore: what an epoll can watch and how

static int em, em_deep[4], em_sock[2];
static pid_t em_child;

static unsigned em_events(int ep) {
	struct epoll_event e[32];
	int n = SYS(epoll_wait(ep, e, 32, 0));
	unsigned got = 0;
	for (int i = 0; i < n; i++) got |= 1u << e[i].data.u64;
	return got;
}

static void em_add(int ep, int fd, uint32_t events, uint64_t data) {
	struct epoll_event e = {.events = events, .data.u64 = data};
	SYS(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}

static char em_list[4096];

static void em_targets(char *to, size_t size) {
	char path[64], line[512];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", em);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s", path);
	unsigned ev[32] = {0}, fds[32] = {0};
	while (fgets(line, sizeof line, f)) {
		unsigned fd, events;
		unsigned long data;
		if (sscanf(line, "tfd: %u events: %x data: %lx", &fd, &events, &data) == 3 && data < 32) ev[data] = events, fds[data] = fd;
	}
	fclose(f);
	size_t n = 0;
	for (int i = 0; i < 32; i++) n += snprintf(to + n, size - n, "%x:%u ", ev[i], fds[i]);
}

static void epollmore_check(void) {
	static int turn;
	recheck();
	expect_alive(em_child);
	char now[4096];
	em_targets(now, sizeof now);
	CHECK(strcmp(now, em_list) == 0, "the epoll watches %s, watched %s", now, em_list);
	const unsigned edge = 1u << 9; // may be told once more
	CHECK((em_events(em) & ~edge) == 0, "idle: events %x", em_events(em));
	uint64_t one = 1, v;
	// A file that was added as a number that now means another file.
	CHECK(SYS(write(41, "x", 1)) == 1, "write");
	CHECK((em_events(em) & ~edge) == 1u << 1, "the file of a closed number: events %x", em_events(em));
	CHECK(SYS(read(42, &v, 1)) == 1, "read");
	// The number itself is an eventfd that nobody watches.
	CHECK(SYS(write(40, &one, 8)) == 8, "write");
	CHECK((em_events(em) & ~edge) == 0, "a number that was used again: events %x", em_events(em));
	CHECK(SYS(read(40, &v, 8)) == 8, "read");
	CHECK(SYS(write(43, &one, 8)) == 8, "write");
	CHECK((em_events(em) & ~edge) == (1u << 2 | 1u << 8), "EPOLLEXCLUSIVE and depth: events %x", em_events(em));
	CHECK(SYS(read(43, &v, 8)) == 8, "read");
	CHECK(kill(getpid(), SIGUSR2) == 0, "kill");
	CHECK((em_events(em) & ~edge) == 1u << 3, "signalfd: events %x", em_events(em));
	struct signalfd_siginfo si;
	CHECK(SYS(read(44, &si, sizeof si)) == sizeof si, "read");
	CHECK(SYS(send(em_sock[1], "x", 1, 0)) == 1, "send");
	CHECK((em_events(em) & ~edge) == 1u << 4, "socket: events %x", em_events(em));
	CHECK(SYS(recv(em_sock[0], &v, 1, 0)) == 1, "recv");
	struct itimerspec is = {{0, 0}, {0, 1}};
	SYS(timerfd_settime(45, 0, &is, NULL));
	nap_ms(1);
	CHECK((em_events(em) & ~edge) == 1u << 5, "timerfd: events %x", em_events(em));
	CHECK(SYS(read(45, &v, 8)) == 8, "read");
	CHECK(SYS(write(47, &one, 8)) == 8, "write");
	CHECK(em_events(em) & edge, "an edge is not told");
	turn++;
}

COMMAND(epollmore) {
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGUSR2);
	sigprocmask(SIG_BLOCK, &s, NULL);
	em = at_fd(20, SYS(epoll_create1(EPOLL_CLOEXEC)));
	for (int i = 0; i < 4; i++) em_deep[i] = at_fd(21 + i, SYS(epoll_create1(0)));
	int p[2];
	SYS(pipe2(p, O_NONBLOCK));
	at_fd(40, p[0]);
	at_fd(41, p[1]);
	em_add(em, 40, EPOLLIN, 1);
	SYS(dup2(40, 42));
	close(40);
	at_fd(40, SYS(eventfd(0, EFD_NONBLOCK)));
	at_fd(43, SYS(eventfd(0, EFD_NONBLOCK)));
	em_add(em, 43, EPOLLIN | EPOLLEXCLUSIVE | EPOLLWAKEUP, 2);
	at_fd(44, SYS(signalfd(-1, &s, SFD_NONBLOCK)));
	em_add(em, 44, EPOLLIN, 3);
	SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, em_sock));
	em_add(em, em_sock[0], EPOLLIN | EPOLLRDHUP, 4);
	at_fd(45, SYS(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)));
	em_add(em, 45, EPOLLIN, 5);
	SYS(mkfifo(path_of("fifo"), 0600));
	at_fd(46, SYS(open(path_of("fifo"), O_RDWR | O_NONBLOCK)));
	em_add(em, 46, EPOLLIN | EPOLLPRI, 6);
	em_child = child();
	if (em_child == 0) {
		// It has the epoll, but none of what is watched.
		for (int i = 40; i <= 47; i++) close(i);
		close(em_sock[0]);
		close(em_sock[1]);
		for (;; orphan_check()) nap_ms(20);
	}
	at_fd(48, SYS(pidfd_open(em_child, 0)));
	em_add(em, 48, EPOLLIN, 7);
	em_add(em_deep[3], 43, EPOLLIN, 0);
	for (int i = 3; i > 0; i--) em_add(em_deep[i - 1], em_deep[i], EPOLLIN, 0);
	em_add(em, em_deep[0], EPOLLIN, 8);
	at_fd(47, SYS(eventfd(1, EFD_NONBLOCK)));
	em_add(em, 47, EPOLLIN | EPOLLET, 9);
	CHECK(em_events(em) == 1u << 9, "set up");
	em_targets(em_list, sizeof em_list);
	for (int i = 20; i <= 24; i++) remember("epoll", i);
	loop(epollmore_check);
	end_child(em_child);
	CHECK(em_events(em) & 1u << 7, "the end of the child is not told through its pidfd");
}

// ---- memfdmore: seals of every sort, and programs in memory

static unsigned char *seal_map;
static int sealed[] = {F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL, 0x20 /* F_SEAL_EXEC */};

static void memfdmore_check(void) {
	recheck();
	char b[16];
	for (int i = 0; i < 4; i++) {
		CHECK(SYS(fcntl(20 + i, F_GET_SEALS)) == sealed[i], "memfd %d has seals %x, had %x", i, fcntl(20 + i, F_GET_SEALS), sealed[i]);
		CHECK(SYS(pread(20 + i, b, 8, 4090)) == 8 && memcmp(b, "contents", 8) == 0, "memfd %d: wrong bytes", i);
		ssize_t n = pwrite(20 + i, "x", 1, 0);
		CHECK((n == 1) == (i == 3), "memfd %d: write gave %zd", i, n);
	}
	// Made before the seal, so that it still can be written.
	seal_map[1]++;
	SYS(pread(21, b, 2, 0));
	CHECK((unsigned char)b[1] == seal_map[1], "the mapping and the memfd differ");
	pid_t pid = SYS(fork());
	if (pid == 0) {
		char *argv[] = {"true", NULL}, *envp[] = {NULL};
		fexecve(24, argv, envp);
		_exit(99);
	}
	int st;
	SYS(waitpid(pid, &st, 0));
	CHECK(WIFEXITED(st) && WEXITSTATUS(st) == 0, "a program in a memfd ended with %x", st);
	CHECK(fchmod(23, 0777) < 0 && errno == EPERM, "a memfd sealed against execution can be made executable");
}

COMMAND(memfdmore) {
	for (int i = 0; i < 4; i++) {
		at_fd(20 + i, SYS(memfd_create("sealed", MFD_ALLOW_SEALING)));
		CHECK(SYS(pwrite(20 + i, "contents", 8, 4090)) == 8, "write");
		if (i == 1) seal_map = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 21, 0));
		if (i == 3) SYS(fchmod(23, 0600));
		SYS(fcntl(20 + i, F_ADD_SEALS, sealed[i]));
	}
	at_fd(24, SYS(memfd_create("program", MFD_CLOEXEC)));
	int fd = SYS(open("/bin/true", O_RDONLY | O_CLOEXEC));
	char b[65536];
	for (ssize_t n; (n = SYS(read(fd, b, sizeof b))) > 0;) CHECK(SYS(write(24, b, n)) == n, "write");
	close(fd);
	// Open for writing it could not be executed.
	char p[64];
	snprintf(p, sizeof p, "/proc/self/fd/%d", 24);
	fd = SYS(open(p, O_RDONLY | O_CLOEXEC));
	SYS(dup3(fd, 24, O_CLOEXEC));
	close(fd);
	for (int i = 20; i <= 24; i++) remember("memfd", i);
	loop(memfdmore_check);
}

// ---- timerfdmore: timers that the clock cancels, and expiries nobody has read

static long tfd_info(int fd, const char *key, int base) {
	char path[64], line[256];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s", path);
	long v = -1;
	while (fgets(line, sizeof line, f)) if (strncmp(line, key, strlen(key)) == 0) v = strtol(line + strlen(key), NULL, base);
	fclose(f);
	return v;
}

static long unread;

static void timerfdmore_check(void) {
	recheck();
	struct itimerspec is;
	CHECK(tfd_info(20, "settime flags:", 8) == (TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET), "flags are %lo", tfd_info(20, "settime flags:", 8));
	SYS(timerfd_gettime(20, &is));
	CHECK(is.it_value.tv_sec > 3000 && is.it_interval.tv_sec == 60, "%ld s left, interval %ld s", is.it_value.tv_sec, is.it_interval.tv_sec);
	SYS(timerfd_gettime(21, &is)); // counts what has expired
	long now = tfd_info(21, "ticks:", 10);
	CHECK(now >= unread, "%ld expiries were unread, now %ld", unread, now);
	unread = now;
	CHECK(tfd_info(22, "ticks:", 10) == 1 && tfd_info(22, "clockid:", 10) == CLOCK_BOOTTIME, "%ld expiries of a one-shot timer", tfd_info(22, "ticks:", 10));
	SYS(timerfd_gettime(23, &is));
	CHECK(is.it_value.tv_sec > 1000000000, "a far timer has %ld s left", is.it_value.tv_sec);
	SYS(timerfd_gettime(24, &is));
	CHECK(is.it_interval.tv_nsec == 3000000, "interval is %ld ns", is.it_interval.tv_nsec);
}

COMMAND(timerfdmore) {
	at_fd(20, SYS(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK)));
	struct itimerspec is = {{60, 0}, {time(NULL) + 7200, 5}};
	SYS(timerfd_settime(20, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &is, NULL));
	at_fd(21, SYS(timerfd_create(CLOCK_MONOTONIC, 0)));
	is = (struct itimerspec){{0, 2000000}, {0, 1}};
	SYS(timerfd_settime(21, 0, &is, NULL));
	at_fd(22, SYS(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC)));
	is = (struct itimerspec){{0, 0}, {0, 1}};
	SYS(timerfd_settime(22, 0, &is, NULL));
	at_fd(23, SYS(timerfd_create(CLOCK_MONOTONIC, 0)));
	is = (struct itimerspec){{0, 0}, {2000000000, 0}};
	SYS(timerfd_settime(23, 0, &is, NULL));
	at_fd(24, SYS(timerfd_create(CLOCK_MONOTONIC, 0)));
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	is = (struct itimerspec){{0, 3000000}, {t.tv_sec + 5, 0}};
	SYS(timerfd_settime(24, TFD_TIMER_ABSTIME, &is, NULL));
	for (int i = 20; i <= 24; i++) remember("timerfd", i);
	nap_ms(5);
	loop(timerfdmore_check);
	uint64_t n;
	CHECK(SYS(read(21, &n, 8)) == 8 && (long)n >= unread, "%lu expiries, want %ld", n, unread);
}

// ---- cloexec: one description, other flags in each process

static pid_t clo_child;

static void cloexec_check(void) {
	recheck();
	expect_alive(clo_child);
	CHECK(SYS(fcntl(20, F_GETFD)) == FD_CLOEXEC && SYS(fcntl(21, F_GETFD)) == 0 && SYS(fcntl(22, F_GETFD)) == FD_CLOEXEC, "close-on-exec changed");
	uint64_t v = (uint64_t)-2, got;
	CHECK(SYS(read(23, &got, 8)) == 8 && got == v, "a full eventfd holds %lu", got);
	CHECK(SYS(write(23, &v, 8)) == 8, "write");
	uint64_t one = 1;
	CHECK(write(23, &one, 8) < 0 && errno == EAGAIN, "a full eventfd can be written");
}

COMMAND(cloexec) {
	at_fd(20, SYS(open(path_of("f"), O_RDWR | O_CREAT | O_CLOEXEC, 0600)));
	SYS(dup2(20, 21));
	at_fd(22, SYS(eventfd(3, EFD_CLOEXEC)));
	at_fd(23, SYS(eventfd(0, EFD_NONBLOCK)));
	uint64_t v = (uint64_t)-2;
	CHECK(SYS(write(23, &v, 8)) == 8, "write");
	clo_child = child();
	if (clo_child == 0) {
		SYS(fcntl(20, F_SETFD, 0));
		SYS(fcntl(21, F_SETFD, FD_CLOEXEC));
		SYS(fcntl(22, F_SETFD, 0));
		for (off_t at = 0;; orphan_check()) {
			CHECK(SYS(fcntl(20, F_GETFD)) == 0 && SYS(fcntl(21, F_GETFD)) == FD_CLOEXEC && SYS(fcntl(22, F_GETFD)) == 0, "close-on-exec changed in the child");
			at = (at + 1) % 1000;
			SYS(lseek(20, at, SEEK_SET));
			CHECK(SYS(lseek(21, 0, SEEK_CUR)) == at, "they no longer share their position");
			nap_ms(5);
		}
	}
	for (int i = 20; i <= 23; i++) remember("shared file", i);
	loop(cloexec_check);
	end_child(clo_child);
}

// ---- exegone: a program whose file was replaced, as by an upgrade

static void exegone_check(void) {
	recheck();
	char b[4096] = {0};
	ssize_t n = SYS(readlink("/proc/self/exe", b, sizeof b - 1));
	CHECK(n > 10 && strcmp(b + n - 10, " (deleted)") == 0, "the program is %s", b);
	int fd = SYS(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
	CHECK(SYS(read(fd, b, 4)) == 4 && memcmp(b, "\177ELF", 4) == 0, "the program begins with %.4s", b);
	close(fd);
}

COMMAND(exegone) {
	char *exe = path_of("exe");
	if (arg_count == 0) {
		int from = SYS(open("/proc/self/exe", O_RDONLY | O_CLOEXEC)), to = SYS(open(exe, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755));
		char b[65536];
		for (ssize_t n; (n = SYS(read(from, b, sizeof b))) > 0;) CHECK(SYS(write(to, b, n)) == n, "write");
		close(to);
		char *argv[] = {"selfcheck", "exegone", (char *)prefix, "again", NULL};
		SYS(execv(exe, argv));
	}
	SYS(unlink(exe));
	close(SYS(open(exe, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755))); // the new version
	loop(exegone_check);
}

// ---- evasive: a node of /dev/null that a mount hides

static void evasive_check(void) {
	recheck();
	char b[4];
	CHECK(SYS(write(20, "x", 1)) == 1 && SYS(read(20, b, 1)) == 0, "it is not /dev/null");
	CHECK(write(21, "<7>selfcheck", 0) >= 0 || errno == EINVAL, "/dev/kmsg: %s", strerror(errno));
}

COMMAND(evasive) {
	SYS(mkdir(path_of("dev"), 0755));
	SYS(mknod(path_of("dev/null"), S_IFCHR | 0666, makedev(1, 3)));
	SYS(chmod(path_of("dev/null"), 0666));
	at_fd(20, SYS(open(path_of("dev/null"), O_RDWR)));
	SYS(mount("none", path_of("dev"), "tmpfs", 0, "size=16k"));
	at_fd(21, SYS(open("/dev/kmsg", O_WRONLY)));
	remember("/dev/kmsg", 21);
	loop(evasive_check);
	SYS(umount2(path_of("dev"), MNT_DETACH));
}
