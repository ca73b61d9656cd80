package files

import (
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// policy is what the caller says about the file of an entry.
func (r *Restorer) policy(e *regfile.RegFileEntry) plan.FilePolicy {
	if r.opts.Policy == nil {
		return plan.FilePolicy{}
	}
	path := e.GetName()
	if f := r.facts[e.GetId()]; f != nil && f.Path != "" {
		path = f.Path
	}
	return r.opts.Policy(e.GetName(), path)
}

// checkPolicy compares a file that was handed in with what was recorded, as far
// as the caller wants that.
func (r *Restorer) checkPolicy(f *os.File, e *regfile.RegFileEntry) error {
	p := r.policy(e)
	if p == (plan.FilePolicy{}) {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	return r.applyPolicy(p, f, &st, e)
}

// applyPolicy compares a file with what was recorded, and notes that it is to be
// truncated.
func (r *Restorer) applyPolicy(p plan.FilePolicy, f *os.File, st *unix.Stat_t, e *regfile.RegFileEntry) error {
	if e.Mode != nil && st.Mode&unix.S_IFMT != e.GetMode()&unix.S_IFMT {
		return nil // another kind stands for it on purpose, or the kind is refused elsewhere
	}
	if e.Mode != nil {
		if why := differentMode(p.Mode, st.Mode, e.GetMode()); why != "" {
			return fmt.Errorf("%s %s", f.Name(), why)
		}
	}
	if e.Size == nil || st.Mode&unix.S_IFMT != unix.S_IFREG || e.GetFlags()&unix.O_PATH != 0 {
		return nil
	}
	if why := differentSize(p.Size, uint64(st.Size), e.GetSize(), e.GetFlags()&unix.O_ACCMODE == unix.O_RDONLY); why != "" {
		return fmt.Errorf("%s %s", f.Name(), why)
	}
	if p.Size == plan.SizeTruncate && uint64(st.Size) > e.GetSize() {
		return r.cuts.add(f, st, e.GetSize())
	}
	return nil
}

// differentMode says in what permissions differ against the rule, or "".
func differentMode(rule plan.ModeRule, have, want uint32) string {
	if rule != plan.ModeSame || have&0o7777 == want&0o7777 {
		return ""
	}
	return fmt.Sprintf("has mode %#o here, expected %#o", have&0o7777, want&0o7777)
}

// differentSize says in what a size differs against the rule, or "".
func differentSize(rule plan.SizeRule, have, want uint64, readOnly bool) string {
	switch {
	case rule == plan.SizeSame && have != want:
		return fmt.Sprintf("has %d bytes here, expected %d", have, want)
	case have >= want:
	case rule == plan.SizeGrown, rule == plan.SizeTruncate, rule == plan.SizeByUse && readOnly:
		return fmt.Sprintf("has %d bytes here, expected at least %d", have, want)
	}
	return ""
}

// Cuts are files that are to be truncated just before the tree runs. Either
// Apply or Close ends them.
type Cuts struct{ all []cut }

type cut struct {
	file *os.File // open for writing
	ino  inodeID
	size uint64
}

// add notes one; a file that is noted already keeps the larger size.
func (c *Cuts) add(f *os.File, st *unix.Stat_t, size uint64) error {
	for i := range c.all {
		if c.all[i].ino == inode(st) {
			c.all[i].size = max(c.all[i].size, size)
			return nil
		}
	}
	w, err := reopen(f, unix.O_WRONLY)
	if err != nil {
		return fmt.Errorf("it is to be truncated: %w", hinted(err))
	}
	c.all = append(c.all, cut{file: w, ino: inode(st), size: size})
	return nil
}

// Apply truncates the files. It may be called twice, and on nil.
func (c *Cuts) Apply() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, x := range c.all {
		var st unix.Stat_t
		err := unix.Fstat(int(x.file.Fd()), &st)
		if err == nil && uint64(st.Size) > x.size {
			err = unix.Ftruncate(int(x.file.Fd()), int64(x.size))
		}
		if err != nil {
			errs = append(errs, &os.PathError{Op: fmt.Sprintf("truncate to %d bytes", x.size), Path: x.file.Name(), Err: err})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.Close()
	return nil
}

// Close leaves the files as they are. It may be called twice, and on nil.
func (c *Cuts) Close() {
	if c == nil {
		return
	}
	for _, x := range c.all {
		_ = x.file.Close()
	}
	c.all = nil
}

// TakeCuts gives the files that are to be truncated just before the tree runs.
func (r *Restorer) TakeCuts() *Cuts {
	c := r.cuts
	r.cuts = Cuts{}
	return &c
}

// Compare says in what a file differs from what was recorded of one against a
// policy; what no rule is about may differ. The error goes on after the file's name.
func Compare(p plan.FilePolicy, st *unix.Stat_t, mode uint32, size uint64, flags uint32) error {
	if why := differentMode(p.Mode, st.Mode, mode); why != "" {
		return errors.New(why)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || flags&unix.O_PATH != 0 {
		return nil
	}
	if why := differentSize(p.Size, uint64(st.Size), size, flags&unix.O_ACCMODE == unix.O_RDONLY); why != "" {
		return errors.New(why)
	}
	return nil
}

// BuildID reads the GNU build-id of an ELF file; other files have none.
func BuildID(f *os.File) string { return buildID(f) }
