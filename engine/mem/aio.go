package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	mmimg "github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// A ring of asynchronous I/O (io_setup(2)) is mapped where its context has its
// name: head, tail and events that were not read yet. The kernel keeps the tail,
// and how many requests are under way, to itself as well. Both are found out and
// set by requests that are done at once: each moves the tail by one.

// Layout of struct aio_ring (fs/aio.c).
const (
	ringNr     = 4
	ringHead   = 8
	ringTail   = 12
	ringMagic  = 16
	ringHeader = 32
	eventSize  = 32 // struct io_event

	aioMagic = 0xa10a10a1
	// perPage is how many events a page takes.
	perPage = arch.PageSize / eventSize
	// maxRing is more than the largest ring, in bytes: the kernel allows 2^28 bytes of events.
	maxRing = 1<<28 + 2*arch.PageSize
)

// aioCookie marks the events of our own requests.
const aioCookie = 0xa10c_6f64_7769_7401

// ErrStaleRing says that a mapping is not the ring of a context of its process: it
// was inherited by fork(2), or its context is gone.
var ErrStaleRing = errors.New("no context of asynchronous I/O has its ring there")

// ringEvents is how many events a ring of that many bytes has.
func ringEvents(size uint64) uint32 { return uint32(size/eventSize) - 1 }

// possibleCPUs counts the CPUs by which the kernel measures rings.
func possibleCPUs() (int, error) {
	mask, err := procfs.PossibleCPUs()
	n := 0
	for _, w := range mask {
		n += bits.OnesCount64(w)
	}
	return max(n, 1), err
}

// ringLen is the size in bytes of the ring that io_setup makes for a number of
// events on a host with so many CPUs (ioctx_alloc and aio_setup_ring, fs/aio.c).
func ringLen(events uint32, cpus int) uint64 {
	n := uint64(max(events, uint32(cpus)*4))*2 + 2
	return (ringHeader + n*eventSize + arch.PageSize - 1) / arch.PageSize * arch.PageSize
}

// ringRequest is the least number of events for which io_setup makes a ring of
// that many bytes; whatever a program asked for, it got the whole ring.
func ringRequest(size uint64) uint32 {
	return uint32(max(1, int64(size/arch.PageSize-1)*perPage/2-1))
}

// RingsToImage makes the entries of the rings.
func RingsToImage(vmas []*VMA) (out []*mmimg.AioRingEntry) {
	for _, v := range vmas {
		if v.Is(AioRing) {
			out = append(out, &mmimg.AioRingEntry{Id: proto.Uint64(v.Start), NrReq: proto.Uint32(ringRequest(v.Len())), RingLen: proto.Uint32(uint32(v.Len()))})
		}
	}
	return out
}

// CheckRings checks the entries of rings in an image against its mappings, and that
// this host makes rings of their sizes.
func CheckRings(vmas []*VMA, es []*mmimg.AioRingEntry) error {
	lens := map[uint64]uint32{}
	for _, e := range es {
		lens[e.GetId()] = e.GetRingLen()
	}
	for _, v := range vmas {
		if !v.Is(AioRing) {
			continue
		}
		if v.Len() > maxRing || uint64(lens[v.Start]) != v.Len() {
			return fmt.Errorf("%s is a ring of asynchronous I/O of %d bytes, and of %d in another place", v, v.Len(), lens[v.Start])
		}
		delete(lens, v.Start)
		cpus, err := possibleCPUs()
		if err != nil {
			return err
		}
		if n := ringLen(ringRequest(v.Len()), cpus); n != v.Len() {
			return fmt.Errorf("%s is a ring of asynchronous I/O of %d bytes, which this host makes %d bytes long, for its %d possible CPUs", v, v.Len(), n, cpus)
		}
	}
	if len(lens) > 0 {
		return fmt.Errorf("image holds %d rings of asynchronous I/O that are mapped nowhere", len(lens))
	}
	return nil
}

// ring is one of a stopped process that executes system calls for us.
type ring struct {
	r    *ptrace.Remote
	v    *VMA
	file uint64 // descriptor of the process to read from
	nr   uint32
	// head and tail are as the process finds them, tail as we have last seen it.
	head, tail uint32
	unread     [][eventSize]byte
	cpus       int
}

// openRing reads a ring.
func openRing(r *ptrace.Remote, v *VMA) (*ring, error) {
	g := &ring{r: r, v: v, nr: ringEvents(v.Len())}
	var err error
	if g.cpus, err = possibleCPUs(); err != nil {
		return nil, err
	}
	return g, g.read()
}

