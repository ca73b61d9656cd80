package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/fleet"
	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// drive starts a real program under the load of its own clients.
func drive(ctx context.Context, t *testing.T, h *hosts.Host, program, work string) *workloads.Run {
	t.Helper()
	prefix := filepath.Join(newDir(t), program)
	return start(ctx, t, h, prefix, "/usr/bin/python3", programs.Drive, prefix, program, work)
}

// TestMigratePrograms moves real programs, each under load and with all its
// clients, ten times to and fro.
func TestMigratePrograms(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 10*time.Minute)
	f, alpha, beta := newFleet(ctx, t)
	to := []*hosts.Host{beta, alpha}
	tenTimes := func(name string, start func(ctx context.Context, t *testing.T) *workloads.Run) {
		t.Run(name, func(t *testing.T) {
			ctx := deadline(t, 2*time.Minute)
			r := start(ctx, t)
			for i := range 10 {
				migrate(ctx, t, f, r, to[i%2], "--mode", []string{fleet.StopAndCopy, fleet.PreCopy}[i/2%2])
			}
			stop(ctx, t, r)
		})
	}
	for _, program := range []string{"nginx", "node", "java", "redis", "xz", "make", "bash", "python"} {
		tenTimes(program, func(ctx context.Context, t *testing.T) *workloads.Run {
			return drive(ctx, t, alpha, program, newDir(t))
		})
	}
	tenTimes("pycheck", func(ctx context.Context, t *testing.T) *workloads.Run {
		p := filepath.Join(newDir(t), "pycheck")
		return start(ctx, t, alpha, p, "/usr/bin/python3", programs.Pycheck, p, "32")
	})
	tenTimes("gocheck", func(ctx context.Context, t *testing.T) *workloads.Run {
		p := filepath.Join(newDir(t), "gocheck")
		return start(ctx, t, alpha, p, programs.Gocheck, p, "0.0.0.0:8080", "32")
	})
	// The files of the database are each host's own: what has been written so far
	// is copied while a transaction is open, as a storage that replicates would;
	// inode numbers are the same too, by which sqlite knows its database.
	t.Run("sqlite", func(t *testing.T) {
		ctx := deadline(t, 2*time.Minute)
		work := "/run/" + filepath.Base(newDir(t))
		for _, h := range to {
			if _, err := h.Run(ctx, "sh", "-c", fmt.Sprintf("mkdir %[1]s && mount -t tmpfs replica %[1]s && touch %[1]s/db", work)); err != nil {
				t.Fatal(err)
			}
		}
		r := drive(ctx, t, alpha, "sqlite", work)
		for i := range 10 {
			hold := r.Prefix + ".hold"
			if err := os.WriteFile(hold, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := r.WaitFile(ctx, "held"); err != nil {
				t.Fatal(err)
			}
			from := r.Host
			for _, name := range []string{"db", "db-journal", "stderr"} {
				b, err := os.ReadFile(from.Path(filepath.Join(work, name)))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(to[i%2].Path(filepath.Join(work, name)), b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			migrate(ctx, t, f, r, to[i%2])
			if err := os.Remove(hold); err != nil {
				t.Fatal(err)
			}
			for unix.Access(r.Prefix+".held", unix.F_OK) == nil {
				goes(ctx, t, r, 1)
			}
		}
		stop(ctx, t, r)
	})
}
