package files

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/tun"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/engine/sys"
)

// kindTun carries descriptors of /dev/net/tun: without an interface, or attached to
// one. An interface that the destination does not have is made again with its
// addresses and routes; one that is there (a persistent one) is only attached to.
// It has two entries of one id, as CRIU writes them: REG and TUNF.
var kindTun = &kind{
	name: "TUN/TAP descriptor", typ: fdinfo.FdTypes_TUNF,
	takes: func(_ *Dumper, o *object) bool {
		return o.mode()&unix.S_IFMT == unix.S_IFCHR && !o.isPath() && o.stat.Rdev == unix.Mkdev(10, 200)
	},
	dump:  dumpTun,
	check: checkTun,
	open:  openEach(openTun),
	seal:  sealTuns,
}

// attachFlags are those that TUNSETIFF takes; IFF_NO_CARRIER (0x40) is for a new
// interface only.
const (
	tunNoCarrier = 0x40
	attachFlags  = unix.IFF_TUN | unix.IFF_TAP | unix.IFF_NAPI | unix.IFF_NAPI_FRAGS | unix.IFF_NO_PI | unix.IFF_ONE_QUEUE |
		unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
)

// offloads are the bits of TUNSETOFFLOAD by the features that show them.
var offloads = []struct {
	feature string
	bits    uint32
}{
	{"tx-checksum-ip-generic", unix.TUN_F_CSUM}, {"tx-tcp-segmentation", unix.TUN_F_TSO4}, {"tx-tcp6-segmentation", unix.TUN_F_TSO6},
	{"tx-tcp-ecn-segmentation", unix.TUN_F_TSO_ECN}, {"tx-udp-segmentation", unix.TUN_F_USO4 | unix.TUN_F_USO6},
}

// tunState is the interface that a descriptor is attached to.
type tunState struct{ name string }

func dumpTun(d *Dumper, o *object) error {
	fd := int(o.file.Fd())
	if other, err := d.refuseOtherNetns(o); other || err != nil {
		return err
	}
	e := &tun.TunfileEntry{Id: proto.Uint32(o.id)}
	if err := dumpNode(d, o); err != nil {
		return err
	}
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	switch err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); {
	case errors.Is(err, unix.EBADFD): // attached to nothing
	case err != nil:
		return os.NewSyscallError("ioctl TUNGETIFF", err)
	default:
		if err := d.dumpTunLink(o, fd, ifr, e); err != nil {
			return err
		}
	}
	// The entry of its type first: the table of descriptors names that.
	o.entries = append([]*fdinfo.FileEntry{{Type: fdinfo.FdTypes_TUNF.Enum(), Id: proto.Uint32(o.id), Tunf: e}}, o.entries...)
	return nil
}

func (d *Dumper) dumpTunLink(o *object, fd int, ifr *unix.Ifreq, e *tun.TunfileEntry) error {
	name, flags := ifr.Name(), uint32(ifr.Uint16())
	o.link += " (" + name + ")"
	ns, err := unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS)
	if err != nil {
		return os.NewSyscallError("ioctl TUNGETDEVNETNS", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(ns, &st)
	_ = unix.Close(ns)
	switch {
	case err != nil:
		return os.NewSyscallError("fstat", err)
	case inode(&st) != d.netns:
		d.refuse(o, "its interface is in another network namespace", "let the program close it")
		return nil
	case filtered(fd):
		d.refuse(o, "a filter is attached to its interface (TUNATTACHFILTER), and cannot be read", "let the program detach it")
		return nil
	}
	f := &image.TunFacts{Owner: -1, Group: -1}
	var attrs map[uint16]uint32
	if f.Link, attrs, err = readLink(name); err != nil {
		return err
	}
	// TUNGETIFF has one bit for IFF_NO_PI and IFF_NOFILTER.
	if f.Flags = flags &^ unix.IFF_NO_PI; attrs[iflaTunPI] == 0 {
		f.Flags |= unix.IFF_NO_PI
	}
	if n, ok := attrs[iflaTunOwner]; ok {
		f.Owner = int32(n)
	}
	if n, ok := attrs[iflaTunGroup]; ok {
		f.Group = int32(n)
	}
	for _, x := range []struct {
		req uint
		set func(int)
	}{
		{unix.TUNGETSNDBUF, func(n int) { f.Sndbuf = n }}, {unix.TUNGETVNETHDRSZ, func(n int) { f.VnetHdrSize = n }},
		{unix.TUNGETVNETBE, func(n int) { f.BigEndian = n != 0 }}, {unix.TUNGETVNETLE, func(n int) { f.LittleEnd = n != 0 }},
	} {
		n, err := unix.IoctlGetInt(fd, x.req)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBADFD) {
			continue // a kernel without another order of bytes, or a detached queue
		}
		if err != nil {
			return fmt.Errorf("settings of interface %s: %w", name, os.NewSyscallError("ioctl", err))
		}
		x.set(n)
	}
	if f.Offload, err = tunOffload(name); err != nil {
		return fmt.Errorf("features of interface %s: %w", name, err)
	}
	e.Netdev = proto.String(name)
	if flags&unix.IFF_DETACH_QUEUE != 0 {
		e.Detached = proto.Bool(true)
	}
	o.facts.Tun = f
	o.state = tunState{name: name}
	return nil
}