// read reads head, tail and the events between them.
func (g *ring) read() error {
	b := make([]byte, g.v.Len())
	if err := g.get(b, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint32(b[ringMagic:]) != aioMagic || le.Uint32(b[ringNr:]) != g.nr {
		return fmt.Errorf("%s has no head of a ring of %d events: %w", g.v, g.nr, ErrStaleRing)
	}
	g.head, g.tail = le.Uint32(b[ringHead:]), le.Uint32(b[ringTail:])
	if g.head >= g.nr || g.tail >= g.nr {
		return fmt.Errorf("%s has its head at event %d and its tail at %d of %d", g.v, g.head, g.tail, g.nr)
	}
	g.unread = nil
	for i := g.head; i != g.tail; i = (i + 1) % g.nr {
		g.unread = append(g.unread, [eventSize]byte(b[ringHeader+i*eventSize:]))
	}
	return nil
}

func (g *ring) get(b []byte, off uint64) error {
	_, err := sys.ProcessVMRead(g.r.Tid, b, []unix.RemoteIovec{{Base: uintptr(g.v.Start + off), Len: len(b)}})
	if err != nil {
		return fmt.Errorf("read %s: %w", g.v, err)
	}
	return nil
}

func (g *ring) put(b []byte, off uint64) error {
	n, err := sys.ProcessVMWrite(g.r.Tid, g.v.Start+off, b)
	if err == nil && n != len(b) {
		err = fmt.Errorf("only %d of %d bytes", n, len(b))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", g.v, err)
	}
	return nil
}

func (g *ring) setHead(head uint32) error {
	return g.put(binary.LittleEndian.AppendUint32(nil, head), ringHead)
}

// count is how many events there are from one place to another.
func (g *ring) count(from, to uint32) uint32 { return (to + g.nr - from) % g.nr }

// open gives the process a file of which every read is done at once.
func (g *ring) open() error {
	c := ptrace.NewCall("make an eventfd", unix.SYS_EVENTFD2, ptrace.Int(0), ptrace.Int(unix.EFD_NONBLOCK|unix.EFD_CLOEXEC))
	if err := g.r.Run(c); err != nil {
		return err
	}
	g.file = uint64(c.Ret)
	return nil
}

func (g *ring) close() error {
	return g.r.Run(ptrace.NewCall("close the eventfd", unix.SYS_CLOSE, ptrace.Int(g.file)))
}

// batchOfRequests is how many requests are made by one call.
const batchOfRequests = 2048

// submit makes up to n requests on the CPU where the process is and says how many
// the kernel took. Events that came from elsewhere meanwhile join unread.
func (g *ring) submit(n uint32) (taken uint32, err error) {
	for taken < n {
		k := min(n-taken, batchOfRequests)
		c := ptrace.NewCall("submit requests of asynchronous I/O", unix.SYS_IO_SUBMIT, ptrace.Int(g.v.Start), ptrace.Int(k), g.requests(k))
		c.MayFail = true
		if err := g.r.Run(c); err != nil {
			return taken, err
		}
		switch {
		case c.Ret == -int64(unix.EAGAIN):
			return taken, g.look()
		case c.Ret == -int64(unix.EINVAL):
			return taken, ErrStaleRing
		case c.Ret < 0:
			return taken, ptrace.Errno("io_submit", c.Ret)
		}
		taken += uint32(c.Ret)
		if err := g.look(); err != nil || uint32(c.Ret) < k {
			return taken, err
		}
	}
	return taken, nil
}

// requests is one request, a struct iocb (include/uapi/linux/aio_abi.h), and k
// pointers to it.
func (g *ring) requests(k uint32) ptrace.Arg {
	at := int(k) * 8
	b := make([]byte, at+64)
	le := binary.LittleEndian
	le.PutUint64(b[at:], aioCookie) // IOCB_CMD_PREAD is 0
	le.PutUint32(b[at+20:], uint32(g.file))
	le.PutUint64(b[at+24:], g.r.Area+arch.PageSize)
	a := ptrace.Arg{In: b}
	for i := range int(k) {
		a.Rel = append(a.Rel, ptrace.Rel{At: 8 * i, To: at})
	}
	return a
}

// look finds the tail, and events that are not ours before it.
func (g *ring) look() error {
	b := make([]byte, g.v.Len())
	if err := g.get(b, 0); err != nil {
		return err
	}
	tail := binary.LittleEndian.Uint32(b[ringTail:]) % g.nr
	for ; g.tail != tail; g.tail = (g.tail + 1) % g.nr {
		if e := b[ringHeader+g.tail*eventSize:]; binary.LittleEndian.Uint64(e) != aioCookie {
			g.unread = append(g.unread, [eventSize]byte(e))
		}
	}
	return nil
}

// everywhere is submit that goes on on other CPUs if the kernel does not take all:
// each keeps room for some requests to itself.
func (g *ring) everywhere(n uint32) (taken uint32, err error) {
	if taken, err = g.submit(n); err != nil || taken == n {
		return taken, err
	}
	old, err := sys.Affinity(g.r.Tid)
	if err != nil {
		return taken, err
	}
	defer func() { err = errors.Join(err, sys.SetAffinity(g.r.Tid, old)) }()
	for cpu := 0; cpu < len(old)*64 && taken < n; cpu++ {
		if old[cpu/64]&(1<<(cpu%64)) == 0 {
			continue
		}
		one := make([]uint64, cpu/64+1)
		one[cpu/64] = 1 << (cpu % 64)
		if err := sys.SetAffinity(g.r.Tid, one); err != nil {
			return taken, err
		}
		k, err := g.submit(n - taken)
		taken += k
		if err != nil {
			return taken, err
		}
	}
	return taken, nil
}

// out is how many requests the kernel never takes: it gives each CPU room for a
// number of them at once (req_batch, fs/aio.c).
func (g *ring) out() uint32 {
	return (g.nr - 1) % max((g.nr-1)/(uint32(g.cpus)*4), 1)
}

// wind puts the tail behind the events of unread, which begin at head, and those
// events, with the kernel counting as many of them as not read.
func (g *ring) wind() error {
	begin := g.tail
	for g.tail != g.head {
		if err := g.setHead(g.tail); err != nil {
			return err
		}
		// Others' events may carry it past the head: then once more around.
		n, err := g.everywhere(min(g.count(g.tail, g.head), g.nr-1))
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s takes no requests from event %d on (it began at %d)", g.v, g.tail, begin)
		}
	}
	if err := g.setHead(g.head); err != nil {
		return err
	}
	for {
		need := int(len(g.unread)) - int(g.count(g.head, g.tail))
		if need <= 0 {
			break
		}
		n, err := g.everywhere(uint32(need))
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%s takes no more requests, with %d events to come", g.v, need)
		}
	}
	for i, e := range g.unread {
		at := (g.head + uint32(i)) % g.nr
		if err := g.put(e[:], ringHeader+uint64(at)*eventSize); err != nil {
			return err
		}
	}
	return nil
}

