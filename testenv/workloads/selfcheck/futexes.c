// ---- futexes: locks with priority inheritance, held and waited for, robust
// ones too, between threads and between processes; requeued waiters; waits for
// several words at once. Each protects a counter that shows a lost lock.
#include "selfcheck.h"
#include <linux/futex.h>
#include <sys/mman.h>

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

enum { PI, ROBUST_PI, SHARED_PI, CONDVAR, LOCKS };
static const char *lock_names[LOCKS] = {"PI mutex", "robust PI mutex", "shared robust PI mutex", "mutex of a condition"};
static struct board {
	struct { pthread_mutex_t m; volatile uint64_t a, b, holders; } l[LOCKS];
	pthread_cond_t cond;
	volatile uint64_t generation, woken;
	pthread_mutex_t dead, held;
	volatile int dead_taken;
	volatile pid_t holder;
	uint32_t words[3];
	volatile uint64_t vwaits, vwakes, timeouts;
} *fb;

static void lock(int i) {
	int e = pthread_mutex_lock(&fb->l[i].m);
	CHECK(e == 0, "lock %s: %s", lock_names[i], strerror(e));
	uint64_t n = __atomic_add_fetch(&fb->l[i].holders, 1, __ATOMIC_SEQ_CST);
	CHECK(n == 1, "%s is held by %lu at once", lock_names[i], n);
	CHECK(fb->l[i].a == fb->l[i].b, "%s: %lu and %lu", lock_names[i], fb->l[i].a, fb->l[i].b);
}

static void unlock(int i) {
	fb->l[i].b++;
	__atomic_sub_fetch(&fb->l[i].holders, 1, __ATOMIC_SEQ_CST);
	int e = pthread_mutex_unlock(&fb->l[i].m);
	CHECK(e == 0, "unlock %s: %s", lock_names[i], strerror(e));
}

static void use_lock(int i, int ms) {
	lock(i);
	fb->l[i].a++;
	nap_ms(ms); // the others wait in the kernel
	unlock(i);
}

static void *t_locker(void *arg) {
	int i = (intptr_t)arg;
	for (int n = 0; !stopping; n++) {
		use_lock(i, n % 8 ? 3 : 40);
		if (n % 3 == 0) nap_ms(1);
	}
	return NULL;
}

static void *t_waiter(void *arg) {
	(void)arg;
	uint64_t seen = 0;
	pthread_mutex_lock(&fb->l[CONDVAR].m);
	while (!stopping) {
		while (fb->generation == seen && !stopping) pthread_cond_wait(&fb->cond, &fb->l[CONDVAR].m);
		seen = fb->generation;
		fb->woken++;
	}
	pthread_mutex_unlock(&fb->l[CONDVAR].m);
	return NULL;
}

// t_waitv waits for any of three words, with a time limit that is hit now and then.
static void *t_waitv(void *arg) {
	(void)arg;
	while (!stopping) {
		struct futex_waitv v[3] = {0};
		for (int i = 0; i < 3; i++) {
			v[i].uaddr = (uintptr_t)&fb->words[i];
			v[i].val = __atomic_load_n(&fb->words[i], __ATOMIC_SEQ_CST);
			v[i].flags = FUTEX_32;
		}
		int64_t t0 = now_ns(), until = t0 + 150000000;
		struct timespec t = {until / 1000000000, until % 1000000000};
		long r = syscall(SYS_futex_waitv, v, 3, 0, &t, CLOCK_MONOTONIC);
		if (r < 0 && errno == ETIMEDOUT) {
			CHECK(now_ns() >= until, "futex_waitv ended %ld ns too early", until - now_ns());
			fb->timeouts++;
		} else CHECK((r >= 0 && r < 3) || errno == EAGAIN, "futex_waitv: %ld %s", r, strerror(errno));
		fb->vwaits++;
	}
	return NULL;
}

