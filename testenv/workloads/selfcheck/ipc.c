// utsipc (sizes of messages that crit and CRIU pad alike): a tree in UTS and IPC namespaces of its own, with names, settings,
// semaphores, message queues and segments, some of them attached.
// semundo: semaphores of the host that are put back when the program ends.
#include "selfcheck.h"
#include <sched.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/utsname.h>

static int ui_sem, ui_msg, ui_empty, ui_full, ui_shm, ui_loose, ui_far;
static volatile char *ui_mem;
static unsigned short ui_values[5] = {1, 0, 32767, 7, 0};
struct ui_msgbuf {
	long type;
	char data[4096];
};

static void ui_text(const char *path, const char *want) {
	char got[64] = "";
	int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = SYS(read(fd, got, sizeof got - 1));
	SYS(close(fd));
	got[n] = 0;
	char *e = strchr(got, '\n');
	if (e) *e = 0;
	CHECK(strcmp(got, want) == 0, "%s says %s, want %s", path, got, want);
}

static void ui_check(void) {
	struct utsname u;
	SYS(uname(&u));
	CHECK(strcmp(u.nodename, "inner") == 0, "host name %s", u.nodename);
	CHECK(strcmp(u.domainname, "example.org") == 0, "domain name %s", u.domainname);
	ui_text("/proc/sys/kernel/msgmax", "5000");
	ui_text("/proc/sys/kernel/shmmni", "77");
	ui_text("/proc/sys/fs/mqueue/msg_max", "12");
	unsigned short v[5];
	SYS(semctl(ui_sem, 0, GETALL, v));
	CHECK(memcmp(v, ui_values, sizeof v) == 0, "semaphores: %d %d %d %d %d", v[0], v[1], v[2], v[3], v[4]);
	struct semid_ds sd;
	SYS(semctl(ui_sem, 0, IPC_STAT, &sd));
	CHECK(sd.sem_perm.mode == 0640 && sd.sem_perm.uid == 12 && sd.sem_perm.gid == 34 && sd.sem_perm.cuid == 0,
		"semaphores: mode %o of %d:%d", sd.sem_perm.mode, sd.sem_perm.uid, sd.sem_perm.gid);
	CHECK(semget(0x51, 0, 0) == ui_sem, "key of the semaphores");
	CHECK(msgget(0x52, 0) == ui_msg, "key of the queue");
	CHECK(shmget(0x53, 0, 0) == ui_shm, "key of the segment");
	struct msqid_ds md;
	SYS(msgctl(ui_msg, IPC_STAT, &md));
	CHECK(md.msg_qnum == 3 && md.msg_perm.mode == 0666 && md.msg_qbytes == 10000, "queue: %lu messages, mode %o, %lu bytes", md.msg_qnum, md.msg_perm.mode, md.msg_qbytes);
	SYS(msgctl(ui_empty, IPC_STAT, &md));
	CHECK(md.msg_qnum == 0, "empty queue: %lu messages", md.msg_qnum);
	// A semaphore goes up and down, a message goes round.
	struct sembuf up = {1, 1, 0}, down = {1, -1, 0};
	SYS(semop(ui_sem, &up, 1));
	SYS(semop(ui_sem, &down, 1));
	static int turn;
	struct ui_msgbuf m = {0};
	static const long types[3] = {5, 1, 9};
	static const int sizes[3] = {9, 3, 4001};
	ssize_t n = SYS(msgrcv(ui_msg, &m, sizeof m.data, 0, IPC_NOWAIT));
	CHECK(m.type == types[turn] && n == sizes[turn], "message of type %ld, %zd bytes", m.type, n);
	for (ssize_t i = 0; i < n; i++) CHECK(m.data[i] == (char)pattern(m.type, i), "message of type %ld differs at %zd", m.type, i);
	SYS(msgsnd(ui_msg, &m, n, IPC_NOWAIT));
	turn = (turn + 1) % 3;
	m.type = 1;
	CHECK(msgsnd(ui_full, &m, 16, IPC_NOWAIT) < 0 && errno == EAGAIN, "the full queue takes a message: %s", strerror(errno));
	struct shmid_ds hd;
	SYS(shmctl(ui_shm, IPC_STAT, &hd));
	CHECK(hd.shm_nattch == 2 && hd.shm_segsz == 10000, "segment: %lu attached, %zu bytes", hd.shm_nattch, hd.shm_segsz);
	for (int i = 0; i < 10000; i += 97) CHECK(ui_mem[i] == (char)pattern(3, i), "segment differs at %d", i);
	SYS(shmctl(ui_loose, IPC_STAT, &hd));
	CHECK(hd.shm_nattch == 0, "loose segment: %lu attached", hd.shm_nattch);
	char *p = shmat(ui_loose, NULL, SHM_RDONLY);
	CHECK(p != (void *)-1, "shmat: %s", strerror(errno));
	for (int i = 0; i < 5000; i += 97) CHECK(p[i] == (char)pattern(4, i), "loose segment differs at %d", i);
	SYS(shmdt(p));
	SYS(shmctl(ui_far, IPC_STAT, &hd));
	CHECK(hd.shm_perm.mode == (SHM_DEST | 0600) && hd.shm_nattch == 2, "removed segment: mode %o, %lu attached", hd.shm_perm.mode, hd.shm_nattch);
}

