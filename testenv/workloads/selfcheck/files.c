// Descriptors of every kind but sockets.
#include "selfcheck.h"
#include <dirent.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>

// ---- what is true of every descriptor

static struct known {
	const char *name;
	int fd, getfl, getfd, sig;
	struct stat st;
	struct f_owner_ex own;
} known[64];
static int nknown;

static struct known look(const char *name, int fd) {
	struct known k = {.name = name, .fd = fd};
	// O_TMPFILE only says how the file was made; what is made anew may be made
	// in another way. It includes O_DIRECTORY.
	k.getfl = SYS(fcntl(fd, F_GETFL)) & ~O_TMPFILE;
	k.getfd = SYS(fcntl(fd, F_GETFD));
	SYS(fstat(fd, &k.st));
	if (!(k.getfl & O_PATH)) {
		k.sig = SYS(fcntl(fd, F_GETSIG));
		SYS(fcntl(fd, F_GETOWN_EX, &k.own));
	}
	return k;
}

void remember(const char *name, int fd) { known[nknown++] = look(name, fd); }

void recheck(void) {
	for (int i = 0; i < nknown; i++) {
		struct known *a = &known[i], b = look(a->name, a->fd);
		CHECK(a->getfl == b.getfl, "%s (fd %d): flags were %o and are %o", a->name, a->fd, a->getfl, b.getfl);
		CHECK(a->getfd == b.getfd, "%s (fd %d): close-on-exec was %d and is %d", a->name, a->fd, a->getfd, b.getfd);
		CHECK(a->sig == b.sig, "%s (fd %d): signal was %d and is %d", a->name, a->fd, a->sig, b.sig);
		CHECK(a->own.type == b.own.type && a->own.pid == b.own.pid, "%s (fd %d): owner was %d and is %d", a->name, a->fd, a->own.pid, b.own.pid);
		CHECK(a->st.st_mode == b.st.st_mode, "%s (fd %d): mode was %o and is %o", a->name, a->fd, a->st.st_mode, b.st.st_mode);
		// Inodes of anonymous objects and of deleted files are new after a move.
		mode_t t = a->st.st_mode & S_IFMT;
		if (a->st.st_nlink > 0 && (t == S_IFREG || t == S_IFDIR || t == S_IFCHR) && b.st.st_nlink > 0)
			CHECK(a->st.st_ino == b.st.st_ino, "%s (fd %d): another inode", a->name, a->fd);
		CHECK(a->st.st_rdev == b.st.st_rdev, "%s (fd %d): another device", a->name, a->fd);
	}
}

int at_fd(int want, int fd) {
	if (fd == want) return fd;
	bool cloexec = SYS(fcntl(fd, F_GETFD)) & FD_CLOEXEC;
	SYS(dup3(fd, want, cloexec ? O_CLOEXEC : 0));
	close(fd);
	return want;
}

ssize_t read_all(int fd, void *p, size_t n) {
	size_t done = 0;
	while (done < n) {
		ssize_t r = read(fd, (char *)p + done, n - done);
		if (r < 0 && errno == EINTR && stopping) continue;
		if (r < 0) return -1;
		if (r == 0) break;
		done += r;
	}
	return done;
}

static void write_pattern(int fd, size_t n, uint64_t seed) {
	unsigned char *b = malloc(n);
	for (size_t i = 0; i < n; i++) b[i] = pattern(seed, i);
	ssize_t w = write(fd, b, n);
	CHECK(w == (ssize_t)n, "write %zu bytes: %zd, %s", n, w, strerror(errno));
	free(b);
}

static void expect_pattern(const char *name, int fd, size_t n, uint64_t seed, size_t from) {
	unsigned char *b = malloc(n);
	ssize_t r = read_all(fd, b, n);
	CHECK(r == (ssize_t)n, "%s: read %zd of %zu bytes: %s", name, r, n, r < 0 ? strerror(errno) : "short");
	for (size_t i = 0; i < n; i++)
		CHECK(b[i] == pattern(seed, from + i), "%s: byte %zu is %02x, want %02x", name, from + i, b[i], pattern(seed, from + i));
	free(b);
}

static int queued(int fd) {
	int n;
	SYS(ioctl(fd, FIONREAD, &n));
	return n;
}

static int poll_now(int fd, short events) {
	struct pollfd p = {fd, events, 0};
	SYS(poll(&p, 1, 0));
	return p.revents;
}

// ---- files: regular files and directories

