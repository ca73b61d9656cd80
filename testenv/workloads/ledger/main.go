// Command ledger is the workload of the demo: a small key ledger that its
// clients talk to over UDP, and a worker process that keeps a digest of it. It
// notices when anything about it breaks.
//
//	ledger PREFIX ADDRESS FIFO LOG [MIB]
//
// Protocol, one datagram each way: "put SEQ" is acknowledged by "ok SEQ COUNT
// DIGEST" once it is entered; repeated puts of an old SEQ are answered again and
// entered once; "get" answers the same with the last SEQ. Numbered lines that
// come through FIFO are appended to LOG. Both are opened at the start and are
// meant to be external: what backs them on another host is handed in there.
// Same files and signals as selfcheck: PREFIX.ready, .log, .ok, .fail, SIGTERM.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	prefix  string
	records atomic.Uint64
	// handing is held while an entry is handed to the worker, and from the end on.
	handing sync.Mutex
)

func verdict(suffix, text string) {
	f, err := os.OpenFile(prefix+"."+suffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return
	}
	_, _ = f.WriteString(text)
	_ = f.Close()
}

func fail(format string, args ...any) {
	verdict("fail", fmt.Sprintf("FAIL after %d records, pid %d: %s\n", records.Load(), os.Getpid(), fmt.Sprintf(format, args...)))
	os.Exit(1)
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "worker" {
		prefix = os.Args[2]
		worker()
		return
	}
	if len(os.Args) < 5 {
		fmt.Fprintln(os.Stderr, "usage: ledger PREFIX ADDRESS FIFO LOG [MIB]")
		os.Exit(2)
	}
	prefix = os.Args[1]
	mib := 64
	if len(os.Args) > 5 {
		n, err := strconv.Atoi(os.Args[5])
		if err != nil {
			fail("size: %v", err)
		}
		mib = n
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	conn, child, err := startWorker()
	if err != nil {
		fail("start worker: %v", err)
	}
	pc, err := net.ListenPacket("udp4", os.Args[2])
	if err != nil {
		fail("%v", err)
	}
	log, err := os.OpenFile(os.Args[4], os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		fail("%v", err)
	}
	go ballast(mib)
	go follow(os.Args[3], log)
	go serve(pc, conn)
	rec, err := os.OpenFile(prefix+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		fail("%v", err)
	}
	verdict("ready", "ready\n")
	tick := time.NewTicker(2 * time.Millisecond)
	for {
		select {
		case <-term:
			handing.Lock()
			_ = conn.Close()
			var ws syscall.WaitStatus
			if _, err := syscall.Wait4(child, &ws, 0, nil); err != nil || ws.ExitStatus() != 0 {
				fail("worker ended with %v, status %d", err, ws.ExitStatus())
			}
			verdict("ok", fmt.Sprintf("OK %d\n", records.Load()))
			return
		case <-tick.C:
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
				fail("clock_gettime: %v", err)
			}
			if _, err := fmt.Fprintf(rec, "%d %d\n", records.Load(), ts.Nano()); err != nil {
				fail("append record: %v", err)
			}
			records.Add(1)
		}
	}
}

// startWorker starts the worker by syscall.ForkExec: os/exec would keep a
// pidfd of it open.
func startWorker() (*os.File, int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = null.Close() }()
	exe, err := os.Executable()
	if err != nil {
		return nil, 0, err
	}
	n := null.Fd()
	pid, err := syscall.ForkExec(exe, []string{"ledger-worker", "worker", prefix}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{n, n, n, uintptr(fds[1])}})
	if err != nil {
		return nil, 0, err
	}
	_ = unix.Close(fds[1])
	return os.NewFile(uintptr(fds[0]), "worker"), pid, nil
}

// worker answers each 8-byte number with the digest of all numbers so far.
func worker() {
	conn := os.NewFile(3, "ledger")
	var sum [32]byte
	var want uint64
	for {
		var b [8]byte
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return
			}
			fail("worker: read: %v", err)
		}
		n := binary.BigEndian.Uint64(b[:])
		if n != want {
			fail("worker: entry %d came, want %d", n, want)
		}
		want++
		sum = Digest(sum, n)
		if _, err := conn.Write(sum[:]); err != nil {
			fail("worker: write: %v", err)
		}
	}
}

// Digest chains one entry to the digest of those before it.
func Digest(sum [32]byte, n uint64) [32]byte {
	return sha256.Sum256(binary.BigEndian.AppendUint64(sum[:], n))
}

// serve answers clients one at a time.
func serve(pc net.PacketConn, conn *os.File) {
	var count uint64 // next SEQ
	var sum [32]byte
	buf := make([]byte, 512)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			fail("receive: %v", err)
		}
		verb, arg, _ := strings.Cut(string(buf[:n]), " ")
		var answer string
		switch verb {
		case "put":
			seq, err := strconv.ParseUint(arg, 10, 64)
			switch {
			case err != nil || seq > count:
				answer = fmt.Sprintf("gap %d", count)
			case seq == count:
				handing.Lock()
				if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, seq)); err != nil {
					fail("hand on entry %d: %v", seq, err)
				}
				if _, err := io.ReadFull(conn, sum[:]); err != nil {
					fail("digest of entry %d: %v", seq, err)
				}
				handing.Unlock()
				count++
				fallthrough
			default:
				answer = fmt.Sprintf("ok %d %d %x", seq, count, sum)
			}
		case "get":
			answer = fmt.Sprintf("ok - %d %x", count, sum)
		default:
			answer = "what?"
		}
		if _, err := pc.WriteTo([]byte(answer), from); err != nil && !errors.Is(err, unix.ENETUNREACH) {
			// The address may be away for a moment; the client asks again.
			continue
		}
	}
}

// follow appends the numbered lines of the fifo to the log. A fifo without
// writer blocks or ends; either way the next writer is waited for.
func follow(path string, log *os.File) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		fail("%v", err)
	}
	var want uint64
	for sc := bufio.NewScanner(f); sc.Scan(); want++ {
		if n, err := strconv.ParseUint(sc.Text(), 10, 64); err != nil || n != want {
			fail("fifo brought %q, want %d", sc.Text(), want)
		}
		if _, err := fmt.Fprintln(log, sc.Text()); err != nil {
			fail("append to log: %v", err)
		}
	}
	fail("fifo ended")
}

// ballast holds memory and looks whether it stays what it is.
func ballast(mib int) {
	words := make([]uint64, mib<<17)
	for i := range words {
		words[i] = uint64(i) * 0x9E3779B97F4A7C15
	}
	for at := 0; ; at = (at + 1<<15) % len(words) {
		for i := at; i < at+1<<15 && i < len(words); i++ {
			if words[i] != uint64(i)*0x9E3779B97F4A7C15 {
				fail("memory word %d changed by itself", i)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}
