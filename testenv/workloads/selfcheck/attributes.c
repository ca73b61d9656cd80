// ---- attributes: what a thread or a process has set of itself that few
// programs do, each by one thread, which looks at it all the time.
#include "selfcheck.h"
#include <asm/ldt.h>
#include <asm/prctl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <ucontext.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

struct sched_attr_v1 {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
	uint32_t util_min, util_max;
};

static void sched_is(const char *what, const struct sched_attr_v1 *want) {
	struct sched_attr_v1 got = {0};
	SYS(syscall(SYS_sched_getattr, 0, &got, sizeof got, 0));
	CHECK(got.policy == want->policy && got.flags == want->flags && got.nice == want->nice && got.priority == want->priority,
		"%s: policy %u flags %lx nice %d priority %u", what, got.policy, got.flags, got.nice, got.priority);
	CHECK(want->runtime == 0 || got.runtime == want->runtime, "%s: runtime or slice of %lu ns, want %lu", what, got.runtime, want->runtime);
	CHECK(got.policy != 6 || (got.deadline == want->deadline && got.period == want->period), "%s: deadline %lu period %lu", what, got.deadline, got.period);
}

static const struct { const char *name; struct sched_attr_v1 a; } scheds[] = {
	{"FIFO", {.policy = SCHED_FIFO, .priority = 3, .flags = 1}},
	{"RR", {.policy = SCHED_RR, .priority = 7}},
	{"DEADLINE", {.policy = 6, .runtime = 2000000, .deadline = 30000000, .period = 40000000}},
	{"IDLE", {.policy = SCHED_IDLE}},
	{"BATCH", {.policy = SCHED_BATCH, .nice = 7, .flags = 1}},
	{"slice", {.policy = SCHED_OTHER, .nice = -3, .runtime = 12000000}},
};
enum { SCHEDS = sizeof scheds / sizeof *scheds };

static volatile int up;
static volatile uint64_t turns[32];

// each is the loop of a thread; it naps by a plain system call.
#define EACH(turn) for (__atomic_add_fetch(&up, 1, __ATOMIC_SEQ_CST); !stopping; turns[turn]++, plain_nap())
static void plain_nap(void) {
	struct timespec t = {0, 4000000};
	syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
}

static void *t_sched(void *arg) {
	int i = (intptr_t)arg;
	struct sched_attr_v1 a = scheds[i].a;
	a.size = sizeof a;
	CHECK(syscall(SYS_sched_setattr, 0, &a, 0) == 0, "set scheduling %s: %s", scheds[i].name, strerror(errno));
	EACH(i) sched_is(scheds[i].name, &scheds[i].a);
	return NULL;
}

