package engine

import "godwit/engine/netlock"

// HeldLock is a network lock that a dump left for its restore (LockNftables).
type HeldLock struct {
	ID    string   // as the inventory has it (dump_criu_run_id)
	Table string   // of nftables, family inet
	Conns []string // "local ↔ peer"; none if the lock is CRIU's
}

// NetworkLocks lists the network locks of this network namespace, CRIU's included.
func NetworkLocks() ([]HeldLock, error) {
	list, err := netlock.List()
	if err != nil {
		return nil, err
	}
	var out []HeldLock
	for _, k := range list {
		h := HeldLock{ID: k.ID, Table: netlock.TableName(k.ID)}
		for _, c := range k.Conns {
			h.Conns = append(h.Conns, c.String())
		}
		out = append(out, h)
	}
	return out, nil
}

// UnlockNetwork removes a network lock; found says whether there was one. The
// connections of a dump that is yet to be restored end by it.
func UnlockNetwork(id string) (found bool, err error) { return netlock.Remove(id, nil) }
