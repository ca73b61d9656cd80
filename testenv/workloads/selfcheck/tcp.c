// TCP connections of which both ends are in the tree.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

// A connection: c connected, s was accepted.
struct conn { int c, s; uint64_t sent[2]; struct sockaddr_storage name[2]; };

static int tcp_listener(int family) {
	struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_addr = in6addr_any};
	struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int l = SYS(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
	if (family == AF_INET6)
		SYS(bind(l, (struct sockaddr *)&a6, sizeof a6));
	else
		SYS(bind(l, (struct sockaddr *)&a4, sizeof a4));
	SYS(listen(l, 5));
	return l;
}

// tcp_open connects to a listener, over IPv4 or IPv6.
static struct conn tcp_open(int l, int family) {
	struct sockaddr_storage a;
	socklen_t n = sizeof a;
	SYS(getsockname(l, (struct sockaddr *)&a, &n));
	uint16_t port = a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port : ((struct sockaddr_in *)&a)->sin_port;
	struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = port, .sin6_addr = in6addr_loopback};
	struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_port = port, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	struct conn x = {.c = SYS(socket(family, SOCK_STREAM, 0))};
	if (family == AF_INET6)
		SYS(connect(x.c, (struct sockaddr *)&a6, sizeof a6));
	else
		SYS(connect(x.c, (struct sockaddr *)&a4, sizeof a4));
	x.s = SYS(accept4(l, NULL, NULL, SOCK_CLOEXEC));
	for (int i = 0; i < 2; i++) {
		n = sizeof x.name[i];
		SYS(getpeername(i ? x.s : x.c, (struct sockaddr *)&x.name[i], &n));
	}
	return x;
}

// tcp_fill sends, from end i, up to max bytes of a pattern: as many as go.
static void tcp_fill(struct conn *x, int i, uint64_t max) {
	unsigned char b[4096];
	while (x->sent[i] < max) {
		size_t n = max - x->sent[i] < sizeof b ? max - x->sent[i] : sizeof b;
		for (size_t k = 0; k < n; k++) b[k] = pattern(i + 1, x->sent[i] + k);
		ssize_t r = send(i ? x->s : x->c, b, n, MSG_DONTWAIT);
		if (r < 0 && errno == EAGAIN) return;
		CHECK(r > 0, "fill a connection: %s", strerror(errno));
		x->sent[i] += r;
	}
}

// tcp_drain receives what end i sent, all of it, and, if it was shut, the end.
static void tcp_drain(struct conn *x, int i, bool shut, const char *what) {
	unsigned char b[4096];
	for (uint64_t at = 0; at < x->sent[i];) {
		int fd = i ? x->c : x->s;
		CHECK(comes(fd, POLLIN), "%s: %lu bytes of %lu came", what, at, x->sent[i]);
		uint64_t left = x->sent[i] - at;
		ssize_t n = recv(fd, b, left < sizeof b ? left : sizeof b, MSG_DONTWAIT);
		CHECK(n > 0, "%s: receive: %zd, %s", what, n, n ? strerror(errno) : "end of file");
		for (ssize_t k = 0; k < n; k++) CHECK(b[k] == pattern(i + 1, at + k), "%s: byte %lu is wrong", what, at + k);
		at += n;
	}
	x->sent[i] = 0;
	struct pollfd p = {i ? x->c : x->s, POLLIN, 0};
	if (shut) {
		CHECK(comes(p.fd, POLLIN) && recv(p.fd, b, 1, MSG_DONTWAIT) == 0, "%s: no end of file", what);
	} else {
		CHECK(poll(&p, 1, 0) == 0, "%s: more came than was sent", what);
	}
}

// tcp_pass sends and receives a few bytes that both ends have room for.
static void tcp_pass(struct conn *x, int i, const char *what) {
	CHECK(send(i ? x->s : x->c, "after", 5, MSG_DONTWAIT) == 5, "%s: send: %s", what, strerror(errno));
	char b[6];
	ssize_t n = read_all(i ? x->c : x->s, b, 5);
	CHECK(n == 5 && memcmp(b, "after", 5) == 0, "%s: received %zd bytes", what, n);
}

static struct conn both, full, half, late, six, mapped, echo;
static pid_t tcp_child;
static uint64_t tcp_asked;

