package files

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

// mqueueRoot mounts the file system of message queues, for nobody else.
func mqueueRoot() int {
	fs := must1(unix.Fsopen("mqueue", unix.FSOPEN_CLOEXEC))
	must(unix.FsconfigCreate(fs))
	root := must1(unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0))
	must(unix.Close(fs))
	return root
}

func init() {
	scenes["mqueues"] = func(string) fds {
		out := fds{}
		root := mqueueRoot()
		for _, name := range []string{"godwit-test-kept", "godwit-test-removed"} {
			out[name] = must1(unix.Openat(root, name, unix.O_CREAT|unix.O_RDWR|unix.O_NONBLOCK, 0o600))
		}
		must(unix.Unlinkat(root, "godwit-test-removed", 0))
		must(unix.Close(root))
		return out
	}
}

// A queue stays on its host: neither one without a name nor one that is wanted
// elsewhere is carried.
func TestMqueueRefused(t *testing.T) {
	t.Cleanup(func() {
		root := mqueueRoot()
		must(unix.Unlinkat(root, "godwit-test-kept", 0))
		must(unix.Close(root))
	})
	c := start(t, "mqueues")
	d := dumpAll(t, Options{}, c)
	wantProblem(t, d.problems, "mq_unlink")
	if len(d.problems) != 1 || d.problems[0].FD != c.fds["godwit-test-removed"] {
		t.Errorf("problems %v, want that of the removed queue alone", d.problems)
	}
	wantProblem(t, dumpAll(t, Options{Elsewhere: true}, c).problems, "stays on this host")
}

func TestNotified(t *testing.T) {
	for text, want := range map[string]int{
		"QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260  \n": 8260,
		"QSIZE:0 NOTIFY:0 SIGNO:0 NOTIFY_PID:0\n":                       0, "": 0, "NOTIFY_PID:x": 0,
	} {
		if got := notified(text); got != want {
			t.Errorf("%q: pid %d, want %d", text, got, want)
		}
	}
}

// An image opens no queue by what is no name of one.
func TestMqueueHostile(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "a\x00b", strings.Repeat("x", 256)} {
		r := &Restorer{facts: map[uint32]*image.FileFacts{1: {ID: 1, Mqueue: &image.MqueueFacts{Name: name}}}}
		if err := checkMqueue(r, &description{id: 1}); err == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}
