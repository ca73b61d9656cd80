// Unix sockets in unusual states.
#include "selfcheck.h"
#include <grp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <linux/sockios.h>

struct addr {
	struct sockaddr_un a;
	socklen_t n;
};

static struct addr path_addr(const char *path) {
	struct addr a = {{AF_UNIX, ""}, offsetof(struct sockaddr_un, sun_path) + strlen(path) + 1};
	CHECK(strlen(path) <= sizeof a.a.sun_path, "path %s is too long", path);
	memcpy(a.a.sun_path, path, strlen(path) < sizeof a.a.sun_path ? strlen(path) + 1 : strlen(path));
	if (a.n > sizeof a.a) a.n = sizeof a.a;
	return a;
}

// abstract makes a name of this process's own, with NULs in it.
static struct addr abstract(const char *name) {
	struct addr a = {{AF_UNIX, ""}, 0};
	int n = snprintf(a.a.sun_path + 1, sizeof a.a.sun_path - 1, "godwit-%d-%s-*", getpid(), name);
	a.a.sun_path[n] = 0; // in place of the star, and counted
	a.n = offsetof(struct sockaddr_un, sun_path) + 1 + n;
	return a;
}

static int usock(int type) { return SYS(socket(AF_UNIX, type, 0)); }

static int bound(int type, struct addr a) {
	int s = usock(type);
	CHECK(bind(s, (struct sockaddr *)&a.a, a.n) == 0, "bind to %s: %s", a.a.sun_path, strerror(errno));
	return s;
}

static int listener(int type, struct addr a, int backlog) {
	int s = bound(type, a);
	SYS(listen(s, backlog));
	return s;
}

static void join(int s, struct addr a) { CHECK(connect(s, (struct sockaddr *)&a.a, a.n) == 0, "connect to %s: %s", a.a.sun_path, strerror(errno)); }

static void put(int s, const char *text) { CHECK(send(s, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text), "send \"%s\": %s", text, strerror(errno)); }

static void put_to(int s, struct addr a, const char *text) {
	CHECK(sendto(s, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT, (struct sockaddr *)&a.a, a.n) == (ssize_t)strlen(text), "send \"%s\": %s", text, strerror(errno));
}

static void want(int s, const char *text) {
	char b[300];
	ssize_t n = recv(s, b, sizeof b, MSG_DONTWAIT);
	CHECK(n == (ssize_t)strlen(text) && memcmp(b, text, n) == 0, "fd %d: received %zd bytes (%s) \"%.*s\", want \"%s\"", s, n, n < 0 ? strerror(errno) : "", (int)(n < 0 ? 0 : n), b, text);
}

static void want_end(int s) {
	char c;
	ssize_t n = recv(s, &c, 1, MSG_DONTWAIT);
	CHECK(n == 0, "fd %d: received %zd (%s), want the end", s, n, n < 0 ? strerror(errno) : "");
}

static void want_nothing(int s) {
	char c;
	ssize_t n = recv(s, &c, 1, MSG_DONTWAIT);
	CHECK(n == -1 && errno == EAGAIN, "fd %d: received %zd (%s), want nothing yet", s, n, n < 0 ? strerror(errno) : "");
}

// want_from is want for a datagram of a sender; its name has n bytes, 0 for none.
static void want_from(int s, const char *text, struct addr from) {
	char b[300];
	struct addr a = {{0}, sizeof a.a};
	ssize_t n = recvfrom(s, b, sizeof b, MSG_DONTWAIT, (struct sockaddr *)&a.a, &a.n);
	CHECK(n == (ssize_t)strlen(text) && memcmp(b, text, n) == 0, "fd %d: received %zd bytes (%s) \"%.*s\", want \"%s\"", s, n, n < 0 ? strerror(errno) : "", (int)(n < 0 ? 0 : n), b, text);
	CHECK(a.n == from.n && memcmp(&a.a, &from.a, a.n) == 0, "fd %d: \"%s\" came from a name of %u bytes, %s, want %u, %s", s, text, a.n, a.a.sun_path, from.n, from.a.sun_path);
}

static const struct addr nobody;

// peers are names that must not change: own and the peer's.
static struct { int fd; struct addr own, peer; int peer_errno; } peers[48];
static int npeers;

static struct addr name_of(int fd, bool peer, int *err) {
	struct addr a = {{0}, sizeof a.a};
	*err = 0;
	if ((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&a.a, &a.n)) {
		*err = errno;
		a.n = 0;
	}
	return a;
}

static void hold_names(int fd) {
	int e;
	peers[npeers].fd = fd;
	peers[npeers].own = name_of(fd, false, &e);
	peers[npeers].peer = name_of(fd, true, &peers[npeers].peer_errno);
	npeers++;
}

static void names_check(void) {
	recheck();
	for (int i = 0; i < npeers; i++) {
		int e, pe;
		struct addr own = name_of(peers[i].fd, false, &e), peer = name_of(peers[i].fd, true, &pe);
		CHECK(own.n == peers[i].own.n && memcmp(&own.a, &peers[i].own.a, own.n) == 0, "fd %d: its name changed to %s", peers[i].fd, own.a.sun_path);
		CHECK(pe == peers[i].peer_errno, "fd %d: getpeername gives error %d, not %d", peers[i].fd, pe, peers[i].peer_errno);
		CHECK(peer.n == peers[i].peer.n && memcmp(&peer.a, &peers[i].peer.a, peer.n) == 0, "fd %d: its peer's name changed to %s, was %s", peers[i].fd, peer.a.sun_path, peers[i].peer.a.sun_path);
	}
}

