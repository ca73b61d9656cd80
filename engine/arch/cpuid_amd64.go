package arch

// cpuid executes the instruction of that name.
func cpuid(leaf, sub uint32) (a, b, c, d uint32)

// xgetbv reads XCR0, the state components that the kernel has enabled.
// Preconditions: the CPU and the kernel have XSAVE (hasXSave).
func xgetbv() uint64

// hasXSave tells whether XSAVE is enabled (CPUID.1:ECX.OSXSAVE).
func hasXSave() bool {
	_, _, c, _ := cpuid(1, 0)
	return c&(1<<27) != 0
}
