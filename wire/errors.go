package wire

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
)

// Exit codes of the commands, the same in all of them.
const (
	ExitDone         = 0 // done
	ExitFailed       = 1 // failed
	ExitUsage        = 2 // the command line or a request was wrong
	ExitAborted      = 3 // aborted, the tree runs on at the source
	ExitRefused      = 4 // refused by preflight, nothing was touched
	ExitUnknownState = 5 // state unknown, an operator must look
)

// ExitCode is the exit code of a command that failed with c. A code that this
// build does not know is a plain failure.
func (c Code) ExitCode() int {
	switch c {
	case Code_CODE_INVALID:
		return ExitUsage
	case Code_CODE_REFUSED:
		return ExitRefused
	case Code_CODE_ABORTED:
		return ExitAborted
	case Code_CODE_UNKNOWN_STATE:
		return ExitUnknownState
	}
	return ExitFailed
}

// Failure is an Error as a Go error: what a party returns so that the other
// side of the bus gets code, place and problems with the sentence, and what
// that side sees. Find it with errors.AsType[*Failure] or use CodeOf.
type Failure struct {
	Code     Code
	Message  string     // one sentence, without host and phase
	Host     string     // where it happened; empty: not said
	Phase    string     // name of a State such as "FREEZING"; empty: none
	Problems []*Problem // everything that stands in the way, for CODE_REFUSED
	// Cause is the error behind it on this side of the bus; it does not travel.
	Cause error
}

// Errorf returns a Failure with the given code. Like fmt.Errorf it wraps the
// operand of %w, which becomes the Cause.
func Errorf(code Code, format string, args ...any) *Failure {
	err := fmt.Errorf(format, args...)
	return &Failure{Code: code, Message: err.Error(), Cause: errors.Unwrap(err)}
}

// At returns a copy of f that names host and phase where f did not yet.
func (f *Failure) At(host, phase string) *Failure {
	g := *f
	if g.Host == "" {
		g.Host = host
	}
	if g.Phase == "" {
		g.Phase = phase
	}
	return &g
}

// Error is the sentence for people: host and phase first, then the message,
// then one line for each problem.
func (f *Failure) Error() string {
	var b strings.Builder
	if f.Host != "" {
		b.WriteString(f.Host + ": ")
	}
	if f.Phase != "" {
		b.WriteString(strings.ToLower(strings.ReplaceAll(f.Phase, "_", " ")) + ": ")
	}
	b.WriteString(f.Message)
	for _, p := range f.Problems {
		b.WriteString("\n  - " + p.Sentence())
	}
	return b.String()
}

// Unwrap returns the Cause.
func (f *Failure) Unwrap() error { return f.Cause }

// Proto is f in the form that travels.
func (f *Failure) Proto() *Error {
	e := &Error{Code: f.Code, Message: f.Message, Host: f.Host, Phase: f.Phase}
	for _, p := range f.Problems {
		e.Problems = append(e.Problems, proto.CloneOf(p))
	}
	return e
}

// Sentence says the problem in one line: object, reason, hint.
func (p *Problem) Sentence() string {
	var b strings.Builder
	if o := p.GetObject(); o != nil {
		if o.Pid != 0 {
			fmt.Fprintf(&b, "pid %d ", o.Pid)
			if o.Comm != "" {
				fmt.Fprintf(&b, "(%s) ", o.Comm)
			}
		}
		if o.HasFd {
			fmt.Fprintf(&b, "fd %d ", o.Fd)
		}
		if o.Path != "" {
			b.WriteString(o.Path + " ")
		}
		if o.Key != "" {
			fmt.Fprintf(&b, "[key %s] ", o.Key)
		}
	}
	s := strings.TrimSuffix(b.String(), " ")
	if s != "" {
		s += ": "
	}
	s += p.GetReason()
	if p.GetHint() != "" {
		s += "; " + p.GetHint()
	}
	return s
}

// ErrorOf returns err in the form that travels; nil for nil. A Failure in the
// chain of err gives code, host, phase and problems; what was wrapped around
// it stays part of the message. Without one, a passed deadline is
// CODE_UNAVAILABLE and anything else CODE_INTERNAL.
func ErrorOf(err error) *Error {
	if err == nil {
		return nil
	}
	if f, ok := errors.AsType[*Failure](err); ok {
		e := f.Proto()
		// The chain's text holds the whole sentence of f; host, phase and
		// problems travel in their own fields and must not be said twice.
		e.Message = strings.Replace(err.Error(), f.Error(), f.Message, 1)
		return e
	}
	code := Code_CODE_INTERNAL
	if errors.Is(err, context.DeadlineExceeded) {
		code = Code_CODE_UNAVAILABLE
	}
	return &Error{Code: code, Message: err.Error()}
}

// Err returns e as a Go error of type *Failure; nil for nil.
func (e *Error) Err() error {
	if e == nil {
		return nil
	}
	return e.Failure()
}

// Failure is Err with its type; nil for nil.
func (e *Error) Failure() *Failure {
	if e == nil {
		return nil
	}
	f := &Failure{Code: e.Code, Message: e.Message, Host: e.Host, Phase: e.Phase}
	if f.Message == "" {
		f.Message = "failed without saying why (" + e.Code.String() + ")"
	}
	for _, p := range e.Problems {
		f.Problems = append(f.Problems, proto.CloneOf(p))
	}
	return f
}

// CodeOf returns the code of err: CODE_UNSPECIFIED for nil, otherwise what
// ErrorOf would send.
func CodeOf(err error) Code {
	if err == nil {
		return Code_CODE_UNSPECIFIED
	}
	return ErrorOf(err).Code
}

// ExitCode is the exit code of a command that ended with err.
func ExitCode(err error) int {
	if err == nil {
		return ExitDone
	}
	return CodeOf(err).ExitCode()
}
