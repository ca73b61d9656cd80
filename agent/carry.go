package agent

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/wire"
)

// What resolver carry has is not external: its content travels with the tree. The
// destination says what it has already, the source sends what differs, and the
// restore places it.

// servesCarry serves regular files and directories.
func servesCarry(o *wire.OpenObject, _ external.Entry) error {
	switch {
	case o.Kind != "regular" && o.Kind != "directory":
		return fmt.Errorf("what is of kind %s does not travel with its content, only regular files and directories do", o.Kind)
	case !plainPath(o.Path):
		return errors.New("it has no plain path")
	}
	return nil
}

// plainPath says whether a path means what it says: no part of it leads upwards.
func plainPath(p string) bool { return path.IsAbs(p) && path.Clean(p) == p }

// lookCarried says what this host has where a file is to be placed; nil: no regular
// file. Its content is read only if it may be the same.
func lookCarried(r *wire.Resolution) (*wire.FileState, error) {
	if len(r.Objects) == 0 || r.Objects[0].Kind != "regular" {
		return nil, nil
	}
	f, err := openFile(r.Argument, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		return nil, nil // what else stands in the way is found out when all is prepared
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil
	}
	s := &wire.FileState{Size: uint64(st.Size), MtimeNs: st.Mtim.Nano()}
	for _, o := range r.Objects {
		if o.Size == s.Size && s.Digest == "" {
			if s.Digest, err = engine.ContentDigest(f); err != nil {
				return nil, fmt.Errorf("read %s: %w", r.Argument, err)
			}
		}
	}
	return s, nil
}

// carried are the files that travel with their content, as the source sends them.
func carried(resolutions []*wire.Resolution) (out []engine.Carry) {
	for _, r := range resolutions {
		if r.Resolver != external.Carry {
			continue
		}
		c := engine.Carry{Key: r.Key, Overwrite: r.Overwrite, Limit: r.Limit}
		if len(r.Objects) == 0 || r.Objects[0].Path != r.Argument {
			c.To = r.Argument
		}
		if h := r.Have; h != nil {
			c.Have = &engine.Content{Size: h.Size, MTimeNS: h.MtimeNs, Digest: h.Digest}
		}
		out = append(out, c)
	}
	for _, t := range carriedTrees(resolutions) {
		c := engine.Carry{Dir: t.from, Overwrite: t.r.Overwrite, Limit: t.r.Limit}
		if t.to != t.from {
			c.To = t.to
		}
		out = append(out, c)
	}
	return out
}

// places is where the destination lets them be placed.
func places(resolutions []*wire.Resolution) (out []engine.Place) {
	for _, r := range resolutions {
		if r.Resolver != external.Carry || !plainPath(r.Argument) {
			continue
		}
		dir := len(r.Objects) > 0 && r.Objects[0].Kind == "directory"
		out = append(out, engine.Place{Path: r.Argument, Dir: dir, Overwrite: r.Overwrite, Limit: r.Limit})
	}
	for _, t := range carriedTrees(resolutions) {
		out = append(out, engine.Place{Path: t.to, Dir: true, Overwrite: t.r.Overwrite, Limit: t.r.Limit})
	}
	return out
}

// carriedTree is a directory that a rule such as path:/srv/app/** means as a
// whole, once the tree has something of it open.
type carriedTree struct {
	from, to string
	r        *wire.Resolution
}

func carriedTrees(resolutions []*wire.Resolution) (out []carriedTree) {
	seen := map[string]bool{}
	for _, r := range resolutions {
		if r.Resolver != external.Carry || seen[r.Entry] {
			continue
		}
		seen[r.Entry] = true
		e, err := external.Parse(r.Entry)
		if err != nil {
			continue // an entry that was made of other words
		}
		dir, ok := e.Selector.Tree()
		if !ok || dir == "/" {
			continue
		}
		to := dir
		if e.Argument != "" {
			below, berr := e.Expand(dir + "/x")
			if to, err = e.Expand(dir); err != nil || berr != nil || filepath.Join(to, "x") != below {
				continue // it places each file by itself
			}
		}
		out = append(out, carriedTree{from: dir, to: to, r: r})
	}
	return out
}
