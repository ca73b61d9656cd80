package setup

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMissing(t *testing.T) {
	for _, tc := range []struct {
		name  string
		needs []Need
		want  []string
	}{
		{"nothing needed", nil, nil},
		{"present", []Need{{"sh", "dash", ""}, {"/bin/sh", "dash", ""}}, nil},
		{"no program", []Need{{"no-such-program", "a", ""}, {"sh", "dash", ""}}, []string{"a"}},
		{"no file", []Need{{"/no/such/file", "b", ""}}, []string{"b"}},
		{"one package once", []Need{{"/no/such/file", "b", ""}, {"no-such-program", "b", ""}, {"/no/other", "c", ""}}, []string{"b", "c"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, n := range Missing(tc.needs) {
				got = append(got, n.Package)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestTail(t *testing.T) {
	if diff := cmp.Diff("c\nd", tail("a\nb\nc\nd\n", 2)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff("a", tail("a\n", 2)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
