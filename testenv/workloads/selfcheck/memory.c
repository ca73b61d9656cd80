// Every kind of mapping of an ordinary process.
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>

enum { PAGE = 4096, MAXREGIONS = 32 };

struct region {
	const char *name;
	unsigned char *p;
	size_t len;
	const char *perms; // of /proc/self/maps
	const char *flag;  // one of VmFlags of smaps, or NULL
	// want returns the byte that must be there.
	unsigned char (*want)(uint64_t seed, uint64_t i);
	uint64_t seed;
	bool unreadable;
};

static struct region regions[MAXREGIONS];
static int nregions;

static void add(const char *name, void *p, size_t len, const char *perms, const char *flag,
		unsigned char (*want)(uint64_t, uint64_t), uint64_t seed) {
	CHECK(p != MAP_FAILED, "map %s: %s", name, strerror(errno));
	regions[nregions++] = (struct region){name, p, len, perms, flag, want, seed, perms[0] == '-'};
}

static void fill(unsigned char *p, size_t len, unsigned char (*want)(uint64_t, uint64_t), uint64_t seed) {
	for (size_t i = 0; i < len; i++) p[i] = want(seed, i);
}

static unsigned char holes(uint64_t seed, uint64_t i) { return i / PAGE % 3 ? 0 : pattern(seed, i); }

// Every fourth page was changed after mapping, the others are the file's.
static unsigned char changed(uint64_t seed, uint64_t i) { return pattern(i / PAGE % 4 ? seed : seed + 1000, i); }

static void check_region(struct region *r) {
	// A stride that is no multiple of anything visits all bytes in some rounds.
	static unsigned start;
	start = (start + 1) % 61;
	for (size_t i = start; i < r->len; i += 61)
		CHECK(r->p[i] == r->want(r->seed, i), "%s: byte %zu is %02x, want %02x", r->name, i, r->p[i], r->want(r->seed, i));
}

// check_maps compares protection and flags of every region with smaps.
static void check_maps(void) {
	FILE *f = fopen("/proc/self/smaps", "re");
	CHECK(f, "open smaps: %s", strerror(errno));
	bool found[MAXREGIONS] = {false}, flagged[MAXREGIONS] = {false};
	char line[4096], perms[8];
	unsigned long lo = 0, hi = 0;
	while (fgets(line, sizeof line, f)) {
		unsigned long a, b;
		if (sscanf(line, "%lx-%lx %7s", &a, &b, perms) == 3) {
			lo = a;
			hi = b;
			for (int i = 0; i < nregions; i++) {
				unsigned long p = (unsigned long)regions[i].p;
				if (p >= hi || p + regions[i].len <= lo) continue;
				found[i] = true;
				CHECK(strcmp(perms, regions[i].perms) == 0, "%s: protection is %s, want %s", regions[i].name, perms, regions[i].perms);
			}
		} else if (strncmp(line, "VmFlags:", 8) == 0) {
			for (int i = 0; i < nregions; i++) {
				unsigned long p = (unsigned long)regions[i].p;
				if (p >= hi || p + regions[i].len <= lo || !regions[i].flag) continue;
				char want[8];
				snprintf(want, sizeof want, " %s ", regions[i].flag);
				CHECK(strstr(line, want), "%s: flag %s is missing in %s", regions[i].name, regions[i].flag, line);
				flagged[i] = true;
			}
		}
	}
	fclose(f);
	for (int i = 0; i < nregions; i++) {
		CHECK(found[i], "%s: no longer mapped", regions[i].name);
		CHECK(flagged[i] || !regions[i].flag, "%s: no flags", regions[i].name);
	}
}

struct shared { volatile uint64_t ask, answer; unsigned char bytes[16 * PAGE]; };
static struct shared *shared;
static volatile uint64_t *live_a, *live_b; // two private counters that go together
static unsigned char *file_shared;
static int file_shared_fd;
static int (*jit)(void);
static pid_t vma_child;

