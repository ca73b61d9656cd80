// ---- dropped: a program that opens as root what it may not open afterwards,
// and becomes an ordinary user.
// ---- zombiekinds: ended children of every shape.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <grp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

static int secret, secret_dir, listener, journal;
static off_t written;

static void dropped_check(void) {
	CHECK(getuid() == 1234 && geteuid() == 1234 && getgid() == 2345, "user %d %d group %d", getuid(), geteuid(), getgid());
	CHECK(setuid(0) < 0 && errno == EPERM, "root again");
	CHECK(open(path_of("secret"), O_RDONLY) < 0 && errno == EACCES, "the file can be opened: %s", strerror(errno));
	char b[8] = {0};
	CHECK(SYS(pread(secret, b, 7, 0)) == 7 && strcmp(b, "secret\n") == 0, "the file says %s", b);
	CHECK(SYS(write(journal, "x", 1)) == 1, "append");
	written++;
	struct stat st;
	SYS(fstat(journal, &st));
	CHECK(st.st_size == written, "%ld bytes were written, the file has %ld", written, st.st_size);
	CHECK(st.st_uid == 0, "the file belongs to %d", st.st_uid);
	CHECK(SYS(fstat(secret_dir, &st)) == 0 && S_ISDIR(st.st_mode), "no directory");
	CHECK(openat(secret_dir, "x", O_RDONLY) < 0 && errno == EACCES, "a file in the closed directory: %s", strerror(errno));
	struct sockaddr_in a = {0};
	socklen_t n = sizeof a;
	SYS(getsockname(listener, (struct sockaddr *)&a, &n));
	int on = 0;
	n = sizeof on;
	SYS(getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &on, &n));
	CHECK(ntohs(a.sin_port) == 81 && on, "port %d, listening %d", ntohs(a.sin_port), on);
	// What the kernel gives to who may look at this process.
	CHECK(prctl(PR_GET_DUMPABLE) == 1, "dumpable is %d", prctl(PR_GET_DUMPABLE));
	int fd = SYS(open("/proc/self/environ", O_RDONLY));
	close(fd);
}

COMMAND(dropped) {
	secret = SYS(open(path_of("secret"), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	CHECK(write(secret, "secret\n", 7) == 7, "write");
	journal = SYS(open(path_of("journal"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600));
	SYS(mkdir(path_of("closed"), 0700));
	int fd = SYS(openat(AT_FDCWD, path_of("closed"), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	close(SYS(openat(fd, "x", O_RDWR | O_CREAT, 0600)));
	secret_dir = fd;
	listener = SYS(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	struct sockaddr_in a = {AF_INET, htons(81), {htonl(INADDR_LOOPBACK)}, {0}};
	SYS(bind(listener, (struct sockaddr *)&a, sizeof a));
	SYS(listen(listener, 5));
	SYS(setgroups(0, NULL));
	SYS(setresgid(2345, 2345, 2345));
	SYS(setresuid(1234, 1234, 1234));
	SYS(prctl(PR_SET_DUMPABLE, 1));
	loop(dropped_check);
}

// Exit codes, signals, users, threads, sessions and groups; a name each.
enum { SHAPES = 12 };
static const struct shape { int code, sig; bool threads, session, group, user, first_gone; } shapes[SHAPES] = {
	{.code = 0}, {.code = 255}, {.code = 1, .threads = true}, {.sig = SIGKILL, .threads = true}, {.sig = SIGTERM, .session = true},
	{.code = 77, .group = true}, {.sig = SIGSEGV}, {.sig = SIGABRT, .user = true}, {.code = 9, .user = true}, {.sig = 34},
	{.code = 5, .first_gone = true}, {.sig = SIGPIPE, .session = true, .user = true},
};
static struct { pid_t pid; siginfo_t si; } ended[SHAPES];

static void *t_forever(void *arg) {
	for (;; nap_ms(10)) (void)arg;
	return NULL;
}

static void *t_last(void *arg) {
	nap_ms(20); // the first thread is gone by then
	_exit((intptr_t)arg);
}

static void be_shape(const struct shape *s, int i) {
	char name[16];
	snprintf(name, sizeof name, "zombie (%d) %%", i);
	prctl(PR_SET_NAME, name);
	struct rlimit none = {0, 0};
	SYS(setrlimit(RLIMIT_CORE, &none));
	if (s->session) SYS(setsid());
	if (s->group) SYS(setpgid(0, 0));
	if (s->threads) for (int j = 0; j < 3; j++) spawn(t_forever, NULL);
	if (s->user) {
		SYS(setresgid(2000 + i, 2000 + i, 2000 + i));
		SYS(setresuid(1000 + i, 1000 + i, 1000 + i));
	}
	if (s->first_gone) {
		spawn(t_last, (void *)(intptr_t)s->code);
		pthread_exit(NULL);
	}
	if (!s->sig) _exit(s->code);
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_UNBLOCK, &all, NULL);
	signal(s->sig, SIG_DFL);
	for (;;) kill(getpid(), s->sig);
}

static void zombiekinds_check(void) {
	for (int i = 0; i < SHAPES; i++) {
		siginfo_t si = {0};
		SYS(waitid(P_PID, ended[i].pid, &si, WEXITED | WNOHANG | WNOWAIT));
		CHECK(si.si_pid == ended[i].pid && si.si_code == ended[i].si.si_code && si.si_status == ended[i].si.si_status && si.si_uid == ended[i].si.si_uid,
			"zombie %d: pid %d code %d status %d user %d, want code %d status %d user %d", i, si.si_pid, si.si_code, si.si_status, si.si_uid,
			ended[i].si.si_code, ended[i].si.si_status, ended[i].si.si_uid);
		pid_t sid = getsid(ended[i].pid), pgid = getpgid(ended[i].pid);
		CHECK(sid == (shapes[i].session ? ended[i].pid : getsid(0)), "zombie %d is in session %d", i, sid);
		CHECK(pgid == (shapes[i].session || shapes[i].group ? ended[i].pid : getpgrp()), "zombie %d is in group %d", i, pgid);
		char path[64], want[32], got[32] = {0};
		snprintf(path, sizeof path, "/proc/%d/comm", ended[i].pid);
		snprintf(want, sizeof want, "zombie (%d) %%\n", i);
		int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
		CHECK(read(fd, got, sizeof got - 1) > 0 && strcmp(got, want) == 0, "zombie %d is called %s", i, got);
		close(fd);
	}
}

COMMAND(zombiekinds) {
	for (int i = 0; i < SHAPES; i++) {
		ended[i].pid = child();
		if (ended[i].pid == 0) be_shape(&shapes[i], i);
		SYS(waitid(P_PID, ended[i].pid, &ended[i].si, WEXITED | WNOWAIT));
	}
	loop(zombiekinds_check);
	for (int i = 0; i < SHAPES; i++) SYS(waitid(P_PID, ended[i].pid, &ended[i].si, WEXITED));
	CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "there are more children than before");
}
