package coordinator

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/configs"
	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/wire"
)

func TestJudge(t *testing.T) {
	p := rules.Patience{Probe: 5 * time.Second, Dead: 40 * time.Second, Orphan: 120 * time.Second}
	const a, d, u = rules.Alive, rules.Dead, rules.Unknown
	tests := []struct {
		states   string
		silent   time.Duration
		src, dst rules.Sign
		want     rules.Verdict
	}{
		{"REQUESTED PREFLIGHT", 119, d, d, rules.Wait},
		{"REQUESTED PREFLIGHT", 120, a, a, rules.AskAbort},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 1000, a, a, rules.Wait},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 39, d, d, rules.Wait},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 40, d, a, rules.AskAbort},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 40, a, d, rules.AskAbort},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 40, d, u, rules.AskAbort},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 40, d, d, rules.Lost},
		{"PRE_COPYING FREEZING FINAL_COPYING RESTORING STAGED", 1000, u, u, rules.Wait},
		{"ABORTING", 5, a, d, rules.Remind},
		{"ABORTING", 39, d, a, rules.Wait},
		{"ABORTING", 40, d, a, rules.Lost},
		{"ABORTING", 1000, u, a, rules.Wait},
		{"HANDING_OFF", 1000, d, a, rules.Wait},
		{"HANDING_OFF", 39, a, d, rules.Wait},
		{"HANDING_OFF", 40, a, d, rules.MarkStuck},
		{"HANDING_OFF", 1000, a, u, rules.Wait},
		{"RETURNING", 1000, a, d, rules.Wait},
		{"RETURNING", 40, d, a, rules.Lost},
		{"COMPLETED ABORTED STUCK", 1000, d, d, rules.Wait},
	}
	for _, tt := range tests {
		for name := range strings.FieldsSeq(tt.states) {
			s := wire.State(wire.State_value["STATE_"+name])
			if got := rules.Judge(s, tt.silent*time.Second, tt.src, tt.dst, p); got != tt.want {
				t.Errorf("%s silent for %d s, source %d, destination %d: verdict %d, want %d", name, tt.silent, tt.src, tt.dst, got, tt.want)
			}
		}
	}
}

// leave makes a record that somebody left in a state.
func (b *testBus) leave(id string, s wire.State) {
	b.t.Helper()
	r := newMigration("alpha", 412, "beta", nil)
	r.Id, r.State = id, s
	r.Steps = append(r.Steps, &wire.Step{State: s, By: "test"})
	if _, err := b.records.Create(b.t.Context(), r); err != nil {
		b.t.Fatal(err)
	}
}

// TestWatchOver: the control plane finds migrations whose command has gone.
func TestWatchOver(t *testing.T) {
	b := newBus(t)
	b.agent("alpha") // holds nothing of any of them
	for id, s := range map[string]wire.State{
		"requested": wire.State_STATE_REQUESTED, "preflight": wire.State_STATE_PREFLIGHT, "aborting": wire.State_STATE_ABORTING,
		"restoring": wire.State_STATE_RESTORING, "handing": wire.State_STATE_HANDING_OFF, "completed": wire.State_STATE_COMPLETED,
		"returning": wire.State_STATE_RETURNING,
	} {
		b.leave(id, s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- watchOver(ctx, b.link, hclog.NewNullLogger(), quick) }()
	want := map[string]wire.State{
		"requested": wire.State_STATE_ABORTED, "preflight": wire.State_STATE_ABORTED, "aborting": wire.State_STATE_ABORTED,
		"restoring": wire.State_STATE_ABORTED, "handing": wire.State_STATE_STUCK, "completed": wire.State_STATE_COMPLETED,
		"returning": wire.State_STATE_RETURNING, // the source is alive; it alone decides
	}
	waitFor(t, func() bool {
		recs, err := b.records.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			if r.State != want[r.Id] {
				return false
			}
		}
		return true
	})
	r, _, err := b.records.Get(t.Context(), "preflight")
	if err != nil || !strings.Contains(r.Reason, "whoever asked for it has gone") {
		t.Errorf("reason %q, %v", r.GetReason(), err)
	}
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("it does not stop")
	}
}

