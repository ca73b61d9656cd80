// sigtrap: the action of SIGTRAP, with which a tracer executes system calls in a
// program, in each of the ways that it can be set: everything that the kernel
// keeps of it must stay.
#include "selfcheck.h"

// action is struct kernel_sigaction.
struct action {
	uint64_t handler, flags, restorer, mask;
};

enum { TR_IGNORE, TR_IGNORE_PLAIN, TR_CATCH, TR_DEFAULT, TR_KINDS };
static struct action tr_want;
static volatile int tr_caught;
static bool tr_caught_by;

static void tr_handler(int sig) { (void)sig; tr_caught++; }

static void tr_check(void) {
	struct action is;
	SYS(syscall(SYS_rt_sigaction, SIGTRAP, NULL, &is, 8));
	CHECK(memcmp(&is, &tr_want, sizeof is) == 0, "action of SIGTRAP: handler %lx flags %lx restorer %lx mask %lx, want %lx %lx %lx %lx",
		is.handler, is.flags, is.restorer, is.mask, tr_want.handler, tr_want.flags, tr_want.restorer, tr_want.mask);
	if (!tr_caught_by) return;
	int before = tr_caught;
	raise(SIGTRAP);
	CHECK(tr_caught == before + 1, "SIGTRAP was caught %d times", tr_caught - before);
}

static void *tr_thread(void *arg) {
	(void)arg;
	while (!stopping) nap_ms(5);
	return NULL;
}

static void tr_set(int kind) {
	switch (kind) {
	case TR_IGNORE: {
		struct action a = {(uint64_t)SIG_IGN, SA_RESTART | SA_ONSTACK | SA_NODEFER | 0x04000000, 0x1234567000, 1 << (SIGUSR2 - 1) | 1ul << 63};
		SYS(syscall(SYS_rt_sigaction, SIGTRAP, &a, NULL, 8));
		break;
	}
	case TR_IGNORE_PLAIN: {
		struct action a = {.handler = (uint64_t)SIG_IGN};
		SYS(syscall(SYS_rt_sigaction, SIGTRAP, &a, NULL, 8));
		break;
	}
	case TR_CATCH: {
		struct sigaction sa = {.sa_handler = tr_handler, .sa_flags = SA_NODEFER};
		sigaddset(&sa.sa_mask, SIGHUP);
		SYS(sigaction(SIGTRAP, &sa, NULL));
		tr_caught_by = true;
		break;
	}
	case TR_DEFAULT: {
		struct action a = {.handler = (uint64_t)SIG_DFL, .flags = SA_SIGINFO, .mask = 1 << (SIGHUP - 1)};
		SYS(syscall(SYS_rt_sigaction, SIGTRAP, &a, NULL, 8));
	}
	}
	SYS(syscall(SYS_rt_sigaction, SIGTRAP, NULL, &tr_want, 8));
}

COMMAND(sigtrap) {
	pid_t pids[TR_KINDS];
	for (int kind = 1; kind < TR_KINDS; kind++)
		if ((pids[kind] = child()) == 0) {
			tr_set(kind);
			// Blocked, too.
			if (kind == TR_IGNORE_PLAIN) {
				sigset_t set;
				sigemptyset(&set);
				sigaddset(&set, SIGTRAP);
				SYS(sigprocmask(SIG_BLOCK, &set, NULL));
			}
			for (;;) {
				orphan_check();
				tr_check();
				nap_ms(10);
			}
		}
	tr_set(TR_IGNORE);
	spawn(tr_thread, NULL);
	loop(tr_check);
	for (int kind = 1; kind < TR_KINDS; kind++) end_child(pids[kind]);
}
