package files

import (
	"fmt"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"godwit/engine/plan"
)

// Support lists the kinds of open files: those of the table of kinds, which are
// carried, and those that are known and refused.
func Support() []plan.Support {
	var out []plan.Support
	var types []fdinfo.FdTypes
	for _, k := range kinds {
		out = append(out, plan.Support{Kind: k.name, Note: k.note})
		types = append(types, k.typ)
	}
	out = append(out,
		plan.Support{Kind: "TCP connections of which both ends are in the tree", With: "--tcp-established", Note: "in every state"},
		plan.Support{Kind: "TCP connections that lead out of the tree", With: "--tcp-established",
			Note: "in every state, to the same address; the network is locked for them from the dump to the restore (--network-lock); migrations refuse them"},
		plan.Support{Kind: "TCP connections that are to end", With: "--tcp-close", Note: "come back closed"},
		plan.Support{Kind: "TCP connections that wait to be accepted", With: "--skip-in-flight", Note: "are left behind, and end"},
		plan.Support{Kind: "unix datagram sockets that are connected to a named one outside the tree", With: "--ext-unix-sk", Note: "are connected to that name again"},
		plan.Support{Kind: "unix sockets of which the peer is outside the tree", With: "--external unix[inode]",
			Note: "the restore puts a socket that is handed in (--inherit-fd fd[N]:socket:[inode]) in their place, or they hang up"},
		plan.Support{Kind: "pipes, and connections of stream unix sockets, that lead out of the tree", With: "godwit migrate --external KEY=proxy",
			Note: "their bytes go on flowing over the bus, in both directions, for as long as the agents of both hosts run; pipes in packet mode, those of which the tree has both ends, and descriptors in flight are refused"},
		plan.Support{Kind: "a terminal whose master stays where it is", With: "godwit migrate --external KEY=proxy",
			Note: "the tree gets a new one; bytes, sizes, hang-ups and the exit status go on flowing over the bus; output only where another process reads what is typed; terminals opened as /dev/tty alone, consoles and serial lines are refused"},
		plan.Support{Kind: "connections of unix sockets from outside the tree that wait to be accepted", With: "--skip-in-flight", Note: "are left behind, and end"},
		plan.Support{Kind: "files that a destination lacks, or has in another state", With: "an entry with resolver carry (--external 'path:/srv/app/**=carry')",
			Note: "in migrations; content, owner, mode, extended attributes and times travel, of a directory all that is in it but devices and other mounts; newer files are replaced with carry,overwrite only, and nothing is removed"},
		plan.Support{Kind: "file locks and leases", With: "--file-locks"},
		plan.Support{Kind: "the terminal that the tree was started on", With: "--shell-job, --attach, --external KEY=proxy, or --external tty[rdev:dev]",
			Note: "the restore puts its own terminal, or one that is handed in, in its place"},
		plan.Support{Kind: "files whose name was removed and of which no other name is found", With: "--link-remap", Note: "get one more name, link_remap.N, until the restore"},
		plan.Support{Kind: "nodes of devices that are no longer at their path", With: "--evasive-devices", Note: "/dev/null and its like without it"})
	out = append(out,
		plan.Support{Kind: "options, multicast groups and classic filters of sockets",
			Note: "all that can be read; nobody can tell of IP_MULTICAST_IF given by index alone, a sticky IPV6_PKTINFO, anycast groups, leased flow labels, SO_BUSY_POLL_BUDGET and programs of SO_ATTACH_REUSEPORT_CBPF and _EBPF"},
		plan.Support{Kind: "datagrams and answers to pings that wait at UDP, UDP-Lite and ping sockets", Note: "with their senders; those from link-local addresses of IPv6, and those behind an error that was not reported yet, are lost"},
		plan.Support{Kind: "packets that wait at raw sockets", Note: "those of ICMP, echo replies of ICMPv6, and of protocols that the kernel itself has no use for; others (UDP, TCP, IGMP, tunnels) are lost"},
		plan.Support{Kind: "interfaces of TUN/TAP descriptors", Note: "one that is not there is made again with its settings, addresses and routes; one that is there is attached to; packets that wait to be read are lost"},
		plan.Support{Kind: "eBPF programs on sockets, classic filters on TCP connections", Refused: true, Note: "detach them"},
		plan.Support{Kind: "numbered transmit timestamps and sends without copying (SOF_TIMESTAMPING_OPT_ID, SO_ZEROCOPY), UDP_ENCAP", Refused: true, Note: "let the program close the socket"},
		plan.Support{Kind: "datagrams of UDP that are held back (UDP_CORK, MSG_MORE)", Refused: true, Note: "let the program send them"},
		plan.Support{Kind: "netlink sockets at which messages wait, packets are queued or logged (NETLINK_NETFILTER), processes reported (proc connector), or of the audit daemon", Refused: true},
		plan.Support{Kind: "packet sockets with rings, or shared out by a BPF program", Refused: true},
		plan.Support{Kind: "BPF maps of other types, over 32 MiB, used by a loaded program or held outside of the tree", Refused: true, Note: "let the program close them"})
	seen := map[string]bool{}
	for _, r := range refusedLinks {
		if !seen[r.what] {
			seen[r.what] = true
			out = append(out, plan.Support{Kind: r.what, Refused: true, Note: r.hint})
		}
	}
	reason, hint := unsupported(&object{link: "/dev/x", stat: unix.Stat_t{Mode: unix.S_IFBLK}})
	out = append(out, plan.Support{Kind: reason, Refused: true, Note: hint})
	var names []string
	for f, name := range families {
		switch f {
		case unix.AF_INET, unix.AF_INET6, unix.AF_UNIX:
			continue
		case unix.AF_NETLINK:
			if slices.Contains(types, fdinfo.FdTypes_NETLINKSK) {
				continue
			}
		case unix.AF_PACKET:
			if slices.Contains(types, fdinfo.FdTypes_PACKETSK) {
				continue
			}
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return append(out, plan.Support{
		Kind: fmt.Sprintf("sockets of other families are not carried: %s", strings.Join(names, ", ")), Refused: true, Note: "let the program close it",
	})
}
