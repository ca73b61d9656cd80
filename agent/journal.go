package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"godwit/engine"
	"godwit/wire"
)

// journal is what an agent notes on disk of trees that only it can free or
// answer for, so that it can still do so after its own death. There is one file
// for each side of a migration, replaced as a whole: a line of JSON, and a line
// with its CRC-32C. A nil journal keeps nothing.
type journal struct{ dir string }

// journalVersion is that of entry; one of another version is left alone.
const journalVersion = 1

// entry is one file of the journal.
type entry struct {
	Version int         `json:"version"`
	Role    string      `json:"role"` // of this host in the migration: source, destination
	ID      string      `json:"id"`
	Peer    string      `json:"peer"` // the other host
	Pid     int         `json:"pid"`  // of the tree's root here
	Boot    string      `json:"boot"` // of this host, when the entry was made
	Agent   engine.Held `json:"agent"`
	// Tree is, at the source, what stays frozen without the agent, at the destination
	// what may run: none as long as the end of the agent undoes all that it did.
	Tree []engine.Held `json:"tree,omitempty"`
	// FrozenUnixUs is when the tree was frozen, at the source.
	FrozenUnixUs int64 `json:"frozen_unix_us,omitempty"`
	// Late are, at the source, the processes whose memory is served while they are
	// frozen, by pid in the images.
	Late map[uint32]engine.Late `json:"late,omitempty"`
	// Pager is, at the destination, who brings memory to the tree; nil: nobody.
	Pager *engine.Held `json:"pager,omitempty"`
	// Ran says, at the destination, that all of the tree was let go.
	Ran bool `json:"ran,omitempty"`

	// What follows is, at the destination, what the agent makes for the tree, and what has
	// to go if it does not run here.

	// Places are where files of the tree, or made for it, may wait with the mark of the
	// migration in their names.
	Places []engine.Place `json:"places,omitempty"`
	// Created are files of resolver create, Made directories and the like of the tree.
	Created []createdFile `json:"created,omitempty"`
	Made    []string      `json:"made,omitempty"`
	// Waiting are the files that are placed, or have been, when the tree is let go.
	Waiting []engine.Waiting `json:"waiting,omitempty"`
}

// createdFile is a file that was made at a path.
type createdFile struct {
	Path string `json:"path"`
	Ino  uint64 `json:"ino"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (e *entry) encode() ([]byte, error) {
	b, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(b, "\n%08x\n", crc32.Checksum(b, castagnoli)), nil
}

// decodeEntry reads one file; a torn or damaged one is an error.
func decodeEntry(b []byte) (*entry, error) {
	line, sum, ok := bytes.Cut(b, []byte("\n"))
	if !ok || string(sum) != fmt.Sprintf("%08x\n", crc32.Checksum(line, castagnoli)) {
		return nil, errors.New("it is torn or damaged: its checksum does not match")
	}
	e := &entry{}
	if err := json.Unmarshal(line, e); err != nil {
		return nil, err
	}
	switch {
	case e.Version != journalVersion:
		return nil, fmt.Errorf("it is of version %d, this agent knows %d", e.Version, journalVersion)
	case e.ID == "" || e.Boot == "" || e.Pid <= 0 && len(e.Tree) > 0:
		return nil, errors.New("it lacks an id, a boot or a pid")
	case e.Role != wire.RoleSource.String() && e.Role != wire.RoleDestination.String():
		return nil, fmt.Errorf("its role is %q", e.Role)
	}
	who := []engine.Held{e.Agent}
	for _, l := range e.Late {
		who = append(who, l.Held)
	}
	if e.Pager != nil {
		who = append(who, *e.Pager)
	}
	for _, h := range append(who, e.Tree...) {
		if h.Pid <= 0 {
			return nil, fmt.Errorf("%d is not a pid", h.Pid)
		}
	}
	return e, nil
}

const journalSuffix = ".journal"

func (j *journal) path(role, id string) string {
	return filepath.Join(j.dir, role+"-"+url.PathEscape(id)+journalSuffix)
}

// put notes an entry; when it returns, it is on disk.
func (j *journal) put(e *entry) error {
	if j == nil {
		return nil
	}
	if err := j.write(e); err != nil {
		return fmt.Errorf("note migration %s in the journal: %w", e.ID, err)
	}
	return nil
}

func (j *journal) write(e *entry) (err error) {
	b, err := e.encode()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return err
	}
	path := j.path(e.Role, e.ID)
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return syncDir(j.dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// drop removes an entry; it need not be there.
func (j *journal) drop(role, id string) error {
	if j == nil {
		return nil
	}
	if err := os.Remove(j.path(role, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove migration %s from the journal: %w", id, err)
	}
	return nil
}

// load reads all entries. The error lists those that cannot be used; their files
// stay, for a person to look at.
func (j *journal) load() ([]*entry, error) {
	if j == nil {
		return nil, nil
	}
	list, err := os.ReadDir(j.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the journal: %w", err)
	}
	var out []*entry
	var errs []error
	for _, x := range list {
		if !strings.HasSuffix(x.Name(), journalSuffix) {
			continue // one that was being written
		}
		path := filepath.Join(j.dir, x.Name())
		b, err := os.ReadFile(path)
		var e *entry
		if err == nil {
			e, err = decodeEntry(b)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("journal entry %s: %w", path, err))
			continue
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *entry) int { return strings.Compare(a.ID, b.ID) })
	return out, errors.Join(errs...)
}
