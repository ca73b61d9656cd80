package files

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fifo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// kindFifo carries named pipes. The bytes in a fifo that only the tree holds
// travel; those in an external fifo belong to whoever is outside and stay.
// A fifo has two entries: FIFO, which descriptors name, and a REG with its path or
// key, flags and owner.
var kindFifo = &kind{
	name: "fifo", typ: fdinfo.FdTypes_FIFO,
	takes: func(_ *Dumper, o *object) bool {
		return o.mode()&unix.S_IFMT == unix.S_IFIFO && !o.isPath() && strings.HasPrefix(o.link, "/")
	},
	dump:   dumpFifo,
	finish: finishFifos,
	check:  checkFifo,
	open:   openFifos,
}

func dumpFifo(d *Dumper, o *object) error {
	reg := d.newID()
	name := o.key.String()
	if !o.ext {
		path, at := d.locate(o)
		switch at {
		case unlinked:
			if err := d.dumpLost(o, reg); err != nil || o.refused {
				return err
			}
		case gone:
			o.path, o.dirOnly = d.standingDir(o), true
			if err := d.addGhost(o, reg); err != nil {
				return err
			}
		case atPath:
			o.path = path
		}
		name = path
	}
	if len(o.entries) == 0 { // unless it has one under another name
		e := d.regEntry(o, reg, name)
		if o.ext {
			e.Reg.Ext = proto.Bool(true)
		}
		o.entries = append(o.entries, e)
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_FIFO.Enum(), Id: proto.Uint32(o.id), Fifo: &fifo.FifoEntry{
		Id: proto.Uint32(o.id), PipeId: proto.Uint32(uint32(o.stat.Ino)), RegfId: proto.Uint32(reg),
	}})
	f := o.fact(reg)
	f.Path = o.link
	return nil
}

func finishFifos(d *Dumper, os []*object) error {
	byIno := map[inodeID][]*object{}
	var order []inodeID
	for _, o := range os {
		k := inode(&o.stat)
		if byIno[k] == nil {
			order = append(order, k)
		}
		byIno[k] = append(byIno[k], o)
	}
	for _, k := range order {
		ends := byIno[k]
		if ends[0].refused {
			continue
		}
		for _, o := range ends {
			// A reader that has seen its last writer leave is told of end of file by
			// poll(2); one that has not met a writer yet is not.
			hup, err := hangup(int(o.file.Fd()))
			if err != nil {
				return err
			}
			if o.facts != nil {
				o.facts.Quiet = !hup
			}
		}
		if ends[0].ext {
			continue
		}
		if x, ok := d.outside(ends[0].link); ok {
			for _, o := range ends {
				d.lacks(o, fmt.Sprintf("the fifo is also held by pid %d (%s), fd %d, outside the tree", x.pid, x.comm, x.fd),
					"include that process in the tree, or declare the fifo external: --external "+o.key.String())
			}
			continue
		}
		if d.dry() {
			continue
		}
		if err := d.dumpQueue(fifosImage, fifosMagic, uint32(k.ino), ends); err != nil {
			return fmt.Errorf("%s: %w", ends[0].link, err)
		}
	}
	return nil
}

func hangup(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd)}}
	for {
		_, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return p[0].Revents&unix.POLLHUP != 0, os.NewSyscallError("poll", err)
	}
}

// regOf is the REG entry of a fifo.
func (r *Restorer) regOf(x *description) *regfile.RegFileEntry {
	e := x.entry.GetFifo()
	if e.RegfId == nil {
		return nil
	}
	if y := r.byID[e.GetRegfId()]; y != nil {
		return y.entry.GetReg()
	}
	return nil
}

func checkFifo(r *Restorer, x *description) error {
	e := x.entry.GetFifo()
	reg := r.regOf(x)
	if reg == nil {
		return fmt.Errorf("its file entry %d is missing", e.GetRegfId())
	}
	if reg.Mode != nil && reg.GetMode()&unix.S_IFMT != unix.S_IFIFO {
		return fmt.Errorf("its file entry %d is of a %s", e.GetRegfId(), modeKind(reg.GetMode()))
	}
	y := r.byID[e.GetRegfId()]
	if y.part != nil && y.part != x {
		return fmt.Errorf("its file entry %d is also that of fifo %d", e.GetRegfId(), y.part.id)
	}
	y.part = x
	if reg.GetExt() {
		return r.checkExternal(reg.GetName(), x)
	}
	return checkName(reg.GetName())
}

