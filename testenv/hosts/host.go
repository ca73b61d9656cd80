package hosts

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is one host of an environment.
type Host struct {
	env      *Env
	name     string
	addr     netip.Addr
	init     *exec.Cmd
	lifeline *os.File
	done     chan struct{}
}

// Name is the hostname.
func (h *Host) Name() string { return h.name }

// Addr is the address on the bridge.
func (h *Host) Addr() netip.Addr { return h.addr }

// InitPid is the pid of the host's pid 1 as the machine sees it.
func (h *Host) InitPid() int { return h.init.Process.Pid }

func (h *Host) port() string { return h.name + "0" }

// Path is where the machine finds the host's file p.
func (h *Host) Path(p string) string {
	return filepath.Join("/proc", strconv.Itoa(h.InitPid()), "root", p)
}

// Command prepares a command inside the host; it is used like any exec.Cmd.
// The process that Start makes is a helper, which hands signals on to the
// command and takes over its exit status (128+n for signal n, 127 if
// there is no such command, 125 if the host could not be entered); killing the helper kills the command.
// ExtraFiles reach the command as they are.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.env.exe)
	cmd.Args = append([]string{nameEnter, strconv.Itoa(h.InitPid()), name}, args...)
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	return cmd
}

// Run runs a command inside the host and returns what it wrote to its standard
// output; an error carries what it wrote to its standard error.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := h.Command(ctx, name, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("host %s: %s %s: %w: %s", h.name, name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Spec says how a detached process is started.
type Spec struct {
	Args   []string // program and arguments
	Env    []string // nil: the environment of the calling program
	Dir    string   // empty: /
	Stdin  string   // paths inside the host; empty: /dev/null
	Stdout string   // appended to
	Stderr string   // the same path as Stdout: one shared open file
	Files  []*os.File
}

// Start starts a process in a session of its own whose parent is the host's
// init, with nothing of the calling program but Files (from 3 on), and returns
// its pid inside the host.
func (h *Host) Start(ctx context.Context, s Spec) (int, error) {
	if s.Env == nil {
		s.Env = os.Environ()
	}
	arg, err := json.Marshal(spawnConfig{Init: h.InitPid(), Dir: s.Dir, Args: s.Args, Env: s.Env,
		Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Keep: len(s.Files)})
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, h.env.exe)
	cmd.Args = []string{nameSpawn, string(arg)}
	cmd.ExtraFiles = s.Files
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("host %s: start %s: %w: %s", h.name, s.Args[0], err, strings.TrimSpace(stderr.String()))
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return 0, fmt.Errorf("host %s: start %s: pid: %w", h.name, s.Args[0], err)
	}
	return pid, nil
}

// ErrNoProcess says that a host has no such process.
var ErrNoProcess = errors.New("no such process")

// nspids are the pids of a process in every pid namespace from the machine's down.
func nspids(outer int) ([]int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", outer))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, "NSpid:")
		if !ok {
			continue
		}
		var pids []int
		for _, f := range strings.Fields(rest) {
			n, err := strconv.Atoi(f)
			if err != nil {
				return nil, fmt.Errorf("NSpid of pid %d: %w", outer, err)
			}
			pids = append(pids, n)
		}
		return pids, nil
	}
	return nil, fmt.Errorf("pid %d has no NSpid", outer)
}

// Inner translates a pid of the machine into the host's.
func (h *Host) Inner(outer int) (int, error) {
	level, err := h.level()
	if err != nil {
		return 0, err
	}
	pids, err := nspids(outer)
	if err != nil {
		return 0, err
	}
	if len(pids) <= level {
		return 0, fmt.Errorf("host %s: pid %d of the machine: %w", h.name, outer, ErrNoProcess)
	}
	return pids[level], nil
}

// level is the index of the host's pid namespace in NSpid lines.
func (h *Host) level() (int, error) {
	pids, err := nspids(h.InitPid())
	return len(pids) - 1, err
}

// Outer translates a pid of the host into the machine's.
func (h *Host) Outer(inner int) (int, error) {
	level, err := h.level()
	if err != nil {
		return 0, err
	}
	// The init and its pid namespace are told apart from other hosts' by the
	// namespace's number; a tree may have a deeper namespace of its own.
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.InitPid()))
	if err != nil {
		return 0, err
	}
	des, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, de := range des {
		outer, err := strconv.Atoi(de.Name())
		if err != nil {
			continue
		}
		pids, err := nspids(outer)
		if err != nil || len(pids) <= level || pids[level] != inner {
			continue
		}
		if len(pids) == level+1 {
			if got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", outer)); err != nil || got != want {
				// A zombie has no namespace link any more: its parent tells.
				if err == nil || !h.owns(outer) {
					continue
				}
			}
		} else if !h.owns(outer) {
			continue
		}
		return outer, nil
	}
	return 0, fmt.Errorf("host %s: pid %d: %w", h.name, inner, ErrNoProcess)
}

