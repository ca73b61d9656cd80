// Mappings at the edges of what the kernel does.
#include "mem.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>

// ---- edges: memory at the lowest address, in the highest terabytes and nearly
// everywhere in between, reserved; a stack that grows downwards and still does; the
// exact break of the heap; stacks of threads.

static unsigned char *low, *reserved, *sprinkled, *growing, *grown_to;
static void *brk_was;
enum { GROW = 40 };
static const uint64_t RESERVED = 80ull << 40, SPRINKLED = 30ull << 40;

static void *stack_thread(void *arg) {
	unsigned char local[200 * PAGE / 4];
	for (size_t i = 0; i < sizeof local; i++) local[i] = pattern((uint64_t)arg, i);
	for (;; nap_ms(20))
		for (size_t i = 0; i < sizeof local; i++) CHECK(local[i] == pattern((uint64_t)arg, i), "stack of thread %lu: byte %zu", (uint64_t)arg, i);
}

static bool mapped(const void *p) { return flags_of(p)[0] != 0; }

static void edges_check(void) {
	static int turn;
	same("lowest memory", low, 0, 2 * PAGE, 400);
	for (uint64_t i = 0; i < 16; i++) CHECK(*(uint64_t *)(sprinkled + SPRINKLED / 16 * i) == 1000 + i, "reservation: word %lu is %lu", i, *(uint64_t *)(sprinkled + SPRINKLED / 16 * i));
	CHECK(sbrk(0) == brk_was, "the break is %p, was %p", sbrk(0), brk_was);
	for (unsigned char *p = grown_to; p < growing + 2 * PAGE; p += PAGE) CHECK(*p == (unsigned char)((uintptr_t)p / PAGE), "stack page %p holds %d", p, *p);
	if (turn % 25 == 0) {
		CHECK(!mapped(grown_to - PAGE), "memory below the stack");
		CHECK(has_flag(growing, "gd"), "the stack does not grow any more");
		CHECK(!readable(reserved + RESERVED / 2) && mapped(reserved) && mapped(reserved + RESERVED - PAGE), "the reservation is not what it was");
		if (grown_to > growing - GROW * PAGE) {
			grown_to -= PAGE;
			*grown_to = (uintptr_t)grown_to / PAGE;
		}
		// The break moves as before.
		char *top = SYS(sbrk(3 * PAGE + 5));
		CHECK(top == brk_was, "sbrk gives %p", top);
		memset(top, 7, 3 * PAGE + 5);
		SYS(sbrk(-(3 * PAGE + 5)));
	}
	turn++;
}

COMMAND(edges) {
	long min = 0;
	FILE *f = fopen("/proc/sys/vm/mmap_min_addr", "re");
	CHECK(f && fscanf(f, "%ld", &min) == 1, "read vm.mmap_min_addr");
	fclose(f);
	low = SYS(mmap((void *)min, 2 * PAGE, RW, PA | MAP_FIXED_NOREPLACE, -1, 0));
	put(low, 2 * PAGE, 400);
	reserved = SYS(mmap(NULL, RESERVED, PROT_NONE, PA | MAP_NORESERVE, -1, 0));
	sprinkled = SYS(mmap(NULL, SPRINKLED, RW, PA | MAP_NORESERVE, -1, 0));
	SYS(madvise(sprinkled, SPRINKLED, MADV_NOHUGEPAGE));
	for (uint64_t i = 0; i < 16; i++) *(uint64_t *)(sprinkled + SPRINKLED / 16 * i) = 1000 + i;
	// Far from what is below it: the kernel keeps a gap of 256 pages.
	grown_to = growing = SYS(mmap((void *)(32ull << 30), 2 * PAGE, RW, PA | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0));
	for (int i = 0; i < 2; i++) growing[i * PAGE] = (uintptr_t)(growing + i * PAGE) / PAGE;
	SYS(sbrk(4711));
	brk_was = sbrk(0);
	for (uintptr_t i = 0; i < 5; i++) spawn(stack_thread, (void *)(410 + i));
	loop(edges_check);
}

// ---- shmpart: System V segments of which parts were unmapped, others mapped into
// the holes, a part moved elsewhere by mremap.

static unsigned char *part[3], *shifted, *inside;
static int part_ids[3];

static void shmpart_check(void) {
	struct shmid_ds d;
	static const unsigned long attached[3] = {2, 1, 4};
	for (int i = 0; i < 3; i++) {
		SYS(shmctl(part_ids[i], IPC_STAT, &d));
		CHECK(d.shm_nattch == attached[i], "segment %d is attached %lu times, want %lu", i, d.shm_nattch, attached[i]);
	}
	same("ends of a segment", part[0], 0, 2 * PAGE, 430);
	same("ends of a segment", part[0], 6 * PAGE, 8 * PAGE, 430);
	same("segment in a hole", part[1], 0, 2 * PAGE, 431);
	same("memory in a hole", inside, 0, 2 * PAGE, 433);
	same("segment without its head", part[2], 4 * PAGE, 8 * PAGE, 432);
	for (int i = 0; i < 2 * PAGE; i++) CHECK(shifted[i] == pattern(432, i), "moved part: byte %d", i);
	CHECK(!readable(part[2] + 8 * PAGE) || !has_flag(part[2] + 8 * PAGE, "sh"), "what was unmapped is there");
	// Both parts are still one segment, and so are two attachments.
	unsigned char c = part[2][5 * PAGE];
	unsigned char *p = SYS(shmat(part_ids[2], NULL, 0));
	CHECK(p[5 * PAGE] == c && p[0] == shifted[0], "a new attachment shows something else");
	p[5 * PAGE] = c;
	SYS(shmdt(p));
	CHECK(!has_flag(part[2] + 5 * PAGE, "wr") && has_flag(part[2] + 4 * PAGE, "wr"), "protection of a part");
}

