package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// TestFilesystems has the commands that hold files of all sorts do so on other
// file systems than that of the tests.
func TestFilesystems(t *testing.T) {
	t.Parallel()
	h := newHosts(t, "alpha").Host("alpha")
	// In /run there are no devices; on an overlay a file without a name has one link,
	// and a watch is found again only as long as its file keeps its inode.
	plain := []string{"files", "dirs", "deleted", "openflags", "opath", "fifo", "pipestates", "vma"}
	all := append([]string{"ghosts", "inotify"}, plain...)
	on := func(name string, mount func(t *testing.T, at string), commands ...string) {
		t.Run(name, func(t *testing.T) {
			at := "/run/" + filepath.Base(newDir(t))
			ctx := deadline(t, time.Minute)
			if _, err := h.Run(ctx, "mkdir", at); err != nil {
				t.Fatal(err)
			}
			mount(t, at)
			t.Cleanup(func() { _, _ = h.Run(context.Background(), "umount", "-l", at) })
			for _, c := range commands {
				t.Run(c, func(t *testing.T) {
					ctx := deadline(t, 2*time.Minute)
					dir := filepath.Join(at, c)
					if _, err := h.Run(ctx, "mkdir", "-m", "777", dir); err != nil {
						t.Fatal(err)
					}
					r := launchAt(ctx, t, h, dir, c)
					dumpRestore(ctx, t, r, 4)
					goes(ctx, t, r, 10)
					stop(ctx, t, r)
				})
			}
		})
	}
	mounts := func(script string) func(t *testing.T, at string) {
		return func(t *testing.T, at string) {
			t.Helper()
			ctx := deadline(t, time.Minute)
			if _, err := h.Run(ctx, "sh", "-ec", strings.NewReplacer("AT", at, "IMG", filepath.Join(newDir(t), "img")).Replace(script)); err != nil {
				t.Fatal(err)
			}
		}
	}
	on("tmpfs", mounts("mount -t tmpfs none AT"), all...)
	on("bind", mounts("mkdir AT.there; mount --bind AT.there AT"), append([]string{"inotify"}, plain...)...)
	on("overlay", mounts("mkdir AT.lower AT.upper AT.work; mount -t overlay -o lowerdir=AT.lower,upperdir=AT.upper,workdir=AT.work none AT"), plain...)
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	for _, fs := range []string{"btrfs", "ext4"} {
		if strings.Contains(string(known), "\t"+fs+"\n") {
			on(fs, mounts("truncate -s 128M IMG; mkfs."+fs+" -q IMG; mount -o loop IMG AT"), all...)
		} else {
			t.Logf("the kernel has no %s", fs)
		}
	}
}

// launchAt is selfcheck with a directory that only the host sees.
func launchAt(ctx context.Context, t *testing.T, h *hosts.Host, dir, command string) *workloads.Run {
	t.Helper()
	t.Helper()
	prefix := filepath.Join(dir, command)
	pid, err := h.Start(ctx, hosts.Spec{Args: []string{programs.Selfcheck, command, prefix}, Stdout: prefix + ".out", Stderr: prefix + ".out"})
	if err != nil {
		t.Fatal(err)
	}
	r := &workloads.Run{Host: h, Pid: pid, Prefix: h.Path(prefix)}
	if err := r.WaitFile(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	return r
}
