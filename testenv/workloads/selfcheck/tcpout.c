// TCP connections of which one end is outside the tree: tcpout is the tree,
// tcppeer the other end. Every connection has a number and a role; each byte in
// either direction is checked, and at the end how many there were.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

// Roles, as the tree sees them.
enum {
	STREAM = 's',    // both ends send and receive all the time
	FULL = 'f',      // both queues are full both ways; nobody receives
	SHUT = 'W',      // the tree has shut, the peer sends: FIN_WAIT2
	SHUT_LATE = 'w', // the same behind a full queue: FIN_WAIT1
	ENDED = 'c',     // the peer has sent and shut, the tree sends: CLOSE_WAIT
	BOTH_LATE = 'l', // the peer has shut, then the tree behind a full queue: LAST_ACK
	CROSSED = 'g',   // the tree has shut behind a full queue, then the peer: CLOSING
	CUT = 'k',       // no connection of its own: the peer shuts that of the number in port
	MAX_CONNS = 64,
};

struct hello { uint8_t id, role; uint16_t port; };

struct link {
	int fd, id, role, state;
	uint64_t sent, got;
	bool ended;        // the other's stream
	uint8_t opts, wscale; // as negotiated
};
static struct link links[MAX_CONNS];
static int link_count;
static bool peer_side, finishing;

static uint64_t seed(struct link *l, bool of_peer) { return 2 * l->id + of_peer + 100; }

// push sends up to max bytes, as many as go at once.
static void push(struct link *l, uint64_t max) {
	static unsigned char b[16384];
	for (uint64_t end = l->sent + max; l->sent < end;) {
		size_t n = end - l->sent < sizeof b ? end - l->sent : sizeof b;
		for (size_t k = 0; k < n; k++) b[k] = pattern(seed(l, peer_side), l->sent + k);
		ssize_t r = send(l->fd, b, n, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (r < 0 && errno == EAGAIN) return;
		CHECK(r > 0, "connection %d (%c): send: %s", l->id, l->role, strerror(errno));
		l->sent += r;
	}
}

// pull receives what is there, up to max bytes, and checks it.
static void pull(struct link *l, uint64_t max) {
	static unsigned char b[16384];
	for (uint64_t end = l->got + max; l->got < end && !l->ended;) {
		size_t n = end - l->got < sizeof b ? end - l->got : sizeof b;
		ssize_t r = recv(l->fd, b, n, MSG_DONTWAIT);
		if (r < 0 && errno == EAGAIN) return;
		CHECK(r >= 0, "connection %d (%c): receive after %lu: %s", l->id, l->role, l->got, strerror(errno));
		l->ended = r == 0;
		for (ssize_t k = 0; k < r; k++)
			CHECK(b[k] == pattern(seed(l, !peer_side), l->got + k), "connection %d (%c): byte %lu is wrong", l->id, l->role, l->got + k);
		l->got += r;
	}
}

static void fill_up(struct link *l) {
	// What the kernels of both ends pass on at once must have settled.
	for (int quiet = 0; quiet < 5;) {
		uint64_t before = l->sent;
		push(l, 1 << 26);
		quiet = l->sent == before ? quiet + 1 : 0;
		nap_ms(10);
	}
}

static void send_all(int fd, const void *p, size_t n) {
	CHECK(send(fd, p, n, MSG_NOSIGNAL) == (ssize_t)n, "send: %s", strerror(errno));
}

// The peer.

#ifndef TCP_RTO_MAX_MS
#define TCP_RTO_MAX_MS 44 // Linux 6.15
#endif

static int peer_listener, peer_full;

// persist makes a connection go on within some seconds after a pause of the other
// end, however long that was: as a rule the time from one try to the next doubles with
// each. After 15 tries, of more than a minute together, the kernel gives up.
static void persist(int fd) {
	int most = 8000;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_RTO_MAX_MS, &most, sizeof most);
}