// t_requeue moves waiters of a word to another and wakes them there.
static uint32_t from_word, to_word;
static volatile uint64_t requeued, requeue_waits;
static volatile bool requeue_stop;
static volatile int requeue_left = 2;
static void *t_requeued(void *arg) {
	(void)arg;
	while (!requeue_stop) {
		long r = syscall(SYS_futex, &from_word, FUTEX_WAIT_PRIVATE, __atomic_load_n(&from_word, __ATOMIC_SEQ_CST), NULL, NULL, 0);
		CHECK(r == 0 || errno == EAGAIN, "wait to be requeued: %s", strerror(errno));
		requeue_waits++;
	}
	__atomic_sub_fetch(&requeue_left, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void *t_requeue(void *arg) {
	(void)arg;
	while (!stopping) {
		nap_ms(7);
		long n = syscall(SYS_futex, &from_word, FUTEX_CMP_REQUEUE_PRIVATE, 0, (void *)10, &to_word, from_word);
		CHECK(n >= 0, "requeue: %s", strerror(errno));
		requeued += n;
		nap_ms(7);
		// After a move they wait on the first word again.
		__atomic_add_fetch(&from_word, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &to_word, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0);
		syscall(SYS_futex, &from_word, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0);
	}
	requeue_stop = true;
	__atomic_add_fetch(&from_word, 1, __ATOMIC_SEQ_CST);
	while (requeue_left > 0) {
		syscall(SYS_futex, &to_word, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0);
		syscall(SYS_futex, &from_word, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0);
		nap_ms(1);
	}
	return NULL;
}

static pid_t locker, holder;

static void futexes_check(void) {
	static int turn;
	static uint64_t last[LOCKS + 4];
	expect_alive(locker);
	CHECK(pthread_mutex_trylock(&fb->held) == EBUSY, "the lock that a child holds is free");
	fb->words[turn % 3]++;
	if (turn % 40 < 20) fb->vwakes += syscall(SYS_futex, &fb->words[turn % 3], FUTEX_WAKE, 10, NULL, NULL, 0);
	if (turn % 4 == 0) {
		lock(CONDVAR);
		fb->l[CONDVAR].a++;
		fb->generation++;
		pthread_cond_broadcast(&fb->cond);
		unlock(CONDVAR);
	}
	if (++turn % 200) return;
	// Of condition and wakes it is this thread itself that goes on.
	const volatile uint64_t *now[] = {&fb->l[0].a, &fb->l[1].a, &fb->l[2].a, &fb->l[3].a, &fb->woken, &fb->vwaits, &fb->vwakes, &requeue_waits};
	for (int i = 0; i < LOCKS + 4; i++) {
		CHECK(moved(now[i], last[i]), "%s stands still at %lu", i < LOCKS ? lock_names[i] : "a wait", last[i]);
		last[i] = *now[i];
	}
}

static void init_lock(pthread_mutex_t *m, bool pi, bool robust, bool shared) {
	pthread_mutexattr_t a;
	pthread_mutexattr_init(&a);
	if (pi) CHECK(pthread_mutexattr_setprotocol(&a, PTHREAD_PRIO_INHERIT) == 0, "priority inheritance");
	if (robust) pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
	if (shared) pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
	CHECK(pthread_mutex_init(m, &a) == 0, "make a lock");
}

COMMAND(futexes) {
	fb = SYS(mmap(NULL, sizeof *fb, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	init_lock(&fb->l[PI].m, true, false, false);
	init_lock(&fb->l[ROBUST_PI].m, true, true, false);
	init_lock(&fb->l[SHARED_PI].m, true, true, true);
	init_lock(&fb->l[CONDVAR].m, false, false, false);
	init_lock(&fb->held, true, true, true);
	pthread_cond_init(&fb->cond, NULL);
	locker = child();
	if (locker == 0)
		for (int n = 0;; n++) {
			orphan_check();
			use_lock(SHARED_PI, n % 5 ? 2 : 30);
		}
	// It holds a lock until its end, of which the lock tells.
	holder = child();
	if (holder == 0) {
		CHECK(pthread_mutex_lock(&fb->held) == 0, "lock");
		fb->holder = getpid();
		for (;; nap_ms(5)) orphan_check();
	}
	while (!fb->holder) nap_ms(1);
	pthread_t t[16];
	int n = 0;
	for (intptr_t i = PI; i <= SHARED_PI; i++)
		for (int j = 0; j < 3; j++) t[n++] = spawn(t_locker, (void *)i);
	pthread_t waiters[2];
	for (int i = 0; i < 2; i++) waiters[i] = spawn(t_waiter, NULL);
	t[n++] = spawn(t_waitv, NULL);
	for (int i = 0; i < 2; i++) t[n++] = spawn(t_requeued, NULL);
	t[n++] = spawn(t_requeue, NULL);
	loop(futexes_check);
	for (int i = 0; i < n; i++) pthread_join(t[i], NULL);
	pthread_mutex_lock(&fb->l[CONDVAR].m);
	fb->generation++;
	pthread_cond_broadcast(&fb->cond);
	pthread_mutex_unlock(&fb->l[CONDVAR].m);
	for (int i = 0; i < 2; i++) pthread_join(waiters[i], NULL);
	CHECK(requeued > 0 && fb->timeouts > 0, "%lu requeued, %lu timeouts", requeued, fb->timeouts);
	end_child(holder);
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += PATIENCE_MS / 1000;
	int e = pthread_mutex_timedlock(&fb->held, &until);
	CHECK(e == EOWNERDEAD, "the lock of the dead child: %s", strerror(e));
	end_child(locker);
}
