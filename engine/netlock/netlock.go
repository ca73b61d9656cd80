// Package netlock owns the network lock: a rule of the kernel's packet filter that
// drops, without a word, whatever belongs to given TCP connections. It is what
// keeps a peer from meeting no socket between a dump and its restore. It must not
// know sockets, images or processes.
//
// A lock is one nftables table of family inet, found by its name:
//
//	table inet CRIU-<id> {
//	    set conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service }
//	    set conns6 { type ipv6_addr . inet_service . ipv6_addr . inet_service }
//	    chain input  { priority  300: peer . port . local . port in a set → drop }
//	    chain output { priority -300: local . port . peer . port in a set → drop }
//	}
//
// The priorities put both chains on the socket's side of address translation: they
// see the addresses that the socket has. Packets with the mark Mark pass.
package netlock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Mark is the mark (SO_MARK) of packets that pass every lock; CRIU's own.
const Mark = 0xC114

// prefix begins the name of every table; CRIU's own, so that either finds the
// locks of the other.
const prefix = "CRIU-"

// Conn is a TCP connection as the end to be locked has it. Addresses of IPv4 are
// not in IPv6's form.
type Conn struct{ Local, Peer netip.AddrPort }

// Lock is a lock that ends with Close, or with this process, whatever happens to
// it, until Keep makes it last.
type Lock struct {
	id    string
	conns []Conn
	nl    *nftables.Conn // which owns the table
	netns *os.File
	kept  bool
}

// TableName is the name of the table of a lock.
func TableName(id string) string { return prefix + id }

// New locks connections of the thread's network namespace. The id is a word of
// letters, digits, '-' and '_'.
func New(id string, conns []Conn) (*Lock, error) {
	if !ValidID(id) {
		return nil, fmt.Errorf("%q cannot name a network lock", id)
	}
	var raw *netlink.Conn
	nl, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		raw = c
		return nil
	}))
	if err != nil {
		return nil, unavailable(err)
	}
	l := &Lock{id: id, conns: conns, nl: nl}
	if l.netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	t := table(id + held)
	err = createOwned(raw, t.Name)
	if err == nil {
		err = fill(nl, t, conns)
	}
	if err != nil {
		return nil, errors.Join(unavailable(err), l.Close())
	}
	return l, nil
}

// held ends the name of the table of a Lock that is not kept.
const held = "-dump"

// ID is what New was given.
func (l *Lock) ID() string { return l.id }

// Keep makes the lock outlive this process, until Remove.
func (l *Lock) Keep() error {
	if l == nil || l.kept {
		return nil
	}
	nl, err := nftables.New(nftables.WithNetNSFd(int(l.netns.Fd())))
	if err != nil {
		return unavailable(err)
	}
	t := nl.CreateTable(table(l.id))
	if err := nl.Flush(); err != nil {
		return unavailable(err)
	}
	if err := fill(nl, t, l.conns); err != nil {
		_, rerr := Remove(l.id, l.netns)
		return errors.Join(unavailable(err), rerr)
	}
	l.kept = true
	return nil
}

// Forsake takes Keep back.
func (l *Lock) Forsake() error {
	if l == nil || !l.kept {
		return nil
	}
	l.kept = false
	_, err := Remove(l.id, l.netns)
	return err
}

// Close ends a lock that was not kept and lets go of one that was. It may be
// called twice.
func (l *Lock) Close() error {
	if l == nil {
		return nil
	}
	if l.netns != nil {
		_ = l.netns.Close()
	}
	return l.nl.CloseLasting() // with the socket goes the table
}

// Remove ends a lock that was kept; there need be none. netns is the network
// namespace, nil for the thread's.
func Remove(id string, netns *os.File) (found bool, err error) {
	var opts []nftables.ConnOption
	if netns != nil {
		opts = append(opts, nftables.WithNetNSFd(int(netns.Fd())))
	}
	nl, err := nftables.New(opts...)
	if err != nil {
		return false, unavailable(err)
	}
	if !ValidID(id) {
		return false, nil
	}
	nl.DelTable(table(id))
	err = nl.Flush()
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("remove the network lock %s: %w", TableName(id), err)
	}
	return true, nil
}

// Kept is a lock that exists without its maker.
type Kept struct {
	ID    string
	Conns []Conn // nil if it is not of this package's form
}

// List gives all locks that were kept, those of CRIU included.
func List() ([]Kept, error) {
	nl, err := nftables.New()
	if err != nil {
		return nil, unavailable(err)
	}
	ts, err := nl.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	var out []Kept
	for _, t := range ts {
		id, ok := strings.CutPrefix(t.Name, prefix)
		if !ok || strings.HasSuffix(id, held) {
			continue
		}
		k := Kept{ID: id}
		for _, f := range families {
			es, err := nl.GetSetElements(f.set(t))
			if err != nil {
				continue // it went, or is CRIU's
			}
			for _, e := range es {
				if c, ok := f.parse(e.Key); ok {
					k.Conns = append(k.Conns, c)
				}
			}
		}
		out = append(out, k)
	}
	return out, nil
}

// Probe says whether this kernel can lock: it makes a lock of nothing for a moment.
func Probe() error {
	l, err := New(fmt.Sprintf("probe-%d", os.Getpid()), nil)
	if err != nil {
		return err
	}
	return l.Close()
}