// hold_all remembers flags and names of sockets.
static void hold_all(int n, const int *fds) {
	for (int i = 0; i < n; i++) {
		remember("unix socket", fds[i]);
		hold_names(fds[i]);
	}
}
#define HOLD(...) hold_all(sizeof (int[]){__VA_ARGS__} / sizeof(int), (int[]){__VA_ARGS__})

static int events(int fd) {
	struct pollfd p = {fd, POLLIN | POLLOUT | POLLPRI | POLLRDHUP, 0};
	SYS(poll(&p, 1, 0));
	return p.revents;
}

static struct { int fd, events; } polled[32];
static int npolled;

static void hold_events(int fd) {
	polled[npolled].fd = fd;
	polled[npolled++].events = events(fd);
}

static void polled_check(void) {
	names_check();
	for (int i = 0; i < npolled; i++) {
		int e = events(polled[i].fd);
		CHECK(e == polled[i].events, "fd %d: poll says %x, was %x", polled[i].fd, e, polled[i].events);
	}
}

static struct ucred peercred(int fd) {
	struct ucred c = {0};
	socklen_t n = sizeof c;
	SYS(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &n));
	return c;
}

// send_fds sends text with descriptors and, if cred, credentials.
static void send_fds(int s, const char *text, int n, const int *fds, const struct ucred *cred) {
	union { char b[512]; struct cmsghdr align; } u = {0};
	struct iovec iov = {(void *)text, strlen(text)};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = u.b, .msg_controllen = sizeof u.b};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	size_t used = 0;
	if (n) {
		*c = (struct cmsghdr){CMSG_LEN(n * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
		memcpy(CMSG_DATA(c), fds, n * sizeof(int));
		used += CMSG_SPACE(n * sizeof(int));
		c = (struct cmsghdr *)(u.b + used);
	}
	if (cred) {
		*c = (struct cmsghdr){CMSG_LEN(sizeof *cred), SOL_SOCKET, SCM_CREDENTIALS};
		memcpy(CMSG_DATA(c), cred, sizeof *cred);
		used += CMSG_SPACE(sizeof *cred);
	}
	m.msg_controllen = used;
	if (!used) m.msg_control = NULL;
	CHECK(sendmsg(s, &m, MSG_NOSIGNAL) == (ssize_t)strlen(text), "send \"%s\" with %d descriptors: %s", text, n, strerror(errno));
}

// receive reads at most max bytes; it gives the number of descriptors, and the
// credentials if there are any (pid -1: none).
static int receive(int s, size_t max, const char *text, int *fds, struct ucred *cred) {
	char b[300];
	union { char b[1024]; struct cmsghdr align; } u;
	struct iovec iov = {b, max < sizeof b ? max : sizeof b};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = u.b, .msg_controllen = sizeof u.b};
	ssize_t n = recvmsg(s, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	CHECK(n == (ssize_t)strlen(text) && memcmp(b, text, n) == 0, "fd %d: received %zd bytes (%s) \"%.*s\", want \"%s\"", s, n, n < 0 ? strerror(errno) : "", (int)(n < 0 ? 0 : n), b, text);
	int got = 0;
	if (cred) cred->pid = -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_type == SCM_RIGHTS) {
			got = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			CHECK(fds != NULL && got <= 8, "fd %d: %d descriptors came with \"%s\"", s, got, text);
			memcpy(fds, CMSG_DATA(c), got * sizeof(int));
		}
		if (c->cmsg_type == SCM_CREDENTIALS && cred) memcpy(cred, CMSG_DATA(c), sizeof *cred);
	}
	return got;
}

static void want_fds(int s, size_t max, const char *text, int n, int *fds) {
	int got = receive(s, max, text, fds, NULL);
	CHECK(got == n, "fd %d: %d descriptors came with \"%s\", want %d", s, got, text, n);
}

// ---- connections that wait to be accepted

static int wait_listener, wait_abstract;

static void pending_check(void) {
	polled_check();
	CHECK(events(wait_listener) & POLLIN, "nobody waits at the listener");
}

static int accepted(int l, const char *what, struct addr from) {
	struct addr a = {{0}, sizeof a.a};
	int s = accept4(l, (struct sockaddr *)&a.a, &a.n, SOCK_CLOEXEC | SOCK_NONBLOCK);
	CHECK(s >= 0, "accept %s: %s", what, strerror(errno));
	CHECK(a.n == (from.n ? from.n : sizeof(sa_family_t)) && (!from.n || memcmp(&a.a, &from.a, a.n) == 0), "%s comes from a name of %u bytes, %s", what, a.n, a.a.sun_path);
	return s;
}

static void want_self(int fd, const char *what) {
	struct ucred c = peercred(fd);
	CHECK(c.pid == getpid() && c.uid == geteuid() && c.gid == getegid(), "%s: the peer is pid %d, uid %d, gid %d", what, c.pid, c.uid, c.gid);
}