static void peer_accept(void) {
	struct sockaddr_in6 a;
	socklen_t n = sizeof a;
	int fd = accept4(peer_listener, (struct sockaddr *)&a, &n, SOCK_CLOEXEC);
	if (fd < 0) {
		CHECK(errno == EAGAIN, "accept: %s", strerror(errno));
		return;
	}
	struct hello h;
	CHECK(read_all(fd, &h, sizeof h) == sizeof h, "no greeting");
	if (h.role == CUT) {
		for (int i = 0; i < link_count; i++)
			if (links[i].id == h.port) SYS(shutdown(links[i].fd, SHUT_WR));
		SYS(write(fd, "k", 1));
		close(fd);
		return;
	}
	if (h.port) { // it wants to be the one that accepts
		close(fd);
		a.sin6_port = h.port;
		fd = SYS(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
		SYS(connect(fd, (struct sockaddr *)&a, n));
	}
	CHECK(link_count < MAX_CONNS, "too many connections");
	persist(fd);
	struct link *l = &links[link_count++];
	*l = (struct link){.fd = fd, .id = h.id, .role = h.role};
	if (l->role == ENDED || l->role == BOTH_LATE) {
		push(l, 5000);
		SYS(shutdown(fd, SHUT_WR));
	}
	if (l->role == FULL) push(l, 1 << 26);
}

static bool peer_reads(struct link *l) {
	return finishing || l->role == STREAM || l->role == SHUT || l->role == ENDED;
}

static void peer_check(void) {
	peer_accept();
	bool all = true;
	struct link *stream = NULL;
	for (int i = 0; i < link_count; i++) {
		struct link *l = &links[i];
		if (peer_reads(l)) pull(l, 1 << 26);
		if (!finishing && (l->role == STREAM || l->role == SHUT)) push(l, l->role == STREAM ? 50000 : 100);
		if (!finishing && l->role == FULL) push(l, 1 << 26);
		if (l->role == STREAM) stream = l; else all &= l->ended;
	}
	if (!stream) return;
	if (stream->ended && !finishing) {
		finishing = true;
		for (int i = 0; i < link_count; i++) {
			struct link *l = &links[i];
			if (l->role == SHUT || l->role == SHUT_LATE || l->role == FULL) SYS(shutdown(l->fd, SHUT_WR));
		}
		SYS(listen(peer_full, 10)); // room for those that could not connect
	} else if (finishing && all) {
		uint64_t counts[MAX_CONNS] = {0};
		for (int i = 0; i < link_count; i++) counts[links[i].id] = links[i].got;
		SYS(fcntl(stream->fd, F_SETFL, 0));
		send_all(stream->fd, counts, sizeof counts);
		for (int i = 0; i < link_count; i++) close(links[i].fd);
		link_count = 0, finishing = false;
	}
}

static int listener(int port, int backlog) {
	struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any};
	int fd = SYS(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)), on = 1;
	SYS(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
	SYS(bind(fd, (struct sockaddr *)&a, sizeof a));
	SYS(listen(fd, backlog));
	return fd;
}

// tcppeer PORT: listens there; at PORT+1, full, nobody gets a connection until the
// tree ends.
COMMAND(tcppeer) {
	peer_side = true;
	int port = atoi(arg_values[0]);
	peer_listener = listener(port, 100);
	peer_full = listener(port + 1, 0);
	for (int i = 0; i < 2; i++) {
		struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons(port + 1), .sin6_addr = in6addr_loopback};
		int fd = SYS(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
		int r = connect(fd, (struct sockaddr *)&a, sizeof a);
		CHECK(r == 0 || errno == EINPROGRESS, "connect: %s", strerror(errno));
	}
	loop(peer_check);
}

// The tree.

static struct sockaddr_storage peer_addr;
static socklen_t peer_len;
static const char *out_dev;
static int asked = -1; // that has no answer
static int out_listener;

static void set_port(struct sockaddr_storage *a, int port) {
	if (a->ss_family == AF_INET6)
		((struct sockaddr_in6 *)a)->sin6_port = htons(port);
	else
		((struct sockaddr_in *)a)->sin_port = htons(port);
}

static int get_port(int fd) {
	struct sockaddr_storage a;
	socklen_t n = sizeof a;
	SYS(getsockname(fd, (struct sockaddr *)&a, &n));
	return a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port : ((struct sockaddr_in *)&a)->sin_port;
}

