// Package sys owns the raw system calls and kernel structures of the engine:
// one function a call, typed arguments, EINTR retried, errno wrapped in an
// *os.SyscallError. It alone imports unsafe. It must not know what any of the
// calls is for.
package sys
