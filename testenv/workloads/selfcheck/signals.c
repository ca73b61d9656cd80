// Signals and timers.
#include "selfcheck.h"
#include <sched.h>
#include <sys/time.h>
#include <ucontext.h>

// ---- signals

static volatile int usr2_count, rt_count, thr_count, alt_count, rt_bad;
static char altstack[65536];
static volatile bool on_alt;
static pthread_t sig_thread;
static volatile int thread_state; // 1: blocked and pending, 2: asked to unblock, 3: done

static void on_usr2(int s) { (void)s; usr2_count++; }
static void on_rt(int s, siginfo_t *si, void *u) {
	(void)s; (void)u;
	// Queued with values 100, 101, 102: none lost, none doubled, in order.
	if (si->si_value.sival_int != 100 + rt_count || si->si_code != SI_QUEUE || si->si_pid != getpid()) rt_bad++;
	rt_count++;
}
static void on_alt_sig(int s) {
	(void)s;
	char here;
	on_alt = &here >= altstack && &here < altstack + sizeof altstack;
	alt_count++;
}
static void on_thr(int s) { (void)s; if (pthread_equal(pthread_self(), sig_thread)) thr_count++; }

static void *blocked_thread(void *arg) {
	(void)arg;
	sigset_t set, got;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 3);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGTERM);
	// Those that stay pending for the process must find no thread to take them.
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN + 2);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	pthread_kill(pthread_self(), SIGRTMIN + 3);
	pthread_kill(pthread_self(), SIGRTMIN + 3);
	thread_state = 1;
	while (thread_state != 2) {
		pthread_sigmask(SIG_SETMASK, NULL, &got);
		for (int i = 1; i < 65; i++)
			CHECK(sigismember(&got, i) == sigismember(&set, i), "signal %d: mask of the thread changed", i);
		sigpending(&got);
		CHECK(sigismember(&got, SIGRTMIN + 3) == 1, "pending signal of the thread is gone");
		CHECK(thr_count == 0, "a blocked signal was delivered to the thread");
		nap_ms(5);
	}
	sigdelset(&set, SIGRTMIN + 3);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	thread_state = 3;
	return NULL;
}

static struct sigaction actions[65];
static sigset_t main_mask;

static void signals_check(void) {
	for (int i = 1; i < 65; i++) {
		struct sigaction sa;
		if (sigaction(i, NULL, &sa) != 0) continue;
		CHECK(sa.sa_handler == actions[i].sa_handler, "signal %d: handler changed", i);
		CHECK(sa.sa_flags == actions[i].sa_flags, "signal %d: flags were %x and are %x", i, actions[i].sa_flags, sa.sa_flags);
		for (int j = 1; j < 65; j++)
			CHECK(sigismember(&sa.sa_mask, j) == sigismember(&actions[i].sa_mask, j), "signal %d: mask changed", i);
	}
	sigset_t got;
	pthread_sigmask(SIG_SETMASK, NULL, &got);
	for (int j = 1; j < 65; j++) CHECK(sigismember(&got, j) == sigismember(&main_mask, j), "signal %d: mask of the main thread changed", j);
	sigpending(&got);
	CHECK(sigismember(&got, SIGUSR2) == 1 && sigismember(&got, SIGRTMIN + 2) == 1, "pending signals of the process are gone");
	CHECK(usr2_count == 0 && rt_count == 0, "a blocked signal was delivered");
	stack_t st;
	SYS(sigaltstack(NULL, &st));
	CHECK(st.ss_sp == altstack && st.ss_size == sizeof altstack && st.ss_flags == 0, "alternate stack changed");
	int before = alt_count;
	raise(SIGRTMIN + 4);
	CHECK(alt_count == before + 1, "a handler did not run");
	CHECK(on_alt, "a handler did not run on the alternate stack");
}