// HasTun tells, after Finish, whether a descriptor is attached to an interface.
func (d *Dumper) HasTun(name string) bool {
	return slices.ContainsFunc(d.objects, func(o *object) bool {
		s, ok := o.state.(tunState)
		return ok && s.name == name
	})
}

// filtered says whether a TAP interface has a filter; those of TUN have none.
func filtered(fd int) bool {
	n, err := sys.TunFilterLen(fd)
	return err == nil && n > 0
}

func tunOffload(name string) (uint32, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(s) }()
	have, err := sys.NetFeatures(s, name)
	if err != nil {
		return 0, err
	}
	var out uint32
	for _, o := range offloads {
		if have[o.feature] {
			out |= o.bits
		}
	}
	return out, nil
}

// joinTun makes one entry of the two that a descriptor of /dev/net/tun has; nil if a
// and b are not those.
func joinTun(a, b *fdinfo.FileEntry) *fdinfo.FileEntry {
	if b.GetType() == fdinfo.FdTypes_TUNF {
		a, b = b, a
	}
	if a.GetType() != fdinfo.FdTypes_TUNF || b.GetType() != fdinfo.FdTypes_REG || a.Reg != nil {
		return nil
	}
	return &fdinfo.FileEntry{Type: a.Type, Id: a.Id, Tunf: a.Tunf, Reg: b.Reg}
}

func checkTun(r *Restorer, x *description) error {
	reg, name := x.entry.GetReg(), x.entry.GetTunf().GetNetdev()
	switch {
	case reg == nil:
		return errors.New("the entry of its node is missing")
	case reg.GetMode()&unix.S_IFMT != unix.S_IFCHR:
		return errors.New("its node is no character device")
	case x.entry.GetTunf().Netdev == nil:
		return nil
	case name == "" || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "/% \t\n"):
		return fmt.Errorf("%.32q is no name of a network interface", name)
	}
	f := r.facts[x.id]
	if f == nil || f.Tun == nil {
		return fmt.Errorf("interface %s: the image of a network namespace would have its configuration, and is not carried", name)
	}
	if t := f.Tun.Flags & (unix.IFF_TUN | unix.IFF_TAP); t != unix.IFF_TUN && t != unix.IFF_TAP {
		return fmt.Errorf("interface %s is neither TUN nor TAP", name)
	}
	if f.Tun.VnetHdrSize < 0 || f.Tun.VnetHdrSize > 1<<12 || f.Tun.Sndbuf < 0 {
		return fmt.Errorf("interface %s has a header of %d bytes and a buffer of %d", name, f.Tun.VnetHdrSize, f.Tun.Sndbuf)
	}
	return checkLink(&f.Tun.Link)
}

