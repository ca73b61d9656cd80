package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// Stat is /proc/PID/stat or /proc/PID/task/TID/stat, all fields in their order
// (proc_pid_stat(5), fs/proc/array.c do_task_stat). Addresses are 0 without
// permission to trace the process.
type Stat struct {
	Pid         int
	Comm        string // raw: may hold any byte but NUL
	State       byte   // R S D Z T t X I P
	PPid        int
	Pgrp        int
	Session     int
	TTYNr       int32 // device of the controlling terminal, 0: none
	TTYPgrp     int   // foreground process group of it, -1: none
	Flags       uint32
	MinFlt      uint64
	CMinFlt     uint64
	MajFlt      uint64
	CMajFlt     uint64
	UTime       uint64 // clock ticks
	STime       uint64
	CUTime      int64
	CSTime      int64
	Priority    int64
	Nice        int64
	NumThreads  int
	ItRealValue int64  // always 0
	StartTime   uint64 // clock ticks since boot, of the boot-time clock
	VSize       uint64 // bytes
	RSS         int64  // pages
	RSSLim      uint64
	StartCode   uint64
	EndCode     uint64
	StartStack  uint64
	KstkESP     uint64
	KstkEIP     uint64
	Signal      uint64
	Blocked     uint64
	SigIgnore   uint64
	SigCatch    uint64
	Wchan       uint64
	NSwap       uint64
	CNSwap      uint64
	ExitSignal  int
	Processor   int
	RTPriority  uint32
	Policy      uint32
	DelayBlkIO  uint64
	GuestTime   uint64
	CGuestTime  int64
	StartData   uint64
	EndData     uint64
	StartBrk    uint64
	ArgStart    uint64
	ArgEnd      uint64
	EnvStart    uint64
	EnvEnd      uint64
	ExitCode    int // as wait(2) has it
}

// Zombie reports whether the task has exited and waits to be reaped.
func (s *Stat) Zombie() bool { return s.State == 'Z' }

// Ended tells whether the whole process has ended and waits to be reaped. A first
// thread is a zombie, too, while others run, and while one of them executes a
// program and takes its place; it is counted among the threads until then.
func (s *Stat) Ended() bool { return s.State == 'Z' && s.NumThreads == 1 }

// ParseStat parses a stat file.
func ParseStat(b []byte) (Stat, error) {
	var s Stat
	open := bytes.IndexByte(b, '(')
	// A comm may hold ") " itself; nothing behind it does.
	end := bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return Stat{}, errors.New("no command name in parentheses")
	}
	pid, err := signed(strings.TrimSpace(string(b[:open])), 32)
	if err != nil {
		return Stat{}, fmt.Errorf("pid: %w", err)
	}
	s.Pid = int(pid)
	s.Comm = string(b[open+1 : end])
	rest := string(b[end+1:])
	state, rest := field(strings.TrimRight(rest, "\n"))
	if len(state) != 1 {
		return Stat{}, fmt.Errorf("state %q", clip(state))
	}
	s.State = state[0]
	for i, dst := range []any{
		&s.PPid, &s.Pgrp, &s.Session, &s.TTYNr, &s.TTYPgrp, &s.Flags, &s.MinFlt, &s.CMinFlt, &s.MajFlt, &s.CMajFlt,
		&s.UTime, &s.STime, &s.CUTime, &s.CSTime, &s.Priority, &s.Nice, &s.NumThreads, &s.ItRealValue, &s.StartTime,
		&s.VSize, &s.RSS, &s.RSSLim, &s.StartCode, &s.EndCode, &s.StartStack, &s.KstkESP, &s.KstkEIP,
		&s.Signal, &s.Blocked, &s.SigIgnore, &s.SigCatch, &s.Wchan, &s.NSwap, &s.CNSwap, &s.ExitSignal, &s.Processor,
		&s.RTPriority, &s.Policy, &s.DelayBlkIO, &s.GuestTime, &s.CGuestTime, &s.StartData, &s.EndData, &s.StartBrk,
		&s.ArgStart, &s.ArgEnd, &s.EnvStart, &s.EnvEnd, &s.ExitCode,
	} {
		var word string
		word, rest = field(rest)
		if err := set(dst, word, 10); err != nil {
			return Stat{}, fmt.Errorf("field %d: %w", i+4, err)
		}
	}
	return s, nil
}

// set parses a word into an integer; int is what C has as int.
func set(dst any, word string, base int) error {
	var err error
	var u uint64
	var n int64
	switch d := dst.(type) {
	case *int:
		n, err = signed(word, 32)
		*d = int(n)
	case *int32:
		n, err = signed(word, 32)
		*d = int32(n)
	case *int64:
		*d, err = signed(word, 64)
	case *uint32:
		u, err = number(word, base, 32)
		*d = uint32(u)
	case *uint64:
		*d, err = number(word, base, 64)
	default:
		err = fmt.Errorf("no parser for %T", dst)
	}
	return err
}

// ReadStat reads /proc/PID/stat.
func ReadStat(pid int) (Stat, error) { return read(Path(pid, "stat"), ParseStat) }

// ReadTaskStat reads the stat file of one thread.
func ReadTaskStat(pid, tid int) (Stat, error) { return read(TaskPath(pid, tid, "stat"), ParseStat) }
