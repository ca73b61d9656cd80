package engine

import (
	"godwit/engine/files"
	"godwit/engine/plan"
)

// Presence says what this host has at the path of an object of another one.
func Presence(o plan.Object) (state string, differences []string) { return files.Presence(o) }