// Without data: the tree may run on after a dump.
COMMAND(unixwait) {
	struct addr p = path_addr(path_of("sock")), ab = abstract("packets"), named = path_addr(path_of("client"));
	wait_listener = listener(SOCK_STREAM | SOCK_NONBLOCK, p, 5);
	wait_abstract = listener(SOCK_SEQPACKET | SOCK_NONBLOCK, ab, 2);
	int c1 = usock(SOCK_STREAM), c2 = bound(SOCK_STREAM, named), q = usock(SOCK_SEQPACKET);
	int done = usock(SOCK_STREAM);
	join(done, p); // accepted, while others wait
	int served = accepted(wait_listener, "the first", nobody);
	join(c1, p);
	join(c2, p);
	join(q, ab);
	shutdown(c1, SHUT_WR);
	HOLD(wait_listener, wait_abstract, c1, c2, q, done, served);
	int all[] = {wait_listener, wait_abstract, c1, c2, q, served, done};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) hold_events(all[i]);
	loop(pending_check);
	int s1 = accepted(wait_listener, "the second", nobody), s2 = accepted(wait_listener, "the third", named);
	int s3 = accepted(wait_abstract, "the packet client", nobody);
	CHECK(accept(wait_listener, NULL, NULL) == -1 && errno == EAGAIN, "one more connection waits");
	want_end(s1);
	want_self(s1, "the second");
	want_self(s2, "the third");
	want_self(c1, "a client");
	put(s2, "hello");
	want(c2, "hello");
	put(q, "packet");
	want(s3, "packet");
	put(done, "old");
	want(served, "old");
}

// With data, and clients that are gone.
COMMAND(unixpending) {
	struct addr p = path_addr(path_of("sock"));
	wait_listener = listener(SOCK_STREAM | SOCK_NONBLOCK, p, 8);
	int c1 = usock(SOCK_STREAM), c2 = usock(SOCK_STREAM), c4 = usock(SOCK_STREAM), file[2];
	join(c1, p);
	put(c1, "request one");
	join(c2, p);
	put(c2, "request ");
	SYS(pipe(file));
	send_fds(c2, "two", 1, &file[0], NULL);
	shutdown(c2, SHUT_WR);
	int gone = usock(SOCK_STREAM);
	join(gone, p);
	put(gone, "farewell");
	close(gone);
	join(c4, p);
	HOLD(wait_listener, c1, c2, c4);
	loop(pending_check);
	int s1 = accepted(wait_listener, "the first", nobody), s2 = accepted(wait_listener, "the second", nobody);
	int s3 = accepted(wait_listener, "the third", nobody), s4 = accepted(wait_listener, "the fourth", nobody), got;
	CHECK(accept(wait_listener, NULL, NULL) == -1 && errno == EAGAIN, "one more connection waits");
	want(s1, "request one");
	want_nothing(s1);
	want_fds(s2, 100, "request two", 1, &got);
	want_end(s2);
	CHECK(SYS(write(file[1], "through the pipe", 16)) == 16, "write");
	char b[32];
	CHECK(SYS(read(got, b, sizeof b)) == 16, "the pipe that was in flight");
	want(s3, "farewell");
	want_end(s3);
	want_nothing(s4);
	want_self(s1, "the first");
	want_self(s3, "the third");
	put(s1, "answer");
	want(c1, "answer");
	put(s4, "hello");
	want(c4, "hello");
}

// ---- descriptors in flight

static int rights_file, rights_stream[2];

static void rights_check(void) {
	polled_check();
	off_t at = lseek(rights_file, 0, SEEK_CUR);
	CHECK(at == 5, "the shared offset is %ld", (long)at);
}

COMMAND(unixrights) {
	int d[2], q[2], p[2], inner[2], mid[2], outer[2], knot[2], fds[8];
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, rights_stream));
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, d));
	SYS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, q));
	rights_file = SYS(open(path_of("file"), O_RDWR | O_CREAT | O_TRUNC, 0644));
	CHECK(SYS(write(rights_file, "hello, world", 12)) == 12, "write");
	SYS(lseek(rights_file, 5, SEEK_SET));
	// Boundaries in a stream: nothing comes with "one".
	put(rights_stream[0], "one");
	send_fds(rights_stream[0], "two", 1, &rights_file, NULL);
	put(rights_stream[0], "three");
	SYS(pipe(p));
	CHECK(SYS(write(p[1], "in the pipe", 11)) == 11, "write");
	int ev = SYS(eventfd(7, EFD_NONBLOCK)), mem = SYS(memfd_create("in flight", 0));
	CHECK(SYS(write(mem, "memory", 6)) == 6, "write");
	send_fds(rights_stream[0], "four", 3, (int[]){p[0], ev, mem}, NULL);
	close(p[0]);
	close(ev);
	close(mem); // all three are nowhere else
	send_fds(d[0], "datagram", 2, (int[]){p[1], rights_file}, NULL);
	close(p[1]);
	send_fds(q[0], "packet", 1, (int[]){rights_stream[0]}, NULL);
	// Sockets in the queues of sockets in the queue of a socket.
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, inner));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, mid));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, outer));
	put(inner[0], "innermost");
	send_fds(mid[0], "m", 2, inner, NULL);
	close(inner[0]);
	close(inner[1]);
	send_fds(outer[0], "o", 2, mid, NULL);
	close(mid[0]);
	close(mid[1]);
	// Two that hold each other.
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, knot));
	send_fds(knot[0], "k", 2, knot, NULL);
	send_fds(knot[1], "l", 2, knot, NULL);
	HOLD(rights_stream[0], rights_stream[1], d[0], d[1], q[0], q[1], outer[0], outer[1], knot[0]);
	int all[] = {rights_stream[1], d[1], q[1], outer[1], knot[0]};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) hold_events(all[i]);
	loop(rights_check);
	want_fds(rights_stream[1], 2, "on", 0, NULL);
	want_fds(rights_stream[1], 1, "e", 0, NULL);
	want_fds(rights_stream[1], 1, "t", 1, fds);
	SYS(lseek(fds[0], 7, SEEK_SET));
	CHECK(SYS(lseek(rights_file, 0, SEEK_CUR)) == 7, "the file that was in flight is another description");
	char b[64];
	CHECK(SYS(read(rights_file, b, 5)) == 5 && memcmp(b, "world", 5) == 0, "its content");
	want_fds(rights_stream[1], 2, "wo", 0, NULL);
	want_fds(rights_stream[1], 100, "threefour", 3, fds);
	CHECK(SYS(read(fds[0], b, sizeof b)) == 11 && memcmp(b, "in the pipe", 11) == 0, "the pipe in flight");
	uint64_t n;
	CHECK(SYS(read(fds[1], &n, 8)) == 8 && n == 7, "the eventfd in flight has %lu", n);
	CHECK(SYS(pread(fds[2], b, sizeof b, 0)) == 6 && memcmp(b, "memory", 6) == 0, "the memfd in flight");
	int rd = fds[0];
	want_fds(d[1], 100, "datagram", 2, fds);
	CHECK(SYS(write(fds[0], "more", 4)) == 4 && SYS(read(rd, b, sizeof b)) == 4, "the pipe's other end");
	want_fds(q[1], 100, "packet", 1, fds);
	put(fds[0], "by another way");
	want(rights_stream[1], "by another way");
	want_fds(outer[1], 100, "o", 2, mid);
	want_fds(mid[1], 100, "m", 2, inner);
	want(inner[1], "innermost");
	put(inner[0], "again");
	want(inner[1], "again");
	want_fds(knot[1], 100, "k", 2, fds);
	put(fds[0], "knot");
	want(knot[1], "knot");
	want_fds(knot[0], 100, "l", 2, fds);
}

