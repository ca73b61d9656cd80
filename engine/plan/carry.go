package plan

// DefaultCarryLimit is that of Carry, in bytes.
const DefaultCarryLimit = 1 << 30

// Carry is a file that travels with a tree: name, content and attributes. A
// directory travels with all that is in it.
type Carry struct {
	// Key is that of an open file or directory, file[mnt:ino]; or Dir is a directory.
	Key, Dir string
	// To is where it is placed at the destination; empty: where it is here.
	To string
	// Overwrite replaces files that are newer at the destination, too.
	Overwrite bool
	// Limit bounds the bytes that the content takes; 0: DefaultCarryLimit.
	Limit uint64
	// Have is the file that the destination has there; nil: none, or none that is
	// a regular file.
	Have *Content
}

// Content identifies what is in a file.
type Content struct {
	Size    uint64 // bytes
	MTimeNS int64  // since 1970
	Digest  string // files.ContentDigest
}

// Place is where a restore may put files that travelled with a tree: at a path
// or, with Dir, in a directory.
type Place struct {
	Path      string
	Dir       bool
	Overwrite bool   // as Carry has it
	Limit     uint64 // as Carry has it
}