// owns says whether a process descends from the host's init.
func (h *Host) owns(outer int) bool {
	for range 64 {
		if outer == h.InitPid() {
			return true
		}
		if outer <= 1 {
			return false
		}
		pp, err := parent(outer)
		if err != nil {
			return false
		}
		outer = pp
	}
	return false
}

func parent(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	s := string(b)
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return 0, fmt.Errorf("stat of pid %d: no command name", pid)
	}
	fs := strings.Fields(s[i+1:])
	if len(fs) < 2 {
		return 0, fmt.Errorf("stat of pid %d: too short", pid)
	}
	return strconv.Atoi(fs[1])
}

// NextPid makes pid the next one that the host gives away, if it is free.
func (h *Host) NextPid(ctx context.Context, pid int) error {
	// The number belongs to the pid namespace of the writer.
	_, err := h.Run(ctx, "sh", "-c", fmt.Sprintf("echo %d >%s", pid-1, lastPid))
	return err
}

// Alive says whether the host has a process of that pid that is not a zombie.
func (h *Host) Alive(inner int) bool {
	b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/stat", inner)))
	if err != nil {
		return false
	}
	s := string(b)
	i := strings.LastIndexByte(s, ')')
	return i >= 0 && i+2 < len(s) && s[i+2] != 'Z' && s[i+2] != 'X'
}

// Kill sends a signal to a process of the host.
func (h *Host) Kill(inner int, sig unix.Signal) error {
	outer, err := h.Outer(inner)
	if err != nil {
		return err
	}
	if err := unix.Kill(outer, sig); err != nil {
		return fmt.Errorf("host %s: kill %d with %v: %w", h.name, inner, sig, err)
	}
	return nil
}

// WaitGone waits until the host has no process of that pid, zombies included.
func (h *Host) WaitGone(ctx context.Context, inner int) error {
	for {
		if _, err := os.Stat(h.Path(fmt.Sprintf("/proc/%d", inner))); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("host %s: pid %d still there: %w", h.name, inner, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Do runs f on a thread inside the host's network namespace: sockets that f
// makes by itself belong to the host. Its other namespaces stay the machine's.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", h.InitPid()))
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = ns.Close() }()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network of host %s: %w", h.name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Dial connects from the host to a numeric address.
func (h *Host) Dial(network, address string, timeout time.Duration) (net.Conn, error) {
	var c net.Conn
	err := h.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: timeout}).Dial(network, address)
		return err
	})
	return c, err
}

// AddAddress gives the host one more address of the network and tells the
// neighbours, as a failover does (RFC 5227, 3: gratuitous ARP).
func (h *Host) AddAddress(a netip.Addr) error {
	return h.Do(func() error {
		if err := ip("addr", "add", fmt.Sprintf("%s/%d", a, Net.Bits()), "dev", "eth0"); err != nil {
			return err
		}
		return announce("eth0", a)
	})
}

// RemoveAddress takes an address of AddAddress away again.
func (h *Host) RemoveAddress(a netip.Addr) error {
	return h.Do(func() error {
		return ip("addr", "del", fmt.Sprintf("%s/%d", a, Net.Bits()), "dev", "eth0")
	})
}

// announce sends a gratuitous ARP request for a.
func announce(dev string, a netip.Addr) error {
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	p := binary.BigEndian.AppendUint16(nil, 1) // Ethernet
	p = binary.BigEndian.AppendUint16(p, unix.ETH_P_IP)
	p = append(p, 6, 4, 0, 1) // address lengths, request
	p = append(p, ifi.HardwareAddr...)
	p = append(p, a.AsSlice()...)
	p = append(p, make([]byte, 6)...)
	p = append(p, a.AsSlice()...)
	to := &unix.SockaddrLinklayer{Ifindex: ifi.Index, Halen: 6,
		Protocol: unix.ETH_P_ARP>>8 | unix.ETH_P_ARP&0xff<<8,
		Addr:     [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	return os.NewSyscallError("sendto", unix.Sendto(fd, p, 0, to))
}

// Unplug takes the host's cable out; Plug puts it back. Addresses stay.
func (h *Host) Unplug() error {
	return h.env.keeper(func() error { return ip("link", "set", h.port(), "down") })
}

// Plug undoes Unplug.
func (h *Host) Plug() error {
	return h.env.keeper(func() error { return ip("link", "set", h.port(), "up") })
}
