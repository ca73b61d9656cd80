// Package procfs owns reading and parsing of /proc, in full: every field that
// a dump needs, where general purpose libraries keep only a part. Parsers take
// bytes or an io.Reader and touch nothing; readers take a pid. It must not know
// images, tracing or what its callers do with the facts.
//
// Formats are those of fs/proc (Linux 6.18) and proc(5). Unknown keys are
// skipped or kept raw: a later kernel adds lines.
package procfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Gone reports whether err says that the process or thread has ended: its
// directory vanished (ENOENT) or it was reaped while it was read (ESRCH).
func Gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

// Path returns the path of an object of a process, such as Path(12, "fd", "3").
func Path(pid int, elem ...string) string {
	p := "/proc/" + strconv.Itoa(pid)
	for _, e := range elem {
		p += "/" + e
	}
	return p
}

// TaskPath returns the path of an object of one thread.
func TaskPath(pid, tid int, elem ...string) string {
	return Path(pid, append([]string{"task", strconv.Itoa(tid)}, elem...)...)
}

// ReadAll reads a /proc file, whose size is always told as 0. Most such files
// fit in one read, so that what they say is of one moment.
//
// It does without os.Open, which makes five more system calls in order to poll
// a file that cannot be polled: a frozen tree waits for hundreds of these reads.
func ReadAll(path string) ([]byte, error) {
	fd, err := uninterrupted(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	b := make([]byte, 0, 8192)
	for {
		n, err := uninterrupted(func() (int, error) { return unix.Read(fd, b[len(b):cap(b)]) })
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return b, nil
		}
		if b = b[:len(b)+n]; len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

func uninterrupted(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// read reads and parses one file; errors of the parser get its path.
func read[T any](path string, parse func([]byte) (T, error)) (T, error) {
	b, err := ReadAll(path)
	if err != nil {
		return *new(T), err
	}
	v, err := parse(b)
	if err != nil {
		return *new(T), fmt.Errorf("parse %s: %w", path, err)
	}
	return v, nil
}

// stream opens one file and parses it as it is read.
func stream[T any](path string, parse func(io.Reader) (T, error)) (T, error) {
	f, err := os.Open(path)
	if err != nil {
		return *new(T), err
	}
	defer func() { _ = f.Close() }()
	v, err := parse(f)
	if err != nil {
		return *new(T), fmt.Errorf("parse %s: %w", path, err)
	}
	return v, nil
}

// maxLine bounds a line of any /proc file: the longest are the groups of
// status (65,536 numbers) and paths, of at most 4 × 4096 bytes.
const maxLine = 1 << 20

// eachLine calls fn with every line, without its newline and with nothing else
// removed: a path may end in a space or a carriage return. The bytes are valid
// during the call.
func eachLine(r io.Reader, fn func(line []byte) error) error {
	br := bufio.NewReaderSize(r, 64<<10)
	var long []byte
	for no := 1; ; no++ {
		line, err := br.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			long = append(long[:0], line...)
			for errors.Is(err, bufio.ErrBufferFull) {
				if len(long) > maxLine {
					return fmt.Errorf("line %d is longer than %d bytes", no, maxLine)
				}
				line, err = br.ReadSlice('\n')
				long = append(long, line...)
			}
			line = long
		}
		if err != nil && err != io.EOF {
			return err
		}
		if n := len(line); n > 0 {
			if line[n-1] == '\n' {
				line = line[:n-1]
			}
			if ferr := fn(line); ferr != nil {
				return fmt.Errorf("line %d: %w", no, ferr)
			}
		}
		if err == io.EOF {
			return nil
		}
	}
}

// field takes the first word off s: words are separated by spaces or tabs.
func field(s string) (word, rest string) {
	s = strings.TrimLeft(s, " \t")
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

// number parses an unsigned number of the given base and size with a short error.
func number(s string, base, bits int) (uint64, error) {
	n, err := strconv.ParseUint(s, base, bits)
	if err != nil {
		return 0, fmt.Errorf("%q is no base %d number of %d bits", clip(s), base, bits)
	}
	return n, nil
}

func signed(s string, bits int) (int64, error) {
	n, err := strconv.ParseInt(s, 10, bits)
	if err != nil {
		return 0, fmt.Errorf("%q is no signed number of %d bits", clip(s), bits)
	}
	return n, nil
}

// clip keeps the quoted part of a message short.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// unescape undoes mangle_path (fs/seq_file.c): a backslash and three octal
// digits stand for one byte. esc are the bytes that the file escapes; other
// sequences are left alone, since a backslash itself is only escaped where esc
// contains it.
func unescape(s, esc string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil && strings.IndexByte(esc, byte(n)) >= 0 {
				b = append(b, byte(n))
				i += 3
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}
