package configs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/configs/external"
)

// TestSamples checks that the sample files are the defaults and name every key.
func TestSamples(t *testing.T) {
	agent, err := LoadAgent("agent.toml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(DefaultAgent(), agent); d != "" {
		t.Errorf("agent.toml is not the defaults (-want +got):\n%s", d)
	}
	coordinator, err := LoadCoordinator("godwit.toml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(DefaultCoordinator(), coordinator); d != "" {
		t.Errorf("godwit.toml is not the defaults (-want +got):\n%s", d)
	}
	for file, config := range map[string]any{"agent.toml": DefaultAgent(), "godwit.toml": DefaultCoordinator()} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		at := positions(text)
		l := newLoader(config, "", "")
		for _, f := range l.fields {
			if _, ok := at[f.key]; !ok {
				t.Errorf("%s does not have the key %s", file, f.key)
			}
		}
		if got, want := len(at), len(l.fields)+len(l.tables); got != want {
			t.Errorf("%s has %d keys and tables, the configuration has %d", file, got, want)
		}
	}
}

func TestDefaultsAreValid(t *testing.T) {
	a := newLoader(DefaultAgent(), agentEnv, "")
	DefaultAgent().validate(a)
	c := newLoader(DefaultCoordinator(), coordinatorEnv, agentEnv)
	DefaultCoordinator().validate(c)
	if err := errors.Join(a.err(), c.err()); err != nil {
		t.Error(err)
	}
}

