package coordinator

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/wire"
)

// openThings is a tree with one of each.
func openThings() []*wire.OpenObject {
	redis := func(roles []string, fds ...int32) []*wire.Holder {
		return []*wire.Holder{{Pid: 412, InnerPid: 412, Comm: "redis-server", Fds: fds, Roles: roles}}
	}
	return []*wire.OpenObject{
		{Kind: "chr", Path: "/dev/null", Link: "/dev/null", Holders: redis([]string{"stdin"}, 0), Carry: "path"},
		{Key: "pipe[77]", Kind: "pipe", Link: "pipe:[77]", Holders: redis([]string{"stdout", "stderr"}, 1, 2), Carry: "refused", Declarable: true,
			Reason: "the pipe is also held by pid 1 (init), fd 9, outside the tree", Hint: "declare it external"},
		{Key: "file[2a:10]", Kind: "regular", Path: "/var/log/redis.log", Link: "/var/log/redis.log", Holders: redis(nil, 3), Carry: "path"},
		{Key: "file[2a:11]", Kind: "regular", Path: "/usr/bin/redis-server", Link: "/usr/bin/redis-server", Holders: redis([]string{"mapping", "exe"}), Carry: "path"},
		{Kind: "eventpoll", Link: "anon_inode:[eventpoll]", Holders: redis(nil, 4), Carry: "image"},
	}
}

func resolveThings(req *wire.ResolveRequest) *wire.ResolveReply {
	reply := &wire.ResolveReply{
		Entries: []*wire.Entry{{Text: "path:/var/log/*=path:/srv/log/{base}", Origin: "agent.toml:12:1"}},
		Resolutions: []*wire.Resolution{{Key: "file[2a:10]", Resolver: "path", Argument: "/srv/log/redis.log",
			Entry: "path:/var/log/*=path:/srv/log/{base}", Origin: "agent.toml:12:1"}},
		Presences: []*wire.Presence{
			{Path: "/dev/null", State: "same"}, {Path: "/var/log/redis.log", State: "missing"},
			{Path: "/usr/bin/redis-server", State: "differs", Differences: []string{"size 12, expected 10"}},
		},
	}
	for _, e := range req.Options.GetExternal() {
		reply.Resolutions = append(reply.Resolutions, &wire.Resolution{Key: "pipe[77]", Resolver: "proxy", Entry: e, Origin: "--external"})
	}
	return reply
}

