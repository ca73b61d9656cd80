// hold KIND: holds one object that cannot be carried, and counts. A dump must
// be refused and leave no trace.
#include "selfcheck.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <linux/bpf.h>
#include <linux/mroute.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/io_uring.h>
#include <sys/ioctl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>

#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447 // Linux 5.14
#endif

static int hold_tcp(void) {
	int l = SYS(socket(AF_INET, SOCK_STREAM, 0)), c = SYS(socket(AF_INET, SOCK_STREAM, 0));
	struct sockaddr_in a = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
	socklen_t n = sizeof a;
	SYS(bind(l, (struct sockaddr *)&a, n));
	SYS(listen(l, 1));
	SYS(getsockname(l, (struct sockaddr *)&a, &n));
	SYS(connect(c, (struct sockaddr *)&a, n));
	int s = SYS(accept(l, NULL, NULL));
	close(l);
	return s;
}

static int hold_tap(void) {
	int fd = SYS(open("/dev/net/tun", O_RDWR));
	struct ifreq r = {.ifr_name = "gwhold0", .ifr_flags = IFF_TAP};
	SYS(ioctl(fd, TUNSETIFF, &r));
	struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, 0xffff);
	SYS(ioctl(fd, TUNATTACHFILTER, &(struct sock_fprog){1, &all}));
	return fd;
}

// elsewhere opens a namespace in which no process of the tree lives.
static int elsewhere(void) {
	int p[2];
	char c, path[64];
	SYS(pipe(p));
	pid_t pid = SYS(fork());
	if (pid == 0) {
		SYS(unshare(CLONE_NEWUTS));
		SYS(write(p[1], "x", 1));
		pause();
	}
	SYS(read(p[0], &c, 1));
	snprintf(path, sizeof path, "/proc/%d/ns/uts", pid);
	int fd = open(path, O_RDONLY);
	kill(pid, SIGKILL);
	SYS(waitpid(pid, NULL, 0));
	close(p[0]);
	close(p[1]);
	return fd;
}

static int hold_router(void) {
	int fd = SYS(socket(AF_INET, SOCK_RAW, IPPROTO_IGMP)), on = 1;
	SYS(setsockopt(fd, IPPROTO_IP, MRT_INIT, &on, sizeof on));
	struct vifctl v = {.vifc_flags = VIFF_USE_IFINDEX, .vifc_threshold = 1, .vifc_lcl_ifindex = if_nametoindex("eth0")};
	SYS(setsockopt(fd, IPPROTO_IP, MRT_ADD_VIF, &v, sizeof v));
	return fd;
}

static int hold_program(void) {
	struct bpf_insn all[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .imm = -1}, {.code = BPF_JMP | BPF_EXIT}};
	union bpf_attr a = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insns = (uintptr_t)all, .insn_cnt = 2, .license = (uintptr_t) "GPL"};
	return syscall(SYS_bpf, BPF_PROG_LOAD, &a, sizeof a);
}

static int hold_filter(void) {
	int p = SYS(hold_program()), fd = SYS(socket(AF_INET, SOCK_DGRAM, 0));
	SYS(setsockopt(fd, SOL_SOCKET, SO_ATTACH_BPF, &p, sizeof p));
	close(p);
	return fd;
}

COMMAND(hold) {
	CHECK(arg_count > 0, "usage: hold PREFIX KIND");
	const char *k = arg_values[0];
	int fd;
	if (strcmp(k, "tapfilter") == 0) fd = hold_tap();
	else if (strcmp(k, "bpfprog") == 0) fd = hold_program();
	else if (strcmp(k, "bpffilter") == 0) fd = hold_filter();
	else if (strcmp(k, "mrouter") == 0) fd = hold_router();
	else if (strcmp(k, "vsock") == 0) fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	else if (strcmp(k, "pidfd") == 0) fd = syscall(SYS_pidfd_open, 1, 0);
	else if (strcmp(k, "pty") == 0) fd = posix_openpt(O_RDWR | O_NOCTTY);
	else if (strcmp(k, "namespace") == 0) fd = elsewhere();
	else if (strcmp(k, "tcp") == 0) fd = hold_tcp();
	else if (strcmp(k, "uring") == 0) {
		struct io_uring_params p = {0};
		fd = syscall(SYS_io_uring_setup, 4, &p);
	} else if (strcmp(k, "secretmem") == 0) {
		fd = SYS(syscall(SYS_memfd_secret, 0));
		SYS(ftruncate(fd, 4096));
		SYS(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0));
		close(fd);
		fd = SYS(open("/dev/null", O_RDONLY));
	} else fail("no kind %s", k);
	CHECK(fd >= 0, "make %s: %s", k, strerror(errno));
	at_fd(33, fd);
	remember(k, 33);
	loop(recheck);
}
