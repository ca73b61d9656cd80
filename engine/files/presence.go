package files

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// hash is the SHA-256 of o's content, each inode read once; empty if it cannot be
// read.
func (d *Dumper) hash(o *object) string {
	k := inode(&o.stat)
	if _, ok := d.hashes[k]; !ok {
		d.hashes[k] = contentHash(o.file)
	}
	return d.hashes[k]
}

// contentHash is the SHA-256 of a regular file, in hexadecimal; empty if it cannot
// be read. f may be O_PATH.
func contentHash(f *os.File) string {
	r, err := reopen(f, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return ""
	}
	defer func() { _ = r.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Presence says what this host has at the path of an object of another one: "same",
// "differs", with the differences, or "missing". Contents are compared if the
// object has a hash.
func Presence(o plan.Object) (state string, differences []string) {
	f, err := openPath(o.Path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return plan.PresenceMissing, nil
	case err != nil:
		return plan.PresenceDiffers, []string{fmt.Sprintf("it cannot be looked at: %v", err)}
	}
	defer func() { _ = f.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return plan.PresenceDiffers, []string{fmt.Sprintf("it cannot be looked at: %v", err)}
	}
	differ := func(what string, here, there any) {
		differences = append(differences, fmt.Sprintf("%s %v, expected %v", what, here, there))
	}
	if st.Mode&unix.S_IFMT != o.Mode&unix.S_IFMT {
		differ("kind", modeKind(st.Mode), modeKind(o.Mode))
		return plan.PresenceDiffers, differences
	}
	if a, b := st.Mode&0o7777, o.Mode&0o7777; a != b {
		differ("mode", fmt.Sprintf("%#o", a), fmt.Sprintf("%#o", b))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if uint64(st.Size) != o.Size {
			differ("size", st.Size, o.Size)
		}
		if st.Mtim.Nano() != o.MTime {
			differ("time", stamp(st.Mtim.Nano()), stamp(o.MTime))
		}
		if o.BuildID != "" {
			if id := buildID(f); id != o.BuildID {
				differ("build-id", orNone(id), o.BuildID)
			}
		}
		if o.SHA256 != "" && uint64(st.Size) == o.Size {
			if sum := contentHash(f); sum != o.SHA256 {
				differ("content", orNone(sum), o.SHA256)
			}
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if uint64(st.Rdev) != o.Rdev {
			differ("device", fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))), fmt.Sprintf("%d:%d", unix.Major(o.Rdev), unix.Minor(o.Rdev)))
		}
	}
	if len(differences) > 0 {
		return plan.PresenceDiffers, differences
	}
	return plan.PresenceSame, nil
}

func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format("2006-01-02T15:04:05.999999999Z") }
