package dump

import "godwit/engine/plan"

// Support lists what is carried of processes and threads beside files and memory.
// What they may not be in is what this package refuses.
func Support() []plan.Support {
	return []plan.Support{
		{Kind: "trees of processes and threads, with their pids"},
		{Kind: "descriptors and directories that processes share (CLONE_FILES, CLONE_FS)"},
		{Kind: "children whose end is told by another signal than SIGCHLD, or by none"},
		{Kind: "vfork in progress", Note: "is waited for, one second before anything is touched"},
		{Kind: "zombies that their parents have not reaped", Note: "that a core file was written is not told again"},
		{Kind: "processes that a signal stopped", Note: "are stopped again; --leave-stopped stops any tree"},
		{Kind: "sessions and process groups", Note: "a session whose leader is outside of the tree becomes the restorer's"},
		{Kind: "registers and extended state up to AVX-512, TLS, restartable sequences, robust futexes"},
		{Kind: "interrupted system calls", Note: "go on after the restore; sleeps, select and ppoll with what was left of their time, poll, epoll_wait and relative futex waits with all of it"},
		{Kind: "signal handlers, masks, alternate stacks, pending signals with their data and in their order"},
		{Kind: "interval timers and POSIX timers of every clock"},
		{Kind: "credentials, capabilities, no_new_privs, limits, OOM score"},
		{Kind: "niceness, policies of scheduling with their budgets and slices, affinity, I/O priority, timer slack, autogroup"},
		{Kind: "credentials, personality, name, securebits, working and root directory of single threads"},
		{Kind: "syscall user dispatch, use of the time stamp counter and cpuid, speculation, machine checks, NUMA policy", Note: "as set by prctl, arch_prctl and set_mempolicy"},
		{Kind: "local descriptor tables, segments of thread-local storage"},
		{Kind: "filter of core files, user who logged in", Note: "the user who logged in stays the restorer's, with a warning, where audit rules forbid another"},
		{Kind: "seccomp, strict and by filters"},
		{Kind: "clocks that count from boot", Note: "go on on any host, in a time namespace where they have to"},
		{Kind: "counts of what was used (getrusage), CPU clocks, times of start, session keyrings", Note: "begin anew; the session keyring is that of the restorer"},
		{Kind: "working directory, root and umask"},
		{Kind: "a UTS namespace of the tree's own"},
		{Kind: "an IPC namespace of the tree's own", Note: "with settings, System V semaphores, message queues and shared memory"},
		{Kind: "a pid namespace of the tree's own, with its first process as root"},
		{Kind: "a user namespace of the tree's own", Note: "together with a pid namespace of its own, and made in the agent's; its other namespaces are its own, too, or the host's"},
		{Kind: "a mount namespace of the tree's own", Note: "mounts of file systems that the host has too are bound from there, by their paths; proc, sysfs, tmpfs (with up to 48 MiB in it), devpts, mqueue and overlay are mounted anew"},
		{Kind: "a network namespace of the tree's own", Note: "with loopback, veth pairs and bridges, addresses, routes, rules and settings; the other end of a veth pair is named at the restore (--external veth[INNER]:OUTER@BRIDGE); other devices, firewalls, queueing disciplines and neighbours set by hand are refused; --external net[INODE]:NAME and --join-ns use one that is there"},
		{Kind: "programs in a frozen control group", With: "--freeze-cgroup", Note: "the group is thawed when all tasks are stopped, and frozen again if they run on; without it refused"},
		{Kind: "control groups, of versions 1 and 2", With: "--manage-cgroups", Note: "where each task is, and what is set in the group of the root and below; without it the tree comes into the groups of whoever restores it"},
		{Kind: "System V semaphores and message queues of the host", Note: "stay where they are; a migration of their users is refused; what a process holds with SEM_UNDO is refused once the tree is frozen, because only the process can tell"},
	}
}
