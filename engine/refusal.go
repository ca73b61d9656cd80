package engine

import "godwit/engine/refuse"

// Refusal lists every object that cannot be carried. Nothing was touched.
type Refusal = refuse.Refusal

// Problem is one object of a Refusal.
type Problem = refuse.Problem
