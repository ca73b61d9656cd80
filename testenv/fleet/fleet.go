// Package fleet runs the real programs, godwit and godwit-agent, on hosts out
// of namespaces: one coordinator on a hub and an agent on each other host. It
// only speaks their command lines and must not know what is inside.
package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"godwit/testenv/hosts"
)

// Binaries are the built programs, by path.
type Binaries struct{ Godwit, Agent string }

// Build builds both programs, without cgo, into dir.
func Build(ctx context.Context, dir string) (*Binaries, error) {
	b := &Binaries{Godwit: filepath.Join(dir, "godwit"), Agent: filepath.Join(dir, "godwit-agent")}
	for _, p := range []struct{ out, pkg string }{{b.Godwit, "godwit/coordinator/cmd/godwit"}, {b.Agent, "godwit/agent/cmd/godwit-agent"}} {
		cmd := exec.CommandContext(ctx, "go", "build", "-o", p.out, p.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w\n%s", p.pkg, err, out)
		}
	}
	return b, nil
}

// Fleet is a running coordinator with its agents.
type Fleet struct {
	Env *hosts.Env
	Hub *hosts.Host
	Dir string // of logs and of the bus; all hosts see it

	bin    *Binaries
	serve  int // pid of godwit serve on the hub
	starts int
	agents map[string]int // host → pid of its agent
	// AgentArgs are given to every agent that is started from then on.
	AgentArgs []string
}

// Start starts the coordinator on the host hub and agents on the others named,
// and waits until all have registered. dir is made; all hosts must see it.
func Start(ctx context.Context, env *hosts.Env, bin *Binaries, dir, hub string, agents []string, agentArgs ...string) (*Fleet, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f := &Fleet{Env: env, Hub: env.Host(hub), Dir: dir, bin: bin, agents: map[string]int{}, AgentArgs: agentArgs}
	if err := f.StartServe(ctx); err != nil {
		return nil, err
	}
	for _, a := range agents {
		if err := f.StartAgent(ctx, a); err != nil {
			return nil, err
		}
	}
	return f, f.WaitHosts(ctx, agents...)
}

// URL is where the bus listens.
func (f *Fleet) URL() string { return fmt.Sprintf("nats://%s:4222", f.Hub.Addr()) }

func (f *Fleet) busDir() string { return filepath.Join(f.Dir, "bus") }

// ready is what godwit serve says when it is ready.
type ready struct {
	Event       string `json:"event"`
	AgentKey    string `json:"agent_key_file"`
	OperatorKey string `json:"operator_key_file"`
}

// StartServe starts the coordinator and waits until it is ready.
func (f *Fleet) StartServe(ctx context.Context) error {
	f.starts++
	out := filepath.Join(f.Dir, fmt.Sprintf("serve-%d.json", f.starts))
	pid, err := f.Hub.Start(ctx, hosts.Spec{
		Args: []string{f.bin.Godwit, "serve", "--listen", fmt.Sprintf("%s:4222", f.Hub.Addr()), "--store-dir", f.busDir(),
			"--output", "json", "--log-level", "debug"},
		Stdout: out, Stderr: filepath.Join(f.Dir, "serve.log"), Env: environ(),
	})
	if err != nil {
		return err
	}
	f.serve = pid
	return wait(ctx, "the coordinator", func() error {
		r, err := readReady(out)
		if err == nil && r.Event != "ready" {
			err = errors.New("it has not said that it is ready")
		}
		if err != nil && !f.Hub.Alive(pid) {
			return fatal{fmt.Errorf("godwit serve ended: %s", f.Log("serve"))}
		}
		return err
	})
}

func readReady(path string) (ready, error) {
	var r ready
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	line, _, ok := bytes.Cut(b, []byte("\n"))
	if !ok {
		return r, errors.New("it has not said that it is ready")
	}
	return r, json.Unmarshal(line, &r)
}

func (f *Fleet) keys() (ready, error) {
	return readReady(filepath.Join(f.Dir, fmt.Sprintf("serve-%d.json", f.starts)))
}

// OperatorKey is the file with the seed that commands use; empty: the bus demands none.
func (f *Fleet) OperatorKey() (string, error) {
	k, err := f.keys()
	return k.OperatorKey, err
}

// environ is an environment without settings of the programs under test.
func environ() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "GODWIT_") {
			env = append(env, e)
		}
	}
	return env
}

// StopServe ends the coordinator, and with it the bus, by a signal and waits
// until it is gone.
func (f *Fleet) StopServe(ctx context.Context, sig unix.Signal) error {
	if err := f.Hub.Kill(f.serve, sig); err != nil {
		return err
	}
	return f.Hub.WaitGone(ctx, f.serve)
}

