package files

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// refusedLinks names what is known and not carried, by the beginning of the text
// of its /proc link.
var refusedLinks = []struct{ prefix, what, hint string }{
	{"anon_inode:[io_uring]", "io_uring instances are not carried", "run the program without io_uring, for redis io-threads or libuv UV_USE_IO_URING=0"},
	{"anon_inode:[userfaultfd]", "userfaultfd is not carried", "let the program close it"},
	{"anon_inode:[perf_event]", "perf events are not carried", "stop the profiler"},
	{"anon_inode:bpf", "BPF programs, links and tokens are not carried", "let the program close it"},
	{"anon_inode:btf", "BPF type information is not carried", "let the program close it"},
	{"anon_inode:kvm", "virtual machines are not carried", "migrate the guest with its hypervisor"},
	{"anon_inode:seccomp", "seccomp listeners are not carried", "let the program close it"},
	{"anon_inode:[landlock", "landlock rule sets are not carried", "let the program close it"},
	{"/dev/zero (deleted)", "shared anonymous memory is held as a file", "let the program unmap it"},
	{"/anon_hugepage", "shared anonymous huge pages are held as a file", "let the program unmap them"},
	{"/SYSV", "System V shared memory is not carried", "let the program detach it"},
	{"/[aio]", "asynchronous I/O contexts are not carried", "let the program destroy them (io_destroy)"},
	{"/secretmem", "secret memory cannot be read", "let the program use memfd_create"},
	{"/dmabuf:", "DMA buffers are not carried", "let the program close it"},
}

// pseudo says whether o is a kernel object that only looks like a deleted file.
func pseudo(o *object) bool {
	if !o.deleted() || o.stat.Nlink != 0 && !strings.HasPrefix(o.link, "/SYSV") && !strings.HasPrefix(o.link, "/dev/zero") {
		return false
	}
	for _, r := range refusedLinks {
		if r.prefix[0] == '/' && strings.HasPrefix(o.link, r.prefix) {
			return true
		}
	}
	return false
}

// unsupported says what an object of no known kind is.
func unsupported(o *object) (reason, hint string) {
	for _, r := range refusedLinks {
		if strings.HasPrefix(o.link, r.prefix) {
			return r.what, r.hint
		}
	}
	switch o.mode() & unix.S_IFMT {
	case unix.S_IFSOCK:
		dom, _ := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
		typ, _ := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
		pro, _ := unix.GetsockoptInt(int(o.file.Fd()), unix.SOL_SOCKET, unix.SO_PROTOCOL)
		name, ok := families[dom]
		if !ok {
			name = fmt.Sprintf("family %d", dom)
		}
		return fmt.Sprintf("%s sockets of type %d, protocol %d are not carried", name, typ, pro), "let the program close it"
	case unix.S_IFBLK:
		return "open block devices are not carried", "let the program close it"
	}
	if name, ok := strings.CutPrefix(o.link, "anon_inode:"); ok {
		return fmt.Sprintf("open files of kind %s are not carried", name), "let the program close it"
	}
	return fmt.Sprintf("open files of this kind (mode %#o) are not carried", o.mode()&unix.S_IFMT), "let the program close it"
}

var families = map[int]string{
	unix.AF_NETLINK: "netlink", unix.AF_PACKET: "packet", unix.AF_VSOCK: "vsock", unix.AF_INET: "IPv4", unix.AF_INET6: "IPv6",
	unix.AF_ALG: "kernel crypto", unix.AF_CAN: "CAN", unix.AF_BLUETOOTH: "Bluetooth", unix.AF_XDP: "XDP", unix.AF_KEY: "IPsec key",
	unix.AF_TIPC: "TIPC", unix.AF_RDS: "RDS", unix.AF_UNIX: "unix",
}
