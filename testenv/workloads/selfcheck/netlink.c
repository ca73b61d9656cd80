// Netlink sockets: ports, groups, options, and what the kernel answers to them.
#include "sockopts.h"
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/unix_diag.h>
#include <net/if.h>
#include <poll.h>

static int nroute, nevents, nuser, nuser2, ngeneric, ndiag, nuevent;

static int nl_open(int protocol, int type, uint32_t port) {
	int fd = SYS(socket(AF_NETLINK, type, protocol));
	struct sockaddr_nl a = {.nl_family = AF_NETLINK, .nl_pid = port};
	if (port) SYS(bind(fd, (struct sockaddr *)&a, sizeof a));
	remember("netlink socket", fd);
	so_hold(fd, SOL_SOCKET, SO_TYPE);
	so_hold(fd, SOL_SOCKET, SO_PROTOCOL);
	return fd;
}

// nl_wait receives one datagram, which must come.
static struct nlmsghdr *nl_wait(int fd, const char *what) {
	static _Alignas(struct nlmsghdr) char b[32768];
	CHECK(comes(fd, POLLIN), "%s: nothing comes", what);
	ssize_t n = recv(fd, b, sizeof b, 0);
	CHECK(n >= (ssize_t)sizeof(struct nlmsghdr), "%s: %zd bytes, %s", what, n, strerror(errno));
	return (struct nlmsghdr *)b;
}

// nl_ask sends a request, whose answer must be of a type.
static void nl_ask(int fd, int type, int flags, const void *body, size_t n, int answer, const char *what) {
	static uint32_t seq;
	struct { struct nlmsghdr h; char b[256]; } m = {.h = {NLMSG_LENGTH(n), type, NLM_F_REQUEST | flags, ++seq, 0}};
	memcpy(m.b, body, n);
	CHECK(send(fd, &m, m.h.nlmsg_len, 0) == (ssize_t)m.h.nlmsg_len, "%s: send: %s", what, strerror(errno));
	struct nlmsghdr *h = nl_wait(fd, what);
	CHECK(h->nlmsg_type == answer && h->nlmsg_seq == seq, "%s: answer of type %d to request %u, want %d to %u", what, h->nlmsg_type, h->nlmsg_seq, answer, seq);
	if (answer == NLMSG_ERROR) {
		int e = ((struct nlmsgerr *)NLMSG_DATA(h))->error;
		CHECK(e == 0, "%s: %s", what, strerror(-e));
	}
}

static void nl_address(int type) {
	struct { struct ifaddrmsg m; struct rtattr a; uint8_t ip[4]; } b = {{AF_INET, 32, 0, 0, if_nametoindex("lo")}, {RTA_LENGTH(4), IFA_LOCAL}, {127, 7, 7, 7}};
	nl_ask(nroute, type, NLM_F_ACK | NLM_F_CREATE, &b, sizeof b, NLMSG_ERROR, "an address");
	struct nlmsghdr *h = nl_wait(nevents, "an event");
	CHECK(h->nlmsg_type == type, "an event of type %d, want %d", h->nlmsg_type, type);
}

static void nl_member(int fd, int group, const char *what) {
	uint32_t w[16] = {0};
	socklen_t n = sizeof w;
	SYS(getsockopt(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, w, &n));
	CHECK(w[(group - 1) / 32] & 1u << (group - 1) % 32, "%s has left group %d", what, group);
}

