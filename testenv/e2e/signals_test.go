package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSignalsDuringDumps sends a running stream of signals to a program that is
// dumped and goes on: each arrives once and in order.
func TestSignalsDuringDumps(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "sigtarget")
	s := selfcheck(ctx, t, h, newDir(t), "sigsender", strconv.Itoa(r.Pid))
	number := func(path string) (n uint64) {
		b, err := os.ReadFile(path)
		if err == nil {
			_, _ = fmt.Sscan(string(b), &n)
		}
		return n
	}
	for range 20 {
		before := number(r.Prefix + ".arrived")
		mustAgent(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "-R")
		goes(ctx, t, r, 5)
		for number(r.Prefix+".arrived") < before+20 {
			if err := ctx.Err(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	stop(ctx, t, s)
	sent := number(s.Prefix + ".sent")
	for number(r.Prefix+".arrived") != sent {
		if ctx.Err() != nil {
			t.Fatalf("%d signals were sent, %d arrived", sent, number(r.Prefix+".arrived"))
		}
		time.Sleep(time.Millisecond)
	}
	stop(ctx, t, r)
}

// TestStopsDuringDumps stops and continues a program all the time while it is
// dumped: it ends as the last signal wants it.
func TestStopsDuringDumps(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "threads")
	done, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		sigs := []unix.Signal{unix.SIGSTOP, unix.SIGCONT, unix.SIGTSTP, unix.SIGCONT, unix.SIGSTOP, unix.SIGTSTP, unix.SIGCONT}
		for i := 0; ; i++ {
			select {
			case <-done:
				ended <- h.Kill(r.Pid, unix.SIGCONT)
				return
			case <-time.After(time.Duration(i%5) * 700 * time.Microsecond):
			}
			if err := h.Kill(r.Pid, sigs[i%len(sigs)]); err != nil {
				ended <- err
				return
			}
		}
	}()
	for i := range 20 {
		o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(r.Pid), "-D", newDir(t), "-R")
		if o.code != 0 {
			t.Errorf("dump %d: exit code %d, %s", i, o.code, o.stderr)
		}
	}
	close(done)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	goes(ctx, t, r, 20)
	if s := taskState(t, h, r.Pid); strings.ContainsAny(s, "Tt") {
		t.Errorf("its state is %s", s)
	}
	stop(ctx, t, r)
}

// TestSIGTRAPAction dumps programs that have set the action of SIGTRAP in every
// way, by each kind of dump that leaves them running, failed ones included.
func TestSIGTRAPAction(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	h := newHosts(t, "alpha").Host("alpha")
	r := selfcheck(ctx, t, h, newDir(t), "sigtrap")
	small := newDir(t)
	if _, err := h.Run(ctx, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small); err != nil {
		t.Fatal(err)
	}
	pid := strconv.Itoa(r.Pid)
	for range 3 {
		mustAgent(ctx, t, h, nil, "dump", "-t", pid, "-D", newDir(t), "-R")
		goes(ctx, t, r, 5)
		mustAgent(ctx, t, h, nil, "pre-dump", "-t", pid, "-D", newDir(t))
		goes(ctx, t, r, 5)
		if o := agentCmd(ctx, t, h, nil, "dump", "-t", pid, "-D", small); o.code != 1 || !strings.Contains(o.stderr, "no space left") {
			t.Fatalf("dump into a full file system: exit code %d, %q", o.code, o.stderr)
		}
		goes(ctx, t, r, 5)
	}
	dumpRestore(ctx, t, r, 2)
	stop(ctx, t, r)
}