enum { SIZE = 10000 };
static off_t pos_a = 1234, pos_b = 77;
static uint64_t appended;
static struct { pthread_mutex_t m; volatile uint64_t taken; } *common;
static pid_t files_child;
static char fd_list[4096];
static off_t dir_pos;

static void list_fds(char *out, size_t size) {
	DIR *d = opendir("/proc/self/fd");
	CHECK(d, "open /proc/self/fd: %s", strerror(errno));
	bool have[512] = {false};
	for (struct dirent *e; (e = readdir(d));)
		if (e->d_name[0] != '.' && atoi(e->d_name) != dirfd(d) && atoi(e->d_name) < 512) have[atoi(e->d_name)] = true;
	closedir(d);
	size_t n = 0;
	for (int i = 0; i < 512; i++) if (have[i]) n += snprintf(out + n, size - n, "%d ", i);
}

static void take_one(void) {
	pthread_mutex_lock(&common->m);
	unsigned char c;
	CHECK(SYS(lseek(24, 0, SEEK_CUR)) == (off_t)(common->taken % SIZE), "offset shared with a child is %ld after %lu reads", lseek(24, 0, SEEK_CUR), common->taken);
	CHECK(SYS(read(24, &c, 1)) == 1 && c == pattern(1, common->taken % SIZE), "file shared with a child: wrong byte");
	common->taken++;
	if (common->taken % SIZE == 0) SYS(lseek(24, 0, SEEK_SET));
	pthread_mutex_unlock(&common->m);
}

static void files_check(void) {
	recheck();
	CHECK(SYS(lseek(20, 0, SEEK_CUR)) == pos_a, "offset was %ld and is %ld", pos_a, lseek(20, 0, SEEK_CUR));
	CHECK(SYS(lseek(21, 0, SEEK_CUR)) == pos_a, "a duplicated descriptor no longer shares the offset");
	expect_pattern("file", pos_a % 2 ? 20 : 21, 7, 1, pos_a);
	pos_a += 7;
	CHECK(SYS(lseek(20, 0, SEEK_CUR)) == pos_a, "a duplicated descriptor no longer shares the offset");
	if (pos_a > SIZE - 7) SYS(lseek(21, pos_a = 0, SEEK_SET));
	CHECK(SYS(lseek(22, 0, SEEK_CUR)) == pos_b, "offset of the second open was %ld and is %ld", pos_b, lseek(22, 0, SEEK_CUR));
	expect_pattern("second open", 22, 3, 1, pos_b);
	if ((pos_b += 3) > SIZE - 3) SYS(lseek(22, pos_b = 0, SEEK_SET));
	CHECK(SYS(write(23, "x", 1)) == 1, "append");
	appended++;
	struct stat st;
	SYS(fstat(23, &st));
	CHECK(st.st_size == (off_t)appended, "appended %lu bytes, the file has %ld", appended, st.st_size);
	take_one();
	CHECK(SYS(lseek(25, 0, SEEK_CUR)) == dir_pos, "offset of the directory was %ld and is %ld", dir_pos, lseek(25, 0, SEEK_CUR));
	int fd = SYS(openat(25, "inside", O_RDONLY | O_CLOEXEC));
	close(fd);
	CHECK(SYS(lseek(27, 0, SEEK_CUR)) == 50000, "offset beyond the end is %ld", lseek(27, 0, SEEK_CUR));
	char c;
	CHECK(read(27, &c, 1) == 0, "read beyond the end");
	CHECK(read(26, &c, 1) < 0 && errno == EBADF, "an O_PATH descriptor can be read");
	CHECK(write(28, "x", 1) < 0 && errno == EBADF, "a read-only descriptor can be written");
	expect_alive(files_child);
	char now[4096] = {0};
	list_fds(now, sizeof now);
	CHECK(strcmp(now, fd_list) == 0, "open descriptors were %s and are %s", fd_list, now);
}

