package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// TestLogPid: what concerns a process is in the log and in one of its own.
func TestLogPid(t *testing.T) {
	dir := t.TempDir()
	f := localFlags{imagesDir: dir, logFile: "log", logPid: true, verbosity: 3}
	log, closeLog, err := f.logger(os.Stderr)
	noErr(t, err)
	log.Named("engine").Info("it rains", "pid", 17)
	log.Warn("it pours", "pid", 17, "error", "wet")
	log.Info("somewhere else", "pid", 18)
	log.Debug("too much", "pid", 19)
	log.Info("of nobody")
	closeLog()
	for name, want := range map[string]string{"log": "it rains|it pours|somewhere else|of nobody", "log.17": "engine: it rains|it pours", "log.18": "somewhere else"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		noErr(t, err)
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		wants := strings.Split(want, "|")
		for i := range wants {
			if len(lines) != len(wants) || !strings.Contains(lines[i], wants[i]) {
				t.Errorf("%s holds %q, want %q", name, b, want)
				break
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "log.19")); err == nil {
		t.Error("a message below the level has a file")
	}
}

func TestStatusFD(t *testing.T) {
	var s statusFlags
	s.ready(hclog.NewNullLogger()) // nobody wants to know
	for _, fd := range []string{"-1", "3x", "99999999999"} {
		s.fd = fd
		if err := s.check(); err == nil {
			t.Errorf("%s is taken for a descriptor", fd)
		}
	}
}

func TestCheckProfile(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "none": "", "none:x": "", "apparmor:": "not of the form", "selinux": "not of the form", "smack:x": "is none of",
	} {
		if err := checkProfile(in); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
	for kind, there := range map[string]string{"apparmor": "/sys/module/apparmor", "selinux": "/sys/fs/selinux/enforce"} {
		want := "does not have " + kind
		if _, err := os.Stat(there); err == nil {
			want = "start the command in that profile"
		}
		if err := checkProfile(kind + ":nobody-has-this"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", kind, err, want)
		}
	}
}

// TestCRIUOptions: every option that scripts for CRIU use is known to all commands
// that take CRIU's options, with its short form, and refused by none.
func TestCRIUOptions(t *testing.T) {
	names := strings.Fields(`tree,t images-dir,D work-dir,W log-file,o verbosity pidfile restore-detached,d restore-sibling,S
		leave-running,R leave-stopped,s shell-job,j file-locks,l tcp-established tcp-close skip-in-flight ext-unix-sk,x link-remap
		ghost-limit evasive-devices manage-cgroups cgroup-root external inherit-fd root,r timeout action-script freeze-cgroup
		weak-sysctls file-validation skip-file-rwx-check pre-dump-mode track-mem prev-images-dir auto-dedup force-irmap lsm-profile
		empty-ns join-ns,J unprivileged network-lock mntns-compat-mode display-stats config no-default-config cgroup-props
		cgroup-props-file cgroup-dump-controller cgroup-yard exec-cmd log-pid status-fd skip-mnt veth-pair ext-mount-map,M
		irmap-scan-path ghost-fiemap close`)
	seen := 0
	for _, cmd := range newRoot(os.Stdout, os.Stderr).Commands() {
		if !exitsAsCRIU(cmd) {
			continue
		}
		seen++
		for _, n := range names {
			name, short, _ := strings.Cut(n, ",")
			f := cmd.Flags().Lookup(name)
			if f == nil {
				t.Errorf("%s does not know --%s", cmd.Name(), name)
				continue
			}
			if _, refused := asForeign(f); refused {
				t.Errorf("%s refuses --%s", cmd.Name(), name)
			}
			if f.Shorthand != short {
				t.Errorf("%s has -%s for --%s, want -%s", cmd.Name(), f.Shorthand, name, short)
			}
		}
	}
	if seen != 3 {
		t.Errorf("%d commands have CRIU's options", seen)
	}
}
