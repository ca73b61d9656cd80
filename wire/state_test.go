package wire

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var allStates = []State{
	State_STATE_UNSPECIFIED, State_STATE_REQUESTED, State_STATE_PREFLIGHT, State_STATE_PRE_COPYING, State_STATE_FREEZING,
	State_STATE_FINAL_COPYING, State_STATE_RESTORING, State_STATE_STAGED, State_STATE_HANDING_OFF, State_STATE_COMPLETED,
	State_STATE_ABORTING, State_STATE_ABORTED, State_STATE_RETURNING, State_STATE_STUCK, State_STATE_PAGING,
}

// TestMovesEveryPair walks every pair of states and every role and compares
// with the transitions written down a second time, by role.
func TestMovesEveryPair(t *testing.T) {
	if len(allStates) != len(State_name) {
		t.Fatalf("the test knows %d states, the protocol has %d", len(allStates), len(State_name))
	}
	want := map[Role][]string{
		RoleCoordinator: {
			"REQUESTED>PREFLIGHT", "REQUESTED>ABORTING", "REQUESTED>ABORTED", "PREFLIGHT>ABORTING", "PREFLIGHT>ABORTED",
			"PRE_COPYING>ABORTING", "FREEZING>ABORTING", "FINAL_COPYING>ABORTING", "RESTORING>ABORTING", "STAGED>ABORTING",
			"HANDING_OFF>STUCK", "ABORTING>ABORTED", "STUCK>RETURNING", "PAGING>RETURNING",
		},
		RoleSource: {
			"REQUESTED>ABORTING", "REQUESTED>ABORTED", "PREFLIGHT>PRE_COPYING", "PREFLIGHT>FREEZING", "PREFLIGHT>ABORTING", "PREFLIGHT>ABORTED",
			"PRE_COPYING>FREEZING", "PRE_COPYING>ABORTING", "PRE_COPYING>ABORTED", "FREEZING>FINAL_COPYING", "FREEZING>ABORTING", "FREEZING>ABORTED",
			"FINAL_COPYING>ABORTING", "FINAL_COPYING>ABORTED", "RESTORING>ABORTING", "RESTORING>ABORTED", "STAGED>ABORTING", "STAGED>ABORTED",
			"HANDING_OFF>STUCK", "ABORTING>ABORTED", "RETURNING>ABORTED",
		},
		RoleDestination: {
			"REQUESTED>ABORTING", "REQUESTED>ABORTED", "PREFLIGHT>ABORTING", "PREFLIGHT>ABORTED", "PRE_COPYING>ABORTING", "PRE_COPYING>ABORTED",
			"FREEZING>ABORTING", "FREEZING>ABORTED", "FINAL_COPYING>RESTORING", "FINAL_COPYING>ABORTING", "FINAL_COPYING>ABORTED",
			"RESTORING>STAGED", "RESTORING>ABORTING", "RESTORING>ABORTED", "STAGED>HANDING_OFF", "STAGED>ABORTING", "STAGED>ABORTED",
			"HANDING_OFF>COMPLETED", "HANDING_OFF>PAGING", "HANDING_OFF>RETURNING", "ABORTING>ABORTED", "STUCK>COMPLETED", "STUCK>PAGING", "STUCK>RETURNING", "PAGING>COMPLETED",
		},
	}
	for role := Role(0); role <= RoleDestination+1; role++ {
		var got []string
		for _, from := range allStates {
			for _, to := range allStates {
				if CanMove(from, to, role) {
					got = append(got, from.Phase()+">"+to.Phase())
				}
			}
		}
		w := slices.Clone(want[role])
		slices.Sort(w)
		slices.Sort(got)
		if d := cmp.Diff(w, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", role, d)
		}
	}
}

