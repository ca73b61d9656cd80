// ---- dirtier MIB [RATE [THREADS [FDS [PROCS]]]]: MIB of private anonymous
// memory of incompressible content, of which RATE MB/s (10^6, whole pages count)
// are dirtied at random; 0 is idle. THREADS idle threads and FDS open
// descriptors come on top. With PROCS, that many processes have this each.
//
// A thread of its own looks at CLOCK_REALTIME every half millisecond. SIGUSR1
// asks for what it saw since the last time it was asked: PREFIX.gap, which
// appears whole. It is there after the end, too.
#include "mem.h"
#include <sys/eventfd.h>
#include <sys/resource.h>

enum {
	WORDS = PAGE / 8,
	STRIDE = 64, // one word in so many is rewritten: in each 512 bytes one
	FIRST_FD = 128,
	TICK_MS = 1,
	AT_MOST_MS = 8, // of dirtying in one tick: a freeze is not made up for
	GAP_NS = 5000000, // pauses from here on are added up
};

static uint64_t (*memory)[WORDS];
static uint32_t *generations; // of each page
static uint64_t npages, writes, random_state;
static int me; // number of the process
static volatile struct { int ready; } *all;

uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
	uint64_t x = a * 0x9E3779B97F4A7C15u ^ (b + 1) * 0xC2B2AE3D27D4EB4Fu ^ (c + 1) * 0x165667B19E3779F9u;
	x ^= x >> 30;
	x *= 0xBF58476D1CE4E5B9u;
	x ^= x >> 27;
	x *= 0x94D049BB133111EBu;
	return x ^ x >> 31;
}

// The word at k of a page that has been written g times.
static uint64_t word(uint64_t page, int k, uint32_t g) {
	return mix(page << 8 | me, k, k % STRIDE == (int)(page % STRIDE) ? g : 0);
}

static void check_words(uint64_t page, int from, int step) {
	uint32_t g = generations[page];
	for (int k = from; k < WORDS; k += step) {
		if (memory[page][k] == word(page, k, g)) continue;
		for (uint32_t old = 0; old < g; old++)
			if (memory[page][k] == word(page, k, old))
				fail("process %d: page %lu of %lu, word %d is of generation %u, want %u", me, page, npages, k, old, g);
		fail("process %d: page %lu of %lu, word %d is %lx, want %lx of generation %u", me, page, npages, k, memory[page][k], word(page, k, g), g);
	}
}

static uint64_t next_page(uint64_t *state) {
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (*state >> 33) % npages;
}

static void dirty_page(void) {
	uint64_t page = next_page(&random_state);
	check_words(page, page % STRIDE, STRIDE);
	uint32_t g = ++generations[page];
	for (int k = page % STRIDE; k < WORDS; k += STRIDE) memory[page][k] = word(page, k, g);
	writes++;
}

// The generations are memory, too, and could be old together with the pages:
// the row of pages is repeated from its beginning and must lead to the same.
static void check_all(void) {
	for (uint64_t page = 0; page < npages; page++) check_words(page, 0, 1);
	uint32_t *again = SYS(mmap(NULL, (npages + 1) * sizeof *again, RW, PA, -1, 0));
	uint64_t state = me;
	for (uint64_t n = 0; n < writes; n++) again[next_page(&state)]++;
	CHECK(state == random_state, "process %d: the random numbers are not where %lu writes lead to", me, writes);
	for (uint64_t page = 0; page < npages; page++)
		CHECK(again[page] == generations[page], "process %d: page %lu was written %u times, not %u times", me, page, again[page], generations[page]);
}

// ---- The heartbeat.

struct seen { int64_t since, until, longest, longest_at, sum; uint64_t beats, gaps; };
static struct seen answer;
static volatile uint64_t asked, answered;

