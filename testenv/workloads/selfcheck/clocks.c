// ---- clocks: CLOCK_MONOTONIC and CLOCK_BOOTTIME go on, whatever host the
// program is on: never back, never far ahead, and everything that waits for a
// point of theirs meets it.
#include "selfcheck.h"
#include <sys/timerfd.h>

static int64_t read_clock(clockid_t c, bool raw) {
	struct timespec t;
	if (raw) SYS(syscall(SYS_clock_gettime, c, &t));
	else SYS(clock_gettime(c, &t));
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME, CLOCK_MONOTONIC_COARSE};
enum { CLOCKS = sizeof clocks / sizeof *clocks };
static int64_t clock_last[CLOCKS], boot_ahead;
static volatile uint64_t waits[4];

// between checks that a clock stands between two points of another reading.
static void uptime_check(void) {
	int64_t before = read_clock(CLOCK_BOOTTIME, false);
	char b[64] = {0};
	int fd = SYS(open("/proc/uptime", O_RDONLY | O_CLOEXEC));
	CHECK(read(fd, b, sizeof b - 1) > 0, "read /proc/uptime");
	close(fd);
	int64_t up = strtod(b, NULL) * 1e9, after = read_clock(CLOCK_BOOTTIME, false);
	CHECK(up >= before - 1000000000LL && up <= after + 1000000000LL, "/proc/uptime says %ld, the clock %ld", up, after);
}

static void clocks_check(void) {
	for (int i = 0; i < CLOCKS; i++) {
		int64_t now = read_clock(clocks[i], i % 2);
		CHECK(now >= clock_last[i], "clock %d went back from %ld to %ld", clocks[i], clock_last[i], now);
		CHECK(clock_last[i] == 0 || now < clock_last[i] + 90000000000LL, "clock %d jumped from %ld to %ld", clocks[i], clock_last[i], now);
		clock_last[i] = now;
	}
	// The library's way, without a system call, and the kernel's agree.
	for (int i = 0; i < CLOCKS; i++) {
		int64_t a = read_clock(clocks[i], true), b = read_clock(clocks[i], false), c = read_clock(clocks[i], true);
		int64_t coarse = clocks[i] == CLOCK_MONOTONIC_COARSE ? 10000000 : 0;
		CHECK(b >= a - coarse && b <= c + coarse, "clock %d is %ld for the library between %ld and %ld of the kernel", clocks[i], b, a, c);
	}
	int64_t before = read_clock(CLOCK_MONOTONIC, true), boot = read_clock(CLOCK_BOOTTIME, true), after = read_clock(CLOCK_MONOTONIC, true);
	CHECK(boot - before > boot_ahead - 1000000000LL && boot - after < boot_ahead + 1000000000LL, "boot time was %ld ahead and is %ld to %ld", boot_ahead, boot - after, boot - before);
	uptime_check();
	static int turn;
	static uint64_t last[4];
	if (++turn % 150) return;
	for (int i = 0; i < 4; i++) {
		CHECK(moved(&waits[i], last[i]), "wait %d never ends", i);
		last[i] = waits[i];
	}
}

// met checks that a wait for a point of a clock ended there, at the earliest,
// and not much later than that and the pause of a move.
static void met(const char *what, clockid_t c, int64_t until) {
	int64_t now = read_clock(c, true);
	CHECK(now >= until, "%s ended %ld ns too early", what, until - now);
	CHECK(now < until + 90000000000LL, "%s ended %ld ns too late", what, now - until);
}

static struct timespec at(int64_t ns) { return (struct timespec){ns / 1000000000, ns % 1000000000}; }

static void *t_sleep(void *arg) {
	clockid_t c = arg ? CLOCK_BOOTTIME : CLOCK_MONOTONIC;
	for (; !stopping; waits[arg ? 0 : 1]++) {
		int64_t until = read_clock(c, false) + 300000000;
		struct timespec t = at(until);
		CHECK(syscall(SYS_clock_nanosleep, c, TIMER_ABSTIME, &t, NULL) == 0, "clock_nanosleep: %s", strerror(errno));
		met("sleep", c, until);
	}
	return NULL;
}

static void *t_timerfd(void *arg) {
	(void)arg;
	int fd = SYS(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC));
	for (; !stopping; waits[2]++) {
		int64_t until = read_clock(CLOCK_BOOTTIME, false) + 250000000;
		struct itimerspec its = {{0, 0}, at(until)};
		SYS(timerfd_settime(fd, TFD_TIMER_ABSTIME, &its, NULL));
		uint64_t n;
		CHECK(read(fd, &n, 8) == 8 && n == 1, "timerfd: %s", strerror(errno));
		met("timerfd", CLOCK_BOOTTIME, until);
	}
	return NULL;
}

static void *t_timer(void *arg) {
	(void)arg;
	timer_t timer;
	struct sigevent ev = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 5};
	ev._sigev_un._tid = gettid();
	SYS(timer_create(CLOCK_MONOTONIC, &ev, &timer));
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	sigaddset(&set, SIGTERM);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	sigdelset(&set, SIGTERM);
	for (; !stopping; waits[3]++) {
		int64_t until = read_clock(CLOCK_MONOTONIC, false) + 200000000;
		struct itimerspec its = {{0, 0}, at(until)};
		SYS(timer_settime(timer, TIMER_ABSTIME, &its, NULL));
		siginfo_t si;
		while (sigwaitinfo(&set, &si) < 0) CHECK(errno == EINTR, "sigwaitinfo: %s", strerror(errno));
		met("POSIX timer", CLOCK_MONOTONIC, until);
	}
	return NULL;
}

COMMAND(clocks) {
	boot_ahead = read_clock(CLOCK_BOOTTIME, true) - read_clock(CLOCK_MONOTONIC, true);
	if (arg_count > 0) {
		// In a time namespace of its own, whose offsets it is told, in seconds.
		int64_t want = atoll(arg_values[0]) * 1000000000LL;
		CHECK(read_clock(CLOCK_MONOTONIC, true) > want, "the monotonic clock is not %s s ahead", arg_values[0]);
	}
	spawn(t_sleep, NULL);
	spawn(t_sleep, "boot");
	spawn(t_timerfd, NULL);
	spawn(t_timer, NULL);
	loop(clocks_check);
}
