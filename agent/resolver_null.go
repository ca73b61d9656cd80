package agent

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/wire"
)

// resolverNull puts /dev/null in the place of whatever is read or written.
var resolverNull = resolver{serves: servesNull, hold: holdNull}

func servesNull(o *wire.OpenObject, _ external.Entry) error {
	if r := standsOn(o); r != "" {
		return fmt.Errorf("/dev/null cannot be the %s of a process", r)
	}
	switch o.Kind {
	case "directory", "tty": // a terminal has a size, modes and a session
		return fmt.Errorf("/dev/null cannot stand for a %s", o.Kind)
	}
	return nil
}

// standsOn is a use of an object that only a file of its kind with its content
// has: as a mapping, a program, a directory; or "".
func standsOn(o *wire.OpenObject) string {
	for _, h := range o.Holders {
		for _, r := range []string{"mapping", "exe", "cwd", "root"} {
			if slices.Contains(h.Roles, r) {
				return r
			}
		}
	}
	return ""
}

func holdNull(_ context.Context, q *holdRequest) (*held, error) {
	f, err := openFile("/dev/null", unix.O_RDWR) // from which each description is opened
	if err != nil {
		return nil, err
	}
	return &held{file: f, anyKind: true}, nil
}
