package agent

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
	"godwit/wire"
)

// Info describes host and agent.
func (a *Agent) Info(context.Context, *wire.InfoRequest) (*wire.InfoReply, error) {
	info, err := a.describe()
	if err != nil {
		return nil, err
	}
	return &wire.InfoReply{Info: info}, nil
}

func (a *Agent) describe() (*wire.AgentInfo, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("describe the host: %w", err)
	}
	mem, err := fieldsKiB("/proc/meminfo", "MemTotal", "MemAvailable")
	if err != nil {
		return nil, fmt.Errorf("describe the host: %w", err)
	}
	a.mu.Lock()
	n := len(a.sources) + len(a.destinations)
	a.mu.Unlock()
	return &wire.AgentInfo{
		Host: a.cfg.Host, Protocol: wire.Version, Version: a.cfg.Version, Kernel: unix.ByteSliceToString(u.Release[:]),
		Arch: runtime.GOARCH, BootId: strings.TrimSpace(string(boot)), MemoryBytes: mem["MemTotal"],
		AvailableBytes: mem["MemAvailable"], Cpus: uint32(runtime.NumCPU()), StartedUnix: a.started.Unix(),
		Migrations: uint32(n), Pid: uint32(os.Getpid()), Proxies: a.proxies.list(),
	}, nil
}

// fieldsKiB reads lines of the form "Name: 12 kB" and returns bytes.
func fieldsKiB(path string, names ...string) (map[string]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	out := map[string]uint64{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		for _, n := range names {
			rest, ok := strings.CutPrefix(sc.Text(), n+":")
			if !ok {
				continue
			}
			num, unit, _ := strings.Cut(strings.TrimSpace(rest), " ")
			v, err := strconv.ParseUint(num, 10, 54)
			if err != nil || unit != "kB" {
				return nil, fmt.Errorf("%s: %s is %q", path, n, rest)
			}
			out[n] = v << 10
		}
	}
	return out, nil
}

// peakRSS is the largest resident set that this process had, bytes; 0 if it
// cannot be told. getrusage(2) would count that of the program before execve.
func peakRSS() uint64 {
	m, err := fieldsKiB("/proc/self/status", "VmHWM")
	if err != nil {
		return 0
	}
	return m["VmHWM"]
}

// Ps lists the processes of the host.
func (a *Agent) Ps(ctx context.Context, _ *wire.PsRequest) (*wire.PsReply, error) {
	pids, err := procfs.Pids()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	reply := &wire.PsReply{}
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("list processes: %w", context.Cause(ctx))
		}
		p, err := process(pid)
		if procfs.Gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list processes: %w", err)
		}
		reply.Processes = append(reply.Processes, p)
	}
	// The reply is one message: on a host with very many processes the
	// commands are what is left out first.
	for _, most := range []int{64, 0} {
		if proto.Size(reply) <= maxReply {
			break
		}
		for _, p := range reply.Processes {
			p.Command = clip(p.Command, most)
		}
	}
	return reply, nil
}

// maxReply keeps within the 1 MiB that a bus allows by default, bytes.
const maxReply = 900 << 10

// clip shortens s to at most n bytes and a mark that tells.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	if n == 0 {
		return ""
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// maxCommand is how much of a command line travels, bytes: a reply is one
// message, and a host may have thousands of processes.
const maxCommand = 256

// process describes one process. The error of one that is not there is procfs.Gone.
func process(pid int) (*wire.Process, error) {
	st, err := procfs.ReadStat(pid)
	if procfs.Gone(err) {
		return nil, fmt.Errorf("no process has pid %d here: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return nil, err
	}
	status, err := procfs.ReadStatus(pid)
	if err != nil {
		return nil, err
	}
	p := &wire.Process{
		Pid: int32(pid), Ppid: int32(st.PPid), Comm: strings.ToValidUTF8(st.Comm, "?"), RssBytes: status.VmRSS,
		Threads: uint32(st.NumThreads), Uid: status.Uid[1], State: string(rune(st.State)),
		// Without PF_KTHREAD (include/linux/sched.h) a zombie would look the same.
		KernelThread: st.Flags&0x00200000 != 0,
	}
	if args, err := procfs.Cmdline(pid); err == nil {
		p.Command = clip(strings.TrimSpace(strings.ToValidUTF8(strings.Join(args, " "), "?")), maxCommand)
	}
	if fds, err := procfs.Fds(pid); err == nil {
		p.OpenFiles = uint32(len(fds))
	}
	return p, nil
}
