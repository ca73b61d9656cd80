// ---- stopped: children stopped by each of the four signals, some of them with
// threads, some with a stop that the parent has not asked for yet.
#include "selfcheck.h"
#include <sys/mman.h>

enum { STOPPED = 6 };
static const struct { int sig; bool seen; int threads; bool group; } how[STOPPED] = {
	{SIGSTOP, true, 0, false}, {SIGSTOP, false, 3, false}, {SIGTSTP, true, 2, true},
	{SIGTSTP, false, 0, true}, {SIGTTIN, true, 0, true}, {SIGTTOU, false, 1, true},
};
static pid_t stopped[STOPPED], runner;
static volatile uint64_t *turns; // of each child: it only counts while it runs
static uint64_t turns_before[STOPPED];
static volatile sig_atomic_t chlds;

static void on_chld(int sig) {
	(void)sig;
	chlds++;
}

static void *stopped_thread(void *arg) {
	volatile uint64_t *n = arg;
	for (;; nap_ms(2)) __atomic_add_fetch(n, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

// told asks what waitid says of a child's stop, without taking it.
static void told(int i, bool stop) {
	siginfo_t si = {0};
	SYS(waitid(P_PID, stopped[i], &si, WSTOPPED | WNOHANG | WNOWAIT));
	if (!stop) {
		CHECK(si.si_pid == 0, "child %d is reported once more: code %d status %d", i, si.si_code, si.si_status);
		return;
	}
	CHECK(si.si_pid == stopped[i] && si.si_code == CLD_STOPPED && si.si_status == how[i].sig,
		"child %d: pid %d code %d status %d, want a stop by %d", i, si.si_pid, si.si_code, si.si_status, how[i].sig);
}

static void stopped_check(void) {
	static uint64_t last;
	static int turn;
	for (int i = 0; i < STOPPED; i++) {
		CHECK(turns[i] == turns_before[i], "child %d ran from %lu to %lu although it is stopped", i, turns_before[i], turns[i]);
		told(i, !how[i].seen);
		expect_alive(stopped[i]);
	}
	CHECK(chlds == STOPPED, "%d times SIGCHLD, want %d", chlds, STOPPED);
	if (++turn % 100 == 0) {
		CHECK(moved(&turns[STOPPED], last), "the child that runs stands still");
		last = turns[STOPPED];
	}
}

COMMAND(stopped) {
	turns = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	struct sigaction sa = {.sa_handler = on_chld, .sa_flags = SA_RESTART};
	SYS(sigaction(SIGCHLD, &sa, NULL));
	for (int i = 0; i <= STOPPED; i++) {
		pid_t pid = child();
		if (pid == 0) {
			// A group of its own, whose leader's parent is in another one of the
			// same session: without that, SIGTSTP and its like stop nothing.
			if (i < STOPPED && how[i].group) SYS(setpgid(0, 0));
			for (int j = 0; i < STOPPED && j < how[i].threads; j++) spawn(stopped_thread, (void *)(turns + i));
			for (;; nap_ms(2)) {
				orphan_check();
				__atomic_add_fetch(turns + i, 1, __ATOMIC_SEQ_CST);
			}
		}
		if (i == STOPPED) runner = pid;
		else stopped[i] = pid;
	}
	for (int i = 0; i < STOPPED; i++) {
		while (turns[i] < 10) nap_ms(1);
		SYS(kill(stopped[i], how[i].sig));
		siginfo_t si = {0};
		SYS(waitid(P_PID, stopped[i], &si, WSTOPPED | (how[i].seen ? 0 : WNOWAIT)));
		CHECK(si.si_pid == stopped[i] && si.si_status == how[i].sig, "child %d stopped by %d", i, si.si_status);
		turns_before[i] = turns[i];
	}
	loop(stopped_check);
	for (int i = 0; i < STOPPED; i++) {
		SYS(kill(stopped[i], SIGCONT));
		siginfo_t si = {0};
		SYS(waitid(P_PID, stopped[i], &si, WCONTINUED));
		CHECK(si.si_pid == stopped[i] && si.si_code == CLD_CONTINUED, "child %d does not go on: code %d", i, si.si_code);
		for (int n = 0; turns[i] < turns_before[i] + 5; n++) {
			CHECK(n < PATIENCE_MS, "child %d was continued and stands still", i);
			nap_ms(1);
		}
		end_child(stopped[i]);
	}
	end_child(runner);
}
