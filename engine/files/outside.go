package files

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
)

// outsider is a process outside the tree that holds something of the tree's.
type outsider struct {
	pid  int
	comm string
	fd   int
}

// outsiders finds, by the texts of /proc links, which processes outside the tree
// have pipes, fifos and sockets open. It reads the links of all processes once.
type outsiders struct {
	byLink map[string]outsider
}

// outside says who outside the tree has an open file with this link, if anybody.
// Descriptors that dumpers hold do not count.
func (d *Dumper) outside(link string) (outsider, bool) {
	if d.others == nil {
		d.others = d.scanOthers()
	}
	x, ok := d.others.byLink[link]
	return x, ok
}

func (d *Dumper) scanOthers() *outsiders {
	// Only links that the tree has are of interest.
	ours := map[string]bool{}
	for _, o := range d.objects {
		switch o.mode() & unix.S_IFMT {
		case unix.S_IFIFO, unix.S_IFSOCK:
			ours[o.link] = true
			ours[socketLink(o)] = true // that of an internet socket tells of its address, too
			if s, ok := o.state.(*unixState); ok && s.diag.peer != 0 {
				ours[fmt.Sprintf("socket:[%d]", s.diag.peer)] = true
			}
		}
	}
	out := &outsiders{byLink: map[string]outsider{}}
	pids, err := procfs.Pids()
	if err != nil {
		return out
	}
	self := os.Getpid()
	for _, pid := range pids {
		if d.inside[pid] || d.dry() && d.descends(pid) {
			continue
		}
		fds, err := procfs.Fds(pid)
		if err != nil {
			continue // ended, or not ours to see
		}
		for _, fd := range fds {
			if _, mine := held.Load(fd); mine && pid == self {
				continue
			}
			link, err := procfs.FdLink(pid, fd)
			if err != nil || !ours[link] {
				continue
			}
			if _, ok := out.byLink[link]; !ok {
				comm, _ := procfs.Comm(pid)
				out.byLink[link] = outsider{pid: pid, comm: comm, fd: fd}
			}
		}
	}
	return out
}

// socketLink is the text of the /proc links to a socket.
func socketLink(o *object) string { return fmt.Sprintf("socket:[%d]", o.stat.Ino) }

// descends says whether pid is a descendant of the tree that was born since its
// processes were listed, which happens while it runs.
func (d *Dumper) descends(pid int) bool {
	for range 64 { // a parent that ends meanwhile could make it a circle
		st, err := procfs.ReadStat(pid)
		if err != nil {
			return true // it has ended
		}
		if pid = st.PPid; pid == 0 {
			return false
		}
		if d.inside[pid] {
			return true
		}
	}
	return false
}
