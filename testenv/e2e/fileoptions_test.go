package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFileOptions: what CRIU's options about files refuse, and what they overlook.
func TestFileOptions(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	t.Run("link-remap", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		dir := newDir(t)
		r := selfcheck(ctx, t, h, dir, "linkremap")
		here := filepath.Join(dir, "linkremap.here")
		for _, tc := range []struct {
			want string
			args []string
		}{
			{"dump with --link-remap", nil},
			{"which runs on", []string{"--link-remap", "--action-script", `[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ]`}},
			{"not an absolute path", []string{"--irmap-scan-path", "etc"}},
			{"neither filesize nor buildid", []string{"--file-validation", "crc"}},
		} {
			o := agentCmd(ctx, t, h, nil, append([]string{"dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)}, tc.args...)...)
			if o.code != 1 || !strings.Contains(o.stderr, tc.want) {
				t.Errorf("dump %v: exit code %d, %q; want %q", tc.args, o.code, o.stderr, tc.want)
			}
			if es, err := os.ReadDir(here); err != nil || len(es) > 0 {
				t.Errorf("dump %v left %v behind (%v)", tc.args, es, err)
			}
			goes(ctx, t, r, 5)
		}
		stop(ctx, t, r)
	})
	t.Run("file-validation", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		dir := newDir(t)
		r := selfcheck(ctx, t, h, dir, "files")
		img := dump(ctx, t, h, r.Pid)
		data := filepath.Join(dir, "files.data")
		fails := func(want string, args ...string) {
			t.Helper()
			o := agentCmd(ctx, t, h, nil, append([]string{"restore", "-D", img, "-d"}, args...)...)
			if o.code != 1 || !strings.Contains(o.stderr, want) {
				t.Errorf("restore %v: exit code %d, %q; want %q", args, o.code, o.stderr, want)
			}
		}
		if err := os.Truncate(data, 10001); err != nil {
			t.Fatal(err)
		}
		fails("has 10001 bytes here, expected 10000", "--file-validation", "filesize")
		fails("has 10001 bytes here, expected 10000", "--file-validation=buildid")
		if err := os.Truncate(data, 10000); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(data, 0o600); err != nil {
			t.Fatal(err)
		}
		fails("has mode 0600 here, expected 0640", "--file-validation", "filesize")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d", "--file-validation", "buildid", "--skip-file-rwx-check"); o.code != 0 {
			t.Fatalf("restore with --skip-file-rwx-check: %s", o.stderr)
		}
		if err := os.Chmod(data, 0o640); err != nil {
			t.Fatal(err)
		}
	})
}
