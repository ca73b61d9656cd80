package agent

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"godwit/configs/external"
	"godwit/wire"
)

// provisions are the descriptors that commands on this host keep ready for
// trees that land here. Each belongs to one connection on the agent's socket and
// goes with it, unless a migration has taken it by then.
type provisions struct {
	log hclog.Logger

	mu   sync.Mutex
	list []*provision
}

// provision is one of them.
//
//	ready ─► held (prepare) ─► used (the tree runs)
//	  ▲          │ abort
//	  └──────────┘
type provision struct {
	req    localRequest
	match  func(*wire.OpenObject) bool
	file   *os.File
	conn   *net.UnixConn
	events chan localEvent

	holder, key string // migration that has it, and for what; empty: none
}

// name names a provision in messages.
func (p *provision) name() string {
	if p.req.What == "" {
		return p.req.Selector
	}
	return fmt.Sprintf("%s (%s)", p.req.Selector, p.req.What)
}

// serve keeps a descriptor until it is used or its connection ends. It takes
// over file. An error means that it was never kept.
func (ps *provisions) serve(c *net.UnixConn, req localRequest, file *os.File) error {
	defer func() { _ = file.Close() }()
	match, err := selectorOf(req.Selector)
	if err != nil {
		return err
	}
	p := &provision{req: req, match: match, file: file, conn: c, events: make(chan localEvent, 16)}
	if err := ps.add(p); err != nil {
		return err
	}
	defer ps.remove(p)
	ps.log.Info("a file is provided", "selector", req.Selector, "file", req.What)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		_, files, _ := readPacket(c) // nothing is expected but the end
		closeAll(files)
	}()
	p.tell(localEvent{Event: eventReady})
	for {
		select {
		case e := <-p.events:
			if err := sendEvent(c, e); err != nil || e.Event == eventUsed {
				return nil
			}
		case <-closed:
			ps.log.Info("a provided file was withdrawn", "selector", req.Selector, "file", req.What)
			return nil
		}
	}
}

// tell queues an event for the provider; one who reads none misses some.
func (p *provision) tell(e localEvent) {
	select {
	case p.events <- e:
	default:
	}
}

func (ps *provisions) add(p *provision) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, o := range ps.list {
		if o.req.Selector == p.req.Selector && o.alive() {
			return fmt.Errorf("%s is provided already; withdraw that one first", o.name())
		}
	}
	ps.list = append(ps.list, p)
	return nil
}

func (ps *provisions) remove(p *provision) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.list = slices.DeleteFunc(ps.list, func(o *provision) bool { return o == p })
}

// alive says whether the provider is still connected, even if that has not
// been noticed yet.
func (p *provision) alive() bool {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, rerr := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ended = n == 0 && rerr == nil || rerr != nil && rerr != unix.EAGAIN && rerr != unix.EINTR
	})
	return err == nil && !ended
}

// matching are the provisions for any of the objects.
func (ps *provisions) matching(objects []*wire.OpenObject) []*provision {
	var out []*provision
	for _, p := range ps.list {
		if slices.ContainsFunc(objects, p.match) && p.alive() {
			out = append(out, p)
		}
	}
	return out
}

// take gives a migration the file that is provided for a key, as a duplicate of
// its own. A release or use of the provision must follow.
func (ps *provisions) take(migration, key string, objects []*wire.OpenObject) (*provision, *os.File, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	found := ps.matching(objects)
	switch {
	case len(found) == 0 && len(ps.list) == 0:
		return nil, nil, fmt.Errorf("nobody provides a file for it on this host")
	case len(found) == 0:
		return nil, nil, fmt.Errorf("nobody provides a file for it on this host; provided are only %s", names(ps.list))
	case len(found) > 1:
		return nil, nil, fmt.Errorf("%d files are provided for it (%s)", len(found), names(found))
	}
	p := found[0]
	switch {
	case p.holder == migration:
		return nil, nil, fmt.Errorf("the one file that is provided, %s, is taken for %s already", p.name(), p.key)
	case p.holder != "":
		return nil, nil, fmt.Errorf("the file that is provided, %s, is held for migration %s", p.name(), p.holder)
	}
	n, err := unix.FcntlInt(p.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	p.holder, p.key = migration, key
	p.tell(localEvent{Event: eventHeld, Migration: migration, Text: "for " + key})
	return p, os.NewFile(uintptr(n), p.name()), nil
}

func names(list []*provision) string {
	var s []string
	for _, p := range list {
		s = append(s, p.name())
	}
	return strings.Join(s, ", ")
}

// release makes a provision ready again: the migration that held it is over
// without a tree here.
func (ps *provisions) release(p *provision) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.holder == "" {
		return
	}
	p.tell(localEvent{Event: eventReleased, Migration: p.holder})
	p.holder, p.key = "", ""
}

// use ends a provision: a tree runs with it.
func (ps *provisions) use(p *provision) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.holder == "" {
		return
	}
	p.tell(localEvent{Event: eventUsed, Migration: p.holder, Text: "for " + p.key})
	ps.list = slices.DeleteFunc(ps.list, func(o *provision) bool { return o == p })
}

// selectorOf reads a selector as what it says of an object.
func selectorOf(s string) (func(*wire.OpenObject) bool, error) {
	sel, err := external.ParseSelector(s)
	if err != nil {
		return nil, err
	}
	return func(o *wire.OpenObject) bool { return sel.Matches(selectable(o)) }, nil
}

// selectable is an object as selectors look at it.
func selectable(o *wire.OpenObject) external.Object {
	x := external.Object{Key: o.Key, Kind: o.Kind, Path: o.Path}
	for _, h := range o.Holders {
		fds := make([]int, len(h.Fds))
		for i, n := range h.Fds {
			fds[i] = int(n)
		}
		x.Holders = append(x.Holders, external.Holder{Pid: int(h.Pid), Comm: h.Comm, FDs: fds, Roles: h.Roles})
	}
	return x
}
