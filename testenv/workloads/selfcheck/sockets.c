// Sockets that need no peer outside.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static int opt(int fd, int level, int name) {
	int v = 0;
	socklen_t n = sizeof v;
	CHECK(getsockopt(fd, level, name, &v, &n) == 0, "getsockopt %d/%d of fd %d: %s", level, name, fd, strerror(errno));
	return v;
}

static void set(int fd, int level, int name, int v) { SYS(setsockopt(fd, level, name, &v, sizeof v)); }

static struct { int fd, level, name, want; } options[64];
static int noptions;
static void hold(int fd, int level, int name) {
	options[noptions].fd = fd;
	options[noptions].level = level;
	options[noptions].name = name;
	options[noptions++].want = opt(fd, level, name);
}

static struct { int fd; struct sockaddr_storage a; socklen_t n; } names[32];
static int nnames;
static void hold_name(int fd) {
	names[nnames].fd = fd;
	names[nnames].n = sizeof names[0].a;
	SYS(getsockname(fd, (struct sockaddr *)&names[nnames].a, &names[nnames].n));
	nnames++;
}

static void sockets_recheck(void) {
	recheck();
	for (int i = 0; i < noptions; i++) {
		int got = opt(options[i].fd, options[i].level, options[i].name);
		CHECK(got == options[i].want, "socket fd %d: option %d/%d was %d and is %d", options[i].fd, options[i].level, options[i].name, options[i].want, got);
	}
	for (int i = 0; i < nnames; i++) {
		struct sockaddr_storage a = {0};
		socklen_t n = sizeof a;
		SYS(getsockname(names[i].fd, (struct sockaddr *)&a, &n));
		CHECK(n == names[i].n && memcmp(&a, &names[i].a, n) == 0, "socket fd %d: address changed", names[i].fd);
	}
}

static void expect_message(int fd, const char *want, const char *what) {
	char b[256];
	ssize_t n = recv(fd, b, sizeof b, MSG_DONTWAIT);
	CHECK(n == (ssize_t)strlen(want) && memcmp(b, want, n) == 0, "%s: received %zd bytes, want \"%s\"", what, n, want);
}

