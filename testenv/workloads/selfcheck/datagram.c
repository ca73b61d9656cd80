// UDP, UDP-Lite, raw and ping sockets: their options, multicast groups, filters.
#include "sockopts.h"
#include <arpa/inet.h>
#include <net/if.h> // before those of the kernel
#include <linux/errqueue.h>
#include <linux/filter.h>
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/ipv6.h>
#include <linux/net_tstamp.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sched.h>
#ifndef IPV6_MULTICAST_ALL
#define IPV6_MULTICAST_ALL 29
#endif
#ifndef IP_LOCAL_PORT_RANGE
#define IP_LOCAL_PORT_RANGE 51
#endif

static struct sockaddr_in at4(const char *a, int port) {
	struct sockaddr_in s = {.sin_family = AF_INET, .sin_port = htons(port)};
	inet_pton(AF_INET, a, &s.sin_addr);
	return s;
}

static struct sockaddr_in6 at6(const char *a, int port, int zone) {
	struct sockaddr_in6 s = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_scope_id = zone};
	inet_pton(AF_INET6, a, &s.sin6_addr);
	return s;
}

static int bound4(const char *a, int port) {
	int fd = SYS(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	so_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	struct sockaddr_in s = at4(a, port);
	SYS(bind(fd, (struct sockaddr *)&s, sizeof s));
	remember("UDP socket", fd);
	so_name(fd);
	return fd;
}

static int bound6(const char *a, int port, int zone) {
	int fd = SYS(socket(AF_INET6, SOCK_DGRAM, 0));
	so_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	struct sockaddr_in6 s = at6(a, port, zone);
	SYS(bind(fd, (struct sockaddr *)&s, sizeof s));
	remember("UDP socket of IPv6", fd);
	so_name(fd);
	return fd;
}

static void send4(int fd, const char *text, const char *a, int port) {
	struct sockaddr_in s = at4(a, port);
	CHECK(sendto(fd, text, strlen(text), 0, (struct sockaddr *)&s, sizeof s) == (ssize_t)strlen(text), "send to %s: %s", a, strerror(errno));
}

static void send6(int fd, const char *text, const char *a, int port, int zone) {
	struct sockaddr_in6 s = at6(a, port, zone);
	CHECK(sendto(fd, text, strlen(text), 0, (struct sockaddr *)&s, sizeof s) == (ssize_t)strlen(text), "send to %s: %s", a, strerror(errno));
}

static void join(int fd, int level, int how, int index, const void *group, const void *source, socklen_t n) {
	struct group_source_req r = {.gsr_interface = index};
	memcpy(&r.gsr_group, group, n);
	if (source) memcpy(&r.gsr_source, source, n);
	so_bytes(fd, level, how, &r, source ? sizeof r : sizeof(struct group_req));
}

// ---- every option of a UDP socket

static int uo4, uo6;

COMMAND(udpopts) {
	uo4 = bound4("127.0.0.1", 0);
	uo6 = bound6("::1", 0, 0);
	int both[] = {uo4, uo6};
	for (int i = 0; i < 2; i++) {
		int fd = both[i];
		static const struct { int name, v; } on[] = {{SO_DEBUG, 1}, {SO_BROADCAST, 1}, {SO_DONTROUTE, 1}, {SO_MARK, 77}, {SO_RXQ_OVFL, 1},
			{SO_NO_CHECK, 1}, {SO_BUSY_POLL, 30}, {SO_INCOMING_CPU, 1}, {SO_SELECT_ERR_QUEUE, 1}, {SO_PEEK_OFF, 3}, {SO_TIMESTAMPNS, 1},
			{SO_RCVLOWAT, 5}, {SO_REUSEPORT, 1}};
		for (size_t k = 0; k < sizeof on / sizeof *on; k++) so_put(fd, SOL_SOCKET, on[k].name, on[k].v);
		uint64_t rate = 123456789;
		so_bytes(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate);
		so_hold(fd, SOL_SOCKET, SO_MAX_PACING_RATE);
		so_put(fd, SOL_SOCKET, SO_TIMESTAMPING, SOF_TIMESTAMPING_RX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE);
		so_bytes(fd, SOL_SOCKET, SO_TXTIME, (int[]){CLOCK_MONOTONIC, 3}, 8);
		so_hold(fd, SOL_SOCKET, SO_TXTIME);
		so_bytes(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){3, 500000}, sizeof(struct timeval));
		so_hold(fd, SOL_SOCKET, SO_RCVTIMEO);
		static const struct { int name, v; } ip[] = {{IP_TOS, 0x10}, {IP_TTL, 33}, {IP_PKTINFO, 1}, {IP_MTU_DISCOVER, IP_PMTUDISC_PROBE},
			{IP_RECVERR, 1}, {IP_RECVTTL, 1}, {IP_RECVTOS, 1}, {IP_RECVOPTS, 1}, {IP_RETOPTS, 1}, {IP_FREEBIND, 1}, {IP_TRANSPARENT, 1},
			{IP_RECVORIGDSTADDR, 1}, {IP_MINTTL, 20}, {IP_BIND_ADDRESS_NO_PORT, 1}, {IP_MULTICAST_TTL, 5}, {IP_MULTICAST_LOOP, 0},
			{IP_MULTICAST_ALL, 0}, {IP_CHECKSUM, 1}, {IP_RECVFRAGSIZE, 1}};
		for (size_t k = 0; k < sizeof ip / sizeof *ip; k++) so_put(fd, IPPROTO_IP, ip[k].name, ip[k].v);
		so_put(fd, SOL_SOCKET, SO_PRIORITY, 5); // after IP_TOS, which changes it
		so_bytes(fd, IPPROTO_IP, IP_OPTIONS, "\x94\x04\0", 4);
		so_hold(fd, IPPROTO_IP, IP_OPTIONS);
		so_bytes(fd, IPPROTO_IP, IP_MULTICAST_IF, &(struct in_addr){htonl(INADDR_LOOPBACK)}, 4);
		so_hold(fd, IPPROTO_IP, IP_MULTICAST_IF);
		so_put(fd, IPPROTO_IP, IP_UNICAST_IF, htonl(if_nametoindex("lo")));
		so_put(fd, IPPROTO_IP, IP_LOCAL_PORT_RANGE, 40000 | 41000 << 16);
		so_put(fd, IPPROTO_UDP, UDP_SEGMENT, 500);
		so_put(fd, IPPROTO_UDP, UDP_GRO, 1);
		so_put(fd, IPPROTO_UDP, UDP_CORK, 1); // and nothing held back
	}
	static const struct { int name, v; } ip6[] = {{IPV6_TCLASS, 0x20}, {IPV6_UNICAST_HOPS, 44}, {IPV6_RECVPKTINFO, 1}, {IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO},
		{IPV6_RECVERR, 1}, {IPV6_RECVHOPLIMIT, 1}, {IPV6_RECVTCLASS, 1}, {IPV6_RECVHOPOPTS, 1}, {IPV6_RECVRTHDR, 1}, {IPV6_RECVDSTOPTS, 1},
		{IPV6_RECVPATHMTU, 1}, {IPV6_DONTFRAG, 1}, {IPV6_AUTOFLOWLABEL, 0}, {IPV6_ADDR_PREFERENCES, IPV6_PREFER_SRC_TMP}, {IPV6_MINHOPCOUNT, 3},
		{IPV6_RECVORIGDSTADDR, 1}, {IPV6_MULTICAST_HOPS, 6}, {IPV6_MULTICAST_LOOP, 0}, {IPV6_MULTICAST_ALL, 0}, {IPV6_FLOWINFO_SEND, 1},
		{IPV6_RECVFRAGSIZE, 1}};
	for (size_t k = 0; k < sizeof ip6 / sizeof *ip6; k++) so_put(uo6, IPPROTO_IPV6, ip6[k].name, ip6[k].v);
	so_put(uo6, IPPROTO_IPV6, IPV6_MULTICAST_IF, if_nametoindex("lo"));
	so_put(uo6, IPPROTO_IPV6, IPV6_UNICAST_IF, htonl(if_nametoindex("lo")));
	so_bytes(uo6, IPPROTO_IPV6, IPV6_DSTOPTS, "\0\0\1\4\0\0\0\0", 8);
	so_hold(uo6, IPPROTO_IPV6, IPV6_DSTOPTS);
	so_put(uo6, IPPROTO_UDP, 101, 1); // UDP_NO_CHECK6_TX
	so_put(uo6, IPPROTO_UDP, 102, 1); // UDP_NO_CHECK6_RX
	loop(so_recheck);
}

