package plan

import "os"

// FileOptions says how the open files of a tree are dumped, besides what other
// options say.
type FileOptions struct {
	// LinkRemap gives a file whose name was removed, but that has others, one
	// more name, which the restore removes. KeepLinks leaves it there if the tree
	// is let go after the dump.
	LinkRemap, KeepLinks bool
	// EvasiveDevices takes any node of the same device in place of one that is
	// no longer at its path.
	EvasiveDevices bool
	// IrmapScanPaths are directories below which a watched inode is looked for
	// if its handle leads to no path.
	IrmapScanPaths []string
	// BuildIDs writes the build-id of every ELF file, not only of mapped ones.
	BuildIDs bool
	// Hash lets a plan tell the SHA-256 of regular files that have a key.
	Hash bool
	// Proxied are keys (pipe[inode], unix[inode], tty[rdev:dev]) of pipes, connected
	// stream sockets and terminals whose other end is outside the tree and whose bytes
	// the caller goes on carrying. True: the other end is the caller's own, and what
	// waits for the tree travels; false: it stays where it is.
	Proxied map[string]bool
	// Masters are those of the proxied terminals, by key, that are the caller's own.
	// While a dump reads what waits in one, nobody else uses it.
	Masters map[string]*os.File
}

// Far is the other end of an object that was made anew.
type Far struct {
	File *os.File // of the caller, once the restore has made it
	Key  string   // of the object as it is now
}

// FileValidation says which differences between a file as it was and as it is
// make a restore fail.
type FileValidation int

const (
	// ValidateUse wants of files what their use needs: those that are read are at
	// least as large as they were, mapped programs and libraries have their build-id.
	ValidateUse FileValidation = iota
	// ValidateSize wants size and mode of every file as they were; a file that is
	// only appended to may have grown.
	ValidateSize
	// ValidateBuildID is ValidateSize, and the build-ids that the images hold.
	ValidateBuildID
)

// FileRestoreOptions says how files are found again.
type FileRestoreOptions struct {
	Validation FileValidation
	// SkipModeCheck leaves the permissions out of ValidateSize and ValidateBuildID.
	SkipModeCheck bool
	// Proxied gives the far ends of objects that were dumped as proxied, by key.
	Proxied map[string]*Far
	// Policy says more about single files, by what the images call them (a path or
	// an external key) and the path that they had; nil: nothing.
	Policy func(name, path string) FilePolicy
}

// FilePolicy says in what one file may differ from what was recorded of it.
type FilePolicy struct {
	Size SizeRule
	Mode ModeRule
}

// SizeRule is about the size of a regular file.
type SizeRule int

const (
	// SizeDefault is what Validation says; of a file that was handed in, nothing.
	SizeDefault SizeRule = iota
	// SizeByUse wants a file that is read to be at least as large as it was.
	SizeByUse
	SizeSame
	SizeGrown // at least as large as it was
	SizeAny
	// SizeTruncate wants what SizeGrown does, and cuts the file to the recorded size
	// just before the tree runs.
	SizeTruncate
)

// ModeRule is about permissions.
type ModeRule int

const (
	ModeDefault ModeRule = iota // what Validation says; of a file that was handed in, nothing
	ModeSame
	ModeAny
)
