package agent

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"godwit/engine"
	"godwit/engine/cgroup"
)

// dumpNamespaces are the flags of dump for namespaces of the tree's own.
type dumpNamespaces struct {
	skipMounts, mountMap, emptyNS []string
	cgroups                       string
	cgroupRoots, cgroupProps      []string
	cgroupPropsFiles, controllers []string
	cgroupYard                    string
}

func (f *dumpNamespaces) add(fs *pflag.FlagSet) {
	fs.StringArrayVar(&f.skipMounts, "skip-mnt", nil, "a mount point that a tree with mounts of its own goes without; may be repeated")
	fs.StringArrayVarP(&f.mountMap, "ext-mount-map", "M", nil, "MOUNTPOINT:NAME, an older form of --external mnt[MOUNTPOINT]:NAME; auto does nothing, mounts of the host are found anyway")
	fs.StringArrayVar(&f.emptyNS, "empty-ns", nil, "net: leave out what is in the tree's own network namespace")
	fs.StringVar(&f.cgroups, "manage-cgroups", cgroup.Ignore, "record the cgroups of the tree and what is set in them: any mode of restore but ignore")
	fs.Lookup("manage-cgroups").NoOptDefVal = cgroupDefault
	fs.StringArrayVar(&f.cgroupRoots, "cgroup-root", nil, "[CONTROLLER:]/PATH: the topmost cgroup that is recorded, at or above that of the tree's root; may be repeated")
	fs.StringArrayVar(&f.cgroupProps, "cgroup-props", nil, "settings of cgroups to record besides or in place of those of a controller, such as '\"cpu\":\\n - \"strategy\": \"merge\"\\n - \"properties\": [\"cpu.rt_period_us\"]'; may be repeated")
	fs.StringArrayVar(&f.cgroupPropsFiles, "cgroup-props-file", nil, "the same, read from a file; may be repeated")
	fs.StringArrayVar(&f.controllers, "cgroup-dump-controller", nil, "record cgroups of this controller only; may be repeated")
	addYard(fs, &f.cgroupYard)
}

func addYard(fs *pflag.FlagSet, yard *string) {
	fs.StringVar(yard, "cgroup-yard", "", "directory with all cgroup hierarchies mounted, each in a directory named by its controllers (cpu,cpuacct; unified for version 2), to use in place of mounts of the command's own")
}

// set puts them into the options of a dump.
func (f *dumpNamespaces) set(o *engine.DumpOptions) error {
	o.SkipMounts = f.skipMounts
	ext, err := externalMounts(f.mountMap)
	if err != nil {
		return err
	}
	o.External = append(o.External, ext...)
	o.EmptyNet, err = emptyNet(f.emptyNS)
	if err != nil {
		return err
	}
	mode, err := cgroup.ParseMode(f.cgroups)
	o.Cgroups = mode != cgroup.Ignore
	if err != nil {
		return err
	}
	g := engine.CgroupDump{Controllers: f.controllers, Yard: f.cgroupYard}
	if g.Roots, err = cgroupRoots(f.cgroupRoots); err != nil {
		return err
	}
	for _, p := range f.cgroupProps {
		// As in CRIU's manual, where a shell leaves \n as it is.
		g.Props = append(g.Props, strings.ReplaceAll(p, `\n`, "\n"))
	}
	for _, path := range f.cgroupPropsFiles {
		b, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("--cgroup-props-file: %w", err)
		}
		g.Props = append(g.Props, string(b))
	}
	o.CgroupDump = g
	return nil
}

// cgroupRoots takes values of --cgroup-root apart.
func cgroupRoots(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, r := range list {
		name, path := "*", r
		if i := strings.Index(r, ":/"); i >= 0 {
			name, path = r[:i], r[i+1:]
		}
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("--cgroup-root %s: not of the form [CONTROLLER:]/PATH", r)
		}
		out[name] = path
	}
	return out, nil
}

// cgroupDefault is the mode of --manage-cgroups without one, as CRIU has it.
const cgroupDefault = cgroup.Soft

// restoreNamespaces are the flags of restore for namespaces.
type restoreNamespaces struct {
	root                                           string
	external, mountMap, emptyNS, joinNS, vethPairs []string
	weakSysctls                                    bool
	cgroups                                        string
	cgroupRoots                                    []string
	cgroupYard                                     string
}

