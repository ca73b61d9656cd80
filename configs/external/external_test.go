package external

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Entry
		text string // empty: in
	}{
		{"file[72:a3e7]", Entry{}, ""},
		{"fd:1234:5=inherit", Entry{Resolver: Inherit}, ""},
		{"role:stdout=journal", Entry{Resolver: Journal}, ""},
		{"path:/var/log/app/*.log=path:/srv/log/{base}", Entry{Resolver: Path, Argument: "/srv/log/{base}"}, ""},
		{"kind:fifo=create", Entry{Resolver: Create}, ""},
		{"file[2a:1f3]=provide", Entry{Resolver: Provide}, ""},
		{"path:/d/**=carry,overwrite,limit=64MiB", Entry{Resolver: Carry, Options: Options{Overwrite: true, Limit: 64 << 20}}, "path:/d/**=carry,overwrite,limit=67108864"},
		{"fd:3=path:/x,mode=any,forward,size=grow-ok,content=any", Entry{Resolver: Path, Argument: "/x", Options: Options{Forward: true, Size: GrowOK, Mode: Any, Content: Any}},
			"fd:3=path:/x,forward,size=grow-ok,mode=any,content=any"},
		{`path:/a\=b=path:/c\,d\\e=f`, Entry{Resolver: Path, Argument: `/c,d\e=f`}, ""},
		{"pipe:[12]=proxy", Entry{Resolver: Proxy}, ""},
	} {
		e, err := Parse(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		text := c.text
		if text == "" {
			text = c.in
		}
		if e.String() != text {
			t.Errorf("%s: comes back as %s", c.in, e)
		}
		e.Selector = Selector{}
		if d := cmp.Diff(c.want, e, cmp.AllowUnexported(Selector{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.in, d)
		}
	}
}

func TestParseRefused(t *testing.T) {
	for in, want := range map[string]string{
		"":                                      "the selector is none of",
		"stdin":                                 "the selector is none of",
		"file[72]":                              "want file[MNT:INO]",
		"file[72:xyz]":                          "want file[MNT:INO]",
		"file[-1:2]":                            "want file[MNT:INO]",
		"dev[8/1]":                              "want file[MNT:INO]",
		"pipe[]":                                "want file[MNT:INO]",
		"fd:x":                                  "is no number",
		"fd:0:1":                                "is no number",
		"fd:1:99999999999":                      "is no number",
		"role:stdlog":                           "want one of stdin, stdout, stderr",
		"kind:fifi":                             "did you mean fifo",
		"path:log":                              "want an absolute path",
		"path:/[":                               "syntax error",
		"path:/a\nb":                            "control character",
		"fd:1=pat:/x":                           "did you mean path",
		"fd:1=":                                 "unknown resolver",
		"fd:1=path":                             "needs an argument",
		"fd:1=path:":                            "nothing follows the colon",
		"fd:1=path:x":                           "must be absolute",
		"fd:1=path:{base}":                      "must be absolute",
		"fd:1=path:/{name}":                     "is no placeholder",
		"fd:1=path:/{{{name}":                   "{{ is one {",
		"fd:1=path:{{dir}/x":                    "must be absolute",
		"fd:1=path:/x,":                         "unknown option",
		"fd:1=path:/x,sise=any":                 "did you mean size",
		"fd:1=path:/x,size=big":                 "want one of same, grow-ok, any, truncate",
		"fd:1=path:/x,forward=yes":              "takes no value",
		"fd:1=null:x":                           "takes no argument",
		"fd:1=null,forward":                     "resolver null has no option forward",
		"fd:1=carry,limit=0":                    "want a size",
		"fd:1=carry,limit=9999999999GiB":        "want a size",
		"fd:1=path:/x\\":                        "ends with a backslash",
		"fd:1=" + strings.Repeat("x", maxEntry): "more than",
	} {
		if e, err := Parse(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, error %v, want %q", in, e, err, want)
		}
	}
}

func TestExpand(t *testing.T) {
	for _, c := range []struct{ selector, argument, source, want string }{
		{"fd:3", "/srv/log/{base}", "/var/log/a.log", "/srv/log/a.log"},
		{"fd:3", "{dir}/other/{base}", "/var/a", "/var/other/a"},
		{"fd:3", "/new{path}", "/var/a", "/new/var/a"},
		{"fd:3", "/x/../y", "", "/y"},
		{"fd:3", "/a{{b}/c", "", "/a{b}/c"},
		{"fd:3", "/{{{{base}", "", "/{{base}"},
		{"fd:3", "/{{base}/{{{base}", "/var/a", "/{base}/{a"},
		{"fd:3", "/{base}/{base}", "/{dir}", "/{dir}/{dir}"},
		{"path:/var/**", "/srv/{rest}", "/var/a/b", "/srv/a/b"},
		{"path:/var/**", "/srv/{rest}", "/var", "/srv"},
		{"path:/var/*/b", "/srv/{rest}.old", "/var/a/b", "/srv/a/b.old"},
		{"path:/var/a", "/srv/{rest}", "/var/a", "/srv"},
		{"path:**/a", "/srv/{rest}", "/var/a", "/srv/var/a"},
		{"path:/var/?/b", "/srv/{rest}", "/var/?/b", "/srv/?/b"},
	} {
		s, err := ParseSelector(c.selector)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := (Entry{Selector: s, Argument: c.argument}).Expand(c.source); err != nil || got != c.want {
			t.Errorf("%s=%s of %s: %q, %v, want %q", c.selector, c.argument, c.source, got, err, c.want)
		}
	}
	for _, c := range []struct{ argument, source string }{{"/{base}", ""}, {"/{rest}", "/a"}} {
		if got, err := (Entry{Argument: c.argument}).Expand(c.source); err == nil {
			t.Errorf("%s of %q became %s", c.argument, c.source, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"file[72:A3e7]=path:/x,forward", "fd:1:2", `path:/a\=*/**=path:/{base}\,,size=any`, "pipe:[0x1f]=proxy", "kind:socket=null", "unix[7", "role:stdin=carry,limit=1kB,overwrite"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := Parse(s)
		if err != nil {
			return
		}
		again, err := Parse(e.String())
		if err != nil {
			t.Fatalf("%q becomes %q: %v", s, e, err)
		}
		if again.String() != e.String() || again.Outcome() != e.Outcome() || again.Argument != e.Argument {
			t.Fatalf("%q becomes %q and then %q", s, e, again)
		}
		Match([]Object{{Key: "file[1:2]", Kind: "regular", Path: "/a/b", Holders: []Holder{{Pid: 1, FDs: []int{1}, Roles: []string{"stdout"}}}}}, []Rule{{Entry: e, Asked: true}}, nil)
	})
}

// tree is what the tests of Match look at.
func tree() []Object {
	h := func(pid int, roles []string, fds ...int) []Holder {
		return []Holder{{Pid: pid, Comm: "w", FDs: fds, Roles: roles}}
	}
	return []Object{
		0: {Key: "file[2a:10]", Kind: "regular", Path: "/var/log/app/a.log", Holders: h(7, []string{"stdout"}, 1)},
		1: {Key: "file[2a:10]", Kind: "regular", Path: "/var/log/app/a.log", Holders: h(8, nil, 5)},
		2: {Key: "file[2a:11]", Kind: "regular", Path: "/var/log/b.log", Holders: h(7, nil, 5)},
		3: {Key: "pipe[77]", Kind: "pipe", Holders: h(7, []string{"stdin"}, 0)},
		4: {Kind: "eventfd", Holders: h(7, nil, 9)},
		5: {Key: "unix[30]", Kind: "unix-stream", Holders: h(8, []string{"stdin", "stdout"}, 0, 1)},
		6: {Key: "file[2a:42]", Kind: "fifo", Path: "/run/f", Holders: h(8, nil, 6)},
	}
}

func rules(t *testing.T, asked, file []string) []Rule {
	var out []Rule
	for i, list := range [][]string{asked, file} {
		for _, s := range list {
			e, err := Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, Rule{Entry: e, Origin: []string{"--external", "agent.toml"}[i], Asked: i == 0})
		}
	}
	return out
}

func TestMatch(t *testing.T) {
	noJournal := func(i int, e Entry) error {
		if e.Resolver == Journal && tree()[i].Kind != "unix-stream" {
			return errors.New("a " + tree()[i].Kind + " is no stream to journald")
		}
		return nil
	}
	for _, c := range []struct {
		name        string
		asked, file []string
		want        map[string]string // key: outcome
		problems    []string
	}{
		{name: "nothing", want: map[string]string{}},
		{name: "key", asked: []string{"file[2A:0x10]=null"}, want: map[string]string{"file[2a:10]": "=null"}},
		{name: "key in decimal", asked: []string{"file[42:66]=null"}, want: map[string]string{"file[2a:42]": "=null"}},
		{name: "inode in hexadecimal", asked: []string{"pipe[0x4d]=null"}, want: map[string]string{"pipe[77]": "=null"}},
		{name: "descriptor", asked: []string{"fd:7:5=null"}, want: map[string]string{"file[2a:11]": "=null"}},
		{name: "ambiguous descriptor", asked: []string{"fd:5=null"}, want: map[string]string{},
			problems: []string{"several processes have a descriptor 5, for different objects; say which: fd:8:5 (pid 8 (w) fd 5 /var/log/app/a.log), fd:7:5"}},
		{name: "the only descriptor", asked: []string{"fd:6=null"}, want: map[string]string{"file[2a:42]": "=null"}},
		{name: "role", asked: []string{"role:stdin=proxy"}, want: map[string]string{"pipe[77]": "=proxy", "unix[30]": "=proxy"}},
		{name: "glob", asked: []string{"path:/var/log/*.log=null"}, want: map[string]string{"file[2a:11]": "=null"}},
		{name: "deep glob", asked: []string{"path:/var/**/*.log=null"}, want: map[string]string{"file[2a:10]": "=null", "file[2a:11]": "=null"}},
		{name: "glob from anywhere", asked: []string{"path:**/f=null"}, want: map[string]string{"file[2a:42]": "=null"}},
		{name: "kinds", asked: []string{"kind:unix=null", "kind:fifo=create"}, want: map[string]string{"unix[30]": "=null", "file[2a:42]": "=create"}},
		{name: "declared and resolved by a rule", asked: []string{"file[2a:10]"}, file: []string{"path:/**=null"},
			want: map[string]string{"file[2a:10]": "=null", "file[2a:11]": "=null", "file[2a:42]": "=null"}},
		{name: "said twice, the same", asked: []string{"file[2a:10]", "fd:7:1=null", "role:stdout=null"}, want: map[string]string{"file[2a:10]": "=null", "unix[30]": "=null"}},
		{name: "said twice, differently", asked: []string{"file[2a:10]=null", "fd:8:5=path:/x"}, want: map[string]string{"file[2a:10]": "=null"},
			problems: []string{"two entries say different things of it: file[2a:10]=null and fd:8:5=path:/x"}},
		{name: "asked before rules, rules in order", asked: []string{"fd:8:5=image"}, file: []string{"path:/var/**=null", "path:/var/log/*=path:/x"},
			want: map[string]string{"file[2a:10]": "=image", "file[2a:11]": "=null"}},
		{name: "a rule for nothing", file: []string{"path:/none=null", "fd:99=null"}, want: map[string]string{}},
		{name: "unmatched", asked: []string{"file[2a:1]=null", "fd:7:6=null", "path:/var/log/c.log=null", "kind:tcp=null"}, want: map[string]string{},
			problems: []string{"nearest: file[2a:10] (pid 7 (w) fd 1 /var/log/app/a.log)", "nearest: fd:7:0 (pid 7", "nearest: path:/var/log/b.log (pid 7", "matches kind:tcp"}},
		{name: "never external", asked: []string{"fd:7:9=null"}, want: map[string]string{}, problems: []string{"it is of kind eventfd, which is never external"}},
		{name: "cannot be served", asked: []string{"fd:8:6=journal"}, want: map[string]string{}, problems: []string{"a fifo is no stream to journald"}},
		{name: "a rule that cannot serve", file: []string{"role:stdout=journal", "role:stdout=null"}, want: map[string]string{"unix[30]": "=journal", "file[2a:10]": "=null"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			choices, problems := Match(tree(), rules(t, c.asked, c.file), noJournal)
			got := map[string]string{}
			for _, x := range choices {
				got[x.Key] = x.Rule.Outcome()
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("choices (-want +got):\n%s", d)
			}
			if len(problems) != len(c.problems) {
				t.Fatalf("problems: %+v", problems)
			}
			for i, p := range problems {
				if s := p.Reason + "; " + p.Hint; !strings.Contains(s, c.problems[i]) {
					t.Errorf("problem %q, want %q", s, c.problems[i])
				}
			}
		})
	}
}
