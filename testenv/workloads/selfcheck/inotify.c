// inotify: watches with their numbers and masks, on files that were moved,
// deleted or replaced since, and what they tell.
#include "selfcheck.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

static int in, in_b, in_full, in_ep, in_kept;
static int wd_dir, wd_file, wd_moved, wd_gone, wd_once, wd_high, wd_link, wd_only;

// A program that is moved with events in the queue is told that they are lost;
// what else one check wants to read is then not known.
static bool lost[64];

static void drain(int fd) {
	char b[4096];
	int n;
	while (SYS(ioctl(fd, FIONREAD, &n)) == 0 && n > 0) SYS(read(fd, b, sizeof b));
}

// event takes one event and wants it to be this.
static void event(int fd, const char *what, int wd, uint32_t mask, const char *name) {
	union { struct inotify_event e; char room[sizeof(struct inotify_event) + 256]; } u;
	// One at a time: the buffer has room for one with a name.
	struct pollfd p = {fd, POLLIN, 0};
	if (lost[fd]) {
		drain(fd);
		return;
	}
	SYS(poll(&p, 1, 2000));
	int size = sizeof u.e + (name ? (strlen(name) + 16) / 16 * 16 : 0);
	ssize_t n = read(fd, &u, size);
	if (n == sizeof u.e && u.e.mask == IN_Q_OVERFLOW && u.e.wd == -1) {
		lost[fd] = true;
		drain(fd);
		return;
	}
	CHECK(n == size, "%s: read gave %zd of %d bytes: %s", what, n, size, n < 0 ? strerror(errno) : "");
	CHECK(u.e.wd == wd, "%s: came from watch %d, want %d (mask %x)", what, u.e.wd, wd, u.e.mask);
	CHECK(u.e.mask == mask, "%s: mask is %x, want %x", what, u.e.mask, mask);
	CHECK(name ? strcmp(u.e.name, name) == 0 : u.e.len == 0, "%s: name is %s, want %s", what, u.e.len ? u.e.name : "none", name ? name : "none");
}

static void quiet(int fd, const char *what) {
	int n;
	SYS(ioctl(fd, FIONREAD, &n));
	if (n == 0) return;
	if (lost[fd]) {
		drain(fd);
		return;
	}
	union { struct inotify_event e; char room[512]; } u;
	SYS(read(fd, &u, sizeof u));
	if (u.e.mask == IN_Q_OVERFLOW) return;
	fail("%s: %d bytes of events nobody caused, the first from watch %d, mask %x, name %s", what, n, u.e.wd, u.e.mask, u.e.len ? u.e.name : "none");
}

static int touch(const char *name, mode_t mode) { return SYS(open(path_of(name), O_RDWR | O_CREAT | O_CLOEXEC, mode)); }

static char list[2][4096];

// watches reads what fdinfo tells of all watches.
static void watches(int fd, char *to, size_t size) {
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	CHECK(f, "open %s", path);
	char line[512];
	size_t n = 0;
	int count = 0;
	while (fgets(line, sizeof line, f)) {
		unsigned wd, mask;
		if (sscanf(line, "inotify wd:%x ino:%*x sdev:%*x mask:%x", &wd, &mask) == 2) {
			n += snprintf(to + n, size - n, "%x %x,", wd, mask);
			count++;
		}
	}
	fclose(f);
	to[n] = 0;
	CHECK(count > 0, "fdinfo shows no watch");
}

static void inotify_check(void) {
	recheck();
	quiet(in, "idle");
	quiet(in_b, "idle");
	char now[4096];
	for (int i = 0; i < 2; i++) {
		watches(i ? in_b : in, now, sizeof now);
		// Their order in the kernel's list does not matter to anybody.
		CHECK(strlen(now) == strlen(list[i]), "watches were %s and are %s", list[i], now);
	}
	close(touch("w/new", 0600));
	event(in, "a file is made", wd_dir, IN_CREATE, "new");
	struct epoll_event ev;
	CHECK(lost[in] || SYS(epoll_wait(in_ep, &ev, 1, 0)) == 0, "epoll tells of an inotify that is empty");
	SYS(unlink(path_of("w/new")));
	CHECK(lost[in] || (SYS(epoll_wait(in_ep, &ev, 1, 1000)) == 1 && ev.data.u64 == 4711), "epoll does not tell of an inotify with an event");
	event(in, "it is removed", wd_dir, IN_DELETE, "new");
	SYS(chmod(path_of("plain"), 0640));
	event(in, "mode of a file", wd_file, IN_ATTRIB, NULL);
	int fd = SYS(open(path_of("moved-there"), O_WRONLY | O_CLOEXEC));
	CHECK(SYS(write(fd, "x", 1)) == 1, "write");
	close(fd);
	event(in, "a file that was moved is written", wd_moved, IN_MODIFY, NULL);
	event(in, "a file that was moved is closed", wd_moved, IN_CLOSE_WRITE, NULL);
	SYS(fchmod(in_kept, 0600));
	event(in, "mode of a file without a name", wd_gone, IN_ATTRIB, NULL);
	// The watch is on the link itself, not on what it leads to.
	SYS(fchownat(AT_FDCWD, path_of("link"), getuid(), getgid(), AT_SYMLINK_NOFOLLOW));
	event(in, "owner of a symlink", wd_link, IN_ATTRIB, NULL);
	SYS(chmod(path_of("w"), 0755));
	event(in_b, "mode of a directory", wd_only, IN_ATTRIB | IN_ISDIR, NULL);
	SYS(chmod(path_of("high"), 0600));
	event(in_b, "watch of a high number", wd_high, IN_ATTRIB, NULL);
	SYS(close(SYS(open(path_of("high"), O_RDONLY | O_CLOEXEC))));
	quiet(in, "after all");
	quiet(in_b, "after all");
	struct stat st;
	CHECK(fstat(in_full, &st) == 0, "fstat");
	int n;
	SYS(ioctl(in_full, FIONREAD, &n));
	CHECK(n > 0, "events that were queued left no trace");
	lost[in] = lost[in_b] = false;
}

