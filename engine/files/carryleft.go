package files

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// An agent that is killed leaves the files that it made for a tree. What waited
// beside its place is told by its name, what was placed by its inode.

// MarkOf is the mark of what belongs to a migration.
func MarkOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:8])
}

// Waiting is a file that is placed when its tree is let go.
type Waiting struct {
	Dir  string `json:"dir"`
	Name string `json:"name"` // that it is to have
	Temp string `json:"temp"` // that it has before, and what it replaced has afterwards
	Ino  uint64 `json:"ino"`
	Keep bool   `json:"keep,omitempty"` // what is there stays, since it is the same
}

// Waiting lists the files that Place places. It may be called on nil.
func (c *Carried) Waiting() ([]Waiting, error) {
	if c == nil {
		return nil, nil
	}
	var out []Waiting
	for _, x := range c.all {
		if x.placed {
			continue
		}
		w := Waiting{Dir: filepath.Dir(x.path()), Name: x.name, Temp: x.temp, Keep: x.keep}
		err := x.in(func(dir int) error {
			var st unix.Stat_t
			err := unix.Fstatat(dir, x.temp, &st, unix.AT_SYMLINK_NOFOLLOW)
			w.Ino = st.Ino
			return err
		})
		if err != nil {
			return nil, &os.PathError{Op: "look at", Path: filepath.Join(w.Dir, w.Temp), Err: err}
		}
		out = append(out, w)
	}
	return out, nil
}

// UndoWaiting removes the files, whether they were placed or not; what they replaced
// is there again.
func UndoWaiting(ws []Waiting) error {
	return eachWaiting(ws, func(dir int, w *Waiting) error {
		temp, err := inodeAt(dir, w.Temp)
		if err != nil {
			return err
		}
		if temp == w.Ino {
			return unix.Unlinkat(dir, w.Temp, 0)
		}
		name, err := inodeAt(dir, w.Name)
		switch {
		case err != nil || name != w.Ino: // it was not placed, or somebody has replaced it since
			return err
		case temp == 0:
			return unix.Unlinkat(dir, w.Name, 0)
		}
		if err := unix.Renameat2(dir, w.Temp, dir, w.Name, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
		return unix.Unlinkat(dir, w.Temp, 0)
	})
}

// EndWaiting removes what files that were placed have replaced.
func EndWaiting(ws []Waiting) error {
	return eachWaiting(ws, func(dir int, w *Waiting) error {
		temp, err := inodeAt(dir, w.Temp)
		if err != nil || temp == 0 || temp == w.Ino && !w.Keep {
			return err
		}
		return unix.Unlinkat(dir, w.Temp, 0)
	})
}

func eachWaiting(ws []Waiting, do func(dir int, w *Waiting) error) error {
	var errs []error
	for i := range slices.Backward(ws) {
		w := &ws[i]
		dir, err := openPath(w.Dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err == nil {
			err = do(int(dir.Fd()), w)
			_ = dir.Close()
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "tidy up", Path: filepath.Join(w.Dir, w.Name), Err: err})
		}
	}
	return errors.Join(errs...)
}

// inodeAt is the number of the inode at a name; 0: there is none.
func inodeAt(dir int, name string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return st.Ino, err
}

// RemoveMarked removes what waits with a mark in and above the places of a tree, and
// in /dev/shm.
func RemoveMarked(mark string, places []plan.Place) error {
	prefix := tempPrefix + mark + "-"
	seen := map[string]bool{}
	var errs []error
	note := func(err error) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			errs = append(errs, err)
		}
	}
	one := func(dir string) {
		if seen[dir] {
			return
		}
		seen[dir] = true
		es, err := os.ReadDir(dir)
		note(err)
		for _, e := range es {
			if strings.HasPrefix(e.Name(), prefix) && !e.IsDir() {
				note(os.Remove(filepath.Join(dir, e.Name())))
			}
		}
	}
	one(shmDir)
	for _, p := range places {
		for dir := filepath.Dir(p.Path); ; dir = filepath.Dir(dir) {
			one(dir)
			if dir == "/" || dir == "." {
				break
			}
		}
		if !p.Dir {
			continue
		}
		note(filepath.WalkDir(p.Path, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				note(err)
				return nil // of all else there is more
			}
			if e.IsDir() {
				one(path)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// RemoveMade removes what was made in its place at once (RestoreOptions.Note):
// directories if nothing is in them, fifos and sockets.
func RemoveMade(paths []string) error {
	var errs []error
	for _, p := range slices.Backward(paths) {
		var st unix.Stat_t
		err := unix.Lstat(p, &st)
		if err == nil {
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFDIR:
				err = unix.Rmdir(p)
			case unix.S_IFIFO, unix.S_IFSOCK:
				err = unix.Unlink(p)
			}
		}
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, &os.PathError{Op: "remove", Path: p, Err: err})
		}
	}
	return errors.Join(errs...)
}
