// Who a process is, and whom it belongs to.
#include "selfcheck.h"
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

// ---- creds [root]: everything that describes a process, compared with what it was.

static char *slurp(const char *path) {
	static char buf[3][16384];
	static int which;
	char *b = buf[which++ % 3];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	size_t n = 0;
	ssize_t r;
	while ((r = read(fd, b + n, sizeof buf[0] - 1 - n)) > 0) n += r;
	close(fd);
	b[n] = 0;
	return b;
}

static void describe(char *out, size_t size) {
	size_t n = 0;
#define ADD(...) n += snprintf(out + n, size - n, __VA_ARGS__)
	uid_t r, e, s;
	gid_t g[32];
	getresuid(&r, &e, &s);
	ADD("uid %u %u %u\n", r, e, s);
	getresgid(&r, &e, &s);
	ADD("gid %u %u %u\n", r, e, s);
	int ng = getgroups(32, g);
	for (int i = 0; i < ng; i++) ADD("group %u\n", g[i]);
	// Selected lines of status: ids with fs ids, capabilities, privileges.
	char *st = slurp("/proc/self/status"), *save;
	for (char *line = strtok_r(st, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		static const char *want[] = {"Name:", "Umask:", "Uid:", "Gid:", "Groups:", "NStgid:", "NSpid:", "NSpgid:", "NSsid:", "Cap",
			"NoNewPrivs:", "Seccomp:", "SigIgn:", "SigCgt:", "SigBlk:", "Cpus_allowed:", "Threads:", "TracerPid:"};
		for (size_t i = 0; i < sizeof want / sizeof *want; i++)
			if (strncmp(line, want[i], strlen(want[i])) == 0) {
				// TracerPid only says that nobody looks on while this runs.
				if (i == sizeof want / sizeof *want - 1) continue;
				// Outside numbers of a nested pid namespace are not ours.
				ADD("%s\n", line);
			}
	}
	ADD("securebits %d nnp %d keepcaps %d dumpable %d subreaper ", prctl(PR_GET_SECUREBITS), prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
		prctl(PR_GET_KEEPCAPS), prctl(PR_GET_DUMPABLE));
	int sub = 0, sig = 0;
	prctl(PR_GET_CHILD_SUBREAPER, &sub);
	prctl(PR_GET_PDEATHSIG, &sig);
	ADD("%d pdeathsig %d timerslack %d\n", sub, sig, prctl(PR_GET_TIMERSLACK));
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		struct rlimit l;
		SYS(getrlimit(i, &l));
		ADD("limit %d %lu %lu\n", i, l.rlim_cur, l.rlim_max);
	}
	char name[16], cwd[4096], exe[4096] = {0}, root[4096] = {0};
	prctl(PR_GET_NAME, name);
	CHECK(getcwd(cwd, sizeof cwd), "getcwd: %s", strerror(errno));
	SYS(readlink("/proc/self/exe", exe, sizeof exe - 1));
	SYS(readlink("/proc/self/root", root, sizeof root - 1));
	ADD("name %s cwd %s exe %s root %s\n", name, cwd, exe, root);
	mode_t um = umask(0);
	umask(um);
	ADD("umask %o nice %d policy %d oom %s", um, getpriority(PRIO_PROCESS, 0), sched_getscheduler(0), slurp("/proc/self/oom_score_adj"));
	cpu_set_t cpus;
	SYS(sched_getaffinity(0, sizeof cpus, &cpus));
	ADD("cpus");
	for (int i = 0; i < CPU_SETSIZE; i++) if (CPU_ISSET(i, &cpus)) ADD(" %d", i);
	// The parent of a tree's root is whoever restored it.
	ADD("\npid %d pgid %d sid %d\n", getpid(), getpgrp(), getsid(0));
	char *cl = slurp("/proc/self/cmdline");
	ADD("cmdline %s", cl);
	char *env = slurp("/proc/self/environ");
	ADD(" environ %.60s\n", env);
	char *stat = slurp("/proc/self/stat"), *after = strrchr(stat, ')');
	CHECK(after, "stat has no name");
	// Fields 26 to 28 and 45 to 51 are the addresses of prctl(PR_SET_MM); they
	// are zero for a process that may not be traced.
	int field = 2;
	for (char *w = strtok_r(after + 1, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
		field++;
		if ((field >= 26 && field <= 28) || (field >= 45 && field <= 51)) ADD("stat%d %s ", field, w);
	}
	char *auxv = slurp("/proc/self/auxv");
	uint64_t h = 0;
	for (int i = 0; i < 320; i++) h = h * 31 + (unsigned char)auxv[i];
	ADD("\nauxv %lx\n", h);
#undef ADD
}

static char creds_before[16384], creds_now[16384];

static void compare_creds(const char *who) {
	describe(creds_now, sizeof creds_now);
	if (strcmp(creds_before, creds_now) == 0) return;
	char *a = creds_before, *b = creds_now;
	while (*a && *a == *b) a++, b++;
	while (a > creds_before && a[-1] != '\n') a--, b--;
	fail("%s: \"%.*s\" became \"%.*s\"", who, (int)strcspn(a, "\n"), a, (int)strcspn(b, "\n"), b);
}

static void creds_check(void) { compare_creds("process"); }

COMMAND(creds) {
	bool root = arg_count > 0 && strcmp(arg_values[0], "root") == 0;
	char *dir = path_of("dir");
	mkdir(dir, 0755);
	SYS(chdir(dir));
	prctl(PR_SET_NAME, "self (check) x");
	umask(027);
	SYS(setpriority(PRIO_PROCESS, 0, 5));
	struct rlimit l = {512, 900};
	SYS(setrlimit(RLIMIT_NOFILE, &l));
	l = (struct rlimit){0, 0};
	SYS(setrlimit(RLIMIT_CORE, &l));
	l = (struct rlimit){4 << 20, 16 << 20};
	SYS(setrlimit(RLIMIT_STACK, &l));
	int fd = SYS(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
	CHECK(SYS(write(fd, "321", 3)) == 3, "write oom_score_adj");
	close(fd);
	cpu_set_t cpus, one;
	SYS(sched_getaffinity(0, sizeof cpus, &cpus));
	CPU_ZERO(&one);
	for (int i = CPU_SETSIZE - 1; i >= 0; i--)
		if (CPU_ISSET(i, &cpus)) {
			CPU_SET(i, &one);
			break;
		}
	SYS(sched_setaffinity(0, sizeof one, &one));
	gid_t groups[] = {7, 1234, 56789};
	SYS(setgroups(3, groups));
	if (root) {
		SYS(prctl(PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0));
		SYS(setresgid(10, 11, 12));
	} else {
		SYS(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0));
		SYS(setresgid(1010, 1011, 1012));
		SYS(setresuid(1000, 1000, 1002));
		SYS(prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0));
		struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
		struct __user_cap_data_struct d[2] = {{0}};
		d[0].effective = 1 << CAP_NET_BIND_SERVICE;
		d[0].permitted = d[0].inheritable = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_CHOWN;
		SYS(syscall(SYS_capset, &h, d));
		SYS(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
		SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		SYS(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
	}
	describe(creds_before, sizeof creds_before);
	loop(creds_check);
}

// ---- sessions: leaders, members and groups.

struct slot { volatile pid_t pid; volatile uint64_t beats; volatile bool ready; };
enum { MAXPROC = 64 };
static struct { struct slot s[MAXPROC]; volatile int threads; } *board;

static void member(int i, pid_t sid, pid_t pgid) {
	board->s[i].pid = getpid();
	if (sid == 0) sid = getpid();
	if (pgid == 0) pgid = getpid();
	for (;;) {
		orphan_check();
		CHECK(getsid(0) == sid, "member %d: session was %d and is %d", i, sid, getsid(0));
		CHECK(getpgrp() == pgid, "member %d: group was %d and is %d", i, pgid, getpgrp());
		CHECK(getpid() == board->s[i].pid, "member %d: pid changed", i);
		board->s[i].ready = true;
		board->s[i].beats++;
		nap_ms(5);
	}
}

static void board_check(int n, const char *what) {
	static int turn;
	static uint64_t last[MAXPROC];
	if (++turn % 500) return;
	for (int i = 0; i < n; i++) {
		CHECK(moved(&board->s[i].beats, last[i]), "%s %d (pid %d) stands still", what, i, board->s[i].pid);
		last[i] = board->s[i].beats;
	}
}

static pid_t members[4], my_sid, my_pgid;

static void sessions_check(void) {
	CHECK(getsid(0) == my_sid && getpgrp() == my_pgid, "session or group of the root changed");
	for (int i = 0; i < 4; i++) expect_alive(members[i]);
	CHECK(getpgid(members[1]) == members[1] && getpgid(members[2]) == members[1], "groups of members %d and %d are %d and %d",
		members[1], members[2], getpgid(members[1]), getpgid(members[2]));
	CHECK(getsid(members[3]) == members[3], "session of member 3 changed");
	board_check(7, "member");
}

COMMAND(sessions) {
	board = SYS(mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	my_sid = getsid(0);
	my_pgid = getpgrp();
	// 0: in our group; 1: leads a group; 2: in that group; 3: leads a session
	// with 4 in its group and 5 leading a group, 6 a session below it.
	for (int i = 0; i < 4; i++) {
		members[i] = child();
		if (members[i] == 0) {
			if (i == 1) SYS(setpgid(0, 0));
			if (i == 2) {
				while (!board->s[1].ready) nap_ms(1);
				SYS(setpgid(0, board->s[1].pid));
				member(i, my_sid, board->s[1].pid);
			}
			if (i == 3) {
				pid_t sid = SYS(setsid());
				for (int j = 4; j < 7; j++)
					if (child() == 0) {
						if (j == 5) SYS(setpgid(0, 0));
						if (j == 6) SYS(setsid());
						member(j, j == 6 ? 0 : sid, j == 4 ? sid : 0);
					}
				member(i, sid, sid);
			}
			member(i, my_sid, i == 1 ? 0 : my_pgid);
		}
	}
	for (int i = 0; i < 7; i++) while (!board->s[i].ready) nap_ms(1);
	loop(sessions_check);
	for (int i = 0; i < 4; i++) end_child(members[i]);
}

// ---- zombies: ended children whose status nobody has asked for yet.

static pid_t dead[3];

static void zombie_status(int i, bool reap) {
	siginfo_t si = {0};
	SYS(waitid(P_PID, dead[i], &si, WEXITED | WNOHANG | (reap ? 0 : WNOWAIT)));
	CHECK(si.si_pid == dead[i], "zombie %d (pid %d) is gone", i, dead[i]);
	int code = i == 0 ? CLD_EXITED : CLD_KILLED, status = i == 0 ? 42 : i == 1 ? SIGKILL : SIGUSR1;
	CHECK(si.si_code == code && si.si_status == status, "zombie %d: code %d status %d, want %d and %d", i, si.si_code, si.si_status, code, status);
}

static void zombies_check(void) { for (int i = 0; i < 3; i++) zombie_status(i, false); }

COMMAND(zombies) {
	for (int i = 0; i < 3; i++) {
		dead[i] = child();
		if (dead[i] == 0) {
			if (i == 0) _exit(42);
			signal(SIGUSR1, SIG_DFL);
			for (;; orphan_check()) nap_ms(5);
		}
	}
	nap_ms(20);
	kill(dead[1], SIGKILL);
	kill(dead[2], SIGUSR1);
	for (int i = 0; i < 3; i++) {
		siginfo_t si;
		SYS(waitid(P_PID, dead[i], &si, WEXITED | WNOWAIT));
	}
	loop(zombies_check);
	for (int i = 0; i < 3; i++) zombie_status(i, true);
	CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "there are more children than before");
}

// ---- tree: 50 processes in three generations with 200 threads altogether.

static void *tree_thread(void *arg) {
	struct slot *s = arg;
	__atomic_add_fetch(&board->threads, 1, __ATOMIC_SEQ_CST);
	uint64_t mine = 0;
	while (!stopping) {
		__atomic_add_fetch(&s->beats, 1, __ATOMIC_SEQ_CST);
		mine++;
		nap_ms(20);
	}
	return (void *)mine;
}

// The compiler takes the recursion for endless; a child of number 8 or more has none.
#pragma GCC diagnostic ignored "-Winfinite-recursion"
static _Noreturn void tree_member(int i) {
	board->s[i].pid = getpid();
	// Three more threads than the first.
	for (int j = 0; j < 3; j++) spawn(tree_thread, &board->s[i]);
	__atomic_add_fetch(&board->threads, 1, __ATOMIC_SEQ_CST);
	pid_t kids[8];
	int n = 0;
	// 1 to 7 are children of the root, each with six children, of number 8 on.
	if (i >= 1 && i <= 7)
		for (int j = 0; j < 6; j++) {
			kids[n] = child();
			if (kids[n++] == 0) tree_member(8 + (i - 1) * 6 + j);
		}
	for (;;) {
		orphan_check();
		for (int j = 0; j < n; j++) expect_alive(kids[j]);
		board->s[i].ready = true;
		__atomic_add_fetch(&board->s[i].beats, 1, __ATOMIC_SEQ_CST);
		nap_ms(20);
	}
}

static pid_t tree_kids[7];
static void tree_check(void) {
	for (int i = 0; i < 7; i++) expect_alive(tree_kids[i]);
	for (int i = 0; i < 50; i++) CHECK(i == 0 || kill(board->s[i].pid, 0) == 0, "process %d of the tree is gone", i);
	board_check(50, "process");
}

COMMAND(tree) {
	board = SYS(mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	for (int i = 0; i < 7; i++) {
		tree_kids[i] = child();
		if (tree_kids[i] == 0) tree_member(i + 1);
	}
	board->s[0].pid = getpid();
	for (int j = 0; j < 3; j++) spawn(tree_thread, &board->s[0]);
	__atomic_add_fetch(&board->threads, 1, __ATOMIC_SEQ_CST);
	while (board->threads != 200) nap_ms(2);
	for (int i = 1; i < 50; i++) while (!board->s[i].ready) nap_ms(1);
	loop(tree_check);
	// Grandchildren end by themselves once their parent is gone.
	for (int i = 0; i < 7; i++) end_child(tree_kids[i]);
}

// ---- forker: forks and threads all the time, so that some race with a freeze.

static volatile uint64_t forks_done;
static void *fork_thread(void *arg) {
	int seed = (uintptr_t)arg;
	for (int n = seed; !stopping; n = (n + 7) % 200) {
		pid_t pid = SYS(fork());
		if (pid == 0) {
			volatile int x = 0;
			for (int i = 0; i < 20000; i++) x += i;
			_exit(n);
		}
		int st;
		pid_t got;
		while ((got = waitpid(pid, &st, 0)) < 0 && errno == EINTR && stopping) {}
		CHECK(got == pid, "wait for child %d: %s", pid, strerror(errno));
		CHECK(WIFEXITED(st) && WEXITSTATUS(st) == n, "child %d ended with %x, want exit %d", pid, st, n);
		__atomic_add_fetch(&forks_done, 1, __ATOMIC_SEQ_CST);
		nap_ms(1);
	}
	return NULL;
}

static void *nop_thread(void *arg) { return arg; }
static void *clone_thread(void *arg) {
	(void)arg;
	for (uintptr_t n = 1; !stopping; n++) {
		void *got;
		pthread_join(spawn(nop_thread, (void *)n), &got);
		CHECK(got == (void *)n, "thread %lu returned %p", n, got);
		nap_ms(1);
	}
	return NULL;
}

static void forker_check(void) {
	static int turn;
	static uint64_t last;
	if (++turn % 500) return;
	CHECK(moved(&forks_done, last), "forks stand still at %lu", last);
	last = forks_done;
}

COMMAND(forker) {
	pthread_t t[3];
	for (uintptr_t i = 0; i < 2; i++) t[i] = spawn(fork_thread, (void *)(i * 3));
	t[2] = spawn(clone_thread, NULL);
	loop(forker_check);
	for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
}