static void tcp_check(void) {
	recheck();
	uint64_t got;
	CHECK(SYS(send(echo.c, &tcp_asked, 8, 0)) == 8, "send");
	CHECK(read_all(echo.c, &got, 8) == 8 && got == tcp_asked * 2 + 1, "the child answered %lu to %lu", got, tcp_asked);
	tcp_asked++;
	struct conn *all[] = {&both, &full, &half, &late, &six, &mapped};
	for (size_t k = 0; k < sizeof all / sizeof *all; k++)
		for (int i = 0; i < 2; i++) {
			struct sockaddr_storage a = {0};
			socklen_t n = sizeof a;
			CHECK(getpeername(i ? all[k]->s : all[k]->c, (struct sockaddr *)&a, &n) == 0, "getpeername: %s", strerror(errno));
			CHECK(memcmp(&a, &all[k]->name[i], n) == 0, "connection %zu: the peer's address changed", k);
		}
	struct pollfd p = {half.s, POLLIN | POLLRDHUP, 0};
	SYS(poll(&p, 1, 0));
	CHECK(p.revents == (POLLIN | POLLRDHUP), "half shut connection: poll says %x", p.revents);
	expect_alive(tcp_child);
}

COMMAND(tcpconn) {
	int l4 = tcp_listener(AF_INET), l6 = tcp_listener(AF_INET6);
	both = tcp_open(l4, AF_INET);
	full = tcp_open(l4, AF_INET);
	half = tcp_open(l4, AF_INET);
	late = tcp_open(l4, AF_INET);
	six = tcp_open(l6, AF_INET6);
	mapped = tcp_open(l6, AF_INET);
	echo = tcp_open(l4, AF_INET);
	tcp_child = child();
	if (tcp_child == 0) {
		close(echo.c);
		for (uint64_t n;; orphan_check()) {
			ssize_t r = read_all(echo.s, &n, 8);
			if (r == 0) _exit(0);
			CHECK(r == 8, "read from the parent: %s", strerror(errno));
			n = n * 2 + 1;
			CHECK(SYS(write(echo.s, &n, 8)) == 8, "write to the parent");
		}
	}
	close(echo.s);
	int on = 1, seconds = 77, room = 60000;
	SYS(setsockopt(both.c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on));
	SYS(setsockopt(both.s, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds));
	SYS(setsockopt(both.c, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on));
	SYS(setsockopt(late.s, SOL_SOCKET, SO_RCVBUF, &room, sizeof room));
	for (int i = 0; i < 2; i++) {
		tcp_fill(&both, i, 1000 + i);
		tcp_fill(&full, i, 1 << 30);
		tcp_fill(&six, i, 70000);
		tcp_fill(&mapped, i, 70000);
	}
	tcp_fill(&half, 0, 5000);
	SYS(shutdown(half.c, SHUT_WR));
	tcp_fill(&half, 1, 3000);
	// The end of this stream waits behind bytes for which there is no room.
	tcp_fill(&late, 0, 1 << 30);
	SYS(shutdown(late.c, SHUT_WR));
	int held[] = {both.c, both.s, full.c, full.s, half.c, half.s, late.c, late.s, six.c, six.s, mapped.c, mapped.s, echo.c, l4, l6};
	for (size_t i = 0; i < sizeof held / sizeof *held; i++) remember("TCP socket", held[i]);
	loop(tcp_check);
	int v = 0;
	socklen_t n = sizeof v;
	SYS(getsockopt(both.c, IPPROTO_TCP, TCP_NODELAY, &v, &n));
	CHECK(v == 1, "TCP_NODELAY is %d", v);
	SYS(getsockopt(both.s, IPPROTO_TCP, TCP_KEEPIDLE, &v, &n));
	CHECK(v == 77, "TCP_KEEPIDLE is %d", v);
	struct { struct conn *x; const char *name; } two[] = {{&both, "both ways"}, {&full, "full both ways"}, {&six, "IPv6"}, {&mapped, "IPv4 at a listener of IPv6"}};
	for (int i = 0; i < 4; i++)
		for (int k = 0; k < 2; k++) {
			tcp_drain(two[i].x, k, false, two[i].name);
			tcp_pass(two[i].x, k, two[i].name);
		}
	tcp_drain(&half, 0, true, "half shut");
	tcp_drain(&half, 1, false, "the open half");
	tcp_pass(&half, 1, "the open half");
	tcp_drain(&late, 0, true, "shut behind a full queue");
	tcp_pass(&late, 1, "the open half behind a full queue");
	struct conn fresh = tcp_open(l4, AF_INET);
	tcp_pass(&fresh, 0, "a new connection");
	close(fresh.s);
	char c;
	CHECK(read_all(fresh.c, &c, 1) == 0, "no end of file when the other end is closed");
	end_child(tcp_child);
	CHECK(read_all(echo.c, &c, 1) == 0, "no end of file when the child has ended");
}
