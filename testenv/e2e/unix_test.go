package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/workloads"
)

// TestUnixOutside has unix sockets of which the other end is not in the tree.
func TestUnixOutside(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	// refused wants a dump of r to be refused for a reason; it runs on.
	refused := func(t *testing.T, r *workloads.Run, want string, options ...string) {
		t.Helper()
		ctx := deadline(t, 30*time.Second)
		o := agentCmd(ctx, t, h, nil, append([]string{"dump", "-t", fmt.Sprint(r.Pid), "-D", newDir(t)}, options...)...)
		if o.code != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("dump %v: exit code %d, %q; want 1 and %q", options, o.code, o.stderr, want)
		}
		goes(ctx, t, r, 3)
	}

	t.Run("datagrams to a name", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		path := filepath.Join(dir, "log")
		server := selfcheck(ctx, t, h, dir, "unixserver", path)
		r := selfcheck(ctx, t, h, dir, "unixlogger", path)
		refused(t, r, "give --ext-unix-sk")
		dumpRestore(ctx, t, r, 10, "--ext-unix-sk")
		img := dump(ctx, t, h, r.Pid, "-x")
		if o := agentCmd(ctx, t, h, nil, "restore", "-D", img, "-d"); o.code != 1 || !strings.Contains(o.stderr, "give --ext-unix-sk") {
			t.Errorf("restore without --ext-unix-sk: exit code %d, %q", o.code, o.stderr)
		}
		restore(ctx, t, h, img, r.Pid, nil, "-x")
		goes(ctx, t, r, 10)
		stop(ctx, t, r)
		goes(ctx, t, server, 3)
		stop(ctx, t, server)
	})

	t.Run("a pair", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		prefix := filepath.Join(dir, "unixpeer")
		pair := func() (mine, theirs *os.File) {
			var p [2]int
			if err := h.Do(func() (err error) {
				p, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			mine, theirs = os.NewFile(uintptr(p[0]), "mine"), os.NewFile(uintptr(p[1]), "theirs")
			t.Cleanup(func() { _, _ = mine.Close(), theirs.Close() })
			return mine, theirs
		}
		ask := func(f *os.File, b byte) {
			t.Helper()
			if err := unix.SetsockoptTimeval(int(f.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
				t.Fatal(err)
			}
			got := []byte{b}
			if _, err := unix.Write(int(f.Fd()), got); err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Read(int(f.Fd()), got); err != nil || n != 1 || got[0] != b+1 {
				t.Fatalf("the answer to %d is %v, %v", b, got[:max(n, 0)], err)
			}
		}
		mine, theirs := pair()
		r, err := workloads.LaunchWith(ctx, h, prefix, []*os.File{theirs}, programs.Selfcheck, "unixpeer", prefix)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.WaitFile(ctx, "ready"); err != nil {
			t.Fatal(err)
		}
		if err := theirs.Close(); err != nil {
			t.Fatal(err)
		}
		ask(mine, 1)
		refused(t, r, "declare it external (--external unix[")
		refused(t, r, "no process of the tree has this socket", "--external", "unix[1]")
		ino := func() uint64 {
			var st unix.Stat_t
			if err := unix.Stat(h.Path(fmt.Sprintf("/proc/%d/fd/3", r.Pid)), &st); err != nil {
				t.Fatal(err)
			}
			return st.Ino
		}
		for i := range 3 {
			n := ino()
			img := dump(ctx, t, h, r.Pid, "--external", fmt.Sprintf("unix[%d]", n))
			mine, theirs = pair()
			restore(ctx, t, h, img, r.Pid, []*os.File{theirs}, "--inherit-fd", fmt.Sprintf("fd[3]:socket:[%d]", n))
			_ = theirs.Close()
			ask(mine, byte(10+i))
		}
		// Nobody hands a socket in: it hangs up.
		img := dump(ctx, t, h, r.Pid, "--external", fmt.Sprintf("unix[%d]", ino()))
		restore(ctx, t, h, img, r.Pid, nil)
		if err := r.WaitFile(ctx, "end"); err != nil {
			t.Fatal(err)
		}
		stop(ctx, t, r)
	})

	t.Run("waiting to be accepted", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		dir := newDir(t)
		path := filepath.Join(dir, "sock")
		r := selfcheck(ctx, t, h, dir, "unixbusy", path)
		var c *os.File
		if err := h.Do(func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			c = os.NewFile(uintptr(fd), "client")
			return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		}); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		refused(t, r, "1 connections from outside the tree wait to be accepted")
		for range 3 {
			img := dump(ctx, t, h, r.Pid, "--skip-in-flight")
			restore(ctx, t, h, img, r.Pid, nil)
			goes(ctx, t, r, 3)
		}
		stop(ctx, t, r)
	})
}