COMMAND(signals) {
	stack_t st = {.ss_sp = altstack, .ss_size = sizeof altstack};
	SYS(sigaltstack(&st, NULL));
	struct sigaction sa = {.sa_handler = on_usr2, .sa_flags = SA_RESTART};
	sigaddset(&sa.sa_mask, SIGHUP);
	sigaddset(&sa.sa_mask, SIGRTMAX);
	SYS(sigaction(SIGUSR2, &sa, NULL));
	sa = (struct sigaction){.sa_sigaction = on_rt, .sa_flags = SA_SIGINFO};
	SYS(sigaction(SIGRTMIN + 2, &sa, NULL));
	sa = (struct sigaction){.sa_handler = on_thr};
	SYS(sigaction(SIGRTMIN + 3, &sa, NULL));
	sa = (struct sigaction){.sa_handler = on_alt_sig, .sa_flags = SA_ONSTACK | SA_NODEFER};
	SYS(sigaction(SIGRTMIN + 4, &sa, NULL));
	sa = (struct sigaction){.sa_handler = SIG_IGN};
	SYS(sigaction(SIGPIPE, &sa, NULL));
	SYS(sigaction(SIGHUP, &sa, NULL));
	SYS(sigaction(SIGTRAP, &sa, NULL)); // the one that a tracer may disturb
	sigset_t block;
	sigemptyset(&block);
	sigaddset(&block, SIGUSR2);
	sigaddset(&block, SIGRTMIN + 2);
	sigaddset(&block, SIGWINCH);
	pthread_sigmask(SIG_BLOCK, &block, NULL);
	pthread_sigmask(SIG_SETMASK, NULL, &main_mask);
	sig_thread = spawn(blocked_thread, NULL);
	while (thread_state != 1) nap_ms(1);
	kill(getpid(), SIGUSR2);
	kill(getpid(), SIGUSR2); // merged: not a queueing signal
	for (int i = 0; i < 3; i++) SYS(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = 100 + i}));
	for (int i = 1; i < 65; i++) sigaction(i, NULL, &actions[i]);
	loop(signals_check);
	thread_state = 2;
	pthread_join(sig_thread, NULL);
	CHECK(thr_count == 2, "%d of 2 signals pending for the thread were delivered", thr_count);
	pthread_sigmask(SIG_UNBLOCK, &block, NULL);
	CHECK(usr2_count == 1, "pending SIGUSR2 was delivered %d times", usr2_count);
	CHECK(rt_count == 3 && rt_bad == 0, "%d of 3 queued signals came, %d of them wrong", rt_count, rt_bad);
}

// ---- timers

static volatile uint64_t ticks_real, ticks_virt, ticks_prof, ticks_posix, ticks_thread;
static pthread_t timer_thread;
static volatile pid_t timer_tid;
static timer_t t_posix, t_thread, t_far, t_none;
static int64_t timers_t0;

static void on_alrm(int s) { (void)s; ticks_real++; }
static void on_vtalrm(int s) { (void)s; ticks_virt++; }
static void on_prof(int s) { (void)s; ticks_prof++; }
static volatile bool timer_bad;
static void on_posix(int s, siginfo_t *si, void *u) {
	(void)s; (void)u;
	if (si->si_code != SI_TIMER || si->si_value.sival_int != 4242) timer_bad = true;
	ticks_posix += 1 + si->si_overrun;
}

static void *thread_timer(void *arg) {
	(void)arg;
	timer_tid = gettid();
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 6);
	while (!stopping) {
		siginfo_t si;
		struct timespec t = {0, 50000000};
		int s = sigtimedwait(&set, &si, &t);
		if (s < 0) {
			// EINTR: documented for every stop by a tracer.
			CHECK(errno == EAGAIN || errno == EINTR, "sigtimedwait: %s", strerror(errno));
			continue;
		}
		CHECK(si.si_value.sival_int == 4343, "timer of the thread brought value %d", si.si_value.sival_int);
		ticks_thread += 1 + si.si_overrun;
	}
	return NULL;
}

// burner uses the CPU time that the other two timers count. It does so in long
// pieces, because the kernel samples user time at its own ticks.
static void *burner(void *arg) {
	(void)arg;
	while (!stopping) {
		for (int64_t until = now_ns() + 25000000; now_ns() < until;)
			for (volatile int i = 0; i < 100000; i++) {}
		nap_ms(60);
	}
	return NULL;
}

