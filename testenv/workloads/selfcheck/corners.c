// ---- dirs: directories that were read in part, on several file systems: what comes
// next is what would have come.
// ---- epollall: an epoll that watches the kinds that epoll and epollmore leave out.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>

enum { ENTRIES = 300, REST = 1 << 16 };
static struct { int fd; off_t at; size_t n; char rest[REST]; } part[8];
static int parts;

// rest_of reads what a directory has left, as names and types, and goes back.
static size_t rest_of(int fd, char *to) {
	static char b[8192];
	off_t at = SYS(lseek(fd, 0, SEEK_CUR));
	size_t n = 0;
	for (long r; (r = SYS(syscall(SYS_getdents64, fd, b, sizeof b))) > 0;)
		for (struct dirent64 *e = (void *)b; (char *)e < b + r; e = (void *)((char *)e + e->d_reclen)) {
			CHECK(n + strlen(e->d_name) + 2 < REST, "too much in a directory");
			to[n++] = e->d_type;
			n += sprintf(to + n, "%s", e->d_name) + 1;
		}
	SYS(lseek(fd, at, SEEK_SET));
	return n;
}

static void take_part(const char *path, int flags) {
	int fd = at_fd(20 + parts, SYS(open(path, O_RDONLY | O_DIRECTORY | flags)));
	char b[256];
	CHECK(SYS(syscall(SYS_getdents64, fd, b, sizeof b)) > 0, "%s is empty", path);
	part[parts].fd = fd;
	part[parts].at = SYS(lseek(fd, 0, SEEK_CUR));
	part[parts].n = rest_of(fd, part[parts].rest);
	CHECK(part[parts].n > 0, "%s was read whole", path);
	remember(path, fd);
	parts++;
}

static void fill_dir(const char *path) {
	char name[300];
	SYS(mkdir(path, 0755));
	for (int i = 0; i < ENTRIES; i++) {
		snprintf(name, sizeof name, "%s/%s-%d", path, i % 2 ? "entry" : "a longer name of an entry", i);
		if (i % 5 == 0) SYS(mkdir(name, 0755));
		else close(SYS(open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644)));
	}
}

static void dirs_check(void) {
	static char now[REST];
	recheck();
	for (int i = 0; i < parts; i++) {
		CHECK(SYS(lseek(part[i].fd, 0, SEEK_CUR)) == part[i].at, "directory %d is read up to %ld, was up to %ld", i, lseek(part[i].fd, 0, SEEK_CUR), part[i].at);
		size_t n = rest_of(part[i].fd, now);
		CHECK(n == part[i].n && memcmp(now, part[i].rest, n) == 0, "directory %d has %zu bytes of names left, had %zu", i, n, part[i].n);
	}
}

COMMAND(dirs) {
	fill_dir(path_of("plain"));
	take_part(path_of("plain"), 0);
	take_part(path_of("plain"), O_CLOEXEC | O_NOATIME);
	char *shm;
	CHECK(asprintf(&shm, "/dev/shm/selfcheck-%d", getpid()) > 0, "memory");
	fill_dir(shm);
	take_part(shm, 0);
	take_part("/proc/sys/kernel", 0);
	take_part("/sys/kernel", 0);
	fill_dir(path_of("lower"));
	const char *more[] = {"upper", "work", "merged"};
	for (int i = 0; i < 3; i++) SYS(mkdir(path_of(more[i]), 0755));
	char *o;
	CHECK(asprintf(&o, "lowerdir=%s,upperdir=%s,workdir=%s", path_of("lower"), path_of("upper"), path_of("work")) > 0, "memory");
	// On some file systems, and for most users, there is no overlay.
	bool over = mount("overlay", path_of("merged"), "overlay", 0, o) == 0;
	if (over) {
		close(SYS(open(path_of("merged/on top"), O_CREAT | O_WRONLY | O_CLOEXEC, 0644)));
		take_part(path_of("merged"), 0);
	}
	loop(dirs_check);
	if (over) SYS(umount2(path_of("merged"), MNT_DETACH));
	char *rm;
	CHECK(asprintf(&rm, "rm -r %s", shm) > 0 && system(rm) == 0, "remove %s", shm);
}

