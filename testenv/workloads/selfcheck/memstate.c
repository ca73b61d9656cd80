// What belongs to an address space beside its mappings, and flags of mappings.
#include "mem.h"
#include <linux/membarrier.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#ifndef MCL_ONFAULT
#define MCL_ONFAULT 4
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8 // Linux 6.11
#endif
enum { SET_MDWE = 65, GET_MDWE, SET_MEMORY_MERGE, GET_MEMORY_MERGE, GET_REGISTRATIONS = 1 << 9 };

// ---- advised: one mapping for each advice and flag, and some with several.
// All of VmFlags must stay, but for "ac", accounted.

static const struct { int advice[4]; int type; } kinds[] = {
	{{MADV_DONTFORK}, MAP_PRIVATE}, {{MADV_WIPEONFORK}, MAP_PRIVATE}, {{MADV_DONTDUMP}, MAP_PRIVATE}, {{MADV_MERGEABLE}, MAP_PRIVATE},
	{{MADV_HUGEPAGE}, MAP_PRIVATE}, {{MADV_NOHUGEPAGE}, MAP_PRIVATE}, {{MADV_RANDOM}, MAP_PRIVATE}, {{MADV_SEQUENTIAL}, MAP_PRIVATE},
	{{MADV_DONTFORK, MADV_WIPEONFORK, MADV_DONTDUMP, MADV_MERGEABLE}, MAP_PRIVATE}, {{MADV_RANDOM, MADV_NOHUGEPAGE, MADV_DONTDUMP}, MAP_PRIVATE},
	{{MADV_DONTFORK, MADV_DONTDUMP, MADV_RANDOM}, MAP_SHARED}, {{0}, MAP_DROPPABLE}, {{MADV_RANDOM}, MAP_DROPPABLE},
	{{0}, MAP_PRIVATE | MAP_GROWSDOWN}, {{0}, MAP_PRIVATE | MAP_NORESERVE}, {{0}, MAP_PRIVATE | MAP_STACK},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };
static struct { unsigned char *p; char flags[256]; } advised[KINDS];

static void advised_check(void) {
	static int turn;
	int i = turn++ % KINDS;
	char *now = flags_of(advised[i].p);
	CHECK(strcmp(now, advised[i].flags) == 0, "mapping %d has flags %s, had %s", i, now, advised[i].flags);
	if (kinds[i].type != MAP_DROPPABLE) same("advised memory", advised[i].p, 0, 4 * PAGE, 60 + i);
}

COMMAND(advised) {
	for (int i = 0; i < KINDS; i++) {
		advised[i].p = SYS(mmap(NULL, 4 * PAGE, RW, kinds[i].type | MAP_ANONYMOUS, -1, 0));
		put(advised[i].p, 4 * PAGE, 60 + i);
		for (int k = 0; k < 4; k++) if (kinds[i].advice[k]) SYS(madvise(advised[i].p, 4 * PAGE, kinds[i].advice[k]));
		SYS(mmap(NULL, PAGE, PROT_NONE, PA, -1, 0)); // keeps neighbours apart
	}
	for (int i = 0; i < KINDS; i++) strcpy(advised[i].flags, flags_of(advised[i].p));
	loop(advised_check);
}

// ---- mmstate: children, each with a setting of its own for its whole address space.

static long status_kb(const char *key) {
	FILE *f = fopen("/proc/self/status", "re");
	char line[256];
	long kb = -1;
	while (f && fgets(line, sizeof line, f))
		if (strncmp(line, key, strlen(key)) == 0) sscanf(line + strlen(key), ": %ld", &kb);
	CHECK(f && kb >= 0, "no %s", key);
	fclose(f);
	return kb;
}

// fresh tells whether a new mapping has a flag.
static bool fresh(const char *flag) {
	void *p = SYS(mmap(NULL, 3 * PAGE, RW, PA, -1, 0));
	bool is = has_flag(p, flag);
	SYS(munmap(p, 3 * PAGE));
	return is;
}

static unsigned char *area, *hole; // some memory of a child, and some that it never touches
static long rss;

static void lock_set(void) { SYS(mlockall(MCL_FUTURE)); }
static void lock_check(void) {
	CHECK(fresh("lo") && !fresh("lf"), "new mappings are not locked as they were");
	CHECK(!has_flag(area, "lo"), "an old mapping is locked");
}

static void onfault_set(void) {
	SYS(mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT));
	rss = status_kb("VmRSS");
}
static void onfault_check(void) {
	CHECK(fresh("lo") && fresh("lf"), "new mappings are not locked on use");
	CHECK(has_flag(hole, "lf") && has_flag(area, "lf"), "old mappings are not locked on use");
	CHECK(status_kb("VmRSS") < rss + (16 << 10), "untouched locked memory was filled: %ld kB, had %ld", status_kb("VmRSS"), rss);
}

