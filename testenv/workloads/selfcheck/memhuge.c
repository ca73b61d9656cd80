// Huge pages of hugetlb that are shared or belong to files.
#include "mem.h"
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/shm.h>
#include <sys/stat.h>

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4u
#endif

// ---- hugeshared: shared anonymous huge pages, with a hole and with a child at the
// other end; a memfd of them that is mapped and sealed, one that is only open; a
// file on hugetlbfs, mapped shared, and private with a changed page; a deleted one.

enum { ANON, MEMFD, NAMED, CHANGED, GONE, MAPPED };
static unsigned char *hp[MAPPED];
static int sealed_fd, open_fd;
static pid_t huge_child;
static char *huge_dir;
static volatile unsigned char *ask;

static void hugeshared_check(void) {
	static unsigned turn, since;
	size_t from = (size_t)turn++ % 16 * (HUGE / 16), to = from + HUGE / 16;
	same("shared huge page", hp[ANON], from < 64 ? 64 : from, to, 90 + ANON);
	same("third shared huge page", hp[ANON], 2 * (size_t)HUGE + from, 2 * (size_t)HUGE + to, 90 + ANON);
	same("huge memfd", hp[MEMFD], from, to, 90 + MEMFD);
	same("huge file", hp[NAMED], from, to, 90 + NAMED);
	same("changed huge page", hp[CHANGED], from, to, 90 + CHANGED);
	same("unchanged huge page", hp[CHANGED], HUGE + from, HUGE + to, 90 + NAMED);
	same("deleted huge file", hp[GONE], from, to, 90 + GONE);
	for (int i = 0; i < MAPPED; i++) CHECK(has_flag(hp[i], "ht"), "mapping %d has no huge pages any more", i);
	unsigned char buf[256];
	CHECK(SYS(pread(open_fd, buf, sizeof buf, HUGE + from)) == sizeof buf, "read huge memfd");
	for (size_t i = 0; i < sizeof buf; i++) CHECK(buf[i] == pattern(95, from + i), "open huge memfd: byte %zu", from + i);
	CHECK(SYS(lseek(open_fd, 0, SEEK_CUR)) == 4711, "position of the huge memfd");
	struct stat st;
	SYS(fstat(open_fd, &st));
	CHECK(st.st_size == 3 * (off_t)HUGE && st.st_blksize == HUGE, "huge memfd of %ld bytes, blocks of %ld", st.st_size, st.st_blksize);
	CHECK(fcntl(sealed_fd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW), "seals are %#x", fcntl(sealed_fd, F_GET_SEALS));
	if (ask[1] == ask[0]) ask[0]++, since = turn;
	CHECK(turn - since < 500, "the child does not answer through shared huge pages");
	expect_alive(huge_child);
}

static void huge_put(unsigned char *p, uint64_t seed, int pages) { put(p, pages * (size_t)HUGE, seed); }

