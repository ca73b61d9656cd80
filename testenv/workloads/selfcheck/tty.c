// Terminals.
#include "selfcheck.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>

// struct termios2 (include/uapi/asm-generic/termbits.h), which <termios.h> hides.
struct settings {
	uint32_t i, o, c, l;
	uint8_t line, cc[19];
	uint32_t ispeed, ospeed;
};
#define GET_SETTINGS _IOR('T', 0x2A, struct settings)
#define SET_SETTINGS _IOW('T', 0x2B, struct settings)
#define GET_PEER _IO('T', 0x41)

static struct settings settings(int fd) {
	struct settings s = {0};
	SYS(ioctl(fd, GET_SETTINGS, &s));
	return s;
}

static int number(int fd, unsigned long req) {
	int n = -1;
	SYS(ioctl(fd, req, &n));
	return n;
}

static short events(int fd) {
	struct pollfd p = {.fd = fd, .events = POLLIN | POLLOUT | POLLPRI | POLLRDHUP};
	SYS(poll(&p, 1, 0));
	return p.revents;
}

// pair makes a pseudoterminal; the master gets the number at, the slave at + 1.
static void pair(int at) {
	int m = at_fd(at, SYS(open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC)));
	int zero = 0;
	SYS(ioctl(m, TIOCSPTLCK, &zero));
	at_fd(at + 1, SYS(ioctl(m, GET_PEER, O_RDWR | O_NOCTTY)));
}

static void raw(int s) {
	struct settings k = settings(s);
	k.i = k.o = k.l = 0;
	SYS(ioctl(s, SET_SETTINGS, &k));
}

static void put(int fd, const void *b, size_t n) {
	ssize_t w = write(fd, b, n);
	CHECK(w == (ssize_t)n, "write of %zu bytes to fd %d: %zd, %s", n, fd, w, strerror(errno));
}
static void puts_to(int fd, const char *text) { put(fd, text, strlen(text)); }

// await_input waits until a terminal has n bytes, which the kernel hands on by itself.
static void await_input(int fd, int n) {
	for (int i = 0; number(fd, FIONREAD) != n; i++) {
		CHECK(i < PATIENCE_MS, "fd %d has %d bytes to be read, want %d", fd, number(fd, FIONREAD), n);
		nap_ms(1);
	}
}

// want reads what has to be there, in one read.
static void want(int fd, const void *b, size_t n, const char *what) {
	static char got[8192];
	ssize_t r = read(fd, got, sizeof got);
	CHECK(r == (ssize_t)n, "%s: read %zd bytes, want %zu: %.*s", what, r, n, r > 0 ? (int)r : 0, got);
	for (size_t i = 0; i < n; i++)
		CHECK(got[i] == ((const char *)b)[i], "%s: byte %zu is %02x, want %02x", what, i, got[i] & 0xff, ((const char *)b)[i] & 0xff);
}
// want_all reads what has to be there, in as many reads as it takes.
static void want_all(int fd, const char *b, size_t n, const char *what) {
	char got[256];
	for (size_t at = 0; at < n;) {
		ssize_t r = read(fd, got, n - at);
		CHECK(r > 0, "%s: read %zd: %s", what, r, strerror(errno));
		CHECK(memcmp(got, b + at, r) == 0, "%s: read \"%.*s\", want \"%s\"", what, (int)r, got, b + at);
		at += r;
	}
}

static void want_text(int fd, const char *text, const char *what) { want(fd, text, strlen(text), what); }

static char *path_at_fd(int fd) {
	char *p;
	if (asprintf(&p, "/proc/self/fd/%d", fd) < 0) abort();
	return p;
}

// What must stay of a terminal.
static struct term {
	int fd;
	bool master, hung;
	struct settings s;
	uint8_t locked[36];
	struct winsize w;
	int lock, packet, excl, in;
	short events;
	struct stat st;
	char link[64];
} terms[40];
static int nterms;

