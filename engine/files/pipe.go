package files

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pipe"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pipe-data"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/plan"
)

// kindPipe carries anonymous pipes with the bytes in them, if no process outside
// the tree has an end. An end that nobody has is not made again, so that end of
// file and EPIPE come as before.
var kindPipe = &kind{
	name: "pipe", typ: fdinfo.FdTypes_PIPE,
	takes: func(_ *Dumper, o *object) bool {
		return o.mode()&unix.S_IFMT == unix.S_IFIFO && strings.HasPrefix(o.link, "pipe:[") && !o.isPath()
	},
	dump:   dumpPipe,
	finish: finishPipes,
	check:  checkPipe,
	open:   openPipes,
}

func dumpPipe(d *Dumper, o *object) error {
	if d.dry() {
		return nil
	}
	o.entries = append(o.entries, &fdinfo.FileEntry{Type: fdinfo.FdTypes_PIPE.Enum(), Id: proto.Uint32(o.id), Pipe: &pipe.PipeEntry{
		Id: proto.Uint32(o.id), PipeId: proto.Uint32(uint32(o.stat.Ino)), Flags: proto.Uint32(uint32(o.flags)), Fown: o.fown,
	}})
	return nil
}

func finishPipes(d *Dumper, os []*object) error {
	byIno := map[uint64][]*object{}
	var order []uint64
	for _, o := range os {
		if byIno[o.stat.Ino] == nil {
			order = append(order, o.stat.Ino)
		}
		byIno[o.stat.Ino] = append(byIno[o.stat.Ino], o)
	}
	for _, ino := range order {
		ends := byIno[ino]
		if travels, ok := d.pipeProxied(ends); ok {
			if !travels {
				continue
			}
		} else if d.declared(ends[0]) { // what is in it belongs to whoever is outside
			for _, o := range ends {
				o.ext = true
				o.fact(o.id).External = true
			}
			continue
		} else if x, ok := d.outside(ends[0].link); ok {
			for _, o := range ends {
				d.lacks(o, fmt.Sprintf("the pipe is also held by pid %d (%s), fd %d, outside the tree", x.pid, x.comm, x.fd),
					"include that process in the tree, or declare the pipe external, --external "+pipeKey(ino)+", and supply another one")
			}
			continue
		}
		if d.dry() {
			continue
		}
		if err := d.need(ends...); err != nil {
			return err
		}
		if err := d.dumpQueue(pipesImage, pipesMagic, uint32(ino), ends); err != nil {
			return fmt.Errorf("%s: %w", ends[0].link, err)
		}
		for _, o := range ends {
			d.park(o)
		}
	}
	return nil
}

// dumpQueue emits the size of a pipe or fifo and the bytes in it. They are copied
// with tee(2) into a pipe of our own and read there; the pipe keeps them. The
// packets of packet mode become one entry each.
func (d *Dumper) dumpQueue(img, magic string, id uint32, ends []*object) error {
	size, err := unix.FcntlInt(ends[0].file.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_GETPIPE_SZ", err)
	}
	var packets [][]byte
	for _, o := range ends {
		if o.readable() {
			if packets, err = peekPipe(int(o.file.Fd()), size); err != nil {
				return err
			}
			break
		}
	}
	if len(packets) == 0 {
		packets = [][]byte{nil}
	}
	for _, p := range packets {
		e := &pipe_data.PipeDataEntry{PipeId: proto.Uint32(id), Bytes: proto.Uint32(uint32(len(p))), Size: proto.Uint32(uint32(size))}
		if err := d.put(img, magic, e, p); err != nil {
			return err
		}
	}
	return nil
}

// peekPipe reads what is in a pipe without taking it out, split as reads of a
// large buffer get it: in one piece, unless there are packets.
func peekPipe(fd, size int) ([][]byte, error) {
	if n, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil && n == 0 {
		return nil, nil
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	defer func() { _, _ = unix.Close(p[0]), unix.Close(p[1]) }()
	if _, err := unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, size); err != nil {
		return nil, os.NewSyscallError("fcntl F_SETPIPE_SZ", err)
	}
	n, err := unix.Tee(fd, p[1], 1<<30, unix.SPLICE_F_NONBLOCK)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		return nil, os.NewSyscallError("tee", err)
	}
	var out [][]byte
	for left := int(n); left > 0; {
		b := make([]byte, left)
		got, err := unix.Read(p[0], b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("read", err)
		}
		if got == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		out = append(out, b[:got:got])
		left -= got
	}
	return out, nil
}

// queue is what must be put back into a pipe or fifo.
type queue struct {
	size    int
	packets [][]byte
}

// maxPipe bounds the size of a pipe that an image may ask for (F_SETPIPE_SZ
// takes an int).
const maxPipe = 1 << 30

// loadQueues reads the data of pipes or of fifos.
func (r *Restorer) loadQueues(img string) (map[uint32]*queue, error) {
	out := map[uint32]*queue{}
	for i, e := range r.set.Entries(img) {
		m, ok := e.Msg.(*pipe_data.PipeDataEntry)
		if !ok {
			return nil, fmt.Errorf("image %s: entry %d is a %T", img, i, e.Msg)
		}
		if int(m.GetBytes()) != len(e.Extra) {
			return nil, fmt.Errorf("image %s: entry %d tells of %d bytes, but there are %d", img, i, m.GetBytes(), len(e.Extra))
		}
		if m.GetSize() > maxPipe {
			return nil, fmt.Errorf("image %s: entry %d: a pipe of %d bytes is not possible", img, i, m.GetSize())
		}
		q := out[m.GetPipeId()]
		if q == nil {
			q = &queue{}
			out[m.GetPipeId()] = q
		}
		if m.Size != nil {
			q.size = int(m.GetSize())
		}
		if len(e.Extra) > 0 {
			q.packets = append(q.packets, e.Extra)
		}
	}
	return out, nil
}