// exchange connects to a listener, sends a word there and another back.
static void exchange(int listener, int family, const struct sockaddr *a, socklen_t n, const char *what) {
	int c = SYS(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
	CHECK(connect(c, a, n) == 0, "%s: connect: %s", what, strerror(errno));
	int s = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(s >= 0, "%s: accept: %s", what, strerror(errno));
	char b[8];
	CHECK(SYS(write(c, "ping", 4)) == 4 && SYS(read(s, b, 8)) == 4 && memcmp(b, "ping", 4) == 0, "%s: ping", what);
	CHECK(SYS(write(s, "pong", 4)) == 4 && SYS(read(c, b, 8)) == 4 && memcmp(b, "pong", 4) == 0, "%s: pong", what);
	close(c);
	close(s);
}

// ---- unix

static int us[2], ud[2], uq[2], uc[2], uh[2];
static pid_t unix_child;
static uint64_t asked;

static void unix_check(void) {
	sockets_recheck();
	uint64_t got;
	CHECK(SYS(send(uc[0], &asked, 8, 0)) == 8, "send");
	CHECK(read_all(uc[0], &got, 8) == 8 && got == asked * 2 + 1, "the child answered %lu to %lu", got, asked);
	asked++;
	struct pollfd p = {uh[0], POLLIN | POLLRDHUP, 0};
	SYS(poll(&p, 1, 0));
	CHECK(p.revents == (POLLIN | POLLRDHUP), "half closed socket: poll says %x", p.revents);
	expect_alive(unix_child);
}

COMMAND(unix) {
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, us));
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, ud));
	SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, uq));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, uc));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, uh));
	unix_child = child();
	if (unix_child == 0) {
		for (uint64_t n;; orphan_check()) {
			close(uc[0]);
			ssize_t r = read_all(uc[1], &n, 8);
			if (r == 0) _exit(0);
			CHECK(r == 8, "read from the parent: %s", strerror(errno));
			n = n * 2 + 1;
			CHECK(SYS(write(uc[1], &n, 8)) == 8, "write to the parent");
		}
	}
	close(uc[1]);
	CHECK(SYS(write(us[0], "to the right", 12)) == 12 && SYS(write(us[1], "to the left", 11)) == 11, "fill");
	static const char *words[] = {"one", "two two", "three three three"};
	for (int i = 0; i < 3; i++) {
		SYS(send(ud[0], words[i], strlen(words[i]), 0));
		SYS(send(uq[1], words[i], strlen(words[i]), 0));
	}
	CHECK(SYS(write(uh[1], "rest", 4)) == 4, "fill");
	SYS(shutdown(uh[1], SHUT_WR));

	struct sockaddr_un path = {AF_UNIX, ""}, abstract = {AF_UNIX, ""}, bound = {AF_UNIX, ""};
	snprintf(path.sun_path, sizeof path.sun_path, "%s", path_of("sock"));
	int an = snprintf(abstract.sun_path + 1, sizeof abstract.sun_path - 1, "godwit-selfcheck-%d", getpid());
	int bn = snprintf(bound.sun_path + 1, sizeof bound.sun_path - 1, "godwit-selfcheck-dgram-%d", getpid());
	socklen_t alen = offsetof(struct sockaddr_un, sun_path) + 1 + an, blen = offsetof(struct sockaddr_un, sun_path) + 1 + bn;
	int lp = SYS(socket(AF_UNIX, SOCK_STREAM, 0)), la = SYS(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)), bd = SYS(socket(AF_UNIX, SOCK_DGRAM, 0));
	SYS(bind(lp, (struct sockaddr *)&path, sizeof path));
	SYS(bind(la, (struct sockaddr *)&abstract, alen));
	SYS(bind(bd, (struct sockaddr *)&bound, blen));
	SYS(listen(lp, 5));
	SYS(listen(la, 7));
	set(lp, SOL_SOCKET, SO_PASSCRED, 1);
	set(us[0], SOL_SOCKET, SO_RCVBUF, 100000);
	set(us[1], SOL_SOCKET, SO_SNDBUF, 120000);
	int all[] = {us[0], us[1], ud[0], ud[1], uq[0], uq[1], uc[0], uh[0], uh[1], lp, la, bd};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		remember("unix socket", all[i]);
		hold(all[i], SOL_SOCKET, SO_TYPE);
		hold(all[i], SOL_SOCKET, SO_ACCEPTCONN);
		hold(all[i], SOL_SOCKET, SO_PASSCRED);
	}
	hold(us[0], SOL_SOCKET, SO_RCVBUF);
	hold(us[1], SOL_SOCKET, SO_SNDBUF);
	hold_name(lp);
	hold_name(la);
	hold_name(bd);
	loop(unix_check);
	expect_message(us[1], "to the right", "stream");
	expect_message(us[0], "to the left", "stream");
	for (int i = 0; i < 3; i++) {
		expect_message(ud[1], words[i], "datagram");
		expect_message(uq[0], words[i], "packet");
	}
	expect_message(uh[0], "rest", "half closed");
	char c;
	CHECK(recv(uh[0], &c, 1, MSG_DONTWAIT) == 0, "no end of file on a half closed socket");
	CHECK(SYS(write(uh[0], "back", 4)) == 4, "write the open half");
	expect_message(uh[1], "back", "the open half");
	CHECK(send(us[0], "more", 4, 0) == 4, "send: %s", strerror(errno));
	expect_message(us[1], "more", "stream");
	exchange(lp, AF_UNIX, (struct sockaddr *)&path, sizeof path, "listener with a path");
	exchange(la, AF_UNIX, (struct sockaddr *)&abstract, alen, "abstract listener");
	int s = SYS(socket(AF_UNIX, SOCK_DGRAM, 0));
	CHECK(sendto(s, "gram", 4, 0, (struct sockaddr *)&bound, blen) == 4, "send to bound socket: %s", strerror(errno));
	expect_message(bd, "gram", "bound socket");
	end_child(unix_child);
}

