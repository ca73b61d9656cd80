package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// smallGap is a pause between two records that a busy machine makes by itself.
const smallGap = 2 * time.Second

// TestRefused: what cannot be carried is named before anything is touched.
func TestRefused(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, kind := range workloads.Refused {
		t.Run(kind, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "hold", kind)
			before, n := traces(t, h, r.Pid), count(t, r)
			img := newDir(t)
			o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", img)
			if o.code != 1 {
				t.Errorf("exit code %d, want 1", o.code)
			}
			object := "fd 33"
			if kind == "secretmem" {
				object = "mapping" // without a descriptor
			}
			for _, want := range []string{object, strconv.Itoa(r.Pid), "refused"} {
				if !strings.Contains(o.stderr, want) {
					t.Errorf("the message does not name %q: %s", want, o.stderr)
				}
			}
			want := 4
			if kind == "tcp" {
				want = 0 // a migration carries a connection within the tree, a dump only when told to
			}
			if o := agentCmd(ctx, t, h, nil, "inspect", "-t", strconv.Itoa(r.Pid)); o.code != want {
				t.Errorf("inspect: exit code %d, want %d: %s", o.code, want, o.stderr)
			}
			if diff := cmp.Diff(before, traces(t, h, r.Pid)); diff != "" {
				t.Errorf("a refused dump changed the process (-before +after):\n%s", diff)
			}
			if names, err := os.ReadDir(img); err != nil || len(names) != 0 {
				t.Errorf("a refused dump left %v, %v", names, err)
			}
			goes(ctx, t, r, 10)
			if gap := longestGap(t, r, n); gap > smallGap {
				t.Errorf("the process stood for %v", gap)
			}
			stop(ctx, t, r)
		})
	}
}

func TestUnknownPid(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	o := agentCmd(ctx, t, h, nil, "dump", "-t", "99999", "-D", newDir(t))
	if o.code != 1 || !strings.Contains(o.stderr, "99999") {
		t.Errorf("exit code %d, %q; want 1 and the pid", o.code, o.stderr)
	}
	o = agentCmd(ctx, t, h, nil, "dump", "-t", "1", "-D", newDir(t))
	if o.code != 1 {
		t.Errorf("dump of init: exit code %d, %q", o.code, o.stderr)
	}
	if !h.Alive(1) {
		t.Error("init is gone")
	}
}

// takePid starts a sleep that has a certain pid of a host, under the shell that is returned.
func takePid(ctx context.Context, t *testing.T, h *hosts.Host, pid int) *exec.Cmd {
	t.Helper()
	out := filepath.Join(newDir(t), "holder")
	// Whatever else runs there may take the pid between the two steps.
	cmd := h.Command(ctx, "sh", "-c", fmt.Sprintf("while :; do echo %d >/proc/sys/kernel/ns_last_pid; sleep 1000 & "+
		"if [ $! = %d ]; then break; fi; kill $!; wait $!; done; echo $! >%s; wait", pid-1, pid, out))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitText(ctx, t, out, fmt.Sprintf("%d\n", pid))
	return cmd
}

// TestPidTaken: a restore whose pid is in use says who has it, and harms nobody.
func TestPidTaken(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "counter")
	img := dump(ctx, t, h, r.Pid)
	holder := takePid(ctx, t, h, r.Pid)
	o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d")
	if o.code != 1 || !strings.Contains(o.stderr, strconv.Itoa(r.Pid)) || !strings.Contains(o.stderr, "sleep") {
		t.Errorf("exit code %d, %q; want 1, the pid and its holder", o.code, o.stderr)
	}
	if !h.Alive(r.Pid) {
		t.Error("the holder of the pid is gone")
	}
	if err := h.Kill(r.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()
	if err := h.WaitGone(ctx, r.Pid); err != nil {
		t.Fatal(err)
	}
	restore(ctx, t, h, img, r.Pid, nil)
	goes(ctx, t, r, 5)
	stop(ctx, t, r)
}

