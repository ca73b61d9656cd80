package configs

import (
	"strings"

	"godwit/configs/external"
)

// nearest returns the known name that was probably meant by name, or "".
// A name that is right up to its table counts as near: "window" for
// "limits.window".
func nearest(name string, known []string) string {
	best, found := len(name)/3+2, ""
	for _, k := range known {
		d := external.Distance(name, k)
		if i := strings.LastIndexByte(k, '.'); i >= 0 {
			last := k[i+1:]
			mine := name[strings.LastIndexByte(name, '.')+1:]
			if e := external.Distance(mine, last) + 1; len(mine) > 2 && e < d {
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
