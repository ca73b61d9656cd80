package procfs

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSelf(t *testing.T) {
	pid := os.Getpid()
	st, err := ReadStat(pid)
	if err != nil {
		t.Fatal(err)
	}
	status, err := ReadStatus(pid)
	if err != nil {
		t.Fatal(err)
	}
	if st.Pid != pid || st.PPid != os.Getppid() || status.Pid != pid || status.PPid != os.Getppid() || st.Comm != status.Name {
		t.Errorf("stat %d/%d/%q, status %d/%d/%q, want %d/%d", st.Pid, st.PPid, st.Comm, status.Pid, status.PPid, status.Name, pid, os.Getppid())
	}
	if int(status.Uid[1]) != os.Geteuid() || int(status.Gid[1]) != os.Getegid() || !status.HasMM || status.VmRSS == 0 || status.NSPid() != pid {
		t.Errorf("status: %+v", status)
	}
	if name, err := Comm(pid); err != nil || name != st.Comm {
		t.Errorf("comm %q, %v, want %q", name, err, st.Comm)
	}
	if args, err := Cmdline(pid); err != nil || !slices.Equal(args, os.Args) {
		t.Errorf("cmdline %q, %v, want %q", args, err, os.Args)
	}
	tids, err := Tids(pid)
	if err != nil || len(tids) < 2 || tids[0] != pid {
		t.Fatalf("tids %v, %v", tids, err)
	}
	for _, tid := range tids[:2] {
		ts, err := ReadTaskStatus(pid, tid)
		if err != nil || ts.Pid != tid || ts.Tgid != pid {
			t.Errorf("status of thread %d: %d/%d, %v", tid, ts.Pid, ts.Tgid, err)
		}
		if s, err := ReadTaskStat(pid, tid); err != nil || s.Pid != tid {
			t.Errorf("stat of thread %d: %d, %v", tid, s.Pid, err)
		}
	}
	pids, err := Pids()
	if err != nil || !slices.Contains(pids, pid) {
		t.Errorf("pids %v, %v", pids, err)
	}
}

