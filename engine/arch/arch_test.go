package arch

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func neg(v int64) uint64 { return uint64(-v) }

func TestRestartInNewTask(t *testing.T) {
	const ip = 0x1002
	for _, c := range []struct {
		name      string
		orig, ax  uint64
		di, si    uint64
		dx, r10   uint64
		want      Regs
		untouched bool
	}{
		{name: "not in a system call", orig: ^uint64(0), ax: 7, untouched: true},
		{name: "completed", orig: unix.SYS_READ, ax: 12, untouched: true},
		{name: "failed", orig: unix.SYS_READ, ax: neg(int64(unix.EAGAIN)), untouched: true},
		{name: "EINTR of another call", orig: unix.SYS_READ, ax: neg(int64(unix.EINTR)), untouched: true},
		{name: "ERESTARTSYS", orig: unix.SYS_READ, ax: neg(512), want: Regs{Rax: unix.SYS_READ, Rip: ip - 2}},
		{name: "ERESTARTNOINTR", orig: unix.SYS_FUTEX, ax: neg(513), want: Regs{Rax: unix.SYS_FUTEX, Rip: ip - 2}},
		{name: "ERESTARTNOHAND", orig: unix.SYS_PAUSE, ax: neg(514), want: Regs{Rax: unix.SYS_PAUSE, Rip: ip - 2}},
		{name: "poll", orig: unix.SYS_POLL, ax: neg(516), di: 1, si: 2, dx: 3, want: Regs{Rax: unix.SYS_POLL, Rip: ip - 2, Rdi: 1, Rsi: 2, Rdx: 3}},
		{name: "nanosleep with remainder", orig: unix.SYS_NANOSLEEP, ax: neg(516), di: 1, si: 2, want: Regs{Rax: unix.SYS_NANOSLEEP, Rip: ip - 2, Rdi: 2, Rsi: 2}},
		{name: "nanosleep without", orig: unix.SYS_NANOSLEEP, ax: neg(516), di: 1, want: Regs{Rax: unix.SYS_NANOSLEEP, Rip: ip - 2, Rdi: 1}},
		{name: "clock_nanosleep with remainder", orig: unix.SYS_CLOCK_NANOSLEEP, ax: neg(516), dx: 3, r10: 4,
			want: Regs{Rax: unix.SYS_CLOCK_NANOSLEEP, Rip: ip - 2, Rdx: 4, R10: 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := Regs{OrigRax: c.orig, Rax: c.ax, Rip: ip, Rdi: c.di, Rsi: c.si, Rdx: c.dx, R10: c.r10}
			want := c.want
			if c.untouched {
				want = r
			}
			want.OrigRax = ^uint64(0) // the kernel must never restart by itself
			r.RestartInNewTask()
			if d := cmp.Diff(want, r); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestHideInterrupt(t *testing.T) {
	for _, c := range []struct {
		name     string
		orig, ax uint64
		hidden   bool
	}{
		{"epoll_wait", unix.SYS_EPOLL_WAIT, neg(int64(unix.EINTR)), true},
		{"sigtimedwait", unix.SYS_RT_SIGTIMEDWAIT, neg(int64(unix.EINTR)), true},
		{"not interrupted", unix.SYS_EPOLL_WAIT, 1, false},
		{"restarts by itself", unix.SYS_READ, neg(512), false},
		{"connect would fail again", unix.SYS_CONNECT, neg(int64(unix.EINTR)), false},
		{"in user code", ^uint64(0), neg(int64(unix.EINTR)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := Regs{OrigRax: c.orig, Rax: c.ax, Rip: 0x1002, Rdi: 5}
			r, want := before, before
			if c.hidden {
				want = Regs{OrigRax: ^uint64(0), Rax: c.orig, Rip: 0x1000, Rdi: 5}
			}
			if got := r.HideInterrupt(); got != c.hidden {
				t.Errorf("hidden %v, want %v", got, c.hidden)
			}
			if d := cmp.Diff(want, r); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestRegsRoundTrip(t *testing.T) {
	var want Regs
	for i, f := range want.fields() {
		*f = uint64(i + 1)
	}
	var got Regs
	if err := got.Decode(want.Encode()); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("bytes (-want +got)\n%s", d)
	}
	back, err := RegsFromImage(RegsToImage(&want))
	if err != nil {
		t.Fatal(err)
	}
	want.OrigRax = ^uint64(0)
	if d := cmp.Diff(want, back); d != "" {
		t.Errorf("image (-want +got)\n%s", d)
	}
	if err := got.Decode(make([]byte, 17*4)); err == nil {
		t.Error("the registers of a 32-bit task were taken")
	}
	kernel := want
	kernel.Rip = 0xffffffff81000000
	if _, err := RegsFromImage(RegsToImage(&kernel)); err == nil {
		t.Error("an instruction pointer in the kernel was taken")
	}
}

// xstate makes the bytes of a task with every component in use.
func xstate(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, xstateExtended)
	for i, c := range components() {
		if XFeatures()&(1<<i) == 0 {
			continue
		}
		if n := int(c.off + c.size); n > len(b) {
			b = append(b, make([]byte, n-len(b))...)
		}
	}
	bv := uint64(1<<xfX87 | 1<<xfSSE)
	for i, c := range components() {
		if XFeatures()&(1<<i) == 0 {
			continue
		}
		bv |= 1 << i
		n := c.size
		if i == xfPkru {
			n = 4 // the rest of its 8 bytes is padding
		}
		for k := range n {
			b[c.off+k] = byte(int(k)*7 + i)
		}
	}
	for i := range 416 {
		if i < 28 || i >= 32 { // not the mask of MXCSR
			b[i] = byte(i*3 + 1)
		}
	}
	b[5] = 0 // reserved byte beside the tag word
	for i := range 8 {
		b[xstateBV+i] = byte(bv >> (8 * i))
	}
	// x87 registers have 10 of 16 bytes.
	return b
}

func TestXStateRoundTrip(t *testing.T) {
	if XFeatures() == 0 {
		t.Skip("this CPU has no XSAVE")
	}
	want := xstate(t)
	e, err := XStateToImage(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := XStateFromImage(e, make([]byte, len(want)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	unknown := append([]byte(nil), want...)
	unknown[xstateBV+2] |= 1 << 2 // component 18, AMX
	if _, err := XStateToImage(unknown); err == nil {
		t.Error("a component without a field in the images was taken")
	}
	e.Xsave.YmmhSpace = make([]uint32, 4096)
	if _, err := XStateFromImage(e, make([]byte, len(want))); err == nil && XFeatures()&(1<<xfAVX) != 0 {
		t.Error("more AVX state than the CPU has was taken")
	}
	if _, err := XStateToImage(want[:512]); err == nil {
		t.Error("state without an XSAVE header was taken")
	}
}

func TestNameContinued(t *testing.T) {
	neg := func(n int64) uint64 { return uint64(-n) }
	for _, tc := range []struct {
		wchan string
		rdi   uint64
		want  uint64
	}{
		{"hrtimer_nanosleep", 0x7ffd12345678, unix.SYS_NANOSLEEP},
		{"hrtimer_nanosleep", 0x4c0000, unix.SYS_NANOSLEEP},
		{"hrtimer_nanosleep", unix.CLOCK_MONOTONIC, unix.SYS_CLOCK_NANOSLEEP},
		{"do_cpu_nanosleep", neg(6), unix.SYS_CLOCK_NANOSLEEP},
		{"do_cpu_nanosleep", 0xfffffffa, unix.SYS_CLOCK_NANOSLEEP},
		{"alarmtimer_do_nsleep", unix.CLOCK_BOOTTIME_ALARM, unix.SYS_CLOCK_NANOSLEEP},
		{"poll_schedule_timeout.constprop.0", 0x7ffd12345678, unix.SYS_POLL},
		{"__futex_wait", 0x7ffd12345678, unix.SYS_FUTEX},
		{"do_syscall_64", 0x7ffd12345678, unix.SYS_NANOSLEEP},
		{"0", 0x7ffd12345678, unix.SYS_RESTART_SYSCALL},
	} {
		r := Regs{}
		r.OrigRax, r.Rax, r.Rdi = unix.SYS_RESTART_SYSCALL, neg(516), tc.rdi
		if !r.ContinuesUnnamed() {
			t.Fatal("it is not known to go on")
		}
		if known := r.NameContinued(tc.wchan); r.OrigRax != tc.want || known != (tc.want != unix.SYS_RESTART_SYSCALL) {
			t.Errorf("%s with %#x: call %d, want %d", tc.wchan, tc.rdi, r.OrigRax, tc.want)
		}
	}
}

func TestKeyRights(t *testing.T) {
	c := component{off: 2688, size: 8}
	xstate := func(bv uint64, pkru uint32) []byte {
		b := make([]byte, 2696)
		binary.LittleEndian.PutUint64(b[xstateBV:], bv)
		binary.LittleEndian.PutUint32(b[c.off:], pkru)
		return b
	}
	for _, x := range []struct {
		name string
		b    []byte
		want uint32
	}{
		{"as a thread begins", xstate(1<<xfPkru|7, KeysDefault), KeysDefault},
		{"key 1 was allocated", xstate(1<<xfPkru, 0x55555550), 0x55555550},
		{"all rights", xstate(7, 0xffff), 0},
		{"no such state", make([]byte, xstateExtended), KeysDefault},
	} {
		if got := keyRights(x.b, c); got != x.want {
			t.Errorf("%s: %#x, want %#x", x.name, got, x.want)
		}
	}
}
