package files

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/plan"
	"godwit/engine/refuse"
)

// lacks records that o cannot be carried unless it is declared external.
func (d *Dumper) lacks(o *object, reason, hint string) {
	if !o.refused {
		o.declarable = true
		d.refuse(o, reason, hint)
	}
}

// externalKey is what o is called in a declaration, empty if it can never be
// external.
func (o *object) externalKey() string {
	switch {
	case o.inFlight:
		return ""
	case o.ttyKey != "":
		return o.ttyKey
	case o.hasKey:
		return o.key.String()
	case o.word == "tty":
		if s, ok := o.state.(*ttyState); ok && !s.master {
			return ttyKey(&o.stat)
		}
	case o.word == "pipe":
		return pipeKey(o.stat.Ino)
	case strings.HasPrefix(o.word, "unix-"):
		return fmt.Sprintf("unix[%d]", o.stat.Ino)
	case o.word == "tcp", o.word == "udp":
		return socketKey(o.stat.Ino)
	}
	return ""
}

// pipeKey is the key of an anonymous pipe, after its text in /proc.
func pipeKey(ino uint64) string { return fmt.Sprintf("pipe[%d]", ino) }

// socketKey is the key of a socket that is no unix socket.
func socketKey(ino uint64) string { return fmt.Sprintf("socket[%d]", ino) }

// externalKind is the kind of an external object in a plan.
func (o *object) externalKind() string {
	if o.word == "pipe" {
		return o.word
	}
	return modeKind(o.mode())
}

// parseNameless gives the canonical form of a key of a pipe or of a socket that is
// no unix socket: pipe[ino], socket[ino], decimal, with a colon as in /proc or
// without. ok is false for keys of other kinds.
func parseNameless(s string) (key string, ok bool) {
	kind, in, _ := strings.Cut(s, "[")
	kind = strings.TrimSuffix(kind, ":")
	in, closed := strings.CutSuffix(in, "]")
	if kind != "pipe" && kind != "socket" || !closed {
		return "", false
	}
	n, err := strconv.ParseUint(in, 10, 64)
	if err != nil {
		return "", false
	}
	return fmt.Sprintf("%s[%d]", kind, n), true
}

// declared says whether o, which has no name, was declared external, and marks it.
func (d *Dumper) declared(o *object) bool {
	key := o.externalKey()
	if _, ok := d.nameless[key]; !ok {
		return false
	}
	d.nameless[key] = true
	o.ext = true
	return true
}

// checkNameless refuses keys of pipes and sockets that match nothing.
func (d *Dumper) checkNameless() {
	for key, found := range d.nameless {
		if found {
			continue
		}
		var have []string
		kind, _, _ := strings.Cut(key, "[")
		for _, o := range d.objects {
			if k := o.externalKey(); strings.HasPrefix(k, kind+"[") {
				have = append(have, k)
			}
		}
		p := refuse.Problem{Key: key, Reason: "no process of the tree has a " + kind + " with this key open"}
		if near := nearest(key, have); len(near) > 0 {
			p.Hint = "nearest: " + strings.Join(near, ", ")
		}
		d.refusal.Add(p)
	}
}

// label is the kind of o in one word. Preconditions: its file is open.
func (o *object) label() string {
	if o.mode()&unix.S_IFMT == unix.S_IFSOCK && !o.isPath() {
		return socketLabel(int(o.file.Fd()))
	}
	switch o.kind {
	case kindTTY:
		return "tty"
	case kindPipe:
		return "pipe"
	case nil, kindFifo, kindCarried, kindGhost, kindRegular, kindDevice:
		if name, ok := strings.CutPrefix(o.link, "anon_inode:"); ok {
			return strings.Trim(name, "[]")
		}
		return modeKind(o.mode())
	case kindEventpoll:
		return "eventpoll"
	}
	return o.kind.name
}

// socketLabel is the kind of a socket in one word.
func socketLabel(fd int) string {
	family, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	typ, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	proto, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	switch family {
	case unix.AF_UNIX:
		return "unix-" + map[int]string{unix.SOCK_STREAM: "stream", unix.SOCK_DGRAM: "dgram", unix.SOCK_SEQPACKET: "seqpacket"}[typ]
	case unix.AF_NETLINK:
		return "netlink"
	case unix.AF_PACKET:
		return "packet"
	case unix.AF_INET, unix.AF_INET6:
		switch {
		case proto == unix.IPPROTO_TCP:
			return "tcp"
		case proto == unix.IPPROTO_UDP:
			return "udp"
		case typ == unix.SOCK_RAW:
			return "raw"
		}
	}
	return "socket"
}

// Objects lists, after Finish, everything that was added, also what is refused.
func (d *Dumper) Objects() []plan.Object {
	out := make([]plan.Object, 0, len(d.objects))
	for _, o := range d.objects {
		out = append(out, o.object())
	}
	return out
}

func (o *object) object() plan.Object {
	p := plan.Object{
		Key: o.externalKey(), Kind: o.word, Link: o.link, Flags: uint32(o.flags), Offset: o.info.Pos, Mode: o.mode(), UID: o.stat.Uid, GID: o.stat.Gid,
		Dev: uint64(o.stat.Dev), Ino: o.stat.Ino, Rdev: uint64(o.stat.Rdev), Queued: o.queued, Peer: o.peer, PeerIno: o.peerIno,
		Holders: o.listHolders(), Reason: o.reason, Hint: o.hint, Declarable: o.declarable,
	}
	if p.Kind == "" { // it was gone before it could be looked at
		p.Kind = modeKind(o.mode())
	}
	switch {
	case o.path != "" && !o.dirOnly:
		p.Path = o.path
	case strings.HasPrefix(o.link, "/") && o.kind != kindMemfd && !pseudo(o):
		p.Path = o.linkPath()
	}
	if p.Path != "" {
		p.MTime, p.Birth, p.SHA256 = o.stat.Mtim.Nano(), o.birth, o.sha256
	}
	if o.mode()&unix.S_IFMT == unix.S_IFREG {
		p.Size = uint64(o.stat.Size)
	}
	if s, ok := o.state.(*regularState); ok {
		p.BuildID = s.buildID
	}
	switch {
	case o.refused:
		p.Carry = plan.CarryRefused
	case o.ext, o.proxied, o.facts != nil && (o.facts.External || o.facts.Unix != nil && o.facts.Unix.External):
		p.Carry = plan.CarryExternal
	case o.path != "" && !o.dirOnly && !o.create && !o.carries:
		p.Carry = plan.CarryPath
	default:
		p.Carry = plan.CarryImage
	}
	return p
}

var stdRoles = []string{"stdin", "stdout", "stderr"}

// listHolders puts what one process has of o together.
func (o *object) listHolders() []plan.Holder {
	var out []plan.Holder
	at := map[int]int{}
	for _, h := range o.holders {
		i, ok := at[h.proc.Pid]
		if !ok {
			i = len(out)
			at[h.proc.Pid] = i
			out = append(out, plan.Holder{Pid: h.proc.Pid, VPid: h.proc.VPid, Comm: h.proc.Comm})
		}
		role := h.role
		if h.fd >= 0 {
			out[i].FDs = append(out[i].FDs, h.fd)
			if h.fd < len(stdRoles) {
				role = stdRoles[h.fd]
			}
		}
		if role != "" && !slices.Contains(out[i].Roles, role) {
			out[i].Roles = append(out[i].Roles, role)
		}
	}
	return out
}

// birth is when a file was made, in ns since 1970; 0 if that is not known.
func birth(f *os.File) int64 {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &st); err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return 0
	}
	return st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
}