COMMAND(files) {
	char *data = path_of("data"), *dir = path_of("dir");
	int fd = SYS(open(data, O_RDWR | O_CREAT | O_TRUNC, 0640));
	write_pattern(fd, SIZE, 1);
	SYS(lseek(fd, pos_a, SEEK_SET));
	at_fd(20, fd);
	SYS(dup3(20, 21, O_CLOEXEC));
	at_fd(22, SYS(open(data, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)));
	SYS(lseek(22, pos_b, SEEK_SET));
	at_fd(23, SYS(open(path_of("append"), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_DSYNC, 0600)));
	at_fd(24, SYS(open(data, O_RDONLY)));
	mkdir(dir, 0755);
	close(openat(AT_FDCWD, path_of("dir/inside"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
	at_fd(25, SYS(open(dir, O_RDONLY | O_DIRECTORY)));
	char entries[64];
	SYS(syscall(SYS_getdents64, 25, entries, sizeof entries));
	dir_pos = lseek(25, 0, SEEK_CUR);
	at_fd(26, SYS(open(data, O_PATH | O_CLOEXEC)));
	at_fd(27, SYS(open(data, O_RDWR | O_NOATIME)));
	SYS(lseek(27, 50000, SEEK_SET));
	at_fd(28, SYS(open(data, O_RDONLY | O_SYNC)));
	SYS(dup2(28, 250));
	SYS(fcntl(20, F_SETOWN, getpid()));
	SYS(fcntl(20, F_SETSIG, SIGRTMIN + 1));
	struct f_owner_ex group = {F_OWNER_PGRP, getpgrp()};
	SYS(fcntl(22, F_SETOWN_EX, &group));
	for (int i = 20; i <= 28; i++) remember("file", i);
	remember("file", 250);
	common = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pthread_mutexattr_t a;
	pthread_mutexattr_init(&a);
	pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
	pthread_mutex_init(&common->m, &a);
	files_child = child();
	if (files_child == 0)
		for (;; orphan_check()) {
			take_one();
			nap_ms(7);
		}
	list_fds(fd_list, sizeof fd_list);
	loop(files_check);
	pthread_mutex_lock(&common->m); // the child must not die with it
	end_child(files_child);
}

// ---- chr: character devices

static void chr_check(void) {
	recheck();
	unsigned char b[64];
	CHECK(SYS(write(20, "x", 1)) == 1 && SYS(read(20, b, 1)) == 0, "/dev/null");
	memset(b, 1, sizeof b);
	CHECK(SYS(read(21, b, 64)) == 64, "/dev/zero");
	for (int i = 0; i < 64; i++) CHECK(b[i] == 0, "/dev/zero gave %d", b[i]);
	CHECK(SYS(read(22, b, 64)) == 64, "/dev/urandom");
	int same = 0;
	for (int i = 1; i < 64; i++) same += b[i] == b[0];
	CHECK(same < 60, "/dev/urandom gives the same byte");
	CHECK(write(23, "x", 1) < 0 && errno == ENOSPC, "/dev/full takes bytes");
	CHECK(SYS(read(24, b, 8)) == 8, "/dev/random");
}

COMMAND(chr) {
	static const char *names[] = {"/dev/null", "/dev/zero", "/dev/urandom", "/dev/full", "/dev/random"};
	for (int i = 0; i < 5; i++) {
		at_fd(20 + i, SYS(open(names[i], i == 2 ? O_RDONLY | O_CLOEXEC : O_RDWR)));
		remember(names[i], 20 + i);
	}
	loop(chr_check);
}

// ---- pipe

static int pa[2], pb[2], pc[2], pd[2], pe[2], pf[2], pg[2];
static pid_t pipe_child;
static uint64_t expected;

static void pipe_check(void) {
	recheck();
	CHECK(queued(pa[0]) == 30000, "pipe held 30000 bytes and holds %d", queued(pa[0]));
	CHECK(SYS(fcntl(pa[0], F_GETPIPE_SZ)) == 131072, "size of the pipe is %d", fcntl(pa[0], F_GETPIPE_SZ));
	for (int i = 0; i < 5; i++) {
		uint64_t n;
		CHECK(read_all(pb[0], &n, 8) == 8 && n == expected, "the child sent %lu, want %lu", n, expected);
		expected++;
	}
	CHECK(queued(pc[0]) == 5 + 4096 + 100, "packet pipe holds %d bytes", queued(pc[0]));
	CHECK(poll_now(pd[0], POLLIN) == (POLLIN | POLLHUP), "pipe without writer: poll says %x", poll_now(pd[0], POLLIN));
	CHECK(poll_now(pe[1], POLLOUT) & POLLERR, "pipe without reader: poll says %x", poll_now(pe[1], POLLOUT));
	CHECK(write(pe[1], "x", 1) < 0 && errno == EPIPE, "pipe without reader can be written");
	CHECK(write(pf[1], "x", 1) < 0 && errno == EAGAIN, "a full pipe can be written");
	char c;
	CHECK(read(pg[0], &c, 1) < 0 && errno == EAGAIN, "an empty pipe can be read");
	expect_alive(pipe_child);
}

COMMAND(pipe) {
	signal(SIGPIPE, SIG_IGN);
	SYS(pipe2(pa, 0));
	SYS(fcntl(pa[0], F_SETPIPE_SZ, 131072));
	write_pattern(pa[1], 30000, 2);
	SYS(pipe2(pb, O_CLOEXEC));
	SYS(pipe2(pc, O_DIRECT));
	write_pattern(pc[1], 5, 3);
	write_pattern(pc[1], 4096, 4);
	write_pattern(pc[1], 100, 5);
	SYS(pipe2(pd, O_NONBLOCK));
	write_pattern(pd[1], 10, 6);
	close(pd[1]);
	SYS(pipe2(pe, O_NONBLOCK));
	close(pe[0]);
	SYS(pipe2(pf, O_NONBLOCK));
	write_pattern(pf[1], 65536, 7);
	SYS(pipe2(pg, O_NONBLOCK | O_CLOEXEC));
	pipe_child = child();
	if (pipe_child == 0) {
		close(pb[0]);
		for (uint64_t n = 0;; n++) {
			// Runs ahead until the pipe is full: bytes are under way at any time.
			ssize_t w = write(pb[1], &n, 8);
			if (w < 0 && errno == EPIPE) _exit(0);
			CHECK(w == 8, "write to the parent: %s", strerror(errno));
			if (n % 100 == 0) orphan_check();
		}
	}
	close(pb[1]);
	int all[] = {pa[0], pa[1], pb[0], pc[0], pc[1], pd[0], pe[1], pf[0], pf[1], pg[0], pg[1]};
	for (int i = 0; i < 11; i++) remember("pipe", all[i]);
	loop(pipe_check);
	expect_pattern("pipe", pa[0], 30000, 2, 0);
	char b[8192];
	static const int sizes[] = {5, 4096, 100};
	for (int i = 0; i < 3; i++) {
		ssize_t n = SYS(read(pc[0], b, sizeof b));
		CHECK(n == sizes[i], "packet %d has %zd bytes, want %d", i, n, sizes[i]);
		for (int j = 0; j < n; j++) CHECK((unsigned char)b[j] == pattern(3 + i, j), "packet %d, byte %d", i, j);
	}
	expect_pattern("pipe without writer", pd[0], 10, 6, 0);
	CHECK(read(pd[0], b, 1) == 0, "no end of file after the last byte");
	expect_pattern("full pipe", pf[0], 65536, 7, 0);
	end_child(pipe_child);
	// What the dead child still sent is whole and in order, then comes the end.
	uint64_t n;
	ssize_t r;
	while ((r = read_all(pb[0], &n, 8)) == 8) CHECK(n == expected++, "the child sent %lu", n);
	CHECK(r == 0, "the last record of the child is torn");
}

// ---- fifo

static pid_t fifo_child;

static void fifo_check(void) {
	recheck();
	CHECK(queued(20) == 5000, "fifo held 5000 bytes and holds %d", queued(20));
	for (int i = 0; i < 3; i++) {
		uint64_t n;
		CHECK(read_all(23, &n, 8) == 8 && n == expected, "fifo brought %lu, want %lu", n, expected);
		expected++;
	}
	CHECK(poll_now(24, POLLIN) == 0, "fifo without data: poll says %x", poll_now(24, POLLIN));
	expect_alive(fifo_child);
}

COMMAND(fifo) {
	char *a = path_of("fifo-a"), *b = path_of("fifo-b"), *c = path_of("fifo-c");
	SYS(mkfifo(a, 0600));
	SYS(mkfifo(b, 0600));
	SYS(mkfifo(c, 0600));
	at_fd(20, SYS(open(a, O_RDWR)));
	at_fd(21, SYS(open(a, O_RDONLY | O_NONBLOCK)));
	at_fd(22, SYS(open(a, O_WRONLY | O_CLOEXEC)));
	write_pattern(22, 5000, 8);
	fifo_child = child();
	if (fifo_child == 0) {
		int fd = SYS(open(b, O_WRONLY));
		signal(SIGPIPE, SIG_IGN);
		for (uint64_t n = 0;; n++) {
			ssize_t w = write(fd, &n, 8);
			if (w < 0 && errno == EPIPE) _exit(0);
			CHECK(w == 8, "write to fifo: %s", strerror(errno));
			if (n % 100 == 0) orphan_check();
		}
	}
	at_fd(23, SYS(open(b, O_RDONLY)));
	at_fd(24, SYS(open(c, O_RDWR | O_NONBLOCK))); // both ends by itself: no peer
	for (int i = 20; i <= 24; i++) remember("fifo", i);
	loop(fifo_check);
	expect_pattern("fifo", 21, 5000, 8, 0);
	end_child(fifo_child);
}

// ---- eventfd

static long fdinfo(int fd, const char *key, int base) {
	char path[64], line[256];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s", path);
	long v = -1;
	while (fgets(line, sizeof line, f))
		if (strncmp(line, key, strlen(key)) == 0) v = strtol(line + strlen(key), NULL, base);
	fclose(f);
	return v;
}

static void eventfd_check(void) {
	recheck();
	CHECK(fdinfo(20, "eventfd-count:", 16) == 7, "eventfd held 7 and holds %ld", fdinfo(20, "eventfd-count:", 16));
	CHECK(fdinfo(21, "eventfd-count:", 16) == 3, "semaphore held 3 and holds %ld", fdinfo(21, "eventfd-count:", 16));
	uint64_t v = 5, got;
	CHECK(SYS(write(22, &v, 8)) == 8 && SYS(read(22, &got, 8)) == 8 && got == 5, "eventfd gave %lu, want 5", got);
	CHECK(read(22, &got, 8) < 0 && errno == EAGAIN, "an eventfd of 0 can be read");
}

COMMAND(eventfd) {
	at_fd(20, SYS(eventfd(7, 0)));
	at_fd(21, SYS(eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC)));
	at_fd(22, SYS(eventfd(0, EFD_NONBLOCK)));
	for (int i = 20; i <= 22; i++) remember("eventfd", i);
	loop(eventfd_check);
	uint64_t v;
	CHECK(SYS(read(20, &v, 8)) == 8 && v == 7, "eventfd gave %lu, want 7", v);
	for (int i = 0; i < 3; i++) CHECK(SYS(read(21, &v, 8)) == 8 && v == 1, "semaphore gave %lu, want 1", v);
	CHECK(poll_now(21, POLLIN) == 0, "semaphore of 0 is readable");
}

// ---- timerfd

static uint64_t tfd_ticks;
static int64_t tfd_t0;

static void timerfd_check(void) {
	static uint64_t last;
	static int turn;
	recheck();
	uint64_t n;
	ssize_t r = read(20, &n, 8);
	if (r == 8) tfd_ticks += n;
	else CHECK(errno == EAGAIN, "read timerfd: %s", strerror(errno));
	int64_t el = now_ns() - tfd_t0;
	CHECK((int64_t)tfd_ticks <= el / 50000000 + 2, "timerfd: %lu ticks of 50 ms in %ld ns", tfd_ticks, el);
	if (++turn % 200 == 0) {
		CHECK(tfd_ticks > last + 5, "timerfd stands still at %lu", tfd_ticks);
		last = tfd_ticks;
	}
	struct itimerspec is;
	SYS(timerfd_gettime(20, &is));
	CHECK(is.it_interval.tv_nsec == 50000000, "interval of timerfd is %ld ns", is.it_interval.tv_nsec);
	SYS(timerfd_gettime(21, &is));
	int64_t left = is.it_value.tv_sec * 1000000000LL + is.it_value.tv_nsec, hour = 3600000000000LL;
	CHECK(left <= hour && left >= hour - el - 1000000000LL, "one-shot timerfd: %ld ns left of an hour after %ld ns", left, el);
	CHECK(poll_now(22, POLLIN) == POLLIN, "an expired timerfd is not readable");
	SYS(timerfd_gettime(23, &is));
	CHECK(is.it_value.tv_sec == 0 && is.it_value.tv_nsec == 0, "a disarmed timerfd is armed");
	CHECK(poll_now(23, POLLIN) == 0, "a disarmed timerfd is readable");
	SYS(timerfd_gettime(24, &is));
	CHECK(is.it_value.tv_sec > 3000, "absolute timerfd has %ld s left", is.it_value.tv_sec);
	static const int clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_REALTIME};
	for (int i = 0; i < 5; i++)
		CHECK(fdinfo(20 + i, "clockid:", 10) == clocks[i], "timerfd %d: clock is %ld", i, fdinfo(20 + i, "clockid:", 10));
}

COMMAND(timerfd) {
	at_fd(20, SYS(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)));
	at_fd(21, SYS(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC)));
	at_fd(22, SYS(timerfd_create(CLOCK_MONOTONIC, 0)));
	at_fd(23, SYS(timerfd_create(CLOCK_REALTIME, 0)));
	at_fd(24, SYS(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC)));
	tfd_t0 = now_ns();
	struct itimerspec is = {{0, 50000000}, {0, 50000000}};
	SYS(timerfd_settime(20, 0, &is, NULL));
	is = (struct itimerspec){{0, 0}, {3600, 0}};
	SYS(timerfd_settime(21, 0, &is, NULL));
	is = (struct itimerspec){{0, 0}, {0, 1000000}};
	SYS(timerfd_settime(22, 0, &is, NULL));
	is = (struct itimerspec){{0, 0}, {time(NULL) + 7200, 0}};
	SYS(timerfd_settime(24, TFD_TIMER_ABSTIME, &is, NULL));
	for (int i = 20; i <= 24; i++) remember("timerfd", i);
	nap_ms(10);
	loop(timerfd_check);
	uint64_t n;
	CHECK(SYS(read(22, &n, 8)) == 8 && n == 1, "an expired one-shot timerfd gave %lu ticks", n);
}

