#include "sockopts.h"
#include <poll.h>

static struct { int fd, level, name; socklen_t n; char v[64]; } held[256];
static int nheld;
static struct { int fd; socklen_t n; struct sockaddr_storage a; } addrs[32];
static int naddrs;

static socklen_t so_get(int fd, int level, int name, char *v) {
	socklen_t n = 64;
	memset(v, 0, 64);
	CHECK(getsockopt(fd, level, name, v, &n) == 0, "getsockopt %d/%d of fd %d: %s", level, name, fd, strerror(errno));
	return n;
}

void so_set(int fd, int level, int name, int v) { so_bytes(fd, level, name, &v, sizeof v); }

void so_bytes(int fd, int level, int name, const void *p, socklen_t n) {
	CHECK(setsockopt(fd, level, name, p, n) == 0, "setsockopt %d/%d of fd %d: %s", level, name, fd, strerror(errno));
}

void so_hold(int fd, int level, int name) {
	CHECK(nheld < 256, "too many options");
	held[nheld].fd = fd;
	held[nheld].level = level;
	held[nheld].name = name;
	held[nheld].n = so_get(fd, level, name, held[nheld].v);
	nheld++;
}

void so_put(int fd, int level, int name, int v) {
	so_set(fd, level, name, v);
	so_hold(fd, level, name);
}

void so_name(int fd) {
	addrs[naddrs].fd = fd;
	addrs[naddrs].n = sizeof addrs[0].a;
	SYS(getsockname(fd, (struct sockaddr *)&addrs[naddrs].a, &addrs[naddrs].n));
	naddrs++;
}

void so_recheck(void) {
	recheck();
	for (int i = 0; i < nheld; i++) {
		char v[64];
		socklen_t n = so_get(held[i].fd, held[i].level, held[i].name, v);
		int was, is;
		memcpy(&was, held[i].v, 4);
		memcpy(&is, v, 4);
		CHECK(n == held[i].n && memcmp(v, held[i].v, 64) == 0, "socket fd %d: option %d/%d was %d (%u bytes) and is %d (%u bytes)",
			held[i].fd, held[i].level, held[i].name, was, held[i].n, is, n);
	}
	for (int i = 0; i < naddrs; i++) {
		struct sockaddr_storage a = {0};
		socklen_t n = sizeof a;
		SYS(getsockname(addrs[i].fd, (struct sockaddr *)&a, &n));
		CHECK(n == addrs[i].n && memcmp(&a, &addrs[i].a, n) == 0, "socket fd %d: its address changed", addrs[i].fd);
	}
}

void so_expect(int fd, const char *want, const char *what) {
	char b[256];
	CHECK(comes(fd, POLLIN), "%s: nothing comes", what);
	ssize_t n = recv(fd, b, sizeof b, MSG_DONTWAIT);
	CHECK(n == (ssize_t)strlen(want) && memcmp(b, want, n) == 0, "%s: received %zd bytes (%s), want \"%s\"", what, n, n < 0 ? strerror(errno) : "", want);
}

void so_silent(int fd, const char *what) {
	char b[256];
	ssize_t n = recv(fd, b, sizeof b, MSG_DONTWAIT);
	CHECK(n < 0 && errno == EAGAIN, "%s: %zd bytes came", what, n);
}
