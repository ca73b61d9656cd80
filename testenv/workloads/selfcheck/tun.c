// Descriptors of /dev/net/tun: a TUN interface with addresses and routes, a
// persistent TAP, one with several queues, one without an interface.
#include "sockopts.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>

static int tfd, tapfd, q[3], tnone, tudp;

static int tun_open(const char *name, int flags) {
	int fd = SYS(open("/dev/net/tun", O_RDWR | O_CLOEXEC));
	struct ifreq r = {0};
	strcpy(r.ifr_name, name);
	r.ifr_flags = flags;
	CHECK(ioctl(fd, TUNSETIFF, &r) == 0, "TUNSETIFF %s: %s", name, strerror(errno));
	remember("TUN descriptor", fd);
	return fd;
}

static void shell(const char *what) {
	int r = system(what);
	CHECK(r == 0, "%s: status %x", what, r);
}

// ask is the output of a command, all of it.
static char *ask(const char *what) {
	static char b[2][4096];
	static int turn;
	char *out = b[turn ^= 1];
	FILE *f = popen(what, "r");
	CHECK(f, "%s: %s", what, strerror(errno));
	size_t n = fread(out, 1, sizeof b[0] - 1, f);
	out[n] = 0;
	CHECK(pclose(f) == 0 && n > 0, "%s fails", what);
	return out;
}

static struct { const char *what; char *want; } answers[16];
static int nanswers;
static void hold_answer(const char *what) {
	answers[nanswers].what = what;
	answers[nanswers++].want = strdup(ask(what));
}

static void tun_flags(int fd, const char *name, int want) {
	struct ifreq r = {0};
	CHECK(ioctl(fd, TUNGETIFF, &r) == 0, "TUNGETIFF of %s: %s", name, strerror(errno));
	CHECK(strcmp(r.ifr_name, name) == 0 && (r.ifr_flags & 0xffff) == want, "interface %s has flags %x, want those of %s, %x", r.ifr_name, r.ifr_flags & 0xffff, name, want);
}

static int tun_get(int fd, unsigned long req) {
	int n = -1;
	SYS(ioctl(fd, req, &n));
	return n;
}

static void tun_check(void) {
	recheck();
	static int n;
	// IFF_NOFILTER is the same bit as IFF_NO_PI, which is looked at otherwise.
	tun_flags(tfd, "gwtun0", IFF_TUN | IFF_NO_PI | IFF_NOFILTER);
	tun_flags(tapfd, "gwtap0", IFF_TAP | IFF_VNET_HDR | IFF_PERSIST | IFF_NOFILTER);
	for (int i = 0; i < 3; i++) tun_flags(q[i], "gwmq0", IFF_TUN | IFF_MULTI_QUEUE | IFF_NOFILTER | (i == 1 ? IFF_DETACH_QUEUE : 0));
	CHECK(tun_get(tapfd, TUNGETVNETHDRSZ) == 12 && tun_get(tapfd, TUNGETSNDBUF) == 77777, "the TAP has a header of %d bytes and a buffer of %d", tun_get(tapfd, TUNGETVNETHDRSZ), tun_get(tapfd, TUNGETSNDBUF));
	struct ifreq r = {0};
	CHECK(ioctl(tnone, TUNGETIFF, &r) < 0 && errno == EBADFD, "a descriptor without an interface has one");
	// Out: what is sent to the net behind the interface can be read.
	char text[32], b[2048];
	int len = snprintf(text, sizeof text, "packet %d", n++);
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
	inet_pton(AF_INET, "10.78.3.4", &to.sin_addr);
	static int again; // packets that may come twice
	bool out = false;
	for (int tries = 0; !out; tries++) { // what waits at an interface while it moves is lost, as on a wire
		CHECK(tries < PATIENCE_MS / 1000, "no packet comes out");
		again += tries > 0;
		CHECK(sendto(tudp, text, len, 0, (struct sockaddr *)&to, sizeof to) == len, "send through the interface: %s", strerror(errno));
		for (struct pollfd p = {tfd, POLLIN, 0}; !out && poll(&p, 1, 1000) > 0;) {
			ssize_t got = SYS(read(tfd, b, sizeof b));
			if (b[0] >> 4 != 4) continue; // IPv6 says a word of its own now and then
			out = got == 28 + len && memcmp(b + 28, text, len) == 0 && memcmp(b + 16, &to.sin_addr, 4) == 0;
			CHECK(out || again-- > 0, "another packet of %zd bytes", got);
		}
	}
	// In: the same packet turned around.
	memcpy(b + 16, b + 12, 4);
	memcpy(b + 12, &to.sin_addr, 4);
	memcpy(b + 22, b + 20, 2);
	b[20] = 0, b[21] = 9, b[26] = b[27] = 0;
	CHECK(SYS(write(tfd, b, 28 + len)) == 28 + len, "a packet does not go in");
	so_expect(tudp, text, "a packet that came in");
	if (n % 8 == 1)
		for (int i = 0; i < nanswers; i++) {
			char *now = ask(answers[i].what);
			CHECK(strcmp(now, answers[i].want) == 0, "%s said\n%sand says\n%s", answers[i].what, answers[i].want, now);
		}
}