// ---- signalfd

static void signalfd_check(void) {
	static int turn;
	recheck();
	CHECK(poll_now(20, POLLIN) == POLLIN, "signalfd with pending signals is not readable");
	CHECK(SYS(sigqueue(getpid(), SIGRTMIN + 8, (union sigval){.sival_int = turn})) == 0, "queue");
	struct signalfd_siginfo si;
	CHECK(SYS(read(21, &si, sizeof si)) == sizeof si, "read signalfd");
	CHECK(si.ssi_signo == (uint32_t)SIGRTMIN + 8 && si.ssi_int == turn && si.ssi_pid == (uint32_t)getpid(), "signalfd brought signal %u value %d", si.ssi_signo, si.ssi_int);
	CHECK(read(21, &si, sizeof si) < 0 && errno == EAGAIN, "signalfd brings signals of another mask");
	turn++;
}

COMMAND(signalfd) {
	sigset_t a, b;
	sigemptyset(&a);
	sigaddset(&a, SIGUSR1);
	sigaddset(&a, SIGRTMIN + 7);
	sigemptyset(&b);
	sigaddset(&b, SIGRTMIN + 8);
	sigprocmask(SIG_BLOCK, &a, NULL);
	sigprocmask(SIG_BLOCK, &b, NULL);
	at_fd(20, SYS(signalfd(-1, &a, SFD_CLOEXEC)));
	at_fd(21, SYS(signalfd(-1, &b, SFD_NONBLOCK)));
	remember("signalfd", 20);
	remember("signalfd", 21);
	kill(getpid(), SIGUSR1);
	SYS(sigqueue(getpid(), SIGRTMIN + 7, (union sigval){.sival_int = 333}));
	loop(signalfd_check);
	struct signalfd_siginfo si[4];
	ssize_t n = SYS(read(20, si, sizeof si));
	CHECK(n == 2 * sizeof *si, "signalfd gave %zd bytes, want two signals", n);
	CHECK(si[0].ssi_signo == SIGUSR1 && si[1].ssi_signo == (uint32_t)SIGRTMIN + 7 && si[1].ssi_int == 333, "signalfd brought %u and %u", si[0].ssi_signo, si[1].ssi_signo);
}