// ---- credentials

static struct { int fd; struct ucred c; gid_t groups[8]; int ngroups; } creds[16];
static int ncreds;

static int peergroups(int fd, gid_t *g) {
	socklen_t n = 8 * sizeof *g;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, g, &n)) return -1;
	return n / sizeof *g;
}

static void hold_cred(int fd) {
	creds[ncreds].fd = fd;
	creds[ncreds].c = peercred(fd);
	creds[ncreds].ngroups = peergroups(fd, creds[ncreds].groups);
	ncreds++;
}

static pid_t cred_child;

static void creds_check(void) {
	names_check();
	for (int i = 0; i < ncreds; i++) {
		struct ucred c = peercred(creds[i].fd), w = creds[i].c;
		CHECK(c.pid == w.pid && c.uid == w.uid && c.gid == w.gid, "fd %d: SO_PEERCRED was %d/%d/%d and is %d/%d/%d", creds[i].fd, w.pid, w.uid, w.gid, c.pid, c.uid, c.gid);
		gid_t g[8];
		int n = peergroups(creds[i].fd, g);
		CHECK(n == creds[i].ngroups && (n <= 0 || memcmp(g, creds[i].groups, n * sizeof *g) == 0), "fd %d: SO_PEERGROUPS changed (%d, %d)", creds[i].fd, creds[i].ngroups, n);
	}
	expect_alive(cred_child);
}

static void passcred(int fd) {
	int one = 1;
	SYS(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
}

static void want_cred(int s, size_t max, const char *text, pid_t pid, uid_t uid, gid_t gid) {
	struct ucred c;
	receive(s, max, text, NULL, &c);
	CHECK(c.pid == pid && c.uid == uid && c.gid == gid, "\"%s\" came with %d/%d/%d, want %d/%d/%d", text, c.pid, c.uid, c.gid, pid, uid, gid);
}

COMMAND(unixcreds) {
	struct addr p = path_addr(path_of("sock"));
	int pair[2], dpair[2], up[2], st[2], l = listener(SOCK_STREAM, p, 5);
	SYS(chmod(path_of("sock"), 0777));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, dpair));
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, up));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, st));
	passcred(up[0]);
	passcred(st[0]);
	// A child of another user connects, stays, and listens itself.
	struct addr cl = abstract("child");
	bool root = geteuid() == 0;
	cred_child = child();
	if (cred_child == 0) {
		if (root) {
			SYS(setgroups(2, (gid_t[]){77, 88}));
			SYS(setresgid(2222, 2222, 2222));
			SYS(setresuid(1111, 1111, 1111));
		}
		int c = usock(SOCK_STREAM), own = listener(SOCK_STREAM, cl, 3);
		put(up[1], "from the child"); // before the parent goes on
		join(c, p);
		for (;; orphan_check()) {
			want_nothing(c);
			nap_ms(20);
			(void)own;
		}
	}
	int cs = SYS(accept(l, NULL, NULL)), to_child = usock(SOCK_STREAM);
	struct ucred c = peercred(cs);
	CHECK(c.pid == cred_child, "SO_PEERCRED of the child");
	join(to_child, cl);
	// One that ends: its end of a connection lives on here.
	pid_t dead = child();
	if (dead == 0) {
		int e = usock(SOCK_STREAM);
		join(e, p);
		send_fds(up[1], "the dead one's", 1, &e, NULL);
		put(st[1], "dead");
		_exit(0);
	}
	int ds = SYS(accept(l, NULL, NULL)), status, got;
	SYS(waitpid(dead, &status, 0));
	CHECK(status == 0, "a child ended with %x", status);
	put(st[1], "alive");
	struct ucred self = {getpid(), geteuid(), getegid()}, other = {getpid(), 4321, 1234};
	if (root) send_fds(st[1], "as another", 0, NULL, &other);
	put(dpair[1], "without");
	put(pair[1], "without");
	hold_cred(l), hold_cred(pair[0]), hold_cred(pair[1]), hold_cred(dpair[0]), hold_cred(cs), hold_cred(to_child), hold_cred(ds);
	HOLD(l, pair[0], pair[1], dpair[0], dpair[1], up[0], up[1], st[0], st[1], cs, to_child, ds);
	loop(creds_check);
	uid_t uid = root ? 1111 : self.uid;
	gid_t gid = root ? 2222 : self.gid;
	want_cred(up[0], 100, "from the child", cred_child, uid, gid);
	struct ucred u;
	CHECK(receive(up[0], 100, "the dead one's", &got, &u) == 1 && u.pid == dead, "the dead one's descriptor and pid: %d, want %d", u.pid, dead);
	hold_cred(got);
	want_self(got, "the end of one that is dead");
	put(got, "still here");
	want(ds, "still here");
	want_cred(st[0], 100, "dead", dead, self.uid, self.gid);
	want_cred(st[0], 100, "alive", self.pid, self.uid, self.gid);
	if (root) want_cred(st[0], 100, "as another", self.pid, 4321, 1234);
	passcred(dpair[0]);
	passcred(pair[0]);
	want_cred(dpair[0], 100, "without", 0, 65534, 65534);
	want_cred(pair[0], 100, "without", 0, 65534, 65534);
	end_child(cred_child);
}