func TestPlan(t *testing.T) {
	b := newBus(t)
	alpha, beta := b.agent("alpha"), b.agent("beta")
	alpha.objects, beta.resolved = openThings(), resolveThings
	c := b.godwit("plan", "alpha:412", "beta")
	if code := c.wait(t); code != wire.ExitRefused || !strings.Contains(c.stderr.String(), "pid 412 (redis-server) fd 1 pipe:[77] [key pipe[77]]: the pipe is also held by pid 1 (init)") {
		t.Errorf("exit code %d, %s", code, c.stderr.String())
	}
	golden(t, "plan", c.stdout.String())

	c = b.godwit("plan", "alpha:412", "beta", "--external", "role:stdout=proxy", "-o", "json")
	if code := c.wait(t); code != 0 {
		t.Fatalf("exit code %d, %s", code, c.stderr.String())
	}
	var d planDoc
	if err := json.Unmarshal([]byte(c.stdout.String()), &d); err != nil {
		t.Fatalf("%v: %s", err, c.stdout.String())
	}
	got := map[string]string{}
	for _, o := range d.Objects {
		got[o.Link] = strings.TrimSpace(o.Presence + " " + o.Carry + " " + o.Resolver + " " + o.Argument + " " + o.Origin)
	}
	want := map[string]string{
		"/dev/null": "same path", "pipe:[77]": "external proxy  --external", "/var/log/redis.log": "missing external path /srv/log/redis.log agent.toml:12:1",
		"/usr/bin/redis-server": "differs path", "anon_inode:[eventpoll]": "image",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	if alpha.wasCalled("start") || beta.wasCalled("prepare") {
		t.Error("a plan touches nothing")
	}
	if recs, err := b.records.List(t.Context()); err != nil || len(recs) != 0 {
		t.Errorf("a plan left records: %v, %v", recs, err)
	}
}

// TestMigrateResolved: what rules and entries make external is declared to the source and
// handed to the destination; what nothing provides is refused with all else.
func TestMigrateResolved(t *testing.T) {
	b := newBus(t)
	alpha, beta := b.agent("alpha"), b.agent("beta")
	alpha.objects, beta.resolved = openThings(), resolveThings
	beta.fail[atPrepare] = &wire.Failure{Code: wire.Code_CODE_REFUSED, Message: "no room", Problems: []*wire.Problem{{Reason: "the port is taken"}}}
	c := b.godwit("migrate", "alpha:412", "beta")
	if code := c.wait(t); code != wire.ExitRefused {
		t.Errorf("exit code %d", code)
	}
	for _, s := range []string{"on alpha: the pipe is also held by pid 1", "declare it external", "on beta: the port is taken"} {
		if !strings.Contains(c.stderr.String(), s) {
			t.Errorf("the refusal does not say %q: %s", s, c.stderr.String())
		}
	}
	// What cannot be declared is no reason to be silent of the destination, either.
	alpha.fail[atPreflight] = &wire.Failure{Code: wire.Code_CODE_REFUSED, Message: "no way", Problems: []*wire.Problem{{Reason: "it holds a lease"}}}
	for _, command := range []string{"migrate", "plan"} {
		c = b.godwit(command, "alpha:412", "beta")
		if code := c.wait(t); code != wire.ExitRefused {
			t.Errorf("%s: exit code %d", command, code)
		}
		for _, s := range []string{"on alpha: it holds a lease", "on alpha: the pipe is also held by pid 1", "on beta: the port is taken"} {
			if !strings.Contains(c.stderr.String(), s) {
				t.Errorf("%s: the refusal does not say %q: %s", command, s, c.stderr.String())
			}
		}
	}
	delete(alpha.fail, atPreflight)
	if alpha.wasCalled("start") || beta.wasCalled("prepare") {
		t.Error("something was touched")
	}
	delete(beta.fail, atPrepare)
	c = b.godwit("migrate", "alpha:412", "beta", "--external", "role:stdout=proxy")
	if code := c.wait(t); code != 0 {
		t.Fatalf("exit code %d, %s", code, c.stderr.String())
	}
	alpha.mu.Lock()
	defer alpha.mu.Unlock()
	if diff := cmp.Diff([]string{"file[2a:10]", "pipe[77]"}, alpha.declared); diff != "" {
		t.Errorf("declared (-want +got):\n%s", diff)
	}
	beta.mu.Lock()
	defer beta.mu.Unlock()
	if len(beta.handed) != 2 || beta.handed[1].Resolver != "proxy" {
		t.Errorf("handed to the destination: %v", beta.handed)
	}
}

// TestPlanCarried: a plan says what becomes of the places to which content travels.
func TestPlanCarried(t *testing.T) {
	file := func(mtime int64) *wire.OpenObject {
		return &wire.OpenObject{Key: "file[1:2]", Kind: "regular", Path: "/srv/a", Size: 2000, MtimeNs: mtime, Carry: "path"}
	}
	dir := file(0)
	dir.Kind = "directory"
	travels := &wire.Requirements{Files: []*wire.RequiredFile{{Path: "/srv/other"}, {Path: "/new/a", Carried: true}}}
	for _, c := range []struct {
		name string
		o    *wire.OpenObject
		have *wire.FileState
		req  *wire.Requirements
		want string
	}{
		{"nothing is there", file(0), nil, travels, "made: with its content, 1.95 KiB"},
		{"a directory", dir, nil, travels, "made: with its content, unless it is there"},
		{"the same", file(5), &wire.FileState{Size: 2000, MtimeNs: 9}, &wire.Requirements{Files: []*wire.RequiredFile{{Path: "/new/a"}}}, "kept: it has the same content"},
		{"an older one", file(5), &wire.FileState{MtimeNs: 4}, travels, "replaced: with its content, 1.95 KiB"},
		{"a newer one", file(5), &wire.FileState{MtimeNs: 6}, travels, "replaced: with its content, 1.95 KiB, although it is newer"},
		{"a refused tree", file(5), &wire.FileState{MtimeNs: 4}, nil, "replaced: with its content, 1.95 KiB"},
	} {
		s := &survey{req: c.req, objects: []*wire.OpenObject{c.o}, presences: []*wire.Presence{{Path: "/srv/a", State: "missing"}},
			resolutions: []*wire.Resolution{{Key: "file[1:2]", Resolver: "carry", Argument: "/new/a", Have: c.have}}}
		if got := newPlanDoc(&wire.Record{}, s).Objects[0].presenceText(); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
