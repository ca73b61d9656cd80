// TCP connections that are not carried although the program had them.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>

static int end_listener, end_c, end_s, closed_seen;

static int listen_at(int port) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_ANY)}};
	int l = SYS(socket(AF_INET, SOCK_STREAM, 0)), on = 1;
	SYS(setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
	SYS(bind(l, (struct sockaddr *)&a, sizeof a));
	SYS(listen(l, 10));
	return l;
}

static void end_open(void) {
	struct sockaddr_in a;
	socklen_t n = sizeof a;
	SYS(getsockname(end_listener, (struct sockaddr *)&a, &n));
	end_c = SYS(socket(AF_INET, SOCK_STREAM, 0));
	SYS(connect(end_c, (struct sockaddr *)&a, sizeof a));
	end_s = SYS(accept(end_listener, NULL, NULL));
	CHECK(send(end_s, "x", 1, 0) == 1, "send: %s", strerror(errno));
	CHECK(comes(end_c, POLLIN), "what was sent does not come");
}

static void end_check(void) {
	char c;
	ssize_t n = recv(end_c, &c, 1, MSG_DONTWAIT | MSG_PEEK);
	if (n == 1) return;
	CHECK(n == 0, "a closed connection: receive: %s", strerror(errno));
	int fds[] = {end_c, end_s};
	for (int i = 0; i < 2; i++) {
		struct pollfd p = {fds[i], POLLIN | POLLRDHUP, 0};
		int err = 0;
		socklen_t len = sizeof err;
		SYS(poll(&p, 1, 0));
		CHECK((p.revents & (POLLIN | POLLRDHUP | POLLHUP)) == (POLLIN | POLLRDHUP | POLLHUP), "a closed connection: poll says %x", p.revents);
		SYS(getsockopt(fds[i], SOL_SOCKET, SO_ERROR, &err, &len));
		CHECK(err == 0, "a closed connection has error %s", strerror(err));
		CHECK(recv(fds[i], &c, 1, 0) == 0, "end %d of a closed connection receives", i);
		CHECK(send(fds[i], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "end %d of a closed connection sends", i);
		close(fds[i]);
	}
	closed_seen++;
	end_open();
}

// tcpclose: with --tcp-close connections have ended when the tree is back.
COMMAND(tcpclose) {
	end_listener = listen_at(0);
	end_open();
	loop(end_check);
	CHECK(closed_seen > 0, "no connection was closed");
}

static void flight_check(void) {
	int on = 0;
	socklen_t n = sizeof on;
	SYS(getsockopt(end_listener, SOL_SOCKET, SO_ACCEPTCONN, &on, &n));
	CHECK(on == 1, "it does not listen");
}

// tcpflight PORT: accepts only when it is to end: one connection, which says "hi".
COMMAND(tcpflight) {
	end_listener = listen_at(atoi(arg_values[0]));
	loop(flight_check);
	char b[2];
	SYS(fcntl(end_listener, F_SETFL, O_NONBLOCK));
	int fd = SYS(accept(end_listener, NULL, NULL));
	CHECK(read_all(fd, b, 2) == 2 && memcmp(b, "hi", 2) == 0, "the connection does not say hi");
	CHECK(accept(end_listener, NULL, NULL) < 0 && errno == EAGAIN, "another connection waits");
}