// ---- inet: listening TCP, UDP

static int tl, tl6, ub, ucon, tfresh;
static struct sockaddr_in a4, au;
static struct sockaddr_in6 a6;

static void inet_check(void) {
	static uint64_t n;
	sockets_recheck();
	// UDP may lose: ask again, but never accept a wrong answer.
	for (int i = 0;; i++) {
		uint64_t got = 0;
		CHECK(SYS(send(ucon, &n, 8, 0)) == 8, "send");
		struct pollfd p = {ub, POLLIN, 0};
		int r = poll(&p, 1, 500);
		if (r < 0 && errno == EINTR && stopping) return;
		if (r == 1) {
			CHECK(SYS(recv(ub, &got, 8, 0)) == 8, "receive");
			if (got == n) break;
			CHECK(got < n, "UDP brought %lu, sent was %lu", got, n);
		}
		CHECK(i < PATIENCE_MS / 500, "UDP brings nothing any more");
	}
	n++;
}

COMMAND(inet) {
	socklen_t len = sizeof a4;
	tl = SYS(socket(AF_INET, SOCK_STREAM, 0));
	tl6 = SYS(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
	ub = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	ucon = SYS(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	tfresh = SYS(socket(AF_INET, SOCK_STREAM, 0)); // neither bound nor connected
	set(tl, SOL_SOCKET, SO_REUSEADDR, 1);
	set(tl, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(tl, IPPROTO_TCP, TCP_NODELAY, 1);
	set(tl, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	set(tl6, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	set(tl6, SOL_SOCKET, SO_REUSEADDR, 1);
	set(tl6, SOL_SOCKET, SO_REUSEPORT, 1);
	set(ub, SOL_SOCKET, SO_RCVBUF, 50000);
	set(ub, SOL_SOCKET, SO_BROADCAST, 1);
	a4 = (struct sockaddr_in){AF_INET, 0, {htonl(INADDR_ANY)}, {0}};
	SYS(bind(tl, (struct sockaddr *)&a4, sizeof a4));
	SYS(getsockname(tl, (struct sockaddr *)&a4, &len));
	SYS(listen(tl, 17));
	a6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_addr = in6addr_any};
	SYS(bind(tl6, (struct sockaddr *)&a6, sizeof a6));
	len = sizeof a6;
	SYS(getsockname(tl6, (struct sockaddr *)&a6, &len));
	SYS(listen(tl6, 5));
	au = (struct sockaddr_in){AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
	SYS(bind(ub, (struct sockaddr *)&au, sizeof au));
	len = sizeof au;
	SYS(getsockname(ub, (struct sockaddr *)&au, &len));
	SYS(connect(ucon, (struct sockaddr *)&au, sizeof au));
	int all[] = {tl, tl6, ub, ucon, tfresh};
	for (int i = 0; i < 5; i++) {
		remember("inet socket", all[i]);
		for (int o = 0; o < 7; o++) {
			static const int so[] = {SO_TYPE, SO_ACCEPTCONN, SO_REUSEADDR, SO_REUSEPORT, SO_KEEPALIVE, SO_BROADCAST, SO_DOMAIN};
			hold(all[i], SOL_SOCKET, so[o]);
		}
		if (i < 4) hold_name(all[i]);
	}
	hold(tl, IPPROTO_TCP, TCP_NODELAY);
	hold(tl, IPPROTO_TCP, TCP_KEEPIDLE);
	hold(tl6, IPPROTO_IPV6, IPV6_V6ONLY);
	hold(ub, SOL_SOCKET, SO_RCVBUF);
	loop(inet_check);
	a4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	a6.sin6_addr = in6addr_loopback;
	exchange(tl, AF_INET, (struct sockaddr *)&a4, sizeof a4, "TCP listener");
	exchange(tl6, AF_INET6, (struct sockaddr *)&a6, sizeof a6, "TCP listener of IPv6");
	CHECK(connect(tfresh, (struct sockaddr *)&a4, sizeof a4) == 0, "connect of a fresh socket: %s", strerror(errno));
}
