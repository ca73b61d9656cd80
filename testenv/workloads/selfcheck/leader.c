// deadleader: a process whose first thread has ended while another one runs on.
// With "child" it is a child of the program.
#include "selfcheck.h"

static pid_t dl_kid;

static void dl_check(void) {
	if (dl_kid) expect_alive(dl_kid);
}

static void *dl_second(void *arg) {
	(void)arg;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	if (dl_kid)
		for (;;) {
			orphan_check();
			nap_ms(10);
		}
	// Not before the first one has ended.
	for (char state = 0; state != 'Z';) {
		char line[256];
		FILE *f = fopen("/proc/self/stat", "re");
		CHECK(f && fgets(line, sizeof line, f), "read /proc/self/stat");
		fclose(f);
		state = strrchr(line, ')')[2];
	}
	loop(NULL);
	ok();
}

COMMAND(deadleader) {
	if (arg_count > 0 && strcmp(arg_values[0], "child") == 0) {
		if ((dl_kid = child()) == 0) {
			dl_kid = getpid();
			spawn(dl_second, NULL);
			syscall(SYS_exit, 0);
		}
		for (char state = 0; state != 'Z'; nap_ms(1)) {
			char path[64], line[256];
			snprintf(path, sizeof path, "/proc/%d/stat", dl_kid);
			FILE *f = fopen(path, "re");
			CHECK(f && fgets(line, sizeof line, f), "read %s", path);
			fclose(f);
			state = strrchr(line, ')')[2];
		}
		loop(dl_check);
		end_child(dl_kid);
		return;
	}
	spawn(dl_second, NULL);
	syscall(SYS_exit, 0);
}
