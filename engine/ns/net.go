package ns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/netdev"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
)

// What "ip address save", "ip route save" and "ip rule save" begin with.
const (
	ifaddrMagic = 0x47361222
	routeMagic  = 0x45311224
	ruleMagic   = 0x71706986
)

// Attributes of links that golang.org/x/sys/unix does not name
// (include/uapi/linux/veth.h).
const vethInfoPeer = 1

// device is one network device.
type device struct {
	index   int32
	flags   uint32
	name    string
	kind    string // of IFLA_INFO_KIND, "" for the loopback
	mtu     uint32
	address []byte
	master  uint32
	link    uint32 // index of the peer of a veth
	outside bool   // the peer is in another namespace
}

func parseDevice(b []byte) (*device, error) {
	as, err := attrs(b, unix.SizeofIfInfomsg)
	if err != nil {
		return nil, err
	}
	d := &device{index: int32(ne.Uint32(b[4:])), flags: ne.Uint32(b[8:]), name: text(find(as, unix.IFLA_IFNAME)), address: find(as, unix.IFLA_ADDRESS)}
	d.mtu, _ = find32(as, unix.IFLA_MTU)
	d.master, _ = find32(as, unix.IFLA_MASTER)
	d.link, _ = find32(as, unix.IFLA_LINK)
	_, d.outside = find32(as, unix.IFLA_LINK_NETNSID)
	info, err := attrs(find(as, unix.IFLA_LINKINFO), 0)
	if err != nil {
		return nil, err
	}
	d.kind = text(find(info, unix.IFLA_INFO_KIND))
	return d, nil
}

// Network is what a network namespace holds, but for sockets.
type Network struct {
	devices                      []*device
	addrs, routes, routes6, rule []nlmsg
	sysctls                      []image.SysctlFacts
	key                          string // of one that the restorer provides
}

// ExternalNet is a network namespace that the restorer provides under a key.
func ExternalNet(key string) *Network { return &Network{key: key} }

// family is struct rtmsg, ifaddrmsg or ifinfomsg of a dump of all of a family.
func family(f byte, size int) []byte {
	b := make([]byte, size)
	b[0] = f
	return b
}

// ReadNet reads the thread's network namespace and refuses what cannot be made again.
func ReadNet(refuse Refuse) (*Network, error) {
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.close()
	n := &Network{}
	tuns := map[uint32]bool{}
	links, err := c.dump("list network devices", unix.RTM_GETLINK, family(0, unix.SizeofIfInfomsg))
	if err != nil {
		return nil, err
	}
	for _, m := range links {
		d, err := parseDevice(m.data)
		if err != nil {
			return nil, fmt.Errorf("list network devices: %w", err)
		}
		n.devices = append(n.devices, d)
		switch {
		case d.flags&unix.IFF_LOOPBACK != 0, d.kind == "veth", d.kind == "bridge":
		case d.kind == "tun":
			tuns[uint32(d.index)] = true // made with the descriptor that it belongs to
		case d.flags&unix.IFF_UP == 0 && fallback(d.kind):
			// The kernel makes it in every new namespace.
		default:
			kind := d.kind
			if kind == "" {
				kind = "hardware"
			}
			refuse("network device "+d.name, "is of kind "+kind+", which cannot be made again in the network namespace of the tree", "remove it (ip link del)")
		}
	}
	for _, x := range []struct {
		what string
		typ  uint16
		data []byte
		to   *[]nlmsg
	}{
		{"list addresses", unix.RTM_GETADDR, family(0, unix.SizeofIfAddrmsg), &n.addrs},
		{"list routes", unix.RTM_GETROUTE, family(unix.AF_INET, unix.SizeofRtMsg), &n.routes},
		{"list IPv6 routes", unix.RTM_GETROUTE, family(unix.AF_INET6, unix.SizeofRtMsg), &n.routes6},
		{"list rules", unix.RTM_GETRULE, family(unix.AF_INET, unix.SizeofRtMsg), &n.rule},
	} {
		if *x.to, err = c.dump(x.what, x.typ, x.data); err != nil {
			return nil, err
		}
	}
	six, err := c.dump("list IPv6 rules", unix.RTM_GETRULE, family(unix.AF_INET6, unix.SizeofRtMsg))
	if err != nil {
		return nil, err
	}
	n.rule = append(n.rule, six...)
	own := func(m nlmsg) bool { return len(m.data) < unix.SizeofRtMsg || m.data[4] == unix.RT_TABLE_LOCAL }
	n.routes, n.routes6 = slices.DeleteFunc(n.routes, own), slices.DeleteFunc(n.routes6, own)
	n.addrs = slices.DeleteFunc(n.addrs, func(m nlmsg) bool { return len(m.data) < unix.SizeofIfAddrmsg || tuns[ne.Uint32(m.data[4:])] })
	through := func(m nlmsg) bool {
		as, err := attrs(m.data, unix.SizeofRtMsg)
		oif, ok := find32(as, unix.RTA_OIF)
		return err == nil && ok && tuns[oif]
	}
	n.routes, n.routes6 = slices.DeleteFunc(n.routes, through), slices.DeleteFunc(n.routes6, through)
	if err := refuseNet(c, n, refuse); err != nil {
		return nil, err
	}
	// Those of a TUN interface are not there when the others are set.
	n.sysctls, err = changedSysctls(slices.DeleteFunc(slices.Clone(n.devices), func(d *device) bool { return d.kind == "tun" }))
	return n, err
}

