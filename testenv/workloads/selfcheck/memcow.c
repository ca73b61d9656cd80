// Memory that parent and child share since a fork, until one of them writes.
#include "mem.h"

// ---- cow: a parent with much memory, children and a grandchild that have
// changed some pages, dropped some, grown the heap, mapped and unmapped, changed
// protections. How much memory they take is for an observer to see. "cow PREFIX MIB"
// has that much.

enum { KIDS = 5 };
static size_t BIG = 48 << 20;
static int PAGES;
static unsigned char *big, *heap, *ro, *gone;
static volatile struct cow_shared { pid_t grandchild; int turns[KIDS + 1]; bool set[KIDS + 1]; } *cow;
static pid_t kids[KIDS];
static int who; // 0..KIDS-1 children, KIDS the grandchild, -1 the parent
static unsigned char *more, *arena;

// Which seed page i of the big memory has in a process; -1: dropped.
static int seed_of(int i) {
	int base = who == KIDS ? 0 : who; // the grandchild is of the first child
	int seed = 1;
	if (i % 50 == 7) seed = 2; // changed by the parent after the forks
	if (who >= 0 && i % 50 == 7) seed = 1;
	if (who >= 0 && i % 40 == base) seed = 100 + base;
	if (who >= 0 && i % 41 == base + 20) seed = -1;
	if (who == KIDS && i % 60 == 59) seed = 200;
	return seed;
}

static void cow_pages(int from, int to) {
	for (int i = from; i < to; i++) {
		int seed = seed_of(i);
		unsigned char *p = big + (size_t)i * PAGE;
		for (int k = i % 13; k < PAGE; k += 97) {
			unsigned char want = seed < 0 ? 0 : pattern(seed, k);
			CHECK(p[k] == want, "process %d: page %d, byte %d is %02x, want %02x", who, i, k, p[k], want);
		}
	}
}

static void set_page(int i, int seed) { for (int k = 0; k < PAGE; k++) big[(size_t)i * PAGE + k] = pattern(seed, k); }

static void cow_common(void) {
	static int turn;
	int n = PAGES / 64, at = turn++ % 64 * n;
	cow_pages(at, at + n);
	same("heap", heap, 0, 256 << 10, 300);
	same("read-only", ro, 0, 8 * PAGE, 301);
	if (who < 0) same("unmapped by children", gone, 0, 16 * PAGE, 302);
	if (more) same("grown heap", more, 0, 128 << 10, 310 + who);
	if (arena) {
		same("arena", arena, 0, 24 * PAGE, 320 + who);
		CHECK(!readable(arena + 24 * PAGE) && !readable(arena + 63 * PAGE), "the rest of the arena is accessible");
	}
}

static void cow_child(int me) {
	who = me;
	for (int i = 0; i < PAGES; i++)
		if (seed_of(i) == 100 + me) set_page(i, 100 + me);
		else if (seed_of(i) < 0) SYS(madvise(big + (size_t)i * PAGE, PAGE, MADV_DONTNEED));
	more = SYS(sbrk(128 << 10));
	put(more, 128 << 10, 310 + me);
	SYS(munmap(gone, 16 * PAGE));
	SYS(mmap(gone + 4 * PAGE, 2 * PAGE, PROT_READ, PA | MAP_FIXED_NOREPLACE, -1, 0));
	if (me % 2) SYS(mprotect(ro, 8 * PAGE, RW));
	// The parent has 16 pages of it.
	SYS(mprotect(arena, 24 * PAGE, RW));
	put(arena, 24 * PAGE, 320 + me);
}

static _Noreturn void cow_run(int slot) {
	cow->set[slot] = true;
	for (;; nap_ms(5)) {
		orphan_check();
		cow_common();
		cow->turns[slot]++;
	}
}

static void cow_check(void) {
	static int turn, last[KIDS + 1];
	cow_common();
	if (turn % 40 == 0) for (int i = 0; i < KIDS; i++) expect_alive(kids[i]);
	if (turn % 500 == 499)
		for (int i = 0; i <= KIDS; i++) {
			CHECK(cow->turns[i] != last[i], "child %d does not go on", i);
			last[i] = cow->turns[i];
		}
	turn++;
}

COMMAND(cow) {
	if (arg_count > 0) BIG = strtoul(arg_values[0], NULL, 10) << 20;
	PAGES = BIG / PAGE;
	cow = SYS(mmap(NULL, PAGE, RW, SA, -1, 0));
	who = -1;
	big = SYS(mmap(NULL, BIG, RW, PA, -1, 0));
	SYS(madvise(big, BIG, MADV_NOHUGEPAGE));
	for (int i = 0; i < PAGES; i++) set_page(i, 1);
	heap = SYS(sbrk(256 << 10));
	put(heap, 256 << 10, 300);
	ro = SYS(mmap(NULL, 8 * PAGE, RW, PA, -1, 0));
	put(ro, 8 * PAGE, 301);
	SYS(mprotect(ro, 8 * PAGE, PROT_READ));
	gone = SYS(mmap(NULL, 16 * PAGE, RW, PA, -1, 0));
	put(gone, 16 * PAGE, 302);
	arena = SYS(mmap(NULL, 64 * PAGE, PROT_NONE, PA | MAP_NORESERVE, -1, 0));
	SYS(mprotect(arena, 16 * PAGE, RW));
	put(arena, 16 * PAGE, 320);
	for (int i = 0; i < KIDS; i++) {
		kids[i] = child();
		if (kids[i]) continue;
		if (i == 3) setsid();
		cow_child(i);
		if (i == 0) {
			pid_t pid = child();
			if (pid == 0) {
				more = NULL; // the parent's: shared, and checked there
				arena = NULL;
				who = KIDS;
				for (int k = 0; k < PAGES; k++) if (seed_of(k) == 200) set_page(k, 200);
				cow_run(KIDS);
			}
			cow->grandchild = pid;
		}
		cow_run(i);
	}
	for (int i = 0; i <= KIDS; i++) while (!cow->set[i]) nap_ms(1);
	for (int i = 7; i < PAGES; i += 50) set_page(i, 2);
	arena = NULL; // other contents than the children's
	loop(cow_check);
	cow_pages(0, PAGES);
	for (int i = 0; i < KIDS; i++) end_child(kids[i]);
}