// StartAgent starts the agent of a host, with more environment if any is given;
// WaitHosts waits for it.
func (f *Fleet) StartAgent(ctx context.Context, host string, env ...string) error {
	k, err := f.keys()
	if err != nil {
		return err
	}
	args := []string{f.bin.Agent, "run", "--host", host, "--nats-url", f.URL(), "--state-dir", "/run/godwit-agent", "--log-level", "debug"}
	if k.AgentKey != "" {
		args = append(args, "--nkey-file", k.AgentKey)
	}
	pid, err := f.Env.Host(host).Start(ctx, hosts.Spec{Args: append(args, f.AgentArgs...),
		Stdout: filepath.Join(f.Dir, host+".log"), Stderr: filepath.Join(f.Dir, host+".log"), Env: append(environ(), env...)})
	f.agents[host] = pid
	return err
}

// AgentPid is the pid of a host's agent inside the host.
func (f *Fleet) AgentPid(host string) int { return f.agents[host] }

// ServePid is the pid of the coordinator, with its bus, inside the hub.
func (f *Fleet) ServePid() int { return f.serve }

// StopAgent ends the agent of a host by a signal and waits until it is gone.
func (f *Fleet) StopAgent(ctx context.Context, host string, sig unix.Signal) error {
	h := f.Env.Host(host)
	if err := h.Kill(f.agents[host], sig); err != nil {
		return err
	}
	return h.WaitGone(ctx, f.agents[host])
}

