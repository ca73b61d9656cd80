// ---- jail: processes whose root is another directory, beside one whose is not,
// and threads with directories and masks of their own.
#include "selfcheck.h"
#include <libgen.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

static struct { volatile uint64_t turns[2]; volatile ino_t root[2]; } *cells;
static ino_t jail_ino, free_ino, dir_inos[2];
static volatile uint64_t thread_turns[2];
static pid_t inmate, visitor;

static ino_t ino_of(const char *path) {
	struct stat st;
	SYS(stat(path, &st));
	return st.st_ino;
}

static void *t_own_dir(void *arg) {
	int i = (intptr_t)arg;
	SYS(unshare(CLONE_FS));
	SYS(chdir(path_of(i ? "one" : "two")));
	SYS(umask(i ? 077 : 002));
	for (; !stopping; thread_turns[i]++, nap_ms(4)) {
		CHECK(ino_of(".") == dir_inos[i], "thread %d is in another directory", i);
		CHECK(ino_of("/") == jail_ino, "thread %d has another root", i);
		mode_t m = umask(0);
		umask(m);
		CHECK(m == (i ? 077 : 002), "umask of thread %d is %o", i, m);
	}
	return NULL;
}

static void jail_check(void) {
	static uint64_t last[4];
	static int turn;
	expect_alive(inmate);
	expect_alive(visitor);
	CHECK(ino_of("/") == jail_ino, "the root is another directory");
	CHECK(access("/etc", F_OK) < 0, "what is outside of the root can be found");
	CHECK(ino_of(".") == jail_ino, "the working directory is another one");
	mode_t m = umask(0);
	umask(m);
	CHECK(m == 026, "umask is %o", m);
	CHECK(cells->root[0] == jail_ino && cells->root[1] == free_ino, "roots of the children are %lu and %lu", cells->root[0], cells->root[1]);
	if (++turn % 200) return;
	const volatile uint64_t *now[] = {&thread_turns[0], &thread_turns[1], &cells->turns[0], &cells->turns[1]};
	for (int i = 0; i < 4; i++) {
		CHECK(moved(now[i], last[i]), "%s %d stands still", i < 2 ? "thread" : "child", i % 2);
		last[i] = *now[i];
	}
}

COMMAND(jail) {
	cells = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	free_ino = ino_of("/");
	visitor = child();
	if (visitor == 0) for (;; nap_ms(5), cells->turns[1]++) {
		orphan_check();
		cells->root[1] = ino_of("/");
	}
	// The records and verdicts of this program are at the same path inside.
	char *jail = path_of("jail"), *dir = dirname(strdup(prefix)), inside[4096];
	SYS(mkdir(jail, 0755));
	for (char *slash = dir; slash; ) {
		slash = strchr(slash + 1, '/');
		snprintf(inside, sizeof inside, "%s%.*s", jail, (int)(slash ? slash - dir : (long)strlen(dir)), dir);
		SYS(mkdir(inside, 0755));
	}
	SYS(mount(dir, inside, NULL, MS_BIND, NULL));
	SYS(chroot(jail));
	SYS(chdir("/"));
	jail_ino = ino_of("/");
	for (int i = 0; i < 2; i++) {
		SYS(mkdir(path_of(i ? "one" : "two"), 0755));
		dir_inos[i] = ino_of(path_of(i ? "one" : "two"));
	}
	inmate = child();
	if (inmate == 0) for (;; nap_ms(5), cells->turns[0]++) {
		orphan_check();
		cells->root[0] = ino_of("/");
	}
	umask(026);
	pthread_t t[2];
	for (intptr_t i = 0; i < 2; i++) t[i] = spawn(t_own_dir, (void *)i);
	while (!thread_turns[0] || !thread_turns[1] || !cells->turns[0] || !cells->turns[1]) nap_ms(1);
	loop(jail_check);
	for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
	end_child(inmate);
	end_child(visitor);
}
