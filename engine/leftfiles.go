package engine

import (
	"godwit/engine/files"
)

// Waiting is a file that is placed when its tree is let go (Standing.Waiting).
type Waiting = files.Waiting

// MarkOf is the mark of the files of a migration (RestoreOptions.Mark).
func MarkOf(id string) string { return files.MarkOf(id) }

// TempName makes a name with a mark, for what waits beside its place.
func TempName(mark string) string { return files.TempName(mark) }

// RemoveMarked removes the files with a mark that wait in and above the places of a
// tree. It is for the agent that follows one that was killed.
func RemoveMarked(mark string, places []Place) error { return files.RemoveMarked(mark, places) }

// RemoveMade removes directories, if they are empty, and the like that
// RestoreOptions.Note told of.
func RemoveMade(paths []string) error { return files.RemoveMade(paths) }

// UndoWaiting removes files that a tree was let go with, or would have been; what they
// replaced is there again.
func UndoWaiting(ws []Waiting) error { return files.UndoWaiting(ws) }

// EndWaiting removes what the files have replaced.
func EndWaiting(ws []Waiting) error { return files.EndWaiting(ws) }