static void ui_set(const char *path, const char *text) {
	int fd = SYS(open(path, O_WRONLY | O_CLOEXEC));
	SYS(write(fd, text, strlen(text)));
	SYS(close(fd));
}

COMMAND(utsipc) {
	SYS(unshare(CLONE_NEWUTS | CLONE_NEWIPC));
	SYS(sethostname("inner", 5));
	SYS(setdomainname("example.org", 11));
	ui_set("/proc/sys/kernel/msgmax", "5000");
	ui_set("/proc/sys/kernel/shmmni", "77");
	ui_set("/proc/sys/fs/mqueue/msg_max", "12");
	SYS(semget(IPC_PRIVATE, 1, 0600)); // ids begin elsewhere than 0
	ui_sem = SYS(semget(0x51, 5, IPC_CREAT | IPC_EXCL | 0600));
	SYS(semctl(ui_sem, 0, SETALL, ui_values));
	struct semid_ds sd = {.sem_perm = {.uid = 12, .gid = 34, .mode = 0640}};
	SYS(semctl(ui_sem, 0, IPC_SET, &sd));
	int gap = SYS(msgget(IPC_PRIVATE, 0600));
	ui_msg = SYS(msgget(0x52, IPC_CREAT | IPC_EXCL | 0666));
	struct msqid_ds md;
	SYS(msgctl(ui_msg, IPC_STAT, &md));
	md.msg_qbytes = 10000;
	SYS(msgctl(ui_msg, IPC_SET, &md));
	ui_empty = SYS(msgget(IPC_PRIVATE, 0600));
	ui_full = SYS(msgget(IPC_PRIVATE, 0600));
	SYS(msgctl(gap, IPC_RMID, NULL));
	struct ui_msgbuf m;
	static const long types[3] = {5, 1, 9};
	static const int sizes[3] = {9, 3, 4001};
	for (int k = 0; k < 3; k++) {
		m.type = types[k];
		for (int i = 0; i < sizes[k]; i++) m.data[i] = pattern(types[k], i);
		SYS(msgsnd(ui_msg, &m, sizes[k], 0));
	}
	m.type = 1;
	memset(m.data, 0, sizeof m.data);
	while (msgsnd(ui_full, &m, 1001, IPC_NOWAIT) == 0) {}
	while (msgsnd(ui_full, &m, 1, IPC_NOWAIT) == 0) {}
	ui_shm = SYS(shmget(0x53, 10000, IPC_CREAT | IPC_EXCL | 0600));
	ui_mem = shmat(ui_shm, NULL, 0);
	for (int i = 0; i < 10000; i++) ui_mem[i] = pattern(3, i);
	ui_loose = SYS(shmget(IPC_PRIVATE, 5000, 0600));
	char *p = shmat(ui_loose, NULL, 0);
	for (int i = 0; i < 5000; i++) p[i] = pattern(4, i);
	SYS(shmdt(p));
	ui_far = SYS(shmget(IPC_PRIVATE, 4096, 0600));
	CHECK(shmat(ui_far, NULL, 0) != (void *)-1, "shmat: %s", strerror(errno));
	pid_t c = child();
	if (c == 0) {
		for (;; orphan_check()) {
			CHECK(semctl(ui_sem, 2, GETVAL) == 32767, "a child sees another semaphore");
			nap_ms(5);
		}
	}
	SYS(shmctl(ui_far, IPC_RMID, NULL));
	loop(ui_check);
	end_child(c);
}

// An IPC namespace with a POSIX message queue that nobody has open.
COMMAND(posixqueue) {
	SYS(unshare(CLONE_NEWIPC));
	SYS(syscall(SYS_close, SYS(syscall(SYS_mq_open, "left", O_RDWR | O_CREAT, 0600, NULL))));
	loop(NULL);
}

// POSIX message queues of the host, with messages of several priorities.

struct mq_state { long flags, maxmsg, msgsize, curmsgs, reserved[4]; };
static int mq_all, mq_in, mq_out;
static const char *mq_texts[] = {"third", "first", "fourth", "second"};
static const unsigned mq_prio[] = {5, 30, 0, 30};