// ---- multicast

static int mall, mssm, mblk, m6, m6ssm, mdual, mdev, mout, mout6;

static void multicast_check(void) {
	so_recheck();
	char text[32];
	static int n;
	snprintf(text, sizeof text, "word %d", n++);
	send4(mout, text, "239.7.7.1", 7001);
	so_expect(mall, text, "a member of any source");
	send4(mout, text, "232.7.7.2", 7002);
	so_expect(mssm, text, "a member of this source");
	send4(mout, text, "239.7.7.3", 7003);
	so_silent(mblk, "a member but of this source");
	send4(mdev, text, "239.7.7.3", 7003);
	so_expect(mblk, text, "a member but of another source");
	so_silent(mssm, "a member of another source");
	send4(mout, text, "239.7.7.4", 7004);
	so_expect(mdual, text, "a socket of IPv6 in a group of IPv4");
	send6(mout6, text, "ff15::7:1", 7005, 0);
	so_expect(m6, text, "a member of IPv6");
	send6(mout6, text, "ff35::7:2", 7006, 0);
	so_expect(m6ssm, text, "a member of IPv6 of this source");
}

COMMAND(multicast) {
	int lo = if_nametoindex("lo");
	CHECK(system("ip -6 route replace local ff00::/8 dev lo table local") == 0, "no route for groups of IPv6");
	mout = bound4("127.0.0.1", 0);
	mdev = bound4("127.0.0.2", 0);
	mout6 = bound6("::1", 0, 0);
	for (int i = 0; i < 2; i++)
		so_bytes(i ? mdev : mout, IPPROTO_IP, IP_MULTICAST_IF, &(struct ip_mreqn){.imr_address.s_addr = htonl(INADDR_LOOPBACK), .imr_ifindex = lo}, sizeof(struct ip_mreqn));
	so_put(mout6, IPPROTO_IPV6, IPV6_MULTICAST_IF, lo);

	mall = bound4("239.7.7.1", 7001);
	so_bytes(mall, IPPROTO_IP, IP_ADD_MEMBERSHIP, &(struct ip_mreqn){{inet_addr("239.7.7.1")}, {0}, lo}, sizeof(struct ip_mreqn));
	mssm = bound4("0.0.0.0", 7002);
	struct sockaddr_in g = at4("232.7.7.2", 0), s = at4("127.0.0.1", 0), s2 = at4("10.9.9.9", 0);
	join(mssm, IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, lo, &g, &s, sizeof g);
	join(mssm, IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, lo, &g, &s2, sizeof g);
	so_put(mssm, IPPROTO_IP, IP_MULTICAST_ALL, 0);
	mblk = bound4("0.0.0.0", 7003);
	g = at4("239.7.7.3", 0);
	join(mblk, IPPROTO_IP, MCAST_JOIN_GROUP, lo, &g, NULL, sizeof g);
	join(mblk, IPPROTO_IP, MCAST_BLOCK_SOURCE, lo, &g, &s, sizeof g);
	mdual = bound6("::", 7004, 0);
	so_bytes(mdual, IPPROTO_IP, IP_ADD_MEMBERSHIP, &(struct ip_mreqn){{inet_addr("239.7.7.4")}, {0}, lo}, sizeof(struct ip_mreqn));
	m6 = bound6("ff15::7:1", 7005, 0);
	struct sockaddr_in6 g6 = at6("ff15::7:1", 0, 0), s6 = at6("::1", 0, 0);
	join(m6, IPPROTO_IPV6, MCAST_JOIN_GROUP, lo, &g6, NULL, sizeof g6);
	m6ssm = bound6("::", 7006, 0);
	g6 = at6("ff35::7:2", 0, 0);
	join(m6ssm, IPPROTO_IPV6, MCAST_JOIN_SOURCE_GROUP, lo, &g6, &s6, sizeof g6);
	loop(multicast_check);
	// What was joined can be left, and cannot be joined again.
	struct ip_mreqn m = {{inet_addr("239.7.7.1")}, {0}, lo};
	CHECK(setsockopt(mall, IPPROTO_IP, IP_ADD_MEMBERSHIP, &m, sizeof m) < 0 && errno == EADDRINUSE, "the group was not joined any more");
	so_bytes(mall, IPPROTO_IP, IP_DROP_MEMBERSHIP, &m, sizeof m);
	send4(mout, "after", "239.7.7.1", 7001);
	nap_ms(20);
}

