// ---- shares: processes that share descriptors or directories, as clone makes
// them: each sees what a member of its group changes, and nobody else does.
// ---- sharing files|vm: a thread, or a process, that shares less or more than
// can be carried.
// ---- execer: processes whose second thread executes a program, all the time.
// ---- spawner: children by vfork and posix_spawn all the time.
#include "selfcheck.h"
#include <linux/sched.h>
#include <sched.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { FILES = 1, DIRS = 2, TWINS = 8 };
// What each member shares with the first process; twins share with each other.
enum { A, B, C, MIDDLE, GRANDCHILD, PARENT, TWIN, TWIN2, QUIET, OTHERSIG, MEMBERS };
static const struct { int with; const char *what; } kinds[MEMBERS] = {
	{FILES, "child with CLONE_FILES"}, {DIRS, "child with CLONE_FS"}, {FILES | DIRS, "child with both"},
	{0, "parent that shares no longer"}, {FILES | DIRS, "its child, which does"},
	{0, "parent of twins"}, {TWINS, "twin"}, {TWINS, "second twin"}, {0, "child without a signal"}, {0, "child with another signal"},
};
static struct {
	volatile uint64_t turn, twin_turn;
	struct { volatile pid_t pid; volatile uint64_t ack; volatile int open, masked; volatile ino_t cwd; } m[MEMBERS];
} *state;
enum { SHARED_FD = 60 };
static ino_t dir_ino[2];
static char *dir_path[2];

static ino_t cwd_ino(void) {
	struct stat st;
	SYS(stat(".", &st));
	return st.st_ino;
}

static pid_t clone_with(uint64_t flags, int sig) {
	struct clone_args a = {.flags = flags, .exit_signal = sig};
	return SYS(syscall(SYS_clone3, &a, sizeof a));
}

static _Noreturn void share_member(int i) {
	pid_t parent = getppid();
	state->m[i].pid = getpid();
	for (uint64_t seen = 0;;) {
		struct timespec t = {0, 2000000};
		clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
		if (getppid() != parent) _exit(2);
		if (i == TWIN && state->twin_turn != state->turn) {
			// One of the twins changes what the other must see.
			SYS(chdir(dir_path[!(state->turn & 1)]));
			state->twin_turn = state->turn;
		}
		if (seen == state->turn || state->twin_turn != state->turn) continue;
		seen = state->turn;
		mode_t m = umask(0);
		umask(m);
		state->m[i].open = fcntl(SHARED_FD, F_GETFD) >= 0;
		state->m[i].cwd = cwd_ino();
		state->m[i].masked = m;
		state->m[i].ack = seen;
	}
}

static void shares_check(void) {
	uint64_t turn = state->turn + 1;
	if (turn & 1) at_fd(SHARED_FD, SYS(open("/dev/null", O_RDONLY | O_CLOEXEC)));
	else SYS(close(SHARED_FD));
	SYS(chdir(dir_path[turn & 1]));
	// A look at the mask of a member changes it for a moment.
	umask(turn & 1 ? 027 : 022);
	state->turn = turn;
	for (int i = 0; i < MEMBERS; i++) {
		for (int n = 0; state->m[i].ack != turn; n++) {
			CHECK(n < PATIENCE_MS, "%s does not answer", kinds[i].what);
			nap_ms(1);
		}
		bool files = kinds[i].with & FILES, dirs = kinds[i].with & DIRS;
		CHECK(state->m[i].open == (files && (turn & 1)), "%s sees the descriptor of turn %lu: %d", kinds[i].what, turn, state->m[i].open);
		ino_t want = kinds[i].with == TWINS ? dir_ino[!(turn & 1)] : dir_ino[dirs ? turn & 1 : 0];
		CHECK(state->m[i].cwd == want, "%s is in another directory in turn %lu", kinds[i].what, turn);
	}
}

