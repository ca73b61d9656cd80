// Threads that a freeze finds inside a system call: each looks whether the
// call ended as if nothing had happened.
#include "selfcheck.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <semaphore.h>

static volatile uint64_t rounds[16];

// took checks that a wait of ms took its time: never less, and not much more
// than that and the longest pause that the whole program saw.
static void took(const char *what, int64_t t0, int ms) {
	int64_t el = now_ns() - t0;
	CHECK(el >= ms * 1000000LL, "%s of %d ms ended after %ld ns", what, ms, el);
	// The main thread notices a pause at its next record only.
	for (int i = 0; i < 2000 && el > ms * 1000000LL + max_gap_ns + 10000000000LL; i++) nap_ms(10);
	CHECK(el <= ms * 1000000LL + max_gap_ns + 10000000000LL, "%s of %d ms took %ld ns; the longest pause was %ld ns", what, ms, el, max_gap_ns);
}

static void *t_nanosleep(void *arg) {
	(void)arg;
	for (; !stopping; rounds[0]++) {
		int64_t t0 = now_ns();
		struct timespec t = {0, 700000000}, rem = {0, 0};
		CHECK(syscall(SYS_nanosleep, &t, &rem) == 0, "nanosleep: %s", strerror(errno));
		took("nanosleep", t0, 700);
	}
	return NULL;
}

static void *t_clock_nanosleep(void *arg) {
	(void)arg;
	for (; !stopping; rounds[1]++) {
		int64_t t0 = now_ns();
		struct timespec t = {0, 650000000}, rem;
		CHECK(syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, &rem) == 0, "clock_nanosleep: %s", strerror(errno));
		took("clock_nanosleep", t0, 650);
		t0 = now_ns();
		int64_t until = t0 + 300000000;
		t = (struct timespec){until / 1000000000, until % 1000000000};
		CHECK(syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == 0, "clock_nanosleep: %s", strerror(errno));
		took("absolute clock_nanosleep", t0, 300);
	}
	return NULL;
}

static int quiet[2]; // a pipe that nobody writes

static void *t_poll(void *arg) {
	(void)arg;
	for (; !stopping; rounds[2]++) {
		int64_t t0 = now_ns();
		struct pollfd p = {quiet[0], POLLIN, 0};
		int n = poll(&p, 1, 600);
		CHECK(n == 0, "poll: %d %s", n, strerror(errno));
		took("poll", t0, 600);
		t0 = now_ns();
		fd_set f;
		FD_ZERO(&f);
		FD_SET(quiet[0], &f);
		struct timeval tv = {0, 400000};
		n = select(quiet[0] + 1, &f, NULL, NULL, &tv);
		CHECK(n == 0, "select: %d %s", n, strerror(errno));
		took("select", t0, 400);
	}
	return NULL;
}

static void *t_futex(void *arg) {
	(void)arg;
	static int word = 5;
	for (; !stopping; rounds[3]++) {
		int64_t t0 = now_ns();
		struct timespec t = {0, 550000000};
		long r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 5, &t, NULL, 0);
		CHECK(r < 0 && errno == ETIMEDOUT, "futex: %ld %s", r, strerror(errno));
		took("futex", t0, 550);
	}
	return NULL;
}

static void *t_cond(void *arg) {
	(void)arg;
	static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t c;
	pthread_condattr_t a;
	pthread_condattr_init(&a);
	pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
	pthread_cond_init(&c, &a);
	for (; !stopping; rounds[4]++) {
		int64_t t0 = now_ns(), until = t0 + 450000000;
		struct timespec t = {until / 1000000000, until % 1000000000};
		pthread_mutex_lock(&m);
		int e;
		while ((e = pthread_cond_timedwait(&c, &m, &t)) == 0) {} // may wake for nothing
		pthread_mutex_unlock(&m);
		CHECK(e == ETIMEDOUT, "pthread_cond_timedwait: %s", strerror(e));
		took("pthread_cond_timedwait", t0, 450);
	}
	return NULL;
}

