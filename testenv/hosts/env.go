package hosts

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Net is the network of an environment; hosts count up from .1.
var Net = netip.MustParsePrefix("10.77.0.0/24")

const bridge = "br0"

// Env is a set of hosts on one bridge.
type Env struct {
	dir  string
	exe  string
	work chan func() // run by the keeper thread

	clocks []time.Duration // by host; none: all have the machine's
	mu     sync.Mutex
	hosts  map[string]*Host
	names  []string
	closed bool
}

// New makes an environment with the named hosts. dir is a directory that all
// hosts see at the same path, for binaries, logs and whatever else they share;
// it must exist and stays.
//
// Errors: not root, "ip" missing, or a namespace that this machine does not allow.
func New(dir string, names ...string) (*Env, error) { return NewAt(dir, nil, names...) }

// NewAt is New with hosts whose clocks that count from boot are ahead of the
// machine's by what clocks say, in the order of names.
func NewAt(dir string, clocks []time.Duration, names ...string) (*Env, error) {
	if clocks != nil && len(clocks) != len(names) {
		return nil, fmt.Errorf("%d clocks for %d hosts", len(clocks), len(names))
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("making hosts out of namespaces needs root")
	}
	for _, tool := range []struct{ name, pkg string }{{"ip", "iproute2"}, {"setpriv", "util-linux"}} {
		if _, err := exec.LookPath(tool.name); err != nil {
			return nil, fmt.Errorf("making hosts needs %s of %s: %w", tool.name, tool.pkg, err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	e := &Env{dir: dir, exe: exe, work: make(chan func()), hosts: map[string]*Host{}, names: names, clocks: clocks}
	up := make(chan error, 1)
	go e.keep(up)
	if err := <-up; err != nil {
		return nil, err
	}
	for i, name := range names {
		if err := e.add(i, name); err != nil {
			return nil, errors.Join(fmt.Errorf("make host %s: %w", name, err), e.Close())
		}
	}
	return e, nil
}

// T is what ForTest needs of a *testing.T.
type T interface {
	Helper()
	Cleanup(func())
	Fatalf(format string, args ...any)
	TempDir() string
}

// ForTest makes an environment that ends with the test.
func ForTest(t T, names ...string) *Env {
	t.Helper()
	e, err := New(t.TempDir(), names...)
	if err != nil {
		t.Fatalf("make hosts: %v", err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Fatalf("remove hosts: %v", err)
		}
	})
	return e
}

// keep is the keeper thread: it lives in the network namespace that holds the
// bridge and is the parent of every init, whose parent-death signal follows
// the thread and not the process (prctl(2)). The namespace goes with it.
func (e *Env) keep(up chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread must not serve others
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		up <- fmt.Errorf("make a network namespace: %w", err)
		return
	}
	if err := ip("link", "add", "name", bridge, "type", "bridge"); err != nil {
		up <- err
		return
	}
	if err := ip("link", "set", bridge, "up"); err != nil {
		up <- err
		return
	}
	up <- nil
	for f := range e.work {
		f()
	}
}

// keeper runs f on the keeper thread.
func (e *Env) keeper(f func() error) error {
	done := make(chan error, 1)
	e.work <- func() { done <- f() }
	return <-done
}

// ip runs iproute2 in the network namespace of the calling thread.
func ip(args ...string) error {
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// add makes host number i.
func (e *Env) add(i int, name string) error {
	if name == "" || len(name) > 10 || strings.ContainsAny(name, "/ ") {
		return fmt.Errorf("host name %q: want 1 to 10 letters", name)
	}
	if e.hosts[name] != nil {
		return errors.New("named twice")
	}
	// Pids of different hosts differ, as they mostly do on real ones, so that a
	// tree finds its own free where it lands, however many it has used up before.
	c := initConfig{Hostname: name, Shared: e.dir, Hosts: map[string]string{}, FirstPid: 1000 + i*pidsApart(len(e.names))}
	for j, n := range e.names {
		c.Hosts[n] = address(j).String()
	}
	arg, err := json.Marshal(c)
	if err != nil {
		return err
	}
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = lifeR.Close() }()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, lifeW.Close())
	}
	defer func() { _ = readyR.Close() }()
	goR, goW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, lifeW.Close(), readyW.Close())
	}
	defer func() { _ = goR.Close() }()

	h := &Host{env: e, name: name, addr: address(i), lifeline: lifeW, done: make(chan struct{})}
	h.init = &exec.Cmd{
		Path:       e.exe,
		Args:       []string{nameInit, string(arg)},
		Env:        append(os.Environ(), "GOMAXPROCS=1"),
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{lifeR, readyW, goR},
		SysProcAttr: &unix.SysProcAttr{
			Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
			Pdeathsig:  unix.SIGKILL,
			Setsid:     true, // Ctrl-C is for the program, which then ends the hosts
		},
	}
	err = e.keeper(func() error {
		if e.clocks != nil {
			if err := ownClocks(e.clocks[i]); err != nil {
				return err
			}
		}
		return h.init.Start()
	})
	if err != nil {
		return errors.Join(err, lifeW.Close(), readyW.Close(), goW.Close())
	}
	_ = readyW.Close()
	e.mu.Lock()
	e.hosts[name] = h
	e.mu.Unlock()
	go func() {
		_ = h.init.Wait()
		close(h.done)
	}()
	line, err := bufio.NewReader(readyR).ReadString('\n')
	if err != nil {
		return errors.Join(fmt.Errorf("wait for its init: %w", err), goW.Close())
	}
	if line != "ok\n" {
		return errors.Join(errors.New(strings.TrimSpace(line)), goW.Close())
	}
	pid := fmt.Sprint(h.init.Process.Pid)
	port := h.port()
	err = e.keeper(func() error {
		if err := ip("link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", pid); err != nil {
			return err
		}
		if err := ip("link", "set", port, "master", bridge); err != nil {
			return err
		}
		return ip("link", "set", port, "up")
	})
	if err == nil {
		err = h.Do(func() error {
			for _, a := range [][]string{
				{"link", "set", "lo", "up"},
				{"addr", "add", fmt.Sprintf("%s/%d", h.addr, Net.Bits()), "dev", "eth0"},
				{"link", "set", "eth0", "up"},
			} {
				if err := ip(a...); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return errors.Join(err, goW.Close())
}

// pidsApart is how many pids lie between the first of one host and the next's.
func pidsApart(n int) int {
	most := 32768 // the default of pid_max(5)
	if b, err := os.ReadFile("/proc/sys/kernel/pid_max"); err == nil {
		if m, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			most = m
		}
	}
	return min(most/(n+1), 100000)
}

func address(i int) netip.Addr {
	a := Net.Addr()
	for range i + 1 {
		a = a.Next()
	}
	return a
}

// Dir is the directory that all hosts share.
func (e *Env) Dir() string { return e.dir }

// Host returns the host of that name; it panics on a name that New was not
// given, which is a mistake in the calling program.
func (e *Env) Host(name string) *Host {
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.hosts[name]
	if h == nil {
		panic("hosts: no host " + name)
	}
	return h
}

// Names lists the hosts in the order in which they were given.
func (e *Env) Names() []string { return slices.Clone(e.names) }

// Close ends every process of every host and removes the network. It may be
// called more than once. Should the program die without it, the kernel does
// the same.
func (e *Env) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	hs := make([]*Host, 0, len(e.hosts))
	for _, h := range e.hosts {
		hs = append(hs, h)
	}
	e.mu.Unlock()
	var errs []error
	for _, h := range hs {
		// Ending pid 1 makes the kernel kill and reap the whole pid namespace
		// before the init itself can be waited for.
		_ = h.init.Process.Kill()
		_ = h.lifeline.Close()
	}
	for _, h := range hs {
		select {
		case <-h.done:
		case <-time.After(2 * time.Minute):
			errs = append(errs, fmt.Errorf("processes of host %s did not end within 2 minutes", h.name))
		}
	}
	close(e.work)
	return errors.Join(errs...)
}