func openTun(r *Restorer, x *description) error {
	if err := openDevice(r, x); err != nil {
		return err
	}
	name := x.entry.GetTunf().GetNetdev()
	if name == "" || r.isForwarded(x) {
		return nil
	}
	if err := r.attachTun(x, name, r.facts[x.id].Tun); err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	return nil
}

// attachTun attaches a descriptor to its interface, which may be a new one.
func (r *Restorer) attachTun(x *description, name string, f *image.TunFacts) error {
	fd := int(x.file.Fd())
	flags := f.Flags & attachFlags
	_, missing := interfaceIndex(name)
	if missing != nil {
		flags |= f.Flags & tunNoCarrier
		// Programs know the index; what else has it now keeps it.
		if _, err := interfaceName(f.Link.Index); err != nil && f.Link.Index > 0 && f.Link.Index <= maxInterface {
			if err := unix.IoctlSetPointerInt(fd, unix.TUNSETIFINDEX, int(f.Link.Index)); err != nil {
				return os.NewSyscallError("ioctl TUNSETIFINDEX", err)
			}
		}
	}
	if err := tunIoctl(fd, unix.TUNSETIFF, name, flags); err != nil {
		if errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%w: another program of this host has it", err)
		}
		return fmt.Errorf("ioctl TUNSETIFF: %w", err)
	}
	if err := setTun(fd, f, missing != nil); err != nil {
		return err
	}
	if missing != nil {
		if err := configureLink(name, &f.Link); err != nil {
			return err
		}
	}
	if x.entry.GetTunf().GetDetached() {
		if err := tunIoctl(fd, unix.TUNSETQUEUE, "", unix.IFF_DETACH_QUEUE); err != nil {
			return fmt.Errorf("ioctl TUNSETQUEUE: %w", err)
		}
	}
	return nil
}

func tunIoctl(fd int, req uint, name string, flags uint32) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(uint16(flags))
	return unix.IoctlIfreq(fd, req, ifr)
}

// setTun gives an interface the settings that it had, and a new one its owners.
func setTun(fd int, f *image.TunFacts, fresh bool) error {
	for _, x := range []struct {
		name string
		set  bool
		do   func() error
	}{
		{"TUNSETVNETHDRSZ", f.VnetHdrSize > 0, func() error { return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, f.VnetHdrSize) }},
		{"TUNSETSNDBUF", f.Sndbuf > 0, func() error { return unix.IoctlSetPointerInt(fd, unix.TUNSETSNDBUF, f.Sndbuf) }},
		{"TUNSETVNETLE", f.LittleEnd, func() error { return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1) }},
		{"TUNSETVNETBE", f.BigEndian, func() error { return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETBE, 1) }},
		{"TUNSETOFFLOAD", f.Offload != 0, func() error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, int(f.Offload)) }},
		{"TUNSETOWNER", fresh && f.Owner >= 0, func() error { return unix.IoctlSetInt(fd, unix.TUNSETOWNER, int(f.Owner)) }},
		{"TUNSETGROUP", fresh && f.Group >= 0, func() error { return unix.IoctlSetInt(fd, unix.TUNSETGROUP, int(f.Group)) }},
		{"TUNSETCARRIER", fresh && f.Link.NoCarrier && f.Link.Up, func() error { return unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, 0) }},
	} {
		if x.set {
			if err := x.do(); err != nil {
				return os.NewSyscallError("ioctl "+x.name, err)
			}
		}
	}
	return nil
}

// sealTuns makes interfaces outlive their descriptors, as they did: only now, so that
// a restore that fails leaves none.
func sealTuns(r *Restorer, xs []*description) []error {
	var errs []error
	for _, x := range xs {
		f := r.facts[x.id]
		if x.file == nil || r.isForwarded(x) || f == nil || f.Tun == nil || f.Tun.Flags&unix.IFF_PERSIST == 0 || x.entry.GetTunf().GetDetached() {
			continue
		}
		if err := unix.IoctlSetInt(int(x.file.Fd()), unix.TUNSETPERSIST, 1); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.who(x), os.NewSyscallError("ioctl TUNSETPERSIST", err)))
		}
	}
	return errs
}