// ---- epollall

enum { TERMINAL, SLAVE_OF_IT, INOTIFY, LISTENER, TCP_END, DATAGRAM, NETLINK, PROC_MOUNTS, UNIX_LISTENER, RANDOM, KINDS };
static int all_ep, all_other, all_fd[KINDS], tcp_other, udp_other;

static void all_add(int kind, int fd, uint32_t events) {
	all_fd[kind] = at_fd(40 + kind, fd);
	struct epoll_event e = {.events = events, .data.u64 = 0x1234567800000000 + kind};
	SYS(epoll_ctl(all_ep, EPOLL_CTL_ADD, all_fd[kind], &e));
}

// all_wait wants events on certain kinds, at the latest when they must have come.
static void all_wait(unsigned want, const char *what) {
	unsigned got = 0;
	for (int64_t until = now_ns() + PATIENCE_MS * 1000000LL; now_ns() < until;) {
		struct epoll_event e[2 * KINDS];
		int n = epoll_wait(all_ep, e, 2 * KINDS, want ? 100 : 0);
		CHECK(n >= 0 || errno == EINTR, "epoll_wait: %s", strerror(errno));
		got = 0;
		for (int i = 0; i < n; i++) {
			CHECK(e[i].data.u64 >> 32 == 0x12345678, "%s: data of an event is %lx", what, e[i].data.u64);
			unsigned kind = e[i].data.u64 & 0xffff;
			if (kind != PROC_MOUNTS) got |= 1u << kind; // others mount something now and then
		}
		if (got == want && n >= 0) return;
		if (!want && n >= 0) break;
	}
	fail("%s: events of %x, want %x", what, got, want);
}

// take reads n bytes, which may come in pieces.
static void take(int fd, size_t n, const char *what) {
	char b[64];
	for (size_t got = 0; got < n;) {
		CHECK(comes(fd, POLLIN), "%s: %zu bytes of %zu come", what, got, n);
		ssize_t r = read(fd, b, n - got);
		CHECK(r > 0 || (r < 0 && errno == EAGAIN), "%s: %s", what, strerror(errno));
		if (r > 0) got += r;
	}
}

