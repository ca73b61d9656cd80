package rules

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"godwit/wire"
)

var update = flag.Bool("update", false, "write the golden file")

// TestEveryPair compares what is decided in every state, with every sign of both agents,
// with the golden file, and sees that the record allows it.
func TestEveryPair(t *testing.T) {
	var b strings.Builder
	p := Patience{Probe: 5 * time.Second, Dead: 40 * time.Second, Orphan: 2 * time.Minute}
	verdicts := []string{"wait", "remind", "abort", "stuck", "lost"}
	words := []string{"ended", "too early", "returns", "not needed", "gives back", "rewinds", "ends", "aborts"}
	signs := []string{"unknown", "alive", "dead"}
	for i := range len(wire.State_name) - 1 {
		s := wire.State(i + 1)
		may := func(from, to wire.State) {
			if !wire.CanMove(from, to, wire.RoleCoordinator) {
				t.Errorf("%s: the record does not let a coordinator make it %s", from.Word(), to.Word())
			}
		}
		fmt.Fprintf(&b, "# %s\n", s.Word())
		to, late := Abort(s)
		fmt.Fprintf(&b, "abort: to %s, too late %v\n", to.Word(), late)
		if to != 0 {
			may(s, to)
		}
		for _, code := range []wire.Code{0, wire.Code_CODE_ABORTED, wire.Code_CODE_UNKNOWN_STATE} {
			fmt.Fprintf(&b, "%s: stuck %v, settles %v\n", code, Stuck(s, code), Settles(s, code))
			if Settles(s, code) {
				may(s, wire.State_STATE_ABORTED)
			}
		}
		for _, destination := range []bool{false, true} {
			w := Pronounce(s, destination)
			fmt.Fprintf(&b, "destination dead %v: %s", destination, words[w])
			from := s
			for _, to := range w.Steps(s) {
				may(from, to)
				fmt.Fprintf(&b, ", %s", to.Word())
				from = to
			}
			b.WriteByte('\n')
		}
		for _, silent := range []time.Duration{time.Second, 5 * time.Second, 40 * time.Second, 2 * time.Minute} {
			var all []string
			for src := range Sign(3) {
				for dst := range Sign(3) {
					v := Judge(s, silent, src, dst, p)
					if v != Wait {
						all = append(all, fmt.Sprintf("%s/%s %s", signs[src], signs[dst], verdicts[v]))
					}
					if v == MarkStuck {
						may(s, wire.State_STATE_STUCK)
					}
				}
			}
			fmt.Fprintf(&b, "silent for %s: %s\n", silent, strings.Join(all, ", "))
		}
	}
	const golden = "testdata/rules.golden"
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