COMMAND(shmpart) {
	for (int i = 0; i < 3; i++) {
		size_t size = (i == 1 ? 2 : 8) * PAGE;
		part_ids[i] = SYS(shmget(IPC_PRIVATE, size, IPC_CREAT | 0600));
		if (i != 1) part[i] = SYS(shmat(part_ids[i], NULL, 0));
		if (i != 1) put(part[i], size, 430 + i);
	}
	SYS(munmap(part[0] + 2 * PAGE, 4 * PAGE));
	part[1] = SYS(shmat(part_ids[1], part[0] + 2 * PAGE, 0));
	put(part[1], 2 * PAGE, 431);
	inside = SYS(mmap(part[0] + 4 * PAGE, 2 * PAGE, RW, PA | MAP_FIXED_NOREPLACE, -1, 0));
	put(inside, 2 * PAGE, 433);
	unsigned char *room = SYS(mmap(NULL, 2 * PAGE, RW, PA, -1, 0));
	shifted = SYS(mremap(part[2], 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room));
	SYS(munmap(part[2] + 2 * PAGE, 2 * PAGE));
	SYS(mprotect(part[2] + 5 * PAGE, PAGE, PROT_READ));
	loop(shmpart_check);
	for (int i = 0; i < 3; i++) SYS(shmctl(part_ids[i], IPC_RMID, NULL));
}

// ---- posixshm: shared memory of shm_open(3), with and without its name, mapped by
// a child too, truncated, changed by write(2); and the memory of a memfd that nobody has
// open any more.

enum { NAMED, UNLINKED, GROWN, NSHM };
static unsigned char *shm[NSHM], *closed_memfd;
static int shm_fd;
static char shm_names[NSHM][64];
static pid_t shm_child;

static void posixshm_check(void) {
	static unsigned turn, since;
	turn++;
	for (int i = 0; i < NSHM; i++) same(shm_names[i], shm[i], 64, 8 * PAGE, 440 + i);
	same("closed memfd", closed_memfd, 64, 4 * PAGE, 450);
	unsigned char c = turn;
	SYS(pwrite(shm_fd, &c, 1, 7));
	CHECK(shm[GROWN][7] == c, "the mapping does not show what was written");
	struct stat st;
	SYS(fstat(shm_fd, &st));
	CHECK(st.st_size == 8 * PAGE + 100, "%ld bytes", st.st_size);
	volatile unsigned char *a = shm[UNLINKED], *b = closed_memfd;
	if (a[1] == a[0] && b[1] == b[0]) a[0]++, b[0]++, since = turn;
	CHECK(turn - since < 500, "the child does not answer");
	expect_alive(shm_child);
	char path[80];
	snprintf(path, sizeof path, "/dev/shm%s", shm_names[UNLINKED]);
	CHECK(access(path, F_OK) == -1, "the removed name is there");
}

COMMAND(posixshm) {
	for (int i = 0; i < NSHM; i++) {
		snprintf(shm_names[i], sizeof shm_names[i], "/selfcheck-%d-%d", getpid(), i);
		int fd = SYS(shm_open(shm_names[i], O_RDWR | O_CREAT | O_EXCL, 0600));
		SYS(ftruncate(fd, 8 * PAGE + (i == GROWN ? 100 : 0)));
		shm[i] = SYS(mmap(NULL, 9 * PAGE, RW, MAP_SHARED, fd, 0));
		put(shm[i], 8 * PAGE, 440 + i);
		memset(shm[i], 0, 64);
		if (i == UNLINKED) SYS(shm_unlink(shm_names[i]));
		if (i == GROWN) shm_fd = fd;
		else close(fd);
	}
	int fd = SYS(memfd_create("closed", 0));
	SYS(ftruncate(fd, 4 * PAGE));
	closed_memfd = SYS(mmap(NULL, 4 * PAGE, RW, MAP_SHARED, fd, 0));
	close(fd);
	put(closed_memfd, 4 * PAGE, 450);
	memset(closed_memfd, 0, 64);
	shm_child = child();
	if (shm_child == 0)
		for (volatile unsigned char *a = shm[UNLINKED], *b = closed_memfd;; nap_ms(1)) {
			orphan_check();
			a[1] = a[0], b[1] = b[0];
		}
	loop(posixshm_check);
	end_child(shm_child);
	SYS(shm_unlink(shm_names[NAMED])), SYS(shm_unlink(shm_names[GROWN]));
}
