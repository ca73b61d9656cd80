// Package setup finds out which programs of the system the tests and the demo
// need and installs the Debian packages of those that are missing. It must not
// know what they are used for.
package setup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Need is one file or program and the Debian package that brings it.
type Need struct {
	Path    string // absolute: a file, perhaps a pattern of filepath.Glob; else a program in PATH
	Package string
	Why     string
}

// Hosts is what hosts out of namespaces need.
var Hosts = []Need{
	{"ip", "iproute2", "network of the test hosts"},
	{"setpriv", "util-linux", "processes on the test hosts"},
}

// Workloads is what building and running all workloads needs.
var Workloads = []Need{
	{"gcc", "gcc", "self-checking programs in C"},
	{"/usr/include/stdio.h", "libc6-dev", "self-checking programs in C"},
	{"/usr/include/linux/io_uring.h", "linux-libc-dev", "self-checking programs in C"},
	{"/usr/bin/python3", "python3", "a self-checking program in Python"},
	{"redis-server", "redis-server", "a real server with a million keys"},
	{"redis-cli", "redis-tools", "its client"},
	{"tmux", "tmux", "a terminal multiplexer with programs in its windows"},
	{"vim", "vim", "an editor on a terminal"},
	{"less", "less", "a pager on a terminal"},
	{"mkfs.btrfs", "btrfs-progs", "a file system in a file"},
	{"mkfs.ext4", "e2fsprogs", "a file system in a file"},
	{"script", "bsdutils", "a terminal that somebody else has made"},
	{"pgrep", "procps", "to find programs that a shell started"},
	{Postgres, "postgresql", "a real database with its benchmark at work"},
	{"nginx", "nginx-light", "a real server with a master and workers"},
	{"node", "nodejs", "a real program on libuv"},
	{"java", "default-jre-headless", "a real program with hundreds of threads"},
	{"javac", "default-jdk-headless", "compiling that program"},
	{"sqlite3", "sqlite3", "a database in the middle of a transaction"},
	{"xz", "xz-utils", "a stream through pipes"},
	{"make", "make", "a compilation of many processes"},
}

// Missing lists the packages of needs that are not met, each once.
func Missing(needs []Need) []Need {
	var out []Need
	for _, n := range needs {
		if Find(n.Path) != "" {
			continue
		}
		if !slices.ContainsFunc(out, func(o Need) bool { return o.Package == n.Package }) {
			out = append(out, n)
		}
	}
	return out
}

// Find gives the absolute path of a file or program as Need.Path has it, the
// last of several that match; "" if it is not there.
func Find(path string) string {
	if !strings.HasPrefix(path, "/") {
		p, err := exec.LookPath(path)
		if err != nil {
			return ""
		}
		return p
	}
	ps, err := filepath.Glob(path)
	if err != nil || len(ps) == 0 {
		return ""
	}
	return ps[len(ps)-1]
}

// Postgres is where Debian has the server, by version.
const Postgres = "/usr/lib/postgresql/*/bin/postgres"

// policy keeps package scripts from starting services (Debian Policy 9.3.3.1
// and /usr/share/doc/init-system-helpers: invoke-rc.d asks it; 101 means no).
const policy = "/usr/sbin/policy-rc.d"

// Ensure installs what needs lack with apt-get and says on w what it does. No
// service is started by it. Errors name the packages.
func Ensure(ctx context.Context, w io.Writer, needs []Need) (err error) {
	missing := Missing(needs)
	if len(missing) == 0 {
		return nil
	}
	var names []string
	for _, n := range missing {
		names = append(names, n.Package)
		_, _ = fmt.Fprintf(w, "missing: %s (Debian package %s), for %s\n", n.Path, n.Package, n.Why)
	}
	list := strings.Join(names, " ")
	if os.Geteuid() != 0 {
		return fmt.Errorf("installing %s needs root", list)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("%s must be installed by hand: %w", list, err)
	}
	if _, serr := os.Lstat(policy); errors.Is(serr, os.ErrNotExist) {
		if err := os.WriteFile(policy, []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil {
			return fmt.Errorf("keep services from starting: %w", err)
		}
		defer func() {
			if rerr := os.Remove(policy); rerr != nil {
				err = errors.Join(err, rerr)
			}
		}()
	}
	_, _ = fmt.Fprintf(w, "installing with apt-get: %s (no service is started)\n", list)
	for _, args := range [][]string{
		{"update", "-q"},
		append([]string{"install", "-y", "-q", "--no-install-recommends"}, names...),
	} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, tail(string(out), 15))
		}
	}
	if still := Missing(needs); len(still) > 0 {
		return fmt.Errorf("package %s is installed but %s is not there", still[0].Package, still[0].Path)
	}
	return nil
}

// tail is the last n lines of s.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
