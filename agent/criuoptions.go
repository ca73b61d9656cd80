package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// CRIU has one list of options for all commands: one that concerns another command
// is taken, and has no effect.

// shareFlags makes the options of commands known to each other.
func shareFlags(cmds ...*cobra.Command) {
	all := make([][]*pflag.Flag, len(cmds))
	for i, c := range cmds {
		c.Flags().VisitAll(func(f *pflag.Flag) { all[i] = append(all[i], f) })
	}
	for i, c := range cmds {
		fs := c.Flags()
		for j := range cmds {
			for _, f := range all[j] {
				if _, refused := asForeign(f); i == j || refused || fs.Lookup(f.Name) != nil {
					continue
				}
				short := f.Shorthand
				if short != "" && fs.ShorthandLookup(short) != nil {
					short = ""
				}
				n := fs.VarPF(unused{f.Value.Type()}, f.Name, short, "")
				n.NoOptDefVal, n.Hidden = f.NoOptDefVal, true
			}
		}
	}
}

// unused is an option of another command; its argument has to be of the right kind.
type unused struct{ kind string }

func (unused) String() string { return "" }
func (u unused) Type() string { return "unused " + u.kind }

func (u unused) Set(s string) (err error) {
	switch u.kind {
	case "int":
		_, err = strconv.Atoi(s)
	case "bool":
		_, err = strconv.ParseBool(s)
	}
	return err
}

// foreignReasons say why options of CRIU are not carried out, where there is a reason.
var foreignReasons = map[string]string{
	"page-server": "there is no page server: godwit migrate moves memory over NATS while the tree runs",
	"address":     "there is no page server: godwit migrate moves memory over NATS",
	"port":        "there is no page server: godwit migrate moves memory over NATS",
	"ps-socket":   "there is no page server: godwit migrate moves memory over NATS",
	"tls":         "there is no page server: the connections to NATS have TLS of their own",
	"lazy-pages":  "memory is always complete before a tree runs",
	"libdir":      "there are no plugins",
	"stream":      "images are streamed over NATS (godwit migrate), not to criu-image-streamer",
}

// statusFlags are the ways in which a command tells what became of it.
type statusFlags struct {
	fd      string
	pidfile string
	out     *os.File // of fd, once it was checked
}

func (s *statusFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&s.fd, "status-fd", "", "write a zero byte to this open descriptor, and close it, as soon as the images are complete or the tree runs")
	fs.StringVar(&s.pidfile, "pidfile", "", "write the pid of the root into this file")
}

// check says early that the descriptor is not open.
func (s *statusFlags) check() error {
	if s.fd == "" {
		return nil
	}
	fd, err := strconv.ParseUint(s.fd, 10, 31)
	if err != nil {
		return fmt.Errorf("--status-fd: %q is no number of a descriptor", s.fd)
	}
	if err := handedIn(int(fd)); err != nil {
		return fmt.Errorf("--status-fd: %w", err)
	}
	unix.CloseOnExec(int(fd))
	s.out = os.NewFile(uintptr(fd), "status descriptor")
	return nil
}

// ready tells that the work is done.
func (s *statusFlags) ready(log hclog.Logger) {
	if s.out == nil {
		return
	}
	_, err := s.out.Write([]byte{0})
	if err = errors.Join(err, s.out.Close()); err != nil {
		log.Warn("nobody was told of the success", "status_fd", s.fd, "error", err)
	}
	s.out = nil
}

// findCommand looks for the program of --exec-cmd; args are the arguments of restore.
func findCommand(wanted bool, args []string, detached bool) (path string, err error) {
	switch {
	case !wanted && len(args) > 0:
		return "", fmt.Errorf("%q is no option, and a command is only executed with --exec-cmd", args[0])
	case !wanted:
		return "", nil
	case len(args) == 0:
		return "", errors.New("--exec-cmd: no command is given behind --")
	case detached:
		return "", errors.New("--exec-cmd makes the command the parent of the tree, and --restore-detached leaves the tree to itself: give one of them")
	}
	if path, err = exec.LookPath(args[0]); err != nil {
		return "", fmt.Errorf("--exec-cmd: %w", err)
	}
	return path, nil
}

// checkProfile judges --lsm-profile TYPE:NAME. A restored tree has the security context
// of the command that restores it, so any other one is refused.
func checkProfile(s string) error {
	kind, name, _ := strings.Cut(s, ":")
	var there string
	switch {
	case s == "" || kind == "none":
		return nil
	case kind == "apparmor":
		there = "/sys/module/apparmor"
	case kind == "selinux":
		there = "/sys/fs/selinux/enforce"
	default:
		return fmt.Errorf("--lsm-profile %s: %q is none of apparmor, selinux and none", s, kind)
	}
	if name == "" {
		return fmt.Errorf("--lsm-profile %s: not of the form TYPE:NAME", s)
	}
	if _, err := os.Stat(there); err != nil {
		return fmt.Errorf("--lsm-profile %s: this host does not have %s", s, kind)
	}
	b, err := os.ReadFile("/proc/self/attr/current")
	own := strings.TrimRight(string(b), "\x00\n")
	if base, _, found := strings.Cut(own, " ("); found && kind == "apparmor" {
		own = base // behind it is the mode
	}
	if err != nil || own != name {
		return fmt.Errorf("--lsm-profile %s: a restored tree has the profile of the command that restores it, which is %q: start the command in that profile", s, own)
	}
	return nil
}