static void partly_set(void) { SYS(syscall(SYS_mlock2, hole, 32 << 20, MLOCK_ONFAULT)); }
static void partly_check(void) {
	CHECK(!fresh("lo"), "new mappings are locked");
	CHECK(has_flag(hole, "lf") && has_flag(hole, "lo") && !has_flag(area, "lo"), "other mappings are locked");
	CHECK(!has_flag(hole + (32 << 20), "lo"), "the rest is locked");
}

static void merge_set(void) {
	SYS(prctl(SET_MEMORY_MERGE, 1, 0, 0, 0));
	SYS(madvise(area, 4 * PAGE, MADV_UNMERGEABLE));
}
static void merge_check(void) {
	CHECK(prctl(GET_MEMORY_MERGE, 0, 0, 0, 0) == 1 && fresh("mg"), "new memory is no longer merged");
	CHECK(has_flag(hole, "mg") && !has_flag(area, "mg"), "other memory is merged");
}

static int (*code)(void);
static void mdwe_set(void) {
	unsigned char *p = SYS(mmap(NULL, PAGE, RW, PA, -1, 0));
	memcpy(p, "\xb8\x67\x12\x00\x00\xc3", 6); // mov $4711, %eax; ret
	SYS(mprotect(p, PAGE, PROT_READ | PROT_EXEC));
	code = (int (*)(void))p;
	SYS(prctl(SET_MDWE, 1, 0, 0, 0));
}
static void mdwe_check(void) {
	CHECK(prctl(GET_MDWE, 0, 0, 0, 0) == 1, "PR_GET_MDWE gives %d", prctl(GET_MDWE, 0, 0, 0, 0));
	CHECK(mprotect(area, PAGE, PROT_READ | PROT_EXEC) == -1 && errno == EACCES, "memory that was written can be executed");
	CHECK(code() == 4711, "generated code returned %d", code());
}

static void thp_set(void) { SYS(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)); }
static void thp_check(void) { CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1, "huge pages are no longer disabled"); }
static void except_set(void) { prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0); } // Linux 6.18
static int except_had;
static void except_check(void) {
	int now = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	if (!except_had) except_had = now + 1;
	CHECK(now + 1 == except_had, "PR_GET_THP_DISABLE gives %d, gave %d", now, except_had - 1);
}

static const int registered = MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED | MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED | MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
static void barrier_set(void) {
	for (int i = 0; i < 9; i++) if (registered & 1 << i) SYS(syscall(SYS_membarrier, 1 << i, 0, 0));
}
static void barrier_check(void) {
	CHECK(syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0) == registered, "membarrier has registrations %#lx", syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0));
	SYS(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0));
	SYS(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0));
	CHECK(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ, 0, 0) == -1 && errno == EPERM, "a registration that was not made is there");
}

static void plain_set(void) {}
static void plain_check(void) {
	CHECK(!fresh("lo") && !fresh("mg"), "new mappings have flags %s", flags_of(area));
	CHECK(prctl(GET_MEMORY_MERGE, 0, 0, 0, 0) == 0 && prctl(GET_MDWE, 0, 0, 0, 0) == 0 && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0, "a setting that was not made is there");
	CHECK(syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0) == 0, "membarrier has registrations %#lx", syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0));
}

static const struct { void (*set)(void), (*check)(void); } states[] = {
	{lock_set, lock_check}, {onfault_set, onfault_check}, {partly_set, partly_check}, {merge_set, merge_check}, {mdwe_set, mdwe_check},
	{thp_set, thp_check}, {except_set, except_check}, {barrier_set, barrier_check}, {plain_set, plain_check},
};
enum { STATES = sizeof states / sizeof states[0] };
static pid_t state_pids[STATES];
static volatile unsigned *state_turns; // shared: checks that each child has made

static void mmstate_check(void) {
	static unsigned last[STATES], since;
	for (int i = 0; i < STATES; i++) {
		if (since % 50 == 0) expect_alive(state_pids[i]);
		if (since % 500 != 499) continue;
		CHECK(state_turns[i] != last[i], "child %d does not go on", i);
		last[i] = state_turns[i];
	}
	since++;
}

COMMAND(mmstate) {
	state_turns = SYS(mmap(NULL, PAGE, RW, SA, -1, 0));
	for (int i = 0; i < STATES; i++) {
		state_pids[i] = child();
		if (state_pids[i]) continue;
		area = SYS(mmap(NULL, 4 * PAGE, RW, PA, -1, 0));
		SYS(mmap(NULL, PAGE, PROT_NONE, PA, -1, 0));
		hole = SYS(mmap(NULL, 64 << 20, RW, PA | MAP_NORESERVE, -1, 0));
		put(area, 4 * PAGE, 80 + i);
		states[i].set();
		for (;; nap_ms(5)) {
			orphan_check();
			states[i].check();
			same("memory of a child", area, 0, 4 * PAGE, 80 + i);
			state_turns[i]++;
		}
	}
	for (int i = 0; i < STATES; i++)
		for (; !state_turns[i]; nap_ms(1)) expect_alive(state_pids[i]);
	loop(mmstate_check);
	for (int i = 0; i < STATES; i++) end_child(state_pids[i]);
}
