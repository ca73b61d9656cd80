// ---- ticking: POSIX timers of every clock, with each way to be told, and what
// they ran past while nobody listened.
#include "selfcheck.h"
#include <sys/mman.h>

#ifndef CLOCK_TAI
#define CLOCK_TAI 11
#endif
enum { TIMERS = 12 };
static struct tick {
	const char *name;
	clockid_t clock;
	int notify;
	int64_t interval; // ns
	bool cpu, there, oneshot;
	timer_t id;
	int64_t t0;
	volatile uint64_t total;
} ticks[TIMERS];
static volatile pid_t ticker;
static pid_t busy;

static int64_t read_ns(clockid_t c) {
	struct timespec t;
	SYS(clock_gettime(c, &t));
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// t_ticker takes the signals of all timers and counts for each what it ran past.
static void *t_ticker(void *arg) {
	(void)arg;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 7);
	sigaddset(&set, SIGRTMIN + 8);
	ticker = gettid();
	while (!stopping) {
		// Rarely, so that most is told by overruns.
		nap_ms(60);
		siginfo_t si;
		struct timespec now = {0, 0};
		while (sigtimedwait(&set, &si, &now) > 0) {
			CHECK(si.si_code == SI_TIMER && si.si_value.sival_int >= 0 && si.si_value.sival_int < TIMERS, "timer signal: code %d value %d", si.si_code, si.si_value.sival_int);
			ticks[si.si_value.sival_int].total += 1 + si.si_overrun;
		}
	}
	return NULL;
}

static void *t_burn(void *arg) {
	(void)arg;
	while (!stopping) {
		for (int64_t until = now_ns() + 5000000; now_ns() < until;) {}
		nap_ms(5);
	}
	return NULL;
}

static void ticking_check(void) {
	static int turn;
	static uint64_t last[TIMERS];
	bool look = ++turn % 150 == 0;
	for (int i = 0; i < TIMERS; i++) {
		struct tick *t = &ticks[i];
		if (!t->there) continue;
		struct itimerspec is;
		SYS(timer_gettime(t->id, &is));
		int64_t left = is.it_value.tv_sec * 1000000000LL + is.it_value.tv_nsec, every = is.it_interval.tv_sec * 1000000000LL + is.it_interval.tv_nsec;
		if (t->oneshot) {
			CHECK(every == 0 && left > 0 && left <= t->interval, "%s: %ld ns left, %ld ns interval", t->name, left, every);
			continue;
		}
		// The kernel rounds to the resolution of CPU clocks.
		CHECK(every >= t->interval && every <= t->interval + 10000000, "%s: interval of %ld ns, want %ld", t->name, every, t->interval);
		CHECK(left <= every + 1000000, "%s: %ld ns left of %ld", t->name, left, every);
		if (t->notify == SIGEV_NONE) continue;
		// Never more than its clock has gone on.
		int64_t most = (read_ns(t->cpu && t->clock != CLOCK_PROCESS_CPUTIME_ID ? CLOCK_MONOTONIC : t->clock) - t->t0) / t->interval + 2;
		CHECK(t->cpu || (int64_t)t->total <= most, "%s: %ld ticks, at most %ld", t->name, t->total, most);
		if (!look) continue;
		CHECK(moved(&t->total, last[i]), "%s stands still at %ld ticks", t->name, t->total);
		last[i] = t->total;
	}
}

COMMAND(ticking) {
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 7);
	sigaddset(&set, SIGRTMIN + 8);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	// The CPU clock of another process has its pid in the number.
	busy = child();
	if (busy == 0)
		for (;; orphan_check()) for (volatile int i = 0; i < 2000000; i++) {}
	clockid_t child_clock, thread_clock;
	CHECK(clock_getcpuclockid(busy, &child_clock) == 0, "CPU clock of the child");
	pthread_t t = spawn(t_ticker, NULL), burn = spawn(t_burn, NULL);
	CHECK(pthread_getcpuclockid(burn, &thread_clock) == 0, "CPU clock of a thread");
	while (!ticker) nap_ms(1);
	struct tick all[TIMERS] = {
		{.name = "realtime", .clock = CLOCK_REALTIME, .notify = SIGEV_SIGNAL, .interval = 7000000},
		{.name = "monotonic", .clock = CLOCK_MONOTONIC, .notify = SIGEV_THREAD_ID, .interval = 3000000},
		{.name = "boottime", .clock = CLOCK_BOOTTIME, .notify = SIGEV_SIGNAL, .interval = 11000000},
		{.name = "tai", .clock = CLOCK_TAI, .notify = SIGEV_THREAD_ID, .interval = 13000000},
		{.name = "process", .clock = CLOCK_PROCESS_CPUTIME_ID, .notify = SIGEV_SIGNAL, .interval = 20000000, .cpu = true},
		{.name = "a thread", .clock = thread_clock, .notify = SIGEV_THREAD_ID, .interval = 20000000, .cpu = true},
		{.name = "a child", .clock = child_clock, .notify = SIGEV_SIGNAL, .interval = 20000000, .cpu = true},
		{.name = "realtime alarm", .clock = CLOCK_REALTIME_ALARM, .notify = SIGEV_SIGNAL, .interval = 50000000},
		{.name = "boottime alarm", .clock = CLOCK_BOOTTIME_ALARM, .notify = SIGEV_THREAD_ID, .interval = 50000000},
		{.name = "silent", .clock = CLOCK_MONOTONIC, .notify = SIGEV_NONE, .interval = 9000000},
		{.name = "far", .clock = CLOCK_BOOTTIME, .notify = SIGEV_SIGNAL, .interval = 5000000000000, .oneshot = true},
		{.name = "far for a thread", .clock = CLOCK_REALTIME, .notify = SIGEV_THREAD_ID, .interval = 6000000000000, .oneshot = true},
	};
	memcpy(ticks, all, sizeof all);
	for (int i = 0; i < TIMERS; i++) {
		struct tick *k = &ticks[i];
		struct sigevent ev = {.sigev_notify = k->notify, .sigev_signo = SIGRTMIN + (k->notify == SIGEV_SIGNAL ? 7 : 8), .sigev_value.sival_int = i};
		if (k->notify == SIGEV_THREAD_ID) ev._sigev_un._tid = ticker;
		if (timer_create(k->clock, &ev, &k->id) != 0) {
			// Alarm clocks need a clock of the hardware that wakes the machine.
			CHECK(strstr(k->name, "alarm"), "create timer %s: %s", k->name, strerror(errno));
			continue;
		}
		k->there = true;
		struct itimerspec is = {.it_value = {k->interval / 1000000000, k->interval % 1000000000}};
		if (!k->oneshot) is.it_interval = is.it_value;
		k->t0 = read_ns(k->cpu && k->clock != CLOCK_PROCESS_CPUTIME_ID ? CLOCK_MONOTONIC : k->clock);
		SYS(timer_settime(k->id, 0, &is, NULL));
	}
	loop(ticking_check);
	pthread_join(t, NULL);
	pthread_join(burn, NULL);
	end_child(busy);
}
