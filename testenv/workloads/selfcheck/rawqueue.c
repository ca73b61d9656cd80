// Packets that wait at ping, raw and UDP-Lite sockets, with their senders.
#include "sockopts.h"
#include <arpa/inet.h>
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#ifndef IPPROTO_UDPLITE
#define IPPROTO_UDPLITE 136
#endif

enum { MAXPACKETS = 32, EXPERIMENT = 253 };

// FORGED_TTL marks packets of which the whole header is ours.
enum { FORGED_TTL = 33 };

// A queue is a socket and what waits in it.
struct queue {
	const char *name;
	int fd, n;
	struct packet {
		unsigned char data[2048];
		ssize_t len;
		struct sockaddr_storage from;
		socklen_t fromlen;
		int ttl; // 0: not told
	} p[MAXPACKETS];
};

static struct queue queues[8];
static int queue_count;

static uint32_t memory(int fd) {
	uint32_t m[16] = {0};
	socklen_t n = sizeof m;
	SYS(getsockopt(fd, SOL_SOCKET, 55 /* SO_MEMINFO */, m, &n));
	return m[0];
}

// come waits until more is in a queue than there was.
static void come(int fd, uint32_t was) {
	for (int i = 0; i < 30000 && memory(fd) <= was; i++) nap_ms(1);
	CHECK(memory(fd) > was, "a packet does not come");
}

static void receive(int fd, struct packet *p, int flags) {
	char oob[256];
	struct iovec v = {p->data, sizeof p->data};
	struct msghdr m = {&p->from, sizeof p->from, &v, 1, oob, sizeof oob, 0};
	memset(&p->from, 0, sizeof p->from);
	p->ttl = 0;
	p->len = recvmsg(fd, &m, flags | MSG_DONTWAIT);
	p->fromlen = m.msg_namelen;
	for (struct cmsghdr *c = p->len < 0 ? NULL : CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL) p->ttl = *(int *)CMSG_DATA(c);
		if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_HOPLIMIT) p->ttl = *(int *)CMSG_DATA(c);
	}
}

static void same(const char *name, int i, struct packet *want, struct packet *got) {
	CHECK(got->len >= 0, "%s: packet %d is lost", name, i);
	// A packet that is made anew gets another number, and so another checksum.
	if (got->len > 20 && got->data[0] == 0x45 && want->data[8] != FORGED_TTL) {
		memset(want->data + 4, 0, 2), memset(got->data + 4, 0, 2);
		memset(want->data + 10, 0, 2), memset(got->data + 10, 0, 2);
	}
	CHECK(got->len == want->len && memcmp(got->data, want->data, want->len) == 0, "%s: packet %d has %zd bytes, not those %zd that it had", name, i, got->len, want->len);
	CHECK(got->fromlen == want->fromlen && memcmp(&got->from, &want->from, want->fromlen) == 0, "%s: packet %d has another sender", name, i);
	CHECK(got->ttl == want->ttl, "%s: packet %d has TTL %d, want %d", name, i, got->ttl, want->ttl);
}

static struct queue *queue(const char *name, int family, int type, int protocol) {
	struct queue *q = &queues[queue_count++];
	q->name = name;
	q->fd = SYS(socket(family, type, protocol));
	remember(name, q->fd);
	return q;
}

// filled reads all of what was sent to a queue, and then lets it be sent once more.
static void filled(void (*send_all)(void)) {
	for (int round = 0; round < 2; round++) {
		send_all();
		for (int i = 0; i < queue_count && !round; i++) {
			struct queue *q = &queues[i];
			for (receive(q->fd, &q->p[q->n], 0); q->p[q->n].len >= 0; receive(q->fd, &q->p[q->n], 0))
				CHECK(++q->n < MAXPACKETS, "%s: more than %d packets", q->name, MAXPACKETS);
			CHECK(q->n > 1, "%s: %d packets", q->name, q->n);
		}
	}
}

static void queues_check(void) {
	static struct packet got;
	so_recheck();
	for (int i = 0; i < queue_count; i++) {
		struct pollfd p = {queues[i].fd, POLLIN | POLLOUT, 0};
		SYS(poll(&p, 1, 0));
		CHECK(p.revents == (POLLIN | POLLOUT), "%s: poll says %x", queues[i].name, p.revents);
		receive(queues[i].fd, &got, MSG_PEEK);
		same(queues[i].name, 0, &queues[i].p[0], &got);
	}
}

