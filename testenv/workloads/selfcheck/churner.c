// ---- churner [MIB]: mappings come, go, move, grow, shrink, are emptied and
// change their protection all the time, heap and stack grow, and children with
// copies of all that come and go. What each page of each mapping must hold is
// known, that emptied pages are zero included. At most MIB are mapped at a time.
#include "mem.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4 // Linux 5.7
#endif

enum { WORDS = PAGE / 8, SLOTS = 64, MOST = 256, KIDS = 3, SHARED = 64, HEAP = 2048, FRAMES = 900, OPS = 16 };

struct area {
	uint64_t *p;
	int n; // pages; 0: free
	uint32_t seed[MOST]; // 0: the page is zero
	unsigned char prot[MOST];
};
static struct area *areas;
static int mapped, most;
static uint32_t next_seed = 1;
static uint64_t ops, moves_refused;

static unsigned roll(unsigned n) {
	static uint64_t x = 1;
	x = x * 6364136223846793005u + 1442695040888963407u;
	return (x >> 33) % n;
}

static void fill_page(uint64_t *p, uint32_t seed) { for (int k = 0; k < WORDS; k++) p[k] = mix(seed, k, 0); }

static void page_is(const char *what, const uint64_t *p, uint32_t seed, int page) {
	for (int k = 0; k < WORDS; k++) {
		uint64_t want = seed ? mix(seed, k, 0) : 0;
		CHECK(p[k] == want, "%s, page %d at %p: word %d is %lx, want %lx (content %u)", what, page, (void *)p, k, p[k], want, seed);
	}
}

static void area_is(struct area *a, int from, int to) {
	for (int i = from; i < to; i++)
		if (a->prot[i] & PROT_READ) page_is("mapping", a->p + (size_t)i * WORDS, a->seed[i], i);
}

static struct area *some_area(bool free_one) {
	for (int i = 0, at = roll(SLOTS); i < SLOTS; i++, at = (at + 1) % SLOTS)
		if ((areas[at].n == 0) == free_one) return &areas[at];
	return NULL;
}

static void range(struct area *a, int *from, int *to) {
	*from = roll(a->n);
	*to = *from + 1 + roll(a->n - *from);
}

static void write_pages(struct area *a, int from, int to) {
	for (int i = from; i < to; i++) {
		if (a->prot[i] != RW) continue;
		page_is("mapping", a->p + (size_t)i * WORDS, a->seed[i], i);
		fill_page(a->p + (size_t)i * WORDS, a->seed[i] = next_seed++);
	}
}

static void protect(struct area *a, int from, int to, int prot) {
	SYS(mprotect(a->p + (size_t)from * WORDS, (size_t)(to - from) * PAGE, prot));
	for (int i = from; i < to; i++) a->prot[i] = prot;
	area_is(a, from, to);
}

static void op_map(void) {
	struct area *a = some_area(true);
	int n = 1 + roll(MOST);
	if (!a || mapped + n > most) return;
	a->p = SYS(mmap(NULL, (size_t)n * PAGE, RW, PA, -1, 0));
	a->n = n;
	mapped += n;
	memset(a->seed, 0, sizeof a->seed);
	memset(a->prot, RW, sizeof a->prot);
	write_pages(a, 0, roll(n + 1));
}

// The end, the beginning or the middle of a mapping goes.
static void op_unmap(void) {
	struct area *a = some_area(false), *rest = some_area(true);
	if (!a) return;
	int from, to, n = a->n;
	range(a, &from, &to);
	if (roll(3) == 0) from = 0;
	if (roll(3) == 0 || !rest) to = n;
	area_is(a, from, to);
	SYS(munmap(a->p + (size_t)from * WORDS, (size_t)(to - from) * PAGE));
	mapped -= to - from;
	a->n = from;
	if (to == n) return;
	if (from == 0) rest = a;
	memmove(rest->seed, a->seed + to, (n - to) * sizeof *a->seed);
	memmove(rest->prot, a->prot + to, n - to);
	rest->p = a->p + (size_t)to * WORDS;
	rest->n = n - to;
}

