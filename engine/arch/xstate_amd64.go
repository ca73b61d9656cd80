package arch

import (
	"encoding/binary"
	"fmt"
	"sync"

	core_x86 "github.com/checkpoint-restore/go-criu/v8/crit/images/core-x86"
	"google.golang.org/protobuf/proto"
)

// MaxXState bounds the extended state of a task (AMX included).
const MaxXState = 16384

// Extended-state components (Intel SDM 1, 13.1; arch/x86/include/asm/fpu/types.h).
const (
	xfX87, xfSSE, xfAVX              = 0, 1, 2
	xfOpmask, xfZmmHi256, xfHi16Zmm  = 5, 6, 7
	xfPkru                           = 9
	xstateHeader                     = 512
	xstateExtended                   = 576
	xstateBV                         = xstateHeader
	fxSwBytes                        = 464 // xfeatures of the kernel's fx_sw_reserved
	legacySt, legacyXmm, legacyMxcsr = 32, 160, 24
)

// carried is every component that CRIU's images have a field for.
const carried = 1<<xfX87 | 1<<xfSSE | 1<<xfAVX | 1<<xfOpmask | 1<<xfZmmHi256 | 1<<xfHi16Zmm | 1<<xfPkru

// component is where the standard (non-compacted) format keeps a component.
type component struct{ off, size uint32 }

var components = sync.OnceValue(func() map[int]component {
	m := map[int]component{}
	for _, i := range []int{xfAVX, xfOpmask, xfZmmHi256, xfHi16Zmm, xfPkru} {
		size, off, _, _ := cpuid(0xd, uint32(i))
		if size != 0 {
			m[i] = component{off, size}
		}
	}
	return m
})

// XFeatures are the components that this CPU and kernel have enabled (XCR0).
func XFeatures() uint64 {
	if !hasXSave() {
		return 0
	}
	return xgetbv()
}

// InUse gives XSTATE_BV of the bytes of NT_X86_XSTATE: the components that are
// not in their initial state.
func InUse(xstate []byte) (uint64, error) {
	if len(xstate) < xstateExtended {
		return 0, fmt.Errorf("extended state of %d bytes: this CPU has no XSAVE: %w", len(xstate), ErrXState)
	}
	return binary.LittleEndian.Uint64(xstate[xstateBV:]), nil
}

// KeysDefault are the rights to memory with protection keys that a thread begins
// with: to key 0 alone (init_pkru_value, arch/x86/mm/pkeys.c).
const KeysDefault = 0x55555554

// HasKeys tells whether this CPU has protection keys for memory.
func HasKeys() bool {
	_, ok := components()[xfPkru]
	return ok && XFeatures()&(1<<xfPkru) != 0
}

// KeyRights are a thread's rights to memory with protection keys (PKRU) in the bytes
// of NT_X86_XSTATE; KeysDefault on a CPU that has none.
func KeyRights(xstate []byte) uint32 {
	c, ok := components()[xfPkru]
	if !ok {
		return KeysDefault
	}
	return keyRights(xstate, c)
}

func keyRights(xstate []byte, c component) uint32 {
	bv, err := InUse(xstate)
	if err != nil || int(c.off)+4 > len(xstate) {
		return KeysDefault
	}
	if bv&(1<<xfPkru) == 0 {
		return 0 // the initial state: all rights
	}
	return binary.LittleEndian.Uint32(xstate[c.off:])
}

func words32(b []byte) []uint32 {
	w := make([]uint32, len(b)/4)
	for i := range w {
		w[i] = binary.LittleEndian.Uint32(b[i*4:])
	}
	return w
}

func words64(b []byte) []uint64 {
	w := make([]uint64, len(b)/8)
	for i := range w {
		w[i] = binary.LittleEndian.Uint64(b[i*8:])
	}
	return w
}