// ---- ends that are closed

COMMAND(unixclosed) {
	struct addr p = path_addr(path_of("sock")), ab = abstract("closed"), own = path_addr(path_of("own"));
	int l = listener(SOCK_STREAM, p, 5), al = listener(SOCK_SEQPACKET, ab, 5);
	int reset[2], wr[2], rd[2], both[2], rest[2], qreset[2];
	// The far end was closed with data that it had not read: an error waits.
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, reset));
	put(reset[0], "unread");
	put(reset[1], "goodbye");
	close(reset[1]);
	SYS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, qreset));
	put(qreset[0], "unread");
	close(qreset[1]);
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, rest));
	put(rest[1], "to be read");
	close(rest[1]);
	// Shut down one way, and the other, and both, with data before.
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, wr));
	put(wr[0], "last words");
	SYS(shutdown(wr[0], SHUT_WR));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, rd));
	put(rd[1], "before");
	SYS(shutdown(rd[0], SHUT_RD));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, both));
	put(both[1], "before");
	SYS(shutdown(both[0], SHUT_RDWR));
	// A client whose server is closed, and a server whose named client is.
	int c = usock(SOCK_STREAM), named = bound(SOCK_STREAM, own), qc = usock(SOCK_SEQPACKET);
	join(c, p);
	close(SYS(accept(l, NULL, NULL)));
	join(named, p);
	int s = SYS(accept(l, NULL, NULL));
	put(named, "from a name");
	close(named);
	join(qc, ab);
	close(SYS(accept(al, NULL, NULL)));
	// Clients that waited when their listener was closed.
	struct addr gone = abstract("gone");
	int g = listener(SOCK_STREAM, gone, 5), gc = usock(SOCK_STREAM);
	join(gc, gone);
	close(g);
	HOLD(l, al, reset[0], qreset[0], rest[0], wr[0], wr[1], rd[0], rd[1], both[0], both[1], c, s, qc, gc);
	int all[] = {reset[0], qreset[0], rest[0], wr[0], wr[1], rd[0], rd[1], both[0], both[1], c, s, qc, gc};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) hold_events(all[i]);
	loop(polled_check);
	int err = 0;
	socklen_t n = sizeof err;
	SYS(getsockopt(qreset[0], SOL_SOCKET, SO_ERROR, &err, &n));
	CHECK(err == ECONNRESET, "SO_ERROR is %d", err);
	SYS(getsockopt(gc, SOL_SOCKET, SO_ERROR, &err, &n));
	CHECK(err == ECONNRESET, "SO_ERROR of a client that was never accepted is %d", err);
	char ch;
	want(reset[0], "goodbye");
	CHECK(recv(reset[0], &ch, 1, MSG_DONTWAIT) == -1 && errno == ECONNRESET, "no reset after the last data: %s", strerror(errno));
	want_end(reset[0]);
	want(rest[0], "to be read");
	want_end(rest[0]);
	want(wr[1], "last words");
	want_end(wr[1]);
	put(wr[1], "back");
	want(wr[0], "back");
	CHECK(send(wr[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it can be written after SHUT_WR");
	want(rd[0], "before");
	want_end(rd[0]);
	CHECK(send(rd[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it can be written after the peer's SHUT_RD");
	put(rd[0], "other way");
	want(rd[1], "other way");
	want(both[0], "before");
	want_end(both[0]);
	want_end(both[1]);
	want_end(c);
	CHECK(send(c, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a connection whose peer is closed can be written");
	want(s, "from a name");
	want_end(s);
}

// ---- datagrams

static struct addr dg_server;

COMMAND(unixdgram) {
	dg_server = path_addr(path_of("server"));
	struct addr abs = abstract("sender"), p1 = path_addr(path_of("s1")), gone = path_addr(path_of("gone")), lost = abstract("lost"), m1 = path_addr(path_of("m1")), m2 = abstract("m2");
	int server = bound(SOCK_DGRAM, dg_server), a = bound(SOCK_DGRAM, abs), b = bound(SOCK_DGRAM, p1), u = usock(SOCK_DGRAM);
	put_to(a, dg_server, "from abstract");
	put_to(b, dg_server, "from a path");
	put_to(u, dg_server, "from nobody");
	int g = bound(SOCK_DGRAM, gone), h = bound(SOCK_DGRAM, lost);
	put_to(g, dg_server, "from one that is gone");
	put_to(h, dg_server, "from one that is lost");
	close(g);
	SYS(unlink(path_of("gone")));
	close(h);
	put_to(a, dg_server, "");
	put_to(a, dg_server, "after an empty one");
	// Autobound by the kernel.
	int autob = usock(SOCK_DGRAM);
	SYS(bind(autob, (struct sockaddr *)&(struct sockaddr_un){AF_UNIX, ""}, sizeof(sa_family_t)));
	int e;
	struct addr auton = name_of(autob, false, &e);
	CHECK(auton.n > 3, "autobind");
	put_to(autob, dg_server, "autobound");
	// Connected one way, each to the other, to one that is closed.
	int one = usock(SOCK_DGRAM), x = bound(SOCK_DGRAM, m1), y = bound(SOCK_DGRAM, m2), orphan = usock(SOCK_DGRAM), pair[2], half[2];
	join(one, dg_server);
	put_to(x, m2, "before it was connected");
	join(x, m2);
	join(y, m1);
	put(y, "mutual");
	struct addr dead = abstract("dead");
	int d = bound(SOCK_DGRAM, dead);
	join(orphan, dead);
	close(d);
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
	SYS(socketpair(AF_UNIX, SOCK_DGRAM, 0, half));
	close(half[1]);
	// A queue that is full: the next has to wait.
	struct addr fulln = abstract("full");
	int full = bound(SOCK_DGRAM, fulln), filler = usock(SOCK_DGRAM), count = 0;
	join(filler, fulln);
	while (send(filler, &count, sizeof count, MSG_DONTWAIT) == sizeof count) count++;
	CHECK(errno == EAGAIN && count > 0, "fill: %s after %d", strerror(errno), count);
	HOLD(server, a, b, u, autob, one, x, y, orphan, pair[0], pair[1], half[0], full, filler);
	int all[] = {server, a, b, one, x, y, pair[0], half[0], full, filler};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) hold_events(all[i]);
	loop(polled_check);
	want_from(server, "from abstract", abs);
	want_from(server, "from a path", p1);
	want_from(server, "from nobody", nobody);
	want_from(server, "from one that is gone", gone);
	want_from(server, "from one that is lost", lost);
	want_from(server, "", abs);
	want_from(server, "after an empty one", abs);
	want_from(server, "autobound", auton);
	want_nothing(server);
	put(one, "one way");
	want_from(server, "one way", nobody);
	put_to(server, p1, "answer");
	want_from(b, "answer", dg_server);
	want_from(y, "before it was connected", m1);
	want_from(x, "mutual", m2);
	put(x, "and back");
	want_from(y, "and back", m1);
	CHECK(send(orphan, "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED, "to a closed peer: %s", strerror(errno));
	CHECK(send(half[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED, "to the closed end of a pair: %s", strerror(errno));
	put(pair[0], "pair");
	want(pair[1], "pair");
	for (int i = 0, n; i < count; i++) CHECK(recv(full, &n, sizeof n, MSG_DONTWAIT) == sizeof n && n == i, "datagram %d of a full queue: %d", i, n);
	put(filler, "room");
	want(full, "room");
}

// ---- out of band

COMMAND(unixoob) {
	int mid[2], head[2], in[2], tail[2];
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, mid));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, head));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, in));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, tail));
	if (send(mid[0], "abc!", 4, MSG_OOB) < 0) {
		CHECK(errno == EOPNOTSUPP, "send out of band: %s", strerror(errno)); // the kernel has none
		loop(NULL);
		return;
	}
	put(mid[0], "def");
	CHECK(SYS(send(head[0], "!", 1, MSG_OOB)) == 1, "send out of band");
	put(head[0], "rest");
	int one = 1;
	SYS(setsockopt(in[1], SOL_SOCKET, SO_OOBINLINE, &one, sizeof one));
	CHECK(SYS(send(in[0], "xy!", 3, MSG_OOB)) == 3, "send out of band");
	put(in[0], "z");
	CHECK(SYS(send(tail[0], "end!", 4, MSG_OOB)) == 4, "send out of band");
	HOLD(mid[0], mid[1], head[0], head[1], in[0], in[1], tail[0], tail[1]);
	hold_events(mid[1]), hold_events(head[1]), hold_events(in[1]), hold_events(tail[1]);
	loop(polled_check);
	int mark = 0;
	char c;
	want(mid[1], "abc");
	SYS(ioctl(mid[1], SIOCATMARK, &mark));
	CHECK(mark, "not at the mark");
	CHECK(recv(mid[1], &c, 1, MSG_OOB | MSG_DONTWAIT) == 1 && c == '!', "the byte out of band: %s", strerror(errno));
	want(mid[1], "def");
	SYS(ioctl(head[1], SIOCATMARK, &mark));
	CHECK(mark, "not at the mark");
	CHECK(recv(head[1], &c, 1, MSG_OOB | MSG_DONTWAIT) == 1 && c == '!', "the byte out of band at the head: %s", strerror(errno));
	want(head[1], "rest");
	want(in[1], "xy");
	want(in[1], "!z");
	want(tail[1], "end");
	CHECK(recv(tail[1], &c, 1, MSG_OOB | MSG_DONTWAIT) == 1 && c == '!', "the byte out of band at the end: %s", strerror(errno));
	want_nothing(tail[1]);
}

// ---- names

static int name_epoll, name_path;
static struct stat name_stat;

static void unixnames_check(void) {
	polled_check();
	struct stat st;
	SYS(lstat(path_of("mode"), &st));
	CHECK(st.st_mode == name_stat.st_mode && st.st_uid == name_stat.st_uid && st.st_gid == name_stat.st_gid, "the socket file changed: mode %o, owner %d:%d", st.st_mode, st.st_uid, st.st_gid);
	SYS(fstat(name_path, &st));
	CHECK(S_ISSOCK(st.st_mode), "O_PATH of a socket file is of mode %o", st.st_mode);
	CHECK(access(path_of("deleted"), F_OK) == -1, "the deleted socket file is back");
	struct epoll_event ev;
	CHECK(SYS(epoll_wait(name_epoll, &ev, 1, 0)) == 1 && ev.data.u64 == 42, "epoll");
}

static void serves(int l, struct addr a, const char *what) {
	int c = usock(SOCK_STREAM);
	CHECK(connect(c, (struct sockaddr *)&a.a, a.n) == 0, "%s: connect: %s", what, strerror(errno));
	int s = accept(l, NULL, NULL);
	CHECK(s >= 0, "%s: accept: %s", what, strerror(errno));
	put(c, what);
	want(s, what);
	close(c);
	close(s);
}

COMMAND(unixnames) {
	char *dir = path_of("dir"), *other = path_of("otherdir");
	SYS(mkdir(dir, 0755));
	SYS(mkdir(other, 0755));
	char cwd[4096];
	CHECK(getcwd(cwd, sizeof cwd) != NULL, "getcwd");
	SYS(chdir(dir));
	struct addr rel = path_addr("rel.sock"), dot = path_addr("./dot.sock");
	int r = listener(SOCK_STREAM, rel, 3), dt = listener(SOCK_STREAM, dot, 3);
	SYS(chdir(other)); // the name now means nothing
	// A path that fills sun_path, without a NUL behind it.
	struct addr full = path_addr(path_of("x"));
	size_t len = strlen(full.a.sun_path);
	memset(full.a.sun_path + len, 'x', sizeof full.a.sun_path - len);
	full.n = sizeof full.a;
	int f = listener(SOCK_STREAM, full, 3);
	struct addr del = path_addr(path_of("deleted")), mode = path_addr(path_of("mode")), repl = path_addr(path_of("replaced"));
	int d = listener(SOCK_STREAM, del, 3), dc = usock(SOCK_STREAM);
	join(dc, del);
	int ds = SYS(accept(d, NULL, NULL));
	SYS(unlink(path_of("deleted")));
	int m = listener(SOCK_STREAM, mode, 3);
	SYS(chmod(path_of("mode"), 0640));
	if (geteuid() == 0) SYS(chown(path_of("mode"), 123, 456));
	SYS(lstat(path_of("mode"), &name_stat));
	int old = listener(SOCK_STREAM, repl, 3), oc = usock(SOCK_STREAM);
	join(oc, repl);
	int os = SYS(accept(old, NULL, NULL));
	SYS(unlink(path_of("replaced")));
	int new = listener(SOCK_STREAM, repl, 3);
	struct addr ab = abstract("name"), pairn = abstract("pair");
	int a = listener(SOCK_STREAM, ab, 3), pair[2];
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	SYS(bind(pair[0], (struct sockaddr *)&pairn.a, pairn.n)); // named after it was connected
	struct addr end = path_addr(path_of("end"));
	SYS(bind(pair[1], (struct sockaddr *)&end.a, end.n));
	name_path = SYS(open(path_of("mode"), O_PATH));
	name_epoll = SYS(epoll_create1(0));
	struct epoll_event ev = {.events = EPOLLIN, .data = {.u64 = 42}};
	SYS(epoll_ctl(name_epoll, EPOLL_CTL_ADD, ds, &ev));
	put(dc, "wakes");
	int nb = usock(SOCK_STREAM | SOCK_NONBLOCK), off = 3;
	SYS(setsockopt(pair[0], SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off));
	put(pair[1], "peek here");
	int small = 9000;
	SYS(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof small));
	HOLD(r, dt, f, d, dc, ds, m, old, oc, os, new, a, pair[0], pair[1], nb);
	loop(unixnames_check);
	char b[32];
	CHECK(recv(pair[0], b, sizeof b, MSG_PEEK) == 6 && memcmp(b, "k here", 6) == 0, "SO_PEEK_OFF");
	socklen_t n = sizeof small;
	SYS(getsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &small, &n));
	CHECK(small == 18000, "SO_SNDBUF is %d", small);
	SYS(chdir(dir));
	serves(r, rel, "relative");
	serves(dt, dot, "relative with a dot");
	SYS(chdir(cwd));
	serves(f, full, "full length");
	serves(m, mode, "with a mode");
	serves(new, repl, "the one that replaced another");
	serves(a, ab, "abstract");
	CHECK(connect(nb, (struct sockaddr *)&del.a, del.n) == -1 && errno == ENOENT, "a deleted name is connected to");
	want(ds, "wakes");
	put(os, "old");
	want(oc, "old");
	// A bound end of a pair does not listen, but its name is taken.
	int t = usock(SOCK_STREAM);
	CHECK(bind(t, (struct sockaddr *)&pairn.a, pairn.n) == -1 && errno == EADDRINUSE, "the name of a pair's end is free");
}

