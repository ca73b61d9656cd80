// Options of TCP sockets in three states, and listeners that processes share.
#include "sockopts.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>

enum { RTO_MAX_MS = 44, RTO_MIN_US = 45, DELACK_MAX_US = 46 }; // include/uapi/linux/tcp.h

static bool has_opt(int fd, int name) {
	int v;
	socklen_t n = sizeof v;
	return getsockopt(fd, IPPROTO_TCP, name, &v, &n) == 0;
}

// tcp_options sets what can be set in every state.
static void tcp_options(int fd) {
	so_bytes(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
	so_hold(fd, IPPROTO_TCP, TCP_CONGESTION);
	so_put(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	so_put(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1111);
	so_put(fd, IPPROTO_TCP, TCP_KEEPINTVL, 22);
	so_put(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
	so_put(fd, IPPROTO_TCP, TCP_SYNCNT, 4);
	so_put(fd, IPPROTO_TCP, TCP_LINGER2, 33);
	so_put(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 700000);
	so_put(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 30000);
	so_put(fd, IPPROTO_TCP, TCP_INQ, 1);
	so_put(fd, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1);
	so_put(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	so_put(fd, SOL_SOCKET, SO_MARK, 77);
	so_put(fd, IPPROTO_IP, IP_TOS, 0x20);
	so_put(fd, SOL_SOCKET, SO_PRIORITY, 5); // IP_TOS changes it
	so_put(fd, IPPROTO_IP, IP_TTL, 44);
	so_put(fd, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT);
	struct linger l = {1, 9};
	so_bytes(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	so_hold(fd, SOL_SOCKET, SO_LINGER);
	int names[][2] = {{RTO_MAX_MS, 30000}, {RTO_MIN_US, 150000}, {DELACK_MAX_US, 30000}};
	for (int i = 0; i < 3; i++)
		if (has_opt(fd, names[i][0])) so_put(fd, IPPROTO_TCP, names[i][0], names[i][1]);
}

static int opt_listener(bool group, int port) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int l = SYS(socket(AF_INET, SOCK_STREAM, 0));
	if (group) so_put(l, SOL_SOCKET, SO_REUSEPORT, 1);
	SYS(bind(l, (struct sockaddr *)&a, sizeof a));
	return l;
}

static struct sockaddr_in opt_name(int fd) {
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(fd, (struct sockaddr *)&a, &n));
	return a;
}

static struct sockaddr_in group_addr;
static pid_t workers[3];
static int opt_pair[2];
static unsigned seen;

// ask_group connects to whoever of the group takes it and wants an answer.
static void ask_group(void) {
	int fd = SYS(socket(AF_INET, SOCK_STREAM, 0));
	struct linger l = {1, 0}; // nothing is left behind
	so_bytes(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	CHECK(connect(fd, (struct sockaddr *)&group_addr, sizeof group_addr) == 0, "connect to the group: %s", strerror(errno));
	unsigned char who;
	CHECK(read_all(fd, &who, 1) == 1 && who < 3, "no worker answers: %s", strerror(errno));
	seen |= 1 << who;
	close(fd);
}

static void opts_check(void) {
	so_recheck();
	static int calls;
	if (calls++ % 4 == 0) ask_group();
	for (int i = 0; i < 2; i++) {
		char c = 'a' + i, got = 0;
		CHECK(send(opt_pair[i], &c, 1, MSG_NOSIGNAL) == 1, "send: %s", strerror(errno));
		CHECK(read_all(opt_pair[!i], &got, 1) == 1 && got == c, "the pair lost a byte");
	}
	for (int i = 0; i < 3; i++) expect_alive(workers[i]);
}

COMMAND(tcpopts) {
	int l = opt_listener(false, 0);
	tcp_options(l);
	so_put(l, IPPROTO_TCP, TCP_MAXSEG, 1200);
	so_put(l, IPPROTO_TCP, TCP_DEFER_ACCEPT, 7);
	so_put(l, IPPROTO_TCP, TCP_SAVE_SYN, 1);
	so_put(l, IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1);
	so_put(l, IPPROTO_TCP, TCP_WINDOW_CLAMP, 20000);
	so_bytes(l, IPPROTO_TCP, TCP_FASTOPEN_KEY, "0123456789abcdef", 16);
	so_hold(l, IPPROTO_TCP, TCP_FASTOPEN_KEY);
	SYS(listen(l, 7));
	so_put(l, IPPROTO_TCP, TCP_FASTOPEN, 16);
	so_name(l);

	int idle = SYS(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0));
	tcp_options(idle);
	so_put(idle, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1);
	so_put(idle, IPPROTO_TCP, TCP_MAXSEG, 999);
	so_put(idle, IPPROTO_TCP, TCP_QUICKACK, 0);
	so_put(idle, IPPROTO_TCP, TCP_CORK, 1);
	remember("idle socket", idle);

	int pl = opt_listener(false, 0);
	SYS(listen(pl, 1));
	struct sockaddr_in a = opt_name(pl);
	opt_pair[0] = SYS(socket(AF_INET, SOCK_STREAM, 0));
	SYS(connect(opt_pair[0], (struct sockaddr *)&a, sizeof a));
	opt_pair[1] = SYS(accept(pl, NULL, NULL));
	close(pl);
	for (int i = 0; i < 2; i++) {
		tcp_options(opt_pair[i]);
		so_put(opt_pair[i], IPPROTO_TCP, TCP_WINDOW_CLAMP, 30000);
	}

	// Two listeners of one port; the first is shared by two workers.
	int g[2];
	g[0] = opt_listener(true, 0);
	group_addr = opt_name(g[0]);
	g[1] = opt_listener(true, ntohs(group_addr.sin_port));
	for (int i = 0; i < 2; i++) {
		SYS(listen(g[i], 50));
		so_name(g[i]);
	}
	for (int i = 0; i < 3; i++) {
		workers[i] = child();
		if (workers[i]) continue;
		SYS(fcntl(g[i % 2], F_SETFL, O_NONBLOCK));
		for (unsigned char who = i;; orphan_check()) {
			struct pollfd p = {g[i % 2], POLLIN, 0};
			if (poll(&p, 1, 50) < 1) continue;
			int fd = accept(g[i % 2], NULL, NULL);
			if (fd < 0) continue; // the other one was faster
			(void)!write(fd, &who, 1);
			close(fd);
		}
	}
	loop(opts_check);
	for (int i = 0; i < 1000 && (seen & 2) + (seen & 5 ? 1 : 0) < 3; i++) ask_group();
	CHECK((seen & 2) && (seen & 5), "only workers %x of the group answer", seen);
	for (int i = 0; i < 3; i++) end_child(workers[i]);
}
