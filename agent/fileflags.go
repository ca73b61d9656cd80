package agent

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"godwit/configs/external"
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
	policies       []string
}

func (f *fileFlags) add(fs *pflag.FlagSet, dump bool) {
	fs.BoolVar(&f.linkRemap, "link-remap", false, "give a file whose name was removed, but that has others, one more (link_remap.N beside it) until the restore")
	fs.BoolVar(&f.evasiveDevices, "evasive-devices", false, "take another node of a device that is no longer at its path")
	fs.StringVar(&f.validation, "file-validation", "", "filesize or buildid: every file must have its recorded size and mode, with buildid programs and libraries also their build-id (default: only what the use of each file needs)")
	if !dump {
		fs.StringArrayVar(&f.policies, "file-policy", nil, "`SELECTOR=image[,size=RULE][,mode=RULE]`: in what the files that path:GLOB or file[MNT:INO] names may differ from what was recorded; size: same, grow-ok, any, or truncate to the recorded size; mode: same, any; the first that names a file decides; may be repeated")
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
	if err != nil {
		return engine.FileRestoreOptions{}, err
	}
	o := engine.FileRestoreOptions{Validation: v, SkipModeCheck: f.skipModeCheck}
	o.Policy, err = parsePolicies(f.policies)
	return o, err
}

// parsePolicies reads entries that say in what files may differ.
func parsePolicies(entries []string) (func(name, path string) engine.FilePolicy, error) {
	type rule struct {
		of     external.Selector
		policy engine.FilePolicy
	}
	var rules []rule
	for _, s := range entries {
		e, err := external.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("--file-policy: %w", err)
		}
		if text := e.Selector.String(); e.Resolver != external.Image || !strings.HasPrefix(text, "path:") && !strings.HasPrefix(text, "file[") {
			return nil, fmt.Errorf("--file-policy %s: not of the form path:GLOB=image,size=RULE or file[MNT:INO]=image,size=RULE", s)
		}
		rules = append(rules, rule{e.Selector, engine.FilePolicy{Size: sizeRules[e.Size], Mode: modeRules[e.Mode]}})
	}
	return func(name, path string) engine.FilePolicy {
		for _, r := range rules {
			if r.of.Matches(external.Object{Key: name, Path: path}) {
				return r.policy
			}
		}
		return engine.FilePolicy{}
	}, nil
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
