package files

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

func init() {
	scenes["measured"] = func(dir string) fds {
		p := filepath.Join(dir, "data")
		must(os.WriteFile(p, []byte("0123456789"), 0o640))
		return fds{"read": open(p, unix.O_RDONLY), "write": open(p, unix.O_WRONLY)}
	}
}

// TestFilePolicy: what may differ of a file, found by its path or handed in, and
// that it is only cut when the tree is about to run.
func TestFilePolicy(t *testing.T) {
	for _, tc := range []struct {
		name   string
		text   string // of the file at the restore
		mode   os.FileMode
		policy plan.FilePolicy
		want   string // of the refusal
		after  string // text once the tree runs
	}{
		{name: "same", text: "0123456789", policy: plan.FilePolicy{Size: plan.SizeSame, Mode: plan.ModeSame}, after: "0123456789"},
		{name: "same but grown", text: "0123456789x", policy: plan.FilePolicy{Size: plan.SizeSame}, want: "has 11 bytes here, expected 10"},
		{name: "grown", text: "0123456789x", policy: plan.FilePolicy{Size: plan.SizeGrown}, after: "0123456789x"},
		{name: "grown but smaller", text: "012", policy: plan.FilePolicy{Size: plan.SizeGrown}, want: "has 3 bytes here, expected at least 10"},
		{name: "any", text: "012", policy: plan.FilePolicy{Size: plan.SizeAny}, after: "012"},
		{name: "by use", text: "012", policy: plan.FilePolicy{Size: plan.SizeByUse}, want: "has 3 bytes here, expected at least 10"},
		{name: "truncate", text: "0123456789more", policy: plan.FilePolicy{Size: plan.SizeTruncate}, after: "0123456789"},
		{name: "truncate what is smaller", text: "012", policy: plan.FilePolicy{Size: plan.SizeTruncate}, want: "has 3 bytes here, expected at least 10"},
		{name: "mode", text: "0123456789", mode: 0o600, policy: plan.FilePolicy{Mode: plan.ModeSame}, want: "has mode 0600 here, expected 0640"},
		{name: "any mode", text: "0123456789", mode: 0o600, policy: plan.FilePolicy{Mode: plan.ModeAny}, after: "0123456789"},
	} {
		for _, external := range []bool{false, true} {
			name := strings.ReplaceAll(tc.name, " ", "-") + map[bool]string{true: "/external", false: "/path"}[external]
			t.Run(name, func(t *testing.T) {
				c := start(t, "measured")
				p := filepath.Join(c.dir, "data")
				o, ro := Options{}, RestoreOptions{}
				asked := ""
				ro.Policy = func(_, path string) plan.FilePolicy {
					asked = path
					return tc.policy
				}
				if external {
					k := keyOf(t, c, "read")
					o.External = []string{k}
					ro.Inherit = map[string]Inherit{k: {File: mustOpen(t, p, unix.O_RDONLY)}}
				}
				d := dumpOK(t, o, c)
				c.kill()
				if err := os.WriteFile(p, []byte(tc.text), 0o640); err != nil {
					t.Fatal(err)
				}
				if tc.mode != 0 {
					if err := os.Chmod(p, tc.mode); err != nil {
						t.Fatal(err)
					}
				}
				r, err := NewRestorer(nil, d.set, ro)
				if err == nil {
					err = r.Open()
					defer func() { _ = r.Close() }()
				}
				if asked != p {
					t.Errorf("the policy of %q was asked for, want %q", asked, p)
				}
				if tc.want != "" {
					if err == nil || !strings.Contains(err.Error(), tc.want) {
						t.Errorf("error %v, want %q", err, tc.want)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				cuts := r.TakeCuts()
				if b, err := os.ReadFile(p); err != nil || string(b) != tc.text {
					t.Errorf("before the tree runs the file is %q, %v; want %q", b, err, tc.text)
				}
				for range 2 {
					if err := cuts.Apply(); err != nil {
						t.Fatal(err)
					}
				}
				if b, err := os.ReadFile(p); err != nil || string(b) != tc.after {
					t.Errorf("the file is %q, %v; want %q", b, err, tc.after)
				}
			})
		}
	}
}
