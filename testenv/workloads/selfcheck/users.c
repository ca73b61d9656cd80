// ---- userns: a tree in a user namespace of its own, which unshare(1) made together
// with others: who everybody is, and what its root may do there.
#include "selfcheck.h"
#include <grp.h>
#include <linux/capability.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static struct {
	char uids[512], gids[512], setgroups[16];
	uid_t uid[3];
	gid_t gid[3], groups[64];
	int ngroups;
	struct __user_cap_data_struct caps[2];
} who;
static bool many; // users and groups 5 and 7 are there
static int own_pair[2], from_child, us_listener;
static pid_t us_child, us_dead;
static struct stat us_file;

static void slurp(const char *path, char *to, size_t size) {
	int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = read(fd, to, size - 1);
	CHECK(n >= 0, "read %s: %s", path, strerror(errno));
	to[n] = 0;
	close(fd);
}

static void look_at_self(typeof(who) *w) {
	memset(w, 0, sizeof *w);
	slurp("/proc/self/uid_map", w->uids, sizeof w->uids);
	slurp("/proc/self/gid_map", w->gids, sizeof w->gids);
	slurp("/proc/self/setgroups", w->setgroups, sizeof w->setgroups);
	SYS(getresuid(&w->uid[0], &w->uid[1], &w->uid[2]));
	SYS(getresgid(&w->gid[0], &w->gid[1], &w->gid[2]));
	w->ngroups = SYS(getgroups(64, w->groups));
	struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
	SYS(syscall(SYS_capget, &h, w->caps));
}

static struct ucred peer_of(int fd) {
	struct ucred c;
	socklen_t n = sizeof c;
	SYS(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &n));
	return c;
}

static void userns_check(void) {
	typeof(who) now;
	look_at_self(&now);
	CHECK(strcmp(now.uids, who.uids) == 0 && strcmp(now.gids, who.gids) == 0, "the maps were %s%sand are %s%s", who.uids, who.gids, now.uids, now.gids);
	CHECK(strcmp(now.setgroups, who.setgroups) == 0, "setgroups was %s and is %s", who.setgroups, now.setgroups);
	CHECK(memcmp(now.uid, who.uid, sizeof now.uid) == 0 && memcmp(now.gid, who.gid, sizeof now.gid) == 0, "user and group were %d %d and are %d %d", who.uid[1], who.gid[1], now.uid[1], now.gid[1]);
	CHECK(now.ngroups == who.ngroups && memcmp(now.groups, who.groups, sizeof now.groups) == 0, "%d groups, had %d", now.ngroups, who.ngroups);
	CHECK(memcmp(now.caps, who.caps, sizeof now.caps) == 0, "capabilities were %x and are %x", who.caps[0].effective, now.caps[0].effective);
	struct ucred a = peer_of(own_pair[0]), b = peer_of(from_child);
	CHECK(a.pid == getpid() && a.uid == who.uid[1] && a.gid == who.gid[1], "the pair is of pid %d, user %d, group %d", a.pid, a.uid, a.gid);
	CHECK(b.pid == us_child && b.uid == (many ? 5 : who.uid[1]) && b.gid == (many ? 7 : who.gid[1]), "the child's socket is of pid %d, user %d, group %d", b.pid, b.uid, b.gid);
	char c = 'x';
	CHECK(SYS(send(from_child, &c, 1, MSG_NOSIGNAL)) == 1 && read_all(from_child, &c, 1) == 1 && c == 'y', "the child answers %c", c);
	expect_alive(us_child);
	struct stat st;
	SYS(stat(path_of("tmpfs/file"), &st));
	CHECK(st.st_uid == us_file.st_uid && st.st_gid == us_file.st_gid && st.st_mode == us_file.st_mode, "a file is of %d:%d, was of %d:%d", st.st_uid, st.st_gid, us_file.st_uid, us_file.st_gid);
	// What only the root of the namespaces may.
	close(SYS(open(path_of("tmpfs/now"), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600)));
	SYS(unlink(path_of("tmpfs/now")));
	SYS(sethostname("inside", 6));
	SYS(mount("none", path_of("point"), "tmpfs", 0, NULL));
	SYS(umount(path_of("point")));
	if (many) {
		SYS(chown(path_of("tmpfs/other"), 5, 7));
		SYS(chown(path_of("tmpfs/other"), 0, 0));
	}
	CHECK(access("/proc/1/status", R_OK) == 0 && access("/proc/2/status", R_OK) == 0, "/proc is of others");
}

static void us_put(const char *path, const char *text) {
	int fd = SYS(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
	CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "write %s", path);
	close(fd);
}

