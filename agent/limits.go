package agent

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"godwit/engine/procfs"
	"godwit/wire"
)

// Limits are how many migrations a host has a part in at a time; 0: any number.
//
// A migration takes its place at the source first (Reserve), then that at the
// destination (Prepare). Who has the second waits for nobody, so that hosts never
// wait for each other in a circle.
type Limits struct {
	Outgoing, Incoming int
}

// Reserve takes a place for a tree that is about to leave, or gives it back.
func (a *Agent) Reserve(_ context.Context, req *wire.ReserveRequest) (*wire.ReserveReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	if req.Id == "" || req.Pid <= 0 {
		return nil, invalid("the request lacks the migration's id or pid")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if req.Release {
		delete(a.reserved, req.Id)
		return &wire.ReserveReply{}, nil
	}
	if a.stopping {
		return nil, errStopping(a.cfg.Host)
	}
	if a.sources[req.Id] == nil {
		if err := a.mayLeave(req.Id, int(req.Pid)); err != nil {
			return nil, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
		}
		a.reserved[req.Id] = time.Now().Add(a.cfg.Timeouts.Prepared)
	}
	return &wire.ReserveReply{}, nil
}

// mayLeave says why the tree of pid cannot leave now: another migration is about it,
// a part of it, or a tree that it is a part of, or there are too many. Preconditions:
// mu is held.
func (a *Agent) mayLeave(id string, pid int) error {
	var others []string
	for other, s := range a.sources {
		if other == id {
			continue
		}
		others = append(others, other)
		switch p := int(s.req.Pid); {
		case p == pid:
			return wire.Errorf(wire.Code_CODE_CONFLICT, "pid %d is already being moved by migration %s", pid, other)
		case below(pid, p):
			return wire.Errorf(wire.Code_CODE_CONFLICT, "pid %d is part of the tree of pid %d, which migration %s moves", pid, p, other)
		case below(p, pid):
			return wire.Errorf(wire.Code_CODE_CONFLICT, "pid %d is part of the tree of pid %d, and migration %s moves it by itself", p, pid, other)
		}
	}
	for other, until := range a.reserved {
		if time.Now().After(until) {
			delete(a.reserved, other)
		} else if other != id {
			others = append(others, other)
		}
	}
	return busy(a.cfg.Host, "leave", a.cfg.Limits.Outgoing, others)
}

// mayLand says why no further tree can land now. Preconditions: mu is held.
func (a *Agent) mayLand() error {
	return busy(a.cfg.Host, "land", a.cfg.Limits.Incoming, slices.Collect(maps.Keys(a.destinations)))
}

// busy says why a host has no place beside the migrations of names; nil: it has.
func busy(host, what string, limit int, names []string) error {
	if limit == 0 || len(names) < limit {
		return nil
	}
	slices.Sort(names)
	if len(names) > 3 {
		names = append(names[:3], "…")
	}
	return wire.Errorf(wire.Code_CODE_BUSY, "%s lets %d trees %s at a time, and so many do (migrations %s)", host, limit, what, strings.Join(names, ", "))
}

// below says whether pid is a descendant of ancestor.
func below(pid, ancestor int) bool {
	for pid > 1 {
		st, err := procfs.ReadStat(pid)
		if err != nil || st.PPid == ancestor {
			return err == nil
		}
		pid = st.PPid
	}
	return false
}
