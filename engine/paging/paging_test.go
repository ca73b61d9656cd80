package paging

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/sys"
)

// far is the other side of testdata/restless.py.
type far struct {
	base  uint64
	pages int
	delay time.Duration

	mu    sync.Mutex
	asked map[uint64]int // how often for each page
	lost  error
}

func (f *far) first(page int) uint64 {
	if page%3 == 2 {
		return 0
	}
	return uint64(page) + 1
}

func (f *far) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(rand.N(f.delay + 1)):
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lost
}

func (f *far) Map(ctx context.Context, pid uint32, from uint64) (runs []image.Range, next uint64, err error) {
	if err := f.wait(ctx); err != nil {
		return nil, 0, err
	}
	for i := range f.pages {
		at := f.base + uint64(i)*arch.PageSize
		if at < from || f.first(i) == 0 {
			continue
		}
		if len(runs) == 100 {
			return runs, at, nil
		}
		runs = append(runs, image.Range{Start: at, End: at + arch.PageSize})
	}
	return runs, 0, nil
}

func (f *far) Pages(ctx context.Context, pid uint32, start, end uint64, urgent bool) (runs []Run, err error) {
	if err := f.wait(ctx); err != nil {
		return nil, err
	}
	for at := max(start, f.base); at < min(end, f.base+uint64(f.pages)*arch.PageSize); at += arch.PageSize {
		v := f.first(int((at - f.base) / arch.PageSize))
		if v == 0 {
			continue
		}
		f.mu.Lock()
		f.asked[at]++
		f.mu.Unlock()
		var b []byte
		for range arch.PageSize / 8 {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		runs = append(runs, Run{Addr: at, Data: b})
	}
	return runs, nil
}

// restless starts the program, and takes its userfaultfd.
func restless(t *testing.T, pages, steps int, seed uint64) (_ *exec.Cmd, in io.Writer, out *bufio.Reader, _ Space) {
	t.Helper()
	if err := sys.UffdServeProbe(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("needs userfaultfd with events: %v", err)
	}
	cmd := exec.Command("python3", "testdata/restless.py", fmt.Sprint(pages), fmt.Sprint(seed), fmt.Sprint(steps))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	out = bufio.NewReader(r)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var n int
	var base uint64
	if _, err := fmt.Sscan(line, &n, &base); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := sys.UffdServe(fd); err != nil {
		t.Fatal(err)
	}
	r2 := image.Range{Start: base, End: base + uint64(pages)*arch.PageSize}
	if err := sys.UffdMissing(fd, r2.Start, r2.End); err != nil {
		t.Fatal(err)
	}
	pm, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return cmd, in, out, Space{Pid: 7, Uffd: os.NewFile(uintptr(fd), "userfaultfd"), Pagemap: pm, Ranges: []image.Range{r2}}
}

// TestPager has a program read, write, empty, move, unmap, protect and inherit memory while
// its pages come late.
func TestPager(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			pages := 600 + int(seed)*300
			cmd, in, out, space := restless(t, pages, 400, seed)
			src := &far{base: space.Ranges[0].Start, pages: pages, delay: time.Duration(seed) * time.Millisecond, asked: map[uint64]int{}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			p := New(hclog.NewNullLogger(), src)
			if err := p.Serve(ctx, []Space{space}); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(in, "go\n"); err != nil {
				t.Fatal(err)
			}
			if seed%2 == 1 {
				time.Sleep(50 * time.Millisecond) // everything so far is asked for by faults
			}
			if err := p.Fill(ctx); err != nil {
				t.Fatal(err)
			}
			if st := p.Stats(); st.Left != 0 || !st.Known || st.Put == 0 {
				t.Errorf("in the end %+v", st)
			}
			line, err := out.ReadString('\n')
			if err != nil || strings.TrimSpace(line) != "fine" {
				t.Errorf("the program said %q, %v", line, err)
			}
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPagerLost: pages that cannot be had are an error, and nothing takes their place.
func TestPagerLost(t *testing.T) {
	cmd, in, _, space := restless(t, 300, 50, 1)
	lost := errors.New("gone for good")
	src := &far{base: space.Ranges[0].Start, pages: 300, asked: map[uint64]int{}, lost: lost}
	p := New(hclog.NewNullLogger(), src)
	if err := p.Serve(t.Context(), []Space{space}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	if err := p.Fill(t.Context()); !errors.Is(err, lost) {
		t.Errorf("the pager said %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	if cmd.ProcessState != nil {
		t.Error("the program went on")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the program ended with %v", err)
	}
}

// TestPagerDeath: a process that dies is no trouble.
func TestPagerDeath(t *testing.T) {
	cmd, in, _, space := restless(t, 3000, 100000, 2)
	src := &far{base: space.Ranges[0].Start, pages: 3000, delay: 2 * time.Millisecond, asked: map[uint64]int{}}
	p := New(hclog.NewNullLogger(), src)
	if err := p.Serve(t.Context(), []Space{space}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Fill(t.Context()); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}
