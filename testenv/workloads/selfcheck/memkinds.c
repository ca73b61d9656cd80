// Kinds of memory beyond those of an ordinary process.
#include "mem.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/uio.h>

#ifndef SYS_mseal
#define SYS_mseal 462 // Linux 6.10
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 // Linux 6.13
#endif

bool readable(const void *p) {
	char c;
	struct iovec to = {&c, 1}, from = {(void *)p, 1};
	ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
	CHECK(n == 1 || errno == EFAULT, "process_vm_readv: %s", strerror(errno));
	return n == 1;
}

void put(unsigned char *p, size_t len, uint64_t seed) {
	for (size_t i = 0; i < len; i++) p[i] = pattern(seed, i);
}

void same(const char *name, unsigned char *p, size_t from, size_t to, uint64_t seed) {
	for (size_t i = from; i < to; i++) CHECK(p[i] == pattern(seed, i), "%s: byte %zu is %02x, want %02x", name, i, p[i], pattern(seed, i));
}

static char *read_flags(const void *p) {
	FILE *f = fopen("/proc/self/smaps", "re");
	CHECK(f, "open smaps: %s", strerror(errno));
	static char line[4096];
	bool in = false;
	while (fgets(line, sizeof line, f)) {
		unsigned long a, b;
		if (sscanf(line, "%lx-%lx ", &a, &b) == 2) in = a <= (unsigned long)p && (unsigned long)p < b;
		else if (in && strncmp(line, "VmFlags:", 8) == 0) {
			fclose(f);
			// What is copied while it runs is under a userfaultfd, which only this file tells.
			char *uw = strstr(line + 8, " uw ");
			if (uw) memmove(uw, uw + 3, strlen(uw + 3) + 1);
			return line + 8;
		}
	}
	fclose(f);
	line[0] = 0;
	return line;
}

// Whoever is moved while reading may read nonsense: two readings must agree.
char *flags_of(const void *p) {
	static char last[4096];
	strcpy(last, "none yet");
	for (;;) {
		char *now = read_flags(p);
		if (strcmp(now, last) == 0) return now;
		strcpy(last, now);
	}
}

bool has_flag(const void *p, const char *flag) {
	char want[8];
	snprintf(want, sizeof want, " %s ", flag);
	return strstr(flags_of(p), want);
}

// ---- guards: guard regions at the start, in the middle and at the end of
// mappings, in memory that was used before, of many threads' stacks' shape, in a
// locked and a read-only mapping and in one of a file.

static unsigned char *guarded, *locked_guarded, *stacks, *file_guarded;
enum { GPAGES = 600, NSTACKS = 300, SPAGES = 4 };

static bool is_guard(int page) { return page < 2 || page >= GPAGES - 1 || page % 7 == 3 || (page >= 300 && page < 420); }

static void guards_check(void) {
	for (int i = 0; i < GPAGES; i++) {
		CHECK(readable(guarded + i * PAGE) == !is_guard(i), "page %d of guarded memory: readable is %d", i, is_guard(i));
		if (!is_guard(i)) same("guarded memory", guarded, i * PAGE + i % 64, (i * PAGE) + i % 64 + 64, 1);
	}
	for (int i = 0; i < NSTACKS; i++) {
		CHECK(!readable(stacks + i * SPAGES * PAGE), "stack %d has no guard page", i);
		CHECK(readable(stacks + (i * SPAGES + 1) * PAGE), "stack %d cannot be read", i);
		CHECK(stacks[(i * SPAGES + 3) * PAGE] == (unsigned char)i, "stack %d has other contents", i);
	}
	for (int i = 0; i < 4; i++) {
		CHECK(readable(locked_guarded + i * PAGE) == (i != 1), "page %d of locked memory", i);
		CHECK(readable(file_guarded + i * PAGE) == (i != 2), "page %d of mapped file", i);
		if (i != 2) same("mapped file", file_guarded, i * PAGE, (i + 1) * PAGE, 3);
	}
	CHECK(has_flag(locked_guarded, "lo"), "locked memory is no longer locked");
}

