package engine_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
)

// restless writes, drops, maps, grows and forks all the time, and knows what it must find.
const restless = `
import mmap, os, random, signal, sys, time
N, P = 4000, 4096
rng = random.Random(7)
maps, want = [], []
def fresh():
    maps.append(mmap.mmap(-1, N * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)); want.append({})
fresh()
stop = [0]
def done(*a): stop[0] = 1
signal.signal(signal.SIGTERM, done)
print("up", flush=True)
rounds, heap = 0, []
while not stop[0]:
    for k, (m, w) in enumerate(zip(maps, want)):
        for i in rng.sample(range(N), 60):
            v = rng.randrange(1, 255)
            m[i*P:(i+1)*P] = bytes([v]) * P; w[i] = v
        i = rng.randrange(N - 50)
        m.madvise(mmap.MADV_DONTNEED, i*P, 50*P)
        for j in range(i, i + 50): w.pop(j, None)
    rounds += 1
    if rounds % 5 == 0 and len(maps) < 4: fresh()
    if rounds % 11 == 0 and len(maps) > 1: maps.pop(0).close(); want.pop(0)
    heap.append(bytes([rounds % 256]) * 300000)
    if len(heap) > 40: heap = heap[30:]
    if rounds % 20 == 0:
        pid = os.fork()
        if pid == 0: os._exit(0 if all(m[i*P] == v for m, w in zip(maps, want) for i, v in w.items()) else 1)
        if os.waitpid(pid, 0)[1] != 0: print("bad child", flush=True)
    time.sleep(0.001)
bad = [(k, i) for k, (m, w) in enumerate(zip(maps, want)) for i in range(N) if m[i*P:(i+1)*P] != bytes([w.get(i, 0)]) * P]
bad += [h[:1] for h in heap if h != h[:1] * len(h)]
print("ok" if not bad and rounds > 10 else "bad %d %s" % (rounds, bad[:5]), flush=True)
`

// tape records what a sink is given, and gives it as a source.
type tape struct {
	out    *image.Outline
	early  []piece
	set    *image.Set
	sealed bool
	late   []piece
}

func (t *tape) Outline(o *image.Outline) error { t.out = o; return nil }
func (t *tape) File(*image.EarlyFile) error    { return errors.New("no file is carried") }
func (t *tape) Facts(f *image.Facts) error     { t.set.Facts = f; return nil }
func (t *tape) Entry(e image.Entry) error      { t.set.Add(e); return nil }
func (t *tape) Sealed() error                  { t.sealed = true; return nil }

func (t *tape) Data(id image.DataID, off uint64, b []byte) error {
	p := piece{id, off, slices.Clone(b)}
	if t.sealed {
		t.late = append(t.late, p)
	} else {
		t.early = append(t.early, p)
	}
	return nil
}

// playback gives a tape as a source.
type playback struct {
	tape
	outlined      bool
	first, second int
}

func (p *playback) Early(context.Context) (image.Early, error) {
	if p.out != nil && !p.outlined {
		p.outlined = true
		return image.Early{Outline: p.out}, nil
	}
	id, off, b, err := next(p.early, &p.first)
	return image.Early{ID: id, Off: off, Data: b}, err
}

func (p *playback) Images(context.Context) (*image.Set, error) { return p.set, nil }

func (p *playback) Next(context.Context) (image.DataID, uint64, []byte, error) {
	return next(p.late, &p.second)
}

func next(list []piece, at *int) (image.DataID, uint64, []byte, error) {
	if *at == len(list) {
		return image.DataID{}, 0, nil, io.EOF
	}
	*at++
	p := list[*at-1]
	return p.id, p.off, p.b, nil
}

