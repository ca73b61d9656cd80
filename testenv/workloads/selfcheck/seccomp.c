// ---- seccomp: filters on all threads, on one more thread, in children, and a
// child under strict seccomp. Each filter answers a getpriority of its own with
// an errno of its own, so that it shows which of them are in force.
#include "selfcheck.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

// The call that shows filter n is getpriority(who = 1000 + n).
static void install(int n, int flags) {
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpriority, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 1000 + n, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (100 + n)),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog p = {sizeof f / sizeof *f, f};
	CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &p) == 0, "install filter %d: %s", n, strerror(errno));
}

// in_force checks that exactly the filters whose bits are set answer.
static void in_force(const char *who, unsigned mask) {
	for (int n = 0; n < 8; n++) {
		errno = 0;
		long r = syscall(SYS_getpriority, 1000 + n, 0);
		int want = mask & 1u << n ? 100 + n : EINVAL;
		CHECK(r == -1 && errno == want, "%s: filter %d answers %ld (errno %d), want errno %d", who, n, r, errno, want);
	}
}

static volatile uint64_t *seccomp_turns; // of threads and children
static int strict_pipe[2];
static volatile bool both, alone;

static void *plain_thread(void *arg) {
	(void)arg;
	for (; !stopping; nap_ms(3)) {
		// The second comes to it from the first thread.
		if (both) in_force("plain thread", 0x03);
		seccomp_turns[0]++;
	}
	// Only threads that still share what they shared take one more together.
	while (!alone) nap_ms(1);
	install(5, SECCOMP_FILTER_FLAG_TSYNC);
	return NULL;
}

static void *more_thread(void *arg) {
	(void)arg;
	install(2, 0);
	for (; !stopping; nap_ms(3)) {
		in_force("thread with one more", 0x07);
		seccomp_turns[1]++;
	}
	return NULL;
}

static pid_t seccomp_kids[2];
static void seccomp_check(void) {
	static uint64_t last[3];
	static int turn;
	in_force("first thread", 0x03);
	for (int i = 0; i < 2; i++) expect_alive(seccomp_kids[i]);
	// The strict child answers what it is sent.
	char c = 'a' + turn % 26, got = 0;
	CHECK(SYS(write(strict_pipe[1], &c, 1)) == 1, "write to the strict child");
	while (read(strict_pipe[1], &got, 1) < 0 && errno == EINTR) {}
	CHECK(got == c + 1, "the strict child answers %d to %d", got, c);
	char st[64];
	snprintf(st, sizeof st, "/proc/%d/status", seccomp_kids[1]);
	FILE *f = fopen(st, "r");
	CHECK(f, "open %s: %s", st, strerror(errno));
	int mode = -1;
	for (char line[256]; fgets(line, sizeof line, f);) sscanf(line, "Seccomp: %d", &mode);
	fclose(f);
	CHECK(mode == SECCOMP_MODE_STRICT, "the strict child is in mode %d", mode);
	if (++turn % 200) return;
	for (int i = 0; i < 3; i++) {
		CHECK(moved(&seccomp_turns[i], last[i]), "number %d stands still", i);
		last[i] = seccomp_turns[i];
	}
}

COMMAND(seccomp) {
	seccomp_turns = SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, strict_pipe));
	// As root without no_new_privs, which PREFIX and a word ask for.
	bool nnp = arg_count > 0 && strcmp(arg_values[0], "nnp") == 0;
	if (nnp) SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	// Before there are filters: nobody changes from one mode to the other.
	seccomp_kids[1] = child();
	if (seccomp_kids[1] == 0) {
		SYS(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
		char c;
		// Nothing but read, write and exit from here on.
		while (syscall(SYS_read, strict_pipe[0], &c, 1) == 1) {
			c++;
			if (syscall(SYS_write, strict_pipe[0], &c, 1) != 1) break;
		}
		syscall(SYS_exit, 3);
	}
	pthread_t t[2];
	install(0, 0);
	t[0] = spawn(plain_thread, NULL);
	install(1, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG);
	both = true;
	t[1] = spawn(more_thread, NULL);
	seccomp_kids[0] = child();
	if (seccomp_kids[0] == 0) {
		install(3, 0);
		install(4, 0);
		if (!nnp) SYS(setresuid(1000, 1000, 1000)); // no right to install a filter any more
		for (;; nap_ms(3)) {
			orphan_check();
			in_force("child", 0x1b);
			seccomp_turns[2]++;
		}
	}
	while (!seccomp_turns[0] || !seccomp_turns[1] || !seccomp_turns[2]) nap_ms(1);
	loop(seccomp_check);
	pthread_join(t[1], NULL);
	alone = true;
	pthread_join(t[0], NULL);
	in_force("first thread at the end", 0x23);
	for (int i = 0; i < 2; i++) end_child(seccomp_kids[i]);
}