static void vma_check(void) {
	static int turn;
	turn++;
	struct region *r = &regions[turn % nregions];
	if (!r->unreadable) check_region(r);
	CHECK(*live_a == *live_b, "private counters are %lu and %lu", *live_a, *live_b);
	++*live_a;
	++*live_b;
	CHECK(jit() == 4711, "generated code returned %d", jit());
	// The child answers within five seconds, however often we are frozen.
	if (shared->answer == shared->ask) shared->ask++;
	static int64_t since;
	static uint64_t last;
	if (shared->answer != last || since == 0) {
		last = shared->answer;
		since = turn;
	}
	CHECK(turn - since < 500, "shared memory: the child does not answer %lu", shared->ask);
	// What is written through a shared mapping is in the file.
	unsigned char c = turn, got;
	file_shared[PAGE + 5] = c;
	CHECK(SYS(pread(file_shared_fd, &got, 1, PAGE + 5)) == 1 && got == c, "shared file mapping: file has %02x, memory %02x", got, c);
	if (turn % 50 == 0) {
		check_maps();
		expect_alive(vma_child);
	}
}

static int data_file(const char *suffix, size_t len, uint64_t seed) {
	int fd = SYS(open(path_of(suffix), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	unsigned char *buf = malloc(len);
	fill(buf, len, pattern, seed);
	CHECK(SYS(write(fd, buf, len)) == (ssize_t)len, "write data file");
	free(buf);
	return fd;
}

COMMAND(vma) {
	const int RW = PROT_READ | PROT_WRITE, PA = MAP_PRIVATE | MAP_ANONYMOUS, SA = MAP_SHARED | MAP_ANONYMOUS;
	unsigned char *p;
	// Guard gaps keep neighbours from being merged: each is mapped alone.
	p = SYS(mmap(NULL, 8 << 20, RW, PA, -1, 0));
	fill(p, 8 << 20, pattern, 1);
	add("anonymous", p, 8 << 20, "rw-p", NULL, pattern, 1);

	p = SYS(mmap(NULL, 300 * PAGE, RW, PA | MAP_NORESERVE, -1, 0));
	for (int i = 0; i < 300; i += 3) fill(p + i * PAGE, PAGE, pattern, 0);
	for (int i = 0; i < 300; i += 3) for (int j = 0; j < PAGE; j++) p[i * PAGE + j] = pattern(2, (uint64_t)i * PAGE + j);
	add("anonymous with holes", p, 300 * PAGE, "rw-p", NULL, holes, 2);

	p = SYS(mmap(NULL, 4 << 20, RW, PA, -1, 0));
	madvise(p, 4 << 20, MADV_HUGEPAGE);
	fill(p, 4 << 20, pattern, 3);
	add("huge pages", p, 4 << 20, "rw-p", NULL, pattern, 3);

	int fd = data_file("data", 64 * PAGE, 4);
	p = SYS(mmap(NULL, 64 * PAGE, RW, MAP_PRIVATE, fd, 0));
	for (int i = 0; i < 64; i += 4) for (int j = 0; j < PAGE; j++) p[i * PAGE + j] = pattern(1004, (uint64_t)i * PAGE + j);
	add("private file, changed", p, 64 * PAGE, "rw-p", NULL, changed, 4);
	p = SYS(mmap(NULL, 64 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0));
	add("private file, read-only", p, 64 * PAGE, "r--p", NULL, pattern, 4);
	close(fd);

	file_shared_fd = data_file("shared", 32 * PAGE, 5);
	file_shared = SYS(mmap(NULL, 32 * PAGE, RW, MAP_SHARED, file_shared_fd, 0));
	add("shared file", file_shared + 2 * PAGE, 30 * PAGE, "rw-s", NULL, pattern, 0);
	fill(file_shared + 2 * PAGE, 30 * PAGE, pattern, 0);

	shared = SYS(mmap(NULL, sizeof *shared, RW, SA, -1, 0));
	fill(shared->bytes, sizeof shared->bytes, pattern, 6);
	add("shared anonymous", shared->bytes, sizeof shared->bytes, "rw-s", NULL, pattern, 6);

	fd = SYS(memfd_create("selfcheck", MFD_CLOEXEC));
	SYS(ftruncate(fd, 40 * PAGE));
	p = SYS(mmap(NULL, 40 * PAGE, RW, MAP_SHARED, fd, 0));
	fill(p, 40 * PAGE, pattern, 7);
	add("memfd", p, 40 * PAGE, "rw-s", NULL, pattern, 7);
	p = SYS(mmap(NULL, 40 * PAGE, RW, MAP_PRIVATE, fd, 0));
	for (int i = 0; i < 40; i += 4) for (int j = 0; j < PAGE; j++) p[i * PAGE + j] = pattern(1007, (uint64_t)i * PAGE + j);
	add("private memfd, changed", p, 40 * PAGE, "rw-p", NULL, changed, 7);
	close(fd);

	p = SYS(sbrk(1 << 20));
	fill(p, 1 << 20, pattern, 8);
	add("brk", p, 1 << 20, "rw-p", NULL, pattern, 8);

	p = SYS(mmap(NULL, 20 * PAGE, RW, PA, -1, 0));
	fill(p, 20 * PAGE, pattern, 9);
	SYS(mprotect(p, 20 * PAGE, PROT_READ));
	add("made read-only", p, 20 * PAGE, "r--p", NULL, pattern, 9);

	p = SYS(mmap(NULL, 20 * PAGE, RW, PA, -1, 0));
	fill(p, 20 * PAGE, pattern, 10);
	SYS(mprotect(p, 20 * PAGE, PROT_NONE));
	add("made inaccessible", p, 20 * PAGE, "---p", NULL, pattern, 10);

	p = SYS(mmap(NULL, PAGE, RW, PA, -1, 0));
	memcpy(p, "\xb8\x67\x12\x00\x00\xc3", 6); // mov $4711, %eax; ret
	SYS(mprotect(p, PAGE, PROT_READ | PROT_EXEC));
	jit = (int (*)(void))p;

	p = SYS(mmap(NULL, 8 * PAGE, RW, PA, -1, 0));
	fill(p, 8 * PAGE, pattern, 11);
	SYS(madvise(p, 8 * PAGE, MADV_DONTFORK));
	add("not inherited", p, 8 * PAGE, "rw-p", "dc", pattern, 11);
	p = SYS(mmap(NULL, 8 * PAGE, RW, PA, -1, 0));
	fill(p, 8 * PAGE, pattern, 12);
	SYS(madvise(p, 8 * PAGE, MADV_DONTDUMP));
	add("not in core files", p, 8 * PAGE, "rw-p", "dd", pattern, 12);
	p = SYS(mmap(NULL, 8 * PAGE, RW, PA, -1, 0));
	fill(p, 8 * PAGE, pattern, 13);
	SYS(mlock(p, 8 * PAGE));
	add("locked", p, 8 * PAGE, "rw-p", "lo", pattern, 13);

	p = SYS(mmap(NULL, 2 * PAGE, RW, PA, -1, 0));
	live_a = (void *)p;
	live_b = (void *)(p + PAGE);

	// The child has copied pages of its own, and others that are still common.
	vma_child = child();
	if (vma_child == 0) {
		unsigned char *a = regions[0].p;
		for (int i = 0; i < 1 << 20; i++) a[i] = pattern(77, i);
		for (uint64_t n = 0;; n++) {
			orphan_check();
			if (shared->answer != shared->ask) shared->answer = shared->ask;
			size_t i = n * 977 % (8 << 20);
			unsigned char want = i < 1 << 20 ? pattern(77, i) : pattern(1, i);
			CHECK(a[i] == want, "child: byte %zu is %02x, want %02x", i, a[i], want);
			nap_ms(1);
		}
	}
	check_maps();
	loop(vma_check);
	for (int i = 0; i < nregions; i++) {
		if (regions[i].unreadable) SYS(mprotect(regions[i].p, regions[i].len, PROT_READ));
		for (size_t j = 0; j < regions[i].len; j++)
			CHECK(regions[i].p[j] == regions[i].want(regions[i].seed, j), "%s: byte %zu is %02x", regions[i].name, j, regions[i].p[j]);
	}
	end_child(vma_child);
}

// ---- stack: 4 MiB of patterned frames below the loop; they are checked on
// the way up, and the stack can still grow.

static __attribute__((noinline)) int dig(int depth, void (*bottom)(void)) {
	volatile unsigned char frame[4000];
	for (int i = 0; i < 4000; i++) frame[i] = pattern(depth, i);
	int n = depth == 0 ? (bottom(), 0) : dig(depth - 1, bottom) + 1;
	for (int i = 0; i < 4000; i++) CHECK(frame[i] == pattern(depth, i), "stack frame %d, byte %d changed", depth, i);
	return n;
}

static void nothing(void) {}
static void stack_check(void) {
	static int turn;
	if (turn++ % 20 == 0) CHECK(dig(200, nothing) == 200, "recursion miscounted");
}
static void stack_loop(void) { loop(stack_check); }

COMMAND(stack) {
	CHECK(dig(1024, stack_loop) == 1024, "recursion miscounted");
	CHECK(dig(1400, nothing) == 1400, "the stack no longer grows");
}

// ---- mem MIB [RATE]: a large memory of which RATE pages a second are
// rewritten. Each page carries its number and a version that only grows, in
// three places. Records come every millisecond, for an observer of the freeze.

struct page { uint64_t version, number, words[508], mirror, check; };
static struct page *pages;
static uint64_t npages, rate, *versions;

static void check_page(uint64_t i) {
	struct page *p = &pages[i];
	CHECK(p->version == versions[i], "page %lu has version %lu, want %lu", i, p->version, versions[i]);
	CHECK(p->number == i && p->mirror == p->version && p->check == (p->version ^ i * 0x9E3779B97F4A7C15u),
		"page %lu is torn", i);
	CHECK(p->words[i % 508] == i + 1, "page %lu: word %lu is %lu", i, i % 508, p->words[i % 508]);
}

static void write_page(uint64_t i, uint64_t version) {
	struct page *p = &pages[i];
	p->version = p->mirror = versions[i] = version;
	p->number = i;
	p->check = version ^ i * 0x9E3779B97F4A7C15u;
	p->words[i % 508] = i + 1;
}

COMMAND(mem) {
	npages = (arg_count > 0 ? strtoul(arg_values[0], NULL, 10) : 64) * 256;
	rate = arg_count > 1 ? strtoul(arg_values[1], NULL, 10) : 0;
	pages = SYS(mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	versions = calloc(npages, sizeof *versions);
	for (uint64_t i = 0; i < npages; i++) write_page(i, 1);
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	uint64_t x = 1, at = 0, done = 0;
	int64_t t0 = now_ns();
	while (!stopping) {
		for (int i = 0; i < 16; i++) check_page(at = (at + 1) % npages);
		uint64_t due = (now_ns() - t0) / 1000 * rate / 1000000;
		for (int i = 0; done < due && i < 1000; i++, done++) {
			x = x * 6364136223846793005u + 1442695040888963407u;
			uint64_t n = (x >> 33) % npages;
			check_page(n);
			write_page(n, versions[n] + 1);
		}
		if (done < due) done = due; // a pause is not made up for
		beat();
		nap_ms(1);
	}
	for (uint64_t i = 0; i < npages; i++) check_page(i);
}
