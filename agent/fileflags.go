package agent

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/pflag"

	"godwit/engine"
)

// fileFlags are CRIU's options about open files. Those that only one of dump and
// restore has a use for are taken by both, as by CRIU.
type fileFlags struct {
	linkRemap      bool
	evasiveDevices bool
	forceIrmap     bool // paths of watches are always looked for
	irmapScanPaths []string
	validation     string
	skipModeCheck  bool
}

func (f *fileFlags) add(fs *pflag.FlagSet, dump bool) {
	fs.BoolVar(&f.linkRemap, "link-remap", false, "give a file whose name was removed, but that has others, one more (link_remap.N beside it) until the restore")
	fs.BoolVar(&f.evasiveDevices, "evasive-devices", false, "take another node of a device that is no longer at its path")
	fs.StringVar(&f.validation, "file-validation", "", "filesize or buildid: every file must have its recorded size and mode, with buildid programs and libraries also their build-id (default: only what the use of each file needs)")
	if !dump {
		fs.BoolVar(&f.skipModeCheck, "skip-file-rwx-check", false, "with --file-validation, overlook the permissions of files")
		return
	}
	fs.BoolVar(&f.forceIrmap, "force-irmap", false, "write the paths of watched files (always done)")
	fs.StringArrayVar(&f.irmapScanPaths, "irmap-scan-path", nil, "a directory below which watched files are looked for if nothing else leads to them; may be repeated")
}

// dump gives the options of a dump; runsOn says that the tree is let go after it.
func (f *fileFlags) dump(runsOn bool) (engine.FileOptions, error) {
	v, err := f.validate()
	if err != nil {
		return engine.FileOptions{}, err
	}
	for _, p := range f.irmapScanPaths {
		if !filepath.IsAbs(p) {
			return engine.FileOptions{}, fmt.Errorf("--irmap-scan-path: %q is not an absolute path", p)
		}
	}
	return engine.FileOptions{LinkRemap: f.linkRemap, KeepLinks: runsOn, EvasiveDevices: f.evasiveDevices,
		IrmapScanPaths: f.irmapScanPaths, BuildIDs: v == engine.ValidateBuildID}, nil
}

func (f *fileFlags) restore() (engine.FileRestoreOptions, error) {
	v, err := f.validate()
	return engine.FileRestoreOptions{Validation: v, SkipModeCheck: f.skipModeCheck}, err
}

func (f *fileFlags) validate() (engine.FileValidation, error) {
	switch f.validation {
	case "":
		return engine.ValidateUse, nil
	case "filesize":
		return engine.ValidateSize, nil
	case "buildid":
		return engine.ValidateBuildID, nil
	}
	return 0, fmt.Errorf("--file-validation: %q is neither filesize nor buildid", f.validation)
}
