package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/wire"
)

// localAgent is an agent of which only the own socket works.
func localAgent(t *testing.T) (*Agent, string) {
	t.Helper()
	a := New(Config{Host: "beta"})
	path := localSocketPath(t.TempDir(), "beta")
	l, err := listenLocal(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go a.serveLocal(l)
	return a, path
}

// provided hands a file to the agent and waits until it is kept.
func provided(t *testing.T, path, selector string, f *os.File) *net.UnixConn {
	t.Helper()
	c, err := provide(path, localRequest{Version: localVersion, Do: "provide", Selector: selector, What: f.Name()}, f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	wantEvent(t, c, eventReady, "")
	return c
}

func wantEvent(t *testing.T, c *net.UnixConn, event, text string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b, files, err := readPacket(c)
	closeAll(files)
	if err != nil {
		t.Fatalf("event %s does not come: %v", event, err)
	}
	var e localEvent
	if err := json.Unmarshal(b, &e); err != nil {
		t.Fatal(err)
	}
	if e.Event != event || !strings.Contains(e.Text, text) {
		t.Fatalf("event %+v, want %s with %q", e, event, text)
	}
}

// wantLack takes a file of a key until it is refused for the reason: that
// somebody has gone shows a little later.
func wantLack(t *testing.T, a *Agent, o *wire.OpenObject, want string) {
	t.Helper()
	_, f, err := a.provisions.take("m", o.Key, []*wire.OpenObject{o})
	if err == nil {
		_ = f.Close()
		t.Fatalf("a file is provided for %s, want %q", o.Key, want)
	}
	if !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}

func temp(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestProvide(t *testing.T) {
	a, path := localAgent(t)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode of the socket: %v, %v; want 0600", st, err)
	}
	log := &wire.OpenObject{Key: "file[1f:2a]", Kind: "regular", Path: "/var/log/app.log"}
	wantLack(t, a, log, "nobody provides a file for it on this host")

	f := temp(t, "here")
	c := provided(t, path, "path:/var/log/*", f)
	wantLack(t, a, &wire.OpenObject{Key: "file[1f:2b]", Kind: "regular", Path: "/etc/other"}, "provided are only path:/var/log/*")
	for range 2 { // an aborted migration gives it back
		p, got, err := a.provisions.take("m1", log.Key, []*wire.OpenObject{log})
		if err != nil {
			t.Fatal(err)
		}
		wantEvent(t, c, eventHeld, log.Key)
		if have, err := got.Stat(); err != nil {
			t.Error(err)
		} else if want, err := f.Stat(); err != nil || !os.SameFile(have, want) {
			t.Errorf("another file was handed over, %v", err)
		}
		_ = got.Close()
		if _, _, err := a.provisions.take("m2", log.Key, []*wire.OpenObject{log}); err == nil || !strings.Contains(err.Error(), "held for migration m1") {
			t.Errorf("taken twice: %v", err)
		}
		if _, _, err := a.provisions.take("m1", "file[1f:2c]", []*wire.OpenObject{{Key: "file[1f:2c]", Path: "/var/log/2"}}); err == nil || !strings.Contains(err.Error(), "taken for file[1f:2a] already") {
			t.Errorf("one file for two keys: %v", err)
		}
		a.provisions.release(p)
		wantEvent(t, c, eventReleased, "")
	}
	p, got, err := a.provisions.take("m3", log.Key, []*wire.OpenObject{log})
	if err != nil {
		t.Fatal(err)
	}
	_ = got.Close()
	wantEvent(t, c, eventHeld, "")
	a.provisions.use(p)
	wantEvent(t, c, eventUsed, log.Key)
	wantLack(t, a, log, "nobody provides a file")
}

func TestProvideTwice(t *testing.T) {
	a, path := localAgent(t)
	first := provided(t, path, "kind:fifo", temp(t, ""))
	c, err := provide(path, localRequest{Version: localVersion, Do: "provide", Selector: "kind:fifo"}, temp(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	wantEvent(t, c, eventRefused, "provided already")
	provided(t, path, "file[1:2]", temp(t, ""))
	o := &wire.OpenObject{Key: "file[1:2]", Kind: "fifo"}
	wantLack(t, a, o, "2 files are provided for it (kind:fifo")

	// The first goes, and its file with it, even if nobody has noticed yet.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	_, f, err := a.provisions.take("m", o.Key, []*wire.OpenObject{o})
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	wantLack(t, a, &wire.OpenObject{Key: "file[1:3]", Kind: "fifo"}, "nobody provides a file")
	provided(t, path, "kind:fifo", temp(t, ""))
}

func TestProvideRefused(t *testing.T) {
	a, path := localAgent(t)
	f := temp(t, "")
	good := localRequest{Version: localVersion, Do: "provide", Selector: "kind:fifo"}
	doc := func(edit func(*localRequest)) []byte {
		r := good
		edit(&r)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one := []int{int(f.Fd())}
	for _, tc := range []struct {
		name string
		body []byte
		fds  []int
		want string
	}{
		{"version", doc(func(r *localRequest) { r.Version = 2 }), one, "update the older one"},
		{"request", doc(func(r *localRequest) { r.Do = "take" }), one, `"take" is not known`},
		{"no selector", doc(func(r *localRequest) { r.Selector = "" }), one, "does not say what"},
		{"selector", doc(func(r *localRequest) { r.Selector = "kind:fif" }), one, "did you mean fifo?"},
		{"escape", doc(func(r *localRequest) { r.What = "\x1b[1m" }), one, "control characters"},
		{"no descriptor", doc(func(*localRequest) {}), nil, "0 descriptors came"},
		{"two", doc(func(*localRequest) {}), []int{one[0], one[0]}, "2 descriptors came"},
		{"no JSON", []byte("provide"), one, "cannot be read"},
		{"unknown field", []byte(`{"version":1,"do":"provide","selector":"kind:fifo","fd":3}`), one, "unknown field"},
		{"long", slices.Repeat([]byte("x"), localPacket+1), one, "too long"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			var oob []byte
			if tc.fds != nil {
				oob = unix.UnixRights(tc.fds...)
			}
			if _, _, err := c.WriteMsgUnix(tc.body, oob, nil); err != nil {
				t.Fatal(err)
			}
			wantEvent(t, c, eventRefused, tc.want)
		})
	}
	if a.provisions.list != nil {
		t.Errorf("kept: %v", names(a.provisions.list))
	}
}

// TestProvideStranger: the permissions keep other users out, and what they do
// not keep out is refused by who it is.
func TestProvideStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	_, path := localAgent(t)
	f := temp(t, "")
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(path); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	type answer struct {
		c   *net.UnixConn
		err error
	}
	got := make(chan answer)
	go func() {
		runtime.LockOSThread() // its user is another one for good
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			got <- answer{err: e}
			return
		}
		c, err := provide(path, localRequest{Version: localVersion, Do: "provide", Selector: "kind:fifo"}, f)
		got <- answer{c, err}
	}()
	x := <-got
	if x.err != nil {
		t.Fatal(x.err)
	}
	defer func() { _ = x.c.Close() }()
	wantEvent(t, x.c, eventRefused, "is of user 65534, and only user 0 may")
}

// TestLongSocketPath: a state directory may be deeper than addresses are long.
func TestLongSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := localSocketPath(dir, "beta")
	for range 2 { // the second agent finds the socket of the first
		l, err := listenLocal(path)
		if err != nil {
			t.Fatal(err)
		}
		a := New(Config{})
		go a.serveLocal(l)
		provided(t, path, "kind:fifo", temp(t, ""))
		_ = l.Close()
	}
}

func TestParseOpen(t *testing.T) {
	for _, tc := range []struct {
		in, path string
		flags    int
		bad      string
	}{
		{in: "/a", path: "/a"},
		{in: "/a,write,append,create", path: "/a", flags: unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT},
		{in: "/a,b,rdwr", path: "/a,b", flags: unix.O_RDWR},
		{in: "/a,read", path: "/a"},
		{in: "/a,path,directory", path: "/a", flags: unix.O_PATH | unix.O_DIRECTORY},
		{in: "/a,read,write", bad: "do not go together"},
		{in: ",write", bad: "empty"},
	} {
		path, flags, err := parseOpen(tc.in)
		if tc.bad != "" {
			if err == nil || !strings.Contains(err.Error(), tc.bad) {
				t.Errorf("parseOpen(%q): %v, want %q", tc.in, err, tc.bad)
			}
			continue
		}
		if err != nil || path != tc.path || flags != tc.flags {
			t.Errorf("parseOpen(%q) = %q, %#x, %v", tc.in, path, flags, err)
		}
	}
}

func TestPipeCommand(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	f, what, c, err := startPipeCommand([]string{"sh", "-c", "cat >" + out + "; exit 3"}, "stdin", io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(what, ", sh") {
		t.Errorf("it is called %q", what)
	}
	if _, err := f.WriteString("to the command"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	err = c.wait(context.Background())
	if e, ok := errors.AsType[*exitError](err); !ok || e.code != 3 {
		t.Errorf("it ends with %v, want exit code 3", err)
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "to the command" {
		t.Errorf("it read %q, %v", b, err)
	}

	f, _, c, err = startPipeCommand([]string{"sh", "-c", "echo from the command"}, "stdout", io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(f); err != nil || string(b) != "from the command\n" {
		t.Errorf("it wrote %q, %v", b, err)
	}
	_ = f.Close()
	if err := c.wait(context.Background()); err != nil {
		t.Error(err)
	}

	if _, _, _, err := startPipeCommand([]string{"/nowhere"}, "stdin", io.Discard); err == nil {
		t.Error("a command that does not exist was started")
	}
}

func FuzzLocalRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"do":"provide","selector":"file[1f:2a]","what":"/var/log"}`))
	f.Add([]byte(`{"version":1,"do":"provide","selector":""}`))
	f.Add([]byte(`{"version":18446744073709551616}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseLocalRequest(b)
		if err != nil {
			return
		}
		if r.Selector == "" || strings.ContainsRune(fmt.Sprint(r), 0x1b) {
			t.Errorf("accepted: %+v", r)
		}
	})
}
