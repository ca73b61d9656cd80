package agent

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// FailpointEnv names a point, POINT=kill or POINT=stop, at which the daemon gets
// SIGKILL or SIGSTOP, once: for tests of what becomes of trees then.
const FailpointEnv = "GODWIT_FAILPOINT"

// Failpoints are the points, in the order in which a migration passes them: after
// each step that others can see.
var Failpoints = []string{
	"destination.prepared", // it was checked, and files are held
	"source.begun",         // the record says Freezing, or PreCopying
	"source.followed",      // pre-copy: what the tree writes is noted
	"destination.outlined", // pre-copy: memory is about to come
	"source.precopied",     // pre-copy: memory has been sent
	"source.frozen",
	"source.copying",      // the record says FinalCopying
	"source.dumped",       // all of the tree was read
	"source.noted",        // it is in the journal
	"source.held",         // it stays frozen without the agent
	"destination.paging",  // post-copy: what it misses is served
	"destination.built",   // the tree stands
	"source.sent",         // all of it has been applied
	"destination.staged",  // the record says so
	"destination.noted",   // the tree is in the journal
	"destination.handing", // the record says HandingOff: the commit
	"destination.ran",     // the tree was let go
	"destination.completed",
	"source.completed", // the outcome is known
	"source.discarded", // the frozen copy is gone
}

// failpoint reads what FailpointEnv says; nil: nothing.
func failpoint(spec string) (func(string), error) {
	if spec == "" {
		return nil, nil
	}
	name, action, _ := strings.Cut(spec, "=")
	signal, ok := map[string]unix.Signal{"kill": unix.SIGKILL, "stop": unix.SIGSTOP}[action]
	if !ok || !slices.Contains(Failpoints, name) {
		return nil, fmt.Errorf("%s=%s: want POINT=kill or POINT=stop, where POINT is one of %s", FailpointEnv, spec, strings.Join(Failpoints, ", "))
	}
	return func(at string) {
		if at == name {
			_ = unix.Kill(os.Getpid(), signal)
			if signal == unix.SIGKILL {
				select {} // it comes at once, but no step is to follow
			}
		}
	}, nil
}

// point passes a failpoint.
func (s *session) point(name string) {
	if f := s.a.cfg.Failpoint; f != nil {
		f(s.role.String() + "." + name)
	}
}
