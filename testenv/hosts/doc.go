// Package hosts makes hosts out of namespaces for tests and the demo: each has
// its own network, mounts, pids, hostname and IPC, its own /proc, /tmp, /run
// and /dev/shm, and hangs by a veth on a bridge that only they see. It needs
// root and touches no interface, route or mount of the machine.
//
// Helpers are the importing program itself, started again under another
// argv[0] (see init in reexec.go), so nothing has to be installed but ip (iproute2) and setpriv (util-linux).
//
//	program ── keeper thread (network namespace of the bridge)
//	   │            br0 ── alpha0 ┄┄ eth0 10.77.0.1
//	   │                └─ beta0  ┄┄ eth0 10.77.0.2
//	   ├─ init of alpha (pid 1 inside; reaps; dies with the program)
//	   └─ init of beta
//
// It must not know agents, engines or workloads.
package hosts
