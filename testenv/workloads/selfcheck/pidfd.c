// pidfd: descriptors of processes: itself, a child, a zombie, a thread, and
// one that was reaped.
#include "selfcheck.h"
#include <poll.h>
#include <sys/stat.h>

#ifndef P_PIDFD
#define P_PIDFD 3
#endif
#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif

static pid_t pf_child, pf_zombie;
static volatile pid_t pf_tid;

static int pf_open(int at, pid_t pid, unsigned flags) { return at_fd(at, SYS(syscall(SYS_pidfd_open, pid, flags))); }

static void pf_is(const char *name, int fd, pid_t pid, short events) {
	char path[64], line[128];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s: %s", path, strerror(errno));
	int got = 0;
	while (fgets(line, sizeof line, f)) if (sscanf(line, "Pid: %d", &got) == 1) break;
	fclose(f);
	CHECK(got == pid, "%s: pidfd of %d, want %d", name, got, pid);
	struct pollfd p = {fd, POLLIN, 0};
	SYS(poll(&p, 1, 0));
	CHECK(p.revents == events, "%s: poll says %x, want %x", name, p.revents, events);
	int r = syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0);
	if (pid == -1)
		CHECK(r < 0 && errno == ESRCH, "%s: a process that was reaped can be signalled: %d, %s", name, r, strerror(errno));
	else
		CHECK(r == 0, "%s: signal: %s", name, strerror(errno));
}

static void pidfd_check(void) {
	recheck();
	pf_is("self", 20, getpid(), 0);
	pf_is("child", 21, pf_child, 0);
	pf_is("zombie", 22, pf_zombie, POLLIN);
	pf_is("reaped", 23, -1, POLLIN | POLLHUP);
	pf_is("reaped, again", 25, -1, POLLIN | POLLHUP);
	pf_is("thread", 26, pf_tid, 0);
	struct stat a, b;
	SYS(fstat(23, &a));
	SYS(fstat(25, &b));
	CHECK(a.st_ino == b.st_ino, "two pidfds of one process lead to different ones");
	siginfo_t si = {0};
	SYS(waitid(P_PIDFD, 22, &si, WEXITED | WNOHANG | WNOWAIT));
	CHECK(si.si_pid == pf_zombie && si.si_status == 7, "zombie: pid %d, status %d", si.si_pid, si.si_status);
	SYS(waitid(P_PIDFD, 21, &si, WEXITED | WNOHANG | WNOWAIT));
	CHECK(si.si_pid == 0, "the child ended: status %d", si.si_status);
}

static void *pf_thread(void *arg) {
	pf_tid = gettid();
	for (;;) pause();
	return arg;
}

COMMAND(pidfd) {
	pf_open(20, getpid(), 0);
	pf_child = child();
	if (pf_child == 0)
		for (;; orphan_check()) nap_ms(5);
	pf_open(21, pf_child, O_NONBLOCK);
	pf_zombie = child();
	if (pf_zombie == 0) _exit(7);
	siginfo_t si;
	SYS(waitid(P_PID, pf_zombie, &si, WEXITED | WNOWAIT));
	pf_open(22, pf_zombie, 0);
	pid_t gone = child();
	if (gone == 0) _exit(0);
	pf_open(23, gone, 0);
	pf_open(25, gone, 0);
	SYS(waitpid(gone, NULL, 0));
	SYS(dup3(21, 24, O_CLOEXEC));
	spawn(pf_thread, NULL);
	while (!pf_tid) nap_ms(1);
	pf_open(26, pf_tid, PIDFD_THREAD);
	for (int i = 20; i <= 26; i++) remember("pidfd", i);
	loop(pidfd_check);
	SYS(syscall(SYS_pidfd_send_signal, 24, SIGKILL, NULL, 0));
	SYS(waitid(P_PID, pf_child, &si, WEXITED));
	CHECK(si.si_pid == pf_child && si.si_status == SIGKILL, "the child %d ended with %d", si.si_pid, si.si_status);
}
