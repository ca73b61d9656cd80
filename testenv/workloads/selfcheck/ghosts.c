// ghosts: files of every type whose name was removed, was never there, is
// hidden or leads to another file, and directories that are gone.
#include "selfcheck.h"
#include <dirent.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

enum { HOLES = 1 << 30, DATA = 70000 };
static const char acl[] = "\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x64\0\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x06\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
static struct stat was[64];
static uint64_t ghost_turn;

static void put(int fd, off_t at, size_t n, uint64_t seed) {
	unsigned char b[4096];
	for (size_t done = 0; done < n; done += sizeof b) {
		for (size_t i = 0; i < sizeof b; i++) b[i] = pattern(seed, at + done + i);
		size_t m = n - done < sizeof b ? n - done : sizeof b;
		CHECK(SYS(pwrite(fd, b, m, at + done)) == (ssize_t)m, "write");
	}
}

static void has(const char *what, int fd, off_t at, uint64_t seed) {
	unsigned char c;
	CHECK(SYS(pread(fd, &c, 1, at)) == 1 && c == pattern(seed, at), "%s: byte %ld is %02x", what, at, c);
}

static void same_stat(const char *what, int fd, bool times) {
	struct stat st, *w = &was[fd];
	SYS(fstat(fd, &st));
	CHECK(st.st_mode == w->st_mode && st.st_uid == w->st_uid && st.st_gid == w->st_gid, "%s: mode %o, owner %d:%d; were %o, %d:%d",
	      what, st.st_mode, st.st_uid, st.st_gid, w->st_mode, w->st_uid, w->st_gid);
	CHECK(st.st_nlink == w->st_nlink || S_ISDIR(st.st_mode), "%s: %lu names, had %lu", what, st.st_nlink, w->st_nlink);
	CHECK(S_ISDIR(st.st_mode) || st.st_size == w->st_size, "%s: %ld bytes, had %ld", what, st.st_size, w->st_size);
	CHECK(st.st_rdev == w->st_rdev, "%s: another device", what);
	CHECK(st.st_blocks <= w->st_blocks + 64, "%s: %ld blocks, had %ld", what, st.st_blocks, w->st_blocks);
	if (times)
		CHECK(st.st_mtim.tv_sec == w->st_mtim.tv_sec && st.st_mtim.tv_nsec == w->st_mtim.tv_nsec, "%s: modified at %ld.%09ld, was %ld.%09ld", what,
		      st.st_mtim.tv_sec, st.st_mtim.tv_nsec, w->st_mtim.tv_sec, w->st_mtim.tv_nsec);
}

static void is_link(int fd, const char *want) {
	char p[64], b[4096] = {0};
	snprintf(p, sizeof p, "/proc/self/fd/%d", fd);
	SYS(readlink(p, b, sizeof b - 1));
	CHECK(strcmp(b, want) == 0, "fd %d leads to %s, want %s", fd, b, want);
}

static char *deleted_path(const char *name) {
	static char b[4096];
	snprintf(b, sizeof b, "%s (deleted)", path_of(name));
	return b;
}

