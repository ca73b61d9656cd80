// container: a tree that made namespaces of its own, as unshare(1) with --pid
// --fork --mount --uts --ipc --mount-proc does: its root is pid 1, with mounts,
// names and objects that only it sees. The command itself only starts it and
// says its pid in PREFIX.pid; the records are the inner program's.
#include "selfcheck.h"
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/un.h>
#include <sys/utsname.h>

static int ct_sock;
static char ct_mounts[64][512];
static int ct_mount_count;
static pid_t ct_child;

// The mounts without what a restore changes: their ids, and numbers of devices
// and groups.
static int ct_read_mounts(char list[64][512]) {
	FILE *f = fopen("/proc/self/mountinfo", "re");
	CHECK(f, "open mountinfo: %s", strerror(errno));
	char line[1024];
	int n = 0;
	while (fgets(line, sizeof line, f)) {
		char root[256], point[256], opts[128], rest[512] = "", tags[128] = "";
		CHECK(sscanf(line, "%*d %*d %*s %255s %255s %127s %511[^\n]", root, point, opts, rest) == 4, "mountinfo: %s", line);
		if (strcmp(point, "/etc/hosts") == 0) continue; // each host of the tests has another
		if (strstr(rest, "shared:") && strstr(rest, "shared:") < strstr(rest, " - ")) strcat(tags, "shared ");
		if (strstr(rest, "master:") && strstr(rest, "master:") < strstr(rest, " - ")) strcat(tags, "slave ");
		if (strstr(rest, "unbindable")) strcat(tags, "unbindable ");
		char *type = strstr(rest, "- ");
		CHECK(type && n < 64, "mountinfo: %s", line);
		snprintf(list[n++], 512, "%.80s %.60s %.60s %.40s%.40s", point, root, opts, tags, type);
	}
	fclose(f);
	qsort(list, n, 512, (int (*)(const void *, const void *))strcmp);
	return n;
}

static void ct_file(const char *path, const char *want) {
	char got[256] = "";
	int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = SYS(read(fd, got, sizeof got - 1));
	SYS(close(fd));
	got[n] = 0;
	CHECK(strcmp(got, want) == 0, "%s says %s, want %s", path, got, want);
}

// A file that is new after a restore, but open as before.
static void ct_open(int fd, int flags, off_t pos, const char *want, const char *path) {
	char got[64] = "", link[64];
	CHECK((SYS(fcntl(fd, F_GETFL)) & ~0100000) == flags, "fd %d: flags %o, want %o", fd, fcntl(fd, F_GETFL), flags);
	CHECK(lseek(fd, 0, SEEK_CUR) == pos, "fd %d is at %ld, want %ld", fd, lseek(fd, 0, SEEK_CUR), pos);
	if (want) {
		SYS(pread(fd, got, sizeof got - 1, 0));
		CHECK(strcmp(got, want) == 0, "fd %d holds %s, want %s", fd, got, want);
	}
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = SYS(readlink(link, got, sizeof got - 1));
	got[n] = 0;
	CHECK(strcmp(got, path) == 0, "fd %d leads to %s, want %s", fd, got, path);
}