// TestMovesRules checks what the handoff's one rule asks of the table.
func TestMovesRules(t *testing.T) {
	for _, from := range allStates {
		for _, to := range allStates {
			for _, by := range []Role{RoleCoordinator, RoleSource, RoleDestination} {
				if !CanMove(from, to, by) {
					continue
				}
				name := fmt.Sprintf("%s makes %s %s", by, from.Word(), to.Word())
				if Terminal(from) {
					t.Errorf("%s: a migration that is over moves", name)
				}
				if from == State_STATE_UNSPECIFIED || to == State_STATE_UNSPECIFIED || from == to {
					t.Errorf("%s: not a move", name)
				}
				if !Committed(from) && Committed(to) && (by != RoleDestination || from != State_STATE_STAGED || to != State_STATE_HANDING_OFF) {
					t.Errorf("%s: a commit that is not the destination's from staged to handing off", name)
				}
				if Committed(from) && !Committed(to) && (from != State_STATE_RETURNING || by != RoleSource) {
					t.Errorf("%s: leaves the commit by another way than returning", name)
				}
			}
		}
	}
	// From every state that is entered, the migration can end.
	for _, s := range allStates[1:] {
		seen := map[State]bool{}
		var end func(State) bool
		end = func(s State) bool {
			if Terminal(s) {
				return true
			}
			if seen[s] {
				return false
			}
			seen[s] = true
			for to := range moves[s] {
				if end(to) {
					return true
				}
			}
			return false
		}
		if !end(s) {
			t.Errorf("%s never ends", s.Word())
		}
	}
}

func TestRecordMove(t *testing.T) {
	at := func(ms int64) time.Time { return time.UnixMilli(ms) }
	r := &Record{Id: "m1"}
	r.Start("coordinator", at(1))
	for i, m := range []struct {
		to  State
		by  Role
		who string
	}{
		{State_STATE_PREFLIGHT, RoleCoordinator, "coordinator"},
		{State_STATE_FREEZING, RoleSource, "alpha"},
		{State_STATE_FINAL_COPYING, RoleSource, "alpha"},
		{State_STATE_RESTORING, RoleDestination, "beta"},
		{State_STATE_STAGED, RoleDestination, "beta"},
		{State_STATE_HANDING_OFF, RoleDestination, "beta"},
	} {
		if r.Owner != Owner_OWNER_SOURCE {
			t.Fatalf("the destination owns the tree in %s", r.State.Word())
		}
		if err := r.Move(m.to, m.by, m.who, at(int64(i+2))); err != nil {
			t.Fatal(err)
		}
	}
	if r.Owner != Owner_OWNER_DESTINATION || len(r.Steps) != 7 {
		t.Errorf("after the commit: %v", r)
	}
	if s := r.Steps[6]; s.State != State_STATE_HANDING_OFF || s.By != "beta" || s.UnixMs != 7 {
		t.Errorf("last step: %v", s)
	}
	err := r.Move(State_STATE_ABORTED, RoleSource, "alpha", at(9))
	if CodeOf(err) != Code_CODE_CONFLICT || r.State != State_STATE_HANDING_OFF || len(r.Steps) != 7 {
		t.Errorf("abort after the commit: %v, state %s", err, r.State.Word())
	}
	if want := "migration m1 is handing off and the source cannot make it aborted"; err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	if err := r.Move(State_STATE_RETURNING, RoleDestination, "beta", at(10)); err != nil || r.Owner != Owner_OWNER_SOURCE {
		t.Errorf("returning: %v, owner %s", err, r.Owner)
	}
	if err := r.Move(State_STATE_ABORTED, RoleSource, "alpha", at(11)); err != nil {
		t.Error(err)
	}
	if err := r.Move(State_STATE_FREEZING, RoleSource, "alpha", at(12)); CodeOf(err) != Code_CODE_ABORTED {
		t.Errorf("move of an aborted migration: %v", err)
	}
}

func TestStateWords(t *testing.T) {
	got := []string{State_STATE_PRE_COPYING.Word(), State_STATE_FINAL_COPYING.Word(), State_STATE_FREEZING.Phase(), State(99).Word()}
	if d := cmp.Diff([]string{"pre-copying", "final copying", "FREEZING", "state 99"}, got); d != "" {
		t.Error(d)
	}
}