static void ghosts_check(void) {
	recheck();
	for (int i = 20; i <= 32; i++) same_stat("file without a name", i, i != 21 && i != 30);
	has("sparse file", 20, ghost_turn * 977 % DATA, 1);
	has("sparse file", 20, HOLES / 2 + ghost_turn * 31 % 4096, 1);
	CHECK(SYS(lseek(20, DATA + 8192, SEEK_DATA)) == HOLES / 2, "the hole ends at %ld", lseek(20, DATA + 8192, SEEK_DATA));
	SYS(lseek(20, 555, SEEK_SET));
	char v[256];
	ssize_t n = SYS(fgetxattr(20, "user.colour", v, sizeof v));
	CHECK(n == 4 && memcmp(v, "blue", 4) == 0, "extended attribute is %.*s", (int)n, v);
	n = SYS(fgetxattr(20, "system.posix_acl_access", v, sizeof v));
	CHECK(n == sizeof acl - 1 && memcmp(v, acl, n) == 0, "the access control list has %zd bytes, or other ones", n);
	CHECK(SYS(pwrite(21, "xyz", 3, ghost_turn % 1000)) == 3, "write");
	is_link(22, deleted_path("tree/a/b"));
	is_link(23, deleted_path("tree/a/b/file"));
	is_link(27, deleted_path("symlink"));
	is_link(29, deleted_path("null"));
	char b[64] = {0};
	CHECK(readlinkat(27, "", b, sizeof b - 1) == 11 && strcmp(b, "some/target") == 0, "the symlink leads to %s", b);
	CHECK(SYS(read(29, b, 8)) == 0 && SYS(write(29, b, 8)) == 8, "a deleted node of /dev/null");
	char cwd[4096];
	CHECK(syscall(SYS_getcwd, cwd, sizeof cwd) < 0 && errno == ENOENT, "a working directory that is gone has the name %s", cwd);
	char p[4096] = {0};
	SYS(readlink("/proc/self/fd/30", p, sizeof p - 1)); // by its other name once it was restored
	CHECK(strcmp(p, path_of("linked-other")) == 0 || strcmp(p, deleted_path("linked")) == 0, "a file with one name left leads to %s", p);
	is_link(31, path_of("replaced.new"));
	// Both lead to one file: what one writes the other sees.
	CHECK(SYS(pwrite(30, &ghost_turn, 8, 100)) == 8, "write");
	int fd = SYS(open(path_of("linked-other"), O_RDONLY | O_CLOEXEC));
	uint64_t got;
	CHECK(SYS(pread(fd, &got, 8, 100)) == 8 && got == ghost_turn, "the other name of a file leads to another file");
	close(fd);
	has("file that was replaced", 32, ghost_turn % 5000, 7);
	CHECK(access(path_of("tree"), F_OK) < 0, "a directory that is gone is there again");
	CHECK(SYS(read(33, b, sizeof b)) == 4 && memcmp(b, "kept", 4) == 0 && SYS(write(33, "kept", 4)) == 4, "a fifo whose directory is gone");
	ghost_turn++;
}