// ---- epoll

static int ep, ep_inner, ep_pipe[2], ep_event, ep_shot, ep_quiet;

static void ep_add(int to, int fd, uint32_t events, uint64_t data) {
	struct epoll_event e = {.events = events, .data.u64 = data};
	SYS(epoll_ctl(to, EPOLL_CTL_ADD, fd, &e));
}

// ep_expect takes all events and wants exactly those of mask (1 << data%16).
// An edge that was already reported may be reported once more.
static void ep_expect(unsigned want, unsigned may, const char *when) {
	struct epoll_event e[16];
	int n = SYS(epoll_wait(ep, e, 16, 0));
	unsigned got = 0;
	for (int i = 0; i < n; i++) {
		CHECK(e[i].data.u64 >> 16 == 0xABCDEF012345, "%s: data of an event is %lx", when, e[i].data.u64);
		got |= 1 << e[i].data.u64 % 16;
	}
	CHECK((got & ~may) == want, "%s: events %x, want %x", when, got, want);
}

static void epoll_check(void) {
	recheck();
	uint64_t one = 1, v;
	ep_expect(0, 1 << 2, "idle");
	CHECK(SYS(write(ep_pipe[1], "x", 1)) == 1, "write");
	ep_expect(1 << 1, 1 << 2, "pipe written");
	ep_expect(1 << 1, 1 << 2, "pipe still readable");
	CHECK(SYS(read(ep_pipe[0], &v, 1)) == 1, "read");
	CHECK(SYS(write(ep_event, &one, 8)) == 8, "write");
	ep_expect(1 << 2, 0, "edge of eventfd");
	CHECK(SYS(write(ep_quiet, &one, 8)) == 8, "write");
	ep_expect(1 << 4, 1 << 2, "nested epoll");
	CHECK(SYS(read(ep_quiet, &v, 8)) == 8, "read");
}

