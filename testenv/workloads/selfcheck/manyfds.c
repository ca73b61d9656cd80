// manyfds PROCS FDS: PROCS processes, each with FDS descriptors of its own of
// several kinds, some of them shared by all.
#include "selfcheck.h"
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

enum { FIRST = 128, SHARED = 500 };
static int procs, fds, who;
static pid_t kids[64];

// One of what the ten thousands are made of, by its number; says how many
// descriptors it takes. Numbers are handed out in ascending order.
static int make(int fd) {
	int p[2], i = fd - FIRST;
	switch (i % 5) {
	case 0: at_fd(fd, SYS(eventfd(who * 100000 + i, EFD_CLOEXEC | EFD_NONBLOCK))); return 1;
	case 1:
		SYS(pipe2(p, O_NONBLOCK));
		CHECK(SYS(write(p[1], &i, sizeof i)) == sizeof i, "write");
		// The lowest free numbers, one after the other.
		CHECK(p[0] == fd && p[1] == fd + 1, "a pipe got numbers %d and %d, want %d", p[0], p[1], fd);
		return 2;
	case 3: at_fd(fd, SYS(open(path_of("file"), O_RDONLY))); SYS(lseek(fd, who * 1000 + i, SEEK_SET)); return 1;
	default: at_fd(fd, SYS(timerfd_create(i % 2 ? CLOCK_BOOTTIME : CLOCK_MONOTONIC, TFD_NONBLOCK))); return 1;
	}
}

static void look_at(int fd) {
	int i = fd - FIRST, n;
	uint64_t v;
	switch (i % 5) {
	case 0:
		v = 0;
		SYS(read(fd, &v, 8));
		CHECK(v == (uint64_t)(who * 100000 + i), "eventfd %d holds %lu", fd, v);
		CHECK(SYS(write(fd, &v, 8)) == 8, "write");
		CHECK(SYS(fcntl(fd, F_GETFD)) == FD_CLOEXEC, "close-on-exec of fd %d is gone", fd);
		break;
	case 1:
		n = -1;
		CHECK(SYS(read(fd, &n, sizeof n)) == sizeof n && n == i, "pipe %d brought %d", fd, n);
		CHECK(SYS(write(fd + 1, &n, sizeof n)) == sizeof n, "write");
		break;
	case 3: CHECK(SYS(lseek(fd, 0, SEEK_CUR)) == who * 1000 + i, "position of fd %d is %ld", fd, lseek(fd, 0, SEEK_CUR)); break;
	case 4: CHECK(read(fd, &v, 8) < 0 && errno == EAGAIN, "timerfd %d: %s", fd, strerror(errno)); break;
	}
	CHECK(SYS(ioctl(FIRST - 1, FIONREAD, &n)) == 0 && n == 4, "the shared pipe holds %d bytes", n);
}

static void manyfds_check(void) {
	static int at;
	for (int i = 0; i < 50; i++) look_at(FIRST + SHARED + (at = (at + 7919) % fds));
	for (int i = 0; i < procs - 1 && who == 0; i++) expect_alive(kids[i]);
}

static void no_gaps(void) {
	for (int fd = 3; fd < FIRST - 2; fd++) if (fcntl(fd, F_GETFD) < 0) SYS(dup2(0, fd));
}

COMMAND(manyfds) {
	CHECK(arg_count == 2, "usage: manyfds PREFIX PROCS FDS");
	procs = atoi(arg_values[0]);
	fds = atoi(arg_values[1]);
	struct rlimit l;
	SYS(getrlimit(RLIMIT_NOFILE, &l));
	l.rlim_cur = l.rlim_max;
	SYS(setrlimit(RLIMIT_NOFILE, &l));
	CHECK((int)l.rlim_max > FIRST + SHARED + fds + 8, "the limit of open files is only %lu", l.rlim_max);
	int fd = SYS(open(path_of("file"), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	SYS(ftruncate(fd, 1 << 20));
	close(fd);
	int p[2];
	SYS(pipe(p));
	CHECK(write(p[1], "once", 4) == 4, "write");
	at_fd(FIRST - 1, p[0]);
	at_fd(FIRST - 2, p[1]);
	no_gaps();
	for (fd = FIRST; fd < FIRST + SHARED;) fd += make(fd);
	while ((fd - FIRST) % 5) fd += make(fd);
	for (int i = 1; i < procs; i++)
		if ((kids[i - 1] = child()) == 0) {
			who = i;
			break;
		}
	no_gaps();
	for (fd = FIRST + SHARED; fd < FIRST + SHARED + fds;) fd += make(fd);
	if (who > 0)
		for (;; orphan_check()) {
			manyfds_check();
			nap_ms(50);
		}
	loop(manyfds_check);
	for (fd = FIRST + SHARED; fd < FIRST + SHARED + fds; fd++) look_at(fd);
	for (int i = 0; i < procs - 1; i++) end_child(kids[i]);
}
