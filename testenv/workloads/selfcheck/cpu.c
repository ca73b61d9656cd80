// Threads and what the CPU and the kernel keep for each of them.
#include "selfcheck.h"
#include <sched.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/rseq.h>

// ---- threads: eight threads count under one mutex.

enum { NTHREADS = 8 };
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t total, parts[NTHREADS], seen[NTHREADS];

static void *count_thread(void *arg) {
	uint64_t *part = arg;
	while (!stopping) {
		for (int i = 0; i < 200; i++) {
			pthread_mutex_lock(&mutex);
			uint64_t before = total++;
			*part += 1;
			CHECK(total == before + 1, "another thread was inside the mutex");
			pthread_mutex_unlock(&mutex);
		}
		nap_ms(1);
	}
	return NULL;
}

static void threads_check(void) {
	static int rounds;
	pthread_mutex_lock(&mutex);
	uint64_t sum = 0;
	for (int i = 0; i < NTHREADS; i++) sum += parts[i];
	CHECK(sum == total, "threads counted %lu, the total is %lu", sum, total);
	if (++rounds % 500 == 0)
		for (int i = 0; i < NTHREADS; i++) {
			CHECK(parts[i] != seen[i], "thread %d stands still at %lu", i, parts[i]);
			seen[i] = parts[i];
		}
	pthread_mutex_unlock(&mutex);
}

COMMAND(threads) {
	pthread_t t[NTHREADS];
	for (int i = 0; i < NTHREADS; i++) t[i] = spawn(count_thread, &parts[i]);
	loop(threads_check);
	for (int i = 0; i < NTHREADS; i++) pthread_join(t[i], NULL);
	threads_check();
}

// ---- tls: thread-local storage and the thread pointer.

static __thread uint64_t tls_value[64];
static __thread int tls_initialised = 0x5eed;

static void *tls_thread(void *arg) {
	uint64_t seed = (uintptr_t)arg;
	for (int i = 0; i < 64; i++) tls_value[i] = seed * 1000 + i;
	uint64_t *at = tls_value;
	pid_t tid = gettid();
	pthread_t self = pthread_self();
	while (!stopping) {
		CHECK(at == tls_value, "thread-local storage moved from %p to %p", at, tls_value);
		CHECK(tls_initialised == 0x5eed, "thread-local initial value is %x", tls_initialised);
		for (int i = 0; i < 64; i++)
			CHECK(tls_value[i] == seed * 1000 + i, "thread-local word %d is %lu", i, tls_value[i]);
		CHECK(gettid() == tid, "tid was %d and is %d", tid, gettid());
		CHECK(pthread_equal(self, pthread_self()), "pthread_self changed");
		errno = seed;
		nap_ms(2);
		CHECK(errno == (int)seed, "errno of the thread was %d and is %d", (int)seed, errno);
	}
	return NULL;
}

COMMAND(tls) {
	pthread_t t[6];
	for (uintptr_t i = 0; i < 6; i++) t[i] = spawn(tls_thread, (void *)(i + 1));
	loop(NULL);
	for (int i = 0; i < 6; i++) pthread_join(t[i], NULL);
}

// ---- xsave: vector, mask and x87 registers held over time.

static bool has_avx512, has_avx;

struct vectors {
	unsigned char v[32][64];
	uint64_t k[8];
	uint32_t mxcsr;
	uint16_t fcw;
	long double st[6];
} __attribute__((aligned(64)));