// TestDiskFull: a dump that fails leaves neither images nor traces.
func TestDiskFull(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	if _, err := h.Run(ctx, "sh", "-c", "mkdir /run/tiny && mount -t tmpfs -o size=8m tmpfs /run/tiny"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command string
		args    []string
	}{{"mem", []string{"64", "2000"}}, {"syscalls", nil}, {"vma", nil}} {
		t.Run(c.command, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			prefix := filepath.Join(newDir(t), c.command)
			r := start(ctx, t, h, prefix, append([]string{programs.Selfcheck, c.command, prefix}, c.args...)...)
			if c.command == "syscalls" {
				// A small process needs a smaller disk.
				if _, err := h.Run(ctx, "dd", "if=/dev/zero", "of=/run/tiny/fill", "bs=4k", "status=none", "count=2040"); err != nil {
					t.Fatal(err)
				}
			}
			before := traces(t, h, r.Pid)
			o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", "/run/tiny")
			if o.code != 1 || !strings.Contains(o.stderr, "no space left") {
				t.Errorf("exit code %d, %q; want 1 and the reason", o.code, o.stderr)
			}
			if diff := cmp.Diff(before, traces(t, h, r.Pid)); diff != "" {
				t.Errorf("a failed dump changed the process (-before +after):\n%s", diff)
			}
			if out, err := h.Run(ctx, "sh", "-c", "rm -f /run/tiny/fill; ls /run/tiny"); err != nil || out != "" {
				t.Errorf("a failed dump left %s, %v", out, err)
			}
			goes(ctx, t, r, 20)
			stop(ctx, t, r)
		})
	}
}

// TestDiesInTheMiddle: the process is killed while it is being dumped.
func TestDiesInTheMiddle(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "mem", "512")
			img := newDir(t)
			cmd := h.Command(ctx, binaries.Agent, "dump", "-t", strconv.Itoa(r.Pid), "-D", img, "-R")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// The tree is frozen once its pages are written.
			for {
				if ps, _ := filepath.Glob(filepath.Join(img, "pages-*")); len(ps) > 0 {
					break
				}
				if ctx.Err() != nil {
					t.Fatalf("no pages are written: %s", stderr.String())
				}
				time.Sleep(time.Millisecond)
			}
			if err := h.Kill(r.Pid, sig); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait()
			var ee *exec.ExitError
			switch {
			case sig == unix.SIGTERM:
				// It waits until the process runs again, and is not lost.
				if err != nil {
					t.Errorf("dump: %v: %s", err, stderr.String())
				}
				if err := r.WaitFile(ctx, "ok"); err != nil {
					t.Error(err)
				}
			case errors.As(err, &ee):
				if ee.ExitCode() != 1 || !strings.Contains(stderr.String(), strconv.Itoa(r.Pid)) {
					t.Errorf("exit code %d, %q; want 1 and the pid", ee.ExitCode(), stderr.String())
				}
				if names, err := os.ReadDir(img); err != nil || len(names) != 0 {
					t.Errorf("a failed dump left %v, %v", names, err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				t.Log("the dump was faster than the signal")
			}
			if err := h.WaitGone(ctx, r.Pid); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAgentKilled: a local dump whose agent is killed in the middle leaves the
// tree running.
func TestAgentKilled(t *testing.T) {
	ctx := deadline(t, time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "mem", "512", "1000")
	img := newDir(t)
	cmd := h.Command(ctx, binaries.Agent, "dump", "-t", strconv.Itoa(r.Pid), "-D", img, "-R")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for {
		if ps, _ := filepath.Glob(filepath.Join(img, "pages-*")); len(ps) > 0 {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("no pages are written")
		}
		time.Sleep(time.Millisecond)
	}
	_ = cmd.Process.Kill() // the command dies with its helper
	_ = cmd.Wait()
	goes(ctx, t, r, 20)
	dumpRestore(ctx, t, r, 1)
	stop(ctx, t, r)
}
