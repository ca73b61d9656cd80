// mounts: files on an overlay, a tmpfs, a read-only bind mount and a bound file.
#include "selfcheck.h"
#include <dirent.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

static struct stat mnt_was[64];
static unsigned char *mnt_map, *mnt_lib;
static int mnt_in;
static uint64_t mnt_turn;

static void text(const char *name, const char *s) {
	int fd = SYS(open(path_of(name), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	CHECK(SYS(write(fd, s, strlen(s))) == (ssize_t)strlen(s), "write");
	close(fd);
}

static void holds(int fd, off_t at, const char *want) {
	char b[64] = {0};
	CHECK(SYS(pread(fd, b, strlen(want), at)) == (ssize_t)strlen(want) && strcmp(b, want) == 0, "fd %d holds %s, want %s", fd, b, want);
}

static void mounts_check(void) {
	recheck();
	for (int i = 20; i <= 31; i++) {
		struct stat st;
		SYS(fstat(i, &st));
		CHECK(st.st_mode == mnt_was[i].st_mode && (S_ISDIR(st.st_mode) || st.st_size == mnt_was[i].st_size) && (i == 22 || st.st_nlink == mnt_was[i].st_nlink),
		      "fd %d: mode %o, %ld bytes, %lu names; had %o, %ld, %lu", i, st.st_mode, st.st_size, st.st_nlink, mnt_was[i].st_mode, mnt_was[i].st_size, mnt_was[i].st_nlink);
	}
	static const char *want[] = {"lower", "upper", "gone from lower", NULL, "both", "tmpfs", "gone under ro", "under ro", "bound", "bind"};
	for (int i = 0; i < 10; i++) if (want[i]) holds(20 + i, 0, want[i]);
	CHECK(SYS(lseek(21, 0, SEEK_CUR)) == 3, "position on the overlay is %ld", lseek(21, 0, SEEK_CUR));
	CHECK(SYS(pwrite(24, &mnt_turn, 8, 100)) == 8, "write to the overlay");
	close(SYS(openat(23, "lower", O_RDONLY | O_CLOEXEC)));
	CHECK(openat(27, "x", O_RDWR) < 0, "a file is a directory");
	int fd = open(path_of("ro/under"), O_RDWR);
	CHECK(fd < 0 && errno == EROFS, "the read-only mount can be written");
	CHECK(memcmp(mnt_map, "lower", 5) == 0 && memcmp(mnt_lib, "gone under ro", 13) == 0, "mappings");
	char b[16] = {0};
	CHECK(SYS(write(31, "abc", 3)) == 3 && SYS(read(31, b, 3)) == 3 && strcmp(b, "abc") == 0, "fifo on the overlay");
	struct { struct inotify_event e; char room[256]; } u;
	CHECK(read(mnt_in, &u, sizeof u) < 0 || u.e.mask == IN_Q_OVERFLOW, "an event that nobody caused: %x", u.e.mask);
	SYS(chmod(path_of("merged/both"), 0600 | (mnt_turn & 7)));
	struct pollfd p = {mnt_in, POLLIN, 0};
	SYS(poll(&p, 1, 1000));
	CHECK(SYS(read(mnt_in, &u, sizeof u)) >= (ssize_t)sizeof u.e && (u.e.mask == IN_ATTRIB || u.e.mask == IN_Q_OVERFLOW), "event of a file on the overlay: %x", u.e.mask);
	mnt_was[24].st_mode = S_IFREG | 0600 | (mnt_turn & 7);
	mnt_turn++;
}

COMMAND(mounts) {
	const char *dirs[] = {"lower", "upper", "work", "merged", "tmpfs", "ro", "rw"};
	for (int i = 0; i < 7; i++) SYS(mkdir(path_of(dirs[i]), 0755));
	text("lower/lower", "lower");
	text("lower/gone", "gone from lower");
	text("lower/both", "both");
	char *o;
	CHECK(asprintf(&o, "lowerdir=%s,upperdir=%s,workdir=%s", path_of("lower"), path_of("upper"), path_of("work")) > 0, "memory");
	SYS(mount("overlay", path_of("merged"), "overlay", 0, o));
	SYS(mount("none", path_of("tmpfs"), "tmpfs", 0, "size=256k"));
	text("merged/upper", "upper");
	text("rw/under", "under ro");
	text("rw/gone", "gone under ro");
	text("plain", "bound");
	text("point", "hidden by a bound file");
	SYS(mount(path_of("rw"), path_of("ro"), NULL, MS_BIND, NULL));
	SYS(mount(NULL, path_of("ro"), NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL));
	SYS(mount(path_of("plain"), path_of("point"), NULL, MS_BIND, NULL));
	at_fd(20, SYS(open(path_of("merged/lower"), O_RDONLY)));
	mnt_map = SYS(mmap(NULL, 4096, PROT_READ, MAP_SHARED, 20, 0));
	at_fd(21, SYS(open(path_of("merged/upper"), O_RDWR | O_CLOEXEC)));
	SYS(lseek(21, 3, SEEK_SET));
	at_fd(22, SYS(open(path_of("merged/gone"), O_RDONLY)));
	SYS(unlink(path_of("merged/gone")));
	at_fd(23, SYS(open(path_of("merged"), O_RDONLY | O_DIRECTORY)));
	at_fd(24, SYS(open(path_of("merged/both"), O_RDWR)));
	CHECK(SYS(pwrite(24, "both", 4, 0)) == 4 && SYS(pwrite(24, "12345678", 8, 100)) == 8, "write"); // copied up
	text("tmpfs/t", "tmpfs");
	at_fd(25, SYS(open(path_of("tmpfs/t"), O_RDWR)));
	at_fd(26, SYS(open(path_of("ro/gone"), O_RDONLY)));
	mnt_lib = SYS(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 26, 0));
	SYS(unlink(path_of("rw/gone")));
	at_fd(27, SYS(open(path_of("ro/under"), O_RDONLY)));
	at_fd(28, SYS(open(path_of("point"), O_RDWR)));
	text("rw/bind", "bind");
	at_fd(29, SYS(open(path_of("rw/bind"), O_RDWR)));
	at_fd(30, SYS(open(path_of("ro"), O_RDONLY | O_DIRECTORY)));
	SYS(mkfifo(path_of("merged/fifo"), 0600));
	at_fd(31, SYS(open(path_of("merged/fifo"), O_RDWR | O_NONBLOCK)));
	mnt_in = at_fd(32, SYS(inotify_init1(IN_NONBLOCK)));
	SYS(inotify_add_watch(mnt_in, path_of("merged/both"), IN_ATTRIB));
	for (int i = 20; i <= 31; i++) SYS(fstat(i, &mnt_was[i]));
	for (int i = 25; i <= 29; i++) remember("file on a mount", i);
	loop(mounts_check);
	const char *points[] = {"point", "ro", "tmpfs", "merged"};
	for (int i = 0; i < 4; i++) SYS(umount2(path_of(points[i]), MNT_DETACH));
}

// ---- pipestates: pipes and fifos with what only splice(2) and tee(2) put there

static int pp[6][2];

static int in_pipe(int fd) {
	int n;
	SYS(ioctl(fd, FIONREAD, &n));
	return n;
}

static int poll_of(int fd, short what) {
	struct pollfd p = {fd, what, 0};
	SYS(poll(&p, 1, 0));
	return p.revents;
}

static void pipestates_check(void) {
	recheck();
	CHECK(in_pipe(pp[0][0]) == 5000, "a pipe with pages of a file holds %d bytes", in_pipe(pp[0][0]));
	CHECK(in_pipe(pp[1][0]) == 5000, "a pipe filled by tee holds %d bytes", in_pipe(pp[1][0]));
	CHECK(in_pipe(pp[2][0]) == 3 + 4096 + 1, "a pipe of packets holds %d bytes", in_pipe(pp[2][0]));
	CHECK(SYS(fcntl(pp[3][0], F_GETPIPE_SZ)) == 4096 && write(pp[3][1], "x", 1) < 0 && errno == EAGAIN, "a full pipe of one page can be written");
	CHECK(SYS(fcntl(pp[4][0], F_GETPIPE_SZ)) == 1 << 20, "a large pipe has %d bytes of room", fcntl(pp[4][0], F_GETPIPE_SZ));
	CHECK(in_pipe(pp[4][0]) == 1000000, "a large pipe holds %d bytes", in_pipe(pp[4][0]));
	// Writer gone with bytes left; reader that never met a writer; reader that met one.
	CHECK(poll_of(40, POLLIN) == (POLLIN | POLLHUP), "fifo without writer: poll says %x", poll_of(40, POLLIN));
	CHECK(poll_of(41, POLLIN) == 0, "fifo that has met no writer: poll says %x", poll_of(41, POLLIN));
	CHECK(poll_of(42, POLLIN) == POLLHUP, "fifo whose writer has left: poll says %x", poll_of(42, POLLIN));
	char c;
	CHECK(read(42, &c, 1) == 0 && read(41, &c, 1) == 0, "no end of file");
}

COMMAND(pipestates) {
	signal(SIGPIPE, SIG_IGN);
	int fd = SYS(open(path_of("data"), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	for (int i = 0; i < 10000; i++) {
		unsigned char c = pattern(61, i);
		CHECK(SYS(write(fd, &c, 1)) == 1, "write");
	}
	off_t at = 0;
	for (int i = 0; i < 5; i++) SYS(pipe2(pp[i], O_NONBLOCK | (i == 2 ? O_DIRECT : 0)));
	CHECK(SYS(splice(fd, &at, pp[0][1], NULL, 5000, 0)) == 5000, "splice");
	CHECK(SYS(tee(pp[0][0], pp[1][1], 5000, 0)) == 5000, "tee");
	close(pp[1][1]);
	char b[4096] = {7};
	CHECK(write(pp[2][1], "abc", 3) == 3 && write(pp[2][1], b, 4096) == 4096 && write(pp[2][1], "z", 1) == 1, "packets");
	SYS(fcntl(pp[2][1], F_SETFL, O_NONBLOCK)); // no longer in packet mode, but the packets are there
	SYS(fcntl(pp[3][1], F_SETPIPE_SZ, 4096));
	while (write(pp[3][1], b, 64) > 0) {}
	SYS(fcntl(pp[4][1], F_SETPIPE_SZ, 1 << 20));
	char *big = calloc(1, 1000000);
	big[999999] = 'e';
	CHECK(write(pp[4][1], big, 1000000) == 1000000, "fill");
	const char *names[] = {"fa", "fb", "fc"};
	for (int i = 0; i < 3; i++) {
		SYS(mkfifo(path_of(names[i]), 0600));
		at_fd(40 + i, SYS(open(path_of(names[i]), O_RDONLY | O_NONBLOCK)));
	}
	int w = SYS(open(path_of("fa"), O_WRONLY));
	CHECK(write(w, "left", 4) == 4, "write");
	close(w);
	w = SYS(open(path_of("fc"), O_WRONLY));
	CHECK(write(w, "x", 1) == 1 && read(42, b, 1) == 1, "write");
	close(w);
	int all[] = {pp[0][0], pp[0][1], pp[1][0], pp[2][0], pp[2][1], pp[3][0], pp[3][1], pp[4][0], pp[4][1], 40, 41, 42};
	for (int i = 0; i < 12; i++) remember("pipe", all[i]);
	loop(pipestates_check);
	for (int i = 0; i < 2; i++)
		for (int n = 0; n < 5000; n++) CHECK(read(pp[i][0], b, 1) == 1 && (unsigned char)b[0] == pattern(61, n), "byte %d of pipe %d is %02x", n, i, b[0]);
	char big_b[8192];
	CHECK(read(pp[2][0], big_b, 8192) == 3 && read(pp[2][0], big_b, 8192) == 4096 && read(pp[2][0], big_b, 8192) == 1, "packets have other boundaries");
	CHECK(read_all(pp[4][0], big, 1000000) == 1000000 && big[999999] == 'e', "the large pipe");
	CHECK(read(40, b, 10) == 4 && memcmp(b, "left", 4) == 0, "fifo without writer");
}
