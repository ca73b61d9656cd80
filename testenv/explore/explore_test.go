package explore

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"godwit/agent/handoff"
	"godwit/wire"
)

var (
	update = flag.Bool("update", false, "write the golden files")
	traces = flag.Bool("traces", false, "print how each planted bug is noticed")
)

// TestExplore walks every way in which a migration can go, to where no new state appears.
func TestExplore(t *testing.T) {
	for _, paged := range []bool{false, true} {
		f := newModel(paged).explore()
		t.Logf("post-copy %v: %d states, %d steps", paged, f.states, f.steps)
		if f.problem != "" {
			t.Errorf("%s:\n%s", f.problem, strings.Join(f.trace, "\n"))
		}
		if f.states < 100_000 {
			t.Errorf("%d states only: something is not explored", f.states)
		}
	}
}

// TestPlanted plants bugs, which the exploration must notice.
func TestPlanted(t *testing.T) {
	type step = handoff.Step
	source := func(s handoff.State, e handoff.Event, to step) func(*model) {
		return func(m *model) { m.source = with(m.source, s, e, to) }
	}
	dest := func(s handoff.State, e handoff.Event, to step) func(*model) {
		return func(m *model) { m.dest = with(m.dest, s, e, to) }
	}
	for _, tt := range []struct {
		bug   string
		paged bool
		plant func(*model)
		want  string
	}{
		{"a commit without compare-and-set", false, func(m *model) { m.plant.noCompare = true }, "two copies run"},
		{"a thaw after the end was sent, without reading the record", false, source(handoff.Offering, handoff.Failed, step{To: handoff.Retreating, Do: handoff.Thaw}), "two copies run"},
		{"a kill of the source's copy before Completed", false, source(handoff.Waiting, handoff.SawHanding, step{To: handoff.Discarding, Do: handoff.Kill}), "before Completed"},
		{"a thaw on HandingOff", false, source(handoff.Ending, handoff.SawHanding, step{To: handoff.Resuming, Do: handoff.Thaw}), "two copies run"},
		{"a recovery that says Completed without looking", false, dest(handoff.Answering, handoff.SawHanding, step{To: handoff.Telling, Do: handoff.Complete}), "Completed promises"},
		{"a source that forgets its second hold", false, func(m *model) { m.plant.noHold = true }, "two copies run"},
		{"a destination that runs after an undecided compare-and-set", false, func(m *model) { m.plant.runUndecided = true }, "two copies run"},
		{"a restarted source that lets the tree run at once", false, source(handoff.Down, handoff.FoundTree, step{To: handoff.Retreating, Do: handoff.Thaw}), "two copies run"},
		{"a destination that commits before its tree is in the journal", false, func(m *model) { m.plant.commitUnnoted = true }, "no way leads"},
		{"a restarted destination that is done when a commit comes late", false, dest(handoff.Aborting, handoff.Overtaken, step{To: handoff.Over, Do: handoff.End}), "no way leads"},
		{"a restarted destination that keeps an overruled copy", false, dest(handoff.Telling, handoff.Overruled, step{To: handoff.Over, Do: handoff.End}), "no way leads"},
		{"a source that forgets a tree that it could not let the record know of", false, source(handoff.Concluding, handoff.Untold, step{To: handoff.Over, Do: handoff.End}), "no way leads"},
		{"a coordinator that says Aborted of a tree that could not be let go", false, func(m *model) {
			m.settles = func(s wire.State, _ wire.Code) bool { return s == wire.State_STATE_ABORTING }
		}, "Aborted promises"},
		{"a pager that lets go before all memory is there", true, func(m *model) { m.plant.looseMemory = true }, "Completed promises"},
		{"a pager that gives up without ending the tree", true, func(m *model) {
			m.pager = with(m.pager, handoff.Filling, handoff.Failed, step{To: handoff.Over, Do: handoff.End})
		}, "zeros"},
		{"a pager that says Completed before the tree may run", true, func(m *model) { m.plant.eager = true }, "Completed promises"},
		{"a tree that is killed before its pager's last word is ruled out", true, dest(handoff.Paging, handoff.PagerGone, step{To: handoff.Lost, Do: handoff.Kill}), "no way leads"},
		{"a source without its tree that waits in silence", true, source(handoff.Empty, handoff.SawPaging, step{To: handoff.Empty, Do: handoff.Await}), "no way leads"},
	} {
		t.Run(tt.bug, func(t *testing.T) {
			m := newModel(tt.paged)
			tt.plant(m)
			f := m.explore()
			if !strings.Contains(f.problem, tt.want) {
				t.Fatalf("after %d states: %q, want %q\n%s", f.states, f.problem, tt.want, strings.Join(f.trace, "\n"))
			}
			t.Logf("noticed after %d states, in %d steps: %s", f.states, len(f.trace)-1, f.problem)
			if *traces {
				t.Logf("\n%s", strings.Join(f.trace, "\n"))
			}
		})
	}
}