static int64_t real_ns(void) {
	struct timespec t;
	SYS(clock_gettime(CLOCK_REALTIME, &t));
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *t_heart(void *arg) {
	(void)arg;
	int64_t last = real_ns();
	for (struct seen s = {.since = last};;) {
		struct timespec half = {0, 500000};
		clock_nanosleep(CLOCK_MONOTONIC, 0, &half, NULL);
		int64_t now = real_ns(), gap = now - last; // negative if the clock was set
		if (gap > s.longest) {
			s.longest = gap;
			s.longest_at = last;
		}
		if (gap >= GAP_NS) {
			s.gaps++;
			s.sum += gap;
		}
		s.beats++;
		last = s.until = now;
		if (asked == answered) continue;
		answer = s;
		s = (struct seen){.since = now};
		__atomic_store_n(&answered, asked, __ATOMIC_SEQ_CST);
	}
	return NULL;
}

static void tell(void) {
	static uint64_t told_writes;
	__atomic_add_fetch(&asked, 1, __ATOMIC_SEQ_CST);
	CHECK(moved(&answered, asked - 1), "the heart stands still");
	char text[512];
	int n = snprintf(text, sizeof text,
		"{\"since_ns\":%ld,\"until_ns\":%ld,\"beats\":%lu,\"longest_ns\":%ld,\"longest_at_ns\":%ld,\"gaps\":%lu,\"gaps_ns\":%ld,\"dirtied_bytes\":%lu}\n",
		answer.since, answer.until, answer.beats, answer.longest, answer.longest_at, answer.gaps, answer.sum, (writes - told_writes) * PAGE);
	told_writes = writes;
	char *tmp = path_of("gap~"), *to = path_of("gap");
	int fd = SYS(open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
	CHECK(write(fd, text, n) == n, "write %s: %s", tmp, strerror(errno));
	close(fd);
	SYS(rename(tmp, to));
	free(tmp);
	free(to);
}

static void on_end(int sig) {
	(void)sig;
	stopping = 1;
}

// ---- Idle threads and descriptors.

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t idle_end = PTHREAD_COND_INITIALIZER;
static bool over;

static void *t_idle(void *arg) {
	volatile int *started = arg;
	pid_t tid = gettid();
	pthread_mutex_lock(&idle_lock);
	++*started;
	while (!over) pthread_cond_wait(&idle_end, &idle_lock);
	pthread_mutex_unlock(&idle_lock);
	CHECK(gettid() == tid, "an idle thread was %d and is %d", tid, gettid());
	return NULL;
}

static void open_fds(int n) {
	struct rlimit l;
	SYS(getrlimit(RLIMIT_NOFILE, &l));
	l.rlim_cur = l.rlim_max;
	SYS(setrlimit(RLIMIT_NOFILE, &l));
	CHECK((rlim_t)(FIRST_FD + n) <= l.rlim_max, "the limit of open files is only %lu", l.rlim_max);
	int fd = SYS(open(path_of("file"), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
	SYS(ftruncate(fd, 1 << 20));
	close(fd);
	for (int i = 0; i < n; i++)
		if (i % 2) at_fd(FIRST_FD + i, SYS(eventfd(i, EFD_NONBLOCK)));
		else SYS(lseek(at_fd(FIRST_FD + i, SYS(open(path_of("file"), O_RDONLY))), i, SEEK_SET));
}

static void check_fds(int n) {
	for (int i = 0; i < n; i++) {
		uint64_t v = 0;
		if (i % 2) SYS(read(FIRST_FD + i, &v, 8));
		else v = SYS(lseek(FIRST_FD + i, 0, SEEK_CUR));
		CHECK(v == (uint64_t)i, "descriptor %d holds %lu, want %d", FIRST_FD + i, v, i);
	}
}

// ---- heart COMMAND [ARG...]: the same heart in a program that does nothing
// but watch another one, its child, which must end well once SIGTERM is handed
// on to it.

COMMAND(heart) {
	CHECK(arg_count > 0, "usage: heart PREFIX COMMAND [ARG...]");
	sigset_t usr1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pid_t pid = child();
	if (pid == 0) {
		execvp(arg_values[0], arg_values);
		fail("execute %s: %s", arg_values[0], strerror(errno));
	}
	SYS(pthread_sigmask(SIG_BLOCK, &usr1, NULL));
	spawn(t_heart, NULL);
	close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	for (; !stopping; nap_ms(10)) {
		expect_alive(pid);
		beat();
		if (sigtimedwait(&usr1, NULL, &(struct timespec){0, 0}) == SIGUSR1) tell();
	}
	int st;
	SYS(kill(pid, SIGTERM));
	CHECK(SYS(waitpid(pid, &st, 0)) == pid && st == 0, "%s ended with %x", arg_values[0], st);
}

static uint64_t arg(int i, uint64_t otherwise) { return arg_count > i ? strtoul(arg_values[i], NULL, 10) : otherwise; }

COMMAND(dirtier) {
	uint64_t mib = arg(0, 64), rate = arg(1, 0);
	int threads = arg(2, 0), fds = arg(3, 0), procs = arg(4, 1);
	CHECK(procs <= 256, "at most 256 processes");
	pid_t kids[256];
	all = SYS(mmap(NULL, PAGE, RW, SA, -1, 0));
	for (int i = 1; i < procs && me == 0; i++)
		if ((kids[i] = child()) == 0) me = i;
	SYS(sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_end, .sa_flags = SA_RESTART}, NULL));
	sigset_t usr1; // waits until it is looked for: it must not end a sleep early
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	SYS(pthread_sigmask(SIG_BLOCK, &usr1, NULL));

	npages = mib * 256;
	memory = SYS(mmap(NULL, (npages + 1) * PAGE, RW, PA, -1, 0)); // one that stays empty, if there were none
	generations = SYS(mmap(NULL, (npages + 1) * sizeof *generations, RW, PA, -1, 0));
	random_state = me;
	for (uint64_t page = 0; page < npages; page++)
		for (int k = 0; k < WORDS; k++) memory[page][k] = word(page, k, 0);
	open_fds(fds);
	volatile int started = 0;
	pthread_t *idle = calloc(threads + 1, sizeof *idle);
	for (int i = 0; i < threads; i++) idle[i] = spawn(t_idle, (void *)&started);
	while (started < threads) nap_ms(TICK_MS);
	if (me == 0) spawn(t_heart, NULL);
	__atomic_add_fetch(&all->ready, 1, __ATOMIC_SEQ_CST);
	if (me == 0) {
		while (all->ready < procs) nap_ms(TICK_MS);
		close(SYS(open(path_of("ready"), O_WRONLY | O_CREAT | O_CLOEXEC, 0644)));
	}

	const double bytes_per_ns = rate / 1000.0, most = bytes_per_ns * AT_MOST_MS * 1000000;
	double due = 0;
	int64_t last = now_ns(), beaten = 0;
	for (uint64_t at = 0; !stopping; nap_ms(TICK_MS)) {
		int64_t now = now_ns();
		due += bytes_per_ns * (now - last);
		last = now;
		if (due > most) due = most;
		for (; npages && due >= PAGE; due -= PAGE) dirty_page();
		if (sigtimedwait(&usr1, NULL, &(struct timespec){0, 0}) == SIGUSR1 && me == 0) tell();
		if (now - beaten < 10000000) continue;
		beaten = now;
		for (int i = 0; npages && i < 64; i++) check_words(at = (at + 1) % npages, 0, 1);
		if (me > 0) orphan_check();
		else beat();
		for (int i = 1; i < procs && me == 0; i++) expect_alive(kids[i]);
	}
	if (me == 0) {
		tell();
		for (int i = 1; i < procs; i++) SYS(kill(kids[i], SIGTERM));
	}
	check_all();
	check_fds(fds);
	pthread_mutex_lock(&idle_lock);
	over = true;
	pthread_cond_broadcast(&idle_end);
	pthread_mutex_unlock(&idle_lock);
	for (int i = 0; i < threads; i++) pthread_join(idle[i], NULL);
	if (me > 0) _exit(0);
	for (int i = 1; i < procs; i++) {
		int st;
		CHECK(SYS(waitpid(kids[i], &st, 0)) == kids[i] && st == 0, "process %d ended with %x", i, st);
	}
}
