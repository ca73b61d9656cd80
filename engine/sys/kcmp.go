package sys

// Whole-process objects that kcmp(2) compares (include/uapi/linux/kcmp.h).
const (
	KcmpVM      = 1
	KcmpFiles   = 2
	KcmpFS      = 3
	KcmpSighand = 4
	KcmpSysVSem = 6 // semaphore adjustments; equal, too, if neither has any
)

// KcmpTask compares a kernel object of two tasks, one of KcmpVM and the others.
func KcmpTask(pid1, pid2, typ int) (Order, error) { return kcmp(pid1, pid2, typ, 0, 0) }
