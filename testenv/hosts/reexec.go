package hosts

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names that a re-executed program recognises itself by, in argv[0].
const (
	nameInit  = "godwit-testenv-init"
	nameEnter = "godwit-testenv-enter"
	nameSpawn = "godwit-testenv-spawn"
	nameBirth = "godwit-testenv-birth"
)

// lastPid sets the pid from which the kernel goes on counting, for the pid
// namespace of the writer (Documentation/admin-guide/sysctl/kernel.rst, ns_last_pid).
const lastPid = "/proc/sys/kernel/ns_last_pid"

// Descriptors that the init of a host gets from its maker.
const (
	fdLifeline = 3 // read end of a pipe; end of file means that the maker is gone
	fdReady    = 4 // write end of a pipe; one line: "ok" or an error
	fdGo       = 5 // read end of a pipe; end of file means that the network is there
)

// initConfig is what the init of a host is told, as JSON in argv[1].
type initConfig struct {
	Hostname string
	Shared   string            // directory that all hosts see at the same path
	Hosts    map[string]string // name → address, for /etc/hosts
	FirstPid int               // of the first process after init
}

// spawnConfig is what a spawn helper is told, as JSON in argv[1].
type spawnConfig struct {
	Init   int // pid of the host's init
	Dir    string
	Args   []string
	Env    []string
	Stdin  string // paths inside the host; empty: /dev/null
	Stdout string
	Stderr string
	Keep   int // descriptors from 3 on that the process inherits
}

// init turns a re-executed program into a helper before main runs.
func init() {
	if len(os.Args) == 0 {
		return
	}
	var run func() (int, error)
	switch os.Args[0] {
	case nameInit:
		run = runInit
	case nameEnter:
		run = runEnter
	case nameSpawn:
		run = runSpawn
	case nameBirth:
		run = runBirth
	default:
		return
	}
	code, err := run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		code = 125
	}
	os.Exit(code)
}

// runInit is pid 1 of a host: it makes the mounts, then reaps until the
// lifeline breaks. Its exit ends every process of the host.
func runInit() (int, error) {
	ready := os.NewFile(fdReady, "ready")
	err := setUpHost()
	msg := "ok\n"
	if err != nil {
		msg = err.Error() + "\n"
	}
	if _, werr := ready.WriteString(msg); err == nil {
		err = werr
	}
	if err != nil {
		return 1, err
	}
	// The network is moved in by the maker.
	buf := make([]byte, 1)
	if _, err := unix.Read(fdGo, buf); err != nil {
		return 1, os.NewSyscallError("read", err)
	}
	_ = ready.Close()
	_ = unix.Close(fdGo)
	// A broken lifeline is the only way out; signals from inside are ignored
	// by the kernel for pid 1, those from outside here.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	go func() {
		for {
			n, err := unix.Read(fdLifeline, buf)
			if err == unix.EINTR {
				continue
			}
			if n <= 0 {
				os.Exit(0)
			}
		}
	}()
	reap()
	return 0, nil
}

// reap waits for every orphan of the host, for ever.
func reap() {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid == 0 {
				break
			}
		}
		<-chld
	}
}

func setUpHost() error {
	var c initConfig
	if err := json.Unmarshal([]byte(os.Args[1]), &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
		return fmt.Errorf("set hostname %s: %w", c.Hostname, err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// The shared directory may lie below a directory that is about to be covered.
	shared, err := unix.Open(c.Shared, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", c.Shared, err)
	}
	etcHosts, err := writeEtcHosts(c)
	if err != nil {
		return err
	}
	for _, m := range []struct {
		fstype, dir, data string
		flags             uintptr
	}{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"tmpfs", "/run", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
		{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"tmpfs", "/tmp", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"devpts", "/dev/pts", "mode=620,ptmxmode=666", unix.MS_NOSUID | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.fstype, m.dir, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.dir, err)
		}
	}
	if err := os.MkdirAll(c.Shared, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", shared), c.Shared, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", c.Shared, err)
	}
	_ = unix.Close(shared)
	if err := os.WriteFile(lastPid, []byte(fmt.Sprint(c.FirstPid-1)), 0); err != nil {
		return err
	}
	if err := unix.Mount(etcHosts, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind /etc/hosts: %w", err)
	}
	return os.Chdir("/")
}

func writeEtcHosts(c initConfig) (string, error) {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n")
	for name, addr := range c.Hosts {
		fmt.Fprintf(&b, "%s %s\n", addr, name)
	}
	dir := filepath.Join(c.Shared, ".hosts")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	p := filepath.Join(dir, c.Hostname)
	return p, os.WriteFile(p, []byte(b.String()), 0o644)
}