static void queues_end(void) {
	static struct packet got;
	for (int i = 0; i < queue_count; i++) {
		for (int k = 0; k < queues[i].n; k++) {
			receive(queues[i].fd, &got, 0);
			same(queues[i].name, k, &queues[i].p[k], &got);
		}
		so_silent(queues[i].fd, queues[i].name);
	}
}

static struct sockaddr_in at4(const char *a, int port) {
	struct sockaddr_in s = {.sin_family = AF_INET, .sin_port = htons(port)};
	inet_pton(AF_INET, a, &s.sin_addr);
	return s;
}

static struct sockaddr_in6 at6(const char *a, int port) {
	struct sockaddr_in6 s = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	inet_pton(AF_INET6, a, &s.sin6_addr);
	return s;
}

static uint16_t internet_sum(const void *p, int n) {
	const uint8_t *b = p;
	uint32_t sum = 0;
	for (int i = 0; i < n; i += 2) sum += b[i] << 8 | (i + 1 < n ? b[i + 1] : 0);
	while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
	return htons(~sum);
}

// ---- answers to pings

static struct queue *pq4, *pq6, *pqcon;

static void ping_all(void) {
	static uint16_t seq = 100;
	struct sockaddr_in to4 = at4("127.0.0.7", 0);
	struct sockaddr_in6 to6 = at6("::1", 0);
	for (int i = 0; i < 5; i++) {
		struct { struct icmphdr h; char data[1000]; } e = {.h = {.type = ICMP_ECHO, .un.echo.sequence = htons(seq + i)}};
		for (int k = 0; k < 1000; k++) e.data[k] = pattern(i, k);
		size_t n = sizeof e.h + i * i * 60;
		for (int k = 0; k < 3; k++) {
			struct queue *q = k == 0 ? pq4 : k == 1 ? pq6 : pqcon;
			const void *to = k == 0 ? (void *)&to4 : k == 1 ? (void *)&to6 : NULL;
			uint32_t was = memory(q->fd);
			e.h.type = k == 1 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO;
			CHECK(sendto(q->fd, &e, n, 0, to, k == 0 ? sizeof to4 : k == 1 ? sizeof to6 : 0) == (ssize_t)n, "ping: %s", strerror(errno));
			come(q->fd, was);
		}
	}
}