static void op_remap(void) {
	struct area *a = some_area(false), *left = some_area(true);
	if (!a) return;
	protect(a, 0, a->n, RW); // what has several protections cannot be resized
	int n = a->n, to = 1 + roll(MOST), how = roll(3);
	uint64_t *p;
	if (how == 0 && left && mapped + n <= most) {
		// The pages go, an empty mapping stays.
		p = mremap(a->p, (size_t)n * PAGE, (size_t)n * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
		if (p != MAP_FAILED) {
			*left = *a;
			memset(left->seed, 0, sizeof left->seed);
			mapped += n;
			a->p = p;
			area_is(left, 0, n);
		}
	} else {
		if (mapped + to - n > most) to = n;
		// To a place that is free because something was just there, or wherever it fits.
		uint64_t *there = SYS(mmap(NULL, (size_t)to * PAGE, PROT_NONE, PA, -1, 0));
		if (how == 1) p = mremap(a->p, (size_t)n * PAGE, (size_t)to * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there);
		else p = mremap(a->p, (size_t)n * PAGE, (size_t)to * PAGE, MREMAP_MAYMOVE);
		int failed = errno;
		// Several mappings of the kernel's move one by one, and it may stop at one of them
		// (mm/mremap.c, remap_move, Linux 6.17): what has gone is fetched back.
		unsigned char in;
		for (int i = 0; how == 1 && p == MAP_FAILED && i < n; i++)
			if (mincore(a->p + (size_t)i * WORDS, PAGE, &in) < 0)
				SYS(mremap(there + (size_t)i * WORDS, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, a->p + (size_t)i * WORDS));
		if (how != 1 || p == MAP_FAILED) SYS(munmap(there, (size_t)to * PAGE));
		errno = failed;
		if (p != MAP_FAILED) {
			for (int i = n; i < to; i++) a->seed[i] = 0, a->prot[i] = RW;
			mapped += to - n;
			a->p = p;
			a->n = to;
		}
	}
	if (p == MAP_FAILED) {
		// Neighbours that were written apart stay two mappings for the kernel.
		CHECK(errno == EFAULT || errno == EINVAL, "mremap of %d pages to %d, way %d: %s", n, to, how, strerror(errno));
		moves_refused++;
	}
	area_is(a, 0, a->n);
}

static void op_protect(void) {
	struct area *a = some_area(false);
	if (!a) return;
	int from, to;
	range(a, &from, &to);
	protect(a, from, to, (int[]){PROT_NONE, PROT_READ, RW}[roll(3)]);
	int i = from + roll(to - from);
	CHECK(readable(a->p + (size_t)i * WORDS) == (a->prot[i] != PROT_NONE), "page %d of a mapping has another protection than %d", i, a->prot[i]);
}

static void op_empty(void) {
	struct area *a = some_area(false);
	if (!a) return;
	int from, to;
	range(a, &from, &to);
	area_is(a, from, to);
	SYS(madvise(a->p + (size_t)from * WORDS, (size_t)(to - from) * PAGE, MADV_DONTNEED));
	for (int i = from; i < to; i++) a->seed[i] = 0;
	if (roll(2)) area_is(a, from, to); // or they have not been touched since
}

static void op_write(void) {
	struct area *a = some_area(false);
	if (!a) return;
	int from, to;
	range(a, &from, &to);
	write_pages(a, from, to);
}

// ---- The heap grows page by page; now and then most of it is given back.

static uint64_t *heap;
static int heap_pages;
static uint32_t heap_seed[HEAP];

static void op_heap(void) {
	uint64_t *end = heap + (size_t)heap_pages * WORDS;
	CHECK(SYS(sbrk(0)) == end, "the heap ends at %p, want %p", sbrk(0), (void *)end);
	if (heap_pages + 16 > HEAP) {
		int keep = roll(HEAP / 2);
		for (int i = keep; i < heap_pages; i++) page_is("heap", heap + (size_t)i * WORDS, heap_seed[i], i);
		SYS(sbrk(-(intptr_t)(heap_pages - keep) * PAGE));
		heap_pages = keep;
	}
	for (int n = 1 + roll(16); n > 0; n--) {
		uint64_t *p = SYS(sbrk(PAGE));
		page_is("new heap", p, 0, heap_pages);
		if (roll(4)) fill_page(p, heap_seed[heap_pages] = next_seed++);
		else heap_seed[heap_pages] = 0;
		heap_pages++;
	}
	if (heap_pages > 0) {
		int i = roll(heap_pages);
		page_is("heap", heap + (size_t)i * WORDS, heap_seed[i], i);
		fill_page(heap + (size_t)i * WORDS, heap_seed[i] = next_seed++);
	}
}

// ---- Children have a copy of everything as it was, change some of it, and
// leave their number in memory that is shared.

static uint64_t *common;
static uint32_t common_seed[SHARED];
static struct kid { pid_t pid; int page; uint32_t seed; } kids[KIDS];

static void check_everything(void) {
	for (int i = 0; i < SLOTS; i++) area_is(&areas[i], 0, areas[i].n);
	for (int i = 0; i < heap_pages; i++) page_is("heap", heap + (size_t)i * WORDS, heap_seed[i], i);
}

static void op_fork(void) {
	struct kid *k = &kids[roll(KIDS)];
	if (k->pid) {
		int st;
		CHECK(SYS(waitpid(k->pid, &st, 0)) == k->pid && WIFEXITED(st) && WEXITSTATUS(st) == 7, "child %d ended with %x", k->pid, st);
		common_seed[k->page] = k->seed;
		k->pid = 0;
		page_is("shared", common + (size_t)k->page * WORDS, k->seed, k->page);
	}
	k->page = roll(SHARED / KIDS) * KIDS + (k - kids); // no two children the same
	k->seed = next_seed++;
	int naps = roll(40);
	if ((k->pid = child()) != 0) return;
	for (int i = 0; i < 8; i++) op_write();
	op_empty();
	op_remap();
	nap_ms(naps);
	orphan_check();
	check_everything();
	fill_page(common + (size_t)k->page * WORDS, k->seed);
	_exit(7);
}

// ---- The stack: each round goes a bit deeper, works there and comes back.

static void work(void) {
	static void (*const op[])(void) = {op_map, op_map, op_unmap, op_remap, op_protect, op_empty, op_write, op_write, op_heap};
	for (int i = 0; i < OPS; i++, ops++) op[roll(sizeof op / sizeof *op)]();
	if (roll(4) == 0) op_fork();
	if (roll(100) == 0) check_everything();
	for (int i = 0, p = roll(SHARED); i < SHARED; i++, p = (p + 1) % SHARED) {
		bool busy = false;
		for (int k = 0; k < KIDS; k++) busy |= kids[k].pid && kids[k].page == p;
		if (busy) continue;
		page_is("shared", common + (size_t)p * WORDS, common_seed[p], p);
		break;
	}
	beat();
	nap_ms(3);
}

static __attribute__((noinline)) void deeper(int depth, uint64_t seed) {
	volatile uint64_t frame[WORDS - 32];
	for (int k = 0; k < WORDS - 32; k++) frame[k] = mix(seed, k, depth);
	if (depth == 0) work();
	else deeper(depth - 1, seed);
	for (int k = 0; k < WORDS - 32; k++) CHECK(frame[k] == mix(seed, k, depth), "stack frame %d, word %d changed", depth, k);
}

// What is not there at all says so, too: the areas around, and what the kernel has there.
static void on_segv(int sig, siginfo_t *si, void *context) {
	(void)sig, (void)context;
	static char text[900];
	uintptr_t at = (uintptr_t)si->si_addr;
	int n = 0;
	for (int i = 0; i < SLOTS; i++) {
		uintptr_t p = (uintptr_t)areas[i].p, page = (at - p) / PAGE;
		if (areas[i].n && at >= p && page < (uintptr_t)areas[i].n)
			n += snprintf(text + n, sizeof text - n, "page %lu of a mapping of %d at %lx, content %u, protection %d;", page, areas[i].n, p, areas[i].seed[page], areas[i].prot[page]);
	}
	FILE *f = fopen("/proc/self/maps", "re");
	for (char line[300]; f && n < 700 && fgets(line, sizeof line, f);) {
		uintptr_t a, b;
		if (sscanf(line, "%lx-%lx", &a, &b) == 2 && b + 64 * PAGE > at && a < at + 64 * PAGE) n += snprintf(text + n, sizeof text - n, " %.26s %.4s;", line, strchr(line, ' ') + 1);
	}
	fail("no access to %lx, code %d: %s", at, si->si_code, text);
}

COMMAND(churner) {
	static unsigned char stack[64 << 10];
	SYS(sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL));
	SYS(sigaction(SIGSEGV, &(struct sigaction){.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_ONSTACK}, NULL));
	most = (arg_count > 0 ? atoi(arg_values[0]) : 24) * 256;
	areas = SYS(mmap(NULL, SLOTS * sizeof *areas, RW, PA, -1, 0));
	common = SYS(mmap(NULL, SHARED * PAGE, RW, SA, -1, 0));
	// What the library takes from the heap is taken before ours begins.
	free(malloc(1 << 16));
	intptr_t odd = (intptr_t)SYS(sbrk(0)) % PAGE;
	if (odd) SYS(sbrk(PAGE - odd));
	heap = SYS(sbrk(0));
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	for (int round = 0; !stopping; round++) deeper(round % FRAMES, round);
	for (int i = 0; i < KIDS; i++) {
		int st;
		if (!kids[i].pid) continue;
		CHECK(SYS(waitpid(kids[i].pid, &st, 0)) == kids[i].pid && WIFEXITED(st) && WEXITSTATUS(st) == 7, "child %d ended with %x", kids[i].pid, st);
		common_seed[kids[i].page] = kids[i].seed;
	}
	for (int i = 0; i < SHARED; i++) page_is("shared", common + (size_t)i * WORDS, common_seed[i], i);
	for (int i = 0; i < SLOTS; i++) if (areas[i].n) protect(&areas[i], 0, areas[i].n, PROT_READ);
	check_everything();
	CHECK(ops > 0, "no work was done");
	(void)moves_refused;
}
