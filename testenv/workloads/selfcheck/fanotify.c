// fanotify: groups with marks on files, mounts and file systems.
#include "selfcheck.h"
#include <poll.h>
#include <sys/fanotify.h>
#include <sys/mount.h>
#include <sys/stat.h>

#ifndef FAN_MARK_FILESYSTEM
#define FAN_MARK_FILESYSTEM 0x100
#endif

static int fa, fa_fid, fa_fs;
static char fa_list[3][4096];

static void marks(int fd, char *to, size_t size) {
	char path[64], line[512];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s", path);
	unsigned sum = 0, n = 0;
	size_t at = 0;
	while (fgets(line, sizeof line, f)) {
		unsigned a, b, mflags, mask, ignored;
		char *m;
		if (sscanf(line, "fanotify flags:%x event-flags:%x", &a, &b) == 2) at += snprintf(to + at, size - at, "%x %x; ", a, b);
		else if (strncmp(line, "fanotify ", 9) == 0 && (m = strstr(line, "mflags:")) && sscanf(m, "mflags:%x mask:%x ignored_mask:%x", &mflags, &mask, &ignored) == 3) {
			// In any order.
			sum += mflags * 3 + mask * 5 + ignored * 7 + (strstr(line, "mnt_id:") ? 1001 : strstr(line, "ino:") ? 1003 : 1005);
			n++;
		}
	}
	fclose(f);
	snprintf(to + at, size - at, "%u marks %x", n, sum);
	CHECK(n > 0, "fdinfo shows no mark");
}

// Events that are queued when the program is moved are lost, which it is not
// told. That cannot happen in two checks in a row.
static bool fa_lost, fa_lost_before;

static bool missing(ssize_t n) {
	if (n >= 0 || errno != EAGAIN) return false;
	CHECK(!fa_lost_before, "no events come");
	return fa_lost = true;
}

// told wants one event, of mask, about the file that has the inode ino.
static void told(int fd, const char *what, uint64_t mask, const char *name) {
	struct pollfd p = {fd, POLLIN, 0};
	if (fa_lost) return;
	SYS(poll(&p, 1, 500));
	struct fanotify_event_metadata m;
	ssize_t n = read(fd, &m, sizeof m);
	if (missing(n)) return;
	CHECK(n == sizeof m, "%s: no event", what);
	CHECK(m.mask == mask, "%s: mask is %llx, want %lx", what, m.mask, mask);
	struct stat a, b;
	SYS(fstat(m.fd, &a));
	SYS(stat(path_of(name), &b));
	CHECK(a.st_ino == b.st_ino, "%s: the event is about another file", what);
	CHECK((SYS(fcntl(m.fd, F_GETFL)) & O_ACCMODE) == O_RDONLY && SYS(fcntl(m.fd, F_GETFD)) == FD_CLOEXEC, "%s: flags of the event's file", what);
	CHECK(m.pid == getpid(), "%s: caused by %d", what, m.pid);
	close(m.fd);
}

static void fa_drain(int fd) {
	char b[4096];
	for (ssize_t n; (n = read(fd, b, sizeof b)) > 0;)
		for (struct fanotify_event_metadata *m = (void *)b; FAN_EVENT_OK(m, n); m = FAN_EVENT_NEXT(m, n))
			if (m->fd >= 0) close(m->fd);
}

static void fa_quiet(int fd, const char *what) {
	struct pollfd p = {fd, POLLIN, 0};
	CHECK(SYS(poll(&p, 1, 0)) == 0, "%s: an event that nobody caused", what);
}

static void fanotify_check(void) {
	fa_lost_before = fa_lost;
	fa_lost = false;
	recheck();
	char now[4096];
	int all[] = {fa, fa_fid, fa_fs};
	for (int i = 0; i < 3; i++) {
		marks(all[i], now, sizeof now);
		CHECK(strcmp(now, fa_list[i]) == 0, "marks were %s and are %s", fa_list[i], now);
		if (fa_lost_before) fa_drain(all[i]);
		fa_quiet(all[i], "idle");
	}
	int fd = SYS(open(path_of("watched"), O_RDWR | O_CLOEXEC));
	told(fa, "a file is opened", FAN_OPEN, "watched");
	CHECK(SYS(pwrite(fd, "x", 1, 0)) == 1, "write");
	told(fa, "it is written", FAN_MODIFY, "watched");
	close(fd);
	close(SYS(open(path_of("m/inside"), O_RDONLY | O_CLOEXEC)));
	told(fa, "a file on a mount is opened", FAN_OPEN, "m/inside");
	close(SYS(open(path_of("m/ignored"), O_RDONLY | O_CLOEXEC)));
	fa_quiet(fa, "a file that is ignored is opened");
	char b[4096];
	close(SYS(open(path_of("d/new"), O_RDWR | O_CREAT | O_CLOEXEC, 0600)));
	ssize_t n = read(fa_fid, b, sizeof b);
	struct fanotify_event_metadata *m = (void *)b;
	CHECK(missing(n) || (n > (ssize_t)sizeof *m && m->mask == FAN_CREATE && m->fd == FAN_NOFD && memmem(b, n, "new", 4)), "a new file: %zd bytes, mask %llx", n, m->mask);
	SYS(unlink(path_of("d/new")));
	SYS(chmod(path_of("m/inside"), 0600));
	n = read(fa_fs, b, sizeof b);
	CHECK(missing(n) || (n > (ssize_t)sizeof *m && m->mask == FAN_ATTRIB), "mode of a file on a marked file system: mask %llx", m->mask);
}

COMMAND(fanotify) {
	SYS(mkdir(path_of("m"), 0755));
	SYS(mkdir(path_of("d"), 0755));
	SYS(mount("none", path_of("m"), "tmpfs", 0, "size=64k"));
	const char *names[] = {"watched", "m/inside", "m/ignored"};
	for (int i = 0; i < 3; i++) close(SYS(open(path_of(names[i]), O_RDWR | O_CREAT | O_CLOEXEC, 0644)));
	fa = at_fd(20, SYS(fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK, O_RDONLY | O_CLOEXEC)));
	SYS(fanotify_mark(fa, FAN_MARK_ADD, FAN_OPEN | FAN_MODIFY, AT_FDCWD, path_of("watched")));
	SYS(fanotify_mark(fa, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, AT_FDCWD, path_of("m")));
	SYS(fanotify_mark(fa, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, FAN_OPEN, AT_FDCWD, path_of("m/ignored")));
	fa_fid = at_fd(21, SYS(fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_REPORT_DFID_NAME, O_RDONLY)));
	SYS(fanotify_mark(fa_fid, FAN_MARK_ADD, FAN_CREATE | FAN_ONDIR, AT_FDCWD, path_of("d")));
	fa_fs = at_fd(22, SYS(fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_REPORT_FID | FAN_UNLIMITED_QUEUE, O_RDONLY)));
	SYS(fanotify_mark(fa_fs, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_ATTRIB, AT_FDCWD, path_of("m")));
	int all[] = {fa, fa_fid, fa_fs};
	for (int i = 0; i < 3; i++) {
		marks(all[i], fa_list[i], sizeof fa_list[i]);
		remember("fanotify", all[i]);
	}
	loop(fanotify_check);
	for (int i = 0; i < 3; i++) close(all[i]);
	SYS(umount(path_of("m")));
}
