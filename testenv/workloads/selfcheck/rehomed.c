// Files that are elsewhere after a move: what a program sees of its descriptors
// stays as it was, whatever stands behind them.
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/stat.h>

// How the descriptors of rehomed and its child share: as kcmp(2) says.
enum { READ = 10, APPEND = 11, BOTH = 12, DUP = 13 };
static const struct {
	int fd, flags;
	off_t pos;
} wanted[] = {{READ, O_RDONLY, 0}, {BOTH, O_RDWR, 100}};
static pid_t rehomed_child;
static bool content, writes;
static const unsigned char *mapped;

static bool same_file(pid_t a, int x, pid_t b, int y) {
	return SYS(syscall(SYS_kcmp, a, b, 0 /* KCMP_FILE */, x, y)) == 0;
}

static void check_rehomed(void) {
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		int fl = SYS(fcntl(wanted[i].fd, F_GETFL)) & ~0100000; // O_LARGEFILE, which the kernel adds
		CHECK(fl == wanted[i].flags, "fd %d: flags are %o, want %o", wanted[i].fd, fl, wanted[i].flags);
		off_t at = lseek(wanted[i].fd, 0, SEEK_CUR);
		CHECK(at == wanted[i].pos || !content, "fd %d: at %ld, want %ld", wanted[i].fd, at, wanted[i].pos);
		CHECK(same_file(getpid(), wanted[i].fd, rehomed_child, wanted[i].fd), "fd %d is not shared with the child", wanted[i].fd);
	}
	int fl = SYS(fcntl(APPEND, F_GETFL)) & ~0100000; // O_LARGEFILE, which the kernel adds
	CHECK(fl == (O_WRONLY | O_APPEND), "fd %d: flags are %o", APPEND, fl);
	CHECK(SYS(fcntl(DUP, F_GETFD)) == FD_CLOEXEC && SYS(fcntl(APPEND, F_GETFD)) == 0, "close-on-exec has moved");
	CHECK(same_file(getpid(), APPEND, getpid(), DUP) && same_file(getpid(), DUP, rehomed_child, APPEND), "duplicates are no longer shared");
	CHECK(!same_file(getpid(), READ, getpid(), BOTH) && !same_file(getpid(), READ, getpid(), APPEND), "descriptions became one");
	if (content) {
		unsigned char b[100];
		CHECK(SYS(pread(BOTH, b, sizeof b, 100)) == sizeof b, "the file is short");
		for (size_t i = 0; i < sizeof b; i++)
			CHECK(b[i] == pattern(7, 100 + i) && mapped[i] == pattern(7, i), "byte %zu is another one", i);
	}
	if (writes) CHECK(SYS(write(APPEND, ".", 1)) == 1, "append");
	nap_ms(5);
}

// rehomed PREFIX FILE [plain]: three descriptions of one file, a mapping of it, and
// its directory as working directory; plain does without the mapping, the
// directory and the content.
COMMAND(rehomed) {
	CHECK(arg_count >= 1, "usage: rehomed PREFIX FILE [plain]");
	content = arg_count < 2;
	writes = true;
	const char *path = arg_values[0];
	int fd = SYS(open(path, O_RDWR | O_CREAT | O_TRUNC, 0640));
	SYS(fchmod(fd, 0640));
	if (content) {
		unsigned char b[4096];
		for (size_t i = 0; i < sizeof b; i++) b[i] = pattern(7, i);
		CHECK(SYS(write(fd, b, sizeof b)) == sizeof b, "write");
		mapped = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
		CHECK(mapped != MAP_FAILED, "map: %s", strerror(errno));
		char dir[4096];
		snprintf(dir, sizeof dir, "%s", path);
		*strrchr(dir, '/') = 0;
		SYS(chdir(dir));
	}
	close(fd);
	at_fd(READ, SYS(open(path, O_RDONLY)));
	at_fd(APPEND, SYS(open(path, O_WRONLY | O_APPEND)));
	at_fd(BOTH, SYS(open(path, O_RDWR)));
	if (content) SYS(lseek(BOTH, 100, SEEK_SET));
	SYS(dup3(APPEND, DUP, O_CLOEXEC));
	rehomed_child = child();
	if (rehomed_child == 0)
		for (;;) {
			orphan_check();
			nap_ms(20);
		}
	loop(check_rehomed);
	expect_alive(rehomed_child);
	end_child(rehomed_child);
}

static void check_streams(void) {
	recheck();
	nap_ms(5);
}

// streams PREFIX: records of 16 bytes are copied from standard input to output,
// whatever these are.
static int in_flags;

static void copy_records(void) {
	CHECK(SYS(fcntl(0, F_GETFL)) == in_flags, "flags of standard input have changed");
	char record[16];
	for (int n = 0; n < 256; n++) {
		ssize_t r = read(0, record, sizeof record);
		if (r == 0 || (r < 0 && (errno == EAGAIN || errno == EINTR))) break;
		CHECK(r == sizeof record, "read standard input: %zd, %s", r, strerror(errno));
		ssize_t w;
		while ((w = write(1, record, sizeof record)) < 0 && (errno == EAGAIN || errno == EINTR)) nap_ms(1);
		CHECK(w == sizeof record, "write standard output: %zd, %s", w, strerror(errno));
	}
	nap_ms(2);
}

COMMAND(streams) {
	SYS(fcntl(0, F_SETFL, SYS(fcntl(0, F_GETFL)) | O_NONBLOCK));
	in_flags = SYS(fcntl(0, F_GETFL));
	signal(SIGPIPE, SIG_IGN);
	loop(copy_records);
}

// stdnull PREFIX: standard descriptors are what they were, by mode and device.
COMMAND(stdnull) {
	remember("stdin", 0);
	remember("stdout", 1);
	loop(check_streams);
}

// numbered PREFIX FILE: appends numbered records to a file by its position, without
// O_APPEND, and knows which is next.
static int numbered_fd;
static uint64_t numbered_next;

static void check_numbered(void) {
	char rec[24];
	snprintf(rec, sizeof rec, "%022lu\n", numbered_next);
	off_t at = SYS(lseek(numbered_fd, 0, SEEK_CUR));
	CHECK(at == (off_t)numbered_next * 23, "at %ld, want %ld", at, numbered_next * 23);
	CHECK(SYS(write(numbered_fd, rec, 23)) == 23, "write");
	numbered_next++;
	nap_ms(2);
}

COMMAND(numbered) {
	CHECK(arg_count == 1, "usage: numbered PREFIX FILE");
	numbered_fd = at_fd(10, SYS(open(arg_values[0], O_WRONLY | O_CREAT | O_TRUNC, 0644)));
	loop(check_numbered);
	struct stat st;
	SYS(fstat(numbered_fd, &st));
	CHECK(st.st_size == (off_t)numbered_next * 23, "the file has %ld bytes, want %ld", st.st_size, numbered_next * 23);
}
