package files

import (
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// buildIDs are the build-ids of files that were looked at, so that a dump need
// not read them while the tree is frozen.
var buildIDs sync.Map // of fileVersion → string

type fileVersion struct {
	inode inodeID
	size  int64
	mtime unix.Timespec
}

// objectBuildID is the build-id of a regular file, "" if it has none.
func objectBuildID(o *object) string {
	if o.mode()&unix.S_IFMT != unix.S_IFREG {
		return ""
	}
	v := fileVersion{inode(&o.stat), o.stat.Size, o.stat.Mtim}
	if id, ok := buildIDs.Load(v); ok {
		return id.(string)
	}
	id := buildID(o.file)
	buildIDs.Store(v, id)
	return id
}

// buildIDWords is the image form of a build-id.
func buildIDWords(id string) []uint32 {
	b, _ := hex.DecodeString(id) // made by hex.EncodeToString
	b = append(b, make([]byte, (4-len(b)%4)%4)...)
	var out []uint32
	for ; len(b) >= 4; b = b[4:] {
		out = append(out, binary.NativeEndian.Uint32(b))
	}
	return out
}

// validate compares a file that was found with what was recorded of it.
func (r *Restorer) validate(f *os.File, e *regfile.RegFileEntry) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	if e.Mode != nil && st.Mode&unix.S_IFMT != e.GetMode()&unix.S_IFMT {
		return fmt.Errorf("%s is a %s here, expected a %s", f.Name(), modeKind(st.Mode), modeKind(e.GetMode()))
	}
	strict := r.opts.Validation != plan.ValidateUse
	policy := r.policy(e)
	if err := r.applyPolicy(policy, f, &st, e); err != nil {
		return err
	}
	if strict && policy.Mode == plan.ModeDefault && e.Mode != nil && !r.opts.SkipModeCheck && st.Mode != e.GetMode() {
		return fmt.Errorf("%s has mode %#o here, expected %#o (--skip-file-rwx-check overlooks permissions)", f.Name(), st.Mode&0o7777, e.GetMode()&0o7777)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || e.GetFlags()&unix.O_PATH != 0 || e.GetExt() {
		return nil
	}
	size, acc := uint64(st.Size), e.GetFlags()&unix.O_ACCMODE
	switch {
	case e.Size == nil, policy.Size != plan.SizeDefault:
	case strict && size != e.GetSize() && (acc != unix.O_WRONLY || e.GetFlags()&unix.O_APPEND == 0):
		return fmt.Errorf("%s has %d bytes here, expected %d", f.Name(), size, e.GetSize())
	case acc == unix.O_RDONLY && size < e.GetSize():
		return fmt.Errorf("%s has %d bytes here, expected at least %d: copy the file first", f.Name(), size, e.GetSize())
	}
	if len(e.GetBuildId()) == 0 || r.opts.Validation == plan.ValidateSize {
		return nil
	}
	if have := buildID(f); !slices.Equal(buildIDWords(have), e.GetBuildId()) {
		return fmt.Errorf("%s is another program or library here: its build-id is %s, expected %s", f.Name(), orNone(have), wordsText(e.GetBuildId()))
	}
	return nil
}

// wordsText shows a build-id of an image.
func wordsText(words []uint32) string {
	var b []byte
	for _, w := range words[:min(len(words), 16)] {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	return hex.EncodeToString(b)
}

// buildID reads the GNU build-id of an ELF file; other files have none.
func buildID(f *os.File) string {
	r, err := reopen(f, unix.O_RDONLY)
	if err != nil {
		return ""
	}
	defer func() { _ = r.Close() }()
	ef, err := elf.NewFile(r)
	if err != nil {
		return ""
	}
	for _, p := range ef.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<16 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := io.ReadFull(p.Open(), b); err != nil {
			continue
		}
		for len(b) >= 12 {
			bo := ef.ByteOrder
			nameLen, descLen, typ := uint64(bo.Uint32(b)), uint64(bo.Uint32(b[4:])), bo.Uint32(b[8:])
			nameEnd := 12 + (nameLen+3)&^3
			end := nameEnd + (descLen+3)&^3
			if end > uint64(len(b)) {
				break
			}
			if typ == 3 && string(b[12:12+nameLen]) == "GNU\x00" { // NT_GNU_BUILD_ID
				return hex.EncodeToString(b[nameEnd : nameEnd+descLen])
			}
			b = b[end:]
		}
	}
	return ""
}