func (f *restoreNamespaces) add(fs *pflag.FlagSet) {
	fs.StringVarP(&f.root, "root", "r", "", "the directory that becomes the root of a tree with mounts of its own")
	fs.StringArrayVar(&f.external, "external", nil, "what the images call external: a mount, mnt[NAME]:PATH, or the outer end of a veth pair, veth[INNER]:OUTER or veth[INNER]:OUTER@BRIDGE; may be repeated")
	fs.StringArrayVarP(&f.mountMap, "ext-mount-map", "M", nil, "NAME:PATH, an older form of --external mnt[NAME]:PATH; auto does nothing, mounts of the host are found anyway")
	fs.StringArrayVar(&f.vethPairs, "veth-pair", nil, "INNER=OUTER or INNER=OUTER@BRIDGE, an older form of --external veth[INNER]:OUTER@BRIDGE")
	fs.StringArrayVar(&f.emptyNS, "empty-ns", nil, "net: make nothing in the tree's own network namespace")
	fs.StringArrayVarP(&f.joinNS, "join-ns", "J", nil, "NS:FILE or NS:PID: make the tree in a namespace that is there, of kind ipc, net or uts; may be repeated")
	fs.BoolVar(&f.weakSysctls, "weak-sysctls", false, "pass over settings of the network that this kernel does not have")
	fs.StringVar(&f.cgroups, "manage-cgroups", cgroup.Ignore, "how the cgroups of the tree are made: cg-none (they are there), props (they are there, and are set up), soft (those that are not there are made and set up), full (all are set up), strict (all are made), ignore (the tree stays in those of this command)")
	fs.Lookup("manage-cgroups").NoOptDefVal = cgroupDefault
	fs.StringArrayVar(&f.cgroupRoots, "cgroup-root", nil, "[CONTROLLER:]/PATH: the cgroup that takes the place of the root task's; may be repeated")
	addYard(fs, &f.cgroupYard)
	fs.Bool("mntns-compat-mode", false, "accepted for scripts: mounts are made in one way only, on every kernel")
}

// set puts them into the options of a restore. What is in o.Join stays open.
func (f *restoreNamespaces) set(o *engine.RestoreOptions) error {
	o.Root, o.WeakSysctls = f.root, f.weakSysctls
	o.External = f.external
	ext, err := externalMounts(f.mountMap)
	if err != nil {
		return err
	}
	o.External = append(o.External, ext...)
	for _, v := range f.vethPairs {
		in, out, ok := strings.Cut(v, "=")
		if !ok || in == "" || out == "" {
			return fmt.Errorf("--veth-pair %s: not of the form INNER=OUTER", v)
		}
		o.External = append(o.External, fmt.Sprintf("veth[%s]:%s", in, out))
	}
	if o.EmptyNet, err = emptyNet(f.emptyNS); err != nil {
		return err
	}
	o.Cgroups = engine.Cgroups{Mode: f.cgroups, Yard: f.cgroupYard}
	if o.Cgroups.Roots, err = cgroupRoots(f.cgroupRoots); err != nil {
		return err
	}
	o.Join = map[string]*os.File{}
	for _, j := range f.joinNS {
		kind, from, ok := strings.Cut(j, ":")
		if !ok || from == "" {
			return fmt.Errorf("--join-ns %s: not of the form NS:FILE or NS:PID", j)
		}
		if pid, err := strconv.Atoi(from); err == nil {
			from = fmt.Sprintf("/proc/%d/ns/%s", pid, kind)
		}
		if o.Join[kind] != nil {
			return fmt.Errorf("--join-ns %s: a namespace of that kind is joined already", j)
		}
		if o.Join[kind], err = os.Open(from); err != nil {
			return fmt.Errorf("--join-ns %s: %w", j, err)
		}
	}
	return nil
}

// externalMounts turns KEY:VALUE of --ext-mount-map into the form of --external.
func externalMounts(list []string) (out []string, err error) {
	for _, x := range list {
		if x == "auto" {
			continue
		}
		key, value, ok := strings.Cut(x, ":")
		if !ok || key == "" || value == "" {
			return nil, fmt.Errorf("--ext-mount-map %s: not of the form KEY:VALUE", x)
		}
		out = append(out, fmt.Sprintf("mnt[%s]:%s", key, value))
	}
	return out, nil
}

func emptyNet(list []string) (bool, error) {
	for _, x := range list {
		if x != "net" {
			return false, fmt.Errorf("--empty-ns %s: only net can be left empty", x)
		}
	}
	return len(list) > 0, nil
}
