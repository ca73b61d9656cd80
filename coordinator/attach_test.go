package coordinator

import "testing"

// TestHangUp types texts, in one piece, byte by byte and in two pieces.
func TestHangUp(t *testing.T) {
	for _, tc := range []struct {
		typed, want string
		hang        bool
	}{
		{"hello\r", "hello\r", false},
		{"~.", "", true},
		{"ls\r~.rest", "ls\r", true},
		{"ls\n~.", "ls\n", true},
		{"a~.", "a~.", false},
		{"~~.", "~.", false},
		{"~~~.", "~~.", false},
		{"~a~.", "~a~.", false},
		{"~\r~.", "~\r", true},
		{"\r\r~~\r~x", "\r\r~\r~x", false},
		{"~", "", false},
	} {
		for cut := range len(tc.typed) + 1 {
			h := hangUp{begins: true}
			got, hang := h.filter([]byte(tc.typed[:cut]))
			if !hang {
				var more []byte
				more, hang = h.filter([]byte(tc.typed[cut:]))
				got = append(got, more...)
			}
			if string(got) != tc.want || hang != tc.hang {
				t.Errorf("%q cut at %d: %q, %v, want %q, %v", tc.typed, cut, got, hang, tc.want, tc.hang)
			}
		}
	}
}
