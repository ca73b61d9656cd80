// ---- churn: hundreds of threads, of which some end and others begin at any
// moment, in two processes that fork besides.
#include "selfcheck.h"
#include <sys/mman.h>

enum { STEADY = 200, MAKERS = 6 };
static struct { volatile uint64_t begun, ended, forks, rounds[2]; volatile int steady; } *churn;

static void *t_brief(void *arg) {
	char name[16];
	snprintf(name, sizeof name, "brief-%lu", (uintptr_t)arg % 1000);
	pthread_setname_np(pthread_self(), name);
	for (volatile int i = 0; i < 3000; i++) {}
	char now[16];
	pthread_getname_np(pthread_self(), now, sizeof now);
	CHECK(strcmp(name, now) == 0, "name was %s and is %s", name, now);
	__atomic_add_fetch(&churn->ended, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void *t_maker(void *arg) {
	int which = (intptr_t)arg;
	pthread_attr_t a;
	pthread_attr_init(&a);
	pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&a, 64 << 10);
	for (uintptr_t n = 0; !stopping; n++) {
		pthread_t t;
		int e = pthread_create(&t, &a, t_brief, (void *)n);
		if (e == EAGAIN) nap_ms(1);
		else {
			CHECK(e == 0, "create thread: %s", strerror(e));
			__atomic_add_fetch(&churn->begun, 1, __ATOMIC_SEQ_CST);
		}
		churn->rounds[which]++;
		// No more than some tens at once, however slow the machine is.
		while (churn->begun > churn->ended + 40 && !stopping) nap_ms(1);
	}
	return NULL;
}

static void *t_twins(void *arg) {
	(void)arg;
	while (!stopping) {
		pid_t pid = SYS(fork());
		if (pid == 0) {
			// Its own child is an orphan at once, and may be met as one.
			if (fork() == 0) _exit(0);
			_exit(4);
		}
		int st;
		CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st) && WEXITSTATUS(st) == 4, "the child ended with %x", st);
		churn->forks++;
		nap_ms(2);
	}
	return NULL;
}

static void *t_steady(void *arg) {
	(void)arg;
	pid_t tid = gettid();
	__atomic_add_fetch(&churn->steady, 1, __ATOMIC_SEQ_CST);
	for (; !stopping; nap_ms(100)) CHECK(gettid() == tid, "a thread has another number");
	return NULL;
}

static pid_t churn_child;

static void churn_check(void) {
	static int turn;
	static uint64_t last[3];
	expect_alive(churn_child);
	CHECK(churn->ended <= churn->begun + 2 * MAKERS, "%lu threads ended, %lu begun", churn->ended, churn->begun);
	if (++turn % 300) return;
	const volatile uint64_t *now[] = {&churn->rounds[0], &churn->rounds[1], &churn->forks};
	for (int i = 0; i < 3; i++) {
		CHECK(moved(now[i], last[i]), "maker %d stands still", i);
		last[i] = *now[i];
	}
}

COMMAND(churn) {
	churn = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	churn_child = child();
	int which = churn_child == 0;
	for (int i = 0; i < STEADY / 2; i++) spawn(t_steady, NULL);
	for (int i = 0; i < MAKERS / 2; i++) spawn(t_maker, (void *)(intptr_t)which);
	if (which) for (;; nap_ms(5)) orphan_check();
	pthread_t twins = spawn(t_twins, NULL);
	while (churn->steady < STEADY) nap_ms(1);
	loop(churn_check);
	pthread_join(twins, NULL);
	end_child(churn_child);
}
