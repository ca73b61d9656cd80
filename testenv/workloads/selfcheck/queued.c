// ---- queued: hundreds of signals that wait, for the process and for a thread,
// with their data and in their order, as many as the limit allows.
// ---- sigtarget, sigsender PID: every signal that one process sends to another
// comes, once and in order, whatever happens to either meanwhile.
#include "selfcheck.h"
#include <sched.h>
#include <sys/resource.h>

enum { QUEUED = 250, KINDS = 3 };
static volatile bool thread_queued, thread_goes;

// queue sends the waiting signals, of three numbers by turns.
static void queue(pid_t tid, int base) {
	for (int i = 0; i < QUEUED; i++) {
		siginfo_t si = {.si_signo = SIGRTMIN + base + i % KINDS, .si_code = SI_QUEUE};
		si.si_pid = 100000 + i;
		si.si_uid = 7;
		si.si_value.sival_ptr = (void *)(0x123456789abc0000 + i);
		if (i % 50 == 49) si.si_code = -60 - i; // of no meaning to the kernel
		if (tid) SYS(syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, si.si_signo, &si));
		else SYS(syscall(SYS_rt_sigqueueinfo, getpid(), si.si_signo, &si));
	}
}

static void queued_set(sigset_t *set, int base) {
	sigemptyset(set);
	for (int k = 0; k < KINDS; k++) sigaddset(set, SIGRTMIN + base + k);
}

// take takes them all. The lowest number comes first, each in order.
static void take(int base, const char *whose) {
	sigset_t set;
	queued_set(&set, base);
	for (int k = 0; k < KINDS; k++)
		for (int i = k; i < QUEUED; i += KINDS) {
			siginfo_t si;
			struct timespec now = {0, 0};
			int s = sigtimedwait(&set, &si, &now);
			CHECK(s == SIGRTMIN + base + k, "signal %d of the %s: got %d, want %d: %s", i, whose, s, SIGRTMIN + base + k, strerror(errno));
			int code = i % 50 == 49 ? -60 - i : SI_QUEUE;
			CHECK(si.si_code == code && si.si_pid == 100000 + i && si.si_uid == 7 && si.si_value.sival_ptr == (void *)(0x123456789abc0000 + i),
				"signal %d of the %s: code %d pid %d uid %d value %p", i, whose, si.si_code, si.si_pid, si.si_uid, si.si_value.sival_ptr);
		}
	struct timespec now = {0, 0};
	CHECK(sigtimedwait(&set, NULL, &now) < 0 && errno == EAGAIN, "there are more signals for the %s than were sent", whose);
}

static void *t_queued(void *arg) {
	(void)arg;
	sigset_t set;
	sigfillset(&set);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	queue(gettid(), 3);
	thread_queued = true;
	while (!thread_goes) nap_ms(5);
	take(3, "thread");
	return NULL;
}

static void queued_check(void) {
	sigset_t got;
	sigpending(&got);
	for (int k = 0; k < KINDS; k++) CHECK(sigismember(&got, SIGRTMIN + k) == 1, "waiting signals are gone");
	CHECK(sigismember(&got, SIGUSR1) == 1 && sigismember(&got, SIGCHLD) == 1, "waiting SIGUSR1 or SIGCHLD is gone");
}

COMMAND(queued) {
	sigset_t set;
	queued_set(&set, 0);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	pthread_t t = spawn(t_queued, NULL);
	while (!thread_queued) nap_ms(1);
	queue(0, 0);
	SYS(kill(getpid(), SIGUSR1));
	// The child stays a zombie, its SIGCHLD waits.
	pid_t pid = child();
	if (pid == 0) _exit(3);
	siginfo_t si;
	SYS(waitid(P_PID, pid, &si, WEXITED | WNOWAIT));
	// No more than these: a restore must not be in its own way.
	struct rlimit l = {2 * QUEUED + 3, 2 * QUEUED + 3};
	SYS(setrlimit(RLIMIT_SIGPENDING, &l));
	loop(queued_check);
	SYS(getrlimit(RLIMIT_SIGPENDING, &l));
	CHECK(l.rlim_cur == 2 * QUEUED + 3 && l.rlim_max == 2 * QUEUED + 3, "limit of waiting signals is %lu", l.rlim_cur);
	thread_goes = true;
	pthread_join(t, NULL);
	take(0, "process");
	struct timespec now = {0, 0};
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK(sigtimedwait(&set, &si, &now) == SIGUSR1 && si.si_code == SI_USER && si.si_pid == getpid(), "SIGUSR1: code %d pid %d", si.si_code, si.si_pid);
	sigaddset(&set, SIGCHLD);
	CHECK(sigtimedwait(&set, &si, &now) == SIGCHLD && si.si_code == CLD_EXITED && si.si_pid == pid && si.si_status == 3,
		"SIGCHLD: code %d pid %d status %d", si.si_code, si.si_pid, si.si_status);
	CHECK(waitpid(pid, NULL, 0) == pid, "reap the child");
}

// What was sent is in a file, so that both ends know it after anything.
static volatile uint64_t arrived, wrong;

static void on_arrival(int sig, siginfo_t *si, void *u) {
	(void)sig; (void)u;
	if ((uint64_t)si->si_value.sival_ptr != arrived + 1 || si->si_code != SI_QUEUE) wrong++;
	arrived++;
}

static void sigtarget_check(void) {
	CHECK(wrong == 0, "%lu of %lu signals came out of order, or twice, or with wrong data", wrong, arrived);
	FILE *f = fopen(path_of("arrived"), "w");
	CHECK(f, "open: %s", strerror(errno));
	fprintf(f, "%lu\n", arrived);
	fclose(f);
}

static void *t_idle(void *arg) {
	(void)arg;
	// It takes signals, too, so that the freeze meets their delivery anywhere.
	while (!stopping) {
		struct timespec t = {0, 3000000};
		clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
	}
	return NULL;
}

COMMAND(sigtarget) {
	struct sigaction sa = {.sa_sigaction = on_arrival, .sa_flags = SA_SIGINFO | SA_RESTART};
	// One handler at a time, or the order would be lost between threads.
	SYS(sigaction(SIGRTMIN + 1, &sa, NULL));
	spawn(t_idle, NULL);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	pthread_sigmask(SIG_BLOCK, &set, NULL); // all go to the other thread
	loop(sigtarget_check);
	nap_ms(20);
	sigtarget_check();
}

COMMAND(sigsender) {
	CHECK(arg_count > 0, "usage: sigsender PREFIX PID");
	pid_t to = atoi(arg_values[0]);
	uint64_t n = 0;
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	while (!stopping) {
		for (int i = 0; i < 4; i++) {
			n++;
			int e;
			while ((e = sigqueue(to, SIGRTMIN + 1, (union sigval){.sival_ptr = (void *)n})) < 0 && errno == EAGAIN) nap_ms(1);
			CHECK(e == 0, "sigqueue: %s", strerror(errno));
		}
		beat();
		struct timespec t = {0, 500000};
		nanosleep(&t, NULL);
	}
	FILE *f = fopen(path_of("sent"), "w");
	CHECK(f, "open: %s", strerror(errno));
	fprintf(f, "%lu\n", n);
	fclose(f);
}