// XStateToImage turns the bytes of NT_X86_XSTATE into CRIU's message.
func XStateToImage(b []byte) (*core_x86.UserX86FpregsEntry, error) {
	bv, err := InUse(b)
	if err != nil {
		return nil, err
	}
	if other := bv &^ carried; other != 0 {
		return nil, fmt.Errorf("extended state components %#x are in use: %w", other, ErrXState)
	}
	le := binary.LittleEndian
	xs := &core_x86.UserX86XsaveEntry{XstateBv: proto.Uint64(bv)}
	at := func(i int) []byte {
		c, ok := components()[i]
		if !ok || int(c.off+c.size) > len(b) {
			return nil
		}
		return b[c.off : c.off+c.size]
	}
	xs.YmmhSpace = words32(at(xfAVX))
	xs.OpmaskReg = words64(at(xfOpmask))
	xs.ZmmUpper = words64(at(xfZmmHi256))
	xs.Hi16Zmm = words64(at(xfHi16Zmm))
	xs.Pkru = words32(at(xfPkru))
	return &core_x86.UserX86FpregsEntry{
		Cwd:       proto.Uint32(uint32(le.Uint16(b[0:]))),
		Swd:       proto.Uint32(uint32(le.Uint16(b[2:]))),
		Twd:       proto.Uint32(uint32(le.Uint16(b[4:]))),
		Fop:       proto.Uint32(uint32(le.Uint16(b[6:]))),
		Rip:       proto.Uint64(le.Uint64(b[8:])),
		Rdp:       proto.Uint64(le.Uint64(b[16:])),
		Mxcsr:     proto.Uint32(le.Uint32(b[legacyMxcsr:])),
		MxcsrMask: proto.Uint32(le.Uint32(b[legacyMxcsr+4:])),
		StSpace:   words32(b[legacySt:legacyXmm]),
		XmmSpace:  words32(b[legacyXmm : legacyXmm+256]),
		Xsave:     xs,
	}, nil
}

// XStateFromImage fills base, the extended state of a task of this CPU in
// standard format, with what the image holds. The layout is this CPU's own, so
// an image from a CPU with another layout fits as long as every component in
// use exists here.
func XStateFromImage(e *core_x86.UserX86FpregsEntry, base []byte) ([]byte, error) {
	if len(base) < xstateExtended {
		return nil, fmt.Errorf("extended state of %d bytes: this CPU has no XSAVE: %w", len(base), ErrXState)
	}
	b := append([]byte(nil), base...)
	clear(b[:fxSwBytes])
	clear(b[xstateHeader:])
	le := binary.LittleEndian
	le.PutUint16(b[0:], uint16(e.GetCwd()))
	le.PutUint16(b[2:], uint16(e.GetSwd()))
	le.PutUint16(b[4:], uint16(e.GetTwd()))
	le.PutUint16(b[6:], uint16(e.GetFop()))
	le.PutUint64(b[8:], e.GetRip())
	le.PutUint64(b[16:], e.GetRdp())
	le.PutUint32(b[legacyMxcsr:], e.GetMxcsr())
	le.PutUint32(b[legacyMxcsr+4:], e.GetMxcsrMask())
	put32 := func(dst []byte, w []uint32, what string) error {
		if len(w)*4 > len(dst) {
			return fmt.Errorf("image holds %d bytes of %s, this CPU has room for %d: %w", len(w)*4, what, len(dst), ErrXState)
		}
		for i, v := range w {
			le.PutUint32(dst[i*4:], v)
		}
		return nil
	}
	put64 := func(dst []byte, w []uint64, what string) error {
		if len(w)*8 > len(dst) {
			return fmt.Errorf("image holds %d bytes of %s, this CPU has room for %d: %w", len(w)*8, what, len(dst), ErrXState)
		}
		for i, v := range w {
			le.PutUint64(dst[i*8:], v)
		}
		return nil
	}
	if err := put32(b[legacySt:legacyXmm], e.GetStSpace(), "x87 registers"); err != nil {
		return nil, err
	}
	if err := put32(b[legacyXmm:legacyXmm+256], e.GetXmmSpace(), "SSE registers"); err != nil {
		return nil, err
	}
	bv := uint64(1<<xfX87 | 1<<xfSSE)
	if xs := e.GetXsave(); xs != nil {
		bv = xs.GetXstateBv()
		if missing := bv &^ XFeatures(); missing != 0 {
			return nil, fmt.Errorf("extended state components %#x of the image do not exist on this CPU: %w", missing, ErrXState)
		}
		if other := bv &^ carried; other != 0 {
			return nil, fmt.Errorf("extended state components %#x of the image are unknown: %w", other, ErrXState)
		}
		at := func(i int) []byte {
			c, ok := components()[i]
			if !ok || bv&(1<<i) == 0 || int(c.off+c.size) > len(b) {
				return nil
			}
			return b[c.off : c.off+c.size]
		}
		for _, p := range []struct {
			i    int
			w32  []uint32
			w64  []uint64
			what string
		}{
			{xfAVX, xs.GetYmmhSpace(), nil, "AVX registers"},
			{xfPkru, xs.GetPkru(), nil, "protection keys"},
			{xfOpmask, nil, xs.GetOpmaskReg(), "AVX-512 masks"},
			{xfZmmHi256, nil, xs.GetZmmUpper(), "AVX-512 upper halves"},
			{xfHi16Zmm, nil, xs.GetHi16Zmm(), "AVX-512 registers"},
		} {
			if bv&(1<<p.i) == 0 {
				continue // initial state: nothing to put
			}
			if err := put32(at(p.i), p.w32, p.what); err != nil {
				return nil, err
			}
			if err := put64(at(p.i), p.w64, p.what); err != nil {
				return nil, err
			}
		}
	}
	if c, ok := components()[xfPkru]; ok && len(e.GetXsave().GetPkru()) == 0 && bv&(1<<xfPkru) == 0 && XFeatures()&(1<<xfPkru) != 0 && int(c.off)+4 <= len(b) {
		// It comes from a CPU without keys, and its initial state would be all rights.
		le.PutUint32(b[c.off:], KeysDefault)
		bv |= 1 << xfPkru
	}
	le.PutUint64(b[xstateBV:], bv)
	return b, nil
}

