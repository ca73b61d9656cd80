// Package refuse owns the one error type for "cannot carry this": a list of
// objects, each with its reason and a hint, collected over a whole tree before
// anything is touched. It must not know how the objects are found.
package refuse

import (
	"fmt"
	"slices"
	"strings"
)

// Problem is one object that stands in the way.
type Problem struct {
	Pid   int    // as the host sees it; 0: not about one process
	Comm  string // empty if unknown
	FD    int    // meaningful only if HasFD
	HasFD bool
	Path  string // path, or the text of the /proc link, or a mapping
	Key   string // external key in CRIU's form, if it could have one
	// Declarable: it does not stand in the way if the key is declared external.
	Declarable bool
	// Passing: it ends by itself as soon as the program does what it is about to do.
	Passing bool
	Reason  string // why it cannot be carried
	Hint    string // what to do about it, may be empty
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Pid != 0 {
		fmt.Fprintf(&b, "pid %d", p.Pid)
		if p.Comm != "" {
			fmt.Fprintf(&b, " (%s)", p.Comm)
		}
		b.WriteByte(' ')
	}
	if p.HasFD {
		fmt.Fprintf(&b, "fd %d ", p.FD)
	}
	if p.Path != "" {
		fmt.Fprintf(&b, "%s ", p.Path)
	}
	s := strings.TrimSpace(b.String())
	if p.Key != "" {
		s += " [key " + p.Key + "]"
	}
	if s != "" {
		s += ": "
	}
	s += p.Reason
	if p.Hint != "" {
		s += "; " + p.Hint
	}
	return s
}

// Refusal is the error that lists Problems. An empty one is not an error: use Err.
type Refusal struct {
	// Doing is what was refused, such as "dump of pid 12".
	Doing    string
	Problems []Problem
}

// Add appends a problem.
func (r *Refusal) Add(p Problem) { r.Problems = append(r.Problems, p) }

// Err returns r if it holds a problem, else nil.
func (r *Refusal) Err() error {
	if len(r.Problems) == 0 {
		return nil
	}
	return r
}

// Passing tells whether nothing but problems that pass stand in the way.
func (r *Refusal) Passing() bool {
	return !slices.ContainsFunc(r.Problems, func(p Problem) bool { return !p.Passing })
}

func (r *Refusal) Error() string {
	if len(r.Problems) == 1 {
		return fmt.Sprintf("%s refused, nothing was touched: %s", r.Doing, r.Problems[0])
	}
	lines := make([]string, 0, len(r.Problems))
	for _, p := range r.Problems {
		lines = append(lines, "\n  - "+p.String())
	}
	return fmt.Sprintf("%s refused, nothing was touched; %d objects stand in the way:%s", r.Doing, len(r.Problems), strings.Join(lines, ""))
}
