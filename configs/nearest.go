package configs

import "strings"

// nearest returns the known name that was probably meant by name, or "".
// A name that is right up to its table counts as near: "window" for
// "limits.window".
func nearest(name string, known []string) string {
	best, found := len(name)/3+2, ""
	for _, k := range known {
		d := distance(name, k)
		if i := strings.LastIndexByte(k, '.'); i >= 0 {
			last := k[i+1:]
			mine := name[strings.LastIndexByte(name, '.')+1:]
			if e := distance(mine, last) + 1; len(mine) > 2 && e < d {
				d = e
			}
		}
		if d < best {
			best, found = d, k
		}
	}
	return found
}

func didYouMean(near string) string {
	if near == "" {
		return ""
	}
	return "; did you mean " + near + "?"
}

// distance is Levenshtein's, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