// The library reads the time by the instruction that is forbidden here.
static void *t_tsc(void *arg) {
	(void)arg;
	SYS(prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
	EACH(10) {
		int v = 0;
		SYS(prctl(PR_GET_TSC, &v));
		CHECK(v == PR_TSC_SIGSEGV, "the time stamp counter may be read again: %d", v);
	}
	return NULL;
}

static void *t_mce(void *arg) {
	(void)arg;
	SYS(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	EACH(11) CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY, "machine check policy changed");
	return NULL;
}

static void *t_persona(void *arg) {
	(void)arg;
	unsigned want = ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS;
	SYS(personality(want));
	EACH(12) CHECK((unsigned)personality(0xffffffff) == want, "personality of a thread is %x", personality(0xffffffff));
	return NULL;
}

static void *t_spec(void *arg) {
	(void)arg;
	for (int i = 0; i < 3; i++) {
		int v = prctl(PR_GET_SPECULATION_CTRL, i, 0, 0, 0);
		if (v > 0 && v & PR_SPEC_PRCTL) SYS(prctl(PR_SET_SPECULATION_CTRL, i, PR_SPEC_DISABLE, 0, 0));
	}
	int before[3];
	for (int i = 0; i < 3; i++) before[i] = prctl(PR_GET_SPECULATION_CTRL, i, 0, 0, 0);
	EACH(13) for (int i = 0; i < 3; i++)
		CHECK(prctl(PR_GET_SPECULATION_CTRL, i, 0, 0, 0) == before[i], "speculation control %d changed from %x", i, before[i]);
	return NULL;
}

static void *t_misc(void *arg) {
	(void)arg;
	SYS(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
	SYS(prctl(PR_SET_TIMERSLACK, 123456));
	unsigned long node = 1;
	SYS(syscall(SYS_set_mempolicy, 2 /* MPOL_BIND */, &node, 64));
	EACH(14) {
		CHECK(syscall(SYS_ioprio_get, 1, 0) == (2 << 13 | 6), "I/O priority is %lx", syscall(SYS_ioprio_get, 1, 0));
		CHECK(prctl(PR_GET_TIMERSLACK) == 123456, "timer slack is %d", prctl(PR_GET_TIMERSLACK));
		int mode = 0;
		unsigned long nodes[16] = {0};
		SYS(syscall(SYS_get_mempolicy, &mode, nodes, 1024, 0, 0));
		CHECK(mode == 2 && nodes[0] == 1, "memory policy %d of nodes %lx", mode, nodes[0]);
	}
	return NULL;
}

static void *t_name(void *arg) {
	(void)arg;
	static const char want[16] = "a \xff\\\n)\x01\xc3%s";
	SYS(prctl(PR_SET_NAME, want));
	EACH(15) {
		char now[16];
		SYS(prctl(PR_GET_NAME, now));
		CHECK(strcmp(now, want) == 0, "name of a thread is \"%s\"", now);
	}
	return NULL;
}

// Syscall user dispatch: a system call while the selector blocks arrives as SIGSYS.
static volatile char selector;
static volatile uint64_t dispatched;

static void on_sys(int sig, siginfo_t *si, void *u) {
	(void)sig;
	selector = 0;
	if (si->si_syscall == SYS_getppid) dispatched++;
	((ucontext_t *)u)->uc_mcontext.gregs[REG_RAX] = 4711;
}

static void *t_dispatch(void *arg) {
	(void)arg;
	SYS(prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, &selector));
	EACH(16) {
		uint64_t before = dispatched;
		selector = 1;
		for (volatile int i = 0; i < 1000000; i++) {} // blocked nearly all the time
		CHECK(syscall(SYS_getppid) == 4711 && dispatched == before + 1, "a system call was not dispatched");
	}
	return NULL;
}

static void *t_creds(void *arg) {
	(void)arg;
	// By plain calls: the library's would change all threads.
	SYS(prctl(PR_SET_KEEPCAPS, 0));
	gid_t groups[] = {5, 77};
	SYS(syscall(SYS_setgroups, 2, groups));
	SYS(syscall(SYS_setresgid, 2001, 2002, 2003));
	SYS(syscall(SYS_setresuid, 1001, 1002, 1003));
	SYS(prctl(PR_SET_DUMPABLE, 1));
	struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
	EACH(17) {
		uid_t r, e, s;
		SYS(syscall(SYS_getresuid, &r, &e, &s));
		CHECK(r == 1001 && e == 1002 && s == 1003, "user ids %u %u %u", r, e, s);
		SYS(syscall(SYS_getresgid, &r, &e, &s));
		CHECK(r == 2001 && e == 2002 && s == 2003, "group ids %u %u %u", r, e, s);
		gid_t g[8];
		CHECK(syscall(SYS_getgroups, 8, g) == 2 && g[0] == 5 && g[1] == 77, "groups changed");
		struct __user_cap_data_struct d[2] = {{0}};
		SYS(syscall(SYS_capget, &h, d));
		CHECK(d[0].effective == 0 && d[0].permitted == 0, "capabilities are back: %x", d[0].permitted);
	}
	return NULL;
}

// A segment of the kind that 32-bit programs use for their threads.
static void *t_segment(void *arg) {
	(void)arg;
	uint32_t *word = SYS(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0));
	struct user_desc *d = (struct user_desc *)(word + 1024);
	*word = 0xabcd1234;
	*d = (struct user_desc){.entry_number = -1, .base_addr = (uintptr_t)word, .limit = 0xfff, .seg_32bit = 1, .useable = 1};
	int r;
	__asm__ volatile("int $0x80" : "=a"(r) : "0"(243), "b"(d) : "memory", "r8", "r9", "r10", "r11");
	CHECK(r == 0, "set_thread_area: %d", r);
	unsigned short sel = d->entry_number << 3 | 3;
	__asm__ volatile("movw %0, %%gs" : : "r"(sel));
	EACH(18) {
		uint32_t got;
		unsigned short now;
		__asm__ volatile("movl %%gs:0, %0\n\tmovw %%gs, %1" : "=r"(got), "=r"(now));
		CHECK(got == 0xabcd1234 && now == sel, "segment %x holds %x", now, got);
	}
	return NULL;
}

