package files

import (
	"bytes"
	"encoding/binary"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"godwit/engine/image"
)

// Options of level SOL_TCP that golang.org/x/sys has no names for
// (include/uapi/linux/tcp.h; the last three are of Linux 6.15 and 6.16).
const (
	tcpRTOMax    = 44
	tcpRTOMin    = 45
	tcpDelackMax = 46
)

// tcpOptions are those of level SOL_TCP that CRIU's message has no field for and
// that tell the same in every state.
var tcpOptions = []sockOption{
	{opt: unix.TCP_CONGESTION, name: "TCP_CONGESTION", size: 16},
	{opt: unix.TCP_SYNCNT, name: "TCP_SYNCNT"},
	{opt: unix.TCP_LINGER2, name: "TCP_LINGER2"},
	{opt: unix.TCP_DEFER_ACCEPT, name: "TCP_DEFER_ACCEPT"},
	{opt: unix.TCP_QUICKACK, name: "TCP_QUICKACK", hint: true}, // it changes by itself
	{opt: unix.TCP_THIN_LINEAR_TIMEOUTS, name: "TCP_THIN_LINEAR_TIMEOUTS"},
	{opt: unix.TCP_USER_TIMEOUT, name: "TCP_USER_TIMEOUT"},
	{opt: unix.TCP_FASTOPEN, name: "TCP_FASTOPEN"},
	{opt: unix.TCP_FASTOPEN_KEY, name: "TCP_FASTOPEN_KEY", size: 32},
	{opt: unix.TCP_FASTOPEN_NO_COOKIE, name: "TCP_FASTOPEN_NO_COOKIE"},
	{opt: unix.TCP_NOTSENT_LOWAT, name: "TCP_NOTSENT_LOWAT"},
	{opt: unix.TCP_SAVE_SYN, name: "TCP_SAVE_SYN"},
	{opt: unix.TCP_INQ, name: "TCP_INQ"},
	{opt: unix.TCP_TX_DELAY, name: "TCP_TX_DELAY", hint: true},
	{opt: tcpRTOMax, name: "TCP_RTO_MAX_MS"},
	{opt: tcpRTOMin, name: "TCP_RTO_MIN_US"},
	{opt: tcpDelackMax, name: "TCP_DELACK_MAX_US"},
}

// tcpStateOptions are those that mean something else, or nothing, in some states.
var tcpStateOptions = []sockOption{
	{opt: unix.TCP_MAXSEG, name: "TCP_MAXSEG"},
	{opt: unix.TCP_FASTOPEN_CONNECT, name: "TCP_FASTOPEN_CONNECT"},
	{opt: unix.TCP_WINDOW_CLAMP, name: "TCP_WINDOW_CLAMP"},
}

// dumpTCPOptions notes what the program asked for before it had a connection
// (that of a connection was negotiated), and how large its window may get.
func (d *Dumper) dumpTCPOptions(o *object, fd int, e *sk_inet.InetSkEntry) {
	if e.GetProto() != unix.IPPROTO_TCP {
		return
	}
	none := map[int]uint32{unix.TCP_MAXSEG: 536} // net/ipv4/tcp.c: TCP_MSS_DEFAULT
	for i := range tcpStateOptions {
		x := tcpStateOptions[i]
		x.level, x.size = unix.SOL_TCP, 4
		if (connected(e.GetState()) || tcpEnded(e)) && x.opt != unix.TCP_WINDOW_CLAMP {
			continue
		}
		v := readOption(fd, &x)
		if v == nil || bytes.Equal(v, binary.NativeEndian.AppendUint32(nil, none[x.opt])) {
			continue
		}
		f := o.sockFacts()
		f.Options = append(f.Options, image.SockOption{Level: x.level, Option: x.opt, Value: v})
	}
}