func openFifos(r *Restorer, xs []*description) []error {
	type place struct {
		pipe uint32
		name string
	}
	byID := map[place][]*description{}
	var order []place
	for _, x := range xs {
		k := place{x.entry.GetFifo().GetPipeId(), r.regOf(x).GetName()}
		if byID[k] == nil {
			order = append(order, k)
		}
		byID[k] = append(byID[k], x)
	}
	var errs []error
	for _, k := range order {
		if err := r.openFifo(byID[k]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.who(byID[k][0]), err))
		}
	}
	return errs
}

// openFifo opens all descriptions of one fifo. Neither side may block in open(2)
// for want of the other, and afterwards poll(2) and end of file must be as they
// were. A reader learns at its open whether writers have been there before
// (fs/pipe.c fifo_open): one that had seen its writers leave is opened while a
// helper holds the fifo for reading and writing, which then is closed; one that had
// met no writer is opened without, and with O_NONBLOCK, which is taken off again.
func (r *Restorer) openFifo(xs []*description) error {
	reg := r.regOf(xs[0])
	var base *os.File
	var in *Inherit
	if id := r.remaps[xs[0].entry.GetFifo().GetRegfId()]; id != 0 && r.inherited(reg) == nil {
		g := r.ghosts[id]
		if err := g.create(r, reg); err != nil {
			return err
		}
		base = g.file
	} else {
		var err error
		if in, base, err = r.base(xs[0], reg); err != nil {
			return err
		}
		if in == nil {
			defer func() { _ = base.Close() }()
		}
	}
	if in != nil && in.Forward {
		for _, x := range xs {
			if err := r.forward(x, in); err != nil {
				return err
			}
		}
		return nil
	}
	if in != nil {
		for _, x := range xs[1:] {
			if err := r.checkHanded(x, r.regOf(x), in); err != nil {
				return err
			}
		}
	}
	var q *queue
	if in == nil {
		q = r.fifos[xs[0].entry.GetFifo().GetPipeId()]
	}
	readers, writers, quiet := 0, 0, true
	packets := false
	for _, x := range xs {
		e := r.regOf(x)
		switch e.GetFlags() & unix.O_ACCMODE {
		case unix.O_RDONLY:
			readers++
			if f := r.facts[e.GetId()]; f == nil || !f.Quiet {
				quiet = false
			}
		case unix.O_WRONLY:
			writers++
		default:
			readers, writers = readers+1, writers+1
		}
		packets = packets || e.GetFlags()&unix.O_DIRECT != 0
	}
	var helper *os.File
	var err error
	switch {
	case q != nil && len(q.packets) > 0, readers > 0 && !quiet:
		helper, err = reopen(base, unix.O_RDWR|unix.O_NONBLOCK)
	case readers == 0 || q != nil:
		helper, err = reopen(base, unix.O_RDONLY|unix.O_NONBLOCK)
	}
	if err != nil {
		return hinted(err)
	}
	defer func() {
		if helper != nil {
			_ = helper.Close()
		}
	}()
	if q != nil && in == nil {
		if n, err := unix.IoctlGetInt(int(helper.Fd()), unix.TIOCINQ); err == nil && n > 0 {
			return fmt.Errorf("fifo %s is in use here: %d bytes are in it", base.Name(), n)
		}
	}
	// Readers first: then a writer finds one.
	for _, acc := range []uint32{unix.O_RDWR, unix.O_RDONLY, unix.O_WRONLY} {
		for _, x := range xs {
			e := r.regOf(x)
			if e.GetFlags()&unix.O_ACCMODE != acc {
				continue
			}
			f, err := reopen(base, pipeFlags(e.GetFlags())|unix.O_NONBLOCK)
			if err != nil {
				return hinted(err)
			}
			x.file = f
			if err := setStatus(f, e.GetFlags()); err != nil {
				return err
			}
		}
	}
	if q == nil {
		return nil
	}
	if err := q.fill(helper, packets); err != nil {
		return fmt.Errorf("put the bytes back into fifo %s: %w", base.Name(), err)
	}
	return nil
}