// Tuns names the TUN and TAP interfaces: descriptors must bring them along.
func (n *Network) Tuns() (names []string) {
	if n == nil {
		return nil
	}
	for _, d := range n.devices {
		if d.kind == "tun" {
			names = append(names, d.name)
		}
	}
	return names
}

// fallback tells whether the kernel makes a device of that kind in new namespaces.
func fallback(kind string) bool {
	return slices.Contains([]string{"ipip", "gre", "gretap", "erspan", "sit", "ip6tnl", "ip6gre", "ip_vti", "vti", "vti6", "ip6_vti"}, kind)
}

// refuseNet refuses what is configured and not carried.
func refuseNet(c *conn, n *Network, refuse Refuse) error {
	name := func(index uint32) string {
		for _, d := range n.devices {
			if uint32(d.index) == index {
				return d.name
			}
		}
		return fmt.Sprintf("number %d", index)
	}
	neigh, err := c.dump("list neighbours", unix.RTM_GETNEIGH, make([]byte, unix.SizeofNdMsg))
	if err != nil {
		return err
	}
	for _, m := range neigh {
		// struct ndmsg: family, pads, ifindex, state
		if len(m.data) >= unix.SizeofNdMsg && ne.Uint16(m.data[8:])&unix.NUD_PERMANENT != 0 && m.data[0] != unix.AF_BRIDGE {
			refuse("network device "+name(ne.Uint32(m.data[4:])), "has neighbours that were set by hand, which are not carried", "remove them (ip neigh del)")
			break
		}
	}
	qdiscs, err := c.dump("list queueing disciplines", unix.RTM_GETQDISC, make([]byte, sizeofTcmsg))
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for _, m := range qdiscs {
		// struct tcmsg: family, pads, ifindex, handle
		if len(m.data) >= sizeofTcmsg && ne.Uint32(m.data[8:]) != 0 {
			refuse("network device "+name(ne.Uint32(m.data[4:])), "has a queueing discipline that was set by hand, which is not carried", "remove it (tc qdisc del)")
			break
		}
	}
	tables, err := nftTables()
	if err != nil {
		return err
	}
	if len(tables) > 0 {
		refuse("", "has rules of a firewall in its network namespace (nftables: "+strings.Join(tables, ", ")+"), which are not carried", "remove them (nft flush ruleset)")
	}
	for _, f := range []string{"ip_tables_names", "ip6_tables_names", "arp_tables_names"} {
		if b, err := os.ReadFile("/proc/thread-self/net/" + f); err == nil && len(b) > 0 {
			refuse("", "uses tables of iptables in its network namespace ("+strings.Join(strings.Fields(string(b)), ", ")+"), which are not carried", "do without a firewall inside")
			break
		}
	}
	return nil
}