// ---- classic filters

static int fdrop, flocked, funfiltered;
static struct sock_filter evens[] = {
	// Of a UDP datagram, the first byte behind the header of 8 bytes; even ones pass.
	BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 8), BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 1), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, 0xffffffff), BPF_STMT(BPF_RET | BPF_K, 0)};

static void filter_send(int to, const char *text) {
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(to, (struct sockaddr *)&a, &n));
	CHECK(sendto(funfiltered, text, strlen(text), 0, (struct sockaddr *)&a, n) == (ssize_t)strlen(text), "send: %s", strerror(errno));
}

static void filter_check(void) {
	so_recheck();
	int both[] = {fdrop, flocked};
	for (int i = 0; i < 2; i++) {
		filter_send(both[i], "1 is odd");
		so_silent(both[i], "a filter that drops it");
		filter_send(both[i], "2 is even");
		so_expect(both[i], "2 is even", "a filter that lets it pass");
		struct sock_filter got[16] = {0};
		socklen_t n = 16;
		SYS(getsockopt(both[i], SOL_SOCKET, SO_GET_FILTER, got, &n));
		CHECK(n == 5 && memcmp(got, evens, sizeof evens) == 0, "the filter has changed, it has %u instructions", n);
	}
	struct sock_fprog f = {5, evens};
	CHECK(setsockopt(flocked, SOL_SOCKET, SO_ATTACH_FILTER, &f, sizeof f) < 0 && errno == EPERM, "the filter is not locked any more");
}

