// Packet sockets: bound and unbound, memberships, sharing, filters, options.
#include "sockopts.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#undef PACKET_VNET_HDR_SZ
#define PACKET_VNET_HDR_SZ 24

static int pall, plo, pdgram, pshare[2], pidle, pudp, plast;
static struct sockaddr_in pto;

static int packet_open(int type, int protocol, const char *dev) {
	int fd = SYS(socket(AF_PACKET, type, 0));
	// Only what is sent to the port of pudp, whatever header is before it.
	struct sock_filter prog[] = {
		BPF_STMT(BPF_LD | BPF_H | BPF_ABS, (__u32)SKF_NET_OFF + 22), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohs(pto.sin_port), 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff), BPF_STMT(BPF_RET | BPF_K, 0)};
	struct sock_fprog f = {4, prog};
	so_bytes(fd, SOL_SOCKET, SO_ATTACH_FILTER, &f, sizeof f);
	if (protocol) {
		struct sockaddr_ll a = {.sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = dev ? if_nametoindex(dev) : 0};
		SYS(bind(fd, (struct sockaddr *)&a, sizeof a));
		so_name(fd);
	}
	remember("packet socket", fd);
	return fd;
}

// packet_take receives a packet whose last bytes are text, and gives its length; 0 if
// it is lost: what waits at a packet socket does not travel.
static ssize_t packet_take(int fd, const char *text, const char *what) {
	char b[512];
	struct pollfd p = {fd, POLLIN, 0};
	int r;
	while ((r = poll(&p, 1, 1000)) < 0 && errno == EINTR) {}
	if (r == 0) return 0;
	ssize_t n = recv(fd, b, sizeof b, 0);
	size_t len = strlen(text);
	CHECK(n > (ssize_t)len && memcmp(b + n - len, text, len) == 0, "%s: another packet, of %zd bytes", what, n);
	return n;
}

static void packet_drain(int fd) {
	char b[512];
	while (recv(fd, b, sizeof b, MSG_DONTWAIT) > 0) {}
}

static int packet_count(int fd) {
	char b[512];
	int n = 0;
	while (recv(fd, b, sizeof b, MSG_DONTWAIT) > 0) n++;
	return n;
}

static bool packet_member(const char *want) {
	FILE *f = fopen("/proc/net/dev_mcast", "r");
	CHECK(f, "open dev_mcast: %s", strerror(errno));
	char line[256];
	bool there = false;
	while (fgets(line, sizeof line, f)) there |= strstr(line, want) != NULL;
	fclose(f);
	return there;
}

static void packet_check(void) {
	so_recheck();
	packet_drain(pall), packet_drain(plo), packet_drain(pdgram), packet_drain(pudp), packet_count(pshare[0]), packet_count(pshare[1]);
	int got[2] = {0};
	for (int i = 0, lost = 0; i < 6 || !got[0] || !got[1]; i++) {
		char text[32];
		static int n;
		snprintf(text, sizeof text, "packet %d", n++);
		SYS(sendto(pudp, text, strlen(text), 0, (struct sockaddr *)&pto, sizeof pto));
		so_expect(pudp, text, "the datagram itself");
		ssize_t header = 20 + 8 + strlen(text), a = packet_take(plo, text, "bound to lo"), b = packet_take(pdgram, text, "of SOCK_DGRAM"), c = packet_take(pall, text, "of all interfaces");
		CHECK(a == 0 || a == 14 + header, "a packet without its header");
		CHECK(b == 0 || b == header, "a packet with its header");
		CHECK(c == 0 || c == 10 + 14 + header, "a packet without its virtio header");
		// In turn; but others on the host send, too.
		for (int k = 0; k < 2; k++) got[k] += packet_count(pshare[k]);
		if (!a || !b || !c) CHECK(++lost < 10, "packets do not come");
		CHECK(i < 100, "of the packets that two share, they got %d and %d", got[0], got[1]);
	}
	CHECK(packet_member("0180c2000003") && packet_member("0180c200000e"), "a device listens to a group no more");
	struct tpacket_stats st;
	socklen_t len = sizeof st;
	SYS(getsockopt(plast, SOL_PACKET, PACKET_STATISTICS, &st, &len));
}

