package engine_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/image"
)

// near asks a frozen tree of this host for its pages.
type near struct{ tree *engine.Pages }

func (n near) Map(ctx context.Context, pid uint32, from uint64) ([]image.Range, uint64, error) {
	return n.tree.Map(ctx, pid, from, 50)
}

func (n near) Pages(ctx context.Context, pid uint32, start, end uint64, _ bool) (out []engine.PageRun, err error) {
	b, runs, err := n.tree.Read(ctx, pid, start, end, nil)
	for _, r := range runs {
		out = append(out, engine.PageRun{Addr: r.Start, Data: b[:r.End-r.Start]})
		b = b[r.End-r.Start:]
	}
	return out, err
}

// TestLate: a program runs while its memory is still in the frozen one, whatever it had
// been given before.
func TestLate(t *testing.T) {
	needRoot(t)
	if err := engine.CanPage(); err != nil {
		t.Fatal(err)
	}
	for _, rounds := range []int{0, 1, 3} {
		t.Run(fmt.Sprint(rounds), func(t *testing.T) {
			p := start(t, restless)
			time.Sleep(100 * time.Millisecond)
			e := engine.New(nil)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			tp := &tape{set: image.NewSet()}
			l, err := e.StartLive(ctx, p.pid, engine.DumpOptions{}, tp)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			for range rounds {
				if _, err := l.Round(ctx, tp); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond)
			}
			tree, err := e.Freeze(ctx, p.pid, engine.DumpOptions{Live: l, Late: true})
			if err != nil {
				t.Fatal(err)
			}
			st, err := tree.Dump(ctx, tp)
			if err != nil || len(st.Late) == 0 {
				t.Fatal(errors.Join(err, tree.Thaw()), st.Late)
			}
			if limit := uint64(8 << 20); st.Bytes > limit {
				t.Errorf("the dump has %d bytes", st.Bytes)
			}
			pages := engine.NewPages(st.Late)
			pager := engine.NewPager(nil, near{pages})
			s, err := e.Restore(ctx, &playback{tape: *tp}, engine.RestoreOptions{NewPidNamespace: true, Paging: func(x []engine.Space) error {
				return pager.Serve(ctx, x)
			}})
			if err != nil {
				t.Fatal(errors.Join(err, tree.Thaw()))
			}
			if err := s.Run(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rounds) * 30 * time.Millisecond)
			if err := pager.Fill(ctx); err != nil {
				t.Fatal(err)
			}
			if st := pager.Stats(); st.Left != 0 || st.Put == 0 || st.Faults == 0 {
				t.Errorf("in the end %+v", st)
			}
			if err := errors.Join(pages.Close(), tree.Kill()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
			if err := unix.Kill(s.Root(), unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			var ws unix.WaitStatus
			if _, err := unix.Wait4(s.Child(), &ws, unix.WALL, nil); err != nil || ws.ExitStatus() != 0 || !strings.Contains(p.read(), "ok\n") {
				t.Fatalf("the program ended with %#x (%v) and said %q", ws, err, p.read())
			}
		})
	}
}