COMMAND(epoll) {
	const uint64_t D = 0xABCDEF0123450000;
	ep = at_fd(20, SYS(epoll_create1(EPOLL_CLOEXEC)));
	ep_inner = at_fd(21, SYS(epoll_create1(0)));
	SYS(pipe2(ep_pipe, O_NONBLOCK));
	ep_event = SYS(eventfd(1, EFD_NONBLOCK));
	ep_shot = SYS(eventfd(1, 0));
	ep_quiet = SYS(eventfd(0, EFD_NONBLOCK));
	ep_add(ep, ep_pipe[0], EPOLLIN, D | 1);
	ep_add(ep, ep_event, EPOLLIN | EPOLLET, D | 2);
	ep_add(ep, ep_shot, EPOLLIN | EPOLLONESHOT, D | 3);
	ep_add(ep_inner, ep_quiet, EPOLLIN, 99);
	ep_add(ep, ep_inner, EPOLLIN, D | 4);
	ep_add(ep, ep_pipe[1], EPOLLERR, D | 5);
	ep_expect(1 << 2 | 1 << 3, 0, "set up"); // the one-shot entry is disabled from here on
	remember("epoll", ep);
	remember("epoll", ep_inner);
	loop(epoll_check);
	struct epoll_event e = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = D | 3};
	SYS(epoll_ctl(ep, EPOLL_CTL_MOD, ep_shot, &e));
	ep_expect(1 << 3, 1 << 2, "one-shot entry armed again");
	SYS(epoll_ctl(ep, EPOLL_CTL_DEL, ep_pipe[1], NULL));
}