func TestSelfMaps(t *testing.T) {
	pid := os.Getpid()
	path := filepath.Join(t.TempDir(), "a b\nc ")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	mem, err := unix.Mmap(int(f.Fd()), 4096, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for _, deleted := range []bool{false, true} {
		if deleted {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		smaps, err := ReadSmaps(pid)
		if err != nil {
			t.Fatal(err)
		}
		maps, err := ReadMaps(pid)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(maps, func(m Mapping) bool { return m.Path == path })
		j := slices.IndexFunc(smaps, func(m SmapsEntry) bool { return m.Path == path })
		if i < 0 || j < 0 {
			t.Fatalf("%q is in maps: %v, in smaps: %v", path, i >= 0, j >= 0)
		}
		m := maps[i]
		if m.Inode != st.Ino || m.Major != unix.Major(st.Dev) || m.Minor != unix.Minor(st.Dev) || m.Offset != 4096 ||
			m.Len() != 4096 || m.Perms() != "r--p" || m.Prot() != 1 || m.Deleted != deleted || smaps[j].Mapping != m {
			t.Errorf("maps %+v, smaps %+v", m, smaps[j].Mapping)
		}
		if !smaps[j].Has("rd") || smaps[j].KernelPageSize != uint64(os.Getpagesize()) {
			t.Errorf("smaps %+v", smaps[j])
		}
	}
}

func TestSelfFdinfo(t *testing.T) {
	pid := os.Getpid()
	fd := func(n int, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(n) })
		return n
	}
	info := func(n int) Fdinfo {
		t.Helper()
		i, err := ReadFdinfo(pid, n)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	ev := fd(unix.Eventfd(0x1234, unix.EFD_CLOEXEC|unix.EFD_SEMAPHORE))
	if i := info(ev); i.Eventfd == nil || i.Eventfd.Count != 0x1234 || !i.Eventfd.Semaphore || i.Flags&unix.O_CLOEXEC == 0 {
		t.Errorf("eventfd: %+v", i)
	}
	tfd := fd(unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC))
	if err := unix.TimerfdSettime(tfd, 0, &unix.ItimerSpec{Value: unix.Timespec{Sec: 100}, Interval: unix.Timespec{Sec: 5, Nsec: 7}}, nil); err != nil {
		t.Fatal(err)
	}
	if i := info(tfd).Timerfd; i == nil || i.ClockID != unix.CLOCK_MONOTONIC || i.Interval != 5e9+7 || i.Value > 100e9 || i.Value < 90e9 {
		t.Errorf("timerfd: %+v", i)
	}
	sfd := fd(unix.Signalfd(-1, &unix.Sigset_t{Val: [16]uint64{0x201}}, unix.SFD_CLOEXEC))
	if i := info(sfd); !i.HasSigmask || i.Sigmask != 0x201 {
		t.Errorf("signalfd: %+v", i)
	}
	ep := fd(unix.EpollCreate1(unix.EPOLL_CLOEXEC))
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, ev, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: 7, Pad: 9}); err != nil {
		t.Fatal(err)
	}
	if i := info(ep).Epoll; len(i) != 1 || i[0].FD != ev || i[0].Data != 9<<32|7 || i[0].Events&unix.EPOLLIN == 0 {
		t.Errorf("epoll: %+v", i)
	}
	in := fd(unix.InotifyInit1(unix.IN_CLOEXEC))
	wd, err := unix.InotifyAddWatch(in, t.TempDir(), unix.IN_CREATE)
	if err != nil {
		t.Fatal(err)
	}
	if i := info(in).Inotify; len(i) != 1 || int(i[0].WD) != wd || i[0].Mask&unix.IN_CREATE == 0 {
		t.Errorf("inotify: %+v", i)
	}
	pfd := fd(unix.PidfdOpen(os.Getppid(), 0))
	if i := info(pfd).Pidfd; i == nil || i.Pid != os.Getppid() {
		t.Errorf("pidfd: %+v", i)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Seek(12345, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK + unix.F_WRLCK, Start: 10, Len: 5}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	i := info(int(f.Fd()))
	if i.Pos != 12345 || i.Ino != st.Ino || len(i.Locks) != 2 || i.Locks[0].Kind != "FLOCK" || i.Locks[1].Kind != "OFDLCK" || i.Locks[1].Start != 10 || i.Locks[1].End != 14 {
		t.Errorf("file: %+v", i)
	}
	if all, err := ReadLocks(); err != nil || !slices.ContainsFunc(all, func(l Lock) bool { return l.Kind == "FLOCK" && l.Ino == st.Ino && l.Pid == pid }) {
		t.Errorf("locks: %v, %v", all, err)
	}
	fds, err := Fds(pid)
	if err != nil || !slices.Contains(fds, int(f.Fd())) {
		t.Errorf("fds %v, %v", fds, err)
	}
	if link, err := FdLink(pid, int(f.Fd())); err != nil || link != f.Name() {
		t.Errorf("link %q, %v", link, err)
	}
}