static void mq_check(void) {
	recheck();
	struct mq_state st;
	SYS(syscall(SYS_mq_getsetattr, mq_all, NULL, &st));
	CHECK(st.curmsgs == 4 && st.maxmsg == 5 && st.msgsize == 64 && st.flags == O_NONBLOCK, "the queue has changed: %ld messages, flags %lo", st.curmsgs, st.flags);
	SYS(syscall(SYS_mq_getsetattr, mq_in, NULL, &st));
	CHECK(st.flags == 0, "flags of another descriptor: %lo", st.flags);
	SYS(syscall(SYS_mq_timedsend, mq_out, "last", 4, 0, NULL));
	CHECK(syscall(SYS_mq_timedsend, mq_all, "more", 4, 0, NULL) < 0 && errno == EAGAIN, "a full queue takes more");
	char b[64];
	unsigned prio;
	long n = syscall(SYS_mq_timedreceive, mq_in, b, sizeof b, &prio, NULL);
	CHECK(n == 5 && memcmp(b, "first", 5) == 0 && prio == 30, "received %ld bytes of priority %u", n, prio);
	// All over again.
	while (syscall(SYS_mq_timedreceive, mq_all, b, sizeof b, &prio, NULL) >= 0) {}
	for (int i = 0; i < 4; i++) SYS(syscall(SYS_mq_timedsend, mq_out, mq_texts[i], strlen(mq_texts[i]), mq_prio[i], NULL));
}

COMMAND(mqueue) {
	char name[64];
	snprintf(name, sizeof name, "selfcheck-%d", getpid());
	struct mq_state st = {.maxmsg = 5, .msgsize = 64};
	mq_all = SYS(syscall(SYS_mq_open, name, O_RDWR | O_CREAT | O_EXCL | O_NONBLOCK | O_CLOEXEC, 0600, &st));
	mq_in = SYS(syscall(SYS_mq_open, name, O_RDONLY, 0, NULL));
	mq_out = SYS(syscall(SYS_mq_open, name, O_WRONLY, 0, NULL));
	for (int i = 0; i < 4; i++) SYS(syscall(SYS_mq_timedsend, mq_out, mq_texts[i], strlen(mq_texts[i]), mq_prio[i], NULL));
	if (arg_count > 0) { // "notify": it is to be told of messages
		struct sigevent ev = {.sigev_notify = SIGEV_NONE};
		SYS(syscall(SYS_mq_notify, mq_all, &ev));
	}
	remember("message queue", mq_all);
	remember("message queue to read", mq_in);
	remember("message queue to write", mq_out);
	loop(arg_count > 0 ? NULL : mq_check); // a message to an empty queue ends that
	static const char *order[] = {"first", "second", "third", "fourth"};
	for (int i = 0; i < 4; i++) {
		char b[64];
		long n = syscall(SYS_mq_timedreceive, mq_all, b, sizeof b, NULL, NULL);
		CHECK(n == (long)strlen(order[i]) && memcmp(b, order[i], n) == 0, "message %d is another", i);
	}
	SYS(syscall(SYS_mq_unlink, name));
}

static int su_sem;

static void su_check(void) { CHECK(semctl(su_sem, 0, GETVAL) == 1, "semaphore changed"); }

static void *su_idle(void *arg) { return arg; }

// Its second word: "held" adjusts a semaphore with SEM_UNDO, "used" does not;
// "threads" had a thread, which gave it a list of adjustments, and one that came to
// nothing; "exec" executes this program after that.
COMMAND(semundo) {
	const char *how = arg_count > 0 ? arg_values[0] : "";
	if (strcmp(how, "threads") == 0 || strcmp(how, "exec") == 0) pthread_join(spawn(su_idle, NULL), NULL);
	if (strcmp(how, "exec") == 0) SYS(execl("/proc/self/exe", "selfcheck", "semundo", prefix, "used", (char *)NULL));
	su_sem = SYS(semget(0x5e4, 1, IPC_CREAT | 0600));
	SYS(semctl(su_sem, 0, SETVAL, 0));
	if (strcmp(how, "threads") == 0) {
		struct sembuf both[] = {{0, 5, SEM_UNDO}, {0, -5, SEM_UNDO}};
		SYS(semop(su_sem, &both[0], 1));
		SYS(semop(su_sem, &both[1], 1));
	}
	struct sembuf up = {0, 1, 0};
	if (strcmp(how, "held") == 0) up.sem_flg = SEM_UNDO;
	SYS(semop(su_sem, &up, 1));
	loop(su_check);
	SYS(semctl(su_sem, 0, IPC_RMID));
}