// RingBusy counts the requests that are under way at the ring v of a stopped process.
// The ring is the same afterwards, but for what became ready meanwhile.
// Preconditions: as for r.Run.
func RingBusy(r *ptrace.Remote, v *VMA) (busy uint32, err error) {
	g, err := openRing(r, v)
	if err != nil {
		return 0, err
	}
	// A context that is not there takes nothing, and no descriptor is needed to know.
	probe := ptrace.NewCall("look at a context of asynchronous I/O", unix.SYS_IO_SUBMIT, ptrace.Int(v.Start), ptrace.Int(0), ptrace.Int(0))
	probe.MayFail = true
	if err := r.Run(probe); err != nil {
		return 0, err
	}
	if probe.Ret < 0 {
		return 0, ErrStaleRing
	}
	if err := g.open(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	begin := len(g.unread)
	room := g.nr - 1 - uint32(begin)
	taken, err := g.everywhere(room)
	if err == nil && room-taken > g.out() {
		// Those that became ready meanwhile are no longer under way.
		busy = room - taken - g.out()
		busy -= min(busy, uint32(len(g.unread)-begin))
	}
	if taken == 0 {
		return busy, err
	}
	return busy, errors.Join(err, g.wind())
}

// MakeRing makes the ring v with the contents that lie, as plain memory, in its place.
// Preconditions: as for r.Run.
func MakeRing(r *ptrace.Remote, v *VMA) (err error) {
	want, err := openRing(r, v)
	if err != nil {
		return err
	}
	slot := make([]byte, 8)
	setup := ptrace.NewCall("make a context of asynchronous I/O (limited by fs.aio-max-nr)", unix.SYS_IO_SETUP, ptrace.Int(ringRequest(v.Len())), ptrace.Arg{In: make([]byte, 8), Out: slot})
	if err := r.Run(setup); err != nil {
		return err
	}
	at := binary.LittleEndian.Uint64(slot)
	move := ptrace.NewCall("move "+v.String(), unix.SYS_MREMAP, ptrace.Int(at), ptrace.Int(v.Len()), ptrace.Int(v.Len()),
		ptrace.Int(uint64(unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED)), ptrace.Int(v.Start))
	if err := r.Run(move); err != nil {
		return err
	}
	g, err := openRing(r, v)
	if err != nil {
		return err
	}
	if err := g.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	g.head, g.unread = want.head, want.unread
	if err := g.wind(); err != nil {
		return err
	}
	if g.tail != want.tail {
		return fmt.Errorf("%s has its tail at event %d, want %d", v, g.tail, want.tail)
	}
	return nil
}
