package restore

import (
	"strings"
	"testing"

	core_x86 "github.com/checkpoint-restore/go-criu/v8/crit/images/core-x86"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	fsimg "github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/task"
)

type task3 struct{ pid, ppid, state uint32 }

// images makes the images of a tree as far as parse looks at them.
func images(version uint32, tasks ...task3) *image.Set {
	s := image.NewSet()
	add := func(file, magic string, m proto.Message) { s.Add(image.Entry{File: file, Magic: magic, Msg: m}) }
	add(image.InventoryFile, image.MagicInventory, &inventory.InventoryEntry{ImgVersion: &version})
	for _, x := range tasks {
		add(image.PstreeFile, image.MagicPstree, &pstree.PstreeEntry{Pid: &x.pid, Ppid: &x.ppid, Pgid: &x.pid, Sid: &x.pid, Threads: []uint32{x.pid}})
		march := criu_core.CoreEntry_X86_64
		core := &criu_core.CoreEntry{Mtype: &march, Tc: &criu_core.TaskCoreEntry{TaskState: &x.state}, Ids: &criu_core.TaskKobjIdsEntry{FilesId: &x.pid}}
		if x.state == task.Alive || x.state == task.Stopped {
			core.ThreadInfo = &core_x86.ThreadInfoX86{Gpregs: arch.RegsToImage(&arch.Regs{}), Fpregs: &core_x86.UserX86FpregsEntry{}}
			core.ThreadCore = &criu_core.ThreadCoreEntry{}
		}
		add(image.CoreFile(x.pid), image.MagicCore, core)
		add(image.MMFile(x.pid), image.MagicMM, &mm.MmEntry{Vmas: []*vma.VmaEntry{
			(&mem.VMA{Start: 0x7f0000000000, End: 0x7f0000001000, Status: mem.Regular | mem.AnonPrivate}).ToImage(),
		}})
		add(image.FSFile(x.pid), image.MagicFS, &fsimg.FsEntry{})
	}
	return s
}

func TestParse(t *testing.T) {
	const alive, dead = task.Alive, task.Dead
	for _, c := range []struct {
		name string
		set  *image.Set
		want string // part of the error, empty for none
	}{
		{"one process", images(2, task3{10, 0, alive}), ""},
		{"with a zombie", images(2, task3{10, 0, alive}, task3{11, 10, dead}), ""},
		{"nothing", image.NewSet(), "inventory"},
		{"unknown version", images(9, task3{10, 0, alive}), "version 9"},
		{"no process", images(2), "no process"},
		{"pid 1", images(2, task3{1, 0, alive}), "no pid namespace of its own"},
		{"pid beyond all", images(2, task3{maxPid + 1, 0, alive}), "impossible"},
		{"pid twice", images(2, task3{10, 0, alive}, task3{10, 10, alive}), "2 entries"},
		{"dead root", images(2, task3{10, 0, dead}), "has exited"},
		{"stranger's child", images(2, task3{10, 0, alive}, task3{11, 12, alive}), "not among"},
		{"child of a zombie", images(2, task3{10, 0, alive}, task3{11, 10, dead}, task3{12, 11, alive}), "has exited"},
		{"stopped task", images(2, task3{10, 0, task.Stopped}), ""},
		{"stopped child", images(2, task3{10, 0, alive}, task3{11, 10, task.Stopped}), ""},
		{"task in a state of its own", images(2, task3{10, 0, 4}), "state 4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, err := parse(c.set)
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got %v, want an error with %q", err, c.want)
			case c.want == "" && len(m.procs) == 0:
				t.Fatal("no process came out")
			}
		})
	}
}

func TestSpareIsFree(t *testing.T) {
	m, err := parse(images(2, task3{10, 0, task.Alive}))
	if err != nil {
		t.Fatal(err)
	}
	// A reservation as sanitizers make it, and one right behind the first gap.
	m.procs[0].vmas = append(m.procs[0].vmas,
		&mem.VMA{Start: 0x10_0000_0000, End: 0x5000_0000_0000}, &mem.VMA{Start: 0x5000_0001_0000, End: 0x6000_0000_0000})
	taken := []span{{0x6000_0000_0000, 0x6000_0010_0000}}
	at, err := m.spare(taken)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range m.procs[0].vmas {
		if at < v.End && v.Start < at+spareSize {
			t.Errorf("spare memory at %#x overlaps %s", at, v)
		}
	}
	if at < taken[0].end && taken[0].start < at+spareSize {
		t.Errorf("spare memory at %#x overlaps the stub", at)
	}
	m.procs[0].vmas = []*mem.VMA{{Start: 0x1000, End: arch.TaskSize &^ 0xfff}}
	if _, err := m.spare(nil); err == nil {
		t.Error("an address was found in a full address space")
	}
}

// FuzzParse feeds arbitrary process trees and address spaces.
func FuzzParse(f *testing.F) {
	f.Add(uint32(10), uint32(0), uint32(1), []byte{})
	f.Fuzz(func(t *testing.T, pid, ppid, state uint32, raw []byte) {
		s := images(2, task3{20, 0, task.Alive}, task3{pid, ppid, state})
		e := &mm.MmEntry{}
		if proto.Unmarshal(raw, e) == nil {
			if got, err := image.One[*mm.MmEntry](s, image.MMFile(20)); err == nil {
				got.Vmas, got.MmSavedAuxv = e.GetVmas(), e.GetMmSavedAuxv()
			}
		}
		m, err := parse(s)
		if err != nil {
			return
		}
		for i, p := range m.procs {
			if (p.parent == nil) != (i == 0) {
				t.Fatalf("%s has parent %v", p, p.parent)
			}
		}
		_, _ = m.spare(nil)
	})
}
