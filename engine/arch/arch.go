// Package arch owns what differs between processor architectures: registers,
// the system-call convention, restart of interrupted system calls, extended
// state and the machine code that is placed into other processes. A new
// architecture is one more set of files with its suffix. It must not know
// tracing or images' files.
package arch
