// selfcheck: programs that notice by themselves when something about them
// breaks. Each object of the kernel that a process can hold has one command.
//
//   selfcheck [-e] COMMAND PREFIX [ARG…]
//
// Files: PREFIX.ready appears when everything is set up. PREFIX.log gets a
// numbered record with CLOCK_MONOTONIC about every 10 ms, so that gaps, losses
// and doublings show. PREFIX.fail appears, once, with a reason as soon as a
// check fails, and the program exits 1. SIGTERM runs the last checks, writes
// "OK <records>" into PREFIX.ok and exits 0.
// -e tolerates EINTR of calls that any ptrace stop interrupts (epoll_wait).
#ifndef SELFCHECK_H
#define SELFCHECK_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern volatile sig_atomic_t stopping; // SIGTERM came
extern const char *prefix;
extern bool eintr_ok;
extern volatile int64_t max_gap_ns; // longest pause between two records so far
extern int arg_count;
extern char **arg_values;

_Noreturn void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int64_t now_ns(void);
void beat(void);
enum { PATIENCE_MS = 120000 }; // for what must happen, however busy the machine is
bool comes(int fd, short events); // polls that long, whatever interrupts it
bool moved(const volatile uint64_t *n, uint64_t was); // waits that long for another number
void nap_ms(int ms); // whole, whatever interrupts it, but for SIGTERM
void loop(void (*check)(void)); // ready, then check and beat until SIGTERM
_Noreturn void ok(void);
char *path_of(const char *suffix);
// fd properties, see files.c
void remember(const char *name, int fd);
void recheck(void);
int at_fd(int want, int fd); // moves fd to the number want
ssize_t read_all(int fd, void *p, size_t n);

pthread_t spawn(void *(*f)(void *), void *arg); // with SIGTERM blocked
pid_t child(void); // fork; the child has no record file and dies with its parent
void orphan_check(void); // to be called by children now and then
void end_child(pid_t pid); // kill and reap, which must both work
void expect_alive(pid_t pid);
unsigned char pattern(uint64_t seed, uint64_t i);

#define CHECK(cond, ...) do { if (!(cond)) fail(__VA_ARGS__); } while (0)
// SYS fails with the text of the call and errno.
#define SYS(call) __extension__({ __typeof__(call) r_ = (call); \
	if (r_ == (__typeof__(call))-1) \
		fail("%s: %s", #call, strerror(errno)); \
	r_; })

// COMMAND begins the function of a command and makes it known to main.
struct command {
	const char *name;
	void (*run)(void);
	struct command *next;
};
void add_command(struct command *c);
#define COMMAND(name_) \
	static void run_##name_(void); \
	__attribute__((constructor)) static void add_##name_(void) { \
		static struct command c = {.name = #name_, .run = run_##name_}; \
		add_command(&c); \
	} \
	static void run_##name_(void)
#endif
