// Bytes between a tree and programs outside of it, which are carried on while only
// the tree moves. Every byte is checked at both ends.
//
//   proxyfeed PREFIX BYTES | proxywork PREFIX > OUT
//   proxyflow PREFIX
#include "selfcheck.h"
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

static bool told(const char *suffix) {
	struct stat st;
	char *p = path_of(suffix);
	bool there = stat(p, &st) == 0;
	free(p);
	return there;
}

static void note(const char *suffix, uint64_t n) {
	char text[32], *p = path_of(suffix);
	int fd = SYS(open(p, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)), len = snprintf(text, sizeof text, "%lu\n", n);
	CHECK(write(fd, text, len) == len, "write %s", p);
	close(fd);
	free(p);
}

static void fill(unsigned char *b, size_t n, uint64_t seed, uint64_t at) {
	for (size_t i = 0; i < n; i++) b[i] = pattern(seed, at + i);
}

static void verify(const char *what, const unsigned char *b, size_t n, uint64_t seed, uint64_t at) {
	for (size_t i = 0; i < n; i++)
		CHECK(b[i] == pattern(seed, at + i), "%s: byte %lu is %d, not %d", what, at + i, b[i], pattern(seed, at + i));
}

// proxyfeed writes at least as many bytes as asked, until PREFIX.enough is there.
COMMAND(proxyfeed) {
	static unsigned char b[65536];
	CHECK(arg_count == 1, "how many bytes are wanted");
	uint64_t want = strtoull(arg_values[0], NULL, 10), sent = 0;
	while (sent < want || !told("enough")) {
		size_t n = 1 + sent % sizeof b;
		fill(b, n, 1, sent);
		for (size_t at = 0; at < n;) {
			ssize_t w = SYS(write(1, b + at, n - at));
			at += w;
		}
		sent += n;
		if (sent >= want) nap_ms(5);
	}
	note("sent", sent);
	_exit(0);
}

// proxywork reads to the end, and appends to its output how far it is.
COMMAND(proxywork) {
	static unsigned char b[50000];
	note("pid", getpid());
	note("ready", 0);
	uint64_t got = 0;
	for (int64_t last = 0;;) {
		ssize_t n = read(0, b, sizeof b);
		CHECK(n >= 0, "read after %lu bytes: %s", got, strerror(errno));
		verify("stdin", b, n, 1, got);
		got += n;
		if (n == 0) break;
		if (now_ns() - last > 10000000) {
			beat();
			CHECK(dprintf(1, "%lu\n", got) > 0, "write output: %s", strerror(errno));
			last = now_ns();
		}
	}
	CHECK(dprintf(1, "end %lu\n", got) > 0, "write output: %s", strerror(errno));
	note("got", got);
	ok();
}

// outsider runs f in a process that is not of the tree and has one end only.
static void outsider(void (*f)(int), int fd, const int *others, int n) {
	pid_t pid = SYS(fork());
	if (pid == 0) {
		if (SYS(fork()) > 0) _exit(0);
		SYS(setsid());
		signal(SIGTERM, SIG_IGN);
		for (int i = 0; i < n; i++)
			if (others[i] != fd) close(others[i]);
		f(fd);
		_exit(0);
	}
	SYS(waitpid(pid, NULL, 0));
}

static void feed_slowly(int fd) {
	unsigned char b[3000];
	uint64_t sent = 0;
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		size_t n = 1 + sent % sizeof b;
		fill(b, n, 2, sent);
		ssize_t w = write(fd, b, n);
		if (w < 0 && errno == EPIPE) { // the tree has closed its end
			note("fed", sent);
			return;
		}
		CHECK(w > 0, "feed: %s", strerror(errno));
		sent += w;
		nap_ms(1);
	}
}

static void eat(int fd) {
	unsigned char b[5000];
	uint64_t got = 0;
	for (;;) {
		ssize_t n = SYS(read(fd, b, sizeof b));
		verify("outside of the pipe", b, n, 3, got);
		got += n;
		if (n == 0) break;
	}
	note("eaten", got);
}