// nftTables names the tables of nftables in the thread's network namespace.
func nftTables() ([]string, error) {
	c, err := dial(unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.close()
	ms, err := c.dump("list tables of nftables", unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, []byte{unix.AF_UNSPEC, 0, 0, 0})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		return nil, nil // this kernel has none
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range ms {
		as, err := attrs(m.data, 4)
		if err != nil {
			return nil, err
		}
		names = append(names, text(find(as, unix.NFTA_TABLE_NAME)))
	}
	return names, nil
}

// netSysctls are the directories with the settings of a network namespace.
var netSysctls = []string{"net/core", "net/ipv4", "net/ipv6", "net/unix", "net/netfilter", "net/mptcp"}

// readSysctls reads the settings of the thread's network namespace.
func readSysctls() (map[string]string, error) {
	out := map[string]string{}
	for _, dir := range netSysctls {
		err := filepath.WalkDir("/proc/sys/"+dir, func(p string, de fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || de.IsDir() {
				return err
			}
			info, err := de.Info()
			if err != nil || info.Mode()&0o200 == 0 {
				return nil // cannot be set
			}
			b, err := os.ReadFile(p)
			if err != nil {
				return nil // some cannot be read, such as keys
			}
			out[strings.TrimPrefix(p, "/proc/sys/")] = strings.TrimSuffix(string(b), "\n")
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// freshSysctls reads the settings of a new network namespace.
func freshSysctls() (out map[string]string, err error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET))
		if err == nil {
			out, err = readSysctls()
		}
		done <- err
	}()
	return out, <-done
}

// uncarried are settings that are not: counters and such that change by themselves.
var uncarried = []string{"flush", "stable_secret", "base_reachable_time", "retrans_time", "nf_conntrack_count", "fib_sync_mem", "drop_caches"}

// changedSysctls are the settings that differ from those of a new namespace.
func changedSysctls(devices []*device) ([]image.SysctlFacts, error) {
	have, err := readSysctls()
	if err != nil {
		return nil, err
	}
	plain, err := freshSysctls()
	if err != nil {
		return nil, err
	}
	var out []image.SysctlFacts
	for p, v := range have {
		want, ok := plain[p]
		if !ok {
			// Of a device: as those of all new devices.
			dir, name := filepath.Split(p)
			dev := filepath.Base(dir)
			if !slices.ContainsFunc(devices, func(d *device) bool { return d.name == dev }) {
				continue
			}
			want, ok = plain[filepath.Dir(filepath.Clean(dir))+"/default/"+name]
		}
		if ok && v != want && !slices.Contains(uncarried, filepath.Base(p)) {
			out = append(out, image.SysctlFacts{Path: p, Value: v})
		}
	}
	// "all" sets those of every device, and "default" comes before single ones.
	rank := func(p string) int {
		return slices.Index([]string{"all", "default"}, filepath.Base(filepath.Dir(p)))
	}
	slices.SortFunc(out, func(a, b image.SysctlFacts) int {
		ra, rb := rank(a.Path), rank(b.Path)
		if ra < 0 {
			ra = 2
		}
		if rb < 0 {
			rb = 2
		}
		if ra != rb {
			return ra - rb
		}
		return strings.Compare(a.Path, b.Path)
	})
	return out, nil
}

// Sysctls are the settings that images have no field for.
func (n *Network) Sysctls() []image.SysctlFacts {
	if n == nil {
		return nil
	}
	return n.sysctls
}

func (n *Network) dump(emit Emit) error {
	id := Net.id()
	e := &netdev.NetnsEntry{}
	if n.key != "" {
		e.ExtKey = &n.key
	}
	if err := emit(image.Entry{File: image.NetnsFile(id), Magic: image.MagicNetns, Msg: e}); err != nil || n.key != "" {
		return err
	}
	for _, d := range n.devices {
		e := &netdev.NetDeviceEntry{Ifindex: proto.Uint32(uint32(d.index)), Mtu: &d.mtu, Flags: &d.flags, Name: &d.name, Address: d.address}
		switch {
		case d.flags&unix.IFF_LOOPBACK != 0:
			e.Type = netdev.NdType_LOOPBACK.Enum()
		case d.kind == "veth":
			e.Type = netdev.NdType_VETH.Enum()
			if !d.outside {
				e.PeerIfindex = &d.link
			}
		case d.kind == "bridge":
			e.Type = netdev.NdType_BRIDGE.Enum()
		default:
			continue
		}
		if d.master != 0 {
			e.Master = &d.master
		}
		if err := emit(image.Entry{File: image.NetdevFile(id), Magic: image.MagicNetdev, Msg: e}); err != nil {
			return err
		}
	}
	for _, x := range []struct {
		file  string
		magic uint32
		typ   uint16
		ms    []nlmsg
	}{
		{image.IfaddrFile(id), ifaddrMagic, unix.RTM_NEWADDR, n.addrs},
		{image.RouteFile(id), routeMagic, unix.RTM_NEWROUTE, n.routes},
		{image.Route6File(id), routeMagic, unix.RTM_NEWROUTE, n.routes6},
		{image.RuleFile(id), ruleMagic, unix.RTM_NEWRULE, n.rule},
	} {
		b := ne.AppendUint32(nil, x.magic)
		for _, m := range x.ms {
			b = appendMsg(b, m.typ, unix.NLM_F_MULTI, 1, m.data)
		}
		if err := emit(image.Entry{File: x.file, Magic: image.MagicRaw, Extra: b}); err != nil {
			return err
		}
	}
	return nil
}

// restoreNet fills the thread's network namespace, which is new. host is the
// network namespace of this process.
func restoreNet(set *image.Set, id uint32, o RestoreOptions, host *os.File) error {
	es, err := image.All[*netdev.NetDeviceEntry](set, image.NetdevFile(id))
	if err != nil {
		return err
	}
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.close()
	made := map[uint32]bool{}
	for _, e := range es {
		if err := makeDevice(c, e, es, made, o, host); err != nil {
			return fmt.Errorf("make the network device %s: %w", e.GetName(), err)
		}
	}
	var facts []image.SysctlFacts
	if set.Facts != nil {
		facts = set.Facts.NetSysctls
	}
	if err := setSysctls(facts, o.WeakSysctls); err != nil {
		return err
	}
	// The addresses were in use: nobody has to be asked whether they are free.
	detect, err := withoutDetection(es)
	if err != nil {
		return err
	}
	if err := replay(c, set, image.IfaddrFile(id), ifaddrMagic, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE); err != nil {
		return err
	}
	for _, e := range es {
		if err := finishDevice(c, e); err != nil {
			return fmt.Errorf("set up the network device %s: %w", e.GetName(), err)
		}
	}
	if err := setSysctls(detect, false); err != nil {
		return err
	}
	// Of equal routes the first is used: what the addresses brought makes way for
	// all in their order.
	if err := flushRoutes(c); err != nil {
		return err
	}
	for _, x := range []struct {
		file  string
		magic uint32
		typ   uint16
		flags uint16
	}{
		{image.RouteFile(id), routeMagic, unix.RTM_NEWROUTE, unix.NLM_F_APPEND},
		{image.Route6File(id), routeMagic, unix.RTM_NEWROUTE, unix.NLM_F_EXCL},
		{image.RuleFile(id), ruleMagic, unix.RTM_NEWRULE, unix.NLM_F_EXCL},
	} {
		if err := replay(c, set, x.file, x.magic, x.typ, unix.NLM_F_CREATE|x.flags); err != nil {
			return err
		}
	}
	return dropRules(c, set, id)
}

// withoutDetection turns the detection of duplicate addresses off, and gives the
// settings that turn it on again.
func withoutDetection(es []*netdev.NetDeviceEntry) (old []image.SysctlFacts, err error) {
	names := []string{"all", "default"}
	for _, e := range es {
		names = append(names, e.GetName())
	}
	for _, n := range names {
		s := image.SysctlFacts{Path: "net/ipv6/conf/" + n + "/accept_dad", Value: "0"}
		b, err := os.ReadFile("/proc/sys/" + s.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		if err := setSysctls([]image.SysctlFacts{s}, false); err != nil {
			return nil, err
		}
		s.Value = strings.TrimSuffix(string(b), "\n")
		old = append(old, s)
	}
	return old, nil
}

// dropRules removes rules that every new namespace has and the tree's had not.
func dropRules(c *conn, set *image.Set, id uint32) error {
	es := set.Entries(image.RuleFile(id))
	if len(es) == 0 {
		return nil
	}
	want, err := splitMsgs(es[0].Extra[4:])
	if err != nil {
		return err
	}
	for _, f := range []byte{unix.AF_INET, unix.AF_INET6} {
		have, err := c.dump("list rules", unix.RTM_GETRULE, family(f, unix.SizeofRtMsg))
		if err != nil {
			return err
		}
		for _, m := range have {
			if slices.ContainsFunc(want, func(w nlmsg) bool { return bytes.Equal(w.data, m.data) }) {
				continue
			}
			if err := c.set("remove a rule", unix.RTM_DELRULE, 0, m.data); err != nil {
				return err
			}
		}
	}
	return nil
}

// flushRoutes removes all IPv4 routes but the local ones.
func flushRoutes(c *conn) error {
	ms, err := c.dump("list routes", unix.RTM_GETROUTE, family(unix.AF_INET, unix.SizeofRtMsg))
	if err != nil {
		return err
	}
	for _, m := range ms {
		if len(m.data) < unix.SizeofRtMsg || m.data[4] == unix.RT_TABLE_LOCAL {
			continue
		}
		if err := c.set("remove a route", unix.RTM_DELROUTE, 0, m.data); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// ifnamsiz is the room for the name of a device (include/uapi/linux/if.h).
const ifnamsiz = 16

func makeDevice(c *conn, e *netdev.NetDeviceEntry, all []*netdev.NetDeviceEntry, made map[uint32]bool, o RestoreOptions, host *os.File) error {
	if e.GetName() == "" || len(e.GetName()) >= ifnamsiz || e.GetIfindex() == 0 || e.GetIfindex() > 1<<30 {
		return errors.New("its name or number is impossible")
	}
	if made[e.GetIfindex()] || e.GetType() == netdev.NdType_LOOPBACK {
		return nil
	}
	made[e.GetIfindex()] = true
	head := appendText(ifinfo(int32(e.GetIfindex()), 0, 0), unix.IFLA_IFNAME, e.GetName())
	if len(e.GetAddress()) > 0 {
		head = appendAttr(head, unix.IFLA_ADDRESS, e.GetAddress())
	}
	const flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	switch e.GetType() {
	case netdev.NdType_BRIDGE:
		info := appendText(nil, unix.IFLA_INFO_KIND, "bridge")
		return c.set("make a bridge", unix.RTM_NEWLINK, flags, appendAttr(head, unix.IFLA_LINKINFO, info))
	case netdev.NdType_VETH:
		peer, bridge, err := vethPeer(e, all, made, o, host)
		if err != nil {
			return err
		}
		data := appendAttr(nil, vethInfoPeer|unix.NLA_F_NESTED, peer)
		info := appendAttr(appendText(nil, unix.IFLA_INFO_KIND, "veth"), unix.IFLA_INFO_DATA|unix.NLA_F_NESTED, data)
		m := appendAttr(head, unix.IFLA_LINKINFO, info)
		// The pair whose end the dumped tree had goes a while after it.
		for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			err := c.set("make a veth pair", unix.RTM_NEWLINK, flags, m)
			if errors.Is(err, unix.EEXIST) && time.Since(start) < 2*time.Second {
				continue
			}
			if err != nil || e.PeerIfindex != nil {
				return err
			}
			return outerEnd(o.Veth[e.GetName()].Name, bridge, host)
		}
	}
	return fmt.Errorf("it is of type %s, which cannot be made", e.GetType())
}

// vethPeer describes the other end of a veth pair.
func vethPeer(e *netdev.NetDeviceEntry, all []*netdev.NetDeviceEntry, made map[uint32]bool, o RestoreOptions, host *os.File) (peer []byte, bridge string, err error) {
	if e.PeerIfindex != nil {
		for _, p := range all {
			if p.GetIfindex() == e.GetPeerIfindex() && p.GetType() == netdev.NdType_VETH && !made[p.GetIfindex()] {
				made[p.GetIfindex()] = true
				b := appendText(ifinfo(int32(p.GetIfindex()), 0, 0), unix.IFLA_IFNAME, p.GetName())
				return appendAttr(b, unix.IFLA_ADDRESS, p.GetAddress()), "", nil
			}
		}
		return nil, "", errors.New("its peer is not in the images")
	}
	v, ok := o.Veth[e.GetName()]
	if !ok {
		return nil, "", fmt.Errorf("its other end is outside of the tree: name it (--external 'veth[%s]:NAME' or 'veth[%s]:NAME@BRIDGE')", e.GetName(), e.GetName())
	}
	b := appendText(ifinfo(0, 0, 0), unix.IFLA_IFNAME, v.Name)
	return append32(b, unix.IFLA_NET_NS_FD, uint32(host.Fd())), v.Bridge, nil
}

// outerEnd puts up the end of a veth pair that is in the host's network namespace.
func outerEnd(name, bridge string, host *os.File) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := os.NewSyscallError("setns", unix.Setns(int(host.Fd()), unix.CLONE_NEWNET))
		if err == nil {
			err = putUp(name, bridge)
		}
		done <- err
	}()
	return <-done
}

func putUp(name, bridge string) error {
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.close()
	m := appendText(ifinfo(0, unix.IFF_UP, unix.IFF_UP), unix.IFLA_IFNAME, name)
	if bridge != "" {
		ms, err := c.do("find the bridge "+bridge, unix.RTM_GETLINK, unix.NLM_F_ACK, appendText(ifinfo(0, 0, 0), unix.IFLA_IFNAME, bridge))
		if err != nil {
			return err
		}
		if len(ms) != 1 || len(ms[0].data) < unix.SizeofIfInfomsg {
			return fmt.Errorf("find the bridge %s: no answer", bridge)
		}
		m = append32(m, unix.IFLA_MASTER, ne.Uint32(ms[0].data[4:]))
	}
	return c.set("put up "+name, unix.RTM_NEWLINK, 0, m)
}

// kept are the flags of a device that are set by hand (netdevice(7)).
const kept = unix.IFF_UP | unix.IFF_PROMISC | unix.IFF_ALLMULTI | unix.IFF_NOARP | unix.IFF_MULTICAST | unix.IFF_DEBUG

func finishDevice(c *conn, e *netdev.NetDeviceEntry) error {
	m := ifinfo(int32(e.GetIfindex()), e.GetFlags()&kept, kept)
	m = append32(m, unix.IFLA_MTU, e.GetMtu())
	if e.GetMaster() != 0 {
		m = append32(m, unix.IFLA_MASTER, e.GetMaster())
	}
	return c.set("set it", unix.RTM_NEWLINK, 0, m)
}

// replay sends the messages of an image. What depends on others is tried again
// after them; what is there already is as it should be.
func replay(c *conn, set *image.Set, file string, magic uint32, typ, flags uint16) error {
	es := set.Entries(file)
	if len(es) == 0 {
		return nil
	}
	b := es[0].Extra
	if len(b) < 4 || ne.Uint32(b) != magic {
		return fmt.Errorf("image %s: it does not begin as it should", file)
	}
	todo, err := splitMsgs(b[4:])
	if err != nil {
		return fmt.Errorf("image %s: %w", file, err)
	}
	for len(todo) > 0 {
		var later []nlmsg
		var last error
		for _, m := range todo {
			if m.typ != typ {
				return fmt.Errorf("image %s: a message of type %d", file, m.typ)
			}
			if loopback6(m) {
				continue
			}
			data, err := settable(m)
			if err != nil {
				return fmt.Errorf("image %s: %w", file, err)
			}
			err = c.set("set what is in "+file, typ, flags, data)
			if err != nil && !errors.Is(err, unix.EEXIST) {
				last = err
				later = append(later, m)
			}
		}
		if len(later) == len(todo) {
			return last
		}
		todo = later
	}
	return nil
}

// loopback6 tells whether a message is about the address ::1, which the kernel
// sets by itself and then without a route.
func loopback6(m nlmsg) bool {
	if m.typ != unix.RTM_NEWADDR || len(m.data) < unix.SizeofIfAddrmsg || m.data[0] != unix.AF_INET6 || m.data[3] != unix.RT_SCOPE_HOST {
		return false
	}
	as, err := attrs(m.data, unix.SizeofIfAddrmsg)
	return err == nil && bytes.Equal(find(as, unix.IFA_ADDRESS), append(make([]byte, 15), 1))
}

// settable turns what the kernel tells into what it takes.
func settable(m nlmsg) ([]byte, error) {
	size, drop := unix.SizeofRtMsg, []uint16{unix.RTA_CACHEINFO}
	switch m.typ {
	case unix.RTM_NEWADDR:
		size, drop = unix.SizeofIfAddrmsg, nil
	case unix.RTM_NEWRULE:
		drop = nil
	}
	as, err := attrs(m.data, size)
	if err != nil {
		return nil, err
	}
	out := bytes.Clone(m.data[:size])
	if m.typ == unix.RTM_NEWROUTE {
		ne.PutUint32(out[8:], ne.Uint32(out[8:])&unix.RTNH_F_ONLINK)
	}
	for _, a := range as {
		if slices.Contains(drop, a.typ) {
			continue
		}
		data := a.data
		if m.typ == unix.RTM_NEWADDR && a.typ == unix.IFA_FLAGS && len(data) == 4 {
			data = ne.AppendUint32(nil, ne.Uint32(data)&^(unix.IFA_F_TENTATIVE|unix.IFA_F_PERMANENT))
		}
		out = appendAttr(out, a.typ, data)
	}
	if m.typ == unix.RTM_NEWRULE && find(as, unix.FRA_PRIORITY) == nil {
		out = append32(out, unix.FRA_PRIORITY, 0) // the kernel does not tell that of the first
	}
	return out, nil
}

// setSysctls writes settings; weak passes over those that this kernel does not have.
func setSysctls(list []image.SysctlFacts, weak bool) error {
	for _, s := range list {
		p := filepath.Clean("/proc/sys/" + s.Path)
		if !slices.ContainsFunc(netSysctls, func(dir string) bool { return strings.HasPrefix(p, "/proc/sys/"+dir+"/") }) {
			return fmt.Errorf("%q is no setting of a network namespace", s.Path)
		}
		if b, err := os.ReadFile(p); err == nil && strings.TrimSuffix(string(b), "\n") == s.Value {
			continue
		}
		if err := os.WriteFile(p, []byte(s.Value), 0); err != nil && !(weak && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("set %s to %q: %w", s.Path, s.Value, err)
		}
	}
	return nil
}

// NetKey is the key under which the restorer provides the network namespace of the
// tree, empty if it is made again.
func (im Images) NetKey(set *image.Set) string {
	es, err := image.All[*netdev.NetnsEntry](set, image.NetnsFile(im.ids[Net]))
	if err != nil || len(es) != 1 {
		return ""
	}
	return es[0].GetExtKey()
}