static int numbers[2], events, ep_thread, sp[2];
static sem_t sem;
static volatile uint64_t sent;

static void *t_read(void *arg) {
	(void)arg;
	for (uint64_t want = 0; !stopping; want++, rounds[5]++) {
		uint64_t n;
		ssize_t r = read(numbers[0], &n, 8);
		if (r == 0) break;
		CHECK(r == 8 && n == want, "read: %zd, number %lu, want %lu: %s", r, n, want, strerror(errno));
	}
	return NULL;
}

static void *t_recv(void *arg) {
	(void)arg;
	for (uint64_t want = 0; !stopping; want++, rounds[6]++) {
		uint64_t n;
		ssize_t r = recv(sp[0], &n, 8, 0);
		if (r == 0) break;
		CHECK(r == 8 && n == want, "recv: %zd, number %lu, want %lu: %s", r, n, want, strerror(errno));
	}
	return NULL;
}

static void *t_sem(void *arg) {
	(void)arg;
	for (; !stopping; rounds[7]++) CHECK(sem_wait(&sem) == 0, "sem_wait: %s", strerror(errno));
	return NULL;
}

// t_epoll waits with and without time limit, also for what comes.
static void *t_epoll(void *arg) {
	(void)arg;
	int idle = SYS(epoll_create1(EPOLL_CLOEXEC));
	for (; !stopping; rounds[8]++) {
		struct epoll_event e;
		int64_t t0 = now_ns();
		int n = epoll_wait(idle, &e, 1, 500);
		if (!(n < 0 && errno == EINTR && eintr_ok)) {
			CHECK(n == 0, "epoll_wait: %d %s", n, strerror(errno));
			took("epoll_wait", t0, 500);
		}
		n = epoll_wait(ep_thread, &e, 1, -1);
		if (n < 0 && errno == EINTR && eintr_ok) continue;
		CHECK(n == 1 && e.data.u64 == 777, "epoll_wait: %d %s", n, strerror(errno));
		uint64_t v;
		CHECK(read(events, &v, 8) == 8, "read eventfd: %s", strerror(errno));
	}
	return NULL;
}

static void *t_wait(void *arg) {
	(void)arg;
	for (; !stopping; rounds[9]++) {
		pid_t pid = SYS(fork());
		if (pid == 0) {
			struct timespec t = {0, 400000000};
			nanosleep(&t, NULL);
			_exit(7);
		}
		int st;
		pid_t got = waitpid(pid, &st, 0);
		CHECK(got == pid && WIFEXITED(st) && WEXITSTATUS(st) == 7, "waitpid: %d, status %x: %s", got, st, strerror(errno));
	}
	return NULL;
}

static volatile bool paused_ended;
static void *t_pause(void *arg) {
	(void)arg;
	// Nothing ever signals this thread: sigsuspend must not come back.
	sigset_t all;
	sigfillset(&all);
	sigsuspend(&all);
	paused_ended = true;
	return NULL;
}

static int stuffed[2];
static void *t_write(void *arg) {
	(void)arg;
	unsigned char b[100000];
	for (uint64_t at = 0; !stopping; rounds[10]++) {
		for (size_t i = 0; i < sizeof b; i++) b[i] = pattern(50, at + i);
		// A write that has moved some bytes may be cut short by a stop.
		ssize_t w = write(stuffed[1], b, sizeof b);
		if (w < 0 && errno == EPIPE) break;
		CHECK(w > 0, "write: %s", strerror(errno));
		at += w;
	}
	return NULL;
}