static void timers_check(void) {
	static int turn;
	static uint64_t last_real, last_posix, last_thread, last_virt, last_prof;
	CHECK(!timer_bad, "a POSIX timer brought a wrong value");
	// Never more ticks than time went by: nothing fires twice.
	int64_t el = now_ns() - timers_t0;
	CHECK((int64_t)ticks_real <= el / 50000000 + 2, "ITIMER_REAL: %lu ticks of 50 ms in %ld ns", ticks_real, el);
	CHECK((int64_t)ticks_posix <= el / 30000000 + 2, "POSIX timer: %lu ticks of 30 ms in %ld ns", ticks_posix, el);
	CHECK((int64_t)ticks_thread <= el / 40000000 + 2, "timer of a thread: %lu ticks of 40 ms in %ld ns", ticks_thread, el);
	if (++turn % 200 == 0) {
		// Two hundred rounds of at least 10 ms: every timer must have ticked.
		CHECK(ticks_real > last_real + 5, "ITIMER_REAL stands still at %lu", ticks_real);
		CHECK(ticks_posix > last_posix + 5, "POSIX timer stands still at %lu", ticks_posix);
		CHECK(ticks_thread > last_thread + 5, "timer of a thread stands still at %lu", ticks_thread);
		CHECK(moved(&ticks_virt, last_virt), "ITIMER_VIRTUAL stands still at %lu", ticks_virt);
		CHECK(moved(&ticks_prof, last_prof), "ITIMER_PROF stands still at %lu", ticks_prof);
		last_real = ticks_real;
		last_posix = ticks_posix;
		last_thread = ticks_thread;
		last_virt = ticks_virt;
		last_prof = ticks_prof;
	}
	struct itimerval iv;
	SYS(getitimer(ITIMER_REAL, &iv));
	CHECK(iv.it_interval.tv_usec == 50000, "interval of ITIMER_REAL is %ld us", iv.it_interval.tv_usec);
	struct itimerspec is;
	SYS(timer_gettime(t_posix, &is));
	CHECK(is.it_interval.tv_nsec == 30000000, "interval of the POSIX timer is %ld ns", is.it_interval.tv_nsec);
	SYS(timer_gettime(t_none, &is));
	CHECK(is.it_value.tv_sec == 0 && is.it_value.tv_nsec == 0, "a disarmed timer is armed");
	// An hour ahead, less what went by; frozen time may or may not count.
	SYS(timer_gettime(t_far, &is));
	int64_t left = is.it_value.tv_sec * 1000000000LL + is.it_value.tv_nsec, hour = 3600000000000LL;
	CHECK(left <= hour && left >= hour - el - 1000000000LL, "one-shot timer: %ld ns left of an hour after %ld ns", left, el);
}

COMMAND(timers) {
	timer_thread = 0;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 6);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	struct sigaction sa = {.sa_handler = on_alrm, .sa_flags = SA_RESTART};
	SYS(sigaction(SIGALRM, &sa, NULL));
	sa.sa_handler = on_vtalrm;
	SYS(sigaction(SIGVTALRM, &sa, NULL));
	sa.sa_handler = on_prof;
	SYS(sigaction(SIGPROF, &sa, NULL));
	sa = (struct sigaction){.sa_sigaction = on_posix, .sa_flags = SA_SIGINFO | SA_RESTART};
	SYS(sigaction(SIGRTMIN + 5, &sa, NULL));
	// Only the thread that naps must not see the other timers' signals.
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	timer_thread = spawn(thread_timer, NULL);
	pthread_t burn = spawn(burner, NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	while (!timer_tid) sched_yield();
	timers_t0 = now_ns();
	struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 5, .sigev_value.sival_int = 4242};
	SYS(timer_create(CLOCK_MONOTONIC, &ev, &t_posix));
	struct sigevent gone = {.sigev_notify = SIGEV_NONE};
	timer_t skip; // leaves a hole in the numbers
	SYS(timer_create(CLOCK_REALTIME, &gone, &skip));
	SYS(timer_create(CLOCK_REALTIME, &gone, &t_none));
	ev = (struct sigevent){.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 6, .sigev_value.sival_int = 4343};
	ev._sigev_un._tid = timer_tid;
	SYS(timer_create(CLOCK_BOOTTIME, &ev, &t_thread));
	SYS(timer_create(CLOCK_MONOTONIC, &gone, &t_far));
	SYS(timer_delete(skip));
	struct itimerspec is = {{0, 30000000}, {0, 30000000}};
	SYS(timer_settime(t_posix, 0, &is, NULL));
	is = (struct itimerspec){{0, 40000000}, {0, 40000000}};
	SYS(timer_settime(t_thread, 0, &is, NULL));
	is = (struct itimerspec){{0, 0}, {3600, 0}};
	SYS(timer_settime(t_far, 0, &is, NULL));
	struct itimerval iv = {{0, 50000}, {0, 50000}};
	SYS(setitimer(ITIMER_REAL, &iv, NULL));
	iv = (struct itimerval){{0, 40000}, {0, 40000}};
	SYS(setitimer(ITIMER_VIRTUAL, &iv, NULL));
	SYS(setitimer(ITIMER_PROF, &iv, NULL));
	// This loop may be interrupted at any sleep: it does its own.
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	while (!stopping) {
		timers_check();
		beat();
		int64_t until = now_ns() + 10000000;
		struct timespec t = {until / 1000000000, until % 1000000000};
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR && !stopping) {}
	}
	pthread_join(timer_thread, NULL);
	pthread_join(burn, NULL);
}