static void look(struct term *t) {
	SYS(fstat(t->fd, &t->st));
	memset(t->link, 0, sizeof t->link);
	char *at = path_at_fd(t->fd);
	SYS(readlink(at, t->link, sizeof t->link - 1));
	free(at);
	t->events = events(t->fd);
	if (t->hung) return;
	t->s = settings(t->fd);
	SYS(ioctl(t->fd, 0x5456 /* TIOCGLCKTRMIOS */, t->locked));
	SYS(ioctl(t->fd, TIOCGWINSZ, &t->w));
	t->excl = number(t->fd, TIOCGEXCL);
	t->in = number(t->fd, FIONREAD);
	if (!t->master) return;
	t->lock = number(t->fd, TIOCGPTLCK);
	t->packet = number(t->fd, TIOCGPKT);
}

static void keep(int fd, bool master) {
	struct term *t = &terms[nterms++];
	*t = (struct term){.fd = fd, .master = master};
	int n;
	t->hung = ioctl(fd, TIOCGWINSZ, &t->w) < 0 || ioctl(fd, FIONREAD, &n) < 0;
	look(t);
}

static void terms_check(void) {
	for (int i = 0; i < nterms; i++) {
		struct term *a = &terms[i], b = {.fd = a->fd, .master = a->master, .hung = a->hung};
		look(&b);
		CHECK(strcmp(a->link, b.link) == 0, "fd %d: was %s and is %s", a->fd, a->link, b.link);
		CHECK(a->st.st_mode == b.st.st_mode && a->st.st_uid == b.st.st_uid && a->st.st_gid == b.st.st_gid && a->st.st_rdev == b.st.st_rdev,
			"fd %d: node was %o %u:%u %lx and is %o %u:%u %lx", a->fd, a->st.st_mode, a->st.st_uid, a->st.st_gid, a->st.st_rdev,
			b.st.st_mode, b.st.st_uid, b.st.st_gid, b.st.st_rdev);
		CHECK(a->events == b.events, "fd %d: events were %x and are %x", a->fd, a->events, b.events);
		if (a->hung) continue;
		CHECK(memcmp(&a->s, &b.s, sizeof a->s) == 0, "fd %d: settings were %x %x %x %x and are %x %x %x %x", a->fd,
			a->s.i, a->s.o, a->s.c, a->s.l, b.s.i, b.s.o, b.s.c, b.s.l);
		CHECK(memcmp(a->locked, b.locked, 36) == 0, "fd %d: locks on settings changed", a->fd);
		CHECK(memcmp(&a->w, &b.w, sizeof a->w) == 0, "fd %d: size was %d %d and is %d %d", a->fd, a->w.ws_row, a->w.ws_col, b.w.ws_row, b.w.ws_col);
		CHECK(a->excl == b.excl && a->lock == b.lock && a->packet == b.packet, "fd %d: exclusive, lock, packet were %d %d %d and are %d %d %d",
			a->fd, a->excl, a->lock, a->packet, b.excl, b.lock, b.packet);
		CHECK(a->in == b.in, "fd %d: %d bytes waited and %d do", a->fd, a->in, b.in);
	}
	recheck();
}

// ---- pty: pairs in every state.

enum { RAW = 20, LINES = 24, LOCKED = 28, CLOSED = 32, HUNG = 36, STOPPED = 40, HELD = 44, LIVE = 48, FULL = 52 };
static char binary[3000];
static int full_out;

static void pty_live(void) {
	static uint32_t n;
	char line[32], echo[40];
	int len = snprintf(line, sizeof line, "line %u\n", ++n);
	put(LIVE, line, len);
	want(LIVE + 1, line, len, "a line");
	int elen = snprintf(echo, sizeof echo, "line %u\r\n", n);
	want_all(LIVE, echo, elen, "its echo");
	puts_to(LIVE + 1, "out\n");
	want_all(LIVE, "out\r\n", 5, "output");
	// The hung-up one is at its end for good.
	char c;
	CHECK(read(HUNG + 1, &c, 1) == 0, "a terminal that hung up can be read");
	CHECK(write(HUNG + 1, "x", 1) < 0 && errno == EIO, "a terminal that hung up can be written");
	terms_check();
}

