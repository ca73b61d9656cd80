package handoff

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/wire"
)

var update = flag.Bool("update", false, "write the golden files")

var machines = []*Machine{Source, Destination, Pager}

// begins are the steps that no other step leads to.
func (m *Machine) begins() []Step {
	return slices.AppendSeq([]Step{m.First}, maps.Values(m.Steps[Down]))
}

// reached are all steps that a session may make.
func (m *Machine) reached() map[Step]bool {
	seen := map[Step]bool{}
	todo := m.begins()
	for len(todo) > 0 {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[s] || s.Do == End || s.Do == Keep {
			continue
		}
		seen[s] = true
		for _, e := range m.Outcomes[s.Do] {
			if next, ok := m.On(s.To, e); ok {
				todo = append(todo, next)
			}
		}
	}
	return seen
}

// TestEveryOutcome: whatever comes of an action, the state in which it is carried out
// knows what follows; and nothing stands in a table that no action leads to.
func TestEveryOutcome(t *testing.T) {
	for _, m := range machines {
		used := map[State]map[Event]bool{}
		for s := range m.reached() {
			if _, ok := m.Outcomes[s.Do]; !ok {
				t.Errorf("%s: %q has no outcomes", m.Name, s.Do)
			}
			if used[s.To] == nil {
				used[s.To] = map[Event]bool{}
			}
			for _, e := range m.Outcomes[s.Do] {
				if _, ok := m.On(s.To, e); !ok {
					t.Errorf("%s: %q in %q may end with %q, of which the table says nothing", m.Name, s.Do, s.To, e)
				}
				used[s.To][e] = true
			}
		}
		for s, row := range m.Steps {
			for e := range row {
				if s != Down && !used[s][e] {
					t.Errorf("%s: nothing leads to %q by %q", m.Name, s, e)
				}
			}
		}
	}
}

// TestEveryPair compares every pair of state and event with the golden file. Pairs that are
// not there are none that a party can meet.
func TestEveryPair(t *testing.T) {
	var b strings.Builder
	for _, m := range machines {
		fmt.Fprintf(&b, "# %s: begins %s / %s\n", m.Name, m.First.To, m.First.Do)
		events := map[Event]bool{}
		for _, row := range m.Steps {
			for e := range row {
				events[e] = true
			}
		}
		met := 0
		for _, s := range slices.Sorted(maps.Keys(m.Steps)) {
			for _, e := range slices.Sorted(maps.Keys(events)) {
				if next, ok := m.On(s, e); ok {
					met++
					fmt.Fprintf(&b, "%-12s %-14s → %s / %s\n", s, e, next.To, next.Do)
				}
			}
		}
		fmt.Fprintf(&b, "%d of %d pairs\n\n", met, len(m.Steps)*len(events))
	}
	golden(t, "testdata/tables.golden", b.String())
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestRule checks what the one rule of the handoff asks of the tables.
func TestRule(t *testing.T) {
	for s := range Source.reached() {
		switch {
		case s.Do == Kill && s.To != Discarding:
			t.Errorf("source: kills in %q", s.To)
		case s.Do == Thaw && s.To != Retreating && s.To != Resuming:
			t.Errorf("source: thaws in %q", s.To)
		}
	}
	for s, row := range Source.Steps {
		for e, next := range row {
			if next.Do == Kill && e != SawComplete {
				t.Errorf("source: %q kills because of %q", s, e)
			}
			if next.To == Resuming && e != SawAborting && e != SawAborted && e != SawReturned {
				t.Errorf("source: %q thaws because of %q", s, e)
			}
			if next.To == Retreating && s != Copying && s != Securing && (s != Down || e != FoundLoose) {
				t.Errorf("source: %q retreats, where the destination may have all of the tree", s)
			}
		}
	}
	for s, row := range Destination.Steps {
		for e, next := range row {
			if next.Do == Run && e != Owner {
				t.Errorf("destination: %q runs the tree because of %q", s, e)
			}
		}
	}
}

func TestSight(t *testing.T) {
	for s := range wire.State_name {
		for _, c := range []wire.Code{0, wire.Code_CODE_ABORTED, wire.Code_CODE_UNKNOWN_STATE} {
			saw := Sight(wire.State(s), c)
			if got := saw != SawOpen && saw != SawAborting && saw != SawAborted; got != wire.Committed(wire.State(s)) {
				t.Errorf("%s, %s: %s", wire.State(s), c, saw)
			}
			if MayComplete(saw) != (wire.State(s) == wire.State_STATE_PAGING) {
				t.Errorf("%s, %s: a pager may complete: %v", wire.State(s), c, MayComplete(saw))
			}
		}
	}
}