// ---- deleted: files without a name

static unsigned char *del_map;
static uint64_t del_turn;

static void deleted_check(void) {
	recheck();
	for (int i = 20; i <= 21; i++) {
		struct stat st;
		SYS(fstat(i, &st));
		CHECK(st.st_nlink == 0, "a deleted file has %lu names", st.st_nlink);
		CHECK(st.st_size == 5000000, "a deleted file has %ld bytes", st.st_size);
		CHECK(SYS(lseek(i, 0, SEEK_CUR)) == 4321, "offset in a deleted file is %ld", lseek(i, 0, SEEK_CUR));
		unsigned char c;
		off_t at = del_turn * 977 % 100000;
		CHECK(SYS(pread(i, &c, 1, at)) == 1 && c == pattern(20, at), "deleted file: byte %ld is %02x", at, c);
		CHECK(SYS(pread(i, &c, 1, 3000000)) == 1 && c == 0, "deleted file: the hole holds %02x", c);
		CHECK(SYS(pread(i, &c, 1, 4999999)) == 1 && c == 'e', "deleted file: the last byte is %02x", c);
		CHECK(st.st_blocks < 2000, "a sparse file has %ld blocks", st.st_blocks);
	}
	size_t at = del_turn * 131 % 8192;
	CHECK(del_map[at] == pattern(21, at), "mapping of a deleted file: byte %zu is %02x", at, del_map[at]);
	CHECK(access(path_of("gone"), F_OK) < 0, "a deleted file has its name again");
	del_turn++;
}