// ValidID says whether a word can be the id of a lock.
func ValidID(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	for _, c := range id {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

func unavailable(err error) error {
	for _, e := range []error{unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return fmt.Errorf("this kernel has no nftables of family inet (CONFIG_NF_TABLES_INET): %w", err)
		}
	}
	return fmt.Errorf("set up nftables: %w", err)
}

func table(id string) *nftables.Table {
	return &nftables.Table{Name: TableName(id), Family: nftables.TableFamilyINet}
}

// tableOwner is NFT_TABLE_F_OWNER (include/uapi/linux/netfilter/nf_tables.h).
const tableOwner = 2

// createOwned makes a table that goes when the socket is closed
// (NFT_TABLE_F_OWNER, Linux 5.12), which the library has no way for.
func createOwned(c *netlink.Conn, name string) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, tableOwner)},
	})
	if err != nil {
		return err
	}
	// struct nfgenmsg (include/uapi/linux/netfilter/nfnetlink.h): family, version, resource.
	gen := func(family byte, resource uint16) []byte {
		return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	}
	msgs := []netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: gen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
		{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Excl},
			Data: append(gen(unix.NFPROTO_INET, 0), attrs...)},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: gen(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
	}
	if _, err := c.SendMessages(msgs); err != nil {
		return err
	}
	_, err = c.Receive()
	return err
}

// family is one of the two families of addresses.
type family struct {
	name         string
	proto        byte
	addr         nftables.SetDatatype
	src, dst, sz uint32 // offsets and length of the addresses in the header
}

var families = []family{
	{name: "conns4", proto: unix.NFPROTO_IPV4, addr: nftables.TypeIPAddr, src: 12, dst: 16, sz: 4},
	{name: "conns6", proto: unix.NFPROTO_IPV6, addr: nftables.TypeIP6Addr, src: 8, dst: 24, sz: 16},
}

func (f family) set(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: f.name, Concatenation: true, KeyByteOrder: binaryutil.BigEndian,
		KeyType: nftables.MustConcatSetType(f.addr, nftables.TypeInetService, f.addr, nftables.TypeInetService)}
}

// key is a connection as the sets have it: each part fills words of 32 bits.
func (f family) key(c Conn) []byte {
	var b []byte
	for _, a := range []netip.AddrPort{c.Local, c.Peer} {
		b = append(b, a.Addr().AsSlice()...)
		b = append(binary.BigEndian.AppendUint16(b, a.Port()), 0, 0)
	}
	return b
}

func (f family) parse(key []byte) (c Conn, ok bool) {
	n := int(f.sz) + 4
	if len(key) != 2*n {
		return c, false
	}
	for i, to := range []*netip.AddrPort{&c.Local, &c.Peer} {
		b := key[i*n:][:n]
		a, _ := netip.AddrFromSlice(b[:f.sz])
		*to = netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[f.sz:]))
	}
	return c, true
}

func (f family) has(c Conn) bool { return uint32(len(c.Local.Addr().AsSlice())) == f.sz }

// chunk is how many connections go in one message.
const chunk = 256

// fill makes everything in a table. The chains come last, in one transaction, so
// that all connections are locked at once.
func fill(nl *nftables.Conn, t *nftables.Table, conns []Conn) error {
	sets := make([]*nftables.Set, len(families))
	for i, f := range families {
		sets[i] = f.set(t)
		if err := nl.AddSet(sets[i], nil); err != nil {
			return err
		}
	}
	if err := nl.Flush(); err != nil {
		return err
	}
	for i, f := range families {
		var es []nftables.SetElement
		seen := map[Conn]bool{}
		for _, c := range conns {
			if f.has(c) && !seen[c] {
				seen[c] = true
				es = append(es, nftables.SetElement{Key: f.key(c)})
			}
		}
		for len(es) > 0 {
			n := min(chunk, len(es))
			if err := nl.SetAddElements(sets[i], es[:n]); err != nil {
				return err
			}
			if err := nl.Flush(); err != nil {
				return err
			}
			es = es[n:]
		}
	}
	for _, dir := range []struct {
		name string
		hook *nftables.ChainHook
		prio nftables.ChainPriority
		in   bool
	}{
		{"input", nftables.ChainHookInput, 300, true},
		{"output", nftables.ChainHookOutput, -300, false},
	} {
		c := nl.AddChain(&nftables.Chain{Name: dir.name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: dir.hook, Priority: &dir.prio})
		nl.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(Mark)},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
		for i, f := range families {
			nl.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: f.drop(sets[i], dir.in)})
		}
	}
	return nl.Flush()
}

// register is NFT_REG32_00: registers of 32 bits follow it.
const register = unix.NFT_REG32_00

// drop is a rule: TCP of this family whose addresses and ports, those of the
// locked end first, are in the set.
func (f family) drop(set *nftables.Set, in bool) []expr.Any {
	local, peer, localPort, peerPort := f.src, f.dst, uint32(0), uint32(2)
	if in {
		local, peer, localPort, peerPort = peer, local, peerPort, localPort
	}
	words := f.sz / 4
	load := func(base expr.PayloadBase, off, n, reg uint32) expr.Any {
		return &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: register + reg, Base: base, Offset: off, Len: n}
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{f.proto}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		load(expr.PayloadBaseNetworkHeader, local, f.sz, 0),
		load(expr.PayloadBaseTransportHeader, localPort, 2, words),
		load(expr.PayloadBaseNetworkHeader, peer, f.sz, words+1),
		load(expr.PayloadBaseTransportHeader, peerPort, 2, 2*words+1),
		&expr.Lookup{SourceRegister: register, SetName: set.Name, SetID: set.ID},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

func (c Conn) String() string { return c.Local.String() + " ↔ " + c.Peer.String() }