// Log is the end of the log of "serve" or of a host's agent.
func (f *Fleet) Log(name string) string {
	b, err := os.ReadFile(filepath.Join(f.Dir, name+".log"))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// PeakRSS is the largest resident size that a host's agent ever had, in bytes.
func (f *Fleet) PeakRSS(host string) (uint64, error) {
	return PeakRSS(f.Env.Host(host), f.agents[host])
}

// PeakRSS is the largest resident size that a process of a host ever had, in bytes.
func PeakRSS(h *hosts.Host, pid int) (uint64, error) {
	b, err := os.ReadFile(h.Path(fmt.Sprintf("/proc/%d/status", pid)))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("status of pid %d of %s has no VmHWM", pid, h.Name())
}

// Godwit prepares a command of the coordinator's program on the hub.
func (f *Fleet) Godwit(ctx context.Context, args ...string) *exec.Cmd {
	args = append(args, "--nats-url", f.URL())
	if k, err := f.keys(); err == nil && k.OperatorKey != "" {
		args = append(args, "--credentials", k.OperatorKey)
	}
	cmd := f.Hub.Command(ctx, f.bin.Godwit, args...)
	cmd.Env = environ()
	// Interrupted by its owner, godwit ends the migration in good order.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// GodwitLine is the command as a person types it.
func (f *Fleet) GodwitLine(args ...string) string {
	return fmt.Sprintf("nsenter -t %d -a %s", f.Hub.InitPid(), f.LineOnHub(args...))
}

// LineOnHub is the command as a person types it who is on the hub.
func (f *Fleet) LineOnHub(args ...string) string {
	line := f.bin.Godwit + " " + strings.Join(args, " ") + " --nats-url " + f.URL()
	if k, err := f.keys(); err == nil && k.OperatorKey != "" {
		line += " --credentials " + k.OperatorKey
	}
	return line
}

// Result is what a command of godwit came to.
type Result struct {
	Code           int // exit code
	Stdout, Stderr string
	Took           time.Duration
}

// Run runs godwit to its end; an exit code other than 0 is no error.
func (f *Fleet) Run(ctx context.Context, args ...string) (Result, error) {
	cmd := f.Godwit(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(start)}
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() >= 0 && ctx.Err() == nil {
		r.Code, err = ee.ExitCode(), nil
	}
	if err != nil {
		return r, fmt.Errorf("godwit %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return r, nil
}

// The modes of a migration.
const (
	StopAndCopy = "stop-and-copy"
	PreCopy     = "precopy"
	PostCopy    = "postcopy"
)

// ModeEnv names a mode for all migrations that do not say theirs: to look how tests do
// with another one than is usual for what they move.
const ModeEnv = "GODWIT_TEST_MODE"

// Migration is godwit's report of a migration, as it is printed for programs.
type Migration struct {
	ID          string   `json:"id"`
	State       string   `json:"state"`
	Outcome     string   `json:"outcome"`
	Source      string   `json:"source"`
	Destination string   `json:"destination"`
	PID         int      `json:"pid"`
	LandedPID   int      `json:"landed_pid"`
	Owner       string   `json:"owner"`
	Tasks       int      `json:"tasks"`
	Threads     int      `json:"threads"`
	MemoryBytes uint64   `json:"memory_bytes"`
	TotalMS     float64  `json:"total_ms"`
	FrozenMS    *float64 `json:"frozen_ms"`
	FrozenClock string   `json:"frozen_clock"`
	Bytes       uint64   `json:"bytes"`
	Pages       uint64   `json:"pages"`
	ResentBytes uint64   `json:"resent_bytes"`
	ExitCode    int      `json:"exit_code"`
	Reason      string   `json:"reason"`
	// SourceReport is what the source measured.
	SourceReport *struct {
		Lane         string `json:"lane"`
		Compression  string `json:"compression"`
		StreamBytes  uint64 `json:"stream_bytes"`
		Rounds       int    `json:"rounds"`
		PrecopyBytes uint64 `json:"precopy_bytes"`
		CopyNote     string `json:"copy_note"`
		// EarlyFileBytes and FrozenFileBytes are content of files that travel.
		EarlyFileBytes  uint64 `json:"early_file_bytes"`
		FrozenFileBytes uint64 `json:"frozen_file_bytes"`
	} `json:"source_report"`
	// DestinationReport is what the destination measured.
	DestinationReport *struct {
		PagingMS   float64 `json:"paging_ms"`
		PagedBytes uint64  `json:"paged_bytes"`
		Faults     uint64  `json:"faults"`
		FaultP50MS float64 `json:"fault_p50_ms"`
		FaultP99MS float64 `json:"fault_p99_ms"`
	} `json:"destination_report"`
	Error *struct {
		Code, Message, Host, Phase string
		Problems                   []struct {
			PID                           int
			FD                            *int
			Comm, Path, Key, Reason, Hint string
		}
	} `json:"error"`
	Steps []struct {
		State string    `json:"state"`
		Time  time.Time `json:"time"`
	} `json:"steps"`
}

// Migrate moves a tree with --output json and returns the report and the
// result of the command.
func (f *Fleet) Migrate(ctx context.Context, source string, pid int, destination string, args ...string) (*Migration, Result, error) {
	if mode := os.Getenv(ModeEnv); mode != "" && !slices.Contains(args, "--mode") && !slices.Contains(args, "--attach") {
		args = append(args, "--mode", mode)
	}
	r, err := f.Run(ctx, append([]string{"migrate", fmt.Sprintf("%s:%d", source, pid), destination, "--output", "json"}, args...)...)
	if err != nil {
		return nil, r, err
	}
	var m Migration
	if err := json.Unmarshal([]byte(r.Stdout), &m); err != nil {
		return nil, r, fmt.Errorf("godwit migrate printed no report (exit code %d): %w: %q, %s", r.Code, err, r.Stdout, r.Stderr)
	}
	return &m, r, nil
}

// History is what godwit knows about all migrations, the oldest first.
func (f *Fleet) History(ctx context.Context) ([]Migration, error) {
	r, err := f.Run(ctx, "history", "--output", "json")
	if err != nil {
		return nil, err
	}
	if r.Code != 0 {
		return nil, fmt.Errorf("godwit history: exit code %d: %s", r.Code, r.Stderr)
	}
	var doc struct {
		Migrations []Migration `json:"migrations"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &doc); err != nil {
		return nil, fmt.Errorf("godwit history: %w: %q", err, r.Stdout)
	}
	return doc.Migrations, nil
}

// WaitHosts waits until the named hosts, and no others, answer on the bus.
func (f *Fleet) WaitHosts(ctx context.Context, names ...string) error {
	return wait(ctx, fmt.Sprintf("the agents of %v", names), func() error {
		r, err := f.Run(ctx, "hosts", "--output", "json")
		if err != nil {
			return fatal{err}
		}
		var doc struct {
			Hosts []struct {
				Host string `json:"host"`
			} `json:"hosts"`
		}
		if err := json.Unmarshal([]byte(r.Stdout), &doc); err != nil {
			return fmt.Errorf("godwit hosts: %w: %q %s", err, r.Stdout, r.Stderr)
		}
		there := map[string]bool{}
		for _, h := range doc.Hosts {
			there[h.Host] = true
		}
		for _, n := range names {
			if !there[n] {
				if !f.Env.Host(n).Alive(f.agents[n]) {
					return fatal{fmt.Errorf("the agent of %s ended: %s", n, f.Log(n))}
				}
				return fmt.Errorf("%s has not registered", n)
			}
		}
		return nil
	})
}

// fatal is an error after which waiting is in vain.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// wait tries until cond returns nil, ctx ends or cond returns a fatal error.
func wait(ctx context.Context, what string, cond func() error) error {
	for {
		err := cond()
		if err == nil {
			return nil
		}
		var stop fatal
		if errors.As(err, &stop) {
			return stop.error
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %w", what, ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