// Both ends of a socket send all the time, and check what they get.
struct talk { int fd; uint64_t sent, got, out, in; };

static bool talk(struct talk *t, bool more) {
	unsigned char b[7000];
	bool quiet = true;
	ssize_t n = recv(t->fd, b, sizeof b, MSG_DONTWAIT);
	if (n > 0) {
		verify("socket", b, n, t->in, t->got);
		t->got += n;
		quiet = false;
	} else if (n == 0) {
		return false;
	} else {
		CHECK(errno == EAGAIN, "receive: %s", strerror(errno));
	}
	size_t want = 1 + t->sent % 4000;
	fill(b, want, t->out, t->sent);
	n = more ? send(t->fd, b, want, MSG_DONTWAIT | MSG_NOSIGNAL) : -1;
	if (n > 0) t->sent += n;
	else if (more) CHECK(errno == EAGAIN, "send: %s", strerror(errno));
	if (quiet) nap_ms(1);
	return true;
}

static void converse(int fd) {
	struct talk t = {.fd = fd, .out = 5, .in = 4};
	while (talk(&t, t.sent - t.got < 4000000)) {}
	// The tree has ended its half; the other one still goes.
	unsigned char b[1000];
	fill(b, sizeof b, t.out, t.sent);
	for (size_t at = 0; at < sizeof b;) at += SYS(write(fd, b + at, sizeof b - at));
	t.sent += sizeof b;
	note("peer-sent", t.sent);
	note("peer-got", t.got);
	close(fd);
}

static struct talk ours = {.out = 4, .in = 5};
static int in_fd, out_fd;
static uint64_t taken, given;

static void flow(void) {
	static unsigned char b[20000];
	for (int i = 0; i < 20; i++) CHECK(talk(&ours, true), "the peer has ended the connection");
	ssize_t n = read(in_fd, b, sizeof b);
	CHECK(n > 0 || (n < 0 && errno == EAGAIN), "read after %lu bytes: %zd, %s", taken, n, strerror(errno));
	if (n > 0) {
		verify("pipe", b, n, 2, taken);
		taken += n;
	}
	size_t want = 1 + given % 3000;
	fill(b, want, 3, given);
	n = write(out_fd, b, want);
	CHECK(n > 0 || errno == EAGAIN, "write: %s", strerror(errno));
	if (n > 0) given += n;
	recheck();
}

COMMAND(proxyflow) {
	int p[2], q[2], s[2];
	SYS(pipe2(p, O_CLOEXEC));
	SYS(pipe2(q, O_CLOEXEC));
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s));
	SYS(fcntl(q[1], F_SETFL, O_NONBLOCK));
	int all[] = {p[0], p[1], q[0], q[1], s[0], s[1]};
	outsider(feed_slowly, p[1], all, 6);
	outsider(eat, q[0], all, 6);
	outsider(converse, s[1], all, 6);
	close(p[1]), close(q[0]), close(s[1]);
	in_fd = p[0], out_fd = q[1], ours.fd = s[0];
	fcntl(in_fd, F_SETFL, O_NONBLOCK);
	SYS(fcntl(in_fd, F_SETOWN, getpid()));
	remember("in", in_fd);
	remember("dup", SYS(fcntl(in_fd, F_DUPFD_CLOEXEC, 40)));
	remember("out", out_fd);
	remember("socket", ours.fd);
	loop(flow);
	// The ends come through, one after the other.
	SYS(shutdown(ours.fd, SHUT_WR));
	for (;;) {
		CHECK(comes(ours.fd, POLLIN), "nothing comes of the peer's half");
		if (!talk(&ours, false)) break;
	}
	note("tree-sent", ours.sent);
	note("tree-got", ours.got);
	note("given", given);
	close(out_fd);
	close(in_fd);
	close(40);
	ok();
}