COMMAND(inotify) {
	SYS(mkdir(path_of("w"), 0755));
	close(touch("plain", 0644));
	close(touch("moved", 0644));
	close(touch("high", 0644));
	in_kept = at_fd(30, touch("gone", 0644));
	SYS(symlink("nowhere", path_of("link")));
	in = at_fd(20, SYS(inotify_init1(IN_NONBLOCK | IN_CLOEXEC)));
	in_b = at_fd(21, SYS(inotify_init1(0)));
	in_full = at_fd(22, SYS(inotify_init1(IN_NONBLOCK)));
	SYS(inotify_add_watch(in, path_of("high"), IN_OPEN));
	wd_dir = SYS(inotify_add_watch(in, path_of("w"), IN_CREATE | IN_DELETE | IN_MOVE | IN_EXCL_UNLINK));
	wd_file = SYS(inotify_add_watch(in, path_of("plain"), IN_ATTRIB));
	wd_moved = SYS(inotify_add_watch(in, path_of("moved"), IN_MODIFY | IN_CLOSE_WRITE));
	wd_gone = SYS(inotify_add_watch(in, path_of("gone"), IN_ATTRIB));
	wd_link = SYS(inotify_add_watch(in, path_of("link"), IN_ATTRIB | IN_DONT_FOLLOW));
	wd_once = SYS(inotify_add_watch(in, "/etc/passwd", IN_MODIFY | IN_ONESHOT));
	SYS(inotify_rm_watch(in, 1)); // a gap in the numbers
	event(in, "a watch is removed", 1, IN_IGNORED, NULL);
	SYS(rename(path_of("moved"), path_of("moved-there")));
	close(touch("moved", 0644)); // another file at the path that the watch was made for
	SYS(unlink(path_of("gone")));
	event(in, "name is removed", wd_gone, IN_ATTRIB, NULL);
	for (int i = 0; i < 5000; i++) {
		wd_high = SYS(inotify_add_watch(in_b, path_of("high"), IN_ATTRIB));
		if (i < 4999) SYS(inotify_rm_watch(in_b, wd_high));
		if (i < 4999) event(in_b, "a watch is removed", wd_high, IN_IGNORED, NULL);
	}
	wd_only = SYS(inotify_add_watch(in_b, path_of("w"), IN_ATTRIB | IN_ONLYDIR));
	SYS(inotify_add_watch(in_full, path_of("plain"), IN_ATTRIB));
	SYS(chmod(path_of("plain"), 0600));
	event(in, "mode of a file", wd_file, IN_ATTRIB, NULL);
	in_ep = at_fd(23, SYS(epoll_create1(0)));
	struct epoll_event e = {.events = EPOLLIN, .data.u64 = 4711};
	SYS(epoll_ctl(in_ep, EPOLL_CTL_ADD, in, &e));
	watches(in, list[0], sizeof list[0]);
	watches(in_b, list[1], sizeof list[1]);
	for (int i = 20; i <= 23; i++) remember("inotify", i);
	loop(inotify_check);
	SYS(inotify_rm_watch(in, wd_once));
	event(in, "the one-shot watch is removed", wd_once, IN_IGNORED, NULL);
	// Events that waited when the program was dumped are lost, and it is told;
	// a program that was never moved has them.
	union { struct inotify_event e; char room[512]; } u;
	SYS(read(in_full, &u, sizeof u));
	CHECK(u.e.mask == IN_Q_OVERFLOW || u.e.mask == IN_ATTRIB, "the first queued event has mask %x", u.e.mask);
	int next = SYS(inotify_add_watch(in, path_of("high"), IN_OPEN));
	CHECK(next > wd_once, "a new watch has number %d, which is not above %d", next, wd_once);
}