// ---- with somebody outside the tree: unixserver PREFIX PATH, unixlogger PREFIX PATH

static int out_fd;
static uint64_t out_next;

static void server_check(void) {
	struct { uint64_t n; char text[24]; } m;
	for (ssize_t n; (n = recv(out_fd, &m, sizeof m, MSG_DONTWAIT)) >= 0; out_next++)
		CHECK(n == sizeof m && m.n == out_next, "datagram %lu came, want %lu", m.n, out_next);
	CHECK(errno == EAGAIN, "receive: %s", strerror(errno));
}

COMMAND(unixserver) {
	CHECK(arg_count > 0, "usage: unixserver PREFIX PATH");
	out_fd = bound(SOCK_DGRAM, path_addr(arg_values[0]));
	loop(server_check);
	server_check();
	CHECK(out_next > 50, "only %lu datagrams came", out_next);
}

static void logger_check(void) {
	names_check();
	struct { uint64_t n; char text[24]; } m = {out_next++, "line"};
	CHECK(SYS(send(out_fd, &m, sizeof m, 0)) == sizeof m, "send");
}

COMMAND(unixlogger) {
	CHECK(arg_count > 0, "usage: unixlogger PREFIX PATH");
	out_fd = usock(SOCK_DGRAM);
	join(out_fd, path_addr(arg_values[0]));
	HOLD(out_fd);
	loop(logger_check);
}

