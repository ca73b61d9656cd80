package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

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

// Attach lets another command take the place of one that has a terminal, of which
// nothing is heard any more.
func (a *Agent) Attach(_ context.Context, req *wire.AttachRequest) (*wire.AttachReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	at := req.Attachment
	for _, name := range []string{at.GetId(), at.GetPeer()} {
		if err := transport.CheckName(name); err != nil {
			return nil, invalid("the attachment: %w", err)
		}
	}
	p := a.proxies.of(attachedKey + at.Id)
	if p == nil {
		return nil, wire.Errorf(wire.Code_CODE_NOT_FOUND, "no tree of this host has a terminal of migration %s: it has ended, has hung up, or the tree has moved on", at.Id)
	}
	if heard := p.relay.Stats().Heard; time.Since(heard) < transport.RelayStalled {
		return nil, wire.Errorf(wire.Code_CODE_CONFLICT, "another command is attached to migration %s: end it, and wait for %s", at.Id, transport.RelayStalled)
	}
	n, err := a.proxies.succeed(p, at)
	if err != nil {
		return nil, err
	}
	return &wire.AttachReply{Epoch: n.info.Epoch}, nil
}

// succeed puts another tree's end in the place of one whose home is lost. It goes on
// with what home had not taken; what was typed and not given to the tree is lost.
func (ps *proxies) succeed(old *proxy, at *wire.Attachment) (*proxy, error) {
	p := &proxy{ps: ps, info: proto.CloneOf(old.info), migration: old.migration, log: old.log, key: old.key, pump: old.pump,
		patience: time.Duration(at.PatienceMs) * time.Millisecond}
	p.info.Home, p.info.Epoch = at.Peer, old.info.Epoch+1
	ps.mu.Lock()
	if ps.trees[at.Id] != old {
		ps.mu.Unlock()
		return nil, wire.Errorf(wire.Code_CODE_CONFLICT, "another command has come before this one")
	}
	ps.trees[at.Id] = p
	over := false
	old.finished.Do(func() { over = true })
	p.pump.halt()
	p.relay = old.relay.Heir(transport.RelayConfig{ID: at.Id, Host: ps.host, Peer: at.Peer, Epoch: p.info.Epoch, Reads: true, Writes: true,
		Send: ps.send, Chunk: ps.bus.Chunk(), Logger: p.log})
	p.pump.relay = p.relay
	ps.mu.Unlock()
	if !over {
		p.drop()
		return nil, wire.Errorf(wire.Code_CODE_NOT_FOUND, "the terminal of migration %s has just ended", at.Id)
	}
	old.relay.Farewell() // should it come back
	old.relay.Leave()
	if err := p.begin(); err != nil {
		p.drop()
		return nil, err
	}
	if size, err := winsize(at.Size); err == nil {
		if err := p.pump.resize(size); err != nil {
			p.log.Debug("the terminal gets no other size", "error", err)
		}
	}
	return p, nil
}

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
