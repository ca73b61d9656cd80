package sys

import (
	"testing"
	"unsafe"
)

func TestSUDConfigSize(t *testing.T) {
	if n := unsafe.Sizeof(SUDConfig{}); n != 32 {
		t.Errorf("struct ptrace_sud_config has %d bytes, want 32", n)
	}
}