COMMAND(sockfilter) {
	struct sock_fprog f = {5, evens};
	fdrop = bound4("127.0.0.1", 0);
	flocked = bound4("127.0.0.1", 0);
	funfiltered = bound4("127.0.0.1", 0);
	so_bytes(fdrop, SOL_SOCKET, SO_ATTACH_FILTER, &f, sizeof f);
	so_bytes(flocked, SOL_SOCKET, SO_ATTACH_FILTER, &f, sizeof f);
	so_put(flocked, SOL_SOCKET, SO_LOCK_FILTER, 1);
	loop(filter_check);
}

// ---- UDP-Lite, with a coverage of its checksum

static int lite, lite6, liteout;

static void lite_check(void) {
	so_recheck();
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(lite, (struct sockaddr *)&a, &n));
	CHECK(sendto(liteout, "partly covered", 14, 0, (struct sockaddr *)&a, n) == 14, "send: %s", strerror(errno));
	so_expect(lite, "partly covered", "UDP-Lite");
}

COMMAND(udplite) {
	lite = SYS(socket(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE));
	liteout = SYS(socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, IPPROTO_UDPLITE));
	lite6 = SYS(socket(AF_INET6, SOCK_DGRAM, IPPROTO_UDPLITE));
	struct sockaddr_in a = at4("127.0.0.1", 0);
	struct sockaddr_in6 a6 = at6("::1", 0, 0);
	SYS(bind(lite, (struct sockaddr *)&a, sizeof a));
	SYS(bind(lite6, (struct sockaddr *)&a6, sizeof a6));
	int all[] = {lite, liteout, lite6};
	for (int i = 0; i < 3; i++) {
		remember("UDP-Lite socket", all[i]);
		if (i != 1) so_name(all[i]);
		so_put(all[i], IPPROTO_UDPLITE, 10, 12 + i); // UDPLITE_SEND_CSCOV
		so_put(all[i], IPPROTO_UDPLITE, 11, 10 + i); // UDPLITE_RECV_CSCOV
	}
	loop(lite_check);
}

// ---- raw sockets

static int ricmp, rudp, rhdr, ricmp6, rcon, rplain;

