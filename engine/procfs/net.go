package procfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// UnixSocket is one line of /proc/net/unix.
type UnixSocket struct {
	RefCount uint32
	Protocol uint32
	Flags    uint32 // 1<<16: it listens (__SO_ACCEPTCON)
	Type     uint32 // SOCK_STREAM 1, SOCK_DGRAM 2, SOCK_SEQPACKET 5
	State    uint32 // SS_UNCONNECTED 1, SS_CONNECTING 2, SS_CONNECTED 3
	Inode    uint64
	// Path as the kernel prints it: raw, an abstract name with '@' for every
	// NUL, the first included. It may hold spaces and newlines.
	Path string
}

// Listening reports whether the socket accepts connections.
func (u *UnixSocket) Listening() bool { return u.Flags&(1<<16) != 0 }

// ParseUnixSocket parses one line.
func ParseUnixSocket(line string) (UnixSocket, error) {
	var u UnixSocket
	num, rest := field(line)
	// The kernel's address of the socket, hashed.
	num, ok := strings.CutSuffix(num, ":")
	if !ok || len(num) < 8 {
		return UnixSocket{}, fmt.Errorf("%q is no socket number", clip(num))
	}
	if _, err := number(num, 16, 64); err != nil {
		return UnixSocket{}, err
	}
	for _, dst := range []*uint32{&u.RefCount, &u.Protocol, &u.Flags, &u.Type, &u.State} {
		var word string
		word, rest = field(rest)
		if err := set(dst, word, 16); err != nil {
			return UnixSocket{}, err
		}
	}
	word, rest := field(rest)
	if err := set(&u.Inode, word, 10); err != nil {
		return UnixSocket{}, fmt.Errorf("inode: %w", err)
	}
	// One space, then the name, which may begin with a space itself.
	u.Path = strings.TrimPrefix(rest, " ")
	return u, nil
}