static void epollall_check(void) {
	char b[4096];
	recheck();
	all_wait(0, "nothing happened");
	CHECK(SYS(write(all_fd[SLAVE_OF_IT], "out\n", 4)) == 4, "write");
	all_wait(1 << TERMINAL, "output of a terminal");
	take(all_fd[TERMINAL], 5, "what a terminal puts out");
	CHECK(SYS(write(all_fd[TERMINAL], "in\n", 3)) == 3, "write");
	all_wait(1 << SLAVE_OF_IT | 1 << TERMINAL, "input of a terminal, and its echo");
	take(all_fd[SLAVE_OF_IT], 3, "a line");
	take(all_fd[TERMINAL], 4, "its echo");
	close(SYS(open(path_of("seen"), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)));
	all_wait(1 << INOTIFY, "a file was opened");
	while (read(all_fd[INOTIFY], b, sizeof b) > 0) {}
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(all_fd[LISTENER], (struct sockaddr *)&a, &n));
	int c = SYS(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	struct linger now = {1, 0}; // nothing is left behind
	SYS(setsockopt(c, SOL_SOCKET, SO_LINGER, &now, sizeof now));
	CHECK(connect(c, (struct sockaddr *)&a, n) == 0, "connect: %s", strerror(errno));
	all_wait(1 << LISTENER, "a connection waits");
	close(SYS(accept(all_fd[LISTENER], NULL, NULL)));
	close(c);
	CHECK(SYS(send(tcp_other, "x", 1, MSG_NOSIGNAL)) == 1, "send");
	all_wait(1 << TCP_END, "a byte on a connection");
	CHECK(SYS(recv(all_fd[TCP_END], b, 1, 0)) == 1, "receive");
	CHECK(SYS(send(udp_other, "x", 1, 0)) == 1, "send");
	all_wait(1 << DATAGRAM, "a datagram");
	CHECK(SYS(recv(all_fd[DATAGRAM], b, 1, 0)) == 1, "receive");
	struct { struct nlmsghdr h; struct ifinfomsg m; } q = {{sizeof q, RTM_GETLINK, NLM_F_REQUEST, 1, 0}, {.ifi_index = if_nametoindex("lo")}};
	CHECK(SYS(send(all_fd[NETLINK], &q, sizeof q, 0)) == sizeof q, "send");
	all_wait(1 << NETLINK, "an answer of the kernel");
	CHECK(SYS(recv(all_fd[NETLINK], b, sizeof b, 0)) > 0, "receive");
	struct sockaddr_un { sa_family_t f; char path[108]; } u = {AF_UNIX, ""};
	n = sizeof u;
	SYS(getsockname(all_fd[UNIX_LISTENER], (struct sockaddr *)&u, &n));
	c = SYS(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
	SYS(connect(c, (struct sockaddr *)&u, n));
	all_wait(1 << UNIX_LISTENER, "a connection waits");
	close(SYS(accept(all_fd[UNIX_LISTENER], NULL, NULL)));
	close(c);
	all_wait(0, "everything was taken");
	// The duplicate of the epoll is the same.
	struct epoll_event e = {.events = EPOLLIN, .data.u64 = 0x1234567800000000 + RANDOM};
	SYS(epoll_ctl(all_other, EPOLL_CTL_MOD, all_fd[RANDOM], &e));
	all_wait(1 << RANDOM, "a device that can always be read");
	e.events = EPOLLPRI;
	SYS(epoll_ctl(all_ep, EPOLL_CTL_MOD, all_fd[RANDOM], &e));
}

static int all_listener(int family) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int fd = SYS(socket(family, (family == AF_UNIX ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_NONBLOCK, 0));
	if (family == AF_UNIX) SYS(bind(fd, (struct sockaddr *)&(sa_family_t){AF_UNIX}, sizeof(sa_family_t)));
	else SYS(bind(fd, (struct sockaddr *)&a, sizeof a));
	SYS(listen(fd, 5));
	return fd;
}

COMMAND(epollall) {
	all_ep = at_fd(20, SYS(epoll_create1(EPOLL_CLOEXEC)));
	all_other = at_fd(21, SYS(dup(all_ep)));
	char name[64];
	int m = SYS(posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK));
	CHECK(unlockpt(m) == 0 && ptsname_r(m, name, sizeof name) == 0, "terminal");
	all_add(SLAVE_OF_IT, SYS(open(name, O_RDWR | O_NOCTTY | O_NONBLOCK)), EPOLLIN);
	all_add(TERMINAL, m, EPOLLIN);
	close(SYS(open(path_of("seen"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
	all_add(INOTIFY, SYS(inotify_init1(IN_NONBLOCK)), EPOLLIN);
	SYS(inotify_add_watch(all_fd[INOTIFY], path_of("seen"), IN_OPEN));
	all_add(LISTENER, all_listener(AF_INET), EPOLLIN);
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(all_fd[LISTENER], (struct sockaddr *)&a, &n));
	tcp_other = SYS(socket(AF_INET, SOCK_STREAM, 0));
	SYS(connect(tcp_other, (struct sockaddr *)&a, n));
	CHECK(comes(all_fd[LISTENER], POLLIN), "no connection comes");
	all_add(TCP_END, SYS(accept(all_fd[LISTENER], NULL, NULL)), EPOLLIN | EPOLLRDHUP);
	int d = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	a = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	SYS(bind(d, (struct sockaddr *)&a, sizeof a));
	SYS(getsockname(d, (struct sockaddr *)&a, &n));
	udp_other = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	SYS(connect(udp_other, (struct sockaddr *)&a, sizeof a));
	all_add(DATAGRAM, d, EPOLLIN);
	all_add(NETLINK, SYS(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)), EPOLLIN);
	all_add(PROC_MOUNTS, SYS(open("/proc/self/mounts", O_RDONLY)), EPOLLPRI);
	all_add(UNIX_LISTENER, all_listener(AF_UNIX), EPOLLIN);
	all_add(RANDOM, SYS(open("/dev/random", O_RDONLY)), EPOLLPRI);
	remember("epoll", 20);
	remember("epoll", 21);
	loop(epollall_check);
}