// enter moves the calling thread into the host whose init is pid and locks the
// goroutine to it; children started from it are born there.
func enter(pid int) error {
	runtime.LockOSThread()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("open init of the host, pid %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(fd) }()
	ahead, err := clocksOf(pid)
	if err != nil {
		return err
	}
	if ahead != 0 {
		// A program with threads cannot join a time namespace, but make an equal one.
		if err := ownClocks(ahead); err != nil {
			return err
		}
	}
	// A mount namespace can only be joined by a thread that shares its
	// directory with no other: setns(2).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	const all = unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNS | unix.CLONE_NEWPID
	if err := unix.Setns(fd, all); err != nil {
		return fmt.Errorf("enter the host of pid %d: %w", pid, err)
	}
	return nil
}

// ownClocks has children of the calling thread be born with clocks that are
// ahead of the machine's (time_namespaces(7)).
func ownClocks(ahead time.Duration) error {
	if err := unix.Unshare(unix.CLONE_NEWTIME); err != nil {
		return fmt.Errorf("make a time namespace: %w", err)
	}
	sec, nsec := ahead/time.Second, ahead%time.Second
	text := fmt.Sprintf("monotonic %d %d\nboottime %d %d\n", sec, nsec, sec, nsec)
	// The file is one of processes, but found under the number of any thread.
	return os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", unix.Gettid()), []byte(text), 0)
}

// clocksOf tells by how much the clocks of a process are ahead of the machine's.
func clocksOf(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timens_offsets", pid))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var sec, nsec int64
	if _, err := fmt.Sscanf(string(b), "monotonic %d %d", &sec, &nsec); err != nil {
		return 0, fmt.Errorf("clocks of pid %d: %w", pid, err)
	}
	return time.Duration(sec)*time.Second + time.Duration(nsec), nil
}

// runEnter runs argv[2:] inside the host of init argv[1], hands signals on and
// exits with its status. The command dies with this helper.
func runEnter() (int, error) {
	if len(os.Args) < 3 {
		return 0, errors.New("usage: INIT-PID COMMAND [ARG…]")
	}
	var pid int
	if _, err := fmt.Sscan(os.Args[1], &pid); err != nil {
		return 0, fmt.Errorf("pid %q: %w", os.Args[1], err)
	}
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	dir, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	if err := enter(pid); err != nil {
		return 0, err
	}
	// A directory that the host does not have means its root.
	_ = os.Chdir(dir)
	// Go's own Pdeathsig would kill the command at once: seen from inside, its
	// parent is pid 0, which Go takes for a parent that died.
	cmd := exec.Command("setpriv", append([]string{"--pdeathsig", "KILL", "--"}, os.Args[2:]...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// What the command holds open must end with it, not with this helper.
	go func() {
		for s := range sigs {
			_ = cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return ee.ExitCode(), nil
	}
	return 0, err
}

// runSpawn enters a host and runs a birth helper there. The second helper is
// needed because an orphan goes to the init of the pid namespace of its dead
// parent (kernel: find_child_reaper), which must therefore live inside.
func runSpawn() (int, error) {
	var c spawnConfig
	if err := json.Unmarshal([]byte(os.Args[1]), &c); err != nil {
		return 0, err
	}
	// The program's file may be hidden by a mount of the host.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return 0, err
	}
	if err := enter(c.Init); err != nil {
		return 0, err
	}
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", 3+c.Keep))
	cmd.Args = []string{nameBirth, os.Args[1]}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	for fd := 3; fd < 3+c.Keep; fd++ {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "kept"))
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, self)
	err = cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return ee.ExitCode(), nil // it has said why
	}
	return 0, err
}

// runBirth starts a process of its own session, prints its pid and leaves: the
// host's init inherits the process.
func runBirth() (int, error) {
	var c spawnConfig
	if err := json.Unmarshal([]byte(os.Args[1]), &c); err != nil {
		return 0, err
	}
	// Whatever this helper inherited by accident would end up in the process
	// and stand in the way of its dump.
	if err := unix.CloseRange(uint(3+c.Keep), ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return 0, os.NewSyscallError("close_range", err)
	}
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = c.Env
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	for i, p := range []string{c.Stdin, c.Stdout, c.Stderr} {
		f, err := openStdio(i, p)
		if err != nil {
			return 0, err
		}
		switch i {
		case 0:
			cmd.Stdin = f
		case 1:
			cmd.Stdout = f
		case 2:
			cmd.Stderr = f
			if c.Stderr != "" && c.Stderr == c.Stdout {
				cmd.Stderr = cmd.Stdout
			}
		}
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	fmt.Println(cmd.Process.Pid)
	return 0, nil
}

func openStdio(i int, p string) (*os.File, error) {
	if p == "" {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	if i == 0 {
		return os.Open(p)
	}
	return os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
}