func TestSelfSockets(t *testing.T) {
	pid := os.Getpid()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tcp.Close() }()
	socks, err := NetTCP(pid)
	if err != nil || !slices.ContainsFunc(socks, func(s InetSocket) bool {
		return s.Local.String() == tcp.Addr().String() && s.State == TCPListen && s.Inode != 0
	}) {
		t.Errorf("%v is not among %v, %v", tcp.Addr(), socks, err)
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = udp.Close() }()
	socks, err = NetUDP(pid)
	if err != nil || !slices.ContainsFunc(socks, func(s InetSocket) bool { return s.Local.String() == udp.LocalAddr().String() }) {
		t.Errorf("%v is not among %v, %v", udp.LocalAddr(), socks, err)
	}
	for name, read := range map[string]func(int) ([]InetSocket, error){"tcp6": NetTCP6, "udp6": NetUDP6, "raw": NetRaw, "raw6": NetRaw6} {
		if _, err := read(pid); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	name := fmt.Sprintf("godwit test %d", pid)
	u, err := net.Listen("unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = u.Close() }()
	unixes, err := NetUnix(pid)
	if err != nil || !slices.ContainsFunc(unixes, func(s UnixSocket) bool { return s.Path == "@"+name && s.Listening() }) {
		t.Errorf("@%s is not among the unix sockets, %v", name, err)
	}
}

func TestSelfRest(t *testing.T) {
	pid := os.Getpid()
	mounts, err := Mountinfo(pid)
	if err != nil || !slices.ContainsFunc(mounts, func(m Mount) bool { return m.FSType == "proc" }) {
		t.Errorf("no proc among the mounts, %v", err)
	}
	auxv, err := Auxv(pid)
	if v, ok := AuxvValue(auxv, 6); err != nil || !ok || int(v) != os.Getpagesize() {
		t.Errorf("AT_PAGESZ %d, %v", v, err)
	}
	if _, err := Timers(pid); err != nil {
		t.Error(err)
	}
	if flags, err := CPUFlags(); err != nil || len(flags) < 5 || runtime.GOARCH == "amd64" && !slices.Contains(flags, "fpu") {
		t.Errorf("CPU flags %v, %v", flags, err)
	}
	if m, err := ReadMemInfo(); err != nil || m.Total < 1<<20 || m.Free > m.Total {
		t.Errorf("memory %+v, %v", m, err)
	}
	if id, err := BootID(); err != nil || len(id) != 36 {
		t.Errorf("boot id %q, %v", id, err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	if rel, err := KernelRelease(); err != nil || rel != unix.ByteSliceToString(uts.Release[:]) {
		t.Errorf("kernel release %q, %v", rel, err)
	}
	if n, err := PidMax(); err != nil || n < 300 {
		t.Errorf("pid_max %d, %v", n, err)
	}
}

// start runs a shell that prints the pid of a child of its own and waits.
func start(t *testing.T, script string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	buf := make([]byte, 64)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(string(buf[:n]))
}

func TestTree(t *testing.T) {
	cmd, kid := start(t, "exec 3<&0; cat <&3 >/dev/null & echo $!; wait")
	root := cmd.Process.Pid
	for name, kids := range map[string]func(int) ([]int, error){
		"children": Children,
		"by parent": func(pid int) ([]int, error) {
			all, err := childrenByParent()
			return all[pid], err
		},
	} {
		got, err := kids(root)
		if err != nil || fmt.Sprint(got) != "["+kid+"]" {
			t.Errorf("%s of %d: %v, %v, want %s", name, root, got, err, kid)
		}
	}
	tree, err := Tree(root)
	if err != nil || fmt.Sprint(tree) != fmt.Sprintf("[%d %s]", root, kid) {
		t.Errorf("tree of %d: %v, %v", root, tree, err)
	}
}

// A zombie has little to read; a reaped process has nothing, and Gone says so.
func TestZombieAndGone(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	deadline := time.Now().Add(time.Minute)
	for {
		st, err := ReadStat(pid)
		if err != nil {
			t.Fatal(err)
		}
		if st.Zombie() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the process does not end")
		}
		runtime.Gosched()
	}
	status, err := ReadStatus(pid)
	if err != nil || !status.Zombie() || status.HasMM {
		t.Errorf("status of a zombie: %+v, %v", status, err)
	}
	maps, err := ReadMaps(pid)
	if err != nil || len(maps) != 0 {
		t.Errorf("maps of a zombie: %v, %v", maps, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func() error{
		"stat":     func() error { _, err := ReadStat(pid); return err },
		"status":   func() error { _, err := ReadStatus(pid); return err },
		"maps":     func() error { _, err := ReadMaps(pid); return err },
		"smaps":    func() error { _, err := ReadSmaps(pid); return err },
		"tids":     func() error { _, err := Tids(pid); return err },
		"children": func() error { _, err := Children(pid); return err },
		"tree":     func() error { _, err := Tree(pid); return err },
		"fdinfo":   func() error { _, err := ReadFdinfo(pid, 0); return err },
		"tcp":      func() error { _, err := NetTCP(pid); return err },
	} {
		if err := read(); !Gone(err) {
			t.Errorf("%s of a reaped process: %v", name, err)
		}
	}
}
