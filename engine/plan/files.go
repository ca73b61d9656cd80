package plan

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
}