// daemon starts serve and waits until it is ready.
func daemon(t *testing.T, args ...string) (*command, readyDoc) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "godwit.toml")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := &command{interrupts: make(chan os.Signal, 4), code: make(chan int, 1)}
	a := &app{stdout: &c.stdout, stderr: &c.stderr, interrupts: c.interrupts, env: []string{"GODWIT_CONFIG=" + config}, wait: &quick}
	go func() { c.code <- a.run(context.Background(), append([]string{"-o", "json", "serve"}, args...)) }()
	var d readyDoc
	waitFor(t, func() bool {
		if len(c.code) > 0 {
			t.Fatalf("serve ended: %s", c.stderr.String())
		}
		return json.Unmarshal([]byte(c.stdout.String()), &d) == nil
	})
	return c, d
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

func TestServe(t *testing.T) {
	dir := t.TempDir()
	listen := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	c, d := daemon(t, "--listen", listen, "--store-dir", dir)
	if d.URL != "nats://"+listen || !d.Embedded || d.AgentKey != "" || d.InFlight != 0 {
		t.Errorf("ready: %+v", d)
	}
	nc, err := transport.Connect(transport.Config{URLs: []string{d.URL}})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	records, err := transport.OpenRecords(t.Context(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := newMigration("alpha", 1, "beta", nil)
	if _, err := records.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	// A second one at the same place says what is wrong.
	second := &command{interrupts: make(chan os.Signal, 1), code: make(chan int, 1)}
	a := &app{stdout: &second.stdout, stderr: &second.stderr, interrupts: second.interrupts}
	second.code <- a.run(t.Context(), []string{"serve", "--listen", listen, "--store-dir", t.TempDir()})
	if code := second.wait(t); code != 1 || !strings.Contains(second.stderr.String(), "the port is in use") {
		t.Errorf("second: %d %s", code, second.stderr.String())
	}
	c.interrupts <- syscall.SIGTERM
	if code := c.wait(t); code != 0 {
		t.Errorf("exit code %d: %s", code, c.stderr.String())
	}
	// The records outlive it.
	c, d = daemon(t, "--listen", listen, "--store-dir", dir)
	if d.InFlight != 1 {
		t.Errorf("after a restart: %+v", d)
	}
	c.interrupts <- syscall.SIGTERM
	if code := c.wait(t); code != 0 {
		t.Errorf("exit code %d: %s", code, c.stderr.String())
	}
}

// TestServeKeys: on another address than loopback keys are demanded, and the
// commands of the same machine find theirs.
func TestServeKeys(t *testing.T) {
	dir := t.TempDir()
	listen := fmt.Sprintf("0.0.0.0:%d", freePort(t))
	c, d := daemon(t, "--listen", listen, "--store-dir", dir)
	defer func() {
		c.interrupts <- syscall.SIGTERM
		if code := c.wait(t); code != 0 {
			t.Errorf("exit code %d: %s", code, c.stderr.String())
		}
	}()
	if !d.KeysMade || d.AgentKey == "" || d.OperatorKey != operatorKey(configs.Serve{StoreDir: dir}) {
		t.Errorf("ready: %+v", d)
	}
	url, _ := localBus(configs.Serve{Listen: listen})
	run := func(env []string, args ...string) (int, string) {
		c := &command{interrupts: make(chan os.Signal, 1)}
		a := &app{stdout: &c.stdout, stderr: &c.stderr, interrupts: c.interrupts, env: env}
		return a.run(t.Context(), args), c.stdout.String() + c.stderr.String()
	}
	if code, out := run(nil, "hosts", "--nats-url", url); code != 1 || !strings.Contains(out, "the bus refused the credentials") {
		t.Errorf("without a key: %d %s", code, out)
	}
	if code, out := run(nil, "hosts", "--nats-url", url, "--credentials", d.OperatorKey); code != 0 || !strings.Contains(out, "No agent is on the bus") {
		t.Errorf("with the operator's key: %d %s", code, out)
	}
	if code, out := run([]string{"GODWIT_SERVE_LISTEN=" + listen, "GODWIT_SERVE_STORE_DIR=" + dir}, "hosts"); code != 0 {
		t.Errorf("on the machine of the bus: %d %s", code, out)
	}
	if code, out := run([]string{"GODWIT_SERVE_LISTEN=" + listen, "GODWIT_SERVE_STORE_DIR=" + dir}, "history"); code != 0 || !strings.Contains(out, "No migration has been asked for yet.") {
		t.Errorf("history: %d %s", code, out)
	}
}

func TestUnreachable(t *testing.T) {
	c := &command{interrupts: make(chan os.Signal, 1)}
	a := &app{stdout: &c.stdout, stderr: &c.stderr, interrupts: c.interrupts}
	code := a.run(t.Context(), []string{"hosts", "-o", "json", "--nats-url", fmt.Sprintf("nats://127.0.0.1:%d", freePort(t))})
	var d struct {
		Error    errorDoc
		ExitCode int `json:"exit_code"`
	}
	if err := json.Unmarshal([]byte(c.stdout.String()), &d); err != nil || code != 1 || d.Error.Code != "unavailable" || d.ExitCode != 1 {
		t.Errorf("%d %q %v", code, c.stdout.String(), err)
	}
	if !strings.Contains(c.stderr.String(), `start it with "godwit serve"`) {
		t.Errorf("no hint: %s", c.stderr.String())
	}
}

func TestHostsAndPs(t *testing.T) {
	b := newBus(t)
	b.agent("alpha")
	c := b.godwit("-o", "json", "hosts")
	var hosts struct{ Hosts []hostDoc }
	if code := c.wait(t); code != 0 || json.Unmarshal([]byte(c.stdout.String()), &hosts) != nil || len(hosts.Hosts) != 1 || hosts.Hosts[0].CPUs != 8 {
		t.Errorf("hosts: %d %s", code, c.stdout.String())
	}
	c = b.godwit("ps", "alpha", "-o", "json", "--all")
	var ps struct{ Processes []processDoc }
	if code := c.wait(t); code != 0 || json.Unmarshal([]byte(c.stdout.String()), &ps) != nil || len(ps.Processes) != len(testProcesses()) {
		t.Errorf("ps: %d %s", code, c.stdout.String())
	}
	c = b.godwit("ps", "alpha")
	if code := c.wait(t); code != 0 || !strings.Contains(c.stdout.String(), "redis-server *:6379") || strings.Contains(c.stdout.String(), "kthreadd") {
		t.Errorf("ps: %d %s", code, c.stdout.String())
	}
	c = b.godwit("ps", "gamma")
	if code := c.wait(t); code != 1 || !strings.Contains(c.stderr.String(), "the hosts on the bus are alpha") {
		t.Errorf("ps of no host: %d %s", code, c.stderr.String())
	}
	c = b.godwit("__complete", "ps", "")
	if code := c.wait(t); code != 0 || !strings.HasPrefix(c.stdout.String(), "alpha\n") {
		t.Errorf("completion: %d %s", code, c.stdout.String())
	}
}

func TestHelp(t *testing.T) {
	root := (&app{}).newRoot()
	for _, c := range root.Commands() {
		if !strings.Contains(c.Long, "Exit codes: 0 done;") {
			t.Errorf("the help of %s does not name the exit codes", c.Name())
		}
	}
	c := &command{}
	a := &app{stdout: &c.stdout, stderr: &c.stderr}
	if code := a.run(t.Context(), []string{"version", "-o", "json"}); code != 0 || !json.Valid([]byte(c.stdout.String())) {
		t.Errorf("version: %d %s", code, c.stdout.String())
	}
}

// TestImports: the coordinator does not know the engine, nor the agent.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "godwit/coordinator/...").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for p := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(p, "godwit/engine") || strings.HasPrefix(p, "godwit/agent") || strings.HasPrefix(p, "godwit/testenv") {
			t.Errorf("the coordinator imports %s", p)
		}
	}
}