static void syscalls_check(void) {
	static int turn;
	static uint64_t last[16], drained;
	CHECK(!paused_ended, "sigsuspend came back: %s", strerror(errno));
	if (++turn % 25 == 0) {
		uint64_t one = 1;
		CHECK(SYS(write(numbers[1], (void *)&sent, 8)) == 8 && SYS(write(sp[1], (void *)&sent, 8)) == 8, "send");
		sent++;
		CHECK(SYS(write(events, &one, 8)) == 8, "write eventfd");
		sem_post(&sem);
	}
	unsigned char b[5000];
	ssize_t n = read(stuffed[0], b, sizeof b);
	CHECK(n > 0 || errno == EAGAIN, "drain: %s", strerror(errno));
	for (ssize_t i = 0; i < n; i++) CHECK(b[i] == pattern(50, drained + i), "blocked write: byte %lu is wrong", drained + i);
	if (n > 0) drained += n;
	if (turn % 800 == 0)
		for (int i = 0; i < 11; i++) {
			CHECK(moved(&rounds[i], last[i]), "thread %d hangs in its system call after %lu rounds", i, last[i]);
			last[i] = rounds[i];
		}
}

COMMAND(syscalls) {
	signal(SIGPIPE, SIG_IGN);
	SYS(pipe2(quiet, O_CLOEXEC));
	SYS(pipe2(numbers, O_CLOEXEC));
	SYS(pipe2(stuffed, O_CLOEXEC));
	SYS(fcntl(stuffed[0], F_SETFL, O_NONBLOCK));
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sp));
	sem_init(&sem, 0, 0);
	events = SYS(eventfd(0, EFD_CLOEXEC));
	ep_thread = SYS(epoll_create1(EPOLL_CLOEXEC));
	struct epoll_event e = {.events = EPOLLIN, .data.u64 = 777};
	SYS(epoll_ctl(ep_thread, EPOLL_CTL_ADD, events, &e));
	void *(*threads[])(void *) = {t_nanosleep, t_clock_nanosleep, t_poll, t_futex, t_cond, t_read, t_recv, t_sem, t_epoll, t_wait, t_write, t_pause};
	for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) spawn(threads[i], NULL);
	loop(syscalls_check);
}

// ---- accept: a thread blocked in accept of a listener; connections come at
// SIGUSR1 and at the end, so that none is open in between.

static int listener;
static volatile int accepted;
static struct sockaddr_un addr = {AF_UNIX, ""};
static volatile sig_atomic_t knock;

static void *t_accept(void *arg) {
	(void)arg;
	for (;;) {
		int s = accept(listener, NULL, NULL);
		CHECK(s >= 0, "accept: %s", strerror(errno));
		char c;
		CHECK(read(s, &c, 1) == 1 && c == 'k', "read from the connection: %s", strerror(errno));
		close(s);
		accepted++;
	}
	return NULL;
}

static void knock_now(void) {
	int before = accepted, c = SYS(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	CHECK(connect(c, (struct sockaddr *)&addr, sizeof addr) == 0, "connect: %s", strerror(errno));
	CHECK(SYS(write(c, "k", 1)) == 1, "write");
	close(c);
	int64_t t0 = now_ns();
	while (accepted == before) {
		CHECK(now_ns() - t0 < PATIENCE_MS * 1000000LL, "a thread blocked in accept does not wake up");
		struct timespec t = {0, 1000000};
		nanosleep(&t, NULL);
	}
}

static void on_knock(int s) { (void)s; knock = 1; }

static void accept_check(void) {
	if (knock) {
		knock = 0;
		knock_now();
	}
}

COMMAND(accept) {
	snprintf(addr.sun_path + 1, sizeof addr.sun_path - 1, "godwit-accept-%d", getpid());
	listener = SYS(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	SYS(bind(listener, (struct sockaddr *)&addr, sizeof addr));
	SYS(listen(listener, 5));
	struct sigaction sa = {.sa_handler = on_knock, .sa_flags = SA_RESTART};
	sigset_t set, old;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	spawn(t_accept, NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	SYS(sigaction(SIGUSR1, &sa, NULL));
	loop(accept_check);
	knock_now();
}