// us_enter makes all namespaces, with many users, and goes on as pid 1 of them.
static void us_enter(void) {
	int up[2], go[2];
	char c, path[64], text[32];
	SYS(pipe2(up, O_CLOEXEC));
	SYS(pipe2(go, O_CLOEXEC));
	pid_t self = getpid(), maker = SYS(fork());
	if (maker == 0) {
		// Whoever is outside of a namespace may map any users.
		CHECK(read_all(up[0], &c, 1) == 1, "no namespace");
		const char *files[] = {"uid_map", "gid_map"};
		for (int i = 0; i < 2; i++) {
			snprintf(path, sizeof path, "/proc/%d/%s", self, files[i]);
			us_put(path, "0 100000 20000\n30000 200000 1\n");
		}
		SYS(write(go[1], "x", 1));
		_exit(0);
	}
	SYS(chmod(path_of("log"), 0666)); // those inside are nobody to it
	SYS(unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET));
	SYS(write(up[1], "x", 1));
	CHECK(read_all(go[0], &c, 1) == 1, "no users");
	SYS(waitpid(maker, NULL, 0));
	pid_t pid = SYS(fork());
	if (pid) {
		snprintf(text, sizeof text, "%d", pid);
		us_put(path_of("pid"), text);
		waitpid(pid, NULL, 0);
		_exit(0);
	}
	SYS(setsid());
	for (int i = 0; i < 2; i++) close(up[i]), close(go[i]);
	SYS(setgroups(2, (gid_t[]){3, 30000}));
	SYS(setresgid(0, 0, 0));
	SYS(setresuid(0, 0, 0));
	SYS(mount("proc", "/proc", "proc", 0, NULL));
}

// userns PREFIX [many]: with many it makes the namespaces itself.
COMMAND(userns) {
	if (arg_count > 0) us_enter();
	CHECK(getpid() == 1, "not the first process of its pid namespace");
	look_at_self(&who);
	unsigned first, outer, count;
	CHECK(sscanf(who.uids, "%u %u %u", &first, &outer, &count) == 3, "no users");
	many = first == 0 && count > 7;
	SYS(mkdir(path_of("tmpfs"), 0777));
	SYS(mkdir(path_of("point"), 0777));
	SYS(mount("none", path_of("tmpfs"), "tmpfs", 0, "mode=755"));
	close(SYS(open(path_of("tmpfs/file"), O_CREAT | O_WRONLY | O_CLOEXEC, 0640)));
	close(SYS(open(path_of("tmpfs/other"), O_CREAT | O_WRONLY | O_CLOEXEC, 0640)));
	if (many) SYS(chown(path_of("tmpfs/file"), 5, 7));
	SYS(stat(path_of("tmpfs/file"), &us_file));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, own_pair));
	us_listener = SYS(socket(AF_UNIX, SOCK_STREAM, 0));
	struct sockaddr_un a = {AF_UNIX, ""};
	SYS(bind(us_listener, (struct sockaddr *)&a, sizeof(sa_family_t)));
	socklen_t n = sizeof a;
	SYS(getsockname(us_listener, (struct sockaddr *)&a, &n));
	SYS(listen(us_listener, 5));
	us_child = child();
	if (us_child == 0) {
		if (many) {
			SYS(setgroups(1, (gid_t[]){9}));
			SYS(setresgid(7, 7, 7));
			SYS(setresuid(5, 5, 5));
		}
		int fd = SYS(socket(AF_UNIX, SOCK_STREAM, 0));
		SYS(connect(fd, (struct sockaddr *)&a, n));
		for (char c;;) {
			ssize_t r = read(fd, &c, 1);
			if (r == 0) _exit(0);
			CHECK(r == 1 && c == 'x', "the child reads %zd", r);
			CHECK(!many || (getuid() == 5 && getegid() == 7), "the child is %d:%d", getuid(), getegid());
			c = 'y';
			CHECK(write(fd, &c, 1) == 1, "write");
		}
	}
	from_child = SYS(accept(us_listener, NULL, NULL));
	us_dead = child();
	if (us_dead == 0) {
		if (many) SYS(setresuid(6, 6, 6));
		_exit(3);
	}
	siginfo_t si;
	SYS(waitid(P_PID, us_dead, &si, WEXITED | WNOWAIT));
	loop(userns_check);
	SYS(waitid(P_PID, us_dead, &si, WEXITED));
	CHECK(si.si_status == 3 && si.si_uid == (many ? 6 : who.uid[0]), "a dead child ended with %d and was user %d", si.si_status, si.si_uid);
	end_child(us_child);
	SYS(umount(path_of("tmpfs")));
}
