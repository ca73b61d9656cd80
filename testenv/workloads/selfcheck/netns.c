// netns: a tree in a network namespace of its own, with devices, addresses,
// routes, rules and settings, which its test compares, and sockets that use them:
// a TCP connection, a UDP socket, an abstract unix socket, a listener.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sched.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { NN_LISTEN = 20, NN_CLIENT, NN_SERVER, NN_UDP, NN_UNIX, NN_SIX };

static struct sockaddr_in nn_addr(const char *ip, int port) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
	CHECK(inet_pton(AF_INET, ip, &a.sin_addr) == 1, "address %s", ip);
	return a;
}

static void nn_check(void) {
	static uint64_t n;
	char x = n++, y;
	SYS(write(NN_CLIENT, &x, 1));
	SYS(read(NN_SERVER, &y, 1));
	CHECK(x == y, "TCP: %d came as %d", x, y);
	struct sockaddr_in a = nn_addr("10.77.0.1", 7001);
	SYS(sendto(NN_UDP, &x, 1, 0, (void *)&a, sizeof a));
	SYS(read(NN_UDP, &y, 1));
	CHECK(x == y, "UDP: %d came as %d", x, y);
	struct sockaddr_un u = {AF_UNIX, "\0netns"};
	int c = SYS(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	SYS(sendto(c, &x, 1, 0, (void *)&u, offsetof(struct sockaddr_un, sun_path) + 6));
	SYS(read(NN_UNIX, &y, 1));
	CHECK(x == y, "unix: %d came as %d", x, y);
	SYS(close(c));
	// A new connection to the listener, by an address of a bridge.
	c = SYS(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	a = nn_addr("10.78.0.1", 7000);
	SYS(connect(c, (void *)&a, sizeof a));
	int s = SYS(accept4(NN_LISTEN, NULL, NULL, SOCK_CLOEXEC));
	struct linger l = {1, 0};
	SYS(setsockopt(c, SOL_SOCKET, SO_LINGER, &l, sizeof l));
	SYS(close(c));
	SYS(close(s));
	struct sockaddr_in6 six;
	socklen_t len = sizeof six;
	SYS(getsockname(NN_SIX, (void *)&six, &len));
	char text[64];
	inet_ntop(AF_INET6, &six.sin6_addr, text, sizeof text);
	CHECK(strcmp(text, "fd00:77::1") == 0, "IPv6 socket is at %s", text);
}

COMMAND(netns) {
	SYS(unshare(CLONE_NEWNET));
	const char *cmd =
		"set -e\n"
		"for f in all default lo; do echo 0 >/proc/sys/net/ipv6/conf/$f/accept_dad; done\n"
		"ip link set lo up; ip addr add 10.77.0.1/32 dev lo; ip addr add fd00:77::1/128 dev lo nodad\n"
		"ip link add v0 address 02:00:00:00:00:10 type veth peer name v1 address 02:00:00:00:00:11\n"
		"ip link add br0 address 02:00:00:00:00:12 type bridge; ip link set v1 master br0; ip link set v0 mtu 1400\n"
		"ip link set v0 up; ip link set v1 up; ip link set br0 up\n"
		"ip addr add 10.78.0.1/24 brd + dev br0 label br0:x; ip addr add 10.78.0.2/24 dev v0; ip addr add fd00:78::1/64 dev br0 nodad\n"
		"ip route add 10.99.0.0/16 via 10.78.0.9; ip route add default via 10.78.0.254 dev br0 metric 50\n"
		"ip route add 10.98.0.0/16 via 10.78.0.9 table 77; ip route add blackhole 10.97.0.0/16; ip -6 route add fd00:99::/64 via fd00:78::9\n"
		"ip rule add from 10.77.0.1 table 77 priority 100; ip -6 rule add from fd00:77::/64 table 78 priority 101\n"
		"echo 1 >/proc/sys/net/ipv4/ip_forward; echo 77 >/proc/sys/net/core/somaxconn; echo 33 >/proc/sys/net/unix/max_dgram_qlen\n"
		"echo '5000 6000' >/proc/sys/net/ipv4/ip_local_port_range; echo 1 >/proc/sys/net/ipv4/conf/br0/proxy_arp\n";
	CHECK(system(cmd) == 0, "set up the network");
	int on = 1;
	int l = at_fd(NN_LISTEN, SYS(socket(AF_INET, SOCK_STREAM, 0)));
	SYS(setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
	struct sockaddr_in a = nn_addr("0.0.0.0", 7000);
	SYS(bind(l, (void *)&a, sizeof a));
	SYS(listen(l, 16));
	int c = at_fd(NN_CLIENT, SYS(socket(AF_INET, SOCK_STREAM, 0)));
	a = nn_addr("10.78.0.2", 7000);
	SYS(connect(c, (void *)&a, sizeof a));
	at_fd(NN_SERVER, SYS(accept(l, NULL, NULL)));
	int u = at_fd(NN_UDP, SYS(socket(AF_INET, SOCK_DGRAM, 0)));
	a = nn_addr("10.77.0.1", 7001);
	SYS(bind(u, (void *)&a, sizeof a));
	int x = at_fd(NN_UNIX, SYS(socket(AF_UNIX, SOCK_DGRAM, 0)));
	struct sockaddr_un ua = {AF_UNIX, "\0netns"};
	SYS(bind(x, (void *)&ua, offsetof(struct sockaddr_un, sun_path) + 6));
	int six = at_fd(NN_SIX, SYS(socket(AF_INET6, SOCK_DGRAM, 0)));
	struct sockaddr_in6 s6 = {.sin6_family = AF_INET6, .sin6_port = htons(7002)};
	inet_pton(AF_INET6, "fd00:77::1", &s6.sin6_addr);
	SYS(bind(six, (void *)&s6, sizeof s6));
	loop(nn_check);
}
