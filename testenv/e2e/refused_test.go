package e2e

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"godwit/testenv/hosts"
	"godwit/testenv/workloads"
)

// elf32 is a static 32-bit program of one page that sleeps for ever.
func elf32() []byte {
	const base, hdr = 0x8048000, 52 + 32
	code := []byte{0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7} // mov eax, 29 (pause); int 0x80; jmp
	b := make([]byte, hdr, hdr+len(code))
	copy(b, "\x7fELF\x01\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 2) // ET_EXEC
	le.PutUint16(b[18:], 3) // EM_386
	le.PutUint32(b[20:], 1)
	le.PutUint32(b[24:], base+hdr)
	le.PutUint32(b[28:], 52)
	le.PutUint16(b[40:], 52)
	le.PutUint16(b[42:], 32)
	le.PutUint16(b[44:], 1)
	p := b[52:]
	le.PutUint32(p[0:], 1) // PT_LOAD
	le.PutUint32(p[8:], base)
	le.PutUint32(p[12:], base)
	le.PutUint32(p[16:], uint32(hdr+len(code)))
	le.PutUint32(p[20:], uint32(hdr+len(code)))
	le.PutUint32(p[24:], 5)
	le.PutUint32(p[28:], 4096)
	return append(b, code...)
}

// TestRefusedTasks dumps processes that cannot be carried: the refusal says why,
// comes soon and changes nothing.
func TestRefusedTasks(t *testing.T) {
	h := newHosts(t, "alpha").Host("alpha")
	refused := func(t *testing.T, pid int, want string) {
		t.Helper()
		ctx := deadline(t, time.Minute)
		before, begin := traces(t, h, pid), time.Now()
		o := agentCmd(ctx, t, h, nil, "dump", "-t", strconv.Itoa(pid), "-D", newDir(t))
		if o.code != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("exit code %d, %q; want 1 and %q", o.code, o.stderr, want)
		}
		if d := time.Since(begin); d > time.Minute {
			t.Errorf("it took %s", d)
		}
		if after := traces(t, h, pid); after != before {
			t.Errorf("the refused dump changed something:\n%s\nbecame\n%s", before, after)
		}
	}
	t.Run("32-bit", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		path := filepath.Join(newDir(t), "pause32")
		if err := os.WriteFile(path, elf32(), 0o755); err != nil {
			t.Fatal(err)
		}
		pid, err := h.Start(ctx, hosts.Spec{Args: []string{path}})
		if err != nil {
			t.Fatal(err)
		}
		refused(t, pid, "is a 32-bit program, which cannot be carried")
		if err := h.Kill(pid, 9); err != nil {
			t.Fatal(err)
		}
	})
	for kind, want := range map[string]string{
		"files": "has descriptors of its own (unshare), which cannot be carried",
		"vm":    "as after clone with CLONE_VM, which cannot be carried",
	} {
		t.Run("sharing "+kind, func(t *testing.T) {
			ctx := deadline(t, time.Minute)
			r := selfcheck(ctx, t, h, newDir(t), "sharing", kind)
			refused(t, r.Pid, want)
			stop(ctx, t, r)
		})
	}
	t.Run("vfork", func(t *testing.T) {
		ctx := deadline(t, time.Minute)
		prefix := filepath.Join(newDir(t), "spawner")
		pid, err := h.Start(ctx, hosts.Spec{Args: []string{programs.Selfcheck, "spawner", prefix, "forever"}})
		if err != nil {
			t.Fatal(err)
		}
		r := &workloads.Run{Host: h, Prefix: prefix, Pid: pid}
		if err := r.WaitFile(ctx, "ready"); err != nil {
			t.Fatal(err)
		}
		refused(t, pid, "a vfork that does not end")
		if err := h.Kill(pid, 9); err != nil { // its child ends with the host
			t.Fatal(err)
		}
	})
}