static uint16_t checksum(const void *p, int n) {
	const uint8_t *b = p;
	uint32_t sum = 0;
	for (int i = 0; i < n; i += 2) sum += b[i] << 8 | (i + 1 < n ? b[i + 1] : 0);
	while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
	return htons(~sum);
}

static void drain(int fd) {
	char b[512];
	while (recv(fd, b, sizeof b, MSG_DONTWAIT) > 0) {}
}

static void raw_check(void) {
	so_recheck();
	static uint16_t n;
	drain(ricmp), drain(ricmp6), drain(rcon), drain(rudp);
	// An echo to ourselves: the filter of ricmp lets the request pass, not the answer.
	struct icmphdr h = {.type = ICMP_ECHO, .un.echo = {htons(getpid()), htons(++n)}};
	h.checksum = checksum(&h, sizeof h);
	CHECK(SYS(send(rcon, &h, sizeof h, 0)) == sizeof h, "send an echo");
	unsigned char b[256];
	for (int seen = 0; seen < 2;) { // rcon has no filter: it gets both
		CHECK(comes(rcon, POLLIN), "a raw socket gets %d of 2", seen);
		CHECK(SYS(recv(rcon, b, sizeof b, 0)) == 28, "a datagram of another size");
		seen++;
	}
	CHECK(recv(ricmp, b, sizeof b, MSG_DONTWAIT) == 28 && b[20] == ICMP_ECHO, "no echo request, but %d", b[20]);
	so_silent(ricmp, "an ICMP filter");
	// A datagram with a header of its own reaches the UDP socket.
	unsigned char d[20 + 8 + 4] = {0x45, 0, 0, sizeof d, 0, 0, 0, 0, 9, IPPROTO_UDP};
	struct sockaddr_in to;
	socklen_t len = sizeof to;
	SYS(getsockname(rplain, (struct sockaddr *)&to, &len));
	memcpy(d + 12, &to.sin_addr, 4), memcpy(d + 16, &to.sin_addr, 4);
	d[20] = 1, d[25] = 12;
	memcpy(d + 22, &to.sin_port, 2);
	memcpy(d + 28, "head", 4);
	// What waits at a raw socket for UDP may be lost by a dump.
	for (int i = 0;; i++) {
		CHECK(SYS(sendto(rhdr, d, sizeof d, 0, (struct sockaddr *)&to, len)) == sizeof d, "send with a header");
		so_expect(rplain, "head", "a datagram with a header of its own");
		ssize_t got;
		while ((got = recv(rudp, b, sizeof b, MSG_DONTWAIT)) >= 28 && memcmp(b + 22, &to.sin_port, 2) != 0) {} // of others on this host
		CHECK(got < 0 || (got == sizeof d && b[8] == 9 && memcmp(b + 28, "head", 4) == 0), "a raw socket for UDP gets another datagram");
		CHECK(got > 0 || i < 10, "a raw socket for UDP gets nothing");
		if (got > 0) break;
	}
}

