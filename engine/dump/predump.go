package dump

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/procfs"
)

// PreDump gives the memory of a running tree to the sink, which must know that
// nothing else comes (image.DirSink.PreDump). The tree is not stopped for it: a page
// that changes meanwhile differs from what a later dump finds, which compares
// all of them.
// mode is CRIU's pre_dump_mode. What cannot be carried is for Preflight to tell.
func PreDump(ctx context.Context, log hclog.Logger, pid int, o Options, mode uint32, sink image.Sink) (st Stats, err error) {
	c, err := look(ctx, log, pid, o)
	if err != nil {
		return st, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if slices.ContainsFunc(c.procs, func(p *process) bool { return p.headless }) {
		return st, c.err() // whose memory cannot be found
	}
	facts, err := c.facts()
	if err != nil {
		return st, err
	}
	inv := &inventory.InventoryEntry{
		ImgVersion: proto.Uint32(imgVersion), FdinfoPerId: proto.Bool(true), NsPerId: proto.Bool(true), Lsmtype: inventory.Lsmtype_NO_LSM.Enum(),
		DumpUptime: proto.Uint64(uint64(facts.BoottimeNS) / 1000), PreDumpMode: proto.Uint32(mode),
	}
	if err := errors.Join(sink.Facts(facts), sink.Entry(image.Entry{File: image.InventoryFile, Magic: image.MagicInventory, Msg: inv}), sink.Sealed()); err != nil {
		return st, err
	}
	start := time.Now()
	for _, p := range c.procs {
		if p.zombie {
			continue
		}
		n, err := preDump(ctx, p, sink)
		if procfs.Gone(err) && p != c.procs[0] {
			continue
		}
		if err != nil {
			return st, fmt.Errorf("read memory of pid %d (%s): %w", p.pid, p.comm, err)
		}
		st.Processes++
		st.Pages += n
		st.Bytes += n * arch.PageSize
	}
	n, err := c.sharedMemory(ctx, sink)
	if err == nil {
		var m uint64
		m, err = c.mappedMemfds(ctx, sink)
		n += m
	}
	st.Pages += n
	st.ShmemPages += n
	st.Bytes += n * arch.PageSize
	st.DataDur = time.Since(start)
	return st, err
}

func preDump(ctx context.Context, p *process, sink image.Sink) (pages uint64, err error) {
	r, err := mem.NewReader(p.pid)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	r.Running = true
	return r.Dump(ctx, p.vmas, sink, image.DataID{Kind: image.Memory, ID: uint32(p.vpid)})
}

// mappedMemfds gives the contents of memfds that are mapped, whose numbers are those
// that a dump gives them: what is only open waits for that.
func (c *collector) mappedMemfds(ctx context.Context, sink image.Sink) (pages uint64, err error) {
	seen := map[uint32]bool{}
	for _, p := range c.procs {
		for _, v := range p.vmas {
			if !v.Is(mem.Memfd) {
				continue
			}
			n, err := c.memfd(ctx, v.Link(p.pid), seen, sink)
			pages += n
			if err != nil && !procfs.Gone(err) && !errors.Is(err, fs.ErrNotExist) {
				return pages, fmt.Errorf("read %s of pid %d (%s): %w", v, p.pid, p.comm, err)
			}
		}
	}
	return pages, nil
}

// memfd gives the contents of the memfd behind a link, unless it was seen.
func (c *collector) memfd(ctx context.Context, link string, seen map[uint32]bool, sink image.Sink) (pages uint64, err error) {
	f, err := os.Open(link)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	id := c.files.ShmID(uint64(st.Dev), st.Ino)
	if seen[id] {
		return 0, nil
	}
	seen[id] = true
	n, err := mem.DumpFile(ctx, f, st.Size, true, sink, image.DataID{Kind: image.Shmem, ID: id})
	return n / arch.PageSize, err
}
