// ---- waits: calls with a time limit that end when their time is over, however
// often they are interrupted by a move: what was left is what they wait for. The
// time of the moves themselves may come on top.
#include "selfcheck.h"
#include <poll.h>
#include <sys/select.h>

enum { WAIT_MS = 1500, WAITS = 5 };
static volatile int64_t paused_ns; // of all pauses longer than any of the loop's own
static volatile uint64_t wait_rounds[WAITS];
static int silent[2];

static void one_wait(int i) {
	struct timespec t = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000000}, rem;
	struct pollfd p = {silent[0], POLLIN, 0};
	fd_set f;
	FD_ZERO(&f);
	FD_SET(silent[0], &f);
	switch (i) {
	case 0: {
		struct timeval tv = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000};
		CHECK(select(silent[0] + 1, &f, NULL, NULL, &tv) == 0, "select: %s", strerror(errno));
		break;
	}
	case 1: CHECK(pselect(silent[0] + 1, &f, NULL, NULL, &t, NULL) == 0, "pselect: %s", strerror(errno)); break;
	case 2: CHECK(ppoll(&p, 1, &t, NULL) == 0, "ppoll: %s", strerror(errno)); break;
	case 3: CHECK(syscall(SYS_nanosleep, &t, &rem) == 0, "nanosleep: %s", strerror(errno)); break;
	case 4: CHECK(syscall(SYS_clock_nanosleep, CLOCK_BOOTTIME, 0, &t, &rem) == 0, "clock_nanosleep: %s", strerror(errno)); break;
	}
}

static void *t_wait_for(void *arg) {
	static const char *names[] = {"select", "pselect", "ppoll", "nanosleep", "clock_nanosleep"};
	int i = (intptr_t)arg;
	for (; !stopping; wait_rounds[i]++) {
		int64_t t0 = now_ns(), p0 = paused_ns;
		one_wait(i);
		int64_t el = now_ns() - t0;
		CHECK(el >= WAIT_MS * 1000000LL, "%s ended after %ld ns", names[i], el);
		nap_ms(30); // the other thread has noticed a pause by then
		int64_t most = WAIT_MS * 1000000LL + (paused_ns - p0) + 1000000000;
		CHECK(el <= most, "%s of %d ms took %ld ns, %ld of them paused", names[i], WAIT_MS, el, paused_ns - p0);
	}
	return NULL;
}

static void waits_check(void) {
	static int64_t last;
	int64_t now = now_ns();
	if (last && now - last > 25000000) paused_ns += now - last;
	last = now;
}

COMMAND(waits) {
	SYS(pipe2(silent, O_CLOEXEC));
	pthread_t t[WAITS];
	for (intptr_t i = 0; i < WAITS; i++) t[i] = spawn(t_wait_for, (void *)i);
	loop(waits_check);
	for (int i = 0; i < WAITS; i++) pthread_join(t[i], NULL);
	for (int i = 0; i < WAITS; i++) CHECK(wait_rounds[i] > 0, "wait %d never ended", i);
}