COMMAND(rawsock) {
	struct sockaddr_in lo4 = at4("127.0.0.1", 0);
	struct sockaddr_in6 lo6 = at6("::1", 0, 0);
	ricmp = SYS(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
	rudp = SYS(socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_UDP));
	rhdr = SYS(socket(AF_INET, SOCK_RAW | SOCK_NONBLOCK, IPPROTO_RAW));
	ricmp6 = SYS(socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6));
	rcon = SYS(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
	rplain = bound4("127.0.0.1", 0);
	int r6 = SYS(socket(AF_INET6, SOCK_RAW, 200)), late = SYS(socket(AF_INET, SOCK_RAW, 201));
	int all[] = {ricmp, rudp, rhdr, ricmp6, rcon, r6, late};
	for (int i = 0; i < 7; i++) {
		remember("raw socket", all[i]);
		so_hold(all[i], SOL_SOCKET, SO_PROTOCOL);
	}
	so_bytes(ricmp, SOL_RAW, ICMP_FILTER, &(struct icmp_filter){~(1u << ICMP_ECHO)}, sizeof(struct icmp_filter));
	so_hold(ricmp, SOL_RAW, ICMP_FILTER);
	struct icmp6_filter f6;
	memset(&f6, 0xff, sizeof f6);
	f6.data[ICMPV6_ECHO_REPLY >> 5] &= ~(1u << (ICMPV6_ECHO_REPLY & 31));
	so_bytes(ricmp6, IPPROTO_ICMPV6, ICMPV6_FILTER, &f6, sizeof f6);
	so_hold(ricmp6, IPPROTO_ICMPV6, ICMPV6_FILTER);
	so_put(ricmp6, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
	so_put(r6, IPPROTO_IPV6, IPV6_CHECKSUM, 6);
	so_put(late, IPPROTO_IP, IP_HDRINCL, 1);
	so_put(late, IPPROTO_IP, IP_NODEFRAG, 1);
	so_hold(rhdr, IPPROTO_IP, IP_HDRINCL);
	so_hold(rudp, IPPROTO_IP, IP_HDRINCL);
	so_put(rudp, IPPROTO_IP, IP_TTL, 99);
	SYS(bind(rudp, (struct sockaddr *)&lo4, sizeof lo4));
	SYS(bind(ricmp6, (struct sockaddr *)&lo6, sizeof lo6));
	SYS(connect(rcon, (struct sockaddr *)&lo4, sizeof lo4));
	so_name(rudp), so_name(ricmp6), so_name(rcon);
	struct sockaddr_in g = at4("239.7.7.9", 0);
	join(late, IPPROTO_IP, MCAST_JOIN_GROUP, if_nametoindex("lo"), &g, NULL, sizeof g);
	loop(raw_check);
	CHECK(setsockopt(late, IPPROTO_IP, IP_ADD_MEMBERSHIP, &(struct ip_mreqn){g.sin_addr, {0}, if_nametoindex("lo")}, sizeof(struct ip_mreqn)) < 0 && errno == EADDRINUSE,
		"a raw socket has left its group");
}

// In a network namespace of its own.
COMMAND(rawns) {
	SYS(unshare(CLONE_NEWNET));
	CHECK(system("ip link set lo up") == 0, "no loopback");
	run_rawsock();
}

// ---- ping sockets

static int ping4, ping6, pingcon;

// ping_once asks again for what does not come, as ping(8) does: a network may lose it.
static void ping_once(int fd, const void *to, socklen_t n, int request, int answer) {
	static uint16_t seq;
	struct icmphdr h = {.type = request}, b = {0};
	uint16_t first = seq + 1;
	for (int i = 0, r = 0; r == 0; i++) {
		CHECK(i < 30, "no answer to %d pings", i);
		h.un.echo.sequence = htons(++seq);
		CHECK(sendto(fd, &h, sizeof h, 0, to, n) == sizeof h, "ping: %s", strerror(errno));
		struct pollfd p = {fd, POLLIN, 0};
		while ((r = poll(&p, 1, 1000)) < 0 && errno == EINTR) {}
	}
	do CHECK(recv(fd, &b, sizeof b, 0) == sizeof b, "a short answer to a ping");
	while ((uint16_t)(ntohs(b.un.echo.sequence) - first) > (uint16_t)(seq - first)); // late, to one that was given up
	struct sockaddr_storage a = {0};
	socklen_t len = sizeof a;
	SYS(getsockname(fd, (struct sockaddr *)&a, &len));
	uint16_t id = a.ss_family == AF_INET ? ((struct sockaddr_in *)&a)->sin_port : ((struct sockaddr_in6 *)&a)->sin6_port;
	CHECK(b.type == answer && b.un.echo.id == id, "another answer to a ping: type %d", b.type);
}

static void ping_check(void) {
	so_recheck();
	struct sockaddr_in lo4 = at4("127.0.0.1", 0);
	struct sockaddr_in6 lo6 = at6("::1", 0, 0);
	ping_once(ping4, &lo4, sizeof lo4, ICMP_ECHO, ICMP_ECHOREPLY);
	ping_once(ping6, &lo6, sizeof lo6, ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY);
	ping_once(pingcon, NULL, 0, ICMP_ECHO, ICMP_ECHOREPLY);
}

COMMAND(ping) {
	int f = SYS(open("/proc/sys/net/ipv4/ping_group_range", O_WRONLY));
	CHECK(write(f, "0 2147483647", 12) == 12, "allow ping sockets: %s", strerror(errno));
	close(f);
	ping4 = SYS(socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP));
	ping6 = SYS(socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, IPPROTO_ICMPV6));
	pingcon = SYS(socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP));
	struct sockaddr_in lo4 = at4("127.0.0.1", 777), to = at4("127.0.0.1", 0);
	struct sockaddr_in6 lo6 = at6("::1", 778, 0);
	SYS(bind(ping4, (struct sockaddr *)&lo4, sizeof lo4));
	SYS(bind(ping6, (struct sockaddr *)&lo6, sizeof lo6));
	SYS(connect(pingcon, (struct sockaddr *)&to, sizeof to));
	ping_once(pingcon, NULL, 0, ICMP_ECHO, ICMP_ECHOREPLY); // gives it its identifier
	int all[] = {ping4, ping6, pingcon};
	for (int i = 0; i < 3; i++) {
		remember("ping socket", all[i]);
		so_name(all[i]);
	}
	so_put(ping4, IPPROTO_IP, IP_RECVERR, 1);
	so_put(ping4, IPPROTO_IP, IP_TTL, 12);
	so_put(ping6, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
	loop(ping_check);
}