// RegsToImage turns general registers into CRIU's message.
func RegsToImage(r *Regs) *core_x86.UserX86RegsEntry {
	mode := core_x86.UserX86RegsMode_NATIVE
	return &core_x86.UserX86RegsEntry{
		R15: &r.R15, R14: &r.R14, R13: &r.R13, R12: &r.R12, Bp: &r.Rbp, Bx: &r.Rbx, R11: &r.R11, R10: &r.R10,
		R9: &r.R9, R8: &r.R8, Ax: &r.Rax, Cx: &r.Rcx, Dx: &r.Rdx, Si: &r.Rsi, Di: &r.Rdi, OrigAx: &r.OrigRax,
		Ip: &r.Rip, Cs: &r.Cs, Flags: &r.Eflags, Sp: &r.Rsp, Ss: &r.Ss, FsBase: &r.FsBase, GsBase: &r.GsBase,
		Ds: &r.Ds, Es: &r.Es, Fs: &r.Fs, Gs: &r.Gs, Mode: &mode,
	}
}

// RegsFromImage is the reverse of RegsToImage; values that user space must not
// have are refused.
func RegsFromImage(e *core_x86.UserX86RegsEntry) (Regs, error) {
	if e == nil {
		return Regs{}, fmt.Errorf("image holds no general registers")
	}
	if e.GetMode() == core_x86.UserX86RegsMode_COMPAT {
		return Regs{}, fmt.Errorf("image holds a 32-bit task")
	}
	r := Regs{
		R15: e.GetR15(), R14: e.GetR14(), R13: e.GetR13(), R12: e.GetR12(), Rbp: e.GetBp(), Rbx: e.GetBx(),
		R11: e.GetR11(), R10: e.GetR10(), R9: e.GetR9(), R8: e.GetR8(), Rax: e.GetAx(), Rcx: e.GetCx(),
		Rdx: e.GetDx(), Rsi: e.GetSi(), Rdi: e.GetDi(), OrigRax: ^uint64(0), Rip: e.GetIp(), Cs: e.GetCs(),
		Eflags: e.GetFlags(), Rsp: e.GetSp(), Ss: e.GetSs(), FsBase: e.GetFsBase(), GsBase: e.GetGsBase(),
		Ds: e.GetDs(), Es: e.GetEs(), Fs: e.GetFs(), Gs: e.GetGs(),
	}
	if r.Rip >= TaskSize || r.FsBase >= TaskSize || r.GsBase >= TaskSize {
		return Regs{}, fmt.Errorf("image holds registers outside user space (ip %#x, fs base %#x, gs base %#x)", r.Rip, r.FsBase, r.GsBase)
	}
	return r, nil
}
