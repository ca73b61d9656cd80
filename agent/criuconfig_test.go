package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func TestConfigWords(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
		bad  bool
	}{
		{"", nil, false},
		{" \t# all of it", nil, false},
		{"leave-running\r\n", []string{"leave-running"}, false},
		{"work-dir /tmp/x# why", []string{"work-dir", "/tmp/x"}, false},
		{`action-script "echo \"a # b\" \n" # end`, []string{"action-script", `echo "a # b" \n`}, false},
		{`log-file ""`, []string{"log-file", ""}, false},
		{`log-file "x`, nil, true},
		{`log-file "x\"`, nil, true},
	} {
		got, err := configWords(tt.in)
		if diff := cmp.Diff(tt.want, got); diff != "" || (err != nil) != tt.bad {
			t.Errorf("%q: %v\n%s", tt.in, err, diff)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add("leave-running\nwork-dir /tmp # x\naction-script \"a \\\" b\"\n")
	f.Add("\"\\\"")
	f.Fuzz(func(t *testing.T, s string) {
		opts, err := parseConfig(s)
		if err != nil {
			return
		}
		// What was read says the same when it is written in quotes.
		quote := func(w string) string { return `"` + strings.ReplaceAll(w, `"`, `\"`) + `"` }
		var b strings.Builder
		for _, o := range opts {
			b.WriteString(quote(o.name))
			if o.has {
				b.WriteString(" " + quote(o.value))
			}
			b.WriteByte('\n')
		}
		// A backslash before a closing quote would be taken for its escape.
		if strings.Contains(s, `\`) {
			return
		}
		again, err := parseConfig(b.String())
		if err != nil || len(again) != len(opts) {
			t.Fatalf("%q: %v", b.String(), err)
		}
		for i, o := range again {
			if o.name != opts[i].name || o.value != opts[i].value || o.has != opts[i].has {
				t.Errorf("%v became %v", opts[i], o)
			}
		}
	})
}

// TestConfigFiles reads files in all places and looks at what dump was given.
func TestConfigFiles(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	noErr(t, os.Mkdir(filepath.Join(home, ".criu"), 0o700))
	file := func(name, text string) string {
		p := filepath.Join(home, name)
		noErr(t, os.WriteFile(p, []byte(text), 0o600))
		return p
	}
	file(".criu/default.conf", "verbosity 3\nwork-dir /of/home\naction-script home\n")
	env := file("env", "work-dir \"/of the/env\" # last but one\n")
	other := file("other", "verbosity 4\naction-script other\nno-display-stats\nrestore-detached\ninherit-fd fd[3]:x\nno-restore-sibling\n")
	tests := []struct {
		name string
		env  string
		args []string
		text string // of a file given by --config in place of other
		want localFlags
		bad  string
	}{
		{name: "home", want: localFlags{verbosity: 3, workDir: "/of/home", scripts: []string{"home"}}},
		{name: "environment", env: env, want: localFlags{verbosity: 3, workDir: "/of the/env", scripts: []string{"home"}}},
		{name: "named file wins", env: env, args: []string{"--config", other}, want: localFlags{verbosity: 4, workDir: "/of the/env", scripts: []string{"home", "other"}}},
		{name: "command line wins", args: []string{"--config", other, "--verbosity=1", "-W", "/cli", "--action-script", "cli", "--display-stats"},
			want: localFlags{verbosity: 1, workDir: "/cli", scripts: []string{"home", "other", "cli"}, stats: true}},
		{name: "no defaults", args: []string{"--no-default-config"}, want: localFlags{verbosity: 2}},
		{name: "negated", text: "display-stats\nshell-job", args: []string{"--no-display-stats"}, want: localFlags{verbosity: 3, workDir: "/of/home", scripts: []string{"home"}, shellJob: true}},
		{name: "unknown", text: "\nfrobnicate", bad: `line 2: unknown option "frobnicate"`},
		{name: "dashes", text: "--display-stats", bad: "line 1: \"--display-stats\": options have no dashes here"},
		{name: "foreign", text: "lazy-pages", bad: "line 1: CRIU's option --lazy-pages is not carried out"},
		{name: "argument missing", text: "work-dir", bad: "line 1: work-dir needs an argument"},
		{name: "argument too much", text: "display-stats yes", bad: `display-stats takes no argument, "yes" is given`},
		{name: "two arguments", text: "work-dir a b", bad: `"b" stands behind the argument of work-dir`},
		{name: "of another kind", text: "verbosity much", bad: "line 1: invalid argument"},
		{name: "nested", text: "config /x", bad: "config has no meaning inside"},
		{name: "no such file", env: "/nonexistent/x", bad: "/nonexistent/x"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := os.Stat(systemConfig); err == nil {
				t.Fatalf("this host has %s, which the test would read", systemConfig)
			}
			t.Setenv(configEnv, tt.env)
			if tt.text != "" {
				tt.args = append(tt.args, "--config", file("text", tt.text))
			}
			var got localFlags
			root := newRoot(os.Stdout, os.Stderr)
			for _, c := range root.Commands() {
				if c.Name() == "dump" {
					root.RemoveCommand(c)
				}
			}
			cmd := &cobra.Command{Use: "dump", RunE: func(*cobra.Command, []string) error { return nil }}
			got.add(cmd)
			foreignFlags(cmd.Flags(), "lazy-pages", "restore-sibling,S")
			negations(cmd.Flags())
			root.AddCommand(cmd)
			root.SetArgs(append([]string{"dump"}, tt.args...))
			err := root.Execute()
			if tt.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tt.bad) {
					t.Errorf("error %v, want %q", err, tt.bad)
				}
				return
			}
			noErr(t, err)
			if got.verbosity != tt.want.verbosity || got.workDir != tt.want.workDir || got.stats != tt.want.stats || got.shellJob != tt.want.shellJob {
				t.Errorf("got %+v\nwant %+v", got, tt.want)
			}
			if diff := cmp.Diff(tt.want.scripts, got.scripts); diff != "" {
				t.Errorf("scripts:\n%s", diff)
			}
		})
	}
}