COMMAND(guards) {
	guarded = SYS(mmap(NULL, GPAGES * PAGE, RW, PA, -1, 0));
	put(guarded, GPAGES * PAGE, 1);
	for (int i = 0; i < GPAGES; i++)
		if (is_guard(i)) SYS(madvise(guarded + i * PAGE, PAGE, MADV_GUARD_INSTALL));
	stacks = SYS(mmap(NULL, NSTACKS * SPAGES * PAGE, RW, PA | MAP_NORESERVE, -1, 0));
	for (int i = 0; i < NSTACKS; i++) {
		SYS(madvise(stacks + i * SPAGES * PAGE, PAGE, MADV_GUARD_INSTALL));
		stacks[(i * SPAGES + 3) * PAGE] = i;
	}
	locked_guarded = SYS(mmap(NULL, 4 * PAGE, RW, PA, -1, 0));
	SYS(madvise(locked_guarded + PAGE, PAGE, MADV_GUARD_INSTALL));
	mlock(locked_guarded, 4 * PAGE); // cannot populate the guard region, but locks
	CHECK(has_flag(locked_guarded, "lo"), "mlock of a guarded mapping did not lock");
	int fd = SYS(open(path_of("data"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	unsigned char buf[4 * PAGE];
	put(buf, sizeof buf, 3);
	CHECK(SYS(write(fd, buf, sizeof buf)) == sizeof buf, "write data file");
	file_guarded = SYS(mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0));
	SYS(madvise(file_guarded + 2 * PAGE, PAGE, MADV_GUARD_INSTALL));
	close(fd);
	guards_check();
	loop(guards_check);
	for (int i = 0; i < GPAGES; i++)
		if (!is_guard(i)) same("guarded memory", guarded, i * PAGE, (i + 1) * PAGE, 1);
}

// ---- sealed: mappings under mseal, writable, read-only, and next to others.

static unsigned char *seals[3];

static void sealed_check(void) {
	for (int i = 0; i < 3; i++) {
		same("sealed memory", seals[i], 0, 4 * PAGE, 10 + i);
		CHECK(mprotect(seals[i], PAGE, PROT_NONE) == -1 && errno == EPERM, "sealed mapping %d can be protected: %s", i, strerror(errno));
		CHECK(munmap(seals[i], PAGE) == -1 && errno == EPERM, "sealed mapping %d can be unmapped", i);
	}
	seals[0][5]++;
	seals[0][5]--;
	// What lies behind the last one is not sealed.
	SYS(mprotect(seals[2] + 4 * PAGE, PAGE, RW));
	SYS(mprotect(seals[2] + 4 * PAGE, PAGE, PROT_READ));
}

COMMAND(sealed) {
	for (int i = 0; i < 3; i++) {
		seals[i] = SYS(mmap(NULL, 5 * PAGE, RW, PA, -1, 0));
		put(seals[i], 4 * PAGE, 10 + i);
		if (i == 1) SYS(mprotect(seals[i], 4 * PAGE, PROT_READ));
		SYS(syscall(SYS_mseal, seals[i], 4 * PAGE, 0));
	}
	loop(sealed_check);
}

// ---- sysvshm: System V segments with and without a key, removed while attached,
// attached twice, read-only, with protection changed in the middle, shared with
// a child, of another owner.

enum { KEYED, PRIVATE, REMOVED, OWNED, NSEGS };
static struct { int id, key; size_t size; unsigned char *p, *again; unsigned mode; unsigned long attached; } segs[NSEGS];
static pid_t sysv_child;

static void sysvshm_check(void) {
	static unsigned turn;
	turn++;
	for (int i = 0; i < NSEGS; i++) {
		struct shmid_ds d;
		SYS(shmctl(segs[i].id, IPC_STAT, &d));
		CHECK(d.shm_perm.mode == segs[i].mode, "segment %d has mode %o, want %o", i, d.shm_perm.mode, segs[i].mode);
		CHECK(d.shm_segsz == segs[i].size, "segment %d has %zu bytes", i, d.shm_segsz);
		CHECK(d.shm_nattch == segs[i].attached, "segment %d is attached %lu times, want %lu", i, d.shm_nattch, segs[i].attached);
		CHECK(d.shm_perm.__key == (i == REMOVED ? 0 : segs[i].key), "segment %d has key %x", i, d.shm_perm.__key);
		same("System V segment", segs[i].p, 8, segs[i].size, 20 + i);
	}
	struct shmid_ds d;
	SYS(shmctl(segs[OWNED].id, IPC_STAT, &d));
	CHECK(d.shm_perm.uid == 1234 && d.shm_perm.gid == 5678 && d.shm_perm.cuid == 4321, "owner is %u:%u, creator %u", d.shm_perm.uid, d.shm_perm.gid, d.shm_perm.cuid);
	CHECK(shmget(segs[KEYED].key, 0, 0) == segs[KEYED].id, "the key leads elsewhere");
	CHECK(!has_flag(segs[KEYED].again, "mw"), "the read-only attachment can be made writable");
	unsigned char c = turn;
	segs[KEYED].p[5] = c;
	CHECK(segs[KEYED].again[5] == c, "two attachments of one segment differ");
	CHECK(segs[PRIVATE].p[1] == 0 || segs[PRIVATE].p[1] == segs[PRIVATE].p[0], "the child answers %d to %d", segs[PRIVATE].p[1], segs[PRIVATE].p[0]);
	bool answered = segs[PRIVATE].p[1] != 0;
	if (answered) {
		segs[PRIVATE].p[1] = 0;
		segs[PRIVATE].p[0] = 1 + turn % 250;
	}
	static unsigned since;
	since = answered ? 0 : since + 1;
	CHECK(since < 500, "the child does not answer through its segment");
	expect_alive(sysv_child);
	// What was attached later goes on being detached and attached.
	void *p = SYS(shmat(segs[OWNED].id, NULL, SHM_RDONLY));
	SYS(shmdt(p));
}

COMMAND(sysvshm) {
	segs[KEYED].key = getpid() | 0x40000000;
	segs[KEYED].size = 10 * PAGE + 100;
	segs[PRIVATE].size = 40 * PAGE;
	segs[REMOVED].size = 3 * PAGE;
	segs[OWNED].size = 100;
	for (int i = 0; i < NSEGS; i++) {
		if (i == OWNED) SYS(seteuid(4321));
		segs[i].mode = 0600 + i;
		segs[i].id = SYS(shmget(segs[i].key, segs[i].size, IPC_CREAT | IPC_EXCL | segs[i].mode));
		if (i == OWNED) SYS(seteuid(0));
		segs[i].p = SYS(shmat(segs[i].id, NULL, 0));
		put(segs[i].p, segs[i].size, 20 + i);
		segs[i].attached = 2; // by the child too
	}
	segs[KEYED].again = SYS(shmat(segs[KEYED].id, NULL, SHM_RDONLY));
	// Three VMAs in each of two processes, and one in each of the second attachment.
	SYS(mprotect(segs[KEYED].p + 4 * PAGE, 2 * PAGE, PROT_READ));
	segs[KEYED].attached = 8;
	SYS(shmctl(segs[REMOVED].id, IPC_RMID, NULL));
	segs[REMOVED].mode |= 01000;
	struct shmid_ds d;
	SYS(shmctl(segs[OWNED].id, IPC_STAT, &d));
	d.shm_perm.uid = 1234;
	d.shm_perm.gid = 5678;
	SYS(shmctl(segs[OWNED].id, IPC_SET, &d));
	segs[PRIVATE].p[0] = segs[PRIVATE].p[1] = 0;
	segs[PRIVATE].p[0] = 1;
	sysv_child = child();
	if (sysv_child == 0) {
		for (volatile unsigned char *p = segs[PRIVATE].p;; nap_ms(1)) {
			orphan_check();
			if (!p[1] && p[0]) p[1] = p[0];
			same("System V segment of the child", segs[REMOVED].p, 0, segs[REMOVED].size, 20 + REMOVED);
		}
	}
	loop(sysvshm_check);
	end_child(sysv_child);
	for (int i = 0; i < NSEGS; i++)
		if (i != REMOVED) SYS(shmctl(segs[i].id, IPC_RMID, NULL));
}

// ---- devzero: private mappings of /dev/zero, which are anonymous memory.

static unsigned char *zeros[2];

static void devzero_check(void) {
	for (int i = 0; i < 8; i++) {
		if (i % 3) same("/dev/zero", zeros[0], i * PAGE, (i + 1) * PAGE, 30);
		else for (int j = 0; j < PAGE; j++) CHECK(zeros[0][i * PAGE + j] == 0, "page %d of /dev/zero: byte %d is not 0", i, j);
	}
	for (int j = 0; j < 4 * PAGE; j += 7) CHECK(zeros[1][j] == 0, "read-only /dev/zero: byte %d is not 0", j);
}

COMMAND(devzero) {
	int fd = SYS(open("/dev/zero", O_RDWR | O_CLOEXEC));
	zeros[0] = SYS(mmap(NULL, 8 * PAGE, RW, MAP_PRIVATE, fd, 0));
	zeros[1] = SYS(mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0));
	close(fd);
	for (int i = 0; i < 8; i++)
		if (i % 3) for (int j = 0; j < PAGE; j++) zeros[0][i * PAGE + j] = pattern(30, (uint64_t)i * PAGE + j);
	loop(devzero_check);
}

// ---- pasteof: mappings that reach past the end of their file, one of which
// was cut after pages of it had been changed.

static unsigned char *past[3];

static void pasteof_check(void) {
	for (int i = 0; i < 3; i++) {
		for (int k = 0; k < 10; k++) CHECK(readable(past[i] + k * PAGE) == (k < 3), "mapping %d, page %d past the end: readable is %d", i, k, k >= 3);
		same("mapping past the end", past[i], 0, 2 * PAGE + 100, 40 + i);
	}
}

COMMAND(pasteof) {
	for (int i = 0; i < 3; i++) {
		char name[8];
		snprintf(name, sizeof name, "data%d", i);
		int fd = SYS(open(path_of(name), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
		static unsigned char buf[5 * PAGE];
		put(buf, sizeof buf, 40 + i);
		CHECK(SYS(write(fd, buf, sizeof buf)) == sizeof buf, "write data file");
		past[i] = SYS(mmap(NULL, 10 * PAGE, RW, i == 1 ? MAP_SHARED : MAP_PRIVATE, fd, 0));
		if (i == 2) put(past[i] + PAGE, 3 * PAGE, 0), put(past[i], 5 * PAGE, 40 + i);
		SYS(ftruncate(fd, 2 * PAGE + 100));
		close(fd);
	}
	loop(pasteof_check);
}

// ---- locked: mlockall, which also locks what is inaccessible and past the end of a file.

static unsigned char *lock_none, *lock_past;

static void locked_check(void) {
	static int turn;
	if (turn++ % 20) return;
	int here;
	CHECK(has_flag(lock_none, "lo"), "inaccessible memory is no longer locked");
	CHECK(has_flag(lock_past, "lo"), "the mapping past the end is no longer locked");
	CHECK(has_flag(&here, "lo"), "the stack is no longer locked");
	CHECK(has_flag(&turn, "lo"), "data are no longer locked");
}

COMMAND(locked) {
	lock_none = SYS(mmap(NULL, 4 * PAGE, PROT_NONE, PA, -1, 0));
	int fd = SYS(open(path_of("data"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	lock_past = SYS(mmap(NULL, 4 * PAGE, PROT_READ, MAP_SHARED, fd, 0));
	close(fd);
	SYS(mlockall(MCL_CURRENT));
	loop(locked_check);
}

// ---- manyvmas: as many mappings as a process may have, and a reservation of
// 60 TiB with a little memory in it.

enum { MANY = 64000 };
static unsigned char *many, *vast;
static const uint64_t VAST = 60ull << 40;

static void manyvmas_check(void) {
	static int turn;
	turn++;
	for (int i = turn % 97; i < MANY; i += 97)
		CHECK(many[(size_t)i * PAGE] == (unsigned char)(i * 7 + 1), "mapping %d holds %d", i, many[(size_t)i * PAGE]);
	for (int i = 0; i < 10; i++) CHECK(*(uint64_t *)(vast + VAST / 10 * i) == 1000u + i, "reservation: word %d is %lu", i, *(uint64_t *)(vast + VAST / 10 * i));
	if (turn == 1 || stopping) {
		char perms[8];
		unsigned long a, b;
		int n = 0;
		FILE *f = fopen("/proc/self/maps", "re");
		char line[4096];
		while (fgets(line, sizeof line, f))
			if (sscanf(line, "%lx-%lx %7s", &a, &b, perms) == 3 && a >= (unsigned long)many && b <= (unsigned long)many + (size_t)MANY * PAGE) {
				CHECK(b - a == PAGE && perms[1] == ((a - (unsigned long)many) / PAGE % 2 ? 'w' : '-'), "mapping %s", line);
				n++;
			}
		fclose(f);
		CHECK(n == MANY, "%d mappings, want %d", n, MANY);
	}
}

COMMAND(manyvmas) {
	many = SYS(mmap(NULL, (size_t)MANY * PAGE, RW, PA, -1, 0));
	for (int i = 0; i < MANY; i++) {
		many[(size_t)i * PAGE] = i * 7 + 1;
		if (i % 2 == 0) SYS(mprotect(many + (size_t)i * PAGE, PAGE, PROT_READ));
	}
	vast = SYS(mmap(NULL, VAST, RW, PA | MAP_NORESERVE, -1, 0));
	SYS(madvise(vast, VAST, MADV_NOHUGEPAGE));
	for (int i = 0; i < 10; i++) *(uint64_t *)(vast + VAST / 10 * i) = 1000 + i;
	loop(manyvmas_check);
	manyvmas_check();
}

// ---- hugetlb: private anonymous memory of huge pages, with a hole, read-only in
// part, and a reservation that was never touched. It reserves the pages itself.

static unsigned char *huge[2];
static const char *const NR_HUGE = "/proc/sys/vm/nr_hugepages";
static long more_huge;

long nr_huge(long set) {
	long n = 0;
	FILE *f = fopen(NR_HUGE, set < 0 ? "re" : "we");
	CHECK(f, "open %s: %s", NR_HUGE, strerror(errno));
	if (set >= 0) fprintf(f, "%ld", set);
	else CHECK(fscanf(f, "%ld", &n) == 1, "read %s", NR_HUGE);
	CHECK(fclose(f) == 0, "this test needs huge pages: write %s: %s", NR_HUGE, strerror(errno));
	return n;
}

void reserve_huge(int pages) {
	more_huge = pages;
	long had = nr_huge(-1);
	nr_huge(had + pages);
	CHECK(nr_huge(-1) >= had + pages, "this test needs %d huge pages more; the machine gives %ld", pages, nr_huge(-1) - had);
}

// Others may have reserved some meanwhile.
void unreserve_huge(void) {
	long n = nr_huge(-1) - more_huge;
	nr_huge(n > 0 ? n : 0);
}

static void hugetlb_check(void) {
	static int turn;
	size_t from = (size_t)turn++ % 8 * (HUGE / 8);
	same("huge page", huge[0], from, from + HUGE / 8, 50);
	same("read-only huge page", huge[0], 2 * (size_t)HUGE + from, 2 * (size_t)HUGE + from + HUGE / 8, 50);
	for (int i = 0; i < 2; i++) CHECK(has_flag(huge[i], "ht"), "mapping %d has no huge pages any more", i);
	huge[0][0]++;
	huge[0][0]--;
}

COMMAND(hugetlb) {
	reserve_huge(6);
	for (int i = 0; i < 2; i++) huge[i] = SYS(mmap(NULL, 3 * (size_t)HUGE, RW, PA | MAP_HUGETLB, -1, 0));
	put(huge[0], HUGE, 50);
	for (size_t i = 2 * (size_t)HUGE; i < 3 * (size_t)HUGE; i++) huge[0][i] = pattern(50, i);
	SYS(mprotect(huge[0] + 2 * (size_t)HUGE, HUGE, PROT_READ));
	loop(hugetlb_check);
	for (size_t i = 0; i < HUGE; i++) CHECK(huge[0][HUGE + i] == 0, "hole between huge pages: byte %zu", i);
	for (size_t i = 0; i < 3 * (size_t)HUGE; i++) CHECK(huge[1][i] == 0, "untouched huge pages: byte %zu", i);
	for (int i = 0; i < 2; i++) SYS(munmap(huge[i], 3 * (size_t)HUGE));
	unreserve_huge();
}
