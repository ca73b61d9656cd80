// ---- family: orphans under a subreaper, groups and sessions whose leaders are
// dead or zombies, and a signal at the death of a parent.
// ---- crowd: 1000 threads with names and masks of their own.
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>

enum { DEADGROUP, ZOMBIEGROUP, DEADSESSION, OWNGROUP, ZOMBIESESSION, HEIR, MEMBERS };
static struct { volatile pid_t pid, pgid, sid; volatile uint64_t beats; } *kin;
static pid_t zombie_leaders[2], head;

static _Noreturn void kin_member(int i) {
	kin[i].pgid = getpgrp();
	kin[i].sid = getsid(0);
	kin[i].pid = getpid();
	pid_t first = getppid();
	for (;; nap_ms(3)) {
		if (getppid() == 1) _exit(2);
		// Once, from the parent that ended to the subreaper.
		CHECK(getppid() == first || getppid() == kin[MEMBERS].pid, "member %d: parent %d", i, getppid());
		CHECK(getpid() == kin[i].pid && getpgrp() == kin[i].pgid && getsid(0) == kin[i].sid,
			"member %d: group %d session %d, want %d and %d", i, getpgrp(), getsid(0), kin[i].pgid, kin[i].sid);
		int sig = -1;
		SYS(prctl(PR_GET_PDEATHSIG, &sig));
		CHECK(sig == (i == HEIR ? SIGUSR2 : 0), "member %d: signal at the parent's death is %d", i, sig);
		kin[i].beats++;
	}
}

static void family_check(void) {
	static uint64_t last[MEMBERS];
	static int turn;
	for (int i = 0; i < MEMBERS; i++) {
		if (i != HEIR) expect_alive(kin[i].pid);
		CHECK(getpgid(kin[i].pid) == kin[i].pgid && getsid(kin[i].pid) == kin[i].sid, "member %d: group or session changed", i);
	}
	expect_alive(head);
	for (int i = 0; i < 2; i++) {
		siginfo_t si = {0};
		SYS(waitid(P_PID, zombie_leaders[i], &si, WEXITED | WNOHANG | WNOWAIT));
		CHECK(si.si_pid == zombie_leaders[i] && si.si_status == 7, "zombie leader %d: pid %d status %d", i, si.si_pid, si.si_status);
	}
	int sub = 0;
	SYS(prctl(PR_GET_CHILD_SUBREAPER, &sub));
	CHECK(sub == 1, "no subreaper any more");
	if (++turn % 200) return;
	for (int i = 0; i < MEMBERS; i++) {
		CHECK(moved(&kin[i].beats, last[i]), "member %d stands still", i);
		last[i] = kin[i].beats;
	}
}

COMMAND(family) {
	kin = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	kin[MEMBERS].pid = getpid();
	SYS(prctl(PR_SET_CHILD_SUBREAPER, 1));
	for (int i = DEADGROUP; i < HEIR; i++) {
		if (i == OWNGROUP) continue; // made with the dead session
		bool session = i == DEADSESSION || i == ZOMBIESESSION, zombie = i == ZOMBIEGROUP || i == ZOMBIESESSION;
		pid_t leader = child();
		if (leader == 0) {
			if (session) SYS(setsid());
			else SYS(setpgid(0, 0));
			if (SYS(fork()) == 0) kin_member(i);
			if (i == DEADSESSION && SYS(fork()) == 0) {
				SYS(setpgid(0, 0));
				kin_member(OWNGROUP);
			}
			while (!kin[i].beats || (i == DEADSESSION && !kin[OWNGROUP].beats)) nap_ms(1);
			_exit(7);
		}
		siginfo_t si = {0};
		SYS(waitid(P_PID, leader, &si, WEXITED | (zombie ? WNOWAIT : 0)));
		CHECK(si.si_status == 7, "leader %d ended with %d", i, si.si_status);
		if (zombie) zombie_leaders[session] = leader;
	}
	head = child();
	if (head == 0) {
		if (SYS(fork()) == 0) {
			signal(SIGUSR2, SIG_DFL);
			SYS(prctl(PR_SET_PDEATHSIG, SIGUSR2));
			kin_member(HEIR);
		}
		for (;; nap_ms(5)) orphan_check();
	}
	while (!kin[HEIR].beats) nap_ms(1);
	loop(family_check);
	for (int i = 0; i < HEIR; i++) end_child(kin[i].pid);
	for (int i = 0; i < 2; i++) SYS(waitpid(zombie_leaders[i], NULL, 0));
	// The heir comes to us, its signal with it.
	end_child(head);
	int st;
	CHECK(SYS(waitpid(kin[HEIR].pid, &st, 0)) == kin[HEIR].pid && WIFSIGNALED(st) && WTERMSIG(st) == SIGUSR2, "the heir ended with %x", st);
	CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "there are more children than before");
}

enum { CROWD = 1000 };
static volatile int crowd_up;
static volatile uint32_t crowd_rounds[CROWD];

static void *crowd_thread(void *arg) {
	int i = (intptr_t)arg;
	char name[16], now[16];
	snprintf(name, sizeof name, "crowd-%d", i);
	SYS(prctl(PR_SET_NAME, name));
	sigset_t want, got;
	sigemptyset(&want);
	sigaddset(&want, SIGTERM);
	for (int b = 0; b < 10; b++) if (i & 1 << b) sigaddset(&want, SIGRTMIN + b);
	pthread_sigmask(SIG_SETMASK, &want, NULL);
	pid_t tid = gettid();
	__atomic_add_fetch(&crowd_up, 1, __ATOMIC_SEQ_CST);
	while (!stopping) {
		nap_ms(200);
		CHECK(gettid() == tid, "thread %d: tid was %d and is %d", i, tid, gettid());
		SYS(prctl(PR_GET_NAME, now));
		CHECK(strcmp(name, now) == 0, "thread %d: name was %s and is %s", i, name, now);
		pthread_sigmask(SIG_SETMASK, NULL, &got);
		for (int s = 1; s < 64; s++)
			CHECK(sigismember(&got, s) == sigismember(&want, s), "thread %d: mask of signal %d changed", i, s);
		crowd_rounds[i]++;
	}
	return NULL;
}

COMMAND(crowd) {
	static pthread_t t[CROWD];
	for (intptr_t i = 0; i < CROWD; i++) t[i] = spawn(crowd_thread, (void *)i);
	while (crowd_up < CROWD) nap_ms(5);
	loop(NULL);
	for (int i = 0; i < CROWD; i++) {
		CHECK(pthread_join(t[i], NULL) == 0, "join thread %d", i);
		CHECK(crowd_rounds[i] > 0, "thread %d never ran", i);
	}
}