COMMAND(deleted) {
	at_fd(20, SYS(open(path_of("gone"), O_RDWR | O_CREAT | O_TRUNC, 0640)));
	char *dir = strdup(prefix), *slash = strrchr(dir, '/');
	if (slash) *slash = 0;
	at_fd(21, SYS(open(slash ? dir : ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)));
	for (int i = 20; i <= 21; i++) {
		write_pattern(i, 100000, 20);
		CHECK(SYS(pwrite(i, "e", 1, 4999999)) == 1, "write");
		SYS(lseek(i, 4321, SEEK_SET));
	}
	SYS(unlink(path_of("gone")));
	int fd = SYS(open(path_of("gone"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
	write_pattern(fd, 8192, 21);
	del_map = SYS(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
	SYS(unlink(path_of("gone")));
	close(fd);
	remember("deleted file", 20);
	remember("file without name", 21);
	loop(deleted_check);
	SYS(lseek(20, 0, SEEK_SET));
	expect_pattern("deleted file", 20, 100000, 20, 0);
}

// ---- memfd

static void memfd_check(void) {
	recheck();
	CHECK(SYS(fcntl(20, F_GET_SEALS)) == (F_SEAL_SHRINK | F_SEAL_GROW), "seals are %x", fcntl(20, F_GET_SEALS));
	CHECK(SYS(fcntl(21, F_GET_SEALS)) & F_SEAL_SEAL, "a memfd without seals can be sealed");
	CHECK(ftruncate(20, 1) < 0 && errno == EPERM, "a sealed memfd can be cut");
	CHECK(SYS(lseek(20, 0, SEEK_CUR)) == 55, "offset of memfd is %ld", lseek(20, 0, SEEK_CUR));
	char link[128] = {0};
	SYS(readlink("/proc/self/fd/20", link, sizeof link - 1));
	CHECK(strncmp(link, "/memfd:self check", 17) == 0, "memfd is called %s", link);
	static off_t at;
	unsigned char c;
	at = (at + 977) % 200000;
	CHECK(SYS(pread(20, &c, 1, at)) == 1 && c == pattern(30, at), "memfd: byte %ld is %02x", at, c);
}

COMMAND(memfd) {
	at_fd(20, SYS(memfd_create("self check", MFD_ALLOW_SEALING)));
	write_pattern(20, 200000, 30);
	SYS(lseek(20, 55, SEEK_SET));
	SYS(fcntl(20, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	at_fd(21, SYS(memfd_create("other", MFD_CLOEXEC)));
	remember("memfd", 20);
	remember("memfd", 21);
	loop(memfd_check);
	SYS(lseek(20, 0, SEEK_SET));
	expect_pattern("memfd", 20, 200000, 30, 0);
}

// ---- external FIFO LOG [MODE]: copies numbered lines from a fifo into an
// append-only log, as line + CLOCK_MONOTONIC. MODE is the way in which the fifo
// is opened: r (blocks for a writer), rw, n (O_RDONLY|O_NONBLOCK).

COMMAND(external) {
	CHECK(arg_count >= 2, "usage: external PREFIX FIFO LOG [MODE]");
	const char *mode = arg_count > 2 ? arg_values[2] : "r";
	int log = at_fd(5, SYS(open(arg_values[1], O_WRONLY | O_APPEND | O_CREAT, 0644)));
	close(SYS(open(path_of("opening"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	int flags = strcmp(mode, "rw") == 0 ? O_RDWR : strcmp(mode, "n") == 0 ? O_RDONLY | O_NONBLOCK : O_RDONLY;
	int fifo = at_fd(4, SYS(open(arg_values[0], flags)));
	remember("fifo", fifo);
	remember("log", log);
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	char line[64];
	size_t len = 0;
	uint64_t next = 0;
	while (!stopping) {
		struct known f = look("fifo", fifo), l = look("log", log);
		CHECK(f.getfl == known[0].getfl, "flags of the fifo were %o and are %o", known[0].getfl, f.getfl);
		CHECK(l.getfl == known[1].getfl, "flags of the log were %o and are %o", known[1].getfl, l.getfl);
		beat();
		struct pollfd p = {fifo, POLLIN, 0};
		int n = poll(&p, 1, 10);
		if (n < 0 && errno == EINTR && stopping) break;
		CHECK(n >= 0, "poll fifo: %s", strerror(errno));
		if (n == 0) continue;
		if (p.revents == POLLHUP) { // no writer now; another may come
			nap_ms(5);
			continue;
		}
		char c;
		ssize_t r;
		while ((r = read(fifo, &c, 1)) == 1) {
			CHECK(len < sizeof line - 1, "line of the fifo is too long");
			if (c != '\n') {
				line[len++] = c;
				continue;
			}
			line[len] = 0;
			CHECK(strtoul(line, NULL, 10) == next, "fifo brought line \"%s\", want %lu", line, next);
			next++;
			char out[128];
			int m = snprintf(out, sizeof out, "%s %ld\n", line, now_ns());
			CHECK(SYS(write(log, out, m)) == m, "append to log");
			len = 0;
			struct pollfd q = {fifo, POLLIN, 0};
			if (SYS(poll(&q, 1, 0)) == 0) break;
		}
		if (r < 0) CHECK(errno == EAGAIN || (errno == EINTR && stopping), "read fifo: %s", strerror(errno));
	}
}
