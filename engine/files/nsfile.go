package files

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	nsimg "github.com/checkpoint-restore/go-criu/v8/crit/images/ns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/procfs"
)

// kindNamespace carries descriptors of namespaces (namespaces(7)) in which
// processes of the tree live: afterwards they are of the namespaces in which the
// same processes live then.
var kindNamespace = &kind{
	name: "namespace", typ: fdinfo.FdTypes_NS,
	takes: func(_ *Dumper, o *object) bool { return nsKindOf(o.link) != nil },
	dump:  dumpNamespace,
	check: checkNamespace,
	open:  openEach(openNamespace),
}

// nsKind is a kind of namespace.
type nsKind struct {
	name string // in /proc/PID/ns
	flag uint32 // CLONE_NEW*
	id   func(*criu_core.TaskKobjIdsEntry) uint32
}

// nsKinds are in the order in which the ids of images number them.
var nsKinds = []*nsKind{
	{"pid", unix.CLONE_NEWPID, (*criu_core.TaskKobjIdsEntry).GetPidNsId},
	{"net", unix.CLONE_NEWNET, (*criu_core.TaskKobjIdsEntry).GetNetNsId},
	{"ipc", unix.CLONE_NEWIPC, (*criu_core.TaskKobjIdsEntry).GetIpcNsId},
	{"uts", unix.CLONE_NEWUTS, (*criu_core.TaskKobjIdsEntry).GetUtsNsId},
	{"mnt", unix.CLONE_NEWNS, (*criu_core.TaskKobjIdsEntry).GetMntNsId},
	{"user", unix.CLONE_NEWUSER, (*criu_core.TaskKobjIdsEntry).GetUserNsId},
	{"cgroup", unix.CLONE_NEWCGROUP, (*criu_core.TaskKobjIdsEntry).GetCgroupNsId},
	{"time", unix.CLONE_NEWTIME, (*criu_core.TaskKobjIdsEntry).GetTimeNsId},
}

// ownNsID is what the id of a namespace that the tree has of its own is higher by.
const ownNsID = 10

// nsKindOf gives the kind of a namespace file by its link, such as net:[4026531840].
func nsKindOf(link string) *nsKind {
	name, rest, ok := strings.Cut(link, ":[")
	if !ok || !strings.HasSuffix(rest, "]") {
		return nil
	}
	if i := slices.IndexFunc(nsKinds, func(k *nsKind) bool { return k.name == name }); i >= 0 {
		return nsKinds[i]
	}
	return nil
}

func dumpNamespace(d *Dumper, o *object) error {
	k := nsKindOf(o.link)
	lives := false
	for pid := range d.inside {
		link, err := procfs.Readlink(procfs.Path(pid), "ns/"+k.name)
		if lives = err == nil && link == o.link; lives {
			break
		}
	}
	if !lives {
		d.refuse(o, fmt.Sprintf("it is a %s namespace in which no process of the tree lives", k.name), "let the program close it")
		return nil
	}
	id := uint32(slices.Index(nsKinds, k) + 1)
	if here, err := os.Readlink("/proc/self/ns/" + k.name); err != nil {
		return err
	} else if here != o.link {
		id += ownNsID
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_NS.Enum(), Id: proto.Uint32(o.id), Nsf: &nsimg.NsFileEntry{
		Id: proto.Uint32(o.id), NsId: proto.Uint32(id), NsCflag: proto.Uint32(k.flag), Flags: proto.Uint32(uint32(o.flags)),
	}})
	return nil
}

func checkNamespace(r *Restorer, x *description) error {
	_, _, err := r.livesIn(x.entry.GetNsf())
	return err
}

// livesIn finds a process, by its pid in the images, that lives in a namespace.
func (r *Restorer) livesIn(e *nsimg.NsFileEntry) (pid int, name string, err error) {
	i := slices.IndexFunc(nsKinds, func(k *nsKind) bool { return k.flag == e.GetNsCflag() })
	if i < 0 {
		return 0, "", fmt.Errorf("namespaces of kind %#x do not exist", e.GetNsCflag())
	}
	k := nsKinds[i]
	for _, file := range r.set.Files() {
		num, ok := strings.CutPrefix(file, "ids-")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(num)
		if err != nil || pid <= 0 {
			continue
		}
		for _, m := range r.set.Entries(file) {
			if ids, ok := m.Msg.(*criu_core.TaskKobjIdsEntry); ok && k.id(ids) == e.GetNsId() && e.GetNsId() != 0 {
				return pid, k.name, nil
			}
		}
	}
	return 0, "", fmt.Errorf("no process of the images lives in %s namespace %d", k.name, e.GetNsId())
}

func openNamespace(r *Restorer, x *description) error {
	e := x.entry.GetNsf()
	pid, name, err := r.livesIn(e)
	if err != nil {
		return err
	}
	if r.opts.Pid != nil {
		host, ok := r.opts.Pid(pid)
		if !ok {
			return fmt.Errorf("process %d, which lives in it, is not there", pid)
		}
		pid = host
	}
	if x.file, err = openPath(procfs.Path(pid, "ns", name), reopenFlags(int(e.GetFlags()), false), 0); err != nil {
		return err
	}
	return nil
}