COMMAND(shares) {
	state = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	for (int i = 0; i < 2; i++) {
		dir_path[i] = path_of(i ? "dir1" : "dir0");
		mkdir(dir_path[i], 0755);
		struct stat st;
		SYS(stat(dir_path[i], &st));
		dir_ino[i] = st.st_ino;
	}
	SYS(chdir(dir_path[0]));
	pid_t pid[MEMBERS] = {0};
	struct { int i; uint64_t flags; int sig; } direct[] = {
		{A, CLONE_FILES, SIGCHLD}, {B, CLONE_FS, SIGCHLD}, {C, CLONE_FILES | CLONE_FS, SIGCHLD}, {QUIET, 0, 0}, {OTHERSIG, 0, SIGURG},
	};
	for (size_t k = 0; k < sizeof direct / sizeof *direct; k++)
		if ((pid[direct[k].i] = clone_with(direct[k].flags, direct[k].sig)) == 0) share_member(direct[k].i);
	if ((pid[MIDDLE] = clone_with(CLONE_FILES | CLONE_FS, SIGCHLD)) == 0) {
		if (clone_with(CLONE_FILES | CLONE_FS, SIGCHLD) == 0) share_member(GRANDCHILD);
		SYS(unshare(CLONE_FILES | CLONE_FS));
		share_member(MIDDLE);
	}
	if ((pid[PARENT] = clone_with(0, SIGCHLD)) == 0) {
		for (int i = TWIN; i <= TWIN2; i++)
			if (clone_with(CLONE_FS, SIGCHLD) == 0) share_member(i);
		SYS(unshare(CLONE_FS));
		share_member(PARENT);
	}
	for (int i = 0; i < MEMBERS; i++) while (!state->m[i].pid) nap_ms(1);
	loop(shares_check);
	// A child without SIGCHLD at its end is only found by who asks for such.
	for (int i = QUIET; i <= OTHERSIG; i++) {
		SYS(kill(pid[i], SIGKILL));
		siginfo_t si = {0};
		nap_ms(50);
		CHECK(waitid(P_PID, pid[i], &si, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD, "%s is found by a plain wait", kinds[i].what);
		SYS(waitid(P_PID, pid[i], &si, WEXITED | __WCLONE));
	}
	for (int i = 0; i < QUIET; i++) if (pid[i]) end_child(pid[i]);
}

static volatile uint64_t spawned[4];

static void *t_spawn(void *arg) {
	int i = (intptr_t)arg;
	static char *argv[] = {"true", NULL}, *env[] = {NULL};
	while (!stopping) {
		pid_t pid;
		int st, e = posix_spawn(&pid, "/bin/true", NULL, NULL, argv, env);
		CHECK(e == 0, "posix_spawn: %s", strerror(e));
		CHECK(waitpid(pid, &st, 0) == pid && st == 0, "the child ended with %x", st);
		spawned[i]++;
		nap_ms(1);
	}
	return NULL;
}

static void *t_vfork(void *arg) {
	int i = (intptr_t)arg;
	while (!stopping) {
		pid_t pid = vfork();
		if (pid == 0) {
			// Long enough to be met in it.
			struct timespec t = {0, 15000000};
			syscall(SYS_nanosleep, &t, NULL);
			syscall(SYS_exit_group, 9);
		}
		int st;
		CHECK(pid > 0 && waitpid(pid, &st, 0) == pid && WIFEXITED(st) && WEXITSTATUS(st) == 9, "the child by vfork ended with %x: %s", st, strerror(errno));
		spawned[i]++;
		nap_ms(25);
	}
	return NULL;
}

static void spawner_check(void) {
	static uint64_t last[4];
	static int turn;
	if (++turn % 300) return;
	for (int i = 0; i < 3; i++) {
		CHECK(moved(&spawned[i], last[i]), "spawner %d stands still", i);
		last[i] = spawned[i];
	}
}

COMMAND(spawner) {
	if (arg_count > 0) {
		// A vfork that does not end.
		pid_t pid = vfork();
		if (pid == 0) {
			static const char up[] = "up";
			int fd = syscall(SYS_open, path_of("ready"), O_WRONLY | O_CREAT, 0644);
			syscall(SYS_write, fd, up, 2);
			for (;;) pause();
		}
	}
	pthread_t t[3];
	for (intptr_t i = 0; i < 2; i++) t[i] = spawn(t_spawn, (void *)i);
	t[2] = spawn(t_vfork, (void *)(intptr_t)2);
	loop(spawner_check);
	for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
}

// ---- execer

COMMAND(execed) { _exit(5); }

static void *t_exec(void *arg) {
	nap_ms((uintptr_t)arg % 3);
	execl("/proc/self/exe", "selfcheck", "execed", path_of("child"), NULL);
	_exit(6);
}

static void *t_still(void *arg) {
	for (;; nap_ms(1)) (void)arg;
	return NULL;
}

static void *t_execer(void *arg) {
	int i = (intptr_t)arg;
	for (uintptr_t n = 0; !stopping; n++) {
		pid_t pid = child();
		if (pid == 0) {
			for (int j = 0; j < 2; j++) spawn(t_still, NULL);
			spawn(t_exec, (void *)n);
			for (;; nap_ms(1)) {}
		}
		int st;
		CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st) && WEXITSTATUS(st) == 5, "the child ended with %x", st);
		spawned[i]++;
	}
	return NULL;
}

COMMAND(execer) {
	pthread_t t[3];
	for (intptr_t i = 0; i < 3; i++) t[i] = spawn(t_execer, (void *)i);
	loop(spawner_check);
	for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
}

// ---- sharing

static void *t_own_files(void *arg) {
	SYS(unshare(CLONE_FILES));
	*(volatile bool *)arg = true;
	for (; !stopping; nap_ms(10)) {}
	return NULL;
}

static int pauses(void *arg) {
	for (; !arg;) syscall(SYS_pause);
	return 0;
}

COMMAND(sharing) {
	CHECK(arg_count > 0, "usage: sharing PREFIX files|vm");
	if (strcmp(arg_values[0], "files") == 0) {
		volatile bool own = false;
		pthread_t t = spawn(t_own_files, (void *)&own);
		while (!own) nap_ms(1);
		loop(NULL);
		pthread_join(t, NULL);
		return;
	}
	static char stack[65536] __attribute__((aligned(16)));
	pid_t pid = SYS(clone(pauses, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
	loop(NULL);
	end_child(pid);
}
