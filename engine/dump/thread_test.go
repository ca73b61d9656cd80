package dump

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"godwit/engine/procfs"
)

// TestThreadState reads /proc/PID/task/TID/status of threads that this CPU, or this
// test, cannot have.
func TestThreadState(t *testing.T) {
	for _, c := range []struct{ file, want string }{
		{"status-plain", ""},
		{"status-shstk", "uses a shadow stack"},
		{"status-shstk-locked", ""},
		{"status-sigtrap", "has a SIGTRAP waiting"},
	} {
		t.Run(c.file, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join("testdata", c.file))
			if err != nil {
				t.Fatal(err)
			}
			st, err := procfs.ParseStatus(b)
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := threadState(&st); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
				t.Errorf("it %q, want %q", got, c.want)
			}
		})
	}
}