// ParseNetUnix parses /proc/net/unix.
func ParseNetUnix(r io.Reader) ([]UnixSocket, error) {
	var out []UnixSocket
	first := true
	err := eachLine(r, func(line []byte) error {
		if first {
			first = false
			if !strings.HasPrefix(string(line), "Num") {
				return errors.New("no heading")
			}
			return nil
		}
		u, err := ParseUnixSocket(string(line))
		if err != nil {
			// The kernel does not escape a newline in a name.
			if n := len(out); n > 0 && out[n-1].Path != "" {
				out[n-1].Path += "\n" + string(line)
				return nil
			}
			return err
		}
		out = append(out, u)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// NetUnix reads the unix sockets of the network namespace of a process.
func NetUnix(pid int) ([]UnixSocket, error) { return stream(Path(pid, "net", "unix"), ParseNetUnix) }

// InetSocket is one line of /proc/net/{tcp,udp,udplite,raw,icmp}{,6}.
type InetSocket struct {
	// Local and Remote; of a raw socket the port is the protocol.
	Local, Remote netip.AddrPort
	State         uint8 // TCP_ESTABLISHED 1 … TCP_CLOSE 7 … TCP_LISTEN 10
	// TxQueue is bytes not acknowledged; RxQueue bytes not read, of a
	// listening socket connections not accepted.
	TxQueue, RxQueue uint64
	Timer            uint8 // 0: none runs; 1 retransmit, 2 keepalive, 3 TIME_WAIT, 4 window probe
	UID              uint32
	Inode            uint64 // 0: no file is open on it (TIME_WAIT, not accepted yet)
}

// States of InetSocket (include/net/tcp_states.h).
const (
	TCPEstablished = 1
	TCPSynSent     = 2
	TCPClose       = 7
	TCPListen      = 10
)

// inetAddr parses "0100007F:1F90": words of the address as this machine's
// numbers, the port as a number.
func inetAddr(s string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(s, ":")
	if !ok || len(host) != 8 && len(host) != 32 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", clip(s))
	}
	var b [16]byte
	for i := 0; i < len(host); i += 8 {
		w, err := number(host[i:i+8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, err
		}
		binary.NativeEndian.PutUint32(b[i/2:], uint32(w))
	}
	p, err := number(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	a := netip.AddrFrom16(b)
	if len(host) == 8 {
		a = netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrPortFrom(a, uint16(p)), nil
}

// ParseInetSocket parses one line.
func ParseInetSocket(line string) (InetSocket, error) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return InetSocket{}, fmt.Errorf("socket of %d fields, want at least 10", len(f))
	}
	var s InetSocket
	var err error
	if s.Local, err = inetAddr(f[1]); err != nil {
		return InetSocket{}, err
	}
	if s.Remote, err = inetAddr(f[2]); err != nil {
		return InetSocket{}, err
	}
	st, err := number(f[3], 16, 8)
	if err != nil {
		return InetSocket{}, fmt.Errorf("state: %w", err)
	}
	s.State = uint8(st)
	tx, rx, ok := strings.Cut(f[4], ":")
	if !ok {
		return InetSocket{}, fmt.Errorf("%q are no queues", clip(f[4]))
	}
	if err := errors.Join(set(&s.TxQueue, tx, 16), set(&s.RxQueue, rx, 16)); err != nil {
		return InetSocket{}, fmt.Errorf("queues: %w", err)
	}
	tr, _, ok := strings.Cut(f[5], ":")
	if !ok {
		return InetSocket{}, fmt.Errorf("%q is no timer", clip(f[5]))
	}
	n, err := number(tr, 16, 8)
	if err != nil {
		return InetSocket{}, fmt.Errorf("timer: %w", err)
	}
	s.Timer = uint8(n)
	if err := set(&s.UID, f[7], 10); err != nil {
		return InetSocket{}, fmt.Errorf("uid: %w", err)
	}
	if err := set(&s.Inode, f[9], 10); err != nil {
		return InetSocket{}, fmt.Errorf("inode: %w", err)
	}
	return s, nil
}

// ParseNetInet parses a table of internet sockets.
func ParseNetInet(r io.Reader) ([]InetSocket, error) {
	var out []InetSocket
	first := true
	err := eachLine(r, func(line []byte) error {
		if first {
			first = false
			if !strings.HasPrefix(strings.TrimLeft(string(line), " "), "sl") {
				return errors.New("no heading")
			}
			return nil
		}
		s, err := ParseInetSocket(string(line))
		if err != nil {
			return err
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// netInet reads a table; a kernel without that protocol has none.
func netInet(pid int, table string) ([]InetSocket, error) {
	ss, err := stream(Path(pid, "net", table), ParseNetInet)
	if errors.Is(err, os.ErrNotExist) {
		if _, serr := os.Stat(Path(pid, "net")); serr == nil {
			return nil, nil
		}
	}
	return ss, err
}

// NetTCP reads the IPv4 TCP sockets of the network namespace of a process.
func NetTCP(pid int) ([]InetSocket, error) { return netInet(pid, "tcp") }

// NetTCP6 reads the IPv6 TCP sockets.
func NetTCP6(pid int) ([]InetSocket, error) { return netInet(pid, "tcp6") }

// NetUDP reads the IPv4 UDP sockets.
func NetUDP(pid int) ([]InetSocket, error) { return netInet(pid, "udp") }

// NetUDP6 reads the IPv6 UDP sockets.
func NetUDP6(pid int) ([]InetSocket, error) { return netInet(pid, "udp6") }

// NetRaw reads the IPv4 raw sockets.
func NetRaw(pid int) ([]InetSocket, error) { return netInet(pid, "raw") }

// NetRaw6 reads the IPv6 raw sockets.
func NetRaw6(pid int) ([]InetSocket, error) { return netInet(pid, "raw6") }

// OwnInet reads a table (raw, raw6, icmp, icmp6) of the calling thread's network
// namespace; a kernel without that protocol has none.
func OwnInet(table string) ([]InetSocket, error) {
	ss, err := stream("/proc/thread-self/net/"+table, ParseNetInet)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return ss, err
}

// SocketInode takes the inode out of a link such as "socket:[12]".
func SocketInode(link string) (uint64, bool) { return bracketed(link, "socket:[") }

// PipeInode takes the inode out of a link such as "pipe:[12]".
func PipeInode(link string) (uint64, bool) { return bracketed(link, "pipe:[") }

func bracketed(link, prefix string) (uint64, bool) {
	in, ok1 := strings.CutPrefix(link, prefix)
	in, ok2 := strings.CutSuffix(in, "]")
	n, err := strconv.ParseUint(in, 10, 64)
	return n, ok1 && ok2 && err == nil
}