static void hold512(const struct vectors *in, struct vectors *out, uint64_t spins) {
#define L(n) "vmovdqu64 " #n "*64(%[i]), %%zmm" #n "\n\t"
#define S(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%[o])\n\t"
#define LK(n) "kmovq 2048+" #n "*8(%[i]), %%k" #n "\n\t"
#define SK(n) "kmovq %%k" #n ", 2048+" #n "*8(%[o])\n\t"
#define ALL32(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15) M(16) \
	M(17) M(18) M(19) M(20) M(21) M(22) M(23) M(24) M(25) M(26) M(27) M(28) M(29) M(30) M(31)
#define ALL8(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
	__asm__ volatile(ALL32(L) ALL8(LK)
		"1: decq %[n]\n\tjnz 1b\n\t"
		ALL32(S) ALL8(SK) "vzeroupper\n\t"
		: [n] "+r"(spins) : [i] "r"(in), [o] "r"(out)
		: "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
		  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
}

static void hold256(const struct vectors *in, struct vectors *out, uint64_t spins) {
#define L(n) "vmovdqu " #n "*64(%[i]), %%ymm" #n "\n\t"
#define S(n) "vmovdqu %%ymm" #n ", " #n "*64(%[o])\n\t"
#define ALL16(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
	__asm__ volatile(ALL16(L)
		"1: decq %[n]\n\tjnz 1b\n\t"
		ALL16(S) "vzeroupper\n\t"
		: [n] "+r"(spins) : [i] "r"(in), [o] "r"(out)
		: "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
		  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
}

static void hold128(const struct vectors *in, struct vectors *out, uint64_t spins) {
#define L(n) "movdqu " #n "*64(%[i]), %%xmm" #n "\n\t"
#define S(n) "movdqu %%xmm" #n ", " #n "*64(%[o])\n\t"
	__asm__ volatile(ALL16(L)
		"1: decq %[n]\n\tjnz 1b\n\t"
		ALL16(S)
		: [n] "+r"(spins) : [i] "r"(in), [o] "r"(out)
		: "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
		  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
}

static void hold_x87(const struct vectors *in, struct vectors *out, uint64_t spins) {
	uint16_t usual_fcw;
	uint32_t usual_mxcsr;
	__asm__ volatile("fnstcw %0\n\tstmxcsr %1" : "=m"(usual_fcw), "=m"(usual_mxcsr));
	__asm__ volatile("fldcw %[cwi]\n\tldmxcsr %[mxi]\n\t"
		"fldt (%[si])\n\tfldt 16(%[si])\n\tfldt 32(%[si])\n\tfldt 48(%[si])\n\tfldt 64(%[si])\n\tfldt 80(%[si])\n\t"
		"1: decq %[n]\n\tjnz 1b\n\t"
		"fstpt 80(%[so])\n\tfstpt 64(%[so])\n\tfstpt 48(%[so])\n\tfstpt 32(%[so])\n\tfstpt 16(%[so])\n\tfstpt (%[so])\n\t"
		"fnstcw %[cwo]\n\tstmxcsr %[mxo]\n\tfldcw %[cwu]\n\tldmxcsr %[mxu]\n\t"
		: [n] "+r"(spins), [cwo] "=m"(out->fcw), [mxo] "=m"(out->mxcsr)
		: [cwi] "m"(in->fcw), [mxi] "m"(in->mxcsr), [cwu] "m"(usual_fcw), [mxu] "m"(usual_mxcsr), [si] "r"(in->st), [so] "r"(out->st)
		: "memory", "cc", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)");
}

static void *xsave_thread(void *arg) {
	uint64_t seed = (uintptr_t)arg;
	struct vectors *in = aligned_alloc(64, sizeof *in), *out = aligned_alloc(64, sizeof *out);
	for (uint64_t round = 0; !stopping; round++) {
		memset(in, 0, sizeof *in);
		memset(out, 0, sizeof *out);
		for (int r = 0; r < 32; r++)
			for (int b = 0; b < 64; b++) in->v[r][b] = pattern(seed + round, r * 64 + b);
		for (int r = 0; r < 8; r++) in->k[r] = seed * 0x0101010101010101u + r;
		for (int i = 0; i < 6; i++) in->st[i] = 1.25L * (seed + i) + round % 1000;
		in->mxcsr = 0x1f80 | (seed % 4) << 13; // a rounding mode of its own
		in->fcw = 0x037f | (seed % 4) << 10;
		int width = has_avx512 ? 64 : has_avx ? 32 : 16, regs = has_avx512 ? 32 : 16;
		uint64_t spins = 4000000;
		if (has_avx512) hold512(in, out, spins);
		else if (has_avx) hold256(in, out, spins);
		else hold128(in, out, spins);
		for (int r = 0; r < regs; r++)
			CHECK(memcmp(in->v[r], out->v[r], width) == 0, "vector register %d of thread %lu changed", r, seed);
		if (has_avx512)
			for (int r = 0; r < 8; r++)
				CHECK(in->k[r] == out->k[r], "mask register %d: %lx became %lx", r, in->k[r], out->k[r]);
		hold_x87(in, out, spins / 4);
		CHECK(in->mxcsr == (out->mxcsr & ~0x3fu), "mxcsr: %x became %x", in->mxcsr, out->mxcsr);
		CHECK(in->fcw == out->fcw, "x87 control word: %x became %x", in->fcw, out->fcw);
		for (int i = 0; i < 6; i++) CHECK(in->st[i] == out->st[i], "x87 register %d changed", i);
		nap_ms(1);
	}
	return NULL;
}

COMMAND(xsave) {
	__builtin_cpu_init();
	has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
	has_avx = __builtin_cpu_supports("avx");
	pthread_t t[4];
	for (uintptr_t i = 0; i < 4; i++) t[i] = spawn(xsave_thread, (void *)(i + 1));
	loop(NULL);
	for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
}

// ---- rseq: restartable sequences, registered by glibc 2.35 and later.

enum { MAXCPU = 1024 };
static struct { long n, pad[7]; } percpu[MAXCPU] __attribute__((aligned(64)));
static uint64_t commits[4];

static volatile struct rseq *own_rseq(void) {
	return (volatile struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

// add_one adds 1 to the counter of the current CPU in one restartable
// sequence that is made long on purpose; 0 if it was aborted.
static int add_one(long spins) {
	volatile struct rseq *r = own_rseq();
	__asm__ goto volatile(
		".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n"
		"3:\t.long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t.popsection\n\t"
		"leaq 3b(%%rip), %%rax\n\tmovq %%rax, %[cs]\n"
		"1:\tmovl %[cpu], %%eax\n\tshlq $6, %%rax\n\taddq %[base], %%rax\n\t"
		"movq (%%rax), %%rcx\n\tmovq %[spins], %%rdx\n"
		"5:\tpause\n\tdecq %%rdx\n\tjnz 5b\n\t"
		"incq %%rcx\n\tmovq %%rcx, (%%rax)\n"
		"2:\n\t"
		".pushsection __rseq_failure, \"ax\"\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n"
		"4:\tjmp %l[aborted]\n\t.popsection\n\t"
		: : [cs] "m"(r->rseq_cs), [cpu] "m"(r->cpu_id), [base] "r"(percpu), [spins] "r"(spins)
		: "memory", "cc", "rax", "rcx", "rdx" : aborted);
	return 1;
aborted:
	return 0;
}

static void *rseq_thread(void *arg) {
	uint64_t *n = arg;
	while (!stopping) {
		*n += add_one(3000);
		if (*n % 64 == 0) nap_ms(1);
	}
	return NULL;
}

static void rseq_check(void) {
	// The kernel keeps cpu_id right only for a registered area.
	static cpu_set_t all;
	static int cpus[2], n;
	if (n == 0) {
		SYS(sched_getaffinity(0, sizeof all, &all));
		for (int c = 0; c < CPU_SETSIZE && n < 2; c++)
			if (CPU_ISSET(c, &all)) cpus[n++] = c;
	}
	static int turn;
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(cpus[turn++ % n], &one);
	SYS(sched_setaffinity(0, sizeof one, &one));
	unsigned got = own_rseq()->cpu_id, want = cpus[(turn - 1) % n];
	CHECK(got == want, "rseq says CPU %u on CPU %u: it is not registered", got, want);
	SYS(sched_setaffinity(0, sizeof all, &all));
}

COMMAND(rseq) {
	CHECK(__rseq_size > 0, "glibc did not register rseq");
	pthread_t t[4];
	for (int i = 0; i < 4; i++) t[i] = spawn(rseq_thread, &commits[i]);
	loop(rseq_check);
	uint64_t sum = 0, counted = 0;
	for (int i = 0; i < 4; i++) {
		pthread_join(t[i], NULL);
		sum += commits[i];
	}
	for (int i = 0; i < MAXCPU; i++) counted += percpu[i].n;
	CHECK(sum == counted, "%lu sequences ended, the CPUs counted %lu", sum, counted);
	CHECK(sum > 0, "no sequence ended");
}

// ---- robust: robust mutexes report the death of their owner.

struct robust { pthread_mutex_t by_child[2], by_thread; volatile int held; };
static struct robust *rob;

static void *robust_thread(void *arg) {
	(void)arg;
	CHECK(pthread_mutex_lock(&rob->by_thread) == 0, "lock robust mutex");
	__atomic_add_fetch(&rob->held, 1, __ATOMIC_SEQ_CST);
	while (!stopping) nap_ms(20);
	return NULL; // with the mutex locked
}

static pid_t robust_pid;

static void robust_check(void) {
	expect_alive(robust_pid);
	CHECK(pthread_mutex_trylock(&rob->by_child[0]) == EBUSY, "mutex of the child is free");
	CHECK(pthread_mutex_trylock(&rob->by_child[1]) == EBUSY, "mutex of the child is free");
	CHECK(pthread_mutex_trylock(&rob->by_thread) == EBUSY, "mutex of the thread is free");
}

static void expect_owner_dead(pthread_mutex_t *m, const char *whose) {
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 5;
	int e = pthread_mutex_timedlock(m, &until);
	CHECK(e == EOWNERDEAD, "mutex of the dead %s: %s, want EOWNERDEAD", whose, strerror(e));
	CHECK(pthread_mutex_consistent(m) == 0 && pthread_mutex_unlock(m) == 0, "recover mutex of the %s", whose);
}

COMMAND(robust) {
	rob = SYS(mmap(NULL, sizeof *rob, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	pthread_mutexattr_t a;
	pthread_mutexattr_init(&a);
	pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
	pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
	for (int i = 0; i < 2; i++) pthread_mutex_init(&rob->by_child[i], &a);
	pthread_mutex_init(&rob->by_thread, &a);
	robust_pid = child();
	if (robust_pid == 0) {
		for (int i = 0; i < 2; i++) CHECK(pthread_mutex_lock(&rob->by_child[i]) == 0, "lock robust mutex");
		__atomic_add_fetch(&rob->held, 1, __ATOMIC_SEQ_CST);
		for (;; orphan_check()) nap_ms(20);
	}
	pthread_t t = spawn(robust_thread, NULL);
	while (rob->held != 2) nap_ms(1);
	loop(robust_check);
	pthread_join(t, NULL);
	expect_owner_dead(&rob->by_thread, "thread");
	end_child(robust_pid);
	for (int i = 0; i < 2; i++) expect_owner_dead(&rob->by_child[i], "child");
}

// ---- join: the end of a thread is announced through its clear_child_tid address.

static void *short_thread(void *arg) {
	nap_ms(150 + ((uintptr_t)arg % 4) * 100);
	return (void *)((uintptr_t)arg * 7);
}

static struct { pthread_t t; uintptr_t arg; bool on; } shorts[4];
static uintptr_t shorts_made;

static void join_check(void) {
	for (int i = 0; i < 4; i++) {
		void *got;
		if (shorts[i].on) {
			int e = pthread_tryjoin_np(shorts[i].t, &got);
			if (e == EBUSY) continue;
			CHECK(e == 0, "join: %s", strerror(e));
			CHECK(got == (void *)(shorts[i].arg * 7), "thread %lu returned %p", shorts[i].arg, got);
		}
		shorts[i].arg = ++shorts_made;
		shorts[i].t = spawn(short_thread, (void *)shorts[i].arg);
		shorts[i].on = true;
	}
}

static void *joiner(void *arg) {
	(void)arg;
	for (uintptr_t n = 1; !stopping; n++) {
		void *got;
		pthread_t t = spawn(short_thread, (void *)n);
		struct timespec until;
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += PATIENCE_MS / 1000;
		int e = pthread_timedjoin_np(t, &got, &until);
		CHECK(e == 0 && got == (void *)(n * 7), "blocked join of thread %lu: %s", n, strerror(e));
	}
	return NULL;
}

COMMAND(join) {
	pthread_t t = spawn(joiner, NULL);
	loop(join_check);
	pthread_join(t, NULL);
	for (int i = 0; i < 4; i++) pthread_join(shorts[i].t, NULL);
}
