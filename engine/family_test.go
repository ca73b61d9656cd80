package engine_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"godwit/engine"
	"godwit/engine/image"
)

// kindred is a parent, a child and a grandchild that share a large table since
// their forks, of which each has changed, dropped and kept a part, and check it.
const kindred = `
import mmap, os, signal, sys, time
N, P = 2000, 4096
m = mmap.mmap(-1, N * P, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
want = {}
def put(i, v):
    m[i*P:(i+1)*P] = bytes([v]) * P
    want[i] = v
def drop(i):
    m.madvise(mmap.MADV_DONTNEED, i*P, P)
    want[i] = 0
for i in range(N): put(i, i % 200 + 1)
out, stop = os.pipe(), [0]
def done(*a): stop[0] = 1
signal.signal(signal.SIGTERM, done)
kids = []
def grow(depth):
    if depth == 0: return
    pid = os.fork()
    if pid:
        kids.append(pid)
        return
    kids.clear()
    for i in range(depth, N, 7): put(i, 200 + depth)
    for i in range(depth + 1, N, 31): drop(i)
    grow(depth - 1)
grow(2)
os.write(out[1], b"x")
first = os.getpid() == os.getsid(0)
if first:
    for i in range(3): os.read(out[0], 1)
    print("up", flush=True)
while not stop[0]: time.sleep(0.01)
bad = [i for i in range(N) if m[i*P:(i+1)*P] != bytes([want[i]]) * P]
for k in kids:
    os.kill(k, signal.SIGTERM)
    if os.waitpid(k, 0)[1] != 0: bad.append("child")
if first: print("ok" if not bad else "bad %s" % bad[:5], flush=True)
sys.exit(1 if bad else 0)
`

// reordered gives data in another order than the one that is best.
type reordered struct {
	image.Source
	pieces []piece
}

type piece struct {
	id  image.DataID
	off uint64
	b   []byte
}

func (r *reordered) Next(context.Context) (image.DataID, uint64, []byte, error) {
	if len(r.pieces) == 0 {
		return image.DataID{}, 0, nil, io.EOF
	}
	p := r.pieces[0]
	r.pieces = r.pieces[1:]
	return p.id, p.off, p.b, nil
}

// Memory comes back right in whatever order it comes, and shared in the best one.
func TestFamilyOrders(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	e := engine.New(nil)
	p := start(t, kindred)
	p.dump(e, dir, true)
	for _, c := range []struct {
		name   string
		order  func([]piece)
		shared string // "all" or "none"; else it depends
	}{
		{"parents first", func([]piece) {}, "all"},
		{"children first", func(ps []piece) {
			slices.SortStableFunc(ps, func(a, b piece) int { return int(b.id.ID) - int(a.id.ID) })
		}, "none"},
		{"grandchild between", func(ps []piece) {
			root := slices.MinFunc(ps, func(a, b piece) int { return int(a.id.ID) - int(b.id.ID) }).id.ID
			slices.SortStableFunc(ps, func(a, b piece) int { return int(a.id.ID-root+2)%3 - int(b.id.ID-root+2)%3 })
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := context.Background()
			src, err := image.OpenDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = src.Close() }()
			r := &reordered{Source: src}
			for {
				id, off, b, err := src.Next(ctx)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				r.pieces = append(r.pieces, piece{id, off, slices.Clone(b)})
			}
			memory := r.pieces[:slices.IndexFunc(append(r.pieces, piece{}), func(x piece) bool { return x.id.Kind != image.Memory })]
			c.order(memory)
			tree, err := e.Restore(ctx, r, engine.RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if shared := tree.Stats().SharedPages; c.shared == "all" && shared <= 2000 || c.shared == "none" && shared > 2000 {
				t.Errorf("%d pages are shared", shared)
			}
			if err := tree.Run(); err != nil {
				t.Fatal(err)
			}
			p.finish()
		})
	}
}