// record copies a running program in some rounds and then dumps it.
func record(t *testing.T, e *engine.Engine, p *program, rounds int) *tape {
	t.Helper()
	ctx := context.Background()
	tp := &tape{set: image.NewSet()}
	l, err := e.StartLive(ctx, p.pid, engine.DumpOptions{}, tp)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	for range rounds {
		if _, err := l.Round(ctx, tp); err != nil {
			t.Fatal(err)
		}
		if n, err := l.Pending(); err != nil || n > 1<<30 {
			t.Fatalf("%d bytes are pending: %v", n, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	tree, err := e.Freeze(ctx, p.pid, engine.DumpOptions{Live: l})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tree.Dump(ctx, tp); err != nil {
		t.Fatal(errors.Join(err, tree.Thaw()))
	}
	if err := tree.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = p.wait() // unless the tracer, a thread of this process, has reaped it
	return tp
}

// TestLive: what was copied while the program ran, and what the dump adds, make it
// again, time after time.
func TestLive(t *testing.T) {
	needRoot(t)
	p := start(t, restless)
	e := engine.New(nil)
	for i := range 6 {
		tp := record(t, e, p, i)
		s, err := e.Restore(context.Background(), &playback{tape: *tp}, engine.RestoreOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	p.finish()
}

// TestLiveLeavesNothing: a copy that is ended is not to be seen in the program.
func TestLiveLeavesNothing(t *testing.T) {
	needRoot(t)
	p := start(t, workload)
	before := shape(t, p.pid)
	l, err := engine.New(nil).StartLive(context.Background(), p.pid, engine.DumpOptions{}, &tape{set: image.NewSet()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Round(context.Background(), &tape{set: image.NewSet()}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	after := shape(t, p.pid)
	if fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("before %v\nafter  %v", before, after)
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", p.pid))
	if err != nil || strings.Contains(string(smaps), " uw") {
		t.Errorf("memory is still followed (%v)", err)
	}
	p.finish()
}

// TestLiveHostile: what comes early is not to be trusted more than images are, and an
// error leaves nothing.
func TestLiveHostile(t *testing.T) {
	needRoot(t)
	e := engine.New(nil)
	p := start(t, workload)
	good := record(t, e, p, 1)
	pid := good.out.Procs[0].Pid
	region := func(r image.Region) piece {
		return piece{image.DataID{Kind: image.Layout, ID: pid}, 0, image.AppendRegion(nil, r)}
	}
	const private = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	for name, tc := range map[string]struct {
		spoil func(*tape)
		want  string
	}{
		"no outline":        {func(t *tape) { t.out = nil }, "not among the processes"},
		"nothing early":     {func(t *tape) { t.out, t.early = nil, nil }, "should have come before"},
		"a parent too many": {func(t *tape) { t.out = &image.Outline{Procs: []image.OutlineProc{{Pid: pid, Parent: 7, Sid: pid}}} }, "no parent before it"},
		"another pid":       {func(t *tape) { t.out = &image.Outline{Procs: []image.OutlineProc{{Pid: pid + 1, Sid: pid + 1}}} }, "not among the processes"},
		"another session":   {func(t *tape) { t.out = &image.Outline{Procs: []image.OutlineProc{{Pid: pid, Sid: 1}}} }, "differs"},
		"pid 1":             {func(t *tape) { t.out = &image.Outline{Procs: []image.OutlineProc{{Pid: 1, Sid: 1}}} }, "impossible numbers"},
		"data of nobody": {func(t *tape) {
			t.early = []piece{{image.DataID{Kind: image.Memory, ID: 1 << 20}, 0, make([]byte, 4096)}}
		}, "not among the processes"},
		"data of a file": {func(t *tape) { t.early = []piece{{image.DataID{Kind: image.Ghost, ID: pid}, 0, make([]byte, 4096)}} }, "before the images"},
		"data in nothing": {func(t *tape) {
			t.early = []piece{{image.DataID{Kind: image.Memory, ID: pid}, 0x1000000, make([]byte, 4096)}}
		}, "no private mapping"},
		"half a layout": {func(t *tape) { t.early = []piece{{image.DataID{Kind: image.Layout, ID: pid}, 0, make([]byte, 31)}} }, "malformed"},
		"shared memory": {func(t *tape) {
			t.early = []piece{region(image.Region{Range: image.Range{Start: 0x100000, End: 0x200000}, Prot: 3, Flags: unix.MAP_SHARED | unix.MAP_ANONYMOUS})}
		}, "with flags"},
		"huge pages": {func(t *tape) {
			t.early = []piece{region(image.Region{Range: image.Range{Start: 0x200000, End: 0x400000}, Prot: 3, Flags: private | unix.MAP_HUGETLB})}
		}, "with flags"},
		"outside": {func(t *tape) {
			t.early = []piece{region(image.Region{Range: image.Range{Start: 0x100000, End: 1 << 50}, Prot: 3, Flags: private})}
		}, "malformed"},
		"everything": {func(t *tape) {
			t.early = []piece{region(image.Region{Range: image.Range{Start: 0x100000, End: 1<<47 - 4096}, Prot: 3, Flags: private | unix.MAP_NORESERVE})}
		}, "works while memory comes early"},
		"holes in nothing": {func(t *tape) {
			t.late = append(t.late, piece{image.DataID{Kind: image.Holes, ID: pid}, 0, image.AppendRange(nil, image.Range{Start: 0x1000, End: 0x2000})})
		}, "no memory of its own"},
		"holes of nobody": {func(t *tape) {
			t.late = append(t.late, piece{image.DataID{Kind: image.Holes, ID: pid + 1}, 0, image.AppendRange(nil, image.Range{Start: 0x1000, End: 0x2000})})
		}, "of which nothing came"},
		"odd holes": {func(t *tape) {
			t.late = append(t.late, piece{image.DataID{Kind: image.Holes, ID: pid}, 0, image.AppendRange(nil, image.Range{Start: 5, End: 0x2000})})
		}, "malformed"},
		"memory of a stranger": {func(t *tape) {
			f := *t.set.Facts
			f.Precopied = append(slices.Clone(f.Precopied), pid+5)
			s := image.NewSet()
			for _, name := range t.set.Files() {
				for _, x := range t.set.Entries(name) {
					s.Add(x)
				}
			}
			s.Facts, t.set = &f, s
		}, "should have come before"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := *good
			tc.spoil(&bad)
			s, err := e.Restore(context.Background(), &playback{tape: bad}, engine.RestoreOptions{})
			if err == nil {
				t.Fatal(errors.Join(errors.New("it was restored"), s.Discard()))
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			if err := unix.Kill(int(pid), 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("pid %d is left: %v", pid, err)
			}
		})
	}
	for name, o := range map[string]engine.RestoreOptions{"lead": {Lead: true}, "sibling": {Sibling: true}} {
		if _, err := e.Restore(context.Background(), &playback{tape: *good}, o); err == nil || !strings.Contains(err.Error(), "before the images") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	s, err := e.Restore(context.Background(), &playback{tape: *good}, engine.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	p.finish()
}
