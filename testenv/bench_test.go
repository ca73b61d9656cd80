package main

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestBench runs the smallest benchmark: it succeeds, and its figures are there.
func TestBench(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cases := slices.DeleteFunc(benchCases(true), func(c benchCase) bool { return c.name != "tiny" })
	var out bytes.Buffer
	doc, err := runBench(ctx, &out, cases, true)
	if err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	if len(doc.Rows) != 1 || !doc.Rows[0].Verified || doc.Rows[0].QuietGapMS <= 0 || doc.Rows[0].MemcpyRate <= 0 || doc.Rows[0].TCPRate <= 0 {
		t.Errorf("rows are %+v", doc.Rows)
	}
	const want = 3
	for _, r := range doc.Rows {
		if len(r.Moves) != want {
			t.Errorf("%d moves, want %d", len(r.Moves), want)
		}
		for _, m := range r.Moves {
			if m.GapMS <= 0 || m.TotalMS < m.GapMS || m.SentBytes == 0 || m.Source.PeakRSSBytes == 0 || m.Destination.PeakRSSBytes == 0 || m.TotalPerTCP <= 0 || !json.Valid(m.Report) {
				t.Errorf("%s: %+v", m.Mode, m)
			}
			if !strings.Contains(out.String(), "| "+m.Mode) {
				t.Errorf("the table has no line for %s:\n%s", m.Mode, &out)
			}
		}
	}
}

func TestBenchNames(t *testing.T) {
	if err := bench(t.Context(), []string{"nonsense"}); err == nil || !strings.Contains(err.Error(), "dirty-50") {
		t.Errorf("an unknown name gives %v, want one that lists all names", err)
	}
	names := benchNames(benchCases(false))
	slices.Sort(names)
	if len(slices.Compact(names)) != len(benchCases(false)) {
		t.Errorf("two benchmarks have one name: %v", names)
	}
}