// fill puts the bytes back through a description that can write. packets keeps
// their boundaries.
func (q *queue) fill(w *os.File, packets bool) error {
	if q == nil {
		return nil
	}
	fd := int(w.Fd())
	if q.size > 0 {
		if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, q.size); err != nil {
			return fmt.Errorf("give it %d bytes of room: %w", q.size, os.NewSyscallError("fcntl F_SETPIPE_SZ", err))
		}
	}
	if len(q.packets) == 0 {
		return nil
	}
	old, err := unix.FcntlInt(w.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_GETFL", err)
	}
	// Packet boundaries can only come from packet mode, even if it is off now.
	fl := old&^unix.O_DIRECT | unix.O_NONBLOCK
	if packets || len(q.packets) > 1 {
		fl |= unix.O_DIRECT
	}
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFL, fl); err != nil {
		return os.NewSyscallError("fcntl F_SETFL", err)
	}
	for _, p := range q.packets {
		for len(p) > 0 {
			n, err := unix.Write(fd, p)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EAGAIN) {
				return fmt.Errorf("it is full with %d bytes left to put back", len(p))
			}
			if err != nil {
				return os.NewSyscallError("write", err)
			}
			p = p[n:]
		}
	}
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFL, old); err != nil {
		return os.NewSyscallError("fcntl F_SETFL", err)
	}
	return nil
}

func checkPipe(r *Restorer, x *description) error {
	if x.entry.GetPipe().GetFlags()&unix.O_ACCMODE == unix.O_ACCMODE {
		return errors.New("the access mode of a pipe is not possible")
	}
	return r.checkNameless(x, fmt.Sprintf("pipe:[%d]", x.entry.GetPipe().GetPipeId()))
}

// checkNameless refuses an external pipe or socket for which nothing was handed in.
func (r *Restorer) checkNameless(x *description, name string) error {
	if f := r.facts[x.id]; f != nil && f.External && r.handed[name] == nil && r.far(name) == nil {
		return fmt.Errorf("external %s was not handed in: supply it, such as --inherit-fd fd[4]:%s with one open as descriptor 4", name, name)
	}
	return nil
}

func openPipes(r *Restorer, xs []*description) []error {
	var errs []error
	byID := map[uint32][]*description{}
	for _, x := range xs {
		byID[x.entry.GetPipe().GetPipeId()] = append(byID[x.entry.GetPipe().GetPipeId()], x)
	}
	for id, ends := range byID {
		var err error
		if in := r.inheritedName(fmt.Sprintf("pipe:[%d]", id)); in != nil {
			err = r.openHandedPipe(in, ends)
		} else {
			err = openPipe(r.pipes[id], ends, r.far(fmt.Sprintf("pipe:[%d]", id)))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: make the pipe again: %w", r.who(ends[0]), err))
		}
	}
	return errs
}

// openPipe makes a pipe with what was in it. The end that the tree does not have
// goes to far, if that is not nil.
func openPipe(q *queue, ends []*description, far *plan.Far) error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	rd, wr := os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe")
	defer func() { _, _ = rd.Close(), wr.Close() }()
	packets := false
	for _, x := range ends {
		packets = packets || x.entry.GetPipe().GetFlags()&unix.O_DIRECT != 0
	}
	if err := q.fill(wr, packets); err != nil {
		return err
	}
	if far != nil {
		end := wr
		if ends[0].entry.GetPipe().GetFlags()&unix.O_ACCMODE == unix.O_WRONLY {
			end = rd
		}
		var err error
		if far.File, err = dupFile(end); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(p[0], &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		far.Key = pipeKey(st.Ino)
	}
	usedR, usedW := false, false
	for _, x := range ends {
		flags := x.entry.GetPipe().GetFlags()
		var err error
		switch acc := flags & unix.O_ACCMODE; {
		case acc == unix.O_RDONLY && !usedR:
			usedR = true
			x.file, err = dupFile(rd)
		case acc == unix.O_WRONLY && !usedW:
			usedW = true
			x.file, err = dupFile(wr)
		default: // a further description, which somebody opened through /proc
			x.file, err = reopen(rd, pipeFlags(flags))
		}
		if err != nil {
			return err
		}
		if err := setStatus(x.file, flags); err != nil {
			return err
		}
	}
	return nil
}

// pipeFlags are the flags with which a pipe or fifo is opened again. Packet mode
// is set afterwards: open(2) takes O_DIRECT for something else.
func pipeFlags(flags uint32) int { return reopenFlags(int(flags), false) &^ unix.O_DIRECT }

// openHandedPipe opens the ends of a pipe, or fifo, that the caller handed in
// for it (CRIU's key pipe:[inode]). What is in it belongs to whoever has it.
func (r *Restorer) openHandedPipe(in *Inherit, ends []*description) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(in.File.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO && !in.AnyKind {
		return fmt.Errorf("the handed file is a %s, expected a pipe or fifo", modeKind(st.Mode))
	}
	for _, x := range ends {
		if in.Forward {
			if err := r.forward(x, in); err != nil {
				return err
			}
			continue
		}
		f, err := reopen(in.File, pipeFlags(x.entry.GetPipe().GetFlags())|unix.O_NONBLOCK)
		if err != nil {
			return hinted(err)
		}
		x.file = f
		if err := setStatus(f, x.entry.GetPipe().GetFlags()); err != nil {
			return err
		}
	}
	return nil
}