static void ct_check(void) {
	CHECK(getpid() == 1, "pid %d", getpid());
	struct utsname u;
	SYS(uname(&u));
	CHECK(strcmp(u.nodename, "container") == 0, "host name %s", u.nodename);
	char self[32];
	ssize_t n = SYS(readlink("/proc/self", self, sizeof self - 1));
	self[n] = 0;
	CHECK(strcmp(self, "1") == 0, "/proc/self leads to %s", self);
	static char now[64][512];
	int count = ct_read_mounts(now);
	if (count != ct_mount_count) {
		for (int i = 0; i < count || i < ct_mount_count; i++)
			fprintf(stderr, "%s | %s\n", i < ct_mount_count ? ct_mounts[i] : "", i < count ? now[i] : "");
	}
	CHECK(count == ct_mount_count, "%d mounts, want %d", count, ct_mount_count);
	for (int i = 0; i < count; i++) CHECK(strcmp(now[i], ct_mounts[i]) == 0, "mount %s, want %s", now[i], ct_mounts[i]);
	struct statfs sf;
	SYS(statfs("/mnt/t", &sf));
	CHECK(sf.f_blocks * (uint64_t)sf.f_bsize == 1 << 20, "size of the tmpfs: %llu", (unsigned long long)sf.f_blocks * sf.f_bsize);
	ct_file("/mnt/t/file", "content");
	ct_file("/mnt/t/dir/bound", "below");
	ct_file("/mnt/b/bound", "below");
	ct_file("/mnt/t/link", "content");
	struct stat a, b;
	SYS(stat("/mnt/t/dir", &a));
	CHECK((a.st_mode & 07777) == 01751 && a.st_uid == 12 && a.st_gid == 34 && a.st_mtime == 1000000000, "directory: mode %o of %d:%d at %ld", a.st_mode, a.st_uid, a.st_gid, a.st_mtime);
	SYS(stat("/mnt/t/hard", &a));
	SYS(stat("/mnt/t/file", &b));
	CHECK(a.st_ino == b.st_ino && a.st_nlink == 2, "hard link");
	SYS(stat("/mnt/t/fifo", &a));
	CHECK(S_ISFIFO(a.st_mode), "fifo: mode %o", a.st_mode);
	SYS(stat("/mnt/t/null", &a));
	CHECK(S_ISCHR(a.st_mode) && a.st_rdev == 0x103, "device: mode %o", a.st_mode);
	CHECK(open("/mnt/ro/x", O_WRONLY | O_CREAT, 0600) < 0 && errno == EROFS, "read-only mount: %s", strerror(errno));
	// The socket in it takes connections.
	struct sockaddr_un sa = {AF_UNIX, "/mnt/t/sock"};
	int c = SYS(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	SYS(connect(c, (void *)&sa, sizeof sa));
	int s = SYS(accept4(ct_sock, NULL, NULL, SOCK_CLOEXEC));
	SYS(write(c, "x", 1));
	char x;
	SYS(read(s, &x, 1));
	SYS(close(s));
	SYS(close(c));
	expect_alive(ct_child);
	ct_open(31, O_RDWR | O_APPEND, 0, "content", "/mnt/t/file");
	ct_open(32, O_RDONLY, 2, "below", "/mnt/b/bound");
	ct_open(34, O_RDONLY | O_DIRECTORY, 0, NULL, "/mnt");
	ct_open(35, O_RDWR, 7, "deleted", "/mnt/t/gone (deleted)");
	char b2[64];
	CHECK(pread(33, b2, sizeof b2, 0) > 0 && strncmp(b2, "Name:\tselfcheck\n", 16) == 0, "own status: %.20s", b2);
}

static void ct_write(const char *path, const char *text) {
	int fd = SYS(open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	SYS(write(fd, text, strlen(text)));
	SYS(close(fd));
}

static void ct_mkdir(const char *path) { CHECK(mkdir(path, 0755) == 0 || errno == EEXIST, "mkdir %s: %s", path, strerror(errno)); }

static void ct_set_up(void) {
	SYS(sethostname("container", 9));
	SYS(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
	SYS(mount("none", "/mnt", "tmpfs", 0, "mode=755"));
	const char *dirs[] = {"/mnt/t", "/mnt/b", "/mnt/ro", "/mnt/q", "/mnt/sh", "/mnt/sh2", "/mnt/pts"};
	for (size_t i = 0; i < sizeof dirs / sizeof *dirs; i++) ct_mkdir(dirs[i]);
	SYS(mount("some tmpfs", "/mnt/t", "tmpfs", MS_NOSUID | MS_NOATIME, "size=1m,mode=1777"));
	ct_write("/mnt/t/file", "content");
	ct_mkdir("/mnt/t/dir");
	ct_write("/mnt/t/dir/bound", "below");
	SYS(link("/mnt/t/file", "/mnt/t/hard"));
	SYS(symlink("file", "/mnt/t/link"));
	SYS(mknod("/mnt/t/fifo", S_IFIFO | 0600, 0));
	SYS(mknod("/mnt/t/null", S_IFCHR | 0600, 0x103));
	SYS(chown("/mnt/t/dir", 12, 34));
	SYS(chmod("/mnt/t/dir", 01751));
	struct timespec ts[2] = {{1000000000, 5}, {1000000000, 5}};
	SYS(utimensat(AT_FDCWD, "/mnt/t/dir", ts, 0));
	SYS(mount("/mnt/t/dir", "/mnt/b", NULL, MS_BIND, NULL));
	SYS(mount("none", "/mnt/ro", "tmpfs", MS_RDONLY, NULL));
	SYS(mount("none", "/mnt/q", "mqueue", MS_NODEV, NULL));
	SYS(mount("none", "/mnt/pts", "devpts", MS_NOSUID, "newinstance,ptmxmode=0666,mode=620,gid=5"));
	SYS(mount("none", "/mnt/sh", "tmpfs", 0, NULL));
	SYS(mount(NULL, "/mnt/sh", NULL, MS_SHARED, NULL));
	SYS(mount("/mnt/sh", "/mnt/sh2", NULL, MS_BIND, NULL));
	ct_mkdir("/mnt/sh/in");
	SYS(mount("none", "/mnt/sh/in", "tmpfs", 0, "size=64k")); // appears below /mnt/sh2 as well
	ct_sock = at_fd(30, SYS(socket(AF_UNIX, SOCK_STREAM, 0)));
	struct sockaddr_un sa = {AF_UNIX, "/mnt/t/sock"};
	SYS(bind(ct_sock, (void *)&sa, sizeof sa));
	SYS(listen(ct_sock, 4));
	at_fd(31, SYS(open("/mnt/t/file", O_RDWR | O_APPEND)));
	at_fd(32, SYS(open("/mnt/b/bound", O_RDONLY)));
	SYS(lseek(32, 2, SEEK_SET));
	at_fd(33, SYS(open("/proc/self/status", O_RDONLY)));
	at_fd(34, SYS(open("/mnt", O_RDONLY | O_DIRECTORY)));
	int gone = at_fd(35, SYS(open("/mnt/t/gone", O_RDWR | O_CREAT, 0600)));
	SYS(write(gone, "deleted", 7));
	SYS(unlink("/mnt/t/gone"));
	ct_mount_count = ct_read_mounts(ct_mounts);
	ct_child = child();
	if (ct_child == 0)
		for (;;) nap_ms(5); // its parent is pid 1 from the start
}

// A root directory of its own, without anything of the host's but /dev and /srv.
static void ct_pivot(void) {
	const char *root = "/tmp/newroot";
	ct_mkdir(root);
	SYS(mount("/", root, NULL, MS_BIND, NULL));
	SYS(mount("/dev", "/tmp/newroot/dev", NULL, MS_BIND, NULL));
	ct_mkdir("/tmp/srv");
	SYS(mount("/tmp/srv", "/tmp/newroot/srv", NULL, MS_BIND, NULL));
	SYS(chdir(root));
	SYS(syscall(SYS_pivot_root, ".", "."));
	SYS(umount2(".", MNT_DETACH));
	SYS(chdir("/"));
}

// With the argument "pivot" it has a root directory of its own.
COMMAND(container) {
	SYS(unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC));
	SYS(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
	pid_t pid = SYS(fork());
	if (pid) {
		char text[16];
		snprintf(text, sizeof text, "%d", pid);
		ct_write(path_of("pid"), text);
		waitpid(pid, NULL, 0);
		_exit(0);
	}
	SYS(setsid());
	if (arg_count > 0) ct_pivot();
	ct_set_up();
	loop(ct_check);
	end_child(ct_child);
}
