package agent

import (
	"os"

	"godwit/engine"
	"godwit/engine/plan"
	"godwit/engine/refuse"
	"godwit/wire"
)

// requirements is p in the form that travels to the destination.
func requirements(p *engine.Plan) *wire.Requirements {
	r := &wire.Requirements{
		MemoryBytes: p.MemoryBytes, EarlyBytes: p.EarlyBytes, NotEarly: p.NotEarly,
		Xfeatures:  p.XFeatures,
		CpuFlags:   p.CPUFlags,
		VdsoSha256: p.VdsoSHA256,
		Kernel:     p.Kernel,
		Arch:       p.Arch,
		PageSize:   uint64(os.Getpagesize()),
		OpenFiles:  uint32(p.OpenFiles),

		Capabilities: p.Capabilities,
	}
	for _, t := range p.Tasks {
		r.Tasks = append(r.Tasks, &wire.RequiredTask{
			Pid: int32(t.VPid), Tids: int32s(t.VTids), Comm: t.Comm, HostPid: int32(t.Pid),
		})
	}
	for _, f := range p.Files {
		r.Files = append(r.Files, &wire.RequiredFile{
			Path: f.Path, Kind: f.Kind, Size: f.Size, Mode: f.Mode, Rdev: f.Rdev, Mapped: f.Mapped,
			BuildId: f.BuildID, Pids: int32s(f.Pids), Writable: f.Writable, Create: f.Create,
			Carried: f.Carried, Allocated: f.Allocated,
		})
	}
	for _, e := range p.External {
		r.Externals = append(r.Externals, &wire.ExternalFile{
			Key: e.Key, Path: e.Path, Kind: e.Kind, Flags: e.Flags, Size: e.Size, Mode: e.Mode, MappedBytes: e.MappedBytes,
		})
	}
	for _, q := range p.Ports {
		r.Ports = append(r.Ports, &wire.RequiredPort{Network: q.Network, Address: q.Address, Pid: int32(q.Pid)})
	}
	for _, l := range p.Rlimits {
		r.Rlimits = append(r.Rlimits, &wire.Rlimit{
			Resource: uint32(l.Resource), Cur: l.Cur, Max: l.Max, Pid: int32(l.Pid),
		})
	}
	return r
}

// planOf rebuilds what requirements made of a plan. What the destination has no
// use for (parents, memory of each task) is not in it.
func planOf(r *wire.Requirements) *engine.Plan {
	p := &engine.Plan{
		MemoryBytes: r.GetMemoryBytes(), EarlyBytes: r.GetEarlyBytes(), NotEarly: r.GetNotEarly(),
		XFeatures:  r.GetXfeatures(),
		CPUFlags:   r.GetCpuFlags(),
		VdsoSHA256: r.GetVdsoSha256(),
		Kernel:     r.GetKernel(),
		Arch:       r.GetArch(),
		OpenFiles:  int(r.GetOpenFiles()),

		Capabilities: r.GetCapabilities(),
	}
	for i, t := range r.GetTasks() {
		if i == 0 {
			p.Pid = int(t.HostPid)
		}
		p.Tasks = append(p.Tasks, plan.Task{Pid: int(t.HostPid), VPid: int(t.Pid), VTids: ints(t.Tids), Comm: t.Comm})
	}
	for _, f := range r.GetFiles() {
		p.Files = append(p.Files, plan.File{
			Path: f.Path, Kind: f.Kind, Size: f.Size, Mode: f.Mode, Rdev: f.Rdev, Mapped: f.Mapped,
			BuildID: f.BuildId, Pids: ints(f.Pids), Writable: f.Writable, Create: f.Create,
			Carried: f.Carried, Allocated: f.Allocated,
		})
	}
	for _, e := range r.GetExternals() {
		p.External = append(p.External, plan.External{
			Key: e.Key, Path: e.Path, Kind: e.Kind, Flags: e.Flags, Size: e.Size, Mode: e.Mode, MappedBytes: e.MappedBytes,
		})
	}
	for _, q := range r.GetPorts() {
		p.Ports = append(p.Ports, plan.Port{Network: q.Network, Address: q.Address, Pid: int(q.Pid)})
	}
	for _, l := range r.GetRlimits() {
		p.Rlimits = append(p.Rlimits, plan.Rlimit{Resource: int(l.Resource), Cur: l.Cur, Max: l.Max, Pid: int(l.Pid)})
	}
	return p
}

// openObjects is the objects of a plan in the form that travels.
func openObjects(objects []plan.Object) []*wire.OpenObject {
	var out []*wire.OpenObject
	for _, o := range objects {
		w := &wire.OpenObject{
			Key: o.Key, Kind: o.Kind, Path: o.Path, Link: o.Link, Flags: o.Flags, Offset: o.Offset, Mode: o.Mode, Uid: o.UID, Gid: o.GID, Size: o.Size, MtimeNs: o.MTime, BirthNs: o.Birth,
			Dev: o.Dev, Ino: o.Ino, Rdev: o.Rdev, BuildId: o.BuildID, Sha256: o.SHA256, Queued: o.Queued, Peer: o.Peer,
			Carry: o.Carry, Reason: o.Reason, Hint: o.Hint, Declarable: o.Declarable,
		}
		w.Journal = journalStream(o)
		if h := o.Inherited; h != nil {
			w.Inherited = &wire.Holder{Pid: int32(h.Pid), Comm: h.Comm, Fds: int32s(h.FDs)}
		}
		for _, h := range o.Holders {
			w.Holders = append(w.Holders, &wire.Holder{Pid: int32(h.Pid), InnerPid: int32(h.VPid), Comm: h.Comm, Fds: int32s(h.FDs), Roles: h.Roles})
		}
		out = append(out, w)
	}
	return out
}

// threads counts the threads of all tasks of p.
func threads(p *engine.Plan) int {
	n := 0
	for _, t := range p.Tasks {
		n += len(t.VTids)
	}
	return n
}

// problems is the list of a refusal in the form that travels.
func problems(ps []refuse.Problem) []*wire.Problem {
	var out []*wire.Problem
	for _, p := range ps {
		out = append(out, &wire.Problem{
			Object: &wire.Object{
				Pid: int32(p.Pid), Comm: p.Comm, Fd: int32(p.FD), HasFd: p.HasFD, Path: p.Path, Key: p.Key,
			},
			Reason: p.Reason,
			Hint:   p.Hint,
		})
	}
	return out
}

func int32s(in []int) []int32 {
	var out []int32
	for _, v := range in {
		out = append(out, int32(v))
	}
	return out
}

func ints(in []int32) []int {
	var out []int
	for _, v := range in {
		out = append(out, int(v))
	}
	return out
}