// calm says whether a step is none by which a migration fails of itself.
func calm(s step) bool {
	for _, bad := range []string{"failed", "refused", "untold", "work ended", "aborts", "is started", "says stuck"} {
		if strings.HasSuffix(s.what, bad) {
			return bad == "is started"
		}
	}
	return s.kind == good
}

// path is a shortest way from a world to one that is as wanted, by steps that may be made.
func (m *model) path(from world, wanted func(world) bool, may func(step) bool) (out []string, worlds []world, ok bool) {
	type came struct {
		from world
		what string
	}
	seen := map[world]came{from: {}}
	for queue := []world{from}; len(queue) > 0; queue = queue[1:] {
		w := queue[0]
		if wanted(w) {
			for ; w != from; w = seen[w].from {
				out, worlds = append(out, seen[w].what), append(worlds, w)
			}
			slices.Reverse(out)
			slices.Reverse(worlds)
			return out, worlds, true
		}
		for _, s := range m.next(w) {
			if _, old := seen[s.to]; !old && may(s) {
				seen[s.to] = came{w, s.what}
				queue = append(queue, s.to)
			}
		}
	}
	return nil, nil, false
}

// TestTranscripts writes down how migrations go: with nothing in the way, and with each
// party that ends them, dies, or is declared dead in each phase.
func TestTranscripts(t *testing.T) {
	var b strings.Builder
	for _, paged := range []bool{false, true} {
		m := newModel(paged)
		completed := func(w world) bool { return w.state() == wire.State_STATE_COMPLETED && m.ended(w) }
		steps, worlds, ok := m.path(m.first(), completed, calm)
		if !ok {
			t.Fatal("nothing completes")
		}
		name := map[bool]string{false: "move", true: "post-copy"}[paged]
		fmt.Fprintf(&b, "# %s\n%s\n\n", name, strings.Join(steps, "\n"))
		phase := wire.State_STATE_UNSPECIFIED
		for _, w := range append([]world{m.first()}, worlds...) {
			if w.state() == phase || paged && !wire.Committed(w.state()) {
				continue
			}
			phase = w.state()
			for _, s := range slices.Clone(m.next(w)) {
				if !strings.HasSuffix(s.what, "dies: after a step") && !strings.HasSuffix(s.what, "host dies") && !strings.HasSuffix(s.what, "pager dies") &&
					!strings.HasSuffix(s.what, "is dead") && !strings.HasSuffix(s.what, "- failed") && s.what != "somebody aborts" {
					continue
				}
				fmt.Fprintf(&b, "# %s, %s: %s\n", name, phase.Word(), s.what)
				b.WriteString(m.sequel(s.to))
			}
		}
	}
	const golden = "testdata/transcripts.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// sequel tells how a migration comes to its end from a world, with as little as it takes:
// calm steps, aborts and timeouts, or an operator.
func (m *model) sequel(w world) string {
	for _, may := range []func(step) bool{calm, func(s step) bool { return s.kind == good }, func(s step) bool { return s.kind != fault }} {
		if steps, worlds, ok := m.path(w, m.ended, may); ok {
			end := w
			if len(worlds) > 0 {
				end = worlds[len(worlds)-1]
			}
			where := "the tree is lost"
			switch {
			case end.atSrc == runs:
				where = "it runs at the source"
			case end.runsAtDst():
				where = "it runs at the destination"
			}
			return fmt.Sprintf("%s\n= %s: %s\n\n", strings.Join(steps, "\n"), end.state().Word(), where)
		}
	}
	return "= an operator is told\n\n"
}