// ---- datagrams that wait to be received, with their senders

static int wany, wcon, w6, wdual, wmc, wfrom[3], wfrom6;

static void queue_take(int fd, const struct sockaddr *from, socklen_t n, const void *want, size_t len, int ttl, const char *to, const char *what) {
	static char b[65536];
	char oob[512];
	struct sockaddr_storage a = {0};
	struct iovec v = {b, sizeof b};
	struct msghdr m = {&a, sizeof a, &v, 1, oob, sizeof oob, 0};
	ssize_t got = recvmsg(fd, &m, MSG_DONTWAIT);
	CHECK(got == (ssize_t)len && memcmp(b, want, len) == 0, "%s: a datagram of %zd bytes (%s), want %zu", what, got, got < 0 ? strerror(errno) : "", len);
	CHECK(m.msg_namelen == n && memcmp(&a, from, n) == 0, "%s: another sender", what);
	bool seen = !ttl && !to;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL) CHECK(*(int *)CMSG_DATA(c) == ttl, "%s: TTL %d", what, *(int *)CMSG_DATA(c));
		if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
			struct in_addr is = ((struct in_pktinfo *)CMSG_DATA(c))->ipi_addr;
			CHECK(strcmp(inet_ntoa(is), to) == 0, "%s: sent to %s", what, inet_ntoa(is));
			seen = true;
		}
	}
	CHECK(seen, "%s: nothing is told of it", what);
}

static void queue_check(void) {
	so_recheck();
	int all[] = {wany, wcon, w6, wdual, wmc};
	for (int i = 0; i < 5; i++) {
		struct pollfd p = {all[i], POLLIN | POLLOUT, 0};
		SYS(poll(&p, 1, 0));
		CHECK(p.revents == (POLLIN | POLLOUT), "socket %d: poll says %x", i, p.revents);
	}
	char b[8];
	CHECK(recv(wany, b, 8, MSG_PEEK | MSG_DONTWAIT) == 3 && memcmp(b, "one", 3) == 0, "the first datagram is another");
}

