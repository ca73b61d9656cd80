// deadleader: a child, of which PREFIX.kid names the pid, has lost its first thread
// while another one runs on.
// landlocked: a child that is confined by Landlock.
#include "selfcheck.h"
#include <linux/landlock.h>
#include <sys/prctl.h>
#include <sys/stat.h>

static pid_t kid;

static void kid_check(void) { expect_alive(kid); }

static void *dl_second(void *arg) {
	for (;;) {
		orphan_check();
		nap_ms(10);
	}
	return arg;
}

COMMAND(deadleader) {
	if ((kid = child()) == 0) {
		spawn(dl_second, NULL);
		syscall(SYS_exit, 0);
	}
	char path[64], line[256];
	snprintf(path, sizeof path, "/proc/%d/stat", kid);
	for (char state = 0; state != 'Z'; nap_ms(1)) {
		FILE *f = fopen(path, "re");
		CHECK(f && fgets(line, sizeof line, f), "read %s", path);
		fclose(f);
		state = strrchr(line, ')')[2];
	}
	FILE *f = fopen(path_of("kid"), "we");
	CHECK(f && fprintf(f, "%d\n", kid) > 0 && fclose(f) == 0, "write the pid of the child");
	loop(kid_check);
	end_child(kid);
}

// With "free" the child only has given up new privileges, as one does before that.
COMMAND(landlocked) {
	bool confined = arg_count == 0 || strcmp(arg_values[0], "free") != 0;
	if ((kid = child()) == 0) {
		SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		if (confined) {
			struct landlock_ruleset_attr a = {.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_DIR};
			int fd = SYS(syscall(SYS_landlock_create_ruleset, &a, sizeof a, 0));
			SYS(syscall(SYS_landlock_restrict_self, fd, 0));
			SYS(close(fd));
		}
		for (;;) {
			orphan_check();
			CHECK((mkdir(path_of("dir"), 0700) < 0 && errno == EACCES) == confined, "a directory was made, or not");
			if (!confined) SYS(rmdir(path_of("dir")));
			nap_ms(10);
		}
	}
	nap_ms(20);
	loop(kid_check);
	end_child(kid);
}
