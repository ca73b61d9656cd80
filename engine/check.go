package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/dump"
	"godwit/engine/files"
	"godwit/engine/plan"
	"godwit/engine/procfs"
	"godwit/engine/refuse"
	"godwit/engine/restore"
)

// Check says whether this host can take a tree with that plan; a *Refusal
// lists everything that it lacks. Nothing is touched.
func (e *Engine) Check(ctx context.Context, p *Plan, o RestoreOptions) error {
	r := &Refusal{Doing: fmt.Sprintf("landing of pid %d", p.Pid)}
	in := map[string]files.Inherit{}
	for k, v := range o.Inherit {
		in[k] = files.Inherit{File: v.File, Forward: v.Forward, AnyKind: v.AnyKind}
	}
	if !o.NewPidNamespace {
		if err := checkPids(r, p); err != nil {
			return err
		}
	}
	if err := checkHost(r, p); err != nil {
		return err
	}
	if err := checkPrivileges(r, p); err != nil {
		return err
	}
	paths := p.Files
	if o.NewPidNamespace { // it has a /dev/pts of its own
		paths = slices.DeleteFunc(slices.Clone(paths), func(f plan.File) bool { return f.Kind == files.KindTerminal })
	}
	for _, x := range files.CheckWith(o.Files.Policy, paths, p.External, p.Ports, in) {
		r.Add(x)
	}
	return errors.Join(ctx.Err(), r.Err())
}

// checkPids refuses pids that somebody on this host has, as process, thread,
// group or session.
func checkPids(r *Refusal, p *Plan) error {
	b, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return err
	}
	var pidMax int
	if _, err := fmt.Sscan(string(b), &pidMax); err != nil {
		return fmt.Errorf("read /proc/sys/kernel/pid_max: %w", err)
	}
	used := map[int]string{}
	pids, err := procfs.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		st, err := procfs.ReadStat(pid)
		if err != nil {
			continue // it ended
		}
		for _, id := range []int{st.Pgrp, st.Session} {
			if used[id] == "" {
				used[id] = fmt.Sprintf("the process group or session of pid %d (%s)", pid, st.Comm)
			}
		}
	}
	for _, t := range p.Tasks {
		for _, tid := range t.VTids {
			switch {
			case tid >= pidMax:
				r.Add(refuse.Problem{Pid: t.Pid, Comm: t.Comm, Reason: fmt.Sprintf("needs pid %d, but pids end at %d on this host", tid, pidMax-1),
					Hint: "raise kernel.pid_max"})
			case unix.Kill(tid, 0) != unix.ESRCH:
				r.Add(refuse.Problem{Pid: t.Pid, Comm: t.Comm, Reason: restore.PidTaken(tid).Error()})
			case used[tid] != "":
				r.Add(refuse.Problem{Pid: t.Pid, Comm: t.Comm, Reason: (&restore.TakenError{Pid: tid, Holder: used[tid]}).Error()})
			}
		}
	}
	return nil
}

// checkHost compares processor, kernel and memory.
func checkHost(r *Refusal, p *Plan) error {
	if p.Arch != arch.Name {
		r.Add(refuse.Problem{Reason: fmt.Sprintf("the tree is of architecture %s, this host is %s", p.Arch, arch.Name)})
		return nil
	}
	if missing := p.XFeatures &^ arch.XFeatures(); missing != 0 {
		r.Add(refuse.Problem{Reason: fmt.Sprintf("this CPU lacks extended state components %#x of the source's", missing), Hint: "choose a host with the same or a newer CPU"})
	}
	flags, err := procfs.CPUFlags()
	if err != nil {
		return err
	}
	var lack []string
	for _, f := range p.CPUFlags {
		if !slices.Contains(flags, f) {
			lack = append(lack, f)
		}
	}
	if len(lack) > 0 {
		r.Add(refuse.Problem{Reason: "this CPU lacks " + strings.Join(lack, " "), Hint: "choose a host with the same or a newer CPU"})
	}
	id, err := dump.VdsoIdentity()
	if err != nil {
		return err
	}
	if p.VdsoSHA256 != "" && p.VdsoSHA256 != id {
		release, err := procfs.KernelRelease()
		if err != nil {
			return err
		}
		r.Add(refuse.Problem{Reason: fmt.Sprintf("the [vdso] of this kernel (%s) is laid out differently from the source's (%s)", release, p.Kernel),
			Hint: "choose a host with the same kernel"})
	}
	mi, err := procfs.ReadMemInfo()
	if err != nil {
		return err
	}
	if avail := mi.Available; avail < p.MemoryBytes {
		r.Add(refuse.Problem{Reason: fmt.Sprintf("the tree holds %d MiB of memory, this host has %d MiB available", p.MemoryBytes>>20, avail>>20)})
	}
	return nil
}

// checkPrivileges compares what the agent may give away with what tasks have.
func checkPrivileges(r *Refusal, p *Plan) error {
	st, err := procfs.ReadStatus(os.Getpid())
	if err != nil {
		return err
	}
	if lack := p.Capabilities &^ st.CapPrm; lack != 0 {
		r.Add(refuse.Problem{Reason: fmt.Sprintf("tasks have capabilities %#x that this agent lacks", lack), Hint: "give the agent these capabilities"})
	}
	if st.CapEff&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return nil
	}
	for _, l := range p.Rlimits {
		var own unix.Rlimit
		if err := unix.Getrlimit(l.Resource, &own); err != nil {
			return os.NewSyscallError("getrlimit", err)
		}
		if l.Max > own.Max {
			r.Add(refuse.Problem{Pid: l.Pid, Reason: fmt.Sprintf("has hard limit %s of resource %d, this agent has %s and no CAP_SYS_RESOURCE", limit(l.Max), l.Resource, limit(own.Max)),
				Hint: "raise the agent's own limit"})
		}
	}
	return nil
}

func limit(v uint64) string {
	if v == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return fmt.Sprint(v)
}

// CompareFile says in what a file differs from the recorded mode, size and open
// flags of one, against a policy. The error goes on after the file's name.
func CompareFile(p FilePolicy, st *unix.Stat_t, mode uint32, size uint64, flags uint32) error {
	return files.Compare(p, st, mode, size, flags)
}

// BuildID reads the GNU build-id of an open ELF file; others have none.
func BuildID(f *os.File) string { return files.BuildID(f) }