COMMAND(pty) {
	for (size_t i = 0; i < sizeof binary; i++) binary[i] = pattern(7, i);
	for (int at = RAW; at <= FULL; at += 4) pair(at);

	raw(RAW + 1);
	put(RAW, binary, sizeof binary);
	await_input(RAW + 1, sizeof binary);
	put(RAW + 1, binary, 2000);
	await_input(RAW, 2000);
	struct winsize w = {.ws_row = 33, .ws_col = 101, .ws_xpixel = 7, .ws_ypixel = 9};
	SYS(ioctl(RAW, TIOCSWINSZ, &w));
	at_fd(RAW + 2, SYS(ioctl(RAW, GET_PEER, O_RDONLY | O_NONBLOCK | O_NOCTTY)));
	at_fd(RAW + 3, SYS(open(path_at_fd(RAW + 1), O_WRONLY | O_APPEND | O_NOCTTY | O_CLOEXEC)));
	SYS(fchmod(RAW + 1, 0602));
	if (geteuid() == 0) SYS(fchown(RAW + 1, 3, 4));

	struct settings k = settings(LINES + 1);
	k.cc[11] = '%';        // VEOL
	k.cc[16] = 0x16;       // VEOL2, which is ^V
	k.cc[15] = 'L' - '@';  // VLNEXT, which is ^L
	k.c = (k.c & ~0x100f) | 0x1000; // BOTHER
	k.ispeed = k.ospeed = 12345;
	SYS(ioctl(LINES + 1, SET_SETTINGS, &k));
	const char typed[] = "first\nsecond%third\x16" "half\x04\x04" "ctrl-\x0c\x03-\x0c\x0a-\n\xff\x80 end\nnot yet";
	put(LINES, typed, sizeof typed - 1);
	// The ends of file and characters that take the next literally are no bytes.
	await_input(LINES + 1, sizeof typed - 1 - 4 - 7);

	w.ws_row = 1;
	SYS(ioctl(LOCKED, TIOCSWINSZ, &w));
	int one = 1;
	SYS(ioctl(LOCKED, TIOCPKT, &one));
	puts_to(LOCKED + 1, "packet");
	await_input(LOCKED, 6);
	uint8_t locked[36] = {0xff, 1, 0, 0, 2};
	if (geteuid() == 0) SYS(ioctl(LOCKED, 0x5457 /* TIOCSLCKTRMIOS */, locked));
	SYS(ioctl(LOCKED + 1, TIOCEXCL));
	SYS(ioctl(LOCKED, TIOCSPTLCK, &one));

	puts_to(CLOSED + 1, "last words\n");
	await_input(CLOSED, 12);
	puts_to(CLOSED, "nobody reads\n");
	await_input(CLOSED, 12 + 14);
	close(CLOSED + 1);

	puts_to(HUNG, "lost\n");
	at_fd(HUNG + 2, SYS(ioctl(HUNG, GET_PEER, O_RDONLY | O_NONBLOCK | O_NOCTTY)));
	close(HUNG);

	puts_to(STOPPED + 1, "before");
	puts_to(STOPPED, "\x13");
	while (events(STOPPED + 1) & POLLOUT) nap_ms(1);
	await_input(STOPPED, 6);
	SYS(fcntl(STOPPED + 1, F_SETFL, O_NONBLOCK));
	CHECK(write(STOPPED + 1, "x", 1) < 0 && errno == EAGAIN, "stopped output goes on");
	SYS(ioctl(HELD + 1, TCXONC, TCOOFF));
	SYS(fcntl(HELD + 1, F_SETFL, O_NONBLOCK));

	// More than the line discipline holds: the rest waits before it.
	raw(FULL + 1);
	SYS(fcntl(FULL, F_SETFL, O_NONBLOCK));
	SYS(fcntl(FULL + 1, F_SETFL, O_NONBLOCK));
	for (int quiet = 0; quiet < 20;) {
		ssize_t n = write(FULL + 1, binary + full_out % 500, 500 - full_out % 500);
		if (n < 0) {
			nap_ms(1);
			quiet++;
			continue;
		}
		quiet = 0;
		full_out += n;
	}
	CHECK(full_out > 5000, "only %d bytes fit", full_out);

	for (int at = RAW; at <= FULL; at += 4) {
		if (at != HUNG) keep(at, true);
		if (at != CLOSED) keep(at + 1, false);
	}
	keep(RAW + 2, false);
	keep(RAW + 3, false);
	keep(HUNG + 2, false);
	for (int i = 0; i < nterms; i++) remember("terminal", terms[i].fd);
	loop(pty_live);

	want(RAW + 2, binary, sizeof binary, "raw input");
	want(RAW, binary, 2000, "raw output");
	puts_to(RAW, "abc");
	want_text(RAW + 1, "abc", "new raw input");
	want_text(LINES + 1, "first\n", "line");
	want_text(LINES + 1, "second%", "line that ends in EOL");
	want_text(LINES + 1, "third\x16", "line that ends in EOL2");
	want_text(LINES + 1, "half", "line that ends in an end of file");
	want_text(LINES + 1, "", "end of file");
	want_text(LINES + 1, "ctrl-\x03-\x0a-\n", "line with control characters");
	want_text(LINES + 1, "\xff\x80 end\n", "line with other characters");
	SYS(fcntl(LINES + 1, F_SETFL, O_NONBLOCK));
	char c;
	CHECK(read(LINES + 1, &c, 1) < 0 && errno == EAGAIN, "a line that is not complete can be read");
	// It can be edited still.
	puts_to(LINES, "\x7f!\n");
	for (int i = 0; !(events(LINES + 1) & POLLIN); i++) {
		CHECK(i < PATIENCE_MS, "no line came");
		nap_ms(1);
	}
	want_text(LINES + 1, "not ye!\n", "rest of a line");
	want(LOCKED, "\0packet", 7, "packet");
	SYS(ioctl(LOCKED + 1, TCFLSH, TCOFLUSH));
	want(LOCKED, "\x02", 1, "event of packet mode");
	want_text(CLOSED, "last words\r\nnobody reads\r\n", "output of a closed terminal");
	CHECK(read(CLOSED, &c, 1) < 0 && errno == EIO, "a master of a closed terminal is not at its end: %s", strerror(errno));
	at_fd(CLOSED + 1, SYS(ioctl(CLOSED, GET_PEER, O_RDWR | O_NOCTTY)));
	want_text(CLOSED + 1, "nobody reads\n", "what waited in a closed terminal");
	want_text(STOPPED, "before", "output before the stop");
	SYS(ioctl(STOPPED + 1, TCXONC, TCOON));
	CHECK(!(events(STOPPED + 1) & POLLOUT), "tcflow ends a stop by ^S");
	puts_to(STOPPED, "\x11");
	for (int i = 0; !(events(STOPPED + 1) & POLLOUT); i++) {
		CHECK(i < PATIENCE_MS, "^Q does not start the output");
		nap_ms(1);
	}
	puts_to(HELD, "\x11");
	nap_ms(5);
	CHECK(!(events(HELD + 1) & POLLOUT), "^Q ends a stop by tcflow");
	SYS(ioctl(HELD + 1, TCXONC, TCOON));
	puts_to(HELD + 1, "on");
	want_text(HELD, "on", "output after tcflow");
	static char all[1 << 16];
	int got = 0;
	for (int quiet = 0; quiet < 20 && got < full_out;) {
		ssize_t n = read(FULL, all + got, sizeof all - got);
		if (n <= 0) {
			nap_ms(1);
			quiet++;
		} else
			got += n;
	}
	CHECK(got == full_out, "a full terminal gave %d bytes, want %d", got, full_out);
	for (int i = 0; i < got; i++) CHECK(all[i] == binary[i % 500], "a full terminal: byte %d is another", i);
}

