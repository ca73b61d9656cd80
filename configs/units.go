package configs

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Size is a number of bytes. In text it is a number and a unit: "512KiB",
// "4MiB", "1GiB" (powers of 1024), "4MB" (powers of 1000), "0" or a plain
// number for bytes.
type Size uint64

// Rate is a number of bytes per second. In text it is a Size, with or without
// "/s" ("100MiB/s", "100MB"), or bits: "800Mbit/s". 0 means no cap.
type Rate uint64

// Duration is a time span in Go's notation, always with a unit: "500ms",
// "10s", "2m". It is not negative.
type Duration time.Duration

// Units from the largest down: the first that divides a size is the one that
// it is written with. The decimal ones are only read.
var sizeUnits = []struct {
	name  string
	bytes uint64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

const binaryUnits = 4 // the first of sizeUnits

var errSize = errors.New(`want a number and a unit, such as "512KiB" or "4MiB"`)

// ParseSize reads a Size. Errors do not repeat the text.
func ParseSize(s string) (Size, error) {
	n, err := parseUnits(s, func(unit string) (uint64, bool) {
		for _, u := range sizeUnits {
			if u.name == unit {
				return u.bytes, true
			}
		}
		return 0, false
	}, errSize)
	return Size(n), err
}

// parseUnits reads a decimal number and a unit. A fraction is fine as long as
// the product is a whole number.
func parseUnits(s string, unit func(string) (uint64, bool), wrong error) (uint64, error) {
	end := 0
	for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == '.') {
		end++
	}
	number, name := s[:end], strings.TrimSpace(s[end:])
	factor := uint64(1)
	if name != "" {
		var ok bool
		if factor, ok = unit(name); !ok {
			return 0, wrong
		}
	}
	whole, frac, isFrac := strings.Cut(number, ".")
	if whole == "" || isFrac && frac == "" || strings.Contains(frac, ".") {
		return 0, wrong
	}
	n, err := strconv.ParseUint(whole, 10, 64)
	if err != nil || n > math.MaxUint64/factor {
		return 0, errors.New("too large")
	}
	n *= factor
	if isFrac {
		f, err := strconv.ParseFloat("0."+frac, 64)
		if err != nil {
			return 0, wrong
		}
		part := f * float64(factor)
		if part != math.Trunc(part) {
			return 0, errors.New("not a whole number of bytes")
		}
		if n > math.MaxUint64-uint64(part) {
			return 0, errors.New("too large")
		}
		n += uint64(part)
	}
	return n, nil
}

// String writes s so that ParseSize reads the same number.
func (s Size) String() string {
	if s == 0 {
		return "0"
	}
	for _, u := range sizeUnits[:binaryUnits] {
		if uint64(s)%u.bytes == 0 {
			return strconv.FormatUint(uint64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// UnmarshalText is ParseSize.
func (s *Size) UnmarshalText(b []byte) (err error) {
	v, err := ParseSize(string(b))
	if err == nil {
		*s = v
	}
	return err
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

var errRate = errors.New(`want bytes or bits per second, such as "100MiB/s" or "800Mbit/s"; 0 is no cap`)

// ParseRate reads a Rate. Errors do not repeat the text.
func ParseRate(s string) (Rate, error) {
	s = strings.TrimSuffix(s, "/s")
	n, err := parseUnits(s, func(unit string) (uint64, bool) {
		switch unit {
		case "kbit":
			return 1e3 / 8, true
		case "Mbit":
			return 1e6 / 8, true
		case "Gbit":
			return 1e9 / 8, true
		}
		for _, u := range sizeUnits {
			if u.name == unit {
				return u.bytes, true
			}
		}
		return 0, false
	}, errRate)
	return Rate(n), err
}

// String writes r so that ParseRate reads the same number.
func (r Rate) String() string {
	if r == 0 {
		return "0"
	}
	return Size(r).String() + "/s"
}

// UnmarshalText is ParseRate.
func (r *Rate) UnmarshalText(b []byte) error {
	v, err := ParseRate(string(b))
	if err == nil {
		*r = v
	}
	return err
}

// MarshalText is String.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// ParseDuration reads a Duration. Errors do not repeat the text.
func ParseDuration(s string) (Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errors.New(`want a time with its unit, such as "500ms" or "10s"`)
	}
	if d < 0 {
		return 0, errors.New("a time cannot be negative")
	}
	return Duration(d), nil
}

// D is d as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }

// String writes d in Go's notation without trailing zero parts: "2m", not
// "2m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// UnmarshalText is ParseDuration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := ParseDuration(string(b))
	if err == nil {
		*d = v
	}
	return err
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

var (
	_ fmt.Stringer = Size(0)
	_ fmt.Stringer = Rate(0)
	_ fmt.Stringer = Duration(0)
)