// unixpeer PREFIX: descriptor 3 is one end of a pair. It answers a byte with the
// next one; at the end of file it says so in PREFIX.end and goes on.
static bool peer_ended;

static void peer_check(void) {
	unsigned char b;
	if (peer_ended) return;
	ssize_t n = recv(3, &b, 1, MSG_DONTWAIT);
	if (n == 0) {
		peer_ended = true;
		close(SYS(open(path_of("end"), O_WRONLY | O_CREAT, 0644)));
	} else if (n == 1) {
		b++;
		CHECK(SYS(send(3, &b, 1, MSG_NOSIGNAL)) == 1, "answer");
	} else CHECK(errno == EAGAIN, "receive: %s", strerror(errno));
}

COMMAND(unixpeer) { loop(peer_check); }

// unixbusy PREFIX PATH: a listener that accepts nobody until the end.
COMMAND(unixbusy) {
	CHECK(arg_count > 0, "usage: unixbusy PREFIX PATH");
	struct addr a = path_addr(arg_values[0]);
	out_fd = listener(SOCK_STREAM | SOCK_NONBLOCK, a, 5);
	HOLD(out_fd);
	loop(names_check);
	serves(out_fd, a, "a new client");
}

// ---- a process with another root directory

static int jail_fd;
static pid_t jail_child;

