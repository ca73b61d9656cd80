// ---- kinship [SEED]: a tree of processes that comes about by chance: sessions,
// groups, orphans, zombies and those who take orphans, wherever they may be.
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>

enum { NODES = 64 };
static struct {
	volatile int count;
	volatile pid_t root;
	volatile bool ending;
	struct {
		volatile pid_t pid, parent, sid, pgid;
		volatile bool settled, gone, zombie; // gone: it has ended, or will now
		volatile bool known; // parent, sid and pgid are those to keep
		volatile uint64_t beats;
	} n[NODES];
} *kin_board;
static uint64_t seed;

static unsigned chance(unsigned n) {
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (seed >> 33) % n;
}

static _Noreturn void settle(int i, pid_t group) {
	if (group) SYS(setpgid(0, group));
	kin_board->n[i].settled = true;
	while (!kin_board->n[i].known) {
		if (kill(kin_board->root, 0) != 0) _exit(2);
		nap_ms(2);
	}
	for (;; nap_ms(4)) {
		if (getppid() == 1) _exit(2);
		bool same = getppid() == kin_board->n[i].parent && getsid(0) == kin_board->n[i].sid && getpgrp() == kin_board->n[i].pgid;
		// At the end they lose their parents one by one.
		CHECK(same || kin_board->ending,
			"member %d: parent %d session %d group %d, want %d %d %d", i, getppid(), getsid(0), getpgrp(),
			kin_board->n[i].parent, kin_board->n[i].sid, kin_board->n[i].pgid);
		kin_board->n[i].beats++;
	}
}

#pragma GCC diagnostic ignored "-Winfinite-recursion"
static void offspring(int depth);

static _Noreturn void relative(int i, int depth, pid_t group) {
	kin_board->n[i].pid = getpid();
	switch (chance(6)) {
	case 0: case 1: SYS(setsid()); group = 0; break;
	case 2: SYS(setpgid(0, 0)); group = 0; break;
	}
	if (chance(5) == 0) SYS(prctl(PR_SET_CHILD_SUBREAPER, 1));
	offspring(depth);
	if (chance(2)) {
		kin_board->n[i].gone = true;
		kin_board->n[i].settled = true;
		_exit(i);
	}
	settle(i, group);
}

// offspring makes children, one after the other, and waits until all below stand.
static void offspring(int depth) {
	int most = depth == 0 ? 5 : depth < 5 ? 3 : 0;
	pid_t sid = getsid(0), group = 0;
	for (int n = most ? 1 + chance(most) : 0; n > 0; n--) {
		int i = __atomic_fetch_add(&kin_board->count, 1, __ATOMIC_SEQ_CST);
		if (i >= NODES) {
			kin_board->count = NODES;
			return;
		}
		uint64_t childs = seed + i * 7919;
		pid_t join = chance(3) == 0 ? group : 0;
		pid_t pid = SYS(fork());
		if (pid == 0) {
			seed = childs;
			relative(i, depth + 1, join);
		}
		while (!kin_board->n[i].settled) nap_ms(1);
		if (kin_board->n[i].gone) {
			siginfo_t si;
			bool zombie = chance(3) == 0;
			SYS(waitid(P_PID, pid, &si, WEXITED | (zombie ? WNOWAIT : 0)));
			kin_board->n[i].zombie = zombie;
		} else if (getsid(pid) == sid && getpgid(pid) == pid) group = pid;
	}
}

static void look(int i) {
	char path[64], b[512];
	snprintf(path, sizeof path, "/proc/%d/stat", kin_board->n[i].pid);
	int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = read(fd, b, sizeof b - 1);
	close(fd);
	CHECK(n > 0, "read %s", path);
	b[n] = 0;
	char st;
	int parent, pgid, sid;
	CHECK(sscanf(strrchr(b, ')'), ") %c %d %d %d", &st, &parent, &pgid, &sid) == 4, "%s says %s", path, b);
	CHECK((st == 'Z') == kin_board->n[i].zombie, "member %d is in state %c", i, st);
	if (!kin_board->n[i].known) {
		kin_board->n[i].parent = parent;
		kin_board->n[i].pgid = pgid;
		kin_board->n[i].sid = sid;
		kin_board->n[i].known = true;
	}
	CHECK(parent == kin_board->n[i].parent && pgid == kin_board->n[i].pgid && sid == kin_board->n[i].sid,
		"member %d (pid %d%s): parent %d session %d group %d, want %d %d %d", i, kin_board->n[i].pid, st == 'Z' ? ", zombie" : "", parent, sid, pgid,
		kin_board->n[i].parent, kin_board->n[i].sid, kin_board->n[i].pgid);
}

static void kinship_check(void) {
	static int turn;
	static uint64_t last[NODES];
	for (int i = 0; i < kin_board->count; i++) {
		if (kin_board->n[i].gone && !kin_board->n[i].zombie) continue;
		look(i);
		if (turn % 200 == 199 && !kin_board->n[i].gone) {
			CHECK(moved(&kin_board->n[i].beats, last[i]), "member %d stands still", i);
			last[i] = kin_board->n[i].beats;
		}
	}
	turn++;
}

COMMAND(kinship) {
	seed = arg_count > 0 ? strtoull(arg_values[0], NULL, 10) : 4;
	kin_board = SYS(mmap(NULL, sizeof *kin_board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	kin_board->root = getpid();
	SYS(prctl(PR_SET_CHILD_SUBREAPER, 1));
	signal(SIGCHLD, SIG_DFL);
	offspring(0);
	loop(kinship_check);
	kin_board->ending = true;
	for (int i = 0; i < kin_board->count; i++)
		if (!kin_board->n[i].gone) SYS(kill(kin_board->n[i].pid, SIGKILL));
}