static void netlink_check(void) {
	so_recheck();
	struct ifinfomsg link = {.ifi_family = AF_UNSPEC, .ifi_index = if_nametoindex("lo")};
	nl_ask(nroute, RTM_GETLINK, 0, &link, sizeof link, RTM_NEWLINK, "a link");
	nl_address(RTM_NEWADDR);
	nl_address(RTM_DELADDR);
	struct { struct genlmsghdr g; struct nlattr a; char name[8]; } fam = {{CTRL_CMD_GETFAMILY, 1, 0}, {NLA_HDRLEN + 7, CTRL_ATTR_FAMILY_NAME}, "nlctrl"};
	nl_ask(ngeneric, GENL_ID_CTRL, 0, &fam, sizeof fam, GENL_ID_CTRL, "a family");
	// In no state are none: others on the host have sockets.
	struct unix_diag_req dr = {.sdiag_family = AF_UNIX, .udiag_states = 0};
	nl_ask(ndiag, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &dr, sizeof dr, NLMSG_DONE, "sockets");
	// From one program to another, by port and by group.
	struct nlmsghdr h = {NLMSG_LENGTH(0), 99, 0, 7, 0};
	CHECK(SYS(send(nuser, &h, sizeof h, 0)) == sizeof h, "send to the connected port");
	CHECK(nl_wait(nuser2, "the other port")->nlmsg_type == 99, "something else came");
	struct sockaddr_nl g = {.nl_family = AF_NETLINK, .nl_groups = 1 << 4};
	h.nlmsg_type = 98;
	// It also goes to the kernel, which has nobody there.
	CHECK(sendto(nuser, &h, sizeof h, 0, (struct sockaddr *)&g, sizeof g) < 0 && errno == ECONNREFUSED, "send to a group: %s", strerror(errno));
	CHECK(nl_wait(nuser2, "the group")->nlmsg_type == 98, "something else came");
	struct sockaddr_nl to;
	socklen_t n = sizeof to;
	SYS(getpeername(nuser, (struct sockaddr *)&to, &n));
	CHECK(to.nl_pid == 4000000001u, "the connected port is %u", to.nl_pid);
	nl_member(nevents, RTNLGRP_IPV4_IFADDR, "a listener");
	nl_member(nevents, RTNLGRP_NSID, "a listener");
	nl_member(nuser2, 5, "a receiver");
	nl_member(nuevent, 1, "a listener of devices");
}

COMMAND(netlink) {
	nroute = nl_open(NETLINK_ROUTE, SOCK_RAW | SOCK_CLOEXEC, 0); // unbound until its first message
	nevents = nl_open(NETLINK_ROUTE, SOCK_RAW | SOCK_NONBLOCK, 4000000002u);
	nuser = nl_open(NETLINK_USERSOCK, SOCK_DGRAM, 4000000003u);
	nuser2 = nl_open(NETLINK_USERSOCK, SOCK_RAW, 4000000001u);
	ngeneric = nl_open(NETLINK_GENERIC, SOCK_RAW, getpid());
	ndiag = nl_open(NETLINK_SOCK_DIAG, SOCK_DGRAM, 0);
	nuevent = nl_open(NETLINK_KOBJECT_UEVENT, SOCK_DGRAM, 4000000004u);
	int nxfrm = nl_open(NETLINK_XFRM, SOCK_RAW, 0), nnf = nl_open(NETLINK_NETFILTER, SOCK_RAW, 4000000005u), naudit = nl_open(NETLINK_AUDIT, SOCK_RAW, 0);
	int events[] = {RTNLGRP_IPV4_IFADDR, RTNLGRP_NSID, RTNLGRP_IPV6_PREFIX};
	for (int i = 0; i < 3; i++) so_set(nevents, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, events[i]);
	so_set(nuser2, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 5);
	so_set(nuevent, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 1);
	so_set(nnf, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 1);
	struct sockaddr_nl to = {.nl_family = AF_NETLINK, .nl_pid = 4000000001u};
	SYS(connect(nuser, (struct sockaddr *)&to, sizeof to));
	static const int names[] = {NETLINK_PKTINFO, NETLINK_BROADCAST_ERROR, NETLINK_NO_ENOBUFS, NETLINK_LISTEN_ALL_NSID, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK};
	int fds[] = {nroute, nevents, nuser, nuser2, ngeneric, nuevent, nxfrm, naudit};
	for (int k = 0; k < 7; k++) so_put(nevents, SOL_NETLINK, names[k], 1);
	for (int i = 0; i < 8; i++)
		for (int k = 0; k < 7; k++) so_hold(fds[i], SOL_NETLINK, names[k]);
	so_put(nuevent, SOL_SOCKET, SO_PASSCRED, 1);
	so_set(nuevent, SOL_SOCKET, SO_RCVBUFFORCE, 1 << 20);
	so_hold(nuevent, SOL_SOCKET, SO_RCVBUF);
	so_name(nevents), so_name(nuser), so_name(nuser2), so_name(ngeneric), so_name(nuevent), so_name(nnf), so_name(nxfrm);
	loop(netlink_check);
}
