package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/wire"
)

// sizeRules and modeRules are the options of entries as the engine has them.
var (
	sizeRules = map[string]engine.SizeRule{
		external.Same: engine.SizeSame, external.GrowOK: engine.SizeGrown, external.Any: engine.SizeAny, external.Truncate: engine.SizeTruncate,
	}
	modeRules = map[string]engine.ModeRule{external.Same: engine.ModeSame, external.Any: engine.ModeAny}
)

// policyOf is what a resolution says of size and mode.
func policyOf(r *wire.Resolution) engine.FilePolicy {
	p := engine.FilePolicy{Size: sizeRules[r.Size], Mode: modeRules[r.Mode]}
	if p.Size == engine.SizeDefault && slices.Contains([]string{external.Path, external.Provide, external.Inherit}, r.Resolver) {
		p.Size = engine.SizeByUse
	}
	return p
}

// policy is what resolutions say of size and mode, by the name that the images
// have for a file. What is left to the images goes by its path.
func policy(rs []*wire.Resolution) func(name, path string) engine.FilePolicy {
	by := map[string]engine.FilePolicy{}
	for _, r := range rs {
		by[r.Key] = policyOf(r)
		if r.Resolver != external.Image {
			continue
		}
		for _, o := range r.Objects {
			if o.Path != "" {
				by[o.Path] = policyOf(r)
			}
		}
	}
	return func(name, _ string) engine.FilePolicy { return by[name] }
}

// suits compares a file that is to stand for the objects with what is known of
// them, as far as the options do not say that it may differ. The error goes on
// after the file's name.
func (q *holdRequest) suits(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	var errs []error
	for _, x := range q.external {
		if x.Mode&unix.S_IFMT == st.Mode&unix.S_IFMT {
			if err := engine.CompareFile(policyOf(q.Resolution), &st, x.Mode, x.Size, x.Flags); err != nil {
				errs = append(errs, err)
			}
		}
	}
	for _, o := range q.Objects {
		errs = append(errs, q.sameContent(f, &st, o))
	}
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 0 {
		return errs[0]
	}
	return q.room(f, &st)
}

// sameContent wants what is mapped or run to be the same program or library.
func (q *holdRequest) sameContent(f *os.File, st *unix.Stat_t, o *wire.OpenObject) error {
	use := standsOn(o)
	if q.Content == external.Any || use != "mapping" && use != "exe" || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	if o.BuildId != "" {
		if have := engine.BuildID(f); have != o.BuildId {
			return fmt.Errorf("is mapped or run, and its build-id is %s here, expected %s", orNone(have), o.BuildId)
		}
		return nil
	}
	if uint64(st.Size) < o.Size || o.Flags&unix.O_ACCMODE == unix.O_RDONLY && uint64(st.Size) != o.Size && q.Size == "" {
		return fmt.Errorf("is mapped, and has %d bytes here, expected %d", st.Size, o.Size)
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// room refuses a fifo or pipe into which the tree writes and nothing fits: whoever
// is to read it does not.
func (q *holdRequest) room(f *os.File, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != unix.S_IFIFO || q.flags()&unix.O_ACCMODE == unix.O_RDONLY || q.flags()&unix.O_PATH != 0 {
		return nil
	}
	size, err := unix.FcntlInt(f.Fd(), unix.F_GETPIPE_SZ, 0)
	queued, qerr := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
	if err := errors.Join(err, qerr); err != nil {
		return nil // open as a path only: it cannot be asked
	}
	if queued >= size {
		return fmt.Errorf("is full: %d bytes are in it, and nobody reads them", queued)
	}
	return nil
}