COMMAND(udpqueue) {
	static char large[60000];
	for (size_t i = 0; i < sizeof large; i++) large[i] = pattern(5, i);
	wany = bound4("0.0.0.0", 0);
	so_put(wany, IPPROTO_IP, IP_PKTINFO, 1);
	so_put(wany, IPPROTO_IP, IP_RECVTTL, 1);
	so_put(wany, SOL_SOCKET, SO_RCVBUF, 400000);
	wcon = bound4("127.0.0.1", 0);
	w6 = bound6("::1", 0, 0);
	wdual = bound6("::", 0, 0);
	wmc = bound4("239.7.7.5", 7010);
	int lo = if_nametoindex("lo");
	so_bytes(wmc, IPPROTO_IP, IP_ADD_MEMBERSHIP, &(struct ip_mreqn){{inet_addr("239.7.7.5")}, {0}, lo}, sizeof(struct ip_mreqn));
	for (int i = 0; i < 3; i++) {
		char a[] = "127.0.0.2";
		a[8] += i;
		wfrom[i] = bound4(a, 0);
	}
	wfrom6 = bound6("::1", 0, 0);
	so_put(wfrom[1], IPPROTO_IP, IP_TTL, 42);
	so_bytes(wfrom[0], IPPROTO_IP, IP_MULTICAST_IF, &(struct ip_mreqn){.imr_address.s_addr = inet_addr("127.0.0.2"), .imr_ifindex = lo}, sizeof(struct ip_mreqn));
	struct sockaddr_in from[3], to, con;
	struct sockaddr_in6 from6, to6, mapped = {.sin6_family = AF_INET6};
	socklen_t n = sizeof to, n6 = sizeof to6;
	for (int i = 0; i < 3; i++) SYS(getsockname(wfrom[i], (struct sockaddr *)&from[i], &n));
	SYS(getsockname(wfrom6, (struct sockaddr *)&from6, &n6));
	SYS(getsockname(wcon, (struct sockaddr *)&con, &n));
	SYS(connect(wcon, (struct sockaddr *)&from[2], sizeof from[2]));
	SYS(getsockname(wany, (struct sockaddr *)&to, &n));
	int any = ntohs(to.sin_port);
	send4(wfrom[0], "one", "127.0.0.7", any);
	send4(wfrom[1], "", "127.0.0.8", any);
	send4(wfrom[2], "three", "127.0.0.9", any);
	inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
	CHECK(SYS(sendto(wfrom[1], large, sizeof large, 0, (struct sockaddr *)&to, n)) == sizeof large, "send");
	send4(wfrom[2], "from the peer", "127.0.0.1", ntohs(con.sin_port));
	SYS(getsockname(w6, (struct sockaddr *)&to6, &n6));
	send6(wfrom6, "over IPv6", "::1", ntohs(to6.sin6_port), 0);
	send6(wfrom6, "", "::1", ntohs(to6.sin6_port), 0);
	SYS(getsockname(wdual, (struct sockaddr *)&to6, &n6));
	send6(wfrom6, "six", "::1", ntohs(to6.sin6_port), 0);
	send4(wfrom[0], "four", "127.0.0.1", ntohs(to6.sin6_port));
	send4(wfrom[0], "to a group", "239.7.7.5", 7010);
	loop(queue_check);
#define SOCKADDR(a) (struct sockaddr *)&(a), sizeof(a)
	queue_take(wany, SOCKADDR(from[0]), "one", 3, 64, "127.0.0.7", "the first");
	queue_take(wany, SOCKADDR(from[1]), "", 0, 42, "127.0.0.8", "the empty one");
	queue_take(wany, SOCKADDR(from[2]), "three", 5, 64, "127.0.0.9", "the third");
	queue_take(wany, SOCKADDR(from[1]), large, sizeof large, 42, "127.0.0.1", "the large one");
	queue_take(wcon, SOCKADDR(from[2]), "from the peer", 13, 0, NULL, "that of the peer");
	queue_take(w6, SOCKADDR(from6), "over IPv6", 9, 0, NULL, "that of IPv6");
	queue_take(w6, SOCKADDR(from6), "", 0, 0, NULL, "the empty one of IPv6");
	queue_take(wdual, SOCKADDR(from6), "six", 3, 0, NULL, "that of IPv6 of two");
	mapped.sin6_port = from[0].sin_port;
	inet_pton(AF_INET6, "::ffff:127.0.0.2", &mapped.sin6_addr);
	queue_take(wdual, SOCKADDR(mapped), "four", 4, 0, NULL, "that of IPv4 of two");
	queue_take(wmc, SOCKADDR(from[0]), "to a group", 10, 0, NULL, "that to a group");
	int all[] = {wany, wcon, w6, wdual, wmc};
	for (int i = 0; i < 5; i++) so_silent(all[i], "a queue that was emptied");
	send4(wfrom[1], "a stranger's", "127.0.0.1", ntohs(con.sin_port));
	nap_ms(20);
	so_silent(wcon, "a connected socket");
}