COMMAND(tun) {
	tnone = SYS(open("/dev/net/tun", O_RDWR | O_NONBLOCK));
	remember("TUN descriptor without an interface", tnone);
	tfd = tun_open("gwtun0", IFF_TUN | IFF_NO_PI);
	tapfd = tun_open("gwtap0", IFF_TAP | IFF_VNET_HDR);
	for (int i = 0; i < 3; i++) q[i] = tun_open("gwmq0", IFF_TUN | IFF_MULTI_QUEUE);
	struct ifreq r = {.ifr_flags = IFF_DETACH_QUEUE};
	SYS(ioctl(q[1], TUNSETQUEUE, &r));
	SYS(ioctl(tapfd, TUNSETVNETHDRSZ, &(int){12}));
	SYS(ioctl(tapfd, TUNSETSNDBUF, &(int){77777}));
	SYS(ioctl(tapfd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6));
	SYS(ioctl(tapfd, TUNSETPERSIST, 1));
	SYS(ioctl(tfd, TUNSETOWNER, 1234));
	SYS(ioctl(tfd, TUNSETGROUP, 5678));
	shell("ip link set gwtun0 mtu 1380 txqueuelen 77 up");
	shell("ip addr add 10.77.0.1/24 dev gwtun0; ip addr add 10.79.0.1 peer 10.79.0.2/32 dev gwtun0; ip addr add fd77::1/64 dev gwtun0 nodad");
	shell("ip route add 10.78.0.0/16 dev gwtun0 metric 55 src 10.77.0.1; ip route add 10.80.0.0/16 via 10.77.0.9 dev gwtun0 table 99 mtu 1200; ip -6 route add fd78::/48 via fd77::9 dev gwtun0");
	shell("ip link set gwtap0 address 02:11:22:33:44:55 up; ip addr add 10.81.0.1/24 brd 10.81.0.255 dev gwtap0; ip link set gwmq0 up");
	tudp = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	struct sockaddr_in a = {.sin_family = AF_INET};
	inet_pton(AF_INET, "10.77.0.1", &a.sin_addr);
	SYS(bind(tudp, (struct sockaddr *)&a, sizeof a));
	hold_answer("ip -o -d link show gwtun0 | sed 's/numtxqueues.*//'");
	hold_answer("ip -o -d link show gwtap0 | sed 's/numtxqueues.*//;s/state [A-Z]*//'");
	hold_answer("ip -o -d link show gwmq0 | grep -o 'numqueues.*numdisabled 1\\|multi_queue on.*'");
	hold_answer("ip -o addr show gwtun0 | grep -v fe80 | sort");
	hold_answer("ip -4 -o addr show gwtap0 | sort");
	hold_answer("ip -6 -o addr show gwtun0 scope link | wc -l");
	hold_answer("ip route show dev gwtun0 | sort");
	hold_answer("ip route show table 99");
	hold_answer("ip -6 route show dev gwtun0 | grep fd7 | sort");
	loop(tun_check);
	SYS(ioctl(tapfd, TUNSETPERSIST, 0));
}

// In a network namespace of its own, in which all of it is made again.
COMMAND(tunns) {
	SYS(unshare(CLONE_NEWNET));
	shell("ip link set lo up");
	run_tun();
}
