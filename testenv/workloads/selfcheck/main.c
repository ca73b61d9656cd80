#include "selfcheck.h"
#include <poll.h>
#include <stdarg.h>

volatile sig_atomic_t stopping;
const char *prefix;
bool eintr_ok;
volatile int64_t max_gap_ns;
int arg_count;
char **arg_values;

static int log_fd = -1;
static uint64_t records;
static int64_t last_ns;
static pid_t parent_pid; // of a child made by child()

char *path_of(const char *suffix) {
	char *p;
	if (asprintf(&p, "%s.%s", prefix, suffix) < 0) abort();
	return p;
}

static void verdict(const char *suffix, const char *text) {
	// O_EXCL: the first of several processes or threads that fail is right.
	int fd = open(path_of(suffix), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0) return;
	if (write(fd, text, strlen(text)) < 0) perror("write verdict");
	close(fd);
}

void fail(const char *fmt, ...) {
	char text[1024];
	int n = snprintf(text, sizeof text, "FAIL after %lu records, pid %d: ", records, getpid());
	va_list ap;
	va_start(ap, fmt);
	n += vsnprintf(text + n, sizeof text - n - 2, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof text - 2) n = sizeof text - 2;
	text[n] = '\n';
	text[n + 1] = 0;
	verdict("fail", text);
	fputs(text, stderr);
	_exit(1);
}

void ok(void) {
	char text[64];
	snprintf(text, sizeof text, "OK %lu\n", records);
	verdict("ok", text);
	_exit(0);
}

int64_t now_ns(void) {
	struct timespec t;
	SYS(clock_gettime(CLOCK_MONOTONIC, &t));
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void beat(void) {
	int64_t now = now_ns();
	CHECK(now >= last_ns, "CLOCK_MONOTONIC went back from %ld to %ld", last_ns, now);
	if (last_ns && now - last_ns > max_gap_ns) max_gap_ns = now - last_ns;
	last_ns = now;
	char text[64];
	int n = snprintf(text, sizeof text, "%lu %ld\n", records, now);
	ssize_t w;
	do w = write(log_fd, text, n);
	while (w < 0 && errno == EINTR && stopping);
	CHECK(w == n, "append record: %zd of %d: %s", w, n, strerror(errno));
	records++;
}

void nap_ms(int ms) {
	int64_t until = now_ns() + ms * 1000000LL;
	struct timespec t = {until / 1000000000, until % 1000000000};
	int e = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
	if (e == EINTR && stopping) return;
	CHECK(e == 0, "sleep of %d ms: %s", ms, strerror(e));
	CHECK(now_ns() >= until, "sleep of %d ms ended too early", ms);
}

bool comes(int fd, short events) {
	struct pollfd p = {fd, events, 0};
	for (int64_t until = now_ns() + PATIENCE_MS * 1000000LL;;) {
		int r = poll(&p, 1, PATIENCE_MS);
		if (r > 0) return true;
		CHECK(r == 0 || errno == EINTR, "poll: %s", strerror(errno));
		if (now_ns() >= until) return false;
	}
}

bool moved(const volatile uint64_t *n, uint64_t was) {
	for (int64_t until = now_ns() + PATIENCE_MS * 1000000LL; *n == was;) {
		if (now_ns() >= until) return false;
		struct timespec t = {0, 1000000};
		nanosleep(&t, NULL);
	}
	return true;
}

void loop(void (*check)(void)) {
	static bool ready;
	if (!ready) verdict("ready", "ready\n");
	ready = true;
	while (!stopping) {
		if (check) check();
		beat();
		nap_ms(10);
	}
}

pthread_t spawn(void *(*f)(void *), void *arg) {
	sigset_t set, old;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	pthread_t t;
	int e = pthread_create(&t, NULL, f, arg);
	CHECK(e == 0, "create thread: %s", strerror(e));
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return t;
}

pid_t child(void) {
	pid_t parent = getpid(), pid = SYS(fork());
	if (pid == 0) {
		parent_pid = parent;
		close(log_fd);
		log_fd = -1;
		signal(SIGTERM, SIG_DFL);
	}
	return pid;
}

void orphan_check(void) {
	pid_t pp = getppid();
	if (pp == 1) _exit(2); // the parent failed and has said why
	CHECK(pp == parent_pid, "parent changed from %d to %d", parent_pid, pp);
}

void expect_alive(pid_t pid) {
	siginfo_t si = {0};
	SYS(waitid(P_PID, pid, &si, WEXITED | WNOHANG | WNOWAIT));
	CHECK(si.si_pid == 0, "child %d ended: code %d status %d", pid, si.si_code, si.si_status);
}

void end_child(pid_t pid) {
	int st;
	expect_alive(pid);
	SYS(kill(pid, SIGKILL));
	CHECK(SYS(waitpid(pid, &st, 0)) == pid, "wait for child %d gave another", pid);
	CHECK(WIFSIGNALED(st) && WTERMSIG(st) == SIGKILL, "child %d ended with status %x", pid, st);
}

unsigned char pattern(uint64_t seed, uint64_t i) {
	uint64_t x = (seed + 1) * 0x9E3779B97F4A7C15u ^ i * 0xC2B2AE3D27D4EB4Fu;
	x ^= x >> 29;
	x *= 0xBF58476D1CE4E5B9u;
	return x >> 56;
}

static void on_term(int sig) {
	(void)sig;
	stopping = 1;
}

COMMAND(counter) { loop(NULL); }

static struct command *commands;

void add_command(struct command *c) {
	struct command **at = &commands;
	while (*at && strcmp((*at)->name, c->name) < 0) at = &(*at)->next;
	c->next = *at;
	*at = c;
}

int main(int argc, char **argv) {
	if (argc > 1 && strcmp(argv[1], "-l") == 0) {
		for (struct command *c = commands; c; c = c->next) puts(c->name);
		return 0;
	}
	if (argc > 1 && strcmp(argv[1], "-e") == 0) {
		eintr_ok = true;
		argc--;
		argv++;
	}
	if (argc < 3) {
		fprintf(stderr, "usage: selfcheck -l | selfcheck [-e] COMMAND PREFIX [ARG...]\n");
		return 2;
	}
	prefix = argv[2];
	arg_count = argc - 3;
	arg_values = argv + 3;
	log_fd = open(path_of("log"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (log_fd < 0) {
		perror("open record file");
		return 2;
	}
	// Out of the way of the descriptors that the checks number themselves.
	log_fd = at_fd(90, log_fd);
	struct sigaction sa = {.sa_handler = on_term, .sa_flags = SA_RESTART};
	SYS(sigaction(SIGTERM, &sa, NULL));
	for (struct command *c = commands; c; c = c->next)
		if (strcmp(c->name, argv[1]) == 0) {
			c->run();
			ok();
		}
	fprintf(stderr, "no command %s\n", argv[1]);
	return 2;
}
