package ptrace

import "fmt"

// Call is one system call for a target to execute. It is built without any
// knowledge of the target's memory: bytes are placed by the Remote that runs it.
type Call struct {
	// What is tried, for error texts, such as "epoll_ctl add fd 7 to epoll fd 5".
	What string
	Nr   uintptr
	Args [6]Arg
	// MayFail leaves judging Ret to the caller; otherwise a negative Ret is an error.
	MayFail bool
	// Ret is the raw result after the run: -4095..-1 is a negated errno.
	Ret int64
}

// Arg is one argument of a Call: a number, or memory passed by address.
type Arg struct {
	Val uint64
	// In is copied into the target before the call; its address is the argument.
	In []byte
	// Out is a buffer of the target whose address is the argument; it is
	// copied back after the call. In and Out of one Arg may both be set: then
	// they have the same length.
	Out []byte
	// Rel are pointers inside In to other places of In.
	Rel []Rel
}

// Rel makes the 8 bytes at offset At of a buffer the address of its offset To.
type Rel struct{ At, To int }

// Int makes a number argument; negative numbers are sign-extended.
func Int[T ~int | ~int32 | ~int64 | ~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64 | ~uintptr](v T) Arg {
	return Arg{Val: uint64(v)}
}

// Bytes makes an input buffer argument.
func Bytes(b []byte) Arg { return Arg{In: b} }

// Str makes a NUL-terminated string argument.
func Str(s string) Arg { return Arg{In: append([]byte(s), 0)} }

// Buf makes an output buffer argument.
func Buf(b []byte) Arg { return Arg{Out: b} }

// NewCall is a Call with its arguments.
func NewCall(what string, nr uintptr, args ...Arg) *Call {
	c := &Call{What: what, Nr: nr}
	if copy(c.Args[:], args) < len(args) {
		panic(fmt.Sprintf("system call %s with %d arguments", what, len(args)))
	}
	return c
}
