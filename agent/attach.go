package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/engine/plan"
	"godwit/transport"
	"godwit/wire"
)

// A tree that lands with an attachment (godwit migrate --attach) gets a new terminal
// of this host in the place of that which it was started on. The bytes go to and from
// the terminal of whoever asked for the migration, by a relay of which that is home.
//
//	tree ─ slave │ master ─ pump ═ relay over the bus ═ godwit migrate ─ its terminal

// holdAttachment makes the terminal, which is idle until the commit.
func (a *Agent) holdAttachment(migration string, at *wire.Attachment) (*held, error) {
	for _, name := range []string{at.Id, at.Peer} {
		if err := transport.CheckName(name); err != nil {
			return nil, invalid("the attachment: %w", err)
		}
	}
	size, err := winsize(at.Size)
	if err != nil {
		return nil, err
	}
	master, slave, err := engine.NewTerminal(size)
	if err != nil {
		return nil, err
	}
	x := &held{file: slave}
	var p *proxy
	x.start = func(context.Context) (err error) {
		info := &wire.Proxy{Id: at.Id, Home: at.Peer, Epoch: 1, Object: "the terminal of migration " + migration}
		m := master
		if master = nil; m == nil {
			return errors.New("the terminal was let go already")
		}
		if p, err = a.proxies.add(info, migration, false, []*os.File{m}); err != nil {
			return err
		}
		p.key, p.patience = attachedKey+at.Id, time.Duration(at.PatienceMs)*time.Millisecond
		return p.begin()
	}
	x.release = func() {
		if p != nil {
			p.drop()
		}
		if master != nil {
			_ = master.Close()
		}
	}
	return x, nil
}

// attachedKey begins the key of a proxy whose tree's end is a terminal. No object has
// such a key: a tree that moves on is attached anew.
const attachedKey = "attached "

// winsize reads a size, which must be that of a terminal.
func winsize(s *wire.WindowSize) (*unix.Winsize, error) {
	if max(s.GetRows(), s.GetColumns(), s.GetXPixels(), s.GetYPixels()) > 1<<16-1 {
		return nil, invalid("no terminal has %d rows of %d columns", s.GetRows(), s.GetColumns())
	}
	return &unix.Winsize{Row: uint16(s.GetRows()), Col: uint16(s.GetColumns()), Xpixel: uint16(s.GetXPixels()), Ypixel: uint16(s.GetYPixels())}, nil
}

// Resize gives a terminal that a tree is attached to another size.
func (a *Agent) Resize(_ context.Context, req *wire.ResizeRequest) (*wire.ResizeReply, error) {
	if err := a.proxies.resize(req.Id, req.Size); err != nil {
		return nil, err
	}
	return &wire.ResizeReply{}, nil
}

// attachable says why a tree that was looked at cannot be attached; nil: it can.
func attachable(p *engine.Plan) error {
	if slices.ContainsFunc(p.Objects, func(o plan.Object) bool { return o.Kind == "tty" }) {
		return nil
	}
	return wire.Errorf(wire.Code_CODE_REFUSED, "the tree has no terminal open, to which it could be attached at its destination; leave out --attach")
}