static void ldt_entry(int n, bool code) {
	struct user_desc d = {.entry_number = n, .base_addr = 0x12345678 + n, .limit = 0x54321, .seg_32bit = 1, .contents = code ? 2 : 0,
		.read_exec_only = !code && n % 2, .limit_in_pages = n % 3 == 0, .useable = 1};
	SYS(syscall(SYS_modify_ldt, 0x11, &d, sizeof d));
}

static unsigned char ldt_before[8 * 200];
static ssize_t ldt_size;
static char filter_before[32], autogroup_before[64], loginuid_before[32];

static void slurp(const char *path, char *b, size_t size) {
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0, "open %s: %s", path, strerror(errno));
	ssize_t n = read(fd, b, size - 1);
	b[n < 0 ? 0 : n] = 0;
	close(fd);
}

static void put(const char *path, const char *text) {
	int fd = SYS(open(path, O_WRONLY | O_CLOEXEC));
	CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "write %s: %s", path, strerror(errno));
	close(fd);
}

static void attributes_check(void) {
	static uint64_t last[32];
	static int turn;
	unsigned char ldt[sizeof ldt_before];
	ssize_t n = SYS(syscall(SYS_modify_ldt, 0, ldt, sizeof ldt));
	CHECK(n == ldt_size && memcmp(ldt, ldt_before, n) == 0, "local descriptor table of %zd bytes changed", n);
	uint32_t limit = 0;
	__asm__ volatile("lsl %1, %0" : "+r"(limit) : "r"(4 << 3 | 7));
	CHECK(limit == 0x54321, "segment 4 of the local descriptor table ends at %x", limit);
	char b[64];
	slurp("/proc/self/coredump_filter", b, sizeof b);
	CHECK(strcmp(b, filter_before) == 0, "filter of core files is %s", b);
	slurp("/proc/self/autogroup", b, sizeof b);
	CHECK(strcmp(strstr(b, "nice"), strstr(autogroup_before, "nice")) == 0, "autogroup was %s and is %s", autogroup_before, b);
	slurp("/proc/self/loginuid", b, sizeof b);
	CHECK(strcmp(b, loginuid_before) == 0, "login uid was %s and is %s", loginuid_before, b);
	CHECK(prctl(PR_GET_MDWE, 0, 0, 0, 0) == 1, "memory may be writable and executable again");
	CHECK(prctl(PR_GET_KEEPCAPS) == 1 && prctl(PR_GET_SECUREBITS) == (1 << 4 | 3), "securebits are %x", prctl(PR_GET_SECUREBITS));
	CHECK(personality(0xffffffff) == ADDR_NO_RANDOMIZE, "personality is %x", personality(0xffffffff));
	if (++turn % 200) return;
	for (int i = 0; i < 19; i++) {
		CHECK((i >= SCHEDS && i < 10) || moved(&turns[i], last[i]), "thread %d stands still", i);
		last[i] = turns[i];
	}
}

COMMAND(attributes) {
	struct sigaction sa = {.sa_sigaction = on_sys, .sa_flags = SA_SIGINFO};
	SYS(sigaction(SIGSYS, &sa, NULL));
	SYS(personality(ADDR_NO_RANDOMIZE));
	for (int i = 1; i < 130; i += 3) ldt_entry(i, i % 2 == 0);
	ldt_size = SYS(syscall(SYS_modify_ldt, 0, ldt_before, sizeof ldt_before));
	put("/proc/self/coredump_filter", "0x6d");
	put("/proc/self/autogroup", "6");
	put("/proc/self/loginuid", "4321");
	slurp("/proc/self/coredump_filter", filter_before, sizeof filter_before);
	slurp("/proc/self/autogroup", autogroup_before, sizeof autogroup_before);
	slurp("/proc/self/loginuid", loginuid_before, sizeof loginuid_before);
	SYS(prctl(PR_SET_SECUREBITS, 1 << 4 | 3));
	SYS(setpriority(PRIO_PROCESS, 0, 0));
	for (intptr_t i = 0; i < SCHEDS; i++) spawn(t_sched, (void *)i);
	void *(*threads[])(void *) = {t_tsc, t_mce, t_persona, t_spec, t_misc, t_name, t_dispatch, t_creds, t_segment};
	int n = sizeof threads / sizeof *threads;
	for (int i = 0; i < n; i++) spawn(threads[i], NULL);
	while (up < n + SCHEDS) nap_ms(1);
	SYS(prctl(PR_SET_MDWE, 1, 0, 0, 0));
	loop(attributes_check);
}
