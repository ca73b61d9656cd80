package transport

import (
	"crypto/rand"
	"encoding/binary"
	"time"
)

// Crockford's alphabet in lower case: in ASCII order, without i, l, o, u.
const idAlphabet = "0123456789abcdefghjkmnpqrstvwxyz"

// idEpoch is 2025-01-01 UTC in units of 10 ms since 1970.
const idEpoch = 1735689600 * 100

// NewID returns a name for a migration: 8 characters of time (10 ms units, so
// that names sort by age) and 4 random ones. Two made in the same 10 ms
// collide once in a million; creating the record finds that.
func NewID() string { return newID(time.Now()) }

func newID(now time.Time) string {
	t := uint64(now.UnixMilli()/10 - idEpoch)
	var r [4]byte
	// crypto/rand.Read never fails since Go 1.24.
	_, _ = rand.Read(r[:])
	v := t<<20 | uint64(binary.LittleEndian.Uint32(r[:])&0xfffff)
	var out [12]byte
	for i := len(out) - 1; i >= 0; i-- {
		out[i] = idAlphabet[v&31]
		v >>= 5
	}
	return string(out[:])
}
