package transport

import (
	"bytes"
	"crypto/rand"
	"strings"
	"testing"
)

func TestPack(t *testing.T) {
	random := make([]byte, 100<<10)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		body     []byte
		encoding string
	}{
		{"empty", nil, ""},
		{"small", []byte("small"), ""},
		{"at the limit", make([]byte, 64<<10-headerRoom), ""},
		{"large", bytes.Repeat([]byte("/usr/lib/x86_64-linux-gnu/libc.so.6 "), 10000), deflated},
		{"random", random, deflated},
	} {
		packed, encoding := pack(c.body, 64<<10)
		if encoding != c.encoding {
			t.Errorf("%s: packed as %q, want %q", c.name, encoding, c.encoding)
		}
		got, err := unpack(packed, encoding)
		if err != nil || !bytes.Equal(got, c.body) {
			t.Errorf("%s: %d bytes came back as %d, %v", c.name, len(c.body), len(got), err)
		}
	}
	if packed, _ := pack(bytes.Repeat([]byte("path "), 100<<10), 64<<10); len(packed) > 64<<10 {
		t.Errorf("%d bytes of text stay %d", 500<<10, len(packed))
	}
	bomb, encoding := pack(make([]byte, maxUnpacked+1), 64<<10)
	for _, c := range []struct {
		body           []byte
		encoding, want string
	}{{bomb, encoding, "unpack to more than"}, {[]byte("no"), deflated, "unpack 2 bytes"}, {nil, "zip", "is not known"}} {
		if _, err := unpack(c.body, c.encoding); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.encoding, err, c.want)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	packed, _ := pack(bytes.Repeat([]byte("x"), 1000), headerRoom)
	f.Add(packed, deflated)
	f.Add([]byte("x"), "")
	f.Fuzz(func(t *testing.T, body []byte, encoding string) {
		out, err := unpack(body, encoding)
		if err == nil && encoding == "" && !bytes.Equal(out, body) {
			t.Error("a body that is not packed changed")
		}
	})
}