static void packet_mreq(int fd, int how, int type, const char *dev, const char *addr) {
	struct packet_mreq m = {if_nametoindex(dev), type, addr ? 6 : 0, ""};
	if (addr) memcpy(m.mr_address, addr, 6);
	so_bytes(fd, SOL_PACKET, how, &m, sizeof m);
}

COMMAND(packet) {
	pudp = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	pto = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t n = sizeof pto;
	SYS(bind(pudp, (struct sockaddr *)&pto, n));
	SYS(getsockname(pudp, (struct sockaddr *)&pto, &n));
	plo = packet_open(SOCK_RAW | SOCK_CLOEXEC, ETH_P_IP, "lo");
	pdgram = packet_open(SOCK_DGRAM | SOCK_NONBLOCK, ETH_P_IP, "lo");
	pall = packet_open(SOCK_RAW, 0, NULL);
	so_put(pall, SOL_PACKET, PACKET_VNET_HDR, 1);
	so_put(pall, SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
	struct sockaddr_ll all = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
	SYS(bind(pall, (struct sockaddr *)&all, sizeof all));
	so_name(pall);
	for (int i = 0; i < 2; i++) {
		pshare[i] = packet_open(SOCK_RAW | SOCK_NONBLOCK, ETH_P_IP, "lo");
		so_put(pshare[i], SOL_PACKET, PACKET_FANOUT, 4242 | PACKET_FANOUT_LB << 16);
	}
	pidle = packet_open(SOCK_RAW, 0, NULL); // receives nothing
	plast = packet_open(SOCK_DGRAM, ETH_P_ARP, "eth0");
	so_put(plast, SOL_PACKET, PACKET_VERSION, TPACKET_V3);
	so_put(plast, SOL_PACKET, PACKET_RESERVE, 32);
	so_put(plast, SOL_PACKET, PACKET_AUXDATA, 1);
	so_put(plast, SOL_PACKET, PACKET_ORIGDEV, 1);
	so_put(plast, SOL_PACKET, PACKET_LOSS, 1);
	so_put(plast, SOL_PACKET, PACKET_TIMESTAMP, 64);
	so_put(plast, SOL_PACKET, PACKET_QDISC_BYPASS, 1);
	so_put(plast, SOL_PACKET, PACKET_TX_HAS_OFF, 1);
	so_put(plast, SOL_SOCKET, SO_TIMESTAMP, 1);
	so_put(pidle, SOL_PACKET, PACKET_VNET_HDR_SZ, 12);
	int fds[] = {plo, pdgram, pall, pidle, plast};
	static const int names[] = {PACKET_VERSION, PACKET_AUXDATA, PACKET_ORIGDEV, PACKET_VNET_HDR, PACKET_LOSS, PACKET_TIMESTAMP, PACKET_FANOUT, PACKET_RESERVE};
	for (int i = 0; i < 5; i++)
		for (int k = 0; k < 8; k++) so_hold(fds[i], SOL_PACKET, names[k]);
	packet_mreq(plast, PACKET_ADD_MEMBERSHIP, PACKET_MR_MULTICAST, "eth0", "\x01\x80\xc2\0\0\x03");
	packet_mreq(plast, PACKET_ADD_MEMBERSHIP, PACKET_MR_MULTICAST, "eth0", "\x01\x80\xc2\0\0\x0e");
	packet_mreq(plast, PACKET_ADD_MEMBERSHIP, PACKET_MR_MULTICAST, "eth0", "\x01\x80\xc2\0\0\x03");
	packet_mreq(plast, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, "eth0", NULL);
	loop(packet_check);
	// A membership ends when it was taken back as often as it was added.
	packet_mreq(plast, PACKET_DROP_MEMBERSHIP, PACKET_MR_MULTICAST, "eth0", "\x01\x80\xc2\0\0\x03");
	CHECK(packet_member("0180c2000003"), "a membership that was added twice is gone");
	packet_mreq(plast, PACKET_DROP_MEMBERSHIP, PACKET_MR_MULTICAST, "eth0", "\x01\x80\xc2\0\0\x03");
	CHECK(!packet_member("0180c2000003"), "a membership is there that was taken back");
}
