package coordinator

import (
	"strings"
	"testing"

	"godwit/wire"
)

// TestResolution: for every state, whether the word that a host is dead changes anything,
// and that the steps which it takes are allowed.
func TestResolution(t *testing.T) {
	const (
		done  = "has ended already"
		early = "has not committed"
		owned = "does not need alpha"
	)
	for state, want := range map[wire.State][2]string{ // for the source, for the destination
		wire.State_STATE_REQUESTED:     {"", early},
		wire.State_STATE_PREFLIGHT:     {"", early},
		wire.State_STATE_PRE_COPYING:   {"", early},
		wire.State_STATE_FREEZING:      {"", early},
		wire.State_STATE_FINAL_COPYING: {"", early},
		wire.State_STATE_RESTORING:     {"", early},
		wire.State_STATE_STAGED:        {"", early},
		wire.State_STATE_ABORTING:      {"", early},
		wire.State_STATE_HANDING_OFF:   {owned, ""},
		wire.State_STATE_STUCK:         {owned, ""},
		wire.State_STATE_RETURNING:     {owned, "lets the tree run already"},
		wire.State_STATE_COMPLETED:     {done, done},
		wire.State_STATE_ABORTED:       {done, done},
	} {
		for i, destination := range []bool{false, true} {
			r := &wire.Record{Id: "x", Source: "alpha", Destination: "beta", Pid: 7, State: state}
			what, err := resolution(r, destination)
			switch {
			case want[i] == "" && (err != nil || what == ""):
				t.Errorf("%s, destination %v: %q, %v", state, destination, what, err)
			case want[i] != "" && (err == nil || !strings.Contains(err.Error(), want[i]) || wire.CodeOf(err) != wire.Code_CODE_CONFLICT):
				t.Errorf("%s, destination %v: error %v, want %q", state, destination, err, want[i])
			}
			if err != nil {
				continue
			}
			if err := pronounce(r, destination, "an operator declared it dead"); err != nil {
				t.Errorf("%s, destination %v: %v", state, destination, err)
			}
			end := wire.State_STATE_ABORTED
			if destination {
				end = wire.State_STATE_RETURNING
			}
			if r.State != end || r.Reason == "" {
				t.Errorf("%s, destination %v: it is %s, want %s", state, destination, r.State, end)
			}
		}
	}
}