func TestLoadAgent(t *testing.T) {
	tests := []struct {
		name      string
		file      string
		env       []string
		overrides []Override
		want      func(*Agent)
		problems  []string
	}{
		{name: "empty file", want: func(*Agent) {}},
		{
			name: "values of every kind",
			file: `
host = "alpha"
ghost_limit = 4096
nats.urls = ["nats://a:1", "tls://b:2"]
[limits]
window = "1.5MiB"
lanes = 4
bandwidth = "800Mbit/s"
[timeouts]
freeze = "1m30s"
`,
			want: func(c *Agent) {
				c.Host, c.GhostLimit, c.NATS.URLs = "alpha", 4096, []string{"nats://a:1", "tls://b:2"}
				c.Limits.Window, c.Limits.Lanes, c.Limits.Bandwidth = 3<<19, 4, 100e6
				c.Timeouts.Freeze = Duration(90 * time.Second)
			},
		},
		{
			name: "direct lane",
			file: "[direct]\nenabled = false\nlisten = \"[::]:99\"\nadvertise = [\"alpha.example\", \"10.0.0.1:5\", \"[fd00::1]:6\", \"fd00::2\"]\n",
			want: func(c *Agent) {
				c.Direct = Direct{Listen: "[::]:99", Advertise: []string{"alpha.example", "10.0.0.1:5", "[fd00::1]:6", "fd00::2"}}
			},
		},
		{
			name: "direct lane, all wrong",
			file: "[direct]\nlisten = \"alpha:0\"\nadvertise = [\"nats://a:1\", \"b:x\"]\n",
			problems: []string{
				`FILE:2:1: direct.listen: port "0"; want a number from 1 to 65535`,
				`FILE:2:1: direct.listen: host "alpha" is no IP address`,
				`FILE:3:1: direct.advertise: "nats://a:1" is no address or name; want host or host:port`,
				`FILE:3:1: direct.advertise: "b:x": port "x"; want a number from 1 to 65535`,
			},
		},
		{
			name:      "flag before environment before file",
			file:      "[limits]\nlanes = 3\nwindow = \"2MiB\"\n[log]\nlevel = \"warn\"",
			env:       []string{"GODWIT_AGENT_LIMITS_LANES=5", "GODWIT_AGENT_LOG_LEVEL=error", "GODWIT_AGENT_NATS_URLS= nats://x:1 ,nats://y:2", "HOME=/root", "GODWIT_SERVE_LISTEN=x"},
			overrides: []Override{{Key: "log.level", Value: "debug", Flag: "--log-level"}},
			want: func(c *Agent) {
				c.Limits.Lanes, c.Limits.Window, c.Log.Level, c.NATS.URLs = 5, 2<<20, "debug", []string{"nats://x:1", "nats://y:2"}
			},
		},
		{
			name: "all problems at once, in the order of the file",
			file: `hots = "a"
[limits]
  windw = "4MiB"
lanes = "two"
chunk = "3 parsecs"
bandwidth = true
[timeouts]
freeze = 10
idle = "-1s"
[log]
level = "inf"
[lmits]
x = 1
`,
			env:       []string{"GODWIT_AGENT_LIMITS_WINDOWS=1", "GODWIT_AGENT_LIMITS_LANES=many"},
			overrides: []Override{{Key: "log.format", Value: "xml", Flag: "--log-format"}},
			problems: []string{
				`FILE:1:1: hots: unknown key; did you mean host?`,
				`FILE:3:3: limits.windw: unknown key; did you mean limits.window?`,
				`FILE:4:1: limits.lanes: is a string; want a whole number`,
				`FILE:5:1: limits.chunk: "3 parsecs": want a number and a unit, such as "512KiB" or "4MiB"`,
				`FILE:6:1: limits.bandwidth: is a boolean; want a size with its unit, such as "4MiB"`,
				`FILE:8:1: timeouts.freeze: 10 has no unit; want a time with its unit, such as "10s"`,
				`FILE:9:1: timeouts.idle: "-1s": a time cannot be negative`,
				`FILE:11:1: log.level: "inf"; want one of trace, debug, info, warn, error; did you mean info?`,
				`FILE:12:2: lmits: unknown key; did you mean limits?`,
				`environment variable GODWIT_AGENT_LIMITS_WINDOWS: unknown variable; did you mean GODWIT_AGENT_LIMITS_WINDOW?`,
				`environment variable GODWIT_AGENT_LIMITS_LANES: limits.lanes: "many" is not a whole number`,
				`--log-format: log.format: "xml"; want text or json`,
			},
		},
		{
			name: "values that do not fit",
			file: `host = "a.b"
state_dir = "var"
[nats]
urls = ["http://a", "nats://u:secret@h:1", "nats://h:1\u0000"]
nkey_file = "/a"
creds_file = "/b"
user = "u"
tls.cert = "/c"
[limits]
window = "64MiB"
chunk = "2MiB"
lanes = 0
memory_limit = "1MiB"
bandwidth = 1
[timeouts]
frozen = "0s"
`,
			problems: []string{
				`FILE:1:1: host: "a.b" cannot be a host's name on the bus; want letters, digits, - and _, at most 63`,
				`FILE:2:1: state_dir: "var"; want an absolute path`,
				`FILE:4:1: nats.urls: "http://a"; want nats://host:port, or the schemes tls, ws, wss`,
				`FILE:4:1: nats.urls: "nats://u:xxxxx@h:1" holds credentials, which would show in messages; use nats.user and nats.password_file, or nats.nkey_file`,
				`FILE:4:1: nats.urls: an element is no URL; want nats://host:port`,
				`FILE:6:1: nats.creds_file: is set beside nats.nkey_file; want one kind of credentials`,
				`FILE:7:1: nats.user: is set without nats.password_file`,
				`FILE:8:5: nats.tls.cert: is set without nats.tls.key`,
				`FILE:10:1: limits.window: 64MiB; want from 64KiB to 48MiB`,
				`FILE:11:1: limits.chunk: 2MiB; want from 4KiB to 1020KiB`,
				`FILE:12:1: limits.lanes: 0; want from 1 to 16`,
				`FILE:13:1: limits.memory_limit: 1MiB; want at least 32MiB`,
				`FILE:14:1: limits.bandwidth: 1/s; want at least 64KiB/s, or 0 for no cap`,
				`FILE:16:1: timeouts.frozen: 0s; want from 1s to 24h`,
			},
		},
		{name: "a default that no longer fits", file: "limits.window = \"40MiB\"", problems: []string{
			`default: limits.memory_limit: 96MiB; want at least three times limits.window (40MiB)`,
		}},
		{name: "syntax", file: "a = \nb = 1", problems: []string{"FILE:1:5: "}},
		{name: "twice", file: "host = \"a\"\nhost = \"b\"", problems: []string{"FILE:2:1: "}},
		{name: "a quoted dot is no table", file: `"limits.window" = "4MiB"`, problems: []string{`FILE:1:1: "limits.window": unknown key; did you mean limits.window?`}},
		{name: "table as a value", file: "nats = 1", problems: []string{"FILE:1:1: nats: is an integer; want a table"}},
		{name: "tables as a list", file: "[[nats]]\nuser=\"x\"", problems: []string{"FILE:1:3: nats: is an array; want a table"}},
		{name: "value as a table", file: "[host]\nx=1", problems: []string{"FILE:1:2: host: is a table; want a string"}},
		{
			name: "rules about external files",
			file: `[[external]]
match = ["path:/var/log/*.log", "role:stdout"]
resolver = "path"
argument = "/srv/{base}"
size = "grow-ok"
mode = "any"
[[external]]
match = ["kind:fifo"]
resolver = "carry"
limit = "1MiB"
overwrite = true
`,
			want: func(c *Agent) {
				c.External = []External{
					{Match: []string{"path:/var/log/*.log", "role:stdout"}, Resolver: "path", Argument: "/srv/{base}", Size: "grow-ok", Mode: "any", origin: "FILE:1"},
					{Match: []string{"kind:fifo"}, Resolver: "carry", Limit: 1 << 20, Overwrite: true, origin: "FILE:7"},
				}
			},
		},
		{
			name: "rules with mistakes",
			file: `[[external]]
match = ["path:var/log", "kind:fif"]
resolvr = "path"
[[external]]
match = []
resolver = "paht"
[[external]]
match = ["kind:fifo"]
resolver = "path"
[[external]]
match = ["kind:fifo"]
resolver = "path"
argument = "log"
[[external]]
match = ["kind:fifo"]
resolver = "null"
forward = 1
limit = "1 parsec"
[[external]]
match = "kind:fifo"
resolver = "null"
size = "same"
[[external]]
match = ["kind:fifo"]
resolver = "provide"
size = "grow"
`,
			problems: []string{
				`FILE:1:3: external[0].resolver: is empty; want one of carry, create, image, inherit, journal, null, path, provide, proxy, terminal`,
				`FILE:2:1: external[0].match: "path:var/log": path "var/log": want an absolute path, or **/NAME`,
				`FILE:2:1: external[0].match: "kind:fif": kind "fif": want one of ` + kinds(t) + `; did you mean fifo?`,
				`FILE:3:1: external[0].resolvr: unknown key; did you mean external[0].resolver?`,
				`FILE:5:1: external[1].match: is empty; want selectors, such as ["path:/var/log/app/*.log"]`,
				`FILE:6:1: external[1].resolver: unknown resolver "paht"; did you mean path?; there are carry, create, image, inherit, journal, null, path, provide, proxy, terminal`,
				`FILE:7:3: external[2].argument: resolver path needs an argument: path:/PATH`,
				`FILE:13:1: external[3].argument: the path "log" is one of the destination and must be absolute`,
				`FILE:17:1: external[4].forward: is an integer; want true or false`,
				`FILE:18:1: external[4].limit: "1 parsec": want a number and a unit, such as "512KiB" or "4MiB"`,
				`FILE:20:1: external[5].match: is a string; want a list of strings`,
				`FILE:20:1: external[5].match: is empty; want selectors, such as ["path:/var/log/app/*.log"]`,
				`FILE:22:1: external[5].size: resolver null has no option size`,
				`FILE:26:1: external[6].size: size="grow": want one of same, grow-ok, any, truncate; did you mean grow-ok?`,
			},
		},
		{name: "rules inline", file: `external = [{match = ["kind:fifo"], resolver = "null"}, 3]`, problems: []string{
			`FILE:1:1: external: an element is an integer; want tables, each below [[external]]`,
		}},
		{name: "rules inline with a mistake", file: `external = [{match = ["kind:fifo"], resolver = "null", size = "any"}, {mach = []}]`, problems: []string{
			`FILE:1:1: external[1].match: is empty; want selectors, such as ["path:/var/log/app/*.log"]`,
			`FILE:1:1: external[1].resolver: is empty; want one of carry, create, image, inherit, journal, null, path, provide, proxy, terminal`,
			`FILE:1:56: external[0].size: resolver null has no option size`,
			`FILE:1:72: external[1].mach: unknown key; did you mean external[1].match?`,
		}},
		{name: "rules as a table", file: "[external]\nmatch = []", problems: []string{`FILE:1:2: external: is a table; want tables, each below [[external]]`}},
		{name: "inline table", file: "limits = {lanes = 3, wndow = 1}", problems: []string{"FILE:1:22: limits.wndow: unknown key; did you mean limits.window?"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "agent.toml")
			if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := LoadAgent(path, tt.env, tt.overrides...)
			if tt.problems != nil {
				e, ok := errors.AsType[*Error](err)
				if !ok {
					t.Fatalf("error %v, want problems", err)
				}
				var lines []string
				for _, p := range e.Problems {
					lines = append(lines, strings.ReplaceAll(p.String(), path, "FILE"))
				}
				if len(lines) == 1 && len(tt.problems) == 1 && strings.HasPrefix(lines[0], tt.problems[0]) {
					return
				}
				if d := cmp.Diff(tt.problems, lines); d != "" {
					t.Errorf("(-want +got):\n%s", d)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := DefaultAgent()
			tt.want(want)
			for i := range want.External {
				want.External[i].origin = strings.ReplaceAll(want.External[i].origin, "FILE", path)
			}
			if d := cmp.Diff(want, got, cmp.AllowUnexported(External{})); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// kinds are the kinds that a selector can name, as messages list them.
func kinds(t *testing.T) string {
	t.Helper()
	_, err := external.ParseSelector("kind:")
	_, all, ok := strings.Cut(fmt.Sprint(err), "want one of ")
	if !ok {
		t.Fatalf("%v does not list the kinds", err)
	}
	all, _, _ = strings.Cut(all, ";")
	return all
}

// TestSampleRules: the rules that the sample has as comments are valid.
func TestSampleRules(t *testing.T) {
	text, err := os.ReadFile("agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(path, regexp.MustCompile(`(?m)^#(\S)`).ReplaceAll(text, []byte("$1")), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadAgent(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range c.Rules() {
		got = append(got, r.Entry.String())
	}
	want := []string{
		"path:/var/log/app/**=path:/srv/log/{rest},size=grow-ok,mode=any", "path:/var/cache/app/*.db=path:{path},size=any",
		"role:stdout=null", "role:stderr=null",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestLoadCoordinator(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "godwit.toml")
	if err := os.WriteFile(path, []byte("[serve]\nlisten = \"nowhere\"\nstore_dir = \"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := LoadCoordinator("", []string{"GODWIT_CONFIG=" + path, "GODWIT_AGENT_NONSENSE=1", "GODWIT_TESTENV_KEEP=1", "GODWIT_NATS_URL=x"})
	want := "configuration: 3 problems:\n" +
		"  " + path + ":2:1: serve.listen: \"nowhere\" is no address; want host:port, such as 127.0.0.1:4222\n" +
		"  " + path + ":3:1: serve.store_dir: is empty; want an absolute path\n" +
		"  environment variable GODWIT_NATS_URL: unknown variable; did you mean GODWIT_NATS_URLS?"
	if err == nil || err.Error() != want {
		t.Errorf("error:\n%v\nwant:\n%s", err, want)
	}
	_, err = LoadCoordinator("", []string{"GODWIT_CONFIG=" + path}, Override{Key: "serve.listen", Value: "0.0.0.0:99999", Flag: "--listen"}, Override{Key: "serve.store_dir", Value: dir, Flag: "--store-dir"})
	if want := "configuration: --listen: serve.listen: port \"99999\"; want a number from 1 to 65535"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestMissingFile(t *testing.T) {
	if _, err := LoadAgent(filepath.Join(t.TempDir(), "none.toml"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a named file that does not exist: %v", err)
	}
	l := newLoader(DefaultAgent(), agentEnv, "")
	if err := l.load("", filepath.Join(t.TempDir(), "none.toml"), nil, nil); err != nil {
		t.Errorf("a default file that does not exist: %v", err)
	}
}

func TestUnits(t *testing.T) {
	sizes := []struct {
		in   string
		want Size
		out  string
		bad  bool
	}{
		{in: "0", want: 0, out: "0"},
		{in: "4MiB", want: 4 << 20, out: "4MiB"},
		{in: "4 MiB", want: 4 << 20, out: "4MiB"},
		{in: "4MB", want: 4e6, out: "4000000"},
		{in: "1536KiB", want: 1536 << 10, out: "1536KiB"},
		{in: "1.5GiB", want: 3 << 29, out: "1536MiB"},
		{in: "17", want: 17, out: "17"},
		{in: "16777215TiB", want: 16777215 << 40, out: "16777215TiB"},
		{in: "16777216TiB", bad: true},
		{in: "0.3B", bad: true},
		{in: "", bad: true}, {in: "MiB", bad: true}, {in: "-1", bad: true}, {in: "1mib", bad: true}, {in: "1..5MiB", bad: true}, {in: "1.", bad: true}, {in: "1e3", bad: true},
	}
	for _, tt := range sizes {
		got, err := ParseSize(tt.in)
		if (err != nil) != tt.bad || !tt.bad && (got != tt.want || got.String() != tt.out) {
			t.Errorf("ParseSize(%q) = %d (%s), %v", tt.in, got, got, err)
		}
	}
	for in, want := range map[string]Rate{"100MiB/s": 100 << 20, "100MB": 100e6, "1Gbit/s": 125e6, "8kbit/s": 1000, "0": 0} {
		if got, err := ParseRate(in); err != nil || got != want {
			t.Errorf("ParseRate(%q) = %d, %v", in, got, err)
		}
	}
	if _, err := ParseRate("fast"); err == nil {
		t.Error(`ParseRate("fast") succeeds`)
	}
	for in, out := range map[string]string{"120s": "2m", "3600s": "1h", "90s": "1m30s", "0s": "0s", "1500ms": "1.5s", "10m": "10m", "100s": "1m40s"} {
		if d, err := ParseDuration(in); err != nil || d.String() != out {
			t.Errorf("ParseDuration(%q) = %s, %v, want %s", in, d, err, out)
		}
	}
}

func TestHostName(t *testing.T) {
	name, err := (&Agent{}).HostName()
	if err != nil || !hostName.MatchString(name) {
		t.Errorf("HostName() = %q, %v", name, err)
	}
	if got := busName("host.example.com"); got != "host-example-com" {
		t.Errorf("busName = %q", got)
	}
}

// TestServiceFiles checks the directives that landed trees depend on.
func TestServiceFiles(t *testing.T) {
	for file, want := range map[string][]string{
		"godwit-agent.service": {"KillMode=process", "SendSIGKILL=no", "OOMPolicy=continue", "ExecStart=/usr/local/bin/godwit-agent run"},
		"godwit.service":       {"ExecStart=/usr/local/bin/godwit serve"},
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(w) + `$`).Match(text) {
				t.Errorf("%s has no line %s", file, w)
			}
		}
	}
}

// FuzzFile feeds any text to the loader: it must not panic, and what it
// accepts must be valid.
func FuzzFile(f *testing.F) {
	for _, file := range []string{"agent.toml", "godwit.toml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("[limits]\nwindow = 1\n\"a.b\" = {c.d = [1, {e = 2}]}\n[[nats]]\n"))
	f.Add([]byte("host = \"\\u00e9\" # é\nstate_dir = '''\n'''\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := DefaultAgent()
		l := newLoader(c, agentEnv, "")
		l.file("f.toml", text)
		c.validate(l)
		err := l.err()
		if err != nil {
			e, ok := errors.AsType[*Error](err)
			if !ok || len(e.Problems) == 0 || e.Error() == "" {
				t.Fatalf("error without problems: %v", err)
			}
			for _, p := range e.Problems {
				if p.Reason == "" || p.Origin == "" {
					t.Errorf("empty problem %+v", p)
				}
			}
			return
		}
		again := newLoader(c, agentEnv, "")
		c.validate(again)
		if err := again.err(); err != nil {
			t.Errorf("accepted, but not valid: %v", err)
		}
		if reflect.DeepEqual(c, &Agent{}) {
			t.Error("defaults are gone")
		}
	})
}

// FuzzUnits: what is read is written so that it reads as the same.
func FuzzUnits(f *testing.F) {
	for _, s := range []string{"0", "4MiB", "1.5GiB", "100MB/s", "800Mbit/s", "10s", "1h30m", "18446744073709551615", "-1s", "1e3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil {
			if again, err := ParseSize(n.String()); err != nil || again != n {
				t.Errorf("ParseSize(%q) = %d, written %q, read as %d, %v", s, uint64(n), n, uint64(again), err)
			}
		}
		if n, err := ParseRate(s); err == nil {
			if again, err := ParseRate(n.String()); err != nil || again != n {
				t.Errorf("ParseRate(%q) = %d, written %q, read as %d, %v", s, uint64(n), n, uint64(again), err)
			}
		}
		if d, err := ParseDuration(s); err == nil {
			if again, err := ParseDuration(d.String()); err != nil || again != d || d < 0 {
				t.Errorf("ParseDuration(%q) = %d, written %q, read as %d, %v", s, d, d, again, err)
			}
		}
	})
}