COMMAND(ghosts) {
	char *f = path_of("sparse");
	at_fd(20, SYS(open(f, O_RDWR | O_CREAT | O_EXCL, 0644)));
	put(20, 0, DATA, 1);
	put(20, HOLES / 2, 4096, 1);
	SYS(ftruncate(20, HOLES));
	SYS(fsetxattr(20, "user.colour", "blue", 4, 0));
	SYS(fsetxattr(20, "system.posix_acl_access", acl, sizeof acl - 1, 0));
	SYS(fchown(20, 1234, 4321));
	SYS(lseek(20, 555, SEEK_SET));
	SYS(unlink(f));
	at_fd(21, SYS(open(path_of("written"), O_RDWR | O_CREAT | O_EXCL, 0600)));
	put(21, 0, 5000, 2);
	SYS(unlink(path_of("written")));
	// A directory, a file in it and the working directory, all gone with two levels above.
	SYS(mkdir(path_of("tree"), 0755));
	SYS(mkdir(path_of("tree/a"), 0755));
	SYS(mkdir(path_of("tree/a/b"), 0701));
	SYS(mkdir(path_of("tree/a/c"), 0700));
	at_fd(22, SYS(open(path_of("tree/a/b"), O_RDONLY | O_DIRECTORY)));
	at_fd(23, SYS(open(path_of("tree/a/b/file"), O_RDONLY | O_CREAT | O_EXCL, 0644)));
	at_fd(24, SYS(open(path_of("tree/a/only-path"), O_RDWR | O_CREAT | O_EXCL, 0644)));
	int fd = SYS(open(path_of("tree/a/only-path"), O_PATH));
	at_fd(25, fd);
	SYS(chdir(path_of("tree/a/c")));
	// The prefix may be relative: everything below goes by names from before.
	char *names[] = {"tree/a/b/file", "tree/a/only-path", NULL};
	for (char **p = names; *p; p++) SYS(unlink(path_of(*p)));
	SYS(rmdir(path_of("tree/a/b")));
	SYS(rmdir(path_of("tree/a/c")));
	SYS(rmdir(path_of("tree/a")));
	SYS(rmdir(path_of("tree")));
	char *dir = strdup(prefix), *slash = strrchr(dir, '/');
	if (slash) *slash = 0;
	at_fd(26, SYS(open(dir, O_TMPFILE | O_RDWR | O_EXCL, 0640)));
	put(26, 0, 100, 3);
	SYS(symlink("some/target", path_of("symlink")));
	at_fd(27, SYS(open(path_of("symlink"), O_PATH | O_NOFOLLOW)));
	SYS(unlink(path_of("symlink")));
	SYS(mkfifo(path_of("pipe"), 0600));
	at_fd(28, SYS(open(path_of("pipe"), O_PATH)));
	SYS(unlink(path_of("pipe")));
	SYS(mknod(path_of("null"), S_IFCHR | 0666, makedev(1, 3)));
	at_fd(29, SYS(open(path_of("null"), O_RDWR)));
	SYS(unlink(path_of("null")));
	at_fd(30, SYS(open(path_of("linked"), O_RDWR | O_CREAT | O_EXCL, 0644)));
	put(30, 0, 5000, 5);
	SYS(link(path_of("linked"), path_of("linked-other")));
	SYS(unlink(path_of("linked")));
	at_fd(31, SYS(open(path_of("replaced.new"), O_RDONLY | O_CREAT | O_EXCL, 0644)));
	// As editors and package managers do it.
	at_fd(32, SYS(open(path_of("replaced"), O_RDWR | O_CREAT | O_EXCL, 0644)));
	put(32, 0, 5001, 7);
	SYS(unlink(path_of("replaced")));
	close(SYS(open(path_of("replaced"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)));
	SYS(mkdir(path_of("fifos"), 0700));
	SYS(mkfifo(path_of("fifos/p"), 0600));
	at_fd(33, SYS(open(path_of("fifos/p"), O_RDWR | O_NONBLOCK)));
	SYS(unlink(path_of("fifos/p")));
	SYS(rmdir(path_of("fifos")));
	CHECK(SYS(write(33, "kept", 4)) == 4, "write");
	remember("fifo without a name", 33);
	for (int i = 20; i <= 32; i++) {
		SYS(fstat(i, &was[i]));
		remember("file without a name", i);
	}
	loop(ghosts_check);
}

// ---- linkremap: files with names that nobody finds

static void *lost_map;

static void linkremap_check(void) {
	recheck();
	struct stat st;
	for (int i = 20; i <= 22; i++) {
		SYS(fstat(i, &st));
		CHECK(st.st_ino == was[i].st_ino, "fd %d is another file", i);
		CHECK(st.st_nlink == was[i].st_nlink, "fd %d has %lu names, had %lu", i, st.st_nlink, was[i].st_nlink);
	}
	for (int i = 20; i <= 21; i++) has("file with hidden names", i, ghost_turn % 5000, 9);
	CHECK(*(unsigned char *)lost_map == pattern(9, 0), "mapping of a file with hidden names");
	CHECK(SYS(lseek(20, 0, SEEK_CUR)) == 777, "offset is %ld", lseek(20, 0, SEEK_CUR));
	char b[8] = {0};
	CHECK(SYS(write(22, "fifo", 4)) == 4 && SYS(read(22, b, 4)) == 4 && strcmp(b, "fifo") == 0, "fifo with a hidden name");
	DIR *d = opendir(path_of("here"));
	CHECK(d, "open the directory");
	for (struct dirent *e; (e = readdir(d));) CHECK(e->d_name[0] == '.', "%s was left behind", e->d_name);
	closedir(d);
	ghost_turn++;
}

COMMAND(linkremap) {
	SYS(mkdir(path_of("here"), 0755));
	SYS(mkdir(path_of("hidden"), 0755));
	at_fd(20, SYS(open(path_of("here/file"), O_RDWR | O_CREAT | O_EXCL, 0644)));
	put(20, 0, 5000, 9);
	SYS(lseek(20, 777, SEEK_SET));
	at_fd(21, SYS(open(path_of("here/file"), O_RDONLY | O_CLOEXEC)));
	lost_map = SYS(mmap(NULL, 4096, PROT_READ, MAP_SHARED, 20, 0));
	SYS(mkfifo(path_of("here/pipe"), 0600));
	at_fd(22, SYS(open(path_of("here/pipe"), O_RDWR)));
	SYS(link(path_of("here/file"), path_of("hidden/file")));
	SYS(link(path_of("here/pipe"), path_of("hidden/pipe")));
	SYS(unlink(path_of("here/file")));
	SYS(unlink(path_of("here/pipe")));
	SYS(mount("none", path_of("hidden"), "tmpfs", 0, "size=64k"));
	for (int i = 20; i <= 22; i++) {
		SYS(fstat(i, &was[i]));
		remember("file with hidden names", i);
	}
	loop(linkremap_check);
	SYS(umount2(path_of("hidden"), MNT_DETACH));
	struct stat st;
	SYS(stat(path_of("hidden/file"), &st));
	CHECK(st.st_ino == was[20].st_ino, "the name that was hidden leads to another file");
}