static int out_socket(int flags) {
	int fd = SYS(socket(peer_addr.ss_family, SOCK_STREAM | flags, 0));
	if (out_dev) SYS(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, out_dev, strlen(out_dev)));
	return fd;
}

static int greet(int id, int role, int port) {
	int fd = out_socket(0);
	SYS(connect(fd, (struct sockaddr *)&peer_addr, peer_len));
	struct hello h = {id, role, port};
	send_all(fd, &h, sizeof h);
	return fd;
}

static struct tcp_info info_of(int fd) {
	struct tcp_info i;
	socklen_t n = sizeof i;
	memset(&i, 0, sizeof i);
	SYS(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &i, &n));
	return i;
}

static void wait_state(struct link *l, const char *when) {
	int got = 0;
	for (int i = 0; i < PATIENCE_MS / 10; i++) {
		got = info_of(l->fd).tcpi_state;
		if (got == l->state) return;
		nap_ms(10);
	}
	fail("connection %d (%c): %s it is in state %d, want %d", l->id, l->role, when, got, l->state);
}

static void out_open(int role, bool accepted, int state) {
	struct link *l = &links[link_count];
	*l = (struct link){.id = link_count, .role = role, .state = state};
	link_count++;
	l->fd = greet(l->id, role, accepted ? get_port(out_listener) : 0);
	if (accepted) {
		char c;
		SYS(read(l->fd, &c, 1)); // the peer has closed it
		close(l->fd);
		l->fd = SYS(accept(out_listener, NULL, NULL));
	}
	switch (role) {
	case SHUT:
		push(l, 5000);
		SYS(shutdown(l->fd, SHUT_WR));
		break;
	case FULL:
		fill_up(l);
		break;
	case BOTH_LATE:
		l->state = 8;
		wait_state(l, "first");
		l->state = state;
		// fall through
	case SHUT_LATE:
	case CROSSED:
		fill_up(l);
		SYS(shutdown(l->fd, SHUT_WR));
		break;
	}
	if (role == CROSSED) {
		char c;
		int fd = greet(0, CUT, l->id);
		CHECK(read_all(fd, &c, 1) == 1, "the peer does not answer");
		close(fd);
	}
	wait_state(l, "at first");
	struct tcp_info i = info_of(l->fd);
	l->opts = i.tcpi_options & 7;
	memcpy(&l->wscale, (char *)&i + 6, 1);
	remember("TCP connection", l->fd);
}

static void out_check(void) {
	recheck();
	for (int i = 0; i < link_count; i++) {
		struct link *l = &links[i];
		if (l->role == STREAM || l->role == SHUT) pull(l, 100000);
		if (l->role == STREAM || l->role == ENDED) push(l, l->role == STREAM ? 50000 : 100);
		wait_state(l, "now");
		struct tcp_info t = info_of(l->fd);
		CHECK((t.tcpi_options & 7) == l->opts, "connection %d (%c): options are %x, were %x", l->id, l->role, t.tcpi_options & 7, l->opts);
		CHECK(memcmp(&l->wscale, (char *)&t + 6, 1) == 0, "connection %d (%c): window scales changed", l->id, l->role);
		if (l->role == ENDED || l->role == BOTH_LATE || l->role == CROSSED) {
			struct pollfd p = {l->fd, POLLRDHUP, 0};
			SYS(poll(&p, 1, 0));
			CHECK(p.revents & POLLRDHUP, "connection %d (%c): the peer's end is not seen", l->id, l->role);
		}
	}
	if (asked >= 0) {
		int state = info_of(asked).tcpi_state;
		CHECK(state == 2, "the connection that nobody answers is in state %d", state);
	}
}

