package files

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseKey(t *testing.T) {
	for _, x := range []struct {
		in   string
		want []Key
		err  string
	}{
		{in: "file[72:a3e7]", want: []Key{{0x72, 0xa3e7}}},
		{in: "file[72:A3E7]", want: []Key{{0x72, 0xa3e7}}},
		{in: "file[0x72:0xa3e7]", want: []Key{{0x72, 0xa3e7}}},
		{in: "file[0X72:0XA3E7]", want: []Key{{0x72, 0xa3e7}}},
		{in: "file[114:41959]", want: []Key{{0x114, 0x41959}, {114, 41959}}},
		{in: "file[0x114:0x41959]", want: []Key{{0x114, 0x41959}}},
		{in: "file[1:2]", want: []Key{{1, 2}}},
		{in: "file[ff:ffffffffffffffff]", want: []Key{{0xff, 1<<64 - 1}}},
		{in: "file[ff:10000000000000000]", err: "at most 64 bits"},
		{in: "file[:1]", err: "mount id"},
		{in: "file[1:]", err: "inode"},
		{in: "file[1:+2]", err: "inode"},
		{in: "file[1]", err: "not of the form"},
		{in: "file[1:2", err: "not of the form"},
		{in: "file[1:2:3]", err: "inode"},
		{in: "tty[88:8]", err: "names a terminal"},
		{in: "", err: "not of the form"},
		{in: "/tmp/x", err: "not of the form"},
	} {
		t.Run(x.in, func(t *testing.T) {
			got, err := ParseKey(x.in)
			if x.err != "" {
				if err == nil || !strings.Contains(err.Error(), x.err) {
					t.Fatalf("error %v, want %q", err, x.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(x.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestNearest(t *testing.T) {
	got := nearest("file[72:a3e7]", []string{"file[1:1]", "file[72:a3e8]", "file[73:a3e7]", "file[72:a3e8]", "file[ffff:ffffff]"})
	want := []string{"file[72:a3e8]", "file[73:a3e7]", "file[1:1]"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzParseKey(f *testing.F) {
	for _, s := range []string{"file[72:a3e7]", "file[0x72:A3E7]", "file[114:41959]", "tty[1:2]", "file[:", "file[1:2]]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		keys, err := ParseKey(s)
		if err != nil {
			return
		}
		// The canonical form is its own first reading.
		again, err := ParseKey(keys[0].String())
		if err != nil || again[0] != keys[0] {
			t.Fatalf("%q gives %s, which gives %v, %v", s, keys[0], again, err)
		}
	})
}

func FuzzUnixDiag(f *testing.F) {
	f.Add([]byte("\x64\x00\x00\x00\x14\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x01\x01\x00WW\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x08\x00\x02\x00XW\x00\x00"))
	f.Add([]byte("\x24\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xfe\xff\xff\xff"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = netlinkMessages(b, func(_ uint16, body []byte) error {
			_, err := parseUnixDiag(body)
			return err
		})
	})
}