// ---- ptyjobs: sessions with controlling terminals and jobs in all states, as a
// shell has them. The root has the masters.

enum { MASTER = 20, SLAVE = 21, DEVTTY = 22, MASTER2 = 24, SLAVE2 = 25 };
static struct {
	volatile pid_t leader, front, stopped, detached, back, leader2, dead;
	volatile int winch, ints, ready; // of the front job
	volatile int unexpected, unexpected_sig, ending;
	volatile uint64_t rounds;
} *jobs;

static void on_unexpected(int sig) {
	jobs->unexpected_sig = sig;
	jobs->unexpected = getpid();
}
static void on_winch(int sig) {
	(void)sig;
	jobs->winch++;
}
static void on_int(int sig) {
	(void)sig;
	jobs->ints++;
}

static pid_t job(void) {
	pid_t pid = SYS(fork());
	SYS(setpgid(pid, pid)); // of itself, or of the child, whoever comes first
	return pid;
}

// forsaken ends a descendant of a root that failed.
static void forsaken(pid_t parent) {
	if (getppid() == 1 || getppid() != parent) _exit(2);
}

static char state_of(pid_t pid) {
	char path[40], b[256];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = SYS(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = SYS(read(fd, b, sizeof b - 1));
	close(fd);
	b[n] = 0;
	return strrchr(b, ')')[2];
}

static void take_session(int at, const char *name) {
	SYS(setsid());
	for (int sig = 1; sig < 32; sig++)
		if (sig != SIGKILL && sig != SIGSTOP && sig != SIGCHLD && sig != SIGTTOU && sig != SIGSEGV) signal(sig, on_unexpected);
	signal(SIGTTOU, SIG_IGN);
	at_fd(at, SYS(open(name, O_RDWR)));
	CHECK(tcgetsid(at) == getpid(), "%s did not become the controlling terminal", name);
}

static _Noreturn void front_job(void) {
	pid_t parent = getppid();
	signal(SIGWINCH, on_winch);
	struct sigaction sa = {.sa_handler = on_int};
	SYS(sigaction(SIGINT, &sa, NULL));
	signal(SIGTSTP, SIG_DFL);
	while (tcgetpgrp(SLAVE) != getpid()) usleep(1000);
	jobs->ready = 1;
	for (;;) {
		char b[64];
		ssize_t n = read(SLAVE, b, sizeof b - 1);
		if (n < 0 && errno == EINTR) {
			forsaken(parent);
			continue;
		}
		if (n <= 0 && jobs->ending) _exit(0);
		CHECK(n > 0, "the front job reads %zd: %s", n, strerror(errno));
		b[n] = 0;
		char r[64];
		int len = snprintf(r, sizeof r, "%lu\n", 2 * strtoul(b, NULL, 10));
		put(SLAVE, r, len);
	}
}

static _Noreturn void lead(const char *name) {
	pid_t root = getppid();
	take_session(SLAVE, name);
	at_fd(DEVTTY, SYS(open("/dev/tty", O_RDWR | O_CLOEXEC)));
	struct termios t;
	SYS(tcgetattr(SLAVE, &t));
	t.c_lflag &= ~ECHO;
	t.c_oflag &= ~OPOST;
	SYS(tcsetattr(SLAVE, TCSANOW, &t));
	pid_t pid;
	if ((pid = job()) == 0) front_job();
	jobs->front = pid;
	SYS(tcsetpgrp(SLAVE, jobs->front));
	if ((pid = job()) == 0) {
		signal(SIGTTIN, SIG_DFL);
		char b[64];
		ssize_t n = SYS(read(SLAVE, b, sizeof b)); // stops it
		put(SLAVE, "job ", 4);
		put(SLAVE, b, n);
		_exit(5);
	}
	jobs->stopped = pid;
	int st;
	CHECK(SYS(waitpid(jobs->stopped, &st, WUNTRACED)) == jobs->stopped && WIFSTOPPED(st) && WSTOPSIG(st) == SIGTTIN, "the job in the background got %x", st);
	if ((pid = job()) == 0) {
		pid_t leader = getppid();
		SYS(ioctl(SLAVE, TIOCNOTTY));
		for (;; usleep(5000)) {
			forsaken(leader);
			CHECK(open("/dev/tty", O_RDWR) < 0 && errno == ENXIO, "the detached job has a terminal again");
			CHECK(getsid(0) == leader, "the detached job is in session %d", getsid(0));
		}
	}
	jobs->detached = pid;
	if ((pid = job()) == 0) {
		pid_t leader = getppid(), front = jobs->front;
		for (;; usleep(5000)) {
			forsaken(leader);
			CHECK(tcgetpgrp(SLAVE) == front || jobs->ending, "seen from the background, group %d is in front, want %d", tcgetpgrp(SLAVE), front);
			int fd = SYS(open("/dev/tty", O_RDWR | O_CLOEXEC));
			close(fd);
		}
	}
	jobs->back = pid;
	remember("terminal", SLAVE);
	remember("/dev/tty", DEVTTY);
	jobs->leader = getpid();
	char link[20] = {0};
	for (;; usleep(5000)) {
		forsaken(root);
		recheck();
		jobs->rounds++;
		CHECK(tcgetsid(SLAVE) == getpid() && tcgetsid(DEVTTY) == getpid(), "the session of the terminal is %d and %d", tcgetsid(SLAVE), tcgetsid(DEVTTY));
		SYS(readlink("/proc/self/fd/22", link, sizeof link - 1));
		CHECK(strcmp(link, "/dev/tty") == 0, "/dev/tty is %s", link);
		// After a dump it runs for an instant, into its stop.
		for (int i = 0; state_of(jobs->stopped) != 'T'; i++) {
			CHECK(i < PATIENCE_MS, "the stopped job is in state %c", state_of(jobs->stopped));
			usleep(1000);
		}
		expect_alive(jobs->detached);
		expect_alive(jobs->back);
		siginfo_t si = {0};
		SYS(waitid(P_PID, jobs->front, &si, WSTOPPED | WEXITED | WNOHANG));
		if (si.si_pid == 0) {
			CHECK(tcgetpgrp(SLAVE) == jobs->front, "group %d is in front, want %d", tcgetpgrp(SLAVE), jobs->front);
			continue;
		}
		// The end has begun: the root typed ^Z.
		CHECK(si.si_code == CLD_STOPPED && si.si_status == SIGTSTP, "the front job: code %d status %d", si.si_code, si.si_status);
		jobs->ending = 1;
		SYS(tcsetpgrp(DEVTTY, jobs->stopped));
		SYS(kill(-jobs->stopped, SIGCONT));
		CHECK(SYS(waitpid(jobs->stopped, &st, 0)) == jobs->stopped && WIFEXITED(st) && WEXITSTATUS(st) == 5, "the continued job ended with %x", st);
		SYS(tcsetpgrp(SLAVE, getpgrp()));
		signal(SIGHUP, SIG_DFL);
		put(SLAVE, "bye\n", 4);
		for (;;) pause(); // until the terminal hangs up
	}
}

// lead2 has a terminal in front of which no process is any more.
static _Noreturn void lead2(const char *name) {
	pid_t root = getppid();
	take_session(SLAVE2, name);
	pid_t dead = job();
	if (dead == 0) _exit(0);
	SYS(tcsetpgrp(SLAVE2, dead));
	SYS(waitpid(dead, NULL, 0));
	jobs->dead = dead;
	jobs->leader2 = getpid();
	for (;; usleep(5000)) {
		forsaken(root);
		CHECK(tcgetpgrp(SLAVE2) == dead, "group %d is in front of the second terminal, want %d", tcgetpgrp(SLAVE2), dead);
		CHECK(tcgetsid(SLAVE2) == getpid(), "the second terminal is of session %d", tcgetsid(SLAVE2));
	}
}

static void ptyjobs_check(void) {
	static uint64_t n;
	static int sizes;
	recheck();
	CHECK(!jobs->unexpected, "signal %d came to pid %d", jobs->unexpected_sig, jobs->unexpected);
	char b[64], want_b[64];
	n++;
	int len = snprintf(b, sizeof b, "%lu\n", n), wlen = snprintf(want_b, sizeof want_b, "%lu\n", 2 * n);
	put(MASTER, b, len);
	want_all(MASTER, want_b, wlen, "reply of the front job");
	CHECK(jobs->winch == sizes, "the front job was told %d times of a new size, want %d", jobs->winch, sizes);
	if (n % 16 == 0) {
		struct winsize w = {.ws_row = 20 + n % 50, .ws_col = 80};
		SYS(ioctl(MASTER, TIOCSWINSZ, &w));
		sizes++;
		for (int i = 0; jobs->winch != sizes; i++) {
			CHECK(i < PATIENCE_MS, "the front job is not told of a new size");
			nap_ms(1);
		}
	}
	expect_alive(jobs->leader);
	expect_alive(jobs->leader2);
}

COMMAND(ptyjobs) {
	jobs = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pair(MASTER);
	pair(MASTER2);
	char name[32], name2[32];
	SYS(ptsname_r(MASTER, name, sizeof name));
	SYS(ptsname_r(MASTER2, name2, sizeof name2));
	// Members first: a terminal with its session open nowhere else hangs up.
	if (child() == 0) {
		close(MASTER), close(SLAVE), close(MASTER2), close(SLAVE2);
		lead(name);
	}
	if (child() == 0) {
		close(MASTER), close(SLAVE), close(MASTER2), close(SLAVE2);
		lead2(name2);
	}
	while (!jobs->leader || !jobs->leader2 || !jobs->ready) nap_ms(1);
	close(SLAVE);
	close(SLAVE2);
	SYS(fcntl(MASTER2, F_SETFL, O_NONBLOCK));
	remember("master", MASTER);
	remember("master", MASTER2);
	loop(ptyjobs_check);
	uint64_t rounds = jobs->rounds;
	puts_to(MASTER, "\x03");
	for (int i = 0; jobs->ints != 1; i++) {
		CHECK(i < PATIENCE_MS, "^C does not reach the front job");
		nap_ms(1);
	}
	puts_to(MASTER, "\x1a");
	for (int i = 0; state_of(jobs->front) != 'T'; i++) {
		CHECK(i < PATIENCE_MS, "^Z does not stop the front job");
		nap_ms(1);
	}
	puts_to(MASTER, "hello\n");
	char got[32];
	size_t n = 0;
	while (n < 14) {
		ssize_t r = SYS(read(MASTER, got + n, sizeof got - n));
		n += r;
	}
	CHECK(n == 14 && memcmp(got, "job hello\nbye\n", 14) == 0, "the continued job said %.*s", (int)n, got);
	CHECK(jobs->rounds >= rounds, "the leader counts backwards");
	close(MASTER);
	int st;
	CHECK(SYS(waitpid(jobs->leader, &st, 0)) == jobs->leader && WIFSIGNALED(st) && WTERMSIG(st) == SIGHUP, "the leader ended with %x", st);
	end_child(jobs->leader2);
	kill(jobs->back, SIGKILL); // who ends with their parent, if they have not yet
	kill(jobs->detached, SIGKILL);
	kill(jobs->front, SIGKILL);
}

// ---- shelljob [job]: a program on a terminal that somebody else made. It answers
// lines; with an argument it is a job of the terminal's session, in the foreground.

static struct settings shelljob_settings;
static sigset_t shelljob_winch;

static void shelljob_check(void) {
	static char line[128];
	static size_t n;
	recheck();
	struct settings now = settings(0);
	CHECK(memcmp(&now, &shelljob_settings, sizeof now) == 0, "settings of the terminal changed: %x %x %x %x", now.i, now.o, now.c, now.l);
	if (arg_count > 0) {
		CHECK(tcgetpgrp(0) == getpgrp(), "group %d is in the foreground, want %d", tcgetpgrp(0), getpgrp());
		CHECK(tcgetsid(0) == getsid(0), "the terminal is of session %d, want %d", tcgetsid(0), getsid(0));
		int fd = SYS(open("/dev/tty", O_RDWR | O_CLOEXEC));
		struct stat a, b;
		SYS(fstat(0, &a));
		unsigned dev = 0;
		SYS(ioctl(fd, _IOR('T', 0x32, unsigned), &dev)); // TIOCGDEV
		SYS(fstat(1, &b));
		CHECK(a.st_rdev == dev && b.st_rdev == dev, "standard files are %lx and %lx, the controlling terminal is %x", a.st_rdev, b.st_rdev, dev);
		close(fd);
	}
	static int winches;
	static const struct timespec at_once;
	while (sigtimedwait(&shelljob_winch, NULL, &at_once) == SIGWINCH) winches++;
	while (events(0) & POLLIN) {
		ssize_t r = SYS(read(0, line + n, sizeof line - 1 - n));
		CHECK(r > 0, "end of the terminal");
		n += r;
		line[n] = 0;
		char *end = strchr(line, '\n');
		if (!end) return;
		*end = 0;
		struct winsize w;
		SYS(ioctl(1, TIOCGWINSZ, &w));
		if (strcmp(line, "size") == 0) dprintf(1, "size %d %d, told %d times\n", w.ws_row, w.ws_col, winches);
		else dprintf(1, "you said %s\n", line);
		n = 0;
	}
}

COMMAND(shelljob) {
	CHECK(isatty(0) && isatty(1), "no terminal");
	sigemptyset(&shelljob_winch);
	sigaddset(&shelljob_winch, SIGWINCH);
	sigprocmask(SIG_BLOCK, &shelljob_winch, NULL);
	shelljob_settings = settings(0);
	shelljob_settings.l &= ~(ECHO | ICANON);
	shelljob_settings.cc[6] = 0; // VMIN
	shelljob_settings.cc[5] = 1; // VTIME
	SYS(ioctl(0, SET_SETTINGS, &shelljob_settings));
	for (int i = 0; i <= 2; i++) {
		struct stat st;
		SYS(fstat(i, &st));
		CHECK(S_ISCHR(st.st_mode), "fd %d is no terminal", i);
	}
	loop(shelljob_check);
}

// ---- lines: consoles and serial lines, as far as there are any. Nothing is read
// from them nor written to them.

COMMAND(lines) {
	static const char *const paths[] = {"/dev/ttyS0", "/dev/tty1", "/dev/console", "/dev/tty0"};
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
		for (int j = 0; j < 2; j++) {
			int fd = open(paths[i], (j ? O_RDONLY : O_RDWR) | O_NONBLOCK | O_NOCTTY);
			if (fd < 0) continue;
			fd = at_fd(20 + 2 * i + j, fd);
			if (!isatty(fd)) {
				close(fd);
				continue;
			}
			keep(fd, false);
			remember(paths[i], fd);
		}
	CHECK(nterms > 0, "no line can be opened: Operation not permitted");
	loop(terms_check);
}