COMMAND(hugeshared) {
	reserve_huge(20);
	huge_dir = path_of("huge");
	SYS(mkdir(huge_dir, 0755));
	SYS(mount("none", huge_dir, "hugetlbfs", 0, "pagesize=2M"));
	hp[ANON] = SYS(mmap(NULL, 3 * (size_t)HUGE, RW, SA | MAP_HUGETLB, -1, 0));
	huge_put(hp[ANON], 90 + ANON, 1);
	for (size_t i = 2 * (size_t)HUGE; i < 3 * (size_t)HUGE; i++) hp[ANON][i] = pattern(90 + ANON, i);
	sealed_fd = SYS(memfd_create("selfcheck-huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB));
	SYS(ftruncate(sealed_fd, 2 * (off_t)HUGE));
	hp[MEMFD] = SYS(mmap(NULL, 2 * (size_t)HUGE, RW, MAP_SHARED, sealed_fd, 0));
	huge_put(hp[MEMFD], 90 + MEMFD, 1);
	SYS(fcntl(sealed_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	open_fd = SYS(memfd_create("selfcheck-open", MFD_HUGETLB));
	SYS(ftruncate(open_fd, 3 * (off_t)HUGE));
	unsigned char *p = SYS(mmap(NULL, HUGE, RW, MAP_SHARED, open_fd, HUGE));
	huge_put(p, 95, 1);
	SYS(munmap(p, HUGE));
	SYS(lseek(open_fd, 4711, SEEK_SET));
	for (int gone = 0; gone < 2; gone++) {
		char name[256];
		snprintf(name, sizeof name, "%s/%s", huge_dir, gone ? "gone" : "named");
		int fd = SYS(open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0644));
		SYS(ftruncate(fd, (2 - gone) * (off_t)HUGE));
		hp[gone ? GONE : NAMED] = p = SYS(mmap(NULL, (2 - gone) * (size_t)HUGE, RW, MAP_SHARED, fd, 0));
		for (int k = 0; k < 2 - gone; k++) huge_put(p + k * (size_t)HUGE, gone ? 90 + GONE : 90 + NAMED, 1);
		if (gone) SYS(unlink(name));
		else {
			hp[CHANGED] = SYS(mmap(NULL, 2 * (size_t)HUGE, RW, MAP_PRIVATE, fd, 0));
			huge_put(hp[CHANGED], 90 + CHANGED, 1);
			for (size_t i = HUGE; i < 2 * (size_t)HUGE; i++) CHECK(hp[CHANGED][i] == pattern(90 + NAMED, i - HUGE), "huge file");
			for (size_t i = HUGE; i < 2 * (size_t)HUGE; i++) p[i] = pattern(90 + NAMED, i);
		}
		close(fd);
	}
	ask = hp[ANON];
	ask[0] = ask[1] = 0;
	huge_child = child();
	if (huge_child == 0)
		for (;; nap_ms(1)) {
			orphan_check();
			ask[1] = ask[0];
			same("shared huge page of the child", hp[ANON], 64, 4096, 90 + ANON);
		}
	loop(hugeshared_check);
	end_child(huge_child);
	for (size_t i = 0; i < HUGE; i++) CHECK(hp[ANON][HUGE + i] == 0 && hp[MEMFD][HUGE + i] == 0, "hole in shared huge pages: byte %zu", i);
	for (int i = 0; i < MAPPED; i++) SYS(munmap(hp[i], (i == ANON ? 3 : i == GONE ? 1 : 2) * (size_t)HUGE));
	close(sealed_fd), close(open_fd);
	SYS(umount2(huge_dir, MNT_DETACH));
	unreserve_huge();
}

// ---- hugeshm: System V segments of huge pages, one of a size that is no multiple of
// theirs, one removed and with a part unmapped.

static unsigned char *hs[2];
static int hs_ids[2];

static void hugeshm_check(void) {
	static unsigned turn;
	size_t from = (size_t)turn++ % 16 * (HUGE / 16), to = from + HUGE / 16;
	same("huge segment", hs[0], from, to, 500);
	same("removed huge segment", hs[1], HUGE + from, HUGE + to, 501);
	for (int i = 0; i < 2; i++) {
		struct shmid_ds d;
		SYS(shmctl(hs_ids[i], IPC_STAT, &d));
		CHECK(d.shm_segsz == (i ? 2 * (size_t)HUGE : HUGE + 100), "huge segment of %zu bytes", d.shm_segsz);
		CHECK(d.shm_nattch == 1, "attached %lu times", d.shm_nattch);
		CHECK(has_flag(hs[i] + i * (size_t)HUGE, "ht"), "segment %d has no huge pages any more", i);
	}
	CHECK(hs[0][HUGE + 4711] == 0, "hole in a huge segment");
	CHECK(flags_of(hs[1])[0] == 0 || !has_flag(hs[1], "ht"), "what was unmapped is there");
}

COMMAND(hugeshm) {
	reserve_huge(6);
	for (int i = 0; i < 2; i++) {
		hs_ids[i] = SYS(shmget(IPC_PRIVATE, i ? 2 * (size_t)HUGE : HUGE + 100, IPC_CREAT | 0600 | SHM_HUGETLB));
		hs[i] = SYS(shmat(hs_ids[i], NULL, 0));
	}
	huge_put(hs[0], 500, 1);
	for (size_t i = HUGE; i < 2 * (size_t)HUGE; i++) hs[1][i] = pattern(501, i);
	SYS(munmap(hs[1], HUGE));
	SYS(shmctl(hs_ids[1], IPC_RMID, NULL));
	loop(hugeshm_check);
	SYS(shmctl(hs_ids[0], IPC_RMID, NULL));
	SYS(shmdt(hs[0]));
	SYS(munmap(hs[1] + HUGE, HUGE));
	unreserve_huge();
}