static void jail_check(void) {
	names_check();
	unsigned char b = 7;
	CHECK(SYS(send(jail_fd, &b, 1, MSG_NOSIGNAL)) == 1, "ask");
	CHECK(read_all(jail_fd, &b, 1) == 1 && b == 8, "the answer is %d", b);
	expect_alive(jail_child);
}

COMMAND(unixjail) {
	char *dir = path_of("jail"), real[300], up[300];
	SYS(mkdir(dir, 0755));
	snprintf(real, sizeof real, "%s/in.sock", dir);
	jail_child = child();
	if (jail_child == 0) {
		SYS(chroot(dir));
		SYS(chdir("/"));
		struct addr a = path_addr("/in.sock"), own;
		int l = listener(SOCK_STREAM | SOCK_NONBLOCK, a, 3), conn[8], n = 0, e;
		close(SYS(open("/up", O_WRONLY | O_CREAT, 0644)));
		for (unsigned char b;; orphan_check()) {
			own = name_of(l, false, &e);
			if (own.n != a.n || memcmp(&own.a, &a.a, a.n)) _exit(3);
			struct pollfd p[9] = {{l, POLLIN, 0}};
			for (int i = 0; i < n; i++) p[i + 1] = (struct pollfd){conn[i], POLLIN, 0};
			if (poll(p, n + 1, 100) < 0) continue;
			for (int i = 0; i < n; i++)
				if (p[i + 1].revents & POLLIN && recv(conn[i], &b, 1, MSG_DONTWAIT) == 1) {
					b++;
					send(conn[i], &b, 1, MSG_NOSIGNAL);
				}
			if (p[0].revents & POLLIN && n < 8) conn[n++] = accept(l, NULL, NULL);
		}
	}
	snprintf(up, sizeof up, "%s/up", dir);
	while (access(up, F_OK)) nap_ms(5);
	jail_fd = usock(SOCK_STREAM);
	join(jail_fd, path_addr(real));
	HOLD(jail_fd);
	loop(jail_check);
	int c = usock(SOCK_STREAM);
	join(c, path_addr(real));
	unsigned char b = 41;
	CHECK(SYS(send(c, &b, 1, MSG_NOSIGNAL)) == 1 && read_all(c, &b, 1) == 1 && b == 42, "a new connection into the other root");
	end_child(jail_child);
}
