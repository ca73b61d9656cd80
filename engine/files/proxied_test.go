package files

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// The child has the read end of a pipe, the write end of another and a socket from
// the test, which keeps the other ends.
func init() {
	scenes["proxied"] = func(string) fds {
		must(unix.SetNonblock(3, true))
		must1(unix.Write(4, []byte("written")))
		must1(unix.Write(5, []byte("sent")))
		must(unix.Shutdown(5, unix.SHUT_WR))
		return fds{"in": 3, "dup": must1(unix.Dup(3)), "out": 4, "sock": 5}
	}
}

type proxiedScene struct {
	*child
	in, out, sock *os.File // the far ends
	keys          map[string]string
}

func startProxied(t *testing.T) *proxiedScene {
	t.Helper()
	pair := func() (a, b *os.File) {
		a, b, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		return a, b
	}
	r1, w1 := pair()
	r2, w2 := pair()
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(sp[0]), "near"), os.NewFile(uintptr(sp[1]), "far")
	if _, err := w1.WriteString("waits"); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(sp[1], []byte("queued")); err != nil {
		t.Fatal(err)
	}
	s := &proxiedScene{child: start(t, "proxied", r1, w2, near), in: w1, out: r2, sock: far, keys: map[string]string{}}
	for _, f := range []*os.File{r1, w2, near} {
		_ = f.Close()
	}
	t.Cleanup(func() {
		for _, f := range []*os.File{w1, r2, far} {
			_ = f.Close()
		}
	})
	for name, fd := range s.fds {
		link, err := procfs.FdLink(s.pid(), fd)
		if err != nil {
			t.Fatal(err)
		}
		s.keys[name] = strings.NewReplacer("socket:", "unix", ":", "").Replace(link)
	}
	return s
}

func TestProxied(t *testing.T) {
	for _, travels := range []bool{false, true} {
		t.Run(fmt.Sprintf("travels=%v", travels), func(t *testing.T) {
			s := startProxied(t)
			proxied, far := map[string]bool{}, map[string]*plan.Far{}
			for _, n := range []string{"in", "out", "sock"} {
				proxied[s.keys[n]] = travels
				far[s.keys[n]] = &plan.Far{}
			}
			d := dumpOK(t, Options{FileOptions: plan.FileOptions{Proxied: proxied}}, s.child)
			// The dump has left all where it was.
			kept, err := Duplicates([]int{s.pid()}, s.keys["in"])
			if err != nil || len(kept) != 1 {
				t.Fatalf("duplicates of the pipe: %d, %v", len(kept), err)
			}
			defer func() { _ = kept[0].Close() }()
			s.kill()
			if got := must1(readFD(t, int(kept[0].Fd()))); got != "waits" {
				t.Errorf("%q waits in the original, want %q", got, "waits")
			}

			r := restore(t, d, RestoreOptions{FileRestoreOptions: plan.FileRestoreOptions{Proxied: far}})
			defer CloseFar(far)
			for _, n := range []string{"in", "out", "sock"} {
				if far[s.keys[n]].File == nil {
					t.Fatalf("%s: no far end", n)
				}
			}
			in, out, sock := r.fd(s.child, "in"), r.fd(s.child, "out"), r.fd(s.child, "sock")
			if travels {
				if got := must1(readFD(t, in)); got != "waits" {
					t.Errorf("%q waits in the pipe, want %q", got, "waits")
				}
				if got := must1(readFD(t, sock)); got != "queued" {
					t.Errorf("%q waits in the socket, want %q", got, "queued")
				}
			} else {
				for _, fd := range []int{in, sock} {
					if e := events(t, fd); e&(unix.POLLIN|unix.POLLHUP) != 0 {
						t.Errorf("fd %d: events %#x, want nothing to read", fd, e)
					}
				}
			}
			if fl, err := unix.FcntlInt(uintptr(in), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK == 0 {
				t.Errorf("flags %#x, %v", fl, err)
			}
			if ord, err := sys.KcmpFile(os.Getpid(), in, os.Getpid(), r.fd(s.child, "dup")); err != nil || ord != sys.Equal {
				t.Errorf("sharing is not as before: %v", err)
			}
			for _, x := range []struct {
				from *os.File
				to   int
			}{{far[s.keys["in"]].File, in}, {far[s.keys["sock"]].File, sock}} {
				must1(unix.Write(int(x.from.Fd()), []byte("more")))
				if got := must1(readFD(t, x.to)); got != "more" {
					t.Errorf("%q came", got)
				}
			}
			must1(unix.Write(out, []byte("up")))
			if got := must1(readFD(t, int(far[s.keys["out"]].File.Fd()))); got != "up" {
				t.Errorf("%q came", got)
			}
			// The tree had shut its side of the socket down.
			if _, err := unix.Write(sock, []byte("x")); !errors.Is(err, unix.EPIPE) {
				t.Errorf("write after shutdown: %v", err)
			}
			if got, err := readFD(t, int(far[s.keys["sock"]].File.Fd())); err != nil || got != "" {
				t.Errorf("%q, %v, want the end", got, err)
			}
		})
	}
}

func TestProxiedRefused(t *testing.T) {
	c := start(t, "pipes")
	link, err := procfs.FdLink(c.pid(), c.fds["r"])
	if err != nil {
		t.Fatal(err)
	}
	key := strings.Replace(link, ":", "", 1)
	for want, keys := range map[string]map[string]bool{
		"both ends":                     {key: false},
		"no process of the tree has a":  {"pipe[1]": false},
		"none of a pipe, socket or ter": {"file[1:2]": false},
	} {
		d := dumpAll(t, Options{FileOptions: plan.FileOptions{Proxied: keys}}, c)
		if len(d.problems) == 0 || !strings.Contains(fmt.Sprint(d.problems), want) {
			t.Errorf("%v: %v, want %q", keys, d.problems, want)
		}
	}
}
