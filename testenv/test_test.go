package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSplit(t *testing.T) {
	for _, tc := range []struct {
		name            string
		args            []string
		flags, packages []string
	}{
		{"nothing", nil, nil, nil},
		{"flags", []string{"-run", "X", "-v"}, []string{"-run", "X", "-v"}, nil},
		{"packages", []string{"-v", "./engine/...", "godwit/wire"}, []string{"-v"}, []string{"./engine/...", "godwit/wire"}},
		{"arguments of the tests", []string{"./wire", "-args", "./not-a-package"}, []string{"-args", "./not-a-package"}, []string{"./wire"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			flags, packages := split(tc.args)
			if diff := cmp.Diff(tc.flags, flags); diff != "" {
				t.Errorf("flags (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.packages, packages); diff != "" {
				t.Errorf("packages (-want +got):\n%s", diff)
			}
		})
	}
}