COMMAND(pingqueue) {
	int f = SYS(open("/proc/sys/net/ipv4/ping_group_range", O_WRONLY));
	CHECK(write(f, "0 2147483647", 12) == 12, "allow ping sockets: %s", strerror(errno));
	close(f);
	pq4 = queue("a ping socket", AF_INET, SOCK_DGRAM, IPPROTO_ICMP);
	pq6 = queue("a ping socket of IPv6", AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, IPPROTO_ICMPV6);
	pqcon = queue("a ping socket with a peer", AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, IPPROTO_ICMP);
	struct sockaddr_in lo4 = at4("127.0.0.1", 3777), to = at4("127.0.0.9", 0);
	struct sockaddr_in6 any6 = at6("::", 3778);
	SYS(bind(pq4->fd, (struct sockaddr *)&lo4, sizeof lo4));
	SYS(bind(pq6->fd, (struct sockaddr *)&any6, sizeof any6));
	SYS(connect(pqcon->fd, (struct sockaddr *)&to, sizeof to));
	so_put(pq4->fd, IPPROTO_IP, IP_RECVTTL, 1);
	so_put(pq4->fd, IPPROTO_IP, IP_RECVERR, 1);
	so_put(pq6->fd, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
	so_put(pq4->fd, SOL_SOCKET, SO_RCVBUF, 100000);
	filled(ping_all);
	so_name(pq4->fd), so_name(pq6->fd), so_name(pqcon->fd);
	loop(queues_check);
	queues_end();
	ping_all();
	for (int i = 0; i < queue_count; i++) {
		static struct packet got;
		int n = 0;
		for (receive(queues[i].fd, &got, 0); got.len >= 0; receive(queues[i].fd, &got, 0)) n++;
		CHECK(n == 5, "%s: %d answers to 5 pings", queues[i].name, n);
	}
}

// ---- raw sockets

static struct queue *rany, *rlo, *rexp, *rpeer, *r6, *r6exp;
static int rout, rout6, rhead;

static void forged(const char *from, const char *to, int protocol, const void *p, int n) {
	unsigned char d[256] = {0x45, 0x10, 0, 0, 0x12, 0x34, 0x40, 0, FORGED_TTL, protocol};
	struct sockaddr_in a = at4(from, 0), b = at4(to, 0);
	memcpy(d + 12, &a.sin_addr, 4), memcpy(d + 16, &b.sin_addr, 4), memcpy(d + 20, p, n);
	CHECK(SYS(sendto(rhead, d, 20 + n, 0, (struct sockaddr *)&b, sizeof b)) == 20 + n, "send with a header");
}

static void raw_all(void) {
	struct sockaddr_in lo = at4("127.0.0.1", 0), peer = at4("127.0.0.3", 0);
	struct sockaddr_in6 lo6 = at6("::1", 0);
	uint32_t was[8];
	for (int i = 0; i < queue_count; i++) was[i] = memory(queues[i].fd);
	// An echo, which is answered; an answer from elsewhere, of odd length.
	struct icmphdr h = {.type = ICMP_ECHO, .un.echo = {htons(3779), htons(1)}};
	h.checksum = internet_sum(&h, sizeof h);
	CHECK(SYS(sendto(rout, &h, sizeof h, 0, (struct sockaddr *)&lo, sizeof lo)) == sizeof h, "send an echo");
	for (int i = 0; i < 3; i++) {
		unsigned char b[8 + 3] = {ICMP_ECHOREPLY, 0, 0, 0, 0x0e, 0xc4, 0, i, 'a' + i, 'b', 'c'};
		uint16_t sum = internet_sum(b, sizeof b);
		memcpy(b + 2, &sum, 2);
		forged("10.77.1.2", "127.0.0.1", IPPROTO_ICMP, b, sizeof b);
		char text[] = "experiment 0";
		text[11] += i;
		int from = rexp->fd;
		forged("10.77.1.3", "127.0.0.4", EXPERIMENT, text, i == 1 ? 0 : 12);
		forged("127.0.0.3", "127.0.0.1", EXPERIMENT, text, 12);
		CHECK(SYS(sendto(from, text, 12, 0, (struct sockaddr *)&peer, sizeof peer)) == 12, "send");
		CHECK(SYS(sendto(r6exp->fd, text, 12 - i, 0, (struct sockaddr *)&lo6, sizeof lo6)) == 12 - i, "send");
		unsigned char e6[8 + 4] = {ICMPV6_ECHO_REQUEST, 0, 0, 0, 0x0e, 0xc5, 0, i, 1, 2, 3, i};
		CHECK(SYS(sendto(rout6, e6, sizeof e6 - i, 0, (struct sockaddr *)&lo6, sizeof lo6)) == (ssize_t)sizeof e6 - i, "send an echo of IPv6");
	}
	for (int i = 0; i < queue_count; i++) come(queues[i].fd, was[i]);
	nap_ms(50); // the last of them, too: all came over one interface
}

static void rawqueue_setup(void) {
	rany = queue("a raw socket of ICMP", AF_INET, SOCK_RAW, IPPROTO_ICMP);
	rlo = queue("a raw socket of ICMP with an address", AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);
	rexp = queue("a raw socket", AF_INET, SOCK_RAW, EXPERIMENT);
	rpeer = queue("a raw socket with a peer", AF_INET, SOCK_RAW | SOCK_NONBLOCK, EXPERIMENT);
	r6 = queue("a raw socket of ICMPv6", AF_INET6, SOCK_RAW, IPPROTO_ICMPV6);
	r6exp = queue("a raw socket of IPv6", AF_INET6, SOCK_RAW, EXPERIMENT);
	struct sockaddr_in lo = at4("127.0.0.1", 0), peer = at4("127.0.0.3", 0);
	SYS(bind(rlo->fd, (struct sockaddr *)&lo, sizeof lo));
	SYS(connect(rpeer->fd, (struct sockaddr *)&peer, sizeof peer));
	int icmp[] = {rany->fd, rlo->fd};
	for (int i = 0; i < 2; i++)
		so_bytes(icmp[i], SOL_RAW, ICMP_FILTER, &(struct icmp_filter){~(1u << ICMP_ECHO | 1u << ICMP_ECHOREPLY)}, sizeof(struct icmp_filter));
	unsigned char f6[32];
	memset(f6, 0xff, sizeof f6);
	((uint32_t *)f6)[ICMPV6_ECHO_REPLY >> 5] &= ~(1u << (ICMPV6_ECHO_REPLY & 31));
	so_bytes(r6->fd, IPPROTO_ICMPV6, ICMPV6_FILTER, f6, sizeof f6);
	so_put(rany->fd, IPPROTO_IP, IP_RECVTTL, 1);
	so_put(r6->fd, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
	rout = SYS(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
	rout6 = SYS(socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6));
	rhead = SYS(socket(AF_INET, SOCK_RAW, IPPROTO_RAW));
	so_bytes(rout, SOL_RAW, ICMP_FILTER, &(struct icmp_filter){~0u}, sizeof(struct icmp_filter));
	memset(f6, 0xff, sizeof f6);
	so_bytes(rout6, IPPROTO_ICMPV6, ICMPV6_FILTER, f6, sizeof f6);
	remember("a raw socket that sends", rout);
	remember("a raw socket of IPv6 that sends", rout6);
	filled(raw_all);
}

COMMAND(rawqueue) {
	SYS(unshare(CLONE_NEWNET)); // nobody else's packets
	CHECK(system("ip link set lo up") == 0, "no loopback");
	rawqueue_setup();
	loop(queues_check);
	queues_end();
	raw_all();
	for (int i = 0; i < queue_count; i++) {
		static struct packet got;
		int n = 0;
		for (receive(queues[i].fd, &got, 0); got.len >= 0; receive(queues[i].fd, &got, 0)) n++;
		CHECK(n == queues[i].n, "%s: %d packets came, as many are to come as %d", queues[i].name, n, queues[i].n);
	}
}

// ---- UDP-Lite

static int lsend[2];

static void lite_all(void) {
	static const char *text[] = {"lite", "", "checksummed in part", "x"};
	for (int i = 0; i < 4; i++) {
		for (int k = 0; k < 2; k++) {
			struct sockaddr_storage a;
			socklen_t n = sizeof a;
			SYS(getsockname(queues[k].fd, (struct sockaddr *)&a, &n));
			if (k == 0) ((struct sockaddr_in *)&a)->sin_addr.s_addr = htonl(INADDR_LOOPBACK + i);
			uint32_t was = memory(queues[k].fd);
			CHECK(sendto(lsend[k], text[i], strlen(text[i]), 0, (struct sockaddr *)&a, n) == (ssize_t)strlen(text[i]), "send: %s", strerror(errno));
			come(queues[k].fd, was);
		}
	}
}

COMMAND(litequeue) {
	struct queue *q4 = queue("a UDP-Lite socket", AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE), *q6 = queue("a UDP-Lite socket of IPv6", AF_INET6, SOCK_DGRAM, IPPROTO_UDPLITE);
	lsend[0] = SYS(socket(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE));
	lsend[1] = SYS(socket(AF_INET6, SOCK_DGRAM, IPPROTO_UDPLITE));
	struct sockaddr_in any = at4("0.0.0.0", 0), from = at4("127.0.0.5", 0);
	struct sockaddr_in6 lo6 = at6("::1", 0);
	SYS(bind(q4->fd, (struct sockaddr *)&any, sizeof any));
	SYS(bind(q6->fd, (struct sockaddr *)&lo6, sizeof lo6));
	SYS(bind(lsend[0], (struct sockaddr *)&from, sizeof from));
	so_put(lsend[0], IPPROTO_UDPLITE, 10, 12); // UDPLITE_SEND_CSCOV
	so_put(lsend[0], IPPROTO_IP, IP_TTL, 21);
	so_put(q4->fd, IPPROTO_UDPLITE, 11, 10); // UDPLITE_RECV_CSCOV
	so_put(q4->fd, IPPROTO_IP, IP_RECVTTL, 1);
	so_name(q4->fd), so_name(q6->fd);
	remember("a UDP-Lite sender", lsend[0]);
	remember("a UDP-Lite sender of IPv6", lsend[1]);
	filled(lite_all);
	loop(queues_check);
	queues_end();
}
