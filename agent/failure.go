package agent

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine"
	"godwit/wire"
)

// failure is err as it travels: with this host, the phase it happened in, and
// the code that fits what the engine said. A *wire.Failure in the chain keeps
// its own code, host and phase. Preconditions: err is not nil.
func failure(err error, host string, phase wire.State) *wire.Failure {
	name := ""
	if phase != wire.State_STATE_UNSPECIFIED {
		name = phase.Phase()
	}
	if f, ok := errors.AsType[*wire.Failure](err); ok {
		if any(f) == any(err) { // the failure itself, not something around it
			return f.At(host, name)
		}
		e := wire.ErrorOf(err)
		g := &wire.Failure{Code: e.Code, Message: e.Message, Host: e.Host, Phase: e.Phase, Problems: e.Problems, Cause: err}
		return g.At(host, name)
	}
	if r, ok := errors.AsType[*engine.Refusal](err); ok {
		return &wire.Failure{
			Code: wire.Code_CODE_REFUSED, Message: r.Doing + " refused, nothing was touched", Host: host, Phase: name,
			Problems: problems(r.Problems), Cause: err,
		}
	}
	code := wire.Code_CODE_INTERNAL
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, os.ErrNotExist) && phase == wire.State_STATE_PREFLIGHT:
		code = wire.Code_CODE_NOT_FOUND
	case errors.Is(err, context.DeadlineExceeded):
		code = wire.Code_CODE_UNAVAILABLE
	}
	return &wire.Failure{Code: code, Message: err.Error(), Host: host, Phase: name, Cause: err}
}
