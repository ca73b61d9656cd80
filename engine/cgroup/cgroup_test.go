package cgroup

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"google.golang.org/protobuf/proto"
)

func TestPlace(t *testing.T) {
	for _, tc := range []struct {
		root, group, to, want string
	}{
		{"/a/b", "/a/b", "/n", "/n"},
		{"/a/b", "/a/b/c", "/n", "/n/c"},
		{"/a/b", "/a/bc", "/n", "/a/bc"},
		{"/", "/x", "/n", "/n/x"},
		{"/", "/", "/n", "/n"},
		{"/a", "/a/c", "", "/a/c"},
	} {
		r := &Restorer{root: Set{"memory": tc.root}}
		if tc.to != "" {
			r.o.Roots = map[string]string{"*": tc.to}
		}
		if got := r.place("memory", tc.group); got != tc.want {
			t.Errorf("root %s, group %s, to %s: %s, want %s", tc.root, tc.group, tc.to, got, tc.want)
		}
	}
}

// TestHostile: images cannot name groups outside of a hierarchy, nor other files.
func TestHostile(t *testing.T) {
	e := &cgroup.CgroupEntry{Sets: []*cgroup.CgSetEntry{{Id: proto.Uint32(1), Ctls: []*cgroup.CgMemberEntry{
		{Name: proto.String("memory"), Path: proto.String("/../../etc")}}}}}
	if _, err := New(e, 1, Options{}); err == nil {
		t.Error("a path that leads out is taken")
	}
	if _, err := New(&cgroup.CgroupEntry{}, 1, Options{}); err == nil {
		t.Error("a set that is not there is taken")
	}
	for _, name := range []string{"../../x", "cgroup.procs", "cgroup.kill", ""} {
		if err := set(t.TempDir(), []*cgroup.CgroupPropEntry{{Name: proto.String(name), Value: proto.String("1")}}); err == nil {
			t.Errorf("%q is set", name)
		}
	}
}

func FuzzSet(f *testing.F) {
	f.Add([]byte("9:name=systemd:/\n4:memory:/a/b\n0::/x:y\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSet(b)
		if err == nil && len(s) == 0 {
			t.Error("a task is in no hierarchy")
		}
	})
}