// tcpout 4|6|m ADDRESS PORT [DEVICE]: m is IPv4 by a socket of IPv6. Sockets are bound
// to the device; an address of its link is only reached through it.
COMMAND(tcpout) {
	struct sockaddr_in *a4 = (void *)&peer_addr;
	struct sockaddr_in6 *a6 = (void *)&peer_addr;
	char mapped[64];
	int port = atoi(arg_values[2]);
	if (arg_values[0][0] == '4') {
		*a4 = (struct sockaddr_in){.sin_family = AF_INET};
		CHECK(inet_pton(AF_INET, arg_values[1], &a4->sin_addr) == 1, "address");
		peer_len = sizeof *a4;
	} else {
		snprintf(mapped, sizeof mapped, "%s%s", arg_values[0][0] == 'm' ? "::ffff:" : "", arg_values[1]);
		*a6 = (struct sockaddr_in6){.sin6_family = AF_INET6};
		CHECK(inet_pton(AF_INET6, mapped, &a6->sin6_addr) == 1, "address");
		peer_len = sizeof *a6;
	}
	set_port(&peer_addr, port);
	out_dev = arg_count > 3 ? arg_values[3] : NULL;
	if (out_dev && peer_addr.ss_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&a6->sin6_addr)) {
		a6->sin6_scope_id = if_nametoindex(out_dev);
		out_dev = NULL;
	}
	out_listener = listener(0, 10);
	SYS(fcntl(out_listener, F_SETFL, 0));
	int roles[][2] = {{STREAM, 1}, {FULL, 1}, {SHUT, 5}, {SHUT_LATE, 4}, {ENDED, 8}, {BOTH_LATE, 9}, {CROSSED, 11}};
	for (int k = 0; k < 2; k++)
		for (size_t i = k ? 1 : 0; i < sizeof roles / sizeof *roles; i++) out_open(roles[i][0], k, roles[i][1]);
	struct sockaddr_storage full = peer_addr;
	set_port(&full, port + 1);
	asked = out_socket(SOCK_NONBLOCK);
	CHECK(connect(asked, (struct sockaddr *)&full, peer_len) < 0 && errno == EINPROGRESS, "connect: %s", strerror(errno));
	loop(out_check);
	for (int i = 0; i < link_count; i++) {
		struct link *l = &links[i];
		if (l->role != STREAM) (void)shutdown(l->fd, SHUT_WR);
	}
	SYS(shutdown(links[0].fd, SHUT_WR));
	for (int i = 1; i < link_count; i++) {
		struct link *l = &links[i];
		for (int k = 0; !l->ended; k++) {
			pull(l, 1 << 26);
			CHECK(k < PATIENCE_MS / 10, "connection %d (%c): no end of file after %lu bytes", l->id, l->role, l->got);
			if (!l->ended) nap_ms(10);
		}
		CHECK(l->role != ENDED && l->role != BOTH_LATE ? true : l->got == 5000, "connection %d (%c): %lu bytes came, want 5000", l->id, l->role, l->got);
	}
	// What the peer sent, and then its counts.
	struct link *s = &links[0];
	uint64_t counts[MAX_CONNS];
	unsigned char *b = malloc(1 << 24);
	size_t n = 0;
	for (ssize_t r; (r = recv(s->fd, b + n, (1 << 24) - n, 0)) != 0; n += r) {
		if (r < 0 && errno == EINTR) { r = 0; continue; }
		CHECK(r > 0, "the stream at the end: %s", strerror(errno));
	}
	CHECK(n >= sizeof counts, "no counts at the end of the stream");
	n -= sizeof counts;
	memcpy(counts, b + n, sizeof counts);
	for (size_t k = 0; k < n; k++) CHECK(b[k] == pattern(seed(s, true), s->got + k), "the stream: byte %lu is wrong", s->got + k);
	for (int i = 0; i < link_count; i++)
		CHECK(counts[i] == links[i].sent, "connection %d (%c): the peer received %lu bytes, %lu were sent", i, links[i].role, counts[i], links[i].sent);
	struct pollfd p = {asked, POLLOUT, 0};
	for (int64_t end = now_ns() + PATIENCE_MS * 1000000LL; poll(&p, 1, 1000) != 1;) CHECK(now_ns() < end, "the peer had room, but no connection was made");
	int err = 0;
	socklen_t len = sizeof err;
	SYS(getsockopt(asked, SOL_SOCKET, SO_ERROR, &err, &len));
	CHECK(err == 0, "the connection that was asked for: %s", strerror(err));
}
